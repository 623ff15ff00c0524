/* Rows grouped by expert inside one block: what dispatch does with few rows, and route after it has
 * chosen the experts. No atomics: a warp's ballots (__match_any) rank the rows of 32 at a time,
 * counts of warps are added up in the order of rows. */
#ifndef SIDA_RUNTIME_OPS_GROUP_CUDA_CUH
#define SIDA_RUNTIME_OPS_GROUP_CUDA_CUH

#include "runtime/ops/kernels_cuda.cuh"

constexpr int GROUP_ROWS = 2048, GROUP_EXPERTS = 512, GROUP_WARPS = 32;

struct group_memory {
    int16_t choice[GROUP_ROWS]; /* in: the expert of a row; here -1: dropped */
    uint16_t rank[GROUP_ROWS];  /* among the rows of its warp with the same expert */
    uint16_t count[GROUP_WARPS][GROUP_EXPERTS];
    int32_t start[GROUP_EXPERTS];
    int32_t sums[GROUP_WARPS];
};

/* Whether a block can do it. */
static inline bool group_takes(const sida_dispatch_call *call) {
    return call->n * call->k <= GROUP_ROWS && call->experts_total <= GROUP_EXPERTS;
}

/* Its threads: one an expert at least, and for `warps` of rows if that is more. */
static inline unsigned group_threads(const sida_dispatch_call *call, int64_t warps) {
    const int64_t experts = (call->experts_total + WARP - 1) / WARP;
    if (warps > GROUP_WARPS) warps = GROUP_WARPS;
    return (unsigned)((warps > experts ? warps : experts) * WARP);
}

/* Ranks 32 rows, -1 for none, by expert: seen[e] rows of this warp came before them. */
static __device__ int group_rank(uint16_t *seen, int expert) {
    constexpr unsigned ALL = 0xffffffffu;
    const unsigned before = (1u << threadIdx.x % WARP) - 1;
    const unsigned same = __match_any_sync(ALL, expert);
    const int base = expert >= 0 ? seen[expert] : 0;
    __syncwarp();
    if (expert >= 0 && (same & before) == 0) seen[expert] = (uint16_t)(base + __popc(same));
    __syncwarp();
    return base + __popc(same & before);
}

/* A warp a sequence: its tokens in order. */
static __device__ void group_drop(const sida_dispatch_call &call, group_memory &memory) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    uint16_t *taken = memory.count[warp];
    for (int32_t s = warp; s < call.sequences; s += (int32_t)(blockDim.x / WARP)) {
        const int begin = (int)call.offsets[s], end = (int)call.offsets[s + 1];
        for (int e = lane; e < call.experts_total; e += WARP) taken[e] = 0;
        __syncwarp();
        for (int base = begin; base < end; base += WARP) {
            const int t = base + lane;
            const int rank = group_rank(taken, t < end ? memory.choice[t] : -1);
            if (t >= end) continue;
            call.dropped[t] = rank >= call.capacity;
            if (rank >= call.capacity) memory.choice[t] = -1;
        }
    }
}

/* All threads of the block, a multiple of 32 and no fewer than experts; memory.choice is there. */
static __device__ void group_rows(const sida_dispatch_call &call, group_memory &memory) {
    constexpr unsigned ALL = 0xffffffffu;
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const int rows = (int)(call.n * call.k), experts = call.experts_total;
    /* No sequence is longer than all of them. */
    if (call.capacity > 0 && call.n > call.capacity) {
        group_drop(call, memory);
        __syncthreads();
    } else {
        for (int t = thread; t < call.n; t += (int)blockDim.x) call.dropped[t] = 0;
    }
    /* Neighbouring rows to a warp, 32 at a time. */
    const int chunks = (rows + WARP - 1) / WARP, warps = (int)blockDim.x / WARP;
    const int each = (chunks + warps - 1) / warps;
    const int begin = warp * each * WARP;
    const int end = begin + each * WARP < rows ? begin + each * WARP : rows;
    uint16_t *own = memory.count[warp];
    for (int e = lane; begin < rows && e < experts; e += WARP) own[e] = 0;
    __syncwarp();
    for (int base = begin; base < end; base += WARP) {
        const int i = base + lane;
        const int rank = group_rank(own, i < end ? memory.choice[i] : -1);
        if (i < end) memory.rank[i] = (uint16_t)rank;
    }
    __syncthreads();
    /* A thread an expert: rows before each warp's, rows of lower experts, and how many of those
     * have any (in the upper half). */
    int mine = 0;
    for (int w = 0; thread < experts && w * each * WARP < rows; w++) {
        const int count = memory.count[w][thread];
        memory.count[w][thread] = (uint16_t)mine;
        mine += count;
    }
    const int packed = mine | (mine > 0) << 16;
    int sum = packed;
    for (int step = 1; step < WARP; step *= 2) {
        const int other = __shfl_up_sync(ALL, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == WARP - 1) memory.sums[warp] = sum;
    __syncthreads();
    if (thread < experts) {
        int before = sum - packed;
        for (int w = 0; w < warp; w++) before += memory.sums[w];
        const int start = before & 0xffff, busy = before >> 16;
        memory.start[thread] = start;
        call.row_start[thread] = start;
        if (mine > 0) call.busy[busy] = thread;
        if (thread == experts - 1) {
            call.row_start[experts] = start + mine;
            *call.busy_count = busy + (mine > 0);
        }
    }
    __syncthreads();
    for (int i = begin + lane; i < end; i += WARP) {
        const int expert = memory.choice[i];
        if (expert >= 0) call.rows[memory.start[expert] + own[expert] + memory.rank[i]] = i;
    }
}

#endif
