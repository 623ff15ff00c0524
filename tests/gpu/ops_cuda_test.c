/* Each CUDA op but products and attention against the CPU op on the same cases. */
#include "tests/gpu/op_case.h"

/* In fp32, and the same rounded to bf16. */
static void check_norm(int64_t n, int64_t d, sida_dtype dtype) {
    const size_t bytes = (size_t)(n * d) * sizeof(float);
    float *x = normal(n * d, 3), *want = host(n * d), *got = host(n * d);
    void *weight = stored(d, 1, dtype), *out = room(bytes);
    sida_weight on = {put(weight, (size_t)d * sida_dtype_bytes(dtype)), dtype, 1, d};
    const float *from = put_floats(x, n * d);
    OK(cuda()->rms_norm(stream, out, SIDA_F32, from, on, n, 1e-6f));
    get(got, out, bytes);
    uint16_t *halves = (uint16_t *)host(n * d);
    OK(cuda()->rms_norm(stream, out, SIDA_BF16, from, on, n, 1e-6f));
    get(halves, out, bytes / 2);
    for (int64_t i = 0; i < n * d; i++) assert_int_equal(halves[i], bf16_of(got[i]));
    on.data = weight;
    OK(sida_rms_norm_cpu(NULL, want, SIDA_F32, x, on, n, 1e-6f));
    expect_close("norm", got, want, n * d, tight);
    end_case();
}

static void test_norm(void **state) {
    (void)state;
    /* A warp's, a block's, and what does not fit or is not aligned. */
    static const int64_t widths[] = {4, 24, 27, 768, 1024, 1028, 4096, 4100};
    for (int dtype = SIDA_F32; dtype <= SIDA_BF16; dtype++)
        for (int w = 0; w < 8; w++) {
            if (gpu_small() && w != 1 && w < 6) continue; /* 24, 4096, 4100 */
            check_norm(1, widths[w], (sida_dtype)dtype);
            check_norm(25, widths[w], (sida_dtype)dtype);
        }
    if (!gpu_small()) check_norm(300, 768, SIDA_BF16);
}

static void test_rows(void **state) {
    (void)state;
    static const int64_t counts[] = {1, 33, 300}, widths[] = {24, 27, 768};
    for (int dtype = SIDA_F32; dtype <= SIDA_BF16; dtype++)
        for (int c = 0; c < gpu_cases(3, 2); c++)
            for (int w = 0; w < 3; w++) {
                int64_t n = counts[c], d = widths[w], words = 50;
                size_t bytes = (size_t)(n * d) * sizeof(float);
                size_t size = sida_dtype_bytes((sida_dtype)dtype);
                float *x = normal(n * d, 3), *want = host(n * d), *got = host(n * d);
                float *out = room(bytes);
                int32_t *ids = (int32_t *)host(n);
                for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)sida_rng_below(&rng, 50);
                void *table = stored(words * d, 1, (sida_dtype)dtype);
                sida_weight on = {put(table, (size_t)(words * d) * size), (sida_dtype)dtype, words,
                                  d};
                OK(cuda()->embedding(stream, out, on, put(ids, (size_t)n * sizeof *ids), n));
                get(got, out, bytes);
                on.data = table;
                OK(sida_embedding_cpu(NULL, want, on, ids, n));
                assert_memory_equal(got, want, bytes);

                float *up = normal(n * d, 1);
                sida_activation act = (sida_activation)dtype; /* three of each */
                OK(cuda()->gated(stream, out, put_floats(x, n * d), put_floats(up, n * d), n * d,
                                 act));
                get(got, out, bytes);
                OK(sida_gated_cpu(NULL, want, x, up, n * d, act));
                expect_close("gate", got, want, n * d, tight);
                end_case();
            }
}

