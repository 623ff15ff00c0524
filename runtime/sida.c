/* The public face: opens what an engine needs, and makes one report of one or two passes. */
#include "runtime/sida.h"

#include "data/batch.h"
#include "formats/base/clock.h"
#include "formats/base/file.h"
#include "formats/base/log.h"
#include "formats/base/memory.h"
#include "formats/tokenizer.h"
#include "runtime/engine/budget.h"
#include "runtime/engine/pass.h"
#include "runtime/engine/score.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum { most_batch = 4096, most_tokens = 65536, most_queue = 1024 };
/* Between two questions to the driver during a run. */
static const double sample_interval_s = 0.1;

struct sida_engine {
    sida_backend *backend;
    sida_model *model;
    sida_run *run;
    sida_resident *resident; /* NULL: experts come through slots */
    sida_tokenizer *tokenizer;
    sida_hash_source *source;
    const sida_policy *policy;
    sida_routing routing;
    sida_engine_options options; /* its strings are not kept */
    sida_budget budget;
    sida_budget_needs needs;
    sida_engine_facts facts;
};

const char *sida_version(void) {
    return SIDA_VERSION;
}

const char *sida_error_message(void) {
    return sida_last_message();
}

sida_status sida_error_raise(sida_status status, const char *message) {
    return sida_fail(status, "%s", message);
}

const char *sida_error_name(sida_status status) {
    return sida_status_name(status);
}

/* --- opening */

static sida_status check_number(const char *name, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return SIDA_OK;
    return sida_fail(SIDA_ERROR_ARGUMENT, "%s %lld: expected %lld to %lld", name, (long long)value,
                     (long long)low, (long long)high);
}

/* What can be said before any file is opened. */
static sida_status check_options(sida_engine *engine, const sida_engine_options *o) {
    sida_status status = SIDA_OK;
    if (o->version != SIDA_ENGINE_OPTIONS_VERSION)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "engine options of version %u: this library knows %d",
                  o->version, SIDA_ENGINE_OPTIONS_VERSION);
    if (!o->model) SIDA_FAIL(SIDA_ERROR_ARGUMENT, "no model directory is given");
    engine->policy = sida_policy_find(o->policy ? o->policy : "lookahead");
    if (!engine->policy)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "policy '%.40s': expected one of %s", o->policy,
                  sida_policy_names());
    if (!sida_routing_from_name(&engine->routing, o->routing ? o->routing : "exact"))
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "routing '%.40s': expected exact, guided or predicted",
                  o->routing);
    if (engine->routing != SIDA_ROUTING_EXACT && !o->predictor)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "routing %s needs a predictor",
                  sida_routing_name(engine->routing));
    SIDA_TRY(sida_budget_parse(&engine->budget, o->budget ? o->budget : "100%"));
    SIDA_TRY(check_number("batch", o->batch, 1, most_batch));
    SIDA_TRY(check_number("queue", o->queue, 1, most_queue));
    SIDA_TRY(check_number("max-tokens", o->max_tokens, 2, most_tokens));
    SIDA_TRY(check_number("max-new-tokens", o->max_new_tokens, 1, most_tokens));
    SIDA_TRY(check_number("threads", o->threads, 0, 1024));
    engine->options = *o;
out:
    return status;
}

/* A predictor must have been made for this model and this tokenizer. */
static sida_status open_predictor(sida_engine *engine) {
    const sida_engine_options *o = &engine->options;
    const sida_model_info *info = sida_model_get_info(engine->model);
    sida_status status = SIDA_OK;
    if (!o->predictor) goto out;
    SIDA_TRY(check_number("top-k", o->top_k, info->top_k, info->experts));
    SIDA_TRY(sida_hash_source_open(&engine->source, o->predictor,
                                   sida_model_embedding_host(engine->model), info->fingerprint));
    const sida_hash_source_info *made = &engine->source->info;
    if (made->experts != info->experts || made->layers[0] != info->moe_layers[0] ||
        made->layers[1] != info->moe_layers[1])
        SIDA_FAIL(SIDA_ERROR_MISMATCH,
                  "%s: predicts %d experts in %d + %d layers, the model has %d in %d + %d",
                  o->predictor, made->experts, made->layers[0], made->layers[1], info->experts,
                  info->moe_layers[0], info->moe_layers[1]);
    sida_fingerprint tokenizer = sida_tokenizer_fingerprint(engine->tokenizer);
    if (!sida_fingerprint_equal(made->tokenizer, tokenizer)) {
        char wanted[SIDA_FINGERPRINT_TEXT], given[SIDA_FINGERPRINT_TEXT];
        sida_fingerprint_format(wanted, made->tokenizer);
        sida_fingerprint_format(given, tokenizer);
        SIDA_FAIL(SIDA_ERROR_MISMATCH, "%s: was made with tokenizer %s, %s/spiece.model is %s",
                  o->predictor, wanted, o->model, given);
    }
out:
    return status;
}

