/* SparseMax attention for training. Rows of some sequences at a time are gathered into padded
 * blocks, whose products are cuBLAS's, one batched call each; a warp then turns a row of scores
 * into probabilities, or into gradients. Padding is zeros, and stays so.
 *
 * Forward:  S = Q Kᵀ, P = sparsemax(S) or softmax(S), out += P K.
 * Backward: [S; dP] = [Q; dO] Kᵀ, from them [dS; P], then dK = [dS; P]ᵀ [Q; dO] and dQ = dS K: with
 * Q and dO of a sequence behind one another the first two pairs of products are one each. */
#include "runtime/ops/score_rows_cuda.cuh"

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int THREADS = 256, WARPS = THREADS / WARP;

/* A chunk's arrays, in floats a sequence; they lie one after another. */
struct blocks {
    int64_t q, k, width; /* padded lengths, and the width */
    float *queries;      /* [chunk, q or 2 q, width]: Q, behind it dO */
    float *keys;         /* [chunk, k, width] */
    float *scores;       /* [chunk, q or 2 q, k]: S, behind it dP */
    float *results;      /* forward [chunk, q, width], backward [chunk, k, width] dK */
};

static size_t sequence_floats(int64_t q, int64_t k, int64_t width, bool backward) {
    return backward ? (size_t)(2 * q * width + 2 * k * width + 2 * q * k)
                    : (size_t)(2 * q * width + k * width + q * k);
}

extern "C" size_t sida_sparsemax_train_bytes(int32_t sequences, int32_t q_longest,
                                             int32_t k_longest, int32_t width, bool backward) {
    return (size_t)sequences * sizeof(float) *
           sequence_floats(padded(q_longest), padded(k_longest), width, backward);
}

static blocks lay_out(const sida_sparsemax_train_call *call, int32_t chunk, bool backward) {
    blocks b;
    b.q = padded(call->q.longest);
    b.k = padded(call->k.longest);
    b.width = call->width;
    const int64_t times = backward ? 2 : 1;
    b.queries = (float *)call->workspace;
    b.keys = b.queries + chunk * times * b.q * b.width;
    b.scores = b.keys + chunk * b.k * b.width;
    b.results = b.scores + chunk * times * b.q * b.k;
    return b;
}

/* Sequences that the workspace holds; 0: not even one. */
static int32_t chunk_of(const sida_sparsemax_train_call *call, bool backward) {
    const size_t one =
        sida_sparsemax_train_bytes(1, call->q.longest, call->k.longest, call->width, backward);
    const size_t most = call->workspace_bytes / one;
    return most < (size_t)call->sequences ? (int32_t)most : call->sequences;
}

/* --- rows to padded blocks and back */

struct move {
    float *block;     /* [sequences, stride / width >= length, width] */
    float *rows;      /* [rows, width] */
    sida_row_map map; /* of the chunk */
    int64_t stride;   /* floats between sequences of the block */
    int64_t length;   /* rows of a sequence's block */
};
struct moves {
    move of[3];
};

/* Grid: rows of a block by WARPS, sequences, moves. ADD: block to rows, added; else rows to block,
 * zeros where there are none. */
template <bool ADD, bool WIDE>
__global__ void __launch_bounds__(THREADS) move_kernel(moves all, int64_t width) {
    const move &m = all.of[blockIdx.z];
    const int32_t sequence = (int32_t)blockIdx.y;
    const int lane = threadIdx.x % WARP;
    const int64_t t = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    allow_next();
    await_inputs();
    if (t >= m.length) return;
    const bool real = t < m.map.count[sequence];
    if (ADD && !real) return;
    float *block = m.block + sequence * m.stride + t * width;
    float *row = real ? m.rows + row_of(m.map, sequence, t) * width : NULL;
    if (WIDE) {
        for (int64_t c = 4 * lane; c < width; c += 4 * WARP) {
            float4 *to = (float4 *)(block + c);
            if (ADD) {
                float4 *sum = (float4 *)(row + c);
                const float4 v = *to;
                float4 s = *sum;
                s.x += v.x;
                s.y += v.y;
                s.z += v.z;
                s.w += v.w;
                *sum = s;
            } else {
                *to = real ? *(const float4 *)(row + c) : make_float4(0, 0, 0, 0);
            }
        }
    } else {
        for (int64_t c = lane; c < width; c += WARP) {
            if (ADD)
                row[c] += block[c];
            else
                block[c] = real ? row[c] : 0.0f;
        }
    }
}

