/* SparseMax (or softmax) attention. A block takes four queries of one sequence over all their keys;
 * a warp makes the sixteen scores of four keys, then each query has a warp that finds its threshold
 * and lists its support, and all threads add up the values of the listed keys in their order.
 *
 * The threshold is Michelot's (sparsemax_cpu.c), without a sort: passes over the scores, each with
 * the last one's threshold. Up to TILE keys the scores stay in shared memory; with more of them
 * every pass makes them anew, tile by tile, so that any number will do.
 *
 * Softmax has one pass between the maximum and the values, which sums the exponentials; its
 * `threshold` is one over that sum, and its support all keys whose share is not 0. */
#include "runtime/ops/dots_cuda.cuh"

constexpr int WARPS = 16, QUERIES = 4, KEYS = DOTS / QUERIES, TILE = 1024;

struct score_tile {
    float score[QUERIES][TILE];
    uint16_t key[QUERIES][TILE]; /* of the tile, in the support: the first `listed` */
    int32_t listed[QUERIES];
};

/* Passes over a block's keys: the greatest score of each query; the threshold from what lies above
 * the last one, until that is the same (softmax: once); the values. */
enum phase { MAXIMUM, SHRINK, ADD, DONE };

/* The block's queries: count of them from row `first`, and the most keys that one of them sees. */
struct query_block {
    const float *queries, *memory;
    int32_t count, keys;
};

/* Scores of the tile's keys, begin … begin + size - 1. All of the block's warps come here. */
template <bool ALIGNED>
static __device__ void make_scores(score_tile &tile, const query_block &block, int32_t width,
                                   int32_t begin, int32_t size) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int32_t first = warp * KEYS; first < size; first += WARPS * KEYS) {
        float sum[DOTS] = {};
#pragma unroll 1
        for (int32_t column = 4 * lane; column < width; column += DOT_COLUMNS) {
            float4 key[KEYS], query[QUERIES];
            /* Beyond the last: read again, not kept. */
#pragma unroll
            for (int k = 0; k < KEYS; k++) {
                const int32_t at = begin + (first + k < size ? first + k : size - 1);
                key[k] = columns4<ALIGNED>(block.memory + (int64_t)at * width, column, width);
            }
#pragma unroll
            for (int q = 0; q < QUERIES; q++) {
                const int32_t at = q < block.count ? q : block.count - 1;
                query[q] = columns4<ALIGNED>(block.queries + (int64_t)at * width, column, width);
            }
#pragma unroll
            for (int k = 0; k < KEYS; k++)
#pragma unroll
                for (int q = 0; q < QUERIES; q++)
                    sum[k * QUERIES + q] = add_dot4(sum[k * QUERIES + q], query[q], key[k]);
        }
        const float score = sum_of_lane(sum);
        const int32_t at = first + lane / 2 / QUERIES;
        if (lane % 2 == 0 && at < size) tile.score[lane / 2 % QUERIES][at] = score;
    }
}

