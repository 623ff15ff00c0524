/* Inside the evaluation: counting, for one layer or for several together. */
#ifndef SIDA_TRAINER_TALLY_H
#define SIDA_TRAINER_TALLY_H

#include "trainer/evaluate.h"

#include <stdbool.h>

typedef struct sida_tally {
    sida_sums sums;
    struct {
        int64_t pairs;
        double predicted, applied;
    } calibration[SIDA_CALIBRATION_BINS];
    struct {
        int64_t pairs, hits[3];
    } margins[SIDA_MARGIN_BINS];
} sida_tally;

/* A token and a layer: what was predicted (all experts, best first) and what the model chose. */
typedef struct sida_pair {
    const uint16_t *predicted; /* [experts] */
    const float *alpha;        /* [experts] */
    const uint16_t *truth;     /* [k] */
    const float *applied;      /* [k] */
    bool dropped;
    int32_t margin; /* its bin, -1: not known */
} sida_pair;
void sida_tally_pair(sida_tally *tally, const sida_pair *pair, int32_t experts, int32_t k,
                     bool renormalised);

/* What one sequence and layer would load: experts by the best rank that a token gives them (in
 * steps of k, as a token uses k), then by how probable it is that some token uses them, were the
 * tokens independent: 1 - Π (1 - α). */
typedef struct sida_wish {
    int32_t step;
    double weight; /* -Σ log(1 - α) */
} sida_wish;

/* The experts of one sequence and layer. */
typedef struct sida_set {
    uint8_t *marks;    /* [experts] 1 used, 2 predicted */
    sida_wish *wishes; /* [experts] */
    sida_wish *left;   /* [experts], scratch */
} sida_set;
sida_status sida_set_create(sida_set *set, int32_t experts);
void sida_set_free(sida_set *set);
void sida_set_clear(sida_set *set, int32_t experts);
/* Adds a token's. set_k: experts predicted a token. */
void sida_set_add(sida_set *set, const sida_pair *pair, int32_t experts, int32_t k, int32_t set_k);
/* Counts the set as it is now; it may go on growing. */
void sida_tally_set(sida_sums *sums, const sida_set *set, int32_t experts);

void sida_sums_add(sida_sums *to, const sida_sums *from);
void sida_tally_add(sida_tally *to, const sida_tally *from);

#endif
