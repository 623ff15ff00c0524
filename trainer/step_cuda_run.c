#include "trainer/step_cuda_private.h"

#include <assert.h>

sida_status sida_step_fork(sida_step_cuda *step) {
    sida_status status = sida_event_record(step->beside.fork, step->stream);
    return status == SIDA_OK ? sida_stream_wait(step->beside.stream, step->beside.fork) : status;
}

sida_status sida_step_mark(sida_step_cuda *step) {
    return sida_event_record(step->beside.mark, step->beside.stream);
}

sida_status sida_step_await(sida_step_cuda *step) {
    return sida_stream_wait(step->stream, step->beside.mark);
}

sida_stream *sida_step_cuda_reader(sida_step_cuda *step) {
    return step->beside.stream;
}

sida_status sida_step_linear(const sida_step_side *q, float *y, const float *x,
                             const sida_net_linear *layer, sida_epilogue epilogue, int64_t n) {
    const float *bias =
        layer->bias ? sida_step_tensor(q->step, SIDA_STEP_PARAMETERS, layer->bias) : NULL;
    return sida_linear_train_cuda(q->stream, y, x, sida_step_weight(q, layer), bias, epilogue, n,
                                  q->step->options.tf32);
}

sida_status sida_step_linear_backward(const sida_step_side *q, float *d_x, const float *d_y,
                                      const float *x, const sida_net_linear *layer, int64_t n,
                                      bool bias) {
    return sida_linear_backward_cuda(
        q->stream,
        &(sida_linear_backward_call){
            .d_x = d_x,
            .d_weight = sida_step_tensor(q->step, SIDA_STEP_GRADIENT, layer->weight),
            .d_bias = bias ? sida_step_tensor(q->step, SIDA_STEP_GRADIENT, layer->bias) : NULL,
            .d_y = d_y,
            .x = x,
            .weight = sida_step_weight(q, layer),
            .n = n},
        q->step->options.tf32, q->sums);
}

sida_status sida_step_input_gradient(const sida_step_side *q, float *d_x, const float *d_y,
                                     const sida_net_linear *layer, int64_t n, bool add) {
    return sida_gemm_cuda(q->stream,
                          &(sida_gemm_call){.c = d_x,
                                            .ldc = layer->cols,
                                            .a = d_y,
                                            .lda = layer->rows,
                                            .b = sida_step_weight(q, layer).data,
                                            .ldb = layer->cols,
                                            .m = n,
                                            .n = layer->cols,
                                            .k = layer->rows,
                                            .add = add},
                          q->step->options.tf32);
}

sida_status sida_step_embed(const sida_step_side *q, int64_t first) {
    return q->step->ops->embedding(q->stream, q->step->scratch, q->step->table,
                                   q->rows->ids + first, sida_step_chunk(q, first));
}

sida_status sida_step_embed_forward(const sida_step_side *q, int64_t first) {
    return first == 0 && q->embedded ? SIDA_OK : sida_step_embed(q, first);
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
                                  step->finish);
}

/* Scores, their loss, and its gradient down to what the heads read, which replaces that. */
static sida_status run_heads(const sida_step_side *q) {
    sida_status status = SIDA_OK;
    sida_step_cuda *step = q->step;
    const sida_net_config *c = &step->config;
    const sida_net_linear *heads = &step->net->trunks[q->side].heads;
    const sida_step_side beside = sida_step_beside(q);
    float *logits = step->scratch;
    for (int64_t first = 0; first < q->n; first += SIDA_STEP_CHUNK_ROWS) {
        int64_t rows = sida_step_chunk(q, first);
        float *mixed = q->a->mixed + first * c->hidden;
        SIDA_TRY(flush_losses(step, q->side));
        SIDA_TRY(sida_linear_train_cuda(step->stream, logits, mixed, sida_step_weight(q, heads),
                                        NULL, SIDA_EPILOGUE_NONE, rows, step->options.tf32));
        SIDA_TRY(sida_loss_cuda(
            step->stream, &(sida_loss_cuda_call){
                              .d_logits = logits,
                              .partials = step->partials[q->side],
                              .logits = logits,
                              .bias = sida_step_tensor(step, SIDA_STEP_PARAMETERS, heads->bias),
                              .top_ids = q->rows->top_ids,
                              .top_logp = q->rows->top_logp,
                              .labels = q->rows->labels,
                              .label_weights = q->rows->label_weights,
                              .label_count = step->options.label_count,
                              .source = q->rows->source + first,
                              .rows = rows,
                              .layers = c->layers[q->side],
                              .experts = c->experts,
                              .top = step->options.top,
                              .tkd = step->options.tkd,
                              .lambda = (float)step->options.lambda,
                              .scale = q->scale}));
        step->open[q->side] = true;
        SIDA_TRY(sida_step_fork(step));
        SIDA_TRY(sida_step_linear_backward(&beside, NULL, logits, mixed, heads, rows, false));
        SIDA_TRY(sida_step_mark(step));
        SIDA_TRY(sida_column_sum_cuda(step->stream,
                                      sida_step_tensor(step, SIDA_STEP_GRADIENT, heads->bias),
                                      logits, NULL, rows, heads->rows, step->sums));
        SIDA_TRY(sida_step_await(step)); /* it reads what is written over next */
        SIDA_TRY(sida_step_input_gradient(q, mixed, logits, heads, rows, false));
    }
out:
    return status;
}

