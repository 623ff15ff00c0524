/* The training ops of a GPU (train_ops.h, and in train_rnn_host.c rnn.h) on the host, over the
 * CPU's ops: so that what calls them is tested where there is no GPU. Every function keeps the
 * contract in its header, workspaces and thresholds included as far as they are handed from one
 * call to another, and is run when its stream's turn comes (streams_host.h). */
#include "runtime/ops/sparsemax.h"
#include "runtime/ops/train_ops.h"
#include "runtime/ops/transformer_train.h"
#include "tests/attention_reference.h"
#include "tests/streams_host.h"
#include "tests/test.h"
#include "trainer/loss.h"

#include <math.h>
#include <string.h>

/* A workspace whose first bytes are 0, and stay so. */
static void spoil(void *workspace, size_t zeros, size_t bytes) {
    for (size_t i = 0; i < zeros; i++) assert_int_equal(((unsigned char *)workspace)[i], 0);
    memset((char *)workspace + zeros, 0xff, bytes - zeros);
}

#define ISSUE(stream, run, ...) streams_host_issue(stream, run, &(__VA_ARGS__), sizeof(__VA_ARGS__))

typedef struct zero_arguments {
    void *data;
    size_t bytes;
} zero_arguments;
static sida_status run_zero(const void *arguments) {
    const zero_arguments *a = arguments;
    memset(a->data, 0, a->bytes);
    return SIDA_OK;
}
sida_status sida_zero_cuda(sida_stream *stream, void *data, size_t bytes) {
    return ISSUE(stream, run_zero, (zero_arguments){data, bytes});
}

sida_status sida_beside_cuda(sida_stream *beside, sida_stream *stream) {
    assert_true(beside != stream && beside->backend == stream->backend);
    return SIDA_OK;
}

static sida_status run_gemm(const void *arguments) {
    sida_gemm_cpu(arguments);
    return SIDA_OK;
}
sida_status sida_gemm_cuda(sida_stream *stream, const sida_gemm_call *call, bool tf32) {
    (void)tf32;
    return ISSUE(stream, run_gemm, *call);
}

static sida_status run_linear(const void *arguments) {
    return sida_linear_gemm_cpu(NULL, arguments);
}
sida_status sida_linear_train_cuda(sida_stream *stream, float *y, const float *x, sida_weight w,
                                   const float *bias, sida_epilogue epilogue, int64_t n,
                                   bool tf32) {
    (void)tf32;
    return ISSUE(stream, run_linear,
                 (sida_linear_call){.y = y,
                                    .ldy = w.rows,
                                    .x = x,
                                    .ldx = w.cols,
                                    .n = n,
                                    .weight = w,
                                    .bias = bias,
                                    .scale = 1,
                                    .epilogue = epilogue});
}

typedef struct linear_backward_arguments {
    sida_linear_backward_call call;
    float *workspace;
} linear_backward_arguments;
static sida_status run_linear_backward(const void *arguments) {
    const linear_backward_arguments *a = arguments;
    spoil(a->workspace, SIDA_COLUMN_SUM_COUNTS, SIDA_COLUMN_SUM_BYTES(a->call.weight.rows));
    sida_linear_backward_cpu(&a->call);
    return SIDA_OK;
}
sida_status sida_linear_backward_cuda(sida_stream *stream, const sida_linear_backward_call *call,
                                      bool tf32, float *workspace) {
    (void)tf32;
    return ISSUE(stream, run_linear_backward, (linear_backward_arguments){*call, workspace});
}

typedef struct column_sum_arguments {
    float *out, *x;
    const float *activated;
    int64_t rows, cols;
    float *workspace;
} column_sum_arguments;
static sida_status run_column_sum(const void *arguments) {
    const column_sum_arguments *a = arguments;
    spoil(a->workspace, SIDA_COLUMN_SUM_COUNTS, SIDA_COLUMN_SUM_BYTES(a->cols));
    for (int64_t i = 0; a->activated && i < a->rows * a->cols; i++)
        if (a->activated[i] == 0) a->x[i] = 0;
    if (a->out) sida_column_sum_cpu(a->out, a->x, a->rows, a->cols);
    return SIDA_OK;
}
sida_status sida_column_sum_cuda(sida_stream *stream, float *out, float *x, const float *activated,
                                 int64_t rows, int64_t cols, float *workspace) {
    return ISSUE(stream, run_column_sum,
                 (column_sum_arguments){out, x, activated, rows, cols, workspace});
}

/* --- attention, a sequence at a time */

