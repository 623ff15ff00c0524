#include "tracer/parts.h"

#include "formats/base/file.h"
#include "formats/base/memory.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

sida_status sida_parts_name(char **out, const sida_parts *parts, int32_t index) {
    return sida_strprintf(out, "%s/part-%06d.h5", parts->folder, index);
}

void sida_parts_free(sida_parts *parts) {
    free(parts->folder);
    parts->folder = NULL;
}

static sida_status compare_fingerprint(const char *path, const char *what, sida_fingerprint found,
                                       sida_fingerprint expected) {
    char a[SIDA_FINGERPRINT_TEXT], b[SIDA_FINGERPRINT_TEXT];
    if (sida_fingerprint_equal(found, expected)) return SIDA_OK;
    sida_fingerprint_format(a, found);
    sida_fingerprint_format(b, expected);
    return sida_fail(SIDA_ERROR_MISMATCH,
                     "%s: made with another %s (%s, now %s); cannot resume: run without --resume "
                     "after removing it",
                     path, what, a, b);
}

sida_status sida_parts_compare(const sida_trace_info *found, const char *path,
                               const sida_trace_info *expected) {
    sida_status status = SIDA_OK;
    SIDA_TRY(compare_fingerprint(path, "model", found->model, expected->model));
    SIDA_TRY(compare_fingerprint(path, "tokenizer", found->tokenizer, expected->tokenizer));
    SIDA_TRY(compare_fingerprint(path, "input", found->input, expected->input));
    if (strcmp(found->options, expected->options) != 0)
        SIDA_FAIL(SIDA_ERROR_MISMATCH,
                  "%s: made with other options (%s, now %s); cannot resume: run without --resume "
                  "after removing it",
                  path, found->options, expected->options);
out:
    return status;
}

sida_status sida_parts_find(sida_parts *out, const char *output, const sida_trace_info *expected) {
    sida_status status = SIDA_OK;
    char *name = NULL;
    sida_trace *part = NULL;
    *out = (sida_parts){0};
    SIDA_TRY(sida_strprintf(&out->folder, "%s.parts", output));
    for (;; out->count++) {
        SIDA_TRY(sida_parts_name(&name, out, out->count));
        if (!sida_file_exists(name)) break;
        SIDA_TRY(sida_trace_open(&part, name));
        const sida_trace_info *info = sida_trace_get_info(part);
        SIDA_TRY(sida_parts_compare(info, name, expected));
        out->sequences += info->sequences;
        out->tokens[0] += info->tokens[0];
        out->tokens[1] += info->tokens[1];
        out->has_targets = info->has_targets;
        sida_trace_close(part);
        part = NULL;
        free(name);
        name = NULL;
    }
out:
    sida_trace_close(part);
    free(name);
    return status;
}

sida_status sida_parts_create_folder(const sida_parts *parts) {
    if (mkdir(parts->folder, 0777) == 0 || errno == EEXIST) return SIDA_OK;
    return sida_fail(SIDA_ERROR_IO, "%s: cannot create the folder: %s", parts->folder,
                     strerror(errno));
}

sida_status sida_parts_remove(const sida_parts *parts) {
    DIR *folder = opendir(parts->folder);
    if (!folder) return SIDA_OK;
    /* From the last to the first would not matter: the trace is complete when this runs. Only
     * files of ours go. */
    struct dirent *entry;
    while ((entry = readdir(folder)))
        if (strncmp(entry->d_name, "part-", 5) == 0) unlinkat(dirfd(folder), entry->d_name, 0);
    closedir(folder);
    if (rmdir(parts->folder) != 0 && errno != ENOENT)
        return sida_fail(SIDA_ERROR_IO,
                         "%s: the trace is complete, but its parts cannot be "
                         "removed: %s",
                         parts->folder, strerror(errno));
    return SIDA_OK;
}

/* --- the merge */

enum { block_rows = 16384 }; /* of a side, in memory at once; above any limit on a sequence */

typedef struct merge {
    const sida_trace_info *info;
    sida_trace_writer *writer;
    sida_trace_rows rows;
    uint8_t *seen; /* [vocabulary] */
} merge;

static sida_status merge_alloc(merge *m) {
    const sida_trace_info *info = m->info;
    int32_t most = info->layers[0] > info->layers[1] ? info->layers[0] : info->layers[1];
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_trace_rows_alloc(&m->rows, most, info->top_k, info->top, block_rows));
    SIDA_TRY(SIDA_ALLOC(&m->seen, info->vocabulary, "merging a trace's parts"));
out:
    return status;
}

static void merge_free(merge *m) {
    sida_trace_rows_free(&m->rows);
    free(m->seen);
}

/* Sequences [first, end) of one side. */
static sida_status merge_side(merge *m, sida_trace *part, int side, int64_t first, int64_t end) {
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

static sida_status merge_sequences(merge *m, sida_trace *part, int64_t first, int64_t end) {
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

static sida_status merge_part(merge *m, sida_trace *part) {
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

static sida_status merge_embedding(merge *m, sida_parts_embed_fn *embed, void *context) {
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

sida_status sida_parts_merge(const sida_parts *parts, const char *output,
                             const sida_trace_info *info, sida_parts_embed_fn *embed,
                             void *embed_context, const sida_tracer_options *options) {
    merge m = {.info = info};
    sida_status status = SIDA_OK;
    sida_trace *part = NULL;
    char *name = NULL;
    SIDA_TRY(merge_alloc(&m));
    SIDA_TRY(sida_trace_create(&m.writer, output, SIDA_H5_TRACE, info));
    for (int32_t i = 0; i < parts->count; i++) {
        SIDA_TRY(sida_parts_name(&name, parts, i));
        SIDA_TRY(sida_trace_open(&part, name));
        SIDA_TRY(merge_part(&m, part));
        sida_trace_close(part);
        part = NULL;
        free(name);
        name = NULL;
        if (options->progress &&
            !options->progress(options->context, "merge", (double)(i + 1) / parts->count, 0))
            SIDA_FAIL(SIDA_ERROR_CANCELLED, "interrupted; --resume goes on from %d finished parts",
                      parts->count);
    }
    SIDA_TRY(merge_embedding(&m, embed, embed_context));
    status = sida_trace_commit(m.writer);
    m.writer = NULL;
out:
    sida_trace_abandon(m.writer);
    sida_trace_close(part);
    free(name);
    merge_free(&m);
    return status;
}
