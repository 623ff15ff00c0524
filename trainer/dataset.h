/* A trace in memory, as training and evaluation use it. */
#ifndef SIDA_TRAINER_DATASET_H
#define SIDA_TRAINER_DATASET_H

#include "formats/ragged.h"
#include "formats/trace.h"
#include "runtime/ops/linear.h"

#include <stdbool.h>
#include <stdint.h>

/* What the cross-entropy is against, where a model chooses top_k experts. */
typedef enum sida_labels {
    SIDA_LABELS_EVEN,   /* each of the chosen, 1 / top_k */
    SIDA_LABELS_WEIGHT, /* each by its share of the applied factors */
    SIDA_LABELS_BEST    /* the first alone */
} sida_labels;
const char *sida_labels_name(sida_labels labels); /* "even", "weight", "best" */
bool sida_labels_from_name(sida_labels *out, const char *name);

typedef struct sida_dataset_side {
    int64_t tokens;     /* n */
    int64_t *offsets;   /* [sequences + 1] */
    int32_t *ids;       /* [n] */
    uint16_t *experts;  /* [n, layers, top_k] */
    float *alpha;       /* [n, layers, top_k] */
    uint8_t *dropped;   /* [n, layers] */
    uint16_t *top_ids;  /* [n, layers, top] */
    uint16_t *top_logp; /* [n, layers, top] fp16 bits */
    uint8_t *content;   /* [n] 1: content (formats/README.md); NULL: all are */
} sida_dataset_side;

typedef struct sida_dataset {
    char *path;
    sida_fingerprint file, model, tokenizer; /* file: of its bytes */
    int32_t experts, top_k, top, d_model, vocabulary, sequences;
    int32_t layers[2];
    /* Factors of a token are divided by their sum over its top_k experts: those that the model
     * applied say it, summing to 1 everywhere. False with one expert. */
    bool renormalised;
    sida_labels labels; /* of its batches: the caller's choice */
    sida_dataset_side sides[2];
    float *embedding; /* [vocabulary, d_model]; rows of ids that do not occur are zero */
} sida_dataset;

/* For a top of sida_dataset_load(): two, or one where the trace has no more, and of these the
 * log-probabilities alone: top_ids is NULL. */
enum { SIDA_DATASET_MARGINS = -2 };

/* Reads the whole trace. top: how many of its T are kept, 0: all of them, -1: none (then
 * top_ids and top_logp are NULL). Errors: IO, FORMAT (also an empty trace), ARGUMENT when it has
 * fewer than `top`, MEMORY. */
sida_status sida_dataset_load(sida_dataset *out, const char *path, int32_t top);
void sida_dataset_free(sida_dataset *data);

/* MISMATCH, naming both files and what differs, when the two are not of one model. */
sida_status sida_dataset_check_pair(const sida_dataset *a, const sida_dataset *b);
sida_weight sida_dataset_embedding(const sida_dataset *data);
bool sida_dataset_is_content(const sida_dataset_side *side, int64_t token);

/* Sequences in the order of the file: the one behind a batch that starts at `first` and has at most
 * `tokens` of both sides, or one sequence; and such a batch, whose offsets are written. */
int32_t sida_dataset_batch_end(const sida_dataset *data, int32_t first, int64_t tokens);
sida_ragged sida_dataset_slice(const sida_dataset *data, int side, int32_t first, int32_t last,
                               int64_t *offsets);

/* --- batches of whole sequences */
typedef struct sida_minibatch_side {
    sida_ragged tokens; /* into offsets and ids */
    int64_t *offsets;
    int32_t *ids;
    uint16_t *top_ids, *top_logp;
    uint16_t *labels;     /* [n, layers, top_k] chosen experts */
    float *label_weights; /* [n, layers, top_k] >= 0, of sum 1 */
    size_t offset_items, id_items, top_items, logp_items, label_items, weight_items;
} sida_minibatch_side;
typedef struct sida_minibatch {
    sida_minibatch_side sides[2];
} sida_minibatch;

/* What the cross-entropy of tokens first … first + count of a side is against: the chosen experts
 * and their weights, of sum 1 in each pair; both [count, layers, top_k]. */
void sida_dataset_labels(uint16_t *labels, float *weights, const sida_dataset *data, int side,
                         int64_t first, int64_t count);

/* Copies the sequences order[0 … count) out of the data. */
sida_status sida_minibatch_fill(sida_minibatch *out, const sida_dataset *data, const int32_t *order,
                                int32_t count);
void sida_minibatch_free(sida_minibatch *batch);

/* The order of an epoch: a permutation of 0 … count-1 that depends on seed and epoch alone. */
void sida_dataset_shuffle(int32_t *order, int32_t count, uint64_t seed, int32_t epoch);

#endif
