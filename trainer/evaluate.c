#include "trainer/evaluate.h"

#include "formats/base/memory.h"
#include "trainer/tally.h"

#include <math.h>
#include <stdlib.h>

/* Bounds the memory, as every token's E scores are kept. */
enum { batch_tokens = 4096 };

void sida_evaluation_free(sida_evaluation *evaluation) {
    free(evaluation->per_layer);
    free(evaluation->all.per_layer);
    free(evaluation->per_sequence);
    *evaluation = (sida_evaluation){0};
}

typedef struct evaluating {
    sida_evaluation *out;
    sida_tally *content; /* [layers] */
    sida_sums *all;      /* [layers] */
    sida_counter counter;
} evaluating;

/* --- what depends on the data alone */

/* Cuts the content pairs' margins at their quantiles. */
static sida_status cut_margins(evaluating *e) {
    sida_status status = SIDA_OK;
    const sida_dataset *data = e->counter.data;
    int64_t *counts = NULL, total = 0, sum = 0;
    if (data->top < 2) return SIDA_OK;
    SIDA_TRY(SIDA_ALLOC(&counts, SIDA_MARGIN_STEPS + 1, "an evaluation"));
    for (int side = 0; side < 2; side++)
        for (int64_t i = 0; i < data->sides[side].tokens; i++)
            for (int32_t l = 0;
                 sida_dataset_is_content(&data->sides[side], i) && l < data->layers[side]; l++) {
                counts[sida_margin_of(data, side, i, l)]++;
                total++;
            }
    int32_t bin = 0, last = 0;
    for (int32_t m = 0; m <= SIDA_MARGIN_STEPS && bin < SIDA_MARGIN_BINS - 1; m++) {
        sum += counts[m];
        while (bin < SIDA_MARGIN_BINS - 1 && sum * SIDA_MARGIN_BINS >= total * (bin + 1))
            e->counter.edges[bin++] = m + 1;
    }
    e->counter.edges[SIDA_MARGIN_BINS - 1] = SIDA_MARGIN_STEPS + 1;
    for (int b = 0; b < SIDA_MARGIN_BINS; b++) {
        e->out->margins[b].from = (double)last / SIDA_MARGIN_STEPS;
        last = e->counter.edges[b];
        e->out->margins[b].to = fmin((double)last / SIDA_MARGIN_STEPS, 1);
    }
    e->out->has_margins = e->counter.has_margins = true;
out:
    free(counts);
    return status;
}

