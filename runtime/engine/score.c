#include "runtime/engine/score.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

sida_score sida_score_begin(sida_corpus_format format) {
    const char *const *labels = sida_corpus_labels(format);
    return (sida_score){.kind = sida_corpus_score_kind(format),
                        .positive = labels ? labels[1] : NULL};
}

void sida_score_add(sida_score *score, const char *answer, const char *target) {
    if (score->kind == SIDA_SCORE_NONE || !target) return;
    score->total++;
    score->correct += strcmp(answer, target) == 0;
    if (!score->positive) return;
    int said = strcmp(answer, score->positive) == 0, is = strcmp(target, score->positive) == 0;
    score->positives += is;
    score->true_positive += said && is;
    score->false_positive += said && !is;
    score->false_negative += !said && is;
}

double sida_score_value(const sida_score *score) {
    if (score->total == 0) return NAN;
    if (score->kind == SIDA_SCORE_EXACT_MATCH) return (double)score->correct / (double)score->total;
    int64_t wrong = score->false_positive + score->false_negative;
    int64_t right = score->true_positive;
    return right == 0 ? 0 : 2.0 * (double)right / (double)(2 * right + wrong);
}

double sida_score_constant(const sida_score *score) {
    if (score->total == 0 || !score->positive) return NAN;
    double share = (double)score->positives / (double)score->total;
    if (score->kind == SIDA_SCORE_F1) return 2 * share / (1 + share);
    return fmax(share, 1 - share);
}

/* Summed in double, in the order of the vocabulary. */
double sida_score_nll(const float *logits, int32_t count, int32_t id) {
    float top = logits[0];
    double sum = 0;
    for (int32_t i = 1; i < count; i++) top = logits[i] > top ? logits[i] : top;
    for (int32_t i = 0; i < count; i++) sum += (double)expf(logits[i] - top);
    return (double)top + log(sum) - (double)logits[id];
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double sida_percentile(double *values, size_t count, double p) {
    if (count == 0) return 0;
    qsort(values, count, sizeof *values, compare);
    size_t rank = (size_t)ceil(p / 100 * (double)count);
    return values[rank > 0 ? rank - 1 : 0];
}
