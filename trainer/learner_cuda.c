/* A learner on a GPU. Three things go on beside each other: a thread prepares the minibatch after
 * the next and a copy stream uploads it (feed.h), the GPU computes a step (step_cuda.h), and the
 * host issues the one behind it. What a step found comes back in a copy of a few bytes, which the
 * host looks at once the two steps after it have been issued. */
#include "formats/base/memory.h"
#include "runtime/ops/ops.h"
#include "runtime/ops/rnn.h"
#include "trainer/feed.h"
#include "trainer/learner.h"
#include "trainer/step_cuda.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Rows of a batch's part, unless the options say how many sequences it has: more would gain little
 * speed, and memory goes by it. */
enum { part_rows = 16384, part_sequences = 8 };

typedef struct cuda_learner {
    sida_learner base;
    int32_t part;  /* sequences of a batch at a time */
    int32_t *rows; /* [vocabulary] of the embedding on the device */
    sida_stream *stream;
    sida_feed *feed;
    sida_step_cuda *step;
    bool uploaded;                     /* the state is on the device */
    bool ahead;                        /* and has been trained on there */
    bool failed;                       /* what is there is not to be used any more */
    int64_t pending[SIDA_STEPS_AHEAD]; /* pairs of steps whose result is not known, oldest first */
    int pending_count;
} cuda_learner;

static void destroy(sida_learner *base) {
    cuda_learner *learner = (cuda_learner *)base;
    sida_step_cuda_destroy(learner->step); /* waits for what reads the feed's buffers */
    sida_feed_destroy(learner->feed);
    sida_stream_destroy(learner->stream);
    free(learner->rows);
    free(learner);
}

/* Takes in the result of the oldest step. */
static sida_status collect(cuda_learner *learner) {
    sida_status status = SIDA_OK;
    sida_train_state *state = learner->base.state;
    double losses, norm;
    SIDA_TRY(sida_step_cuda_result(learner->step, --learner->pending_count, &losses, &norm));
    if (!isfinite(losses)) SIDA_TRY(sida_learner_bad_loss(learner->base.data));
    if (!isfinite(norm)) SIDA_TRY(sida_learner_bad_gradient());
    state->loss_sum += losses;
    state->loss_pairs += learner->pending[0];
    memmove(learner->pending, learner->pending + 1,
            sizeof learner->pending[0] * (SIDA_STEPS_AHEAD - 1));
out:
    if (status != SIDA_OK) learner->failed = true;
    return status;
}

static sida_status finish(sida_learner *base) {
    sida_status status = SIDA_OK;
    cuda_learner *learner = (cuda_learner *)base;
    if (learner->failed) SIDA_FAIL(SIDA_ERROR_CANCELLED, "an earlier step of this training failed");
    while (learner->pending_count > 0) SIDA_TRY(collect(learner));
    if (!learner->ahead) goto out;
    SIDA_TRY(sida_step_cuda_download(learner->step, base->state));
    learner->ahead = false;
out:
    return status;
}

/* With the option that helps; the device reports the one as DEVICE, our own count as BUDGET. */
static sida_status explain(const cuda_learner *learner, sida_status status) {
    if (status != SIDA_ERROR_BUDGET && status != SIDA_ERROR_DEVICE) return status;
    return sida_fail_context(SIDA_ERROR_BUDGET,
                             "no device memory for a step: lower --device-batch, the sequences "
                             "that are computed at a time (now %d)",
                             learner->part);
}

static sida_status begin(sida_learner *base) {
    sida_status status = SIDA_OK;
    cuda_learner *learner = (cuda_learner *)base;
    SIDA_TRY(finish(base));
    status = sida_feed_begin(learner->feed, base->order, base->count);
    if (status == SIDA_OK && base->count > 0)
        status = sida_step_cuda_reserve(learner->step, sida_feed_get_limits(learner->feed));
    if (status != SIDA_OK) status = explain(learner, status);
    if (status != SIDA_OK || learner->uploaded || base->count == 0) goto out;
    SIDA_TRY(sida_step_cuda_upload(learner->step, base->state));
    learner->uploaded = true;
out:
    return status;
}

static int64_t pairs_of(const sida_learner *base, int32_t count) {
    int64_t pairs = 0;
    for (int side = 0; side < 2; side++)
        for (int32_t i = base->next; i < base->next + count; i++) {
            const int64_t *offsets = base->data->sides[side].offsets + base->order[i];
            pairs += (offsets[1] - offsets[0]) * base->data->layers[side];
        }
    return pairs;
}

static sida_status take_step(sida_learner *base, int32_t count, double rate) {
    sida_status status = SIDA_OK;
    cuda_learner *learner = (cuda_learner *)base;
    sida_train_state *state = base->state;
    int64_t pairs = pairs_of(base, count);
    float scale = pairs > 0 ? 1.0f / (float)pairs : 0;
    for (int32_t first = 0; first < count; first += learner->part) {
        sida_feed_part *part;
        SIDA_TRY(sida_feed_take(learner->feed, sida_step_cuda_reader(learner->step), &part));
        SIDA_TRY(sida_step_cuda_add(learner->step, part, scale));
        SIDA_TRY(sida_feed_give(learner->feed, learner->stream, part));
    }
    SIDA_TRY(sida_step_cuda_end(learner->step, &state->optimiser, rate, state->optimiser.step + 1));
    state->optimiser.step++;
    learner->ahead = true;
    learner->pending[learner->pending_count++] = pairs;
    if (learner->pending_count == SIDA_STEPS_AHEAD) SIDA_TRY(collect(learner));
out:
    if (status != SIDA_OK) learner->failed = true;
    return status;
}

