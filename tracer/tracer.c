#include "tracer/tracer.h"

#include "data/batch.h"
#include "formats/base/clock.h"
#include "formats/base/file.h"
#include "formats/base/memory.h"
#include "runtime/model/model.h"
#include "tracer/parts.h"
#include "tracer/writer.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct tracer {
    const sida_tracer_options *options;
    sida_backend *backend;
    sida_model *model;
    const sida_model_info *info;
    sida_resident *resident;
    sida_tokenizer *tokenizer;
    sida_corpus *corpus;
    sida_batcher *batcher;
    sida_run *run;
    sida_trace_info header; /* of every part and of the trace */
    bool header_known;      /* has_targets is set */
    sida_parts parts;
    sida_trace_job jobs[SIDA_TRACE_JOBS];
    int32_t job_count;
    sida_part_writer *writer; /* NULL: nothing is recorded */
    int64_t sequences;        /* so far, resumed ones included */
    sida_tracer_report *report;
    int32_t *answer_ids, *answer_counts; /* [batch, generate], [batch] */
} tracer;

/* What decides the trace's bytes, in a fixed order. Another device than the CPU rounds otherwise: a
 * trace begun on one is not resumed on the other. */
static sida_status describe_options(char **out, const sida_tracer_options *o, const char *device) {
    json_t *json = json_pack("{s:s, s:i, s:i, s:i, s:b, s:i, s:I, s:I}", "format",
                             sida_corpus_format_name(o->format), "top", (int)o->top, "batch",
                             (int)o->batch, "max_tokens", (int)o->max_tokens, "truncate",
                             (int)o->truncate, "generate", (int)o->generate, "limit",
                             (json_int_t)o->limit, "part_tokens", (json_int_t)o->part_tokens);
    if (json && strcmp(device, "cpu") != 0)
        json_object_set_new(json, "device", json_string(device));
    *out = json ? json_dumps(json, JSON_COMPACT) : NULL;
    json_decref(json);
    return *out ? SIDA_OK : sida_fail(SIDA_ERROR_MEMORY, "out of memory describing the options");
}

static sida_status fill_header(tracer *t) {
    const sida_model_info *info = t->info;
    sida_trace_info *h = &t->header;
    sida_status status = SIDA_OK;
    *h = (sida_trace_info){.model = info->fingerprint,
                           .tokenizer = sida_tokenizer_fingerprint(t->tokenizer),
                           .experts = info->experts,
                           .top_k = info->top_k,
                           .top = t->options->top < info->experts ? t->options->top : info->experts,
                           .d_model = info->d_model,
                           .vocabulary = info->vocabulary,
                           .layers = {info->moe_layers[0], info->moe_layers[1]}};
    if (h->top < info->top_k)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "--top %d is below the %d experts a token takes", h->top,
                  info->top_k);
    SIDA_TRY(sida_fingerprint_of_file(&h->input, t->options->input));
    SIDA_TRY(sida_strdup(&h->family, info->family));
    SIDA_TRY(describe_options(&h->options, t->options, t->backend->table->name));
    h->config = json_dumps(sida_checkpoint_config(sida_model_checkpoint(t->model)), JSON_COMPACT);
    if (!h->config) SIDA_FAIL(SIDA_ERROR_MEMORY, "out of memory copying the configuration");
out:
    return status;
}

static sida_status open_all(tracer *t) {
    const sida_tracer_options *o = t->options;
    char *spiece = NULL;
    sida_status status = SIDA_OK;
    if (!o->dry_run) SIDA_TRY(sida_file_check_writable(o->output));
    /* The corpus before the model: a mistyped name should not cost a minute of loading. */
    SIDA_TRY(sida_corpus_open(&t->corpus, o->format, o->input));
    SIDA_TRY(sida_path_join(&spiece, o->model, "spiece.model"));
    SIDA_TRY(sida_tokenizer_open(&t->tokenizer, spiece));
    SIDA_TRY(sida_backend_create_named(&t->backend, o->device));
    t->report->device = t->backend->table->name;
    SIDA_TRY(sida_model_open(&t->model, t->backend, o->model));
    t->info = sida_model_get_info(t->model);
    if (t->info->moe_layers[0] + t->info->moe_layers[1] == 0)
        SIDA_FAIL(SIDA_ERROR_UNSUPPORTED, "%s: the model has no MoE layer to trace", o->model);
    SIDA_TRY(fill_header(t));
    sida_batch_options cut = {.sequences = o->batch,
                              .limit = o->limit,
                              .max_tokens = o->max_tokens,
                              .truncate = o->truncate,
                              .vocabulary = t->info->vocabulary,
                              .eos = t->info->eos};
    SIDA_TRY(sida_batcher_create(&t->batcher, t->corpus, t->tokenizer, &cut));
out:
    free(spiece);
    return status;
}

