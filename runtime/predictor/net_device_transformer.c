/* The Transformer on a device. A kernel's launch costs more than a sequence's arithmetic, so
 * queries, keys and values are one product, and so are all decoder blocks' keys and values of the
 * encoder's outputs; norms, ReLU and the residual sums are part of the products. */
#include "runtime/predictor/net_device_private.h"

#include <math.h>
#include <string.h>

/* --- parameters */

static void lay_block(sida_net_device_block *block, sida_net_layout *at,
                      const sida_net_device *device, bool cross) {
    sida_dtype dtype = device->weights;
    int64_t h = device->config.hidden;
    block->norm = sida_net_layout_weight(at, dtype, 1, h);
    block->project = sida_net_layout_weight(at, dtype, 3 * h, h);
    block->output = sida_net_layout_weight(at, dtype, h, h);
    block->positions =
        sida_net_layout_weight(at, SIDA_F32, SIDA_NET_BUCKETS, h / SIDA_NET_HEAD_WIDTH);
    if (cross) {
        block->cross_norm = sida_net_layout_weight(at, dtype, 1, h);
        block->cross_query = sida_net_layout_weight(at, dtype, h, h);
        block->cross_output = sida_net_layout_weight(at, dtype, h, h);
    }
    block->up_norm = sida_net_layout_weight(at, dtype, 1, h);
    block->up = sida_net_layout_weight(at, dtype, SIDA_NET_UP * h, h);
    block->down = sida_net_layout_weight(at, dtype, h, SIDA_NET_UP * h);
}

void sida_net_device_transformer_lay(sida_net_device *device, sida_net_layout *at) {
    const sida_net_config *c = &device->config;
    sida_dtype dtype = device->weights;
    int64_t h = c->hidden;
    for (int side = 0; side < 2; side++) {
        sida_net_device_transformer *to = &device->transformers[side];
        bool cross = side == 1 && c->layers[0] > 0;
        int64_t outputs = (int64_t)c->layers[side] * c->experts;
        if (outputs == 0) continue;
        to->norm_in = sida_net_layout_weight(at, dtype, 1, c->d_model);
        to->compress = sida_net_layout_weight(at, dtype, h, c->d_model);
        to->compress_bias = sida_net_layout_part(at, h, 1, sizeof(float));
        for (int b = 0; b < c->blocks; b++) lay_block(&to->blocks[b], at, device, cross);
        if (cross) {
            to->norm_memory = sida_net_layout_weight(at, dtype, 1, h);
            to->memory = sida_net_layout_weight(at, dtype, 2 * c->blocks * h, h);
        }
        to->norm_out = sida_net_layout_weight(at, dtype, 1, h);
        to->heads = sida_net_layout_weight(at, dtype, outputs, h);
        to->heads_bias = sida_net_layout_part(at, outputs, 1, sizeof(float));
    }
}

static void fill_all(const sida_weight *to, const sida_net_linear *from) {
    sida_net_fill(to, 0, from->weight, to->rows, 1);
}

static void fill_block(const sida_net_device_block *to, const sida_net_block *from) {
    /* The op's scores are q kᵀ. */
    const float scale = 1.0f / sqrtf((float)SIDA_NET_HEAD_WIDTH);
    int64_t h = to->output.rows;
    fill_all(&to->norm, &from->self.norm);
    sida_net_fill(&to->project, 0, from->self.query.weight, h, scale);
    sida_net_fill(&to->project, h, from->self.key_value.weight, 2 * h, 1);
    fill_all(&to->output, &from->self.output);
    sida_net_fill(&to->positions, 0, from->self.positions, to->positions.rows, 1);
    if (to->cross_norm.rows > 0) {
        fill_all(&to->cross_norm, &from->cross.norm);
        sida_net_fill(&to->cross_query, 0, from->cross.query.weight, h, scale);
        fill_all(&to->cross_output, &from->cross.output);
    }
    fill_all(&to->up_norm, &from->norm);
    fill_all(&to->up, &from->up);
    fill_all(&to->down, &from->down);
}

