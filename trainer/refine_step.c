#include "trainer/refine_step.h"

#include "formats/base/memory.h"
#include "runtime/ops/gemm.h"
#include "trainer/gradient_private.h"
#include "trainer/learner.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Tokens of a shard, more where that would be more shards than this. All of a side's are one where
 * there are so many parameters that a gradient for each shard costs more than it saves. */
enum { shard_tokens = 32, shards_most = 8, many_parameters = 1 << 22 };

/* Last known layers that a shard trains with, about. */
enum { last_most = 4 };

/* What a shard of n tokens of a side with L layers needs; d_* are gradients. Of layers it has the
 * L - 1 behind the first, layer by layer, so that those behind a known one are a block's end. */
typedef struct shard {
    sida_refine *gradient;
    float *f;                     /* [n, h] features */
    float *sum, *d_sum;           /* [n, R] */
    float *z, *d_z;               /* [n, R]; [L - 1, n, R] by the last known layer */
    float *s, *scores, *d_scores; /* [L - 1, n, E] s: the network's */
    uint16_t *labels;             /* [L - 1, n, k] */
    float *label_weights;
    uint16_t *top_ids, *top_logp; /* [L - 1, n, top] */
    double *losses;               /* [L - 1, n] */
    uint16_t *token_labels;       /* [L, k] of one token */
    float *token_weights;
    double loss;
    sida_status status;
    char message[512]; /* a thread's own is not seen by the others */
} shard;

struct sida_refine_step {
    const sida_refine *refine;
    const sida_net *net;
    const sida_dataset *data;
    const float *features[2];
    shard *shards;
    int32_t shard_count, shard_size;
    sida_tkd tkd;
    double lambda;
};

/* A side's sizes. */
typedef struct sizes {
    int64_t width, hidden, experts, steps; /* R, h, E, L - 1 */
} sizes;

static sizes sizes_of(const sida_refine *refine, int side) {
    return (sizes){refine->width, refine->net.hidden, refine->net.experts,
                   refine->net.layers[side] - 1};
}

/* Whether a shard with that turn trains with layer l the last known one. All do where a side has
 * few layers, as that costs little; otherwise every so many-th. */
static bool is_last(int64_t steps, int64_t l, uint32_t turn) {
    const int64_t stride = (steps - 1) / last_most + 1;
    return l % stride == (int64_t)turn % stride;
}

/* Room for a shard of either side. */
static sida_status shard_create(shard *to, const sida_refine_step *step) {
    sida_status status = SIDA_OK;
    const char what[] = "a refinement's training step";
    const size_t n = (size_t)step->shard_size, k = (size_t)step->data->top_k,
                 top = (size_t)step->data->top;
    const int32_t *layers = step->refine->net.layers;
    const sizes z = sizes_of(step->refine, layers[0] < layers[1]);
    const size_t pairs = n * (size_t)z.steps, scores = pairs * (size_t)z.experts;
    const size_t row = n * (size_t)z.width;
    SIDA_TRY(sida_refine_create(&to->gradient, &step->refine->net, step->refine->width));
    SIDA_TRY(SIDA_ALLOC(&to->f, n * (size_t)z.hidden, what));
    SIDA_TRY(SIDA_ALLOC(&to->s, scores, what));
    SIDA_TRY(SIDA_ALLOC(&to->sum, row, what));
    SIDA_TRY(SIDA_ALLOC(&to->d_sum, row, what));
    SIDA_TRY(SIDA_ALLOC(&to->z, row, what));
    SIDA_TRY(SIDA_ALLOC(&to->d_z, row * (size_t)z.steps, what));
    SIDA_TRY(SIDA_ALLOC(&to->scores, scores, what));
    SIDA_TRY(SIDA_ALLOC(&to->d_scores, scores, what));
    SIDA_TRY(SIDA_ALLOC(&to->label_weights, pairs * k, what));
    SIDA_TRY(SIDA_ALLOC(&to->labels, pairs * k, what));
    SIDA_TRY(SIDA_ALLOC(&to->top_ids, pairs * top, what));
    SIDA_TRY(SIDA_ALLOC(&to->top_logp, pairs * top, what));
    SIDA_TRY(SIDA_ALLOC(&to->losses, pairs, what));
    SIDA_TRY(SIDA_ALLOC(&to->token_labels, (size_t)(z.steps + 1) * k, what));
    SIDA_TRY(SIDA_ALLOC(&to->token_weights, (size_t)(z.steps + 1) * k, what));
out:
    return status;
}

