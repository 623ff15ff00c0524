/* T5 attention on tensor cores, d_kv 32, 64 and 128: a warp takes 16 queries of one sequence and
 * head, 16 keys at a time, with a running maximum (Milakov and Gimelshein 2018); the warps of a
 * block share the keys, and their sums meet in shared memory in a fixed order.
 *
 * Scores of T5 are large (nothing divides them by √d), so bf16 alone will not do. Each of q, k, p
 * and v is the sum of two bf16 numbers, high + low, and a product is high·high + high·low +
 * low·high: what is left out is 2^-17 of |q||k| at most, where bf16 alone would leave 2^-8.
 *
 * Keys and values go from memory straight into mma fragments. The order of the elements that are
 * summed over, and of the output's columns, is permuted so that every lane reads 16 bytes at a
 * time: with g = lane / 4 and t = lane % 4, a lane has elements 4t … 4t + 3 of each 16 of q and k,
 * and elements g * d_kv / 8 … of v. */
#include "runtime/ops/attention_cuda.cuh"
#include "runtime/ops/mma_cuda.cuh"

constexpr int QUERIES = 16, KEYS = 16; /* of a warp at a time */
constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int MAX_TILE_DISTANCE = 512;

/* Two numbers each. */
struct halves {
    uint32_t high, low;
};
static __device__ halves halve(float x, float y) {
    halves out;
    out.high = pack_bf16(x, y);
    out.low =
        pack_bf16(x - __uint_as_float(out.high << 16), y - __uint_as_float(out.high & 0xffff0000u));
    return out;
}

static __device__ float4 load4(const float *from, bool inside) {
    return inside ? *(const float4 *)from : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

static __device__ void store4(void *out, sida_dtype type, int64_t at, float4 value) {
    if (type == SIDA_F32)
        *(float4 *)((float *)out + at) = value;
    else
        *(uint2 *)((__nv_bfloat16 *)out + at) =
            make_uint2(pack_bf16(value.x, value.y), pack_bf16(value.z, value.w));
}

/* The queries of a warp, as fragments. */
template <int D> struct query_tile {
    uint32_t high[D / 16][4], low[D / 16][4];

    __device__ void set(const float4 (&q)[D / 16][2]) {
#pragma unroll
        for (int s = 0; s < D / 16; s++) {
            const float4 a = q[s][0], b = q[s][1];
            const halves parts[4] = {halve(a.x, a.y), halve(b.x, b.y), halve(a.z, a.w),
                                     halve(b.z, b.w)};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                high[s][i] = parts[i].high;
                low[s][i] = parts[i].low;
            }
        }
    }
};

/* Rows g and g + 8 of 16, of which the first `count` are there; the others are zero. */
template <int D>
static __device__ void load_queries(float4 (&out)[D / 16][2], const float *q, int64_t ld,
                                    int count) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int s = 0; s < D / 16; s++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            out[s][h] = load4(q + (g + 8 * h) * ld + s * 16 + 4 * t, g + 8 * h < count);
}

/* 16 keys: row g of each 8. */
template <int D> struct key_tile {
    float4 at[2][D / 16];

    __device__ void load(const float *k, int64_t ld, int count) {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int s = 0; s < D / 16; s++)
                at[n][s] = load4(k + (n * 8 + g) * ld + s * 16 + 4 * t, n * 8 + g < count);
    }
    /* score[n][c]: of query g + 8 (c / 2) and key 8n + 2t + c % 2. Six chains of products. */
    __device__ void scores(float (&score)[2][4], const query_tile<D> &q) const {
        float part[2][3][4] = {};
#pragma unroll
        for (int s = 0; s < D / 16; s++)
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const halves b0 = halve(at[n][s].x, at[n][s].y);
                const halves b1 = halve(at[n][s].z, at[n][s].w);
                mma_bf16(part[n][0], q.high[s], b0.high, b1.high);
                mma_bf16(part[n][1], q.high[s], b0.low, b1.low);
                mma_bf16(part[n][2], q.low[s], b0.high, b1.high);
            }
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                score[n][c] = part[n][0][c] + (part[n][1][c] + part[n][2][c]);
    }
};