static sida_status launch_moves(sida_stream *stream, const moves &all, int count, int32_t sequences,
                                int64_t width, bool add) {
    int64_t longest = 0;
    bool wide = width % 4 == 0;
    for (int i = 0; i < count; i++) {
        const move &m = all.of[i];
        longest = m.length > longest ? m.length : longest;
        wide = wide && ((uintptr_t)m.block | (uintptr_t)m.rows) % 16 == 0;
    }
    const dim3 grid((unsigned)((longest + WARPS - 1) / WARPS), (unsigned)sequences,
                    (unsigned)count);
    const auto kernel = add ? (wide ? move_kernel<true, true> : move_kernel<true, false>)
                            : (wide ? move_kernel<false, true> : move_kernel<false, false>);
    return launch_kernel("attention rows kernel", stream, kernel, grid, THREADS, 0, all, width);
}

static move move_of(float *block, const float *rows, const sida_row_map &map, int64_t stride,
                    int64_t length) {
    move m;
    m.block = block;
    m.rows = (float *)rows; /* written by a move that adds only */
    m.map = map;
    m.stride = stride;
    m.length = length;
    return m;
}

/* --- a row of scores */

struct score_rows {
    float *scores;     /* [sequences, stride / k, k] */
    float *gradients;  /* the same of dP; NULL forward */
    float *thresholds; /* [rows of queries, 2] */
    sida_row_map q;
    const int32_t *k_count;
    int64_t stride, q_length, k_length;
    bool causal, softmax;
};

