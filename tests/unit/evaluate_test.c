/* The evaluation's figures of content and of all tokens, α, margins and paired differences, against
 * what was counted by hand; the bootstrap against answers that are known. */
#include "tests/train_data.h"

#include "runtime/predictor/sources.h"
#include "trainer/evaluate.h"

#include <unistd.h>

static void close_to(double got, double wanted, double within) {
    if (!(fabs(got - wanted) <= within)) fail_msg("%.9g, expected %.9g", got, wanted);
}

/* --- bootstrap */

enum { UNITS = 400 };

static void bootstrap(void **state) {
    (void)state;
    sida_interval i[2], again[2];
    double over[2 * UNITS], under[2 * UNITS], sum = 0, square = 0;
    /* What all units agree on does not move; without denominators there is nothing. */
    for (int u = 0; u < UNITS; u++) {
        under[u * 2] = 1 + u % 7;
        over[u * 2] = 0.25 * under[u * 2];
        over[u * 2 + 1] = under[u * 2 + 1] = 0;
    }
    assert_int_equal(sida_bootstrap(i, over, under, UNITS, 2, 500, 1), SIDA_OK);
    close_to(i[0].mean, 0.25, 1e-12);
    close_to(i[0].low, 0.25, 1e-12);
    close_to(i[0].high, 0.25, 1e-12);
    assert_true(i[1].mean == 0 && i[1].low == 0 && i[1].high == 0);

    /* Two units of 0 and 1: a quarter of the resamples has 0, a quarter has 1. */
    const double two[2] = {0, 1}, ones[2] = {1, 1};
    assert_int_equal(sida_bootstrap(i, two, ones, 2, 1, 2000, 1), SIDA_OK);
    assert_true(i[0].mean == 0.5 && i[0].low == 0 && i[0].high == 1);
    /* One unit: nothing to draw. */
    assert_int_equal(sida_bootstrap(i, two + 1, ones, 1, 1, 100, 1), SIDA_OK);
    assert_true(i[0].mean == 1 && i[0].low == 1 && i[0].high == 1);

    /* Units of one weight: nearly normal, 1.96 standard errors to either side. The second column is
     * the same data, so it must get the same draws. */
    sida_rng rng = sida_rng_seed(5);
    for (int u = 0; u < UNITS; u++) {
        over[u * 2] = over[u * 2 + 1] = 3 + (double)sida_rng_normal(&rng);
        under[u * 2] = under[u * 2 + 1] = 1;
        sum += over[u * 2];
        square += over[u * 2] * over[u * 2];
    }
    double mean = sum / UNITS, error = sqrt((square / UNITS - mean * mean) / UNITS);
    assert_int_equal(sida_bootstrap(i, over, under, UNITS, 2, 10000, 1), SIDA_OK);
    close_to(i[0].mean, mean, 1e-12);
    close_to(i[0].low, mean - 1.96 * error, 0.1 * error);
    close_to(i[0].high, mean + 1.96 * error, 0.1 * error);
    assert_memory_equal(&i[0], &i[1], sizeof i[0]);
    assert_int_equal(sida_bootstrap(again, over, under, UNITS, 2, 10000, 1), SIDA_OK);
    assert_memory_equal(i, again, sizeof i);
    assert_int_equal(sida_bootstrap(again, over, under, UNITS, 2, 10000, 2), SIDA_OK);
    assert_true(i[0].low != again[0].low);

    /* A ratio of sums, not a mean of ratios. */
    const double parts[2] = {1, 0}, wholes[2] = {1, 3};
    assert_int_equal(sida_bootstrap(i, parts, wholes, 2, 1, 2000, 1), SIDA_OK);
    assert_true(i[0].mean == 0.25 && i[0].low == 0 && i[0].high == 1);
}

/* --- a case by hand: two sequences of three and two tokens, one layer in the encoder, four
 * experts. A source that predicts expert `id` for a token, then the next ones round. */
enum { EXPERTS = 4 };
static const float shares[EXPERTS] = {0.55f, 0.25f, 0.15f, 0.05f};

static sida_status no_state(const sida_hash_source *source, sida_hash_state **out) {
    (void)source;
    *out = NULL;
    return SIDA_OK;
}

static void no_destroy(sida_hash_state *state) {
    (void)state;
}

static sida_status rotate(const sida_hash_source *source, sida_hash_state *state,
                          const sida_ragged *input, int32_t k, sida_hash_table *out) {
    (void)source, (void)state;
    int64_t n = sida_ragged_tokens(input);
    sida_status status = sida_hash_table_reserve(out, 0, 1, k, n);
    for (int64_t i = 0; status == SIDA_OK && i < n; i++)
        for (int32_t r = 0; r < k; r++) {
            out->experts[i * k + r] = (uint16_t)((input->ids[i] + r) % EXPERTS);
            out->alpha[i * k + r] = shares[r];
        }
    return status;
}

