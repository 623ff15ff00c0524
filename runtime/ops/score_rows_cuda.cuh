/* What the attentions of training share: rows of padded blocks, their batched products, and a
 * warp's row of scores. */
#ifndef SIDA_RUNTIME_OPS_SCORE_ROWS_CUDA_CUH
#define SIDA_RUNTIME_OPS_SCORE_ROWS_CUDA_CUH

#include "runtime/ops/gemm_cuda.cuh"

/* Blocks' rows and columns are multiples of it, so that cuBLAS's loads are aligned. */
constexpr int64_t BLOCK_PAD = 8;

static inline int64_t padded(int64_t count) {
    return (count + BLOCK_PAD - 1) / BLOCK_PAD * BLOCK_PAD;
}

static __device__ int64_t row_of(const sida_row_map &map, int32_t sequence, int64_t t) {
    return (int64_t)map.start[sequence] + map.step[t];
}

/* The maps of the sequences from `first` on. */
static inline sida_row_map shifted(const sida_row_map &map, int32_t first) {
    sida_row_map m = map;
    m.start += first;
    m.count += first;
    return m;
}

/* A lane's part of a row: in registers if KEPT * 32 keys are enough, else read again. */
template <int KEPT> struct lane_row {
    float kept[KEPT > 0 ? KEPT : 1];
    const float *from;
    int32_t count;
    __device__ void load(const float *row, int32_t keys, int lane) {
        from = row;
        count = keys;
        if (KEPT > 0)
#pragma unroll
            for (int k = 0; k < KEPT; k++)
                kept[k] = lane + k * WARP < keys ? row[lane + k * WARP] : -INFINITY;
    }
    template <typename Visit> __device__ void each(int lane, Visit visit) const {
        if (KEPT > 0) {
#pragma unroll
            for (int k = 0; k < KEPT; k++)
                if (lane + k * WARP < count) visit(lane + k * WARP, kept[k]);
        } else {
            for (int32_t i = lane; i < count; i += WARP) visit(i, from[i]);
        }
    }
};

/* c = a b of `count` blocks: [m, k] by [k, n], or transposed; rows lie end to end. */
static inline sida_status multiply(sida_stream *stream, float *c, int64_t c_stride, const float *a,
                                   int64_t a_stride, bool transpose_a, const float *b,
                                   int64_t b_stride, bool transpose_b, int64_t m, int64_t n,
                                   int64_t k, bool add, int32_t count, bool tf32) {
    gemm_batch batch = {};
    batch.first.c = c;
    batch.first.ldc = n;
    batch.first.a = a;
    batch.first.lda = transpose_a ? m : k;
    batch.first.b = b;
    batch.first.ldb = transpose_b ? k : n;
    batch.first.m = m;
    batch.first.n = n;
    batch.first.k = k;
    batch.first.transpose_a = transpose_a;
    batch.first.transpose_b = transpose_b;
    batch.first.add = add;
    batch.a_stride = a_stride;
    batch.b_stride = b_stride;
    batch.c_stride = c_stride;
    batch.count = count;
    return gemm_batched(stream, &batch, tf32);
}

#endif
