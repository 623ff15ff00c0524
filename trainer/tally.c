#include "trainer/tally.h"

#include "formats/base/memory.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const int hit_k[3] = {1, 3, 5};

/* A probability of 1 counts as this one, whose logarithm is finite. */
static const double most_certain = 1 - 1e-6;

static int32_t rank_of(const uint16_t *predicted, int32_t experts, int32_t expert) {
    int32_t rank = 0;
    while (rank < experts - 1 && predicted[rank] != expert) rank++;
    return rank;
}

/* α means nothing where the token was dropped. */
static void count_alpha(sida_tally *tally, double predicted, double applied) {
    int bin = (int)(predicted * SIDA_CALIBRATION_BINS);
    if (bin < 0) bin = 0;
    if (bin >= SIDA_CALIBRATION_BINS) bin = SIDA_CALIBRATION_BINS - 1;
    tally->sums.alpha_pairs++;
    tally->sums.alpha += fabs(predicted - applied);
    tally->calibration[bin].pairs++;
    tally->calibration[bin].predicted += predicted;
    tally->calibration[bin].applied += applied;
}

void sida_tally_pair(sida_tally *tally, const sida_pair *pair, int32_t experts, int32_t k,
                     bool renormalised) {
    sida_sums *sums = &tally->sums;
    int32_t best = rank_of(pair->predicted, experts, pair->truth[0]), inside = 0;
    double whole = 0;
    sums->pairs++;
    sums->dropped += pair->dropped;
    for (int i = 0; i < 3; i++) sums->hits[i] += best < hit_k[i];
    if (pair->margin >= 0) {
        tally->margins[pair->margin].pairs++;
        for (int i = 0; i < 3; i++) tally->margins[pair->margin].hits[i] += best < hit_k[i];
    }
    for (int32_t j = 0; j < k; j++) {
        int32_t rank = j == 0 ? best : rank_of(pair->predicted, experts, pair->truth[j]);
        whole += (double)pair->alpha[rank];
        sums->applied += (double)pair->applied[j];
        inside += rank < k;
        for (int i = 0; i < 2; i++)
            if (rank < k << i) {
                sums->slots[i]++;
                sums->covered[i] += (double)pair->applied[j];
            }
    }
    sums->exact += inside == k;
    double factor = (double)pair->alpha[best];
    if (renormalised && whole > 0) factor /= whole;
    if (!pair->dropped) count_alpha(tally, factor, (double)pair->applied[0]);
}

sida_status sida_set_create(sida_set *set, int32_t experts) {
    sida_status status = SIDA_OK;
    *set = (sida_set){0};
    SIDA_TRY(SIDA_ALLOC(&set->marks, experts, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&set->wishes, experts, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&set->left, experts, "an evaluation"));
out:
    if (status != SIDA_OK) sida_set_free(set);
    return status;
}

void sida_set_free(sida_set *set) {
    free(set->marks);
    free(set->wishes);
    free(set->left);
    *set = (sida_set){0};
}

void sida_set_clear(sida_set *set, int32_t experts) {
    memset(set->marks, 0, (size_t)experts);
    for (int32_t e = 0; e < experts; e++) set->wishes[e] = (sida_wish){INT32_MAX - 1, 0};
}

void sida_set_add(sida_set *set, const sida_pair *pair, int32_t experts, int32_t k, int32_t set_k) {
    for (int32_t j = 0; j < k && !pair->dropped; j++) set->marks[pair->truth[j]] |= 1;
    for (int32_t j = 0; j < set_k; j++) set->marks[pair->predicted[j]] |= 2;
    for (int32_t j = 0; j < experts; j++) {
        sida_wish *w = &set->wishes[pair->predicted[j]];
        if (j / k < w->step) w->step = j / k;
        w->weight -= log1p(-fmin((double)pair->alpha[j], most_certain));
    }
}

static bool wished_more(const sida_wish *a, const sida_wish *b) {
    return a->step != b->step ? a->step < b->step : a->weight > b->weight;
}

/* The recall where as many experts are loaded as were used. */
static double equal_recall(const sida_set *set, int32_t experts, int32_t used) {
    int32_t both = 0;
    memcpy(set->left, set->wishes, (size_t)experts * sizeof *set->left);
    for (int32_t i = 0; i < used; i++) {
        int32_t best = 0;
        for (int32_t e = 1; e < experts; e++)
            if (wished_more(&set->left[e], &set->left[best])) best = e;
        set->left[best] = (sida_wish){INT32_MAX, 0};
        both += set->marks[best] & 1;
    }
    return (double)both / used;
}

void sida_tally_set(sida_sums *sums, const sida_set *set, int32_t experts) {
    int32_t used = 0, predicted = 0, both = 0;
    for (int32_t e = 0; e < experts; e++) {
        used += set->marks[e] & 1;
        predicted += set->marks[e] >> 1;
        both += set->marks[e] == 3;
    }
    if (used > 0) {
        sums->sets++;
        sums->recall += (double)both / used;
        sums->equal += equal_recall(set, experts, used);
    }
    if (predicted > 0) {
        sums->predicted_sets++;
        sums->precision += (double)both / predicted;
    }
}

