/* Row-major products through cublasLt and cuBLAS, for the ops of training. */
#ifndef SIDA_RUNTIME_OPS_GEMM_CUDA_CUH
#define SIDA_RUNTIME_OPS_GEMM_CUDA_CUH

#include "runtime/ops/cublaslt_cuda.h"
#include "runtime/ops/kernels_cuda.cuh"

extern "C" {
#include "runtime/ops/train_ops.h"
}

using gemm_batch = sida_gemm_batch;
sida_status gemm_batched(sida_stream *stream, const gemm_batch *batch, bool tf32);

#endif
