/* CUDA's attention and append against the CPU's on the same cases, and against themselves: the same
 * bytes twice, however the work is spread. */
#include "tests/gpu/op_case.h"

/* d_kv 32, 64 and 128 run on tensor cores with each operand as the sum of two bf16 numbers. A
 * product leaves out 2^-17 of itself at most; signs are random, so a score of 64 products is off by
 * some 1e-5 to 1e-4 of its terms' size, and a weight by as much. Expected is 1e-5, and twice that
 * with scores of tens; bf16 alone gives 1e-2. */
static const double split = 5e-5;

enum { MOST = 8, HEADS = 3, BUCKETS = 32, DISTANCE = 128 };
enum kind { ENCODER, DECODER, CROSS };

struct shape {
    int32_t sequences, q_count[MOST], k_count[MOST];
};

typedef struct attention_case {
    const struct shape *shape;
    enum kind kind;
    int32_t d_kv;
    sida_dtype bias_type;
    int32_t pad; /* of leading dimensions */
    float q_scale;
    double tolerance;
} attention_case;

static void check_attention(attention_case c) {
    const struct shape *shape = c.shape;
    const size_t starts = MOST * sizeof(int64_t), counts = MOST * sizeof(int32_t);
    int64_t q_start[MOST], k_start[MOST], rows = 0, keys = 0;
    int32_t position[MOST];
    for (int s = 0; s < shape->sequences; s++) {
        int32_t before = shape->k_count[s] - shape->q_count[s];
        q_start[s] = rows;
        k_start[s] = keys;
        position[s] = c.kind == DECODER && before > 0 ? before : 0;
        rows += shape->q_count[s];
        keys += shape->k_count[s];
    }
    const int64_t width = (int64_t)HEADS * c.d_kv, ld = width + c.pad;
    const size_t bytes = (size_t)(rows * ld) * sizeof(float);
    float *q = normal(rows * ld, c.q_scale), *k = normal(keys * ld, 1), *v = normal(keys * ld, 1);
    float *want = host(rows * ld), *got = host(rows * ld), *again = host(rows * ld);
    void *bias = stored(BUCKETS * HEADS, 1, c.bias_type);
    sida_attention_call call = {.out = room(bytes),
                                .q = put_floats(q, rows * ld),
                                .k = put_floats(k, keys * ld),
                                .v = put_floats(v, keys * ld),
                                .ldo = ld,
                                .ldq = ld,
                                .ldk = ld,
                                .ldv = ld,
                                .sequences = shape->sequences,
                                .heads = HEADS,
                                .d_kv = c.d_kv,
                                .rows = rows,
                                .q_start = put(q_start, starts),
                                .k_start = put(k_start, starts),
                                .q_count = put(shape->q_count, counts),
                                .k_count = put(shape->k_count, counts),
                                .q_position = c.kind == DECODER ? put(position, counts) : NULL,
                                .causal = c.kind == DECODER,
                                .bias_bidirectional = c.kind == ENCODER,
                                .bias_max_distance = DISTANCE};
    if (c.kind != CROSS)
        call.bias = (sida_weight){put(bias, BUCKETS * HEADS * sida_dtype_bytes(c.bias_type)),
                                  c.bias_type, BUCKETS, HEADS};
    OK(cuda()->attention(stream, &call));
    get(got, call.out, bytes);
    for (int64_t i = 0; i < rows; i++)
        for (int32_t d = 0; d < c.pad; d++) {
            uint32_t bits;
            memcpy(&bits, &got[i * ld + width + d], sizeof bits);
            assert_int_equal(bits, UINT32_MAX); /* as the device's memory begins */
        }
    call.rows = 1;
    call.out = room(bytes);
    OK(cuda()->attention(stream, &call));
    get(again, call.out, bytes);
    assert_memory_equal(got, again, bytes);
    /* In bf16: the same, rounded. */
    call.rows = 10 * rows;
    call.out = room(bytes);
    call.out_type = SIDA_BF16;
    OK(cuda()->attention(stream, &call));
    get(again, call.out, bytes / 2);
    const uint16_t *halves = (const uint16_t *)again;
    for (int64_t i = 0; i < rows * ld; i++)
        if (i % ld < width) assert_int_equal(halves[i], bf16_of(got[i]));
    call.out = want;
    call.out_type = SIDA_F32;
    call.q = q;
    call.k = k;
    call.v = v;
    call.q_start = q_start;
    call.k_start = k_start;
    call.q_count = shape->q_count;
    call.k_count = shape->k_count;
    call.q_position = c.kind == DECODER ? position : NULL;
    if (c.kind != CROSS) call.bias.data = bias;
    OK(sida_attention_cpu(NULL, &call));
    for (int64_t i = 0; i < rows; i++)
        for (int32_t d = 0; d < c.pad; d++) got[i * ld + width + d] = want[i * ld + width + d] = 0;
    char what[120];
    snprintf(what, sizeof what, "attention kind %d d_kv %d pad %d, first %d x %d", c.kind, c.d_kv,
             c.pad, shape->q_count[0], shape->k_count[0]);
    expect_close(what, got, want, rows * ld, c.tolerance);
    end_case();
}

