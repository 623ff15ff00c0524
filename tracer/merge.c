#include "tracer/merge.h"

#include "formats/base/memory.h"
#include "formats/base/queue.h"

#include <pthread.h>
#include <stdlib.h>

enum { QUEUED_PARTS = 64 };
enum { block_rows = 16384 }; /* of a side, in memory at once; above any limit on a sequence */

struct sida_merger {
    const sida_parts *parts;
    const char *output;
    const sida_trace_info *info;
    pthread_t thread;
    sida_queue *finished; /* numbers of parts, from 1; the thread closes it with its error */
    pthread_mutex_t mutex;
    pthread_cond_t moved;
    int32_t merged; /* parts; under the mutex, as is */
    bool stopped;
    /* the thread's own, and whose comes after it */
    sida_trace_writer *writer; /* NULL before the first part */
    sida_trace_rows rows;
    uint8_t *seen; /* [vocabulary] */
};

static sida_status alloc_rows(sida_merger *m) {
    const sida_trace_info *info = m->info;
    int32_t most = info->layers[0] > info->layers[1] ? info->layers[0] : info->layers[1];
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_trace_rows_alloc(&m->rows, most, info->top_k, info->top, block_rows));
    SIDA_TRY(SIDA_ALLOC(&m->seen, info->vocabulary, "merging a trace's parts"));
out:
    return status;
}

/* Sequences [first, end) of one side. */
static sida_status merge_side(sida_merger *m, sida_trace *part, int side, int64_t first,
                              int64_t end) {
    const int64_t *offsets = sida_trace_offsets(part, side);
    int64_t *lengths = NULL, count = offsets[end] - offsets[first];
    sida_status status = SIDA_OK;
    SIDA_TRY(SIDA_ALLOC(&lengths, end - first, "merging a trace's parts"));
    for (int64_t s = first; s < end; s++) lengths[s - first] = offsets[s + 1] - offsets[s];
    SIDA_TRY(sida_trace_read(part, side, offsets[first], count, &m->rows));
    for (int64_t i = 0; i < count; i++) m->seen[m->rows.tokens[i]] = 1;
    SIDA_TRY(sida_trace_append_side(m->writer, side, (int32_t)(end - first), lengths, &m->rows));
out:
    free(lengths);
    return status;
}

static sida_status merge_sequences(sida_merger *m, sida_trace *part, int64_t first, int64_t end) {
    sida_status status = SIDA_OK;
    int64_t *lines = NULL, *offsets = NULL, count = end - first;
    int32_t *labels = NULL, *ids = NULL;
    uint8_t *generated = NULL;
    const char *what = "merging a trace's parts";
    SIDA_TRY(SIDA_ALLOC(&lines, count, what));
    SIDA_TRY(SIDA_ALLOC(&labels, count, what));
    SIDA_TRY(SIDA_ALLOC(&generated, count, what));
    SIDA_TRY(sida_trace_read_sequences(part, first, count, lines, labels, generated));
    if (m->info->has_targets) {
        SIDA_TRY(sida_trace_read_targets(part, first, count, &offsets, &ids));
        for (int64_t s = 0; s < count; s++) offsets[s] = offsets[s + 1] - offsets[s];
    }
    SIDA_TRY(sida_trace_append_sequences(m->writer, (int32_t)count, lines, labels, generated,
                                         offsets, ids));
out:
    free(lines);
    free(offsets);
    free(labels);
    free(ids);
    free(generated);
    return status;
}

static sida_status merge_part(sida_merger *m, sida_trace *part) {
    const int64_t *offsets[2] = {sida_trace_offsets(part, 0), sida_trace_offsets(part, 1)};
    int64_t sequences = sida_trace_get_info(part)->sequences;
    sida_status status = SIDA_OK;
    for (int64_t first = 0, end; first < sequences; first = end) {
        end = first;
        while (end < sequences && offsets[0][end + 1] - offsets[0][first] <= block_rows &&
               offsets[1][end + 1] - offsets[1][first] <= block_rows)
            end++;
        if (end == first)
            SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: a sequence of more than %d tokens",
                      sida_trace_path(part), block_rows);
        SIDA_TRY(merge_side(m, part, 0, first, end));
        SIDA_TRY(merge_side(m, part, 1, first, end));
        SIDA_TRY(merge_sequences(m, part, first, end));
    }
out:
    return status;
}

static sida_status merge_embedding(sida_merger *m, sida_merger_embed_fn *embed, void *context) {
    sida_status status = SIDA_OK;
    int32_t *ids = NULL, count = 0;
    float *rows = NULL;
    SIDA_TRY(SIDA_ALLOC(&ids, m->info->vocabulary, "the embedding's ids"));
    for (int32_t id = 0; id < m->info->vocabulary; id++)
        if (m->seen[id]) ids[count++] = id;
    SIDA_TRY(SIDA_ALLOC(&rows, (size_t)count * (size_t)m->info->d_model, "the embedding's rows"));
    SIDA_TRY(embed(context, ids, count, rows));
    SIDA_TRY(sida_trace_write_embedding(m->writer, count, ids, rows));
out:
    free(ids);
    free(rows);
    return status;
}

