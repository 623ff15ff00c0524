/* Gated feed-forward: out = act(gate) * up. */
#ifndef SIDA_RUNTIME_OPS_ELEMENTWISE_H
#define SIDA_RUNTIME_OPS_ELEMENTWISE_H

#include "runtime/backend/backend.h"

typedef enum sida_activation {
    SIDA_ACT_RELU,
    SIDA_ACT_GELU_NEW, /* 0.5 x (1 + tanh(sqrt(2/π) (x + 0.044715 x³))) */
    SIDA_ACT_SILU
} sida_activation;

/* out, gate, up: [count]; out may be gate. */
typedef sida_status sida_gated_fn(sida_stream *stream, float *out, const float *gate,
                                  const float *up, int64_t count, sida_activation activation);
sida_gated_fn sida_gated_cpu;

#endif