static const sida_hash_source_table rotation = {
    .state_create = no_state, .state_destroy = no_destroy, .encode = rotate};

static sida_hash_source rotating(void) {
    return (sida_hash_source){&rotation,
                              {.name = "rotation", .experts = EXPERTS, .layers = {1, 0}}};
}

static uint16_t half(double probability) {
    return sida_f16_from_f32((float)log(probability));
}

typedef struct made {
    sida_dataset data;
    int64_t offsets[2][3];
    int32_t ids[5];
    uint16_t truth[5], top_ids[10], logp[10];
    float alpha[5];
    uint8_t dropped[5], content[5];
} made;

/* Ranks of the truth: 1st, 2nd, 4th; 1st, 3rd. Tokens 0 and 3 are no content. */
static void make(made *m) {
    static const int32_t ids[5] = {0, 1, 2, 3, 0};
    static const uint16_t truth[5] = {0, 2, 1, 3, 2};
    static const float alpha[5] = {0.5f, 0.6f, 0.2f, 0.7f, 0.4f};
    static const double first[5] = {0.5, 0.6, 0.4, 0.7, 0.9}, second[5] = {0.1, 0.1, 0.3, 0.2, 0.1};
    *m = (made){.offsets = {{0, 3, 5}}, .content = {0, 1, 1, 0, 1}, .dropped = {0, 0, 1, 0, 0}};
    for (int i = 0; i < 5; i++) {
        m->ids[i] = ids[i];
        m->truth[i] = truth[i];
        m->alpha[i] = alpha[i];
        m->logp[i * 2] = half(first[i]);
        m->logp[i * 2 + 1] = half(second[i]);
        m->top_ids[i * 2] = truth[i];
        m->top_ids[i * 2 + 1] = (uint16_t)((truth[i] + 1) % EXPERTS);
    }
    m->data = (sida_dataset){.path = (char *)(uintptr_t) "made",
                             .experts = EXPERTS,
                             .top_k = 1,
                             .top = 2,
                             .d_model = 1,
                             .vocabulary = 4,
                             .sequences = 2,
                             .layers = {1, 0}};
    m->data.sides[0] = (sida_dataset_side){.tokens = 5,
                                           .offsets = m->offsets[0],
                                           .ids = m->ids,
                                           .experts = m->truth,
                                           .alpha = m->alpha,
                                           .dropped = m->dropped,
                                           .top_ids = m->top_ids,
                                           .top_logp = m->logp,
                                           .content = m->content};
    m->data.sides[1].offsets = m->offsets[1];
}