/* 16 values: rows 2t, 2t + 1, 2t + 8, 2t + 9. */
template <int D> struct value_tile {
    float4 at[4][D / 32];

    __device__ void load(const float *v, int64_t ld, int count) {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = i / 2 * 8 + 2 * t + i % 2;
#pragma unroll
            for (int x = 0; x < D / 32; x++)
                at[i][x] = load4(v + row * ld + g * (D / 8) + 4 * x, row < count);
        }
    }
    /* sum[j][c]: of query g + 8 (c / 2) and element (2t + c % 2) * D / 8 + j. Four of them at a
     * time, so that a product need not wait for the one before it. */
    __device__ void add(float (&sum)[D / 8][4], const uint32_t (&high)[4],
                        const uint32_t (&low)[4]) const {
#pragma unroll
        for (int x = 0; x < D / 32; x++) {
            const halves b0[4] = {halve(at[0][x].x, at[1][x].x), halve(at[0][x].y, at[1][x].y),
                                  halve(at[0][x].z, at[1][x].z), halve(at[0][x].w, at[1][x].w)};
            const halves b1[4] = {halve(at[2][x].x, at[3][x].x), halve(at[2][x].y, at[3][x].y),
                                  halve(at[2][x].z, at[3][x].z), halve(at[2][x].w, at[3][x].w)};
#pragma unroll
            for (int i = 0; i < 4; i++) mma_bf16(sum[4 * x + i], high, b0[i].low, b1[i].low);
#pragma unroll
            for (int i = 0; i < 4; i++) mma_bf16(sum[4 * x + i], low, b0[i].high, b1[i].high);
#pragma unroll
            for (int i = 0; i < 4; i++) mma_bf16(sum[4 * x + i], high, b0[i].high, b1[i].high);
        }
    }
};

/* What a warp has summed: high[h] and total[h] are of query g + 8h. */
template <int D> struct running_sum {
    float sum[D / 8][4], high[2], total[2];

    __device__ void clear(void) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            high[h] = -INFINITY;
            total[h] = 0.0f;
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) sum[j][c] = 0.0f;
    }
    /* Scores (-INFINITY: not seen) become exp(score - maximum). */
    __device__ void raise(float (&score)[2][4]) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = fmaxf(fmaxf(score[0][2 * h], score[0][2 * h + 1]),
                              fmaxf(score[1][2 * h], score[1][2 * h + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            top = fmaxf(top, high[h]);
            /* Nothing seen so far: all is zero, and stays so. */
            const float base = top == -INFINITY ? 0.0f : top;
            const float shrink = __expf(high[h] - base);
            high[h] = top;
            total[h] *= shrink;
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                sum[j][2 * h] *= shrink;
                sum[j][2 * h + 1] *= shrink;
            }
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int c = 2 * h; c < 2 * h + 2; c++) {
                    score[n][c] = __expf(score[n][c] - base);
                    total[h] += score[n][c];
                }
        }
    }
    __device__ void add(const float (&p)[2][4], const value_tile<D> &values) {
        uint32_t first[4], second[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const halves both = halve(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
            first[i] = both.high;
            second[i] = both.low;
        }
        values.add(sum, first, second);
    }
};