/* The warp's sums, in every lane the same. */
static __device__ double warp_sum_of(double value) {
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

/* Replaces the scores of the tile's first `size` keys by their probabilities, those that are not 0
 * in the order of keys, and lists the keys. */
static __device__ void list_support(score_tile &tile, int query, int32_t size, float top,
                                    double threshold, bool softmax) {
    const int lane = threadIdx.x % WARP;
    const unsigned before = (1u << lane) - 1;
    int32_t listed = 0;
    for (int32_t base = 0; base < size; base += WARP) {
        float p = 0.0f;
        if (base + lane < size) {
            const float below = tile.score[query][base + lane] - top;
            const double value =
                softmax ? (double)expf(below) * threshold : (double)below - threshold;
            p = value <= 0 ? 0.0f : (float)value; /* NaN stays */
        }
        const unsigned kept = __ballot_sync(ALL_LANES, p != 0.0f);
        __syncwarp();
        if (p != 0.0f) {
            const int32_t to = listed + __popc(kept & before); /* no later than it came from */
            tile.score[query][to] = p;
            tile.key[query][to] = (uint16_t)(base + lane);
        }
        __syncwarp();
        listed += __popc(kept);
    }
    if (lane == 0) tile.listed[query] = listed;
}

/* All threads: values of the listed keys, times their probabilities. */
static __device__ void add_values(float *out, const score_tile &tile, const float *memory,
                                  int32_t count, int32_t width) {
    for (int32_t e = (int32_t)threadIdx.x; e < count * width; e += WARPS * WARP) {
        const int query = e / width;
        const float *values = memory + e % width;
        const int32_t listed = tile.listed[query];
        if (listed == 0) continue;
        float sum = out[e];
#pragma unroll 8
        for (int32_t i = 0; i < listed; i++)
            sum = fmaf(tile.score[query][i], values[(int64_t)tile.key[query][i] * width], sum);
        out[e] = sum;
    }
}

template <bool ALIGNED>
__global__ void __launch_bounds__(WARPS *WARP, 1)
    sparsemax_kernel(sida_sparsemax_attention_call call) {
    __shared__ score_tile tile;
    const int32_t s = (int32_t)blockIdx.x, width = call.width;
    const int query = threadIdx.x / WARP, lane = threadIdx.x % WARP; /* of the first four warps */
    allow_next();
    await_inputs();
    const int32_t q_count = call.q_count[s], k_count = call.k_count[s];
    const int64_t position = call.q_position ? call.q_position[s] : 0;
    for (int32_t first = (int32_t)blockIdx.y * QUERIES; first < q_count;
         first += (int32_t)gridDim.y * QUERIES) {
        const int64_t row = (call.q_start[s] + first) * width;
        query_block block = {call.queries + row, call.memory + call.k_start[s] * width,
                             q_count - first < QUERIES ? q_count - first : QUERIES, k_count};
        int32_t own = query < block.count ? k_count : 0; /* keys of this warp's query */
        if (call.causal) {
            const int64_t end = position + first + 1;
            if (own > end + query) own = (int32_t)(end + query);
            if (block.keys > end + block.count - 1) block.keys = (int32_t)(end + block.count - 1);
        }
        if (block.keys <= 0) continue;
        float top = -INFINITY;
        double threshold = -1; /* beside the maximum: what lies below cannot be in the support */
        int32_t kept = own + 1;
        for (phase now = MAXIMUM, next; now != DONE; now = next) {
            double sum = 0;
            int32_t count = 0;
            for (int32_t begin = 0; begin < block.keys; begin += TILE) {
                const int32_t size = block.keys - begin < TILE ? block.keys - begin : TILE;
                const int32_t mine = own - begin < size ? own - begin : size;
                if (now == MAXIMUM || block.keys > TILE) {
                    __syncthreads(); /* the tile's last readers */
                    make_scores<ALIGNED>(tile, block, width, begin, size);
                    __syncthreads();
                }
                if (now == MAXIMUM) {
                    for (int32_t j = lane; j < mine; j += WARP)
                        top = fmaxf(top, tile.score[query][j]);
                } else if (now == SHRINK) {
                    for (int32_t j = lane; j < mine; j += WARP) {
                        const double value = (double)(tile.score[query][j] - top);
                        if (call.softmax) {
                            sum += (double)expf((float)value);
                            continue;
                        }
                        if (value <= threshold) continue; /* NaN gets in and poisons the sum */
                        sum += value;
                        count++;
                    }
                } else {
                    if (query < QUERIES)
                        list_support(tile, query, mine, top, threshold, call.softmax);
                    __syncthreads();
                    add_values(call.out + row, tile, block.memory + (int64_t)begin * width,
                               block.count, width);
                }
            }
            next = now == MAXIMUM ? SHRINK : DONE;
            if (now == MAXIMUM) top = warp_max(top);
            if (now != SHRINK) continue;
            sum = warp_sum_of(sum);
            count = __reduce_add_sync(ALL_LANES, count);
            if (call.softmax) threshold = 1 / sum;
            const bool changed = count > 0 && count < kept; /* softmax counts none */
            if (changed) {
                kept = count;
                threshold = (sum - 1) / (double)count;
            }
            next = __syncthreads_or(changed) ? SHRINK : ADD;
        }
    }
}

extern "C" sida_status sida_sparsemax_attention_cuda(sida_stream *stream,
                                                     const sida_sparsemax_attention_call *call) {
    if (call->probabilities)
        return sida_fail(SIDA_ERROR_UNSUPPORTED,
                         "SparseMax attention keeps no probabilities on CUDA; train on the CPU");
    if (call->sequences <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    /* Blocks a sequence: enough for one of twice the mean; a block takes more turns where that is
     * too few. */
    const int64_t turn = (int64_t)QUERIES * call->sequences;
    const int64_t all = (call->rows + QUERIES - 1) / QUERIES;
    int64_t blocks = call->rows > 0 ? 2 * ((call->rows + turn - 1) / turn) : 16;
    if (call->rows > 0 && blocks > all) blocks = all;
    const bool aligned =
        call->width % 4 == 0 && ((uintptr_t)call->queries | (uintptr_t)call->memory) % 16 == 0;
    const dim3 grid((unsigned)call->sequences, (unsigned)(blocks < 1024 ? blocks : 1024));
    return launch_kernel("SparseMax attention kernel", stream,
                         aligned ? sparsemax_kernel<true> : sparsemax_kernel<false>, grid,
                         WARPS * WARP, 0, *call);
}