/* Ragged: none, one, tiles of 16 and 32 and beside them; a query alone; more keys than queries. */
static const struct shape few = {5, {5, 0, 1, 17, 3}, {5, 3, 1, 40, 0}};
static const struct shape edges = {8, {16, 17, 1, 33, 0, 15, 32, 1}, {16, 17, 1, 33, 2, 47, 64, 0}};
static const struct shape one_query = {7, {1, 1, 1, 1, 1, 1, 2}, {1, 15, 17, 31, 32, 33, 300}};
static const struct shape sentence = {1, {25}, {25}};
static const struct shape two = {2, {60, 25}, {60, 129}};
static const struct shape long_one = {1, {300}, {300}};
static const struct shape fewer_keys = {2, {40, 3}, {9, 2}};

static void test_attention_any(void **state) {
    (void)state;
    static const int32_t widths[] = {8, 20, 200};
    for (int w = 0; w < 3; w++)
        for (int kind = 0; kind < 3; kind++)
            check_attention((attention_case){&few, (enum kind)kind, widths[w],
                                             (sida_dtype)((w + kind) % 3), w, 0.3f, tight});
    /* Rows that are not aligned, and more than one turn of a block. */
    check_attention((attention_case){&two, ENCODER, 64, SIDA_F32, 1, 0.3f, tight});
    check_attention((attention_case){&edges, DECODER, 128, SIDA_BF16, 3, 0.3f, tight});
}

static void test_attention_tiles(void **state) {
    (void)state;
    static const struct shape *const shapes[] = {&few, &edges, &one_query, &sentence, &two};
    for (int32_t d_kv = 32; d_kv <= 128; d_kv *= 2)
        for (int s = 0; s < 5; s += gpu_step(2))
            for (int kind = 0; kind < 3; kind++)
                check_attention((attention_case){shapes[s], (enum kind)kind, d_kv,
                                                 (sida_dtype)((s + kind) % 3), s % 2 * 8, 0.3f,
                                                 split});
    for (int32_t d_kv = 32; d_kv <= 128; d_kv *= 2) {
        check_attention((attention_case){&fewer_keys, CROSS, d_kv, SIDA_F32, 0, 0.3f, split});
        /* Scores like T5's: tens. */
        check_attention((attention_case){&two, ENCODER, d_kv, SIDA_F32, 0, 2, 2 * split});
    }
    if (gpu_small()) return;
    check_attention((attention_case){&long_one, ENCODER, 64, SIDA_BF16, 0, 0.3f, split});
    check_attention((attention_case){&long_one, DECODER, 64, SIDA_F32, 4, 0.3f, split});
}

