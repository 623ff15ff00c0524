/* Inside formats/: names that the trace's writer and reader share. */
#ifndef SIDA_FORMATS_TRACE_INSIDE_H
#define SIDA_FORMATS_TRACE_INSIDE_H

#include "formats/trace.h"

#define SIDA_TRACE_FORMAT "sida-trace"
enum {
    SIDA_TRACE_VERSION = 1,
    /* The largest that an attribute may claim. */
    SIDA_TRACE_MOST_D_MODEL = 1 << 24,
    SIDA_TRACE_MOST_VOCABULARY = 1 << 24,
    SIDA_TRACE_MOST_LAYERS = 65536 /* of both sides */
};

/* The datasets of a side, in the order of the schema. */
typedef enum sida_trace_field {
    SIDA_TRACE_TOKENS,
    SIDA_TRACE_OFFSETS,
    SIDA_TRACE_EXPERTS,
    SIDA_TRACE_ALPHA,
    SIDA_TRACE_DROPPED,
    SIDA_TRACE_TOP_IDS,
    SIDA_TRACE_TOP_LOGP,
    SIDA_TRACE_FIELDS
} sida_trace_field;

/* [side][field]: "encoder/tokens", … */
extern const char *const sida_trace_paths[2][SIDA_TRACE_FIELDS];

/* The longest line of a report, with its NUL. */
enum { SIDA_TRACE_LINE = 512 };
/* sida_trace_diagnose() of an open file. */
sida_status sida_trace_diagnose_file(sida_h5_file *file, sida_trace_report report, void *context);

#endif
