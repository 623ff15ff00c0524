#include "formats/base/memory.h"
#include "trainer/step_cuda_private.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum { alignment = 256 };

/* --- memory, laid out as it is taken; base NULL only counts */

typedef struct layout {
    char *base;
    size_t used;
} layout;

static void *area(layout *at, int64_t rows, int64_t width, size_t size) {
    size_t bytes = (size_t)rows * (size_t)width * size; /* rows < 2^31, width < 2^17 or so */
    void *start = at->base ? at->base + at->used : NULL;
    at->used += (bytes + alignment - 1) / alignment * alignment;
    return start;
}

static float *floats(layout *at, int64_t rows, int64_t width) {
    return area(at, rows, width, sizeof(float));
}

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static bool present(const sida_step_cuda *step, int side) {
    return step->config.layers[side] > 0;
}

/* --- making one */

static sida_status copy_embedding(sida_step_cuda *step, sida_weight embedding) {
    sida_status status = SIDA_OK;
    size_t bytes = (size_t)embedding.rows * (size_t)embedding.cols * sizeof(float);
    assert(embedding.dtype == SIDA_F32 && embedding.cols == step->config.d_model);
    SIDA_TRY(sida_buffer_create(step->stream->backend, &step->embedding, SIDA_MEMORY_DEVICE, bytes,
                                "the embedding"));
    SIDA_TRY(sida_copy(step->stream, step->embedding->data, embedding.data, bytes));
    SIDA_TRY(sida_stream_synchronize(step->stream));
    step->table = embedding;
    step->table.data = step->embedding->data;
out:
    return status;
}

sida_status sida_step_cuda_create(sida_step_cuda **out, sida_stream *stream,
                                  const sida_net_config *config, sida_weight embedding,
                                  const sida_step_cuda_options *options) {
    *out = NULL;
    sida_status status = SIDA_OK;
    sida_step_cuda *step = NULL;
    sida_net *shapes = NULL;
    SIDA_TRY(SIDA_ALLOC(&step, 1, "a training step"));
    step->stream = stream;
    step->ops = sida_ops_of(stream->backend);
    step->config = *config;
    step->options = *options;
    SIDA_TRY(sida_net_create(&shapes, config));
    memcpy(step->shapes, shapes->trunks, sizeof step->shapes);
    for (int i = 0; i < SIDA_STEPS_AHEAD; i++)
        SIDA_TRY(sida_event_create(stream->backend, &step->done[i]));
    if (step->ops->prepare) SIDA_TRY(step->ops->prepare(stream));
    SIDA_TRY(copy_embedding(step, embedding));
    *out = step;
    step = NULL;
out:
    sida_net_destroy(shapes);
    sida_step_cuda_destroy(step);
    return status;
}

void sida_step_cuda_destroy(sida_step_cuda *step) {
    if (!step) return;
    for (int i = 0; i < SIDA_STEPS_AHEAD; i++) sida_event_destroy(step->done[i]);
    sida_rnn_destroy(step->rnn[1]);
    sida_rnn_destroy(step->rnn[0]);
    sida_buffer_destroy(step->parameters);
    sida_buffer_destroy(step->staging);
    sida_buffer_destroy(step->embedding);
    sida_buffer_destroy(step->work);
    sida_buffer_destroy(step->host);
    free(step);
}

/* --- room for parts */

static sida_status make_rnns(sida_step_cuda *step, const sida_feed_limits *limits) {
    sida_status status = SIDA_OK;
    /* The second borrows from the first. */
    for (int side = 1; side >= 0; side--) {
        sida_rnn_destroy(step->rnn[side]);
        step->rnn[side] = NULL;
    }
    for (int side = 0; side < 2; side++) {
        if (!present(step, side)) continue;
        SIDA_TRY(sida_rnn_create(
            &step->rnn[side], step->stream,
            &(sida_rnn_options){.hidden = step->config.hidden,
                                .layers = step->config.lstm_layers,
                                .sequences = limits->sequences,
                                .longest = (int32_t)larger(limits->longest[side], 1),
                                .tokens = larger(limits->tokens[side], 1),
                                .layout = SIDA_RNN_PACKED,
                                .algorithm = SIDA_RNN_STANDARD,
                                .tf32 = step->options.tf32,
                                .beside = side == 1 ? step->rnn[0] : NULL}));
    }
out:
    return status;
}

