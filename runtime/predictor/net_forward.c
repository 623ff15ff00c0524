#include "runtime/predictor/net_private.h"

#include "formats/base/memory.h"
#include "runtime/ops/embedding.h"
#include "runtime/ops/gemm.h"
#include "runtime/ops/lstm.h"
#include "runtime/predictor/net_transformer.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

sida_status sida_net_pass_create(sida_net_pass **out, const sida_net *net, bool training) {
    *out = NULL;
    sida_status status = SIDA_OK;
    sida_net_pass *pass = NULL;
    SIDA_TRY(SIDA_ALLOC(&pass, 1, "a predictor's pass"));
    pass->net = net;
    pass->training = training;
    for (int side = 0; side < 2 && net->config.kind == SIDA_NET_TRANSFORMER; side++)
        SIDA_TRY(SIDA_ALLOC(&pass->sides[side].transformer, 1, "a predictor's pass"));
    *out = pass;
    pass = NULL;
out:
    sida_net_pass_destroy(pass);
    return status;
}

void sida_net_pass_destroy(sida_net_pass *pass) {
    if (!pass) return;
    for (int side = 0; side < 2; side++) {
        for (int i = 0; i < 4; i++) free(pass->sides[side].storage[i]);
        free(pass->sides[side].transformer);
    }
    for (int l = 0; l < SIDA_NET_LSTM_MAX; l++) {
        free(pass->state_h[l]);
        free(pass->state_c[l]);
    }
    free(pass->memory);
    free(pass->counts);
    free(pass);
}

sida_status sida_net_pass_reserve(sida_net_activations *a, int which, size_t items, size_t size) {
    if (a->storage[which] && items <= a->storage_items[which]) return SIDA_OK;
    free(a->storage[which]);
    a->storage[which] = NULL;
    a->storage_items[which] = 0;
    sida_status status = sida_alloc(&a->storage[which], items, size, "a predictor's activations");
    if (status == SIDA_OK) a->storage_items[which] = items;
    return status;
}

static float *take(float **from, int64_t count) {
    float *block = *from;
    *from += count;
    return block;
}

/* Cuts the activations of n tokens out of one block. Inference keeps one layer's gates only. */
static sida_status lay_out(sida_net_pass *pass, int side, int64_t n) {
    sida_net_activations *a = &pass->sides[side];
    const sida_net_config *c = &pass->net->config;
    int64_t h = c->hidden, outputs = pass->net->trunks[side].heads.rows;
    int64_t gate_layers = pass->training ? c->lstm_layers : 1;
    int64_t workspace = 5 * h * pass->sequences;
    int64_t row = c->d_model + 2 * h + 4 * h * gate_layers + 2 * h * c->lstm_layers + outputs;
    size_t items;
    if (sida_mul_overflow((size_t)n, (size_t)row, &items) ||
        sida_add_overflow(items, (size_t)workspace, &items))
        return sida_fail(SIDA_ERROR_MEMORY, "%" PRId64 " tokens are too many for one batch", n);
    sida_status status = sida_net_pass_reserve(a, SIDA_NET_STORE_FLOATS, items, sizeof(float));
    if (status != SIDA_OK) return status;
    float *next = (float *)a->storage[SIDA_NET_STORE_FLOATS] + workspace;
    a->embedded = take(&next, n * c->d_model);
    a->compressed = take(&next, n * h);
    a->mixed = take(&next, n * h);
    for (int l = 0; l < c->lstm_layers; l++) {
        a->gates[l] = l < gate_layers ? take(&next, n * 4 * h) : a->gates[0];
        a->cells[l] = take(&next, n * h);
        a->out[l] = take(&next, n * h);
    }
    a->logits = take(&next, n * outputs);
    a->tokens = n;
    return SIDA_OK;
}

