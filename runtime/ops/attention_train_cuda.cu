/* Attention of several heads for training, the way of sparsemax_train_cuda.cu: heads of some
 * sequences at a time are gathered into padded blocks [sequence, head, token, WIDTH], whose
 * products are cuBLAS's, and a warp turns a row of scores into probabilities or gradients.
 *
 * Forward:  S = Q Kᵀ, P = softmax(S + bias), O = P V; Q is gathered as Q / √WIDTH.
 * Backward: [S, dP] = [Q, dO] [K, V]ᵀ, from them [dS, P], [dK, dV] = [dS, P]ᵀ [Q, dO], dQ = dS K:
 * pairs are one batch, as the blocks of one lie behind the other's. The gradient of the bias is dS
 * summed along diagonals, then over the diagonals of a bucket, then over queries and sequences. */
#include "runtime/ops/score_rows_cuda.cuh"

#include <assert.h>

extern "C" {
#include "runtime/ops/attention.h"
#include "runtime/ops/transformer_train.h"
}

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int HEAD = SIDA_ATTENTION_TRAIN_WIDTH, BUCKETS = SIDA_ATTENTION_TRAIN_BUCKETS;
constexpr int FAR = SIDA_ATTENTION_TRAIN_DISTANCE; /* all from there on are one bucket */
constexpr int DISTANCES = 2 * FAR + 1;
constexpr int64_t SPLIT = 64; /* queries whose part of the bias' gradient is summed first */

/* By key - query + FAR. */
struct bucket_table {
    uint8_t of[DISTANCES];
};

/* --- memory: a chunk's arrays, which lie one after another */

struct blocks {
    int64_t q, k;             /* padded lengths */
    int64_t items;            /* sequences times heads */
    int64_t splits;           /* of the queries */
    float *queries, *d_out;   /* [items, q, HEAD] */
    float *keys, *values;     /* [items, k, HEAD] */
    float *scores, *d_scores; /* [items, q, k] */
    float *d_keys, *d_values; /* [items, k, HEAD] */
    float *parts;             /* [items, splits, BUCKETS] */
};

static int64_t splits_of(int64_t q) {
    return (q + SPLIT - 1) / SPLIT;
}

extern "C" size_t sida_attention_train_bytes(int32_t sequences, int32_t q_longest,
                                             int32_t k_longest, int32_t heads, bool backward) {
    const int64_t q = padded(q_longest), k = padded(k_longest);
    const int64_t one = backward ? 2 * q * HEAD + 4 * k * HEAD + 2 * q * k + splits_of(q) * BUCKETS
                                 : q * HEAD + 2 * k * HEAD + q * k;
    return (size_t)sequences * (size_t)heads * (size_t)one * sizeof(float);
}

static blocks lay_out(const sida_attention_train_call *call, int32_t sequences, bool backward) {
    blocks b = {};
    float *at = (float *)call->workspace;
    b.q = padded(call->q.longest);
    b.k = padded(call->k.longest);
    b.items = (int64_t)sequences * call->heads;
    b.splits = splits_of(b.q);
    const auto take = [&](int64_t floats, bool wanted) {
        float *from = at;
        if (wanted) at += b.items * floats;
        return from;
    };
    b.queries = take(b.q * HEAD, true);
    b.d_out = take(b.q * HEAD, backward);
    b.keys = take(b.k * HEAD, true);
    b.values = take(b.k * HEAD, true);
    b.scores = take(b.q * b.k, true);
    b.d_scores = take(b.q * b.k, backward);
    b.d_keys = take(b.k * HEAD, backward);
    b.d_values = take(b.k * HEAD, backward);
    b.parts = take(b.splits * BUCKETS, backward);
    return b;
}

/* --- rows to padded blocks and back */

struct move {
    float *block; /* [sequences, heads, length, HEAD] */
    float *rows;  /* [rows, stride], from the first of its columns on */
    sida_row_map map;
    int64_t stride, length;
    float scale; /* of what is moved */
};
struct moves {
    move of[4];
};

/* Grid: tokens of a block by WARPS, sequences, moves. BACK: block to rows; else rows to block,
 * zeros where there are none. */
