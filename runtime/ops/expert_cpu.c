#include "runtime/ops/expert.h"

#include "runtime/ops/cpu_kernels.h"

#include <assert.h>

size_t sida_expert_workspace_floats(const sida_expert_shape *shape, int64_t rows) {
    return (size_t)rows * (size_t)shape->d_ff * (shape->gated ? 2 : 1);
}

static int32_t count_of(const sida_expert_call *call) {
    return call->count_of ? *call->count_of : call->count;
}

static int32_t id_of(const sida_expert_call *call, int32_t index) {
    return call->ids ? call->ids[index] : index;
}

/* The products of one phase over all experts of a wave: expert i's columns are cut into tasks, and
 * the tasks of all experts are shared, so that a wave of many small experts and one of a single
 * large one both use every thread. */
typedef enum phase { PHASE_IN, PHASE_GATE, PHASE_OUT } phase;

static sida_product product_of(const sida_expert_call *call, phase which, int32_t index) {
    const sida_expert_shape *shape = &call->shape;
    int32_t id = id_of(call, index);
    int64_t first = call->row_start[id], rows = call->row_start[id + 1] - first;
    float *hidden = call->workspace + first * shape->d_ff;
    const char *weights = call->weights[call->weights_by_expert ? id : index];
    size_t matrix = (size_t)shape->d_model * (size_t)shape->d_ff * sida_dtype_bytes(shape->dtype);
    sida_product p = {.n = rows, .dtype = shape->dtype, .scale = 1.0f};
    if (which == PHASE_OUT) {
        p.x = hidden;
        p.ldx = p.ldw = p.cols = shape->d_ff;
        p.w = weights + matrix * (shape->gated ? 2 : 1);
        p.rows = p.ldy = shape->d_model;
        p.y = call->scratch;
        p.y_index = call->rows + first;
        return p;
    }
    p.x = call->x;
    p.x_index = call->rows + first;
    p.x_divide = call->k;
    p.ldx = p.ldw = p.cols = shape->d_model;
    p.rows = p.ldy = shape->d_ff;
    p.w = weights + (which == PHASE_GATE ? matrix : 0);
    p.y = hidden + (which == PHASE_GATE ? call->rows_total * shape->d_ff : 0);
    if (!shape->gated) p.epilogue = SIDA_EPILOGUE_RELU;
    return p;
}

static bool has_rows(const sida_expert_call *call, int32_t index) {
    int32_t id = id_of(call, index);
    return call->row_start[id + 1] > call->row_start[id];
}

/* busy: experts that have rows. */
static void run_phase(const sida_cpu_kernels *kernels, const sida_expert_call *call, phase which,
                      int32_t busy, int threads) {
    int64_t width = which == PHASE_OUT ? call->shape.d_model : call->shape.d_ff;
    int64_t cols = busy >= 4 * threads ? width : sida_product_task_cols(width, threads);
    int64_t across = (width + cols - 1) / cols, tasks = across * count_of(call);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int32_t index = (int32_t)(task / across);
        if (!has_rows(call, index)) continue;
        sida_product p = product_of(call, which, index);
        int64_t col = task % across * cols;
        kernels->product(&p, 0, p.n, col, col + cols < width ? col + cols : width);
    }
}

/* act(gate) * up over the rows of all experts; neighbours' in one piece. */
static sida_status run_gate(sida_stream *stream, const sida_expert_call *call) {
    const sida_expert_shape *shape = &call->shape;
    sida_status status = SIDA_OK;
    const int32_t count = count_of(call);
    for (int32_t i = 0, next; i < count && status == SIDA_OK; i = next) {
        int64_t first = call->row_start[id_of(call, i)], end = call->row_start[id_of(call, i) + 1];
        for (next = i + 1; next < count && call->row_start[id_of(call, next)] == end; next++)
            end = call->row_start[id_of(call, next) + 1];
        float *hidden = call->workspace + first * shape->d_ff;
        status = sida_gated_cpu(stream, hidden, hidden, hidden + call->rows_total * shape->d_ff,
                                (end - first) * shape->d_ff, shape->activation);
    }
    return status;
}

sida_status sida_expert_cpu(sida_stream *stream, const sida_expert_call *call) {
    const sida_expert_shape *shape = &call->shape;
    assert(shape->gated || shape->activation == SIDA_ACT_RELU);
    assert(call->x_type == SIDA_F32 && !call->h);
    int64_t rows = 0;
    int32_t busy = 0;
    for (int32_t i = 0; i < count_of(call); i++) {
        int32_t id = id_of(call, i);
        assert(call->row_start[id] <= call->row_start[id + 1]);
        assert(call->row_start[id + 1] <= call->rows_total);
        rows += call->row_start[id + 1] - call->row_start[id];
        busy += has_rows(call, i);
    }
    if (rows == 0) return SIDA_OK;
    const sida_cpu_kernels *kernels = sida_cpu_kernels_get();
    int64_t work = sida_product_work(rows, shape->d_model, shape->d_ff) +
                   sida_product_work(0, shape->d_model, shape->d_ff) * (busy - 1);
    int threads = work < SIDA_PARALLEL_WORK ? 1 : sida_ops_threads();
    run_phase(kernels, call, PHASE_IN, busy, threads);
    if (shape->gated) {
        run_phase(kernels, call, PHASE_GATE, busy, threads);
        sida_status status = run_gate(stream, call);
        if (status != SIDA_OK) return status;
    }
    run_phase(kernels, call, PHASE_OUT, busy, threads);
    return SIDA_OK;
}

sida_status sida_combine_cpu(sida_stream *stream, float *h, const float *scratch,
                             const float *alpha, const uint8_t *dropped, int64_t n, int32_t k,
                             int64_t d) {
    (void)stream;
    const sida_cpu_kernels *kernels = sida_cpu_kernels_get();
    int threads = n * k * d < SIDA_PARALLEL_WORK / 8 ? 1 : sida_ops_threads();
    (void)threads; /* without OpenMP */
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < n; t++) {
        if (dropped && dropped[t]) continue;
        for (int32_t r = 0; r < k; r++)
            kernels->axpy(h + t * d, scratch + (t * k + r) * d, alpha[t * k + r], d);
    }
    return SIDA_OK;
}