size_t sida_sparsemax_train_bytes(int32_t sequences, int32_t q_longest, int32_t k_longest,
                                  int32_t width, bool backward) {
    return (size_t)sequences * (backward ? 2 : 1) * sizeof(float) *
           (size_t)(q_longest * (int64_t)k_longest + (q_longest + k_longest) * (int64_t)width);
}

static float *gather(const float *from, const sida_row_map *map, int32_t s, int32_t width) {
    float *rows = calloc((size_t)(map->count[s] * width) + 1, sizeof *rows);
    for (int32_t t = 0; t < map->count[s]; t++)
        memcpy(rows + t * width, from + (int64_t)(map->start[s] + map->step[t]) * width,
               (size_t)width * sizeof *rows);
    return rows;
}

static void scatter_add(float *to, const float *rows, const sida_row_map *map, int32_t s,
                        int32_t width) {
    for (int32_t t = 0; t < map->count[s]; t++)
        for (int32_t c = 0; c < width; c++)
            to[(int64_t)(map->start[s] + map->step[t]) * width + c] += rows[t * width + c];
}

/* One sequence, forward and, where d_out is not NULL, backward. */
static void attend(const sida_sparsemax_train_call *q, int32_t s, float *d_queries, float *d_memory,
                   const float *d_out) {
    const int64_t zero = 0;
    int32_t nq = q->q.count[s], nk = q->k.count[s], width = q->width;
    assert_true(nq <= q->q.longest && nk <= q->k.longest);
    float *queries = gather(q->queries, &q->q, s, width),
          *memory = gather(q->memory, &q->k, s, width);
    float *out = calloc((size_t)(nq * width) + 1, sizeof *out);
    float *p = calloc((size_t)(nq * nk) + 1, sizeof *p);
    const sida_sparsemax_attention_call call = {.out = out,
                                                .queries = queries,
                                                .memory = memory,
                                                .sequences = 1,
                                                .width = width,
                                                .q_start = &zero,
                                                .k_start = &zero,
                                                .q_count = &nq,
                                                .k_count = &nk,
                                                .causal = q->causal,
                                                .softmax = q->softmax,
                                                .probabilities = p,
                                                .p_start = &zero};
    assert_int_equal(sida_sparsemax_attention_cpu(NULL, &call), SIDA_OK);
    for (int32_t t = 0; t < nq; t++) {
        /* What forward leaves must be what backward gets. */
        float *threshold = q->thresholds + 2 * (int64_t)(q->q.start[s] + q->q.step[t]);
        float mark = nk > 0 ? out[t * width] : 0;
        if (d_out) assert_memory_equal(threshold, &mark, sizeof mark);
        threshold[0] = mark;
    }
    if (!d_out)
        scatter_add(q->out, out, &q->q, s, width);
    else {
        float *given = gather(d_out, &q->q, s, width);
        float *dq = calloc((size_t)(nq * width) + 1, sizeof *dq);
        float *dk = calloc((size_t)(nk * width) + 1, sizeof *dk);
        assert_int_equal(
            sida_sparsemax_attention_backward_cpu(&(sida_sparsemax_attention_backward_call){
                .d_queries = dq, .d_memory = dk, .d_out = given, .forward = &call}),
            SIDA_OK);
        scatter_add(d_queries, dq, &q->q, s, width);
        scatter_add(d_memory, dk, &q->k, s, width);
        free(given);
        free(dq);
        free(dk);
    }
    free(queries);
    free(memory);
    free(out);
    free(p);
}

static void attend_all(const sida_sparsemax_train_call *q, float *d_queries, float *d_memory,
                       const float *d_out) {
    size_t one = sida_sparsemax_train_bytes(1, q->q.longest, q->k.longest, q->width, d_out != NULL);
    assert_true(q->workspace_bytes >= one && (uintptr_t)q->workspace % 256 == 0);
    memset(q->workspace, 0xff, q->workspace_bytes);
    for (int32_t s = 0; s < q->sequences; s++) attend(q, s, d_queries, d_memory, d_out);
}

typedef struct attend_arguments {
    sida_sparsemax_train_call call;
    float *d_queries, *d_memory;
    const float *d_out;
} attend_arguments;
static sida_status run_attend(const void *arguments) {
    const attend_arguments *a = arguments;
    attend_all(&a->call, a->d_queries, a->d_memory, a->d_out);
    return SIDA_OK;
}
sida_status sida_sparsemax_train_forward_cuda(sida_stream *stream,
                                              const sida_sparsemax_train_call *call) {
    if (call->out_ready) assert_int_equal(sida_stream_wait(stream, call->out_ready), SIDA_OK);
    return ISSUE(stream, run_attend, (attend_arguments){.call = *call});
}
sida_status sida_sparsemax_train_backward_cuda(sida_stream *stream, float *d_queries,
                                               float *d_memory, const float *d_out,
                                               const sida_sparsemax_train_call *call) {
    return ISSUE(stream, run_attend, (attend_arguments){*call, d_queries, d_memory, d_out});
}

