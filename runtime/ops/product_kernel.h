/* The product's micro-kernels: MR rows of x by NR rows of W, both contiguous along the summed
 * dimension. Every element of y is summed in the same order in every block shape: lane l takes the
 * indices l, l + LANES, … by fused multiply-adds, then vec_sum4's tree. */
#ifndef SIDA_RUNTIME_OPS_PRODUCT_KERNEL_H
#define SIDA_RUNTIME_OPS_PRODUCT_KERNEL_H

#include "runtime/ops/panel_kernel.h"

/* fp32 copies of NR rows of W up to this many columns: 64 KiB of stack, half of L2 at most. */
enum { PANEL_COLS = 4096, PANEL_ROWS = 4 };
/* Rows of x that are kept in L2 while all of a tile's W passes. */
enum { CHUNK_BYTES = 384 << 10 };

typedef struct product_rows {
    const float *x[BLOCK_ROWS];
    float *y[BLOCK_ROWS];
} product_rows;

SIDA_INLINE void product_rows_fill(product_rows *out, const sida_product *p, int64_t row,
                                   int count) {
    for (int i = 0; i < count; i++) {
        int64_t from = p->x_index ? p->x_index[row + i] / p->x_divide : row + i;
        int64_t to = p->y_index ? p->y_index[row + i] : row + i;
        out->x[i] = p->x + from * p->ldx;
        out->y[i] = p->y + to * p->ldy;
    }
}

SIDA_INLINE vec4 product_epilogue4(vec4 sum, const sida_product *p, const float *y, int64_t col) {
    sum = sum * p->scale;
    if (p->bias) {
        vec4 bias;
        memcpy(&bias, p->bias + col, sizeof bias);
        sum = sum + bias;
    }
    if (p->epilogue == SIDA_EPILOGUE_ADD) {
        vec4 old;
        memcpy(&old, y + col, sizeof old);
        sum = old + sum;
    } else if (p->epilogue == SIDA_EPILOGUE_RELU) {
        typedef int32_t ivec4 __attribute__((vector_size(16)));
        /* Negative becomes 0; NaN stays, so that poisoned memory shows. */
        sum = (vec4)(~(ivec4)(sum < 0.0f) & (ivec4)sum);
    }
    return sum;
}

SIDA_INLINE float product_epilogue(float sum, const sida_product *p, const float *y, int64_t col) {
    sum = sum * p->scale;
    if (p->bias) sum = sum + p->bias[col];
    if (p->epilogue == SIDA_EPILOGUE_ADD) return y[col] + sum;
    if (p->epilogue == SIDA_EPILOGUE_RELU) return sum < 0.0f ? 0.0f : sum;
    return sum;
}

/* Columns [col, col + NR) of MR rows. w: NR rows of stride ldw whose type is `dtype`. */
SIDA_INLINE void product_block(int MR, int NR, sida_dtype dtype, const product_rows *rows,
                               const void *w, int64_t ldw, const sida_product *p, int64_t col) {
    vec sum[8][8];
    const float *x[8];
    const char *base[8];
    int64_t k = 0, cols = p->cols;
    size_t ahead = (size_t)NR * (size_t)ldw * sida_dtype_bytes(dtype);
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++)
        base[j] = (const char *)w + (size_t)j * (size_t)ldw * sida_dtype_bytes(dtype);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
        x[i] = rows->x[i];
