/* Rows grouped by expert, without atomics: a warp an expert reads all choices, 32 at a time, and
 * ballots say where its own go. Loop bounds are the same for a warp's lanes, so every ballot has
 * all of them. */
#include "runtime/ops/kernels_cuda.cuh"

constexpr int THREADS = 128;
constexpr unsigned ALL = 0xffffffffu;

static __device__ int32_t expert_of_warp(void) {
    return (int32_t)(blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP);
}

/* Every token's flag is written by the warp of its expert. */
__global__ void drop_kernel(sida_dispatch_call call) {
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

extern "C" sida_status sida_dispatch_cuda(sida_stream *stream, const sida_dispatch_call *call) {
    if (call->experts_total <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    const unsigned blocks = ((unsigned)call->experts_total + THREADS / WARP - 1) / (THREADS / WARP);
    /* No sequence is longer than all of them. */
    const bool drops = call->capacity > 0 && call->n > call->capacity;
    if (drops) {
        drop_kernel<<<blocks, THREADS, 0, stream_of(stream)>>>(*call);
        status = launched("dispatch kernel, capacity");
        if (status != SIDA_OK) return status;
    }
    place_kernel<<<blocks, THREADS, 0, stream_of(stream)>>>(*call, drops);
    return launched("dispatch kernel, rows");
}
