#include "trainer/step_cuda_private.h"

#include <assert.h>

/* One side of a part under way. */
typedef struct side_call {
    sida_step_cuda *step;
    const sida_feed_part *part;
    const sida_feed_side *rows;
    const sida_step_activations *a;
    int side;
    int64_t n;
    float scale;
} side_call;

static sida_weight weight_of(const side_call *q, const sida_net_linear *shape, int64_t place) {
    return (sida_weight){sida_step_array(q->step, SIDA_STEP_PARAMETERS) + place, SIDA_F32,
                         shape->rows, shape->cols};
}

static const float *bias_of(const side_call *q, int64_t place) {
    return sida_step_array(q->step, SIDA_STEP_PARAMETERS) + place;
}

/* Gradients of a layer's weight and bias, and of what it read where d_x is not NULL: all added. */
static sida_status linear_backward(const side_call *q, float *d_x, const float *d_y, const float *x,
                                   int64_t n, const sida_net_linear *shape, int64_t weight,
                                   int64_t bias) {
    float *gradient = sida_step_array(q->step, SIDA_STEP_GRADIENT);
    return sida_linear_backward_cuda(
        q->step->stream,
        &(sida_linear_backward_call){.d_x = d_x,
                                     .d_weight = gradient + weight,
                                     .d_bias = bias >= 0 ? gradient + bias : NULL,
                                     .d_y = d_y,
                                     .x = x,
                                     .weight = weight_of(q, shape, weight),
                                     .n = n},
        q->step->options.tf32, q->step->sums);
}

static sida_status embed(const side_call *q, int64_t first, int64_t rows) {
    return q->step->ops->embedding(q->step->stream, q->step->scratch, q->step->table,
                                   q->rows->ids + first, rows);
}

/* Everything below the attention. */
static sida_status run_trunk(const side_call *q) {
    sida_status status = SIDA_OK;
    sida_step_cuda *step = q->step;
    const sida_net_trunk *shape = &step->shapes[q->side];
    const sida_step_places *p = &step->places[q->side];
    const bool tf32 = step->options.tf32;
    SIDA_TRY(sida_rnn_set_lengths(step->rnn[q->side], q->rows->lengths, q->rows->sequences));
    assert(sida_rnn_rows(step->rnn[q->side]) == q->n);
    for (int64_t first = 0; first < q->n; first += SIDA_STEP_CHUNK_ROWS) {
        int64_t rows = sida_step_smaller(q->n - first, SIDA_STEP_CHUNK_ROWS);
        SIDA_TRY(embed(q, first, rows));
        SIDA_TRY(sida_linear_train_cuda(
            step->stream, q->a->compressed + first * step->config.hidden, step->scratch,
            weight_of(q, &shape->compress, p->compress_weight), bias_of(q, p->compress_bias),
            SIDA_EPILOGUE_RELU, rows, tf32));
    }
    SIDA_TRY(sida_rnn_forward(step->rnn[q->side], q->a->out, q->a->compressed,
                              sida_step_array(step, SIDA_STEP_PARAMETERS) + p->lstm));
    SIDA_TRY(sida_linear_train_cuda(step->stream, q->a->mixed, q->a->compressed,
                                    weight_of(q, &shape->residual, p->residual_weight),
                                    bias_of(q, p->residual_bias), SIDA_EPILOGUE_NONE, q->n, tf32));
out:
    return status;
}

/* The attention of this side's queries to the LSTM's outputs of side `keys`. */
static sida_sparsemax_train_call attention(const side_call *q, int keys) {
    sida_step_cuda *step = q->step;
    const sida_feed_side *r = q->rows, *k = &q->part->sides[keys];
    bool self = keys == q->side;
    size_t bytes = sida_step_score_bytes(step, r->sequences, r->longest, k->longest);
    assert(bytes <= step->scratch_bytes);
    return (sida_sparsemax_train_call){.out = q->a->mixed,
                                       .thresholds = self ? q->a->self : q->a->cross,
                                       .queries = q->a->out,
                                       .memory = step->sides[keys].out,
                                       .q = {r->start, r->step, r->count, r->longest},
                                       .k = {self ? r->start : r->other_start, k->step,
                                             self ? r->count : r->other_count, k->longest},
                                       .sequences = r->sequences,
                                       .width = step->config.hidden,
                                       .causal = self && q->side == 1,
                                       .tf32 = step->options.tf32,
                                       .workspace = step->scratch,
                                       .workspace_bytes = bytes};
}

/* Whether this side's queries see anything of the encoder. */
static bool crosses(const side_call *q) {
    return q->side == 1 && q->part->sides[0].tokens > 0;
}

