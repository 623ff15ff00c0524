/* Training's products through cuBLAS's lower half, cublasLt. cublasGemmEx asks its heuristics which
 * kernel to take in every call; here they are asked once for every kind of product, and the answer
 * is kept. */
#ifndef SIDA_RUNTIME_OPS_CUBLASLT_CUDA_H
#define SIDA_RUNTIME_OPS_CUBLASLT_CUDA_H

#include "runtime/ops/cublas_cuda.h"
#include "runtime/ops/gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* `count` products of one shape, whose matrices begin `*_stride` floats after one another. Shapes
 * and row lengths fit an int. Then c += bias, and c = max(c, 0) with relu; with either, rows of c
 * lie end to end and count is 1. */
typedef struct sida_gemm_batch {
    sida_gemm_call first;
    int64_t a_stride, b_stride, c_stride;
    int32_t count;
    const float *bias; /* [n], or NULL */
    bool relu;
} sida_gemm_batch;

/* None of the sizes is 0. *done = false and nothing issued where cublasLt is missing or has no
 * kernel for the product: that depends on sizes, row lengths, alignment to 16 bytes, the device and
 * the stream's workspace alone, as the result does, never on earlier products. */
sida_status sida_lt_multiply(sida_stream *stream, const sida_gemm_batch *batch, bool tf32,
                             bool *done);

/* Which kernels were chosen: host memory of a stream's state, made by its first product. */
typedef struct sida_lt_plans sida_lt_plans;
void sida_lt_plans_destroy(sida_lt_plans *plans);

/* What a product needs of a compute stream. Two streams that share a handle share the plans. */
typedef struct sida_lt_place {
    const sida_cublas *cublas;
    cublasLtHandle_t handle; /* cuBLAS's own: it is one of cublasLt's too */
    void *workspace;
    size_t workspace_bytes;
    cudaStream_t stream;
    sida_lt_plans **plans;
} sida_lt_place;
sida_status sida_lt_place_of(sida_stream *stream, sida_lt_place *place);

#ifdef __cplusplus
}
#endif

#endif