/* What needs no parameters, and so runs beside AdamW of the step before. */
static sida_status begin_part(sida_step_side *first, int64_t rows) {
    sida_status status = SIDA_OK;
    sida_step_cuda *step = first->step;
    const sida_step_side beside = sida_step_beside(first);
    SIDA_TRY(sida_step_embed(&beside, 0));
    first->embedded = true;
    SIDA_TRY(sida_step_mark(step));
    SIDA_TRY(sida_step_await(step));
    /* Needed behind the heads, which await more than this. */
    SIDA_TRY(sida_zero_cuda(beside.stream, step->d_outs,
                            (size_t)(rows * step->config.hidden) * sizeof(float)));
out:
    return status;
}

sida_status sida_step_cuda_add(sida_step_cuda *step, const sida_feed_part *part, float scale) {
    sida_status status = SIDA_OK;
    sida_step_side calls[2];
    int64_t h = step->config.hidden, rows = part->sides[0].tokens + part->sides[1].tokens;
    for (int side = 0; side < 2; side++) {
        const sida_feed_side *s = &part->sides[side];
        calls[side] = (sida_step_side){.step = step,
                                       .stream = step->stream,
                                       .sums = step->sums,
                                       .part = part,
                                       .rows = s,
                                       .a = &step->sides[side],
                                       .side = side,
                                       .n = s->tokens,
                                       .scale = scale};
        assert(s->tokens <= step->limits.tokens[side] && s->longest <= step->limits.longest[side] &&
               s->sequences <= step->limits.sequences &&
               (step->config.layers[side] > 0 || s->tokens == 0));
    }
    if (step->begun)
        SIDA_TRY(sida_step_fork(step)); /* the part before uses the same memory */
    else
        step->results_used[step->steps % SIDA_STEPS_AHEAD] = 0;
    step->begun = true;
    step->sides[0].d_out = step->d_outs;
    step->sides[1].d_out = step->d_outs + part->sides[0].tokens * h;
    SIDA_TRY(begin_part(&calls[calls[0].n > 0 ? 0 : 1], rows));
    for (int side = 0; side < 2; side++) {
        if (calls[side].n == 0) continue;
        SIDA_TRY(step->kind->forward(&calls[side]));
        SIDA_TRY(run_heads(&calls[side]));
    }
    /* The decoder first: it adds to the gradient of what it read of the encoder. */
    for (int side = 1; side >= 0; side--)
        if (calls[side].n > 0) SIDA_TRY(step->kind->backward(&calls[side]));
    SIDA_TRY(sida_step_mark(step));
    SIDA_TRY(sida_step_await(step));
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
    const sida_adamw_scalars scalars = sida_adamw_scalars_of(
        o->beta1, o->beta2, o->epsilon, rate, o->weight_decay, number, step->options.clip);
    SIDA_TRY(sida_train_finish_cuda(step->stream, result, partials,
                                    sida_step_array(step, SIDA_STEP_GRADIENT), step->count,
                                    step->finish));
    SIDA_TRY(sida_step_fork(step)); /* of the next step too: AdamW is not in its way */
    SIDA_TRY(sida_copy(step->beside.stream, step->host_results[slot], step->results[slot],
                       (size_t)step->results_used[slot] * sizeof *result));
    SIDA_TRY(sida_event_record(step->done[slot], step->beside.stream));
    SIDA_TRY(sida_adamw_cuda(
        step->stream, sida_step_array(step, SIDA_STEP_PARAMETERS),
        sida_step_array(step, SIDA_STEP_FIRST), sida_step_array(step, SIDA_STEP_SECOND),
        sida_step_array(step, SIDA_STEP_GRADIENT), step->count, &scalars, result, true));
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