/* Sums what a side's partials hold, before they are written again. */
static sida_status flush_losses(sida_step_cuda *step, int side) {
    if (!step->open[side]) return SIDA_OK;
    int slot = (int)(step->steps % SIDA_STEPS_AHEAD);
    const double *const partials[2] = {side == 0 ? step->partials[0] : NULL,
                                       side == 1 ? step->partials[1] : NULL};
    assert(step->results_used[slot] < step->results_most - 1);
    step->open[side] = false;
    return sida_train_finish_cuda(step->stream, &step->results[slot][step->results_used[slot]++],
                                  partials, sida_step_array(step, SIDA_STEP_GRADIENT), 0,
                                  step->partial_norm);
}

/* Scores, their loss, and its gradient down to what the heads read, which replaces that. */
static sida_status run_heads(const side_call *q) {
    sida_status status = SIDA_OK;
    sida_step_cuda *step = q->step;
    const sida_net_config *c = &step->config;
    const sida_net_linear *heads = &step->shapes[q->side].heads;
    const sida_step_places *p = &step->places[q->side];
    float *logits = step->scratch;
    for (int64_t first = 0; first < q->n; first += SIDA_STEP_CHUNK_ROWS) {
        int64_t rows = sida_step_smaller(q->n - first, SIDA_STEP_CHUNK_ROWS);
        float *mixed = q->a->mixed + first * c->hidden;
        sida_weight weight = weight_of(q, heads, p->heads_weight);
        SIDA_TRY(flush_losses(step, q->side));
        SIDA_TRY(sida_linear_train_cuda(step->stream, logits, mixed, weight, NULL,
                                        SIDA_EPILOGUE_NONE, rows, step->options.tf32));
        SIDA_TRY(sida_loss_cuda(step->stream,
                                &(sida_loss_cuda_call){.d_logits = logits,
                                                       .partials = step->partials[q->side],
                                                       .logits = logits,
                                                       .bias = bias_of(q, p->heads_bias),
                                                       .top_ids = q->rows->top_ids,
                                                       .top_logp = q->rows->top_logp,
                                                       .source = q->rows->source + first,
                                                       .rows = rows,
                                                       .layers = c->layers[q->side],
                                                       .experts = c->experts,
                                                       .top = step->options.top,
                                                       .tkd = step->options.tkd,
                                                       .lambda = (float)step->options.lambda,
                                                       .scale = q->scale}));
        step->open[q->side] = true;
        SIDA_TRY(
            linear_backward(q, NULL, logits, mixed, rows, heads, p->heads_weight, p->heads_bias));
        SIDA_TRY(sida_gemm_cuda(step->stream,
                                &(sida_gemm_call){.c = mixed,
                                                  .ldc = heads->cols,
                                                  .a = logits,
                                                  .lda = heads->rows,
                                                  .b = weight.data,
                                                  .ldb = heads->cols,
                                                  .m = rows,
                                                  .n = heads->cols,
                                                  .k = heads->rows},
                                step->options.tf32));
    }
out:
    return status;
}

static sida_status forward(const side_call *q) {
    sida_status status = SIDA_OK;
    if (q->n == 0) return SIDA_OK;
    sida_sparsemax_train_call self = attention(q, q->side);
    SIDA_TRY(run_trunk(q));
    SIDA_TRY(sida_sparsemax_train_forward_cuda(q->step->stream, &self));
    if (crosses(q)) {
        sida_sparsemax_train_call cross = attention(q, 0);
        SIDA_TRY(sida_sparsemax_train_forward_cuda(q->step->stream, &cross));
    }
    SIDA_TRY(run_heads(q));
out:
    return status;
}

static sida_status backward(const side_call *q) {
    sida_status status = SIDA_OK;
    if (q->n == 0) return SIDA_OK;
    sida_step_cuda *step = q->step;
    sida_stream *stream = step->stream;
    const sida_net_trunk *shape = &step->shapes[q->side];
    const sida_step_places *p = &step->places[q->side];
    sida_rnn *rnn = step->rnn[q->side];
    float *d_out = q->a->d_out, *d_mixed = q->a->mixed, *d_compressed = step->d_compressed;
    sida_sparsemax_train_call self = attention(q, q->side);
    SIDA_TRY(sida_sparsemax_train_backward_cuda(stream, d_out, d_out, d_mixed, &self));
    if (crosses(q)) {
        sida_sparsemax_train_call cross = attention(q, 0);
        SIDA_TRY(sida_sparsemax_train_backward_cuda(stream, d_out, step->sides[0].d_out, d_mixed,
                                                    &cross));
    }
    SIDA_TRY(sida_rnn_backward_data(rnn, d_compressed, d_out, q->a->out,
                                    sida_step_array(step, SIDA_STEP_PARAMETERS) + p->lstm));
    SIDA_TRY(sida_rnn_backward_weights(rnn, sida_step_array(step, SIDA_STEP_GRADIENT) + p->lstm,
                                       q->a->compressed, q->a->out));
    SIDA_TRY(linear_backward(q, d_compressed, d_mixed, q->a->compressed, q->n, &shape->residual,
                             p->residual_weight, p->residual_bias));
    SIDA_TRY(sida_column_sum_cuda(
        stream, sida_step_array(step, SIDA_STEP_GRADIENT) + p->compress_bias, d_compressed,
        q->a->compressed, q->n, step->config.hidden, step->sums));
    for (int64_t first = 0; first < q->n; first += SIDA_STEP_CHUNK_ROWS) {
        int64_t rows = sida_step_smaller(q->n - first, SIDA_STEP_CHUNK_ROWS);
        SIDA_TRY(embed(q, first, rows));
        SIDA_TRY(linear_backward(q, NULL, d_compressed + first * step->config.hidden, step->scratch,
                                 rows, &shape->compress, p->compress_weight, -1));
    }
out:
    return status;
}

