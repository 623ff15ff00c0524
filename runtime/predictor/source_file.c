/* What the files of sources without a network share: their shape, in the config. */
#include "runtime/predictor/sources.h"

#include <inttypes.h>

static const char *const sides[2] = {"layers_encoder", "layers_decoder"};

sida_status sida_source_check_model(const char *path, sida_fingerprint theirs,
                                    sida_fingerprint ours) {
    char their_text[SIDA_FINGERPRINT_TEXT], our_text[SIDA_FINGERPRINT_TEXT];
    if (sida_fingerprint_equal(theirs, ours)) return SIDA_OK;
    sida_fingerprint_format(their_text, theirs);
    sida_fingerprint_format(our_text, ours);
    return sida_fail(SIDA_ERROR_MISMATCH, "%s: a predictor of model %s, not of this model, %s",
                     path, their_text, our_text);
}

sida_status sida_source_check_embedding(const char *path, const sida_source_shape *shape,
                                        sida_weight embedding) {
    if (embedding.cols == shape->d_model && embedding.rows == shape->vocabulary) return SIDA_OK;
    return sida_fail(SIDA_ERROR_MISMATCH,
                     "%s: made for an embedding of %d ids by %d columns, not of %" PRId64
                     " by %" PRId64,
                     path, shape->vocabulary, shape->d_model, embedding.rows, embedding.cols);
}

sida_status sida_source_file_create(sida_h5_file **out, const char *path,
                                    const sida_hash_source_info *info, int32_t vocabulary,
                                    json_t *settings, const json_t *about) {
    sida_predictor_meta meta = {info->model, info->tokenizer, (char *)(uintptr_t)info->name,
                                json_object()};
    json_t *shape =
        json_pack("{s:i, s:i, s:i, s:i, s:i}", "d_model", info->d_model, "experts", info->experts,
                  "vocabulary", vocabulary, sides[0], info->layers[0], sides[1], info->layers[1]);
    if (about) json_object_update(meta.config, (json_t *)(uintptr_t)about);
    json_object_set_new(meta.config, "shape", shape);
    json_object_set_new(meta.config, info->name, settings);
    sida_status status = sida_predictor_file_create(out, path, SIDA_H5_PREDICTOR, &meta);
    json_decref(meta.config);
    return status;
}

sida_status sida_source_setting(int64_t *out, const json_t *settings, const char *name, int64_t low,
                                int64_t high, const char *path) {
    const json_t *value = json_object_get(settings, name);
    if (!json_is_integer(value))
        return sida_fail(SIDA_ERROR_FORMAT, "%s: its config has no whole number %s", path, name);
    *out = json_integer_value(value);
    if (*out < low || *out > high)
        return sida_fail(SIDA_ERROR_FORMAT,
                         "%s: its config's %s is %" PRId64 ", not %" PRId64 " to %" PRId64, path,
                         name, *out, low, high);
    return SIDA_OK;
}

sida_status sida_source_file_shape(sida_source_shape *out, const json_t **settings,
                                   const sida_predictor_meta *meta, const char *path) {
    sida_status status = SIDA_OK;
    const json_t *shape = json_object_get(meta->config, "shape");
    const struct {
        const char *name;
        int32_t *to;
        int64_t low, high;
    } fields[] = {{"d_model", &out->d_model, 1, 65536},
                  {"experts", &out->experts, 1, 65535},
                  {"vocabulary", &out->vocabulary, 1, INT32_MAX},
                  {sides[0], &out->layers[0], 0, 4096},
                  {sides[1], &out->layers[1], 0, 4096}};
    *settings = json_object_get(meta->config, meta->source);
    if (!json_is_object(*settings))
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: its config has no settings of a %.40s", path,
                  meta->source);
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        int64_t value = 0;
        SIDA_TRY(sida_source_setting(&value, shape, fields[i].name, fields[i].low, fields[i].high,
                                     path));
        *fields[i].to = (int32_t)value;
    }
    if (out->layers[0] + out->layers[1] == 0)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: its config has no MoE layers", path);
out:
    return status;
}
