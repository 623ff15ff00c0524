/* Reading a trace or a part of one. */
#include "formats/base/memory.h"
#include "formats/trace.h"
#include "formats/trace_inside.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct sida_trace {
    sida_h5_file *file;
    sida_trace_info info;
    int64_t *offsets[2], *target_offsets;
};

static sida_status fail(const sida_trace *trace, const char *what, const char *reason) {
    return sida_fail(SIDA_ERROR_FORMAT, "%s: %s %s", sida_h5_path(trace->file), what, reason);
}

/* --- opening */

static sida_status read_i32(int32_t *out, sida_trace *trace, const char *name, int64_t low,
                            int64_t high) {
    int64_t value;
    sida_status status = sida_h5_get_i64(trace->file, name, &value);
    if (status != SIDA_OK) return status;
    if (value < low || value > high)
        return sida_fail(SIDA_ERROR_FORMAT, "%s: attribute %s is %lld, not %lld to %lld",
                         sida_h5_path(trace->file), name, (long long)value, (long long)low,
                         (long long)high);
    *out = (int32_t)value;
    return SIDA_OK;
}

static sida_status read_fingerprint(sida_fingerprint *out, sida_trace *trace, const char *name) {
    char *text;
    sida_status status = sida_h5_get_text(trace->file, name, &text);
    if (status != SIDA_OK) return status;
    if (!sida_fingerprint_parse(out, text)) status = fail(trace, name, "is no fingerprint");
    free(text);
    return status;
}

static sida_status read_attributes(sida_trace *trace) {
    sida_trace_info *info = &trace->info;
    sida_status status = SIDA_OK;
    char *format = NULL;
    int32_t version;
    SIDA_TRY(sida_h5_get_text(trace->file, "format", &format));
    if (strcmp(format, SIDA_TRACE_FORMAT) != 0) {
        status = fail(trace, "it", "is no trace");
        goto out;
    }
    SIDA_TRY(read_i32(&version, trace, "version", SIDA_TRACE_VERSION, SIDA_TRACE_VERSION));
    SIDA_TRY(read_fingerprint(&info->model, trace, "model"));
    SIDA_TRY(read_fingerprint(&info->tokenizer, trace, "tokenizer"));
    SIDA_TRY(read_fingerprint(&info->input, trace, "input"));
    SIDA_TRY(sida_h5_get_text(trace->file, "config", &info->config));
    SIDA_TRY(sida_h5_get_text(trace->file, "options", &info->options));
    SIDA_TRY(sida_h5_get_text(trace->file, "family", &info->family));
    SIDA_TRY(read_i32(&info->experts, trace, "experts", 1, UINT16_MAX + 1));
    SIDA_TRY(read_i32(&info->top_k, trace, "top_k", 1, info->experts));
    SIDA_TRY(read_i32(&info->top, trace, "top", info->top_k, info->experts));
    SIDA_TRY(read_i32(&info->d_model, trace, "d_model", 1, SIDA_TRACE_MOST_D_MODEL));
    SIDA_TRY(read_i32(&info->vocabulary, trace, "vocabulary", 1, SIDA_TRACE_MOST_VOCABULARY));
    SIDA_TRY(read_i32(&info->layers[0], trace, "layers_encoder", 0, SIDA_TRACE_MOST_LAYERS));
    SIDA_TRY(read_i32(&info->layers[1], trace, "layers_decoder", 0,
                      SIDA_TRACE_MOST_LAYERS - info->layers[0]));
    if (info->layers[0] + info->layers[1] == 0) status = fail(trace, "it", "has no MoE layers");
out:
    free(format);
    return status;
}

