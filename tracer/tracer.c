#include "tracer/tracer.h"

#include "data/batch.h"
#include "formats/base/clock.h"
#include "formats/base/file.h"
#include "formats/base/memory.h"
#include "runtime/model/model.h"
#include "tracer/parts.h"
#include "tracer/recorder.h"

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
    const sida_moe_driver *driver;
    sida_tokenizer *tokenizer;
    sida_corpus *corpus;
    sida_batcher *batcher;
    sida_run *run;
    sida_recorder recorder;
    sida_trace_info header; /* of every part and of the trace */
    bool header_known;      /* has_targets is set */
    sida_parts parts;
    sida_trace_writer *writer; /* the part being written */
    int64_t part_tokens;       /* in it */
    int64_t sequences, tokens; /* so far, resumed ones included */
    sida_tracer_report *report;
    /* of a batch */
    int64_t *base, *lengths, *decoder_offsets;
    int32_t *decoder_ids, *answer_ids, *answer_counts;
    size_t decoder_capacity;
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
    SIDA_TRY(sida_file_check_writable(o->output));
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
    SIDA_TRY(sida_recorder_init(&t->recorder, t->info, t->header.top));
out:
    free(spiece);
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
                              .decoder_positions = positions};
    SIDA_TRY(sida_resident_create(&t->resident, t->model));
    t->driver = sida_resident_driver(t->resident, &t->recorder, NULL, sida_recorder_observe);
    SIDA_TRY(sida_run_create(&t->run, t->model, &limits));
    SIDA_TRY(SIDA_ALLOC(&t->base, o->batch + 1, "a batch"));
    SIDA_TRY(SIDA_ALLOC(&t->lengths, o->batch, "a batch"));
    SIDA_TRY(SIDA_ALLOC(&t->decoder_offsets, o->batch + 1, "a batch"));
    SIDA_TRY(SIDA_ALLOC(&t->answer_ids, (size_t)o->batch * (size_t)o->generate, "a batch"));
    SIDA_TRY(SIDA_ALLOC(&t->answer_counts, o->batch, "a batch"));
out:
    return status;
}

static void close_all(tracer *t) {
    sida_trace_abandon(t->writer);
    sida_run_destroy(t->run);
    sida_recorder_free(&t->recorder);
    sida_resident_destroy(t->resident);
    sida_batcher_destroy(t->batcher);
    sida_corpus_close(t->corpus);
    sida_tokenizer_destroy(t->tokenizer);
    sida_model_destroy(t->model);
    sida_backend_destroy(t->backend);
    sida_parts_free(&t->parts);
    sida_trace_info_free(&t->header);
    free(t->base);
    free(t->lengths);
    free(t->decoder_offsets);
    free(t->decoder_ids);
    free(t->answer_ids);
    free(t->answer_counts);
}

/* The decoder's inputs: the target shifted right behind the start token. */
static sida_status shift_targets(tracer *t, const sida_ragged *target) {
    sida_status status = SIDA_GROW(&t->decoder_ids, &t->decoder_capacity,
                                   sida_ragged_tokens(target), "decoder inputs");
    if (status != SIDA_OK) return status;
    for (int32_t s = 0; s < target->sequences; s++) {
        int64_t first = target->offsets[s], end = target->offsets[s + 1];
        t->decoder_ids[first] = t->info->decoder_start;
        for (int64_t i = first + 1; i < end; i++) t->decoder_ids[i] = target->ids[i - 1];
        t->lengths[s] = end - first;
    }
    return SIDA_OK;
}

static sida_status trace_targets(tracer *t, const sida_batch *batch) {
    sida_status status = SIDA_OK;
    const sida_ragged *target = &batch->target;
    SIDA_TRY(shift_targets(t, target));
    sida_ragged step = {target->sequences, target->offsets, t->decoder_ids};
    int64_t tokens = sida_ragged_tokens(target);
    SIDA_TRY(sida_recorder_start(&t->recorder, SIDA_DECODER, tokens, target->offsets));
    SIDA_TRY(sida_run_decode(t->run, &step, t->driver));
    memcpy(t->recorder.rows.tokens, t->decoder_ids, (size_t)tokens * sizeof *t->decoder_ids);
out:
    return status;
}

