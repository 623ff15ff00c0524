/* sida run: answers under a memory budget, and what that cost. */
#include "formats/base/file.h"
#include "runtime/sida.h"
#include "tools/cli/cli.h"
#include "tools/cli/measure.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    KEY_ROUTING = 0x100,
    KEY_ACTIVE_SHARE,
    KEY_RANDOM,
    KEY_SCORE,
    KEY_SEED,
    KEY_BUDGET,
    KEY_POLICY,
    KEY_QUEUE,
    KEY_NO_PREFETCH,
    KEY_NO_REFINE,
    KEY_NO_COMPARE,
    KEY_DIGEST,
    KEY_JSON,
    KEY_LIMIT,
    KEY_MAX_TOKENS,
    KEY_MAX_NEW_TOKENS,
    KEY_TRUNCATE,
    KEY_THREADS,
    KEY_DEVICE
};

typedef struct options {
    sida_engine_options engine;
    sida_job job;
    const char *output;
    bool json, new_tokens_given;
    FILE *answers; /* of --output */
    char *temporary;
    sida_progress progress;
} options;

static const struct argp_option argp_options[] = {
    {0, 0, 0, 0, "What runs", 1},
    {"model", 'm', "DIR", 0, "Hugging Face directory of the model", 1},
    {"predictor", 'p', "P.h5", 0,
     "hash function of `sida train`, of any source; a trace of this input: its own routing, the "
     "oracle; none: experts load on demand",
     1},
    {"format", 'f', "FORMAT", 0, "text, jsonl, tsv, sst2, mrpc, multirc or span-corruption", 1},
    {"input", 'i', "FILE", 0, "the records, plain or gzip", 1},
    {"limit", KEY_LIMIT, "N", 0, "stop after N records", 1},
    {"max-tokens", KEY_MAX_TOKENS, "N", 0, "longest input in tokens (512)", 1},
    {"truncate", KEY_TRUNCATE, 0, 0, "cut longer ones instead of refusing them", 1},
    {"max-new-tokens", KEY_MAX_NEW_TOKENS, "N", 0,
     "longest answer in tokens (16); with --score the longest target (128)", 1},
    {"score", KEY_SCORE, 0, 0,
     "do not answer: how probable is each target, forced token by token? sst2, mrpc, multirc: the "
     "answer is the more probable label",
     1},
    {"seed", KEY_SEED, "N", 0, "span-corruption: which spans are cut out (0)", 1},
    {"batch", 'b', "N", 0, "sequences a batch (1)", 1},
    {0, 0, 0, 0, "Which experts compute", 2},
    {"routing", KEY_ROUTING, "KIND", 0,
     "exact (default): the router decides, output never changes; guided: the router's best of the "
     "predicted; predicted: the predictor decides",
     2},
    {"top-k", 'k', "K", 0, "experts predicted a token and layer (3)", 2},
    {"active-share", KEY_ACTIVE_SHARE, "P%", 0,
     "guided: at most so many of a layer's experts a sequence, those of its predicted ones that "
     "would be missed most; wants a --top-k of 5 or more",
     2},
    {"random", KEY_RANDOM, "SEED", 0,
     "guided, predicted: a baseline, as many experts as predicted but drawn at random", 2},
    {"no-compare", KEY_NO_COMPARE, 0, 0, "guided, predicted: leave the full model out", 2},
    {0, 0, 0, 0, "Where experts live", 3},
    {"budget", KEY_BUDGET, "B", 0,
     "20% of all experts, 12-experts, or a size (2GiB) for everything on the device (100%)", 3},
    {"policy", KEY_POLICY, "NAME", 0, "which expert gives way: lookahead (default), lru, fifo", 3},
    {"queue", KEY_QUEUE, "N", 0, "batches predicted ahead (8)", 3},
    {"no-prefetch", KEY_NO_PREFETCH, 0, 0, "load experts only when a layer needs them", 3},
    {"no-refine", KEY_NO_REFINE, 0, 0,
     "exact: do not predict the layers behind one again once it has chosen", 3},
    {"device", KEY_DEVICE, "NAME", 0, "cpu, cuda, or auto (default): cuda where a GPU is present",
     3},
    {"threads", KEY_THREADS, "N", 0, "CPU threads (all)", 3},
    {0, 0, 0, 0, "What is printed", 4},
    {"output", 'o', "FILE", 0,
     "write one answer a line; with --score, between tabs: the answer, -log p of the target, its "
     "tokens, the target",
     4},
    {"digest", KEY_DIGEST, 0, 0, "a hash of all raw logits", 4},
    {"json", KEY_JSON, 0, 0, "print the report as JSON", 4},
    {0}};

