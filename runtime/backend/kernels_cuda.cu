/* The back-end's own kernels: one to ask about, whose code was chosen as that of all others, and
 * one that copies. */
extern "C" {
#include "runtime/backend/backend_cuda.h"
}

#include <cuda_runtime.h>

namespace {

__global__ void probe() {}

__global__ void copy_words(uint32_t *to, const uint32_t *from, size_t words) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < words;
         i += gridDim.x * (size_t)blockDim.x)
        to[i] = from[i];
}

} // namespace

extern "C" cudaError_t sida_cuda_probe(int *code, int *ptx) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
    *code = error == cudaSuccess ? attributes.binaryVersion : 0;
    *ptx = error == cudaSuccess ? attributes.ptxVersion : 0;
    return error;
}

extern "C" cudaError_t sida_cuda_copy_words(cudaStream_t stream, void *to, const void *from,
                                            size_t words) {
    const unsigned threads = 256, most = 64;
    size_t blocks = (words + threads - 1) / threads;
    copy_words<<<(unsigned)(blocks < most ? blocks : most), threads, 0, stream>>>(
        (uint32_t *)to, (const uint32_t *)from, words);
    return cudaGetLastError();
}
