#include "runtime/predictor/net_device_private.h"
#include "runtime/predictor/select.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static sida_net_index lay_index(char *base, int64_t sequences, int64_t tokens) {
    sida_net_index index;
    index.offsets = (int64_t *)base;
    index.memory_start = index.offsets + sequences + 1;
    index.trunk_start = index.memory_start + sequences;
    index.counts = (int32_t *)(index.trunk_start + sequences);
    index.positions = index.counts + sequences;
    index.memory_count = index.positions + sequences;
    index.trunk_count = index.memory_count + sequences;
    index.ids = index.trunk_count + sequences;
    index.bytes = (size_t)(3 * sequences + 1) * sizeof(int64_t) +
                  (size_t)(4 * sequences + tokens) * sizeof(int32_t);
    return index;
}

static sida_net_call begin(sida_net_device_state *state, int which, int side,
                           const sida_ragged *input, int32_t k) {
    sida_net_lane *lane = &state->device->lanes[which];
    sida_net_call call = {.device = state->device,
                          .lane = lane,
                          .state = state,
                          .side = side,
                          .sequences = input->sequences,
                          .k = k,
                          .tokens = sida_ragged_tokens(input)};
    call.host = lay_index(lane->host_index, call.sequences, call.tokens);
    call.index = lay_index(lane->index, call.sequences, call.tokens);
    call.top = side == 0 && state->trunk ? state->trunk : lane->out;
    memcpy(call.host.offsets, input->offsets, ((size_t)call.sequences + 1) * sizeof(int64_t));
    memcpy(call.host.ids, input->ids, (size_t)call.tokens * sizeof(int32_t));
    for (int32_t s = 0; s < call.sequences; s++)
        call.host.counts[s] = (int32_t)(input->offsets[s + 1] - input->offsets[s]);
    return call;
}

static sida_status apply(const sida_net_call *q, float *y, const float *x, int64_t n,
                         const sida_net_linear *layer, sida_epilogue epilogue) {
    return q->device->ops->linear(q->lane->stream,
                                  &(sida_linear_call){.y = y,
                                                      .ldy = layer->rows,
                                                      .x = x,
                                                      .ldx = layer->cols,
                                                      .n = n,
                                                      .weight = sida_net_weight(layer),
                                                      .bias = layer->bias,
                                                      .scale = 1,
                                                      .epilogue = epilogue});
}

/* The LSTM's layers over what was compressed; all write where the last one's outputs belong, so all
 * directions of a layer have read the one below before the first of them writes. */
static sida_status run_lstm(const sida_net_call *q) {
    sida_status status = SIDA_OK;
    const sida_net_config *c = &q->device->config;
    const sida_net_trunk *trunk = &q->device->trunks[q->side];
    const sida_net_lane *lane = q->lane;
    int directions = sida_net_directions(c, q->side);
    int32_t units = c->hidden / directions;
    int64_t carried = (int64_t)q->sequences * c->hidden, rows = q->tokens;
    for (int l = 0; l < c->lstm_layers; l++) {
        float *carry = q->side == 1 ? q->state->carry + 2 * l * carried : NULL;
        for (int way = 0; way < directions; way++)
            SIDA_TRY(apply(q, lane->wide + way * rows * 4 * units,
                           l == 0 ? lane->compressed : q->top, rows,
                           &trunk->input[l * directions + way], SIDA_EPILOGUE_NONE));
        sida_lstm_call calls[2];
        for (int way = 0; way < directions; way++) {
            const sida_net_linear *recurrent = &trunk->recurrent[l * directions + way];
            calls[way] = (sida_lstm_call){.out = q->top + (int64_t)way * units,
                                          .ldo = c->hidden,
                                          .gates = lane->wide + way * rows * 4 * units,
                                          .cells = lane->mixed + way * rows * units,
                                          .recurrent = sida_net_weight(recurrent),
                                          .bias = recurrent->bias,
                                          .sequences = q->sequences,
                                          .hidden = units,
                                          .offsets = q->index.offsets,
                                          .reverse = way == 1,
                                          .state_h = carry,
                                          .state_c = carry ? carry + carried : NULL,
                                          .workspace = lane->workspace};
        }
        if (directions == 2) calls[0].beside = &calls[1];
        SIDA_TRY(q->device->ops->lstm(lane->stream, &calls[0]));
    }
out:
    return status;
}