/* --- of a Transformer */

static sida_status run_norm_backward(const void *arguments) {
    const sida_norm_train_call *call = arguments;
    reference_norm_backward(call);
    spoil(call->workspace, SIDA_COLUMN_SUM_COUNTS, SIDA_COLUMN_SUM_BYTES(call->width));
    memset(call->d_y, 0xff, (size_t)(call->n * call->width) * sizeof(float));
    return SIDA_OK;
}
sida_status sida_norm_train_backward_cuda(sida_stream *stream, const sida_norm_train_call *call) {
    return ISSUE(stream, run_norm_backward, *call);
}

size_t sida_attention_train_bytes(int32_t sequences, int32_t q_longest, int32_t k_longest,
                                  int32_t heads, bool backward) {
    return (size_t)sequences * (size_t)heads * (backward ? 2 : 1) * sizeof(float) *
           (size_t)(q_longest * (int64_t)k_longest +
                    (q_longest + 2 * k_longest) * (int64_t)SIDA_ATTENTION_TRAIN_WIDTH);
}

static void spoil_workspace(const sida_attention_train_call *c, bool backward) {
    size_t one = sida_attention_train_bytes(1, c->q.longest, c->k.longest, c->heads, backward);
    assert_true(c->workspace_bytes >= one && (uintptr_t)c->workspace % 256 == 0);
    memset(c->workspace, 0xff, c->workspace_bytes);
    for (int32_t s = 0; s < c->sequences; s++)
        assert_true(c->q.count[s] <= c->q.longest && c->k.count[s] <= c->k.longest);
}

typedef struct attention_arguments {
    sida_attention_train_call call;
    float *d_queries, *d_key_value, *d_positions;
    const float *d_out;
} attention_arguments;
static sida_status run_attention(const void *arguments) {
    const attention_arguments *a = arguments;
    spoil_workspace(&a->call, a->d_out != NULL);
    reference_attention(a->d_queries, a->d_key_value, a->d_positions, a->d_out, &a->call);
    return SIDA_OK;
}
sida_status sida_attention_train_forward_cuda(sida_stream *stream,
                                              const sida_attention_train_call *call) {
    return ISSUE(stream, run_attention, (attention_arguments){.call = *call});
}
sida_status sida_attention_train_backward_cuda(sida_stream *stream, float *d_queries,
                                               float *d_key_value, float *d_positions,
                                               const float *d_out,
                                               const sida_attention_train_call *call) {
    return ISSUE(stream, run_attention,
                 (attention_arguments){*call, d_queries, d_key_value, d_positions, d_out});
}

/* --- loss and the end of a step */

static sida_status run_loss(const void *arguments) {
    const sida_loss_cuda_call *q = arguments;
    double sum, *losses = calloc((size_t)(q->rows * q->layers) + 1, sizeof *losses);
    int64_t width = (int64_t)q->layers * q->experts, list = (int64_t)q->layers * q->top;
    float *logits = calloc((size_t)(q->rows * width) + 1, sizeof *logits);
    uint16_t *ids = calloc((size_t)(q->rows * list) + 1, sizeof *ids);
    uint16_t *logp = calloc((size_t)(q->rows * list) + 1, sizeof *logp);
    int64_t count = q->labels ? (int64_t)q->layers * q->label_count : 0;
    uint16_t *labels = calloc((size_t)(q->rows * count) + 1, sizeof *labels);
    float *weights = calloc((size_t)(q->rows * count) + 1, sizeof *weights);
    for (int64_t r = 0; r < q->rows; r++) {
        int64_t from = q->source ? q->source[r] : r;
        for (int64_t i = 0; i < width; i++)
            logits[r * width + i] = q->logits[r * width + i] + (q->bias ? q->bias[i] : 0);
        memcpy(ids + r * list, q->top_ids + from * list, (size_t)list * sizeof *ids);
        memcpy(logp + r * list, q->top_logp + from * list, (size_t)list * sizeof *logp);
        if (count == 0) continue;
        memcpy(labels + r * count, q->labels + from * count, (size_t)count * sizeof *labels);
        memcpy(weights + r * count, q->label_weights + from * count,
               (size_t)count * sizeof *weights);
    }
    sida_status status = sida_loss(&sum, &(sida_loss_call){.d_logits = q->d_logits,
                                                           .losses = losses,
                                                           .logits = logits,
                                                           .top_ids = ids,
                                                           .top_logp = logp,
                                                           .labels = q->labels ? labels : NULL,
                                                           .label_weights = weights,
                                                           .label_count = q->label_count,
                                                           .pairs = q->rows * q->layers,
                                                           .experts = q->experts,
                                                           .top = q->top,
                                                           .tkd = q->tkd,
                                                           .lambda = q->lambda,
                                                           .scale = q->scale});
    memset(q->partials, 0, SIDA_TRAIN_PARTIALS * sizeof *q->partials);
    q->partials[7] = sum;
    free(losses);
    free(logits);
    free(ids);
    free(logp);
    free(labels);
    free(weights);
    return status;
}

