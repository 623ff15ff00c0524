/* Inside the CPU ops: the loops that are built once for each instruction set and chosen when the
 * program starts. A kernel computes one tile on the calling thread; threads are its caller's. */
#ifndef SIDA_RUNTIME_OPS_CPU_KERNELS_H
#define SIDA_RUNTIME_OPS_CPU_KERNELS_H

#include "runtime/ops/attention.h"
#include "runtime/ops/elementwise.h"
#include "runtime/ops/linear.h"

/* y = x Wᵀ with rows chosen by index: row i reads x[x_index[i] / x_divide] and writes
 * y[y_index[i]] (NULL: i). */
typedef struct sida_product {
    float *y;
    const float *x;
    const void *w;
    const float *bias;
    const int32_t *x_index, *y_index;
    int64_t ldy, ldx, ldw; /* elements */
    int64_t n, rows, cols; /* rows of x; rows and columns of w */
    int32_t x_divide;
    sida_dtype dtype;
    sida_epilogue epilogue;
    float scale;
} sida_product;

/* Columns of y in a tile are a multiple of this, the last tile's aside: which column falls into
 * which micro-kernel then depends on w alone. */
enum { SIDA_PRODUCT_STEP = 8 };

/* Queries in one attention task. */
enum { SIDA_ATTENTION_QUERIES = 24 };

/* Values that `top` chooses from, at most. */
enum { SIDA_TOP_COUNT = 2048 };

typedef struct sida_cpu_kernels {
    const char *name; /* "avx512", "avx2", "base" */
    /* Rows [row, row_end) and columns [col, col_end) of y; col a multiple of SIDA_PRODUCT_STEP. */
    void (*product)(const sida_product *product, int64_t row, int64_t row_end, int64_t col,
                    int64_t col_end);
    /* Queries [first, first + count) of one sequence and head, count <= SIDA_ATTENTION_QUERIES.
     * buckets: of distances -max … max, [2 * max + 1]; NULL without bias. */
    void (*attention)(const sida_attention_call *call, const uint8_t *buckets, int32_t sequence,
                      int32_t head, int32_t first, int32_t count);
    void (*rms_norm)(float *out, const float *x, sida_weight weight, int64_t rows, float epsilon);
    void (*gated)(float *out, const float *gate, const float *up, int64_t count,
                  sida_activation activation);
    /* y[i] += a * x[i]. */
    void (*axpy)(float *y, const float *x, float a, int64_t count);
    /* Σ exp(x[i] - shift). */
    float (*exp_sum)(const float *x, float shift, int64_t count);
    float (*exp_one)(float x);
    /* The k highest of x [count], best first, ties to the lower index: k of 1 … count, few, as each
     * costs a pass; count <= SIDA_TOP_COUNT. False where an x is not finite. */
    bool (*top)(uint16_t *chosen, const float *x, int32_t count, int32_t k);
    /* The chosen ones' shares in softmax(x); the first is the highest. */
    void (*shares)(float *share, const uint16_t *chosen, int32_t k, const float *x, int32_t count);
} sida_cpu_kernels;

extern const sida_cpu_kernels sida_cpu_kernels_base;
#if SIDA_X86_KERNELS
extern const sida_cpu_kernels sida_cpu_kernels_avx2, sida_cpu_kernels_avx512;
#endif

/* The best set that this processor runs. */
const sida_cpu_kernels *sida_cpu_kernels_get(void);
/* The i-th set that this processor runs, best first; NULL past the end: for tests. */
const sida_cpu_kernels *sida_cpu_kernels_at(int i);
/* Tests only: every op uses `kernels` from now on; NULL: the best again. */
void sida_cpu_kernels_force(const sida_cpu_kernels *kernels);

/* The whole product, over threads when it is large enough. */
void sida_product_run(const sida_product *product);
/* Below this many multiply-adds, some ten microseconds, a parallel region costs more than it saves;
 * on a busy machine it can cost far more. */
enum { SIDA_PARALLEL_WORK = 1 << 21 };
/* What a product costs, in multiply-adds: reading a weight is worth about four. */
static inline int64_t sida_product_work(int64_t n, int64_t rows, int64_t cols) {
    return (n + 4) * rows * cols;
}
/* Threads that a parallel region started here would get. */
int sida_ops_threads(void);
/* The columns of one task when `cols` columns are shared by `threads`. */
int64_t sida_product_task_cols(int64_t cols, int threads);

#endif