sida_status sida_net_pass_lay_out_integers(sida_net_pass *pass, int side) {
    sida_net_activations *a = &pass->sides[side];
    size_t s = (size_t)pass->sequences;
    sida_status status = sida_net_pass_reserve(a, SIDA_NET_STORE_LONGS, 6 * s + 1, sizeof(int64_t));
    if (status == SIDA_OK)
        status = sida_net_pass_reserve(a, SIDA_NET_STORE_INTS, 4 * s, sizeof(int32_t));
    if (status != SIDA_OK) return status;
    memset(a->storage[SIDA_NET_STORE_LONGS], 0, (6 * s + 1) * sizeof(int64_t));
    memset(a->storage[SIDA_NET_STORE_INTS], 0, 4 * s * sizeof(int32_t));
    a->offsets = a->storage[SIDA_NET_STORE_LONGS];
    a->self = a->cross = (sida_sparsemax_attention_call){0};
    return SIDA_OK;
}

sida_status sida_net_check_ids(sida_weight embedding, const sida_ragged *input) {
    for (int64_t i = 0; i < sida_ragged_tokens(input); i++)
        if (input->ids[i] < 0 || input->ids[i] >= embedding.rows)
            return sida_fail(SIDA_ERROR_FORMAT,
                             "token id %d is outside the embedding of %" PRId64 " rows",
                             input->ids[i], embedding.rows);
    return SIDA_OK;
}

static bool attends(const sida_net_pass *pass) {
    return pass->net->config.attention != SIDA_NET_NO_ATTENTION;
}

sida_status sida_net_pass_apply(const sida_net_pass *pass, float *y, const float *x, int64_t n,
                                const sida_net_linear *layer, sida_epilogue epilogue) {
    sida_linear_fn *linear = pass->training ? sida_linear_gemm_cpu : sida_linear_cpu;
    return linear(NULL, &(sida_linear_call){.y = y,
                                            .ldy = layer->rows,
                                            .x = x,
                                            .ldx = layer->cols,
                                            .n = n,
                                            .weight = sida_net_weight(layer),
                                            .bias = layer->bias,
                                            .scale = 1,
                                            .epilogue = epilogue});
}

/* The LSTM's layers over what was compressed. */
static sida_status run_lstm(sida_net_pass *pass, int side, int64_t n) {
    sida_status status = SIDA_OK;
    const sida_net_trunk *trunk = &pass->net->trunks[side];
    const sida_net_config *c = &pass->net->config;
    sida_net_activations *a = &pass->sides[side];
    int directions = sida_net_directions(c, side);
    int32_t units = c->hidden / directions;
    for (int cell = 0; cell < directions * c->lstm_layers; cell++) {
        int l = cell / directions, way = cell % directions;
        const sida_net_linear *recurrent = &trunk->recurrent[cell];
        float *gates = a->gates[l] + way * n * 4 * units;
        SIDA_TRY(sida_net_pass_apply(pass, gates, l == 0 ? a->compressed : a->out[l - 1], n,
                                     &trunk->input[cell], SIDA_EPILOGUE_NONE));
        SIDA_TRY(sida_lstm_cpu(
            NULL, &(sida_lstm_call){.out = a->out[l] + (int64_t)way * units,
                                    .ldo = c->hidden,
                                    .gates = gates,
                                    .cells = a->cells[l] + way * n * units,
                                    .recurrent = sida_net_weight(recurrent),
                                    .bias = recurrent->bias,
                                    .sequences = pass->sequences,
                                    .hidden = units,
                                    .offsets = a->offsets,
                                    .reverse = way == 1,
                                    .state_h = side == 1 ? pass->state_h[l] : NULL,
                                    .state_c = side == 1 ? pass->state_c[l] : NULL,
                                    .workspace = a->storage[SIDA_NET_STORE_FLOATS],
                                    .linear = pass->training ? sida_linear_gemm_cpu : NULL}));
    }
out:
    return status;
}

