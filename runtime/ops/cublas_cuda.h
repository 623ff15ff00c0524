/* cuBLAS, loaded when the first compute stream wants it: linked, it would cost every start of every
 * program a tenth of a second, on machines without a GPU too. */
#ifndef SIDA_RUNTIME_OPS_CUBLAS_CUDA_H
#define SIDA_RUNTIME_OPS_CUBLAS_CUDA_H

#include <cublas_v2.h>
#include <cublasLt.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "formats/base/status.h"
#include "runtime/backend/backend.h"

/* Those of cublasLt, on which cuBLAS stands. */
typedef struct sida_cublas_lt {
    cublasStatus_t (*product_init)(cublasLtMatmulDesc_t product, size_t bytes,
                                   cublasComputeType_t compute, cudaDataType_t scale_type);
    cublasStatus_t (*product_set)(cublasLtMatmulDesc_t product,
                                  cublasLtMatmulDescAttributes_t attribute, const void *value,
                                  size_t bytes);
    cublasStatus_t (*layout_init)(cublasLtMatrixLayout_t layout, size_t bytes, cudaDataType type,
                                  uint64_t rows, uint64_t cols, int64_t ld);
    cublasStatus_t (*layout_set)(cublasLtMatrixLayout_t layout,
                                 cublasLtMatrixLayoutAttribute_t attribute, const void *value,
                                 size_t bytes);
    cublasStatus_t (*preference_init)(cublasLtMatmulPreference_t preference, size_t bytes);
    cublasStatus_t (*preference_set)(cublasLtMatmulPreference_t preference,
                                     cublasLtMatmulPreferenceAttributes_t attribute,
                                     const void *value, size_t bytes);
    cublasStatus_t (*heuristic)(cublasLtHandle_t handle, cublasLtMatmulDesc_t product,
                                cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                cublasLtMatmulPreference_t preference, int wanted,
                                cublasLtMatmulHeuristicResult_t *results, int *found);
    cublasStatus_t (*multiply)(cublasLtHandle_t handle, cublasLtMatmulDesc_t product,
                               const void *alpha, const void *a, cublasLtMatrixLayout_t a_layout,
                               const void *b, cublasLtMatrixLayout_t b_layout, const void *beta,
                               const void *c, cublasLtMatrixLayout_t c_layout, void *d,
                               cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo,
                               void *workspace, size_t workspace_bytes, cudaStream_t stream);
} sida_cublas_lt;

/* The functions that the ops call, under cuBLAS's own types. */
typedef struct sida_cublas {
    cublasStatus_t (*create)(cublasHandle_t *handle);
    cublasStatus_t (*destroy)(cublasHandle_t handle);
    cublasStatus_t (*set_stream)(cublasHandle_t handle, cudaStream_t stream);
    cublasStatus_t (*set_workspace)(cublasHandle_t handle, void *workspace, size_t bytes);
    cublasStatus_t (*gemm)(cublasHandle_t handle, cublasOperation_t transa,
                           cublasOperation_t transb, int m, int n, int k, const void *alpha,
                           const void *a, cudaDataType a_type, int lda, const void *b,
                           cudaDataType b_type, int ldb, const void *beta, void *c,
                           cudaDataType c_type, int ldc, cublasComputeType_t compute,
                           cublasGemmAlgo_t algo);
    cublasStatus_t (*gemm_batched)(cublasHandle_t handle, cublasOperation_t transa,
                                   cublasOperation_t transb, int m, int n, int k, const void *alpha,
                                   const void *a, cudaDataType a_type, int lda, long long a_stride,
                                   const void *b, cudaDataType b_type, int ldb, long long b_stride,
                                   const void *beta, void *c, cudaDataType c_type, int ldc,
                                   long long c_stride, int batch, cublasComputeType_t compute,
                                   cublasGemmAlgo_t algo);
    const char *(*status_string)(cublasStatus_t status);
    const sida_cublas_lt *lt; /* NULL: not there */
} sida_cublas;

/* Loads the version that this was compiled against. DEVICE when it is not there. Any thread. */
sida_status sida_cublas_load(const sida_cublas **out);
/* SIDA_OK, or DEVICE with the call's name, cuBLAS's words and what to do. */
sida_status sida_cublas_check(const sida_cublas *cublas, cublasStatus_t code, const char *call);
/* The handle of a compute stream, made (sida_prepare_cuda) where there is none yet. */
sida_status sida_cublas_of(sida_stream *stream, const sida_cublas **cublas, cublasHandle_t *handle);
/* Gives `beside`, which has none yet, the handle of another compute stream and a quarter of its
 * workspace: a handle of its own would take device memory that nobody counts. One thread issues to
 * both; `beside` is destroyed first. */
sida_status sida_cublas_share(sida_stream *beside, sida_stream *stream);

#ifdef __cplusplus
}
#endif

#endif