/* Puts the predictor where it computes, and counts what it takes. On the CPU it stays as it is, in
 * the host's memory, which is the device's. */
static sida_status place_predictor(sida_engine *engine, const sida_run_limits *limits,
                                   size_t *bytes) {
    sida_hash_source *source = engine->source;
    const sida_hash_limits needed = {
        .states = sida_pass_batches(engine->options.queue),
        .sequences = limits->sequences,
        .input_tokens = limits->input_tokens,
        .step_tokens = limits->step_tokens,
        .decoder_positions = limits->decoder_positions,
        .k = engine->options.top_k,
    };
    *bytes = 0;
    if (!source) return SIDA_OK;
    if (strcmp(engine->backend->table->name, "cpu") == 0) {
        *bytes = source->info.bytes;
        return SIDA_OK;
    }
    sida_status status = sida_hash_source_place(source, engine->backend,
                                                sida_model_embedding(engine->model), &needed);
    *bytes = source->info.device_bytes;
    return status;
}

/* What driver and libraries take now, and may take yet. */
static sida_status measure_driver(sida_engine *engine) {
    size_t overhead;
    sida_status status = sida_backend_measure_overhead(engine->backend, &overhead);
    if (status != SIDA_OK) return status;
    size_t reserve = engine->backend->table->driver_used ? SIDA_BUDGET_DRIVER_RESERVE_BYTES : 0;
    if (engine->needs.driver_bytes < overhead + reserve)
        engine->needs.driver_bytes = overhead + reserve;
    return SIDA_OK;
}

/* The slots that the needs leave, and whether that is everybody. Then there is no store, but a
 * table of pointers, and room for that is needed as well. */
static sida_status count_slots(sida_engine *engine, size_t *cap_bytes) {
    sida_engine_facts *facts = &engine->facts;
    sida_budget_needs needs = engine->needs;
    needs.workspace_bytes += (size_t)needs.experts * sizeof(void *);
    sida_status status = sida_budget_slots(&facts->slots, cap_bytes, &engine->budget, &needs);
    facts->resident = status == SIDA_OK && facts->slots >= needs.experts;
    if (facts->resident) {
        engine->needs = needs;
        return SIDA_OK;
    }
    return sida_budget_slots(&facts->slots, cap_bytes, &engine->budget, &engine->needs);
}

/* What is on the device is measured, not estimated: the cap is enforced to the byte. */
static sida_status divide_memory(sida_engine *engine) {
    const sida_engine_options *o = &engine->options;
    const sida_model_info *info = sida_model_get_info(engine->model);
    sida_memory_usage before, after;
    sida_status status = SIDA_OK;
    size_t cap_bytes;
    const sida_run_limits limits = {.sequences = o->batch,
                                    .input_tokens = (int64_t)o->batch * o->max_tokens,
                                    .step_tokens = o->batch,
                                    .decoder_positions = o->max_new_tokens};
    sida_backend_memory(engine->backend, &before);
    engine->needs = (sida_budget_needs){
        .experts = (int64_t)info->sites * info->experts,
        .slot_bytes = sida_store_slot_bytes(info->expert_bytes),
        .dense_bytes = before.used_bytes,
        .workspace_bytes = sida_run_bytes(engine->model, &limits),
    };
    SIDA_TRY(place_predictor(engine, &limits, &engine->needs.predictor_bytes));
    sida_backend_memory(engine->backend, &before);
    /* Twice: before the workspace is taken, and when it has shown what the libraries want. */
    SIDA_TRY(measure_driver(engine));
    SIDA_TRY(count_slots(engine, &cap_bytes));
    SIDA_TRY(sida_run_create(&engine->run, engine->model, &limits));
    sida_backend_memory(engine->backend, &after);
    engine->needs.workspace_bytes = after.used_bytes - before.used_bytes;
    SIDA_TRY(measure_driver(engine));
    SIDA_TRY(count_slots(engine, &cap_bytes));
    SIDA_TRY(sida_backend_set_cap(engine->backend, cap_bytes));
    if (engine->budget.kind == SIDA_BUDGET_BYTES)
        SIDA_TRY(sida_backend_set_overhead(engine->backend, engine->needs.driver_bytes));
    if (engine->facts.resident) SIDA_TRY(sida_resident_create(&engine->resident, engine->model));
    engine->facts.experts = (int32_t)engine->needs.experts;
    engine->facts.slot_bytes = engine->needs.slot_bytes;
    engine->facts.dense_bytes = engine->needs.dense_bytes;
    engine->facts.workspace_bytes = engine->needs.workspace_bytes;
    engine->facts.predictor_bytes = engine->needs.predictor_bytes;
    engine->facts.driver_bytes = engine->needs.driver_bytes;
    engine->facts.cap_bytes = cap_bytes;
    engine->facts.device = engine->backend->table->name;
out:
    return status;
}

