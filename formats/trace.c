/* Writing a trace or a part of one. */
#include "formats/trace.h"

#include "formats/base/memory.h"
#include "formats/trace_inside.h"

#include <assert.h>
#include <stdlib.h>

#define SIDE_PATHS(side)                                                                           \
    {                                                                                              \
        side "/tokens", side "/offsets", side "/experts", side "/alpha", side "/dropped",          \
            side "/top_ids", side "/top_logp", side "/content"                                     \
    }
const char *const sida_trace_paths[2][SIDA_TRACE_FIELDS] = {SIDE_PATHS("encoder"),
                                                            SIDE_PATHS("decoder")};

struct sida_trace_writer {
    sida_h5_file *file;
    sida_trace_info info; /* numbers only */
    int64_t tokens[2], target_tokens;
    int64_t appended[2], sequences; /* sequences so far: of a side, of the fields */
    bool started[2], has_embedding;
    uint8_t *narrow; /* ids of experts on their way to a dataset of bytes */
    size_t narrow_capacity;
};

void sida_trace_info_free(sida_trace_info *info) {
    free(info->config);
    free(info->options);
    free(info->family);
    *info = (sida_trace_info){0};
}

static sida_status check_info(const sida_trace_info *info, const char *path) {
    bool sound = info->experts >= 1 && info->experts <= UINT16_MAX + 1 && info->top_k >= 1 &&
                 info->top >= info->top_k && info->top <= info->experts && info->d_model >= 1 &&
                 info->vocabulary >= 1 && info->layers[0] >= 0 && info->layers[1] >= 0 &&
                 info->layers[0] <= 65536 - info->layers[1] &&
                 info->layers[0] + info->layers[1] > 0;
    return sound
               ? SIDA_OK
               : sida_fail(SIDA_ERROR_ARGUMENT,
                           "%s: a trace of %d experts, k %d, top %d, layers %d and %d, d_model %d, "
                           "vocabulary %d is not possible",
                           path, info->experts, info->top_k, info->top, info->layers[0],
                           info->layers[1], info->d_model, info->vocabulary);
}

static sida_status write_attributes(sida_h5_file *file, const sida_trace_info *info) {
    char model[SIDA_FINGERPRINT_TEXT], tokenizer[SIDA_FINGERPRINT_TEXT],
        input[SIDA_FINGERPRINT_TEXT];
    sida_fingerprint_format(model, info->model);
    sida_fingerprint_format(tokenizer, info->tokenizer);
    sida_fingerprint_format(input, info->input);
    const struct {
        const char *name, *value;
    } texts[] = {{"format", SIDA_TRACE_FORMAT}, {"model", model},
                 {"tokenizer", tokenizer},      {"input", input},
                 {"config", info->config},      {"options", info->options},
                 {"family", info->family}};
    const struct {
        const char *name;
        int64_t value;
    } numbers[] = {{"version", SIDA_TRACE_VERSION},
                   {"experts", info->experts},
                   {"top_k", info->top_k},
                   {"top", info->top},
                   {"layers_encoder", info->layers[0]},
                   {"layers_decoder", info->layers[1]},
                   {"d_model", info->d_model},
                   {"vocabulary", info->vocabulary}};
    sida_status status = SIDA_OK;
    for (size_t i = 0; i < sizeof texts / sizeof *texts && status == SIDA_OK; i++)
        status = sida_h5_set_text(file, texts[i].name, texts[i].value ? texts[i].value : "");
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers && status == SIDA_OK; i++)
        status = sida_h5_set_i64(file, numbers[i].name, numbers[i].value);
    return status;
}

static sida_status append_i64(sida_trace_writer *writer, const char *path, int64_t value) {
    return sida_h5_append(writer->file, path, SIDA_H5_I64, 1, NULL, 1, &value);
}

/* Appends the running sums of `lengths` behind *total. */
static sida_status append_lengths(sida_trace_writer *writer, const char *path, int64_t *total,
                                  int32_t sequences, const int64_t *lengths) {
    for (int32_t s = 0; s < sequences; s++) {
        if (lengths[s] < 0)
            return sida_fail(SIDA_ERROR_ARGUMENT, "%s: a sequence of %lld tokens",
                             sida_h5_path(writer->file), (long long)lengths[s]);
        *total += lengths[s];
        sida_status status = append_i64(writer, path, *total);
        if (status != SIDA_OK) return status;
    }
    return SIDA_OK;
}