/* Needs the LSTMs, which know how many floats their weights are. */
static sida_status make_parameters(sida_step_cuda *step) {
    sida_status status = SIDA_OK;
    layout at = {0};
    /* Every tensor begins at a multiple of 256 bytes; what lies between stays 0. */
    for (int side = 0; side < 2; side++) {
        const sida_net_trunk *t = &step->shapes[side];
        sida_step_places *p = &step->places[side];
        if (!present(step, side)) continue;
        const struct {
            int64_t *place, rows, cols;
        } tensors[] = {{&p->compress_weight, t->compress.rows, t->compress.cols},
                       {&p->compress_bias, t->compress.rows, 1},
                       {&p->lstm, sida_rnn_weight_items(step->rnn[side]), 1},
                       {&p->residual_weight, t->residual.rows, t->residual.cols},
                       {&p->residual_bias, t->residual.rows, 1},
                       {&p->heads_weight, t->heads.rows, t->heads.cols},
                       {&p->heads_bias, t->heads.rows, 1}};
        for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
            *tensors[i].place = (int64_t)(at.used / sizeof(float));
            (void)floats(&at, tensors[i].rows, tensors[i].cols);
        }
    }
    step->count = (int64_t)(at.used / sizeof(float));
    sida_buffer_destroy(step->parameters);
    step->parameters = NULL;
    SIDA_TRY(sida_buffer_create(step->stream->backend, &step->parameters, SIDA_MEMORY_DEVICE,
                                4 * at.used, "the parameters in training"));
    SIDA_TRY(sida_buffer_create(step->stream->backend, &step->staging, SIDA_MEMORY_HOST,
                                3 * at.used, "the parameters in training"));
out:
    return status;
}

size_t sida_step_score_bytes(const sida_step_cuda *step, int32_t sequences, int32_t q_longest,
                             int32_t k_longest) {
    for (;; sequences = (sequences + 1) / 2) {
        size_t bytes =
            sida_sparsemax_train_bytes(sequences, q_longest, k_longest, step->config.hidden, true);
        if (sequences <= 1 || bytes <= SIDA_STEP_SCORE_BYTES) return bytes;
    }
}

static size_t scratch_bytes(const sida_step_cuda *step, const sida_feed_limits *limits) {
    const sida_net_config *c = &step->config;
    size_t most = SIDA_STEP_SCORE_BYTES;
    for (int side = 0; side < 2; side++) {
        int64_t width = larger(c->d_model, (int64_t)c->layers[side] * c->experts);
        size_t chunk =
            (size_t)(sida_step_smaller(limits->tokens[side], SIDA_STEP_CHUNK_ROWS) * width) *
            sizeof(float);
        if (chunk > most) most = chunk;
        for (int keys = 0; keys <= side; keys++) {
            if (limits->longest[side] == 0 || limits->longest[keys] == 0) continue;
            size_t one = sida_sparsemax_train_bytes(1, limits->longest[side], limits->longest[keys],
                                                    c->hidden, true);
            if (one > most) most = one;
        }
    }
    return most;
}

/* Losses that are summed one by one in a step: a chunk's. */
static int32_t results_of(const sida_feed_limits *limits) {
    int64_t chunks = 1;
    for (int side = 0; side < 2; side++)
        chunks += (limits->tokens[side] + SIDA_STEP_CHUNK_ROWS - 1) / SIDA_STEP_CHUNK_ROWS *
                  limits->parts;
    return (int32_t)chunks;
}

static void lay_work(sida_step_cuda *step, layout *at, const sida_feed_limits *limits) {
    const sida_net_config *c = &step->config;
    int64_t h = c->hidden, outputs = larger(c->layers[0], c->layers[1]) * (int64_t)c->experts;
    for (int side = 0; side < 2; side++) {
        sida_step_activations *a = &step->sides[side];
        int64_t n = present(step, side) ? limits->tokens[side] : 0;
        a->compressed = floats(at, n, h);
        a->out = floats(at, n, h);
        a->mixed = floats(at, n, h);
        a->self = floats(at, n, 2);
        a->cross = floats(at, side == 1 && present(step, 0) ? n : 0, 2);
    }
    step->d_outs = floats(at, limits->tokens[0] + limits->tokens[1], h);
    step->d_compressed = floats(at, larger(limits->tokens[0], limits->tokens[1]), h);
    step->scratch_bytes = scratch_bytes(step, limits);
    step->scratch = area(at, (int64_t)step->scratch_bytes, 1, 1);
    step->sums = area(at, (int64_t)SIDA_COLUMN_SUM_BYTES(larger(outputs, h)), 1, 1);
    for (int side = 0; side < 2; side++)
        step->partials[side] = area(at, SIDA_TRAIN_PARTIALS, 1, sizeof(double));
    step->partial_norm = area(at, SIDA_TRAIN_PARTIALS, 1, sizeof(double));
    step->scalars = area(at, 1, 1, sizeof *step->scalars);
    for (int i = 0; i < SIDA_STEPS_AHEAD; i++)
        step->results[i] = area(at, step->results_most, 1, sizeof **step->results);
}

static void lay_host(sida_step_cuda *step, layout *at) {
    for (int i = 0; i < SIDA_STEPS_AHEAD; i++) {
        step->host_scalars[i] = area(at, 1, 1, sizeof **step->host_scalars);
        step->host_results[i] = area(at, step->results_most, 1, sizeof **step->host_results);
    }
}

static bool covers(const sida_feed_limits *a, const sida_feed_limits *b) {
    bool all = a->sequences >= b->sequences && a->parts >= b->parts;
    for (int side = 0; side < 2; side++)
        all = all && a->longest[side] >= b->longest[side] && a->tokens[side] >= b->tokens[side];
    return all;
}