double sida_alpha_constant(const sida_dataset *data, int side, int32_t layer, bool all) {
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

static sida_status count_side(void *context, sida_hash_state *state, int side, int32_t first,
                              int32_t last, const sida_hash_table *table) {
    (void)state;
    evaluating *e = context;
    const sida_dataset *data = e->counter.data;
    const int64_t *offsets = data->sides[side].offsets;
    int64_t row = (int64_t)data->layers[side] * data->experts;
    for (int32_t q = first; q < last; q++)
        for (int32_t l = 0; l < data->layers[side]; l++) {
            sida_tally content = {.sums = {0}};
            int64_t from = (offsets[q] - offsets[first]) * row;
            int32_t at = (side ? data->layers[0] : 0) + l;
            sida_tally_layer(&content, &e->all[at], &e->counter, side, q, l, table->experts + from,
                             table->alpha + from);
            sida_tally_add(&e->content[at], &content);
            sida_sums_add(&e->out->per_sequence[(int64_t)q * 2 + side], &content.sums);
        }
    return SIDA_OK;
}

static void finish_bins(sida_evaluation *out, const sida_tally *whole) {
    for (int b = 0; b < SIDA_CALIBRATION_BINS; b++) {
        sida_calibration *to = &out->calibration[b];
        to->pairs = whole->calibration[b].pairs;
        to->predicted = sida_per_cent(whole->calibration[b].predicted, to->pairs);
        to->applied = sida_per_cent(whole->calibration[b].applied, to->pairs);
    }
    for (int b = 0; b < SIDA_MARGIN_BINS; b++) {
        sida_margin *to = &out->margins[b];
        to->pairs = whole->margins[b].pairs;
        for (int i = 0; i < 3; i++)
            to->hit[i] = sida_per_cent((double)whole->margins[b].hits[i], to->pairs);
    }
}

static void finish_all(evaluating *e) {
    sida_evaluation *out = e->out;
    const sida_dataset *data = e->counter.data;
    sida_tally whole = {.sums = {0}};
    sida_sums sides[2] = {{0}}, all[3] = {{0}}, overall = {0};
    for (int side = 0, at = 0; side < 2; side++)
        for (int32_t l = 0; l < data->layers[side]; l++, at++) {
            e->content[at].sums.alpha_constant = sida_alpha_constant(data, side, l, false);
            e->all[at].alpha_constant = sida_alpha_constant(data, side, l, true);
            out->per_layer[at] = sida_sums_finish(&e->content[at].sums, data->top_k);
            out->all.per_layer[at] = sida_sums_finish(&e->all[at], data->top_k);
            sida_tally_add(&whole, &e->content[at]);
            sida_sums_add(&sides[side], &e->content[at].sums);
            sida_sums_add(&all[side], &e->all[at]);
            sida_sums_add(&all[2], &e->all[at]);
        }
    overall = whole.sums;
    for (int side = 0; side < 2; side++) {
        out->sides[side] = sida_sums_finish(&sides[side], data->top_k);
        out->all.sides[side] = sida_sums_finish(&all[side], data->top_k);
    }
    out->overall = sida_sums_finish(&overall, data->top_k);
    out->all.overall = sida_sums_finish(&all[2], data->top_k);
    finish_bins(out, &whole);
}

sida_status sida_evaluate_check(const sida_hash_source *source, const sida_dataset *data,
                                int32_t set_k) {
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

sida_status sida_evaluate_walk(
    const sida_hash_source *source, const sida_dataset *data, sida_walk_fn *on_table, void *walker,
    sida_status (*on_progress)(void *context, double fraction, int64_t tokens), void *context) {
    sida_status status = SIDA_OK;
    sida_hash_state *state = NULL;
    sida_hash_table table = {0};
    int64_t *offsets = NULL, done = 0;
    SIDA_TRY(SIDA_ALLOC(&offsets, (size_t)data->sequences + 1, "an evaluation"));
    SIDA_TRY(sida_hash_state_create(source, &state));
    for (int32_t first = 0, last; first < data->sequences; first = last) {
        last = sida_dataset_batch_end(data, first, batch_tokens);
        sida_ragged input = sida_dataset_slice(data, 0, first, last, offsets);
        done += sida_ragged_tokens(&input);
        SIDA_TRY(sida_hash_encode(source, state, &input, data->experts, &table));
        if (data->layers[0] > 0) SIDA_TRY(on_table(walker, state, 0, first, last, &table));
        if (data->layers[1] > 0) {
            sida_ragged step = sida_dataset_slice(data, 1, first, last, offsets);
            done += sida_ragged_tokens(&step);
            SIDA_TRY(sida_hash_decode(source, state, &step, data->experts, &table));
            SIDA_TRY(on_table(walker, state, 1, first, last, &table));
        }
        if (on_progress) SIDA_TRY(on_progress(context, (double)last / data->sequences, done));
    }
out:
    sida_hash_state_destroy(source, state);
    sida_hash_table_free(&table);
    free(offsets);
    return status;
}

sida_status sida_evaluate(
    sida_evaluation *out, const sida_hash_source *source, const sida_dataset *data, int32_t set_k,
    sida_status (*on_progress)(void *context, double fraction, int64_t tokens), void *context) {
    *out = (sida_evaluation){.chosen = data->top_k,
                             .set_k = set_k,
                             .layers = {data->layers[0], data->layers[1]},
                             .sequences = data->sequences};
    sida_status status = SIDA_OK;
    evaluating e = {.out = out, .counter = {.data = data, .set_k = set_k}};
    int32_t total = data->layers[0] + data->layers[1];
    SIDA_TRY(sida_evaluate_check(source, data, set_k));
    SIDA_TRY(SIDA_ALLOC(&e.content, total, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&e.all, total, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&out->per_layer, total, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&out->all.per_layer, total, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&out->per_sequence, (size_t)data->sequences * 2, "an evaluation"));
    SIDA_TRY(sida_set_create(&e.counter.set, data->experts));
    SIDA_TRY(cut_margins(&e));
    SIDA_TRY(sida_evaluate_walk(source, data, count_side, &e, on_progress, context));
    finish_all(&e);
out:
    sida_set_free(&e.counter.set);
    free(e.content);
    free(e.all);
    if (status != SIDA_OK) sida_evaluation_free(out);
    return status;
}

/* --- two sources */

enum { measures = 4, bootstrap_seed = 1 };

/* The sums that the rates are made of, and how many there are. */
static void add_measures(double over[measures], double under[measures], const sida_sums *s,
                         int32_t k, double sign) {
    over[0] += sign * 100 * (double)s->hits[0];
    over[1] += sign * 100 * (double)s->hits[1];
    over[2] += sign * 100 * s->equal;
    over[3] += sign * 100 * (double)s->slots[0];
    if (sign < 0) return;
    under[0] += (double)s->pairs;
    under[1] += (double)s->pairs;
    under[2] += (double)s->sets;
    under[3] += (double)(s->pairs * k);
}

sida_status sida_sums_compare(sida_comparison *out, const uint8_t *groups, int32_t group_count,
                              const sida_sums *ours, const sida_sums *theirs, int32_t sequences,
                              int32_t columns, int32_t k) {
    sida_status status = SIDA_OK;
    double *over = NULL, *under = NULL;
    sida_interval *intervals = NULL;
    const int32_t width = group_count * measures;
    size_t cells;
    if (sida_mul_overflow((size_t)sequences, (size_t)width, &cells))
        SIDA_FAIL(SIDA_ERROR_MEMORY, "a comparison of %d sequences is too large", sequences);
    SIDA_TRY(SIDA_ALLOC(&over, cells, "a comparison"));
    SIDA_TRY(SIDA_ALLOC(&under, cells, "a comparison"));
    SIDA_TRY(SIDA_ALLOC(&intervals, width, "a comparison"));
    for (int64_t q = 0; q < sequences; q++)
        for (int32_t g = 0; g < group_count; g++)
            for (int32_t c = 0; c < columns; c++) {
                int64_t to = q * width + g * measures;
                if (!groups[g * columns + c]) continue;
                add_measures(over + to, under + to, &ours[q * columns + c], k, 1);
                add_measures(over + to, under + to, &theirs[q * columns + c], k, -1);
            }
    SIDA_TRY(
        sida_bootstrap(intervals, over, under, sequences, width, SIDA_RESAMPLES, bootstrap_seed));
    for (int32_t g = 0; g < group_count; g++) {
        const sida_interval *i = intervals + (size_t)g * measures;
        out[g] = (sida_comparison){{i[0], i[1]}, i[2], i[3]};
    }
out:
    free(over);
    free(under);
    free(intervals);
    return status;
}

sida_status sida_evaluation_compare(sida_comparison out[3], const sida_evaluation *ours,
                                    const sida_evaluation *theirs) {
    static const uint8_t groups[3][2] = {{1, 1}, {1, 0}, {0, 1}};
    return sida_sums_compare(out, groups[0], 3, ours->per_sequence, theirs->per_sequence,
                             ours->sequences, 2, ours->chosen);
}
