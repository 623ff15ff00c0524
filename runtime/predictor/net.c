#include "runtime/predictor/net.h"

#include "formats/base/memory.h"
#include "formats/base/rng.h"
#include "runtime/predictor/net_private.h"

#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int32_t sida_net_default_hidden(int32_t d_model) {
    int32_t third = (d_model + 2) / 3;
    return (third + 63) / 64 * 64;
}

const char *sida_net_kind_name(sida_net_kind kind) {
    return kind == SIDA_NET_TRANSFORMER ? "transformer" : "lstm";
}

bool sida_net_kind_from_name(sida_net_kind *out, const char *name) {
    for (int kind = SIDA_NET_LSTM; kind <= SIDA_NET_TRANSFORMER; kind++) {
        if (strcmp(name, sida_net_kind_name((sida_net_kind)kind)) != 0) continue;
        *out = (sida_net_kind)kind;
        return true;
    }
    return false;
}

static sida_status check_range(const char *name, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return SIDA_OK;
    return sida_fail(SIDA_ERROR_ARGUMENT,
                     "%s of %" PRId64 ": a predictor has %" PRId64 " to %" PRId64, name, value, low,
                     high);
}

static const char *const attention_names[] = {"sparsemax", "softmax", "none"};
enum { attention_count = sizeof attention_names / sizeof *attention_names };

const char *sida_net_attention_name(sida_net_attention attention) {
    return attention_names[attention];
}

bool sida_net_attention_from_name(sida_net_attention *out, const char *name) {
    for (int i = 0; i < attention_count; i++) {
        if (strcmp(name, attention_names[i]) != 0) continue;
        *out = (sida_net_attention)i;
        return true;
    }
    return false;
}

int sida_net_directions(const sida_net_config *config, int side) {
    return config->bidirectional && side == 0 ? 2 : 1;
}

sida_status sida_net_config_check(const sida_net_config *config) {
    sida_status status = SIDA_OK;
    SIDA_TRY(check_range("d_model", config->d_model, 1, 65536));
    SIDA_TRY(check_range("hidden", config->hidden, 1, 16384));
    const bool lstm = config->kind == SIDA_NET_LSTM;
    SIDA_TRY(check_range("lstm_layers", config->lstm_layers, lstm, lstm ? SIDA_NET_LSTM_MAX : 0));
    SIDA_TRY(check_range("blocks", config->blocks, !lstm, lstm ? 0 : SIDA_NET_BLOCKS_MAX));
    SIDA_TRY(check_range("experts", config->experts, 1, 65535));
    SIDA_TRY(check_range("vocabulary", config->vocabulary, 1, INT32_MAX));
    SIDA_TRY(check_range("layers_encoder", config->layers[0], 0, 4096));
    SIDA_TRY(check_range("layers_decoder", config->layers[1], 0, 4096));
    SIDA_TRY(check_range("layers", (int64_t)config->layers[0] + config->layers[1], 1, 8192));
    if (!lstm && config->hidden % SIDA_NET_HEAD_WIDTH != 0)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "hidden of %d: a Transformer's is a multiple of %d",
                  config->hidden, SIDA_NET_HEAD_WIDTH);
    if (!lstm && (config->bidirectional || config->attention != SIDA_NET_SPARSEMAX))
        SIDA_FAIL(SIDA_ERROR_ARGUMENT,
                  "directions and the kind of attention are options of an LSTM's predictor");
    if (config->bidirectional && config->layers[0] == 0)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT,
                  "bidirectional: there is no encoder with MoE layers, and a decoder is causal");
    if (config->bidirectional && config->hidden % 2 != 0)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "hidden of %d: two directions want an even number",
                  config->hidden);
out:
    return status;
}

/* Visits the tensors in their order. With net->tensors NULL it only counts. Initial values are
 * uniform within `bound` of `centre`. */
static void add(sida_net *net, float **view, int side, const char *name, int rank, int64_t rows,
                int64_t cols, float centre, float bound) {
    static const char *const sides[2] = {"encoder", "decoder"};
    int64_t count = rank == 2 ? rows * cols : rows;
    if (net->tensors) {
        sida_net_tensor *t = &net->tensors[net->tensor_count];
        snprintf(t->name, sizeof t->name, "%s.%s", sides[side], name);
        t->rank = rank;
        t->shape[0] = rows;
        t->shape[1] = rank == 2 ? cols : 1;
        t->count = count;
        t->centre = centre;
        t->bound = bound;
        t->data = *view = net->parameters ? net->parameters + net->parameter_count : NULL;
    }
    net->tensor_count++;
    net->parameter_count += count;
}

