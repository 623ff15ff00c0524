#include "runtime/ops/lstm_train.h"
#include "trainer/step_cuda_private.h"

#include <assert.h>

static void release(sida_step_cuda *step) {
    for (int side = 1; side >= 0; side--) { /* the second borrows from the first */
        sida_rnn_destroy(step->lstm.rnn[side]);
        step->lstm.rnn[side] = NULL;
    }
}

static sida_status reserve(sida_step_cuda *step, const sida_feed_limits *limits) {
    sida_status status = SIDA_OK;
    release(step);
    for (int side = 0; side < 2; side++) {
        if (!sida_step_present(step, side)) continue;
        bool bidirectional = sida_net_directions(&step->config, side) == 2;
        bool own = step->options.tf32 &&
                   sida_lstm_train_possible(step->stream->backend,
                                            step->config.hidden / (bidirectional ? 2 : 1));
        step->lstm.in_place[side] = own;
        SIDA_TRY(sida_rnn_create(
            &step->lstm.rnn[side], step->stream,
            &(sida_rnn_options){.hidden = step->config.hidden,
                                .layers = step->config.lstm_layers,
                                .bidirectional = bidirectional,
                                .sequences = limits->sequences,
                                .longest = (int32_t)sida_step_larger(limits->longest[side], 1),
                                .tokens = sida_step_larger(limits->tokens[side], 1),
                                .algorithm = own ? SIDA_RNN_CLUSTER : SIDA_RNN_STANDARD,
                                .tf32 = step->options.tf32,
                                .gradient_stream = step->beside.stream,
                                .beside = side == 1 && !own && !step->lstm.in_place[0]
                                              ? step->lstm.rnn[0]
                                              : NULL}));
    }
out:
    return status;
}

static void lay(sida_step_cuda *step, sida_step_layout *at, const sida_feed_limits *limits) {
    int64_t h = step->config.hidden;
    step->lstm.d_compressed = NULL;
    for (int side = 0; side < 2; side++) {
        sida_step_activations *a = &step->sides[side];
        int64_t n = sida_step_present(step, side) ? limits->tokens[side] : 0;
        a->of.lstm.compressed = sida_step_floats(at, n, h);
        a->of.lstm.out = sida_step_floats(at, n, h);
        a->of.lstm.self = sida_step_floats(at, n, 2);
        a->of.lstm.cross = sida_step_floats(at, side == 1 && sida_step_present(step, 0) ? n : 0, 2);
        if (sida_step_present(step, side) && !step->lstm.in_place[side] && !step->lstm.d_compressed)
            step->lstm.d_compressed =
                sida_step_floats(at, sida_step_larger(limits->tokens[0], limits->tokens[1]), h);
    }
}

static size_t score_bytes(const sida_step_cuda *step, int32_t sequences, int32_t q_longest,
                          int32_t k_longest) {
    return sida_sparsemax_train_bytes(sequences, q_longest, k_longest, step->config.hidden, true);
}

static int64_t widest(const sida_step_cuda *step) {
    return step->config.hidden;
}

static bool attends(const sida_step_side *q) {
    return q->step->config.attention != SIDA_NET_NO_ATTENTION;
}

/* A side's LSTM in one of the device's arrays. */
static float *weights(const sida_step_side *q, int which) {
    return sida_step_array(q->step, which) + q->step->lstms[q->side];
}

/* Everything below the attention, and the residual to which it adds beside its first products;
 * without an attention, all that the heads read. */
static sida_status run_trunk(const sida_step_side *q) {
    sida_status status = SIDA_OK;
    sida_step_cuda *step = q->step;
    const sida_net_trunk *trunk = &step->net->trunks[q->side];
    sida_rnn *rnn = step->lstm.rnn[q->side];
    float *compressed = q->a->of.lstm.compressed, *out = q->a->of.lstm.out;
    const sida_row_map rows_of = sida_step_rows(q);
    const sida_step_side beside = sida_step_beside(q);
    SIDA_TRY(sida_rnn_set_lengths(rnn, q->rows->lengths, q->rows->sequences));
    assert(sida_rnn_rows(rnn) == q->n);
    sida_rnn_set_rows(rnn, &rows_of, q->rows->sequences);
    for (int64_t first = 0; first < q->n; first += SIDA_STEP_CHUNK_ROWS) {
        SIDA_TRY(sida_step_embed_forward(q, first));
        SIDA_TRY(sida_step_linear(q, compressed + first * step->config.hidden, step->scratch,
                                  &trunk->compress, SIDA_EPILOGUE_RELU, sida_step_chunk(q, first)));
    }
    SIDA_TRY(sida_rnn_forward(rnn, out, compressed, weights(q, SIDA_STEP_PARAMETERS)));
    if (!attends(q)) {
        SIDA_TRY(sida_copy(step->stream, q->a->mixed, out, sida_step_activation_bytes(q)));
        SIDA_TRY(sida_step_linear(q, q->a->mixed, compressed, &trunk->residual, SIDA_EPILOGUE_ADD,
                                  q->n));
        goto out;
    }
    SIDA_TRY(sida_step_fork(step));
    SIDA_TRY(sida_step_linear(&beside, q->a->mixed, compressed, &trunk->residual,
                              SIDA_EPILOGUE_NONE, q->n));
    SIDA_TRY(sida_step_mark(step));
out:
    return status;
}