template <bool BACK>
__global__ void __launch_bounds__(THREADS) heads_kernel(moves all, int32_t heads) {
    const move &m = all.of[blockIdx.z];
    const int32_t sequence = (int32_t)blockIdx.y;
    const int lane = threadIdx.x % WARP;
    const int64_t t = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    allow_next();
    await_inputs();
    if (t >= m.length) return;
    const bool real = t < m.map.count[sequence];
    if (BACK && !real) return;
    float *row = real ? m.rows + row_of(m.map, sequence, t) * m.stride : NULL;
    for (int32_t c = 4 * lane; c < heads * HEAD; c += 4 * WARP) {
        const int64_t item = (int64_t)sequence * heads + c / HEAD;
        float4 *in_block = (float4 *)(m.block + (item * m.length + t) * HEAD + c % HEAD);
        float4 v = make_float4(0, 0, 0, 0);
        if (BACK)
            v = *in_block;
        else if (real)
            v = *(const float4 *)(row + c);
        v.x *= m.scale;
        v.y *= m.scale;
        v.z *= m.scale;
        v.w *= m.scale;
        if (BACK)
            *(float4 *)(row + c) = v;
        else
            *in_block = v;
    }
}

static sida_status launch_moves(sida_stream *stream, const moves &all, int count, int32_t sequences,
                                int32_t heads, bool back) {
    int64_t longest = 0;
    for (int i = 0; i < count; i++) {
        const move &m = all.of[i];
        assert((uintptr_t)m.rows % 16 == 0);
        longest = m.length > longest ? m.length : longest;
    }
    const dim3 grid((unsigned)((longest + WARPS - 1) / WARPS), (unsigned)sequences,
                    (unsigned)count);
    return launch_kernel("attention heads kernel", stream,
                         back ? heads_kernel<true> : heads_kernel<false>, grid, THREADS, 0, all,
                         heads);
}

/* Of all `width` columns from `rows` on, in rows of `stride`. */
static move move_of(float *block, const float *rows, int64_t stride, const sida_row_map &map,
                    int64_t length, float scale) {
    move m;
    m.block = block;
    m.rows = (float *)rows; /* written by a move back only */
    m.map = map;
    m.stride = stride;
    m.length = length;
    m.scale = scale;
    return m;
}

/* --- a row of scores */

struct score_rows {
    float *scores;          /* [items, q, k] */
    float *d_scores;        /* the same of dP; NULL forward */
    const float *positions; /* [BUCKETS, heads] or NULL */
    const int32_t *q_count, *k_count;
    int64_t q, k;
    int32_t heads;
    bool causal;
    bucket_table buckets;
};

static __device__ int distance_of(int64_t key, int64_t query) {
    const int64_t r = key - query;
    return (int)(r < -FAR ? -FAR : r > FAR ? FAR : r) + FAR;
}

/* Grid: queries by WARPS, items. Forward: probabilities over the scores. Backward: dS over the
 * scores and P over dP. Beyond the keys that a query sees: zeros. */
template <int KEPT, bool BACKWARD>
__global__ void __launch_bounds__(THREADS) score_kernel(score_rows r) {
    __shared__ float bias[DISTANCES];
    const int32_t sequence = (int32_t)blockIdx.y / r.heads, head = (int32_t)blockIdx.y % r.heads;
    const int lane = threadIdx.x % WARP;
    const int64_t t = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    allow_next();
    await_inputs();
    for (int i = threadIdx.x; i < DISTANCES; i += THREADS)
        bias[i] = r.positions ? r.positions[(int)r.buckets.of[i] * r.heads + head] : 0.0f;
    __syncthreads();
    if (t >= r.q) return;
    const int64_t at = ((int64_t)blockIdx.y * r.q + t) * r.k;
    float *scores = r.scores + at, *d_scores = BACKWARD ? r.d_scores + at : NULL;
    int32_t keys = 0;
    if (t < r.q_count[sequence]) keys = r.k_count[sequence];
    if (r.causal && keys > t + 1) keys = (int32_t)t + 1;
    if (keys > 0) {
        lane_row<KEPT> row;
        row.load(scores, keys, lane);
        const auto biased = [&](int32_t i, float z) { return z + bias[distance_of(i, t)]; };
        float top = -INFINITY, sum = 0.0f;
        row.each(lane, [&](int32_t i, float z) { top = fmaxf(top, biased(i, z)); });
        top = warp_max(top);
        row.each(lane, [&](int32_t i, float z) { sum += expf(biased(i, z) - top); });
        const float share = 1.0f / warp_sum(sum);
        const auto probability = [&](int32_t i, float z) {
            return expf(biased(i, z) - top) * share;
        };
        if (!BACKWARD) {
            row.each(lane, [&](int32_t i, float z) { scores[i] = probability(i, z); });
        } else {
            float mean = 0.0f;
            row.each(lane, [&](int32_t i, float z) { mean += probability(i, z) * d_scores[i]; });
            mean = warp_sum(mean);
            row.each(lane, [&](int32_t i, float z) {
                const float p = probability(i, z);
                scores[i] = p * (d_scores[i] - mean);
                d_scores[i] = p;
            });
        }
    }
    for (int64_t i = keys + lane; i < r.k; i += WARP) {
        scores[i] = 0.0f;
        if (BACKWARD) d_scores[i] = 0.0f;
    }
}