/* The first offset, and those of sequences before the first token of a side without MoE layers. */
static sida_status start_side(sida_trace_writer *writer, int side) {
    const char *path = sida_trace_paths[side][SIDA_TRACE_OFFSETS];
    sida_status status = append_i64(writer, path, 0);
    for (int64_t s = 0; s < writer->appended[side] && status == SIDA_OK; s++)
        status = append_i64(writer, path, 0);
    writer->started[side] = true;
    return status;
}

sida_status sida_trace_create(sida_trace_writer **out, const char *path, sida_h5_kind kind,
                              const sida_trace_info *info) {
    sida_status status = SIDA_OK;
    sida_trace_writer *writer = NULL;
    assert(kind == SIDA_H5_TRACE || kind == SIDA_H5_PART);
    *out = NULL;
    SIDA_TRY(check_info(info, path));
    SIDA_TRY(SIDA_ALLOC(&writer, 1, path));
    writer->info = *info;
    writer->info.config = writer->info.options = writer->info.family = NULL;
    SIDA_TRY(sida_h5_create(&writer->file, path, kind));
    SIDA_TRY(write_attributes(writer->file, info));
    for (int side = 0; side < 2; side++)
        if (info->layers[side] > 0) SIDA_TRY(start_side(writer, side));
    if (info->has_targets) SIDA_TRY(append_i64(writer, "target/offsets", 0));
    *out = writer;
    writer = NULL;
out:
    sida_trace_abandon(writer);
    return status;
}

/* Ids of experts: a byte each where all fit. */
static sida_status append_experts(sida_trace_writer *writer, const char *path, const int64_t *shape,
                                  int64_t rows, const uint16_t *ids) {
    const size_t count = (size_t)(rows * shape[0] * shape[1]);
    sida_status status = SIDA_OK;
    uint16_t all = 0;
    if (writer->info.experts > UINT8_MAX + 1)
        return sida_h5_append(writer->file, path, SIDA_H5_U16, 3, shape, rows, ids);
    SIDA_TRY(SIDA_GROW(&writer->narrow, &writer->narrow_capacity, count, path));
    for (size_t i = 0; i < count; i++) {
        all |= ids[i];
        writer->narrow[i] = (uint8_t)ids[i];
    }
    if (all > UINT8_MAX)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "%s: an expert in %s is not below %d",
                  sida_h5_path(writer->file), path, writer->info.experts);
    SIDA_TRY(sida_h5_append(writer->file, path, SIDA_H5_U8, 3, shape, rows, writer->narrow));
out:
    return status;
}

sida_status sida_trace_append_side(sida_trace_writer *writer, int side, int32_t sequences,
                                   const int64_t *lengths, const sida_trace_rows *rows) {
    const sida_trace_info *info = &writer->info;
    const char *const *paths = sida_trace_paths[side];
    int64_t before = writer->tokens[side], batch = 0, layers = info->layers[side];
    sida_status status = SIDA_OK;
    for (int32_t s = 0; s < sequences; s++) batch += lengths[s];
    if (!writer->started[side] && batch > 0) SIDA_TRY(start_side(writer, side));
    if (writer->started[side])
        SIDA_TRY(append_lengths(writer, paths[SIDA_TRACE_OFFSETS], &writer->tokens[side], sequences,
                                lengths));
    writer->appended[side] += sequences;
    if (!writer->started[side]) goto out;

    int64_t n = writer->tokens[side] - before;
    int64_t chosen[2] = {layers, info->top_k}, top[2] = {layers, info->top};
    sida_h5_file *file = writer->file;
    SIDA_TRY(sida_h5_append(file, paths[SIDA_TRACE_TOKENS], SIDA_H5_I32, 1, NULL, n, rows->tokens));
    if (info->has_content)
        SIDA_TRY(
            sida_h5_append(file, paths[SIDA_TRACE_CONTENT], SIDA_H5_U8, 1, NULL, n, rows->content));
    if (layers == 0) goto out;
    SIDA_TRY(append_experts(writer, paths[SIDA_TRACE_EXPERTS], chosen, n, rows->experts));
    SIDA_TRY(sida_h5_append(file, paths[SIDA_TRACE_ALPHA], SIDA_H5_F32, 3, chosen, n, rows->alpha));
    SIDA_TRY(
        sida_h5_append(file, paths[SIDA_TRACE_DROPPED], SIDA_H5_U8, 2, &layers, n, rows->dropped));
    SIDA_TRY(append_experts(writer, paths[SIDA_TRACE_TOP_IDS], top, n, rows->top_ids));
    SIDA_TRY(
        sida_h5_append(file, paths[SIDA_TRACE_TOP_LOGP], SIDA_H5_F16, 3, top, n, rows->top_logp));
out:
    return status;
}

