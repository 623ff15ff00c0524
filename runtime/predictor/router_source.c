/* The model's own routers on the normed input embedding: a baseline that learns nothing. */
#include "formats/base/memory.h"
#include "runtime/ops/embedding.h"
#include "runtime/predictor/select.h"
#include "runtime/predictor/sources.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static const sida_hash_source_table router_table;

typedef struct router_source {
    sida_hash_source base;
    float *weights; /* [layers of both sides] of router [E, d_model] and norm [d_model] */
    sida_weight embedding;
    float epsilon;
} router_source;

/* Room for a batch's tokens; one layer at a time. */
typedef struct router_state {
    float *embedded, *normed, *logits; /* [n, d_model] twice, [n, E] */
    uint64_t *keys;                    /* [E] */
    size_t embedded_items, normed_items, logit_items;
} router_state;

static void router_destroy(sida_hash_source *source) {
    router_source *self = (router_source *)source;
    free(self->weights);
    free(self);
}

static void router_state_destroy(sida_hash_state *state) {
    router_state *self = (router_state *)state;
    free(self->embedded);
    free(self->normed);
    free(self->logits);
    free(self->keys);
    free(self);
}

static sida_status router_state_create(const sida_hash_source *source, sida_hash_state **out) {
    *out = NULL;
    sida_status status = SIDA_OK;
    router_state *self = NULL;
    SIDA_TRY(SIDA_ALLOC(&self, 1, "a router's state"));
    SIDA_TRY(SIDA_ALLOC(&self->keys, source->info.experts, "a router's state"));
    *out = (sida_hash_state *)self;
    self = NULL;
out:
    if (self) router_state_destroy((sida_hash_state *)self);
    return status;
}

/* Room for n tokens. */
static sida_status reserve(const router_source *self, router_state *state, int64_t n) {
    sida_status status = SIDA_OK;
    size_t floats, scores;
    if (sida_mul_overflow((size_t)n, (size_t)self->embedding.cols, &floats) ||
        sida_mul_overflow((size_t)n, (size_t)self->base.info.experts, &scores))
        SIDA_FAIL(SIDA_ERROR_MEMORY, "too many tokens for one batch");
    SIDA_TRY(SIDA_GROW(&state->embedded, &state->embedded_items, floats + 1, "a router's batch"));
    SIDA_TRY(SIDA_GROW(&state->normed, &state->normed_items, floats + 1, "a router's batch"));
    SIDA_TRY(SIDA_GROW(&state->logits, &state->logit_items, scores + 1, "a router's batch"));
out:
    return status;
}

sida_status sida_router_source_apply(const sida_hash_source *source, sida_hash_state *of, int side,
                                     int32_t first, const float *hidden, int64_t n, int32_t k,
                                     sida_hash_table *out) {
    sida_status status = SIDA_OK;
    const router_source *self = (const router_source *)source;
    router_state *state = (router_state *)of;
    int32_t layers = source->info.layers[side], experts = source->info.experts;
    int64_t d = self->embedding.cols;
    assert(source->table == &router_table);
    SIDA_TRY(reserve(self, state, n));
    SIDA_TRY(sida_hash_table_reserve(out, side, layers, k, n));
    for (int32_t l = first; l < layers; l++) {
        int32_t site = l + (side == 1 ? source->info.layers[0] : 0);
        const float *router = self->weights + (int64_t)site * (experts + 1) * d;
        SIDA_TRY(sida_linear_cpu(NULL,
                                 &(sida_linear_call){.y = state->logits,
                                                     .ldy = experts,
                                                     .x = hidden,
                                                     .ldx = d,
                                                     .n = n,
                                                     .weight = {router, SIDA_F32, experts, d},
                                                     .scale = 1,
                                                     .norm = {router + experts * d, SIDA_F32, 1, d},
                                                     .epsilon = self->epsilon,
                                                     .normed = state->normed}));
        for (int64_t i = 0; i < n; i++)
            if (!sida_select_logits(out, i, l, state->logits + i * experts, experts, state->keys))
                SIDA_FAIL(SIDA_ERROR_FORMAT, "the router's scores of a token are not finite");
    }
out:
    return status;
}

