/* The backward pass of a Transformer. */
#include "runtime/ops/norm.h"
#include "runtime/predictor/net_transformer.h"
#include "trainer/gradient_private.h"

#include <assert.h>
#include <math.h>
#include <string.h>

/* The gradients of one side, n tokens, while they are made. */
typedef struct side_blocks {
    float *normed;    /* [n, hidden or d_model] of what a norm gave */
    float *query;     /* [n, hidden] */
    float *mixed;     /* [n, hidden] */
    float *key_value; /* [n or the encoder's tokens, 2 hidden] */
    float *up;        /* [n, UP hidden] */
    float *memory;    /* [the encoder's tokens, hidden] */
} side_blocks;

static float *take(float **from, int64_t count) {
    float *block = *from;
    *from += count;
    return block;
}

static void zero(float *block, int64_t count) {
    memset(block, 0, (size_t)count * sizeof *block);
}

static void norm_backward(sida_net_linear *gradient, const sida_net_linear *layer, float *d_x,
                          const float *d_out, const float *x, int64_t n) {
    sida_rms_norm_backward_cpu(&(sida_rms_norm_backward_call){.d_x = d_x,
                                                              .d_weight = gradient->weight,
                                                              .d_out = d_out,
                                                              .x = x,
                                                              .weight = sida_net_weight(layer),
                                                              .n = n,
                                                              .epsilon = SIDA_NET_EPSILON});
}

/* d_x, the gradient of the residual stream, goes from behind the attention to before it. With
 * d_memory the keys and values are `keys` rows of the encoder's memory, whose gradient is added. */
static sida_status attend_backward(sida_net_attend *to, const sida_net_attend *layers,
                                   const sida_net_attend_pass *a, float *d_x, float *d_memory,
                                   const float *memory, int64_t keys, const side_blocks *b,
                                   int64_t n) {
    sida_status status = SIDA_OK;
    const int64_t h = layers->query.rows;
    const float scale = 1.0f / sqrtf((float)SIDA_NET_HEAD_WIDTH);
    zero(b->mixed, n * h);
    zero(b->query, n * h);
    zero(b->key_value, keys * 2 * h);
    zero(b->normed, n * h);
    sida_gradient_linear(&to->output, &layers->output, b->mixed, d_x, a->mixed, n);
    SIDA_TRY(sida_attention_backward_cpu(&(sida_attention_backward_call){.d_q = b->query,
                                                                         .d_k = b->key_value,
                                                                         .d_v = b->key_value + h,
                                                                         .d_bias = to->positions,
                                                                         .d_out = b->mixed,
                                                                         .forward = &a->call}));
    for (int64_t i = 0; i < n * h; i++) b->query[i] *= scale;
    sida_gradient_linear(&to->query, &layers->query, b->normed, b->query, a->normed, n);
    sida_gradient_linear(&to->key_value, &layers->key_value, d_memory ? d_memory : b->normed,
                         b->key_value, memory, keys);
    norm_backward(&to->norm, &layers->norm, d_x, b->normed, a->x, n);
out:
    return status;
}

/* d_x: room for the gradient of this side's residual stream; of an encoder, what the decoder has
 * added. d_encoder: the encoder's, NULL where there is none. */
static sida_status side_backward(sida_net *gradient, const sida_net_pass *pass, int side,
                                 const float *d_logits, float *d_x, float *d_encoder,
                                 const side_blocks *b) {
    sida_status status = SIDA_OK;
    const sida_net_config *c = &pass->net->config;
    const sida_net_trunk *trunk = &pass->net->trunks[side];
    sida_net_trunk *to = &gradient->trunks[side];
    const sida_net_activations *a = &pass->sides[side], *encoder = &pass->sides[0];
    const struct sida_net_transformer_side *t = a->transformer;
    const int64_t n = a->tokens, h = c->hidden;
    zero(b->normed, n * h);
    sida_gradient_linear(&to->heads, &trunk->heads, b->normed, d_logits, a->mixed, n);
    norm_backward(&to->norm_out, &trunk->norm_out, d_x, b->normed, t->last, n);
    if (d_encoder) zero(b->memory, encoder->tokens * h);
    for (int i = c->blocks - 1; i >= 0; i--) {
        const sida_net_block *layers = &trunk->blocks[i];
        const sida_net_block_pass *kept = &t->blocks[i];
        sida_net_block *block = &to->blocks[i];
        zero(b->up, n * SIDA_NET_UP * h);
        zero(b->normed, n * h);
        sida_gradient_linear(&block->down, &layers->down, b->up, d_x, kept->up, n);
        sida_gradient_relu(b->up, kept->up, n * SIDA_NET_UP * h);
        sida_gradient_linear(&block->up, &layers->up, b->normed, b->up, kept->normed, n);
        norm_backward(&block->norm, &layers->norm, d_x, b->normed, kept->x, n);
        if (d_encoder)
            SIDA_TRY(attend_backward(&block->cross, &layers->cross, &kept->cross, d_x, b->memory,
                                     encoder->transformer->memory, encoder->tokens, b, n));
        SIDA_TRY(attend_backward(&block->self, &layers->self, &kept->self, d_x, NULL,
                                 kept->self.normed, n, b, n));
    }
    if (d_encoder)
        norm_backward(&to->norm_memory, &trunk->norm_memory, d_encoder, b->memory,
                      encoder->transformer->last, encoder->tokens);
    zero(b->normed, n * c->d_model);
    sida_gradient_linear(&to->compress, &trunk->compress, b->normed, d_x, t->normed_in, n);
    norm_backward(&to->norm_in, &trunk->norm_in, NULL, b->normed, a->embedded, n);
out:
    return status;
}

sida_status sida_gradient_add_transformer(sida_net *gradient, sida_gradient_workspace *workspace,
                                          const sida_net_pass *pass,
                                          const float *const d_logits[2]) {
    sida_status status = SIDA_OK;
    const sida_net_config *c = &pass->net->config;
    const int64_t h = c->hidden, wide = h > c->d_model ? h : c->d_model;
    int64_t tokens[2] = {0, 0};
    for (int side = 0; side < 2; side++)
        if (d_logits[side]) tokens[side] = pass->sides[side].tokens;
    const int64_t most = tokens[0] > tokens[1] ? tokens[0] : tokens[1];
    const int64_t row = wide + (4 + SIDA_NET_UP) * h;
    SIDA_TRY(sida_gradient_reserve(workspace, (size_t)((2 * tokens[0] + tokens[1]) * h) +
                                                  (size_t)(most * row)));
    float *next = workspace->block;
    float *d_x[2] = {take(&next, tokens[0] * h), take(&next, tokens[1] * h)};
    zero(workspace->block, (tokens[0] + tokens[1]) * h);
    const side_blocks blocks = {.memory = take(&next, tokens[0] * h),
                                .normed = take(&next, most * wide),
                                .query = take(&next, most * h),
                                .mixed = take(&next, most * h),
                                .key_value = take(&next, most * 2 * h),
                                .up = take(&next, most * SIDA_NET_UP * h)};
    /* The decoder first: it adds to the gradient of what it read of the encoder. */
    for (int side = 1; side >= 0; side--)
        if (d_logits[side])
            SIDA_TRY(side_backward(gradient, pass, side, d_logits[side], d_x[side],
                                   side == 1 && d_logits[0] ? d_x[0] : NULL, &blocks));
out:
    return status;
}
