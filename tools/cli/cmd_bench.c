/* sida bench: one encoder pass and one decoder token, timed, beside what memory and link allow. */
#include "formats/base/clock.h"
#include "formats/base/memory.h"
#include "formats/base/text.h"
#include "runtime/engine/budget.h"
#include "runtime/engine/pass.h"
#include "runtime/model/synthetic.h"
#include "runtime/ops/cpu_kernels.h"
#include "tools/cli/bench_record.h"
#include "tools/cli/cli.h"
#include "tools/cli/measure.h"

#include <inttypes.h>
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
    KEY_QUEUE,
    KEY_DEVICE,
    KEY_THREADS,
    KEY_DIGEST,
    KEY_JSON
};

enum { MOST_LENGTHS = 16, LINK_BYTES = 64 << 20 };

typedef struct options {
    const char *model, *synthetic, *dtype, *lengths, *budget, *policy, *prefetch, *device;
    int32_t batch, runs, warmup, queue;
    bool digest, json;
} options;

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
     "oracle (default): experts are loaded ahead by a record of the routers' own choices; none: on "
     "demand",
     2},
    {"queue", KEY_QUEUE, "N", 0, "batches predicted ahead (2)", 2},
    {"device", KEY_DEVICE, "NAME", 0, "cpu, cuda, or auto (default): cuda where a GPU is present",
     2},
    {"threads", KEY_THREADS, "N", 0, "CPU threads (all)", 2},
    {0, 0, 0, 0, "What is printed", 3},
    {"digest", KEY_DIGEST, 0, 0,
     "a hash of all raw logits, equal for every budget; under one, hashing is timed too", 3},
    {"json", KEY_JSON, 0, 0, "print as JSON, with every sample", 3},
    {0}};

static error_t parse(int key, char *text, struct argp_state *state) {
    options *o = state->input;
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

typedef struct session {
    const options *options;
    sida_synthetic_options synthetic;
    sida_budget budget;
    const sida_policy *policy;
    bool resident_wanted, oracle;
    int32_t lengths[MOST_LENGTHS], length_count;
    sida_backend *backend;
    sida_device_info device;
    sida_model *model;
    const sida_model_info *info;
    sida_resident *resident;
    double memory_rate, link_rate, load_seconds; /* bytes a second */
    /* Of the length in hand. */
    sida_run_limits limits;
    sida_run *run;
    sida_bench_record *record;
    double *samples_ms; /* [runs] */
    int32_t slots;      /* 0: all resident */
    sida_pass_stats stats;
    sida_fingerprint digest;
    size_t driver_used;           /* device bytes in use while it ran, whoever uses them */
    int32_t handed_out, finished; /* batches of a pass */
    double last;                  /* when its last batch was finished */
} session;

/* --- options */

static sida_status parse_lengths(session *s) {
    char text[256];
    snprintf(text, sizeof text, "%s", s->options->lengths);
    for (char *rest = text, *word; (word = strsep(&rest, ",")) != NULL;) {
        int64_t length;
        if (s->length_count == MOST_LENGTHS || !sida_text_to_i64(&length, word, 1, 65536))
            return sida_fail(SIDA_ERROR_ARGUMENT,
                             "--lengths '%.60s': expected up to %d numbers from 1 to 65536 with "
                             "commas between them",
                             s->options->lengths, MOST_LENGTHS);
        s->lengths[s->length_count++] = (int32_t)length;
    }
    return SIDA_OK;
}

static sida_status check_options(session *s) {
    sida_status status = SIDA_OK;
    const options *o = s->options;
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
    s->oracle = strcmp(o->prefetch, "oracle") == 0;
    if (!s->oracle && strcmp(o->prefetch, "none") != 0)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "--prefetch '%.40s': expected oracle or none", o->prefetch);
out:
    return status;
}

