/* Dispatch by hand and against a loop that looks at every pair; experts over ranges of its rows. */
#include "formats/base/memory.h"
#include "formats/base/rng.h"
#include "runtime/ops/ops.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MOST = 400, MOST_EXPERTS = 40, UNWRITTEN = 0x5a };

typedef struct outcome {
    uint8_t dropped[MOST];
    int32_t rows[MOST];
    int64_t row_start[MOST_EXPERTS + 1];
    int32_t busy[MOST_EXPERTS], busy_count;
} outcome;

static void dispatch(outcome *out, const int32_t *experts, int64_t n, int32_t k,
                     const int64_t *offsets, int32_t sequences, int32_t total, int32_t capacity) {
    memset(out, UNWRITTEN, sizeof *out);
    const sida_dispatch_call call = {.dropped = out->dropped,
                                     .rows = out->rows,
                                     .row_start = out->row_start,
                                     .busy = out->busy,
                                     .busy_count = &out->busy_count,
                                     .experts = experts,
                                     .offsets = offsets,
                                     .n = n,
                                     .k = k,
                                     .sequences = sequences,
                                     .experts_total = total,
                                     .capacity = capacity};
    assert_int_equal(sida_dispatch_cpu(NULL, &call), SIDA_OK);
    int32_t busy = 0;
    for (int32_t e = 0; e < total; e++)
        if (out->row_start[e + 1] > out->row_start[e]) assert_int_equal(out->busy[busy++], e);
    assert_int_equal(out->busy_count, busy);
}

static void test_by_hand(void **state) {
    (void)state;
    static const int32_t experts[] = {0, 1, 0, 0, 1, /**/ 0, 0, 0};
    static const int64_t offsets[] = {0, 5, 5, 8};
    outcome out;
    dispatch(&out, experts, 8, 1, offsets, 3, 3, 2);
    static const uint8_t dropped[] = {0, 0, 0, 1, 0, /**/ 0, 0, 1};
    static const int32_t rows[] = {0, 2, 5, 6, 1, 4};
    static const int64_t starts[] = {0, 4, 6, 6};
    assert_memory_equal(out.dropped, dropped, sizeof dropped);
    assert_memory_equal(out.rows, rows, sizeof rows);
    assert_memory_equal(out.row_start, starts, sizeof starts);
    assert_int_equal(out.rows[6], 0x5a5a5a5a);
    /* No limit. */
    dispatch(&out, experts, 8, 1, offsets, 3, 3, 0);
    static const uint8_t none[8] = {0};
    static const int32_t all[] = {0, 2, 3, 5, 6, 7, 1, 4};
    static const int64_t all_starts[] = {0, 6, 8, 8};
    assert_memory_equal(out.dropped, none, sizeof none);
    assert_memory_equal(out.rows, all, sizeof all);
    assert_memory_equal(out.row_start, all_starts, sizeof all_starts);
}

static void test_two_choices(void **state) {
    (void)state;
    static const int32_t experts[] = {3, 0, /**/ 0, 1, /**/ 1, 3};
    static const int64_t offsets[] = {0, 3};
    static const int32_t rows[] = {1, 2, 3, 4, 0, 5};
    static const int64_t starts[] = {0, 2, 4, 4, 6};
    outcome out;
    dispatch(&out, experts, 3, 2, offsets, 1, 4, 0);
    assert_memory_equal(out.rows, rows, sizeof rows);
    assert_memory_equal(out.row_start, starts, sizeof starts);
}

static void test_nothing(void **state) {
    (void)state;
    static const int64_t offsets[] = {0, 0, 0}, starts[6] = {0};
    outcome out;
    for (int32_t capacity = 0; capacity < 2; capacity++) {
        dispatch(&out, NULL, 0, 1, offsets, 2, 5, capacity);
        assert_memory_equal(out.row_start, starts, sizeof starts);
    }
}

/* All but one of a sequence is dropped. */
static void test_one_expert(void **state) {
    (void)state;
    static const int32_t experts[7] = {0};
    static const int64_t offsets[] = {0, 0, 4, 7}, starts[] = {0, 2};
    static const uint8_t dropped[] = {0, 1, 1, 1, /**/ 0, 1, 1};
    static const int32_t rows[] = {0, 4};
    outcome out;
    dispatch(&out, experts, 7, 1, offsets, 3, 1, 1);
    assert_memory_equal(out.dropped, dropped, sizeof dropped);
    assert_memory_equal(out.rows, rows, sizeof rows);
    assert_memory_equal(out.row_start, starts, sizeof starts);
}

/* Choices of the same expert before t in t's sequence. */
static int32_t earlier(const int32_t *experts, int64_t begin, int64_t t) {
    int32_t count = 0;
    for (int64_t i = begin; i < t; i++) count += experts[i] == experts[t];
    return count;
}