template <bool BACKWARD>
static sida_status launch_scores(sida_stream *stream, const score_rows &rows, int64_t items) {
    const int64_t k = rows.k;
    const auto kernel = k <= 1 * WARP    ? score_kernel<1, BACKWARD>
                        : k <= 2 * WARP  ? score_kernel<2, BACKWARD>
                        : k <= 4 * WARP  ? score_kernel<4, BACKWARD>
                        : k <= 8 * WARP  ? score_kernel<8, BACKWARD>
                        : k <= 16 * WARP ? score_kernel<16, BACKWARD>
                                         : score_kernel<0, BACKWARD>;
    const dim3 grid((unsigned)((rows.q + WARPS - 1) / WARPS), (unsigned)items);
    return launch_kernel("attention scores kernel", stream, kernel, grid, THREADS, 0, rows);
}

/* --- the gradient of the bias */

/* Grid: SPLITs of queries, items. A thread sums diagonals of dS, keys - queries constant, of which
 * neighbouring threads read neighbouring elements. */
__global__ void __launch_bounds__(THREADS) diagonals_kernel(float *parts, score_rows r) {
    __shared__ float sums[DISTANCES], far[2][WARPS];
    const int32_t sequence = (int32_t)blockIdx.y / r.heads;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    allow_next();
    await_inputs();
    const int64_t begin = (int64_t)blockIdx.x * SPLIT, count = r.q_count[sequence];
    const int64_t end = begin + SPLIT < count ? begin + SPLIT : count;
    const int64_t keys = r.k_count[sequence];
    const int64_t diagonals = begin < end && keys > 0 ? end - begin + keys - 1 : 0;
    const float *scores = r.scores + (int64_t)blockIdx.y * r.q * r.k;
    for (int i = threadIdx.x; i < DISTANCES; i += THREADS) sums[i] = 0.0f;
    __syncthreads();
    float before = 0.0f, after = 0.0f; /* all far away */
    for (int64_t d = threadIdx.x; d < diagonals; d += THREADS) {
        const int64_t distance = d - (end - 1); /* key - query */
        const int64_t first = begin > -distance ? begin : -distance;
        const int64_t last = end < keys - distance ? end : keys - distance;
        float sum = 0.0f;
#pragma unroll 4
        for (int64_t i = first; i < last; i++) sum += scores[i * r.k + i + distance];
        if (distance <= -FAR)
            before += sum;
        else if (distance >= FAR)
            after += sum;
        else
            sums[distance + FAR] = sum;
    }
    before = warp_sum(before);
    after = warp_sum(after);
    if (lane == 0) {
        far[0][warp] = before;
        far[1][warp] = after;
    }
    __syncthreads();
    if (threadIdx.x < 2) {
        float sum = 0.0f;
        for (int w = 0; w < WARPS; w++) sum += far[threadIdx.x][w];
        sums[threadIdx.x == 0 ? 0 : DISTANCES - 1] = sum;
    }
    __syncthreads();
    parts += ((int64_t)blockIdx.y * gridDim.x + blockIdx.x) * BUCKETS;
    for (int bucket = warp; bucket < BUCKETS; bucket += WARPS) {
        float sum = 0.0f;
        for (int i = lane; i < DISTANCES; i += WARP)
            if (r.buckets.of[i] == bucket) sum += sums[i];
        sum = warp_sum(sum);
        if (lane == 0) parts[bucket] = sum;
    }
}