/* Everything below the attention; without one, all that the heads read. */
static sida_status run_trunk(sida_net_pass *pass, int side, sida_weight embedding,
                             const sida_ragged *input) {
    sida_status status = SIDA_OK;
    const sida_net_trunk *trunk = &pass->net->trunks[side];
    const sida_net_config *c = &pass->net->config;
    sida_net_activations *a = &pass->sides[side];
    int64_t n = sida_ragged_tokens(input);
    assert(embedding.cols == c->d_model);
    SIDA_TRY(sida_net_check_ids(embedding, input));
    SIDA_TRY(sida_net_pass_lay_out_integers(pass, side));
    SIDA_TRY(lay_out(pass, side, n));
    memcpy(a->offsets, input->offsets, ((size_t)pass->sequences + 1) * sizeof *a->offsets);
    SIDA_TRY(sida_embedding_cpu(NULL, a->embedded, embedding, input->ids, n));
    SIDA_TRY(sida_net_pass_apply(pass, a->compressed, a->embedded, n, &trunk->compress,
                                 SIDA_EPILOGUE_RELU));
    SIDA_TRY(run_lstm(pass, side, n));
    if (attends(pass)) {
        SIDA_TRY(sida_net_pass_apply(pass, a->mixed, a->compressed, n, &trunk->residual,
                                     SIDA_EPILOGUE_NONE));
        goto out;
    }
    memcpy(a->mixed, a->out[c->lstm_layers - 1], (size_t)(n * c->hidden) * sizeof(float));
    SIDA_TRY(
        sida_net_pass_apply(pass, a->mixed, a->compressed, n, &trunk->residual, SIDA_EPILOGUE_ADD));
out:
    return status;
}

/* Fills one attention call: queries are this side's, keys lie at k_start. */
static sida_sparsemax_attention_call attention(sida_net_pass *pass, int side, int which,
                                               const float *memory) {
    sida_net_activations *a = &pass->sides[side];
    int32_t s = pass->sequences;
    int64_t *longs = a->offsets + s + 1 + (int64_t)which * 2 * s; /* k_start, p_start */
    int32_t *ints = a->storage[SIDA_NET_STORE_INTS];              /* q_count, q_position, k_count */
    return (sida_sparsemax_attention_call){
        .out = a->mixed,
        .queries = a->out[pass->net->config.lstm_layers - 1],
        .memory = memory,
        .sequences = s,
        .width = pass->net->config.hidden,
        .q_start = a->offsets,
        .k_start = longs,
        .p_start = longs + s,
        .q_count = ints,
        .q_position = ints + s,
        .k_count = ints + (2 + which) * (int64_t)s,
        .causal = side == 1 && which == 0,
        .softmax = pass->net->config.attention == SIDA_NET_SOFTMAX,
    };
}

/* Probabilities of both attentions for the backward pass, the second behind the first. */
static sida_status keep_probabilities(sida_net_pass *pass, int side) {
    sida_net_activations *a = &pass->sides[side];
    sida_sparsemax_attention_call *calls[2] = {&a->self, &a->cross};
    size_t total = 0;
    for (int i = 0; i < 2; i++)
        for (int32_t s = 0; s < calls[i]->sequences; s++) {
            size_t area;
            ((int64_t *)calls[i]->p_start)[s] = (int64_t)total;
            if (sida_mul_overflow((size_t)calls[i]->q_count[s], (size_t)calls[i]->k_count[s],
                                  &area) ||
                sida_add_overflow(total, area, &total) || total > INT64_MAX)
                return sida_fail(SIDA_ERROR_MEMORY, "sequences too long for attention");
        }
    sida_status status = sida_net_pass_reserve(a, SIDA_NET_STORE_KEPT, total, sizeof(float));
    for (int i = 0; i < 2; i++) calls[i]->probabilities = a->storage[SIDA_NET_STORE_KEPT];
    return status;
}

