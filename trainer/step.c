#include "trainer/step.h"

#include "formats/base/memory.h"
#include "trainer/gradient.h"
#include "trainer/learner.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Sequences of a shard: enough to fill the products, few enough to keep every core busy. More where
 * a batch would give more shards than this, as each has a gradient of its own. */
enum { shard_sequences = 4, shards_most = 8 };

typedef struct shard {
    sida_minibatch batch;
    sida_net_pass *pass;
    sida_net *gradient;
    sida_gradient_workspace workspace;
    float *d_logits[2];
    double *losses;
    size_t logit_items[2], loss_items;
    double sum;
    sida_status status;
    char message[512]; /* a thread's own is not seen by the others */
} shard;

struct sida_step {
    const sida_net *net;
    shard *shards;
    int32_t shard_count, shard_size;
    sida_tkd tkd;
    double lambda;
};

sida_status sida_step_create(sida_step **out, const sida_net *net, int32_t batch, sida_tkd tkd,
                             double lambda) {
    *out = NULL;
    sida_status status = SIDA_OK;
    sida_step *step = NULL;
    assert(batch > 0);
    SIDA_TRY(SIDA_ALLOC(&step, 1, "a training step"));
    step->net = net;
    step->tkd = tkd;
    step->lambda = lambda;
    step->shard_size = (batch - 1) / shards_most + 1;
    if (step->shard_size < shard_sequences) step->shard_size = shard_sequences;
    int32_t count = (batch - 1) / step->shard_size + 1;
    SIDA_TRY(SIDA_ALLOC(&step->shards, count, "a training step"));
    step->shard_count = count;
    for (int32_t i = 0; i < count; i++) {
        SIDA_TRY(sida_net_create(&step->shards[i].gradient, &net->config));
        SIDA_TRY(sida_net_pass_create(&step->shards[i].pass, net, true));
    }
    *out = step;
    step = NULL;
out:
    sida_step_destroy(step);
    return status;
}

void sida_step_destroy(sida_step *step) {
    if (!step) return;
    for (int32_t i = 0; i < step->shard_count; i++) {
        shard *s = &step->shards[i];
        sida_minibatch_free(&s->batch);
        sida_net_pass_destroy(s->pass);
        sida_net_destroy(s->gradient);
        sida_gradient_workspace_free(&s->workspace);
        for (int side = 0; side < 2; side++) free(s->d_logits[side]);
        free(s->losses);
    }
    free(step->shards);
    free(step);
}

sida_net *sida_step_get_gradient(sida_step *step) {
    return step->shards[0].gradient;
}

static sida_status add_loss(const sida_step *step, shard *s, int side, int32_t top,
                            int32_t label_count, float scale) {
    sida_status status = SIDA_OK;
    const sida_net_config *c = &step->net->config;
    const sida_minibatch_side *batch = &s->batch.sides[side];
    int64_t pairs = sida_ragged_tokens(&batch->tokens) * c->layers[side];
    double sum = 0;
    SIDA_TRY(SIDA_GROW(&s->d_logits[side], &s->logit_items[side],
                       (size_t)pairs * (size_t)c->experts + 1, "the loss of a batch"));
    SIDA_TRY(SIDA_GROW(&s->losses, &s->loss_items, (size_t)pairs + 1, "the loss of a batch"));
    SIDA_TRY(sida_loss(&sum, &(sida_loss_call){.d_logits = s->d_logits[side],
                                               .losses = s->losses,
                                               .logits = s->pass->sides[side].logits,
                                               .top_ids = batch->top_ids,
                                               .top_logp = batch->top_logp,
                                               .labels = batch->labels,
                                               .label_weights = batch->label_weights,
                                               .label_count = label_count,
                                               .pairs = pairs,
                                               .experts = c->experts,
                                               .top = top,
                                               .tkd = step->tkd,
                                               .lambda = (float)step->lambda,
                                               .scale = scale}));
    s->sum += sum;
out:
    return status;
}

static sida_status run_shard(const sida_step *step, shard *s, const sida_dataset *data,
                             const int32_t *order, int32_t count, float scale) {
    sida_status status = SIDA_OK;
    const sida_net_config *c = &step->net->config;
    sida_weight embedding = sida_dataset_embedding(data);
    s->sum = 0;
    memset(s->gradient->parameters, 0, (size_t)s->gradient->parameter_count * sizeof(float));
    SIDA_TRY(sida_minibatch_fill(&s->batch, data, order, count));
    SIDA_TRY(sida_net_encode(s->pass, embedding, &s->batch.sides[0].tokens));
    if (c->layers[1] > 0) SIDA_TRY(sida_net_decode(s->pass, embedding, &s->batch.sides[1].tokens));
    for (int side = 0; side < 2; side++)
        if (c->layers[side] > 0) SIDA_TRY(add_loss(step, s, side, data->top, data->top_k, scale));
    if (!isfinite(s->sum)) SIDA_TRY(sida_learner_bad_loss(data));
    SIDA_TRY(sida_gradient_add(s->gradient, &s->workspace, s->pass,
                               (const float *const[2]){c->layers[0] > 0 ? s->d_logits[0] : NULL,
                                                       c->layers[1] > 0 ? s->d_logits[1] : NULL}));
out:
    return status;
}

/* All shards' gradients into the first's, in order. */
static void add_gradients(sida_step *step, int32_t shards) {
    enum { block = 4096 };
    int64_t total = step->net->parameter_count;
    float *to = step->shards[0].gradient->parameters;
#pragma omp parallel for schedule(static) if (shards > 1 && total > 1 << 16)
    for (int64_t first = 0; first < total; first += block) {
        int64_t last = first + block < total ? first + block : total;
        for (int32_t s = 1; s < shards; s++) {
            const float *from = step->shards[s].gradient->parameters;
            for (int64_t i = first; i < last; i++) to[i] += from[i];
        }
    }
}

sida_status sida_step_gradient(sida_step *step, double *sum, int64_t *pairs,
                               const sida_dataset *data, const int32_t *order, int32_t count) {
    int32_t size = step->shard_size, shards = count > 0 ? (count - 1) / size + 1 : 0;
    assert(shards <= step->shard_count);
    *sum = 0;
    *pairs = 0;
    for (int side = 0; side < 2; side++)
        for (int32_t i = 0; i < count; i++) {
            const int64_t *offsets = data->sides[side].offsets + order[i];
            *pairs += (offsets[1] - offsets[0]) * step->net->config.layers[side];
        }
    float scale = *pairs > 0 ? 1.0f / (float)*pairs : 0;
    /* A batch of one shard leaves the threads to the ops inside. */
#pragma omp parallel for schedule(dynamic, 1) if (shards > 1)
    for (int32_t i = 0; i < shards; i++) {
        shard *s = &step->shards[i];
        int32_t first = i * size, rest = count - first;
        s->status = run_shard(step, s, data, order + first, rest < size ? rest : size, scale);
        if (s->status != SIDA_OK)
            snprintf(s->message, sizeof s->message, "%s", sida_last_message());
    }
    for (int32_t i = 0; i < shards; i++) {
        shard *s = &step->shards[i];
        if (s->status != SIDA_OK) return sida_fail(s->status, "%s", s->message);
        *sum += s->sum;
    }
    add_gradients(step, shards);
    return SIDA_OK;
}
