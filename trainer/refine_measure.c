#include "trainer/refine_measure.h"

#include "formats/base/memory.h"
#include "runtime/ops/linear.h"

#include <stdlib.h>
#include <string.h>

/* Tokens that are run and measured at a time. */
enum { pass_tokens = 4096, chunk_tokens = 1024 };

sida_status sida_refine_features(float *out[2], const sida_net *net, const sida_dataset *data,
                                 sida_status (*on_batch)(void *context), void *context) {
    sida_status status = SIDA_OK;
    const size_t hidden = (size_t)net->config.hidden;
    const sida_weight embedding = sida_dataset_embedding(data);
    sida_net_pass *pass = NULL;
    int64_t *offsets = NULL;
    for (int side = 0; side < 2; side++)
        if (data->layers[side] > 1)
            SIDA_TRY(SIDA_ALLOC(&out[side], (size_t)data->sides[side].tokens * hidden,
                                "the features of a trace"));
    SIDA_TRY(SIDA_ALLOC(&offsets, (size_t)data->sequences + 1, "the features of a trace"));
    SIDA_TRY(sida_net_pass_create(&pass, net, false));
    for (int32_t first = 0, last; first < data->sequences; first = last) {
        last = sida_dataset_batch_end(data, first, pass_tokens);
        for (int side = 0; side < 2; side++) {
            const sida_ragged tokens = sida_dataset_slice(data, side, first, last, offsets);
            if (side == 0)
                SIDA_TRY(sida_net_encode(pass, embedding, &tokens));
            else if (out[1])
                SIDA_TRY(sida_net_decode(pass, embedding, &tokens));
            if (out[side])
                memcpy(out[side] + (size_t)data->sides[side].offsets[first] * hidden,
                       pass->sides[side].mixed,
                       (size_t)sida_ragged_tokens(&tokens) * hidden * sizeof(float));
        }
        if (on_batch) SIDA_TRY(on_batch(context));
    }
out:
    sida_net_pass_destroy(pass);
    free(offsets);
    return status;
}

/* Content tokens of one side at a time. */
typedef struct chunk {
    int64_t n, index[chunk_tokens];
    float *f;         /* [n, hidden] */
    float *s;         /* [n, layers, experts] */
    float *scores;    /* [n, layers behind, experts] */
    float *sum, *z;   /* [n, width] */
    int32_t *experts; /* [n, k] */
} chunk;

static sida_status chunk_create(chunk **out, const sida_refine_measure *measure, int32_t width) {
    sida_status status = SIDA_OK;
    const sida_net_config *c = &measure->net->config;
    const char what[] = "measuring a refinement";
    const int32_t layers = c->layers[c->layers[0] < c->layers[1]];
    const size_t scores = (size_t)layers * (size_t)c->experts * chunk_tokens;
    SIDA_TRY(SIDA_ALLOC(out, 1, what));
    SIDA_TRY(SIDA_ALLOC(&(*out)->f, (size_t)c->hidden * chunk_tokens, what));
    SIDA_TRY(SIDA_ALLOC(&(*out)->s, scores, what));
    SIDA_TRY(SIDA_ALLOC(&(*out)->scores, scores, what));
    SIDA_TRY(SIDA_ALLOC(&(*out)->sum, (size_t)width * chunk_tokens, what));
    SIDA_TRY(SIDA_ALLOC(&(*out)->z, (size_t)width * chunk_tokens, what));
    SIDA_TRY(SIDA_ALLOC(&(*out)->experts, (size_t)measure->data->top_k * chunk_tokens, what));
out:
    return status;
}

static void chunk_destroy(chunk *c) {
    if (!c) return;
    free(c->f);
    free(c->s);
    free(c->scores);
    free(c->sum);
    free(c->z);
    free(c->experts);
    free(c);
}

/* The next content tokens from *at on, and what the network says of them. */
static sida_status chunk_fill(chunk *c, const sida_refine_measure *measure, int side, int64_t *at) {
    const sida_dataset_side *from = &measure->data->sides[side];
    const sida_net_linear *heads = &measure->net->trunks[side].heads;
    const size_t hidden = (size_t)measure->net->config.hidden;
    c->n = 0;
    for (; *at < from->tokens && c->n < chunk_tokens; ++*at) {
        if (!sida_dataset_is_content(from, *at)) continue;
        memcpy(c->f + (size_t)c->n * hidden, measure->features[side] + (size_t)*at * hidden,
               hidden * sizeof *c->f);
        c->index[c->n++] = *at;
    }
    return sida_linear_cpu(NULL, &(sida_linear_call){.y = c->s,
                                                     .ldy = heads->rows,
                                                     .x = c->f,
                                                     .ldx = heads->cols,
                                                     .n = c->n,
                                                     .weight = sida_net_weight(heads),
                                                     .bias = heads->bias,
                                                     .scale = 1});
}

/* A layer's chosen experts that are among the k highest of scores [n, ld >= E]. Of equal ones the
 * lower id is the higher. */
