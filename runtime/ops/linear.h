/* y = x Wᵀ (+ bias): the product of activations with stored weights. */
#ifndef SIDA_RUNTIME_OPS_LINEAR_H
#define SIDA_RUNTIME_OPS_LINEAR_H

#include "formats/dtype.h"
#include "runtime/backend/backend.h"

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
    float *y; /* [n, ldy >= weight.rows] */
    int64_t ldy;
    const float *x; /* [n, ldx >= weight.cols] */
    int64_t ldx;
    int64_t n; /* rows, >= 0 */
    sida_weight weight;
    const float *bias; /* [weight.rows], or NULL */
    float scale;       /* x is multiplied by it first; 1 for none */
    sida_epilogue epilogue;
} sida_linear_call;

/* fp32 accumulation in an order fixed by weight.cols alone. */
typedef sida_status sida_linear_fn(sida_stream *stream, const sida_linear_call *call);
sida_linear_fn sida_linear_cpu;

#endif
