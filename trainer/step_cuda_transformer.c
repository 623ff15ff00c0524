/* A step of the Transformer (net.h). Of what forward computes, every x, the queries, keys, values
 * and outputs of the attentions and up's outputs are kept; norms are computed again. */
#include "runtime/ops/transformer_train.h"
#include "trainer/step_cuda_private.h"

#include <assert.h>

static const float epsilon = 1e-6f;

_Static_assert((int)SIDA_ATTENTION_TRAIN_WIDTH == (int)SIDA_NET_HEAD_WIDTH &&
                   (int)SIDA_ATTENTION_TRAIN_BUCKETS == (int)SIDA_NET_BUCKETS &&
                   (int)SIDA_ATTENTION_TRAIN_DISTANCE == (int)SIDA_NET_DISTANCE,
               "the network's attention is the op's");

/* --- memory */

static void lay(sida_step_cuda *step, sida_step_layout *at, const sida_feed_limits *limits) {
    const sida_net_config *c = &step->config;
    int64_t h = c->hidden, encoder = sida_step_present(step, 0) ? limits->tokens[0] : 0;
    int64_t most = sida_step_larger(limits->tokens[0], limits->tokens[1]);
    for (int side = 0; side < 2; side++) {
        sida_step_activations *a = &step->sides[side];
        int64_t n = sida_step_present(step, side) ? limits->tokens[side] : 0;
        bool crosses = side == 1 && encoder > 0;
        for (int i = 0; i <= c->blocks * (crosses ? 3 : 2); i++)
            a->of.transformer.x[i] = sida_step_floats(at, n, h);
        for (int b = 0; b < c->blocks; b++) {
            sida_step_attend *self = &a->of.transformer.self[b],
                             *cross = &a->of.transformer.cross[b];
            *self = (sida_step_attend){.query = sida_step_floats(at, n, h),
                                       .key_value = sida_step_floats(at, n, 2 * h),
                                       .out = sida_step_floats(at, n, h)};
            a->of.transformer.up[b] = sida_step_floats(at, n, SIDA_NET_UP * h);
            if (crosses)
                *cross = (sida_step_attend){.query = sida_step_floats(at, n, h),
                                            .key_value = sida_step_floats(at, encoder, 2 * h),
                                            .out = sida_step_floats(at, n, h)};
        }
    }
    bool crosses = encoder > 0 && sida_step_present(step, 1);
    step->transformer.memory = sida_step_floats(at, crosses ? encoder : 0, h);
    step->transformer.d_memory = sida_step_floats(at, crosses ? encoder : 0, h);
    step->transformer.normed = sida_step_floats(at, most, h);
    step->transformer.d_normed = sida_step_floats(at, most, h);
    step->transformer.d_attended = sida_step_floats(at, most, h);
    step->transformer.d_wide = sida_step_floats(at, most, sida_step_larger(2, SIDA_NET_UP) * h);
}

static size_t score_bytes(const sida_step_cuda *step, int32_t sequences, int32_t q_longest,
                          int32_t k_longest) {
    return sida_attention_train_bytes(sequences, q_longest, k_longest,
                                      step->config.hidden / SIDA_NET_HEAD_WIDTH, true);
}

static int64_t widest(const sida_step_cuda *step) {
    return sida_step_larger(step->config.d_model,
                            sida_step_larger(2, SIDA_NET_UP) * (int64_t)step->config.hidden);
}

/* --- parts of a block */

static sida_status norm(const sida_step_side *q, float *out, const float *x,
                        const sida_net_linear *layer, int64_t n) {
    return q->step->ops->rms_norm(q->step->stream, out, SIDA_F32, x, sida_step_weight(q, layer), n,
                                  epsilon);
}

/* d_x, added to, may be NULL; d_y is lost. */
static sida_status norm_backward(const sida_step_side *q, float *d_x, float *d_y, const float *x,
                                 const sida_net_linear *layer, int64_t n) {
    return sida_norm_train_backward_cuda(
        q->step->stream,
        &(sida_norm_train_call){
            .d_x = d_x,
            .d_weight = sida_step_tensor(q->step, SIDA_STEP_GRADIENT, layer->weight),
            .d_y = d_y,
            .x = x,
            .weight = sida_step_tensor(q->step, SIDA_STEP_PARAMETERS, layer->weight),
            .n = n,
            .width = layer->cols,
            .epsilon = epsilon,
            .workspace = q->step->sums});
}

