/* SparseMax, and the choice of experts. */
#include "tests/test.h"

#include "formats/base/rng.h"
#include "runtime/ops/cpu_kernels.h"
#include "runtime/ops/sparsemax.h"
#include "runtime/predictor/select.h"

#include <float.h>
#include <math.h>
#include <string.h>

static void sparsemax_known(void **state) {
    (void)state;
    static const struct {
        int n;
        float z[4], p[4];
    } cases[] = {{1, {-7}, {1}},
                 {2, {0, 0}, {0.5f, 0.5f}},
                 {2, {3, 1}, {1, 0}},
                 {3, {0.5f, 0, 0.5f}, {0.5f, 0, 0.5f}},
                 {3, {1, 0.5f, -2}, {0.75f, 0.25f, 0}},
                 {4, {1e6f, 1e6f, 1e6f, 1e6f}, {0.25f, 0.25f, 0.25f, 0.25f}},
                 {4, {-1e30f, 1e30f, 0, 1}, {0, 1, 0, 0}}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float p[4], scratch[4];
        sida_sparsemax(p, cases[i].z, cases[i].n, scratch);
        for (int k = 0; k < cases[i].n; k++) assert_true(p[k] == cases[i].p[k]);
    }
    float p[2], scratch[2], z[2] = {1, NAN};
    sida_sparsemax(p, z, 2, scratch);
    assert_true(isnan(p[0]) || isnan(p[1]));
}

/* What defines the projection: on the simplex, and z - p is the same on the support and no larger
 * off it. */
static void sparsemax_random(void **state) {
    (void)state;
    sida_rng rng = sida_rng_seed(4);
    for (int round = 0; round < 500; round++) {
        float z[40], p[40], scratch[40];
        int n = 1 + (int)sida_rng_below(&rng, 40);
        float scale = 0.01f * (float)(1 + round);
        for (int i = 0; i < n; i++) z[i] = scale * sida_rng_normal(&rng);
        if (n > 3) z[2] = z[0]; /* a tie */
        sida_sparsemax(p, z, n, scratch);
        double sum = 0, threshold = -INFINITY, low = INFINITY;
        for (int i = 0; i < n; i++) {
            assert_true(p[i] >= 0);
            sum += (double)p[i];
            if (p[i] > 0) {
                threshold = fmax(threshold, (double)z[i] - (double)p[i]);
                low = fmin(low, (double)z[i] - (double)p[i]);
            }
        }
        /* One rounding of z - top each, of values up to `scale` times a few. */
        double bound = 1e-6 * (1 + 4 * (double)scale);
        assert_true(fabs(sum - 1) < 40 * bound && threshold - low < bound);
        for (int i = 0; i < n; i++)
            if (p[i] == 0) assert_true((double)z[i] <= threshold + bound);
        memcpy(scratch, z, sizeof scratch);
        sida_sparsemax(z, z, n, scratch); /* in place */
        assert_memory_equal(z, p, (size_t)n * sizeof *p);
    }
}

static void select_ties(void **state) {
    (void)state;
    enum { many = 40 };
    sida_hash_table table = {0};
    uint64_t scratch[many];
    const float scores[6] = {1, 3, 3, -0.0f, 0, 3};
    static const uint16_t expected[6] = {1, 2, 5, 0, 3, 4};
    for (int k = 1; k <= 6; k++) {
        assert_int_equal(sida_hash_table_reserve(&table, 0, 1, k, 1), SIDA_OK);
        assert_true(sida_select_logits(&table, 0, 0, scores, 6, scratch));
        assert_memory_equal(table.experts, expected, (size_t)k * sizeof *expected);
        double sum = 3 + 2 * exp(-3.0) + exp(-2.0);
        assert_true(fabs((double)table.alpha[0] - 1 / sum) < 1e-6);
    }
    float sum = 0;
    for (int i = 0; i < 6; i++) sum += table.alpha[i];
    assert_true(fabsf(sum - 1) < 1e-6f);

    /* Few and many chosen agree with each other. */
    sida_rng rng = sida_rng_seed(3);
    float values[many];
    for (int i = 0; i < many; i++) values[i] = (float)sida_rng_below(&rng, 12);
    uint16_t all[many];
    assert_int_equal(sida_hash_table_reserve(&table, 0, 1, many, 1), SIDA_OK);
    assert_true(sida_select_logits(&table, 0, 0, values, many, scratch));
    memcpy(all, table.experts, sizeof all);
    for (int i = 1; i < many; i++)
        assert_true(values[all[i - 1]] > values[all[i]] ||
                    (values[all[i - 1]] == values[all[i]] && all[i - 1] < all[i]));
    for (int k = 1; k < many; k++) {
        assert_int_equal(sida_hash_table_reserve(&table, 0, 1, k, 1), SIDA_OK);
        assert_true(sida_select_logits(&table, 0, 0, values, many, scratch));
        assert_memory_equal(table.experts, all, (size_t)k * sizeof *all);
    }
    values[7] = NAN;
    assert_false(sida_select_logits(&table, 0, 0, values, many, scratch));
    sida_hash_table_free(&table);
}

