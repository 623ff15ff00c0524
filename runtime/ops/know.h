/* What a refinement of predictions is told: rows of a table, by index, added to each token's sum.
 */
#ifndef SIDA_RUNTIME_OPS_KNOW_H
#define SIDA_RUNTIME_OPS_KNOW_H

#include "runtime/backend/backend.h"

#include <stdint.h>

/* sum[i] += Σ_j known[experts[i, j]], in the order of j; z[i] = relu(sum[i] + bias). */
typedef struct sida_know_call {
    float *sum;             /* [n, width] added to */
    float *z;               /* [n, width] out */
    const float *known;     /* [E, width] */
    const float *bias;      /* [width] */
    const int32_t *experts; /* [n, k] in 0 … E - 1 */
    int64_t n, width;
    int32_t k;
} sida_know_call;

typedef sida_status sida_know_fn(sida_stream *stream, const sida_know_call *call);
sida_know_fn sida_know_cpu;

#endif