static __device__ double warp_sum_of(double value) {
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

/* Michelot's threshold relative to the largest score (sparsemax_cpu.c), rounded to a float so that
 * the backward pass finds the same support. */
template <int KEPT>
static __device__ float threshold_of(const lane_row<KEPT> &row, int lane, float top) {
    double threshold = -1; /* beside the largest what lies below cannot be in the support */
    int32_t kept = row.count + 1;
    for (;;) {
        double sum = 0;
        int32_t count = 0;
        row.each(lane, [&](int32_t, float z) {
            const double value = (double)(z - top);
            if (value <= threshold) return; /* NaN gets in and poisons the sum */
            sum += value;
            count++;
        });
        sum = warp_sum_of(sum);
        count = __reduce_add_sync(ALL_LANES, count);
        if (count == 0 || count >= kept) return (float)threshold;
        kept = count;
        threshold = (sum - 1) / (double)count;
    }
}

/* One over the sum of the exponentials: what takes the threshold's place. */
template <int KEPT>
static __device__ float share_of(const lane_row<KEPT> &row, int lane, float top) {
    double sum = 0;
    row.each(lane, [&](int32_t, float z) { sum += (double)expf(z - top); });
    return (float)(1 / warp_sum_of(sum));
}

static __device__ float probability(float z, float top, float threshold, bool softmax) {
    if (softmax) return expf(z - top) * threshold;
    const float value = (z - top) - threshold;
    return value <= 0.0f ? 0.0f : value; /* NaN stays */
}

/* Grid: queries by WARPS, sequences. Forward: probabilities over the scores. Backward: dS over the
 * scores and P over dP. Beyond the keys that a query sees: zeros. */
template <int KEPT, bool BACKWARD>
__global__ void __launch_bounds__(THREADS) score_kernel(score_rows r) {
    const int32_t sequence = (int32_t)blockIdx.y;
    const int lane = threadIdx.x % WARP;
    const int64_t t = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    allow_next();
    await_inputs();
    if (t >= r.q_length) return;
    float *scores = r.scores + sequence * r.stride + t * r.k_length;
    float *gradients = BACKWARD ? r.gradients + sequence * r.stride + t * r.k_length : NULL;
    int32_t keys = 0;
    if (t < r.q.count[sequence]) keys = r.k_count[sequence];
    if (r.causal && keys > t + 1) keys = (int32_t)t + 1;
    if (keys > 0) {
        float *kept = r.thresholds + 2 * row_of(r.q, sequence, t);
        lane_row<KEPT> row;
        row.load(scores, keys, lane);
        if (!BACKWARD) {
            float top = -INFINITY;
            row.each(lane, [&](int32_t, float z) { top = fmaxf(top, z); });
            top = warp_max(top);
            const float threshold =
                r.softmax ? share_of<KEPT>(row, lane, top) : threshold_of<KEPT>(row, lane, top);
            if (lane == 0) {
                kept[0] = top;
                kept[1] = threshold;
            }
            row.each(lane, [&](int32_t i, float z) {
                scores[i] = probability(z, top, threshold, r.softmax);
            });
        } else {
            const float top = kept[0], threshold = kept[1];
            /* The mean of dP: by p with softmax, over the support with SparseMax. */
            double sum = 0;
            int32_t count = 0;
            row.each(lane, [&](int32_t i, float z) {
                const float p = probability(z, top, threshold, r.softmax);
                if (p == 0.0f) return;
                sum += (r.softmax ? (double)p : 1.0) * (double)gradients[i];
                count++;
            });
            sum = warp_sum_of(sum);
            count = __reduce_add_sync(ALL_LANES, count);
            if (r.softmax) count = 1; /* its weights sum to 1 */
            const float mean = count > 0 ? (float)(sum / (double)count) : 0.0f;
            row.each(lane, [&](int32_t i, float z) {
                const float p = probability(z, top, threshold, r.softmax);
                const float off = p != 0.0f ? gradients[i] - mean : 0.0f;
                scores[i] = r.softmax ? p * off : off;
                gradients[i] = p;
            });
        }
    }
    for (int64_t i = keys + lane; i < r.k_length; i += WARP) {
        scores[i] = 0.0f;
        if (BACKWARD) gradients[i] = 0.0f;
    }
}

template <bool BACKWARD>
static sida_status launch_scores(sida_stream *stream, const score_rows &rows, int32_t sequences) {
    const int64_t k = rows.k_length;
    const auto kernel = k <= 1 * WARP    ? score_kernel<1, BACKWARD>
                        : k <= 2 * WARP  ? score_kernel<2, BACKWARD>
                        : k <= 4 * WARP  ? score_kernel<4, BACKWARD>
                        : k <= 8 * WARP  ? score_kernel<8, BACKWARD>
                        : k <= 16 * WARP ? score_kernel<16, BACKWARD>
                                         : score_kernel<0, BACKWARD>;
    const dim3 grid((unsigned)((rows.q_length + WARPS - 1) / WARPS), (unsigned)sequences);
    return launch_kernel("SparseMax kernel", stream, kernel, grid, THREADS, 0, rows);
}

/* --- a chunk of sequences */

static bool nothing(const sida_sparsemax_train_call *call) {
    return call->sequences <= 0 || call->q.longest <= 0 || call->k.longest <= 0;
}

static bool maps_equal(const sida_row_map &a, const sida_row_map &b) {
    return a.start == b.start && a.step == b.step && a.count == b.count && a.longest == b.longest;
}

/* Queries and keys are the same rows. */
static bool is_self(const sida_sparsemax_train_call *call) {
    return call->queries == call->memory && maps_equal(call->q, call->k);
}

static score_rows score_rows_of(const sida_sparsemax_train_call *call, const blocks &b,
                                const sida_row_map &q, const sida_row_map &k, int64_t stride) {
    score_rows rows = {};
    rows.scores = b.scores;
    rows.thresholds = call->thresholds;
    rows.q = q;
    rows.k_count = k.count;
    rows.stride = stride;
    rows.q_length = b.q;
    rows.k_length = b.k;
    rows.causal = call->causal;
    rows.softmax = call->softmax;
    return rows;
}

static sida_status forward_chunk(sida_stream *stream, const sida_sparsemax_train_call *call,
                                 int32_t first, int32_t count, int32_t chunk) {
    blocks b = lay_out(call, chunk, false);
    const sida_row_map q = shifted(call->q, first), k = shifted(call->k, first);
    const int64_t q_stride = b.q * b.width, k_stride = b.k * b.width, s_stride = b.q * b.k;
    const bool self = is_self(call);
    if (self) b.keys = b.queries;
    moves in = {}, out = {};
    in.of[0] = move_of(b.queries, call->queries, q, q_stride, b.q);
    in.of[1] = move_of(b.keys, call->memory, k, k_stride, b.k);
    out.of[0] = move_of(b.results, call->out, q, q_stride, b.q);
    sida_status status = launch_moves(stream, in, self ? 1 : 2, count, b.width, false);
    if (status == SIDA_OK)
        status = multiply(stream, b.scores, s_stride, b.queries, q_stride, false, b.keys, k_stride,
                          true, b.q, b.k, b.width, false, count, call->tf32);
    if (status == SIDA_OK)
        status = launch_scores<false>(stream, score_rows_of(call, b, q, k, s_stride), count);
    if (status == SIDA_OK)
        status = multiply(stream, b.results, q_stride, b.scores, s_stride, false, b.keys, k_stride,
                          false, b.q, b.width, b.k, false, count, call->tf32);
    if (status == SIDA_OK && call->out_ready && first == 0)
        status = sida_stream_wait(stream, call->out_ready);
    if (status == SIDA_OK) status = launch_moves(stream, out, 1, count, b.width, true);
    return status;
}

static sida_status backward_chunk(sida_stream *stream, float *d_queries, float *d_memory,
                                  const float *d_out, const sida_sparsemax_train_call *call,
                                  int32_t first, int32_t count, int32_t chunk) {
    const blocks b = lay_out(call, chunk, true);
    const sida_row_map q = shifted(call->q, first), k = shifted(call->k, first);
    const int64_t half = b.q * b.width, scores = b.q * b.k;
    const int64_t q_stride = 2 * half, k_stride = b.k * b.width, s_stride = 2 * scores;
    const bool shared = d_queries == d_memory && is_self(call);
    moves in = {}, out = {};
    in.of[0] = move_of(b.queries, call->queries, q, q_stride, b.q);
    in.of[1] = move_of(b.queries + half, d_out, q, q_stride, b.q);
    in.of[2] = move_of(b.keys, call->memory, k, k_stride, b.k);
    out.of[0] = move_of(b.results, d_memory, k, k_stride, b.k);
    out.of[1] = move_of(b.queries, d_queries, q, q_stride, b.q);
    score_rows rows = score_rows_of(call, b, q, k, s_stride);
    rows.gradients = b.scores + scores;
    sida_status status = launch_moves(stream, in, 3, count, b.width, false);
    if (status == SIDA_OK)
        status = multiply(stream, b.scores, s_stride, b.queries, q_stride, false, b.keys, k_stride,
                          true, 2 * b.q, b.k, b.width, false, count, call->tf32);
    if (status == SIDA_OK) status = launch_scores<true>(stream, rows, count);
    if (status == SIDA_OK)
        status = multiply(stream, b.results, k_stride, b.scores, s_stride, true, b.queries,
                          q_stride, false, b.k, b.width, 2 * b.q, false, count, call->tf32);
    /* dQ: onto dK where they are of the same rows, else in the place of Q, which has been read. */
    if (status == SIDA_OK)
        status = multiply(stream, shared ? b.results : b.queries, shared ? k_stride : q_stride,
                          b.scores, s_stride, false, b.keys, k_stride, false, b.q, b.width, b.k,
                          shared, count, call->tf32);
    if (status == SIDA_OK) status = launch_moves(stream, out, 1, count, b.width, true);
    if (status == SIDA_OK && !shared) {
        out.of[0] = out.of[1];
        status = launch_moves(stream, out, 1, count, b.width, true);
    }
    return status;
}

static sida_status check_chunk(const sida_sparsemax_train_call *call, int32_t *chunk,
                               bool backward) {
    *chunk = chunk_of(call, backward);
    if (*chunk > 65535) *chunk = 65535; /* a grid's second dimension */
    if (*chunk > 0) return SIDA_OK;
    return sida_fail(SIDA_ERROR_ARGUMENT,
                     "SparseMax attention of %d by %d tokens has too small a workspace",
                     call->q.longest, call->k.longest);
}

extern "C" sida_status sida_sparsemax_train_forward_cuda(sida_stream *stream,
                                                         const sida_sparsemax_train_call *call) {
    if (nothing(call)) return SIDA_OK;
    int32_t chunk;
    sida_status status = sida_cuda_use(stream->backend);
    if (status == SIDA_OK) status = check_chunk(call, &chunk, false);
    for (int32_t first = 0; status == SIDA_OK && first < call->sequences; first += chunk)
        status =
            forward_chunk(stream, call, first,
                          call->sequences - first < chunk ? call->sequences - first : chunk, chunk);
    return status;
}

extern "C" sida_status sida_sparsemax_train_backward_cuda(sida_stream *stream, float *d_queries,
                                                          float *d_memory, const float *d_out,
                                                          const sida_sparsemax_train_call *call) {
    if (nothing(call)) return SIDA_OK;
    int32_t chunk;
    sida_status status = sida_cuda_use(stream->backend);
    if (status == SIDA_OK) status = check_chunk(call, &chunk, true);
    for (int32_t first = 0; status == SIDA_OK && first < call->sequences; first += chunk)
        status = backward_chunk(stream, d_queries, d_memory, d_out, call, first,
                                call->sequences - first < chunk ? call->sequences - first : chunk,
                                chunk);
    return status;
}