sida_status sida_refine_step_create(sida_refine_step **out, const sida_refine *refine,
                                    const sida_net *net, const sida_dataset *data,
                                    const float *const features[2], int32_t tokens, sida_tkd tkd,
                                    double lambda) {
    *out = NULL;
    sida_status status = SIDA_OK;
    sida_refine_step *step = NULL;
    assert(tokens > 0);
    SIDA_TRY(SIDA_ALLOC(&step, 1, "a refinement's training step"));
    *step = (sida_refine_step){.refine = refine,
                               .net = net,
                               .data = data,
                               .features = {features[0], features[1]},
                               .tkd = tkd,
                               .lambda = lambda};
    step->shard_size = (tokens - 1) / shards_most + 1;
    if (step->shard_size < shard_tokens) step->shard_size = shard_tokens;
    if (refine->parameter_count > many_parameters) step->shard_size = tokens;
    const int32_t count = (refine->sides[0].present + refine->sides[1].present) *
                          ((tokens - 1) / step->shard_size + 1);
    SIDA_TRY(SIDA_ALLOC(&step->shards, count, "a refinement's training step"));
    step->shard_count = count;
    for (int32_t i = 0; i < count; i++) SIDA_TRY(shard_create(&step->shards[i], step));
    *out = step;
    step = NULL;
out:
    sida_refine_step_destroy(step);
    return status;
}

void sida_refine_step_destroy(sida_refine_step *step) {
    if (!step) return;
    for (int32_t i = 0; i < step->shard_count; i++) {
        shard *s = &step->shards[i];
        void *const blocks[] = {s->f,
                                s->sum,
                                s->d_sum,
                                s->z,
                                s->d_z,
                                s->s,
                                s->scores,
                                s->d_scores,
                                s->labels,
                                s->label_weights,
                                s->top_ids,
                                s->top_logp,
                                s->losses,
                                s->token_labels,
                                s->token_weights};
        for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++) free(blocks[b]);
        sida_refine_destroy(s->gradient);
    }
    free(step->shards);
    free(step);
}

sida_refine *sida_refine_step_get_gradient(sida_refine_step *step) {
    return step->shards[0].gradient;
}

static sida_net_linear rows_of(const sida_net_linear *layer, int64_t first, int64_t rows) {
    return (sida_net_linear){layer->weight + first * layer->cols,
                             layer->bias ? layer->bias + first : NULL, rows, layer->cols};
}

/* y (+)= x Wᵀ + bias */
static sida_status apply(float *y, const float *x, int64_t n, const sida_net_linear *layer,
                         sida_epilogue epilogue) {
    return sida_linear_gemm_cpu(NULL, &(sida_linear_call){.y = y,
                                                          .ldy = layer->rows,
                                                          .x = x,
                                                          .ldx = layer->cols,
                                                          .n = n,
                                                          .weight = sida_net_weight(layer),
                                                          .bias = layer->bias,
                                                          .scale = 1,
                                                          .epilogue = epilogue});
}

/* Features, labels and teacher. */
static void gather(const sida_refine_step *step, shard *s, int side, const int32_t *index,
                   int64_t n) {
    const sida_dataset *data = step->data;
    const sida_dataset_side *from = &data->sides[side];
    const int64_t layers = data->layers[side], hidden = step->refine->net.hidden;
    const size_t k = (size_t)data->top_k, top = (size_t)data->top;
    for (int64_t i = 0; i < n; i++) {
        memcpy(s->f + i * hidden, step->features[side] + index[i] * hidden,
               (size_t)hidden * sizeof *s->f);
        sida_dataset_labels(s->token_labels, s->token_weights, data, side, index[i], 1);
        for (int64_t m = 1; m < layers; m++) {
            const size_t to = (size_t)((m - 1) * n + i), pair = (size_t)(index[i] * layers + m);
            memcpy(s->labels + to * k, s->token_labels + (size_t)m * k, k * sizeof *s->labels);
            memcpy(s->label_weights + to * k, s->token_weights + (size_t)m * k,
                   k * sizeof *s->label_weights);
            memcpy(s->top_ids + to * top, from->top_ids + pair * top, top * sizeof *s->top_ids);
            memcpy(s->top_logp + to * top, from->top_logp + pair * top, top * sizeof *s->top_logp);
        }
    }
}

