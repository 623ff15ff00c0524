/* T5's layer norm (RMS norm, Zhang and Sennrich 2019): no mean, no bias. */
#ifndef SIDA_RUNTIME_OPS_NORM_H
#define SIDA_RUNTIME_OPS_NORM_H

#include "runtime/ops/linear.h"

/* out[i] = weight * x[i] * rsqrt(mean(x[i]²) + epsilon); out, x [n, d]; weight [1, d]. out is F32,
 * or BF16 where the device takes it (sida_ops.bf16_activations). */
typedef sida_status sida_rms_norm_fn(sida_stream *stream, void *out, sida_dtype out_type,
                                     const float *x, sida_weight weight, int64_t n, float epsilon);
sida_rms_norm_fn sida_rms_norm_cpu;

/* Gradients of the norm, on the calling thread. Either output may be NULL: then it is not
 * computed. */
typedef struct sida_rms_norm_backward_call {
    float *d_x;         /* [n, d]: added to */
    float *d_weight;    /* [d]: added to */
    const float *d_out; /* [n, d] */
    const float *x;     /* [n, d] */
    sida_weight weight; /* [1, d] F32 */
    int64_t n;
    float epsilon;
} sida_rms_norm_backward_call;
void sida_rms_norm_backward_cpu(const sida_rms_norm_backward_call *call);

#endif
