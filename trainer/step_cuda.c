#include "formats/base/memory.h"
#include "trainer/step_cuda_private.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

void *sida_step_area(sida_step_layout *at, int64_t rows, int64_t width, size_t size) {
    size_t bytes = (size_t)rows * (size_t)width * size; /* rows < 2^31, width < 2^17 or so */
    void *start = at->base ? at->base + at->used : NULL;
    at->used += (bytes + SIDA_STEP_ALIGNMENT - 1) / SIDA_STEP_ALIGNMENT * SIDA_STEP_ALIGNMENT;
    return start;
}

/* --- making one */

static sida_status copy_embedding(sida_step_cuda *step, sida_weight embedding) {
    sida_status status = SIDA_OK;
    size_t bytes =
        (size_t)embedding.rows * (size_t)embedding.cols * sida_dtype_bytes(embedding.dtype);
    assert(embedding.cols == step->config.d_model);
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
    SIDA_TRY(SIDA_ALLOC(&step, 1, "a training step"));
    step->stream = stream;
    step->ops = sida_ops_of(stream->backend);
    step->config = *config;
    step->options = *options;
    step->kind = config->kind == SIDA_NET_LSTM ? &sida_step_lstm : &sida_step_transformer;
    SIDA_TRY(sida_net_create(&step->net, config));
    SIDA_TRY(SIDA_ALLOC(&step->places, step->net->tensor_count, "a training step"));
    for (int i = 0; i < SIDA_STEPS_AHEAD; i++)
        SIDA_TRY(sida_event_create(stream->backend, &step->done[i]));
    SIDA_TRY(sida_event_create(stream->backend, &step->beside.fork));
    SIDA_TRY(sida_event_create(stream->backend, &step->beside.mark));
    SIDA_TRY(sida_stream_create(stream->backend, &step->beside.stream, SIDA_STREAM_BESIDE));
    SIDA_TRY(sida_beside_cuda(step->beside.stream, stream));
    SIDA_TRY(copy_embedding(step, embedding));
    *out = step;
    step = NULL;
out:
    sida_step_cuda_destroy(step);
    return status;
}

static sida_status wait_for_all(const sida_step_cuda *step) {
    sida_status status = sida_stream_synchronize(step->stream);
    sida_status beside =
        step->beside.stream ? sida_stream_synchronize(step->beside.stream) : SIDA_OK;
    return status != SIDA_OK ? status : beside;
}

void sida_step_cuda_destroy(sida_step_cuda *step) {
    if (!step) return;
    (void)wait_for_all(step);
    for (int i = 0; i < SIDA_STEPS_AHEAD; i++) sida_event_destroy(step->done[i]);
    if (step->kind && step->kind->release) step->kind->release(step);
    sida_buffer_destroy(step->parameters);
    sida_buffer_destroy(step->staging);
    sida_buffer_destroy(step->embedding);
    sida_buffer_destroy(step->work);
    sida_buffer_destroy(step->host);
    sida_stream_destroy(step->beside.stream);
    sida_event_destroy(step->beside.fork);
    sida_event_destroy(step->beside.mark);
    sida_net_destroy(step->net);
    free(step->places);
    free(step);
}

/* --- room for parts */

/* Whether a tensor is in the weight space of an LSTM. */
static bool in_lstm(const sida_net_trunk *trunk, const sida_net_tensor *tensor) {
    const float *first = trunk->input[0].weight;
    return first && tensor->data >= first && tensor->data < trunk->residual.weight;
}

