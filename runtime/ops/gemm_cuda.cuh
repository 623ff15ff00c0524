/* Row-major products through cuBLAS, for the ops of training. */
#ifndef SIDA_RUNTIME_OPS_GEMM_CUDA_CUH
#define SIDA_RUNTIME_OPS_GEMM_CUDA_CUH

#include "runtime/ops/cublas_cuda.h"
#include "runtime/ops/kernels_cuda.cuh"

extern "C" {
#include "runtime/ops/train_ops.h"
}

/* `count` products of one shape, whose matrices begin `*_stride` floats after one another. Shapes
 * and row lengths fit an int. */
struct gemm_batch {
    sida_gemm_call first;
    int64_t a_stride, b_stride, c_stride;
    int32_t count;
};
sida_status gemm_batched(sida_stream *stream, const gemm_batch *batch, bool tf32);

#endif