/* Adds to the sums the rows of known that a layer's experts have; or to these rows' gradient that
 * of the sums. */
static void know(const sida_refine_step *step, shard *s, int side, int64_t layer,
                 const int32_t *index, int64_t n, bool backward) {
    const sizes z = sizes_of(step->refine, side);
    const int64_t k = step->data->top_k, layers = z.steps + 1;
    for (int64_t i = 0; i < n; i++) {
        const uint16_t *chosen = step->data->sides[side].experts + (index[i] * layers + layer) * k;
        for (int64_t j = 0; j < k; j++) {
            const int64_t row = (layer * z.experts + chosen[j]) * z.width;
            const float *from =
                backward ? s->d_sum + i * z.width : step->refine->sides[side].known + row;
            float *to = backward ? s->gradient->sides[side].known + row : s->sum + i * z.width;
            for (int64_t c = 0; c < z.width; c++) to[c] += from[c];
        }
    }
}

/* The loss of the layers behind `layer`, the last known one, whose experts are in the sums; d_z
 * [n, R] becomes the gradient of what relu reads. */
static sida_status predict(const sida_refine_step *step, shard *s, int side, int64_t layer,
                           float *d_z, int64_t n, float scale) {
    sida_status status = SIDA_OK;
    const sizes z = sizes_of(step->refine, side);
    const sida_refine_side *of = &step->refine->sides[side], *to = &s->gradient->sides[side];
    const int64_t first = layer * n, pairs = (z.steps - layer) * n, k = step->data->top_k;
    const int64_t top = step->data->top;
    const float *bias = of->bias + layer * z.width;
    double loss = 0;
    for (int64_t i = 0; i < n * z.width; i++) {
        const float value = s->sum[i] + bias[i % z.width];
        s->z[i] = value > 0 ? value : 0;
    }
    memcpy(s->scores, s->s + first * z.experts, (size_t)(pairs * z.experts) * sizeof *s->scores);
    for (int64_t m = layer; m < z.steps; m++) {
        const sida_net_linear heads = rows_of(&of->heads, m * z.experts, z.experts);
        SIDA_TRY(
            apply(s->scores + (m - layer) * n * z.experts, s->z, n, &heads, SIDA_EPILOGUE_ADD));
    }
    SIDA_TRY(sida_loss(&loss, &(sida_loss_call){.d_logits = s->d_scores,
                                                .losses = s->losses,
                                                .logits = s->scores,
                                                .top_ids = s->top_ids + first * top,
                                                .top_logp = s->top_logp + first * top,
                                                .labels = s->labels + first * k,
                                                .label_weights = s->label_weights + first * k,
                                                .label_count = (int32_t)k,
                                                .pairs = pairs,
                                                .experts = (int32_t)z.experts,
                                                .top = (int32_t)top,
                                                .tkd = step->tkd,
                                                .lambda = (float)step->lambda,
                                                .scale = scale}));
    s->loss += loss;
    for (int64_t m = layer; m < z.steps; m++) {
        const sida_net_linear heads = rows_of(&of->heads, m * z.experts, z.experts);
        sida_net_linear d_heads = rows_of(&to->heads, m * z.experts, z.experts);
        sida_gradient_linear(&d_heads, &heads, d_z, s->d_scores + (m - layer) * n * z.experts, s->z,
                             n);
    }
    sida_gradient_relu(d_z, s->z, n * z.width);
    sida_column_sum_cpu(to->bias + layer * z.width, d_z, n, z.width);
out:
    return status;
}

