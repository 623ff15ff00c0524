#include "tracer/writer.h"

#include "formats/base/memory.h"
#include "formats/base/queue.h"
#include "tracer/recorder.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct sida_part_writer {
    sida_parts *parts;
    const sida_trace_info *header;
    int64_t part_tokens;
    pthread_t threads[2]; /* gather, commit */
    int started;
    sida_queue *submitted; /* of sida_trace_job, to gather */
    sida_queue *finished;  /* of sida_trace_writer, whole parts to commit */
    sida_queue *idle; /* of sida_trace_job; the first thread that fails closes it with its error */
    /* gather's own */
    sida_recorder recorder;
    sida_trace_writer *part; /* at hand; NULL before the first batch */
    int32_t index;           /* its number */
    int64_t tokens;          /* in it */
    int64_t *lengths;        /* [sequences] */
    uint8_t *generated;      /* [sequences] */
};

/* --- gather */

static sida_status open_part(const sida_part_writer *w, sida_trace_writer **part, int32_t index) {
    sida_status status = SIDA_OK;
    char *name = NULL;
    SIDA_TRY(sida_parts_create_folder(w->parts));
    SIDA_TRY(sida_parts_name(&name, w->parts, index));
    SIDA_TRY(sida_trace_create(part, name, SIDA_H5_PART, w->header));
out:
    free(name);
    return status;
}

static sida_status append_side(sida_part_writer *w, const sida_trace_job *job, int side,
                               const int64_t *lengths, const int32_t *ids) {
    sida_status status = SIDA_OK;
    int32_t sequences = job->batch->input.sequences;
    int64_t tokens = 0;
    for (int32_t s = 0; s < sequences; s++) tokens += lengths[s];
    SIDA_TRY(sida_recorder_gather(&w->recorder, job->recording, side, sequences, lengths));
    memcpy(w->recorder.rows.tokens, ids, (size_t)tokens * sizeof *ids);
    SIDA_TRY(sida_trace_append_side(w->part, side, sequences, lengths, &w->recorder.rows));
    w->tokens += tokens;
out:
    return status;
}

static sida_status append_batch(sida_part_writer *w, const sida_trace_job *job) {
    sida_status status = SIDA_OK;
    const sida_batch *batch = job->batch;
    const sida_ragged *input = &batch->input;
    const bool has_targets = w->header->has_targets;
    SIDA_TRY(sida_recording_wait(job->recording));
    if (!w->part) SIDA_TRY(open_part(w, &w->part, w->index));
    for (int32_t s = 0; s < input->sequences; s++)
        w->lengths[s] = input->offsets[s + 1] - input->offsets[s];
    memset(w->generated, !has_targets, (size_t)input->sequences);
    SIDA_TRY(append_side(w, job, SIDA_ENCODER, w->lengths, input->ids));
    SIDA_TRY(append_side(w, job, SIDA_DECODER, job->lengths, job->decoder_ids));
    /* The decoder's lengths are the target's where there is one. */
    SIDA_TRY(sida_trace_append_sequences(w->part, input->sequences, batch->lines, batch->labels,
                                         w->generated, has_targets ? job->lengths : NULL,
                                         batch->target.ids));
out:
    return status;
}

/* The next part is opened before this one is on its way: while that is written HDF5's lock is
 * taken, and filling a part that is open needs none. */
static sida_status finish_part(sida_part_writer *w) {
    sida_status status = SIDA_OK;
    sida_trace_writer *next = NULL;
    SIDA_TRY(open_part(w, &next, w->index + 1));
    SIDA_TRY(sida_queue_push(w->finished, w->part, NULL)); /* or commit failed and has said so */
    w->part = next;
    next = NULL;
    w->index++;
    w->tokens = 0;
out:
    sida_trace_abandon(next);
    return status;
}

static void empty_job(sida_trace_job *job) {
    sida_batch_destroy(job->batch);
    job->batch = NULL;
    if (job->recording) sida_recording_reset(job->recording);
}

