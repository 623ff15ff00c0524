#include "runtime/predictor/net_device_private.h"

#include "formats/base/memory.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 256, LINEARS_MAX = 3 + 2 * SIDA_NET_CELLS_MAX };

_Static_assert(SIDA_NET_UP <= 3, "what is between up and down lies where q, k and v do");

/* --- memory */

void *sida_net_layout_part(sida_net_layout *at, int64_t rows, int64_t width, size_t size) {
    size_t bytes, end;
    if (sida_mul_overflow((size_t)rows, (size_t)width, &bytes) ||
        sida_mul_overflow(bytes, size, &bytes) || sida_add_overflow(bytes, ALIGNMENT - 1, &bytes) ||
        sida_add_overflow(at->used, bytes / ALIGNMENT * ALIGNMENT, &end)) {
        at->overflow = true;
        return NULL;
    }
    void *start = at->base ? at->base + at->used : NULL;
    at->used = end;
    return start;
}

static float *floats(sida_net_layout *at, int64_t rows, int64_t width) {
    return sida_net_layout_part(at, rows, width, sizeof(float));
}

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}
static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t outputs_of(const sida_net_device *device) {
    return larger(device->config.layers[0], device->config.layers[1]) * device->config.experts;
}

/* The arrays that host and device both have. */
static void lay_shared(char **index, char **results, sida_net_layout *at,
                       const sida_net_device *device, int64_t rows) {
    const sida_net_config *c = &device->config;
    int64_t layers = larger(c->layers[0], c->layers[1]);
    *index = sida_net_layout_part(at, 10 * (int64_t)device->limits.sequences + 2 + rows, 1,
                                  sizeof(int32_t));
    *results =
        sida_net_layout_part(at, rows, layers * device->limits.k, sizeof(int32_t) + sizeof(float));
}

static void lay_lane(sida_net_lane *lane, sida_net_layout *at, const sida_net_device *device) {
    const sida_net_config *c = &device->config;
    int64_t rows = lane->rows, h = c->hidden;
    int64_t chunk = smaller(rows, SIDA_NET_CHUNK_ROWS) * larger(c->d_model, outputs_of(device));
    lay_shared(&lane->index, &lane->results, at, device, rows);
    bool transformer = c->kind == SIDA_NET_TRANSFORMER;
    int64_t between = transformer ? 3 * h : 4 * h; /* columns */
    lane->wide = floats(at, larger(rows * between, chunk), 1);
    lane->compressed = floats(at, rows, h);
    if (transformer) {
        int64_t normed = larger(smaller(rows, SIDA_NET_CHUNK_ROWS) * c->d_model, rows * h);
        lane->normed = sida_net_layout_part(at, normed, 1, sida_dtype_bytes(device->activations));
        return;
    }
    lane->mixed = floats(at, rows, h);
    /* The encoder's go to the state where the decoder attends to them. */
    bool kept = c->layers[0] > 0 && c->layers[1] > 0 && sida_net_device_attends(device);
    lane->out = floats(at, kept ? device->limits.step_tokens : rows, h);
    lane->workspace = floats(at, device->limits.sequences, 5 * h);
}

static void lay_states(sida_net_layout *at, sida_net_device *device) {
    const sida_hash_limits *l = &device->limits;
    const sida_net_config *c = &device->config;
    int64_t h = c->hidden;
    bool encoder = c->layers[0] > 0, decoder = c->layers[1] > 0;
    bool attends = sida_net_device_attends(device);
    for (int32_t i = 0; decoder && i < l->states; i++) {
        sida_net_device_state *state = &device->states[i];
        if (c->kind == SIDA_NET_TRANSFORMER) {
            int64_t width = 2 * c->blocks * h; /* keys and values */
            if (encoder) state->trunk = floats(at, l->input_tokens, width);
            state->memory = floats(at, (int64_t)l->sequences * l->decoder_positions, width);
            continue;
        }
        if (encoder && attends) state->trunk = floats(at, l->input_tokens, h);
        state->carry = floats(at, 2 * (int64_t)c->lstm_layers * l->sequences, h);
        if (attends) state->memory = floats(at, (int64_t)l->sequences * l->decoder_positions, h);
    }
    for (int32_t i = 0; i < l->states; i++)
        sida_net_device_refine_lay_state(&device->states[i], at, device);
}