/* Grid: heads. A warp sums a bucket over sequences and splits. */
__global__ void __launch_bounds__(THREADS)
    positions_kernel(float *d_positions, const float *parts, int32_t sequences, int64_t splits) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int64_t heads = gridDim.x, head = blockIdx.x;
    allow_next();
    await_inputs();
    for (int bucket = warp; bucket < BUCKETS; bucket += WARPS) {
        float sum = 0.0f;
        for (int64_t i = lane; i < sequences * splits; i += WARP)
            sum += parts[((i / splits * heads + head) * splits + i % splits) * BUCKETS + bucket];
        sum = warp_sum(sum);
        if (lane == 0) d_positions[bucket * heads + head] += sum;
    }
}

static sida_status add_positions(sida_stream *stream, float *d_positions, const blocks &b,
                                 const score_rows &rows, int32_t sequences) {
    sida_status status =
        launch_kernel("position gradient kernel", stream, diagonals_kernel,
                      dim3((unsigned)b.splits, (unsigned)b.items), THREADS, 0, b.parts, rows);
    if (status != SIDA_OK) return status;
    return launch_kernel("position gradient kernel", stream, positions_kernel,
                         dim3((unsigned)rows.heads), THREADS, 0, d_positions, b.parts, sequences,
                         b.splits);
}

/* --- a chunk of sequences */

static score_rows score_rows_of(const sida_attention_train_call *call, const blocks &b,
                                const sida_row_map &q, const sida_row_map &k, bool backward) {
    score_rows rows = {};
    rows.scores = b.scores;
    rows.d_scores = backward ? b.d_scores : NULL;
    rows.positions = call->positions;
    rows.q_count = q.count;
    rows.k_count = k.count;
    rows.q = b.q;
    rows.k = b.k;
    rows.heads = call->heads;
    rows.causal = call->causal;
    for (int i = 0; i < DISTANCES; i++)
        rows.buckets.of[i] = (uint8_t)sida_relative_bucket(i - FAR, !call->causal, BUCKETS, FAR);
    return rows;
}

static float scale_of_queries(void) {
    return 1.0f / sqrtf((float)HEAD);
}

static sida_status forward_chunk(sida_stream *stream, const sida_attention_train_call *call,
                                 int32_t first, int32_t count) {
    const blocks b = lay_out(call, count, false);
    const sida_row_map q = shifted(call->q, first), k = shifted(call->k, first);
    const int64_t q_stride = b.q * HEAD, k_stride = b.k * HEAD, s_stride = b.q * b.k;
    const int64_t width = (int64_t)call->heads * HEAD;
    const int32_t items = (int32_t)b.items;
    moves in = {}, out = {};
    in.of[0] = move_of(b.queries, call->queries, width, q, b.q, scale_of_queries());
    in.of[1] = move_of(b.keys, call->key_value, 2 * width, k, b.k, 1);
    in.of[2] = move_of(b.values, call->key_value + width, 2 * width, k, b.k, 1);
    out.of[0] = move_of(b.queries, call->out, width, q, b.q, 1);
    sida_status status = launch_moves(stream, in, 3, count, call->heads, false);
    if (status == SIDA_OK)
        status = multiply(stream, b.scores, s_stride, b.queries, q_stride, false, b.keys, k_stride,
                          true, b.q, b.k, HEAD, false, items, call->tf32);
    if (status == SIDA_OK)
        status = launch_scores<false>(stream, score_rows_of(call, b, q, k, false), items);
    /* In the place of Q, which has been read. */
    if (status == SIDA_OK)
        status = multiply(stream, b.queries, q_stride, b.scores, s_stride, false, b.values,
                          k_stride, false, b.q, HEAD, b.k, false, items, call->tf32);
    if (status == SIDA_OK) status = launch_moves(stream, out, 1, count, call->heads, true);
    return status;
}

