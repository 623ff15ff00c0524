/* The best of each row of router logits, a warp a row. */
#include "runtime/ops/kernels_cuda.cuh"

#include "runtime/ops/order_cuda.cuh"

constexpr int THREADS = 128;
constexpr unsigned ALL = 0xffffffffu, NO_EXPERT = 0xffffffffu;

/* In double as on the CPU: norm is rounded to fp32 once, and a log-probability near 0 has fp16
 * steps finer than fp32's around norm. */
static __device__ double warp_sum_double(double value) {
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL, value, step);
    return value;
}

/* SLOTS: logits that a lane keeps, 32 * SLOTS >= E; 0: any number, read again for each rank. Either
 * way lane i has experts i, i + 32, … in this order, so every SLOTS gives the same bytes. */
template <int SLOTS> __global__ void __launch_bounds__(THREADS) top_kernel(sida_top_call call) {
    allow_next();
    await_inputs();
    const int64_t row = (int64_t)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    if (row >= call.n) return;
    const int lane = threadIdx.x % WARP, total = call.experts_total, top = call.top;
    const int slots = SLOTS > 0 ? SLOTS : (total + WARP - 1) / WARP;
    const float *logits = call.logits + row * total + lane;
    uint16_t *ids = call.ids + row * top, *logp = call.logp + row * top;
    float kept[SLOTS > 0 ? SLOTS : 1];
#pragma unroll
    for (int i = 0; i < SLOTS; i++) kept[i] = lane + i * WARP < total ? logits[i * WARP] : 0.0f;
    float norm = 0.0f;
    unsigned mine = 0, my_order = 0; /* rank r's in lane r % WARP, until they are written */
    /* Better than `order`, or as good with a lower id, has been taken; `expert` was the last. */
    unsigned order = 0xffffffffu, expert = 0;
    for (int r = 0; r < top; r++) {
        unsigned best = 0, best_expert = NO_EXPERT;
#pragma unroll
        for (int i = 0; i < slots; i++) {
            const unsigned e = (unsigned)(lane + i * WARP);
            if (e >= (unsigned)total) continue;
            const unsigned its = order_of(SLOTS > 0 ? kept[i] : logits[i * WARP]);
            if (its > order || (its == order && e <= expert)) continue;
            if (its > best || best_expert == NO_EXPERT) {
                best = its;
                best_expert = e;
            }
        }
        order = __reduce_max_sync(ALL, best);
        expert = __reduce_min_sync(ALL, best == order ? best_expert : NO_EXPERT);
        if (r == 0) {
            const double high = (double)logit_of(order);
            double sum = 0.0;
#pragma unroll
            for (int i = 0; i < slots; i++)
                if (lane + i * WARP < total)
                    sum += exp((double)(SLOTS > 0 ? kept[i] : logits[i * WARP]) - high);
            norm = (float)(high + log(warp_sum_double(sum)));
        }
        if (lane == r % WARP) {
            mine = expert;
            my_order = order;
        }
        if (r % WARP < WARP - 1 && r < top - 1) continue;
        const int rank = r - r % WARP + lane;
        if (rank > r) continue;
        ids[rank] = (uint16_t)mine;
        logp[rank] = isfinite(norm) ? __half_as_ushort(__float2half_rn(logit_of(my_order) - norm))
                                    : (uint16_t)SIDA_TOP_NOT_FINITE;
    }
}

extern "C" sida_status sida_top_cuda(sida_stream *stream, const sida_top_call *call) {
    if (call->n <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    const dim3 blocks((unsigned)((call->n + THREADS / WARP - 1) / (THREADS / WARP)));
    auto *kernel = call->experts_total <= 4 * WARP    ? top_kernel<4>
                   : call->experts_total <= 16 * WARP ? top_kernel<16>
                                                      : top_kernel<0>;
    return launch_kernel("top kernel", stream, kernel, blocks, THREADS, 0, *call);
}