/* Whether this side's queries see anything of the encoder. */
static bool crosses(const sida_step_side *q) {
    return q->side == 1 && q->part->sides[0].tokens > 0;
}

/* The x behind all blocks of a side. */
static const float *last_x(const sida_step_side *q, int side) {
    int adds = side == q->side && crosses(q) ? 3 : 2;
    return q->step->sides[side].of.transformer.x[q->step->config.blocks * adds];
}

/* Of this side's queries to the rows of side `keys`. */
static sida_attention_train_call attention(const sida_step_side *q, const sida_step_attend *a,
                                           const sida_net_attend *layer, int keys) {
    sida_step_cuda *step = q->step;
    const sida_row_map k = sida_step_keys(q, keys);
    size_t bytes = sida_step_score_bytes(step, q->rows->sequences, q->rows->longest, k.longest);
    assert(bytes <= step->scratch_bytes);
    return (sida_attention_train_call){
        .out = a->out,
        .queries = a->query,
        .key_value = a->key_value,
        .positions = layer->positions
                         ? sida_step_tensor(step, SIDA_STEP_PARAMETERS, layer->positions)
                         : NULL,
        .q = sida_step_rows(q),
        .k = k,
        .sequences = q->rows->sequences,
        .heads = step->config.hidden / SIDA_NET_HEAD_WIDTH,
        .causal = q->side == 1 && keys == 1,
        .tf32 = step->options.tf32,
        .workspace = step->scratch,
        .workspace_bytes = bytes};
}

/* y = x + output(attention(norm(x))), keys and values of norm(x) or of the memory. */
static sida_status attend(const sida_step_side *q, float *y, const float *x,
                          const sida_step_attend *a, const sida_net_attend *layer, int keys) {
    sida_status status = SIDA_OK;
    sida_step_cuda *step = q->step;
    const sida_attention_train_call call = attention(q, a, layer, keys);
    float *normed = step->transformer.normed;
    const float *source = keys == q->side ? normed : step->transformer.memory;
    SIDA_TRY(norm(q, normed, x, &layer->norm, q->n));
    SIDA_TRY(sida_step_linear(q, a->query, normed, &layer->query, SIDA_EPILOGUE_NONE, q->n));
    SIDA_TRY(sida_step_linear(q, a->key_value, source, &layer->key_value, SIDA_EPILOGUE_NONE,
                              q->part->sides[keys].tokens));
    SIDA_TRY(sida_attention_train_forward_cuda(step->stream, &call));
    SIDA_TRY(sida_copy(step->stream, y, x, sida_step_activation_bytes(q)));
    SIDA_TRY(sida_step_linear(q, y, a->out, &layer->output, SIDA_EPILOGUE_ADD, q->n));
out:
    return status;
}