static sida_status check_shape(sida_trace *trace, const char *path, sida_h5_type type, int rank,
                               const int64_t *expected) {
    int64_t shape[3];
    sida_status status = sida_h5_shape(trace->file, path, type, rank, shape);
    if (status != SIDA_OK) return status;
    for (int i = 0; i < rank; i++)
        if (shape[i] != expected[i])
            return sida_fail(SIDA_ERROR_FORMAT,
                             "%s: dataset %s has extent %lld on axis %d, "
                             "expected %lld",
                             sida_h5_path(trace->file), path, (long long)shape[i], i,
                             (long long)expected[i]);
    return SIDA_OK;
}

/* Reads [S + 1] offsets that rise from 0 to `tokens`. */
static sida_status read_offsets(int64_t **out, sida_trace *trace, const char *path,
                                int64_t tokens) {
    int64_t count = trace->info.sequences + 1;
    sida_status status = SIDA_OK;
    SIDA_TRY(check_shape(trace, path, SIDA_H5_I64, 1, &count));
    SIDA_TRY(SIDA_ALLOC(out, count, path));
    SIDA_TRY(sida_h5_read_rows(trace->file, path, SIDA_H5_I64, 0, count, *out));
    bool sound = (*out)[0] == 0 && (*out)[count - 1] == tokens;
    for (int64_t s = 1; s < count; s++) sound = sound && (*out)[s] >= (*out)[s - 1];
    if (!sound) status = fail(trace, path, "does not rise from 0 to the number of tokens");
out:
    return status;
}

static sida_status open_side(sida_trace *trace, int side) {
    sida_trace_info *info = &trace->info;
    const char *const *paths = sida_trace_paths[side];
    int64_t layers = info->layers[side], *n = &info->tokens[side];
    sida_status status = SIDA_OK;
    if (layers == 0 && !sida_h5_exists(trace->file, paths[SIDA_TRACE_TOKENS]))
        return SIDA_ALLOC(&trace->offsets[side], info->sequences + 1, "a trace's offsets");
    SIDA_TRY(sida_h5_shape(trace->file, paths[SIDA_TRACE_TOKENS], SIDA_H5_I32, 1, n));
    SIDA_TRY(read_offsets(&trace->offsets[side], trace, paths[SIDA_TRACE_OFFSETS], *n));
    if (layers == 0) goto out;
    const int64_t chosen[3] = {*n, layers, info->top_k}, top[3] = {*n, layers, info->top};
    SIDA_TRY(check_shape(trace, paths[SIDA_TRACE_EXPERTS], SIDA_H5_U16, 3, chosen));
    SIDA_TRY(check_shape(trace, paths[SIDA_TRACE_ALPHA], SIDA_H5_F32, 3, chosen));
    SIDA_TRY(check_shape(trace, paths[SIDA_TRACE_DROPPED], SIDA_H5_U8, 2, chosen));
    SIDA_TRY(check_shape(trace, paths[SIDA_TRACE_TOP_IDS], SIDA_H5_U16, 3, top));
    SIDA_TRY(check_shape(trace, paths[SIDA_TRACE_TOP_LOGP], SIDA_H5_F16, 3, top));
out:
    return status;
}

static sida_status open_sequences(sida_trace *trace) {
    sida_trace_info *info = &trace->info;
    sida_status status = SIDA_OK;
    int64_t tokens, embedding[2];
    SIDA_TRY(check_shape(trace, "sequence/label", SIDA_H5_I32, 1, &info->sequences));
    SIDA_TRY(check_shape(trace, "sequence/generated", SIDA_H5_U8, 1, &info->sequences));
    bool has_offsets = sida_h5_exists(trace->file, "target/offsets");
    info->has_targets = sida_h5_exists(trace->file, "target/tokens");
    if (has_offsets != info->has_targets) {
        status = fail(trace, "target", "has tokens or offsets, but not both");
        goto out;
    }
    if (info->has_targets) {
        SIDA_TRY(sida_h5_shape(trace->file, "target/tokens", SIDA_H5_I32, 1, &tokens));
        SIDA_TRY(read_offsets(&trace->target_offsets, trace, "target/offsets", tokens));
    }
    if (sida_h5_exists(trace->file, "embedding/ids")) {
        SIDA_TRY(sida_h5_shape(trace->file, "embedding/ids", SIDA_H5_I32, 1, embedding));
        embedding[1] = info->d_model;
        SIDA_TRY(check_shape(trace, "embedding/rows", SIDA_H5_F32, 2, embedding));
        if (embedding[0] > info->vocabulary)
            status = fail(trace, "embedding/ids", "has more ids than the vocabulary");
    }
out:
    return status;
}

