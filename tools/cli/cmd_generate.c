/* sida generate: an answer for each line of text, with every expert on the device. */
#include "data/batch.h"
#include "formats/base/clock.h"
#include "formats/base/file.h"
#include "formats/base/memory.h"
#include "formats/tokenizer.h"
#include "runtime/backend/backend.h"
#include "runtime/model/model.h"
#include "tools/cli/cli.h"
#include "tools/cli/measure.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    KEY_MAX_NEW_TOKENS = 0x100,
    KEY_MAX_TOKENS,
    KEY_TRUNCATE,
    KEY_JSON,
    KEY_THREADS,
    KEY_DEVICE
};

typedef struct options {
    const char *model, *input, *device;
    int32_t batch, max_new_tokens, max_tokens;
    bool truncate, json;
} options;

static const struct argp_option argp_options[] = {
    {"model", 'm', "DIR", 0, "Hugging Face directory of the model", 0},
    {"input", 'i', "FILE", 0, "text, one input a line, plain or gzip", 0},
    {"batch", 'b', "N", 0, "sequences a batch (1)", 0},
    {"max-new-tokens", KEY_MAX_NEW_TOKENS, "N", 0, "longest answer in tokens (16)", 0},
    {"max-tokens", KEY_MAX_TOKENS, "N", 0, "longest input in tokens (512)", 0},
    {"truncate", KEY_TRUNCATE, 0, 0, "cut longer ones instead of refusing them", 0},
    {"threads", KEY_THREADS, "N", 0, "CPU threads (all)", 0},
    {"device", KEY_DEVICE, "NAME", 0, "cpu, cuda, or auto (default): cuda where a GPU is present",
     0},
    {"json", KEY_JSON, 0, 0, "print answers and timing as JSON", 0},
    {0}};