static sida_status backward_chunk(sida_stream *stream, float *d_queries, float *d_key_value,
                                  float *d_positions, const float *d_out,
                                  const sida_attention_train_call *call, int32_t first,
                                  int32_t count) {
    const blocks b = lay_out(call, count, true);
    const sida_row_map q = shifted(call->q, first), k = shifted(call->k, first);
    const int64_t q_stride = b.q * HEAD, k_stride = b.k * HEAD, s_stride = b.q * b.k;
    const int64_t width = (int64_t)call->heads * HEAD;
    const int32_t items = (int32_t)b.items;
    const score_rows rows = score_rows_of(call, b, q, k, true);
    moves in = {}, out = {};
    in.of[0] = move_of(b.queries, call->queries, width, q, b.q, scale_of_queries());
    in.of[1] = move_of(b.d_out, d_out, width, q, b.q, 1);
    in.of[2] = move_of(b.keys, call->key_value, 2 * width, k, b.k, 1);
    in.of[3] = move_of(b.values, call->key_value + width, 2 * width, k, b.k, 1);
    out.of[0] = move_of(b.queries, d_queries, width, q, b.q, scale_of_queries());
    out.of[1] = move_of(b.d_keys, d_key_value, 2 * width, k, b.k, 1);
    out.of[2] = move_of(b.d_values, d_key_value + width, 2 * width, k, b.k, 1);
    sida_status status = launch_moves(stream, in, 4, count, call->heads, false);
    if (status == SIDA_OK)
        status = multiply(stream, b.scores, s_stride, b.queries, q_stride, false, b.keys, k_stride,
                          true, b.q, b.k, HEAD, false, 2 * items, call->tf32);
    if (status == SIDA_OK) status = launch_scores<true>(stream, rows, items);
    if (status == SIDA_OK && call->positions)
        status = add_positions(stream, d_positions, b, rows, count);
    if (status == SIDA_OK)
        status = multiply(stream, b.d_keys, k_stride, b.scores, s_stride, true, b.queries, q_stride,
                          false, b.k, HEAD, b.q, false, 2 * items, call->tf32);
    /* dQ in the place of Q, which has been read. */
    if (status == SIDA_OK)
        status = multiply(stream, b.queries, q_stride, b.scores, s_stride, false, b.keys, k_stride,
                          false, b.q, HEAD, b.k, false, items, call->tf32);
    if (status == SIDA_OK) status = launch_moves(stream, out, 3, count, call->heads, true);
    return status;
}

/* Sequences that the workspace holds. */
static sida_status chunk_of(const sida_attention_train_call *call, int32_t *chunk, bool backward) {
    const size_t one =
        sida_attention_train_bytes(1, call->q.longest, call->k.longest, call->heads, backward);
    size_t most = call->workspace_bytes / one;
    const size_t grid = 65535 / 2 / (size_t)call->heads; /* its second dimension; pairs of blocks */
    if (most > grid) most = grid;
    *chunk = most < (size_t)call->sequences ? (int32_t)most : call->sequences;
    if (*chunk > 0) return SIDA_OK;
    return sida_fail(SIDA_ERROR_ARGUMENT, "attention of %d by %d tokens has too small a workspace",
                     call->q.longest, call->k.longest);
}

static bool nothing(const sida_attention_train_call *call) {
    return call->sequences <= 0 || call->q.longest <= 0;
}

extern "C" sida_status sida_attention_train_forward_cuda(sida_stream *stream,
                                                         const sida_attention_train_call *call) {
    if (nothing(call)) return SIDA_OK;
    int32_t chunk;
    sida_status status = sida_cuda_use(stream->backend);
    if (status == SIDA_OK) status = chunk_of(call, &chunk, false);
    for (int32_t first = 0; status == SIDA_OK && first < call->sequences; first += chunk)
        status = forward_chunk(stream, call, first,
                               call->sequences - first < chunk ? call->sequences - first : chunk);
    return status;
}

extern "C" sida_status sida_attention_train_backward_cuda(sida_stream *stream, float *d_queries,
                                                          float *d_key_value, float *d_positions,
                                                          const float *d_out,
                                                          const sida_attention_train_call *call) {
    if (nothing(call)) return SIDA_OK;
    int32_t chunk;
    sida_status status = sida_cuda_use(stream->backend);
    if (status == SIDA_OK) status = chunk_of(call, &chunk, true);
    for (int32_t first = 0; status == SIDA_OK && first < call->sequences; first += chunk)
        status = backward_chunk(stream, d_queries, d_key_value, d_positions, d_out, call, first,
                                call->sequences - first < chunk ? call->sequences - first : chunk);
    return status;
}
