#include "trainer/gradient_private.h"

#include "formats/base/memory.h"
#include "runtime/ops/gemm.h"
#include "runtime/ops/lstm.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

void sida_gradient_workspace_free(sida_gradient_workspace *workspace) {
    free(workspace->block);
    *workspace = (sida_gradient_workspace){0};
}

void sida_gradient_linear(sida_net_linear *gradient, const sida_net_linear *layer, float *d_x,
                          const float *d_y, const float *x, int64_t n) {
    sida_linear_backward_cpu(&(sida_linear_backward_call){.d_x = d_x,
                                                          .d_weight = gradient->weight,
                                                          .d_bias = gradient->bias,
                                                          .d_y = d_y,
                                                          .x = x,
                                                          .weight = sida_net_weight(layer),
                                                          .n = n});
}

void sida_gradient_relu(float *d, const float *activated, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (activated[i] == 0) d[i] = 0;
}

sida_status sida_gradient_reserve(sida_gradient_workspace *workspace, size_t items) {
    if (workspace->block && items <= workspace->items) return SIDA_OK;
    sida_gradient_workspace_free(workspace);
    sida_status status = SIDA_ALLOC(&workspace->block, items, "the gradients of a batch");
    if (status == SIDA_OK) workspace->items = items;
    return status;
}

/* The blocks of one side's gradients, [n, hidden] each unless said otherwise. */
typedef struct side_blocks {
    float *mixed, *compressed, *above, *below;
    float *gates;     /* [n, 4 hidden] */
    float *workspace; /* [n + 6 sequences, hidden] */
} side_blocks;

/* Of both attentions, from that of what they added to. */
static sida_status attention_backward(const sida_net_pass *pass, int side, float *d_out,
                                      float *d_encoder, const float *d_mixed) {
    sida_status status = SIDA_OK;
    const sida_net_activations *a = &pass->sides[side];
    /* The decoder's keys lie in its state's memory; in one call from an empty state they are the
     * LSTM's outputs, row for row, so that keys and queries share one gradient. */
    sida_sparsemax_attention_call self = a->self;
    self.memory = a->out[pass->net->config.lstm_layers - 1];
    self.k_start = self.q_start;
    SIDA_TRY(sida_sparsemax_attention_backward_cpu(&(sida_sparsemax_attention_backward_call){
        .d_queries = d_out, .d_memory = d_out, .d_out = d_mixed, .forward = &self}));
    if (a->cross.sequences > 0)
        SIDA_TRY(sida_sparsemax_attention_backward_cpu(&(sida_sparsemax_attention_backward_call){
            .d_queries = d_out, .d_memory = d_encoder, .d_out = d_mixed, .forward = &a->cross}));
out:
    return status;
}

/* d_out: gradient of the last layer's outputs; that of its input is added to b->compressed. */
static sida_status lstm_backward(sida_net *gradient, const sida_net_pass *pass, int side,
                                 const float *d_out, side_blocks *b) {
    sida_status status = SIDA_OK;
    const sida_net_config *c = &pass->net->config;
    const sida_net_trunk *trunk = &pass->net->trunks[side];
    sida_net_trunk *to = &gradient->trunks[side];
    const sida_net_activations *a = &pass->sides[side];
    int64_t n = a->tokens;
    int directions = sida_net_directions(c, side);
    int32_t units = c->hidden / directions;
    const float *above = d_out;
    float *pair[2] = {b->above, b->below};
    for (int l = c->lstm_layers - 1; l >= 0; l--) {
        const float *x = l == 0 ? a->compressed : a->out[l - 1];
        float *below = l == 0 ? b->compressed : pair[l % 2];
        if (l > 0) memset(below, 0, (size_t)(n * c->hidden) * sizeof *below);
        for (int way = 0; way < directions; way++) {
            int cell = l * directions + way;
            SIDA_TRY(sida_lstm_backward_cpu(
                &(sida_lstm_backward_call){.d_gates = b->gates,
                                           .d_recurrent = to->recurrent[cell].weight,
                                           .d_bias = to->recurrent[cell].bias,
                                           .d_out = above + (int64_t)way * units,
                                           .out = a->out[l] + (int64_t)way * units,
                                           .ldo = c->hidden,
                                           .gates = a->gates[l] + way * n * 4 * units,
                                           .cells = a->cells[l] + way * n * units,
                                           .recurrent = sida_net_weight(&trunk->recurrent[cell]),
                                           .sequences = pass->sequences,
                                           .hidden = units,
                                           .offsets = a->offsets,
                                           .reverse = way == 1,
                                           .workspace = b->workspace}));
            sida_gradient_linear(&to->input[cell], &trunk->input[cell], below, b->gates, x, n);
        }
        above = below;
    }
out:
    return status;
}

