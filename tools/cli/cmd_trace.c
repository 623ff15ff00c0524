/* sida trace: run the full model over a corpus and record its routers. */
#include "data/corpus.h"
#include "tools/cli/cli.h"
#include "tracer/tracer.h"

#include <stdio.h>
#include <string.h>

enum {
    KEY_LIMIT = 0x100,
    KEY_RESUME,
    KEY_DRY_RUN,
    KEY_MAX_TOKENS,
    KEY_TRUNCATE,
    KEY_GENERATE,
    KEY_PART_TOKENS,
    KEY_THREADS,
    KEY_DEVICE,
    KEY_JSON
};

typedef struct options {
    sida_tracer_options tracer;
    bool format_known, json;
    sida_progress progress;
    char stage[16];
} options;

static const struct argp_option argp_options[] = {
    {"model", 'm', "DIR", 0, "Hugging Face directory of the model", 0},
    {"format", 'f', "FORMAT", 0, "text, jsonl, tsv, sst2, mrpc or multirc", 0},
    {"input", 'i', "FILE", 0, "the corpus, plain or gzip", 0},
    {"output", 'o', "T.h5", 0, "the trace", 0},
    {"top", 't', "T", 0, "log-probabilities kept a token and MoE layer (30)", 0},
    {"batch", 'b', "N", 0, "sequences a batch (16)", 0},
    {"limit", KEY_LIMIT, "N", 0, "stop after N records", 0},
    {"resume", KEY_RESUME, 0, 0, "go on with what a killed run finished", 0},
    {"dry-run", KEY_DRY_RUN, 0, 0, "only run the model over the corpus: record and write nothing",
     0},
    {"max-tokens", KEY_MAX_TOKENS, "N", 0, "longest input or target in tokens (512)", 0},
    {"truncate", KEY_TRUNCATE, 0, 0, "cut longer ones instead of refusing them", 0},
    {"generate", KEY_GENERATE, "N", 0, "greedy tokens traced where there is no target (16)", 0},
    {"part-tokens", KEY_PART_TOKENS, "N", 0, "tokens a part of the unfinished trace (65536)", 0},
    {"device", KEY_DEVICE, "NAME", 0, "cpu, cuda, or auto (default): cuda where a GPU is present",
     0},
    {"threads", KEY_THREADS, "N", 0, "CPU threads (all)", 0},
    {"json", KEY_JSON, 0, 0, "print the summary as JSON", 0},
    {0}};

static error_t parse(int key, char *text, struct argp_state *state) {
    options *o = state->input;
    sida_tracer_options *t = &o->tracer;
    switch (key) {
    case 'm':
        t->model = text;
        return 0;
    case 'i':
        t->input = text;
        return 0;
    case 'o':
        t->output = text;
        return 0;
    case 'f':
        t->format = sida_cli_format(state, text);
        o->format_known = true;
        return 0;
    case 't':
        t->top = (int32_t)sida_cli_i64(state, "--top", text, 1, 65535);
        return 0;
    case 'b':
        t->batch = (int32_t)sida_cli_i64(state, "--batch", text, 1, 4096);
        return 0;
    case KEY_LIMIT:
        t->limit = sida_cli_i64(state, "--limit", text, 1, INT64_MAX);
        return 0;
    case KEY_RESUME:
        t->resume = true;
        return 0;
    case KEY_DRY_RUN:
        t->dry_run = true;
        return 0;
    case KEY_MAX_TOKENS:
        t->max_tokens = (int32_t)sida_cli_i64(state, "--max-tokens", text, 2, 8192);
        return 0;
    case KEY_TRUNCATE:
        t->truncate = true;
        return 0;
    case KEY_GENERATE:
        t->generate = (int32_t)sida_cli_i64(state, "--generate", text, 1, 8192);
        return 0;
    case KEY_PART_TOKENS:
        t->part_tokens = sida_cli_i64(state, "--part-tokens", text, 1, 1 << 30);
        return 0;
    case KEY_THREADS:
        sida_cli_set_threads(sida_cli_i64(state, "--threads", text, 1, 1024));
        return 0;
    case KEY_DEVICE:
        t->device = text;
        return 0;
    case KEY_JSON:
        o->json = true;
        return 0;
    case ARGP_KEY_END:
        sida_cli_require(state, "--model", t->model);
        sida_cli_require(state, "--format", o->format_known ? t : NULL);
        sida_cli_require(state, "--input", t->input);
        if (!t->dry_run) sida_cli_require(state, "--output", t->output);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static bool on_progress(void *context, const char *stage, double fraction, int64_t tokens) {
    options *o = context;
    if (strcmp(o->stage, stage) != 0) {
        snprintf(o->stage, sizeof o->stage, "%s", stage);
        sida_progress_end(&o->progress);
        o->progress = sida_progress_begin(o->stage, "tokens");
    }
    sida_progress_update(&o->progress, fraction, tokens, NULL);
    return !sida_cli_interrupted();
}

static sida_status print_report(const options *o, const sida_tracer_report *r) {
    int64_t tokens = r->tokens[0] + r->tokens[1];
    double rate = r->seconds > 0 ? (double)r->new_tokens / r->seconds : 0,
           bytes = tokens > 0 ? (double)r->bytes / (double)tokens : 0;
    const char *name = o->tracer.dry_run ? "dry run" : o->tracer.output;
    if (o->json)
        return sida_cli_print_json(
            json_pack("{s:s, s:s, s:I, s:I, s:I, s:I, s:i, s:i, s:f, s:f, s:I, s:f}", "trace", name,
                      "device", r->device, "sequences", (json_int_t)r->sequences, "encoder_tokens",
                      (json_int_t)r->tokens[0], "decoder_tokens", (json_int_t)r->tokens[1],
                      "new_tokens", (json_int_t)r->new_tokens, "parts", (int)r->parts,
                      "parts_reused", (int)r->parts_reused, "tokens_per_s", rate, "merge_s",
                      r->merge_seconds, "bytes", (json_int_t)r->bytes, "bytes_per_token", bytes));
    if (r->parts_reused > 0) printf("%d finished parts reused; ", r->parts_reused);
    printf("%s: %lld sequences, %lld encoder and %lld decoder tokens, ", name,
           (long long)r->sequences, (long long)r->tokens[0], (long long)r->tokens[1]);
    if (!o->tracer.dry_run) printf("%.1f bytes a token, ", bytes);
    printf("%.0f tokens/s on %s\n", rate, r->device);
    return sida_cli_flush();
}

int sida_cmd_trace(int argc, char **argv) {
    options o = {.tracer = SIDA_TRACER_OPTIONS_INIT};
    const struct argp argp = {argp_options,
                              parse,
                              NULL,
                              "Runs the full model over a corpus and writes its router activations "
                              "to an HDF5 trace.\v"
                              "The trace appears only when it is complete. Until then finished "
                              "parts lie in T.h5.parts; after a kill, the same command with "
                              "--resume goes on from them to the same bytes.",
                              NULL,
                              NULL,
                              NULL};
    sida_tracer_report report;
    sida_cli_parse(&argp, argc, argv, &o);
    sida_cli_catch_signals();
    o.tracer.progress = on_progress;
    o.tracer.context = &o;
    sida_status status = sida_tracer_run(&o.tracer, &report);
    sida_progress_end(&o.progress);
    if (status == SIDA_OK) status = print_report(&o, &report);
    return sida_cli_report(status);
}
