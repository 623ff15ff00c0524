#include "data/batch.h"

#include "formats/base/memory.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

struct sida_batcher {
    sida_corpus *corpus;
    const sida_tokenizer *tokenizer;
    sida_batch_options options;
    int64_t records, batches; /* so far */
    bool ended;
};

/* A batch while it grows. */
typedef struct building {
    sida_batch *batch;
    size_t sequences;
    size_t offsets_capacity[2], ids_capacity[2];
    size_t lines_capacity, labels_capacity, targets_capacity;
} building;

sida_status sida_batcher_create(sida_batcher **out, sida_corpus *corpus,
                                const sida_tokenizer *tokenizer,
                                const sida_batch_options *options) {
    *out = NULL;
    if (options->sequences < 1 || options->max_tokens < 2 || options->limit < 0 ||
        options->vocabulary < 1 || options->eos < 0 || options->eos >= options->vocabulary)
        return sida_fail(SIDA_ERROR_ARGUMENT,
                         "a batch needs 1 sequence or more, 2 tokens a sequence or more, and an "
                         "end-of-sequence id within the vocabulary");
    sida_batcher *batcher;
    sida_status status = SIDA_ALLOC(&batcher, 1, "a batcher");
    if (status != SIDA_OK) return status;
    batcher->corpus = corpus;
    batcher->tokenizer = tokenizer;
    batcher->options = *options;
    *out = batcher;
    return SIDA_OK;
}

void sida_batcher_destroy(sida_batcher *batcher) {
    free(batcher);
}

/* The next record within the limit. */
static sida_status next_record(sida_batcher *batcher, sida_record *record, bool *more) {
    *more = false;
    if (batcher->ended ||
        (batcher->options.limit > 0 && batcher->records >= batcher->options.limit)) {
        batcher->ended = true;
        return SIDA_OK;
    }
    sida_status status = sida_corpus_next(batcher->corpus, record, more);
    if (*more) batcher->records++;
    if (status == SIDA_OK && !*more) batcher->ended = true;
    return status;
}

static sida_status fail_at(const sida_batcher *batcher, const sida_record *record, const char *what,
                           const char *reason) {
    return sida_fail(SIDA_ERROR_FORMAT, "%s:%lld: the %s %s", sida_corpus_path(batcher->corpus),
                     (long long)record->line, what, reason);
}

/* Tokenises `text` (NULL: nothing) as sequence `sequences` of side 0 (input) or 1 (target). */
static sida_status add_side(const sida_batcher *batcher, building *part, int side,
                            const sida_record *record, const char *text) {
    const sida_batch_options *options = &batcher->options;
    const char *what = side == 0 ? "input" : "target";
    sida_batch *batch = part->batch;
    sida_status status = SIDA_OK;
    int32_t *ids = NULL;
    size_t count = 0, first = (size_t)batch->offsets[side][part->sequences];
    if (text) {
        status = sida_tokenizer_encode(&ids, &count, batcher->tokenizer, text, strlen(text));
        if (status != SIDA_OK) {
            status = sida_fail_context(status, "%s:%lld", sida_corpus_path(batcher->corpus),
                                       (long long)record->line);
            goto out;
        }
        /* As T5Tokenizer: an </s> at the end of the text is the end, not followed by another. */
        if (count > 0 && ids[count - 1] == options->eos) count--;
        for (size_t i = 0; i < count; i++)
            if (ids[i] >= options->vocabulary)
                SIDA_FAIL(SIDA_ERROR_FORMAT,
                          "%s:%lld: token id %d of the %s is past the model's vocabulary of %d",
                          sida_corpus_path(batcher->corpus), (long long)record->line, ids[i], what,
                          options->vocabulary);
        if (count == 0 && side == 0) {
            status = fail_at(batcher, record, what, "has no tokens");
            goto out;
        }
        if (count + 1 > (size_t)options->max_tokens) {
            if (!options->truncate)
                SIDA_FAIL(SIDA_ERROR_FORMAT, "%s:%lld: the %s has %zu tokens, the limit is %d",
                          sida_corpus_path(batcher->corpus), (long long)record->line, what,
                          count + 1, options->max_tokens);
            count = (size_t)options->max_tokens - 1;
        }
        SIDA_TRY(SIDA_GROW(&batch->ids[side], &part->ids_capacity[side], first + count + 1,
                           "the ids of a batch"));
        memcpy(batch->ids[side] + first, ids, count * sizeof *ids);
        batch->ids[side][first + count++] = options->eos;
    }
    SIDA_TRY(SIDA_GROW(&batch->offsets[side], &part->offsets_capacity[side], part->sequences + 2,
                       "the offsets of a batch"));
    batch->offsets[side][part->sequences + 1] = (int64_t)(first + count);
out:
    free(ids);
    return status;
}

