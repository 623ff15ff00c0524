/* The parts of an unfinished trace. */
#ifndef SIDA_TRACER_PARTS_H
#define SIDA_TRACER_PARTS_H

#include "formats/trace.h"
#include "tracer/tracer.h"

typedef struct sida_parts {
    char *folder;      /* OUTPUT.parts */
    int32_t count;     /* finished parts, 0 … count - 1 */
    int64_t sequences; /* in them */
    int64_t tokens[2];
    bool has_targets; /* of their corpus; known when count > 0 */
} sida_parts;

/* Looks for finished parts of `output`. They must carry the fingerprints and options of `expected`:
 * MISMATCH otherwise. */
sida_status sida_parts_find(sida_parts *out, const char *output, const sida_trace_info *expected);
void sida_parts_free(sida_parts *parts);
/* The file of part `index`; free(). */
sida_status sida_parts_name(char **out, const sida_parts *parts, int32_t index);
/* Makes the folder. */
sida_status sida_parts_create_folder(const sida_parts *parts);
/* Removes every part and the folder. */
sida_status sida_parts_remove(const sida_parts *parts);

/* MISMATCH unless the trace at `path` is of the same model, tokenizer, input and options; says
 * which differs. */
sida_status sida_parts_compare(const sida_trace_info *found, const char *path,
                               const sida_trace_info *expected);

#endif
