/* Sixteen dot products by one warp, as lstm and SparseMax attention take them: lane l multiplies
 * columns 4 l … 4 l + 3 of every 128, then sums meet in a tree. One order whoever asks. */
#ifndef SIDA_RUNTIME_OPS_DOTS_CUDA_CUH
#define SIDA_RUNTIME_OPS_DOTS_CUDA_CUH

#include "runtime/ops/kernels_cuda.cuh"

constexpr int DOTS = 16, DOT_COLUMNS = 4 * WARP;
constexpr unsigned ALL_LANES = 0xffffffffu;

/* Columns column … column + 3 of a row, zeros beyond its width. ALIGNED: rows begin at multiples of
 * 16 bytes. */
template <bool ALIGNED>
__device__ inline float4 columns4(const float *row, int32_t column, int32_t width) {
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (ALIGNED) {
        if (column < width) v = *(const float4 *)(row + column);
        return v;
    }
    if (column < width) v.x = row[column];
    if (column + 1 < width) v.y = row[column + 1];
    if (column + 2 < width) v.z = row[column + 2];
    if (column + 3 < width) v.w = row[column + 3];
    return v;
}

__device__ inline float add_dot4(float sum, float4 a, float4 b) {
    sum = fmaf(a.x, b.x, sum);
    sum = fmaf(a.y, b.y, sum);
    sum = fmaf(a.z, b.z, sum);
    return fmaf(a.w, b.w, sum);
}

/* Lanes whose bit 2 * HALF is set go on with the upper half of the sums, the others with the lower.
 */
template <int HALF> __device__ inline void halve_sums(float (&sum)[DOTS]) {
    const bool upper = threadIdx.x & 2 * HALF;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float keep = upper ? sum[i + HALF] : sum[i];
        const float give = upper ? sum[i] : sum[i + HALF];
        sum[i] = keep + __shfl_xor_sync(ALL_LANES, give, 2 * HALF);
    }
}

/* Lanes 2 r and 2 r + 1 get the warp's sum[r]. */
__device__ inline float sum_of_lane(float (&sum)[DOTS]) {
    halve_sums<8>(sum);
    halve_sums<4>(sum);
    halve_sums<2>(sum);
    halve_sums<1>(sum);
    return sum[0] + __shfl_xor_sync(ALL_LANES, sum[0], 1);
}

#endif