/* Sums of a block's warps. Rows are four floats longer, against bank conflicts. */
template <int D> struct warp_sums {
    float high[WARPS][QUERIES], total[WARPS][QUERIES];
    float sum[WARPS][QUERIES][D + 4];

    __device__ void put(const running_sum<D> &own) {
        const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float all = own.total[h];
            all += __shfl_xor_sync(0xffffffffu, all, 1);
            all += __shfl_xor_sync(0xffffffffu, all, 2);
            const int row = g + 8 * h;
            if (t == 0) {
                high[warp][row] = own.high[h];
                total[warp][row] = all;
            }
#pragma unroll
            for (int c = 0; c < 2; c++)
#pragma unroll
                for (int j = 0; j < D / 8; j += 4)
                    *(float4 *)&sum[warp][row][(2 * t + c) * (D / 8) + j] =
                        make_float4(own.sum[j][2 * h + c], own.sum[j + 1][2 * h + c],
                                    own.sum[j + 2][2 * h + c], own.sum[j + 3][2 * h + c]);
        }
    }
    /* Elements d … d + 3 of a row, over warps first … first + count - 1. */
    __device__ float4 get(int first, int count, int row, int d) const {
        float top = -INFINITY, all = 0.0f;
        float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (count == 0) return out;
        for (int w = first; w < first + count; w++) top = fmaxf(top, high[w][row]);
        for (int w = first; w < first + count; w++) {
            const float share = __expf(high[w][row] - top);
            const float4 part = *(const float4 *)&sum[w][row][d];
            all = fmaf(total[w][row], share, all);
            out.x = fmaf(part.x, share, out.x);
            out.y = fmaf(part.y, share, out.y);
            out.z = fmaf(part.z, share, out.z);
            out.w = fmaf(part.w, share, out.w);
        }
        const float factor = 1.0f / all;
        return make_float4(out.x * factor, out.y * factor, out.z * factor, out.w * factor);
    }
};

/* Keys that the 16 queries from `first` on see between them. */
static __device__ int32_t keys_of(const sida_attention_call &call, int32_t first, int32_t q_count,
                                  int32_t k_count, int32_t q_position) {
    if (first >= q_count) return 0;
    if (!call.causal) return k_count;
    const int32_t end = first + QUERIES < q_count ? first + QUERIES : q_count;
    return k_count < q_position + end ? k_count : q_position + end;
}

/* More than 16 queries: half the warps take another 16. How a sequence is cut depends on its own
 * counts alone. */
