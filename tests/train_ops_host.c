/* The training ops of a GPU (train_ops.h, rnn.h) on the host, over the CPU's ops: so that what
 * calls them is tested where there is no GPU. Every function keeps the contract in its header,
 * workspaces and thresholds included as far as they are handed from one call to another. */
#include "formats/base/memory.h"
#include "runtime/ops/lstm.h"
#include "runtime/ops/rnn.h"
#include "runtime/ops/sparsemax.h"
#include "runtime/ops/train_ops.h"
#include "tests/test.h"
#include "trainer/loss.h"

#include <math.h>
#include <string.h>

sida_status sida_zero_cuda(sida_stream *stream, void *data, size_t bytes) {
    (void)stream;
    memset(data, 0, bytes);
    return SIDA_OK;
}

sida_status sida_gemm_cuda(sida_stream *stream, const sida_gemm_call *call, bool tf32) {
    (void)stream, (void)tf32;
    sida_gemm_cpu(call);
    return SIDA_OK;
}

sida_status sida_linear_train_cuda(sida_stream *stream, float *y, const float *x, sida_weight w,
                                   const float *bias, sida_epilogue epilogue, int64_t n,
                                   bool tf32) {
    (void)tf32;
    return sida_linear_gemm_cpu(stream, &(sida_linear_call){.y = y,
                                                            .ldy = w.rows,
                                                            .x = x,
                                                            .ldx = w.cols,
                                                            .n = n,
                                                            .weight = w,
                                                            .bias = bias,
                                                            .scale = 1,
                                                            .epilogue = epilogue});
}

sida_status sida_linear_backward_cuda(sida_stream *stream, const sida_linear_backward_call *call,
                                      bool tf32, float *workspace) {
    (void)stream, (void)tf32;
    memset(workspace, 0xff, SIDA_COLUMN_SUM_BYTES(call->weight.rows));
    sida_linear_backward_cpu(call);
    return SIDA_OK;
}

