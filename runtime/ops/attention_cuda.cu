/* T5 attention of any shape, and the choice between this and the kernel on tensor cores. Fused: a
 * block takes some queries of one sequence and head over all their keys, a tile of keys at a time,
 * with a running maximum (Milakov and Gimelshein 2018), all in fp32. And the caches' new rows. */
#include "runtime/ops/attention_cuda.cuh"

constexpr int WARPS = 4, WARP_QUERIES = 4, QUERIES = WARPS * WARP_QUERIES, KEYS = WARP;
constexpr int MAX_D_KV = 256, MAX_DISTANCE = 4096;
/* Distinct distances between a tile's queries and keys. */
constexpr int DISTANCES = QUERIES + KEYS - 1;

static __host__ size_t shared_floats(int32_t d_kv) {
    return (size_t)QUERIES * d_kv + (size_t)KEYS * (d_kv + 1) + (size_t)KEYS * d_kv;
}

/* D: d_kv / 32, rounded up to the next that is built. */
template <int D>
__global__ void __launch_bounds__(WARPS *WARP)
    attention_kernel(sida_attention_call call, bucket_steps steps) {
    extern __shared__ float shared[];
    __shared__ float bias[DISTANCES];
    __shared__ int16_t first_of[MAX_BUCKETS];
    const int32_t d_kv = call.d_kv, thread = threadIdx.x, lane = thread % WARP;
    const int own = thread / WARP * WARP_QUERIES; /* this warp's first query of the block */
    const int32_t sequence = blockIdx.x / call.heads, head = blockIdx.x % call.heads;
    const int64_t column = (int64_t)head * d_kv;
    float *q = shared, *k = q + QUERIES * d_kv, *v = k + KEYS * (d_kv + 1);
    for (int i = thread; i < steps.count; i += WARPS * WARP) first_of[i] = steps.first[i];
    allow_next();
    await_inputs();
    const int32_t q_count = call.q_count[sequence], k_count = call.k_count[sequence];
    const int64_t q_start = call.q_start[sequence], k_start = call.k_start[sequence];
    for (int32_t first = (int32_t)blockIdx.y * QUERIES; first < q_count;
         first += (int32_t)gridDim.y * QUERIES) {
        const int32_t count = q_count - first < QUERIES ? q_count - first : QUERIES;
        const int32_t position = first + (call.q_position ? call.q_position[sequence] : 0);
        int32_t keys = k_count;
        if (call.causal && keys > position + count) keys = position + count;
        float sum[WARP_QUERIES][D], high[WARP_QUERIES], total[WARP_QUERIES];
#pragma unroll
        for (int i = 0; i < WARP_QUERIES; i++) {
            high[i] = -INFINITY;
            total[i] = 0.0f;
#pragma unroll
            for (int x = 0; x < D; x++) sum[i][x] = 0.0f;
        }
        __syncthreads(); /* the last tile's readers */
        for (int i = thread; i < QUERIES * d_kv; i += WARPS * WARP) {
            int row = i / d_kv, d = i % d_kv;
            q[i] = row < count ? call.q[(q_start + first + row) * call.ldq + column + d] : 0.0f;
        }
        for (int32_t begin = 0; begin < keys; begin += KEYS) {
            __syncthreads(); /* the last keys' readers */
            for (int i = thread; i < KEYS * d_kv; i += WARPS * WARP) {
                int row = i / d_kv, d = i % d_kv;
                bool inside = begin + row < keys;
                int64_t at = k_start + begin + row;
                k[row * (d_kv + 1) + d] = inside ? call.k[at * call.ldk + column + d] : 0.0f;
                v[i] = inside ? call.v[at * call.ldv + column + d] : 0.0f;
            }
            /* bias[j + QUERIES - 1 - i]: of the block's query i and the tile's key j. */
            if (steps.count > 0 && thread < DISTANCES) {
                int32_t relative = begin - position - (QUERIES - 1) + thread;
                int64_t bucket =
                    bucket_of(first_of, steps.count, call.bias_bidirectional, relative);
                bias[thread] =
                    weight_at(call.bias.data, bucket * call.bias.cols + head, call.bias.dtype);
            }
            __syncthreads();
            float p[WARP_QUERIES] = {};
            for (int d = 0; d < d_kv; d++) {
                float key = k[lane * (d_kv + 1) + d];
#pragma unroll
                for (int i = 0; i < WARP_QUERIES; i++)
                    p[i] = fmaf(q[(own + i) * d_kv + d], key, p[i]);
            }
#pragma unroll
            for (int i = 0; i < WARP_QUERIES; i++) {
                bool visible = own + i < count && begin + lane < keys &&
                               (!call.causal || begin + lane <= position + own + i);
                float score = p[i];
                if (steps.count > 0) score += bias[lane + QUERIES - 1 - (own + i)];
                float top = fmaxf(high[i], warp_max(visible ? score : -INFINITY));
                /* No key of this tile or those before is visible: nothing to add. */
                bool none = top == -INFINITY;
                p[i] = visible ? expf(score - top) : 0.0f;
                float shrink = none ? 1.0f : expf(high[i] - top);
                total[i] = total[i] * shrink + warp_sum(p[i]);
                high[i] = top;
#pragma unroll
                for (int x = 0; x < D; x++) sum[i][x] *= shrink;
            }
            for (int j = 0; j < KEYS; j++) {
                float value[D];
#pragma unroll
                for (int x = 0; x < D; x++)
                    value[x] = lane + x * WARP < d_kv ? v[j * d_kv + lane + x * WARP] : 0.0f;
#pragma unroll
                for (int i = 0; i < WARP_QUERIES; i++) {
                    float weight = __shfl_sync(0xffffffffu, p[i], j);
#pragma unroll
                    for (int x = 0; x < D; x++) sum[i][x] = fmaf(weight, value[x], sum[i][x]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < WARP_QUERIES; i++) {
            if (own + i >= count) continue;
            const int64_t to = (q_start + first + own + i) * call.ldo + column;
#pragma unroll
            for (int x = 0; x < D; x++) {
                const int32_t d = lane + x * WARP;
                const float value = keys > 0 ? sum[i][x] / total[i] : 0.0f;
                if (d >= d_kv) continue;
                if (call.out_type == SIDA_F32)
                    ((float *)call.out)[to + d] = value;
                else
                    ((__nv_bfloat16 *)call.out)[to + d] = __float2bfloat16_rn(value);
            }
        }
    }
}

/* Remembered between the calls of one thread: every block asks for the same ones. */
static const bucket_steps *steps_get(bool bidirectional, int32_t buckets, int32_t max_distance) {
    static thread_local struct {
        int32_t buckets, max_distance;
        bucket_steps steps;
    } tables[2];
    auto *table = &tables[bidirectional];
    if (table->buckets == buckets && table->max_distance == max_distance) return &table->steps;
    bucket_steps *steps = &table->steps;
    steps->count = bidirectional ? buckets / 2 : buckets;
    int32_t reached = 0;
    steps->first[0] = 0;
    for (int32_t r = 0; r <= max_distance; r++) {
        int32_t bucket = sida_relative_bucket(-r, bidirectional, buckets, max_distance);
        while (reached < bucket) steps->first[++reached] = (int16_t)r;
    }
    table->buckets = buckets;
    table->max_distance = max_distance;
    return steps;
}

template <int D>
static sida_status launch(sida_stream *stream, const sida_attention_call *call,
                          const bucket_steps *steps) {
    size_t bytes = shared_floats(call->d_kv) * sizeof(float);
    sida_status status = SIDA_CUDA(cudaFuncSetAttribute(
        attention_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    if (status != SIDA_OK) return status;
    dim3 grid((unsigned)call->sequences * (unsigned)call->heads, attention_blocks(call, QUERIES));
    return launch_kernel("attention kernel", stream, attention_kernel<D>, grid, WARPS * WARP, bytes,
                         *call, *steps);
}

extern "C" sida_status sida_attention_cuda(sida_stream *stream, const sida_attention_call *call) {
    const bucket_steps none = {};
    const bucket_steps *steps = &none;
    if (call->d_kv < 1 || call->d_kv > MAX_D_KV)
        return sida_fail(SIDA_ERROR_UNSUPPORTED, "attention: d_kv %d is not in 1 … %d", call->d_kv,
                         MAX_D_KV);
    if (call->sequences <= 0 || call->heads <= 0) return SIDA_OK;
    if ((int64_t)call->sequences * call->heads > INT32_MAX)
        return sida_fail(SIDA_ERROR_UNSUPPORTED, "attention: %d sequences of %d heads",
                         call->sequences, call->heads);
    if (call->bias.data) {
        if (call->bias_max_distance < 1 || call->bias_max_distance > MAX_DISTANCE ||
            call->bias.rows < 4 || call->bias.rows > MAX_BUCKETS)
            return sida_fail(SIDA_ERROR_UNSUPPORTED, "attention: %d buckets up to distance %d",
                             (int)call->bias.rows, call->bias_max_distance);
        steps =
            steps_get(call->bias_bidirectional, (int32_t)call->bias.rows, call->bias_max_distance);
    }
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    if (attention_tiles_take(call)) return attention_tiles(stream, call, steps);
    if (call->d_kv <= 2 * WARP) return launch<2>(stream, call, steps);
    if (call->d_kv <= 4 * WARP) return launch<4>(stream, call, steps);
    return launch<MAX_D_KV / WARP>(stream, call, steps);
}

/* --- append: a block a row, or more than one where a sequence has many */

constexpr int APPEND_THREADS = 256;

/* P: float, or float4 where everything is aligned; width and ld are counted in it. */
template <typename P>
__global__ void __launch_bounds__(APPEND_THREADS)
    append_kernel(sida_append_call call, int64_t width, int64_t ld) {
    allow_next();
    await_inputs();
    const int32_t s = blockIdx.x, count = call.q_count[s];
    const int64_t from = call.q_start[s], to = call.start[s] + call.position[s];
    for (int32_t i = (int32_t)blockIdx.y; i < count; i += (int32_t)gridDim.y)
        for (int64_t c = threadIdx.x; c < 2 * width; c += APPEND_THREADS) {
            const bool key = c < width;
            const int64_t at = key ? c : c - width;
            ((P *)(key ? call.k_cache : call.v_cache))[(to + i) * width + at] =
                ((const P *)(key ? call.k : call.v))[(from + i) * ld + at];
        }
}

extern "C" sida_status sida_append_cuda(sida_stream *stream, const sida_append_call *call) {
    if (call->sequences <= 0 || call->rows <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    const int64_t down = (call->rows + call->sequences - 1) / call->sequences;
    const dim3 grid((unsigned)call->sequences, (unsigned)(down < 1024 ? down : 1024));
    const bool packed =
        (call->width | call->ld) % 4 == 0 && ((uintptr_t)call->k_cache | (uintptr_t)call->v_cache |
                                              (uintptr_t)call->k | (uintptr_t)call->v) %
                                                     16 ==
                                                 0;
    if (packed)
        return launch_kernel("append kernel", stream, append_kernel<float4>, grid, APPEND_THREADS,
                             0, *call, call->width / 4, call->ld / 4);
    return launch_kernel("append kernel", stream, append_kernel<float>, grid, APPEND_THREADS, 0,
                         *call, call->width, call->ld);
}