sida_status sida_step_cuda_add(sida_step_cuda *step, const sida_feed_part *part, float scale) {
    sida_status status = SIDA_OK;
    side_call calls[2];
    int64_t h = step->config.hidden, rows = part->sides[0].tokens + part->sides[1].tokens;
    for (int side = 0; side < 2; side++) {
        const sida_feed_side *s = &part->sides[side];
        calls[side] = (side_call){step, part, s, &step->sides[side], side, s->tokens, scale};
        assert(s->tokens <= step->limits.tokens[side] && s->longest <= step->limits.longest[side] &&
               s->sequences <= step->limits.sequences &&
               (step->config.layers[side] > 0 || s->tokens == 0));
    }
    if (!step->begun) step->results_used[step->steps % SIDA_STEPS_AHEAD] = 0;
    step->begun = true;
    step->sides[0].d_out = step->d_outs;
    step->sides[1].d_out = step->d_outs + part->sides[0].tokens * h;
    SIDA_TRY(sida_zero_cuda(step->stream, step->d_outs, (size_t)(rows * h) * sizeof(float)));
    SIDA_TRY(forward(&calls[0]));
    SIDA_TRY(forward(&calls[1]));
    /* The decoder first: it adds to the gradient of what it read of the encoder. */
    SIDA_TRY(backward(&calls[1]));
    SIDA_TRY(backward(&calls[0]));
out:
    return status;
}

sida_status sida_step_cuda_end(sida_step_cuda *step, const sida_adamw *optimiser, double rate,
                               int64_t number) {
    sida_status status = SIDA_OK;
    const sida_adamw *o = optimiser;
    int slot = (int)(step->steps % SIDA_STEPS_AHEAD);
    sida_train_result *result = &step->results[slot][step->results_used[slot]++];
    const double *const partials[2] = {step->open[0] ? step->partials[0] : NULL,
                                       step->open[1] ? step->partials[1] : NULL};
    *step->host_scalars[slot] = sida_adamw_scalars_of(o->beta1, o->beta2, o->epsilon, rate,
                                                      o->weight_decay, number, step->options.clip);
    SIDA_TRY(sida_upload(step->stream, step->scalars, step->host, step->host_scalars[slot],
                         sizeof *step->scalars));
    SIDA_TRY(sida_train_finish_cuda(step->stream, result, partials,
                                    sida_step_array(step, SIDA_STEP_GRADIENT), step->count,
                                    step->partial_norm));
    SIDA_TRY(sida_adamw_cuda(
        step->stream, sida_step_array(step, SIDA_STEP_PARAMETERS),
        sida_step_array(step, SIDA_STEP_FIRST), sida_step_array(step, SIDA_STEP_SECOND),
        sida_step_array(step, SIDA_STEP_GRADIENT), step->count, step->scalars, result, true));
    SIDA_TRY(sida_copy(step->stream, step->host_results[slot], step->results[slot],
                       (size_t)step->results_used[slot] * sizeof *result));
    SIDA_TRY(sida_event_record(step->done[slot], step->stream));
    step->open[0] = step->open[1] = false;
    step->steps++;
    step->begun = false;
out:
    return status;
}

sida_status sida_step_cuda_result(sida_step_cuda *step, int later, double *losses, double *norm) {
    sida_status status = SIDA_OK;
    assert(later >= 0 && later < SIDA_STEPS_AHEAD && step->steps > later);
    int slot = (int)((step->steps - 1 - later) % SIDA_STEPS_AHEAD);
    const sida_train_result *results = step->host_results[slot];
    SIDA_TRY(sida_event_synchronize(step->done[slot]));
    *losses = 0;
    for (int32_t i = 0; i < step->results_used[slot]; i++)
        *losses += results[i].losses[0] + results[i].losses[1];
    *norm = results[step->results_used[slot] - 1].norm;
out:
    return status;
}