sida_status sida_trace_open(sida_trace **out, const char *path) {
    sida_status status = SIDA_OK;
    sida_trace *trace = NULL;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&trace, 1, path));
    SIDA_TRY(sida_h5_open(&trace->file, path, 1u << SIDA_H5_TRACE | 1u << SIDA_H5_PART, true));
    SIDA_TRY(read_attributes(trace));
    SIDA_TRY(sida_h5_shape(trace->file, "sequence/line", SIDA_H5_I64, 1, &trace->info.sequences));
    for (int side = 0; side < 2; side++) SIDA_TRY(open_side(trace, side));
    SIDA_TRY(open_sequences(trace));
    *out = trace;
    trace = NULL;
out:
    sida_trace_close(trace);
    return status;
}

void sida_trace_close(sida_trace *trace) {
    if (!trace) return;
    sida_h5_close(trace->file);
    sida_trace_info_free(&trace->info);
    free(trace->offsets[0]);
    free(trace->offsets[1]);
    free(trace->target_offsets);
    free(trace);
}

const sida_trace_info *sida_trace_get_info(const sida_trace *trace) {
    return &trace->info;
}

const char *sida_trace_path(const sida_trace *trace) {
    return sida_h5_path(trace->file);
}

sida_h5_kind sida_trace_kind(const sida_trace *trace) {
    return sida_h5_file_kind(trace->file);
}

const int64_t *sida_trace_offsets(const sida_trace *trace, int side) {
    return trace->offsets[side];
}

/* --- what the readers check of all that they hand out */

static sida_status check_ids(const sida_trace *trace, const char *path, const int32_t *ids,
                             int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= trace->info.vocabulary)
            return fail(trace, path, "has a token id outside of the vocabulary");
    return SIDA_OK;
}

static sida_status check_experts(const sida_trace *trace, const char *path, const uint16_t *ids,
                                 int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i] >= trace->info.experts)
            return fail(trace, path, "has an expert past the number of experts");
    return SIDA_OK;
}

static sida_status check_floats(const sida_trace *trace, const char *path, const float *values,
                                int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (!isfinite(values[i])) return fail(trace, path, "has a value that is not finite");
    return SIDA_OK;
}

static sida_status check_range(const sida_trace *trace, const char *what, int64_t first,
                               int64_t count, int64_t all) {
    if (first >= 0 && count >= 0 && first <= all && count <= all - first) return SIDA_OK;
    return sida_fail(SIDA_ERROR_ARGUMENT, "%s: %s %lld to %lld of %lld do not exist",
                     sida_h5_path(trace->file), what, (long long)first, (long long)(first + count),
                     (long long)all);
}