static sida_status finish(sida_net_pass *pass, int side) {
    sida_status status = SIDA_OK;
    sida_net_activations *a = &pass->sides[side];
    if (pass->training) SIDA_TRY(keep_probabilities(pass, side));
    if (a->self.sequences > 0) SIDA_TRY(sida_sparsemax_attention_cpu(NULL, &a->self));
    if (a->cross.sequences > 0) SIDA_TRY(sida_sparsemax_attention_cpu(NULL, &a->cross));
    SIDA_TRY(sida_net_pass_apply(pass, a->logits, a->mixed, a->tokens,
                                 &pass->net->trunks[side].heads, SIDA_EPILOGUE_NONE));
out:
    return status;
}

/* Matrices of a row for every token of the decoder so far. */
static size_t planes(const sida_net_config *c) {
    return c->kind == SIDA_NET_TRANSFORMER ? 2 * (size_t)c->blocks : 1;
}

static sida_status reset_state(sida_net_pass *pass) {
    sida_status status = SIDA_OK;
    const sida_net_config *c = &pass->net->config;
    size_t items = (size_t)pass->sequences * (size_t)c->hidden;
    if (!pass->counts || (size_t)pass->sequences > pass->count_items) {
        free(pass->counts);
        pass->counts = NULL;
        SIDA_TRY(SIDA_ALLOC(&pass->counts, pass->sequences, "a predictor's state"));
        pass->count_items = (size_t)pass->sequences;
    }
    memset(pass->counts, 0, (size_t)pass->sequences * sizeof *pass->counts);
    for (int l = 0; l < c->lstm_layers; l++) {
        float **states[2] = {&pass->state_h[l], &pass->state_c[l]};
        for (int i = 0; i < 2; i++) {
            if (!*states[i] || items > pass->state_items) {
                free(*states[i]);
                *states[i] = NULL;
                SIDA_TRY(SIDA_ALLOC(states[i], items, "a predictor's state"));
            }
            memset(*states[i], 0, items * sizeof **states[i]);
        }
    }
    if (items > pass->state_items) pass->state_items = items;
    size_t capacity = items > 0 ? pass->memory_items / items / planes(c) : 0;
    pass->capacity = capacity > INT32_MAX / 2 ? INT32_MAX / 2 : (int32_t)capacity;
out:
    return status;
}

sida_status sida_net_encode(sida_net_pass *pass, sida_weight embedding, const sida_ragged *input) {
    sida_status status = SIDA_OK;
    sida_net_activations *a = &pass->sides[0];
    pass->sequences = input->sequences;
    a->tokens = 0;
    pass->sides[1].tokens = 0;
    if (pass->net->trunks[1].present) SIDA_TRY(reset_state(pass));
    if (!pass->net->trunks[0].present) goto out;
    if (pass->net->config.kind == SIDA_NET_TRANSFORMER) {
        SIDA_TRY(sida_net_transformer_run(pass, 0, embedding, input));
        goto out;
    }
    SIDA_TRY(run_trunk(pass, 0, embedding, input));
    if (attends(pass)) a->self = attention(pass, 0, 0, a->out[pass->net->config.lstm_layers - 1]);
    int32_t *counts = a->storage[SIDA_NET_STORE_INTS],
            *keys = counts + 2 * (int64_t)pass->sequences;
    int64_t *k_start = a->offsets + pass->sequences + 1;
    for (int32_t s = 0; s < pass->sequences; s++) {
        int64_t length = a->offsets[s + 1] - a->offsets[s];
        if (length > INT32_MAX) SIDA_FAIL(SIDA_ERROR_MEMORY, "a sequence is too long");
        counts[s] = keys[s] = (int32_t)length;
        k_start[s] = a->offsets[s];
    }
    SIDA_TRY(finish(pass, 0));
out:
    return status;
}

