#include "formats/predictor_file.h"

#include "formats/base/memory.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static const char format_name[] = "sida-predictor";
enum { FORMAT_VERSION = 1 };

void sida_predictor_meta_free(sida_predictor_meta *meta) {
    free(meta->source);
    json_decref(meta->config);
    *meta = (sida_predictor_meta){0};
}

sida_status sida_predictor_file_create(sida_h5_file **out, const char *path, sida_h5_kind kind,
                                       const sida_predictor_meta *meta) {
    sida_status status = SIDA_OK;
    sida_h5_file *file = NULL;
    char model[SIDA_FINGERPRINT_TEXT], tokenizer[SIDA_FINGERPRINT_TEXT], *config = NULL;
    assert(kind == SIDA_H5_PREDICTOR || kind == SIDA_H5_CHECKPOINT);
    *out = NULL;
    config = json_dumps(meta->config, JSON_COMPACT | JSON_SORT_KEYS);
    if (!config) SIDA_FAIL(SIDA_ERROR_MEMORY, "%s: its config cannot be written as JSON", path);
    sida_fingerprint_format(model, meta->model);
    sida_fingerprint_format(tokenizer, meta->tokenizer);
    SIDA_TRY(sida_h5_create(&file, path, kind));
    SIDA_TRY(sida_h5_set_text(file, "format", format_name));
    SIDA_TRY(sida_h5_set_i64(file, "version", FORMAT_VERSION));
    SIDA_TRY(sida_h5_set_text(file, "source", meta->source));
    SIDA_TRY(sida_h5_set_text(file, "model", model));
    SIDA_TRY(sida_h5_set_text(file, "tokenizer", tokenizer));
    SIDA_TRY(sida_h5_set_text(file, "config", config));
    *out = file;
    file = NULL;
out:
    sida_h5_abandon(file);
    free(config);
    return status;
}

static sida_status read_fingerprint(sida_fingerprint *out, sida_h5_file *file, const char *name) {
    char *text;
    sida_status status = sida_h5_get_text(file, name, &text);
    if (status != SIDA_OK) return status;
    if (!sida_fingerprint_parse(out, text))
        status = sida_fail(SIDA_ERROR_FORMAT, "%s: attribute %s is no fingerprint",
                           sida_h5_path(file), name);
    free(text);
    return status;
}

static sida_status read_meta(sida_predictor_meta *meta, sida_h5_file *file) {
    sida_status status = SIDA_OK;
    char *text = NULL;
    int64_t version;
    json_error_t error;
    const char *path = sida_h5_path(file);
    SIDA_TRY(sida_h5_get_text(file, "format", &text));
    if (strcmp(text, format_name) != 0) SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: no predictor", path);
    SIDA_TRY(sida_h5_get_i64(file, "version", &version));
    if (version != FORMAT_VERSION)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: predictor version %lld, expected %d", path,
                  (long long)version, FORMAT_VERSION);
    SIDA_TRY(read_fingerprint(&meta->model, file, "model"));
    SIDA_TRY(read_fingerprint(&meta->tokenizer, file, "tokenizer"));
    SIDA_TRY(sida_h5_get_text(file, "source", &meta->source));
    free(text);
    SIDA_TRY(sida_h5_get_text(file, "config", &text));
    meta->config = json_loads(text, JSON_REJECT_DUPLICATES, &error);
    if (!json_is_object(meta->config))
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: attribute config is no JSON object", path);
out:
    free(text);
    return status;
}

sida_status sida_predictor_file_open(sida_h5_file **out, sida_predictor_meta *meta,
                                     const char *path) {
    sida_h5_file *file;
    *out = NULL;
    *meta = (sida_predictor_meta){0};
    sida_status status =
        sida_h5_open(&file, path, 1u << SIDA_H5_PREDICTOR | 1u << SIDA_H5_CHECKPOINT, false);
    if (status != SIDA_OK) return status;
    status = read_meta(meta, file);
    if (status != SIDA_OK) {
        sida_predictor_meta_free(meta);
        sida_h5_close(file);
        return status;
    }
    *out = file;
    return SIDA_OK;
}
