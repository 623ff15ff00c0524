/* Products of many rows of x with short rows of W. There the micro-kernels of product_kernel.h
 * would spend more on adding up the lanes of their sums than on the sums; here LANES rows of W are
 * turned about once, and a vector holds one index of all of them. Sums are made in the order of
 * those kernels, so every byte is theirs: one sum for each lane l of theirs, over the indices l,
 * l + LANES, …, and these sums are added in vec_sum4's tree. */
#ifndef SIDA_RUNTIME_OPS_PANEL_KERNEL_H
#define SIDA_RUNTIME_OPS_PANEL_KERNEL_H

#include "runtime/ops/cpu_kernels.h"
#include "runtime/ops/simd.h"

/* Above these columns the lanes' sums are a small part of the work. */
enum { PANEL_SHORT = 256 };

/* Rows of x and vectors of columns in one block. Their sums and what they are made of stay in
 * registers; the tree's sums that wait for others do not. */
#if defined(__AVX2__)
enum { PANEL_HIGH = 6, PANEL_WIDE = 2 };
#else
enum { PANEL_HIGH = 3, PANEL_WIDE = 2 };
#endif

typedef struct panel_rows {
    const float *x[PANEL_HIGH];
    float *y[PANEL_HIGH];
} panel_rows;

/* Rows of LANES floats become columns. */
#if defined(__AVX512F__)
SIDA_INLINE void panel_transpose(vec *a) {
    vec b[LANES];
    /* Pairs, then fours of rows within 128 bits; then these as 4 by 4. */
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        b[i] = (vec)_mm512_unpacklo_ps((__m512)a[i], (__m512)a[i + 1]);
        b[i + 1] = (vec)_mm512_unpackhi_ps((__m512)a[i], (__m512)a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const __m512d low = (__m512d)b[i + j], high = (__m512d)b[i + j + 2];
            a[i + 2 * j] = (vec)_mm512_unpacklo_pd(low, high);
            a[i + 2 * j + 1] = (vec)_mm512_unpackhi_pd(low, high);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512 even = _mm512_shuffle_f32x4((__m512)a[i], (__m512)a[i + 4], 0x88),
                     even_behind = _mm512_shuffle_f32x4((__m512)a[i + 8], (__m512)a[i + 12], 0x88),
                     odd = _mm512_shuffle_f32x4((__m512)a[i], (__m512)a[i + 4], 0xdd),
                     odd_behind = _mm512_shuffle_f32x4((__m512)a[i + 8], (__m512)a[i + 12], 0xdd);
        b[i] = (vec)_mm512_shuffle_f32x4(even, even_behind, 0x88);
        b[i + 4] = (vec)_mm512_shuffle_f32x4(odd, odd_behind, 0x88);
        b[i + 8] = (vec)_mm512_shuffle_f32x4(even, even_behind, 0xdd);
        b[i + 12] = (vec)_mm512_shuffle_f32x4(odd, odd_behind, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) a[i] = b[i];
}
#else
#if defined(__AVX2__)
#define VEC_ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define VEC_ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define VEC_ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define VEC_ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif
SIDA_INLINE void panel_transpose(vec *a) {
    vec b[LANES];
#pragma GCC unroll 3
    for (int stage = 1; stage < LANES; stage *= 2) {
#pragma GCC unroll 4
        for (int i = 0; i < LANES / 2; i++) {
            b[2 * i] = VEC_ZIP_LOW(a[i], a[i + LANES / 2]);
            b[2 * i + 1] = VEC_ZIP_HIGH(a[i], a[i + LANES / 2]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < LANES; i++) a[i] = b[i];
    }
}
#endif

/* The lane whose sum is leaf number `leaf` of the tree, from the left: its bits the other way
 * round. */
SIDA_INLINE int panel_lane(int leaf) {
    int lane = 0;
#pragma GCC unroll 4
    for (int bit = 1; bit < LANES; bit *= 2)
        if (leaf & bit) lane += LANES / 2 / bit;
    return lane;
}

/* LANES rows of w from `row`, as [leaf][cols / LANES][row]. */
static void panel_turn(float *panel, const sida_product *p, int64_t row) {
    const size_t size = sida_dtype_bytes(p->dtype);
    const int64_t steps = p->cols / LANES;
    for (int64_t s = 0; s < steps; s++) {
        vec a[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            a[i] = vec_load_weights((const char *)p->w + (size_t)((row + i) * p->ldw) * size,
                                    s * LANES, p->dtype);
        panel_transpose(a);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            vec_store(panel + (i * steps + s) * LANES, a[panel_lane(i)]);
    }
}

typedef struct panel_sums {
    vec of[PANEL_HIGH][PANEL_WIDE];
} panel_sums;

/* One leaf of `high` rows and `wide` panels, and the sums of 2, 4, 8 and 16 leaves. */
SIDA_INLINE void panel_sum1(panel_sums *sum, int high, int wide, const panel_rows *rows,
                            const float *panel, int64_t steps, int leaf) {
    const float *w = panel + leaf * steps * LANES;
    const int lane = panel_lane(leaf);
#pragma GCC unroll 8
    for (int i = 0; i < high; i++)
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) sum->of[i][j] = vec_set(0.0f);
    for (int64_t s = 0; s < steps; s++) {
        vec ws[PANEL_WIDE];
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) ws[j] = vec_load(w + (s + j * steps * LANES) * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < high; i++) {
            const vec xs = vec_set(rows->x[i][s * LANES + lane]);
#pragma GCC unroll 2
            for (int j = 0; j < wide; j++) sum->of[i][j] = vec_fma(xs, ws[j], sum->of[i][j]);
        }
    }
}
#define PANEL_SUM(COUNT, HALF)                                                                     \
    SIDA_INLINE void panel_sum##COUNT(panel_sums *sum, int high, int wide, const panel_rows *rows, \
                                      const float *panel, int64_t steps, int leaf) {               \
        panel_sums other;                                                                          \
        panel_sum##HALF(sum, high, wide, rows, panel, steps, leaf);                                \
        panel_sum##HALF(&other, high, wide, rows, panel, steps, leaf + HALF);                      \
        _Pragma("GCC unroll 8") for (int i = 0; i < high; i++)                                     \
            _Pragma("GCC unroll 2") for (int j = 0; j < wide; j++)                                 \
                sum->of[i][j] = sum->of[i][j] + other.of[i][j];                                    \
    }