/* PyTorch's initial values. */
static void add_linear(sida_net *net, sida_net_linear *layer, int side, const char *weight,
                       const char *bias, int64_t rows, int64_t cols, int64_t fan_in) {
    float bound = 1.0f / sqrtf((float)fan_in);
    layer->rows = rows;
    layer->cols = cols;
    add(net, &layer->weight, side, weight, 2, rows, cols, 0, bound);
    add(net, &layer->bias, side, bias, 1, rows, 1, 0, bound);
}

static void lay_out_lstm(sida_net *net, int side) {
    const sida_net_config *c = &net->config;
    sida_net_trunk *trunk = &net->trunks[side];
    int64_t h = c->hidden;
    add_linear(net, &trunk->compress, side, "compress.weight", "compress.bias", h, c->d_model,
               c->d_model);
    int directions = sida_net_directions(c, side);
    int64_t units = h / directions;
    for (int cell = 0; cell < directions * c->lstm_layers; cell++) {
        char weight[40], bias[40];
        int l = cell / directions;
        const char *way = cell % directions ? "_reverse" : "";
        snprintf(weight, sizeof weight, "lstm.weight_ih_l%d%s", l, way);
        snprintf(bias, sizeof bias, "lstm.bias_ih_l%d%s", l, way);
        add_linear(net, &trunk->input[cell], side, weight, bias, 4 * units, h, units);
        snprintf(weight, sizeof weight, "lstm.weight_hh_l%d%s", l, way);
        snprintf(bias, sizeof bias, "lstm.bias_hh_l%d%s", l, way);
        add_linear(net, &trunk->recurrent[cell], side, weight, bias, 4 * units, units, units);
    }
    add_linear(net, &trunk->residual, side, "residual.weight", "residual.bias", h, h, h);
    add_linear(net, &trunk->heads, side, "heads.weight", "heads.bias",
               (int64_t)c->layers[side] * c->experts, h, h);
}

/* A layer without a bias, of standard deviation 1/sqrt(cols) at first; one that writes to the
 * residual stream begins at zero, so that every block begins as the identity. */
static void add_weight(sida_net *net, sida_net_linear *layer, int side, const char *path,
                       const char *name, int64_t rows, int64_t cols, bool zero) {
    char full[40];
    snprintf(full, sizeof full, "%s%s.weight", path, name);
    layer->rows = rows;
    layer->cols = cols;
    add(net, &layer->weight, side, full, 2, rows, cols, 0, zero ? 0 : sqrtf(3.0f / (float)cols));
}

static void add_norm(sida_net *net, sida_net_linear *layer, int side, const char *path,
                     const char *name, int64_t width) {
    char full[40];
    snprintf(full, sizeof full, "%s%s.weight", path, name);
    layer->rows = 1;
    layer->cols = width;
    add(net, &layer->weight, side, full, 1, width, 1, 1, 0);
}

/* The bias of compress and heads begins at zero. */
static void add_biased(sida_net *net, sida_net_linear *layer, int side, const char *name,
                       int64_t rows, int64_t cols) {
    char bias[40];
    add_weight(net, layer, side, "", name, rows, cols, false);
    snprintf(bias, sizeof bias, "%s.bias", name);
    add(net, &layer->bias, side, bias, 1, rows, 1, 0, 0);
}

static void add_attend(sida_net *net, sida_net_attend *attend, int side, const char *path) {
    int64_t h = net->config.hidden;
    add_norm(net, &attend->norm, side, path, "norm", h);
    add_weight(net, &attend->query, side, path, "query", h, h, false);
    add_weight(net, &attend->key_value, side, path, "key_value", 2 * h, h, false);
    add_weight(net, &attend->output, side, path, "output", h, h, true);
}

static void lay_out_transformer(sida_net *net, int side) {
    const sida_net_config *c = &net->config;
    sida_net_trunk *trunk = &net->trunks[side];
    const int64_t h = c->hidden;
    const bool cross = side == 1 && c->layers[0] > 0;
    add_biased(net, &trunk->compress, side, "compress", h, c->d_model);
    add_norm(net, &trunk->norm_in, side, "", "norm_in", c->d_model);
    for (uint8_t b = 0; b < c->blocks; b++) {
        sida_net_block *block = &trunk->blocks[b];
        char path[24];
        snprintf(path, sizeof path, "blocks.%hhu.self.", b);
        add_attend(net, &block->self, side, path);
        char positions[40];
        snprintf(positions, sizeof positions, "%spositions", path);
        add(net, &block->self.positions, side, positions, 2, SIDA_NET_BUCKETS,
            h / SIDA_NET_HEAD_WIDTH, 0, 0);
        snprintf(path, sizeof path, "blocks.%hhu.cross.", b);
        if (cross) add_attend(net, &block->cross, side, path);
        snprintf(path, sizeof path, "blocks.%hhu.", b);
        add_norm(net, &block->norm, side, path, "norm", h);
        add_weight(net, &block->up, side, path, "up", SIDA_NET_UP * h, h, false);
        add_weight(net, &block->down, side, path, "down", h, SIDA_NET_UP * h, true);
    }
    if (cross) add_norm(net, &trunk->norm_memory, side, "", "norm_memory", h);
    add_norm(net, &trunk->norm_out, side, "", "norm_out", h);
    add_biased(net, &trunk->heads, side, "heads", (int64_t)c->layers[side] * c->experts, h);
}