static sida_status open_job(tracer *t, sida_trace_job *job) {
    sida_status status = SIDA_OK;
    /* One call of the encoder; of the decoder one with targets, or one a generated token. */
    if (!t->options->dry_run)
        SIDA_TRY(sida_recording_create(&job->recording, t->run, 1 + t->options->generate));
    SIDA_TRY(SIDA_ALLOC(&job->lengths, t->options->batch, "a batch"));
out:
    return status;
}

/* Only once there is something to run: a finished trace needs no experts on the device. */
static sida_status open_run(tracer *t) {
    const sida_tracer_options *o = t->options;
    sida_status status = SIDA_OK;
    int32_t positions = o->max_tokens > o->generate ? o->max_tokens : o->generate;
    sida_run_limits limits = {.sequences = o->batch,
                              .input_tokens = (int64_t)o->batch * o->max_tokens,
                              .step_tokens = (int64_t)o->batch * o->max_tokens,
                              .decoder_positions = positions,
                              .record_top = o->dry_run ? 0 : t->header.top};
    SIDA_TRY(sida_resident_create(&t->resident, t->model));
    SIDA_TRY(sida_run_create(&t->run, t->model, &limits));
    SIDA_TRY(SIDA_ALLOC(&t->answer_ids, (size_t)o->batch * (size_t)o->generate, "a batch"));
    SIDA_TRY(SIDA_ALLOC(&t->answer_counts, o->batch, "a batch"));
    t->job_count = o->dry_run ? 1 : SIDA_TRACE_JOBS;
    for (int32_t i = 0; i < t->job_count; i++) SIDA_TRY(open_job(t, &t->jobs[i]));
    if (!o->dry_run)
        SIDA_TRY(sida_part_writer_create(&t->writer, &t->parts, &t->header, t->jobs, t->job_count,
                                         o->batch, o->part_tokens));
out:
    return status;
}

static void close_job(sida_trace_job *job) {
    sida_batch_destroy(job->batch);
    sida_recording_destroy(job->recording);
    free(job->lengths);
    free(job->decoder_ids);
}

static void close_all(tracer *t) {
    for (int32_t i = 0; i < t->job_count; i++) close_job(&t->jobs[i]);
    sida_run_destroy(t->run);
    sida_resident_destroy(t->resident);
    sida_batcher_destroy(t->batcher);
    sida_corpus_close(t->corpus);
    sida_tokenizer_destroy(t->tokenizer);
    sida_model_destroy(t->model);
    sida_backend_destroy(t->backend);
    sida_parts_free(&t->parts);
    sida_trace_info_free(&t->header);
    free(t->answer_ids);
    free(t->answer_counts);
}

/* A sequence's inputs: the start token, then all but the last of what it answers. */
static void shift(int32_t *inputs, int32_t start, const int32_t *answer, int64_t length) {
    if (length == 0) return;
    inputs[0] = start;
    memcpy(inputs + 1, answer, (size_t)(length - 1) * sizeof *answer);
}

/* Teacher forcing: the whole target in one call. */
static sida_status trace_targets(tracer *t, sida_trace_job *job, const sida_moe_driver *driver) {
    sida_status status = SIDA_OK;
    const sida_ragged *target = &job->batch->target;
    SIDA_TRY(SIDA_GROW(&job->decoder_ids, &job->decoder_capacity, sida_ragged_tokens(target),
                       "decoder inputs"));
    for (int32_t s = 0; s < target->sequences; s++) {
        int64_t first = target->offsets[s];
        job->lengths[s] = target->offsets[s + 1] - first;
        shift(job->decoder_ids + first, t->info->decoder_start, target->ids + first,
              job->lengths[s]);
    }
    const sida_ragged step = {target->sequences, target->offsets, job->decoder_ids};
    SIDA_TRY(sida_run_decode(t->run, &step, driver));
out:
    return status;
}

/* N greedy tokens. */
static sida_status trace_generated(tracer *t, sida_trace_job *job, const sida_moe_driver *driver) {
    const int32_t sequences = job->batch->input.sequences, most = t->options->generate;
    const sida_generate_options generate = {.max_new_tokens = most};
    sida_status status = SIDA_OK;
    int64_t tokens = 0;
    SIDA_TRY(sida_run_generate(t->run, &generate, driver, t->answer_ids, t->answer_counts));
    for (int32_t s = 0; s < sequences; s++) tokens += job->lengths[s] = t->answer_counts[s];
    SIDA_TRY(SIDA_GROW(&job->decoder_ids, &job->decoder_capacity, tokens, "decoder inputs"));
    int32_t *inputs = job->decoder_ids;
    for (int32_t s = 0; s < sequences; inputs += job->lengths[s++])
        shift(inputs, t->info->decoder_start, t->answer_ids + (int64_t)s * most, job->lengths[s]);
out:
    return status;
}