/* Everything below the attention; without one, all that the heads read. */
static sida_status run_trunk(const sida_net_call *q) {
    sida_status status = SIDA_OK;
    const sida_net_device *device = q->device;
    const sida_net_trunk *trunk = &device->trunks[q->side];
    const sida_net_lane *lane = q->lane;
    for (int64_t first = 0; first < q->tokens; first += SIDA_NET_CHUNK_ROWS) {
        int64_t rows = smaller(q->tokens - first, SIDA_NET_CHUNK_ROWS);
        SIDA_TRY(device->ops->embedding(lane->stream, lane->wide, device->embedding,
                                        q->index.ids + first, rows));
        SIDA_TRY(apply(q, lane->compressed + first * device->config.hidden, lane->wide, rows,
                       &trunk->compress, SIDA_EPILOGUE_RELU));
    }
    SIDA_TRY(run_lstm(q));
    bool attends = sida_net_device_attends(device);
    if (!attends)
        SIDA_TRY(sida_copy(lane->stream, lane->mixed, q->top,
                           (size_t)(q->tokens * device->config.hidden) * sizeof(float)));
    SIDA_TRY(apply(q, lane->mixed, lane->compressed, q->tokens, &trunk->residual,
                   attends ? SIDA_EPILOGUE_NONE : SIDA_EPILOGUE_ADD));
out:
    return status;
}

static sida_status attend(const sida_net_call *q, const float *memory, const int64_t *start,
                          const int32_t *count, const int32_t *position) {
    bool softmax = q->device->config.attention == SIDA_NET_SOFTMAX;
    return q->device->ops->sparsemax_attention(
        q->lane->stream, &(sida_sparsemax_attention_call){.out = q->lane->mixed,
                                                          .queries = q->top,
                                                          .memory = memory,
                                                          .sequences = q->sequences,
                                                          .width = q->device->config.hidden,
                                                          .q_start = q->index.offsets,
                                                          .k_start = start,
                                                          .q_count = q->index.counts,
                                                          .k_count = count,
                                                          .q_position = position,
                                                          .causal = position != NULL,
                                                          .softmax = softmax,
                                                          .rows = q->tokens});
}

/* The decoder's memory grows, and its queries look at it and at the encoder. */
static sida_status attend_to_both(const sida_net_call *q) {
    sida_status status = SIDA_OK;
    const sida_net_device_state *state = q->state;
    const sida_net_index *at = &q->index;
    /* Keys and values are the same vectors, at the same place. */
    SIDA_TRY(q->device->ops->append(q->lane->stream,
                                    &(sida_append_call){.k_cache = state->memory,
                                                        .v_cache = state->memory,
                                                        .k = q->top,
                                                        .v = q->top,
                                                        .width = q->device->config.hidden,
                                                        .ld = q->device->config.hidden,
                                                        .sequences = q->sequences,
                                                        .rows = q->tokens,
                                                        .q_start = at->offsets,
                                                        .start = at->memory_start,
                                                        .q_count = at->counts,
                                                        .position = at->positions}));
    SIDA_TRY(attend(q, state->memory, at->memory_start, at->memory_count, at->positions));
    if (state->trunk) SIDA_TRY(attend(q, state->trunk, at->trunk_start, at->trunk_count, NULL));
out:
    return status;
}

/* All below the heads. */
static sida_status run(const sida_net_call *q) {
    sida_status status = SIDA_OK;
    if (q->device->config.kind == SIDA_NET_TRANSFORMER) return sida_net_device_transformer_run(q);
    SIDA_TRY(run_trunk(q));
    if (!sida_net_device_attends(q->device)) goto out;
    if (q->side == 0)
        SIDA_TRY(attend(q, q->top, q->index.offsets, q->index.counts, NULL));
    else
        SIDA_TRY(attend_to_both(q));
out:
    return status;
}

/* The scores of some rows, in the lane's `wide`. */
static sida_status score(const sida_net_call *q, int64_t first, int64_t rows) {
    if (q->device->config.kind == SIDA_NET_TRANSFORMER)
        return sida_net_device_transformer_score(q, first, rows);
    return apply(q, q->lane->wide, q->lane->mixed + first * q->device->config.hidden, rows,
                 &q->device->trunks[q->side].heads, SIDA_EPILOGUE_NONE);
}

