/* A fixed hash of the token id for each layer, as a hash source. File: /hash/SIDE/experts
 * u16 [vocabulary, layers], the first rank; /hash/SIDE/alpha f32 [layers, top_k]. */
#include "formats/base/memory.h"
#include "formats/base/rng.h"
#include "runtime/predictor/sources.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct layer_hash {
    sida_hash_source base;
    sida_layer_hash kind;
    int64_t seed;
    int32_t vocabulary, top_k;
    uint16_t *experts[2]; /* [vocabulary, layers] */
    float *alpha[2];      /* [layers, top_k]: of the first ranks */
} layer_hash;

const char *sida_layer_hash_name(sida_layer_hash kind) {
    return kind == SIDA_LAYER_HASH_BALANCED ? "balanced" : "random";
}

static void layer_hash_destroy(sida_hash_source *source) {
    layer_hash *self = (layer_hash *)source;
    for (int side = 0; side < 2; side++) {
        free(self->experts[side]);
        free(self->alpha[side]);
    }
    free(self);
}

static sida_status layer_hash_state_create(const sida_hash_source *source, sida_hash_state **out) {
    (void)source;
    return sida_alloc((void **)out, 1, 1, "a hash's state"); /* nothing has to be remembered */
}

static void layer_hash_state_destroy(sida_hash_state *state) {
    free(state);
}

static sida_status look_up(const sida_hash_source *source, int side, const sida_ragged *input,
                           int32_t k, sida_hash_table *out) {
    const layer_hash *self = (const layer_hash *)source;
    int32_t layers = source->info.layers[side], experts = source->info.experts;
    int64_t n = sida_ragged_tokens(input);
    sida_status status = sida_hash_table_reserve(out, side, layers, k, n);
    if (status != SIDA_OK) return status;
    for (int64_t i = 0; i < n; i++) {
        int32_t id = input->ids[i];
        if (id < 0 || id >= self->vocabulary)
            return sida_fail(SIDA_ERROR_FORMAT, "token id %d: the hash is of %d ids", id,
                             self->vocabulary);
        for (int32_t l = 0; l < layers; l++) {
            const float *known = self->alpha[side] + (int64_t)l * self->top_k;
            float rest = 1;
            for (int32_t r = 0; r < self->top_k; r++) rest -= known[r];
            rest = experts > self->top_k && rest > 0 ? rest / (float)(experts - self->top_k) : 0;
            int32_t first = self->experts[side][(int64_t)id * layers + l];
            int64_t at = (i * layers + l) * k;
            for (int32_t r = 0; r < k; r++) {
                out->experts[at + r] = (uint16_t)((first + r) % experts);
                out->alpha[at + r] = r < self->top_k ? known[r] : rest;
            }
        }
    }
    return SIDA_OK;
}

static sida_status layer_hash_encode(const sida_hash_source *source, sida_hash_state *state,
                                     const sida_ragged *input, int32_t k, sida_hash_table *out) {
    (void)state;
    return look_up(source, 0, input, k, out);
}

static sida_status layer_hash_decode(const sida_hash_source *source, sida_hash_state *state,
                                     const sida_ragged *step, int32_t k, sida_hash_table *out) {
    (void)state;
    return look_up(source, 1, step, k, out);
}

static const sida_hash_source_table layer_hash_table = {.destroy = layer_hash_destroy,
                                                        .state_create = layer_hash_state_create,
                                                        .state_destroy = layer_hash_state_destroy,
                                                        .encode = layer_hash_encode,
                                                        .decode = layer_hash_decode};

static sida_status allocate(layer_hash **out, const sida_source_shape *shape, int32_t top_k,
                            sida_fingerprint model, sida_fingerprint tokenizer) {
    sida_status status = SIDA_OK;
    layer_hash *self;
    SIDA_TRY(SIDA_ALLOC(out, 1, "a layer hash"));
    self = *out;
    self->vocabulary = shape->vocabulary;
    self->top_k = top_k;
    self->base.table = &layer_hash_table;
    self->base.info = (sida_hash_source_info){.name = "layer-hash",
                                              .model = model,
                                              .tokenizer = tokenizer,
                                              .d_model = shape->d_model,
                                              .experts = shape->experts,
                                              .layers = {shape->layers[0], shape->layers[1]}};
    for (int side = 0; side < 2; side++) {
        size_t layers = (size_t)shape->layers[side], ids = (size_t)shape->vocabulary * layers;
        SIDA_TRY(SIDA_ALLOC(&self->experts[side], ids, "a layer hash"));
        SIDA_TRY(SIDA_ALLOC(&self->alpha[side], layers * (size_t)top_k, "a layer hash"));
        self->base.info.bytes += ids * sizeof(uint16_t) + layers * (size_t)top_k * sizeof(float);
    }
out:
    return status;
}

