/* Inside formats/: names that the trace's writer and reader share. */
#ifndef SIDA_FORMATS_TRACE_INSIDE_H
#define SIDA_FORMATS_TRACE_INSIDE_H

#include "formats/trace.h"

#define SIDA_TRACE_FORMAT "sida-trace"
enum { SIDA_TRACE_VERSION = 1 };

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

#endif