void sida_net_device_transformer_fill(sida_net_device *device, const sida_net *net) {
    const sida_net_config *c = &device->config;
    int64_t h = c->hidden;
    for (int side = 0; side < 2; side++) {
        const sida_net_device_transformer *to = &device->transformers[side];
        const sida_net_trunk *from = &net->trunks[side];
        if (!from->present) continue;
        fill_all(&to->norm_in, &from->norm_in);
        fill_all(&to->compress, &from->compress);
        memcpy(to->compress_bias, from->compress.bias, (size_t)h * sizeof(float));
        for (int b = 0; b < c->blocks; b++) fill_block(&to->blocks[b], &from->blocks[b]);
        if (to->memory.rows > 0) {
            fill_all(&to->norm_memory, &from->norm_memory);
            for (int b = 0; b < c->blocks; b++)
                sida_net_fill(&to->memory, 2 * b * h, from->blocks[b].cross.key_value.weight, 2 * h,
                              1);
        }
        fill_all(&to->norm_out, &from->norm_out);
        fill_all(&to->heads, &from->heads);
        memcpy(to->heads_bias, from->heads.bias, (size_t)to->heads.rows * sizeof(float));
    }
}

/* --- the pass */

/* A product of dense rows; what is left out of the call is filled in. */
static sida_status multiply(const sida_net_call *q, sida_linear_call call) {
    call.ldy = call.weight.rows;
    call.ldx = call.weight.cols;
    call.scale = 1;
    call.epsilon = SIDA_NET_EPSILON;
    call.normed = q->lane->normed;
    call.normed_type = q->device->activations;
    return q->device->ops->linear(q->lane->stream, &call);
}

/* x = compress(norm_in(e)) */
static sida_status embed(const sida_net_call *q) {
    sida_status status = SIDA_OK;
    const sida_net_device *device = q->device;
    const sida_net_device_transformer *net = &device->transformers[q->side];
    const sida_net_lane *lane = q->lane;
    for (int64_t first = 0; first < q->tokens; first += SIDA_NET_CHUNK_ROWS) {
        int64_t left = q->tokens - first;
        int64_t rows = left < SIDA_NET_CHUNK_ROWS ? left : SIDA_NET_CHUNK_ROWS;
        SIDA_TRY(device->ops->embedding(lane->stream, lane->wide, device->embedding,
                                        q->index.ids + first, rows));
        SIDA_TRY(multiply(q, (sida_linear_call){.y = lane->compressed + first * net->compress.rows,
                                                .x = lane->wide,
                                                .n = rows,
                                                .weight = net->compress,
                                                .bias = net->compress_bias,
                                                .norm = net->norm_in}));
    }
out:
    return status;
}

/* x += output(what attention left) */
static sida_status add_attended(const sida_net_call *q, sida_weight output) {
    return multiply(q, (sida_linear_call){.y = q->lane->compressed,
                                          .x = q->lane->normed,
                                          .x_type = q->device->activations,
                                          .n = q->tokens,
                                          .weight = output,
                                          .epilogue = SIDA_EPILOGUE_ADD});
}

/* What both attentions share: queries in `wide`, of leading dimension ldq. */
static sida_attention_call attention_of(const sida_net_call *q, int64_t ldq) {
    int64_t h = q->device->config.hidden;
    return (sida_attention_call){.out = q->lane->normed,
                                 .out_type = q->device->activations,
                                 .ldo = h,
                                 .q = q->lane->wide,
                                 .ldq = ldq,
                                 .sequences = q->sequences,
                                 .heads = (int32_t)(h / SIDA_NET_HEAD_WIDTH),
                                 .d_kv = SIDA_NET_HEAD_WIDTH,
                                 .rows = q->tokens,
                                 .q_start = q->index.offsets,
                                 .q_count = q->index.counts};
}

/* The decoder's keys and values join those of the steps before. */
static sida_status remember(const sida_net_call *q, int block, sida_attention_call *attention) {
    int64_t h = q->device->config.hidden;
    int64_t rows = (int64_t)q->device->limits.sequences * q->device->limits.decoder_positions;
    float *keys = q->state->memory + 2 * block * rows * h, *values = keys + rows * h;
    attention->k = keys;
    attention->v = values;
    attention->ldk = attention->ldv = h;
    attention->k_start = q->index.memory_start;
    attention->k_count = q->index.memory_count;
    attention->q_position = q->index.positions;
    attention->causal = true;
    return q->device->ops->append(q->lane->stream,
                                  &(sida_append_call){.k_cache = keys,
                                                      .v_cache = values,
                                                      .k = q->lane->wide + h,
                                                      .v = q->lane->wide + 2 * h,
                                                      .width = h,
                                                      .ld = 3 * h,
                                                      .sequences = q->sequences,
                                                      .rows = q->tokens,
                                                      .q_start = q->index.offsets,
                                                      .start = q->index.memory_start,
                                                      .q_count = q->index.counts,
                                                      .position = q->index.positions});
}

