/* The gradient of the RMS norm: a warp a row, then sums of columns. */
#include "runtime/ops/kernels_cuda.cuh"

extern "C" {
#include "runtime/ops/transformer_train.h"
}

constexpr int THREADS = 256, WARPS = THREADS / WARP;

/* With r = rsqrt(mean(x²) + ε): d_x += r (w d_y - r² x mean(w d_y x)); d_y becomes d_y x r. */
__global__ void __launch_bounds__(THREADS) norm_backward_kernel(sida_norm_train_call call) {
    const int lane = threadIdx.x % WARP;
    const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    allow_next();
    await_inputs();
    if (row >= call.n) return;
    const float *x = call.x + row * call.width;
    float *d_y = call.d_y + row * call.width;
    float squares = 0.0f, product = 0.0f;
    for (int64_t c = lane; c < call.width; c += WARP) {
        squares = fmaf(x[c], x[c], squares);
        product = fmaf(call.weight[c] * d_y[c], x[c], product);
    }
    const float width = (float)call.width;
    const float r = 1.0f / sqrtf(warp_sum(squares) / width + call.epsilon);
    const float mean = warp_sum(product) / width * r * r;
    for (int64_t c = lane; c < call.width; c += WARP) {
        const float value = x[c], d = d_y[c];
        if (call.d_x) call.d_x[row * call.width + c] += r * (call.weight[c] * d - value * mean);
        d_y[c] = d * value * r;
    }
}

extern "C" sida_status sida_norm_train_backward_cuda(sida_stream *stream,
                                                     const sida_norm_train_call *call) {
    if (call->n <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status == SIDA_OK)
        status = launch_kernel("norm gradient kernel", stream, norm_backward_kernel,
                               dim3((unsigned)((call->n + WARPS - 1) / WARPS)), THREADS, 0, *call);
    if (status != SIDA_OK) return status;
    return sida_column_sum_cuda(stream, call->d_weight, call->d_y, NULL, call->n, call->width,
                                call->workspace);
}