sida_status sida_trace_read(sida_trace *trace, int side, int64_t first, int64_t count,
                            const sida_trace_rows *out) {
    const sida_trace_info *info = &trace->info;
    const char *const *paths = sida_trace_paths[side];
    sida_h5_file *file = trace->file;
    sida_status status = SIDA_OK;
    SIDA_TRY(check_range(trace, "tokens", first, count, info->tokens[side]));
    if (count == 0) goto out;
    if (out->tokens) {
        const char *path = paths[SIDA_TRACE_TOKENS];
        SIDA_TRY(sida_h5_read_rows(file, path, SIDA_H5_I32, first, count, out->tokens));
        SIDA_TRY(check_ids(trace, path, out->tokens, count));
    }
    int64_t cells = count * info->layers[side];
    if (cells == 0) goto out;
    if (out->experts) {
        const char *path = paths[SIDA_TRACE_EXPERTS];
        SIDA_TRY(sida_h5_read_rows(file, path, SIDA_H5_U16, first, count, out->experts));
        SIDA_TRY(check_experts(trace, path, out->experts, cells * info->top_k));
    }
    if (out->alpha) {
        const char *path = paths[SIDA_TRACE_ALPHA];
        SIDA_TRY(sida_h5_read_rows(file, path, SIDA_H5_F32, first, count, out->alpha));
        SIDA_TRY(check_floats(trace, path, out->alpha, cells * info->top_k));
    }
    if (out->dropped) {
        const char *path = paths[SIDA_TRACE_DROPPED];
        SIDA_TRY(sida_h5_read_rows(file, path, SIDA_H5_U8, first, count, out->dropped));
        for (int64_t i = 0; i < cells; i++)
            if (out->dropped[i] > 1) return fail(trace, path, "has a flag that is neither 0 nor 1");
    }
    if (out->top_ids) {
        const char *path = paths[SIDA_TRACE_TOP_IDS];
        SIDA_TRY(sida_h5_read_rows(file, path, SIDA_H5_U16, first, count, out->top_ids));
        SIDA_TRY(check_experts(trace, path, out->top_ids, cells * info->top));
    }
    if (out->top_logp) {
        const char *path = paths[SIDA_TRACE_TOP_LOGP];
        SIDA_TRY(sida_h5_read_rows(file, path, SIDA_H5_F16, first, count, out->top_logp));
        for (int64_t i = 0; i < cells * info->top; i++)
            if ((out->top_logp[i] & 0x7fff) > 0x7c00) return fail(trace, path, "has a NaN");
    }
out:
    return status;
}

sida_status sida_trace_read_sequences(sida_trace *trace, int64_t first, int64_t count,
                                      int64_t *lines, int32_t *labels, uint8_t *generated) {
    sida_h5_file *file = trace->file;
    sida_status status = SIDA_OK;
    SIDA_TRY(check_range(trace, "sequences", first, count, trace->info.sequences));
    if (lines) SIDA_TRY(sida_h5_read_rows(file, "sequence/line", SIDA_H5_I64, first, count, lines));
    if (labels)
        SIDA_TRY(sida_h5_read_rows(file, "sequence/label", SIDA_H5_I32, first, count, labels));
    if (generated)
        SIDA_TRY(
            sida_h5_read_rows(file, "sequence/generated", SIDA_H5_U8, first, count, generated));
    for (int64_t s = 0; s < count; s++) {
        if (lines && lines[s] < 1) return fail(trace, "sequence/line", "has a line below 1");
        if (labels && labels[s] < -1) return fail(trace, "sequence/label", "has a label below -1");
        if (generated && generated[s] > 1)
            return fail(trace, "sequence/generated", "has a flag that is neither 0 nor 1");
    }
out:
    return status;
}

sida_status sida_trace_read_targets(sida_trace *trace, int64_t first, int64_t count,
                                    int64_t **offsets, int32_t **ids) {
    sida_status status = SIDA_OK;
    *offsets = NULL;
    *ids = NULL;
    SIDA_TRY(check_range(trace, "sequences", first, count, trace->info.sequences));
    SIDA_TRY(SIDA_ALLOC(offsets, count + 1, "target offsets"));
    const int64_t *all = trace->target_offsets;
    if (all)
        for (int64_t s = 0; s <= count; s++) (*offsets)[s] = all[first + s] - all[first];
    int64_t tokens = (*offsets)[count];
    SIDA_TRY(SIDA_ALLOC(ids, tokens, "target ids"));
    if (tokens > 0) {
        SIDA_TRY(
            sida_h5_read_rows(trace->file, "target/tokens", SIDA_H5_I32, all[first], tokens, *ids));
        SIDA_TRY(check_ids(trace, "target/tokens", *ids, tokens));
    }
out:
    if (status != SIDA_OK) {
        free(*offsets);
        free(*ids);
        *offsets = NULL;
        *ids = NULL;
    }
    return status;
}

