/* Refinements on a device (refine.h): behind each call the features that the heads have read stay
 * in the state, and the first part of the sum is made of them. A refinement then is a sum of rows,
 * two products for the layers behind, and their best experts. */
#include "runtime/predictor/net_device_private.h"
#include "runtime/predictor/select.h"

#include <assert.h>
#include <math.h>
#include <string.h>

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static bool has_side(const sida_net_device *device, int side) {
    return device->refine.width > 0 && device->config.layers[side] > 1;
}

static int64_t rows_of(const sida_net_device *device, int side) {
    return side == 0 ? device->limits.input_tokens : device->limits.step_tokens;
}

/* --- memory */

void sida_net_device_refine_lay(sida_net_device *device, sida_net_layout *at) {
    const sida_net_config *c = &device->config;
    sida_dtype dtype = c->kind == SIDA_NET_TRANSFORMER ? device->weights : SIDA_F32;
    int64_t width = device->refine.width;
    for (int side = 0; side < 2; side++) {
        if (!has_side(device, side)) continue;
        int64_t steps = c->layers[side] - 1, outputs = steps * c->experts;
        device->refine.sides[side].features = sida_net_layout_weight(at, dtype, width, c->hidden);
        device->refine.sides[side].heads = sida_net_layout_weight(at, dtype, outputs, width);
        device->refine.sides[side].bias = sida_net_layout_part(at, steps, width, sizeof(float));
        device->refine.sides[side].known = sida_net_layout_part(at, outputs, width, sizeof(float));
        device->refine.sides[side].heads_bias = sida_net_layout_part(at, outputs, 1, sizeof(float));
    }
}

void sida_net_device_refine_fill(const sida_net_device *device, const sida_refine *refine) {
    for (int side = 0; side < 2; side++) {
        if (!has_side(device, side)) continue;
        const sida_refine_side *from = &refine->sides[side];
        size_t steps = (size_t)device->config.layers[side] - 1, width = (size_t)refine->width;
        size_t outputs = steps * (size_t)device->config.experts;
        sida_net_fill(&device->refine.sides[side].features, 0, from->features.weight,
                      from->features.rows, 1);
        sida_net_fill(&device->refine.sides[side].heads, 0, from->heads.weight, from->heads.rows,
                      1);
        memcpy(device->refine.sides[side].bias, from->bias, steps * width * sizeof(float));
        memcpy(device->refine.sides[side].known, from->known, outputs * width * sizeof(float));
        memcpy(device->refine.sides[side].heads_bias, from->heads.bias, outputs * sizeof(float));
    }
}

void sida_net_device_refine_lay_state(sida_net_device_state *state, sida_net_layout *at,
                                      const sida_net_device *device) {
    for (int side = 0; side < 2; side++) {
        if (!has_side(device, side)) continue;
        int64_t rows = rows_of(device, side);
        state->told[side].features =
            sida_net_layout_part(at, rows, device->config.hidden, sizeof(float));
        state->told[side].sum = sida_net_layout_part(at, rows, device->refine.width, sizeof(float));
    }
}

/* The arrays that host and device both have. */
static void lay_shared(char **chosen, char **results, sida_net_layout *at,
                       const sida_net_device *device) {
    int64_t k = device->limits.k, most_chosen = 0, most_results = 0;
    for (int side = 0; side < 2; side++) {
        if (!has_side(device, side)) continue;
        int64_t rows = rows_of(device, side),
                results_here = rows * (device->config.layers[side] - 1);
        if (rows > most_chosen) most_chosen = rows;
        if (results_here > most_results) most_results = results_here;
    }
    *chosen = sida_net_layout_part(at, most_chosen, k, sizeof(int32_t));
    *results = sida_net_layout_part(at, most_results, k, sizeof(int32_t) + sizeof(float));
}

static void lay_workspace(sida_net_device *device, sida_net_layout *at) {
    sida_net_device_refine *refine = &device->refine;
    int64_t most_rows = 0, most_scores = 0;
    lay_shared(&refine->chosen, &refine->results, at, device);
    for (int side = 0; side < 2; side++) {
        if (!has_side(device, side)) continue;
        int64_t rows = rows_of(device, side);
        int64_t scores = smaller(rows, SIDA_NET_CHUNK_ROWS) * (device->config.layers[side] - 1);
        if (rows > most_rows) most_rows = rows;
        if (scores > most_scores) most_scores = scores;
    }
    refine->z = sida_net_layout_part(at, most_rows, refine->width, sizeof(float));
    refine->scores = sida_net_layout_part(at, most_scores, device->config.experts, sizeof(float));
}

