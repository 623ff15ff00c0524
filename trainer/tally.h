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
static inline double sida_per_cent(double part, int64_t whole) {
    return whole > 0 ? 100 * part / (double)whole : 0;
}
sida_scores sida_sums_finish(const sida_sums *sums, int32_t k);
json_t *sida_scores_to_json(const sida_scores *scores, int32_t chosen);

/* What counting sequence by sequence needs. */
typedef struct sida_counter {
    const sida_dataset *data;
    int32_t set_k;
    bool has_margins;
    int32_t edges[SIDA_MARGIN_BINS]; /* bin b ends before edges[b], in steps */
    sida_set set;
} sida_counter;

/* Margins are compared as whole numbers of 1 / SIDA_MARGIN_STEPS, which is finer than fp16 keeps
 * their logarithms. */
enum { SIDA_MARGIN_STEPS = 65536 };
/* The router's margin at a token and layer, in steps. */
int32_t sida_margin_of(const sida_dataset *data, int side, int64_t token, int32_t layer);

/* A sequence and layer: its content tokens are added to `content`, all its tokens to `all`.
 * predicted, alpha: all experts, from the sequence's first token on, rows of all layers. */
void sida_tally_layer(sida_tally *content, sida_sums *all, sida_counter *counter, int side,
                      int32_t sequence, int32_t layer, const uint16_t *predicted,
                      const float *alpha);

/* What a layer's mean α would be wrong by, summed; all: tokens that are not content too. */
double sida_alpha_constant(const sida_dataset *data, int side, int32_t layer, bool all);

/* MISMATCH when source and data are not of one model, ARGUMENT for set_k. */
sida_status sida_evaluate_check(const sida_hash_source *source, const sida_dataset *data,
                                int32_t set_k);

/* A batch: the sequences [first, last) of a side, rows of all experts; state: as the source left
 * it. */
typedef sida_status sida_walk_fn(void *walker, sida_hash_state *state, int side, int32_t first,
                                 int32_t last, const sida_hash_table *table);
/* The source over all of the data, in order; the sides that have layers. */
sida_status sida_evaluate_walk(
    const sida_hash_source *source, const sida_dataset *data, sida_walk_fn *on_table, void *walker,
    sida_status (*on_progress)(void *context, double fraction, int64_t tokens), void *context);

/* Of sums [sequences, columns], by how much one is better than another in each group of columns;
 * groups [group_count, columns]: not 0 for a column that is in it. k: of the model. MEMORY. */
sida_status sida_sums_compare(sida_comparison *out, const uint8_t *groups, int32_t group_count,
                              const sida_sums *ours, const sida_sums *theirs, int32_t sequences,
                              int32_t columns, int32_t k);

#endif