/* --- making one */

typedef struct ranked_id {
    int64_t count;
    uint64_t draw; /* the order of ids that are as frequent: another one for each layer */
    int32_t id;
} ranked_id;

static int compare_ranked(const void *a, const void *b) {
    const ranked_id *x = a, *y = b;
    if (x->count != y->count) return x->count > y->count ? -1 : 1;
    if (x->draw != y->draw) return x->draw < y->draw ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

/* Deals ids [count], most frequent first, each to the expert with the fewest tokens; among those as
 * full to the first behind `start`. */
static void deal(uint16_t *to, int32_t stride, const ranked_id *ids, int32_t count, int64_t *load,
                 int32_t experts, int32_t start) {
    memset(load, 0, (size_t)experts * sizeof *load);
    for (int32_t i = 0; i < count; i++) {
        int32_t best = start;
        for (int32_t j = 1; j < experts; j++) {
            int32_t e = (start + j) % experts;
            if (load[e] < load[best]) best = e;
        }
        load[best] += ids[i].count;
        to[(int64_t)ids[i].id * stride] = (uint16_t)best;
    }
}

static sida_status fill_side(layer_hash *self, const sida_routed *from, int side) {
    sida_status status = SIDA_OK;
    int32_t layers = from->shape.layers[side], experts = from->shape.experts;
    int64_t n = layers > 0 ? sida_ragged_tokens(&from->tokens[side]) : 0, *counts = NULL;
    int64_t *load = NULL;
    ranked_id *ids = NULL;
    SIDA_TRY(SIDA_ALLOC(&counts, self->vocabulary, "a layer hash"));
    SIDA_TRY(SIDA_ALLOC(&ids, self->vocabulary, "a layer hash"));
    SIDA_TRY(SIDA_ALLOC(&load, experts, "a layer hash"));
    for (int64_t i = 0; i < n; i++) counts[from->tokens[side].ids[i]]++;
    for (int32_t l = 0; l < layers; l++) {
        /* Two draws keep neighbouring seeds, sides and layers apart. */
        sida_rng rng = sida_rng_seed((uint64_t)self->seed);
        rng = sida_rng_seed(sida_rng_u64(&rng) + (uint64_t)side * 65536 + (uint64_t)l);
        rng = sida_rng_seed(sida_rng_u64(&rng));
        int32_t start = (int32_t)sida_rng_below(&rng, (uint32_t)experts), seen = 0;
        uint16_t *to = self->experts[side] + l;
        for (int32_t id = 0; id < self->vocabulary; id++) {
            uint64_t draw = sida_rng_u64(&rng);
            to[(int64_t)id * layers] = (uint16_t)sida_rng_below(&rng, (uint32_t)experts);
            if (counts[id] > 0) ids[seen++] = (ranked_id){counts[id], draw, id};
        }
        if (self->kind != SIDA_LAYER_HASH_BALANCED) continue;
        qsort(ids, (size_t)seen, sizeof *ids, compare_ranked);
        deal(to, layers, ids, seen, load, experts, start);
    }
    for (int32_t l = 0; l < layers; l++)
        for (int32_t r = 0; r < self->top_k; r++) {
            double sum = 0;
            for (int64_t i = 0; i < n; i++)
                sum += (double)from->alpha[side][(i * layers + l) * self->top_k + r];
            double mean = n > 0 ? sum / (double)n : 1.0 / experts;
            self->alpha[side][(int64_t)l * self->top_k + r] = (float)mean;
        }
out:
    free(counts);
    free(ids);
    free(load);
    return status;
}

sida_status sida_layer_hash_source_create(sida_hash_source **out, sida_layer_hash kind,
                                          uint64_t seed, const sida_routed *from) {
    *out = NULL;
    sida_status status = SIDA_OK;
    layer_hash *self = NULL;
    SIDA_TRY(allocate(&self, &from->shape, from->top_k, from->model, from->tokenizer));
    self->kind = kind;
    self->seed = (int64_t)seed;
    for (int side = 0; side < 2; side++) SIDA_TRY(fill_side(self, from, side));
    *out = &self->base;
    self = NULL;
out:
    if (self) layer_hash_destroy(&self->base);
    return status;
}

/* --- files */

static const char *const expert_paths[2] = {"hash/encoder/experts", "hash/decoder/experts"};
static const char *const alpha_paths[2] = {"hash/encoder/alpha", "hash/decoder/alpha"};

sida_status sida_layer_hash_source_write(const sida_hash_source *source, const char *path,
                                         const json_t *about) {
    sida_status status = SIDA_OK;
    const layer_hash *self = (const layer_hash *)source;
    sida_h5_file *file = NULL;
    json_t *settings = json_pack("{s:s, s:I, s:i}", "kind", sida_layer_hash_name(self->kind),
                                 "seed", (json_int_t)self->seed, "top_k", self->top_k);
    SIDA_TRY(
        sida_source_file_create(&file, path, &source->info, self->vocabulary, settings, about));
    for (int side = 0; side < 2; side++) {
        int64_t layers = source->info.layers[side];
        const int64_t ids[2] = {self->vocabulary, layers}, ranks[2] = {layers, self->top_k};
        if (layers == 0) continue;
        SIDA_TRY(sida_h5_write(file, expert_paths[side], SIDA_H5_U16, 2, ids, self->experts[side]));
        SIDA_TRY(sida_h5_write(file, alpha_paths[side], SIDA_H5_F32, 2, ranks, self->alpha[side]));
    }
    status = sida_h5_commit(file);
    file = NULL;
out:
    sida_h5_abandon(file);
    return status;
}

static sida_status check_extents(sida_h5_file *file, const char *path, sida_h5_type type,
                                 int64_t rows, int64_t cols) {
    int64_t shape[2];
    sida_status status = sida_h5_shape(file, path, type, 2, shape);
    if (status != SIDA_OK || (shape[0] == rows && shape[1] == cols)) return status;
    return sida_fail(SIDA_ERROR_FORMAT,
                     "%s: %s is [%" PRId64 ", %" PRId64 "], its config says [%" PRId64 ", %" PRId64
                     "]",
                     sida_h5_path(file), path, shape[0], shape[1], rows, cols);
}

static sida_status read_side(layer_hash *self, sida_h5_file *file, int side) {
    sida_status status = SIDA_OK;
    int64_t layers = self->base.info.layers[side];
    const char *path = sida_h5_path(file);
    SIDA_TRY(sida_h5_read_rows(file, expert_paths[side], SIDA_H5_U16, 0, self->vocabulary,
                               self->experts[side]));
    SIDA_TRY(sida_h5_read_rows(file, alpha_paths[side], SIDA_H5_F32, 0, layers, self->alpha[side]));
    for (int64_t i = 0; i < self->vocabulary * layers; i++)
        if (self->experts[side][i] >= self->base.info.experts)
            SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: %s has expert %d of %d", path, expert_paths[side],
                      self->experts[side][i], self->base.info.experts);
    for (int64_t i = 0; i < layers * self->top_k; i++)
        if (!isfinite(self->alpha[side][i]) || self->alpha[side][i] < 0)
            SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: %s has a factor of %g", path, alpha_paths[side],
                      (double)self->alpha[side][i]);