static int64_t count_layer(const chunk *c, const sida_refine_measure *measure, int side,
                           int64_t layer, const float *scores, int64_t ld) {
    const sida_dataset *data = measure->data;
    const int64_t layers = data->layers[side], experts = data->experts, k = data->top_k;
    int64_t hits = 0;
#pragma omp parallel for schedule(static) reduction(+ : hits) if (c->n * experts > 1 << 15)
    for (int64_t i = 0; i < c->n; i++) {
        const float *row = scores + i * ld;
        const uint16_t *chosen = data->sides[side].experts + (c->index[i] * layers + layer) * k;
        for (int64_t j = 0; j < k; j++) {
            const float own = row[chosen[j]];
            int64_t above = 0;
            for (int64_t e = 0; e < experts; e++)
                above += row[e] > own || (row[e] == own && e < chosen[j]);
            hits += above < k;
        }
    }
    return hits;
}

/* Adds to a side's rows. refine NULL: up front. */
static sida_status measure_chunk(chunk *c, const sida_refine_measure *measure, int side,
                                 int64_t *hits, const sida_refine *refine) {
    sida_status status = SIDA_OK;
    const sida_dataset *data = measure->data;
    const int32_t layers = data->layers[side], k = data->top_k;
    const int64_t experts = data->experts;
    for (int32_t m = 1; !refine && m < layers; m++) {
        const int64_t found =
            count_layer(c, measure, side, m, c->s + m * experts, layers * experts);
        for (int32_t l = 0; l < m; l++) hits[l] += found;
    }
    if (!refine) return SIDA_OK;
    SIDA_TRY(sida_refine_begin(refine, side, c->sum, c->f, c->n));
    for (int32_t l = 0; l + 1 < layers; l++) {
        for (int64_t i = 0; i < c->n; i++)
            for (int32_t j = 0; j < k; j++)
                c->experts[i * k + j] =
                    data->sides[side].experts[(c->index[i] * layers + l) * k + j];
        sida_refine_know(refine, side, l, c->sum, c->experts, k, c->n);
        SIDA_TRY(sida_refine_scores(refine, side, l, c->scores, c->z, c->sum, c->s, c->n));
        for (int32_t m = l + 1; m < layers; m++)
            hits[l] += count_layer(c, measure, side, m, c->scores + (m - l - 1) * experts,
                                   (layers - 1 - l) * experts);
    }
out:
    return status;
}

sida_status sida_refine_measure_run(const sida_refine_measure *measure, int64_t *hits,
                                    const sida_refine *refine) {
    sida_status status = SIDA_OK;
    chunk *c = NULL;
    memset(hits, 0, (size_t)measure->rows * sizeof *hits);
    SIDA_TRY(chunk_create(&c, measure, refine ? refine->width : 1));
    for (int side = 0; side < 2; side++) {
        if (!measure->features[side]) continue;
        const int64_t tokens = measure->data->sides[side].tokens;
        for (int64_t at = 0; at < tokens;) {
            SIDA_TRY(chunk_fill(c, measure, side, &at));
            SIDA_TRY(measure_chunk(c, measure, side, hits + measure->first[side], refine));
        }
    }
out:
    chunk_destroy(c);
    return status;
}

static void count_slots(sida_refine_measure *measure, int side) {
    const sida_dataset *data = measure->data;
    const int64_t steps = data->layers[side] - 1;
    int64_t tokens = 0;
    for (int64_t i = 0; i < data->sides[side].tokens; i++)
        tokens += sida_dataset_is_content(&data->sides[side], i);
    for (int64_t l = 0; l < steps; l++)
        measure->slots[measure->first[side] + l] = tokens * (steps - l) * data->top_k;
}

sida_status sida_refine_measure_create(sida_refine_measure **out, const sida_net *net,
                                       const sida_dataset *data,
                                       sida_status (*on_batch)(void *context), void *context) {
    *out = NULL;
    sida_status status = SIDA_OK;
    sida_refine_measure *measure = NULL;
    SIDA_TRY(SIDA_ALLOC(&measure, 1, "measuring a refinement"));
    measure->net = net;
    measure->data = data;
    for (int side = 0; side < 2; side++) {
        measure->first[side] = measure->rows;
        if (data->layers[side] > 1) measure->rows += data->layers[side] - 1;
    }
    SIDA_TRY(SIDA_ALLOC(&measure->slots, measure->rows, "measuring a refinement"));
    SIDA_TRY(SIDA_ALLOC(&measure->up_front, measure->rows, "measuring a refinement"));
    SIDA_TRY(sida_refine_features(measure->features, net, data, on_batch, context));
    for (int side = 0; side < 2; side++) count_slots(measure, side);
    SIDA_TRY(sida_refine_measure_run(measure, measure->up_front, NULL));
    *out = measure;
    measure = NULL;
out:
    sida_refine_measure_destroy(measure);
    return status;
}

void sida_refine_measure_destroy(sida_refine_measure *measure) {
    if (!measure) return;
    for (int side = 0; side < 2; side++) free(measure->features[side]);
    free(measure->slots);
    free(measure->up_front);
    free(measure);
}
