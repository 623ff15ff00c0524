/* Tokenised batches, cut in the order of the input: batch b holds records b*n … b*n + n - 1. */
#ifndef SIDA_DATA_BATCH_H
#define SIDA_DATA_BATCH_H

#include "data/corpus.h"
#include "formats/ragged.h"
#include "formats/tokenizer.h"

typedef struct sida_batch_options {
    int32_t sequences;  /* a batch, >= 1 */
    int64_t limit;      /* records in all; 0: no limit */
    int32_t max_tokens; /* longest input or target, </s> included */
    bool truncate;      /* cut longer ones (keeping </s>) instead of refusing them */
    int32_t vocabulary; /* ids must be below: FORMAT otherwise */
    int32_t eos;        /* appended to every input and target */
    bool content;       /* tell which tokens are content */
    bool each_label;    /* a record of a labelled format becomes two sequences, which have
                         * label 0 and label 1 as their targets */
    uint64_t seed;      /* span corruption: what is cut out of a record follows from this, its line
                         * and its tokens */
} sida_batch_options;

/* Owned; sida_batch_destroy(). */
typedef struct sida_batch {
    int64_t index;       /* 0, 1, 2 … */
    sida_ragged input;   /* ids with </s> */
    sida_ragged target;  /* ids with </s>; an empty sequence where there is none */
    bool has_targets;    /* every record of the batch has one */
    int64_t *lines;      /* [sequences] */
    int32_t *labels;     /* [sequences], -1: none */
    char **targets;      /* [sequences] target texts, NULL: none */
    int64_t *offsets[2]; /* storage behind input and target */
    int32_t *ids[2];
    /* Of input and target, a flag a token: 1, it is of the text; 0, the task or the batcher added
     * it (a task's fixed words, sentinels, </s>). NULL unless it was asked for. */
    uint8_t *content[2];
} sida_batch;

typedef struct sida_batcher sida_batcher;
/* Borrows corpus and tokenizer. */
sida_status sida_batcher_create(sida_batcher **out, sida_corpus *corpus,
                                const sida_tokenizer *tokenizer, const sida_batch_options *options);
void sida_batcher_destroy(sida_batcher *batcher);
/* The next batch, or *out = NULL at the end. The last may be smaller. An input of no tokens but
 * </s> is a FORMAT error, as is one longer than max_tokens without truncate. As T5Tokenizer does, a
 * text that itself ends in "</s>" gets no second one. Of a span-corruption corpus the text may have
 * max_tokens tokens before it is cut, and FORMAT is said of a text of a single token too. */
sida_status sida_batcher_next(sida_batcher *batcher, sida_batch **out);
void sida_batch_destroy(sida_batch *batch);

/* Batches by their index without keeping them: skips `batches` (for --resume). */
sida_status sida_batcher_skip(sida_batcher *batcher, int64_t batches);

#endif