static sida_status check_targets(tracer *t, const sida_batch *batch) {
    for (int32_t s = 0; s < batch->input.sequences; s++) {
        bool has = batch->targets[s] != NULL;
        if (!t->header_known) {
            t->header.has_targets = has;
            t->header_known = true;
        }
        if (has != t->header.has_targets)
            return sida_fail(SIDA_ERROR_FORMAT,
                             "%s:%lld: some records have a target and some have none",
                             t->options->input, (long long)batch->lines[s]);
    }
    return SIDA_OK;
}

/* Hands the job's batch to the device and the job to the writer: both may still be at it. */
static sida_status trace_batch(tracer *t, sida_trace_job *job) {
    sida_status status = SIDA_OK;
    const sida_batch *batch = job->batch;
    int64_t tokens[2] = {sida_ragged_tokens(&batch->input), 0};
    const sida_moe_driver driver = {.resident = sida_resident_table(t->resident),
                                    .record = job->recording};
    SIDA_TRY(check_targets(t, batch));
    SIDA_TRY(sida_run_encode(t->run, &batch->input, &driver));
    SIDA_TRY(t->header.has_targets ? trace_targets(t, job, &driver)
                                   : trace_generated(t, job, &driver));
    for (int32_t s = 0; s < batch->input.sequences; s++) tokens[1] += job->lengths[s];
    t->sequences += batch->input.sequences;
    t->report->new_tokens += tokens[0] + tokens[1];
    t->report->tokens[0] += tokens[0];
    t->report->tokens[1] += tokens[1];
    if (t->writer) SIDA_TRY(sida_part_writer_submit(t->writer, job));
out:
    return status;
}

/* Where the next batch goes. */
static sida_status take_job(tracer *t, sida_trace_job **job) {
    if (t->writer) return sida_part_writer_take(t->writer, job);
    *job = &t->jobs[0];
    sida_batch_destroy((*job)->batch);
    (*job)->batch = NULL;
    return SIDA_OK;
}

/* False to stop. */
static bool report_progress(const tracer *t) {
    const sida_tracer_options *o = t->options;
    int64_t done, total;
    if (!o->progress) return true;
    sida_corpus_progress(t->corpus, &done, &total);
    double fraction = total > 0 ? (double)done / (double)total : 1;
    if (o->limit > 0 && (double)t->sequences / (double)o->limit > fraction)
        fraction = (double)t->sequences / (double)o->limit;
    return o->progress(o->context, "trace", fraction, t->report->new_tokens);
}

static sida_status trace_batches(tracer *t, double *begin) {
    sida_status status = SIDA_OK;
    sida_batch *batch = NULL;
    sida_trace_job *job;
    for (;;) {
        SIDA_TRY(sida_batcher_next(t->batcher, &batch));
        if (!batch) break;
        if (!t->run) {
            SIDA_TRY(open_run(t));
            *begin = sida_clock_seconds();
        }
        SIDA_TRY(take_job(t, &job));
        job->batch = batch;
        batch = NULL;
        SIDA_TRY(trace_batch(t, job));
        if (!report_progress(t)) SIDA_FAIL(SIDA_ERROR_CANCELLED, "interrupted");
    }
    if (t->run) SIDA_TRY(sida_stream_synchronize(sida_run_stream(t->run)));
out:
    sida_batch_destroy(batch);
    return status;
}

static sida_status trace_corpus(tracer *t) {
    double begin = sida_clock_seconds();
    sida_status status = trace_batches(t, &begin);
    status = sida_part_writer_finish(t->writer, status);
    t->writer = NULL;
    t->report->seconds = sida_clock_seconds() - begin;
    if (status == SIDA_ERROR_CANCELLED && !t->options->dry_run)
        return sida_fail(status, "interrupted; --resume goes on from %d finished parts",
                         t->parts.count);
    if (status == SIDA_OK && t->sequences == 0)
        return sida_fail(SIDA_ERROR_FORMAT, "%s: holds no records to trace", t->options->input);
    return status;
}

