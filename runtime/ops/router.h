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

#endif
