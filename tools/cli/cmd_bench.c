/* sida bench: one encoder pass and one decoder token, timed, beside what memory and link allow. */
#include "formats/base/clock.h"
#include "formats/base/memory.h"
#include "formats/base/text.h"
#include "tools/cli/bench.h"
#include "tools/cli/cli.h"
#include "tools/cli/measure.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    KEY_SYNTHETIC = 0x100,
    KEY_DTYPE,
    KEY_LENGTHS,
    KEY_RUNS,
    KEY_WARMUP,
    KEY_BUDGET,
    KEY_POLICY,
    KEY_PREFETCH,
    KEY_RECALL,
    KEY_QUEUE,
    KEY_DEVICE,
    KEY_THREADS,
    KEY_DIGEST,
    KEY_JSON
};

enum { LINK_BYTES = 64 << 20, TABLE_PLACES = 3 };

static const struct argp_option argp_options[] = {
    {0, 0, 0, 0, "What runs", 1},
    {"synthetic", KEY_SYNTHETIC, "base-E", 0,
     "a Switch-Base model of E experts with random weights and skewed routers: base-8, base-64, "
     "base-128, base-256 are the published sizes",
     1},
    {"dtype", KEY_DTYPE, "TYPE", 0, "how its weights are stored: bf16 (default) or f32", 1},
    {"model", 'm', "DIR", 0, "a Hugging Face directory instead", 1},
    {"lengths", KEY_LENGTHS, "L,L,...", 0, "tokens a sequence (25,60,300)", 1},
    {"batch", 'b', "N", 0, "sequences a batch (1)", 1},
    {"runs", KEY_RUNS, "N", 0, "batches that count (20)", 1},
    {"warmup", KEY_WARMUP, "N", 0, "batches before them (3)", 1},
    {0, 0, 0, 0, "Where experts live", 2},
    {"budget", KEY_BUDGET, "B", 0,
     "100% (default): all experts resident. Else 20% of them, 12-experts, or a size (2GiB) for "
     "everything on the device",
     2},
    {"policy", KEY_POLICY, "NAME", 0, "which expert gives way: lookahead (default), lru, fifo", 2},
    {"prefetch", KEY_PREFETCH, "KIND", 0,
     "oracle (default): experts are loaded ahead by a record of the routers' own choices; recall: "
     "by tables with a predictor's mistakes; none: on demand",
     2},
    {"recall", KEY_RECALL, "P[,Q]", 0,
     "what those tables hold: the true expert first of 3 for P % of tokens and layers, and among "
     "the 3 for Q % (65,86: measured, trainer/README.md); P alone: tables of 1",
     2},
    {"queue", KEY_QUEUE, "N", 0, "batches predicted ahead (8)", 2},
    {"device", KEY_DEVICE, "NAME", 0, "cpu, cuda, or auto (default): cuda where a GPU is present",
     2},
    {"threads", KEY_THREADS, "N", 0, "CPU threads (all)", 2},
    {0, 0, 0, 0, "What is printed", 3},
    {"digest", KEY_DIGEST, 0, 0,
     "a hash of all raw logits, equal for every budget; under one, hashing is timed too", 3},
    {"json", KEY_JSON, 0, 0, "print as JSON, with every sample", 3},
    {0}};

