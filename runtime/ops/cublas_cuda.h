/* cuBLAS, loaded when the first compute stream wants it: linked, it would cost every start of every
 * program a tenth of a second, on machines without a GPU too. */
#ifndef SIDA_RUNTIME_OPS_CUBLAS_CUDA_H
#define SIDA_RUNTIME_OPS_CUBLAS_CUDA_H

#include <cublas_v2.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "formats/base/status.h"

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
    const char *(*status_string)(cublasStatus_t status);
} sida_cublas;

/* Loads the version that this was compiled against. DEVICE when it is not there. Any thread. */
sida_status sida_cublas_load(const sida_cublas **out);

#ifdef __cplusplus
}
#endif

#endif