/* Every distance falls into the CPU's bucket: the bias alone decides. */
static void check_buckets(int32_t d_kv, int32_t length, int32_t buckets, int32_t distance,
                          bool both) {
    const int64_t start = 0, count = (int64_t)length * d_kv;
    float *zeros = host(count), *v = normal(count, 1), *want = host(count), *got = host(count);
    float *bias = normal(buckets, 1), *out = room((size_t)count * sizeof *got);
    sida_attention_call call = {.out = out,
                                .q = put_floats(zeros, count),
                                .k = put_floats(zeros, count),
                                .v = put_floats(v, count),
                                .ldo = d_kv,
                                .ldq = d_kv,
                                .ldk = d_kv,
                                .ldv = d_kv,
                                .sequences = 1,
                                .heads = 1,
                                .d_kv = d_kv,
                                .rows = length,
                                .q_start = put(&start, sizeof start),
                                .k_start = put(&start, sizeof start),
                                .q_count = put(&length, sizeof length),
                                .k_count = put(&length, sizeof length),
                                .bias_bidirectional = both,
                                .bias_max_distance = distance,
                                .bias = {put_floats(bias, buckets), SIDA_F32, buckets, 1}};
    OK(cuda()->attention(stream, &call));
    get(got, out, (size_t)count * sizeof *got);
    call.out = want;
    call.q = call.k = zeros;
    call.v = v;
    call.q_start = call.k_start = &start;
    call.q_count = call.k_count = &length;
    call.bias.data = bias;
    OK(sida_attention_cpu(NULL, &call));
    expect_close("buckets", got, want, count, d_kv == 64 ? split : tight);
    end_case();
}

static void test_buckets(void **state) {
    (void)state;
    static const int32_t cases[][2] = {{32, 128}, {8, 20}, {64, 4096}, {256, 300}};
    for (int c = 0; c < 4; c += gpu_step(3))
        for (int both = 0; both < 2; both++) {
            check_buckets(1, 150, cases[c][0], cases[c][1], both);
            check_buckets(64, 150, cases[c][0], cases[c][1], both);
        }
    if (!gpu_small()) check_buckets(64, 320, 256, 300, true);
}

static void check_append(int32_t heads, int32_t d_kv, int32_t pad) {
    enum { SEQUENCES = 4, POSITIONS = 9 };
    static const int64_t start[SEQUENCES] = {0, POSITIONS, 2 * POSITIONS, 3 * POSITIONS};
    static const int64_t q_start[SEQUENCES] = {0, 1, 1, 6};
    static const int32_t q_count[SEQUENCES] = {1, 0, 5, 2}, position[SEQUENCES] = {3, 2, 4, 0};
    const int64_t width = (int64_t)heads * d_kv, ld = width + pad, rows = 8;
    const int64_t cached = SEQUENCES * POSITIONS * width;
    const size_t bytes = (size_t)cached * sizeof(float);
    float *k = normal(rows * ld, 1), *v = normal(rows * ld, 1), *got = host(cached);
    float *k_cache = normal(cached, 1), *v_cache = normal(cached, 1);
    sida_append_call call = {.k_cache = put_floats(k_cache, cached),
                             .v_cache = put_floats(v_cache, cached),
                             .k = put_floats(k, rows * ld),
                             .v = put_floats(v, rows * ld),
                             .width = width,
                             .ld = ld,
                             .sequences = SEQUENCES,
                             .rows = rows,
                             .q_start = put(q_start, sizeof q_start),
                             .start = put(start, sizeof start),
                             .q_count = put(q_count, sizeof q_count),
                             .position = put(position, sizeof position)};
    OK(cuda()->append(stream, &call));
    const sida_append_call on_host = {.k_cache = k_cache,
                                      .v_cache = v_cache,
                                      .k = k,
                                      .v = v,
                                      .width = width,
                                      .ld = ld,
                                      .sequences = SEQUENCES,
                                      .rows = rows,
                                      .q_start = q_start,
                                      .start = start,
                                      .q_count = q_count,
                                      .position = position};
    OK(sida_append_cpu(NULL, &on_host));
    get(got, call.k_cache, bytes);
    assert_memory_equal(got, k_cache, bytes);
    get(got, call.v_cache, bytes);
    assert_memory_equal(got, v_cache, bytes);
    end_case();
}

static void test_append(void **state) {
    (void)state;
    check_append(12, 64, 0);
    check_append(12, 64, 24 * 64);
    check_append(3, 20, 0);
    check_append(3, 20, 2);
    check_append(3, 5, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_append),
        cmocka_unit_test(test_attention_any),
        cmocka_unit_test(test_attention_tiles),
        cmocka_unit_test(test_buckets),
    };
    return run_op_tests(tests, sizeof tests / sizeof *tests);
}