/* The attention of this side's queries to the LSTM's outputs of side `keys`. */
static sida_sparsemax_train_call attention(const sida_step_side *q, int keys) {
    sida_step_cuda *step = q->step;
    const sida_step_activations *a = q->a;
    const sida_row_map k = sida_step_keys(q, keys);
    bool self = keys == q->side;
    size_t bytes = sida_step_score_bytes(step, q->rows->sequences, q->rows->longest, k.longest);
    assert(bytes <= step->scratch_bytes);
    return (sida_sparsemax_train_call){.out = a->mixed,
                                       .thresholds = self ? a->of.lstm.self : a->of.lstm.cross,
                                       .queries = a->of.lstm.out,
                                       .memory = step->sides[keys].of.lstm.out,
                                       .q = sida_step_rows(q),
                                       .k = k,
                                       .sequences = q->rows->sequences,
                                       .width = step->config.hidden,
                                       .causal = self && q->side == 1,
                                       .softmax = step->config.attention == SIDA_NET_SOFTMAX,
                                       .tf32 = step->options.tf32,
                                       .workspace = step->scratch,
                                       .workspace_bytes = bytes,
                                       .out_ready = self ? step->beside.mark : NULL};
}

/* Whether this side's queries see anything of the encoder. */
static bool crosses(const sida_step_side *q) {
    return attends(q) && q->side == 1 && q->part->sides[0].tokens > 0;
}

static sida_status forward(const sida_step_side *q) {
    sida_status status = SIDA_OK;
    SIDA_TRY(run_trunk(q));
    if (attends(q)) {
        sida_sparsemax_train_call self = attention(q, q->side);
        SIDA_TRY(sida_sparsemax_train_forward_cuda(q->step->stream, &self));
    }
    if (crosses(q)) {
        sida_sparsemax_train_call cross = attention(q, 0);
        SIDA_TRY(sida_sparsemax_train_forward_cuda(q->step->stream, &cross));
    }
out:
    return status;
}

static sida_status backward(const sida_step_side *q) {
    sida_status status = SIDA_OK;
    sida_step_cuda *step = q->step;
    sida_stream *stream = step->stream;
    const sida_net_trunk *trunk = &step->net->trunks[q->side];
    sida_rnn *rnn = step->lstm.rnn[q->side];
    const float *compressed = q->a->of.lstm.compressed, *out = q->a->of.lstm.out;
    float *d_out = q->a->d_out, *d_mixed = q->a->mixed;
    float *d_compressed = step->lstm.in_place[q->side] ? d_out : step->lstm.d_compressed;
    const sida_step_side beside = sida_step_beside(q);
    SIDA_TRY(sida_step_fork(step));
    SIDA_TRY(sida_step_linear_backward(&beside, NULL, d_mixed, compressed, &trunk->residual, q->n,
                                       true));
    if (attends(q)) {
        sida_sparsemax_train_call self = attention(q, q->side);
        SIDA_TRY(sida_sparsemax_train_backward_cuda(stream, d_out, d_out, d_mixed, &self));
    } else { /* o = h + …, and nothing else reads h */
        SIDA_TRY(sida_copy(stream, d_out, d_mixed, sida_step_activation_bytes(q)));
    }
    if (crosses(q)) {
        sida_sparsemax_train_call cross = attention(q, 0);
        SIDA_TRY(sida_sparsemax_train_backward_cuda(stream, d_out, step->sides[0].d_out, d_mixed,
                                                    &cross));
    }
    SIDA_TRY(sida_step_fork(step)); /* the attention has done with the scratch */
    SIDA_TRY(sida_step_embed(&beside, 0));
    SIDA_TRY(sida_step_mark(step));
    SIDA_TRY(sida_rnn_backward(rnn, d_compressed, weights(q, SIDA_STEP_GRADIENT), d_out, compressed,
                               out, weights(q, SIDA_STEP_PARAMETERS)));
    SIDA_TRY(sida_step_input_gradient(q, d_compressed, d_mixed, &trunk->residual, q->n, true));
    SIDA_TRY(sida_column_sum_cuda(stream,
                                  sida_step_tensor(step, SIDA_STEP_GRADIENT, trunk->compress.bias),
                                  d_compressed, compressed, q->n, step->config.hidden, step->sums));
    SIDA_TRY(sida_step_await(step));
    for (int64_t first = 0; first < q->n; first += SIDA_STEP_CHUNK_ROWS) {
        if (first > 0) SIDA_TRY(sida_step_embed(q, first));
        SIDA_TRY(sida_step_linear_backward(q, NULL, d_compressed + first * step->config.hidden,
                                           step->scratch, &trunk->compress,
                                           sida_step_chunk(q, first), false));
    }
out:
    return status;
}

const sida_step_kind sida_step_lstm = {.reserve = reserve,
                                       .release = release,
                                       .lay = lay,
                                       .score_bytes = score_bytes,
                                       .widest = widest,
                                       .embeddings = 1,
                                       .forward = forward,
                                       .backward = backward};
