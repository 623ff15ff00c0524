/* The public face: runs a job, and makes one report of one or two passes. */
#include "data/batch.h"
#include "formats/base/clock.h"
#include "formats/base/log.h"
#include "runtime/engine/compare.h"
#include "runtime/engine/score.h"
#include "runtime/sida_private.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* Between two questions to the driver during a run. */
static const double sample_interval_s = 0.1;

typedef struct job {
    sida_engine *engine;
    const sida_job *options;
    sida_corpus_format format;
    int passes, pass; /* of the run itself and of the full model */
    int64_t tokens;
    sida_comparison comparison; /* of the first pass's answers with the second's */
    /* Of the running pass. */
    size_t seen; /* records */
    sida_score score;
    double nll; /* of all targets */
    int64_t target_tokens;
    /* Scoring a labelled format: which label of the record comes next, and what was seen of it. */
    int32_t label_next;
    double label_nll[2];
    int64_t label_tokens[2];
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

/* A record is done: its answer, and how probable its target was. */
static sida_status finish_record(job *j, const sida_answer *answer) {
    sida_status status = SIDA_OK;
    sida_score_add(&j->score, answer->text, answer->target);
    if (j->options->score) {
        j->nll += answer->nll;
        j->target_tokens += answer->tokens;
    }
    j->seen++;
    if (j->pass > 0) {
        sida_comparison_check(&j->comparison, answer->text, answer->target);
        goto out;
    }
    if (j->passes > 1) SIDA_TRY(sida_comparison_add(&j->comparison, answer->text, answer->target));
    if (j->options->on_answer) SIDA_TRY(j->options->on_answer(j->options->context, answer));
out:
    return status;
}

static sida_status handle_answer(job *j, const sida_pass_batch *done, int32_t s) {
    const sida_batch *batch = done->batch;
    char *text = NULL;
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_tokenizer_decode(&text, j->engine->tokenizer,
                                   done->ids + (int64_t)s * done->stride, (size_t)done->counts[s]));
    SIDA_TRY(finish_record(j, &(sida_answer){.index = (int64_t)j->seen,
                                             .line = batch->lines[s],
                                             .text = text,
                                             .target = batch->targets ? batch->targets[s] : NULL,
                                             .latency_ms = done->latency_ms,
                                             .nll = NAN}));
out:
    free(text);
    return status;
}

/* One sequence's target; of a labelled format both labels of a record come one behind the other. */
static sida_status handle_target(job *j, const sida_pass_batch *done, int32_t s) {
    const sida_batch *batch = done->batch;
    const char *const *labels = sida_corpus_labels(j->format);
    double nll = done->nll[s];
    int64_t tokens = done->counts[s];
    sida_answer answer = {.index = (int64_t)j->seen,
                          .line = batch->lines[s],
                          .text = "",
                          .target = batch->targets[s],
                          .latency_ms = done->latency_ms};
    if (!answer.target || (labels && batch->labels[s] < 0))
        return sida_fail(SIDA_ERROR_FORMAT, "%s:%lld: no target: there is nothing to score",
                         j->options->input, (long long)batch->lines[s]);
    if (labels) {
        int32_t label = j->label_next, is = batch->labels[s];
        j->label_nll[label] = nll;
        j->label_tokens[label] = tokens;
        j->label_next = 1 - label;
        if (label == 0) return SIDA_OK;
        answer.text = labels[j->label_nll[1] < j->label_nll[0]];
        answer.target = labels[is];
        nll = j->label_nll[is];
        tokens = j->label_tokens[is];
    }
    answer.nll = nll;
    answer.tokens = tokens;
    return finish_record(j, &answer);
}