/* Scores, and what they choose. */
static sida_status choose(const sida_net_call *q) {
    sida_status status = SIDA_OK;
    const sida_net_config *c = &q->device->config;
    const sida_net_lane *lane = q->lane;
    int64_t layers = c->layers[q->side], each = layers * q->k;
    int32_t *experts = (int32_t *)lane->results;
    float *alpha = (float *)(experts + q->tokens * each);
    for (int64_t first = 0; first < q->tokens; first += SIDA_NET_CHUNK_ROWS) {
        int64_t rows = smaller(q->tokens - first, SIDA_NET_CHUNK_ROWS);
        SIDA_TRY(score(q, first, rows));
        SIDA_TRY(q->device->ops->router(lane->stream,
                                        &(sida_router_call){.experts = experts + first * each,
                                                            .alpha = alpha + first * each,
                                                            .logits = lane->wide,
                                                            .n = rows * layers,
                                                            .experts_total = c->experts,
                                                            .k = q->k}));
    }
out:
    return status;
}

static sida_status issue(void *context) {
    sida_status status = run(context);
    return status == SIDA_OK ? choose(context) : status;
}

/* Issues a call whose index is on its way to the device. A Transformer is many small kernels: what
 * comes back in the same shape is replayed. An encoder's does not depend on the state. */
static sida_status compute(sida_net_call *q) {
    sida_status status = SIDA_OK;
    sida_graphs *graphs = q->lane->graphs;
    if (!graphs) {
        SIDA_TRY(issue(q));
        return sida_net_device_refine_keep(q);
    }
    const sida_graphs_key key = {.subject = q->side == 1 ? q->state : NULL,
                                 .tokens = q->tokens,
                                 .sequences = q->sequences,
                                 .side = q->side,
                                 .chooser = q->k};
    SIDA_TRY(sida_graphs_begin(graphs, &key));
    SIDA_TRY(sida_graphs_issue(graphs, 0, issue, q));
    if (q->side == 0) SIDA_TRY(sida_net_device_transformer_keep(q));
    SIDA_TRY(sida_net_device_refine_keep(q));
out:
    return status;
}

/* Waits for the choice and makes a table of it. */
static sida_status read_table(const sida_net_call *q, sida_hash_table *out) {
    sida_status status = SIDA_OK;
    const sida_net_lane *lane = q->lane;
    int32_t layers = q->device->config.layers[q->side];
    int64_t count = q->tokens * layers * q->k;
    const int32_t *experts = (const int32_t *)lane->host_results;
    const float *alpha = (const float *)(experts + count);
    SIDA_TRY(sida_copy(lane->stream, lane->host_results, lane->results,
                       (size_t)count * (sizeof *experts + sizeof *alpha)));
    SIDA_TRY(sida_stream_synchronize(lane->stream));
    SIDA_TRY(sida_hash_table_reserve(out, q->side, layers, q->k, q->tokens));
    bool good = true;
    for (int64_t i = 0; i < count; i++) {
        good &= (bool)isfinite(alpha[i]); /* the softmax is over all scores */
        out->experts[i] = (uint16_t)experts[i];
    }
    memcpy(out->alpha, alpha, (size_t)count * sizeof *alpha);
    if (!good) SIDA_TRY(sida_select_not_finite());
out:
    return status;
}

/* The decoder starts from zeros. */
static sida_status clear_carry(sida_net_device_state *state, sida_stream *stream) {
    sida_status status = SIDA_OK;
    const sida_net_device *device = state->device;
    const sida_net_config *c = &device->config;
    size_t left =
        2 * (size_t)c->lstm_layers * (size_t)state->sequences * (size_t)c->hidden * sizeof(float);
    for (char *at = (char *)state->carry; left > 0;) {
        size_t bytes = left < SIDA_NET_ZERO_BYTES ? left : SIDA_NET_ZERO_BYTES;
        SIDA_TRY(sida_upload(stream, at, device->zeros, device->zeros->data, bytes));
        at += bytes;
        left -= bytes;
    }
out:
    return status;
}

static sida_status check_call(const sida_net_device *device, const sida_ragged *input, int32_t k,
                              int64_t most_tokens) {
    const sida_hash_limits *l = &device->limits;
    int64_t tokens = sida_ragged_tokens(input);
    if (input->sequences > l->sequences || tokens > most_tokens || k > l->k)
        return sida_fail(SIDA_ERROR_ARGUMENT,
                         "%d sequences, %" PRId64 " tokens, %d experts: this predictor was placed "
                         "for %d, %" PRId64 ", %d",
                         input->sequences, tokens, k, l->sequences, most_tokens, l->k);
    return sida_net_check_ids(device->embedding, input);
}

