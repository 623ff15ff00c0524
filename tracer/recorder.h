/* Gathers one side's router activations of a batch, in the trace's layout. */
#ifndef SIDA_TRACER_RECORDER_H
#define SIDA_TRACER_RECORDER_H

#include "formats/trace.h"
#include "runtime/model/model.h"

typedef struct sida_recorder {
    int32_t experts, top_k, top, layers[2];
    int side;             /* recorded now */
    const int64_t *base;  /* [S] first row of each sequence in the arrays below */
    sida_trace_rows rows; /* room for `capacity` rows of either side */
    int64_t capacity;
    uint32_t *order; /* scratch [E] */
} sida_recorder;

sida_status sida_recorder_init(sida_recorder *recorder, const sida_model_info *info, int32_t top);
void sida_recorder_free(sida_recorder *recorder);
/* Makes room for `rows` rows and says where each sequence's position 0 goes. */
sida_status sida_recorder_start(sida_recorder *recorder, int side, int64_t rows,
                                const int64_t *base);
/* sida_moe_driver.observe with the recorder as its context. */
sida_status sida_recorder_observe(void *recorder, const sida_moe_call *call);
/* Moves each sequence's first lengths[s] rows together, in the order of sequences. */
void sida_recorder_compact(sida_recorder *recorder, int32_t sequences, const int64_t *lengths);

#endif