/* Needs the LSTMs, which know how many floats their weights are. */
static sida_status make_parameters(sida_step_cuda *step) {
    sida_status status = SIDA_OK;
    sida_step_layout at = {0};
    /* Every tensor begins at a multiple of 256 bytes; what lies between stays 0. */
    for (int32_t i = 0; i < step->net->tensor_count; i++) {
        const sida_net_tensor *t = &step->net->tensors[i];
        int64_t place = (int64_t)(at.used / sizeof(float));
        step->places[i] = place;
        for (int side = 0; side < 2; side++) {
            const sida_net_trunk *trunk = &step->net->trunks[side];
            if (!in_lstm(trunk, t)) continue;
            step->places[i] = -1;
            if (t->data != trunk->input[0].weight) continue;
            step->lstms[side] = place;
            (void)sida_step_floats(&at, sida_rnn_weight_items(step->lstm.rnn[side]), 1);
        }
        if (step->places[i] >= 0) (void)sida_step_floats(&at, t->count, 1);
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

float *sida_step_tensor(const sida_step_cuda *step, int which, const float *tensor) {
    int32_t low = 0, high = step->net->tensor_count; /* they lie in order */
    while (high - low > 1) {
        int32_t middle = low + (high - low) / 2;
        if (step->net->tensors[middle].data <= tensor)
            low = middle;
        else
            high = middle;
    }
    assert(step->net->tensors[low].data == tensor && step->places[low] >= 0);
    return sida_step_array(step, which) + step->places[low];
}

size_t sida_step_score_bytes(const sida_step_cuda *step, int32_t sequences, int32_t q_longest,
                             int32_t k_longest) {
    for (;; sequences = (sequences + 1) / 2) {
        size_t bytes = step->kind->score_bytes(step, sequences, q_longest, k_longest);
        if (sequences <= 1 || bytes <= SIDA_STEP_SCORE_BYTES) return bytes;
    }
}

static size_t scratch_bytes(const sida_step_cuda *step, const sida_feed_limits *limits) {
    const sida_net_config *c = &step->config;
    size_t most = 0;
    for (int side = 0; side < 2; side++) {
        int64_t width = sida_step_larger((int64_t)step->kind->embeddings * c->d_model,
                                         (int64_t)c->layers[side] * c->experts);
        size_t chunk =
            (size_t)(sida_step_smaller(limits->tokens[side], SIDA_STEP_CHUNK_ROWS) * width) *
            sizeof(float);
        if (chunk > most) most = chunk;
        for (int keys = 0; keys <= side; keys++) {
            if (limits->longest[side] == 0 || limits->longest[keys] == 0) continue;
            /* sida_step_score_bytes() of any part is at most this. */
            size_t one =
                step->kind->score_bytes(step, 1, limits->longest[side], limits->longest[keys]);
            size_t all = step->kind->score_bytes(step, limits->sequences, limits->longest[side],
                                                 limits->longest[keys]);
            if (all > SIDA_STEP_SCORE_BYTES) all = SIDA_STEP_SCORE_BYTES;
            if (one > most) most = one;
            if (all > most) most = all;
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

static void lay_work(sida_step_cuda *step, sida_step_layout *at, const sida_feed_limits *limits) {
    const sida_net_config *c = &step->config;
    int64_t h = c->hidden;
    int64_t outputs = sida_step_larger(c->layers[0], c->layers[1]) * (int64_t)c->experts;
    for (int side = 0; side < 2; side++)
        step->sides[side].mixed =
            sida_step_floats(at, sida_step_present(step, side) ? limits->tokens[side] : 0, h);
    step->d_outs = sida_step_floats(at, limits->tokens[0] + limits->tokens[1], h);
    step->kind->lay(step, at, limits);
    step->scratch_bytes = scratch_bytes(step, limits);
    step->scratch = sida_step_area(at, (int64_t)step->scratch_bytes, 1, 1);
    int64_t sums =
        (int64_t)SIDA_COLUMN_SUM_BYTES(sida_step_larger(outputs, step->kind->widest(step)));
    step->sums = sida_step_area(at, sums, 1, 1);
    step->beside.sums = sida_step_area(at, sums, 1, 1);
    for (int side = 0; side < 2; side++)
        step->partials[side] = sida_step_area(at, SIDA_TRAIN_PARTIALS, 1, sizeof(double));
    step->finish = sida_step_area(at, SIDA_TRAIN_FINISH_BYTES, 1, 1);
    for (int i = 0; i < SIDA_STEPS_AHEAD; i++)
        step->results[i] = sida_step_area(at, step->results_most, 1, sizeof **step->results);
}

static void lay_host(sida_step_cuda *step, sida_step_layout *at) {
    for (int i = 0; i < SIDA_STEPS_AHEAD; i++)
        step->host_results[i] =
            sida_step_area(at, step->results_most, 1, sizeof **step->host_results);
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
    sida_step_layout at = {0}, host = {0};
    if (step->host && covers(&step->limits, limits)) return SIDA_OK;
    SIDA_TRY(wait_for_all(step));
    /* What is there goes first: the two do not have to fit together. */
    sida_buffer_destroy(step->work);
    sida_buffer_destroy(step->host);
    step->work = step->host = NULL;
    step->limits = *limits;
    if (step->kind->reserve) SIDA_TRY(step->kind->reserve(step, limits));
    if (!step->staging) SIDA_TRY(make_parameters(step));
    step->results_most = results_of(limits);
    lay_work(step, &at, limits);
    SIDA_TRY(sida_buffer_create(backend, &step->work, SIDA_MEMORY_DEVICE, at.used,
                                "a training step's activations"));
    lay_work(step, &(sida_step_layout){.base = step->work->data}, limits);
    SIDA_TRY(sida_zero_cuda(step->stream, step->sums, SIDA_COLUMN_SUM_COUNTS));
    SIDA_TRY(sida_zero_cuda(step->stream, step->beside.sums, SIDA_COLUMN_SUM_COUNTS));
    SIDA_TRY(sida_zero_cuda(step->stream, step->finish, SIDA_TRAIN_FINISH_COUNT));
    lay_host(step, &host);
    SIDA_TRY(sida_buffer_create(backend, &step->host, SIDA_MEMORY_HOST, host.used,
                                "a training step's results"));
    lay_host(step, &(sida_step_layout){.base = step->host->data});
out:
    return status;
}

/* --- parameters and moments */

/* Copies one array of the state's order to the device's, or back. */
static void reorder(const sida_step_cuda *step, const sida_net *net, float *theirs, float *ours,
                    bool back) {
    if (!back) memset(ours, 0, (size_t)step->count * sizeof(float));
    for (int32_t i = 0; i < net->tensor_count; i++) {
        const sida_net_tensor *t = &net->tensors[i];
        if (step->places[i] < 0) continue;
        float *there = theirs + (t->data - net->parameters), *here = ours + step->places[i];
        memcpy(back ? there : here, back ? here : there, (size_t)t->count * sizeof(float));
    }
    for (int side = 0; side < 2; side++) {
        const sida_net_trunk *t = &net->trunks[side];
        sida_rnn *rnn = step->lstm.rnn[side];
        sida_rnn_weights lstm[SIDA_NET_CELLS_MAX]; /* both count directions alike */
        if (!rnn) continue;
        for (int l = 0; l < net->config.lstm_layers * sida_net_directions(&net->config, side); l++)
            lstm[l] = (sida_rnn_weights){
                .input_weight = theirs + (t->input[l].weight - net->parameters),
                .input_bias = theirs + (t->input[l].bias - net->parameters),
                .recurrent_weight = theirs + (t->recurrent[l].weight - net->parameters),
                .recurrent_bias = theirs + (t->recurrent[l].bias - net->parameters)};
        if (back)
            sida_rnn_unpack(rnn, lstm, ours + step->lstms[side]);
        else
            sida_rnn_pack(rnn, ours + step->lstms[side], lstm);
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