enum { MOST = 2100 };

/* The naive choice: whoever comes before has a higher score, or the same and a lower id. */
static void check_selected(const sida_hash_table *table, const float *scores, int32_t experts) {
    double sum = 0;
    float top = scores[0];
    for (int32_t e = 1; e < experts; e++) top = scores[e] > top ? scores[e] : top;
    for (int32_t e = 0; e < experts; e++) sum += exp((double)scores[e] - (double)top);
    for (int32_t e = 0; e < experts; e++) {
        int32_t before = 0;
        for (int32_t i = 0; i < experts; i++)
            before += scores[i] > scores[e] || (scores[i] == scores[e] && i < e);
        if (before >= table->k) continue;
        assert_int_equal(table->experts[before], e);
        double share = exp((double)scores[e] - (double)top) / sum;
        assert_true(fabs((double)table->alpha[before] - share) < 1e-5 * share + 1e-12);
    }
}

/* Every number of experts around the widths of all vectors, each with few chosen, about as many as
 * are chosen another way, and all; scores with and without ties. */
static void select_naive(void **state) {
    (void)state;
    static const int32_t wide[] = {511, 512, 2047, 2048, 2049, MOST};
    static const int32_t ks[] = {1, 2, 3, 5, 8, 31, 32, 33};
    static float scores[MOST];
    static uint64_t scratch[MOST];
    sida_hash_table table = {0};
    sida_rng rng = sida_rng_seed(11);
    for (int set = 0; sida_cpu_kernels_at(set); set++) {
        sida_cpu_kernels_force(sida_cpu_kernels_at(set));
        for (int32_t at = 1; at <= 257 + (int32_t)(sizeof wide / sizeof *wide); at++) {
            const int32_t experts = at <= 257 ? at : wide[at - 258];
            for (size_t i = 0; i <= sizeof ks / sizeof *ks; i++) {
                const int32_t k = i == sizeof ks / sizeof *ks ? experts : ks[i];
                if (k > experts) continue;
                for (int32_t e = 0; e < experts; e++) {
                    scores[e] = sida_rng_normal(&rng) * 3;
                    if (i % 2) scores[e] = truncf(scores[e]); /* 0 and -0 are among them */
                }
                assert_int_equal(sida_hash_table_reserve(&table, 0, 1, k, 1), SIDA_OK);
                assert_true(sida_select_logits(&table, 0, 0, scores, experts, scratch));
                check_selected(&table, scores, experts);
            }
            /* Wherever the odd one stands. */
            static const float odd[] = {NAN, INFINITY, -INFINITY};
            const int32_t where = (int32_t)sida_rng_below(&rng, (uint32_t)experts);
            scores[at % 2 ? where : experts - 1] = odd[at % 3];
            assert_int_equal(sida_hash_table_reserve(&table, 0, 1, 1, 1), SIDA_OK);
            assert_false(sida_select_logits(&table, 0, 0, scores, experts, scratch));
        }
        /* The largest and the smallest there are. */
        const float far[5] = {-FLT_MAX, FLT_MAX, 0, FLT_MAX, -FLT_MAX};
        assert_int_equal(sida_hash_table_reserve(&table, 0, 1, 5, 1), SIDA_OK);
        assert_true(sida_select_logits(&table, 0, 0, far, 5, scratch));
        static const uint16_t order[5] = {1, 3, 2, 0, 4};
        assert_memory_equal(table.experts, order, sizeof order);
    }
    sida_cpu_kernels_force(NULL);
    sida_hash_table_free(&table);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sparsemax_known), cmocka_unit_test(sparsemax_random),
        cmocka_unit_test(select_ties), cmocka_unit_test(select_naive)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