sida_status sida_trace_append_sequences(sida_trace_writer *writer, int32_t sequences,
                                        const int64_t *lines, const int32_t *labels,
                                        const uint8_t *generated, const int64_t *target_lengths,
                                        const int32_t *target_ids) {
    sida_h5_file *file = writer->file;
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_h5_append(file, "sequence/line", SIDA_H5_I64, 1, NULL, sequences, lines));
    SIDA_TRY(sida_h5_append(file, "sequence/label", SIDA_H5_I32, 1, NULL, sequences, labels));
    SIDA_TRY(sida_h5_append(file, "sequence/generated", SIDA_H5_U8, 1, NULL, sequences, generated));
    writer->sequences += sequences;
    if (!writer->info.has_targets) goto out;
    if (!target_lengths)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "%s: a batch without targets in a trace with targets",
                  sida_h5_path(file));
    int64_t before = writer->target_tokens;
    SIDA_TRY(append_lengths(writer, "target/offsets", &writer->target_tokens, sequences,
                            target_lengths));
    SIDA_TRY(sida_h5_append(file, "target/tokens", SIDA_H5_I32, 1, NULL,
                            writer->target_tokens - before, target_ids));
out:
    return status;
}

sida_status sida_trace_write_embedding(sida_trace_writer *writer, int32_t count, const int32_t *ids,
                                       const float *rows) {
    const int64_t shape[2] = {count, writer->info.d_model};
    assert(sida_h5_file_kind(writer->file) == SIDA_H5_TRACE && !writer->has_embedding);
    writer->has_embedding = true;
    sida_status status = sida_h5_write(writer->file, "embedding/ids", SIDA_H5_I32, 1, shape, ids);
    if (status == SIDA_OK)
        status = sida_h5_write(writer->file, "embedding/rows", SIDA_H5_F32, 2, shape, rows);
    return status;
}

/* Empty datasets where nothing was appended, so that the schema is whole. */
static sida_status append_nothing(sida_trace_writer *writer) {
    const sida_trace_rows none = {0};
    sida_status status = SIDA_OK;
    for (int side = 0; side < 2 && status == SIDA_OK; side++)
        if (writer->started[side]) status = sida_trace_append_side(writer, side, 0, NULL, &none);
    if (status == SIDA_OK)
        status =
            sida_trace_append_sequences(writer, 0, NULL, NULL, NULL, (const int64_t[1]){0}, NULL);
    return status;
}

sida_status sida_trace_commit(sida_trace_writer *writer) {
    sida_status status = SIDA_OK;
    for (int side = 0; side < 2; side++)
        if (writer->started[side] && writer->appended[side] != writer->sequences)
            SIDA_FAIL(SIDA_ERROR_ARGUMENT, "%s: %lld sequences, but %lld on side %d",
                      sida_h5_path(writer->file), (long long)writer->sequences,
                      (long long)writer->appended[side], side);
    SIDA_TRY(append_nothing(writer));
    sida_h5_file *file = writer->file;
    writer->file = NULL; /* commit frees it, also on error */
    status = sida_h5_commit(file);
out:
    sida_trace_abandon(writer);
    return status;
}

void sida_trace_abandon(sida_trace_writer *writer) {
    if (!writer) return;
    sida_h5_abandon(writer->file);
    free(writer->narrow);
    free(writer);
}