static error_t parse(int key, char *text, struct argp_state *state) {
    sida_bench_options *o = state->input;
    switch (key) {
    case KEY_SYNTHETIC:
        o->synthetic = text;
        return 0;
    case KEY_DTYPE:
        o->dtype = text;
        return 0;
    case 'm':
        o->model = text;
        return 0;
    case KEY_LENGTHS:
        o->lengths = text;
        return 0;
    case 'b':
        o->batch = (int32_t)sida_cli_i64(state, "--batch", text, 1, 4096);
        return 0;
    case KEY_RUNS:
        o->runs = (int32_t)sida_cli_i64(state, "--runs", text, 1, 100000);
        return 0;
    case KEY_WARMUP:
        o->warmup = (int32_t)sida_cli_i64(state, "--warmup", text, 1, 10000);
        return 0;
    case KEY_BUDGET:
        o->budget = text;
        return 0;
    case KEY_POLICY:
        o->policy = text;
        return 0;
    case KEY_PREFETCH:
        o->prefetch = text;
        return 0;
    case KEY_RECALL:
        o->recall = text;
        return 0;
    case KEY_QUEUE:
        o->queue = (int32_t)sida_cli_i64(state, "--queue", text, 1, 1024);
        return 0;
    case KEY_DEVICE:
        o->device = text;
        return 0;
    case KEY_THREADS:
        sida_cli_set_threads(sida_cli_i64(state, "--threads", text, 1, 1024));
        return 0;
    case KEY_DIGEST:
        o->digest = true;
        return 0;
    case KEY_JSON:
        o->json = true;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* --- options */

static sida_status parse_lengths(sida_bench *s) {
    char text[256];
    snprintf(text, sizeof text, "%s", s->options->lengths);
    for (char *rest = text, *word; (word = strsep(&rest, ",")) != NULL;) {
        int64_t length;
        if (s->length_count == SIDA_BENCH_LENGTHS || !sida_text_to_i64(&length, word, 1, 65536))
            return sida_fail(SIDA_ERROR_ARGUMENT,
                             "--lengths '%.60s': expected up to %d numbers from 1 to 65536 with "
                             "commas between them",
                             s->options->lengths, SIDA_BENCH_LENGTHS);
        s->lengths[s->length_count++] = (int32_t)length;
    }
    return SIDA_OK;
}

static sida_status parse_prefetch(sida_bench *s) {
    static const char *const names[] = {
        [SIDA_BENCH_NONE] = "none", [SIDA_BENCH_ORACLE] = "oracle", [SIDA_BENCH_RECALL] = "recall"};
    const sida_bench_options *o = s->options;
    sida_status status = SIDA_OK;
    char text[64];
    int kind = 0;
    while (kind < 3 && strcmp(o->prefetch, names[kind]) != 0) kind++;
    if (kind == 3)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "--prefetch '%.40s': expected oracle, recall or none",
                  o->prefetch);
    s->prefetch = (sida_bench_prefetch)kind;
    if (s->prefetch != SIDA_BENCH_RECALL) goto out;
    snprintf(text, sizeof text, "%s", o->recall);
    char *all = strchr(text, ',');
    if (all) *all++ = 0;
    double first_percent, all_percent;
    bool right = sida_text_to_f64(&first_percent, text, 0, 100);
    all_percent = first_percent;
    if (right && all) right = sida_text_to_f64(&all_percent, all, first_percent, 100);
    if (!right)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT,
                  "--recall '%.40s': expected one percentage, or two with a comma between them of "
                  "which the second is not smaller",
                  o->recall);
    s->recall = (sida_bench_recall){
        .places = all ? TABLE_PLACES : 1, .first = first_percent / 100, .all = all_percent / 100};
out:
    return status;
}

static sida_status check_options(sida_bench *s) {
    sida_status status = SIDA_OK;
    const sida_bench_options *o = s->options;
    int64_t experts = 0;
    s->synthetic = (sida_synthetic_options)SIDA_SYNTHETIC_BASE;
    if (!o->model == !o->synthetic)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "one of --synthetic and --model is required");
    if (o->synthetic && (strncmp(o->synthetic, "base-", 5) != 0 ||
                         !sida_text_to_i64(&experts, o->synthetic + 5, 1, 65536)))
        SIDA_FAIL(SIDA_ERROR_ARGUMENT,
                  "--synthetic '%.40s': expected base-8, base-64, base-128, base-256 or another "
                  "number of experts",
                  o->synthetic);
    if (o->synthetic) s->synthetic.name = o->synthetic;
    if (o->synthetic) s->synthetic.experts = (int32_t)experts;
    if (strcmp(o->dtype, "f32") == 0)
        s->synthetic.dtype = SIDA_F32;
    else if (strcmp(o->dtype, "bf16") != 0)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "--dtype '%.40s': expected bf16 or f32", o->dtype);
    SIDA_TRY(parse_lengths(s));
    SIDA_TRY(sida_budget_parse(&s->budget, o->budget));
    s->resident_wanted = s->budget.kind == SIDA_BUDGET_SHARE && s->budget.share >= 1;
    s->policy = sida_policy_find(o->policy);
    if (!s->policy)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "--policy '%.40s': expected one of %s", o->policy,
                  sida_policy_names());
    SIDA_TRY(parse_prefetch(s));
out:
    return status;
}

static sida_status open_session(sida_bench *s) {
    sida_status status = SIDA_OK;
    const sida_bench_options *o = s->options;
    SIDA_TRY(sida_backend_create_named(&s->backend, o->device));
    SIDA_TRY(sida_measure_memory(&s->memory_rate, s->backend));
    SIDA_TRY(sida_measure_copy(&s->link_rate, s->backend, SIDA_COPY_PINNED, LINK_BYTES));
    double begin = sida_clock_seconds();
    if (o->model)
        SIDA_TRY(sida_model_open(&s->model, s->backend, o->model));
    else
        SIDA_TRY(sida_model_open_synthetic(&s->model, s->backend, &s->synthetic));
    if (s->resident_wanted) SIDA_TRY(sida_resident_create(&s->resident, s->model));
    s->load_seconds = sida_clock_seconds() - begin;
    s->info = sida_model_get_info(s->model);
    SIDA_TRY(SIDA_ALLOC(&s->samples_ms, o->runs, "samples"));
out:
    return status;
}

/* --- a length */