sida_status sida_loss_cuda(sida_stream *stream, const sida_loss_cuda_call *call) {
    return ISSUE(stream, run_loss, *call);
}

typedef struct finish_arguments {
    sida_train_result *result;
    const double *partials[2];
    const float *gradient;
    int64_t count;
    void *workspace;
} finish_arguments;
static sida_status run_finish(const void *arguments) {
    const finish_arguments *a = arguments;
    double sum = 0;
    spoil(a->workspace, SIDA_TRAIN_FINISH_COUNT, SIDA_TRAIN_FINISH_BYTES);
    *a->result = (sida_train_result){.finite = 1};
    for (int side = 0; side < 2; side++)
        for (int i = 0; a->partials[side] && i < SIDA_TRAIN_PARTIALS; i++)
            a->result->losses[side] += a->partials[side][i];
    for (int64_t i = 0; i < a->count; i++) sum += (double)a->gradient[i] * (double)a->gradient[i];
    a->result->norm = sqrt(sum);
    a->result->finite = isfinite(a->result->losses[0] + a->result->losses[1] + a->result->norm);
    return SIDA_OK;
}
sida_status sida_train_finish_cuda(sida_stream *stream, sida_train_result *result,
                                   const double *const loss_partials[2], const float *gradient,
                                   int64_t count, void *workspace) {
    return ISSUE(stream, run_finish,
                 (finish_arguments){
                     result, {loss_partials[0], loss_partials[1]}, gradient, count, workspace});
}

sida_adamw_scalars sida_adamw_scalars_of(double beta1, double beta2, double epsilon, double lr,
                                         double weight_decay, int64_t step, double clip) {
    return (sida_adamw_scalars){.beta1 = (float)beta1,
                                .beta2 = (float)beta2,
                                .rest1 = (float)(1 - beta1),
                                .rest2 = (float)(1 - beta2),
                                .decay = (float)(1 - lr * weight_decay),
                                .rate = (float)(lr / (1 - pow(beta1, (double)step))),
                                .root = (float)sqrt(1 - pow(beta2, (double)step)),
                                .epsilon = (float)epsilon,
                                .clip = clip};
}

typedef struct adamw_arguments {
    float *parameters, *first, *second, *gradient;
    int64_t count;
    sida_adamw_scalars scalars;
    const sida_train_result *result;
    bool zero_gradient;
} adamw_arguments;
static sida_status run_adamw(const void *arguments) {
    const adamw_arguments *a = arguments;
    const sida_adamw_scalars *s = &a->scalars;
    const double norm = a->result->norm;
    float factor = s->clip > 0 && norm > s->clip ? (float)(s->clip / norm) : 1.0f;
    for (int64_t i = 0; a->result->finite != 0 && i < a->count; i++) {
        float g = a->gradient[i] * factor, *first = &a->first[i], *second = &a->second[i];
        *first = s->beta1 * *first + s->rest1 * g;
        *second = s->beta2 * *second + s->rest2 * g * g;
        a->parameters[i] = a->parameters[i] * s->decay -
                           s->rate * *first / (sqrtf(*second) / s->root + s->epsilon);
    }
    if (a->zero_gradient) memset(a->gradient, 0, (size_t)a->count * sizeof *a->gradient);
    return SIDA_OK;
}
sida_status sida_adamw_cuda(sida_stream *stream, float *parameters, float *first, float *second,
                            float *gradient, int64_t count, const sida_adamw_scalars *scalars,
                            const sida_train_result *result, bool zero_gradient) {
    return ISSUE(stream, run_adamw,
                 (adamw_arguments){parameters, first, second, gradient, count, *scalars, result,
                                   zero_gradient});
}
