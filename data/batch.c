#include "data/batch.h"

#include "data/spans.h"
#include "formats/base/memory.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

struct sida_batcher {
    sida_corpus *corpus;
    const sida_tokenizer *tokenizer;
    sida_batch_options options;
    int64_t records, batches; /* so far */
    sida_record record;       /* the last one, if its second label comes next */
    bool again;
    bool ended;
};

/* A batch while it grows. */
typedef struct building {
    sida_batch *batch;
    size_t sequences;
    size_t offsets_capacity[2], ids_capacity[2];
    size_t lines_capacity, labels_capacity, targets_capacity, content_capacity[2];
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

/* The next record within the limit; with each_label the last one once more. */
static sida_status next_record(sida_batcher *batcher, sida_record *record, bool *more) {
    const char *const *labels = batcher->options.each_label
                                    ? sida_corpus_labels(sida_corpus_get_format(batcher->corpus))
                                    : NULL;
    *more = false;
    if (batcher->again) {
        *record = batcher->record;
        record->target = labels[1];
        batcher->again = false;
        *more = true;
        return SIDA_OK;
    }
    if (batcher->ended ||
        (batcher->options.limit > 0 && batcher->records >= batcher->options.limit)) {
        batcher->ended = true;
        return SIDA_OK;
    }
    sida_status status = sida_corpus_next(batcher->corpus, record, more);
    if (*more) batcher->records++;
    if (status == SIDA_OK && !*more) batcher->ended = true;
    if (!*more || !labels) return status;
    record->target = labels[0];
    batcher->record = *record;
    batcher->again = true;
    return status;
}

static sida_status fail_at(const sida_batcher *batcher, const sida_record *record, const char *what,
                           const char *reason) {
    return sida_fail(SIDA_ERROR_FORMAT, "%s:%lld: the %s %s", sida_corpus_path(batcher->corpus),
                     (long long)record->line, what, reason);
}

/* The ids of a text without </s>, cut where that is wanted. *ids: free(). */
static sida_status tokenise(const sida_batcher *batcher, int32_t **ids, size_t *count,
                            const sida_record *record, int side, const char *text) {
    const sida_batch_options *options = &batcher->options;
    const char *what = side == 0 ? "input" : "target";
    sida_status status = sida_tokenizer_encode(ids, count, batcher->tokenizer, text, strlen(text));
    if (status != SIDA_OK)
        return sida_fail_context(status, "%s:%lld", sida_corpus_path(batcher->corpus),
                                 (long long)record->line);
    /* As T5Tokenizer: an </s> at the end of the text is the end, not followed by another. */
    if (*count > 0 && (*ids)[*count - 1] == options->eos) --*count;
    for (size_t i = 0; i < *count; i++)
        if ((*ids)[i] >= options->vocabulary)
            return sida_fail(SIDA_ERROR_FORMAT,
                             "%s:%lld: token id %d of the %s is past the model's vocabulary of %d",
                             sida_corpus_path(batcher->corpus), (long long)record->line, (*ids)[i],
                             what, options->vocabulary);
    if (*count == 0 && side == 0) return fail_at(batcher, record, what, "has no tokens");
    if (*count + 1 <= (size_t)options->max_tokens) return SIDA_OK;
    if (!options->truncate)
        return sida_fail(SIDA_ERROR_FORMAT, "%s:%lld: the %s has %zu tokens, the limit is %d",
                         sida_corpus_path(batcher->corpus), (long long)record->line, what,
                         *count + 1, options->max_tokens);
    *count = (size_t)options->max_tokens - 1;
    return SIDA_OK;
}

static bool is_sentinel(const sida_batcher *batcher, int32_t id) {
    int32_t pieces = sida_tokenizer_pieces(batcher->tokenizer);
    return id >= pieces && id < pieces + SIDA_SPANS_SENTINELS;
}

/* Flags of the ids of a text without </s>, as they are in the batch already. Which ids are a fixed
 * part's is told by where the ids of the parts before it end, and of those and it together: a piece
 * never holds characters of two words. */
static sida_status mark_content(const sida_batcher *batcher, building *part, int side,
                                const sida_record *record, size_t first, size_t count) {
    sida_status status = SIDA_OK;
    const sida_batch *batch = part->batch;
    const int32_t *ids = batch->ids[side] + first;
    int32_t *before = NULL;
    SIDA_TRY(SIDA_GROW(&part->batch->content[side], &part->content_capacity[side],
                       first + count + 1, "the flags of a batch"));
    uint8_t *flags = batch->content[side] + first;
    bool spans = sida_corpus_get_format(batcher->corpus) == SIDA_CORPUS_SPANS;
    for (size_t i = 0; i < count; i++) flags[i] = !spans || !is_sentinel(batcher, ids[i]);
    flags[count] = 0; /* </s> */
    const size_t bytes = record->parts > 0 ? strlen(record->input) : 0;
    for (size_t p = 0, at = 0; side == 0 && p < (size_t)record->parts && at < count; p++) {
        size_t found, end = count;
        if (record->ends[p] < bytes) { /* else these are the ids */
            free(before);
            before = NULL;
            SIDA_TRY(sida_tokenizer_encode(&before, &found, batcher->tokenizer, record->input,
                                           record->ends[p]));
            for (end = 0; end < count && end < found && before[end] == ids[end];) end++;
        }
        if (end < at) end = at;
        if (p % 2 == 0) memset(flags + at, 0, end - at);
        at = end;
    }
out:
    free(before);
    return status;
}

/* Sequence `sequences` of side 0 (input) or 1 (target): the ids and </s>; ids NULL: nothing. */
static sida_status append(const sida_batcher *batcher, building *part, int side,
                          const sida_record *record, const int32_t *ids, size_t count) {
    sida_batch *batch = part->batch;
    sida_status status = SIDA_OK;
    size_t end = (size_t)batch->offsets[side][part->sequences];
    if (ids) {
        SIDA_TRY(SIDA_GROW(&batch->ids[side], &part->ids_capacity[side], end + count + 1,
                           "the ids of a batch"));
        memcpy(batch->ids[side] + end, ids, count * sizeof *ids);
        if (batcher->options.content)
            SIDA_TRY(mark_content(batcher, part, side, record, end, count));
        end += count;
        batch->ids[side][end++] = batcher->options.eos;
    }
    SIDA_TRY(SIDA_GROW(&batch->offsets[side], &part->offsets_capacity[side], part->sequences + 2,
                       "the offsets of a batch"));
    batch->offsets[side][part->sequences + 1] = (int64_t)end;
out:
    return status;
}

static sida_status add_side(const sida_batcher *batcher, building *part, int side,
                            const sida_record *record, const char *text) {
    sida_status status = SIDA_OK;
    int32_t *ids = NULL;
    size_t count = 0;
    if (text) SIDA_TRY(tokenise(batcher, &ids, &count, record, side, text));
    SIDA_TRY(append(batcher, part, side, record, ids, count));
out:
    free(ids);
    return status;
}

/* Both sides from one text, and the target in words. */
static sida_status add_corrupted(const sida_batcher *batcher, building *part,
                                 const sida_record *record, char **target_text) {
    const sida_batch_options *options = &batcher->options;
    int32_t first = sida_tokenizer_pieces(batcher->tokenizer) + SIDA_SPANS_SENTINELS - 1;
    sida_status status = SIDA_OK;
    int32_t *ids = NULL, *input = NULL, *target = NULL;
    size_t count, input_count, target_count;
    sida_rng rng = sida_rng_seed(options->seed);
    rng = sida_rng_seed(sida_rng_u64(&rng) + (uint64_t)record->line);
    if (first >= options->vocabulary)
        SIDA_FAIL(SIDA_ERROR_FORMAT,
                  "%s: span corruption needs <extra_id_0>, id %d, in the model's vocabulary of %d",
                  sida_corpus_path(batcher->corpus), first, options->vocabulary);
    SIDA_TRY(tokenise(batcher, &ids, &count, record, 0, record->input));
    if (count < 2) {
        status = fail_at(batcher, record, "text", "has a single token: no span can be cut out");
        goto out;
    }
    SIDA_TRY(SIDA_ALLOC(&input, count, "a span-corrupted text"));
    SIDA_TRY(SIDA_ALLOC(&target, count + 1, "a span-corrupted text"));
    SIDA_TRY(
        sida_spans_corrupt(input, &input_count, target, &target_count, ids, count, first, &rng));
    if (target_count + 1 > (size_t)options->max_tokens)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s:%lld: the target has %zu tokens, the limit is %d",
                  sida_corpus_path(batcher->corpus), (long long)record->line, target_count + 1,
                  options->max_tokens);
    SIDA_TRY(append(batcher, part, 0, record, input, input_count));
    SIDA_TRY(append(batcher, part, 1, record, target, target_count));
    SIDA_TRY(sida_tokenizer_decode(target_text, batcher->tokenizer, target, target_count));
out:
    free(ids);
    free(input);
    free(target);
    return status;
}