sida_status sida_step_cuda_reserve(sida_step_cuda *step, const sida_feed_limits *limits) {
    sida_status status = SIDA_OK;
    sida_backend *backend = step->stream->backend;
    layout at = {0}, host = {0};
    if (step->host && covers(&step->limits, limits)) return SIDA_OK;
    SIDA_TRY(sida_stream_synchronize(step->stream));
    /* What is there goes first: the two do not have to fit together. */
    sida_buffer_destroy(step->work);
    sida_buffer_destroy(step->host);
    step->work = step->host = NULL;
    step->limits = *limits;
    SIDA_TRY(make_rnns(step, limits));
    if (!step->staging) SIDA_TRY(make_parameters(step));
    step->results_most = results_of(limits);
    lay_work(step, &at, limits);
    SIDA_TRY(sida_buffer_create(backend, &step->work, SIDA_MEMORY_DEVICE, at.used,
                                "a training step's activations"));
    lay_work(step, &(layout){.base = step->work->data}, limits);
    lay_host(step, &host);
    SIDA_TRY(sida_buffer_create(backend, &step->host, SIDA_MEMORY_HOST, host.used,
                                "a training step's results"));
    lay_host(step, &(layout){.base = step->host->data});
out:
    return status;
}

/* --- parameters and moments */

/* Copies one array of the state's order to the device's, or back. */
static void reorder(const sida_step_cuda *step, const sida_net *net, float *theirs, float *ours,
                    bool back) {
    if (!back) memset(ours, 0, (size_t)step->count * sizeof(float));
    for (int side = 0; side < 2; side++) {
        const sida_net_trunk *t = &net->trunks[side];
        const sida_step_places *p = &step->places[side];
        if (!t->present) continue;
        const struct {
            const float *tensor;
            int64_t place, items;
        } tensors[] = {
            {t->compress.weight, p->compress_weight, t->compress.rows * t->compress.cols},
            {t->compress.bias, p->compress_bias, t->compress.rows},
            {t->residual.weight, p->residual_weight, t->residual.rows * t->residual.cols},
            {t->residual.bias, p->residual_bias, t->residual.rows},
            {t->heads.weight, p->heads_weight, t->heads.rows * t->heads.cols},
            {t->heads.bias, p->heads_bias, t->heads.rows}};
        for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
            float *there = theirs + (tensors[i].tensor - net->parameters);
            float *here = ours + tensors[i].place;
            memcpy(back ? there : here, back ? here : there,
                   (size_t)tensors[i].items * sizeof(float));
        }
        sida_rnn_weights lstm[SIDA_NET_LSTM_MAX];
        for (int l = 0; l < net->config.lstm_layers; l++)
            lstm[l] = (sida_rnn_weights){
                .input_weight = theirs + (t->input[l].weight - net->parameters),
                .input_bias = theirs + (t->input[l].bias - net->parameters),
                .recurrent_weight = theirs + (t->recurrent[l].weight - net->parameters),
                .recurrent_bias = theirs + (t->recurrent[l].bias - net->parameters)};
        if (back)
            sida_rnn_unpack(step->rnn[side], lstm, ours + p->lstm);
        else
            sida_rnn_pack(step->rnn[side], ours + p->lstm, lstm);
    }
}

static const int kept[3] = {SIDA_STEP_PARAMETERS, SIDA_STEP_FIRST, SIDA_STEP_SECOND};

sida_status sida_step_cuda_upload(sida_step_cuda *step, const sida_train_state *state) {
    sida_status status = SIDA_OK;
    size_t bytes = (size_t)step->count * sizeof(float);
    float *const arrays[3] = {state->net->parameters, state->optimiser.first,
                              state->optimiser.second};
    SIDA_TRY(sida_stream_synchronize(step->stream));
    for (int i = 0; i < 3; i++) {
        float *ours = (float *)step->staging->data + i * step->count;
        reorder(step, state->net, arrays[i], ours, false);
        SIDA_TRY(sida_copy(step->stream, sida_step_array(step, kept[i]), ours, bytes));
    }
    SIDA_TRY(sida_zero_cuda(step->stream, sida_step_array(step, SIDA_STEP_GRADIENT), bytes));
    SIDA_TRY(sida_stream_synchronize(step->stream));
out:
    return status;
}

sida_status sida_step_cuda_download(sida_step_cuda *step, sida_train_state *state) {
    sida_status status = SIDA_OK;
    size_t bytes = (size_t)step->count * sizeof(float);
    float *const arrays[3] = {state->net->parameters, state->optimiser.first,
                              state->optimiser.second};
    for (int i = 0; i < 3; i++)
        SIDA_TRY(sida_copy(step->stream, (float *)step->staging->data + i * step->count,
                           sida_step_array(step, kept[i]), bytes));
    SIDA_TRY(sida_stream_synchronize(step->stream));
    for (int i = 0; i < 3; i++)
        reorder(step, state->net, arrays[i], (float *)step->staging->data + i * step->count, true);
out:
    return status;
}
