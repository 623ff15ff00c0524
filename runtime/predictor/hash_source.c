#include "runtime/predictor/hash_source.h"

#include "formats/base/memory.h"
#include "runtime/predictor/sources.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

void sida_hash_table_free(sida_hash_table *table) {
    free(table->experts);
    free(table->alpha);
    *table = (sida_hash_table){0};
}

sida_status sida_hash_table_reserve(sida_hash_table *table, int32_t side, int32_t layers, int32_t k,
                                    int64_t tokens) {
    sida_status status = SIDA_OK;
    /* Capacity is in rows of the shape that was asked for last. */
    bool same = table->experts && table->layers == layers && table->k == k;
    if (!same || tokens > table->capacity) {
        size_t row = (size_t)layers * (size_t)k, items;
        int64_t capacity = same && tokens < INT64_MAX / 2 ? tokens + tokens / 2 : tokens;
        sida_hash_table_free(table);
        if (sida_mul_overflow(row, (size_t)capacity, &items))
            SIDA_FAIL(SIDA_ERROR_MEMORY, "a hash table of %" PRId64 " tokens is too large", tokens);
        SIDA_TRY(SIDA_ALLOC(&table->experts, items, "a hash table"));
        SIDA_TRY(SIDA_ALLOC(&table->alpha, items, "a hash table"));
        table->capacity = capacity;
    }
    table->side = side;
    table->layers = layers;
    table->k = k;
    table->tokens = tokens;
out:
    if (status != SIDA_OK) sida_hash_table_free(table);
    return status;
}

static sida_status open_predictor(sida_hash_source **out, const char *path, sida_weight embedding,
                                  sida_fingerprint model) {
    sida_status status = SIDA_OK;
    sida_h5_file *file = NULL;
    sida_predictor_meta meta = {0};
    sida_net_kind kind;
    sida_table_order order;
    SIDA_TRY(sida_predictor_file_open(&file, &meta, path));
    if (sida_h5_file_kind(file) != SIDA_H5_PREDICTOR)
        SIDA_FAIL(SIDA_ERROR_FORMAT,
                  "%s: a checkpoint of an unfinished training, not a predictor; finish it with "
                  "sida train --resume",
                  path);
    SIDA_TRY(sida_source_check_model(path, meta.model, model));
    if (sida_net_kind_from_name(&kind, meta.source))
        SIDA_TRY(sida_lstm_source_read(out, file, &meta, embedding));
    else if (sida_table_order_from_name(&order, meta.source))
        SIDA_TRY(sida_table_source_read(out, file, &meta, embedding));
    else if (strcmp(meta.source, "layer-hash") == 0)
        SIDA_TRY(sida_layer_hash_source_read(out, file, &meta, embedding));
    else
        SIDA_FAIL(SIDA_ERROR_UNSUPPORTED, "%s: unknown hash source '%.40s'", path, meta.source);
out:
    sida_predictor_meta_free(&meta);
    sida_h5_close(file);
    return status;
}

/* What kind of file it is; a foreign one can only be a trace. */
static sida_status find_kind(sida_h5_kind *out, const char *path) {
    sida_h5_file *file;
    unsigned all = 1u << SIDA_H5_TRACE | 1u << SIDA_H5_PART | 1u << SIDA_H5_PREDICTOR |
                   1u << SIDA_H5_CHECKPOINT;
    sida_status status = sida_h5_open(&file, path, all, true);
    if (status != SIDA_OK) return status;
    *out = sida_h5_file_kind(file);
    sida_h5_close(file);
    return SIDA_OK;
}

sida_status sida_hash_source_open(sida_hash_source **out, const char *path, sida_weight embedding,
                                  sida_fingerprint model) {
    *out = NULL;
    sida_status status = SIDA_OK;
    sida_h5_kind kind;
    SIDA_TRY(find_kind(&kind, path));
    bool learnt = kind == SIDA_H5_PREDICTOR || kind == SIDA_H5_CHECKPOINT;
    SIDA_TRY(learnt ? open_predictor(out, path, embedding, model)
                    : sida_oracle_source_open(out, path, embedding, model));
out:
    return status;
}

void sida_hash_source_destroy(sida_hash_source *source) {
    if (source) source->table->destroy(source);
}

sida_status sida_hash_source_place(sida_hash_source *source, sida_backend *backend,
                                   sida_weight embedding, const sida_hash_limits *limits) {
    return source->table->place ? source->table->place(source, backend, embedding, limits)
                                : SIDA_OK;
}

sida_status sida_hash_state_create(const sida_hash_source *source, sida_hash_state **out) {
    return source->table->state_create(source, out);
}

void sida_hash_state_destroy(const sida_hash_source *source, sida_hash_state *state) {
    if (state) source->table->state_destroy(state);
}

static sida_status check_k(const sida_hash_source *source, int32_t k) {
    if (k < 1 || k > source->info.experts)
        return sida_fail(SIDA_ERROR_ARGUMENT, "%d experts a token: this model has 1 to %d", k,
                         source->info.experts);
    return SIDA_OK;
}

sida_status sida_hash_encode(const sida_hash_source *source, sida_hash_state *state,
                             const sida_ragged *input, int32_t k, sida_hash_table *out) {
    sida_status status = check_k(source, k);
    return status == SIDA_OK ? source->table->encode(source, state, input, k, out) : status;
}

sida_status sida_hash_decode(const sida_hash_source *source, sida_hash_state *state,
                             const sida_ragged *step, int32_t k, sida_hash_table *out) {
    sida_status status = check_k(source, k);
    return status == SIDA_OK ? source->table->decode(source, state, step, k, out) : status;
}

sida_status sida_hash_refine(const sida_hash_source *source, sida_hash_state *state, int side,
                             int32_t layer, const int32_t *experts, int32_t top_k, int32_t k,
                             sida_hash_table *out) {
    sida_status status = SIDA_OK;
    const sida_hash_source_info *info = &source->info;
    if (!info->refines)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "a '%s' without a refinement says nothing anew", info->name);
    if (side < 0 || side > 1 || layer < 0 || layer >= info->layers[side] - 1)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "MoE layer %d of side %d has none behind it", layer, side);
    SIDA_TRY(check_k(source, top_k));
    SIDA_TRY(check_k(source, k));
    SIDA_TRY(source->table->refine(source, state, side, layer, experts, top_k, k, out));
out:
    return status;
}