template <int D>
__global__ void __launch_bounds__(THREADS)
    attention_tiles_kernel(const sida_attention_call call,
                           const __grid_constant__ bucket_steps steps) {
    /* The next keys and values are loaded ahead, where there are registers for them. */
    constexpr bool AHEAD = D <= 64;
    extern __shared__ float4 shared[];
    __shared__ float bias[2 * MAX_TILE_DISTANCE + 1]; /* by relative position + reach */
    warp_sums<D> &sums = *(warp_sums<D> *)shared;
    const int thread = threadIdx.x, warp = thread / WARP;
    const int g = thread % WARP / 4, t = thread % 4;
    const int32_t sequence = blockIdx.x / call.heads, head = blockIdx.x % call.heads;
    const int64_t column = (int64_t)head * D;
    const int32_t reach = steps.count > 0 ? call.bias_max_distance : 0;
    for (int i = thread; i < 2 * reach + 1; i += THREADS) {
        int64_t bucket = bucket_of(steps.first, steps.count, call.bias_bidirectional, i - reach);
        bias[i] = steps.count > 0
                      ? weight_at(call.bias.data, bucket * call.bias.cols + head, call.bias.dtype)
                      : 0.0f;
    }
    allow_next();
    await_inputs();
    const int32_t q_count = call.q_count[sequence], k_count = call.k_count[sequence];
    const int32_t q_position = call.q_position ? call.q_position[sequence] : 0;
    const int64_t q_start = call.q_start[sequence], k_start = call.k_start[sequence];
    __syncthreads(); /* bias is there */
    const int tiles = q_count > QUERIES ? 2 : 1, splits = tiles == 1 ? WARPS : WARPS / 2;
    const int tile = tiles == 1 ? 0 : warp / (WARPS / 2), split = warp - tile * splits;
    for (int32_t first = (int32_t)blockIdx.y * tiles * QUERIES; first < q_count;
         first += (int32_t)gridDim.y * tiles * QUERIES) {
        const int32_t own = first + tile * QUERIES, position = q_position + own;
        const int32_t keys = keys_of(call, own, q_count, k_count, q_position);
        const float *k = call.k + k_start * call.ldk + column;
        const float *v = call.v + k_start * call.ldv + column;
        query_tile<D> queries;
        key_tile<D> key;
        value_tile<D> values;
        running_sum<D> running;
        running.clear();
        int32_t begin = split * KEYS;
        if (begin < keys) {
            float4 q[D / 16][2];
            key.load(k + begin * call.ldk, call.ldk, keys - begin);
            load_queries<D>(q, call.q + (q_start + own) * call.ldq + column, call.ldq,
                            q_count - own);
            if (AHEAD) values.load(v + begin * call.ldv, call.ldv, keys - begin);
            queries.set(q);
        }
        for (; begin < keys; begin += splits * KEYS) {
            const int32_t next = begin + splits * KEYS;
            float score[2][4];
            key.scores(score, queries);
            if (AHEAD && next < keys) key.load(k + next * call.ldk, call.ldk, keys - next);
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const int32_t at = begin + 8 * n + 2 * t + c % 2;
                    const int32_t relative = at - (position + g + c / 2 * 8);
                    const int32_t near = relative < -reach  ? -reach
                                         : relative > reach ? reach
                                                            : relative;
                    score[n][c] += bias[near + reach];
                    if (at >= keys || (call.causal && relative > 0)) score[n][c] = -INFINITY;
                }
            running.raise(score);
            if (!AHEAD) values.load(v + begin * call.ldv, call.ldv, keys - begin);
            running.add(score, values);
            if (AHEAD && next < keys) values.load(v + next * call.ldv, call.ldv, keys - next);
            if (!AHEAD && next < keys) key.load(k + next * call.ldk, call.ldk, keys - next);
        }
        if (split * KEYS < keys) sums.put(running);
        __syncthreads();
        for (int i = thread; i < tiles * QUERIES * (D / 4); i += THREADS) {
            const int row = i / (D / 4), d = i % (D / 4) * 4, from = row / QUERIES;
            if (first + row >= q_count) break;
            const int32_t seen =
                keys_of(call, first + from * QUERIES, q_count, k_count, q_position);
            const int32_t parts = (seen + KEYS - 1) / KEYS;
            store4(call.out, call.out_type, (q_start + first + row) * call.ldo + column + d,
                   sums.get(from * splits, parts < splits ? parts : splits, row % QUERIES, d));
        }
        __syncthreads(); /* the next turn writes them anew */
    }
}

bool attention_tiles_take(const sida_attention_call *call) {
    return (call->d_kv == 32 || call->d_kv == 64 || call->d_kv == 128) &&
           (call->ldo | call->ldq | call->ldk | call->ldv) % 4 == 0 &&
           ((uintptr_t)call->out | (uintptr_t)call->q | (uintptr_t)call->k | (uintptr_t)call->v) %
                   16 ==
               0 &&
           (!call->bias.data || call->bias_max_distance <= MAX_TILE_DISTANCE);
}

template <int D>
static sida_status launch(sida_stream *stream, const sida_attention_call *call,
                          const bucket_steps *steps) {
    sida_status status = SIDA_CUDA(cudaFuncSetAttribute(attention_tiles_kernel<D>,
                                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                        (int)sizeof(warp_sums<D>)));
    if (status != SIDA_OK) return status;
    const dim3 grid((unsigned)call->sequences * (unsigned)call->heads,
                    attention_blocks(call, 2 * QUERIES));
    return launch_kernel("attention kernel, tiles", stream, attention_tiles_kernel<D>, grid,
                         THREADS, sizeof(warp_sums<D>), *call, *steps);
}

sida_status attention_tiles(sida_stream *stream, const sida_attention_call *call,
                            const bucket_steps *steps) {
    if (call->d_kv == 32) return launch<32>(stream, call, steps);
    return call->d_kv == 64 ? launch<64>(stream, call, steps) : launch<128>(stream, call, steps);
}
