/* Budgets, scores, percentiles and the sets of guided routing. */
#include "runtime/engine/budget.h"
#include "runtime/engine/compare.h"
#include "runtime/engine/routing.h"
#include "runtime/engine/score.h"
#include "tests/test.h"

#include <math.h>
#include <string.h>

static sida_budget_needs needs = {.experts = 100,
                                  .slot_bytes = 1000,
                                  .dense_bytes = 5000,
                                  .workspace_bytes = 300,
                                  .predictor_bytes = 20};

static void assert_slots(const char *text, int32_t slots, size_t cap_bytes) {
    sida_budget budget;
    int32_t got;
    size_t cap;
    assert_int_equal(sida_budget_parse(&budget, text), SIDA_OK);
    if (sida_budget_slots(&got, &cap, &budget, &needs) != SIDA_OK)
        fail_msg("%s: %s", text, sida_last_message());
    assert_int_equal(got, slots);
    assert_int_equal(cap, cap_bytes);
}

static void assert_refused(const char *text, const char *words) {
    sida_budget budget;
    int32_t slots;
    size_t cap;
    assert_int_equal(sida_budget_parse(&budget, text), SIDA_OK);
    assert_int_equal(sida_budget_slots(&slots, &cap, &budget, &needs), SIDA_ERROR_BUDGET);
    if (!strstr(sida_last_message(), words))
        fail_msg("'%s' is not in '%s'", words, sida_last_message());
}

static void test_budget(void **state) {
    (void)state;
    assert_slots("20%", 20, 5320 + 20000);
    assert_slots("29%", 29, 5320 + 29000);
    assert_slots("2.9%", 2, 5320 + 2000);
    assert_slots("100%", 100, 5320 + 100000);
    assert_slots("2-experts", 2, 5320 + 2000);
    assert_slots("5000-experts", 100, 5320 + 100000);
    assert_slots("7320", 2, 7320);
    assert_slots("8319", 2, 8319);
    assert_slots("8320", 3, 8320);
    assert_slots("1MiB", 100, 1 << 20);
    assert_refused("1%", "1% of 100 experts is 1 slots, at least 2");
    assert_refused("0%", "at least 2");
    assert_refused("1-experts", "at least 2");
    assert_refused("7319", "at least 7320 are needed = 5000 dense weights + 300 workspace + 20 "
                           "predictor + 0 driver and libraries + 2 slots of 1000");
    /* What the driver takes counts against a size, not against a share. */
    needs.driver_bytes = 4000;
    assert_slots("11320", 2, 11320);
    assert_slots("12320", 3, 12320);
    assert_slots("20%", 20, 5320 + 20000);
    assert_refused("11319", "at least 11320 are needed = 5000 dense weights + 300 workspace + 20 "
                            "predictor + 4000 driver and libraries + 2 slots of 1000");
    needs.driver_bytes = 0;
    static const char *const wrong[] = {"",      "%",   "101%",        "-1%",      "nan%",
                                        "20 %x", "two", "1.5-experts", "-experts", "0-experts",
                                        "2GiBs", "-5",  "5-expertss",  " 5%"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        sida_budget budget;
        if (sida_budget_parse(&budget, wrong[i]) != SIDA_ERROR_ARGUMENT)
            fail_msg("'%s' was taken for a budget", wrong[i]);
    }
}

static void test_score(void **state) {
    (void)state;
    sida_score match = sida_score_begin(SIDA_CORPUS_SST2);
    assert_true(isnan(sida_score_value(&match)));
    sida_score_add(&match, "negative", "negative");
    sida_score_add(&match, "positive", "negative");
    sida_score_add(&match, "rubbish", "positive");
    sida_score_add(&match, "positive", "positive");
    sida_score_add(&match, "positive", NULL);
    assert_true(sida_score_value(&match) == 0.5);
    assert_true(sida_score_constant(&match) == 0.5);
    sida_score_add(&match, "negative", "negative");
    assert_true(fabs(sida_score_constant(&match) - 0.6) < 1e-12);
    sida_score f1 = sida_score_begin(SIDA_CORPUS_MRPC);
    sida_score_add(&f1, "not_equivalent", "not_equivalent");
    assert_true(sida_score_value(&f1) == 0);
    sida_score_add(&f1, "equivalent", "equivalent");
    sida_score_add(&f1, "equivalent", "equivalent");
    sida_score_add(&f1, "equivalent", "not_equivalent");
    sida_score_add(&f1, "rubbish", "equivalent");
    sida_score_add(&f1, "rubbish", "equivalent");
    /* precision 2/3, recall 2/4; of 6 targets 4 positive */
    assert_true(fabs(sida_score_constant(&f1) - 2.0 * (4.0 / 6) / (4.0 / 6 + 1)) < 1e-12);
    assert_true(fabs(sida_score_value(&f1) - 2.0 * (2.0 / 3) * 0.5 / (2.0 / 3 + 0.5)) < 1e-12);
    sida_score none = sida_score_begin(SIDA_CORPUS_TEXT);
    sida_score_add(&none, "a", "a");
    assert_true(isnan(sida_score_value(&none)) && isnan(sida_score_constant(&none)));
}

