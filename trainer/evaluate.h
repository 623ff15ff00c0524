/* How well a hash source predicts what a trace saw. Padding does not exist in a trace. The figures
 * are of its content tokens (formats/README.md): not of the words that a task puts before every
 * input, nor of </s>; those of all tokens stand beside. Tokens dropped for capacity count in the
 * hit rates, as the router chose for them too, but use no expert in the sets and have no α. */
#ifndef SIDA_TRAINER_EVALUATE_H
#define SIDA_TRAINER_EVALUATE_H

#include "runtime/predictor/hash_source.h"
#include "trainer/bootstrap.h"
#include "trainer/dataset.h"

#include <jansson.h>
#include <stdint.h>

/* What is counted; rates are made of sums. Pairs of a token and an MoE layer; sets of a sequence
 * and an MoE layer. */
typedef struct sida_sums {
    int64_t pairs, dropped;
    int64_t hits[3];                 /* the router's best is among the 1, 3, 5 predicted */
    int64_t slots[2];                /* chosen experts among the k, 2 k predicted */
    int64_t exact;                   /* pairs whose k predicted are the chosen ones, in any order */
    int64_t sets;                    /* that use an expert */
    int64_t predicted_sets;          /* that predict one */
    int64_t alpha_pairs;             /* not dropped */
    double recall, precision, equal; /* over sets */
    double alpha;                    /* |α predicted - α applied| of the router's best */
    double alpha_constant;           /* the same, were the layer's mean applied α predicted */
    double applied, covered[2]; /* factors of the chosen; of those among the k, 2 k predicted */
} sida_sums;

/* Per cent. */
typedef struct sida_scores {
    int64_t pairs, dropped, sets;
    double hit[3];        /* hit@1, hit@3, hit@5 */
    double set_recall;    /* used experts that were predicted, mean over sets */
    double set_precision; /* predicted experts that were used, mean over sets */
    /* The recall where a source loads as many experts as the sequence used in that layer, its most
     * probable ones over all tokens: the same number for every source that is compared. */
    double set_recall_equal;
    double slot_recall[2];       /* chosen ones that were predicted */
    double exact_set;            /* pairs whose k predicted are the chosen ones */
    double weight_recall[2];     /* of all factors applied, those of experts that were predicted */
    double alpha_error;          /* mean error of α at the router's best, points */
    double alpha_constant_error; /* of a constant: the layer's mean α in this trace, points */
} sida_scores;

enum { SIDA_CALIBRATION_BINS = 10, SIDA_MARGIN_BINS = 5 };

/* Bin b: pairs whose predicted α of the router's best is in [b, b + 1) / SIDA_CALIBRATION_BINS. */
typedef struct sida_calibration {
    int64_t pairs;
    double predicted, applied; /* means, per cent */
} sida_calibration;

/* Pairs by p1 - p2, the router's margin between its two most probable experts; the bins hold as
 * many content pairs each, as far as ties let them. */
typedef struct sida_margin {
    double from, to; /* 0 … 1 */
    int64_t pairs;
    double hit[3];
} sida_margin;

/* The figures of all tokens. */
typedef struct sida_all_tokens {
    sida_scores overall, sides[2];
    sida_scores *per_layer;
} sida_all_tokens;

typedef struct sida_evaluation {
    int32_t chosen; /* k of the model */
    int32_t set_k;  /* experts predicted a token, in the sets */
    int32_t layers[2];
    /* Of content tokens. */
    sida_scores overall, sides[2];
    sida_scores *per_layer; /* [layers[0] + layers[1]] */
    sida_calibration calibration[SIDA_CALIBRATION_BINS];
    sida_margin margins[SIDA_MARGIN_BINS]; /* pairs 0 where the data has no top 2 */
    bool has_margins;
    int32_t sequences;
    sida_sums *per_sequence; /* [sequences, 2 sides], without alpha_constant */
    sida_all_tokens all;
} sida_evaluation;
void sida_evaluation_free(sida_evaluation *evaluation);

/* set_k: 1 … E. Margins need data->top >= 2. MISMATCH when source and data are not of one model.
 * on_progress may be NULL; what it returns, if not OK, ends the evaluation. */
sida_status sida_evaluate(
    sida_evaluation *out, const sida_hash_source *source, const sida_dataset *data, int32_t set_k,
    sida_status (*on_progress)(void *context, double fraction, int64_t tokens), void *context);

/* By how many points one source is better than another on content tokens: paired over the
 * sequences, by bootstrap. */
enum { SIDA_RESAMPLES = 10000 };
typedef struct sida_comparison {
    sida_interval hit[2]; /* hit@1, hit@3 */
    sida_interval set_recall_equal;
    sida_interval slot_recall;
} sida_comparison;
/* out: overall, encoder, decoder. Both evaluations are of the same data. MEMORY. */
sida_status sida_evaluation_compare(sida_comparison out[3], const sida_evaluation *ours,
                                    const sida_evaluation *theirs);

/* {"overall": {...}, "encoder": {...}, "decoder": {...}, "layers": [...], "calibration": [...],
 * "margins": [...], "all_tokens": {"overall" … "layers"}}; a side without layers is left out. */
json_t *sida_evaluation_to_json(const sida_evaluation *evaluation);
/* {"hit@1": {"mean", "low", "high"}, …}; chosen: k of the model. */
json_t *sida_comparison_to_json(const sida_comparison *comparison, int32_t chosen);
/* The three of an evaluation: {"overall": …, "encoder": …, "decoder": …}. */
json_t *sida_comparisons_to_json(const sida_comparison comparison[3],
                                 const sida_evaluation *evaluation);

#endif