sida_status sida_net_device_refine_open(sida_net_device *device) {
    sida_status status = SIDA_OK;
    sida_net_device_refine *refine = &device->refine;
    sida_net_layout at = {0}, host = {0};
    if (refine->width == 0) goto out;
    lay_workspace(device, &at);
    SIDA_TRY(sida_net_device_buffer(device, &refine->device, SIDA_MEMORY_DEVICE, &at,
                                    "the refinement's workspace"));
    lay_workspace(device, &(sida_net_layout){.base = refine->device->data});
    lay_shared(&refine->host_chosen, &refine->host_results, &host, device);
    SIDA_TRY(sida_net_device_buffer(device, &refine->host, SIDA_MEMORY_HOST, &host,
                                    "the refinement's host arrays"));
    lay_shared(&refine->host_chosen, &refine->host_results,
               &(sida_net_layout){.base = refine->host->data}, device);
out:
    return status;
}

/* --- the pass */

/* Rows `first` and on of a weight, of which those before belong to other layers. */
static sida_weight rows_from(sida_weight weight, int64_t first) {
    weight.data =
        (const char *)weight.data + (size_t)(first * weight.cols) * sida_dtype_bytes(weight.dtype);
    weight.rows -= first;
    return weight;
}

static sida_status multiply(const sida_net_device *device, sida_stream *stream, float *y,
                            const float *x, int64_t n, sida_weight weight, const float *bias,
                            sida_epilogue epilogue) {
    return device->ops->linear(stream, &(sida_linear_call){.y = y,
                                                           .ldy = weight.rows,
                                                           .x = x,
                                                           .ldx = weight.cols,
                                                           .n = n,
                                                           .weight = weight,
                                                           .bias = bias,
                                                           .scale = 1,
                                                           .epilogue = epilogue});
}

sida_status sida_net_device_refine_keep(const sida_net_call *q) {
    sida_status status = SIDA_OK;
    const sida_net_device *device = q->device;
    const sida_net_device_told *told = &q->state->told[q->side];
    const sida_net_lane *lane = q->lane;
    const int64_t h = device->config.hidden;
    if (!has_side(device, q->side)) goto out;
    if (device->config.kind == SIDA_NET_TRANSFORMER)
        SIDA_TRY(device->ops->rms_norm(lane->stream, told->features, SIDA_F32, lane->compressed,
                                       device->transformers[q->side].norm_out, q->tokens,
                                       SIDA_NET_EPSILON));
    else
        SIDA_TRY(sida_copy(lane->stream, told->features, lane->mixed,
                           (size_t)(q->tokens * h) * sizeof(float)));
    SIDA_TRY(multiply(device, lane->stream, told->sum, told->features, q->tokens,
                      device->refine.sides[q->side].features, NULL, SIDA_EPILOGUE_NONE));
out:
    return status;
}

/* Issues everything, up to the results' way back to the host. */
static sida_status issue(sida_net_device_state *state, int side, int32_t layer, int32_t top_k,
                         int32_t k) {
    sida_status status = SIDA_OK;
    const sida_net_device *device = state->device;
    const sida_net_device_refine *refine = &device->refine;
    const sida_net_device_told *told = &state->told[side];
    const bool transformer = device->config.kind == SIDA_NET_TRANSFORMER;
    sida_stream *stream = device->lanes[SIDA_LANE_STEPS].stream;
    const int64_t h = device->config.hidden, width = refine->width, e = device->config.experts;
    const int64_t behind = device->config.layers[side] - 1 - layer, each = behind * k;
    const sida_weight heads = transformer ? device->transformers[side].heads
                                          : sida_net_weight(&device->trunks[side].heads);
    const float *bias =
        transformer ? device->transformers[side].heads_bias : device->trunks[side].heads.bias;
    int32_t *experts = (int32_t *)refine->results;
    float *alpha = (float *)(experts + told->tokens * each);
    SIDA_TRY(sida_upload(stream, refine->chosen, refine->host, refine->host_chosen,
                         (size_t)(told->tokens * top_k) * sizeof(int32_t)));
    SIDA_TRY(device->ops->know(
        stream, &(sida_know_call){.sum = told->sum,
                                  .z = refine->z,
                                  .known = refine->sides[side].known + layer * e * width,
                                  .bias = refine->sides[side].bias + layer * width,
                                  .experts = (const int32_t *)refine->chosen,
                                  .n = told->tokens,
                                  .width = width,
                                  .k = top_k}));
    for (int64_t first = 0; first < told->tokens; first += SIDA_NET_CHUNK_ROWS) {
        int64_t rows = smaller(told->tokens - first, SIDA_NET_CHUNK_ROWS);
        SIDA_TRY(multiply(device, stream, refine->scores, told->features + first * h, rows,
                          rows_from(heads, (layer + 1) * e), bias + (layer + 1) * e,
                          SIDA_EPILOGUE_NONE));
        SIDA_TRY(multiply(device, stream, refine->scores, refine->z + first * width, rows,
                          rows_from(refine->sides[side].heads, layer * e),
                          refine->sides[side].heads_bias + layer * e, SIDA_EPILOGUE_ADD));
        SIDA_TRY(device->ops->router(stream, &(sida_router_call){.experts = experts + first * each,
                                                                 .alpha = alpha + first * each,
                                                                 .logits = refine->scores,
                                                                 .n = rows * behind,
                                                                 .experts_total = (int32_t)e,
                                                                 .k = k}));
    }
    SIDA_TRY(sida_copy(stream, refine->host_results, refine->results,
                       (size_t)(told->tokens * each) * (sizeof *experts + sizeof *alpha)));
out:
    return status;
}