static void test_comparison(void **state) {
    (void)state;
    sida_comparison c = {0};
    static const char *const run[] = {"a", "b", "a", "b", "c", "a"};
    static const char *const full[] = {"a", "a", "b", "c", "c", "b"};
    static const char *const target[] = {"a", "a", "a", "a", "a", NULL};
    for (int i = 0; i < 6; i++)
        assert_int_equal(sida_comparison_add(&c, run[i], target[i]), SIDA_OK);
    for (int i = 0; i < 6; i++) sida_comparison_check(&c, full[i], target[i]);
    assert_int_equal(c.changed, 4);
    assert_int_equal(c.lost, 1);
    assert_int_equal(c.gained, 1);
    sida_comparison_free(&c);
    /* Binomial tails by hand. */
    assert_true(sida_mcnemar_p(0, 0) == 1);
    assert_true(fabs(sida_mcnemar_p(1, 0) - 1) < 1e-12);
    assert_true(fabs(sida_mcnemar_p(0, 6) - 2.0 / 64) < 1e-12);
    assert_true(fabs(sida_mcnemar_p(8, 2) - 2.0 * (1 + 10 + 45) / 1024) < 1e-12);
    assert_true(fabs(sida_mcnemar_p(2, 8) - sida_mcnemar_p(8, 2)) < 1e-15);
    assert_true(fabs(sida_mcnemar_p(5, 5) - 1) < 1e-12);
    assert_true(sida_mcnemar_p(3000, 1000) < 1e-200);
}

static void test_percentile(void **state) {
    (void)state;
    double values[10] = {5, 3, 9, 1, 7, 10, 2, 8, 6, 4};
    assert_true(sida_percentile(values, 10, 50) == 5);
    assert_true(sida_percentile(values, 10, 90) == 9);
    assert_true(sida_percentile(values, 10, 99) == 10);
    assert_true(sida_percentile(values, 10, 0) == 1);
    assert_true(sida_percentile(values, 1, 50) == 1);
    assert_true(sida_percentile(values, 0, 50) == 0);
}

/* The router's choice of the call's tokens among the sets. */
static void choose(const sida_router_sets *sets, const sida_moe_call *call, bool renormalise) {
    int32_t set_of[8];
    for (int32_t s = 0; s < call->sequences; s++)
        for (int64_t i = call->offsets[s]; i < call->offsets[s + 1]; i++) set_of[i] = s;
    assert_int_equal(
        sida_router_cpu(NULL, &(sida_router_call){.experts = call->experts,
                                                  .alpha = call->alpha,
                                                  .logits = call->logits,
                                                  .n = call->tokens,
                                                  .experts_total = call->experts_total,
                                                  .k = call->k,
                                                  .renormalise = renormalise,
                                                  .allowed = sida_router_sets_at(sets, call->side,
                                                                                 call->layer, 0),
                                                  .set_of = set_of}),
        SIDA_OK);
}