static sida_status embed_ids(void *context, const int32_t *ids, int32_t count, float *rows) {
    tracer *t = context;
    sida_weight table = sida_model_embedding(t->model);
    sida_stream *stream = NULL;
    sida_buffer *device_ids = NULL, *device_rows = NULL;
    size_t row_bytes = (size_t)count * (size_t)table.cols * sizeof *rows,
           id_bytes = (size_t)count * sizeof *ids;
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_stream_create(t->backend, &stream, SIDA_STREAM_COMPUTE));
    SIDA_TRY(sida_buffer_create(t->backend, &device_ids, SIDA_MEMORY_DEVICE, id_bytes, "ids"));
    SIDA_TRY(sida_buffer_create(t->backend, &device_rows, SIDA_MEMORY_DEVICE, row_bytes, "rows"));
    SIDA_TRY(sida_copy(stream, device_ids->data, ids, id_bytes));
    SIDA_TRY(sida_ops_of(t->backend)
                 ->embedding(stream, device_rows->data, table, device_ids->data, count));
    SIDA_TRY(sida_copy(stream, rows, device_rows->data, row_bytes));
    SIDA_TRY(sida_stream_synchronize(stream));
out:
    sida_buffer_destroy(device_ids);
    sida_buffer_destroy(device_rows);
    sida_stream_destroy(stream);
    return status;
}

/* The trace is there already, from this very input and these options: then only the parts that a
 * kill left behind are to go. *complete tells. */
static sida_status check_complete(tracer *t, bool *complete) {
    sida_status status = SIDA_OK;
    sida_trace *trace = NULL;
    *complete = false;
    if (!sida_file_exists(t->options->output)) return SIDA_OK;
    SIDA_TRY(sida_trace_open(&trace, t->options->output));
    const sida_trace_info *info = sida_trace_get_info(trace);
    status = sida_parts_compare(info, t->options->output, &t->header);
    if (status == SIDA_OK) {
        *complete = true;
        t->sequences = info->sequences;
        t->report->tokens[0] = info->tokens[0];
        t->report->tokens[1] = info->tokens[1];
    } else if (t->parts.count > 0) {
        status = SIDA_OK; /* an older trace, about to be replaced by what the parts hold */
    }
out:
    sida_trace_close(trace);
    return status;
}

static sida_status prepare(tracer *t, bool *complete) {
    const sida_tracer_options *o = t->options;
    sida_status status = SIDA_OK;
    char *first = NULL;
    *complete = false;
    if (!o->resume) {
        SIDA_TRY(sida_strprintf(&t->parts.folder, "%s.parts", o->output));
        SIDA_TRY(sida_parts_name(&first, &t->parts, 0));
        if (sida_file_exists(first))
            SIDA_FAIL(SIDA_ERROR_ARGUMENT,
                      "%s: holds the parts of an unfinished run; use --resume to go on, or remove "
                      "the folder to start again",
                      t->parts.folder);
        goto out;
    }
    SIDA_TRY(sida_parts_find(&t->parts, o->output, &t->header));
    SIDA_TRY(check_complete(t, complete));
    if (*complete) goto out;
    if (t->parts.sequences > 0) {
        t->sequences = t->parts.sequences;
        t->report->tokens[0] = t->parts.tokens[0];
        t->report->tokens[1] = t->parts.tokens[1];
        t->report->parts_reused = t->parts.count;
        t->header.has_targets = t->parts.has_targets;
        t->header_known = true;
        SIDA_TRY(sida_batcher_skip(t->batcher, (t->sequences + o->batch - 1) / o->batch));
    }
out:
    free(first);
    return status;
}

sida_status sida_tracer_run(const sida_tracer_options *options, sida_tracer_report *report) {
    tracer t = {.options = options, .report = report};
    struct stat info;
    sida_status status = SIDA_OK;
    bool complete = false;
    *report = (sida_tracer_report){0};
    SIDA_TRY(open_all(&t));
    if (options->dry_run) {
        SIDA_TRY(trace_corpus(&t));
        report->sequences = t.sequences;
        goto out;
    }
    SIDA_TRY(prepare(&t, &complete));
    if (!complete) {
        SIDA_TRY(trace_corpus(&t));
        double begin = sida_clock_seconds();
        SIDA_TRY(sida_parts_merge(&t.parts, options->output, &t.header, embed_ids, &t, options));
        report->merge_seconds = sida_clock_seconds() - begin;
    }
    SIDA_TRY(sida_parts_remove(&t.parts));
    report->sequences = t.sequences;
    report->parts = t.parts.count;
    if (stat(options->output, &info) == 0) report->bytes = (int64_t)info.st_size;
out:
    if (t.parts.folder) rmdir(t.parts.folder); /* stays when there are parts to resume from */
    close_all(&t);
    return status;
}
