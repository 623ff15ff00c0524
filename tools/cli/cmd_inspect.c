/* sida inspect: what is in a trace, a part, a predictor, a trainer's checkpoint or a model. */
#include "formats/base/file.h"
#include "formats/checkpoint.h"
#include "formats/h5.h"
#include "formats/predictor_file.h"
#include "formats/trace.h"
#include "tools/cli/cli.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

typedef struct options {
    const char *path;
    bool json, check;
} options;

static const struct argp_option argp_options[] = {
    {"json", 'j', 0, 0, "print as JSON", 0},
    {"check", 'c', 0, 0, "read all of a trace and tell all that is wrong with it, a line a problem",
     0},
    {0}};

static error_t parse(int key, char *text, struct argp_state *state) {
    options *o = state->input;
    switch (key) {
    case 'j':
        o->json = true;
        return 0;
    case 'c':
        o->check = true;
        return 0;
    case ARGP_KEY_ARG:
        if (o->path) return ARGP_ERR_UNKNOWN;
        o->path = text;
        return 0;
    case ARGP_KEY_END:
        sida_cli_require(state, "FILE", o->path);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void set_fingerprint(json_t *to, const char *key, sida_fingerprint value) {
    char text[SIDA_FINGERPRINT_TEXT];
    sida_fingerprint_format(text, value);
    json_object_set_new(to, key, json_string(text));
}

static sida_status describe_model(json_t *to, const char *path) {
    sida_checkpoint *checkpoint = NULL;
    sida_fingerprint fingerprint;
    sida_status status = SIDA_OK;
    static const char *const keys[] = {"model_type",
                                       "vocab_size",
                                       "d_model",
                                       "d_kv",
                                       "d_ff",
                                       "num_heads",
                                       "num_layers",
                                       "num_decoder_layers",
                                       "num_sparse_encoder_layers",
                                       "num_sparse_decoder_layers",
                                       "num_experts",
                                       "expert_capacity",
                                       "feed_forward_proj",
                                       "tie_word_embeddings"};
    uint64_t weights = 0, bytes = 0, expert_bytes = 0, by_type[3] = {0};
    SIDA_TRY(sida_checkpoint_open(&checkpoint, path));
    SIDA_TRY(sida_checkpoint_fingerprint(&fingerprint, checkpoint));
    for (size_t i = 0; i < sida_checkpoint_count(checkpoint); i++) {
        const sida_tensor_view *tensor = sida_checkpoint_at(checkpoint, i);
        weights += tensor->bytes / sida_dtype_bytes(tensor->dtype);
        bytes += tensor->bytes;
        by_type[tensor->dtype] += tensor->bytes;
        if (strstr(tensor->name, ".experts.")) expert_bytes += tensor->bytes;
    }
    json_object_set_new(to, "kind", json_string("model"));
    json_object_set_new(to, "path", json_string(path));
    set_fingerprint(to, "fingerprint", fingerprint);
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        json_t *value = json_object_get(sida_checkpoint_config(checkpoint), keys[i]);
        if (value) json_object_set(to, keys[i], value);
    }
    json_object_set_new(to, "tensors", json_integer((json_int_t)sida_checkpoint_count(checkpoint)));
    json_object_set_new(to, "weights", json_integer((json_int_t)weights));
    json_object_set_new(to, "bytes", json_integer((json_int_t)bytes));
    json_object_set_new(to, "expert_bytes", json_integer((json_int_t)expert_bytes));
    for (int t = 0; t < 3; t++)
        if (by_type[t]) {
            char key[32];
            snprintf(key, sizeof key, "bytes_%s", sida_dtype_name((sida_dtype)t));
            json_object_set_new(to, key, json_integer((json_int_t)by_type[t]));
        }
out:
    sida_checkpoint_destroy(checkpoint);
    return status;
}

/* JSON text as a value, or as a string when it is not JSON (a foreign trace's). */
static json_t *parse_text(const char *text) {
    json_t *value = text ? json_loads(text, 0, NULL) : NULL;
    return value ? value : json_string(text ? text : "");
}

typedef struct problems {
    json_t *list; /* NULL: lines go to standard error, but for the last */
    char last[512];
    int64_t count;
} problems;

static void take_problem(void *context, const char *line) {
    problems *p = context;
    if (!p->list && p->count > 0) fprintf(stderr, "sida: %s\n", p->last);
    if (p->list) {
        json_t *text = json_string(line);
        json_array_append_new(p->list, text ? text : json_string("(not UTF-8)"));
    }
    snprintf(p->last, sizeof p->last, "%s", line);
    p->count++;
}

/* The last problem is the message of the status, so that each is one line. */
static sida_status check_trace(const options *o) {
    problems found = {.list = o->json ? json_array() : NULL};
    json_t *object;
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_trace_diagnose(o->path, take_problem, &found));
    if (found.count == 0) goto out;
    if (!o->json) SIDA_FAIL(SIDA_ERROR_FORMAT, "%s", found.last);
    object = json_object();
    json_object_set_new(object, "path", json_string(o->path));
    json_object_set_new(object, "check", json_string("unsound"));
    json_object_set(object, "problems", found.list);
    SIDA_TRY(sida_cli_print_json(object));
    SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: problems: %" PRId64, o->path, found.count);
out:
    json_decref(found.list);
    return status;
}

