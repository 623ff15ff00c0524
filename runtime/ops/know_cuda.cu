/* Sums of a table's rows: a block a token, a thread a column. */
#include "runtime/ops/kernels_cuda.cuh"

constexpr int THREADS = 128;

__global__ void know_kernel(sida_know_call call) {
    allow_next();
    await_inputs();
    const int64_t row = blockIdx.x;
    const int32_t *experts = call.experts + row * call.k;
    for (int64_t c = threadIdx.x; c < call.width; c += blockDim.x) {
        float sum = call.sum[row * call.width + c];
        for (int32_t j = 0; j < call.k; j++) sum += call.known[experts[j] * call.width + c];
        call.sum[row * call.width + c] = sum;
        const float value = sum + call.bias[c];
        call.z[row * call.width + c] = value > 0.0f ? value : 0.0f;
    }
}

extern "C" sida_status sida_know_cuda(sida_stream *stream, const sida_know_call *call) {
    if (call->n <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    return launch_kernel("know kernel", stream, know_kernel, dim3((unsigned)call->n), THREADS, 0,
                         *call);
}
