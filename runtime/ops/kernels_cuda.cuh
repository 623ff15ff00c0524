/* What the CUDA kernels share: stored weights as fp32, sums over a warp, and the product of a few
 * rows with a weight matrix, which reads every weight once. */
#ifndef SIDA_RUNTIME_OPS_KERNELS_CUDA_CUH
#define SIDA_RUNTIME_OPS_KERNELS_CUDA_CUH

/* The project's headers are C; the system's that they include come first. */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

extern "C" {
#include "runtime/backend/backend_cuda.h"
#include "runtime/ops/ops_cuda.h"
}

constexpr int WARP = 32;

static inline cudaStream_t stream_of(sida_stream *stream) {
    return sida_cuda_stream_of(stream)->stream;
}

/* --- launches
 *
 * On compute capability 9.0 and later a kernel may start while the one before it on the stream is
 * ending (programmatic dependent launch). Every kernel therefore calls await_inputs() in every
 * thread before it reads what another kernel wrote or writes anything at all; what it reads before
 * that must be weights and index arrays that no kernel writes (expert_cuda.cu has one more case).
 * allow_next() says that the next may start; it costs the next one nothing to wait, so it is called
 * early. */

__device__ inline void await_inputs(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}
__device__ inline void allow_next(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/* Launches kernel<<<grid, threads, shared>>>(arguments...) so; `what` names it in a failure. */
template <typename... Parameters, typename... Arguments>
static inline sida_status launch_kernel(const char *what, sida_stream *stream,
                                        void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                                        size_t shared, Arguments... arguments) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream_of(stream);
    config.attrs = &early;
    config.numAttrs = sida_cuda_early_launch(stream->backend) ? 1 : 0;
    return sida_cuda_check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), what);
}

__device__ inline float to_float(float value) {
    return value;
}
__device__ inline float to_float(__half value) {
    return __half2float(value);
}
__device__ inline float to_float(__nv_bfloat16 value) {
    return __bfloat162float(value);
}

/* An element of any stored type, where speed does not matter. */
__device__ inline float weight_at(const void *data, int64_t index, sida_dtype dtype) {
    if (dtype == SIDA_F32) return ((const float *)data)[index];
    if (dtype == SIDA_F16) return to_float(((const __half *)data)[index]);
    return to_float(((const __nv_bfloat16 *)data)[index]);
}

