/* A table's file: /table/SIDE/ORDER/{keys, starts, experts, counts}, as table_private.h says. */
#include "formats/base/memory.h"
#include "runtime/predictor/table_private.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>

typedef struct level_paths {
    char keys[48], starts[48], experts[48], counts[48];
} level_paths;

static level_paths paths_of(int side, int order) {
    static const char *const sides[2] = {"encoder", "decoder"};
    level_paths paths;
    snprintf(paths.keys, sizeof paths.keys, "table/%s/%d/keys", sides[side], order);
    snprintf(paths.starts, sizeof paths.starts, "table/%s/%d/starts", sides[side], order);
    snprintf(paths.experts, sizeof paths.experts, "table/%s/%d/experts", sides[side], order);
    snprintf(paths.counts, sizeof paths.counts, "table/%s/%d/counts", sides[side], order);
    return paths;
}

sida_status sida_table_source_write(const sida_hash_source *source, const char *path,
                                    const json_t *about) {
    sida_status status = SIDA_OK;
    const sida_table_source *self = (const sida_table_source *)source;
    sida_h5_file *file = NULL;
    SIDA_TRY(sida_source_file_create(&file, path, &source->info, self->vocabulary,
                                     json_pack("{s:i}", "order", (int)self->order), about));
    for (int side = 0; side < 2; side++)
        for (int order = 0; order <= (int)self->order && source->info.layers[side] > 0; order++) {
            const sida_table_level *level = &self->levels[side][order];
            level_paths at = paths_of(side, order);
            int64_t starts = level->count * source->info.layers[side] + 1;
            SIDA_TRY(sida_h5_write(file, at.keys, SIDA_H5_I64, 1, &level->count, level->keys));
            SIDA_TRY(sida_h5_write(file, at.starts, SIDA_H5_I64, 1, &starts, level->starts));
            SIDA_TRY(
                sida_h5_write(file, at.experts, SIDA_H5_U16, 1, &level->entries, level->experts));
            SIDA_TRY(
                sida_h5_write(file, at.counts, SIDA_H5_I32, 1, &level->entries, level->counts));
        }
    status = sida_h5_commit(file);
    file = NULL;
out:
    sida_h5_abandon(file);
    return status;
}

/* --- reading */

static sida_status check_keys(const sida_table_level *level, int order, int32_t vocabulary,
                              const char *file, const char *what) {
    for (int64_t i = 0; i < level->count; i++) {
        int64_t key = level->keys[i], before = key >> 32, id = key & INT64_C(0xffffffff);
        bool fits = key >= 0 && id < (order == SIDA_TABLE_POPULAR ? 1 : vocabulary) &&
                    before <= (order == SIDA_TABLE_BIGRAM ? vocabulary : 0);
        if (!fits || (i > 0 && key <= level->keys[i - 1]))
            return sida_fail(SIDA_ERROR_FORMAT,
                             "%s: %s: row %" PRId64 " is out of order or of the vocabulary", file,
                             what, i);
    }
    return SIDA_OK;
}

static sida_status check_runs(const sida_table_level *level, int64_t runs, int32_t experts,
                              const char *file, const char *what) {
    if (level->starts[0] != 0 || level->starts[runs] != level->entries)
        return sida_fail(SIDA_ERROR_FORMAT, "%s: %s do not span the counts", file, what);
    for (int64_t r = 0; r < runs; r++) {
        int64_t first = level->starts[r], last = level->starts[r + 1];
        /* The end is known to be `entries`, so a step back would be the first to leave the range.
         */
        if (last < first || last > level->entries)
            return sida_fail(SIDA_ERROR_FORMAT, "%s: %s are not ascending", file, what);
        for (int64_t i = first; i < last; i++)
            if (level->counts[i] <= 0 || level->experts[i] >= experts ||
                (i > first && level->experts[i] <= level->experts[i - 1]))
                return sida_fail(SIDA_ERROR_FORMAT,
                                 "%s: beside %s: count %" PRId64 " or its expert is not sound",
                                 file, what, i);
    }
    return SIDA_OK;
}

/* Compares extents before memory is taken: a small file must not make us take much. */
static sida_status read_level(sida_table_level *level, sida_h5_file *file, int side, int order,
                              const sida_source_shape *shape) {
    sida_status status = SIDA_OK;
    level_paths at = paths_of(side, order);
    const char *path = sida_h5_path(file);
    int64_t starts, counts;
    size_t runs;
    SIDA_TRY(sida_h5_shape(file, at.keys, SIDA_H5_I64, 1, &level->count));
    SIDA_TRY(sida_h5_shape(file, at.starts, SIDA_H5_I64, 1, &starts));
    SIDA_TRY(sida_h5_shape(file, at.experts, SIDA_H5_U16, 1, &level->entries));
    SIDA_TRY(sida_h5_shape(file, at.counts, SIDA_H5_I32, 1, &counts));
    if (sida_mul_overflow((size_t)level->count, (size_t)shape->layers[side], &runs) ||
        runs >= INT64_MAX || (int64_t)runs + 1 != starts || counts != level->entries)
        SIDA_FAIL(SIDA_ERROR_FORMAT,
                  "%s: %" PRId64 " rows of %s do not fit %" PRId64 " of %s, or %" PRId64
                  " counts %" PRId64 " experts",
                  path, level->count, at.keys, starts, at.starts, counts, level->entries);
    SIDA_TRY(SIDA_ALLOC(&level->keys, level->count, path));
    SIDA_TRY(SIDA_ALLOC(&level->starts, starts, path));
    SIDA_TRY(SIDA_ALLOC(&level->experts, level->entries, path));
    SIDA_TRY(SIDA_ALLOC(&level->counts, level->entries, path));
    SIDA_TRY(sida_h5_read_rows(file, at.keys, SIDA_H5_I64, 0, level->count, level->keys));
    SIDA_TRY(sida_h5_read_rows(file, at.starts, SIDA_H5_I64, 0, starts, level->starts));
    SIDA_TRY(sida_h5_read_rows(file, at.experts, SIDA_H5_U16, 0, level->entries, level->experts));
    SIDA_TRY(sida_h5_read_rows(file, at.counts, SIDA_H5_I32, 0, level->entries, level->counts));
    SIDA_TRY(check_keys(level, order, shape->vocabulary, path, at.keys));
    SIDA_TRY(check_runs(level, starts - 1, shape->experts, path, at.starts));
out:
    return status;
}

sida_status sida_table_source_read(sida_hash_source **out, sida_h5_file *file,
                                   const sida_predictor_meta *meta, sida_weight embedding) {
    *out = NULL;
    sida_status status = SIDA_OK;
    sida_table_source *self = NULL;
    sida_source_shape shape;
    sida_table_order order;
    const json_t *settings;
    int64_t said;
    const char *path = sida_h5_path(file);
    bool known = sida_table_order_from_name(&order, meta->source);
    assert(known);
    (void)known;
    SIDA_TRY(sida_source_file_shape(&shape, &settings, meta, path));
    SIDA_TRY(sida_source_setting(&said, settings, "order", order, order, path));
    SIDA_TRY(sida_source_check_embedding(path, &shape, embedding));
    SIDA_TRY(sida_table_source_alloc(&self, order, &shape, meta->model, meta->tokenizer));
    for (int side = 0; side < 2; side++)
        for (int i = 0; i <= (int)order && shape.layers[side] > 0; i++)
            SIDA_TRY(read_level(&self->levels[side][i], file, side, i, &shape));
    sida_table_source_measure(self);
    *out = &self->base;
    self = NULL;
out:
    if (self) sida_hash_source_destroy(&self->base);
    return status;
}
