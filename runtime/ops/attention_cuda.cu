/* T5 attention, fused: a block takes some queries of one sequence and head over all their keys, a
 * tile of keys at a time, with a running maximum (Milakov and Gimelshein 2018). */
#include "runtime/ops/kernels_cuda.cuh"

constexpr int WARPS = 4, WARP_QUERIES = 4, QUERIES = WARPS * WARP_QUERIES, KEYS = WARP;
constexpr int MAX_D_KV = 256, MAX_DISTANCE = 4096, MAX_BUCKETS = 256;
constexpr int MAX_GRID_Y = 1024;
/* Distinct distances between a tile's queries and keys. */
constexpr int DISTANCES = QUERIES + KEYS - 1;

/* first[b]: the least distance in bucket b or beyond, in one direction. */
struct bucket_steps {
    int32_t count; /* buckets of one direction; 0: no bias */
    int16_t first[MAX_BUCKETS];
};

static __device__ int bucket_of(const int16_t *first, int count, bool bidirectional,
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
    const int32_t q_count = call.q_count[sequence], k_count = call.k_count[sequence];
    const int64_t q_start = call.q_start[sequence], k_start = call.k_start[sequence];
    for (int i = thread; i < steps.count; i += WARPS * WARP) first_of[i] = steps.first[i];
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
            float *out = (float *)call.out + (q_start + first + own + i) * call.ldo + column;
#pragma unroll
            for (int x = 0; x < D; x++)
                if (lane + x * WARP < d_kv)
                    out[lane + x * WARP] = keys > 0 ? sum[i][x] / total[i] : 0.0f;
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
    int64_t down = (call->rows + QUERIES - 1) / QUERIES;
    dim3 grid((unsigned)call->sequences * (unsigned)call->heads,
              (unsigned)(down < 1            ? 1
                         : down < MAX_GRID_Y ? down
                                             : MAX_GRID_Y));
    attention_kernel<D><<<grid, WARPS * WARP, bytes, stream_of(stream)>>>(*call, *steps);
    return launched("attention kernel");
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
    if (call->d_kv <= 2 * WARP) return launch<2>(stream, call, steps);
    if (call->d_kv <= 4 * WARP) return launch<4>(stream, call, steps);
    return launch<MAX_D_KV / WARP>(stream, call, steps);
}