/* A later job under a size, when the libraries have taken more than was set aside: fewer slots. */
static sida_status divide_again(sida_engine *engine) {
    sida_status status = SIDA_OK;
    sida_memory_usage usage;
    size_t cap_bytes;
    if (engine->budget.kind != SIDA_BUDGET_BYTES || engine->resident) return SIDA_OK;
    SIDA_TRY(sida_backend_sample(engine->backend));
    sida_backend_memory(engine->backend, &usage);
    if (usage.overhead_bytes <= engine->needs.driver_bytes) goto out;
    engine->needs.driver_bytes = usage.overhead_bytes;
    SIDA_TRY(count_slots(engine, &cap_bytes));
    engine->facts.driver_bytes = usage.overhead_bytes;
out:
    return status;
}

sida_status sida_engine_open(sida_engine **out, const sida_engine_options *options) {
    *out = NULL;
    char *path = NULL;
    sida_engine *engine;
    sida_status status = SIDA_ALLOC(&engine, 1, "an engine");
    if (status != SIDA_OK) return status;
    SIDA_TRY(check_options(engine, options));
    SIDA_TRY(sida_backend_create_named(&engine->backend, options->device));
    SIDA_TRY(sida_path_join(&path, options->model, "spiece.model"));
    SIDA_TRY(sida_tokenizer_open(&engine->tokenizer, path));
    SIDA_TRY(sida_model_open(&engine->model, engine->backend, options->model));
    SIDA_TRY(open_predictor(engine));
    SIDA_TRY(divide_memory(engine));
    /* The caller's strings end here. */
    engine->options.model = engine->options.predictor = engine->options.device = NULL;
    engine->options.budget = engine->options.policy = engine->options.routing = NULL;
    *out = engine;
    engine = NULL;
out:
    free(path);
    sida_engine_close(engine);
    return status;
}

void sida_engine_close(sida_engine *engine) {
    if (!engine) return;
    sida_hash_source_destroy(engine->source);
    sida_run_destroy(engine->run);
    sida_resident_destroy(engine->resident);
    sida_model_destroy(engine->model);
    sida_tokenizer_destroy(engine->tokenizer);
    sida_backend_destroy(engine->backend);
    free(engine);
}

void sida_engine_get_facts(const sida_engine *engine, sida_engine_facts *out) {
    *out = engine->facts;
}

/* --- a job */

typedef struct job {
    sida_engine *engine;
    const sida_job *options;
    sida_corpus_format format;
    int passes, pass; /* of the run itself and of the full model */
    int64_t tokens;
    /* The first pass's answers, compared with the second's. */
    char **answers;
    size_t answers_capacity, answers_count;
    size_t seen; /* answers of the running pass */
    int64_t equal;
    sida_score score;
    sida_corpus *corpus;
    sida_batcher *batcher;
    _Atomic double read; /* share of the file; the hash thread writes it */
    double sampled;      /* when the driver was last asked */
} job;

static sida_status next_batch(void *context, sida_batch **out) {
    job *j = context;
    int64_t done_bytes, total_bytes;
    sida_status status = sida_batcher_next(j->batcher, out);
    sida_corpus_progress(j->corpus, &done_bytes, &total_bytes);
    j->read = total_bytes > 0 ? (double)done_bytes / (double)total_bytes : 0;
    return status;
}

static sida_status handle_answer(job *j, const sida_pass_batch *done, int32_t s) {
    const sida_batch *batch = done->batch;
    char *text = NULL;
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_tokenizer_decode(&text, j->engine->tokenizer,
                                   done->ids + (int64_t)s * done->stride, (size_t)done->counts[s]));
    const char *target = batch->targets ? batch->targets[s] : NULL;
    sida_score_add(&j->score, text, target);
    size_t index = j->seen++;
    if (j->pass > 0) {
        j->equal += index < j->answers_count && strcmp(text, j->answers[index]) == 0;
        goto out;
    }
    if (j->options->on_answer)
        SIDA_TRY(j->options->on_answer(j->options->context, &(sida_answer){
                                                                .index = (int64_t)index,
                                                                .line = batch->lines[s],
                                                                .text = text,
                                                                .target = target,
                                                                .latency_ms = done->latency_ms,
                                                            }));
    if (j->passes > 1) {
        SIDA_TRY(SIDA_GROW(&j->answers, &j->answers_capacity, index + 1, "answers"));
        j->answers[index] = text;
        j->answers_count = index + 1;
        text = NULL;
    }
