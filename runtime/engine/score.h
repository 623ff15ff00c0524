/* Task scores from answers, and percentiles from times. */
#ifndef SIDA_RUNTIME_ENGINE_SCORE_H
#define SIDA_RUNTIME_ENGINE_SCORE_H

#include "data/corpus.h"

#include <stddef.h>
#include <stdint.h>

typedef struct sida_score {
    sida_score_kind kind;
    const char *positive; /* the text of label 1, NULL: no labels; borrowed */
    int64_t total, correct;
    int64_t positives; /* targets that are label 1 */
    int64_t true_positive, false_positive, false_negative;
} sida_score;

sida_score sida_score_begin(sida_corpus_format format);
/* One answer beside its target; a NULL target (unlabelled) does not count. */
void sida_score_add(sida_score *score, const char *answer, const char *target);
/* In [0, 1]: the share of equal answers, or F1 (0 without any positive). NAN when nothing was
 * counted or the format has no score. */
double sida_score_value(const sida_score *score);

/* What always giving the same label would score: the more frequent one, or for F1 label 1. NAN as
 * above, and without labels. */
double sida_score_constant(const sida_score *score);

/* -log p of token `id` under the softmax of its logits [count], in nats. */
double sida_score_nll(const float *logits, int32_t count, int32_t id);

/* The p-th percentile (0 … 100) by nearest rank; sorts `values`; 0 of nothing. */
double sida_percentile(double *values, size_t count, double p);

#endif
