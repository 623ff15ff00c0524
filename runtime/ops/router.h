/* From router logits to experts and factors. */
#ifndef SIDA_RUNTIME_OPS_ROUTER_H
#define SIDA_RUNTIME_OPS_ROUTER_H

#include "runtime/backend/backend.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct sida_router_call {
    int32_t *experts;    /* [n, k] out: best first, ties to the lower id */
    float *alpha;        /* [n, k] out: softmax over all E (of the chosen ones if renormalise) */
    const float *logits; /* [n, E] */
    int64_t n;
    int32_t experts_total, k;
    bool renormalise;
    /* guided routing: token i chooses among allowed[set_of[i]] only; NULL: among all.
     * [sets, E] bytes, non-zero: allowed; each set has at least k. */
    const uint8_t *allowed;
    const int32_t *set_of; /* [n] */
} sida_router_call;

typedef sida_status sida_router_fn(sida_stream *stream, const sida_router_call *call);
sida_router_fn sida_router_cpu;

/* Capacity (Fedus et al. 2022, as Hugging Face enforces it): in each sequence, in token order, a
 * choice of an expert that has taken `capacity` tokens already is dropped. dropped [n]: 1 where
 * the token's choice is; k must be 1 when a capacity is set. capacity 0: nothing drops.
 * Host arrays. counts: scratch [E]. */
void sida_router_capacity(uint8_t *dropped, const int32_t *experts, int32_t sequences,
                          const int64_t *offsets, int32_t experts_total, int32_t capacity,
                          int32_t *counts);

#endif
