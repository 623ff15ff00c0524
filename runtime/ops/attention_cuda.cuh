/* Inside CUDA's attention: what its two kernels share. */
#ifndef SIDA_RUNTIME_OPS_ATTENTION_CUDA_CUH
#define SIDA_RUNTIME_OPS_ATTENTION_CUDA_CUH

#include "runtime/ops/kernels_cuda.cuh"

constexpr int MAX_BUCKETS = 256;

/* first[b]: the least distance in bucket b or beyond, in one direction. */
struct bucket_steps {
    int32_t count; /* buckets of one direction; 0: no bias */
    int16_t first[MAX_BUCKETS];
};

__device__ inline int bucket_of(const int16_t *first, int count, bool bidirectional,
                                int32_t relative) {
    int side = bidirectional && relative > 0 ? count : 0;
    int32_t distance = relative < 0 ? -relative : bidirectional ? relative : 0;
    int low = 0, high = count; /* first[low] <= distance < first[high] */
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (first[middle] <= distance)
            low = middle;
        else
            high = middle;
    }
    return side + low;
}

/* Blocks that share the queries of one sequence and head, `queries` at a time, when the host knows
 * no more than how many all sequences have: enough for one with twice the mean. A block takes more
 * than one turn where that is too few. */
static inline unsigned attention_blocks(const sida_attention_call *call, int queries) {
    const int64_t mean = (int64_t)queries * call->sequences;
    int64_t all = (call->rows + queries - 1) / queries;
    int64_t blocks = 2 * ((call->rows + mean - 1) / mean);
    if (blocks > all) blocks = all;
    return (unsigned)(blocks < 1 ? 1 : blocks < 1024 ? blocks : 1024);
}

/* The kernel on tensor cores: whether it takes the call, and its launch. */
bool attention_tiles_take(const sida_attention_call *call);
sida_status attention_tiles(sida_stream *stream, const sida_attention_call *call,
                            const bucket_steps *steps);

#endif