static void lay_out(sida_net *net) {
    net->tensor_count = 0;
    net->parameter_count = 0;
    for (int side = 0; side < 2; side++) {
        net->trunks[side].present = net->config.layers[side] > 0;
        if (!net->trunks[side].present) continue;
        if (net->config.kind == SIDA_NET_TRANSFORMER)
            lay_out_transformer(net, side);
        else
            lay_out_lstm(net, side);
    }
}

sida_status sida_net_create(sida_net **out, const sida_net_config *config) {
    *out = NULL;
    sida_status status = SIDA_OK;
    sida_net *net = NULL;
    SIDA_TRY(sida_net_config_check(config));
    SIDA_TRY(SIDA_ALLOC(&net, 1, "a predictor"));
    net->config = *config;
    lay_out(net);
    SIDA_TRY(SIDA_ALLOC(&net->tensors, net->tensor_count, "a predictor's tensors"));
    SIDA_TRY(SIDA_ALLOC(&net->parameters, net->parameter_count, "a predictor's parameters"));
    lay_out(net);
    *out = net;
    net = NULL;
out:
    sida_net_destroy(net);
    return status;
}

void sida_net_destroy(sida_net *net) {
    if (!net) return;
    free(net->parameters);
    free(net->tensors);
    free(net);
}

void sida_net_initialise(sida_net *net, uint64_t seed) {
    sida_net_tensors_initialise(net->tensors, net->tensor_count, seed);
}

sida_weight sida_net_weight(const sida_net_linear *layer) {
    return (sida_weight){layer->weight, SIDA_F32, layer->rows, layer->cols};
}

/* --- files */

static const struct {
    const char *key;
    size_t offset;
    unsigned kinds; /* that have it: 1 << kind */
} config_fields[] = {{"d_model", offsetof(sida_net_config, d_model), ~0u},
                     {"hidden", offsetof(sida_net_config, hidden), ~0u},
                     {"lstm_layers", offsetof(sida_net_config, lstm_layers), 1u << SIDA_NET_LSTM},
                     {"blocks", offsetof(sida_net_config, blocks), 1u << SIDA_NET_TRANSFORMER},
                     {"experts", offsetof(sida_net_config, experts), ~0u},
                     {"vocabulary", offsetof(sida_net_config, vocabulary), ~0u},
                     {"layers_encoder", offsetof(sida_net_config, layers[0]), ~0u},
                     {"layers_decoder", offsetof(sida_net_config, layers[1]), ~0u}};
enum { config_field_count = sizeof config_fields / sizeof *config_fields };

static bool has_field(const sida_net_config *config, int field) {
    return config_fields[field].kinds >> config->kind & 1;
}

json_t *sida_net_config_to_json(const sida_net_config *config) {
    json_t *object = json_object();
    if (config->kind != SIDA_NET_LSTM)
        json_object_set_new(object, "kind", json_string(sida_net_kind_name(config->kind)));
    for (int i = 0; i < config_field_count; i++) {
        int32_t value;
        if (!has_field(config, i)) continue;
        memcpy(&value, (const char *)config + config_fields[i].offset, sizeof value);
        json_object_set_new(object, config_fields[i].key, json_integer(value));
    }
    if (config->bidirectional) json_object_set_new(object, "bidirectional", json_true());
    if (config->attention != SIDA_NET_SPARSEMAX)
        json_object_set_new(object, "attention",
                            json_string(sida_net_attention_name(config->attention)));
    return object;
}

