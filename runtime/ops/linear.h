/* y = x Wᵀ (+ bias): the product of activations with stored weights. */
#ifndef SIDA_RUNTIME_OPS_LINEAR_H
#define SIDA_RUNTIME_OPS_LINEAR_H

#include "formats/dtype.h"
#include "runtime/backend/backend.h"

#include <stdbool.h>
#include <stdint.h>

/* A weight matrix as stored, [rows, cols] = [out, in], row-major. */
typedef struct sida_weight {
    const void *data;
    sida_dtype dtype;
    int64_t rows, cols;
} sida_weight;

typedef enum sida_epilogue {
    SIDA_EPILOGUE_NONE, /* y  = x Wᵀ + bias */
    SIDA_EPILOGUE_RELU, /* y  = max(x Wᵀ + bias, 0) */
    SIDA_EPILOGUE_ADD   /* y += x Wᵀ + bias */
} sida_epilogue;

typedef struct sida_linear_call {
    void *y; /* [n, ldy >= weight.rows] of y_type */
    int64_t ldy;
    const void *x; /* [n, ldx >= weight.cols] of x_type */
    int64_t ldx;
    int64_t n; /* rows, >= 0 */
    sida_weight weight;
    const float *bias; /* [weight.rows], or NULL */
    float scale;       /* x is multiplied by it first; 1 for none */
    sida_epilogue epilogue;
    /* F32 (0), or BF16 where the device takes it (sida_ops.bf16_activations) and the weight is
     * BF16; y BF16: not with ADD. */
    sida_dtype x_type, y_type;
    /* y = … rms_norm(x) Wᵀ …: the norm's weight [1, cols], of x in F32, ldx = cols. data NULL:
     * no norm. normed [n, cols] of normed_type, never NULL with a norm, is room for the normed
     * rows; keep_normed: they are wanted, otherwise the device may leave them unwritten. */
    sida_weight norm;
    float epsilon;
    void *normed;
    sida_dtype normed_type;
    bool keep_normed;
} sida_linear_call;

/* fp32 accumulation in an order fixed by weight.cols alone. */
typedef sida_status sida_linear_fn(sida_stream *stream, const sida_linear_call *call);
sida_linear_fn sida_linear_cpu;

#endif
