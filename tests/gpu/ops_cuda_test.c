/* Each CUDA op but the products against the CPU op on the same cases, and against itself: the same
 * bytes twice. */
#include "tests/gpu/op_case.h"

static void test_rows(void **state) {
    (void)state;
    static const int64_t counts[] = {1, 2, 9, 33, 300}, widths[] = {24, 100, 768};
    for (int dtype = SIDA_F32; dtype <= SIDA_BF16; dtype++)
        for (int c = 0; c < 5; c++)
            for (int w = 0; w < 3; w++) {
                int64_t n = counts[c], d = widths[w], words = 50;
                size_t bytes = (size_t)(n * d) * sizeof(float);
                size_t size = sida_dtype_bytes((sida_dtype)dtype);
                float *x = normal(n * d, 3), *want = host(n * d), *got = host(n * d);
                float *out = room(bytes);
                void *weight = stored(d, 1, (sida_dtype)dtype);
                sida_weight on = {put(weight, (size_t)d * size), (sida_dtype)dtype, 1, d};
                OK(cuda()->rms_norm(stream, out, SIDA_F32, put_floats(x, n * d), on, n, 1e-6f));
                get(got, out, bytes);
                on.data = weight;
                OK(sida_rms_norm_cpu(NULL, want, SIDA_F32, x, on, n, 1e-6f));
                expect_close("norm", got, want, n * d, tight);

                int32_t *ids = (int32_t *)host(n);
                for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)sida_rng_below(&rng, 50);
                void *table = stored(words * d, 1, (sida_dtype)dtype);
                on = (sida_weight){put(table, (size_t)(words * d) * size), (sida_dtype)dtype, words,
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

enum { SEQUENCES = 5, HEADS = 3, BUCKETS = 32, DISTANCE = 128 };

static void check_attention(int32_t d_kv, int kind, sida_dtype dtype) {
    static const int32_t q_count[SEQUENCES] = {29, 0, 1, 53, 300};
    static const int32_t k_count[SEQUENCES] = {29, 3, 1, 280, 300};
    int32_t position[SEQUENCES];
    int64_t width = (int64_t)HEADS * d_kv, rows = 0, keys = 0;
    int64_t q_start[SEQUENCES], k_start[SEQUENCES];
    for (int s = 0; s < SEQUENCES; s++) {
        q_start[s] = rows;
        k_start[s] = keys;
        position[s] = kind == 1 ? k_count[s] - q_count[s] : 0;
        rows += q_count[s];
        keys += k_count[s];
    }
    float *q = normal(rows * width, 0.3f), *k = normal(keys * width, 1);
    float *v = normal(keys * width, 1), *want = host(rows * width), *got = host(rows * width);
    void *bias = stored(BUCKETS * HEADS, 1, dtype);
    size_t bytes = (size_t)(rows * width) * sizeof(float);
    float *out = room(bytes);
    sida_attention_call call = {
        .out = out,
        .q = put_floats(q, rows * width),
        .k = put_floats(k, keys * width),
        .v = put_floats(v, keys * width),
        .ldo = width,
        .ldq = width,
        .ldk = width,
        .ldv = width,
        .sequences = SEQUENCES,
        .heads = HEADS,
        .d_kv = d_kv,
        .rows = rows,
        .q_start = put(q_start, sizeof q_start),
        .k_start = put(k_start, sizeof k_start),
        .q_count = put(q_count, sizeof q_count),
        .k_count = put(k_count, sizeof k_count),
        .q_position = kind == 1 ? put(position, sizeof position) : NULL,
        .causal = kind == 1,
        .bias_bidirectional = kind == 0,
        .bias_max_distance = DISTANCE,
    };
    if (kind < 2)
        call.bias = (sida_weight){put(bias, BUCKETS * HEADS * sida_dtype_bytes(dtype)), dtype,
                                  BUCKETS, HEADS};
    OK(cuda()->attention(stream, &call));
    get(got, out, bytes);
    /* However the work is spread. */
    float *again = host(rows * width);
    call.rows = 1;
    OK(cuda()->attention(stream, &call));
    get(again, out, bytes);
    assert_memory_equal(got, again, bytes);
    call.out = want;
    call.q = q;
    call.k = k;
    call.v = v;
    call.q_start = q_start;
    call.k_start = k_start;
    call.q_count = q_count;
    call.k_count = k_count;
    call.q_position = kind == 1 ? position : NULL;
    if (kind < 2) call.bias.data = bias;
    OK(sida_attention_cpu(NULL, &call));
    char what[80];
    snprintf(what, sizeof what, "attention d_kv %d kind %d", d_kv, kind);
    expect_close(what, got, want, rows * width, tight);
    end_case();
}

static void test_attention(void **state) {
    (void)state;
    static const int32_t widths[] = {8, 20, 64, 128, 200};
    for (int w = 0; w < 5; w++)
        for (int kind = 0; kind < 3; kind++)
            check_attention(widths[w], kind, (sida_dtype)((w + kind) % 3));
}

/* Every distance falls into the CPU's bucket: one query a distance, the bias alone decides. */
static void test_buckets(void **state) {
    (void)state;
    static const int32_t cases[][2] = {{32, 128}, {8, 20}, {64, 4096}, {256, 300}};
    enum { LENGTH = 400 };
    for (int c = 0; c < 4; c++)
        for (int both = 0; both < 2; both++) {
            const int32_t count = LENGTH, buckets = cases[c][0];
            const int64_t start = 0;
            float *zeros = host(LENGTH), *v = normal(LENGTH, 1), *want = host(LENGTH);
            float *got = host(LENGTH), *bias = normal(buckets, 1), *out = room(LENGTH * 4);
            sida_attention_call call = {.out = out,
                                        .q = put_floats(zeros, LENGTH),
                                        .k = put_floats(zeros, LENGTH),
                                        .v = put_floats(v, LENGTH),
                                        .ldo = 1,
                                        .ldq = 1,
                                        .ldk = 1,
                                        .ldv = 1,
                                        .sequences = 1,
                                        .heads = 1,
                                        .d_kv = 1,
                                        .rows = LENGTH,
                                        .q_start = put(&start, sizeof start),
                                        .k_start = put(&start, sizeof start),
                                        .q_count = put(&count, sizeof count),
                                        .k_count = put(&count, sizeof count),
                                        .bias_bidirectional = both,
                                        .bias_max_distance = cases[c][1],
                                        .bias = {put_floats(bias, buckets), SIDA_F32, buckets, 1}};
            OK(cuda()->attention(stream, &call));
            get(got, out, LENGTH * sizeof *got);
            call.out = want;
            call.q = call.k = zeros;
            call.v = v;
            call.q_start = call.k_start = &start;
            call.q_count = call.k_count = &count;
            call.bias.data = bias;
            OK(sida_attention_cpu(NULL, &call));
            expect_close("buckets", got, want, LENGTH, tight);
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
    static const int32_t totals[] = {5, 64, 300};
    for (int c = 0; c < 5; c++)
        for (int e = 0; e < 3; e++)
            for (int32_t k = 1; k <= 3; k++)
                for (int kind = 0; kind < 4; kind++)
                    check_router(counts[c], totals[e], k, kind % 2, kind / 2);
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
    end_case();
}

static void test_dispatch(void **state) {
    (void)state;
    static const int64_t counts[] = {0, 1, 31, 32, 33, 300, 5000};
    static const int32_t totals[] = {1, 8, 64, 256}, capacities[] = {0, 1, 64};
    for (int c = 0; c < 7; c++)
        for (int e = 0; e < 4; e++)
            for (int kind = 0; kind < 6; kind++) {
                for (int cuts = 0; cuts <= 9; cuts += 3)
                    check_dispatch(counts[c], totals[e], capacities[kind % 3], 1, cuts, kind / 3);
                if (totals[e] > 1)
                    check_dispatch(counts[c], totals[e], 0, 2 + kind % 2, 3, kind / 3);
            }
    check_dispatch(20000, 2048, 64, 1, 9, false);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows),     cmocka_unit_test(test_attention),
        cmocka_unit_test(test_buckets),  cmocka_unit_test(test_router),
        cmocka_unit_test(test_dispatch),
    };
    return run_op_tests(tests, sizeof tests / sizeof *tests);
}
