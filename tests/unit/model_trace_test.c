/* What a trace takes of a forward pass: the best log-probabilities, and recordings of the routing.
 */
#include "formats/base/rng.h"
#include "formats/dtype.h"
#include "tests/recording_rig.h"

/* Worse than: a lower logit, or as good with a higher id. */
static bool before(const float *logits, int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
}

/* By rank: the one with exactly r better ones. */
static void check_row(const float *logits, int32_t experts, int32_t top, const uint16_t *ids,
                      const uint16_t *logp) {
    double sum = 0, high = logits[0];
    for (int32_t e = 0; e < experts; e++) high = fmax(high, logits[e]);
    for (int32_t e = experts; e-- > 0;) sum += exp(logits[e] - high);
    for (int32_t r = 0; r < top; r++) {
        int32_t better = 0;
        for (int32_t e = 0; e < experts; e++) better += before(logits, e, ids[r]);
        assert_int_equal(better, r);
        /* Between them lie the rounding to fp32 and that to fp16, of 2^-11 of it. */
        double want = logits[ids[r]] - high - log(sum), got = sida_f16_to_f32(logp[r]);
        if (want < -65504)
            assert_true(got <= -65504);
        else
            assert_true(fabs(got - want) <= fabs(want) / 2000 + 2e-7 * (fabs(high) + 1));
    }
}

static void test_top(void **state) {
    (void)state;
    static const int32_t experts[] = {1, 7, 64, 128, 300}, tops[] = {1, 5, 30, 128, 300};
    static float logits[9 * 300];
    static uint16_t ids[9 * 300], logp[9 * 300];
    sida_rng rng = sida_rng_seed(7);
    for (int e = 0; e < 5; e++)
        for (int t = 0; t < 5; t++)
            for (int coarse = 0; coarse < 2; coarse++) {
                sida_top_call call = {ids, logp, logits, 9, experts[e], tops[t]};
                if (call.top > call.experts_total) continue;
                for (int i = 0; i < 9 * experts[e]; i++) {
                    float value = 3 * sida_rng_normal(&rng);
                    logits[i] = coarse ? rintf(value) : value; /* coarse: many ties */
                }
                assert_int_equal(sida_top_cpu(NULL, &call), SIDA_OK);
                for (int row = 0; row < 9; row++)
                    check_row(logits + row * call.experts_total, call.experts_total, call.top,
                              ids + row * call.top, logp + row * call.top);
            }
}

static void test_extremes(void **state) {
    (void)state;
    float logits[5][4] = {{-1e30f, 1e30f, 0, 1e5f},
                          {NAN, 1, 2, 3},
                          {1, 2, 3, INFINITY},
                          {1, 2, NAN, 3},
                          {0, -0.0f, -INFINITY, 0}};
    uint16_t ids[5 * 4], logp[5 * 4];
    const sida_top_call call = {ids, logp, &logits[0][0], 5, 4, 4};
    assert_int_equal(sida_top_cpu(NULL, &call), SIDA_OK);
    check_row(logits[0], 4, 4, ids, logp);
    assert_int_equal(ids[0], 1);
    assert_int_equal(logp[0], 0);      /* certain */
    assert_int_equal(logp[1], 0xfc00); /* further down than fp16 reaches */
    for (int row = 1; row < 4; row++)
        for (int r = 0; r < 4; r++) assert_int_equal(logp[row * 4 + r], SIDA_TOP_NOT_FINITE);
    const uint16_t order[] = {0, 1, 3, 2};
    assert_memory_equal(ids + 4 * 4, order, sizeof order);
    assert_int_equal(logp[4 * 4 + 3], 0xfc00);
    assert_int_equal(logp[4 * 4], sida_f16_from_f32(-logf(3)));
}

static void test_recording(void **state) {
    (void)state;
    static const char *const folders[] = {"base", "every-layer", "dense-decoder", "overflow"};
    for (int i = 0; i < 4; i++) {
        char folder[64];
        sida_backend *cpu;
        snprintf(folder, sizeof folder, "tests/parity/%s", folders[i]);
        RIG_OK(sida_backend_create_cpu(&cpu, &(sida_cpu_options){.poison = true}));
        rig_check(cpu, folder, 1 + i, 0);
        sida_backend_destroy(cpu);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_top), cmocka_unit_test(test_extremes),
                                       cmocka_unit_test(test_recording)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
