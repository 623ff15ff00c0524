#include "formats/checkpoint.h"

#include "formats/base/file.h"
#include "formats/base/memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_CONFIG_BYTES = 4 << 20,
    MAX_INDEX_BYTES = 64 << 20,
    MAX_SHARDS = 100000,
    HELD_BYTES = 64 << 20
};

typedef struct shard {
    char *file; /* name within the folder */
    sida_mapped_file map;
    sida_safetensors *tensors;
} shard;

struct sida_checkpoint {
    char *folder;
    char *config_text;
    size_t config_bytes;
    json_t *config;
    shard *shards;
    size_t shard_count;
    const sida_tensor_view **tensors; /* sorted by name */
    size_t count;
    size_t passed_bytes; /* since pages were given back */
    bool has_fingerprint;
    sida_fingerprint fingerprint;
};

static sida_status load_json(json_t **out, const char *text, size_t bytes, const char *path) {
    json_error_t error;
    *out = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    if (!*out) return sida_fail(SIDA_ERROR_FORMAT, "%s: line %d: %s", path, error.line, error.text);
    if (json_is_object(*out)) return SIDA_OK;
    json_decref(*out);
    *out = NULL;
    return sida_fail(SIDA_ERROR_FORMAT, "%s: not a JSON object", path);
}

static sida_status load_config(sida_checkpoint *checkpoint) {
    char *path = NULL;
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_path_join(&path, checkpoint->folder, "config.json"));
    SIDA_TRY(sida_file_read(&checkpoint->config_text, &checkpoint->config_bytes, path,
                            MAX_CONFIG_BYTES));
    SIDA_TRY(
        load_json(&checkpoint->config, checkpoint->config_text, checkpoint->config_bytes, path));
out:
    free(path);
    return status;
}

static int by_name(const void *a, const void *b) {
    return strcmp((*(const sida_tensor_view *const *)a)->name,
                  (*(const sida_tensor_view *const *)b)->name);
}

static int find_by_name(const void *key, const void *item) {
    return strcmp(key, (*(const sida_tensor_view *const *)item)->name);
}

/* Maps and parses one weight file. */
static sida_status open_shard(shard *out, const char *folder, const char *file) {
    char *path = NULL;
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_path_join(&path, folder, file));
    SIDA_TRY(sida_strdup(&out->file, file));
    SIDA_TRY(sida_file_map(&out->map, path));
    SIDA_TRY(sida_safetensors_parse(&out->tensors, out->map.data, out->map.size, path));
out:
    free(path);
    return status;
}

static sida_status open_single(sida_checkpoint *checkpoint) {
    sida_status status = SIDA_OK;
    SIDA_TRY(SIDA_ALLOC(&checkpoint->shards, 1, checkpoint->folder));
    checkpoint->shard_count = 1;
    SIDA_TRY(open_shard(checkpoint->shards, checkpoint->folder, "model.safetensors"));
    const sida_safetensors *file = checkpoint->shards[0].tensors;
    SIDA_TRY(SIDA_ALLOC(&checkpoint->tensors, sida_safetensors_count(file), checkpoint->folder));
    for (; checkpoint->count < sida_safetensors_count(file); checkpoint->count++)
        checkpoint->tensors[checkpoint->count] = sida_safetensors_at(file, checkpoint->count);
out:
    return status;
}

/* A shard is a plain file of the same folder: no path, nothing hidden. */
static bool is_plain_name(const char *name) {
    if (!name[0] || name[0] == '.' || strlen(name) > 255) return false;
    for (const char *c = name; *c; c++)
        if (*c == '/' || *c == '\\' || (unsigned char)*c < 0x20) return false;
    return true;
}