static sida_status describe_trace(json_t *to, const options *o) {
    sida_trace *trace = NULL;
    struct stat file;
    sida_status status = SIDA_OK;
    if (o->check) SIDA_TRY(check_trace(o));
    SIDA_TRY(sida_trace_open(&trace, o->path));
    const sida_trace_info *info = sida_trace_get_info(trace);
    int64_t tokens = info->tokens[0] + info->tokens[1];
    int64_t bytes = stat(o->path, &file) == 0 ? (int64_t)file.st_size : 0;
    json_object_set_new(
        to, "kind",
        json_string(sida_trace_kind(trace) == SIDA_H5_PART ? "part of a trace" : "trace"));
    json_object_set_new(to, "path", json_string(o->path));
    json_object_set_new(to, "family", json_string(info->family ? info->family : ""));
    set_fingerprint(to, "model", info->model);
    set_fingerprint(to, "tokenizer", info->tokenizer);
    set_fingerprint(to, "input", info->input);
    json_object_set_new(to, "options", parse_text(info->options));
    json_object_set_new(to, "sequences", json_integer(info->sequences));
    json_object_set_new(to, "encoder_tokens", json_integer(info->tokens[0]));
    json_object_set_new(to, "decoder_tokens", json_integer(info->tokens[1]));
    json_object_set_new(to, "encoder_moe_layers", json_integer(info->layers[0]));
    json_object_set_new(to, "decoder_moe_layers", json_integer(info->layers[1]));
    json_object_set_new(to, "experts", json_integer(info->experts));
    json_object_set_new(to, "top_k", json_integer(info->top_k));
    json_object_set_new(to, "top", json_integer(info->top));
    json_object_set_new(to, "targets", json_boolean(info->has_targets));
    json_object_set_new(to, "bytes", json_integer(bytes));
    json_object_set_new(to, "bytes_per_token",
                        json_real(tokens > 0 ? (double)bytes / (double)tokens : 0));
    if (o->check) json_object_set_new(to, "check", json_string("sound"));
out:
    sida_trace_close(trace);
    return status;
}

static sida_status describe_predictor(json_t *to, const char *path) {
    sida_h5_file *file = NULL;
    sida_predictor_meta meta = {0};
    char **paths = NULL;
    size_t count = 0;
    sida_status status = SIDA_OK;
    json_t *tensors = NULL;
    int64_t weights = 0;
    SIDA_TRY(sida_predictor_file_open(&file, &meta, path));
    json_object_set_new(to, "kind",
                        json_string(sida_h5_file_kind(file) == SIDA_H5_CHECKPOINT
                                        ? "checkpoint of a training run"
                                        : "predictor"));
    json_object_set_new(to, "path", json_string(path));
    json_object_set_new(to, "source", json_string(meta.source));
    set_fingerprint(to, "model", meta.model);
    set_fingerprint(to, "tokenizer", meta.tokenizer);
    json_object_set(to, "config", meta.config);
    SIDA_TRY(sida_h5_list(file, &paths, &count));
    tensors = json_object();
    for (size_t i = 0; i < count; i++) {
        int64_t shape[3], size = 1;
        int rank = 1;
        if (strncmp(paths[i], "tensors/", 8) != 0 && strncmp(paths[i], "/tensors/", 9) != 0)
            continue;
        while (rank <= 3 && sida_h5_shape(file, paths[i], SIDA_H5_F32, rank, shape) != SIDA_OK)
            rank++;
        if (rank > 3) SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: %s is no tensor", path, paths[i]);
        json_t *extents = json_array();
        for (int d = 0; d < rank; d++) {
            json_array_append_new(extents, json_integer(shape[d]));
            size *= shape[d];
        }
        weights += size;
        json_object_set_new(tensors, strrchr(paths[i], '/') + 1, extents);
    }
    json_object_set_new(to, "weights", json_integer(weights));
    json_object_set(to, "tensors", tensors);
out:
    json_decref(tensors);
    for (size_t i = 0; i < count; i++) free(paths[i]);
    free(paths);
    sida_h5_close(file);
    sida_predictor_meta_free(&meta);
    return status;
}

static sida_status describe_file(json_t *to, const options *o) {
    sida_h5_file *file = NULL;
    sida_status status = sida_h5_open(&file, o->path,
                                      1u << SIDA_H5_TRACE | 1u << SIDA_H5_PART |
                                          1u << SIDA_H5_PREDICTOR | 1u << SIDA_H5_CHECKPOINT,
                                      true);
    if (status != SIDA_OK) return status;
    sida_h5_kind kind = sida_h5_file_kind(file);
    sida_h5_close(file);
    if (kind == SIDA_H5_PREDICTOR || kind == SIDA_H5_CHECKPOINT)
        return describe_predictor(to, o->path);
    return describe_trace(to, o);
}

static void print_plain(const json_t *object) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)object, key, value) {
        if (json_is_string(value)) {
            printf("%-28s %s\n", key, json_string_value(value));
        } else {
            char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(6));
            printf("%-28s %s\n", key, text ? text : "?");
            free(text);
        }
    }
}

static sida_status inspect(const options *o) {
    struct stat file;
    json_t *description = json_object();
    sida_status status = stat(o->path, &file) == 0 && S_ISDIR(file.st_mode)
                             ? describe_model(description, o->path)
                             : describe_file(description, o);
    if (status == SIDA_OK && o->json) return sida_cli_print_json(description);
    if (status == SIDA_OK) {
        print_plain(description);
        status = sida_cli_flush();
    }
    json_decref(description);
    return status;
}

int sida_cmd_inspect(int argc, char **argv) {
    options o = {0};
    const struct argp argp = {
        argp_options,
        parse,
        "FILE",
        "Says what is in a trace, a part of one, a predictor, a training checkpoint or a model "
        "directory, and how many bytes a token a trace takes. --check is for traces that other "
        "software wrote: every problem is a line, and the exit status is 1.",
        NULL,
        NULL,
        NULL};
    sida_cli_parse(&argp, argc, argv, &o);
    return sida_cli_report(inspect(&o));
}
