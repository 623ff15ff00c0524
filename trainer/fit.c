#include "trainer/fit.h"

#include "formats/base/clock.h"
#include "formats/base/file.h"

#include <string.h>

const char sida_fit_sources[] = "popular, table, bigram, layer-hash";

static const char layer_hash[] = "layer-hash";

bool sida_fit_known(const char *source) {
    sida_table_order order;
    return sida_table_order_from_name(&order, source) || strcmp(source, layer_hash) == 0;
}

sida_status sida_fit_source(sida_hash_source **out, const char *source, sida_layer_hash hash,
                            int64_t seed, const sida_dataset *data) {
    sida_table_order order;
    sida_routed routed = {
        .shape = {data->experts,
                  data->vocabulary,
                  data->d_model,
                  {data->layers[0], data->layers[1]}},
        .model = data->model,
        .tokenizer = data->tokenizer,
        .top_k = data->top_k,
    };
    for (int side = 0; side < 2; side++) {
        const sida_dataset_side *from = &data->sides[side];
        routed.tokens[side] = (sida_ragged){data->sequences, from->offsets, from->ids};
        routed.experts[side] = from->experts;
        routed.alpha[side] = from->alpha;
    }
    *out = NULL;
    if (sida_table_order_from_name(&order, source))
        return sida_table_source_create(out, order, &routed);
    if (strcmp(source, layer_hash) == 0)
        return sida_layer_hash_source_create(out, hash, (uint64_t)seed, &routed);
    return sida_fail(SIDA_ERROR_ARGUMENT, "source '%.40s': expected lstm or one of %s", source,
                     sida_fit_sources);
}

static json_t *fingerprint_json(sida_fingerprint value) {
    char text[SIDA_FINGERPRINT_TEXT];
    sida_fingerprint_format(text, value);
    return json_string(text);
}

sida_status sida_fit(const sida_train_options *options, json_t **summary) {
    if (summary) *summary = NULL;
    sida_status status = SIDA_OK;
    sida_dataset train = {0}, valid = {0};
    sida_hash_source *source = NULL;
    sida_evaluation scores = {0};
    json_t *about = json_object();
    double begin = sida_clock_seconds();
    if (options->seed < 0)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "an option of the training is out of its range");
    SIDA_TRY(sida_file_check_writable(options->output));
    SIDA_TRY(sida_dataset_load(&train, options->trace, -1));
    if (options->valid) {
        SIDA_TRY(sida_dataset_load(&valid, options->valid, -1));
        SIDA_TRY(sida_dataset_check_pair(&train, &valid));
    }
    SIDA_TRY(sida_fit_source(&source, options->source, options->hash, options->seed, &train));
    json_object_set_new(about, "trace", fingerprint_json(train.file));
    json_object_set_new(about, "version", json_string(SIDA_VERSION));
    if (options->valid) SIDA_TRY(sida_evaluate(&scores, source, &valid, valid.top_k, NULL, NULL));
    SIDA_TRY(strcmp(options->source, layer_hash) == 0
                 ? sida_layer_hash_source_write(source, options->output, about)
                 : sida_table_source_write(source, options->output, about));
    if (!summary) goto out;
    *summary = json_object();
    json_object_set_new(*summary, "output", json_string(options->output));
    json_object_set_new(*summary, "source", json_string(options->source));
    json_object_set_new(*summary, "model", fingerprint_json(train.model));
    json_object_set_new(*summary, "bytes", json_integer((json_int_t)source->info.bytes));
    if (options->valid) json_object_set_new(*summary, "valid", sida_evaluation_to_json(&scores));
    json_object_set_new(*summary, "seconds", json_real(sida_clock_seconds() - begin));
out:
    json_decref(about);
    sida_evaluation_free(&scores);
    sida_hash_source_destroy(source);
    sida_dataset_free(&train);
    sida_dataset_free(&valid);
    return status;
}
