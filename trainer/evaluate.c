#include "trainer/evaluate.h"

#include "formats/base/memory.h"
#include "trainer/tally.h"

#include <math.h>
#include <stdlib.h>

/* batch_tokens bounds the memory, as every token's E scores are kept. Margins are compared as
 * whole numbers of 1 / margin_steps, which is finer than fp16 keeps their logarithms. */
enum { batch_tokens = 4096, margin_steps = 65536, bootstrap_seed = 1, comparison_columns = 9 };

void sida_evaluation_free(sida_evaluation *evaluation) {
    free(evaluation->per_layer);
    free(evaluation->all.per_layer);
    free(evaluation->per_sequence);
    *evaluation = (sida_evaluation){0};
}

typedef struct evaluating {
    const sida_dataset *data;
    sida_evaluation *out;
    sida_tally *content;             /* [layers] */
    sida_sums *all;                  /* [layers] */
    int32_t edges[SIDA_MARGIN_BINS]; /* bin b ends before edges[b], in steps */
    sida_set set;
} evaluating;

/* --- what depends on the data alone */

/* The router's margin at a token and layer, in steps. */
static int32_t margin_of(const sida_dataset *data, int side, int64_t token, int32_t layer) {
    const uint16_t *logp =
        data->sides[side].top_logp + (token * data->layers[side] + layer) * data->top;
    double margin = exp((double)sida_f16_to_f32(logp[0])) - exp((double)sida_f16_to_f32(logp[1]));
    return (int32_t)(fmin(fmax(margin, 0), 1) * margin_steps);
}

/* Cuts the content pairs' margins at their quantiles. */
static sida_status cut_margins(evaluating *e) {
    sida_status status = SIDA_OK;
    const sida_dataset *data = e->data;
    int64_t *counts = NULL, total = 0, sum = 0;
    if (data->top < 2) return SIDA_OK;
    SIDA_TRY(SIDA_ALLOC(&counts, margin_steps + 1, "an evaluation"));
    for (int side = 0; side < 2; side++)
        for (int64_t i = 0; i < data->sides[side].tokens; i++)
            for (int32_t l = 0;
                 sida_dataset_is_content(&data->sides[side], i) && l < data->layers[side]; l++) {
                counts[margin_of(data, side, i, l)]++;
                total++;
            }
    int32_t bin = 0, last = 0;
    for (int32_t m = 0; m <= margin_steps && bin < SIDA_MARGIN_BINS - 1; m++) {
        sum += counts[m];
        while (bin < SIDA_MARGIN_BINS - 1 && sum * SIDA_MARGIN_BINS >= total * (bin + 1))
            e->edges[bin++] = m + 1;
    }
    e->edges[SIDA_MARGIN_BINS - 1] = margin_steps + 1;
    for (int b = 0; b < SIDA_MARGIN_BINS; b++) {
        e->out->margins[b].from = (double)last / margin_steps;
        last = e->edges[b];
        e->out->margins[b].to = fmin((double)last / margin_steps, 1);
    }
    e->out->has_margins = true;
out:
    free(counts);
    return status;
}

static int32_t margin_bin(const evaluating *e, int side, int64_t token, int32_t layer) {
    if (!e->out->has_margins) return -1;
    int32_t margin = margin_of(e->data, side, token, layer), bin = 0;
    while (margin >= e->edges[bin]) bin++;
    return bin;
}

/* What a layer's mean α would be wrong by; all: tokens that are not content too. */
static double constant_error(const sida_dataset *data, int side, int32_t layer, bool all) {
    const sida_dataset_side *s = &data->sides[side];
    double mean = 0, error = 0;
    int64_t count = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = 0; i < s->tokens; i++) {
            int64_t pair = i * data->layers[side] + layer;
            if (s->dropped[pair] || !(all || sida_dataset_is_content(s, i))) continue;
            double alpha = (double)s->alpha[pair * data->top_k];
            if (pass == 0) {
                mean += alpha;
                count++;
            } else {
                error += fabs(alpha - mean);
            }
        }
        if (count > 0 && pass == 0) mean /= (double)count;
    }
    return error;
}

/* --- counting */

/* A sequence and layer. experts, alpha: of its first token, rows of all layers. */
static void count_layer(evaluating *e, int side, int32_t sequence, int32_t layer, int32_t set_k,
                        const uint16_t *predicted, const float *alpha) {
    const sida_dataset *data = e->data;
    const sida_dataset_side *s = &data->sides[side];
    int32_t layers = data->layers[side], experts = data->experts, k = data->top_k;
    int32_t at = (side ? data->layers[0] : 0) + layer;
    int64_t first = s->offsets[sequence];
    sida_tally parts[2] = {{.sums = {0}}, {.sums = {0}}}; /* content, the rest */
    sida_set_clear(&e->set, experts);
    for (int part = 0; part < 2; part++) {
        for (int64_t i = first; i < s->offsets[sequence + 1]; i++) {
            if (sida_dataset_is_content(s, i) == (part == 1)) continue;
            int64_t row = (i - first) * layers + layer, pair = i * layers + layer;
            const sida_pair p = {.predicted = predicted + row * experts,
                                 .alpha = alpha + row * experts,
                                 .truth = s->experts + pair * k,
                                 .applied = s->alpha + pair * k,
                                 .dropped = s->dropped[pair] != 0,
                                 .margin = margin_bin(e, side, i, layer)};
            sida_tally_pair(&parts[part], &p, experts, k, data->renormalised);
            sida_set_add(&e->set, &p, experts, k, set_k);
        }
        sida_sums_add(&e->all[at], &parts[part].sums);
        if (part == 0) sida_tally_set(&parts[0].sums, &e->set, experts);
    }
    sida_tally_set(&e->all[at], &e->set, experts);
    sida_tally_add(&e->content[at], &parts[0]);
    sida_sums_add(&e->out->per_sequence[(int64_t)sequence * 2 + side], &parts[0].sums);
}