/* --- the thread */

static sida_status merge_next(sida_merger *m, int32_t index) {
    sida_status status = SIDA_OK;
    sida_trace *part = NULL;
    char *name = NULL;
    if (!m->writer) { /* not before: the first batch tells whether there are targets */
        SIDA_TRY(alloc_rows(m));
        SIDA_TRY(sida_trace_create(&m->writer, m->output, SIDA_H5_TRACE, m->info));
    }
    SIDA_TRY(sida_parts_name(&name, m->parts, index));
    SIDA_TRY(sida_trace_open(&part, name));
    SIDA_TRY(merge_part(m, part));
out:
    sida_trace_close(part);
    free(name);
    return status;
}

static void tell(sida_merger *m, int32_t merged, bool stopped) {
    pthread_mutex_lock(&m->mutex);
    m->merged = merged;
    m->stopped = stopped;
    pthread_cond_broadcast(&m->moved);
    pthread_mutex_unlock(&m->mutex);
}

static void *merge_parts(void *context) {
    sida_merger *m = context;
    sida_status status = SIDA_OK;
    int32_t merged = 0;
    for (;;) {
        void *item;
        SIDA_TRY(sida_queue_pop(m->finished, &item, NULL));
        if (!item) break;
        SIDA_TRY(merge_next(m, (int32_t)(intptr_t)item - 1));
        tell(m, ++merged, false);
    }
out:
    if (status != SIDA_OK) sida_queue_close(m->finished, status);
    tell(m, merged, true);
    return NULL;
}

/* --- the other threads' side */

static void merger_free(sida_merger *m) {
    sida_trace_abandon(m->writer);
    sida_queue_destroy(m->finished);
    sida_trace_rows_free(&m->rows);
    free(m->seen);
    pthread_cond_destroy(&m->moved);
    pthread_mutex_destroy(&m->mutex);
    free(m);
}

sida_status sida_merger_create(sida_merger **out, const sida_parts *parts, const char *output,
                               const sida_trace_info *info) {
    sida_status status = SIDA_OK;
    sida_merger *m = NULL;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&m, 1, "merging a trace's parts"));
    m->parts = parts;
    m->output = output;
    m->info = info;
    pthread_mutex_init(&m->mutex, NULL);
    pthread_cond_init(&m->moved, NULL);
    SIDA_TRY(sida_queue_create(&m->finished, QUEUED_PARTS));
    if (pthread_create(&m->thread, NULL, merge_parts, m) != 0)
        SIDA_FAIL(SIDA_ERROR_MEMORY, "cannot start a thread for merging a trace's parts");
    *out = m;
    m = NULL;
    for (int32_t i = 0; i < parts->count; i++) SIDA_TRY(sida_merger_add(*out, i));
out:
    if (m) merger_free(m);
    if (status != SIDA_OK) {
        sida_merger_abandon(*out);
        *out = NULL;
    }
    return status;
}

/* The error that closed the queue. */
static sida_status reason_of(sida_merger *m) {
    void *item;
    return sida_queue_pop(m->finished, &item, NULL);
}

sida_status sida_merger_add(sida_merger *m, int32_t index) {
    sida_status status = sida_queue_push(m->finished, (void *)(intptr_t)(index + 1), NULL);
    return status == SIDA_OK ? SIDA_OK : reason_of(m);
}

sida_status sida_merger_wait(sida_merger *m, int32_t index) {
    pthread_mutex_lock(&m->mutex);
    while (m->merged <= index && !m->stopped) pthread_cond_wait(&m->moved, &m->mutex);
    bool done = m->merged > index;
    pthread_mutex_unlock(&m->mutex);
    return done ? SIDA_OK : reason_of(m);
}

sida_status sida_merger_finish(sida_merger *m, sida_merger_embed_fn *embed, void *context) {
    sida_status status = SIDA_OK;
    sida_queue_close(m->finished, SIDA_OK);
    pthread_join(m->thread, NULL);
    SIDA_TRY(reason_of(m));
    SIDA_TRY(merge_embedding(m, embed, context));
    status = sida_trace_commit(m->writer);
    m->writer = NULL;
out:
    merger_free(m);
    return status;
}

void sida_merger_abandon(sida_merger *m) {
    if (!m) return;
    sida_queue_close(m->finished, SIDA_ERROR_CANCELLED);
    pthread_join(m->thread, NULL);
    merger_free(m);
}