/* d_out holds y's gradient, and x's after it. */
static sida_status attend_backward(const sida_step_side *q, const float *x,
                                   const sida_step_attend *a, const sida_net_attend *layer,
                                   int keys) {
    sida_status status = SIDA_OK;
    sida_step_cuda *step = q->step;
    const sida_attention_train_call call = attention(q, a, layer, keys);
    const int64_t key_rows = q->part->sides[keys].tokens;
    const bool self = keys == q->side;
    float *d = q->a->d_out, *normed = step->transformer.normed,
          *d_normed = step->transformer.d_normed, *d_query = step->transformer.d_attended,
          *d_key_value = step->transformer.d_wide;
    float *d_positions =
        layer->positions ? sida_step_tensor(step, SIDA_STEP_GRADIENT, layer->positions) : NULL;
    const float *source = self ? normed : step->transformer.memory;
    const sida_step_side beside = sida_step_beside(q);
    SIDA_TRY(sida_step_fork(step));
    SIDA_TRY(sida_step_linear_backward(&beside, NULL, d, a->out, &layer->output, q->n, false));
    SIDA_TRY(sida_step_input_gradient(q, d_query, d, &layer->output, q->n, false));
    if (!self) /* sequences that this side has no tokens of are not written */
        SIDA_TRY(sida_zero_cuda(step->stream, d_key_value,
                                (size_t)(key_rows * layer->key_value.rows) * sizeof(float)));
    SIDA_TRY(sida_attention_train_backward_cuda(step->stream, d_query, d_key_value, d_positions,
                                                d_query, &call));
    SIDA_TRY(norm(q, normed, x, &layer->norm, q->n));
    SIDA_TRY(sida_step_fork(step));
    SIDA_TRY(sida_step_linear_backward(&beside, NULL, d_query, normed, &layer->query, q->n, false));
    SIDA_TRY(sida_step_linear_backward(&beside, NULL, d_key_value, source, &layer->key_value,
                                       key_rows, false));
    SIDA_TRY(sida_step_mark(step));
    SIDA_TRY(sida_step_input_gradient(q, d_normed, d_query, &layer->query, q->n, false));
    SIDA_TRY(sida_step_input_gradient(q, self ? d_normed : step->transformer.d_memory, d_key_value,
                                      &layer->key_value, key_rows, true));
    SIDA_TRY(sida_step_await(step)); /* d, and what the next part takes, is free */
    SIDA_TRY(norm_backward(q, d, d_normed, x, &layer->norm, q->n));
out:
    return status;
}

/* y = x + down(relu(up(norm(x)))) */
static sida_status feed_forward(const sida_step_side *q, float *y, const float *x, float *up,
                                const sida_net_block *block) {
    sida_status status = SIDA_OK;
    float *normed = q->step->transformer.normed;
    SIDA_TRY(norm(q, normed, x, &block->norm, q->n));
    SIDA_TRY(sida_step_linear(q, up, normed, &block->up, SIDA_EPILOGUE_RELU, q->n));
    SIDA_TRY(sida_copy(q->step->stream, y, x, sida_step_activation_bytes(q)));
    SIDA_TRY(sida_step_linear(q, y, up, &block->down, SIDA_EPILOGUE_ADD, q->n));
out:
    return status;
}

static sida_status feed_forward_backward(const sida_step_side *q, const float *x, const float *up,
                                         const sida_net_block *block) {
    sida_status status = SIDA_OK;
    sida_step_cuda *step = q->step;
    float *d = q->a->d_out, *normed = step->transformer.normed,
          *d_normed = step->transformer.d_normed, *d_up = step->transformer.d_wide;
    const sida_step_side beside = sida_step_beside(q);
    SIDA_TRY(sida_step_fork(step));
    SIDA_TRY(sida_step_linear_backward(&beside, NULL, d, up, &block->down, q->n, false));
    SIDA_TRY(sida_step_input_gradient(q, d_up, d, &block->down, q->n, false));
    SIDA_TRY(sida_column_sum_cuda(step->stream, NULL, d_up, up, q->n, block->up.rows, step->sums));
    SIDA_TRY(norm(q, normed, x, &block->norm, q->n));
    SIDA_TRY(sida_step_fork(step));
    SIDA_TRY(sida_step_linear_backward(&beside, NULL, d_up, normed, &block->up, q->n, false));
    SIDA_TRY(sida_step_mark(step));
    SIDA_TRY(sida_step_input_gradient(q, d_normed, d_up, &block->up, q->n, false));
    SIDA_TRY(sida_step_await(step));
    SIDA_TRY(norm_backward(q, d, d_normed, x, &block->norm, q->n));
out:
    return status;
}

/* --- a side */

/* The norm of a chunk's embedding rows, which are in the scratch, behind them. */
static sida_status norm_embedded(const sida_step_side *q, float **normed, int64_t rows) {
    const sida_net_trunk *trunk = &q->step->net->trunks[q->side];
    const float *embedded = q->step->scratch;
    *normed = (float *)q->step->scratch + rows * q->step->config.d_model;
    return norm(q, *normed, embedded, &trunk->norm_in, rows);
}