out:
    free(text);
    return status;
}

static sida_status on_batch(void *context, const sida_pass_batch *done) {
    job *j = context;
    const sida_ragged *input = &done->batch->input;
    sida_status status = SIDA_OK;
    for (int32_t s = 0; s < input->sequences; s++) {
        SIDA_TRY(handle_answer(j, done, s));
        j->tokens += done->counts[s];
    }
    j->tokens += sida_ragged_tokens(input);
    if (done->batch->index == 0 || sida_clock_seconds() - j->sampled > sample_interval_s) {
        SIDA_TRY(sida_backend_sample(j->engine->backend));
        j->sampled = sida_clock_seconds();
    }
    if (!j->options->on_progress) goto out;
    double fraction = j->read;
    if (j->pass > 0)
        fraction = (double)j->seen / (double)j->answers_count;
    else if (j->options->limit > 0)
        fraction = (double)j->seen / (double)j->options->limit;
    fraction = (j->pass + fmin(fraction, 1)) / j->passes;
    SIDA_TRY(j->options->on_progress(j->options->context, fraction, j->tokens));
out:
    return status;
}

static sida_status run_pass(job *j, sida_pass_stats *stats, sida_routing routing) {
    sida_engine *engine = j->engine;
    const sida_engine_options *o = &engine->options;
    const sida_model_info *info = sida_model_get_info(engine->model);
    sida_status status = SIDA_OK;
    j->seen = 0;
    j->read = 0;
    j->score = sida_score_begin(j->format);
    SIDA_TRY(sida_corpus_open(&j->corpus, j->format, j->options->input));
    SIDA_TRY(sida_batcher_create(&j->batcher, j->corpus, engine->tokenizer,
                                 &(sida_batch_options){.sequences = o->batch,
                                                       .limit = j->options->limit,
                                                       .max_tokens = o->max_tokens,
                                                       .truncate = o->truncate,
                                                       .vocabulary = info->vocabulary,
                                                       .eos = info->eos}));
    SIDA_TRY(sida_pass_run(stats, &(sida_pass_options){
                                      .model = engine->model,
                                      .run = engine->run,
                                      .source = engine->source,
                                      .routing = routing,
                                      .top_k = o->top_k,
                                      .slots = engine->facts.slots,
                                      .queue = o->queue,
                                      .prefetch = !o->no_prefetch,
                                      .digest = j->options->digest && j->pass == 0,
                                      .policy = engine->policy,
                                      .resident = engine->resident,
                                      .max_new_tokens = o->max_new_tokens,
                                      .next = next_batch,
                                      .next_context = j,
                                      .on_batch = on_batch,
                                      .on_batch_context = j,
                                  }));
out:
    sida_batcher_destroy(j->batcher);
    sida_corpus_close(j->corpus);
    j->batcher = NULL;
    j->corpus = NULL;
    return status;
}

static void fill_report(sida_report *out, const job *j, sida_pass_stats *stats) {
    const sida_store_stats *store = &stats->store;
    size_t batches = (size_t)stats->batches;
    sida_memory_usage usage;
    sida_backend_memory(j->engine->backend, &usage);
    int64_t needed = store->hits + store->late_prefetches + store->demand_loads;
    int64_t tokens = stats->input_tokens + stats->generated_tokens;
    bool guided = j->engine->routing == SIDA_ROUTING_GUIDED;
    *out = (sida_report){
        .batches = stats->batches,
        .sequences = stats->sequences,
        .input_tokens = stats->input_tokens,
        .generated_tokens = stats->generated_tokens,
        .score = sida_score_value(&j->score),
        .full_score = NAN,
        .fidelity = NAN,
        .label_flips = -1,
        .allowed_share = {guided ? stats->allowed_share[0] : NAN,
                          guided ? stats->allowed_share[1] : NAN},
        .seconds = stats->seconds,
        .tokens_per_s = stats->seconds > 0 ? (double)tokens / stats->seconds : 0,
        .latency_ms_p50 = sida_percentile(stats->latencies_ms, batches, 50),
        .latency_ms_p90 = sida_percentile(stats->latencies_ms, batches, 90),
        .latency_ms_p99 = sida_percentile(stats->latencies_ms, batches, 99),
        .device_bytes_peak = usage.peak_bytes,
        .driver_bytes_peak = usage.driver_peak_bytes,
        .driver_alone = usage.driver_alone,
        .experts_resident = store->resident,
        .experts_resident_peak = store->peak_resident,
        .hits = store->hits,
        .late_prefetches = store->late_prefetches,
        .demand_loads = store->demand_loads,
        .hit_rate = needed > 0 ? (double)store->hits / (double)needed : NAN,
        .prefetch_loads = store->prefetch_loads,
        .dropped_prefetches = store->dropped_prefetches,
        .bytes_moved = store->bytes_moved,
        .bytes_wasted = store->bytes_wasted,
        .wait_ms_inference = stats->inference_wait_seconds * 1e3,
        .wait_ms_hash = stats->hash_wait_seconds * 1e3,
    };
    if (j->engine->resident) {
        out->experts_resident = out->experts_resident_peak = j->engine->facts.experts;
        out->hit_rate = NAN;
    }
    if (j->options->digest) sida_fingerprint_format(out->digest, stats->digest);
}

