/* Ops that work along one row: embedding, norm, gate. */
#include "runtime/ops/kernels_cuda.cuh"

constexpr int THREADS = 128;

/* Four stored elements; one, where rows do not begin at multiples of four. */
static __device__ float4 load4(const float *from) {
    return *(const float4 *)from;
}
template <typename W> static __device__ float4 load4(const W *from) {
    W part[4];
    const uint2 raw = *(const uint2 *)from;
    memcpy(part, &raw, sizeof part);
    return make_float4(to_float(part[0]), to_float(part[1]), to_float(part[2]), to_float(part[3]));
}

static __device__ void store4(float *to, float4 v) {
    *(float4 *)to = v;
}
static __device__ void store4(__nv_bfloat16 *to, float4 v) {
    const __nv_bfloat162 part[2] = {__floats2bfloat162_rn(v.x, v.y),
                                    __floats2bfloat162_rn(v.z, v.w)};
    uint2 raw;
    memcpy(&raw, part, sizeof raw);
    *(uint2 *)to = raw;
}

static __device__ void store(float *to, float v) {
    *to = v;
}
static __device__ void store(__nv_bfloat16 *to, float v) {
    *to = __float2bfloat16_rn(v);
}

static bool aligned(const void *a, const void *b, int64_t d) {
    return d % 4 == 0 && ((uintptr_t)a | (uintptr_t)b) % 16 == 0;
}

/* --- embedding: a block a row */

template <typename W>
__global__ void embedding_kernel(float *out, const W *table, const int32_t *ids, int64_t d,
                                 bool packed) {
    allow_next();
    await_inputs();
    const W *from = table + ids[blockIdx.x] * d;
    out += blockIdx.x * d;
    if (packed)
        for (int64_t c = 4 * threadIdx.x; c < d; c += 4 * THREADS) store4(out + c, load4(from + c));
    else
        for (int64_t c = threadIdx.x; c < d; c += THREADS) out[c] = to_float(from[c]);
}

template <typename W>
static sida_status embed(sida_stream *stream, float *out, sida_weight table, const int32_t *ids,
                         int64_t n) {
    return launch_kernel("embedding kernel", stream, embedding_kernel<W>, dim3((unsigned)n),
                         THREADS, 0, out, (const W *)table.data, ids, table.cols,
                         aligned(out, table.data, table.cols));
}

extern "C" sida_status sida_embedding_cuda(sida_stream *stream, float *out, sida_weight table,
                                           const int32_t *ids, int64_t n) {
    if (n <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    if (table.dtype == SIDA_F32) return embed<float>(stream, out, table, ids, n);
    if (table.dtype == SIDA_F16) return embed<__half>(stream, out, table, ids, n);
    return embed<__nv_bfloat16>(stream, out, table, ids, n);
}

/* --- RMS norm: a block a row. Up to 1024 elements it is one warp, which keeps them: no barrier. */

constexpr int NORM_PACKS = 8; /* of four elements, that a thread keeps */

template <int ROW_THREADS> static __device__ float block_sum(float sum) {
    __shared__ float parts[ROW_THREADS / WARP];
    sum = warp_sum(sum);
    if (ROW_THREADS == WARP) return sum;
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int i = 0; i < ROW_THREADS / WARP; i++) sum += parts[i];
    return sum;
}