/* N greedy tokens; the rows are recorded step by step and moved together. */
static sida_status trace_generated(tracer *t, const sida_batch *batch) {
    const int32_t sequences = batch->input.sequences, most = t->options->generate;
    sida_status status = SIDA_OK;
    for (int32_t s = 0; s < sequences; s++) t->base[s] = (int64_t)s * most;
    SIDA_TRY(sida_recorder_start(&t->recorder, SIDA_DECODER, (int64_t)sequences * most, t->base));
    sida_generate_options generate = {.max_new_tokens = most};
    SIDA_TRY(sida_run_generate(t->run, &generate, t->driver, t->answer_ids, t->answer_counts));
    for (int32_t s = 0; s < sequences; s++) {
        int32_t *inputs = t->recorder.rows.tokens + t->base[s];
        inputs[0] = t->info->decoder_start;
        for (int32_t i = 1; i < t->answer_counts[s]; i++)
            inputs[i] = t->answer_ids[(int64_t)s * most + i - 1];
        t->lengths[s] = t->answer_counts[s];
    }
    sida_recorder_compact(&t->recorder, sequences, t->lengths);
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

static sida_status trace_batch(tracer *t, const sida_batch *batch) {
    const int32_t sequences = batch->input.sequences;
    const sida_ragged *input = &batch->input;
    int64_t tokens = sida_ragged_tokens(input), *target_lengths = NULL, decoder_tokens = 0;
    sida_status status = SIDA_OK;
    uint8_t *generated = NULL;
    SIDA_TRY(check_targets(t, batch));
    if (!t->writer) {
        char *name = NULL;
        SIDA_TRY(sida_parts_create_folder(&t->parts));
        SIDA_TRY(sida_parts_name(&name, &t->parts, t->parts.count));
        status = sida_trace_create(&t->writer, name, SIDA_H5_PART, &t->header);
        free(name);
        if (status != SIDA_OK) goto out;
    }
    SIDA_TRY(sida_recorder_start(&t->recorder, SIDA_ENCODER, tokens, input->offsets));
    SIDA_TRY(sida_run_encode(t->run, input, t->driver));
    memcpy(t->recorder.rows.tokens, input->ids, (size_t)tokens * sizeof *input->ids);
    for (int32_t s = 0; s < sequences; s++)
        t->lengths[s] = input->offsets[s + 1] - input->offsets[s];
    SIDA_TRY(
        sida_trace_append_side(t->writer, SIDA_ENCODER, sequences, t->lengths, &t->recorder.rows));
    SIDA_TRY(t->header.has_targets ? trace_targets(t, batch) : trace_generated(t, batch));
    SIDA_TRY(
        sida_trace_append_side(t->writer, SIDA_DECODER, sequences, t->lengths, &t->recorder.rows));
    for (int32_t s = 0; s < sequences; s++) decoder_tokens += t->lengths[s];
    SIDA_TRY(SIDA_ALLOC(&generated, sequences, "a batch"));
    memset(generated, !t->header.has_targets, (size_t)sequences);
    if (t->header.has_targets) target_lengths = t->lengths; /* the decoder's are the target's */
    SIDA_TRY(sida_trace_append_sequences(t->writer, sequences, batch->lines, batch->labels,
                                         generated, target_lengths, batch->target.ids));
    t->part_tokens += tokens + decoder_tokens;
    t->tokens += tokens + decoder_tokens;
    t->sequences += sequences;
    t->report->new_tokens += tokens + decoder_tokens;
    t->report->tokens[0] += tokens;
    t->report->tokens[1] += decoder_tokens;
out:
    free(generated);
    return status;
}

static sida_status finish_part(tracer *t) {
    if (!t->writer) return SIDA_OK;
    sida_status status = sida_trace_commit(t->writer);
    t->writer = NULL;
    t->part_tokens = 0;
    if (status == SIDA_OK) t->parts.count++;
    return status;
}

static sida_status report_progress(tracer *t) {
    const sida_tracer_options *o = t->options;
    int64_t done, total;
    if (!o->progress) return SIDA_OK;
    sida_corpus_progress(t->corpus, &done, &total);
    double fraction = total > 0 ? (double)done / (double)total : 1;
    if (o->limit > 0 && (double)t->sequences / (double)o->limit > fraction)
        fraction = (double)t->sequences / (double)o->limit;
    if (o->progress(o->context, "trace", fraction, t->report->new_tokens)) return SIDA_OK;
    return sida_fail(SIDA_ERROR_CANCELLED, "interrupted; --resume goes on from %d finished parts",
                     t->parts.count);
}

static sida_status trace_corpus(tracer *t) {
    sida_status status = SIDA_OK;
    sida_batch *batch = NULL;
    double begin = sida_clock_seconds();
    for (;;) {
        SIDA_TRY(sida_batcher_next(t->batcher, &batch));
        if (!batch) break;
        if (!t->run) {
            SIDA_TRY(open_run(t));
            begin = sida_clock_seconds();
        }
        SIDA_TRY(trace_batch(t, batch));
        sida_batch_destroy(batch);
        batch = NULL;
        if (t->part_tokens >= t->options->part_tokens) SIDA_TRY(finish_part(t));
        SIDA_TRY(report_progress(t));
    }
    SIDA_TRY(finish_part(t));
    t->report->seconds = sida_clock_seconds() - begin;
    if (t->sequences == 0)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: holds no records to trace", t->options->input);
out:
    sida_batch_destroy(batch);
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
    SIDA_TRY(prepare(&t, &complete));
    if (!complete) {
        SIDA_TRY(trace_corpus(&t));
        SIDA_TRY(sida_parts_merge(&t.parts, options->output, &t.header, embed_ids, &t, options));
    }
    SIDA_TRY(sida_parts_remove(&t.parts));
    report->sequences = t.sequences;
    report->parts = t.parts.count;
    if (stat(options->output, &info) == 0) report->bytes = (int64_t)info.st_size;
out:
    sida_trace_abandon(t.writer);
    t.writer = NULL;
    if (t.parts.folder) rmdir(t.parts.folder); /* stays when there are parts to resume from */
    close_all(&t);
    return status;
}