/* Two layers a side, five experts, k 2: by hand. */
static void test_sets(void **state) {
    (void)state;
    const sida_model_info info = {.experts = 5, .moe_layers = {2, 1}};
    sida_router_sets sets = {0};
    sida_hash_table table = {0};
    assert_int_equal(sida_router_sets_begin(&sets, &info, 2), SIDA_OK);
    assert_int_equal(sida_hash_table_reserve(&table, SIDA_ENCODER, 2, 2, 3), SIDA_OK);
    /* token, layer: {experts} */
    const uint16_t predicted[] = {0, 1, 4, 3, /**/ 1, 2, 4, 0, /**/ 3, 4, 1, 2};
    memcpy(table.experts, predicted, sizeof predicted);
    const int64_t offsets[] = {0, 2, 3};
    sida_router_sets_add(&sets, &table, offsets);
    const float logits[] = {0, 1, 2, 9, 9, /**/ 3, 3, 0, 9, 9, /**/ 9, 9, 9, 1, 2};
    int32_t experts[3];
    float alpha[3];
    sida_moe_call call = {.side = SIDA_ENCODER,
                          .layer = 0,
                          .sequences = 2,
                          .offsets = offsets,
                          .tokens = 3,
                          .experts_total = 5,
                          .k = 1,
                          .logits = logits,
                          .experts = experts,
                          .alpha = alpha};
    choose(&sets, &call, false);
    assert_int_equal(experts[0], 2); /* of {0, 1, 2} */
    assert_int_equal(experts[1], 0); /* a tie goes to the lower id */
    assert_int_equal(experts[2], 4); /* of {3, 4} */
    /* α is over all experts, not over the allowed. */
    float sum = 0;
    for (int i = 0; i < 5; i++) sum += expf(logits[i]);
    assert_true(fabsf(alpha[0] - expf(2) / sum) < 1e-6f);
    choose(&sets, &call, true);
    assert_true(fabsf(alpha[0] - 1) < 1e-6f);
    call.layer = 1;
    choose(&sets, &call, false);
    assert_int_equal(experts[0], 3); /* of {0, 3, 4}: 3 and 4 tie */
    /* The decoder's sets grow step by step, also over a step in which a sequence has ended. */
    sida_hash_table step = {0};
    assert_int_equal(sida_hash_table_reserve(&step, SIDA_DECODER, 1, 2, 2), SIDA_OK);
    memcpy(step.experts, (uint16_t[]){0, 1, 2, 3}, 4 * sizeof(uint16_t));
    sida_router_sets_add(&sets, &step, (int64_t[]){0, 1, 2});
    assert_int_equal(sida_hash_table_reserve(&step, SIDA_DECODER, 1, 2, 1), SIDA_OK);
    memcpy(step.experts, (uint16_t[]){0, 4}, 2 * sizeof(uint16_t));
    sida_router_sets_add(&sets, &step, (int64_t[]){0, 0, 1});
    const float last[] = {5, 6, 7, 8, 9};
    const int64_t one[] = {0, 0, 1};
    call = (sida_moe_call){.side = SIDA_DECODER,
                           .sequences = 2,
                           .offsets = one,
                           .tokens = 1,
                           .experts_total = 5,
                           .k = 1,
                           .logits = last,
                           .experts = experts,
                           .alpha = alpha};
    choose(&sets, &call, false);
    assert_int_equal(experts[0], 4);
    sida_router_sets_end(&sets);
    assert_int_equal(sets.share_count[0], 2);
    assert_true(fabs(sets.share_sum[0][0] - (3 + 2) / 5.0) < 1e-12);
    assert_true(fabs(sets.share_sum[0][1] - (3 + 2) / 5.0) < 1e-12);
    assert_true(fabs(sets.share_sum[1][0] - (2 + 4) / 5.0) < 1e-12);
    /* A new batch starts from nothing. */
    assert_int_equal(sida_router_sets_begin(&sets, &info, 1), SIDA_OK);
    for (int i = 0; i < 10; i++) assert_int_equal(sets.allowed[0][i], 0);
    sida_router_sets_free(&sets);
    sida_hash_table_free(&table);
    sida_hash_table_free(&step);
}

static void assert_set(const sida_router_sets *sets, int side, int32_t layer, int32_t sequence,
                       const char *expected) {
    const uint8_t *set = sida_router_sets_at(sets, side, layer, sequence);
    for (int32_t e = 0; e < sets->experts; e++) assert_int_equal(set[e], expected[e] == '1');
}

