/* Joins the parts of a trace while later ones are still being made. The output is written under its
 * temporary name in a thread of its own, which takes finished parts in their order; what is left
 * for the end is the last of them, the embedding, the checksum and the name. */
#ifndef SIDA_TRACER_MERGE_H
#define SIDA_TRACER_MERGE_H

#include "formats/trace.h"
#include "tracer/parts.h"

typedef struct sida_merger sida_merger;

/* Starts the thread with the parts that there are. All is borrowed; info->has_targets is read when
 * the first part comes. */
sida_status sida_merger_create(sida_merger **out, const sida_parts *parts, const char *output,
                               const sida_trace_info *info);
/* Part `index` is finished too: the one behind the last. What stopped the merging comes out here,
 * as it does of wait() and finish(). */
sida_status sida_merger_add(sida_merger *merger, int32_t index);
/* Until part `index`, which was added, has been merged. */
sida_status sida_merger_wait(sida_merger *merger, int32_t index);

/* Called once the token ids that occur are known, with ids ascending: fills rows [count, d_model]
 * of the model's input embedding. */
typedef sida_status sida_merger_embed_fn(void *context, const int32_t *ids, int32_t count,
                                         float *rows);
/* Once all parts were added, one at least: completes the output. Frees, also on error. */
sida_status sida_merger_finish(sida_merger *merger, sida_merger_embed_fn *embed, void *context);
/* Stops, and removes what was written; takes NULL. */
void sida_merger_abandon(sida_merger *merger);

#endif
