/* Rows grouped by expert, without atomics. Few rows: one block. More: a warp an expert reads all
 * choices, 32 at a time, and ballots say where its own go. Loop bounds are the same for a warp's
 * lanes, so every ballot has all of them. */
#include "runtime/ops/group_cuda.cuh"

constexpr int THREADS = 128;
constexpr unsigned ALL = 0xffffffffu;

static __device__ int32_t expert_of_warp(void) {
    return (int32_t)(blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP);
}

__global__ void __launch_bounds__(GROUP_WARPS *WARP) group_kernel(sida_dispatch_call call) {
    __shared__ group_memory memory;
    allow_next();
    await_inputs();
    for (int i = threadIdx.x; i < call.n * call.k; i += (int)blockDim.x)
        memory.choice[i] = (int16_t)call.experts[i];
    __syncthreads();
    group_rows(call, memory);
}

/* Every token's flag is written by the warp of its expert. */
__global__ void drop_kernel(sida_dispatch_call call) {
    allow_next();
    await_inputs();
    const int lane = threadIdx.x % WARP;
    const int32_t expert = expert_of_warp();
    if (expert >= call.experts_total) return;
    const unsigned before = (1u << lane) - 1;
    for (int32_t s = 0; s < call.sequences; s++) {
        const int64_t end = call.offsets[s + 1];
        int64_t taken = 0;
        for (int64_t base = call.offsets[s]; base < end; base += WARP) {
            const int64_t t = base + lane;
            const bool mine = t < end && call.experts[t] == expert;
            const unsigned mask = __ballot_sync(ALL, mine);
            if (mine) call.dropped[t] = taken + __popc(mask & before) >= call.capacity;
            taken += __popc(mask);
        }
    }
}

/* `drops`: dropped says which; else nothing drops, and dropped is written here. */
__global__ void place_kernel(sida_dispatch_call call, bool drops) {
    allow_next();
    await_inputs();
    const int lane = threadIdx.x % WARP;
    const int32_t expert = expert_of_warp();
    if (expert >= call.experts_total) return;
    const int64_t choices = call.n * call.k;
    int lower = 0, own = 0; /* this lane's part of the choices of lower experts, and of ours */
    for (int64_t i = lane; i < choices; i += WARP) {
        if (drops && call.dropped[i]) continue; /* then k is 1 */
        const int32_t e = call.experts[i];
        lower += e < expert;
        own += e == expert;
        if (!drops && e == expert && i % call.k == 0) call.dropped[i / call.k] = 0;
    }
    for (int step = WARP / 2; step > 0; step /= 2) {
        lower += __shfl_xor_sync(ALL, lower, step);
        own += __shfl_xor_sync(ALL, own, step);
    }
    if (lane == 0) {
        call.row_start[expert] = lower;
        if (expert == call.experts_total - 1) call.row_start[call.experts_total] = lower + own;
    }
    const unsigned before = (1u << lane) - 1;
    int32_t *to = call.rows + lower;
    for (int64_t base = 0; own > 0; base += WARP) {
        const int64_t i = base + lane;
        const bool mine = i < choices && call.experts[i] == expert && !(drops && call.dropped[i]);
        const unsigned mask = __ballot_sync(ALL, mine);
        if (mine) to[__popc(mask & before)] = (int32_t)i;
        to += __popc(mask);
        own -= __popc(mask);
    }
}

/* One block: the experts that have rows. */
__global__ void __launch_bounds__(GROUP_WARPS *WARP) busy_kernel(sida_dispatch_call call) {
    __shared__ int32_t sums[GROUP_WARPS];
    allow_next();
    await_inputs();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int32_t busy = 0;
    for (int32_t base = 0; base < call.experts_total; base += GROUP_WARPS * WARP) {
        const int32_t e = base + (int32_t)threadIdx.x;
        const bool has = e < call.experts_total && call.row_start[e + 1] > call.row_start[e];
        const unsigned mask = __ballot_sync(ALL, has);
        __syncthreads(); /* the last turn's readers */
        if (lane == 0) sums[warp] = __popc(mask);
        __syncthreads();
        int32_t at = busy + __popc(mask & ((1u << lane) - 1));
        for (int w = 0; w < GROUP_WARPS; w++) {
            if (w < warp) at += sums[w];
            busy += sums[w];
        }
        if (has) call.busy[at] = e;
    }
    if (threadIdx.x == 0) *call.busy_count = busy;
}

extern "C" sida_status sida_dispatch_cuda(sida_stream *stream, const sida_dispatch_call *call) {
    if (call->experts_total <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    if (group_takes(call))
        return launch_kernel("dispatch kernel, few rows", stream, group_kernel, dim3(1),
                             group_threads(call, (call->n * call->k + WARP - 1) / WARP), 0, *call);
    const dim3 blocks(((unsigned)call->experts_total + THREADS / WARP - 1) / (THREADS / WARP));
    /* No sequence is longer than all of them. */
    const bool drops = call->capacity > 0 && call->n > call->capacity;
    if (drops)
        status = launch_kernel("dispatch kernel, capacity", stream, drop_kernel, blocks, THREADS, 0,
                               *call);
    if (status == SIDA_OK)
        status = launch_kernel("dispatch kernel, rows", stream, place_kernel, blocks, THREADS, 0,
                               *call, drops);
    if (status == SIDA_OK)
        status = launch_kernel("dispatch kernel, busy", stream, busy_kernel, dim3(1),
                               GROUP_WARPS * WARP, 0, *call);
    return status;
}