static void check_router(int64_t n, int32_t total, int32_t k, bool renormalise, bool guided) {
    enum { SETS = 3 };
    float *logits = host(n * total), *alpha = host(n * k), *got_alpha = host(n * k);
    int32_t *experts = (int32_t *)host(n * k), *got = (int32_t *)host(n * k);
    int32_t *set_of = (int32_t *)host(n);
    uint8_t *allowed = (uint8_t *)host(SETS * total);
    /* Steps of a half: many ties; some zeros of either sign. */
    for (int64_t i = 0; i < n * total; i++) {
        logits[i] = roundf(4 * sida_rng_normal(&rng)) / 2;
        if (logits[i] == 0 && sida_rng_below(&rng, 2)) logits[i] = -0.0f;
    }
    for (int32_t i = 0; i < SETS * total; i++) allowed[i] = sida_rng_below(&rng, 3) == 0;
    for (int32_t s = 0; s < SETS; s++)
        for (int32_t r = 0; r < k; r++) allowed[s * total + total - 1 - r] = 1;
    for (int64_t i = 0; i < n; i++) set_of[i] = (int32_t)sida_rng_below(&rng, SETS);
    size_t choices = (size_t)(n * k);
    sida_router_call call = {.experts = room(choices * sizeof *experts),
                             .alpha = room(choices * sizeof *alpha),
                             .logits = put_floats(logits, n * total),
                             .n = n,
                             .experts_total = total,
                             .k = k,
                             .renormalise = renormalise};
    if (guided) {
        call.allowed = put(allowed, (size_t)(SETS * total));
        call.set_of = put(set_of, (size_t)n * sizeof *set_of);
    }
    OK(cuda()->router(stream, &call));
    get(got, call.experts, choices * sizeof *experts);
    get(got_alpha, call.alpha, choices * sizeof *alpha);
    call.experts = experts;
    call.alpha = alpha;
    call.logits = logits;
    if (guided) {
        call.allowed = allowed;
        call.set_of = set_of;
    }
    OK(sida_router_cpu(NULL, &call));
    for (int64_t i = 0; i < n * k; i++) assert_int_equal(got[i], experts[i]);
    expect_close("alpha", got_alpha, alpha, n * k, tight);
    end_case();
}

static void test_router(void **state) {
    (void)state;
    static const int64_t counts[] = {1, 2, 7, 33, 300};
    static const int32_t totals[] = {5, 64, 300, 600};
    for (int c = 0; c < 5; c += gpu_step(3))
        for (int e = 0; e < 4; e++)
            for (int32_t k = 1; k <= 3; k += gpu_step(2))
                for (int kind = 0; kind < 4; kind++)
                    check_router(counts[c], totals[e], k, kind % 2, kind / 2);
    check_router(3, 100, 70, true, false);
    check_router(3, 100, 33, false, false);
    /* NaN still gives experts that exist, and different ones. */
    float *nan = host(70);
    for (int i = 0; i < 70; i++) nan[i] = NAN;
    int32_t experts[2];
    sida_router_call call = {.experts = room(sizeof experts),
                             .alpha = room(sizeof experts),
                             .logits = put_floats(nan, 70),
                             .n = 1,
                             .experts_total = 70,
                             .k = 2};
    OK(cuda()->router(stream, &call));
    get(experts, call.experts, sizeof experts);
    assert_true(experts[0] >= 0 && experts[0] < 70 && experts[1] >= 0 && experts[1] < 70);
    assert_true(experts[0] != experts[1]);
    end_case();
}