/* Every lane gets the same bytes: a + b is b + a. */
__device__ inline float warp_sum(float value) {
    for (int step = WARP / 2; step > 0; step /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}
__device__ inline float warp_max(float value) {
    for (int step = WARP / 2; step > 0; step /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
    return value;
}

/* exp(-x) that overflows makes the quotient 0, as it should be. */
__device__ inline float activate(float x, sida_activation activation) {
    if (activation == SIDA_ACT_RELU) return x < 0.0f ? 0.0f : x;
    if (activation == SIDA_ACT_SILU) return x / (1.0f + expf(-x));
    /* 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)) */
    float u = x * 0.7978845608028654f * fmaf(x * x, 0.044715f, 1.0f);
    return x / (1.0f + expf(-2.0f * u));
}

/* --- products of few rows */

/* y = epilogue(scale * x Wᵀ + bias), rows chosen by index: row i reads x[x_index[i] / x_divide] and
 * writes y[y_index[i]] (NULL: i). With `up`, y = act(x Wᵀ) * (x upᵀ). */
struct product {
    const void *w, *up; /* [rows, cols] */
    const float *x, *bias;
    const float *alpha; /* [rows of y]: y += alpha * …; NULL: no */
    float *y;
    const int32_t *x_index, *y_index;
    int64_t ldx, ldy, rows, cols;
    int32_t x_divide;
    float scale;
    sida_epilogue epilogue;
    sida_activation activation;
};

/* Rows of x at a time, weight rows that a warp reads beside each other, warps of a block. */
constexpr int PRODUCT_X = 8, PRODUCT_W = 4, PRODUCT_WARPS = 4;

/* Columns of y that one block makes. */
__host__ __device__ inline int64_t product_columns(bool gated) {
    return (int64_t)PRODUCT_WARPS * (gated ? PRODUCT_W / 2 : PRODUCT_W);
}

/* 16 bytes of weights. */
template <typename W> struct pack {
    static constexpr int COUNT = 16 / (int)sizeof(W);
    W v[COUNT];
};

template <typename W, int X>
__device__ inline void dot_packed(float (&sum)[X][PRODUCT_W], const W *const (&w)[PRODUCT_W],
                                  const float *const (&x)[X], int64_t at) {
    constexpr int COUNT = pack<W>::COUNT;
    uint4 raw[PRODUCT_W];
#pragma unroll
    for (int c = 0; c < PRODUCT_W; c++) raw[c] = __ldg((const uint4 *)(w[c] + at));
#pragma unroll
    for (int part = 0; part < COUNT; part += 4) {
        float weights[PRODUCT_W][4];
#pragma unroll
        for (int c = 0; c < PRODUCT_W; c++) {
            pack<W> values;
            memcpy(&values, &raw[c], sizeof values);
#pragma unroll
            for (int i = 0; i < 4; i++) weights[c][i] = to_float(values.v[part + i]);
        }
#pragma unroll
        for (int r = 0; r < X; r++) {
            float4 v = *(const float4 *)(x[r] + at + part);
#pragma unroll
            for (int c = 0; c < PRODUCT_W; c++) {
                sum[r][c] = fmaf(v.x, weights[c][0], sum[r][c]);
                sum[r][c] = fmaf(v.y, weights[c][1], sum[r][c]);
                sum[r][c] = fmaf(v.z, weights[c][2], sum[r][c]);
                sum[r][c] = fmaf(v.w, weights[c][3], sum[r][c]);
            }
        }
    }
}

/* Rows row … row + count - 1 (count <= X) and this warp's columns. All of a block's warps come
 * here. `aligned`: rows of w and x begin at multiples of 16 bytes. */
template <typename W, int X>
__device__ void product_rows(const product &p, int64_t row, int count, int64_t col, bool aligned) {
    constexpr int COUNT = pack<W>::COUNT;
    const int lane = threadIdx.x % WARP;
    float sum[X][PRODUCT_W];
    const W *w[PRODUCT_W];
    const float *x[X];
#pragma unroll
    for (int c = 0; c < PRODUCT_W; c++) {
        /* Beyond the last: read again, not written. */
        int64_t at = col + (p.up ? c / 2 : c);
        if (at >= p.rows) at = p.rows - 1;
        w[c] = (const W *)(p.up && c % 2 ? p.up : p.w) + at * p.cols;
    }
#pragma unroll
    for (int r = 0; r < X; r++) {
        int64_t at = row + (r < count ? r : count - 1);
        x[r] = p.x + (p.x_index ? p.x_index[at] / p.x_divide : at) * p.ldx;
#pragma unroll
        for (int c = 0; c < PRODUCT_W; c++) sum[r][c] = 0.0f;
    }
    if (aligned) {
        for (int64_t k = (int64_t)lane * COUNT; k < p.cols; k += WARP * COUNT)
            dot_packed<W, X>(sum, w, x, k);
    } else {
        for (int64_t k = lane; k < p.cols; k += WARP)
#pragma unroll
            for (int r = 0; r < X; r++)
#pragma unroll
                for (int c = 0; c < PRODUCT_W; c++)
                    sum[r][c] = fmaf(x[r][k], to_float(w[c][k]), sum[r][c]);
    }
    /* Lane r * PRODUCT_W + c keeps sum[r][c]; gated: the even ones, with their neighbour's. */
    float mine = 0.0f, up = 0.0f;
#pragma unroll
    for (int r = 0; r < X; r++)
#pragma unroll
        for (int c = 0; c < PRODUCT_W; c++) {
            float total = warp_sum(sum[r][c]);
            if (lane == r * PRODUCT_W + c) mine = total;
            if (lane == r * PRODUCT_W + c - 1) up = total;
        }
    int r = lane / PRODUCT_W, c = lane % PRODUCT_W;
    if (r >= count) return;
    float *y = p.y + (p.y_index ? (int64_t)p.y_index[row + r] : row + r) * p.ldy;
    if (p.up) {
        if (c % 2 == 0 && col + c / 2 < p.rows) y[col + c / 2] = activate(mine, p.activation) * up;
        return;
    }
    col += c;
    if (col >= p.rows) return;
    float value = mine * p.scale + (p.bias ? p.bias[col] : 0.0f);
    if (p.epilogue == SIDA_EPILOGUE_RELU) value = value < 0.0f ? 0.0f : value;
    if (p.alpha)
        y[col] = fmaf(p.alpha[p.y_index ? p.y_index[row + r] : row + r], value, y[col]);
    else
        y[col] = p.epilogue == SIDA_EPILOGUE_ADD ? y[col] + value : value;
}

/* Rows first, first + step, … of n, in groups of PRODUCT_X; columns from `col`. A row's sums have
 * one order whatever its group. */
template <typename W>
__device__ void product_block(const product &p, int64_t n, int64_t first, int64_t step,
                              int64_t col) {
    col += (int64_t)(threadIdx.x / WARP) * (p.up ? PRODUCT_W / 2 : PRODUCT_W);
    if (col >= p.rows) return;
    const bool aligned = p.cols % pack<W>::COUNT == 0 && p.ldx % 4 == 0 &&
                         ((uintptr_t)p.w | (uintptr_t)p.up | (uintptr_t)p.x) % 16 == 0;
    for (int64_t row = first; row < n; row += step) {
        int count = n - row < PRODUCT_X ? (int)(n - row) : PRODUCT_X;
        if (count == 1)
            product_rows<W, 1>(p, row, count, col, aligned);
        else if (count <= 4)
            product_rows<W, 4>(p, row, count, col, aligned);
        else
            product_rows<W, PRODUCT_X>(p, row, count, col, aligned);
    }
}

#endif
