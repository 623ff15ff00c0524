#include "runtime/ops/cpu_kernels.h"
#include "runtime/ops/norm.h"

#include <assert.h>

#ifdef _OPENMP
#include <omp.h>
#endif

int sida_ops_threads(void) {
#ifdef _OPENMP
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

/* About four tasks a thread: enough to even out a busy core, few enough to stay cheap. */
int64_t sida_product_task_cols(int64_t cols, int threads) {
    int64_t share = cols / (4 * (int64_t)threads);
    share -= share % SIDA_PRODUCT_STEP;
    return share < 2 * SIDA_PRODUCT_STEP ? 2 * SIDA_PRODUCT_STEP : share;
}

void sida_product_run(const sida_product *p) {
    const sida_cpu_kernels *kernels = sida_cpu_kernels_get();
    int threads = sida_ops_threads();
    if (p->n <= 0 || p->rows <= 0) return;
    if (threads == 1 || sida_product_work(p->n, p->rows, p->cols) < SIDA_PARALLEL_WORK) {
        kernels->product(p, 0, p->n, 0, p->rows);
        return;
    }
    /* Columns are shared, so that every weight is read by one thread; rows where there are too few
     * columns (a router's). */
    int64_t cols = sida_product_task_cols(p->rows, threads), rows = p->n;
    if (cols * threads > p->rows && p->n >= 16 * threads) {
        cols = p->rows;
        rows = (p->n + 2 * threads - 1) / (2 * threads);
    }
    int64_t across = (p->rows + cols - 1) / cols, tasks = across * ((p->n + rows - 1) / rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t col = task % across * cols, row = task / across * rows;
        int64_t col_end = col + cols < p->rows ? col + cols : p->rows;
        int64_t row_end = row + rows < p->n ? row + rows : p->n;
        kernels->product(p, row, row_end, col, col_end);
    }
}

sida_status sida_linear_cpu(sida_stream *stream, const sida_linear_call *call) {
    const void *x = call->x;
    int64_t ldx = call->ldx;
    assert(call->ldy >= call->weight.rows && call->ldx >= call->weight.cols);
    assert(call->x_type == SIDA_F32 && call->y_type == SIDA_F32);
    if (call->norm.data) {
        assert(call->normed && call->normed_type == SIDA_F32 && ldx == call->weight.cols);
        sida_status status = sida_rms_norm_cpu(stream, call->normed, SIDA_F32, x, call->norm,
                                               call->n, call->epsilon);
        if (status != SIDA_OK) return status;
        x = call->normed;
    }
    sida_product product = {.y = call->y,
                            .x = x,
                            .w = call->weight.data,
                            .bias = call->bias,
                            .ldy = call->ldy,
                            .ldx = ldx,
                            .ldw = call->weight.cols,
                            .n = call->n,
                            .rows = call->weight.rows,
                            .cols = call->weight.cols,
                            .dtype = call->weight.dtype,
                            .epilogue = call->epilogue,
                            .scale = call->scale};
    sida_product_run(&product);
    return SIDA_OK;
}