static void content(void **state) {
    (void)state;
    made m;
    sida_evaluation e;
    sida_hash_source source = rotating();
    make(&m);
    assert_int_equal(sida_evaluate(&e, &source, &m.data, 1, NULL, NULL), SIDA_OK);
    /* Content: ranks 2, 4, 3. All: 1, 2, 4, 1, 3. */
    assert_int_equal(e.overall.pairs, 3);
    assert_int_equal(e.all.overall.pairs, 5);
    close_to(e.overall.hit[0], 0, 1e-9);
    close_to(e.overall.hit[1], 100 * 2.0 / 3, 1e-9);
    close_to(e.overall.hit[2], 100, 1e-9);
    close_to(e.all.overall.hit[0], 40, 1e-9);
    close_to(e.all.overall.hit[1], 80, 1e-9);
    assert_int_equal(e.overall.dropped, 1);
    assert_int_equal(e.all.overall.dropped, 1);
    /* Sets of content: {2} (1 was dropped), predicted {1, 2}; {2}, predicted {0}. Of all: {0, 2},
     * predicted {0, 1, 2}; {3, 2}, predicted {3, 0}. */
    close_to(e.overall.set_recall, 50, 1e-9);
    close_to(e.overall.set_precision, 25, 1e-9);
    close_to(e.all.overall.set_recall, 75, 1e-9);
    close_to(e.all.overall.set_precision, 100 * (2.0 / 3 + 0.5) / 2, 1e-9);
    /* Equal: one expert for {2}: 1 and 2 are both a first choice; weights: 1 has .55 and .05 (as
     * 2's fourth), 2 has .55 and .25 (as 1's second), so 2. For the other {2}: 0. */
    close_to(e.overall.set_recall_equal, 50, 1e-9);
    /* α of content that was not dropped: |.25 - .6| and |.15 - .4|; their mean is .5. */
    close_to(e.overall.alpha_error, 100 * (0.35 + 0.25) / 2, 1e-4);
    close_to(e.overall.alpha_constant_error, 10, 1e-4);
    close_to(e.all.overall.alpha_error, 100 * (0.05 + 0.35 + 0.15 + 0.25) / 4, 1e-4);
    close_to(e.all.overall.alpha_constant_error, 100 * (0.05 + 0.05 + 0.15 + 0.15) / 4, 1e-4);
    assert_int_equal(e.calibration[2].pairs, 1);
    close_to(e.calibration[2].predicted, 25, 1e-4);
    close_to(e.calibration[2].applied, 60, 1e-4);
    assert_int_equal(e.calibration[1].pairs, 1);
    close_to(e.calibration[1].applied, 40, 1e-4);
    assert_int_equal(e.calibration[5].pairs, 0);
    /* Margins of content: .5, .1, .8; fifths of three are cut behind .1, .5, .5, .8. */
    assert_true(e.has_margins);
    assert_int_equal(e.margins[0].pairs, 1);
    close_to(e.margins[0].hit[1], 0, 1e-9);
    assert_int_equal(e.margins[1].pairs, 1);
    assert_int_equal(e.margins[2].pairs, 0);
    assert_int_equal(e.margins[3].pairs, 1);
    assert_int_equal(e.margins[4].pairs, 0);
    close_to(e.margins[3].hit[1], 100, 1e-9);
    assert_true(e.margins[0].from == 0 && e.margins[4].to == 1);
    /* A sequence's sums. */
    assert_int_equal(e.per_sequence[0].pairs, 2);
    assert_int_equal(e.per_sequence[0].hits[1], 1);
    assert_int_equal(e.per_sequence[0].alpha_pairs, 1);
    assert_int_equal(e.per_sequence[2].sets, 1);
    close_to(e.per_sequence[0].equal, 1, 1e-9);
    assert_int_equal(e.per_sequence[1].pairs, 0);
    json_t *json = sida_evaluation_to_json(&e), *all = json_object_get(json, "all_tokens");
    close_to(json_real_value(json_object_get(json_object_get(all, "overall"), "hit@1")), 40, 1e-9);
    assert_int_equal(json_array_size(json_object_get(json, "calibration")), SIDA_CALIBRATION_BINS);
    assert_int_equal(json_array_size(json_object_get(json, "margins")), SIDA_MARGIN_BINS);
    json_decref(json);
    sida_evaluation_free(&e);

    /* Nothing said: all are content. Without the top two: no margins. */
    m.data.sides[0].content = NULL;
    m.data.top = 1;
    assert_int_equal(sida_evaluate(&e, &source, &m.data, 1, NULL, NULL), SIDA_OK);
    assert_true(e.overall.hit[0] == e.all.overall.hit[0] && e.overall.pairs == 5);
    assert_false(e.has_margins);
    json = sida_evaluation_to_json(&e);
    assert_null(json_object_get(json, "margins"));
    json_decref(json);
    sida_evaluation_free(&e);

    /* No content at all: no figures, and no division by nothing. */
    m.data.sides[0].content = (uint8_t[5]){0};
    assert_int_equal(sida_evaluate(&e, &source, &m.data, 1, NULL, NULL), SIDA_OK);
    assert_true(e.overall.pairs == 0 && e.overall.hit[0] == 0 && e.overall.alpha_error == 0);
    sida_evaluation_free(&e);
}

static void comparison(void **state) {
    (void)state;
    made m;
    sida_evaluation ours, theirs;
    sida_comparison c[3];
    sida_hash_source source = rotating();
    make(&m);
    m.data.sides[0].content = NULL;
    assert_int_equal(sida_evaluate(&ours, &source, &m.data, 1, NULL, NULL), SIDA_OK);
    assert_int_equal(sida_evaluation_compare(c, &ours, &ours), SIDA_OK);
    assert_true(c[0].hit[0].mean == 0 && c[0].hit[0].low == 0 && c[0].hit[0].high == 0);
    /* The other source knows all: behind by 2 of 3 in one sequence, by 1 of 2 in the other. */
    assert_int_equal(sida_evaluate(&theirs, &source, &m.data, 1, NULL, NULL), SIDA_OK);
    for (int q = 0; q < 2; q++) theirs.per_sequence[q * 2].hits[0] = q == 0 ? 3 : 2;
    assert_int_equal(sida_evaluation_compare(c, &ours, &theirs), SIDA_OK);
    for (int i = 0; i < 2; i++) { /* overall, encoder */
        close_to(c[i].hit[0].mean, -60, 1e-9);
        close_to(c[i].hit[0].low, -100 * 2.0 / 3, 1e-9);
        close_to(c[i].hit[0].high, -50, 1e-9);
        assert_true(c[i].hit[1].mean == 0);
    }
    assert_true(c[2].hit[0].mean == 0 && c[2].hit[0].high == 0);
    json_t *json = sida_comparisons_to_json(c, &ours);
    assert_null(json_object_get(json, "decoder"));
    json_t *hit = json_object_get(json_object_get(json, "encoder"), "hit@1");
    close_to(json_real_value(json_object_get(hit, "low")), -100 * 2.0 / 3, 1e-9);
    json_decref(json);
    sida_evaluation_free(&ours);
    sida_evaluation_free(&theirs);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(bootstrap), cmocka_unit_test(content),
                                       cmocka_unit_test(comparison)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
