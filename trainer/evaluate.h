/* How well a hash source predicts what a trace saw. Padding does not exist in a trace, so nothing
 * has to be left out; tokens dropped for capacity count in the hit rates, as the router chose for
 * them too, but use no expert in the sets. */
#ifndef SIDA_TRAINER_EVALUATE_H
#define SIDA_TRAINER_EVALUATE_H

#include "runtime/predictor/hash_source.h"
#include "trainer/dataset.h"

#include <jansson.h>
#include <stdint.h>

/* Per cent, over `pairs` of a token and an MoE layer, and `sets` of a sequence and an MoE layer. */
typedef struct sida_scores {
    int64_t pairs, dropped, sets;
    double hit[3];        /* hit@1, hit@3, hit@5: the router's best is among the k predicted */
    double set_recall;    /* used experts that were predicted, mean over sets */
    double set_precision; /* predicted experts that were used, mean over sets */
    /* The recall where a source loads as many experts as the sequence used in that layer, its most
     * probable ones over all tokens: the same number for every source that is compared. */
    double set_recall_equal;
    /* Of the k experts that the model chose a token; at [1] among 2 k predicted. */
    double slot_recall[2];   /* chosen ones that were predicted */
    double exact_set;        /* pairs whose k predicted are the chosen ones, in any order */
    double weight_recall[2]; /* of all factors applied, those of experts that were predicted */
    double alpha_error;      /* mean |α predicted - α applied| of the router's best, points */
} sida_scores;

typedef struct sida_evaluation {
    int32_t chosen; /* k of the model */
    int32_t set_k;  /* experts predicted a token, in the sets */
    int32_t layers[2];
    sida_scores overall, sides[2];
    sida_scores *per_layer; /* [layers[0] + layers[1]] */
} sida_evaluation;
void sida_evaluation_free(sida_evaluation *evaluation);

/* set_k: 1 … E. MISMATCH when source and data are not of one model. on_progress may be NULL; what
 * it returns, if not OK, ends the evaluation. */
sida_status sida_evaluate(
    sida_evaluation *out, const sida_hash_source *source, const sida_dataset *data, int32_t set_k,
    sida_status (*on_progress)(void *context, double fraction, int64_t tokens), void *context);

/* {"overall": {...}, "encoder": {...}, "decoder": {...}, "layers": [...]}; a side without layers is
 * left out. */
json_t *sida_evaluation_to_json(const sida_evaluation *evaluation);

#endif