sida_status sida_column_sum_cuda(sida_stream *stream, float *out, float *x, const float *activated,
                                 int64_t rows, int64_t cols, float *workspace) {
    (void)stream;
    memset(workspace, 0xff, SIDA_COLUMN_SUM_BYTES(cols));
    for (int64_t i = 0; activated && i < rows * cols; i++)
        if (activated[i] == 0) x[i] = 0;
    if (out) sida_column_sum_cpu(out, x, rows, cols);
    return SIDA_OK;
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

sida_status sida_sparsemax_train_forward_cuda(sida_stream *stream,
                                              const sida_sparsemax_train_call *call) {
    (void)stream;
    attend_all(call, NULL, NULL, NULL);
    return SIDA_OK;
}

sida_status sida_sparsemax_train_backward_cuda(sida_stream *stream, float *d_queries,
                                               float *d_memory, const float *d_out,
                                               const sida_sparsemax_train_call *call) {
    (void)stream;
    attend_all(call, d_queries, d_memory, d_out);
    return SIDA_OK;
}

/* --- loss and the end of a step */

sida_status sida_loss_cuda(sida_stream *stream, const sida_loss_cuda_call *q) {
    (void)stream;
    double sum, *losses = calloc((size_t)(q->rows * q->layers) + 1, sizeof *losses);
    int64_t width = (int64_t)q->layers * q->experts, list = (int64_t)q->layers * q->top;
    float *logits = calloc((size_t)(q->rows * width) + 1, sizeof *logits);
    uint16_t *ids = calloc((size_t)(q->rows * list) + 1, sizeof *ids);
    uint16_t *logp = calloc((size_t)(q->rows * list) + 1, sizeof *logp);
    for (int64_t r = 0; r < q->rows; r++) {
        int64_t from = q->source ? q->source[r] : r;
        for (int64_t i = 0; i < width; i++)
            logits[r * width + i] = q->logits[r * width + i] + (q->bias ? q->bias[i] : 0);
        memcpy(ids + r * list, q->top_ids + from * list, (size_t)list * sizeof *ids);
        memcpy(logp + r * list, q->top_logp + from * list, (size_t)list * sizeof *logp);
    }
    sida_status status = sida_loss(&sum, &(sida_loss_call){.d_logits = q->d_logits,
                                                           .losses = losses,
                                                           .logits = logits,
                                                           .top_ids = ids,
                                                           .top_logp = logp,
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
    return status;
}

sida_status sida_train_finish_cuda(sida_stream *stream, sida_train_result *result,
                                   const double *const loss_partials[2], const float *gradient,
                                   int64_t count, double *workspace) {
    (void)stream;
    double sum = 0;
    memset(workspace, 0xff, SIDA_TRAIN_PARTIALS * sizeof *workspace);
    *result = (sida_train_result){.finite = 1};
    for (int side = 0; side < 2; side++)
        for (int i = 0; loss_partials[side] && i < SIDA_TRAIN_PARTIALS; i++)
            result->losses[side] += loss_partials[side][i];
    for (int64_t i = 0; i < count; i++) sum += (double)gradient[i] * (double)gradient[i];
    result->norm = sqrt(sum);
    result->finite = isfinite(result->losses[0] + result->losses[1] + result->norm);
    return SIDA_OK;
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

sida_status sida_adamw_cuda(sida_stream *stream, float *parameters, float *first, float *second,
                            float *gradient, int64_t count, const sida_adamw_scalars *s,
                            const sida_train_result *result, bool zero_gradient) {
    (void)stream;
    float factor = s->clip > 0 && result->norm > s->clip ? (float)(s->clip / result->norm) : 1.0f;
    for (int64_t i = 0; result->finite != 0 && i < count; i++) {
        float g = gradient[i] * factor;
        first[i] = s->beta1 * first[i] + s->rest1 * g;
        second[i] = s->beta2 * second[i] + s->rest2 * g * g;
        parameters[i] = parameters[i] * s->decay -
                        s->rate * first[i] / (sqrtf(second[i]) / s->root + s->epsilon);
    }
    if (zero_gradient) memset(gradient, 0, (size_t)count * sizeof *gradient);
    return SIDA_OK;
}

/* --- the LSTM: the CPU's op, layer by layer, on rows that lie end to end */

struct sida_rnn {
    sida_rnn_options options;
    sida_buffer *reserve; /* counts against the cap */
    int32_t *lengths, sequences;
    int64_t *offsets, rows;
    float *x, *y, *d, *gates[SIDA_RNN_LAYERS_MAX], *cells[SIDA_RNN_LAYERS_MAX],
        *out[SIDA_RNN_LAYERS_MAX], *d_gates, *workspace, *gradient;
};

bool sida_rnn_built(void) {
    return true;
}

/* Floats of the parts of a layer, with a gap as cuDNN may have them. */
enum { GAP = 24 };
static int64_t layer_items(const sida_rnn *rnn) {
    int64_t h = rnn->options.hidden;
    return 8 * h * h + 8 * h + GAP;
}

sida_status sida_rnn_create(sida_rnn **out, sida_stream *stream, const sida_rnn_options *options) {
    int64_t n = options->tokens, h = options->hidden, s = options->sequences;
    sida_rnn *rnn = calloc(1, sizeof *rnn);
    *out = NULL;
    rnn->options = *options;
    sida_status status =
        sida_buffer_create(stream->backend, &rnn->reserve, SIDA_MEMORY_DEVICE,
                           (size_t)(n * h * 6 * options->layers) * sizeof(float), "the LSTM");
    if (status != SIDA_OK) {
        free(rnn);
        return status;
    }
    rnn->lengths = calloc((size_t)s, sizeof *rnn->lengths);
    rnn->offsets = calloc((size_t)s + 1, sizeof *rnn->offsets);
    rnn->x = calloc((size_t)(n * h), sizeof(float));
    rnn->y = calloc((size_t)(n * h), sizeof(float));
    rnn->d = calloc((size_t)(n * h), sizeof(float));
    for (int l = 0; l < options->layers; l++) {
        rnn->gates[l] = calloc((size_t)(n * 4 * h), sizeof(float));
        rnn->cells[l] = calloc((size_t)(n * h), sizeof(float));
        rnn->out[l] = calloc((size_t)(n * h), sizeof(float));
    }
    rnn->d_gates = calloc((size_t)(n * 4 * h), sizeof(float));
    rnn->workspace = calloc((size_t)((n + 6 * s) * h), sizeof(float));
    rnn->gradient = calloc((size_t)(layer_items(rnn) * options->layers), sizeof(float));
    *out = rnn;
    return SIDA_OK;
}

void sida_rnn_destroy(sida_rnn *rnn) {
    if (!rnn) return;
    sida_buffer_destroy(rnn->reserve);
    for (int l = 0; l < rnn->options.layers; l++) {
        free(rnn->gates[l]);
        free(rnn->cells[l]);
        free(rnn->out[l]);
    }
    free(rnn->lengths);
    free(rnn->offsets);
    free(rnn->x);
    free(rnn->y);
    free(rnn->d);
    free(rnn->d_gates);
    free(rnn->workspace);
    free(rnn->gradient);
    free(rnn);
}

size_t sida_rnn_bytes(const sida_rnn *rnn) {
    return rnn->reserve->bytes;
}
int64_t sida_rnn_weight_items(const sida_rnn *rnn) {
    return layer_items(rnn) * rnn->options.layers;
}

/* Biases first: unlike the state's order. */
static sida_rnn_weights view(const sida_rnn *rnn, float *space, int layer) {
    int64_t h = rnn->options.hidden;
    float *at = space + layer * layer_items(rnn);
    return (sida_rnn_weights){.recurrent_bias = at,
                              .input_bias = at + 4 * h,
                              .recurrent_weight = at + 8 * h + GAP,
                              .input_weight = at + 8 * h + GAP + 4 * h * h};
}

static void move(const sida_rnn *rnn, const sida_rnn_weights *weights, float *space, bool back) {
    size_t h = (size_t)rnn->options.hidden;
    for (int l = 0; l < rnn->options.layers; l++) {
        sida_rnn_weights ours = view(rnn, space, l), theirs = weights[l];
        float *const pairs[4][2] = {{ours.input_weight, theirs.input_weight},
                                    {ours.recurrent_weight, theirs.recurrent_weight},
                                    {ours.input_bias, theirs.input_bias},
                                    {ours.recurrent_bias, theirs.recurrent_bias}};
        for (int i = 0; i < 4; i++)
            memcpy(pairs[i][back], pairs[i][!back], (i < 2 ? 4 * h * h : 4 * h) * sizeof(float));
    }
}
void sida_rnn_pack(const sida_rnn *rnn, float *space, const sida_rnn_weights *weights) {
    memset(space, 0, (size_t)sida_rnn_weight_items(rnn) * sizeof(float));
    move(rnn, weights, space, false);
}
void sida_rnn_unpack(const sida_rnn *rnn, const sida_rnn_weights *weights, const float *space) {
    move(rnn, weights, (float *)(uintptr_t)space, true);
}

sida_status sida_rnn_set_lengths(sida_rnn *rnn, const int32_t *lengths, int32_t sequences) {
    assert_true(sequences <= rnn->options.sequences);
    rnn->sequences = 0;
    rnn->rows = 0;
    for (int32_t s = 0; s < sequences; s++) {
        assert_true(s == 0 || lengths[s] <= lengths[s - 1]);
        rnn->lengths[s] = lengths[s];
        rnn->rows += lengths[s];
        rnn->offsets[s + 1] = rnn->rows;
        rnn->sequences += lengths[s] > 0;
    }
    assert_true(rnn->rows <= rnn->options.tokens && sida_rnn_longest(rnn) <= rnn->options.longest);
    return SIDA_OK;
}
int64_t sida_rnn_rows(const sida_rnn *rnn) {
    return rnn->rows;
}
int32_t sida_rnn_longest(const sida_rnn *rnn) {
    return rnn->sequences > 0 ? rnn->lengths[0] : 0;
}
void sida_rnn_steps(const sida_rnn *rnn, int32_t *step) {
    step[0] = 0;
    for (int32_t t = 0; t < sida_rnn_longest(rnn); t++) {
        step[t + 1] = step[t];
        for (int32_t s = 0; s < rnn->sequences; s++) step[t + 1] += rnn->lengths[s] > t;
    }
}

/* Between rows in time's order and rows end to end. */
static void reorder(const sida_rnn *rnn, float *to, const float *from, bool back) {
    size_t h = (size_t)rnn->options.hidden;
    int32_t *step = calloc((size_t)sida_rnn_longest(rnn) + 1, sizeof *step);
    sida_rnn_steps(rnn, step);
    for (int32_t s = 0; s < rnn->sequences; s++)
        for (int32_t t = 0; t < rnn->lengths[s]; t++) {
            size_t ours = (size_t)(rnn->offsets[s] + t) * h, theirs = (size_t)(step[t] + s) * h;
            memcpy(to + (back ? theirs : ours), from + (back ? ours : theirs), h * sizeof *to);
        }
    free(step);
}

static sida_weight square(const sida_rnn *rnn, const float *data) {
    return (sida_weight){data, SIDA_F32, 4 * (int64_t)rnn->options.hidden, rnn->options.hidden};
}

sida_status sida_rnn_forward(sida_rnn *rnn, float *y, const float *x, const float *weights) {
    int32_t h = rnn->options.hidden;
    reorder(rnn, rnn->x, x, false);
    for (int l = 0; l < rnn->options.layers; l++) {
        sida_rnn_weights w = view(rnn, (float *)(uintptr_t)weights, l);
        assert_int_equal(sida_linear_train_cuda(NULL, rnn->gates[l], l ? rnn->out[l - 1] : rnn->x,
                                                square(rnn, w.input_weight), w.input_bias,
                                                SIDA_EPILOGUE_NONE, rnn->rows, false),
                         SIDA_OK);
        assert_int_equal(
            sida_lstm_cpu(NULL, &(sida_lstm_call){.out = rnn->out[l],
                                                  .gates = rnn->gates[l],
                                                  .cells = rnn->cells[l],
                                                  .recurrent = square(rnn, w.recurrent_weight),
                                                  .bias = w.recurrent_bias,
                                                  .sequences = rnn->sequences,
                                                  .hidden = h,
                                                  .offsets = rnn->offsets,
                                                  .workspace = rnn->workspace,
                                                  .linear = sida_linear_gemm_cpu}),
            SIDA_OK);
    }
    reorder(rnn, y, rnn->out[rnn->options.layers - 1], true);
    return SIDA_OK;
}

sida_status sida_rnn_backward_data(sida_rnn *rnn, float *d_x, const float *d_y, const float *y,
                                   const float *weights) {
    int32_t h = rnn->options.hidden;
    (void)y;
    memset(rnn->gradient, 0, (size_t)sida_rnn_weight_items(rnn) * sizeof(float));
    reorder(rnn, rnn->d, d_y, false);
    for (int l = rnn->options.layers - 1; l >= 0; l--) {
        sida_rnn_weights w = view(rnn, (float *)(uintptr_t)weights, l),
                         g = view(rnn, rnn->gradient, l);
        assert_int_equal(sida_lstm_backward_cpu(&(sida_lstm_backward_call){
                             .d_gates = rnn->d_gates,
                             .d_recurrent = g.recurrent_weight,
                             .d_bias = g.recurrent_bias,
                             .d_out = rnn->d,
                             .out = rnn->out[l],
                             .gates = rnn->gates[l],
                             .cells = rnn->cells[l],
                             .recurrent = square(rnn, w.recurrent_weight),
                             .sequences = rnn->sequences,
                             .hidden = h,
                             .offsets = rnn->offsets,
                             .workspace = rnn->workspace}),
                         SIDA_OK);
        memset(rnn->d, 0, (size_t)(rnn->rows * h) * sizeof(float));
        sida_linear_backward_cpu(&(sida_linear_backward_call){.d_x = rnn->d,
                                                              .d_weight = g.input_weight,
                                                              .d_bias = g.input_bias,
                                                              .d_y = rnn->d_gates,
                                                              .x = l ? rnn->out[l - 1] : rnn->x,
                                                              .weight = square(rnn, w.input_weight),
                                                              .n = rnn->rows});
    }
    reorder(rnn, d_x, rnn->d, true);
    return SIDA_OK;
}

sida_status sida_rnn_backward_weights(sida_rnn *rnn, float *d_weights, const float *x,
                                      const float *y) {
    (void)x, (void)y;
    for (int64_t i = 0; i < sida_rnn_weight_items(rnn); i++) d_weights[i] += rnn->gradient[i];
    return SIDA_OK;
}