/* cuDNN says what it can do only when it is asked to do it. A Transformer needs cuBLAS alone. */
sida_status sida_learner_check_cuda(sida_backend *backend, sida_net_kind kind) {
    sida_status status = SIDA_OK;
    sida_stream *stream = NULL;
    sida_rnn *rnn = NULL;
    SIDA_TRY(sida_stream_create(backend, &stream, SIDA_STREAM_COMPUTE));
    if (kind == SIDA_NET_TRANSFORMER) {
        const sida_ops *ops = sida_ops_of(backend);
        if (ops->prepare) SIDA_TRY(ops->prepare(stream));
        goto out;
    }
    SIDA_TRY(sida_rnn_create(
        &rnn, stream,
        &(sida_rnn_options){.hidden = 64, .layers = 1, .sequences = 1, .longest = 1, .tokens = 1}));
out:
    sida_rnn_destroy(rnn);
    sida_stream_destroy(stream);
    return status;
}

/* Sequences of a part, by the data and the options alone: sums depend on it. */
static int32_t part_of(const sida_dataset *data, const sida_learner_options *options) {
    int64_t longest = 1;
    if (options->device_batch > 0) return options->device_batch;
    for (int side = 0; side < 2; side++)
        for (int32_t i = 0; data->layers[side] > 0 && i < data->sequences; i++) {
            const int64_t *offsets = data->sides[side].offsets + i;
            if (offsets[1] - offsets[0] > longest) longest = offsets[1] - offsets[0];
        }
    int64_t part = part_rows / longest / part_sequences * part_sequences;
    if (part < part_sequences) part = part_sequences;
    return part < options->batch ? (int32_t)part : options->batch;
}

/* Numbers the ids that occur, and gathers their rows of the embedding: in bf16 where that loses
 * nothing, as with a model that is stored so. *storage is to be freed. */
static sida_status gather_embedding(sida_weight *out, void **storage, int32_t *rows,
                                    const sida_dataset *data) {
    sida_status status = SIDA_OK;
    float *table = NULL;
    int32_t count = 0;
    bool exact = true;
    for (int32_t id = 0; id < data->vocabulary; id++) rows[id] = -1;
    for (int side = 0; side < 2; side++)
        for (int64_t i = 0; data->layers[side] > 0 && i < data->sides[side].tokens; i++) {
            int32_t *row = &rows[data->sides[side].ids[i]];
            if (*row < 0) *row = count++;
        }
    SIDA_TRY(SIDA_ALLOC(&table, (int64_t)count * data->d_model + 1, "the embedding"));
    for (int32_t id = 0; id < data->vocabulary; id++) {
        if (rows[id] < 0) continue;
        const float *from = data->embedding + (int64_t)id * data->d_model;
        float *to = table + (int64_t)rows[id] * data->d_model;
        memcpy(to, from, (size_t)data->d_model * sizeof *to);
        for (int32_t k = 0; exact && k < data->d_model; k++) {
            uint32_t bits;
            memcpy(&bits, &from[k], sizeof bits);
            exact = (bits & 0xffff) == 0;
        }
    }
    if (exact) /* the narrower numbers never reach what is still to be read */
        for (int64_t i = 0; i < (int64_t)count * data->d_model; i++) {
            uint32_t bits;
            memcpy(&bits, &table[i], sizeof bits);
            uint16_t narrow = (uint16_t)(bits >> 16);
            memcpy((char *)table + i * (int64_t)sizeof narrow, &narrow, sizeof narrow);
        }
    *out = (sida_weight){table, exact ? SIDA_BF16 : SIDA_F32, count, data->d_model};
    *storage = table;
    table = NULL;
out:
    free(table);
    return status;
}

sida_status sida_learner_create_cuda(sida_learner **out, sida_backend *backend,
                                     sida_train_state *state, const sida_dataset *data,
                                     const sida_learner_options *options) {
    static const sida_learner_table table = {destroy, begin, take_step, finish};
    sida_status status = SIDA_OK;
    cuda_learner *learner = NULL;
    sida_weight embedding;
    void *storage = NULL;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&learner, 1, "a learner"));
    learner->base = (sida_learner){&table, state, data, *options, NULL, 0, 0};
    SIDA_TRY(sida_stream_create(backend, &learner->stream, SIDA_STREAM_COMPUTE));
    learner->part = part_of(data, options);
    SIDA_TRY(SIDA_ALLOC(&learner->rows, data->vocabulary, "the embedding's rows"));
    SIDA_TRY(gather_embedding(&embedding, &storage, learner->rows, data));
    SIDA_TRY(sida_feed_create(&learner->feed, backend, data, options->batch, learner->part,
                              learner->rows));
    status = sida_step_cuda_create(&learner->step, learner->stream, &state->net->config, embedding,
                                   &(sida_step_cuda_options){.tkd = options->tkd,
                                                             .lambda = options->lambda,
                                                             .clip = options->clip,
                                                             .top = data->top,
                                                             .label_count = data->top_k,
                                                             .tf32 = options->tf32});
    if (status != SIDA_OK) goto out;
    *out = &learner->base;
    learner = NULL;
out:
    free(storage);
    if (learner) destroy(&learner->base);
    return status;
}