sida_status sida_net_config_from_json(sida_net_config *out, const json_t *object,
                                      const char *file) {
    *out = (sida_net_config){0};
    const json_t *kind = json_object_get(object, "kind");
    if (kind) {
        const char *name = json_string_value(kind);
        if (!name || !sida_net_kind_from_name(&out->kind, name))
            return sida_fail(SIDA_ERROR_FORMAT,
                             "%s: its config's net.kind is '%.40s', which this version does not "
                             "know",
                             file, name ? name : "(no text)");
    }
    for (int i = 0; i < config_field_count; i++) {
        if (!has_field(out, i)) continue;
        const json_t *field = json_object_get(object, config_fields[i].key);
        if (!json_is_integer(field))
            return sida_fail(SIDA_ERROR_FORMAT, "%s: its config has no whole number net.%s", file,
                             config_fields[i].key);
        json_int_t value = json_integer_value(field);
        if (value < 0 || value > INT32_MAX)
            return sida_fail(SIDA_ERROR_FORMAT, "%s: its config's net.%s is out of range", file,
                             config_fields[i].key);
        int32_t narrow = (int32_t)value;
        memcpy((char *)out + config_fields[i].offset, &narrow, sizeof narrow);
    }
    const json_t *bidirectional = json_object_get(object, "bidirectional"),
                 *attention = json_object_get(object, "attention");
    if (bidirectional && !json_is_boolean(bidirectional))
        return sida_fail(SIDA_ERROR_FORMAT, "%s: its config's net.bidirectional is no boolean",
                         file);
    out->bidirectional = json_is_true(bidirectional);
    const char *name = attention ? json_string_value(attention) : "sparsemax";
    if (!name || !sida_net_attention_from_name(&out->attention, name))
        return sida_fail(
            SIDA_ERROR_FORMAT,
            "%s: its config's net.attention is '%.40s', not sparsemax, softmax or none", file,
            name ? name : "(no text)");
    if (sida_net_config_check(out) != SIDA_OK)
        return sida_fail_context(SIDA_ERROR_FORMAT, "%s", file);
    return SIDA_OK;
}

static void tensor_path(char path[64], const sida_net_tensor *tensor) {
    snprintf(path, 64, "tensors/%s", tensor->name);
}

sida_status sida_net_tensors_write(sida_h5_file *file, const sida_net_tensor *tensors,
                                   int32_t count) {
    sida_status status = SIDA_OK;
    for (int32_t i = 0; i < count; i++) {
        const sida_net_tensor *t = &tensors[i];
        char path[64];
        tensor_path(path, t);
        SIDA_TRY(sida_h5_write(file, path, SIDA_H5_F32, t->rank, t->shape, t->data));
    }
out:
    return status;
}

sida_status sida_net_tensors_check(sida_h5_file *file, const sida_net_tensor *tensors,
                                   int32_t count) {
    for (int32_t i = 0; i < count; i++) {
        const sida_net_tensor *t = &tensors[i];
        char path[64];
        int64_t shape[3] = {0, 1, 1};
        tensor_path(path, t);
        sida_status status = sida_h5_shape(file, path, SIDA_H5_F32, t->rank, shape);
        if (status != SIDA_OK) return status;
        if (shape[0] != t->shape[0] || (t->rank == 2 && shape[1] != t->shape[1]))
            return sida_fail(
                SIDA_ERROR_FORMAT,
                "%s: %s is [%" PRId64 ", %" PRId64 "], its config says [%" PRId64 ", %" PRId64 "]",
                sida_h5_path(file), path, shape[0], shape[1], t->shape[0], t->shape[1]);
    }
    return SIDA_OK;
}

sida_status sida_net_tensors_read(sida_h5_file *file, const sida_net_tensor *tensors,
                                  int32_t count) {
    sida_status status = SIDA_OK;
    for (int32_t i = 0; i < count; i++) {
        const sida_net_tensor *t = &tensors[i];
        char path[64];
        tensor_path(path, t);
        SIDA_TRY(sida_h5_read_rows(file, path, SIDA_H5_F32, 0, t->shape[0], t->data));
        for (int64_t k = 0; k < t->count; k++)
            if (!isfinite(t->data[k]))
                SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: %s holds a value that is not finite",
                          sida_h5_path(file), path);
    }
out:
    return status;
}

void sida_net_tensors_initialise(const sida_net_tensor *tensors, int32_t count, uint64_t seed) {
    sida_rng rng = sida_rng_seed(seed);
    for (int32_t i = 0; i < count; i++)
        for (int64_t k = 0; k < tensors[i].count; k++)
            tensors[i].data[k] =
                tensors[i].centre + (2.0f * sida_rng_f32(&rng) - 1.0f) * tensors[i].bound;
}

sida_status sida_net_write(sida_h5_file *file, const sida_net *net) {
    return sida_net_tensors_write(file, net->tensors, net->tensor_count);
}

sida_status sida_net_read(sida_net **out, sida_h5_file *file, const sida_net_config *config) {
    *out = NULL;
    sida_status status = SIDA_OK;
    sida_net *net = NULL, shapes = {.config = *config};
    SIDA_TRY(sida_net_config_check(config));
    /* A pass over the shapes alone first: a small file must not make us take much memory. */
    lay_out(&shapes);
    SIDA_TRY(SIDA_ALLOC(&shapes.tensors, shapes.tensor_count, "a predictor's tensors"));
    lay_out(&shapes);
    SIDA_TRY(sida_net_tensors_check(file, shapes.tensors, shapes.tensor_count));
    SIDA_TRY(sida_net_create(&net, config));
    SIDA_TRY(sida_net_tensors_read(file, net->tensors, net->tensor_count));
    *out = net;
    net = NULL;
out:
    sida_net_destroy(net);
    free(shapes.tensors);
    return status;
}