#pragma GCC unroll 8
        for (int j = 0; j < NR; j++) sum[i][j] = vec_set(0.0f);
    }
    for (; k + LANES <= cols; k += LANES) {
        vec xs[8];
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) xs[i] = vec_load(x[i] + k);
#pragma GCC unroll 8
        for (int j = 0; j < NR; j++) {
            vec ws = vec_load_weights(base[j], k, dtype);
            /* With few rows memory decides: ask for the next block's weights while this one runs;
             * the hardware's own stream ends at every page. */
            if (MR <= 4) __builtin_prefetch(base[j] + ahead + (size_t)k * sida_dtype_bytes(dtype));
#pragma GCC unroll 8
            for (int i = 0; i < MR; i++) sum[i][j] = vec_fma(xs[i], ws, sum[i][j]);
        }
    }
    if (k < cols) {
        vec xs[8];
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) xs[i] = vec_load_part(x[i] + k, cols - k);
#pragma GCC unroll 8
        for (int j = 0; j < NR; j++) {
            vec ws = vec_load_weights_part(base[j], k, cols - k, dtype);
#pragma GCC unroll 8
            for (int i = 0; i < MR; i++) sum[i][j] = vec_fma(xs[i], ws, sum[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
        float *y = rows->y[i];
        if (NR == 1) {
            y[col] = product_epilogue(vec_sum(sum[i][0]), p, y, col);
            continue;
        }
#pragma GCC unroll 8
        for (int j = 0; j + 4 <= NR; j += 4) {
            vec4 four = vec_sum4(sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]);
            four = product_epilogue4(four, p, y, col + j);
            memcpy(y + col + j, &four, sizeof four);
        }
    }
}

typedef void product_block_fn(const product_rows *rows, const void *w, int64_t ldw,
                              const sida_product *p, int64_t col);

