/* From a recording to rows in the trace's layout. */
#ifndef SIDA_TRACER_RECORDER_H
#define SIDA_TRACER_RECORDER_H

#include "formats/trace.h"
#include "runtime/model/model.h"

typedef struct sida_recorder {
    int32_t top_k, top, layers[2];
    sida_trace_rows rows; /* of the side gathered last; room for `capacity` rows of either */
    int64_t capacity;
    int64_t *base; /* [most sequences] first row of each sequence */
} sida_recorder;

sida_status sida_recorder_init(sida_recorder *recorder, const sida_trace_info *info,
                               int32_t sequences);
void sida_recorder_free(sida_recorder *recorder);
/* Gathers all calls of one side, which have come to the host: lengths[s] rows of each of
 * `sequences`, end to end. Tokens are left to the caller. FORMAT for logits that were not finite.
 */
sida_status sida_recorder_gather(sida_recorder *recorder, const sida_recording *recording, int side,
                                 int32_t sequences, const int64_t *lengths);

#endif
