/* A learner on a GPU. Three things go on beside each other: a thread prepares the minibatch after
 * the next and a copy stream uploads it (feed.h), the GPU computes a step (step_cuda.h), and the
 * host issues the one behind it. What a step found comes back in a copy of a few bytes, which the
 * host looks at once the following step has been issued. */
#include "formats/base/memory.h"
#include "runtime/ops/rnn.h"
#include "trainer/feed.h"
#include "trainer/learner.h"
#include "trainer/step_cuda.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>

typedef struct cuda_learner {
    sida_learner base;
    sida_stream *stream;
    sida_feed *feed;
    sida_step_cuda *step;
    bool uploaded;      /* the state is on the device */
    bool ahead;         /* and has been trained on there */
    bool failed;        /* what is there is not to be used any more */
    int64_t pending[2]; /* pairs of the steps whose result is not known, the older first */
    int pending_count;
} cuda_learner;

static void destroy(sida_learner *base) {
    cuda_learner *learner = (cuda_learner *)base;
    if (learner->stream) (void)sida_stream_synchronize(learner->stream);
    sida_feed_destroy(learner->feed);
    sida_step_cuda_destroy(learner->step);
    sida_stream_destroy(learner->stream);
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
    learner->pending[0] = learner->pending[1];
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
    const sida_learner_options *o = &learner->base.options;
    if (status != SIDA_ERROR_BUDGET && status != SIDA_ERROR_DEVICE) return status;
    int32_t at_a_time = o->device_batch > 0 ? o->device_batch : o->batch;
    return sida_fail_context(SIDA_ERROR_BUDGET,
                             "no device memory for a step: lower --device-batch, the sequences "
                             "that are computed at a time (now %d)",
                             at_a_time);
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
    int32_t size = base->options.device_batch > 0 ? base->options.device_batch : count;
    int64_t pairs = pairs_of(base, count);
    float scale = pairs > 0 ? 1.0f / (float)pairs : 0;
    for (int32_t first = 0; first < count; first += size) {
        sida_feed_part *part;
        SIDA_TRY(sida_feed_take(learner->feed, learner->stream, &part));
        SIDA_TRY(sida_step_cuda_add(learner->step, part, scale));
        SIDA_TRY(sida_feed_give(learner->feed, learner->stream, part));
    }
    SIDA_TRY(sida_step_cuda_end(learner->step, &state->optimiser, rate, state->optimiser.step + 1));
    state->optimiser.step++;
    learner->ahead = true;
    learner->pending[learner->pending_count++] = pairs;
    if (learner->pending_count > 1) SIDA_TRY(collect(learner));
out:
    if (status != SIDA_OK) learner->failed = true;
    return status;
}

/* cuDNN says what it can do only when it is asked to do it. */
sida_status sida_learner_check_cuda(sida_backend *backend) {
    sida_status status = SIDA_OK;
    sida_stream *stream = NULL;
    sida_rnn *rnn = NULL;
    SIDA_TRY(sida_stream_create(backend, &stream, SIDA_STREAM_COMPUTE));
    SIDA_TRY(sida_rnn_create(
        &rnn, stream,
        &(sida_rnn_options){.hidden = 64, .layers = 1, .sequences = 1, .longest = 1, .tokens = 1}));
out:
    sida_rnn_destroy(rnn);
    sida_stream_destroy(stream);
    return status;
}

sida_status sida_learner_create_cuda(sida_learner **out, sida_backend *backend,
                                     sida_train_state *state, const sida_dataset *data,
                                     const sida_learner_options *options) {
    static const sida_learner_table table = {destroy, begin, take_step, finish};
    sida_status status = SIDA_OK;
    cuda_learner *learner = NULL;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&learner, 1, "a learner"));
    learner->base = (sida_learner){&table, state, data, *options, NULL, 0, 0};
    SIDA_TRY(sida_stream_create(backend, &learner->stream, SIDA_STREAM_COMPUTE));
    SIDA_TRY(
        sida_feed_create(&learner->feed, backend, data, options->batch, options->device_batch));
    status = sida_step_cuda_create(&learner->step, learner->stream, &state->net->config,
                                   sida_dataset_embedding(data),
                                   &(sida_step_cuda_options){.tkd = options->tkd,
                                                             .lambda = options->lambda,
                                                             .clip = options->clip,
                                                             .top = data->top,
                                                             .tf32 = options->tf32});
    if (status != SIDA_OK) goto out;
    *out = &learner->base;
    learner = NULL;
out:
    if (learner) destroy(&learner->base);
    return status;
}