/* The layers behind `layer` of a table, once their results are on the host. */
static sida_status read_results(const sida_net_device *device, int side, int32_t layer, int64_t n,
                                int32_t k, sida_hash_table *out) {
    const int32_t layers = device->config.layers[side], behind = layers - 1 - layer;
    const int64_t each = (int64_t)behind * k, all = (int64_t)layers * k;
    const int32_t *experts = (const int32_t *)device->refine.host_results;
    const float *alpha = (const float *)(experts + n * each);
    sida_status status = sida_hash_table_reserve(out, side, layers, k, n);
    if (status != SIDA_OK) return status;
    bool good = true;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < each; j++) {
            good &= (bool)isfinite(alpha[i * each + j]);
            out->experts[i * all + all - each + j] = (uint16_t)experts[i * each + j];
            out->alpha[i * all + all - each + j] = alpha[i * each + j];
        }
    return good ? SIDA_OK : sida_select_not_finite();
}

static sida_status check(const sida_net_device_state *state, int side, int32_t layer,
                         const int32_t *experts, int32_t top_k, int32_t k) {
    const sida_net_device *device = state->device;
    const sida_net_device_told *told = &state->told[side];
    if (!told->called)
        return sida_fail(SIDA_ERROR_ARGUMENT, "nothing has been predicted that a layer refines");
    if (layer != told->layers)
        return sida_fail(SIDA_ERROR_ARGUMENT,
                         "a refinement by MoE layer %d where that by layer %d is next", layer,
                         told->layers);
    if (top_k > device->limits.k || k > device->limits.k)
        return sida_fail(SIDA_ERROR_ARGUMENT,
                         "%d chosen and %d predicted experts: this predictor was placed for %d",
                         top_k, k, device->limits.k);
    for (int64_t i = 0; i < told->tokens * top_k; i++)
        if (experts[i] < 0 || experts[i] >= device->config.experts)
            return sida_fail(SIDA_ERROR_ARGUMENT, "MoE layer %d chose expert %d of %d", layer,
                             experts[i], device->config.experts);
    return SIDA_OK;
}

sida_status sida_net_device_refine_table(sida_net_device_state *state, int side, int32_t layer,
                                         const int32_t *experts, int32_t top_k, int32_t k,
                                         sida_hash_table *out) {
    sida_net_device *device = state->device;
    sida_net_device_told *told = &state->told[side];
    sida_net_lane *lane = &device->lanes[SIDA_LANE_STEPS];
    assert(has_side(device, side) && layer + 1 < device->config.layers[side]);
    sida_status status = check(state, side, layer, experts, top_k, k);
    if (status != SIDA_OK) return status;
    told->layers++;
    pthread_mutex_lock(&lane->mutex);
    if (told->tokens > 0) {
        memcpy(device->refine.host_chosen, experts,
               (size_t)(told->tokens * top_k) * sizeof *experts);
        SIDA_TRY(issue(state, side, layer, top_k, k));
        SIDA_TRY(sida_stream_synchronize(lane->stream));
    }
    SIDA_TRY(read_results(device, side, layer, told->tokens, k, out));
out:
    pthread_mutex_unlock(&lane->mutex);
    return status;
}
