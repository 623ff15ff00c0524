/* T5's layer norm (RMS norm, Zhang and Sennrich 2019): no mean, no bias. */
#ifndef SIDA_RUNTIME_OPS_NORM_H
#define SIDA_RUNTIME_OPS_NORM_H

#include "runtime/ops/linear.h"

/* out[i] = weight * x[i] * rsqrt(mean(x[i]²) + epsilon); out, x [n, d]; weight [1, d]. out is F32,
 * or BF16 where the device takes it (sida_ops.bf16_activations). */
typedef sida_status sida_rms_norm_fn(sida_stream *stream, void *out, sida_dtype out_type,
                                     const float *x, sida_weight weight, int64_t n, float epsilon);
sida_rms_norm_fn sida_rms_norm_cpu;

#endif