static sida_status encode(sida_net_device_state *state, const sida_ragged *input, int32_t k,
                          sida_hash_table *out) {
    sida_status status = SIDA_OK;
    sida_net_device *device = state->device;
    sida_net_call q = begin(state, SIDA_LANE_AHEAD, 0, input, k);
    if (device->trunks[1].present && state->carry) SIDA_TRY(clear_carry(state, q.lane->stream));
    if (!device->trunks[0].present || q.tokens == 0) {
        status = sida_hash_table_reserve(out, 0, device->config.layers[0], k, 0);
        goto out;
    }
    SIDA_TRY(
        sida_upload(q.lane->stream, q.lane->index, q.lane->host, q.lane->host_index, q.host.bytes));
    SIDA_TRY(compute(&q));
    SIDA_TRY(read_table(&q, out));
out:
    return status;
}

/* A call that may be refined: no layer of it has told its choice yet. */
static void begin_told(sida_net_device_state *state, int side, const sida_ragged *input) {
    sida_net_device_told *told = &state->told[side];
    told->called = true;
    told->layers = 0;
    told->tokens = sida_ragged_tokens(input);
}

sida_status sida_net_device_encode(sida_net_device_state *state, const sida_ragged *input,
                                   int32_t k, sida_hash_table *out) {
    sida_net_device *device = state->device;
    sida_net_lane *lane = &device->lanes[SIDA_LANE_AHEAD];
    state->encoded = state->stepped = false;
    for (int side = 0; side < 2; side++) state->told[side].called = false;
    sida_status status = check_call(device, input, k, device->limits.input_tokens);
    if (status != SIDA_OK) return status;
    state->sequences = input->sequences;
    memcpy(state->offsets, input->offsets, ((size_t)input->sequences + 1) * sizeof(int64_t));
    memset(state->position, 0, (size_t)input->sequences * sizeof *state->position);
    pthread_mutex_lock(&lane->mutex);
    status = encode(state, input, k, out);
    pthread_mutex_unlock(&lane->mutex);
    state->encoded = status == SIDA_OK;
    if (status == SIDA_OK) begin_told(state, 0, input);
    return status;
}

/* Where each sequence stands, on the host's side of the index. */
static sida_status fill_positions(const sida_net_call *q) {
    const sida_net_device_state *state = q->state;
    int32_t most = q->device->limits.decoder_positions;
    for (int32_t s = 0; s < q->sequences; s++) {
        int64_t count = (int64_t)state->position[s] + q->host.counts[s];
        if (count > most)
            return sida_fail(SIDA_ERROR_ARGUMENT,
                             "%" PRId64 " decoder tokens: this predictor was placed for %d", count,
                             most);
        q->host.positions[s] = state->position[s];
        q->host.memory_count[s] = (int32_t)count;
        q->host.memory_start[s] = (int64_t)s * most;
        q->host.trunk_start[s] = state->offsets[s];
        q->host.trunk_count[s] = (int32_t)(state->offsets[s + 1] - state->offsets[s]);
    }
    return SIDA_OK;
}

static sida_status decode(sida_net_device_state *state, int which, const sida_ragged *step,
                          int32_t k, sida_hash_table *out) {
    sida_status status = SIDA_OK;
    sida_net_call q = begin(state, which, 1, step, k);
    SIDA_TRY(fill_positions(&q));
    SIDA_TRY(
        sida_upload(q.lane->stream, q.lane->index, q.lane->host, q.lane->host_index, q.host.bytes));
    SIDA_TRY(compute(&q));
    SIDA_TRY(read_table(&q, out));
    for (int32_t s = 0; s < q.sequences; s++) state->position[s] = q.host.memory_count[s];
out:
    return status;
}

sida_status sida_net_device_decode(sida_net_device_state *state, const sida_ragged *step, int32_t k,
                                   sida_hash_table *out) {
    sida_net_device *device = state->device;
    if (!state->encoded || step->sequences != state->sequences)
        return sida_fail(SIDA_ERROR_ARGUMENT, "a decoder step of another batch");
    sida_status status = check_call(device, step, k, device->limits.step_tokens);
    if (status != SIDA_OK) return status;
    int which = state->stepped ? SIDA_LANE_STEPS : SIDA_LANE_AHEAD;
    state->told[1].called = false;
    if (!device->trunks[1].present || sida_ragged_tokens(step) == 0) {
        status =
            sida_hash_table_reserve(out, 1, device->config.layers[1], k, sida_ragged_tokens(step));
        if (status == SIDA_OK) begin_told(state, 1, step);
        return status;
    }
    pthread_mutex_lock(&device->lanes[which].mutex);
    status = decode(state, which, step, k, out);
    pthread_mutex_unlock(&device->lanes[which].mutex);
    state->stepped = true;
    state->encoded = status == SIDA_OK;
    if (status == SIDA_OK) begin_told(state, 1, step);
    return status;
}