static sida_status run_shard(const sida_refine_step *step, shard *s, int side, const int32_t *index,
                             int64_t n, uint32_t turn, float scale) {
    sida_status status = SIDA_OK;
    const sizes z = sizes_of(step->refine, side);
    const sida_net_linear *features = &step->refine->sides[side].features;
    s->loss = 0;
    memset(s->gradient->parameters, 0, (size_t)s->gradient->parameter_count * sizeof(float));
    memset(s->d_sum, 0, (size_t)(n * z.width) * sizeof *s->d_sum);
    memset(s->d_z, 0, (size_t)(z.steps * n * z.width) * sizeof *s->d_z);
    gather(step, s, side, index, n);
    for (int64_t m = 0; m < z.steps; m++) {
        const sida_net_linear heads =
            rows_of(&step->net->trunks[side].heads, (m + 1) * z.experts, z.experts);
        SIDA_TRY(apply(s->s + m * n * z.experts, s->f, n, &heads, SIDA_EPILOGUE_NONE));
    }
    SIDA_TRY(apply(s->sum, s->f, n, features, SIDA_EPILOGUE_NONE));
    for (int64_t l = 0; l < z.steps; l++) {
        know(step, s, side, l, index, n, false);
        if (is_last(z.steps, l, turn))
            SIDA_TRY(predict(step, s, side, l, s->d_z + l * n * z.width, n, scale));
    }
    if (!isfinite(s->loss)) SIDA_TRY(sida_learner_bad_loss(step->data));
    for (int64_t l = z.steps - 1; l >= 0; l--) {
        const float *d_z = s->d_z + l * n * z.width;
        for (int64_t i = 0; i < n * z.width; i++) s->d_sum[i] += d_z[i];
        know(step, s, side, l, index, n, true);
    }
    sida_gradient_linear(&s->gradient->sides[side].features, features, NULL, s->d_sum, s->f, n);
out:
    return status;
}

/* All shards' gradients into the first's, in order. */
static void add_gradients(sida_refine_step *step, int32_t shards) {
    enum { block = 4096 };
    const int64_t total = step->shards[0].gradient->parameter_count;
    float *to = step->shards[0].gradient->parameters;
#pragma omp parallel for schedule(static) if (shards > 1 && total > 1 << 16)
    for (int64_t first = 0; first < total; first += block) {
        const int64_t last = first + block < total ? first + block : total;
        for (int32_t s = 1; s < shards; s++) {
            const float *from = step->shards[s].gradient->parameters;
            for (int64_t i = first; i < last; i++) to[i] += from[i];
        }
    }
}

sida_status sida_refine_step_gradient(sida_refine_step *step, double *sum, int64_t *pairs,
                                      const sida_refine_tokens *tokens) {
    const int32_t size = step->shard_size;
    int32_t firsts[2], shards = 0; /* of a side: its first shard */
    *sum = 0;
    *pairs = 0;
    for (int side = 0; side < 2; side++) {
        const int64_t steps = step->refine->net.layers[side] - 1;
        firsts[side] = shards;
        for (int32_t at = 0; at < tokens->count[side]; at += size, shards++) {
            const int64_t n = tokens->count[side] - at < size ? tokens->count[side] - at : size;
            for (int64_t l = 0; l < steps; l++)
                if (is_last(steps, l, tokens->turn + (uint32_t)shards)) *pairs += n * (steps - l);
        }
    }
    assert(shards > 0 && shards <= step->shard_count);
    const float scale = 1.0f / (float)*pairs;
    /* A single shard leaves the threads to the ops inside. */
#pragma omp parallel for schedule(dynamic, 1) if (shards > 1)
    for (int32_t i = 0; i < shards; i++) {
        shard *s = &step->shards[i];
        const int side = tokens->count[1] > 0 && i >= firsts[1];
        const int32_t first = (i - firsts[side]) * size, rest = tokens->count[side] - first;
        s->status = run_shard(step, s, side, tokens->index[side] + first, rest < size ? rest : size,
                              tokens->turn + (uint32_t)i, scale);
        if (s->status != SIDA_OK)
            snprintf(s->message, sizeof s->message, "%s", sida_last_message());
    }
    for (int32_t i = 0; i < shards; i++) {
        const shard *s = &step->shards[i];
        if (s->status != SIDA_OK) return sida_fail(s->status, "%s", s->message);
        *sum += s->loss;
    }
    add_gradients(step, shards);
    return SIDA_OK;
}