#define PRODUCT_BLOCK(MR, NR, DTYPE)                                                               \
    static void product_##MR##x##NR##_##DTYPE(const product_rows *rows, const void *w,             \
                                              int64_t ldw, const sida_product *p, int64_t col) {   \
        product_block(MR, NR, SIDA_##DTYPE, rows, w, ldw, p, col);                                 \
    }
#define PRODUCT_BLOCKS(MR, WIDE)                                                                   \
    PRODUCT_BLOCK(MR, WIDE, F32)                                                                   \
    PRODUCT_BLOCK(MR, WIDE, F16)                                                                   \
    PRODUCT_BLOCK(MR, WIDE, BF16)                                                                  \
    PRODUCT_BLOCK(MR, 1, F32)                                                                      \
    PRODUCT_BLOCK(MR, 1, F16)                                                                      \
    PRODUCT_BLOCK(MR, 1, BF16)
PRODUCT_BLOCKS(1, 4)
PRODUCT_BLOCKS(2, 4)
PRODUCT_BLOCKS(3, 4)
#define PRODUCT_WIDE1 8 /* one row has too few sums of its own to hide the adder's latency */
PRODUCT_BLOCK(1, 8, F32)
PRODUCT_BLOCK(1, 8, F16)
PRODUCT_BLOCK(1, 8, BF16)
#if defined(__AVX512F__)
PRODUCT_BLOCK(2, 8, F32)
PRODUCT_BLOCK(2, 8, F16)
PRODUCT_BLOCK(2, 8, BF16)
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
PRODUCT_BLOCKS(4, 4)
#endif
#if defined(__AVX512F__)
PRODUCT_BLOCKS(5, 4)
PRODUCT_BLOCKS(6, 4)
#endif

#define PRODUCT_ENTRY(MR, NR)                                                                      \
    { product_##MR##x##NR##_F32, product_##MR##x##NR##_F16, product_##MR##x##NR##_BF16 }

/* [rows - 1][dtype]: 8, 4 and 1 columns; NULL where a shape would spill. */
static product_block_fn *const product_by8[BLOCK_ROWS][3] = {PRODUCT_ENTRY(1, 8),
#if defined(__AVX512F__)
                                                             PRODUCT_ENTRY(2, 8)
#endif
};
static product_block_fn *const product_by4[BLOCK_ROWS][3] = {
    PRODUCT_ENTRY(1, 4), PRODUCT_ENTRY(2, 4), PRODUCT_ENTRY(3, 4),
#if defined(__AVX512F__) || defined(__aarch64__)
    PRODUCT_ENTRY(4, 4),
#endif
#if defined(__AVX512F__)
    PRODUCT_ENTRY(5, 4), PRODUCT_ENTRY(6, 4),
#endif
};
static product_block_fn *const product_by1[BLOCK_ROWS][3] = {
    PRODUCT_ENTRY(1, 1), PRODUCT_ENTRY(2, 1), PRODUCT_ENTRY(3, 1),
#if defined(__AVX512F__) || defined(__aarch64__)
    PRODUCT_ENTRY(4, 1),
#endif
#if defined(__AVX512F__)
    PRODUCT_ENTRY(5, 1), PRODUCT_ENTRY(6, 1),
#endif
};

/* `count` rows of w from `row` as fp32. */
static void product_panel(float *panel, const sida_product *p, int64_t row, int count) {
    for (int j = 0; j < count; j++) {
        const uint16_t *from = (const uint16_t *)p->w + (row + j) * p->ldw;
        float *to = panel + (int64_t)j * p->cols;
        int64_t k = 0;
        for (; k + LANES <= p->cols; k += LANES) {
            vec_store(to + k, vec_load_weights(from, k, p->dtype));
            __builtin_prefetch(from + k + PANEL_ROWS * p->ldw);
        }
        for (; k < p->cols; k++) to[k] = weight_at(from, k, p->dtype);
    }
}

/* All columns of a tile for one block of rows: the weights are read straight from where they are.
 */
static void product_few_rows(const sida_product *p, int64_t row, int count, int64_t col,
                             int64_t col_end) {
    product_rows rows;
    product_rows_fill(&rows, p, row, count);
    size_t stride = (size_t)p->ldw * sida_dtype_bytes(p->dtype);
    const char *w = (const char *)p->w + (size_t)col * stride;
    product_block_fn *by8 = product_by8[count - 1][p->dtype];
    product_block_fn *by4 = product_by4[count - 1][p->dtype];
    product_block_fn *by1 = product_by1[count - 1][p->dtype];
    if (by8)
        for (; col + 8 <= col_end; col += 8, w += 8 * stride) by8(&rows, w, p->ldw, p, col);
    for (; col + 4 <= col_end; col += 4, w += 4 * stride) by4(&rows, w, p->ldw, p, col);
    for (; col < col_end; col++, w += stride) by1(&rows, w, p->ldw, p, col);
}

static void product_many_rows(const sida_product *p, int64_t row, int64_t row_end, int64_t col,
                              int64_t col_end) {
    float panel[PANEL_ROWS * PANEL_COLS] __attribute__((aligned(64)));
    size_t stride = (size_t)p->ldw * sida_dtype_bytes(p->dtype);
    bool convert = p->dtype != SIDA_F32 && p->cols <= PANEL_COLS;
    sida_dtype dtype = convert ? SIDA_F32 : p->dtype;
    col = panel_product(p, row, row_end, col, col_end);
    while (col < col_end) {
        int wide = col + 4 <= col_end ? 4 : 1;
        const void *w = (const char *)p->w + (size_t)col * stride;
        int64_t ldw = p->ldw;
        if (convert) {
            product_panel(panel, p, col, wide);
            w = panel;
            ldw = p->cols;
        }
        for (int64_t i = row; i < row_end;) {
            int count = row_end - i < BLOCK_ROWS ? (int)(row_end - i) : BLOCK_ROWS;
            product_rows rows;
            product_rows_fill(&rows, p, i, count);
            if (wide == 4)
                product_by4[count - 1][dtype](&rows, w, ldw, p, col);
            else
                product_by1[count - 1][dtype](&rows, w, ldw, p, col);
            i += count;
        }
        col += wide;
    }
}

static void kernel_product(const sida_product *p, int64_t row, int64_t row_end, int64_t col,
                           int64_t col_end) {
    int64_t chunk = CHUNK_BYTES / (4 * (p->cols > 0 ? p->cols : 1));
    chunk -= chunk % BLOCK_ROWS;
    if (chunk < 2 * BLOCK_ROWS) chunk = 2 * BLOCK_ROWS;
    while (row < row_end) {
        int64_t count = row_end - row < chunk ? row_end - row : chunk;
        if (count <= BLOCK_ROWS)
            product_few_rows(p, row, (int)count, col, col_end);
        else
            product_many_rows(p, row, row + count, col, col_end);
        row += count;
    }
}

#endif