static void *gather_batches(void *context) {
    sida_part_writer *w = context;
    sida_status status = SIDA_OK;
    for (;;) {
        void *item;
        SIDA_TRY(sida_queue_pop(w->submitted, &item, NULL));
        if (!item) break;
        SIDA_TRY(append_batch(w, item));
        empty_job(item);
        if (w->tokens >= w->part_tokens) SIDA_TRY(finish_part(w));
        SIDA_TRY(sida_queue_push(w->idle, item, NULL));
    }
    if (w->tokens == 0) goto out;
    SIDA_TRY(sida_queue_push(w->finished, w->part, NULL));
    w->part = NULL;
out:
    sida_trace_abandon(w->part);
    w->part = NULL;
    if (status != SIDA_OK) sida_queue_close(w->idle, status);
    sida_queue_close(w->finished, SIDA_OK); /* parts that are whole are kept whatever happened */
    return NULL;
}

/* --- commit */

static void *commit_parts(void *context) {
    sida_part_writer *w = context;
    sida_status status = SIDA_OK;
    for (;;) {
        void *item;
        SIDA_TRY(sida_queue_pop(w->finished, &item, NULL));
        if (!item) break;
        SIDA_TRY(sida_trace_commit(item));
        w->parts->count++;
    }
out:
    if (status != SIDA_OK) {
        sida_queue_close(w->idle, status);
        sida_queue_close(w->finished, status);
    }
    return NULL;
}

/* --- the caller's side */

static sida_status start(sida_part_writer *w, void *(*run)(void *context)) {
    if (pthread_create(&w->threads[w->started], NULL, run, w) != 0)
        return sida_fail(SIDA_ERROR_MEMORY, "cannot start a thread for writing the trace");
    w->started++;
    return SIDA_OK;
}

sida_status sida_part_writer_create(sida_part_writer **out, sida_parts *parts,
                                    const sida_trace_info *header, sida_trace_job *jobs,
                                    int32_t job_count, int32_t sequences, int64_t part_tokens) {
    sida_status status = SIDA_OK;
    sida_part_writer *w = NULL;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&w, 1, "writing the trace"));
    w->parts = parts;
    w->header = header;
    w->part_tokens = part_tokens;
    w->index = parts->count;
    SIDA_TRY(sida_recorder_init(&w->recorder, header, sequences));
    SIDA_TRY(SIDA_ALLOC(&w->lengths, sequences, "writing the trace"));
    SIDA_TRY(SIDA_ALLOC(&w->generated, sequences, "writing the trace"));
    SIDA_TRY(sida_queue_create(&w->submitted, (size_t)job_count));
    SIDA_TRY(sida_queue_create(&w->idle, (size_t)job_count));
    SIDA_TRY(sida_queue_create(&w->finished, 1));
    for (int32_t i = 0; i < job_count; i++) SIDA_TRY(sida_queue_push(w->idle, &jobs[i], NULL));
    SIDA_TRY(start(w, gather_batches));
    SIDA_TRY(start(w, commit_parts));
    *out = w;
    w = NULL;
out:
    sida_part_writer_finish(w, status);
    return status;
}

sida_status sida_part_writer_take(sida_part_writer *w, sida_trace_job **job) {
    void *item;
    sida_status status = sida_queue_pop(w->idle, &item, NULL);
    *job = item;
    return status;
}

sida_status sida_part_writer_submit(sida_part_writer *w, sida_trace_job *job) {
    return sida_queue_push(w->submitted, job, NULL);
}

sida_status sida_part_writer_finish(sida_part_writer *w, sida_status reason) {
    sida_status status = reason;
    void *item;
    if (!w) return reason;
    if (w->submitted) sida_queue_close(w->submitted, reason);
    /* Without its reader a queue of finished parts would hold gather up. */
    if (w->started == 1) sida_queue_close(w->finished, reason);
    for (int i = 0; i < w->started; i++) pthread_join(w->threads[i], NULL);
    /* Parts that nobody commits any more. */
    while (w->finished && (item = sida_queue_drain(w->finished))) sida_trace_abandon(item);
    if (reason == SIDA_OK) {
        sida_queue_close(w->idle, SIDA_OK); /* unless a thread has, with its error */
        status = sida_queue_pop(w->idle, &item, NULL);
    }
    sida_queue_destroy(w->submitted);
    sida_queue_destroy(w->idle);
    sida_queue_destroy(w->finished);
    sida_recorder_free(&w->recorder);
    free(w->lengths);
    free(w->generated);
    free(w);
    return status;
}
