/* A baseline: another source's tables with the experts' names drawn anew for each sequence and
 * layer. So as many experts are predicted as there, with the same factors, and they say nothing. */
#include "formats/base/memory.h"
#include "formats/base/rng.h"
#include "runtime/predictor/sources.h"

#include <stdlib.h>

typedef struct random_source {
    sida_hash_source base;
    sida_hash_source *inner; /* owned */
    uint64_t seed;
} random_source;

typedef struct random_state {
    const sida_hash_source *source; /* the inner one, which `inner` is of */
    sida_hash_state *inner;
    uint16_t *names; /* [sequences, layers of both sides, E]: each layer's a permutation */
    size_t capacity;
} random_state;

static const random_source *source_of(const sida_hash_source *source) {
    return (const random_source *)source;
}

static random_state *state_of(sida_hash_state *state) {
    return (random_state *)(void *)state;
}

static void random_destroy(sida_hash_source *source) {
    sida_hash_source_destroy(source_of(source)->inner);
    free(source);
}

static void random_state_destroy(sida_hash_state *state) {
    random_state *self = state_of(state);
    sida_hash_state_destroy(self->source, self->inner);
    free(self->names);
    free(self);
}

static sida_status random_state_create(const sida_hash_source *source, sida_hash_state **out) {
    sida_status status = SIDA_OK;
    random_state *self = NULL;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&self, 1, "a batch's state"));
    self->source = source_of(source)->inner;
    SIDA_TRY(sida_hash_state_create(self->source, &self->inner));
    *out = (sida_hash_state *)(void *)self;
    self = NULL;
out:
    if (self) random_state_destroy((sida_hash_state *)(void *)self);
    return status;
}

static size_t names_of_sequence(const sida_hash_source *source) {
    const sida_hash_source_info *info = &source->info;
    return (size_t)(info->layers[0] + info->layers[1]) * (size_t)info->experts;
}

/* Fisher and Yates; by the sequence's own ids, so that it does not matter where it is. */
static void draw_names(const sida_hash_source *source, uint16_t *names, const int32_t *ids,
                       size_t count) {
    int32_t experts = source->info.experts;
    sida_fingerprint sequence = sida_fingerprint_of(ids, count * sizeof *ids);
    sida_rng rng = sida_rng_seed(source_of(source)->seed ^ sequence.low);
    for (uint16_t *end = names + names_of_sequence(source); names < end; names += experts)
        for (int32_t e = 0; e < experts; e++) {
            int32_t other = (int32_t)sida_rng_below(&rng, (uint32_t)e + 1);
            names[e] = names[other];
            names[other] = (uint16_t)e;
        }
}

static void rename_experts(const sida_hash_source *source, const random_state *state,
                           const int64_t *offsets, int32_t sequences, sida_hash_table *table) {
    size_t experts = (size_t)source->info.experts;
    size_t before = table->side == 1 ? (size_t)source->info.layers[0] * experts : 0;
    for (int32_t s = 0; s < sequences; s++) {
        const uint16_t *names = state->names + (size_t)s * names_of_sequence(source) + before;
        for (int64_t i = offsets[s]; i < offsets[s + 1]; i++)
            for (int32_t layer = 0; layer < table->layers; layer++) {
                uint16_t *row = table->experts + (i * table->layers + layer) * table->k;
                for (int32_t r = 0; r < table->k; r++)
                    row[r] = names[(size_t)layer * experts + row[r]];
            }
    }
}

static sida_status random_encode(const sida_hash_source *source, sida_hash_state *state,
                                 const sida_ragged *input, int32_t k, sida_hash_table *out) {
    random_state *self = state_of(state);
    size_t each = names_of_sequence(source);
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_hash_encode(self->source, self->inner, input, k, out));
    SIDA_TRY(SIDA_GROW(&self->names, &self->capacity, (size_t)input->sequences * each,
                       "experts' names"));
    for (int32_t s = 0; s < input->sequences; s++)
        draw_names(source, self->names + (size_t)s * each, input->ids + input->offsets[s],
                   (size_t)(input->offsets[s + 1] - input->offsets[s]));
    rename_experts(source, self, input->offsets, input->sequences, out);
out:
    return status;
}

static sida_status random_decode(const sida_hash_source *source, sida_hash_state *state,
                                 const sida_ragged *step, int32_t k, sida_hash_table *out) {
    random_state *self = state_of(state);
    sida_status status = sida_hash_decode(self->source, self->inner, step, k, out);
    if (status == SIDA_OK) rename_experts(source, self, step->offsets, step->sequences, out);
    return status;
}

static sida_status random_place(sida_hash_source *source, sida_backend *backend,
                                sida_weight embedding, const sida_hash_limits *limits) {
    sida_hash_source *inner = source_of(source)->inner;
    sida_status status = sida_hash_source_place(inner, backend, embedding, limits);
    source->info.device_bytes = inner->info.device_bytes;
    return status;
}

static const sida_hash_source_table random_table = {.destroy = random_destroy,
                                                    .state_create = random_state_create,
                                                    .state_destroy = random_state_destroy,
                                                    .encode = random_encode,
                                                    .decode = random_decode,
                                                    .place = random_place};

sida_status sida_random_source_create(sida_hash_source **out, sida_hash_source *inner,
                                      uint64_t seed) {
    random_source *self;
    *out = NULL;
    sida_status status = SIDA_ALLOC(&self, 1, "a random source");
    if (status != SIDA_OK) {
        sida_hash_source_destroy(inner);
        return status;
    }
    self->base = (sida_hash_source){.table = &random_table, .info = inner->info};
    self->base.info.name = "random";
    self->base.info.refines = false;
    self->inner = inner;
    self->seed = seed;
    *out = &self->base;
    return SIDA_OK;
}