static sida_status add_record(const sida_batcher *batcher, building *part,
                              const sida_record *record) {
    sida_batch *batch = part->batch;
    size_t i = part->sequences;
    sida_status status = SIDA_OK;
    SIDA_TRY(SIDA_GROW(&batch->lines, &part->lines_capacity, i + 1, "the lines of a batch"));
    SIDA_TRY(SIDA_GROW(&batch->labels, &part->labels_capacity, i + 1, "the labels of a batch"));
    SIDA_TRY(SIDA_GROW(&batch->targets, &part->targets_capacity, i + 1, "the targets of a batch"));
    SIDA_TRY(add_side(batcher, part, 0, record, record->input));
    SIDA_TRY(add_side(batcher, part, 1, record, record->target));
    batch->lines[i] = record->line;
    batch->labels[i] = record->label;
    SIDA_TRY(sida_strdup(&batch->targets[i], record->target));
    if (!record->target) batch->has_targets = false;
    part->sequences++;
    batch->input.sequences = batch->target.sequences = (int32_t)part->sequences;
out:
    return status;
}

sida_status sida_batcher_next(sida_batcher *batcher, sida_batch **out) {
    sida_status status = SIDA_OK;
    building part = {0};
    sida_record record;
    bool more = true;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&part.batch, 1, "a batch"));
    part.batch->has_targets = true;
    for (int side = 0; side < 2; side++) {
        SIDA_TRY(SIDA_GROW(&part.batch->offsets[side], &part.offsets_capacity[side], 1,
                           "the offsets of a batch"));
        SIDA_TRY(
            SIDA_GROW(&part.batch->ids[side], &part.ids_capacity[side], 1, "the ids of a batch"));
    }
    while (part.sequences < (size_t)batcher->options.sequences) {
        SIDA_TRY(next_record(batcher, &record, &more));
        if (!more) break;
        SIDA_TRY(add_record(batcher, &part, &record));
    }
    if (part.sequences == 0) goto out;
    for (int side = 0; side < 2; side++) {
        sida_ragged *ragged = side == 0 ? &part.batch->input : &part.batch->target;
        ragged->offsets = part.batch->offsets[side];
        ragged->ids = part.batch->ids[side];
    }
    part.batch->index = batcher->batches++;
    *out = part.batch;
    part.batch = NULL;
out:
    sida_batch_destroy(part.batch);
    return status;
}

void sida_batch_destroy(sida_batch *batch) {
    if (!batch) return;
    for (int32_t i = 0; i < batch->input.sequences; i++) free(batch->targets[i]);
    for (int side = 0; side < 2; side++) {
        free(batch->offsets[side]);
        free(batch->ids[side]);
    }
    free(batch->lines);
    free(batch->labels);
    free(batch->targets);
    free(batch);
}

sida_status sida_batcher_skip(sida_batcher *batcher, int64_t batches) {
    sida_record record;
    bool more = true;
    assert(batches >= 0);
    for (int64_t b = 0; b < batches && !batcher->ended; b++) {
        int32_t taken = 0;
        for (; taken < batcher->options.sequences && more; taken++) {
            sida_status status = next_record(batcher, &record, &more);
            if (status != SIDA_OK) return status;
            if (!more) break;
        }
        if (taken > 0) batcher->batches++;
    }
    return SIDA_OK;
}