static sida_status forward(const sida_step_side *q) {
    sida_status status = SIDA_OK;
    sida_step_cuda *step = q->step;
    const sida_net_trunk *trunk = &step->net->trunks[q->side];
    const sida_step_activations *a = q->a;
    float *const *x = a->of.transformer.x;
    for (int64_t first = 0; first < q->n; first += SIDA_STEP_CHUNK_ROWS) {
        int64_t rows = sida_step_chunk(q, first);
        float *normed;
        SIDA_TRY(sida_step_embed_forward(q, first));
        SIDA_TRY(norm_embedded(q, &normed, rows));
        SIDA_TRY(sida_step_linear(q, x[0] + first * step->config.hidden, normed, &trunk->compress,
                                  SIDA_EPILOGUE_NONE, rows));
    }
    if (crosses(q))
        SIDA_TRY(norm(q, step->transformer.memory, last_x(q, 0), &trunk->norm_memory,
                      q->part->sides[0].tokens));
    for (int b = 0; b < step->config.blocks; b++) {
        const sida_net_block *block = &trunk->blocks[b];
        SIDA_TRY(attend(q, x[1], x[0], &a->of.transformer.self[b], &block->self, q->side));
        x++;
        if (crosses(q)) {
            SIDA_TRY(attend(q, x[1], x[0], &a->of.transformer.cross[b], &block->cross, 0));
            x++;
        }
        SIDA_TRY(feed_forward(q, x[1], x[0], a->of.transformer.up[b], block));
        x++;
    }
    assert(*x == last_x(q, q->side));
    SIDA_TRY(norm(q, a->mixed, *x, &trunk->norm_out, q->n));
out:
    return status;
}

static sida_status backward(const sida_step_side *q) {
    sida_status status = SIDA_OK;
    sida_step_cuda *step = q->step;
    const sida_net_trunk *trunk = &step->net->trunks[q->side];
    const sida_step_activations *a = q->a;
    const int64_t encoder = q->part->sides[0].tokens;
    float *const *x = a->of.transformer.x + step->config.blocks * (crosses(q) ? 3 : 2);
    if (crosses(q))
        SIDA_TRY(sida_zero_cuda(step->stream, step->transformer.d_memory,
                                (size_t)(encoder * step->config.hidden) * sizeof(float)));
    SIDA_TRY(norm_backward(q, a->d_out, a->mixed, *x, &trunk->norm_out, q->n));
    for (int b = step->config.blocks - 1; b >= 0; b--) {
        const sida_net_block *block = &trunk->blocks[b];
        SIDA_TRY(feed_forward_backward(q, *--x, a->of.transformer.up[b], block));
        if (crosses(q))
            SIDA_TRY(attend_backward(q, *--x, &a->of.transformer.cross[b], &block->cross, 0));
        SIDA_TRY(attend_backward(q, *--x, &a->of.transformer.self[b], &block->self, q->side));
    }
    if (crosses(q))
        SIDA_TRY(norm_backward(q, step->sides[0].d_out, step->transformer.d_memory, last_x(q, 0),
                               &trunk->norm_memory, encoder));
    for (int64_t first = 0; first < q->n; first += SIDA_STEP_CHUNK_ROWS) {
        int64_t rows = sida_step_chunk(q, first);
        const float *d = a->d_out + first * step->config.hidden;
        float *normed;
        SIDA_TRY(sida_step_embed(q, first));
        SIDA_TRY(norm_embedded(q, &normed, rows));
        SIDA_TRY(sida_step_linear_backward(q, NULL, d, normed, &trunk->compress, rows, true));
        SIDA_TRY(sida_step_input_gradient(q, normed, d, &trunk->compress, rows, false));
        SIDA_TRY(norm_backward(q, NULL, normed, step->scratch, &trunk->norm_in, rows));
    }
out:
    return status;
}

const sida_step_kind sida_step_transformer = {.lay = lay,
                                              .score_bytes = score_bytes,
                                              .widest = widest,
                                              .embeddings = 2,
                                              .forward = forward,
                                              .backward = backward};