/* Returns how many there are. */
static int linears_of(sida_net_linear *out[LINEARS_MAX], sida_net_trunk *trunk,
                      const sida_net_config *config, int side) {
    int count = 0, cells = config->lstm_layers * sida_net_directions(config, side);
    out[count++] = &trunk->compress;
    for (int cell = 0; cell < cells; cell++) {
        out[count++] = &trunk->input[cell];
        out[count++] = &trunk->recurrent[cell];
    }
    out[count++] = &trunk->residual;
    out[count++] = &trunk->heads;
    return count;
}

static void lay_parameters(sida_net_layout *at, sida_net_device *device) {
    sida_net_device_refine_lay(device, at);
    if (device->config.kind == SIDA_NET_TRANSFORMER) {
        sida_net_device_transformer_lay(device, at);
        return;
    }
    for (int side = 0; side < 2; side++) {
        sida_net_linear *all[LINEARS_MAX];
        if (!device->trunks[side].present) continue;
        int count = linears_of(all, &device->trunks[side], &device->config, side);
        for (int i = 0; i < count; i++) {
            all[i]->weight = floats(at, all[i]->rows, all[i]->cols);
            all[i]->bias = floats(at, all[i]->rows, 1);
        }
    }
}

sida_weight sida_net_layout_weight(sida_net_layout *at, sida_dtype dtype, int64_t rows,
                                   int64_t cols) {
    return (sida_weight){sida_net_layout_part(at, rows, cols, sida_dtype_bytes(dtype)), dtype, rows,
                         cols};
}

void sida_net_fill(const sida_weight *to, int64_t first, const float *from, int64_t rows,
                   float factor) {
    int64_t count = rows * to->cols;
    float *wide = (float *)to->data + first * to->cols;
    uint16_t *narrow = (uint16_t *)to->data + first * to->cols;
    for (int64_t i = 0; i < count; i++)
        if (to->dtype == SIDA_F32)
            wide[i] = from[i] * factor;
        else
            narrow[i] = sida_bf16_from_f32(from[i] * factor);
}

/* --- making one */

bool sida_net_device_possible(const sida_backend *backend, const sida_net_config *config) {
    const sida_ops *ops = sida_ops_of(backend);
    if (config->kind == SIDA_NET_TRANSFORMER) return ops->attention && ops->append;
    return ops->lstm && ops->sparsemax_attention;
}

sida_status sida_net_device_buffer(sida_net_device *device, sida_buffer **out,
                                   sida_memory_kind kind, const sida_net_layout *counted,
                                   const char *what) {
    if (counted->overflow)
        return sida_fail(SIDA_ERROR_MEMORY, "%s: larger than memory can be", what);
    return sida_buffer_create(device->backend, out, kind, counted->used, what);
}

static sida_status open_lane(sida_net_device *device, sida_net_lane *lane, int64_t rows) {
    sida_status status = SIDA_OK;
    lane->rows = rows;
    sida_net_layout at = {0}, host = {0};
    lay_lane(lane, &at, device);
    SIDA_TRY(sida_net_device_buffer(device, &lane->device, SIDA_MEMORY_DEVICE, &at,
                                    "the predictor's workspace"));
    lay_lane(lane, &(sida_net_layout){.base = lane->device->data}, device);
    lay_shared(&lane->host_index, &lane->host_results, &host, device, rows);
    SIDA_TRY(sida_net_device_buffer(device, &lane->host, SIDA_MEMORY_HOST, &host,
                                    "the predictor's host arrays"));
    host = (sida_net_layout){.base = lane->host->data};
    lay_shared(&lane->host_index, &lane->host_results, &host, device, rows);
    SIDA_TRY(sida_stream_create(device->backend, &lane->stream, SIDA_STREAM_COMPUTE));
    if (device->config.kind == SIDA_NET_TRANSFORMER)
        SIDA_TRY(sida_graphs_create(&lane->graphs, lane->stream, 1));
    /* The products of one row are no library's; refinements on the lane of steps have more. */
    if (!device->ops->prepare || (rows == 1 && device->refine.width == 0)) goto out;
    SIDA_TRY(device->ops->prepare(lane->stream));
    lane->stream_bytes = device->ops->stream_bytes;
out:
    return status;
}

