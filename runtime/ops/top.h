/* The best of each row of router logits, as a trace keeps them. */
#ifndef SIDA_RUNTIME_OPS_TOP_H
#define SIDA_RUNTIME_OPS_TOP_H

#include "runtime/backend/backend.h"

#include <stdint.h>

/* Every log-probability of a row whose logits are not finite: an fp16 NaN. */
enum { SIDA_TOP_NOT_FINITE = 0x7e00 };

/* logp = fp16(logit - norm), to the nearest, ties to even; norm is the logarithm of the sum of
 * exp(logit) over all E, taken in double and rounded to fp32. The sum's order is the device's own:
 * its last bits only show where they move norm's rounding, so CUDA's bytes are the CPU's but for
 * one row in some 10^8, for equal logits. */
typedef struct sida_top_call {
    uint16_t *ids;       /* [n, T] out: best first, ties to the lower id */
    uint16_t *logp;      /* [n, T] out: fp16 bits */
    const float *logits; /* [n, E] */
    int64_t n;
    int32_t experts_total, top; /* E <= 65536; 1 <= T <= E */
} sida_top_call;

typedef sida_status sida_top_fn(sida_stream *stream, const sida_top_call *call);
sida_top_fn sida_top_cpu;

#endif