out:
    return status;
}

sida_status sida_layer_hash_source_read(sida_hash_source **out, sida_h5_file *file,
                                        const sida_predictor_meta *meta, sida_weight embedding) {
    *out = NULL;
    sida_status status = SIDA_OK;
    layer_hash *self = NULL;
    sida_source_shape shape;
    const json_t *settings;
    int64_t top_k;
    const char *path = sida_h5_path(file);
    SIDA_TRY(sida_source_file_shape(&shape, &settings, meta, path));
    SIDA_TRY(sida_source_setting(&top_k, settings, "top_k", 1, shape.experts, path));
    SIDA_TRY(sida_source_check_embedding(path, &shape, embedding));
    /* A small file must not make us take much memory. */
    for (int side = 0; side < 2; side++) {
        if (shape.layers[side] == 0) continue;
        SIDA_TRY(check_extents(file, expert_paths[side], SIDA_H5_U16, shape.vocabulary,
                               shape.layers[side]));
        SIDA_TRY(check_extents(file, alpha_paths[side], SIDA_H5_F32, shape.layers[side], top_k));
    }
    SIDA_TRY(allocate(&self, &shape, (int32_t)top_k, meta->model, meta->tokenizer));
    for (int side = 0; side < 2; side++)
        if (shape.layers[side] > 0) SIDA_TRY(read_side(self, file, side));
    *out = &self->base;
    self = NULL;
out:
    if (self) layer_hash_destroy(&self->base);
    return status;
}
