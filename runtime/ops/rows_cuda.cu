/* Ops that work along one row: embedding, norm, gate, router. */
#include "runtime/ops/kernels_cuda.cuh"

constexpr int THREADS = 128;

/* --- embedding: a block a row */

__global__ void embedding_kernel(float *out, sida_weight table, const int32_t *ids) {
    int64_t row = blockIdx.x, from = (int64_t)ids[row] * table.cols;
    for (int64_t c = threadIdx.x; c < table.cols; c += blockDim.x)
        out[row * table.cols + c] = weight_at(table.data, from + c, table.dtype);
}

extern "C" sida_status sida_embedding_cuda(sida_stream *stream, float *out, sida_weight table,
                                           const int32_t *ids, int64_t n) {
    if (n <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    embedding_kernel<<<(unsigned)n, THREADS, 0, stream_of(stream)>>>(out, table, ids);
    return launched("embedding kernel");
}

/* --- RMS norm: a block a row */

__global__ void rms_norm_kernel(float *out, const float *x, sida_weight weight, float epsilon) {
    __shared__ float parts[THREADS / WARP];
    const int64_t d = weight.cols;
    x += blockIdx.x * d;
    out += blockIdx.x * d;
    float sum = 0.0f;
    for (int64_t c = threadIdx.x; c < d; c += THREADS) sum = fmaf(x[c], x[c], sum);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int i = 0; i < THREADS / WARP; i++) sum += parts[i];
    float factor = 1.0f / sqrtf(sum / (float)d + epsilon);
    for (int64_t c = threadIdx.x; c < d; c += THREADS)
        out[c] = x[c] * factor * weight_at(weight.data, c, weight.dtype);
}

extern "C" sida_status sida_rms_norm_cuda(sida_stream *stream, void *out_rows, sida_dtype out_type,
                                          const float *x, sida_weight weight, int64_t n,
                                          float epsilon) {
    float *out = (float *)out_rows;
    (void)out_type;
    if (n <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    rms_norm_kernel<<<(unsigned)n, THREADS, 0, stream_of(stream)>>>(out, x, weight, epsilon);
    return launched("norm kernel");
}

/* --- gate */

__global__ void gated_kernel(float *out, const float *gate, const float *up, int64_t count,
                             sida_activation activation) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * blockDim.x)
        out[i] = activate(gate[i], activation) * up[i];
}

extern "C" sida_status sida_gated_cuda(sida_stream *stream, float *out, const float *gate,
                                       const float *up, int64_t count, sida_activation activation) {
    if (count <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    int64_t blocks = (count + THREADS - 1) / THREADS;
    gated_kernel<<<(unsigned)(blocks < 65536 ? blocks : 65536), THREADS, 0, stream_of(stream)>>>(
        out, gate, up, count, activation);
    return launched("gate kernel");
}

/* --- router: a warp a token */

/* Larger for a larger logit and, between equal ones, for the lower id; NaN below all; never 0. */
static __device__ unsigned long long rank_key(float logit, int32_t expert) {
    uint32_t bits = __float_as_uint(logit + 0.0f); /* -0 becomes 0 */
    bits = isnan(logit) ? 0u : (bits >> 31 ? ~bits : bits | 0x80000000u);
    return (unsigned long long)bits << 32 | (0xffffffffu - (uint32_t)expert);
}

/* The best of those below `bound`. */
static __device__ unsigned long long best_below(const float *logits, const uint8_t *allowed,
                                                int32_t experts, int lane,
                                                unsigned long long bound) {
    unsigned long long best = 0;
    for (int32_t e = lane; e < experts; e += WARP) {
        if (allowed && !allowed[e]) continue;
        unsigned long long key = rank_key(logits[e], e);
        if (key < bound && key > best) best = key;
    }
    for (int step = WARP / 2; step > 0; step /= 2) {
        unsigned long long other = __shfl_xor_sync(0xffffffffu, best, step);
        if (other > best) best = other;
    }
    return best;
}

__global__ void router_kernel(sida_router_call call) {
    const int lane = threadIdx.x % WARP;
    const int64_t token = (int64_t)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    if (token >= call.n) return;
    const float *logits = call.logits + token * call.experts_total;
    const uint8_t *allowed =
        call.allowed ? call.allowed + (int64_t)call.set_of[token] * call.experts_total : NULL;
    int32_t *experts = call.experts + token * call.k;
    float *alpha = call.alpha + token * call.k;
    float high = 0.0f, sum = 0.0f;
    unsigned long long bound = ~0ull;
    for (int32_t r = 0; r < call.k; r++) {
        bound = best_below(logits, allowed, call.experts_total, lane, bound);
        int32_t e = (int32_t)(0xffffffffu - (uint32_t)bound);
        float logit = logits[e];
        if (r == 0) {
            high = logit;
            for (int32_t i = lane; allowed && !call.renormalise && i < call.experts_total;
                 i += WARP)
                high = logits[i] > high ? logits[i] : high;
            if (allowed && !call.renormalise) high = warp_max(high);
        }
        float share = expf(logit - high);
        if (call.renormalise) sum += share;
        if (lane == 0) {
            experts[r] = e;
            alpha[r] = share;
        }
    }
    if (!call.renormalise) {
        for (int32_t i = lane; i < call.experts_total; i += WARP) sum += expf(logits[i] - high);
        sum = warp_sum(sum);
    }
    if (lane == 0)
        for (int32_t r = 0; r < call.k; r++) alpha[r] /= sum;
}

extern "C" sida_status sida_router_cuda(sida_stream *stream, const sida_router_call *call) {
    if (call->n <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    int64_t blocks = (call->n + THREADS / WARP - 1) / (THREADS / WARP);
    router_kernel<<<(unsigned)blocks, THREADS, 0, stream_of(stream)>>>(*call);
    return launched("router kernel");
}