PANEL_SUM(2, 1)
PANEL_SUM(4, 2)
#if defined(__AVX2__)
PANEL_SUM(8, 4)
#endif
#if defined(__AVX512F__)
PANEL_SUM(16, 8)
#endif

SIDA_INLINE vec panel_epilogue(vec sum, const sida_product *p, const float *y, int64_t col) {
    sum = sum * p->scale;
    if (p->bias) sum = sum + vec_load(p->bias + col);
    if (p->epilogue == SIDA_EPILOGUE_ADD) return vec_load(y + col) + sum;
    /* Negative becomes 0; NaN stays, so that poisoned memory shows. */
    if (p->epilogue == SIDA_EPILOGUE_RELU) return (vec)(~(ivec)(sum < 0.0f) & (ivec)sum);
    return sum;
}

/* Columns [col, col + wide LANES) of `high` rows of y. */
SIDA_INLINE void panel_block(int high, int wide, const panel_rows *rows, const float *panel,
                             const sida_product *p, int64_t col) {
    panel_sums sum;
#if defined(__AVX512F__)
    panel_sum16(&sum, high, wide, rows, panel, p->cols / LANES, 0);
#elif defined(__AVX2__)
    panel_sum8(&sum, high, wide, rows, panel, p->cols / LANES, 0);
#else
    panel_sum4(&sum, high, wide, rows, panel, p->cols / LANES, 0);
#endif
#pragma GCC unroll 8
    for (int i = 0; i < high; i++)
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) {
            const int64_t at = col + j * LANES;
            vec_store(rows->y[i] + at, panel_epilogue(sum.of[i][j], p, rows->y[i], at));
        }
}

typedef void panel_block_fn(const panel_rows *rows, const float *panel, const sida_product *p,
                            int64_t col);
#define PANEL_BLOCK(HIGH, WIDE)                                                                    \
    static void panel_##HIGH##x##WIDE(const panel_rows *rows, const float *panel,                  \
                                      const sida_product *p, int64_t col) {                        \
        panel_block(HIGH, WIDE, rows, panel, p, col);                                              \
    }
#define PANEL_BLOCKS(HIGH)                                                                         \
    PANEL_BLOCK(HIGH, 1)                                                                           \
    PANEL_BLOCK(HIGH, 2)
PANEL_BLOCKS(1)
PANEL_BLOCKS(2)
PANEL_BLOCKS(3)
#if defined(__AVX2__)
PANEL_BLOCKS(4)
PANEL_BLOCKS(5)
PANEL_BLOCKS(6)
#endif
static panel_block_fn *const panel_blocks[PANEL_HIGH][PANEL_WIDE] = {
    {panel_1x1, panel_1x2}, {panel_2x1, panel_2x2}, {panel_3x1, panel_3x2},
#if defined(__AVX2__)
    {panel_4x1, panel_4x2}, {panel_5x1, panel_5x2}, {panel_6x1, panel_6x2},
#endif
};

/* Panels that are used at a time: with a few rows of x they stay in L1. */
enum { PANEL_BYTES = 32 << 10 };

/* As many of columns [col, col_end) of rows [row, row_end) as go this way; returns their end. */
static int64_t panel_product(const sida_product *p, int64_t row, int64_t row_end, int64_t col,
                             int64_t col_end) {
    float panels[PANEL_BYTES / sizeof(float)] __attribute__((aligned(64)));
    if (p->cols > PANEL_SHORT || p->cols < LANES || p->cols % LANES != 0) return col;
    const int64_t size = p->cols * LANES;
    int64_t room = PANEL_BYTES / (int64_t)sizeof(float) / size;
    room -= room % PANEL_WIDE;
    while (col + LANES <= col_end) {
        int64_t count = (col_end - col) / LANES;
        if (count > room) count = room;
        for (int64_t j = 0; j < count; j++) panel_turn(panels + j * size, p, col + j * LANES);
        for (int64_t i = row; i < row_end; i += PANEL_HIGH) {
            const int high = row_end - i < PANEL_HIGH ? (int)(row_end - i) : PANEL_HIGH;
            panel_rows rows;
            for (int r = 0; r < high; r++) {
                int64_t from = p->x_index ? p->x_index[i + r] / p->x_divide : i + r;
                int64_t to = p->y_index ? p->y_index[i + r] : i + r;
                rows.x[r] = p->x + from * p->ldx;
                rows.y[r] = p->y + to * p->ldy;
            }
            for (int64_t j = 0; j < count;) {
                const int wide = count - j < PANEL_WIDE ? (int)(count - j) : PANEL_WIDE;
                panel_blocks[high - 1][wide - 1](&rows, panels + j * size, p, col + j * LANES);
                j += wide;
            }
        }
        col += count * LANES;
    }
    return col;
}

#endif