static sida_status run(const router_source *self, router_state *state, int side,
                       const sida_ragged *input, int32_t k, sida_hash_table *out) {
    sida_status status = SIDA_OK;
    int64_t n = sida_ragged_tokens(input);
    SIDA_TRY(sida_net_check_ids(self->embedding, input));
    SIDA_TRY(reserve(self, state, n));
    SIDA_TRY(sida_embedding_cpu(NULL, state->embedded, self->embedding, input->ids, n));
    SIDA_TRY(sida_router_source_apply(&self->base, (sida_hash_state *)state, side, 0,
                                      state->embedded, n, k, out));
out:
    return status;
}

static sida_status router_encode(const sida_hash_source *source, sida_hash_state *state,
                                 const sida_ragged *input, int32_t k, sida_hash_table *out) {
    return run((const router_source *)source, (router_state *)state, 0, input, k, out);
}

static sida_status router_decode(const sida_hash_source *source, sida_hash_state *state,
                                 const sida_ragged *step, int32_t k, sida_hash_table *out) {
    return run((const router_source *)source, (router_state *)state, 1, step, k, out);
}

static const sida_hash_source_table router_table = {.destroy = router_destroy,
                                                    .state_create = router_state_create,
                                                    .state_destroy = router_state_destroy,
                                                    .encode = router_encode,
                                                    .decode = router_decode};

/* Values of a stored tensor, which may lie unaligned in its file. */
static float *unpack(float *to, sida_weight from) {
    for (int64_t i = 0; i < from.rows * from.cols; i++, to++) {
        uint16_t half;
        if (from.dtype == SIDA_F32) {
            memcpy(to, (const char *)from.data + i * 4, sizeof *to);
            continue;
        }
        memcpy(&half, (const char *)from.data + i * 2, sizeof half);
        *to = from.dtype == SIDA_F16 ? sida_f16_to_f32(half) : sida_bf16_to_f32(half);
    }
    return to;
}

sida_status sida_router_source_create(sida_hash_source **out, const sida_source_shape *shape,
                                      const sida_router_weights *weights, float epsilon,
                                      sida_weight embedding, sida_fingerprint model,
                                      sida_fingerprint tokenizer) {
    *out = NULL;
    sida_status status = SIDA_OK;
    router_source *self = NULL;
    size_t layers = (size_t)shape->layers[0] + (size_t)shape->layers[1];
    size_t items = layers * ((size_t)shape->experts + 1) * (size_t)shape->d_model;
    SIDA_TRY(sida_source_check_embedding("the model's routers", shape, embedding));
    SIDA_TRY(SIDA_ALLOC(&self, 1, "a router source"));
    SIDA_TRY(SIDA_ALLOC(&self->weights, items, "a router source"));
    self->embedding = embedding;
    self->epsilon = epsilon;
    self->base.table = &router_table;
    self->base.info = (sida_hash_source_info){.name = "router",
                                              .model = model,
                                              .tokenizer = tokenizer,
                                              .d_model = shape->d_model,
                                              .experts = shape->experts,
                                              .layers = {shape->layers[0], shape->layers[1]},
                                              .bytes = items * sizeof(float)};
    float *to = self->weights;
    for (size_t l = 0; l < layers; l++) {
        assert(weights[l].router.rows == shape->experts && weights[l].norm.rows == 1);
        assert(weights[l].router.cols == shape->d_model && weights[l].norm.cols == shape->d_model);
        to = unpack(to, weights[l].router);
        to = unpack(to, weights[l].norm);
    }
    *out = &self->base;
    self = NULL;
out:
    if (self) router_destroy(&self->base);
    return status;
}