/* skew: most choices are of expert 0. */
static void check_dispatch(int64_t n, int32_t total, int32_t capacity, int32_t k, int cuts,
                           bool skew) {
    enum { MOST_CUTS = 9 };
    int64_t offsets[MOST_CUTS + 2] = {0};
    size_t rows = (size_t)(n * k), starts = (size_t)total + 1;
    int32_t *experts = (int32_t *)host(n * k + 1), *want_rows = (int32_t *)host(n * k + 1);
    int32_t *got_rows = (int32_t *)host(n * k + 1);
    uint8_t *want_dropped = (uint8_t *)host(n + 1), *got_dropped = (uint8_t *)host(n + 1);
    int64_t *want_start = (int64_t *)host(2 * (int64_t)starts);
    int64_t *got_start = (int64_t *)host(2 * (int64_t)starts);
    for (int64_t t = 0; t < n; t++)
        for (int32_t r = 0; r < k; r++) {
            int32_t e = (int32_t)sida_rng_below(&rng, (uint32_t)total);
            if (skew && sida_rng_below(&rng, 4)) e = 0;
            experts[t * k + r] = r ? (experts[t * k] + r) % total : e;
        }
    /* Some sequences are empty, the first and the last too. */
    for (int i = 1; i < cuts; i++) offsets[i + 1] = n * (i / 2) * 2 / cuts;
    offsets[cuts + 1] = n;
    if (cuts > 2) offsets[cuts] = n;
    sida_dispatch_call call = {.dropped = room((size_t)n + 1),
                               .rows = room((rows + 1) * sizeof *experts),
                               .row_start = room(starts * sizeof *want_start),
                               .busy = room((size_t)total * sizeof(int32_t)),
                               .busy_count = room(sizeof(int32_t)),
                               .experts = put(experts, (rows + 1) * sizeof *experts),
                               .offsets = put(offsets, sizeof offsets),
                               .n = n,
                               .k = k,
                               .sequences = cuts + 1,
                               .experts_total = total,
                               .capacity = capacity};
    OK(cuda()->dispatch(stream, &call));
    get(got_dropped, call.dropped, (size_t)n);
    get(got_rows, call.rows, rows * sizeof *got_rows);
    get(got_start, call.row_start, starts * sizeof *got_start);
    int32_t *got_busy = (int32_t *)host(total), got_busy_count;
    get(got_busy, call.busy, (size_t)total * sizeof *got_busy);
    get(&got_busy_count, call.busy_count, sizeof got_busy_count);
    call.dropped = want_dropped;
    call.rows = want_rows;
    call.row_start = want_start;
    call.busy = (int32_t *)host(total);
    call.busy_count = (int32_t *)host(1);
    call.experts = experts;
    call.offsets = offsets;
    OK(sida_dispatch_cpu(NULL, &call));
    assert_memory_equal(got_start, want_start, starts * sizeof *got_start);
    if (n > 0) assert_memory_equal(got_dropped, want_dropped, (size_t)n);
    size_t kept = (size_t)want_start[total];
    if (kept > 0) assert_memory_equal(got_rows, want_rows, kept * sizeof *got_rows);
    assert_int_equal(got_busy_count, *call.busy_count);
    if (got_busy_count > 0)
        assert_memory_equal(got_busy, call.busy, (size_t)got_busy_count * sizeof *got_busy);
    end_case();
}

static void test_dispatch(void **state) {
    (void)state;
    static const int64_t counts[] = {0, 1, 31, 32, 33, 300};
    static const int32_t totals[] = {1, 8, 64, 256}, capacities[] = {0, 1, 64};
    for (int c = 0; c < 6; c += gpu_step(5)) /* none and the most */
        for (int e = 0; e < 4; e++)
            for (int kind = 0; kind < 6; kind += gpu_step(2)) {
                for (int cuts = 0; cuts <= 9; cuts += 3)
                    check_dispatch(counts[c], totals[e], capacities[kind % 3], 1, cuts, kind / 3);
                if (totals[e] > 1)
                    check_dispatch(counts[c], totals[e], 0, 2 + kind % 2, 3, kind / 3);
            }
    /* Up to what one block does, and beyond. */
    for (int skew = 0; skew < 2; skew++) {
        check_dispatch(2048, 512, 64, 1, 3, skew);
        check_dispatch(1024, 256, 0, 2, 3, skew);
        check_dispatch(2049, 64, 64, 1, 3, skew);
        check_dispatch(1025, 64, 0, 2, 3, skew);
        check_dispatch(300, 513, 1, 1, 6, skew);
    }
    check_dispatch(5000, 1500, 2, 1, 9, false);
}

/* The outputs of the router and of dispatch, end to end. */
typedef struct routed {
    int32_t *experts, *rows, *busy, *busy_count;
    float *alpha;
    int64_t *row_start;
    uint8_t *dropped;
} routed;

static routed routed_create(int64_t n, int32_t k, int32_t total) {
    const size_t choices = (size_t)(n * k) * 4, experts = (size_t)total * 4;
    return (routed){room(choices), room(choices),           room(experts),  room(4),
                    room(choices), room(2 * (experts + 4)), room((size_t)n)};
}

static void expect_same(const void *a, const void *b, size_t bytes) {
    if (bytes == 0) return;
    void *left = host((int64_t)(bytes + 3) / 4), *right = host((int64_t)(bytes + 3) / 4);
    get(left, a, bytes);
    get(right, b, bytes);
    assert_memory_equal(left, right, bytes);
}