void sida_sums_add(sida_sums *to, const sida_sums *from) {
    to->pairs += from->pairs;
    to->dropped += from->dropped;
    for (int i = 0; i < 3; i++) to->hits[i] += from->hits[i];
    for (int i = 0; i < 2; i++) {
        to->slots[i] += from->slots[i];
        to->covered[i] += from->covered[i];
    }
    to->exact += from->exact;
    to->applied += from->applied;
    to->sets += from->sets;
    to->predicted_sets += from->predicted_sets;
    to->recall += from->recall;
    to->precision += from->precision;
    to->equal += from->equal;
    to->alpha_pairs += from->alpha_pairs;
    to->alpha += from->alpha;
    to->alpha_constant += from->alpha_constant;
}

void sida_tally_add(sida_tally *to, const sida_tally *from) {
    sida_sums_add(&to->sums, &from->sums);
    for (int b = 0; b < SIDA_CALIBRATION_BINS; b++) {
        to->calibration[b].pairs += from->calibration[b].pairs;
        to->calibration[b].predicted += from->calibration[b].predicted;
        to->calibration[b].applied += from->calibration[b].applied;
    }
    for (int b = 0; b < SIDA_MARGIN_BINS; b++) {
        to->margins[b].pairs += from->margins[b].pairs;
        for (int i = 0; i < 3; i++) to->margins[b].hits[i] += from->margins[b].hits[i];
    }
}

sida_scores sida_sums_finish(const sida_sums *t, int32_t k) {
    sida_scores scores = {.pairs = t->pairs,
                          .dropped = t->dropped,
                          .sets = t->sets,
                          .set_recall = sida_per_cent(t->recall, t->sets),
                          .set_precision = sida_per_cent(t->precision, t->predicted_sets),
                          .set_recall_equal = sida_per_cent(t->equal, t->sets),
                          .alpha_error = sida_per_cent(t->alpha, t->alpha_pairs),
                          .alpha_constant_error = sida_per_cent(t->alpha_constant, t->alpha_pairs)};
    for (int i = 0; i < 3; i++) scores.hit[i] = sida_per_cent((double)t->hits[i], t->pairs);
    for (int i = 0; i < 2; i++) {
        scores.slot_recall[i] = sida_per_cent((double)t->slots[i], t->pairs * k);
        scores.weight_recall[i] = t->applied > 0 ? 100 * t->covered[i] / t->applied : 0;
    }
    scores.exact_set = sida_per_cent((double)t->exact, t->pairs);
    return scores;
}

int32_t sida_margin_of(const sida_dataset *data, int side, int64_t token, int32_t layer) {
    const uint16_t *logp =
        data->sides[side].top_logp + (token * data->layers[side] + layer) * data->top;
    double margin = exp((double)sida_f16_to_f32(logp[0])) - exp((double)sida_f16_to_f32(logp[1]));
    return (int32_t)(fmin(fmax(margin, 0), 1) * SIDA_MARGIN_STEPS);
}

static int32_t margin_bin(const sida_counter *counter, int side, int64_t token, int32_t layer) {
    if (!counter->has_margins) return -1;
    int32_t margin = sida_margin_of(counter->data, side, token, layer), bin = 0;
    while (margin >= counter->edges[bin]) bin++;
    return bin;
}

void sida_tally_layer(sida_tally *content, sida_sums *all, sida_counter *counter, int side,
                      int32_t sequence, int32_t layer, const uint16_t *predicted,
                      const float *alpha) {
    const sida_dataset *data = counter->data;
    const sida_dataset_side *s = &data->sides[side];
    int32_t layers = data->layers[side], experts = data->experts, k = data->top_k;
    int64_t first = s->offsets[sequence];
    sida_tally parts[2] = {{.sums = {0}}, {.sums = {0}}}; /* content, the rest */
    sida_set_clear(&counter->set, experts);
    for (int part = 0; part < 2; part++) {
        for (int64_t i = first; i < s->offsets[sequence + 1]; i++) {
            if (sida_dataset_is_content(s, i) == (part == 1)) continue;
            int64_t row = (i - first) * layers + layer, pair = i * layers + layer;
            const sida_pair p = {.predicted = predicted + row * experts,
                                 .alpha = alpha + row * experts,
                                 .truth = s->experts + pair * k,
                                 .applied = s->alpha + pair * k,
                                 .dropped = s->dropped[pair] != 0,
                                 .margin = margin_bin(counter, side, i, layer)};
            sida_tally_pair(&parts[part], &p, experts, k, data->renormalised);
            sida_set_add(&counter->set, &p, experts, k, counter->set_k);
        }
        sida_sums_add(all, &parts[part].sums);
        if (part == 0) sida_tally_set(&parts[0].sums, &counter->set, experts);
    }
    sida_tally_set(all, &counter->set, experts);
    sida_tally_add(content, &parts[0]);
}