static int by_text(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The distinct file names of a weight map, sorted; borrowed from `map`. */
static sida_status shard_names(const char ***out, size_t *count, json_t *map, const char *path) {
    sida_status status = SIDA_OK;
    const char **names = NULL, *key;
    size_t all = 0, distinct = 0;
    json_t *value;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&names, json_object_size(map), path));
    json_object_foreach(map, key, value) {
        const char *name = json_string_value(value);
        if (!name || !is_plain_name(name))
            SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: %.200s: \"%.200s\" is not a file name in this folder",
                      path, key, name ? name : "(no text)");
        names[all++] = name;
    }
    qsort(names, all, sizeof *names, by_text);
    for (size_t i = 0; i < all; i++)
        if (i == 0 || strcmp(names[i], names[i - 1]) != 0) names[distinct++] = names[i];
    if (distinct > MAX_SHARDS)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: %zu files, more than the limit of %d", path, distinct,
                  MAX_SHARDS);
    *out = names;
    *count = distinct;
    names = NULL;
out:
    free(names);
    return status;
}

/* The tensors of one shard that the index places there. */
static sida_status take_mapped(sida_checkpoint *checkpoint, const shard *part, const json_t *map) {
    for (size_t i = 0; i < sida_safetensors_count(part->tensors); i++) {
        const sida_tensor_view *view = sida_safetensors_at(part->tensors, i);
        const char *place = json_string_value(json_object_get(map, view->name));
        if (place && strcmp(place, part->file) == 0)
            checkpoint->tensors[checkpoint->count++] = view;
    }
    return SIDA_OK;
}

static sida_status open_sharded(sida_checkpoint *checkpoint, const char *path) {
    sida_status status = SIDA_OK;
    char *text = NULL;
    json_t *index = NULL, *map, *value;
    const char **names = NULL, *key;
    size_t bytes = 0, count = 0;
    SIDA_TRY(sida_file_read(&text, &bytes, path, MAX_INDEX_BYTES));
    SIDA_TRY(load_json(&index, text, bytes, path));
    map = json_object_get(index, "weight_map");
    if (!json_is_object(map)) SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: no object weight_map", path);
    SIDA_TRY(shard_names(&names, &count, map, path));
    SIDA_TRY(SIDA_ALLOC(&checkpoint->shards, count, path));
    SIDA_TRY(SIDA_ALLOC(&checkpoint->tensors, json_object_size(map), path));
    for (size_t i = 0; i < count; i++) {
        checkpoint->shard_count = i + 1;
        SIDA_TRY(open_shard(&checkpoint->shards[i], checkpoint->folder, names[i]));
        SIDA_TRY(take_mapped(checkpoint, &checkpoint->shards[i], map));
    }
    qsort(checkpoint->tensors, checkpoint->count, sizeof *checkpoint->tensors, by_name);
    json_object_foreach(map, key, value) {
        if (!sida_checkpoint_find(checkpoint, key))
            SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: %.200s is not in %.200s, where the index places it",
                      path, key, json_string_value(value));
    }
out:
    free(names);
    free(text);
    json_decref(index);
    return status;
}

static sida_status open_weights(sida_checkpoint *checkpoint) {
    char *single = NULL, *index = NULL;
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_path_join(&single, checkpoint->folder, "model.safetensors"));
    SIDA_TRY(sida_path_join(&index, checkpoint->folder, "model.safetensors.index.json"));
    if (!sida_file_exists(single) && sida_file_exists(index))
        SIDA_TRY(open_sharded(checkpoint, index));
    else
        SIDA_TRY(open_single(checkpoint));
    qsort(checkpoint->tensors, checkpoint->count, sizeof *checkpoint->tensors, by_name);
out:
    free(single);
    free(index);
    return status;
}

sida_status sida_checkpoint_open(sida_checkpoint **out, const char *folder) {
    sida_status status = SIDA_OK;
    sida_checkpoint *checkpoint = NULL;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&checkpoint, 1, folder));
    SIDA_TRY(sida_strdup(&checkpoint->folder, folder));
    SIDA_TRY(load_config(checkpoint));
    SIDA_TRY(open_weights(checkpoint));
    *out = checkpoint;
    checkpoint = NULL;
out:
    sida_checkpoint_destroy(checkpoint);
    return status;
}

void sida_checkpoint_destroy(sida_checkpoint *checkpoint) {
    if (!checkpoint) return;
    for (size_t i = 0; i < checkpoint->shard_count; i++) {
        shard *part = &checkpoint->shards[i];
        sida_safetensors_destroy(part->tensors);
        sida_file_unmap(&part->map);
        free(part->file);
    }
    free(checkpoint->shards);
    free(checkpoint->tensors);
    json_decref(checkpoint->config);
    free(checkpoint->config_text);
    free(checkpoint->folder);
    free(checkpoint);
}