static error_t parse(int key, char *text, struct argp_state *state) {
    options *o = state->input;
    switch (key) {
    case 'm':
        o->model = text;
        return 0;
    case 'i':
        o->input = text;
        return 0;
    case 'b':
        o->batch = (int32_t)sida_cli_i64(state, "--batch", text, 1, 4096);
        return 0;
    case KEY_MAX_NEW_TOKENS:
        o->max_new_tokens = (int32_t)sida_cli_i64(state, "--max-new-tokens", text, 1, 65536);
        return 0;
    case KEY_MAX_TOKENS:
        o->max_tokens = (int32_t)sida_cli_i64(state, "--max-tokens", text, 2, 65536);
        return 0;
    case KEY_TRUNCATE:
        o->truncate = true;
        return 0;
    case KEY_THREADS:
        sida_cli_set_threads(sida_cli_i64(state, "--threads", text, 1, 1024));
        return 0;
    case KEY_DEVICE:
        o->device = text;
        return 0;
    case KEY_JSON:
        o->json = true;
        return 0;
    case ARGP_KEY_END:
        sida_cli_require(state, "--model", o->model);
        sida_cli_require(state, "--input", o->input);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* What the command holds while it runs. */
typedef struct session {
    const options *options;
    sida_backend *backend;
    sida_model *model;
    sida_resident *resident;
    sida_tokenizer *tokenizer;
    sida_corpus *corpus;
    sida_batcher *batcher;
    sida_run *run;
    sida_run_limits limits; /* of `run` */
    int32_t *ids, *counts;
    json_t *answers; /* --json */
    int64_t sequences, input_tokens, new_tokens;
    double encode_seconds, generate_seconds;
    double sampled; /* when the driver was last asked what is in use */
} session;

static sida_status session_open(session *s) {
    sida_status status = SIDA_OK;
    const options *o = s->options;
    char *path = NULL;
    SIDA_TRY(sida_path_join(&path, o->model, "spiece.model"));
    SIDA_TRY(sida_tokenizer_open(&s->tokenizer, path));
    SIDA_TRY(sida_corpus_open(&s->corpus, SIDA_CORPUS_TEXT, o->input));
    SIDA_TRY(sida_backend_create_named(&s->backend, o->device));
    SIDA_TRY(sida_model_open(&s->model, s->backend, o->model));
    SIDA_TRY(sida_resident_create(&s->resident, s->model));
    const sida_model_info *info = sida_model_get_info(s->model);
    sida_batch_options batching = {.sequences = o->batch,
                                   .max_tokens = o->max_tokens,
                                   .truncate = o->truncate,
                                   .vocabulary = info->vocabulary,
                                   .eos = info->eos};
    SIDA_TRY(sida_batcher_create(&s->batcher, s->corpus, s->tokenizer, &batching));
    SIDA_TRY(SIDA_ALLOC(&s->ids, (int64_t)o->batch * o->max_new_tokens, "the answers"));
    SIDA_TRY(SIDA_ALLOC(&s->counts, o->batch, "the answers"));
    if (o->json) s->answers = json_array();
out:
    free(path);
    return status;
}

static void session_close(session *s) {
    free(s->ids);
    free(s->counts);
    json_decref(s->answers);
    sida_run_destroy(s->run);
    sida_batcher_destroy(s->batcher);
    sida_corpus_close(s->corpus);
    sida_tokenizer_destroy(s->tokenizer);
    sida_resident_destroy(s->resident);
    sida_model_destroy(s->model);
    sida_backend_destroy(s->backend);
}

/* A run with room for the batch; a longer one than ever before gets a new run. */
static sida_status session_reserve(session *s, const sida_batch *batch) {
    int64_t tokens = sida_ragged_tokens(&batch->input);
    if (s->run && tokens <= s->limits.input_tokens) return SIDA_OK;
    sida_run_destroy(s->run);
    s->run = NULL;
    s->limits = (sida_run_limits){.sequences = s->options->batch,
                                  .input_tokens = tokens + tokens / 4,
                                  .step_tokens = s->options->batch,
                                  .decoder_positions = s->options->max_new_tokens};
    return sida_run_create(&s->run, s->model, &s->limits);
}

static sida_status print_answers(session *s, const sida_batch *batch) {
    sida_status status = SIDA_OK;
    char *text = NULL;
    for (int32_t i = 0; i < batch->input.sequences; i++) {
        const int32_t *ids = s->ids + (int64_t)i * s->options->max_new_tokens;
        SIDA_TRY(sida_tokenizer_decode(&text, s->tokenizer, ids, (size_t)s->counts[i]));
        s->new_tokens += s->counts[i];
        if (s->answers)
            json_array_append_new(s->answers,
                                  json_pack("{s:I, s:s, s:i}", "line", (json_int_t)batch->lines[i],
                                            "answer", text, "tokens", (int)s->counts[i]));
        else
            puts(text);
        free(text);
        text = NULL;
    }
out:
    free(text);
    return status;
}

static sida_status answer(session *s, const sida_batch *batch) {
    sida_status status = SIDA_OK;
    const sida_moe_driver *driver = sida_resident_driver(s->resident, NULL, NULL, NULL);
    sida_generate_options generate = {.max_new_tokens = s->options->max_new_tokens};
    SIDA_TRY(session_reserve(s, batch));
    double begin = sida_clock_seconds();
    SIDA_TRY(sida_run_encode(s->run, &batch->input, driver));
    SIDA_TRY(sida_stream_synchronize(sida_run_stream(s->run))); /* for the time that is told */
    double encoded = sida_clock_seconds();
    SIDA_TRY(sida_run_generate(s->run, &generate, driver, s->ids, s->counts));
    s->generate_seconds += sida_clock_seconds() - encoded;
    s->encode_seconds += encoded - begin;
    s->sequences += batch->input.sequences;
    s->input_tokens += sida_ragged_tokens(&batch->input);
    /* Between batches, and not every time: asking takes a while. */
    if (s->sequences == batch->input.sequences || encoded - s->sampled > 0.1) {
        SIDA_TRY(sida_backend_sample(s->backend));
        s->sampled = encoded;
    }
    SIDA_TRY(print_answers(s, batch));
out:
    return status;
}

static json_t *report(session *s) {
    double seconds = s->encode_seconds + s->generate_seconds;
    json_t *answers = s->answers;
    sida_memory_usage usage;
    sida_backend_memory(s->backend, &usage);
    s->answers = NULL;
    return json_pack(
        "{s:I, s:I, s:I, s:f, s:f, s:f, s:s, s:I, s:I, s:b, s:o}", "sequences",
        (json_int_t)s->sequences, "input_tokens", (json_int_t)s->input_tokens, "new_tokens",
        (json_int_t)s->new_tokens, "encode_s", s->encode_seconds, "generate_s", s->generate_seconds,
        "tokens_per_s", seconds > 0 ? (double)(s->input_tokens + s->new_tokens) / seconds : 0.0,
        "device", s->backend->table->name, "device_bytes_peak", (json_int_t)usage.peak_bytes,
        "driver_bytes_peak", (json_int_t)usage.driver_peak_bytes, "driver_alone",
        usage.driver_alone, "answers", answers);
}

/* On stderr: stdout is for the answers. */
static void print_memory(session *s) {
    sida_memory_usage usage;
    char peak[160];
    sida_backend_memory(s->backend, &usage);
    fprintf(stderr, "device memory: %s, %s\n", s->backend->table->name,
            sida_format_peak(peak, usage.driver_peak_bytes, usage.peak_bytes, usage.driver_alone));
}

static sida_status generate(session *s) {
    sida_status status = SIDA_OK;
    sida_batch *batch = NULL;
    SIDA_TRY(session_open(s));
    for (;;) {
        SIDA_TRY(sida_batcher_next(s->batcher, &batch));
        if (!batch) break;
        SIDA_TRY(answer(s, batch));
        sida_batch_destroy(batch);
        batch = NULL;
        if (sida_cli_interrupted()) SIDA_FAIL(SIDA_ERROR_CANCELLED, "interrupted");
    }
    if (s->answers)
        SIDA_TRY(sida_cli_print_json(report(s)));
    else
        print_memory(s);
    SIDA_TRY(sida_cli_flush());
out:
    sida_batch_destroy(batch);
    return status;
}

int sida_cmd_generate(int argc, char **argv) {
    options o = {.batch = 1, .max_new_tokens = 16, .max_tokens = 512};
    session s = {.options = &o};
    const struct argp argp = {argp_options,
                              parse,
                              NULL,
                              "Answers each line of text with greedy decoding; every expert stays "
                              "on the device.",
                              NULL,
                              NULL,
                              NULL};
    sida_cli_parse(&argp, argc, argv, &o);
    sida_cli_catch_signals();
    int code = sida_cli_report(generate(&s));
    session_close(&s);
    return code;
}
