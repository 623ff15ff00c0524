/* Products for training: OpenBLAS in fixed tiles. The tiles depend on the shape alone and OpenBLAS
 * runs on one thread inside a tile, so the bytes do not depend on the number of threads; unlike
 * sida_linear_cpu, a row's bytes may depend on how many rows there are. */
#ifndef SIDA_RUNTIME_OPS_GEMM_H
#define SIDA_RUNTIME_OPS_GEMM_H

#include "runtime/ops/linear.h"

#include <stdbool.h>
#include <stdint.h>

/* c = op(a) op(b), or c += with `add`. Row-major; op(a) is [m, k], op(b) is [k, n]. */
typedef struct sida_gemm_call {
    float *c; /* [m, ldc >= n] */
    int64_t ldc;
    const float *a; /* [m, lda >= k]; with transpose_a [k, lda >= m] */
    int64_t lda;
    const float *b; /* [k, ldb >= n]; with transpose_b [n, ldb >= k] */
    int64_t ldb;
    int64_t m, n, k; /* >= 0; k = 0 gives zeros */
    bool transpose_a, transpose_b, add;
} sida_gemm_call;
void sida_gemm_cpu(const sida_gemm_call *call);

/* sida_linear_fn over sida_gemm_cpu: F32 weights only, scale 1. */
sida_linear_fn sida_linear_gemm_cpu;

/* Gradients of y = x Wᵀ + bias. Any output may be NULL: then it is not computed. */
typedef struct sida_linear_backward_call {
    float *d_x;         /* [n, cols]: added to */
    float *d_weight;    /* [rows, cols]: added to */
    float *d_bias;      /* [rows]: added to */
    const float *d_y;   /* [n, rows] */
    const float *x;     /* [n, cols] */
    sida_weight weight; /* F32 */
    int64_t n;
} sida_linear_backward_call;
void sida_linear_backward_cpu(const sida_linear_backward_call *call);

/* out[c] += Σ_r x[r, c]: the rows are summed in blocks of a fixed size, in order. */
void sida_column_sum_cpu(float *out, const float *x, int64_t rows, int64_t cols);

#endif
