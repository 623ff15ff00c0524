/* The token-id table as a hash source: the bar that a predictor has to clear. */
#include "formats/base/memory.h"
#include "runtime/predictor/select.h"
#include "runtime/predictor/sources.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* The weight of the popularity beside the counts: it only breaks ties and serves unseen ids. */
static const float prior_weight = 0.01f;

typedef struct table_source {
    sida_hash_source base;
    int32_t *ids;
    int32_t id_count;
    uint32_t *counts[2]; /* [id_count, layers, experts] */
    float *prior[2];     /* [layers, experts]: shares */
} table_source;

typedef struct table_state {
    float *scores;
    uint64_t *keys;
} table_state;

static void table_destroy(sida_hash_source *source) {
    table_source *self = (table_source *)source;
    for (int side = 0; side < 2; side++) {
        free(self->counts[side]);
        free(self->prior[side]);
    }
    free(self->ids);
    free(self);
}

static void table_state_destroy(sida_hash_state *state) {
    table_state *self = (table_state *)state;
    free(self->scores);
    free(self->keys);
    free(self);
}

static sida_status table_state_create(const sida_hash_source *source, sida_hash_state **out) {
    *out = NULL;
    sida_status status = SIDA_OK;
    table_state *self = NULL;
    SIDA_TRY(SIDA_ALLOC(&self, 1, "a token table's state"));
    SIDA_TRY(SIDA_ALLOC(&self->scores, source->info.experts, "a token table's state"));
    SIDA_TRY(SIDA_ALLOC(&self->keys, source->info.experts, "a token table's state"));
    *out = (sida_hash_state *)self;
    self = NULL;
out:
    if (self) table_state_destroy((sida_hash_state *)self);
    return status;
}

/* The row of an id, -1 for one that has none. */
static int32_t find(const table_source *self, int32_t id) {
    int32_t low = 0, high = self->id_count;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (self->ids[middle] < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low < self->id_count && self->ids[low] == id ? low : -1;
}

static sida_status look_up(const table_source *self, table_state *state, int side,
                           const sida_ragged *input, int32_t k, sida_hash_table *out) {
    int32_t layers = self->base.info.layers[side], experts = self->base.info.experts;
    int64_t n = sida_ragged_tokens(input);
    sida_status status = sida_hash_table_reserve(out, side, layers, k, n);
    if (status != SIDA_OK) return status;
    for (int64_t i = 0; i < n; i++) {
        int32_t row = find(self, input->ids[i]);
        for (int32_t l = 0; l < layers; l++) {
            const float *prior = self->prior[side] + (int64_t)l * experts;
            const uint32_t *counts =
                row < 0 ? NULL : self->counts[side] + ((int64_t)row * layers + l) * experts;
            for (int32_t e = 0; e < experts; e++)
                state->scores[e] = prior_weight * prior[e] + (counts ? (float)counts[e] : 0);
            sida_select_weights(out, i, l, state->scores, experts, state->keys);
        }
    }
    return SIDA_OK;
}

static sida_status table_encode(const sida_hash_source *source, sida_hash_state *state,
                                const sida_ragged *input, int32_t k, sida_hash_table *out) {
    return look_up((const table_source *)source, (table_state *)state, 0, input, k, out);
}

static sida_status table_decode(const sida_hash_source *source, sida_hash_state *state,
                                const sida_ragged *step, int32_t k, sida_hash_table *out) {
    return look_up((const table_source *)source, (table_state *)state, 1, step, k, out);
}

static const sida_hash_source_table table_table = {.destroy = table_destroy,
                                                   .state_create = table_state_create,
                                                   .state_destroy = table_state_destroy,
                                                   .encode = table_encode,
                                                   .decode = table_decode};

sida_status sida_table_source_create(sida_hash_source **out, const sida_table_shape *shape,
                                     const int32_t *ids, int32_t id_count, sida_fingerprint model,
                                     sida_fingerprint tokenizer) {
    *out = NULL;
    sida_status status = SIDA_OK;
    table_source *self = NULL;
    SIDA_TRY(SIDA_ALLOC(&self, 1, "a token table"));
    self->base.table = &table_table;
    self->base.info = (sida_hash_source_info){.name = "table",
                                              .model = model,
                                              .tokenizer = tokenizer,
                                              .d_model = shape->d_model,
                                              .experts = shape->experts,
                                              .layers = {shape->layers[0], shape->layers[1]}};
    SIDA_TRY(SIDA_ALLOC(&self->ids, id_count, "a token table's ids"));
    memcpy(self->ids, ids, (size_t)id_count * sizeof *ids);
    self->id_count = id_count;
    for (int side = 0; side < 2; side++) {
        size_t row = (size_t)shape->layers[side] * (size_t)shape->experts, items;
        if (sida_mul_overflow(row, (size_t)id_count, &items))
            SIDA_FAIL(SIDA_ERROR_MEMORY, "a token table of %d ids is too large", id_count);
        SIDA_TRY(SIDA_ALLOC(&self->counts[side], items, "a token table's counts"));
        SIDA_TRY(SIDA_ALLOC(&self->prior[side], row, "a token table's popularity"));
        self->base.info.bytes += items * sizeof(uint32_t) + row * sizeof(float);
    }
    sida_table_source_finish(&self->base);
    *out = &self->base;
    self = NULL;
out:
    if (self) table_destroy(&self->base);
    return status;
}

void sida_table_source_add(sida_hash_source *source, int side, const int32_t *tokens,
                           const uint16_t *chosen, int32_t stride, int64_t count) {
    table_source *self = (table_source *)source;
    assert(source->table == &table_table);
    int32_t layers = source->info.layers[side], experts = source->info.experts;
    for (int64_t i = 0; i < count; i++) {
        int32_t row = find(self, tokens[i]);
        for (int32_t l = 0; row >= 0 && l < layers; l++) {
            uint16_t expert = chosen[(i * layers + l) * stride];
            assert(expert < experts);
            self->counts[side][((int64_t)row * layers + l) * experts + expert]++;
        }
    }
}

void sida_table_source_finish(sida_hash_source *source) {
    table_source *self = (table_source *)source;
    assert(source->table == &table_table);
    int32_t experts = source->info.experts;
    for (int side = 0; side < 2; side++) {
        int32_t layers = source->info.layers[side];
        for (int32_t l = 0; l < layers; l++) {
            float *prior = self->prior[side] + (int64_t)l * experts;
            uint64_t total = 0;
            for (int32_t e = 0; e < experts; e++) {
                uint64_t sum = 0;
                for (int64_t i = 0; i < self->id_count; i++)
                    sum += self->counts[side][(i * layers + l) * experts + e];
                prior[e] = (float)sum;
                total += sum;
            }
            for (int32_t e = 0; e < experts; e++)
                prior[e] = total > 0 ? prior[e] / (float)total : 1.0f / (float)experts;
        }
    }
}