/* d <= 4 * NORM_PACKS * ROW_THREADS, rows aligned. */
template <int ROW_THREADS, typename Out, typename W>
__global__ void __launch_bounds__(ROW_THREADS)
    rms_norm_packed_kernel(Out *out, const float *x, const W *weight, int64_t d, float epsilon) {
    float4 w[NORM_PACKS], v[NORM_PACKS];
    allow_next();
#pragma unroll
    for (int i = 0; i < NORM_PACKS; i++) {
        const int64_t c = 4 * (threadIdx.x + i * ROW_THREADS);
        if (c < d) w[i] = load4(weight + c);
    }
    await_inputs();
    x += blockIdx.x * d;
    out += blockIdx.x * d;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < NORM_PACKS; i++) {
        const int64_t c = 4 * (threadIdx.x + i * ROW_THREADS);
        v[i] = c < d ? load4(x + c) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
#pragma unroll
    for (int i = 0; i < NORM_PACKS; i++)
        sum = fmaf(v[i].x, v[i].x,
                   fmaf(v[i].y, v[i].y, fmaf(v[i].z, v[i].z, fmaf(v[i].w, v[i].w, sum))));
    const float factor = 1.0f / sqrtf(block_sum<ROW_THREADS>(sum) / (float)d + epsilon);
#pragma unroll
    for (int i = 0; i < NORM_PACKS; i++) {
        const int64_t c = 4 * (threadIdx.x + i * ROW_THREADS);
        if (c < d)
            store4(out + c, make_float4(v[i].x * factor * w[i].x, v[i].y * factor * w[i].y,
                                        v[i].z * factor * w[i].z, v[i].w * factor * w[i].w));
    }
}

/* Any d. */
template <typename Out, typename W>
__global__ void __launch_bounds__(THREADS)
    rms_norm_kernel(Out *out, const float *x, const W *weight, int64_t d, float epsilon) {
    allow_next();
    await_inputs();
    x += blockIdx.x * d;
    out += blockIdx.x * d;
    float sum = 0.0f;
    for (int64_t c = threadIdx.x; c < d; c += THREADS) sum = fmaf(x[c], x[c], sum);
    const float factor = 1.0f / sqrtf(block_sum<THREADS>(sum) / (float)d + epsilon);
    for (int64_t c = threadIdx.x; c < d; c += THREADS)
        store(out + c, x[c] * factor * to_float(weight[c]));
}

template <typename Out, typename W>
static sida_status norm(sida_stream *stream, void *out, const float *x, sida_weight weight,
                        int64_t n, float epsilon) {
    constexpr int WIDE = 128;
    const int64_t d = weight.cols;
    auto *kernel = rms_norm_kernel<Out, W>;
    unsigned threads = THREADS;
    if (aligned(out, x, d) && aligned(weight.data, x, d) && d <= 4 * NORM_PACKS * WIDE) {
        threads = d <= 4 * NORM_PACKS * WARP ? WARP : WIDE;
        kernel = threads == WARP ? rms_norm_packed_kernel<WARP, Out, W>
                                 : rms_norm_packed_kernel<WIDE, Out, W>;
    }
    return launch_kernel("norm kernel", stream, kernel, dim3((unsigned)n), threads, 0, (Out *)out,
                         x, (const W *)weight.data, d, epsilon);
}

template <typename Out>
static sida_status norm_to(sida_stream *stream, void *out, const float *x, sida_weight weight,
                           int64_t n, float epsilon) {
    if (weight.dtype == SIDA_F32) return norm<Out, float>(stream, out, x, weight, n, epsilon);
    if (weight.dtype == SIDA_F16) return norm<Out, __half>(stream, out, x, weight, n, epsilon);
    return norm<Out, __nv_bfloat16>(stream, out, x, weight, n, epsilon);
}

extern "C" sida_status sida_rms_norm_cuda(sida_stream *stream, void *out, sida_dtype out_type,
                                          const float *x, sida_weight weight, int64_t n,
                                          float epsilon) {
    if (n <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    return out_type == SIDA_BF16 ? norm_to<__nv_bfloat16>(stream, out, x, weight, n, epsilon)
                                 : norm_to<float>(stream, out, x, weight, n, epsilon);
}

/* --- gate */

__global__ void gated_kernel(float *out, const float *gate, const float *up, int64_t count,
                             sida_activation activation) {
    allow_next();
    await_inputs();
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * blockDim.x)
        out[i] = activate(gate[i], activation) * up[i];
}

extern "C" sida_status sida_gated_cuda(sida_stream *stream, float *out, const float *gate,
                                       const float *up, int64_t count, sida_activation activation) {
    if (count <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    const int64_t blocks = (count + THREADS - 1) / THREADS;
    return launch_kernel("gate kernel", stream, gated_kernel,
                         dim3((unsigned)(blocks < 65536 ? blocks : 65536)), THREADS, 0, out, gate,
                         up, count, activation);
}