/* Writes them where lay_parameters() has put them in host memory. */
static void fill_parameters(sida_net_device *device, const sida_net *net) {
    if (device->config.kind == SIDA_NET_TRANSFORMER) {
        sida_net_device_transformer_fill(device, net);
        return;
    }
    for (int side = 0; side < 2; side++) {
        sida_net_linear *to[LINEARS_MAX], *from[LINEARS_MAX];
        sida_net_trunk source = net->trunks[side];
        if (!source.present) continue;
        int count = linears_of(to, &device->trunks[side], &device->config, side);
        linears_of(from, &source, &device->config, side);
        for (int i = 0; i < count; i++) {
            size_t row = (size_t)to[i]->rows * sizeof(float);
            memcpy(to[i]->weight, from[i]->weight, row * (size_t)to[i]->cols);
            memcpy(to[i]->bias, from[i]->bias, row);
        }
    }
}

static sida_status copy_parameters(sida_net_device *device, const sida_net *net,
                                   const sida_refine *refine) {
    sida_status status = SIDA_OK;
    sida_stream *stream = device->lanes[0].stream;
    sida_net_layout at = {0};
    char *image = NULL;
    lay_parameters(&at, device);
    SIDA_TRY(sida_net_device_buffer(device, &device->parameters, SIDA_MEMORY_DEVICE, &at,
                                    "the predictor's parameters"));
    SIDA_TRY(SIDA_ALLOC(&image, at.used, "the predictor's parameters"));
    lay_parameters(&(sida_net_layout){.base = image}, device);
    fill_parameters(device, net);
    sida_net_device_refine_fill(device, refine);
    lay_parameters(&(sida_net_layout){.base = device->parameters->data}, device);
    SIDA_TRY(sida_copy(stream, device->parameters->data, image, at.used));
    SIDA_TRY(sida_stream_synchronize(stream));
out:
    free(image);
    return status;
}

static sida_status open_states(sida_net_device *device) {
    sida_status status = SIDA_OK;
    const sida_hash_limits *l = &device->limits;
    int64_t rows = (int64_t)l->sequences + 1;
    sida_net_layout at = {0};
    SIDA_TRY(SIDA_ALLOC(&device->states, l->states, "a predictor's states"));
    SIDA_TRY(SIDA_ALLOC(&device->offsets, rows * l->states, "a predictor's states"));
    SIDA_TRY(SIDA_ALLOC(&device->positions, rows * l->states, "a predictor's states"));
    lay_states(&at, device);
    SIDA_TRY(sida_net_device_buffer(device, &device->states_memory, SIDA_MEMORY_DEVICE, &at,
                                    "the predictor's states"));
    lay_states(&(sida_net_layout){.base = device->states_memory->data}, device);
    for (int32_t i = 0; i < l->states; i++) {
        device->states[i].device = device;
        device->states[i].offsets = device->offsets + i * rows;
        device->states[i].position = device->positions + i * rows;
    }
    SIDA_TRY(sida_buffer_create(device->backend, &device->zeros, SIDA_MEMORY_HOST,
                                SIDA_NET_ZERO_BYTES, "the predictor's host arrays"));
    memset(device->zeros->data, 0, SIDA_NET_ZERO_BYTES);
out:
    return status;
}