static sida_status open_session(session *s) {
    sida_status status = SIDA_OK;
    const options *o = s->options;
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

/* --- one batch */

static sida_status run_batch(session *s, const sida_bench_batch *batch,
                             const sida_moe_driver *driver, int64_t *offsets, int32_t *ids,
                             sida_buffer *logits) {
    sida_status status = SIDA_OK;
    int32_t sequences = batch->input.sequences;
    sida_ragged step = {sequences, offsets, ids};
    SIDA_TRY(sida_run_encode(s->run, &batch->input, driver));
    SIDA_TRY(sida_run_decode(s->run, &step, driver));
    SIDA_TRY(sida_run_read_logits(s->run, 0, sequences, logits->data));
out:
    return status;
}

/* As the engine's pass does it: one hash a sequence, and one over them. */
static sida_status add_digest(sida_hasher *all, const float *logits, int32_t sequences,
                              int32_t vocabulary) {
    sida_status status = SIDA_OK;
    sida_hasher *hasher = NULL;
    SIDA_TRY(sida_hasher_create(&hasher));
    for (int32_t i = 0; i < sequences; i++) {
        sida_hasher_reset(hasher);
        sida_hasher_update(hasher, logits + (int64_t)i * vocabulary,
                           (size_t)vocabulary * sizeof *logits);
        sida_fingerprint one = sida_hasher_finish(hasher);
        sida_hasher_update(all, &one, sizeof one);
    }
out:
    sida_hasher_destroy(hasher);
    return status;
}

/* All batches, one after the other; the last --runs of them are timed when `timed`. */
static sida_status run_batches(session *s, const sida_moe_driver *driver, bool timed) {
    sida_status status = SIDA_OK;
    int64_t *offsets = NULL;
    int32_t *ids = NULL, sequences = s->options->batch;
    sida_buffer *logits = NULL;
    sida_hasher *digest = NULL;
    size_t bytes = (size_t)sequences * (size_t)s->info->vocabulary * sizeof(float);
    SIDA_TRY(SIDA_ALLOC(&offsets, sequences + 1, "a step"));
    SIDA_TRY(SIDA_ALLOC(&ids, sequences, "a step"));
    SIDA_TRY(sida_buffer_create(s->backend, &logits, SIDA_MEMORY_HOST, bytes, "logits"));
    SIDA_TRY(sida_hasher_create(&digest));
    for (int32_t i = 0; i < sequences; i++) {
        offsets[i + 1] = i + 1;
        ids[i] = s->info->decoder_start;
    }
    for (int32_t b = 0; b < s->record->count; b++) {
        if (sida_cli_interrupted()) SIDA_FAIL(SIDA_ERROR_CANCELLED, "interrupted");
        if (!timed) s->record->current = b;
        double begin = sida_clock_seconds();
        SIDA_TRY(run_batch(s, &s->record->batches[b], driver, offsets, ids, logits));
        if (timed && b >= s->options->warmup)
            s->samples_ms[b - s->options->warmup] = (sida_clock_seconds() - begin) * 1e3;
        if (timed && s->options->digest)
            SIDA_TRY(add_digest(digest, logits->data, sequences, s->info->vocabulary));
    }
    s->digest = sida_hasher_finish(digest);
out:
    sida_hasher_destroy(digest);
    sida_buffer_destroy(logits);
    free(offsets);
    free(ids);
    return status;
}

/* --- recording under a budget: experts on demand through a store */

typedef struct loader {
    session *session;
    sida_store *store;
    int64_t position;
    int32_t *global, *wave; /* [E] */
} loader;

static sida_status loader_observe(void *context, const sida_moe_call *call) {
    return sida_bench_record_observe(((loader *)context)->session->record, call);
}

static sida_status loader_begin(void *context, const sida_moe_call *call, const int32_t *needed,
                                int32_t count) {
    loader *l = context;
    for (int32_t i = 0; i < count; i++) l->global[i] = call->site * call->experts_total + needed[i];
    return sida_store_begin(l->store, ++l->position, l->global, count);
}

static sida_status loader_take(void *context, int32_t *experts, const void **weights,
                               int32_t *count) {
    loader *l = context;
    sida_status status = sida_store_take(l->store, experts, weights, count);
    for (int32_t i = 0; status == SIDA_OK && i < *count; i++) {
        l->wave[i] = experts[i];
        experts[i] %= l->session->info->experts;
    }
    return status;
}

static sida_status loader_release(void *context, const int32_t *experts, int32_t count,
                                  sida_stream *stream) {
    loader *l = context;
    (void)experts;
    return sida_store_release(l->store, l->wave, count, stream);
}

static const void *expert_source(void *context, int32_t expert) {
    return sida_model_expert(context, expert);
}

static sida_status record_by_store(session *s) {
    sida_status status = SIDA_OK;
    loader l = {.session = s};
    const sida_moe_driver driver = {.context = &l,
                                    .observe = loader_observe,
                                    .begin = loader_begin,
                                    .take = loader_take,
                                    .release = loader_release};
    SIDA_TRY(SIDA_ALLOC(&l.global, s->info->experts, "a wave"));
    SIDA_TRY(SIDA_ALLOC(&l.wave, s->info->experts, "a wave"));
    SIDA_TRY(sida_store_create(&l.store, s->backend,
                               &(sida_store_options){.slots = s->slots,
                                                     .experts = s->info->sites * s->info->experts,
                                                     .expert_bytes = s->info->expert_bytes,
                                                     .source = expert_source,
                                                     .source_context = s->model,
                                                     .policy = sida_policy_find("lru")}));
    SIDA_TRY(run_batches(s, &driver, false));
out:
    sida_store_destroy(l.store);
    free(l.global);
    free(l.wave);
    return status;
}

/* --- the engine's pass */

static sida_status next_batch(void *context, sida_batch **out) {
    sida_status status = SIDA_OK;
    session *s = context;
    sida_batch *batch = NULL;
    *out = NULL;
    if (s->handed_out == s->record->count) return SIDA_OK;
    const sida_ragged *from = &s->record->batches[s->handed_out].input;
    int64_t tokens = sida_ragged_tokens(from);
    SIDA_TRY(SIDA_ALLOC(&batch, 1, "a batch"));
    SIDA_TRY(SIDA_ALLOC(&batch->offsets[0], from->sequences + 1, "a batch"));
    SIDA_TRY(SIDA_ALLOC(&batch->ids[0], tokens, "a batch"));
    SIDA_TRY(SIDA_ALLOC(&batch->targets, from->sequences, "a batch"));
    memcpy(batch->offsets[0], from->offsets, ((size_t)from->sequences + 1) * sizeof *from->offsets);
    memcpy(batch->ids[0], from->ids, (size_t)tokens * sizeof *from->ids);
    batch->input = (sida_ragged){from->sequences, batch->offsets[0], batch->ids[0]};
    batch->index = s->handed_out++;
    *out = batch;
    batch = NULL;
out:
    sida_batch_destroy(batch);
    return status;
}

/* A failure to ask is no failure of the benchmark. */
static size_t driver_used(session *s) {
    sida_device_info info;
    if (sida_backend_describe(s->backend, &info) != SIDA_OK) return 0;
    return info.total_bytes - info.free_bytes;
}

/* From one batch's end to the next one's: a batch pays for what was not loaded in time. */
static sida_status on_batch(void *context, const sida_pass_batch *done) {
    session *s = context;
    double now = sida_clock_seconds();
    (void)done;
    if (s->finished >= s->options->warmup)
        s->samples_ms[s->finished - s->options->warmup] = (now - s->last) * 1e3;
    s->last = now;
    if (s->finished++ == 0) { /* always a warm-up: asking takes a while */
        s->driver_used = driver_used(s);
        s->last = sida_clock_seconds();
    }
    if (sida_cli_interrupted()) return sida_fail(SIDA_ERROR_CANCELLED, "interrupted");
    return SIDA_OK;
}

static sida_status run_pass(session *s) {
    sida_status status = SIDA_OK;
    sida_hash_source *source = NULL;
    s->handed_out = s->finished = 0;
    if (s->oracle) SIDA_TRY(sida_bench_oracle_create(&source, s->record));
    SIDA_TRY(sida_pass_run(&s->stats, &(sida_pass_options){.model = s->model,
                                                           .run = s->run,
                                                           .source = source,
                                                           .routing = SIDA_ROUTING_EXACT,
                                                           .top_k = s->info->top_k,
                                                           .slots = s->slots,
                                                           .queue = s->options->queue,
                                                           .prefetch = s->oracle,
                                                           .digest = s->options->digest,
                                                           .policy = s->policy,
                                                           .max_new_tokens = 1,
                                                           .next = next_batch,
                                                           .next_context = s,
                                                           .on_batch = on_batch,
                                                           .on_batch_context = s}));
    s->digest = s->stats.digest;
out:
    sida_hash_source_destroy(source);
    return status;
}

/* --- a length */

static json_t *report(session *s, size_t cap_bytes) {
    const options *o = s->options;
    sida_memory_usage usage;
    double *sorted = s->samples_ms;
    json_t *samples = json_array();
    for (int32_t i = 0; i < o->runs; i++)
        json_array_append_new(samples, json_real(s->samples_ms[i]));
    double median_ms = sida_median(sorted, (size_t)o->runs);
    sida_backend_memory(s->backend, &usage);
    double touched = sida_bench_record_touched(s->record, o->warmup);
    double bytes = touched * (double)s->info->expert_bytes + (double)s->info->dense_bytes;
    double floor_ms = bytes / s->memory_rate * 1e3;
    json_t *row = json_pack(
        "{s:i, s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:I, s:I}", "length", s->record->length,
        "batch", o->batch, "latency_ms", median_ms, "latency_ms_min", sorted[0], "tokens_per_s",
        o->batch * s->record->length / median_ms * 1e3, "experts_touched", touched,
        "top_expert_share", sida_bench_record_top_share(s->record), "weight_bytes", bytes,
        "floor_ms", floor_ms, "share_of_floor", floor_ms / median_ms, "device_bytes_peak",
        (json_int_t)usage.peak_bytes, "driver_bytes_used", (json_int_t)s->driver_used);
    if (s->slots > 0) {
        const sida_store_stats *store = &s->stats.store;
        double rate = (double)store->bytes_moved / s->stats.seconds;
        json_t *moves = json_pack(
            "{s:i, s:I, s:f, s:I, s:I, s:I, s:I, s:I, s:f, s:f}", "slots", s->slots, "cap_bytes",
            (json_int_t)cap_bytes, "pass_seconds", s->stats.seconds, "hits",
            (json_int_t)store->hits, "late_prefetches", (json_int_t)store->late_prefetches,
            "demand_loads", (json_int_t)store->demand_loads, "bytes_moved",
            (json_int_t)store->bytes_moved, "bytes_wasted", (json_int_t)store->bytes_wasted,
            "moved_gb_per_s", rate / 1e9, "share_of_link", rate / s->link_rate);
        json_object_update(row, moves);
        json_decref(moves);
    }
    if (o->digest) {
        char text[SIDA_FINGERPRINT_TEXT];
        sida_fingerprint_format(text, s->digest);
        json_object_set_new(row, "digest", json_string(text));
    }
    json_object_set_new(row, "samples_ms", samples);
    return row;
}

static sida_status measure_length(session *s, int32_t length, json_t *rows) {
    sida_status status = SIDA_OK;
    const options *o = s->options;
    sida_memory_usage before;
    size_t cap_bytes = SIZE_MAX;
    SIDA_TRY(sida_backend_set_cap(s->backend, SIZE_MAX));
    sida_backend_memory(s->backend, &before);
    s->limits = (sida_run_limits){.sequences = o->batch,
                                  .input_tokens = (int64_t)o->batch * length,
                                  .step_tokens = o->batch,
                                  .decoder_positions = 1};
    if (!s->resident) {
        const sida_budget_needs needs = {.experts = (int64_t)s->info->sites * s->info->experts,
                                         .slot_bytes = sida_store_slot_bytes(s->info->expert_bytes),
                                         .dense_bytes = before.used_bytes,
                                         .workspace_bytes = sida_run_bytes(s->model, &s->limits)};
        SIDA_TRY(sida_budget_slots(&s->slots, &cap_bytes, &s->budget, &needs));
        SIDA_TRY(sida_backend_set_cap(s->backend, cap_bytes));
    }
    SIDA_TRY(sida_run_create(&s->run, s->model, &s->limits));
    SIDA_TRY(sida_bench_record_create(&s->record, s->info, o->runs + o->warmup, o->batch, length));
    if (s->resident) {
        SIDA_TRY(run_batches(
            s, sida_resident_driver(s->resident, s->record, NULL, sida_bench_record_observe),
            false));
        SIDA_TRY(run_batches(s, sida_resident_driver(s->resident, NULL, NULL, NULL), true));
        s->driver_used = driver_used(s);
    } else {
        SIDA_TRY(record_by_store(s));
        SIDA_TRY(run_pass(s));
    }
    json_array_append_new(rows, report(s, cap_bytes));
out:
    sida_pass_stats_free(&s->stats);
    sida_run_destroy(s->run);
    s->run = NULL;
    sida_bench_record_destroy(s->record);
    s->record = NULL;
    return status;
}

/* --- printing */

static double number(const json_t *object, const char *key) {
    return json_number_value(json_object_get(object, key));
}

static void print_rows(const session *s, const json_t *rows) {
    double mib = 1.0 / (1 << 20);
    size_t i;
    json_t *row;
    printf("device memory %.1f GB/s (read and written), link %.1f GB/s; loaded in %.1f s\n",
           s->memory_rate / 1e9, s->link_rate / 1e9, s->load_seconds);
    printf("%6s %10s %10s %10s %8s %9s %9s %7s %10s\n", "length", "ms", "min", "tokens/s",
           "experts", "MiB read", "floor ms", "share", "peak MiB");
    json_array_foreach((json_t *)(uintptr_t)rows, i, row) {
        printf("%6.0f %10.3f %10.3f %10.1f %8.1f %9.1f %9.3f %6.1f%% %10.1f\n",
               number(row, "length"), number(row, "latency_ms"), number(row, "latency_ms_min"),
               number(row, "tokens_per_s"), number(row, "experts_touched"),
               number(row, "weight_bytes") * mib, number(row, "floor_ms"),
               number(row, "share_of_floor") * 100, number(row, "device_bytes_peak") * mib);
        if (json_object_get(row, "slots"))
            printf("       %.0f slots: %.0f hits, %.0f late, %.0f on demand; %.1f MiB moved, "
                   "%.1f GB/s, %.1f%% of the link\n",
                   number(row, "slots"), number(row, "hits"), number(row, "late_prefetches"),
                   number(row, "demand_loads"), number(row, "bytes_moved") * mib,
                   number(row, "moved_gb_per_s"), number(row, "share_of_link") * 100);
        if (json_object_get(row, "digest"))
            printf("       digest %s\n", json_string_value(json_object_get(row, "digest")));
    }
}

static json_t *whole_report(const session *s, json_t *rows) {
    const options *o = s->options;
    return json_pack(
        "{s:s, s:s, s:s, s:s, s:i, s:s, s:s, s:s, s:s, s:i, s:i, s:i, s:f, s:f, s:f, s:I, s:I, "
        "s:O}",
        "version", SIDA_VERSION, "model", o->model ? o->model : o->synthetic, "dtype",
        sida_dtype_name(s->info->expert.dtype), "device", s->backend->table->name, "threads",
        sida_ops_threads(), "device_name", s->device.name, "budget", o->budget, "policy",
        s->policy->name, "prefetch", s->resident ? "resident" : o->prefetch, "runs", o->runs,
        "warmup", o->warmup, "experts", s->info->sites * s->info->experts, "memory_bytes_per_s",
        s->memory_rate, "link_bytes_per_s", s->link_rate, "load_seconds", s->load_seconds,
        "dense_bytes", (json_int_t)s->info->dense_bytes, "expert_bytes",
        (json_int_t)s->info->expert_bytes, "rows", rows);
}

static sida_status bench(const options *o) {
    session s = {.options = o};
    sida_status status = SIDA_OK;
    json_t *rows = json_array();
    SIDA_TRY(check_options(&s));
    SIDA_TRY(open_session(&s));
    SIDA_TRY(sida_backend_describe(s.backend, &s.device));
    for (int32_t i = 0; i < s.length_count; i++) SIDA_TRY(measure_length(&s, s.lengths[i], rows));
    if (o->json) {
        status = sida_cli_print_json(whole_report(&s, rows));
        goto out;
    }
    printf("%s, %s, %s, budget %s, batches of %d, %s\n", o->model ? o->model : o->synthetic,
           sida_dtype_name(s.info->expert.dtype), s.device.name, o->budget, o->batch,
           s.resident ? "all experts resident"
           : s.oracle ? "experts ahead by an oracle"
                      : "experts on demand");
    print_rows(&s, rows);
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
    options o = {.dtype = "bf16",
                 .lengths = "25,60,300",
                 .budget = "100%",
                 .policy = "lookahead",
                 .prefetch = "oracle",
                 .device = "auto",
                 .batch = 1,
                 .runs = 20,
                 .warmup = 3,
                 .queue = 2};
    const struct argp argp = {
        argp_options,
        parse,
        NULL,
        "Times one encoder pass and one decoder token over random token ids, exact routing.\v"
        "Ids are uniform, from a fixed seed. The floor is the time in which the device's memory, "
        "at its measured rate, gives the bytes of the dense weights and of the experts that the "
        "routers choose. Under a budget a batch's time runs from the end of the one before: "
        "loading that is not hidden counts.",
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