/* Slots and cap. The workspace has been taken: it shows what the libraries want. */
static sida_status divide_memory(sida_bench *s, size_t dense_bytes) {
    sida_status status = SIDA_OK;
    sida_memory_usage usage;
    size_t driver_bytes;
    sida_backend_memory(s->backend, &usage);
    SIDA_TRY(sida_backend_measure_overhead(s->backend, &driver_bytes));
    if (s->backend->table->driver_used) driver_bytes += SIDA_BUDGET_DRIVER_RESERVE_BYTES;
    const sida_budget_needs needs = {.experts = (int64_t)s->info->sites * s->info->experts,
                                     .slot_bytes = sida_store_slot_bytes(s->info->expert_bytes),
                                     .dense_bytes = dense_bytes,
                                     .workspace_bytes = usage.used_bytes - dense_bytes,
                                     .driver_bytes = driver_bytes};
    SIDA_TRY(sida_budget_slots(&s->slots, &s->cap_bytes, &s->budget, &needs));
    SIDA_TRY(sida_backend_set_cap(s->backend, s->cap_bytes));
    if (s->budget.kind == SIDA_BUDGET_BYTES)
        SIDA_TRY(sida_backend_set_overhead(s->backend, driver_bytes));
out:
    return status;
}

static sida_status measure_length(sida_bench *s, int32_t length, json_t *rows) {
    sida_status status = SIDA_OK;
    const sida_bench_options *o = s->options;
    int32_t count = o->warmup + o->runs + SIDA_BENCH_TAIL;
    sida_memory_usage before;
    SIDA_TRY(sida_backend_set_cap(s->backend, SIZE_MAX));
    SIDA_TRY(sida_backend_set_overhead(s->backend, 0));
    sida_backend_memory(s->backend, &before);
    s->limits = (sida_run_limits){.sequences = o->batch,
                                  .input_tokens = (int64_t)o->batch * length,
                                  .step_tokens = o->batch,
                                  .decoder_positions = 1};
    SIDA_TRY(sida_run_create(&s->run, s->model, &s->limits));
    if (!s->resident) SIDA_TRY(divide_memory(s, before.used_bytes));
    SIDA_TRY(sida_bench_record_create(&s->record, s->info, count, o->batch, length));
    SIDA_TRY(s->resident ? sida_bench_run_resident(s) : sida_bench_run_budget(s));
    SIDA_TRY(sida_bench_report(s, rows));
out:
    sida_pass_stats_free(&s->stats);
    sida_run_destroy(s->run);
    s->run = NULL;
    sida_bench_record_destroy(s->record);
    s->record = NULL;
    return status;
}

static sida_status bench(const sida_bench_options *o) {
    sida_bench s = {.options = o};
    sida_status status = SIDA_OK;
    json_t *rows = json_array();
    SIDA_TRY(check_options(&s));
    SIDA_TRY(open_session(&s));
    SIDA_TRY(sida_backend_describe(s.backend, &s.device));
    for (int32_t i = 0; i < s.length_count; i++) SIDA_TRY(measure_length(&s, s.lengths[i], rows));
    if (o->json) {
        status = sida_cli_print_json(sida_bench_whole(&s, rows));
        goto out;
    }
    sida_bench_print(&s, rows);
    status = sida_cli_flush();
out:
    json_decref(rows);
    free(s.samples_ms);
    sida_resident_destroy(s.resident);
    sida_model_destroy(s.model);
    sida_backend_destroy(s.backend);
    return status;
}

int sida_cmd_bench(int argc, char **argv) {
    sida_bench_options o = {.dtype = "bf16",
                            .lengths = "25,60,300",
                            .budget = "100%",
                            .policy = "lookahead",
                            .prefetch = "oracle",
                            .recall = "65,86",
                            .device = "auto",
                            .batch = 1,
                            .runs = 20,
                            .warmup = 3,
                            .queue = 8};
    const struct argp argp = {
        argp_options,
        parse,
        NULL,
        "Times one encoder pass and one decoder token over random token ids, exact routing.\v"
        "Ids are uniform, from a fixed seed. The floor is the time in which the device's memory, "
        "at its measured rate, gives the bytes of the dense weights and of the experts that the "
        "routers choose. Four more batches run after those that count.\n\n"
        "Under a budget a batch's time runs from the end of the one before: loading that is not "
        "hidden counts. Hits, loads and MiB in the first line are of all batches, warm-up "
        "included; rates and what is said of a batch are of those that count. Belady is the least "
        "that any schedule of loads moves for them, knowing all batches and starting with empty "
        "slots before the warm-up. The link is busy while a copy is issued and not known to be "
        "over.",
        NULL,
        NULL,
        NULL};
    sida_cli_parse(&argp, argc, argv, &o);
    sida_cli_catch_signals();
    sida_status status = bench(&o);
    sida_cli_report(status);
    if (status == SIDA_OK) return SIDA_EXIT_OK;
    return status == SIDA_ERROR_ARGUMENT ? SIDA_EXIT_USAGE : SIDA_EXIT_FAILURE;
}