/* At most two or three of five experts: those with the largest sums, ties to the lower id. */
static void test_limited_sets(void **state) {
    (void)state;
    const sida_model_info info = {.experts = 5, .moe_layers = {1, 1}};
    sida_router_sets sets = {.most = 2};
    sida_hash_table table = {0};
    assert_int_equal(sida_router_sets_begin(&sets, &info, 2), SIDA_OK);
    assert_int_equal(sida_hash_table_reserve(&table, SIDA_ENCODER, 1, 2, 4), SIDA_OK);
    memcpy(table.experts, (uint16_t[]){0, 1, 4, 1, 3, 1, 2, 0}, 8 * sizeof(uint16_t));
    memcpy(table.alpha, (float[]){.5f, .3f, .6f, .3f, .4f, .1f, .25f, 0}, 8 * sizeof(float));
    /* Σα² 0: .25, 1: .19 (although Σα is .7), 3: .16, 4: .36 | 2: .0625, 0: 0 */
    sida_router_sets_add(&sets, &table, (int64_t[]){0, 3, 4});
    assert_set(&sets, SIDA_ENCODER, 0, 0, "10001");
    assert_set(&sets, SIDA_ENCODER, 0, 1, "10100"); /* predicted, if with nothing */
    /* The decoder's sum over steps; sequence 1 has no token in the second. */
    assert_int_equal(sida_hash_table_reserve(&table, SIDA_DECODER, 1, 2, 2), SIDA_OK);
    memcpy(table.experts, (uint16_t[]){4, 3, 2, 1}, 4 * sizeof(uint16_t));
    memcpy(table.alpha, (float[]){.5f, .5f, .5f, .5f}, 4 * sizeof(float));
    sida_router_sets_add(&sets, &table, (int64_t[]){0, 1, 2});
    assert_set(&sets, SIDA_DECODER, 0, 0, "00011");
    assert_set(&sets, SIDA_DECODER, 0, 1, "01100");
    assert_int_equal(sida_hash_table_reserve(&table, SIDA_DECODER, 1, 2, 1), SIDA_OK);
    memcpy(table.experts, (uint16_t[]){0, 1}, 2 * sizeof(uint16_t));
    memcpy(table.alpha, (float[]){.5f, .1f}, 2 * sizeof(float));
    sida_router_sets_add(&sets, &table, (int64_t[]){0, 1, 1});
    assert_set(&sets, SIDA_DECODER, 0, 0, "10010"); /* 0, 3 and 4 tie */
    assert_set(&sets, SIDA_DECODER, 0, 1, "01100");
    sida_router_sets_end(&sets);
    assert_true(fabs(sets.share_sum[0][0] - (2 + 2) / 5.0) < 1e-12);
    /* Fewer than the limit; a new batch has no weights of the last one. */
    sida_router_sets_free(&sets);
    sets.most = 3;
    for (int i = 0; i < 2; i++) {
        assert_int_equal(sida_router_sets_begin(&sets, &info, 1), SIDA_OK);
        sida_router_sets_add(&sets, &table, (int64_t[]){0, 1});
        assert_set(&sets, SIDA_DECODER, 0, 0, i == 0 ? "11000" : "01010");
        assert_set(&sets, SIDA_ENCODER, 0, 0, "00000");
        table.experts[0] = 3;
    }
    sida_router_sets_free(&sets);
    sida_hash_table_free(&table);
}

static void test_predicted(void **state) {
    (void)state;
    sida_hash_table table = {0};
    assert_int_equal(sida_hash_table_reserve(&table, SIDA_DECODER, 2, 3, 1), SIDA_OK);
    memcpy(table.experts, (uint16_t[]){9, 8, 7, 3, 1, 2}, 6 * sizeof(uint16_t));
    memcpy(table.alpha, (float[]){0.9f, 0.1f, 0, 0.5f, 0.25f, 0.125f}, 6 * sizeof(float));
    int32_t experts[2];
    float alpha[2];
    sida_moe_call call = {.side = SIDA_DECODER,
                          .layer = 1,
                          .tokens = 1,
                          .experts_total = 10,
                          .k = 2,
                          .experts = experts,
                          .alpha = alpha};
    sida_routing_predicted(&table, &call, false);
    assert_int_equal(experts[0], 3);
    assert_int_equal(experts[1], 1);
    assert_true(alpha[0] == 0.5f && alpha[1] == 0.25f);
    sida_routing_predicted(&table, &call, true);
    assert_true(fabsf(alpha[0] - 2.0f / 3) < 1e-6f && fabsf(alpha[1] - 1.0f / 3) < 1e-6f);
    sida_hash_table_free(&table);
    sida_routing routing;
    assert_true(sida_routing_from_name(&routing, "predicted"));
    assert_int_equal(routing, SIDA_ROUTING_PREDICTED);
    assert_false(sida_routing_from_name(&routing, "Exact"));
    assert_string_equal(sida_routing_name(SIDA_ROUTING_GUIDED), "guided");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_budget),     cmocka_unit_test(test_score),
        cmocka_unit_test(test_comparison), cmocka_unit_test(test_percentile),
        cmocka_unit_test(test_sets),       cmocka_unit_test(test_limited_sets),
        cmocka_unit_test(test_predicted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