const char *sida_checkpoint_folder(const sida_checkpoint *checkpoint) {
    return checkpoint->folder;
}

const json_t *sida_checkpoint_config(const sida_checkpoint *checkpoint) {
    return checkpoint->config;
}

const sida_tensor_view *sida_checkpoint_find(const sida_checkpoint *checkpoint, const char *name) {
    if (checkpoint->count == 0) return NULL;
    const sida_tensor_view **found = bsearch(name, checkpoint->tensors, checkpoint->count,
                                             sizeof *checkpoint->tensors, find_by_name);
    return found ? *found : NULL;
}

static void format_shape(char text[128], int rank, const int64_t *shape) {
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; i < rank && used < 128; i++)
        used +=
            (size_t)snprintf(text + used, 128 - used, "%s%lld", i ? ", " : "", (long long)shape[i]);
}

sida_status sida_checkpoint_tensor(const sida_tensor_view **out, const sida_checkpoint *checkpoint,
                                   const char *name, int rank, const int64_t *shape) {
    char wanted[128], found[128];
    const sida_tensor_view *view = sida_checkpoint_find(checkpoint, name);
    format_shape(wanted, rank, shape);
    *out = NULL;
    if (!view)
        return sida_fail(SIDA_ERROR_FORMAT, "%s: tensor %.200s [%s] is missing", checkpoint->folder,
                         name, wanted);
    bool same = view->rank == rank;
    for (int i = 0; same && i < rank; i++) same = view->shape[i] == shape[i];
    if (!same) {
        format_shape(found, view->rank, view->shape);
        return sida_fail(SIDA_ERROR_FORMAT, "%s: tensor %.200s has shape [%s], expected [%s]",
                         checkpoint->folder, name, found, wanted);
    }
    *out = view;
    return SIDA_OK;
}

size_t sida_checkpoint_count(const sida_checkpoint *checkpoint) {
    return checkpoint->count;
}

const sida_tensor_view *sida_checkpoint_at(const sida_checkpoint *checkpoint, size_t index) {
    return checkpoint->tensors[index];
}

void sida_checkpoint_pass(sida_checkpoint *checkpoint, size_t bytes) {
    checkpoint->passed_bytes += bytes;
    if (checkpoint->passed_bytes < HELD_BYTES) return;
    checkpoint->passed_bytes = 0;
    for (size_t i = 0; i < checkpoint->shard_count; i++)
        sida_file_forget(&checkpoint->shards[i].map);
}

sida_status sida_checkpoint_fingerprint(sida_fingerprint *out, sida_checkpoint *checkpoint) {
    sida_status status = SIDA_OK;
    sida_hasher *hasher = NULL;
    if (!checkpoint->has_fingerprint) {
        SIDA_TRY(sida_hasher_create(&hasher));
        uint64_t length = checkpoint->config_bytes;
        sida_hasher_update(hasher, &length, sizeof length);
        sida_hasher_update(hasher, checkpoint->config_text, checkpoint->config_bytes);
        for (size_t i = 0; i < checkpoint->count; i++) {
            const sida_tensor_view *view = checkpoint->tensors[i];
            const char *dtype = sida_dtype_name(view->dtype);
            int64_t extents[1 + SIDA_TENSOR_MAX_RANK] = {view->rank};
            for (int d = 0; d < view->rank; d++) extents[d + 1] = view->shape[d];
            sida_hasher_update(hasher, view->name, strlen(view->name) + 1);
            sida_hasher_update(hasher, dtype, strlen(dtype) + 1);
            sida_hasher_update(hasher, extents, sizeof extents);
            sida_hasher_update(hasher, view->data, view->bytes);
            sida_checkpoint_pass(checkpoint, view->bytes);
        }
        checkpoint->fingerprint = sida_hasher_finish(hasher);
        checkpoint->has_fingerprint = true;
    }
    *out = checkpoint->fingerprint;
out:
    sida_hasher_destroy(hasher);
    return status;
}