/* Route gives the bytes of the router and then dispatch. */
static void check_route(int64_t n, int32_t total, int32_t k, int32_t capacity, int kind) {
    enum { SETS = 2, SEQUENCES = 4 };
    float *logits = host(n * total);
    int32_t *set_of = (int32_t *)host(n);
    uint8_t *allowed = (uint8_t *)host(SETS * total);
    const int64_t offsets[SEQUENCES + 1] = {0, n / 8, n / 8, n - n / 5, n};
    /* Some experts are better than others, and there are ties. */
    for (int64_t i = 0; i < n * total; i++)
        logits[i] = roundf(4 * sida_rng_normal(&rng)) / 4 + (i % total % 7 == 0 ? 2 : 0);
    for (int32_t i = 0; i < SETS * total; i++)
        allowed[i] = sida_rng_below(&rng, 3) == 0 || i % total < k;
    for (int64_t i = 0; i < n; i++) set_of[i] = (int32_t)sida_rng_below(&rng, SETS);
    const routed one = routed_create(n, k, total), two = routed_create(n, k, total);
    sida_router_call router = {.logits = put_floats(logits, n * total),
                               .experts = one.experts,
                               .alpha = one.alpha,
                               .n = n,
                               .experts_total = total,
                               .k = k,
                               .renormalise = kind % 2};
    if (kind / 2) {
        router.allowed = put(allowed, (size_t)(SETS * total));
        router.set_of = put(set_of, (size_t)n * sizeof *set_of);
    }
    sida_dispatch_call dispatch = {.dropped = one.dropped,
                                   .rows = one.rows,
                                   .row_start = one.row_start,
                                   .busy = one.busy,
                                   .busy_count = one.busy_count,
                                   .experts = one.experts,
                                   .offsets = put(offsets, sizeof offsets),
                                   .n = n,
                                   .k = k,
                                   .sequences = SEQUENCES,
                                   .experts_total = total,
                                   .capacity = capacity};
    OK(cuda()->route(stream, &router, &dispatch));
    router.experts = two.experts;
    router.alpha = two.alpha;
    dispatch.dropped = two.dropped;
    dispatch.rows = two.rows;
    dispatch.row_start = two.row_start;
    dispatch.busy = two.busy;
    dispatch.busy_count = two.busy_count;
    dispatch.experts = two.experts;
    OK(cuda()->router(stream, &router));
    OK(cuda()->dispatch(stream, &dispatch));
    const size_t choices = (size_t)(n * k) * 4;
    expect_same(one.experts, two.experts, choices);
    expect_same(one.alpha, two.alpha, choices);
    expect_same(one.dropped, two.dropped, (size_t)n);
    expect_same(one.row_start, two.row_start, ((size_t)total + 1) * sizeof *one.row_start);
    expect_same(one.busy_count, two.busy_count, sizeof *one.busy_count);
    int32_t busy;
    int64_t kept;
    get(&busy, one.busy_count, sizeof busy);
    get(&kept, one.row_start + total, sizeof kept);
    assert_true(busy > 0 && busy <= total && kept > 0 && kept <= n * k);
    expect_same(one.busy, two.busy, (size_t)busy * sizeof busy);
    expect_same(one.rows, two.rows, (size_t)kept * sizeof *one.rows);
    end_case();
}

static void test_route(void **state) {
    (void)state;
    static const int64_t counts[] = {1, 25, 33, 60, 96, 97};
    static const int32_t totals[] = {5, 128, 130, 512, 600};
    for (int c = 0; c < 6; c += gpu_step(2))
        for (int e = 0; e < 5; e += gpu_step(2))
            for (int kind = 0; kind < 4; kind += gpu_step(3)) {
                check_route(counts[c], totals[e], 1, kind ? 2 : 64, kind);
                check_route(counts[c], totals[e], 2 + kind % 2, 0, kind);
            }
    check_route(60, 256, 40, 0, 0); /* too many rows for one block */
    check_route(5, 256, 70, 0, 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_norm),   cmocka_unit_test(test_rows),
        cmocka_unit_test(test_router), cmocka_unit_test(test_dispatch),
        cmocka_unit_test(test_route),
    };
    return run_op_tests(tests, sizeof tests / sizeof *tests);
}
