/* The router, a warp a token, and route: with few tokens one block chooses the experts and groups
 * the rows, which saves the launches between. */
#include "runtime/ops/group_cuda.cuh"
#include "runtime/ops/order_cuda.cuh"

constexpr int THREADS = 128;
constexpr unsigned ALL = 0xffffffffu, NO_EXPERT = 0xffffffffu;
/* Tokens that one block takes in route: more of them are slower than a router on many blocks. */
constexpr int ROUTE_TOKENS = 96;

/* One token's choices, by a warp; to chosen [k] as well, unless NULL. SLOTS: logits that a lane
 * keeps, 32 * SLOTS >= E; 0: any number, read again for each rank. Either way lane i has experts i,
 * i + 32, … in this order, so every SLOTS gives the same bytes. */
template <int SLOTS>
static __device__ void route_token(const sida_router_call &call, int64_t token, int16_t *chosen) {
    const int lane = threadIdx.x % WARP, total = call.experts_total;
    const int slots = SLOTS > 0 ? SLOTS : (total + WARP - 1) / WARP;
    const float *logits = call.logits + token * total + lane;
    const uint8_t *allowed =
        call.allowed ? call.allowed + (int64_t)call.set_of[token] * total + lane : NULL;
    float kept[SLOTS > 0 ? SLOTS : 1];
#pragma unroll
    for (int i = 0; i < SLOTS; i++) kept[i] = lane + i * WARP < total ? logits[i * WARP] : 0.0f;
    float high = 0.0f, sum = 0.0f, mine = 0.0f;
    /* Better than `order`, or as good with a higher id, has been chosen. */
    unsigned order = 0xffffffffu, expert = 0;
    for (int32_t r = 0; r < call.k; r++) {
        unsigned best = 0, best_expert = NO_EXPERT;
#pragma unroll
        for (int i = 0; i < slots; i++) {
            const unsigned e = (unsigned)(lane + i * WARP);
            if (e >= (unsigned)total || (allowed && !allowed[i * WARP])) continue;
            const unsigned its = order_of(SLOTS > 0 ? kept[i] : logits[i * WARP]);
            if (its > order || (its == order && e <= expert)) continue;
            if (its > best || best_expert == NO_EXPERT) {
                best = its;
                best_expert = e;
            }
        }
        order = __reduce_max_sync(ALL, best);
        expert = __reduce_min_sync(ALL, best == order ? best_expert : NO_EXPERT);
        const float logit = logit_of(order);
        if (r == 0) {
            high = logit;
            if (allowed && !call.renormalise) {
#pragma unroll
                for (int i = 0; i < slots; i++)
                    if (lane + i * WARP < total) {
                        const float other = SLOTS > 0 ? kept[i] : logits[i * WARP];
                        high = other > high ? other : high;
                    }
                high = warp_max(high);
            }
        }
        const float share = expf(logit - high);
        if (call.renormalise) sum += share;
        if (lane == r % WARP) {
            mine = share;
            call.experts[token * call.k + r] = (int32_t)expert;
            if (r + WARP < call.k) call.alpha[token * call.k + r] = share;
            if (chosen) chosen[r] = (int16_t)expert;
        }
    }
    if (!call.renormalise) {
#pragma unroll
        for (int i = 0; i < slots; i++)
            if (lane + i * WARP < total)
                sum += expf((SLOTS > 0 ? kept[i] : logits[i * WARP]) - high);
        sum = warp_sum(sum);
    }
    float *alpha = call.alpha + token * call.k;
    for (int32_t r = lane; r < call.k; r += WARP)
        alpha[r] = (r + WARP < call.k ? alpha[r] : mine) / sum;
}

template <int SLOTS>
__global__ void __launch_bounds__(THREADS) router_kernel(sida_router_call call) {
    allow_next();
    await_inputs();
    const int64_t token = (int64_t)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    if (token < call.n) route_token<SLOTS>(call, token, NULL);
}

extern "C" sida_status sida_router_cuda(sida_stream *stream, const sida_router_call *call) {
    if (call->n <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    const dim3 blocks((unsigned)((call->n + THREADS / WARP - 1) / (THREADS / WARP)));
    auto *kernel = call->experts_total <= 4 * WARP    ? router_kernel<4>
                   : call->experts_total <= 16 * WARP ? router_kernel<16>
                                                      : router_kernel<0>;
    return launch_kernel("router kernel", stream, kernel, blocks, THREADS, 0, *call);
}

template <int SLOTS>
__global__ void __launch_bounds__(GROUP_WARPS *WARP, 1)
    route_kernel(sida_router_call router, sida_dispatch_call dispatch) {
    __shared__ group_memory memory;
    allow_next();
    await_inputs();
    for (int token = threadIdx.x / WARP; token < router.n; token += (int)blockDim.x / WARP)
        route_token<SLOTS>(router, token, memory.choice + token * router.k);
    __syncthreads();
    group_rows(dispatch, memory);
}

extern "C" sida_status sida_route_cuda(sida_stream *stream, const sida_router_call *router,
                                       const sida_dispatch_call *dispatch) {
    if (router->n > ROUTE_TOKENS || !group_takes(dispatch)) {
        sida_status status = sida_router_cuda(stream, router);
        return status == SIDA_OK ? sida_dispatch_cuda(stream, dispatch) : status;
    }
    if (dispatch->experts_total <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    auto *kernel = router->experts_total <= 4 * WARP ? route_kernel<4> : route_kernel<16>;
    return launch_kernel("route kernel", stream, kernel, dim3(1),
                         group_threads(dispatch, router->n), 0, *router, *dispatch);
}