/* One side of the sequences [first, last). */
static void count_side(evaluating *e, int side, int32_t first, int32_t last, int32_t set_k,
                       const sida_hash_table *table) {
    const int64_t *offsets = e->data->sides[side].offsets;
    int64_t row = (int64_t)e->data->layers[side] * e->data->experts;
    for (int32_t q = first; q < last; q++)
        for (int32_t l = 0; l < e->data->layers[side]; l++) {
            int64_t at = (offsets[q] - offsets[first]) * row;
            count_layer(e, side, q, l, set_k, table->experts + at, table->alpha + at);
        }
}

static double per_cent(double part, int64_t whole) {
    return whole > 0 ? 100 * part / (double)whole : 0;
}

static sida_scores finish(const sida_sums *t, int32_t k) {
    sida_scores scores = {.pairs = t->pairs,
                          .dropped = t->dropped,
                          .sets = t->sets,
                          .set_recall = per_cent(t->recall, t->sets),
                          .set_precision = per_cent(t->precision, t->predicted_sets),
                          .set_recall_equal = per_cent(t->equal, t->sets),
                          .alpha_error = per_cent(t->alpha, t->alpha_pairs),
                          .alpha_constant_error = per_cent(t->alpha_constant, t->alpha_pairs)};
    for (int i = 0; i < 3; i++) scores.hit[i] = per_cent((double)t->hits[i], t->pairs);
    for (int i = 0; i < 2; i++) {
        scores.slot_recall[i] = per_cent((double)t->slots[i], t->pairs * k);
        scores.weight_recall[i] = t->applied > 0 ? 100 * t->covered[i] / t->applied : 0;
    }
    scores.exact_set = per_cent((double)t->exact, t->pairs);
    return scores;
}

static void finish_bins(sida_evaluation *out, const sida_tally *whole) {
    for (int b = 0; b < SIDA_CALIBRATION_BINS; b++) {
        sida_calibration *to = &out->calibration[b];
        to->pairs = whole->calibration[b].pairs;
        to->predicted = per_cent(whole->calibration[b].predicted, to->pairs);
        to->applied = per_cent(whole->calibration[b].applied, to->pairs);
    }
    for (int b = 0; b < SIDA_MARGIN_BINS; b++) {
        sida_margin *to = &out->margins[b];
        to->pairs = whole->margins[b].pairs;
        for (int i = 0; i < 3; i++)
            to->hit[i] = per_cent((double)whole->margins[b].hits[i], to->pairs);
    }
}

static void finish_all(evaluating *e) {
    sida_evaluation *out = e->out;
    const sida_dataset *data = e->data;
    sida_tally whole = {.sums = {0}};
    sida_sums sides[2] = {{0}}, all[3] = {{0}}, overall = {0};
    for (int side = 0, at = 0; side < 2; side++)
        for (int32_t l = 0; l < data->layers[side]; l++, at++) {
            e->content[at].sums.alpha_constant = constant_error(data, side, l, false);
            e->all[at].alpha_constant = constant_error(data, side, l, true);
            out->per_layer[at] = finish(&e->content[at].sums, data->top_k);
            out->all.per_layer[at] = finish(&e->all[at], data->top_k);
            sida_tally_add(&whole, &e->content[at]);
            sida_sums_add(&sides[side], &e->content[at].sums);
            sida_sums_add(&all[side], &e->all[at]);
            sida_sums_add(&all[2], &e->all[at]);
        }
    overall = whole.sums;
    for (int side = 0; side < 2; side++) {
        out->sides[side] = finish(&sides[side], data->top_k);
        out->all.sides[side] = finish(&all[side], data->top_k);
    }
    out->overall = finish(&overall, data->top_k);
    out->all.overall = finish(&all[2], data->top_k);
    finish_bins(out, &whole);
}