/* Room in the decoder's memory for the longest sequence after this step. */
static sida_status grow_memory(sida_net_pass *pass, const sida_ragged *step) {
    sida_status status = SIDA_OK;
    int64_t needed = 1, h = pass->net->config.hidden;
    float *memory = NULL;
    for (int32_t s = 0; s < pass->sequences; s++) {
        int64_t count = pass->counts[s] + step->offsets[s + 1] - step->offsets[s];
        needed = count > needed ? count : needed;
    }
    if (needed <= pass->capacity) return SIDA_OK;
    if (needed > INT32_MAX / 2) SIDA_FAIL(SIDA_ERROR_MEMORY, "a sequence is too long");
    int64_t capacity = pass->capacity > 0 ? 2 * (int64_t)pass->capacity : needed;
    if (capacity < needed) capacity = needed;
    size_t items, rows = planes(&pass->net->config) * (size_t)pass->sequences;
    if (sida_mul_overflow(rows * (size_t)h, (size_t)capacity, &items))
        SIDA_FAIL(SIDA_ERROR_MEMORY, "a sequence is too long");
    SIDA_TRY(SIDA_ALLOC(&memory, items, "a predictor's memory"));
    for (int64_t r = 0; r < (int64_t)rows; r++) {
        int32_t count = pass->counts[r % pass->sequences];
        if (count > 0)
            memcpy(memory + r * capacity * h, pass->memory + r * pass->capacity * h,
                   (size_t)count * (size_t)h * sizeof *memory);
    }
    free(pass->memory);
    pass->memory = memory;
    pass->memory_items = items;
    pass->capacity = (int32_t)capacity;
out:
    return status;
}

sida_status sida_net_decode(sida_net_pass *pass, sida_weight embedding, const sida_ragged *step) {
    sida_status status = SIDA_OK;
    sida_net_activations *a = &pass->sides[1];
    const sida_net_activations *encoder = &pass->sides[0];
    const sida_net *net = pass->net;
    int64_t h = net->config.hidden;
    int last = net->config.lstm_layers - 1;
    assert(net->trunks[1].present && step->sequences == pass->sequences);
    if (net->config.kind == SIDA_NET_TRANSFORMER) {
        if (!pass->training) SIDA_TRY(grow_memory(pass, step));
        status = sida_net_transformer_run(pass, 1, embedding, step);
        goto out;
    }
    if (!attends(pass)) {
        SIDA_TRY(run_trunk(pass, 1, embedding, step));
        status = finish(pass, 1);
        goto out;
    }
    SIDA_TRY(grow_memory(pass, step));
    SIDA_TRY(run_trunk(pass, 1, embedding, step));
    a->self = attention(pass, 1, 0, pass->memory);
    if (net->trunks[0].present) a->cross = attention(pass, 1, 1, encoder->out[last]);
    int32_t n = pass->sequences, *counts = a->storage[SIDA_NET_STORE_INTS], *positions = counts + n;
    int32_t *keys = counts + 2 * (int64_t)n, *cross_keys = counts + 3 * (int64_t)n;
    int64_t *k_start = a->offsets + n + 1, *cross_start = k_start + 2 * (int64_t)n;
    for (int32_t s = 0; s < n; s++) {
        counts[s] = (int32_t)(a->offsets[s + 1] - a->offsets[s]);
        positions[s] = pass->counts[s];
        keys[s] = positions[s] + counts[s];
        k_start[s] = (int64_t)s * pass->capacity;
        memcpy(pass->memory + (k_start[s] + positions[s]) * h, a->out[last] + a->offsets[s] * h,
               (size_t)counts[s] * (size_t)h * sizeof(float));
        pass->counts[s] = keys[s];
        if (a->cross.sequences == 0) continue;
        cross_start[s] = encoder->offsets[s];
        cross_keys[s] = (int32_t)(encoder->offsets[s + 1] - encoder->offsets[s]);
    }
    SIDA_TRY(finish(pass, 1));
out:
    return status;
}