/* The driver does not ask us: what it took cannot be refused, but said. */
static void check_driver(const sida_engine *engine) {
    sida_memory_usage usage;
    sida_backend_memory(engine->backend, &usage);
    if (engine->budget.kind == SIDA_BUDGET_BYTES && usage.driver_peak_bytes > usage.cap_bytes)
        sida_log(SIDA_LOG_WARNING,
                 "the driver says %zu bytes at peak, %zu above the budget: it and its libraries "
                 "took more than the %zu set aside for them%s",
                 usage.driver_peak_bytes, usage.driver_peak_bytes - usage.cap_bytes,
                 engine->needs.driver_bytes, usage.driver_alone ? "" : ", or another program did");
}

/* Sets the run beside the full model. */
static void compare_scores(sida_report *out, const job *j) {
    out->full_score = sida_score_value(&j->score);
    out->label_flips = (int64_t)j->answers_count - j->equal;
    if (!isnan(out->full_score) && !isnan(out->score)) {
        if (out->full_score > 0) out->fidelity = out->score / out->full_score;
    } else if (j->answers_count > 0) {
        out->fidelity = (double)j->equal / (double)j->answers_count;
    }
}

static sida_status run_job(sida_engine *engine, const sida_job *options, sida_report *out) {
    job j = {.engine = engine, .options = options, .passes = 1};
    sida_pass_stats stats = {0}, full = {0};
    sida_status status = SIDA_OK;
    *out = (sida_report){0};
    if (options->version != SIDA_JOB_VERSION)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "a job of version %u: this library knows %d",
                  options->version, SIDA_JOB_VERSION);
    if (!options->input) SIDA_FAIL(SIDA_ERROR_ARGUMENT, "no input file is given");
    if (!options->format || !sida_corpus_format_from_name(&j.format, options->format))
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "format '%.40s': expected %s",
                  options->format ? options->format : "", sida_corpus_format_names());
    SIDA_TRY(check_number("limit", options->limit, 0, INT64_MAX));
    SIDA_TRY(divide_again(engine));
    bool exact = engine->routing == SIDA_ROUTING_EXACT;
    if (!exact && !options->no_compare) j.passes = 2;
    SIDA_TRY(run_pass(&j, &stats, engine->routing));
    fill_report(out, &j, &stats);
    if (exact) {
        /* The router decides in every case: it is the full model. */
        out->full_score = out->score;
        out->fidelity = out->sequences > 0 ? 1 : NAN;
        out->label_flips = 0;
    }
    if (j.passes > 1) {
        j.pass = 1;
        SIDA_TRY(run_pass(&j, &full, SIDA_ROUTING_EXACT));
        compare_scores(out, &j);
    }
    check_driver(engine);
out:
    for (size_t i = 0; i < j.answers_count; i++) free(j.answers[i]);
    free(j.answers);
    sida_pass_stats_free(&stats);
    sida_pass_stats_free(&full);
    return status;
}

sida_status sida_engine_run(sida_engine *engine, const sida_job *options, sida_report *out) {
#ifdef _OPENMP
    /* The caller's own setting comes back. */
    int before = omp_get_max_threads();
    if (engine->options.threads > 0) omp_set_num_threads(engine->options.threads);
#endif
    sida_status status = run_job(engine, options, out);
#ifdef _OPENMP
    omp_set_num_threads(before);
#endif
    return status;
}
