#include "runtime/predictor/export.h"

#include "formats/base/memory.h"
#include "formats/safetensors.h"
#include "runtime/predictor/refine.h"

#include <stdlib.h>
#include <string.h>

static sida_status set_metadata(json_t *metadata, const sida_predictor_meta *meta) {
    char model[SIDA_FINGERPRINT_TEXT], tokenizer[SIDA_FINGERPRINT_TEXT];
    char *config = json_dumps(meta->config, JSON_COMPACT | JSON_SORT_KEYS);
    if (!config) return sida_fail(SIDA_ERROR_MEMORY, "no memory for a predictor's config");
    sida_fingerprint_format(model, meta->model);
    sida_fingerprint_format(tokenizer, meta->tokenizer);
    json_object_set_new(metadata, "format", json_string("pt"));
    json_object_set_new(metadata, "sida", json_string("predictor 1"));
    json_object_set_new(metadata, "source", json_string(meta->source));
    json_object_set_new(metadata, "model", json_string(model));
    json_object_set_new(metadata, "tokenizer", json_string(tokenizer));
    json_object_set_new(metadata, "config", json_string(config));
    free(config);
    return SIDA_OK;
}

static void view_tensors(sida_tensor_view *views, const sida_net_tensor *tensors, int32_t count) {
    for (int32_t i = 0; i < count; i++) {
        const sida_net_tensor *t = &tensors[i];
        views[i] = (sida_tensor_view){.name = t->name,
                                      .dtype = SIDA_F32,
                                      .rank = t->rank,
                                      .shape = {t->shape[0], t->shape[1]},
                                      .data = t->data,
                                      .bytes = (size_t)t->count * sizeof *t->data};
    }
}

sida_status sida_predictor_export(const char *path, const char *predictor) {
    sida_status status = SIDA_OK;
    sida_h5_file *file = NULL;
    sida_predictor_meta meta = {0};
    sida_net *net = NULL;
    sida_refine *refine = NULL;
    sida_tensor_view *views = NULL;
    sida_net_config config;
    sida_net_kind kind;
    json_t *metadata = json_object();
    SIDA_TRY(sida_predictor_file_open(&file, &meta, predictor));
    if (sida_h5_file_kind(file) != SIDA_H5_PREDICTOR)
        SIDA_FAIL(SIDA_ERROR_FORMAT,
                  "%s: a checkpoint of an unfinished training, not a predictor; finish it with "
                  "sida train --resume",
                  predictor);
    if (!json_object_get(meta.config, "net") && !sida_net_kind_from_name(&kind, meta.source))
        SIDA_FAIL(SIDA_ERROR_UNSUPPORTED,
                  "%s: a '%.40s' has no network to export; its file is HDF5, as formats/README.md "
                  "says",
                  predictor, meta.source);
    SIDA_TRY(sida_net_config_from_json(&config, json_object_get(meta.config, "net"), predictor));
    SIDA_TRY(sida_net_read(&net, file, &config));
    SIDA_TRY(sida_refine_read(&refine, file, meta.config, &config));
    const int32_t refined = refine ? refine->tensor_count : 0;
    SIDA_TRY(SIDA_ALLOC(&views, net->tensor_count + refined, "a predictor's tensors"));
    view_tensors(views, net->tensors, net->tensor_count);
    if (refine) view_tensors(views + net->tensor_count, refine->tensors, refined);
    SIDA_TRY(set_metadata(metadata, &meta));
    status = sida_safetensors_write(path, views, (size_t)(net->tensor_count + refined), metadata);
out:
    json_decref(metadata);
    free(views);
    sida_refine_destroy(refine);
    sida_net_destroy(net);
    sida_predictor_meta_free(&meta);
    sida_h5_close(file);
    return status;
}