/* d_out: gradient of the last LSTM layer's output from outside this side, or zeros; used up. */
static sida_status side_backward(sida_net *gradient, const sida_net_pass *pass, int side,
                                 const float *d_logits, float *d_out, float *d_encoder,
                                 side_blocks *b) {
    sida_status status = SIDA_OK;
    const sida_net_config *c = &pass->net->config;
    const sida_net_trunk *trunk = &pass->net->trunks[side];
    sida_net_trunk *to = &gradient->trunks[side];
    const sida_net_activations *a = &pass->sides[side];
    int64_t n = a->tokens, h = c->hidden;
    size_t bytes = (size_t)(n * h) * sizeof(float);
    memset(b->mixed, 0, bytes);
    memset(b->compressed, 0, bytes);
    sida_gradient_linear(&to->heads, &trunk->heads, b->mixed, d_logits, a->mixed, n);
    sida_gradient_linear(&to->residual, &trunk->residual, b->compressed, b->mixed, a->compressed,
                         n);
    if (c->attention == SIDA_NET_NO_ATTENTION) /* o = h + …, and nothing else reads h */
        memcpy(d_out, b->mixed, bytes);
    else
        SIDA_TRY(attention_backward(pass, side, d_out, d_encoder, b->mixed));
    SIDA_TRY(lstm_backward(gradient, pass, side, d_out, b));
    sida_gradient_relu(b->compressed, a->compressed, n * h);
    sida_gradient_linear(&to->compress, &trunk->compress, NULL, b->compressed, a->embedded, n);
out:
    return status;
}

static float *take(float **from, int64_t count) {
    float *block = *from;
    *from += count;
    return block;
}

sida_status sida_gradient_add(sida_net *gradient, sida_gradient_workspace *workspace,
                              const sida_net_pass *pass, const float *const d_logits[2]) {
    sida_status status = SIDA_OK;
    const sida_net *net = pass->net;
    assert(pass->training && gradient->parameter_count == net->parameter_count);
    if (net->config.kind == SIDA_NET_TRANSFORMER)
        return sida_gradient_add_transformer(gradient, workspace, pass, d_logits);
    int64_t h = net->config.hidden, tokens[2] = {0, 0}, most = 0;
    for (int side = 0; side < 2; side++) {
        if (!d_logits[side]) continue;
        assert(net->trunks[side].present);
        tokens[side] = pass->sides[side].tokens;
        most = tokens[side] > most ? tokens[side] : most;
    }
    size_t rows =
        (size_t)tokens[0] + (size_t)tokens[1] + 9 * (size_t)most + 6 * (size_t)pass->sequences;
    SIDA_TRY(sida_gradient_reserve(workspace, rows * (size_t)h));
    float *next = workspace->block;
    float *d_out[2] = {take(&next, tokens[0] * h), take(&next, tokens[1] * h)};
    side_blocks blocks = {.mixed = take(&next, most * h),
                          .compressed = take(&next, most * h),
                          .above = take(&next, most * h),
                          .below = take(&next, most * h),
                          .gates = take(&next, most * 4 * h),
                          .workspace = next};
    memset(workspace->block, 0, (size_t)((tokens[0] + tokens[1]) * h) * sizeof(float));
    /* The decoder first: it adds to the gradient of what it read of the encoder. */
    for (int side = 1; side >= 0; side--)
        if (d_logits[side])
            SIDA_TRY(side_backward(gradient, pass, side, d_logits[side], d_out[side], d_out[0],
                                   &blocks));
out:
    return status;
}