static void check_random(sida_rng *rng, int32_t k, int32_t total, int32_t capacity) {
    int32_t experts[MOST], sequences = 1 + (int32_t)sida_rng_below(rng, 8);
    int64_t offsets[9] = {0}, n = 0, at = 0;
    for (int32_t s = 0; s < sequences; s++) {
        n += sida_rng_below(rng, 3) ? (int64_t)sida_rng_below(rng, (uint32_t)(MOST / k / 8)) : 0;
        offsets[s + 1] = n;
    }
    for (int64_t t = 0; t < n; t++)
        for (int32_t r = 0; r < k; r++)
            experts[t * k + r] =
                r ? (experts[t * k] + r) % total : (int32_t)sida_rng_below(rng, (uint32_t)total);
    outcome out;
    dispatch(&out, experts, n, k, offsets, sequences, total, capacity);
    for (int32_t s = 0; s < sequences; s++)
        for (int64_t t = offsets[s]; t < offsets[s + 1]; t++)
            assert_int_equal(out.dropped[t],
                             capacity > 0 && earlier(experts, offsets[s], t) >= capacity);
    for (int32_t e = 0; e < total; e++) {
        assert_int_equal(out.row_start[e], at);
        for (int64_t row = 0; row < n * k; row++)
            if (experts[row] == e && !out.dropped[row / k]) assert_int_equal(out.rows[at++], row);
    }
    assert_int_equal(out.row_start[total], at);
}

static void test_random(void **state) {
    (void)state;
    sida_rng rng = sida_rng_seed(3);
    for (int round = 0; round < 300; round++) {
        int32_t total = 3 + (int32_t)sida_rng_below(&rng, MOST_EXPERTS - 3);
        check_random(&rng, 1, total, (int32_t)sida_rng_below(&rng, 6));
        check_random(&rng, 1 + round % 3, total, 0);
    }
}

/* --- the expert op over ranges of what dispatch made */

static float *random_floats(sida_rng *rng, int64_t count) {
    float *values = NULL;
    assert_int_equal(SIDA_ALLOC(&values, count, "test"), SIDA_OK);
    for (int64_t i = 0; i < count; i++) values[i] = sida_rng_normal(rng);
    return values;
}

/* All experts at once, one at a time, and a scattered wave give the same bytes; rows of experts
 * that are not in a wave stay as they are. */
static void check_ranges(bool gated) {
    enum { N = 60, K = 2, E = 9, D = 11, FF = 21 };
    const sida_expert_shape shape = {D, FF, gated, gated ? SIDA_ACT_SILU : SIDA_ACT_RELU, SIDA_F32};
    static const int64_t offsets[] = {0, N};
    static const int32_t order[E] = {8, 2, 5, 0, 1, 7, 3, 6, 4};
    sida_rng rng = sida_rng_seed(9);
    int32_t experts[N * K];
    outcome out;
    /* Expert 4 gets nothing. */
    for (int i = 0; i < N * K; i++) {
        int32_t e = i % 2 ? experts[i - 1] + 1 : (int32_t)sida_rng_below(&rng, 8);
        experts[i] = e % E == 4 ? 6 + i % 2 : e % E;
        if (i % 2 && experts[i] == experts[i - 1]) experts[i] = 0;
    }
    dispatch(&out, experts, N, K, offsets, 1, E, 0);
    assert_int_equal(out.row_start[4], out.row_start[5]);
    const void *weights[E], *shuffled[E];
    float *x = random_floats(&rng, N * D), *whole = random_floats(&rng, N * K * D);
    float *waves = random_floats(&rng, N * K * D), *blank = random_floats(&rng, N * K * D);
    float *workspace =
        random_floats(&rng, (int64_t)sida_expert_workspace_floats(&shape, (int64_t)N * K));
    for (int e = 0; e < E; e++)
        weights[e] = e == 4 ? NULL : random_floats(&rng, (int64_t)sida_expert_bytes(&shape) / 4);
    for (int i = 0; i < E; i++) shuffled[i] = weights[order[i]];
    sida_expert_call call = {.scratch = whole,
                             .x = x,
                             .k = K,
                             .shape = shape,
                             .count = E,
                             .weights = weights,
                             .row_start = out.row_start,
                             .rows = out.rows,
                             .rows_total = (int64_t)N * K,
                             .workspace = workspace};
    assert_int_equal(sida_expert_cpu(NULL, &call), SIDA_OK);
    memcpy(waves, blank, sizeof(float) * N * K * D);
    call.scratch = waves;
    call.weights = shuffled;
    call.ids = order;
    call.count = 3;
    assert_int_equal(sida_expert_cpu(NULL, &call), SIDA_OK);
    for (int row = 0; row < N * K; row++) {
        int32_t e = experts[row];
        const float *want = (e == 8 || e == 2 || e == 5 ? whole : blank) + row * D;
        assert_memory_equal(waves + row * D, want, D * sizeof *want);
    }
    call.count = 1;
    for (int i = 3; i < E; i++) {
        call.weights = shuffled + i;
        call.ids = order + i;
        assert_int_equal(sida_expert_cpu(NULL, &call), SIDA_OK);
    }
    assert_memory_equal(waves, whole, sizeof(float) * N * K * D);
    for (int e = 0; e < E; e++) free((void *)(uintptr_t)weights[e]);
    free(x);
    free(whole);
    free(waves);
    free(blank);
    free(workspace);
}

static void test_ranges(void **state) {
    (void)state;
    check_ranges(false);
    check_ranges(true);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_by_hand), cmocka_unit_test(test_two_choices),
        cmocka_unit_test(test_nothing), cmocka_unit_test(test_one_expert),
        cmocka_unit_test(test_random),  cmocka_unit_test(test_ranges),
    };
    return cmocka_run_group_tests_name("dispatch", tests, NULL, NULL);
}
