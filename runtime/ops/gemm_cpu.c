#include "runtime/ops/gemm.h"

#include <assert.h>
#include <cblas.h>
#include <limits.h>
#include <pthread.h>
#include <string.h>

/* A tile of c. Small enough that a few thousand rows keep every core busy, large enough that
 * OpenBLAS's packing is paid back. */
enum { tile_rows = 128, tile_cols = 256 };
/* A tile's k is cut too, as its loop counter is an int. The pieces are added in order. */
enum { tile_depth = 1 << 20 };
/* Below this many multiplications waking the other threads costs more than they save. */
enum { parallel_work = 1 << 17 };

static void use_one_blas_thread(void) {
    openblas_set_num_threads(1);
}

static void tile(const sida_gemm_call *q, int64_t i, int64_t j) {
    int64_t m = q->m - i < tile_rows ? q->m - i : tile_rows;
    int64_t n = q->n - j < tile_cols ? q->n - j : tile_cols;
    float *c = q->c + i * q->ldc + j;
    if (q->k == 0 && !q->add)
        for (int64_t r = 0; r < m; r++) memset(c + r * q->ldc, 0, (size_t)n * sizeof *c);
    for (int64_t p = 0; p < q->k; p += tile_depth) {
        int64_t k = q->k - p < tile_depth ? q->k - p : tile_depth;
        const float *a = q->transpose_a ? q->a + p * q->lda + i : q->a + i * q->lda + p;
        const float *b = q->transpose_b ? q->b + j * q->ldb + p : q->b + p * q->ldb + j;
        cblas_sgemm(CblasRowMajor, q->transpose_a ? CblasTrans : CblasNoTrans,
                    q->transpose_b ? CblasTrans : CblasNoTrans, (int)m, (int)n, (int)k, 1.0f, a,
                    (int)q->lda, b, (int)q->ldb, q->add || p > 0 ? 1.0f : 0.0f, c, (int)q->ldc);
    }
}

void sida_gemm_cpu(const sida_gemm_call *call) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, use_one_blas_thread);
    assert(call->lda <= INT_MAX && call->ldb <= INT_MAX && call->ldc <= INT_MAX);
    if (call->m == 0 || call->n == 0) return;
    int64_t down = (call->m + tile_rows - 1) / tile_rows;
    int64_t across = (call->n + tile_cols - 1) / tile_cols;
    int64_t work = call->m * call->n * call->k;
    (void)work;
#pragma omp parallel for schedule(static) if (down * across > 1 && work > parallel_work)
    for (int64_t t = 0; t < down * across; t++)
        tile(call, t / across * tile_rows, t % across * tile_cols);
}

sida_status sida_linear_gemm_cpu(sida_stream *stream, const sida_linear_call *call) {
    (void)stream;
    const sida_weight *w = &call->weight;
    assert(w->dtype == SIDA_F32 && call->scale == 1.0f);
    const sida_gemm_call product = {.c = call->y,
                                    .ldc = call->ldy,
                                    .a = call->x,
                                    .lda = call->ldx,
                                    .b = w->data,
                                    .ldb = w->cols,
                                    .m = call->n,
                                    .n = w->rows,
                                    .k = w->cols,
                                    .transpose_b = true,
                                    .add = call->epilogue == SIDA_EPILOGUE_ADD};
    sida_gemm_cpu(&product);
    if (!call->bias && call->epilogue != SIDA_EPILOGUE_RELU) return SIDA_OK;
#pragma omp parallel for schedule(static) if (call->n * w->rows > parallel_work)
    for (int64_t i = 0; i < call->n; i++) {
        float *y = (float *)call->y + i * call->ldy;
        if (call->bias)
            for (int64_t j = 0; j < w->rows; j++) y[j] += call->bias[j];
        if (call->epilogue == SIDA_EPILOGUE_RELU)
            for (int64_t j = 0; j < w->rows; j++) y[j] = y[j] < 0 ? 0 : y[j]; /* NaN stays */
    }
    return SIDA_OK;
}

void sida_linear_backward_cpu(const sida_linear_backward_call *call) {
    const sida_weight *w = &call->weight;
    assert(w->dtype == SIDA_F32);
    if (call->d_x) {
        const sida_gemm_call product = {.c = call->d_x,
                                        .ldc = w->cols,
                                        .a = call->d_y,
                                        .lda = w->rows,
                                        .b = w->data,
                                        .ldb = w->cols,
                                        .m = call->n,
                                        .n = w->cols,
                                        .k = w->rows,
                                        .add = true};
        sida_gemm_cpu(&product);
    }
    if (call->d_weight) {
        const sida_gemm_call product = {.c = call->d_weight,
                                        .ldc = w->cols,
                                        .a = call->d_y,
                                        .lda = w->rows,
                                        .b = call->x,
                                        .ldb = w->cols,
                                        .m = w->rows,
                                        .n = w->cols,
                                        .k = call->n,
                                        .transpose_a = true,
                                        .add = true};
        sida_gemm_cpu(&product);
    }
    if (call->d_bias) sida_column_sum_cpu(call->d_bias, call->d_y, call->n, w->rows);
}

void sida_column_sum_cpu(float *out, const float *x, int64_t rows, int64_t cols) {
    enum { block_rows = 64, block_cols = 64 };
#pragma omp parallel for schedule(static) if (rows * cols > parallel_work)
    for (int64_t j = 0; j < cols; j += block_cols) {
        int64_t n = cols - j < block_cols ? cols - j : block_cols;
        for (int64_t i = 0; i < rows; i += block_rows) {
            int64_t end = i + block_rows < rows ? i + block_rows : rows;
            float sum[block_cols] = {0};
            for (int64_t r = i; r < end; r++)
                for (int64_t c = 0; c < n; c++) sum[c] += x[r * cols + j + c];
            for (int64_t c = 0; c < n; c++) out[j + c] += sum[c];
        }
    }
}