static sida_status attend_self(const sida_net_call *q, int b) {
    sida_status status = SIDA_OK;
    const sida_net_lane *lane = q->lane;
    const sida_net_device_block *block = &q->device->transformers[q->side].blocks[b];
    int64_t h = q->device->config.hidden;
    sida_attention_call attention = attention_of(q, 3 * h);
    attention.bias = block->positions;
    attention.bias_bidirectional = q->side == 0;
    attention.bias_max_distance = SIDA_NET_DISTANCE;
    SIDA_TRY(multiply(q, (sida_linear_call){.y = lane->wide,
                                            .x = lane->compressed,
                                            .n = q->tokens,
                                            .weight = block->project,
                                            .norm = block->norm}));
    if (q->side == 1) {
        SIDA_TRY(remember(q, b, &attention));
    } else {
        attention.k = lane->wide + h;
        attention.v = lane->wide + 2 * h;
        attention.ldk = attention.ldv = 3 * h;
        attention.k_start = q->index.offsets;
        attention.k_count = q->index.counts;
    }
    SIDA_TRY(q->device->ops->attention(lane->stream, &attention));
    SIDA_TRY(add_attended(q, block->output));
out:
    return status;
}

static sida_status attend_cross(const sida_net_call *q, int b) {
    sida_status status = SIDA_OK;
    const sida_net_lane *lane = q->lane;
    const sida_net_device_block *block = &q->device->transformers[1].blocks[b];
    int64_t h = q->device->config.hidden;
    sida_attention_call attention = attention_of(q, h);
    attention.k = q->state->trunk + 2 * b * h;
    attention.v = attention.k + h;
    attention.ldk = attention.ldv = 2 * q->device->config.blocks * h;
    attention.k_start = q->index.trunk_start;
    attention.k_count = q->index.trunk_count;
    SIDA_TRY(multiply(q, (sida_linear_call){.y = lane->wide,
                                            .x = lane->compressed,
                                            .n = q->tokens,
                                            .weight = block->cross_query,
                                            .norm = block->cross_norm}));
    SIDA_TRY(q->device->ops->attention(lane->stream, &attention));
    SIDA_TRY(add_attended(q, block->cross_output));
out:
    return status;
}

/* x += down(relu(up(norm(x)))) */
static sida_status feed_forward(const sida_net_call *q, const sida_net_device_block *block) {
    sida_status status = SIDA_OK;
    const sida_net_lane *lane = q->lane;
    SIDA_TRY(multiply(q, (sida_linear_call){.y = lane->wide,
                                            .y_type = q->device->activations,
                                            .x = lane->compressed,
                                            .n = q->tokens,
                                            .weight = block->up,
                                            .epilogue = SIDA_EPILOGUE_RELU,
                                            .norm = block->up_norm}));
    SIDA_TRY(multiply(q, (sida_linear_call){.y = lane->compressed,
                                            .x = lane->wide,
                                            .x_type = q->device->activations,
                                            .n = q->tokens,
                                            .weight = block->down,
                                            .epilogue = SIDA_EPILOGUE_ADD}));
out:
    return status;
}

sida_status sida_net_device_transformer_run(const sida_net_call *q) {
    sida_status status = SIDA_OK;
    const sida_net_device *device = q->device;
    const sida_net_device_transformer *net = &device->transformers[q->side];
    SIDA_TRY(embed(q));
    for (int b = 0; b < device->config.blocks; b++) {
        SIDA_TRY(attend_self(q, b));
        if (net->blocks[b].cross_norm.rows > 0) SIDA_TRY(attend_cross(q, b));
        SIDA_TRY(feed_forward(q, &net->blocks[b]));
    }
out:
    return status;
}

sida_status sida_net_device_transformer_keep(const sida_net_call *q) {
    const sida_net_device_transformer *decoder = &q->device->transformers[1];
    if (decoder->memory.rows == 0) return SIDA_OK;
    return multiply(q, (sida_linear_call){.y = q->state->trunk,
                                          .x = q->lane->compressed,
                                          .n = q->tokens,
                                          .weight = decoder->memory,
                                          .norm = decoder->norm_memory});
}

sida_status sida_net_device_transformer_score(const sida_net_call *q, int64_t first, int64_t rows) {
    const sida_net_device_transformer *net = &q->device->transformers[q->side];
    return multiply(q,
                    (sida_linear_call){.y = q->lane->wide,
                                       .x = q->lane->compressed + first * q->device->config.hidden,
                                       .n = rows,
                                       .weight = net->heads,
                                       .bias = net->heads_bias,
                                       .norm = net->norm_out});
}