sida_status sida_trace_read_embedding(sida_trace *trace, int32_t *count, int32_t **ids,
                                      float **rows) {
    sida_status status = SIDA_OK;
    int64_t n, values;
    *count = 0;
    *ids = NULL;
    *rows = NULL;
    SIDA_TRY(sida_h5_shape(trace->file, "embedding/ids", SIDA_H5_I32, 1, &n));
    values = n * trace->info.d_model;
    SIDA_TRY(SIDA_ALLOC(ids, n, "embedding ids"));
    SIDA_TRY(SIDA_ALLOC(rows, values, "embedding rows"));
    SIDA_TRY(sida_h5_read_rows(trace->file, "embedding/ids", SIDA_H5_I32, 0, n, *ids));
    SIDA_TRY(sida_h5_read_rows(trace->file, "embedding/rows", SIDA_H5_F32, 0, n, *rows));
    SIDA_TRY(check_ids(trace, "embedding/ids", *ids, n));
    for (int64_t i = 1; i < n; i++)
        if ((*ids)[i] <= (*ids)[i - 1]) {
            status = fail(trace, "embedding/ids", "does not ascend");
            goto out;
        }
    SIDA_TRY(check_floats(trace, "embedding/rows", *rows, values));
    *count = (int32_t)n;
out:
    if (status != SIDA_OK) {
        free(*ids);
        free(*rows);
        *ids = NULL;
        *rows = NULL;
    }
    return status;
}

/* --- the whole */

sida_status sida_trace_rows_alloc(sida_trace_rows *rows, int32_t layers, int32_t top_k, int32_t top,
                                  int64_t tokens) {
    size_t cells;
    sida_status status = SIDA_OK;
    *rows = (sida_trace_rows){0};
    if (sida_mul_overflow((size_t)tokens, (size_t)layers, &cells))
        SIDA_FAIL(SIDA_ERROR_MEMORY, "a trace's rows: %lld tokens of %d layers are too many",
                  (long long)tokens, layers);
    SIDA_TRY(SIDA_ALLOC(&rows->tokens, tokens, "tokens"));
    SIDA_TRY(SIDA_ALLOC(&rows->experts, cells * (size_t)top_k, "experts"));
    SIDA_TRY(SIDA_ALLOC(&rows->alpha, cells * (size_t)top_k, "factors"));
    SIDA_TRY(SIDA_ALLOC(&rows->dropped, cells, "flags"));
    SIDA_TRY(SIDA_ALLOC(&rows->top_ids, cells * (size_t)top, "top experts"));
    SIDA_TRY(SIDA_ALLOC(&rows->top_logp, cells * (size_t)top, "log-probabilities"));
out:
    if (status != SIDA_OK) sida_trace_rows_free(rows);
    return status;
}

void sida_trace_rows_free(sida_trace_rows *rows) {
    free(rows->tokens);
    free(rows->experts);
    free(rows->alpha);
    free(rows->dropped);
    free(rows->top_ids);
    free(rows->top_logp);
    *rows = (sida_trace_rows){0};
}

/* The first line, as later ones write over the message. */
static void keep_first(void *context, const char *line) {
    char *first = context;
    if (!*first) snprintf(first, SIDA_TRACE_LINE, "%s", line);
}

sida_status sida_trace_check(sida_trace *trace) {
    char first[SIDA_TRACE_LINE] = "";
    sida_status status = sida_trace_diagnose_file(trace->file, keep_first, first);
    return *first ? sida_fail(SIDA_ERROR_FORMAT, "%s", first) : status;
}