static sida_status add_record(const sida_batcher *batcher, building *part,
                              const sida_record *record) {
    sida_batch *batch = part->batch;
    size_t i = part->sequences;
    sida_status status = SIDA_OK;
    char *target = NULL;
    SIDA_TRY(SIDA_GROW(&batch->lines, &part->lines_capacity, i + 1, "the lines of a batch"));
    SIDA_TRY(SIDA_GROW(&batch->labels, &part->labels_capacity, i + 1, "the labels of a batch"));
    SIDA_TRY(SIDA_GROW(&batch->targets, &part->targets_capacity, i + 1, "the targets of a batch"));
    if (sida_corpus_get_format(batcher->corpus) == SIDA_CORPUS_SPANS) {
        SIDA_TRY(add_corrupted(batcher, part, record, &target));
    } else {
        SIDA_TRY(add_side(batcher, part, 0, record, record->input));
        SIDA_TRY(add_side(batcher, part, 1, record, record->target));
        SIDA_TRY(sida_strdup(&target, record->target));
    }
    batch->lines[i] = record->line;
    batch->labels[i] = record->label;
    batch->targets[i] = target;
    if (!target) batch->has_targets = false;
    target = NULL;
    part->sequences++;
    batch->input.sequences = batch->target.sequences = (int32_t)part->sequences;
out:
    free(target);
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
        free(batch->content[side]);
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