static sida_status on_batch(void *context, const sida_pass_batch *done) {
    job *j = context;
    const sida_ragged *input = &done->batch->input;
    sida_status status = SIDA_OK;
    for (int32_t s = 0; s < input->sequences; s++) {
        SIDA_TRY(done->nll ? handle_target(j, done, s) : handle_answer(j, done, s));
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
        fraction = (double)j->seen / (double)j->comparison.count;
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
    j->nll = 0;
    j->target_tokens = 0;
    j->label_next = 0;
    j->score = sida_score_begin(j->format);
    SIDA_TRY(sida_corpus_open(&j->corpus, j->format, j->options->input));
    SIDA_TRY(sida_batcher_create(&j->batcher, j->corpus, engine->tokenizer,
                                 &(sida_batch_options){.sequences = o->batch,
                                                       .limit = j->options->limit,
                                                       .max_tokens = o->max_tokens,
                                                       .truncate = o->truncate,
                                                       .vocabulary = info->vocabulary,
                                                       .eos = info->eos,
                                                       .each_label = j->options->score,
                                                       .seed = j->options->seed}));
    SIDA_TRY(sida_pass_run(stats, &(sida_pass_options){
                                      .model = engine->model,
                                      .run = engine->run,
                                      .source = engine->source,
                                      .routing = routing,
                                      .top_k = o->top_k,
                                      .slots = engine->facts.slots,
                                      .queue = o->queue,
                                      .prefetch = !o->no_prefetch,
                                      .refine = !o->no_refine,
                                      .digest = j->options->digest && j->pass == 0,
                                      .score = j->options->score,
                                      .most_allowed = engine->most_allowed,
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

static double mean_loss(const job *j) {
    return j->target_tokens > 0 ? j->nll / (double)j->target_tokens : NAN;
}

/* What predicting took beside the model, and made it wait. */
static void fill_hash_report(sida_report *out, const sida_pass_stats *stats) {
    double batches = stats->batches > 0 ? (double)stats->batches : 1;
    out->hash_ms_per_batch = stats->hash_seconds * 1e3 / batches;
    out->refine_ms_per_batch = stats->refine_seconds * 1e3 / batches;
    out->inference_ms_per_batch = stats->batch_seconds * 1e3 / batches;
    out->hash_share = stats->batch_seconds > 0 ? stats->hash_seconds / stats->batch_seconds : NAN;
    out->refine_share =
        stats->batch_seconds > 0 ? stats->refine_seconds / stats->batch_seconds : NAN;
    out->table_wait_share = stats->after_first_seconds > 0
                                ? stats->table_wait_seconds / stats->after_first_seconds
                                : NAN;
    for (int side = 0; side < 2 && stats->layer_share[0] && stats->layer_share[1]; side++) {
        int32_t layers = stats->layers[side];
        if (layers > SIDA_REPORT_LAYERS) layers = SIDA_REPORT_LAYERS;
        out->allowed_layers[side] = layers;
        memcpy(out->allowed_layer_share[side], stats->layer_share[side],
               (size_t)layers * sizeof(double));
    }
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
        .constant_score = sida_score_constant(&j->score),
        .fidelity = NAN,
        .label_flips = -1,
        .answers_lost = -1,
        .answers_gained = -1,
        .mcnemar_p = NAN,
        .loss = mean_loss(j),
        .full_loss = NAN,
        .target_tokens = j->target_tokens,
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
        .refinements = stats->refinements,
        .revised_in = store->revised_in,
        .revised_out = store->revised_out,
        .bytes_moved = store->bytes_moved,
        .bytes_wasted = store->bytes_wasted,
        .wait_ms_inference = stats->inference_wait_seconds * 1e3,
        .wait_ms_hash = stats->hash_wait_seconds * 1e3,
    };
    fill_hash_report(out, stats);
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

static bool has_answers(const job *j) {
    return !j->options->score || sida_corpus_labels(j->format);
}

/* Sets the run beside the full model, which has just run. */
static void compare_scores(sida_report *out, const job *j) {
    const sida_comparison *c = &j->comparison;
    out->full_score = sida_score_value(&j->score);
    out->full_loss = mean_loss(j);
    if (!has_answers(j)) return;
    out->label_flips = c->changed;
    out->answers_lost = c->lost;
    out->answers_gained = c->gained;
    out->mcnemar_p = sida_mcnemar_p(c->lost, c->gained);
    if (!isnan(out->full_score) && !isnan(out->score)) {
        if (out->full_score > 0) out->fidelity = out->score / out->full_score;
    } else if (c->count > 0) {
        out->fidelity = (double)(c->count - (size_t)c->changed) / (double)c->count;
    }
}

/* The router decides in every case: it is the full model. */
static void compare_with_itself(sida_report *out, const job *j) {
    out->full_score = out->score;
    out->full_loss = out->loss;
    if (!has_answers(j)) return;
    out->fidelity = out->sequences > 0 ? 1 : NAN;
    out->label_flips = out->answers_lost = out->answers_gained = 0;
    out->mcnemar_p = 1;
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
    SIDA_TRY(sida_engine_check_number("limit", options->limit, 0, INT64_MAX));
    SIDA_TRY(sida_engine_divide_again(engine));
    if (options->score && j.format == SIDA_CORPUS_TEXT)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "format text has no targets to score; span-corruption makes "
                                       "some of a text");
    bool exact = engine->routing == SIDA_ROUTING_EXACT;
    if (!exact && !options->no_compare) j.passes = 2;
    SIDA_TRY(run_pass(&j, &stats, engine->routing));
    fill_report(out, &j, &stats);
    if (exact) compare_with_itself(out, &j);
    if (j.passes > 1) {
        j.pass = 1;
        SIDA_TRY(run_pass(&j, &full, SIDA_ROUTING_EXACT));
        compare_scores(out, &j);
    }
    check_driver(engine);
out:
    sida_comparison_free(&j.comparison);
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