static sida_status check(const sida_hash_source *source, const sida_dataset *data, int32_t set_k) {
    const sida_hash_source_info *info = &source->info;
    if (!sida_fingerprint_equal(info->model, data->model)) {
        char theirs[SIDA_FINGERPRINT_TEXT], ours[SIDA_FINGERPRINT_TEXT];
        sida_fingerprint_format(theirs, info->model);
        sida_fingerprint_format(ours, data->model);
        return sida_fail(SIDA_ERROR_MISMATCH, "the predictor is of model %s, %s of model %s",
                         theirs, data->path, ours);
    }
    if (info->experts != data->experts || info->layers[0] != data->layers[0] ||
        info->layers[1] != data->layers[1])
        return sida_fail(SIDA_ERROR_MISMATCH,
                         "the predictor has %d + %d layers of %d experts, %s %d + %d of %d",
                         info->layers[0], info->layers[1], info->experts, data->path,
                         data->layers[0], data->layers[1], data->experts);
    if (set_k < 1 || set_k > data->experts)
        return sida_fail(SIDA_ERROR_ARGUMENT, "%d experts a token: %s has %d", set_k, data->path,
                         data->experts);
    return SIDA_OK;
}

sida_status sida_evaluate(
    sida_evaluation *out, const sida_hash_source *source, const sida_dataset *data, int32_t set_k,
    sida_status (*on_progress)(void *context, double fraction, int64_t tokens), void *context) {
    *out = (sida_evaluation){.chosen = data->top_k,
                             .set_k = set_k,
                             .layers = {data->layers[0], data->layers[1]},
                             .sequences = data->sequences};
    sida_status status = SIDA_OK;
    sida_hash_state *state = NULL;
    sida_hash_table table = {0};
    evaluating e = {.data = data, .out = out};
    int64_t *offsets = NULL, done = 0;
    int32_t total = data->layers[0] + data->layers[1];
    SIDA_TRY(check(source, data, set_k));
    SIDA_TRY(SIDA_ALLOC(&e.content, total, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&e.all, total, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&out->per_layer, total, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&out->all.per_layer, total, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&out->per_sequence, (size_t)data->sequences * 2, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&offsets, (size_t)data->sequences + 1, "an evaluation"));
    SIDA_TRY(sida_set_create(&e.set, data->experts));
    SIDA_TRY(cut_margins(&e));
    SIDA_TRY(sida_hash_state_create(source, &state));
    for (int32_t first = 0, last; first < data->sequences; first = last) {
        last = sida_dataset_batch_end(data, first, batch_tokens);
        sida_ragged input = sida_dataset_slice(data, 0, first, last, offsets);
        done += sida_ragged_tokens(&input);
        SIDA_TRY(sida_hash_encode(source, state, &input, data->experts, &table));
        if (data->layers[0] > 0) count_side(&e, 0, first, last, set_k, &table);
        if (data->layers[1] > 0) {
            sida_ragged step = sida_dataset_slice(data, 1, first, last, offsets);
            done += sida_ragged_tokens(&step);
            SIDA_TRY(sida_hash_decode(source, state, &step, data->experts, &table));
            count_side(&e, 1, first, last, set_k, &table);
        }
        if (on_progress) SIDA_TRY(on_progress(context, (double)last / data->sequences, done));
    }
    finish_all(&e);
out:
    sida_hash_state_destroy(source, state);
    sida_hash_table_free(&table);
    sida_set_free(&e.set);
    free(e.content);
    free(e.all);
    free(offsets);
    if (status != SIDA_OK) sida_evaluation_free(out);
    return status;
}

/* --- two sources */

/* A sequence's three columns: the sums that the rates are made of, and how many there are. */
static void columns_of(double over[3], double under[3], const sida_sums *s) {
    over[0] = (double)s->hits[0];
    over[1] = (double)s->hits[1];
    over[2] = s->equal;
    under[0] = under[1] = (double)s->pairs;
    under[2] = (double)s->sets;
}

sida_status sida_evaluation_compare(sida_comparison out[3], const sida_evaluation *ours,
                                    const sida_evaluation *theirs) {
    sida_status status = SIDA_OK;
    double *over = NULL, *under = NULL;
    sida_interval intervals[comparison_columns];
    size_t cells = (size_t)ours->sequences * comparison_columns;
    SIDA_TRY(SIDA_ALLOC(&over, cells, "a comparison"));
    SIDA_TRY(SIDA_ALLOC(&under, cells, "a comparison"));
    for (int64_t q = 0; q < ours->sequences; q++)
        for (int side = 0; side < 2; side++) {
            double a[3], b[3], n[3], *row = over + q * comparison_columns,
                                     *counts = under + q * comparison_columns;
            columns_of(b, n, &theirs->per_sequence[q * 2 + side]);
            columns_of(a, n, &ours->per_sequence[q * 2 + side]);
            for (int c = 0; c < 3; c++) { /* overall, then the side */
                row[c] += 100 * (a[c] - b[c]);
                row[3 + side * 3 + c] = 100 * (a[c] - b[c]);
                counts[c] += n[c];
                counts[3 + side * 3 + c] = n[c];
            }
        }
    SIDA_TRY(sida_bootstrap(intervals, over, under, ours->sequences, comparison_columns,
                            SIDA_RESAMPLES, bootstrap_seed));
    for (int i = 0; i < 3; i++)
        out[i] = (sida_comparison){{intervals[i * 3], intervals[i * 3 + 1]}, intervals[i * 3 + 2]};
out:
    free(over);
    free(under);
    return status;
}