/* "40%", or "40" */
static double share_of(struct argp_state *state, const char *text) {
    char number[32];
    size_t length = strlen(text);
    if (length > 1 && text[length - 1] == '%' && length < sizeof number) {
        snprintf(number, sizeof number, "%.*s", (int)length - 1, text);
        text = number;
    }
    return sida_cli_f64(state, "--active-share", text, 0.001, 100) / 100;
}

static error_t parse_engine(int key, char *text, struct argp_state *state) {
    options *o = state->input;
    sida_engine_options *e = &o->engine;
    switch (key) {
    case 'm':
        e->model = text;
        return 0;
    case 'p':
        e->predictor = text;
        return 0;
    case 'b':
        e->batch = (int32_t)sida_cli_i64(state, "--batch", text, 1, 4096);
        return 0;
    case 'k':
        e->top_k = (int32_t)sida_cli_i64(state, "--top-k", text, 1, 65535);
        return 0;
    case KEY_ROUTING:
        e->routing = text;
        return 0;
    case KEY_ACTIVE_SHARE:
        e->active_share = share_of(state, text);
        return 0;
    case KEY_RANDOM:
        e->random_experts = true;
        e->random_seed = (uint64_t)sida_cli_i64(state, "--random", text, 0, INT64_MAX);
        return 0;
    case KEY_BUDGET:
        e->budget = text;
        return 0;
    case KEY_POLICY:
        e->policy = text;
        return 0;
    case KEY_DEVICE:
        e->device = text;
        return 0;
    case KEY_QUEUE:
        e->queue = (int32_t)sida_cli_i64(state, "--queue", text, 1, 1024);
        return 0;
    case KEY_NO_PREFETCH:
        e->no_prefetch = true;
        return 0;
    case KEY_NO_REFINE:
        e->no_refine = true;
        return 0;
    case KEY_THREADS:
        e->threads = (int32_t)sida_cli_i64(state, "--threads", text, 1, 1024);
        return 0;
    case KEY_MAX_TOKENS:
        e->max_tokens = (int32_t)sida_cli_i64(state, "--max-tokens", text, 2, 65536);
        return 0;
    case KEY_MAX_NEW_TOKENS:
        o->new_tokens_given = true;
        e->max_new_tokens = (int32_t)sida_cli_i64(state, "--max-new-tokens", text, 1, 65536);
        return 0;
    case KEY_TRUNCATE:
        e->truncate = true;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static error_t parse(int key, char *text, struct argp_state *state) {
    options *o = state->input;
    switch (key) {
    case 'f':
        o->job.format = text;
        return 0;
    case 'i':
        o->job.input = text;
        return 0;
    case 'o':
        o->output = text;
        return 0;
    case KEY_LIMIT:
        o->job.limit = sida_cli_i64(state, "--limit", text, 1, INT64_MAX);
        return 0;
    case KEY_SCORE:
        o->job.score = true;
        return 0;
    case KEY_SEED:
        o->job.seed = (uint64_t)sida_cli_i64(state, "--seed", text, 0, INT64_MAX);
        return 0;
    case KEY_DIGEST:
        o->job.digest = true;
        return 0;
    case KEY_NO_COMPARE:
        o->job.no_compare = true;
        return 0;
    case KEY_JSON:
        o->json = true;
        return 0;
    case ARGP_KEY_END:
        sida_cli_require(state, "--model", o->engine.model);
        sida_cli_require(state, "--format", o->job.format);
        sida_cli_require(state, "--input", o->job.input);
        if (o->job.score && !o->new_tokens_given) o->engine.max_new_tokens = 128;
        return 0;
    default:
        return parse_engine(key, text, state);
    }
}

/* --- while it runs */

/* One answer a line, whatever the model said. */
static void print_line(FILE *file, const char *text) {
    for (const char *c = text; *c; c++) putc(*c == '\n' || *c == '\r' ? ' ' : *c, file);
}

static sida_status on_answer(void *context, const sida_answer *answer) {
    options *o = context;
    if (!o->answers) return SIDA_OK;
    print_line(o->answers, answer->text);
    if (o->job.score) {
        fprintf(o->answers, "\t%.17g\t%" PRId64 "\t", answer->nll, answer->tokens);
        print_line(o->answers, answer->target);
    }
    if (putc('\n', o->answers) != EOF) return SIDA_OK;
    return sida_fail(SIDA_ERROR_IO, "%s: %s", o->temporary, strerror(errno));
}

static sida_status on_progress(void *context, double fraction, int64_t tokens) {
    options *o = context;
    sida_progress_update(&o->progress, fraction, tokens, NULL);
    if (!sida_cli_interrupted()) return SIDA_OK;
    return sida_fail(SIDA_ERROR_CANCELLED, "interrupted");
}

static sida_status open_output(options *o) {
    sida_status status = SIDA_OK;
    if (!o->output) goto out;
    SIDA_TRY(sida_file_check_writable(o->output));
    SIDA_TRY(sida_file_temporary_name(&o->temporary, o->output));
    o->answers = fopen(o->temporary, "w");
    if (!o->answers) SIDA_FAIL(SIDA_ERROR_IO, "%s: %s", o->temporary, strerror(errno));
out:
    return status;
}

/* The file gets its name only when everything is in it. */
static sida_status close_output(options *o, sida_status status) {
    if (o->answers) {
        bool failed = ferror(o->answers);
        failed |= fclose(o->answers) != 0;
        if (status == SIDA_OK && failed)
            status = sida_fail(SIDA_ERROR_IO, "%s: %s", o->temporary, strerror(errno));
        if (status == SIDA_OK)
            status = sida_file_commit(o->temporary, o->output);
        else
            unlink(o->temporary);
    }
    free(o->temporary);
    return status;
}

/* --- the report */

static json_t *number(double value) {
    return isnan(value) ? json_null() : json_real(value);
}

static json_t *layer_shares(const sida_report *r, int side) {
    json_t *shares = json_array();
    for (int32_t layer = 0; layer < r->allowed_layers[side]; layer++)
        json_array_append_new(shares, json_real(r->allowed_layer_share[side][layer]));
    return shares;
}

static json_t *report_json(const options *o, const sida_engine_facts *f, const sida_report *r) {
    json_t *budget = json_pack(
        "{s:s, s:I, s:I, s:I, s:I, s:I, s:I}", "asked",
        o->engine.budget ? o->engine.budget : "100%", "cap_bytes", (json_int_t)f->cap_bytes,
        "dense_bytes", (json_int_t)f->dense_bytes, "workspace_bytes",
        (json_int_t)f->workspace_bytes, "predictor_bytes", (json_int_t)f->predictor_bytes,
        "driver_bytes", (json_int_t)f->driver_bytes, "slot_bytes", (json_int_t)f->slot_bytes);
    json_t *all = json_pack(
        "{s:s, s:b, s:o, s:o, s:o, s:o, s:I, s:I, s:I, s:o, s:o, s:o, s:I, s:o, s:o, s:o, s:o}",
        "routing", o->engine.routing, "random", o->engine.random_experts, "score", number(r->score),
        "full_score", number(r->full_score), "constant_score", number(r->constant_score),
        "fidelity", number(r->fidelity), "label_flips", (json_int_t)r->label_flips, "answers_lost",
        (json_int_t)r->answers_lost, "answers_gained", (json_int_t)r->answers_gained, "mcnemar_p",
        number(r->mcnemar_p), "loss", number(r->loss), "full_loss", number(r->full_loss),
        "target_tokens", (json_int_t)r->target_tokens, "allowed_share_encoder",
        number(r->allowed_share[0]), "allowed_share_decoder", number(r->allowed_share[1]),
        "allowed_layers_encoder", layer_shares(r, 0), "allowed_layers_decoder", layer_shares(r, 1));
    json_t *work =
        json_pack("{s:I, s:I, s:I, s:I, s:I, s:f, s:f, s:{s:f, s:f, s:f}}", "batches",
                  (json_int_t)r->batches, "sequences", (json_int_t)r->sequences, "tokens",
                  (json_int_t)(r->input_tokens + r->generated_tokens), "input_tokens",
                  (json_int_t)r->input_tokens, "generated_tokens", (json_int_t)r->generated_tokens,
                  "seconds", r->seconds, "tokens_per_s", r->tokens_per_s, "latency_ms", "p50",
                  r->latency_ms_p50, "p90", r->latency_ms_p90, "p99", r->latency_ms_p99);
    json_t *memory =
        json_pack("{s:s, s:I, s:I, s:b, s:o, s:i, s:i, s:b, s:i, s:i}", "device", f->device,
                  "device_bytes_peak", (json_int_t)r->device_bytes_peak, "driver_bytes_peak",
                  (json_int_t)r->driver_bytes_peak, "driver_alone", r->driver_alone, "budget",
                  budget, "experts", (int)f->experts, "slots", (int)f->slots, "resident",
                  f->resident, "experts_resident", (int)r->experts_resident,
                  "experts_resident_peak", (int)r->experts_resident_peak);
    json_t *moves = json_pack(
        "{s:s, s:b, s:I, s:I, s:I, s:o, s:I, s:I, s:I, s:I, s:{s:f, s:f}}", "policy",
        o->engine.policy, "prefetch", !o->engine.no_prefetch && o->engine.predictor, "hits",
        (json_int_t)r->hits, "late_prefetches", (json_int_t)r->late_prefetches, "demand_loads",
        (json_int_t)r->demand_loads, "hit_rate", number(r->hit_rate), "prefetch_loads",
        (json_int_t)r->prefetch_loads, "dropped_prefetches", (json_int_t)r->dropped_prefetches,
        "bytes_moved", (json_int_t)r->bytes_moved, "bytes_wasted", (json_int_t)r->bytes_wasted,
        "wait_ms", "inference", r->wait_ms_inference, "hash", r->wait_ms_hash);
    json_t *hash = json_pack("{s:f, s:f, s:f, s:o, s:o, s:o, s:I, s:I, s:I}", "hash_ms_per_batch",
                             r->hash_ms_per_batch, "refine_ms_per_batch", r->refine_ms_per_batch,
                             "inference_ms_per_batch", r->inference_ms_per_batch, "hash_share",
                             number(r->hash_share), "refine_share", number(r->refine_share),
                             "table_wait_share", number(r->table_wait_share), "refinements",
                             (json_int_t)r->refinements, "revised_in", (json_int_t)r->revised_in,
                             "revised_out", (json_int_t)r->revised_out);
    json_object_update(all, work);
    json_object_update(all, memory);
    json_object_update(all, moves);
    json_object_update(all, hash);
    json_decref(work);
    json_decref(memory);
    json_decref(moves);
    json_decref(hash);
    if (o->job.digest) json_object_set_new(all, "digest", json_string(r->digest));
    return all;
}

static void print_share(const char *name, double value) {
    if (isnan(value))
        printf("%-18s -\n", name);
    else
        printf("%-18s %.2f %%\n", name, value * 100);
}

/* What the cap is made of; the driver's part counts where the budget is a size. */
static void print_budget(const sida_engine_facts *f) {
    double mib = 1.0 / (1 << 20);
    printf("%-18s cap %.2f MiB: %.2f dense + %.2f workspace + %.2f predictor + %d slots of %.3f",
           "budget", (double)f->cap_bytes * mib, (double)f->dense_bytes * mib,
           (double)f->workspace_bytes * mib, (double)f->predictor_bytes * mib, f->slots,
           (double)f->slot_bytes * mib);
    if (f->driver_bytes > 0) printf("; driver and libraries %.2f", (double)f->driver_bytes * mib);
    putchar('\n');
}

static void print_moves(const options *o, const sida_engine_facts *f, const sida_report *r) {
    double mib = 1.0 / (1 << 20);
    printf("%-18s %d resident of %d (%d slots, %s)\n", "experts", r->experts_resident, f->experts,
           f->slots, o->engine.policy);
    printf("%-18s %" PRId64 " hits, %" PRId64 " late prefetches, %" PRId64 " demand loads\n",
           "needed", r->hits, r->late_prefetches, r->demand_loads);
    print_share("hit rate", r->hit_rate);
    printf("%-18s %" PRId64 " loaded, %" PRId64 " dropped\n", "prefetches", r->prefetch_loads,
           r->dropped_prefetches);
    printf("%-18s %.2f MiB, %.2f of it wasted\n", "moved", (double)r->bytes_moved * mib,
           (double)r->bytes_wasted * mib);
}

static void print_loss(const sida_report *r) {
    printf("%-18s %.4f nats a token of %" PRId64 " target tokens", "loss", r->loss,
           r->target_tokens);
    if (!isnan(r->full_loss))
        printf(", full model %.4f: %+.2f %%", r->full_loss, (r->loss / r->full_loss - 1) * 100);
    putchar('\n');
}

static void print_allowed(const char *name, const sida_report *r, int side) {
    printf("%-18s %.2f %%:", name, r->allowed_share[side] * 100);
    for (int32_t layer = 0; layer < r->allowed_layers[side]; layer++)
        printf(" %.2f", r->allowed_layer_share[side][layer] * 100);
    putchar('\n');
}

static void print_table(const options *o, const sida_engine_facts *f, const sida_report *r) {
    print_share("score", r->score);
    print_share("full model", r->full_score);
    print_share("fidelity", r->fidelity);
    if (r->label_flips >= 0)
        printf("%-18s %" PRId64 ": %" PRId64 " no longer right, %" PRId64
               " right now (McNemar p %.3g)\n",
               "answers changed", r->label_flips, r->answers_lost, r->answers_gained, r->mcnemar_p);
    if (o->job.score) print_loss(r);
    if (!isnan(r->allowed_share[0])) {
        print_allowed("allowed, encoder", r, 0);
        print_allowed("allowed, decoder", r, 1);
    }
    printf("%-18s %" PRId64 " in %" PRId64 " batches, %" PRId64 " input and %" PRId64
           " generated tokens\n",
           "sequences", r->sequences, r->batches, r->input_tokens, r->generated_tokens);
    printf("%-18s %.1f\n", "tokens/s", r->tokens_per_s);
    printf("%-18s p50 %.2f  p90 %.2f  p99 %.2f ms a batch\n", "latency", r->latency_ms_p50,
           r->latency_ms_p90, r->latency_ms_p99);
    char peak[160];
    printf("%-18s %s, %s\n", "device memory", f->device,
           sida_format_peak(peak, r->driver_bytes_peak, r->device_bytes_peak, r->driver_alone));
    print_budget(f);
    if (f->resident)
        printf("%-18s all %d resident\n", "experts", f->experts);
    else
        print_moves(o, f, r);
    printf("%-18s inference %.1f ms, hash building %.1f ms\n", "waits", r->wait_ms_inference,
           r->wait_ms_hash);
    if (o->engine.predictor && !isnan(r->hash_share))
        printf("%-18s %.3f ms a batch, %.1f %% of inference; %.2f %% of inference's time waited "
               "for it after the first batch\n",
               "predicting", r->hash_ms_per_batch, r->hash_share * 100, r->table_wait_share * 100);
    if (r->refinements > 0)
        printf("%-18s %.3f ms a batch, %.1f %% of inference, by %" PRId64
               " layers' choices: %" PRId64 " planned uses came, %" PRId64
               " went before their load\n",
               "refining", r->refine_ms_per_batch, r->refine_share * 100, r->refinements,
               r->revised_in, r->revised_out);
    if (o->job.digest) printf("%-18s %s\n", "digest", r->digest);
}

static sida_status run(options *o) {
    sida_engine *engine = NULL;
    sida_engine_facts facts;
    sida_report report;
    sida_status status = SIDA_OK;
    SIDA_TRY(open_output(o));
    SIDA_TRY(sida_engine_open(&engine, &o->engine));
    o->job.on_answer = on_answer;
    o->job.on_progress = on_progress;
    o->job.context = o;
    o->progress = sida_progress_begin("run", "tokens");
    status = sida_engine_run(engine, &o->job, &report);
    sida_progress_end(&o->progress);
    sida_engine_get_facts(engine, &facts); /* a job may find less room than there was */
out:
    status = close_output(o, status);
    sida_engine_close(engine);
    if (status != SIDA_OK) return status;
    if (o->json) return sida_cli_print_json(report_json(o, &facts, &report));
    print_table(o, &facts, &report);
    return sida_cli_flush();
}

int sida_cmd_run(int argc, char **argv) {
    options o = {.engine = SIDA_ENGINE_OPTIONS_INIT, .job = SIDA_JOB_INIT};
    const struct argp argp = {argp_options,
                              parse,
                              NULL,
                              "Answers every record of a file with only a part of the model's "
                              "experts on the device.\v"
                              "With exact routing the answers are those of the full model, byte "
                              "for byte, whatever the budget, policy, queue or prefetching.",
                              NULL,
                              NULL,
                              NULL};
    sida_cli_parse(&argp, argc, argv, &o);
    sida_cli_catch_signals();
    sida_status status = run(&o);
    sida_cli_report(status);
    if (status == SIDA_OK) return SIDA_EXIT_OK;
    return status == SIDA_ERROR_ARGUMENT ? SIDA_EXIT_USAGE : SIDA_EXIT_FAILURE;
}
