#include "tools/cli/router_baseline.h"

#include "formats/base/memory.h"
#include "formats/checkpoint.h"
#include "runtime/model/family.h"
#include "runtime/predictor/sources.h"

#include <stdlib.h>

/* The tensor of a role, under whichever of its names is there. */
static sida_status find(sida_weight *out, const sida_checkpoint *checkpoint,
                        const sida_family *family, const sida_family_config *config,
                        sida_tensor_role role, int side, int32_t block, int64_t rows) {
    const sida_tensor_view *view;
    char name[SIDA_TENSOR_NAME_MAX];
    int64_t cols = config->info.d_model, shape[2] = {rows, cols};
    int32_t i = 0;
    while (family->name(name, config, role, side, block, -1, i) &&
           !sida_checkpoint_find(checkpoint, name))
        i++;
    /* Under none of them: the message names the first. */
    if (!sida_checkpoint_find(checkpoint, name))
        family->name(name, config, role, side, block, -1, 0);
    sida_status status =
        sida_checkpoint_tensor(&view, checkpoint, name, rows ? 2 : 1, rows ? shape : shape + 1);
    if (status == SIDA_OK) *out = (sida_weight){view->data, view->dtype, rows ? rows : 1, cols};
    return status;
}

static sida_status check_trace(const char *folder, sida_checkpoint *checkpoint,
                               const sida_model_info *info, const sida_dataset *data) {
    sida_status status = SIDA_OK;
    sida_fingerprint model;
    SIDA_TRY(sida_checkpoint_fingerprint(&model, checkpoint));
    if (!sida_fingerprint_equal(model, data->model)) {
        char theirs[SIDA_FINGERPRINT_TEXT], ours[SIDA_FINGERPRINT_TEXT];
        sida_fingerprint_format(theirs, data->model);
        sida_fingerprint_format(ours, model);
        SIDA_FAIL(SIDA_ERROR_MISMATCH, "%s is a trace of model %s, %s is another, %s", data->path,
                  theirs, folder, ours);
    }
    if (info->d_model != data->d_model || info->vocabulary != data->vocabulary)
        SIDA_FAIL(SIDA_ERROR_MISMATCH, "%s: an embedding of %d ids by %d columns, %s has %d by %d",
                  folder, info->vocabulary, info->d_model, data->path, data->vocabulary,
                  data->d_model);
    if (info->experts != data->experts || info->moe_layers[0] != data->layers[0] ||
        info->moe_layers[1] != data->layers[1])
        SIDA_FAIL(SIDA_ERROR_MISMATCH, "%s has %d + %d MoE layers of %d experts, %s %d + %d of %d",
                  folder, info->moe_layers[0], info->moe_layers[1], info->experts, data->path,
                  data->layers[0], data->layers[1], data->experts);
out:
    return status;
}

sida_status sida_router_baseline(sida_hash_source **out, const char *folder,
                                 const sida_dataset *data) {
    sida_status status = SIDA_OK;
    sida_checkpoint *checkpoint = NULL;
    sida_family_config config = {0};
    sida_router_weights *weights = NULL;
    char *path = NULL;
    *out = NULL;
    SIDA_TRY(sida_strprintf(&path, "%s/config.json", folder));
    SIDA_TRY(sida_checkpoint_open(&checkpoint, folder));
    const json_t *json = sida_checkpoint_config(checkpoint);
    const char *type;
    SIDA_TRY(sida_config_text(&type, json, path, "model_type", ""));
    const sida_family *family = sida_family_find(type);
    if (!family)
        SIDA_FAIL(SIDA_ERROR_UNSUPPORTED, "%s: model_type '%.60s': known are %s", path, type,
                  sida_family_names());
    SIDA_TRY(family->configure(&config, json, path));
    SIDA_TRY(check_trace(folder, checkpoint, &config.info, data));
    size_t sites = (size_t)data->layers[0] + (size_t)data->layers[1], at = 0;
    SIDA_TRY(SIDA_ALLOC(&weights, sites, path));
    for (int side = 0; side < 2; side++)
        for (int32_t block = 0; block < config.info.layers[side]; block++) {
            if (!config.sparse[side][block]) continue;
            sida_router_weights *w = &weights[at++];
            SIDA_TRY(find(&w->router, checkpoint, family, &config, SIDA_TENSOR_ROUTER, side, block,
                          config.info.experts));
            SIDA_TRY(
                find(&w->norm, checkpoint, family, &config, SIDA_TENSOR_FF_NORM, side, block, 0));
        }
    const sida_source_shape shape = {
        data->experts, data->vocabulary, data->d_model, {data->layers[0], data->layers[1]}};
    SIDA_TRY(sida_router_source_create(out, &shape, weights, config.epsilon,
                                       sida_dataset_embedding(data), data->model, data->tokenizer));
out:
    free(weights);
    free(path);
    sida_family_config_free(&config);
    sida_checkpoint_destroy(checkpoint);
    return status;
}