sida_status sida_net_device_create(sida_net_device **out, const sida_net *net,
                                   const sida_refine *refine, sida_backend *backend,
                                   sida_weight embedding, const sida_hash_limits *limits) {
    assert(sida_net_device_possible(backend, &net->config) &&
           embedding.cols == net->config.d_model);
    assert(limits->weights == SIDA_F32 || limits->weights == SIDA_BF16);
    assert(limits->states >= 1 && limits->sequences >= 1 && limits->input_tokens >= 1 &&
           limits->step_tokens >= 1 && limits->decoder_positions >= 1 && limits->k >= 1 &&
           limits->k <= net->config.experts);
    sida_status status = SIDA_OK;
    sida_net_device *device = NULL;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&device, 1, "a predictor on a device"));
    device->backend = backend;
    device->ops = sida_ops_of(backend);
    device->config = net->config;
    device->trunks[0] = net->trunks[0];
    device->trunks[1] = net->trunks[1];
    device->embedding = embedding;
    device->limits = *limits;
    device->weights = limits->weights;
    device->refine.width = refine ? refine->width : 0;
    device->activations =
        device->weights == SIDA_BF16 && device->ops->bf16_activations ? SIDA_BF16 : SIDA_F32;
    pthread_mutex_init(&device->mutex, NULL);
    for (int i = 0; i < SIDA_LANES; i++) pthread_mutex_init(&device->lanes[i].mutex, NULL);
    SIDA_TRY(open_lane(device, &device->lanes[SIDA_LANE_AHEAD],
                       larger(limits->input_tokens, limits->step_tokens)));
    SIDA_TRY(open_lane(device, &device->lanes[SIDA_LANE_STEPS], limits->step_tokens));
    SIDA_TRY(copy_parameters(device, net, refine));
    SIDA_TRY(open_states(device));
    SIDA_TRY(sida_net_device_refine_open(device));
    *out = device;
    device = NULL;
out:
    sida_net_device_destroy(device);
    return status;
}

void sida_net_device_destroy(sida_net_device *device) {
    if (!device) return;
    for (int i = 0; i < SIDA_LANES; i++) {
        sida_net_lane *lane = &device->lanes[i];
        sida_stream_destroy(lane->stream);
        sida_graphs_destroy(lane->graphs);
        sida_buffer_destroy(lane->device);
        sida_buffer_destroy(lane->host);
        pthread_mutex_destroy(&lane->mutex);
    }
    for (int32_t i = 0; device->states && i < device->limits.states; i++)
        assert(!device->states[i].taken && "states go before their source");
    sida_buffer_destroy(device->parameters);
    sida_buffer_destroy(device->states_memory);
    sida_buffer_destroy(device->zeros);
    sida_buffer_destroy(device->refine.device);
    sida_buffer_destroy(device->refine.host);
    pthread_mutex_destroy(&device->mutex);
    free(device->states);
    free(device->offsets);
    free(device->positions);
    free(device);
}

size_t sida_net_device_bytes(const sida_net_device *device) {
    size_t bytes = device->parameters->bytes + device->states_memory->bytes;
    if (device->refine.device) bytes += device->refine.device->bytes;
    for (int i = 0; i < SIDA_LANES; i++)
        bytes += device->lanes[i].device->bytes + device->lanes[i].stream_bytes;
    return bytes;
}

sida_status sida_net_device_take(sida_net_device *device, sida_net_device_state **out) {
    *out = NULL;
    pthread_mutex_lock(&device->mutex);
    for (int32_t i = 0; !*out && i < device->limits.states; i++)
        if (!device->states[i].taken) *out = &device->states[i];
    if (*out) (*out)->taken = true;
    pthread_mutex_unlock(&device->mutex);
    if (*out) return SIDA_OK;
    return sida_fail(SIDA_ERROR_ARGUMENT, "a predictor that was placed for %d batches at a time",
                     device->limits.states);
}

void sida_net_device_give(sida_net_device_state *state) {
    if (!state) return;
    pthread_mutex_lock(&state->device->mutex);
    state->taken = state->encoded = false;
    pthread_mutex_unlock(&state->device->mutex);
}
