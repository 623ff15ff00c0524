/* Attention, norm, gate, router, combine and embedding against plain double loops. */
#include "formats/base/memory.h"
#include "formats/base/rng.h"
#include "runtime/ops/cpu_kernels.h"
#include "runtime/ops/ops.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static float *random_floats(sida_rng *rng, int64_t count) {
    float *values = NULL;
    assert_int_equal(SIDA_ALLOC(&values, count, "test"), SIDA_OK);
    for (int64_t i = 0; i < count; i++) values[i] = sida_rng_normal(rng);
    return values;
}

/* fp32 sums of a few hundred terms of order one: 1e-5 leaves room, a wrong key is of order one. */
static void expect_near(float got, double want) {
    if (!(fabs((double)got - want) <= 1e-5 * (1 + fabs(want))))
        fail_msg("%.9g, expected %.9g", (double)got, want);
}

static void test_relative_bucket(void **state) {
    (void)state;
    /* From T5: 16 buckets a direction, half of them exact. */
    static const int32_t both[][2] = {{0, 0},   {-1, 1},  {-7, 7},   {-8, 8},     {-127, 15},
                                      {1, 17},  {7, 23},  {8, 24},   {11, 24},    {12, 25},
                                      {16, 26}, {64, 30}, {128, 31}, {100000, 31}};
    for (size_t i = 0; i < sizeof both / sizeof *both; i++)
        assert_int_equal(sida_relative_bucket(both[i][0], true, 32, 128), both[i][1]);
    static const int32_t back[][2] = {{5, 0},     {0, 0},           {-1, 1},   {-15, 15},
                                      {-16, 16},  {-18, 16},        {-19, 17}, {-127, 31},
                                      {-128, 31}, {-2000000000, 31}};
    for (size_t i = 0; i < sizeof back / sizeof *back; i++)
        assert_int_equal(sida_relative_bucket(back[i][0], false, 32, 128), back[i][1]);
}

enum { SEQUENCES = 4, HEADS = 3, MOST_KEYS = 300, BUCKETS = 32, DISTANCE = 128 };

static double score(const sida_attention_call *call, int s, int head, int i, int j) {
    double sum = 0;
    const float *q = call->q + (call->q_start[s] + i) * call->ldq + head * call->d_kv;
    const float *k = call->k + (call->k_start[s] + j) * call->ldk + head * call->d_kv;
    for (int d = 0; d < call->d_kv; d++) sum += (double)q[d] * (double)k[d];
    int position = i + (call->q_position ? call->q_position[s] : 0);
    if (call->causal && j > position) return -INFINITY;
    if (call->bias.data) {
        int32_t bucket = sida_relative_bucket(j - position, call->bias_bidirectional, BUCKETS,
                                              call->bias_max_distance);
        sum += (double)((const float *)call->bias.data)[bucket * call->heads + head];
    }
    return sum;
}

static void check_attention(const sida_attention_call *call) {
    static double p[MOST_KEYS];
    for (int s = 0; s < call->sequences; s++)
        for (int head = 0; head < call->heads; head++)
            for (int i = 0; i < call->q_count[s]; i++) {
                double high = -INFINITY, total = 0;
                for (int j = 0; j < call->k_count[s]; j++) {
                    p[j] = score(call, s, head, i, j);
                    high = p[j] > high ? p[j] : high;
                }
                for (int j = 0; j < call->k_count[s]; j++) total += p[j] = exp(p[j] - high);
                for (int d = 0; d < call->d_kv; d++) {
                    double want = 0;
                    for (int j = 0; j < call->k_count[s]; j++)
                        want +=
                            p[j] / total *
                            (double)
                                call->v[(call->k_start[s] + j) * call->ldv + head * call->d_kv + d];
                    int64_t at = (call->q_start[s] + i) * call->ldo + head * call->d_kv + d;
                    expect_near(((const float *)call->out)[at], want);
                }
            }
}

/* Ragged sequences (none, one, past a block of keys), every kind of attention, d_kv with and
 * without a remainder; a sequence alone gives the same bytes. */
static void test_attention(void **state) {
    (void)state;
    static const int32_t widths[] = {64, 8, 20};
    for (int set = 0; sida_cpu_kernels_at(set); set++)
        for (int variant = 0; variant < 9; variant++) {
            sida_cpu_kernels_force(sida_cpu_kernels_at(set));
            sida_rng rng = sida_rng_seed(5);
            int32_t d_kv = widths[variant % 3], kind = variant / 3;
            int64_t width = (int64_t)HEADS * d_kv, rows = 0, keys = 0;
            int32_t q_count[SEQUENCES] = {29, 0, 1, 53};
            int32_t k_count[SEQUENCES] = {29, 3, 1, 280}, position[SEQUENCES];
            int64_t q_start[SEQUENCES], k_start[SEQUENCES];
            for (int s = 0; s < SEQUENCES; s++) {
                q_start[s] = rows;
                k_start[s] = keys;
                position[s] = kind == 1 ? k_count[s] - q_count[s] : 0;
                rows += q_count[s];
                keys += k_count[s];
            }
            float *q = random_floats(&rng, rows * width), *k = random_floats(&rng, keys * width);
            float *v = random_floats(&rng, keys * width);
            float *bias = random_floats(&rng, BUCKETS * HEADS);
            float *out = random_floats(&rng, rows * width);
            float *alone = random_floats(&rng, rows * width);
            for (int64_t i = 0; i < rows * width; i++) q[i] *= 0.3f;
            sida_attention_call call = {.out = out,
                                        .q = q,
                                        .k = k,
                                        .v = v,
                                        .ldo = width,
                                        .ldq = width,
                                        .ldk = width,
                                        .ldv = width,
                                        .sequences = SEQUENCES,
                                        .heads = HEADS,
                                        .d_kv = d_kv,
                                        .q_start = q_start,
                                        .k_start = k_start,
                                        .q_count = q_count,
                                        .k_count = k_count,
                                        .q_position = position,
                                        .causal = kind == 1,
                                        .bias_bidirectional = kind == 0,
                                        .bias_max_distance = DISTANCE};
            if (kind < 2) call.bias = (sida_weight){bias, SIDA_F32, BUCKETS, HEADS};
            assert_int_equal(sida_attention_cpu(NULL, &call), SIDA_OK);
            check_attention(&call);
            call.sequences = 1;
            call.out = alone;
            for (int s = 0; s < SEQUENCES; s++) {
                call.q_start = q_start + s;
                call.k_start = k_start + s;
                call.q_count = q_count + s;
                call.k_count = k_count + s;
                call.q_position = position + s;
                assert_int_equal(sida_attention_cpu(NULL, &call), SIDA_OK);
            }
            assert_memory_equal(alone, out, (size_t)(rows * width) * sizeof *out);
            free(q);
            free(k);
            free(v);
            free(bias);
            free(out);
            free(alone);
        }
    sida_cpu_kernels_force(NULL);
}

static void test_attention_refuses(void **state) {
    (void)state;
    sida_attention_call call = {.d_kv = 257, .heads = 1};
    assert_int_equal(sida_attention_cpu(NULL, &call), SIDA_ERROR_UNSUPPORTED);
}

/* One row, none, two; the rest of the caches stays as it was. */
static void test_append(void **state) {
    (void)state;
    enum { CACHES = 3, POSITIONS = 4, WIDTH = 2, LD = 3, ROWS = 3 };
    static const int64_t start[CACHES] = {0, POSITIONS, 2 * POSITIONS};
    static const int64_t q_start[CACHES] = {0, 1, 1};
    static const int32_t q_count[CACHES] = {1, 0, 2}, position[CACHES] = {3, 1, 0};
    static const float k[ROWS * LD] = {1, 2, -9, 3, 4, -9, 5, 6, -9};
    static const float v[ROWS * LD] = {10, 20, -9, 30, 40, -9, 50, 60, -9};
    float keys[CACHES * POSITIONS * WIDTH] = {0}, values[CACHES * POSITIONS * WIDTH] = {0};
    const sida_append_call call = {.k_cache = keys,
                                   .v_cache = values,
                                   .k = k,
                                   .v = v,
                                   .width = WIDTH,
                                   .ld = LD,
                                   .sequences = CACHES,
                                   .rows = ROWS,
                                   .q_start = q_start,
                                   .start = start,
                                   .q_count = q_count,
                                   .position = position};
    assert_int_equal(sida_append_cpu(NULL, &call), SIDA_OK);
    static const float want[CACHES * POSITIONS * WIDTH] = {
        0, 0, 0, 0, 0, 0, 1, 2, /**/ 0, 0, 0, 0, 0, 0, 0, 0, /**/ 3, 4, 5, 6, 0, 0, 0, 0};
    assert_memory_equal(keys, want, sizeof want);
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) assert_true(values[i] == 10 * want[i]);
}

static void test_rms_norm(void **state) {
    (void)state;
    sida_rng rng = sida_rng_seed(1);
    enum { N = 37, WIDTH = 51 };
    float *x = random_floats(&rng, N * WIDTH), *w = random_floats(&rng, WIDTH);
    float *out = random_floats(&rng, N * WIDTH);
    for (int set = 0; sida_cpu_kernels_at(set); set++) {
        sida_cpu_kernels_force(sida_cpu_kernels_at(set));
        sida_rms_norm_cpu(NULL, out, SIDA_F32, x, (sida_weight){w, SIDA_F32, 1, WIDTH}, N, 1e-6f);
        for (int i = 0; i < N; i++) {
            double squares = 0;
            for (int d = 0; d < WIDTH; d++) squares += pow((double)x[i * WIDTH + d], 2);
            for (int d = 0; d < WIDTH; d++)
                expect_near(out[i * WIDTH + d],
                            (double)w[d] * (double)x[i * WIDTH + d] / sqrt(squares / WIDTH + 1e-6));
        }
    }
    sida_cpu_kernels_force(NULL);
    free(x);
    free(w);
    free(out);
}

static double activated(double x, sida_activation activation) {
    if (activation == SIDA_ACT_RELU) return x > 0 ? x : 0;
    if (activation == SIDA_ACT_SILU) return x / (1 + exp(-x));
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

static void test_gated(void **state) {
    (void)state;
    enum { COUNT = 999 };
    float gate[COUNT], up[COUNT], out[COUNT];
    for (int i = 0; i < COUNT; i++) {
        gate[i] = (float)(i - 500) * 0.25f;
        up[i] = i % 2 ? 1.0f : -0.5f;
    }
    for (int set = 0; sida_cpu_kernels_at(set); set++) {
        sida_cpu_kernels_force(sida_cpu_kernels_at(set));
        for (int a = 0; a < 3; a++) {
            sida_gated_cpu(NULL, out, gate, up, COUNT, (sida_activation)a);
            for (int i = 0; i < COUNT; i++)
                expect_near(out[i], activated((double)gate[i], (sida_activation)a) * (double)up[i]);
        }
    }
    sida_cpu_kernels_force(NULL);
}

/* 2 ulp over the whole range, by every instruction set. */
static void test_exp(void **state) {
    (void)state;
    for (int set = 0; sida_cpu_kernels_at(set); set++) {
        const sida_cpu_kernels *kernels = sida_cpu_kernels_at(set);
        for (float x = -87.0f; x <= 88.0f; x += 0.00371f) {
            double want = exp((double)x);
            assert_true(fabs((double)kernels->exp_one(x) - want) <= want * 0x1p-22);
        }
        assert_true(kernels->exp_one(0.0f) == 1.0f);
        assert_true(kernels->exp_one(-INFINITY) == 0.0f);
        assert_true(isnan(kernels->exp_one(NAN)));
    }
}

static void test_router(void **state) {
    (void)state;
    enum { N = 3, E = 5, K = 2 };
    static const float logits[N * E] = {1, 3, 3, 0, 2, /**/ -1, -1, -1, -1, -1, /**/ 0, 1, 2, 3, 4};
    int32_t experts[N * K];
    float alpha[N * K];
    sida_router_call call = {
        .experts = experts, .alpha = alpha, .logits = logits, .n = N, .experts_total = E, .k = K};
    assert_int_equal(sida_router_cpu(NULL, &call), SIDA_OK);
    static const int32_t want[N * K] = {1, 2, 0, 1, 4, 3};
    assert_memory_equal(experts, want, sizeof want);
    double sum = exp(-2) + 2 + exp(-3) + exp(-1);
    expect_near(alpha[0], 1 / sum);
    expect_near(alpha[1], 1 / sum);
    expect_near(alpha[2], 0.2);
    call.renormalise = true;
    assert_int_equal(sida_router_cpu(NULL, &call), SIDA_OK);
    expect_near(alpha[0], 0.5);
    expect_near(alpha[4], 1 / (1 + exp(-1)));
    /* Guided: the best of a set, α over all. */
    static const uint8_t allowed[2 * E] = {1, 1, 1, 1, 1, /**/ 1, 0, 0, 1, 0};
    static const int32_t set_of[N] = {0, 1, 1};
    call.renormalise = false;
    call.allowed = allowed;
    call.set_of = set_of;
    call.k = 1;
    assert_int_equal(sida_router_cpu(NULL, &call), SIDA_OK);
    static const int32_t guided[N] = {1, 0, 3};
    assert_memory_equal(experts, guided, sizeof guided);
    expect_near(alpha[0], 1 / sum);
    expect_near(alpha[2], exp(-1) / (1 + exp(-1) + exp(-2) + exp(-3) + exp(-4)));
}

static void test_combine(void **state) {
    (void)state;
    enum { N = 3, K = 2, WIDTH = 19 };
    sida_rng rng = sida_rng_seed(2);
    float *h = random_floats(&rng, N * WIDTH), *scratch = random_floats(&rng, N * K * WIDTH);
    static const float alpha[N * K] = {0.5f, 0.25f, 1, 1, 2, -1};
    static const uint8_t dropped[N] = {0, 1, 0};
    double want[N * WIDTH];
    for (int t = 0; t < N; t++)
        for (int d = 0; d < WIDTH; d++) {
            want[t * WIDTH + d] = (double)h[t * WIDTH + d];
            for (int r = 0; r < K && !dropped[t]; r++)
                want[t * WIDTH + d] +=
                    (double)alpha[t * K + r] * (double)scratch[(t * K + r) * WIDTH + d];
        }
    /* A dropped token's rows are not read. */
    for (int d = 0; d < K * WIDTH; d++) scratch[K * WIDTH + d] = NAN;
    assert_int_equal(sida_combine_cpu(NULL, h, scratch, alpha, dropped, N, K, WIDTH), SIDA_OK);
    for (int i = 0; i < N * WIDTH; i++) expect_near(h[i], want[i]);
    free(h);
    free(scratch);
}

static void test_embedding(void **state) {
    (void)state;
    static const float wide[] = {1, 2, 3, 4, 5, 6};
    static const uint16_t bf16[] = {0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0};
    static const uint16_t f16[] = {0x3c00, 0x4000, 0x4200, 0x4400, 0x4500, 0x4600};
    const void *tables[] = {wide, f16, bf16};
    static const int32_t ids[] = {2, 0, 2};
    static const float want[] = {5, 6, 1, 2, 5, 6};
    for (int dtype = 0; dtype < 3; dtype++) {
        float out[6];
        sida_weight table = {tables[dtype], (sida_dtype)dtype, 3, 2};
        assert_int_equal(sida_embedding_cpu(NULL, out, table, ids, 3), SIDA_OK);
        assert_memory_equal(out, want, sizeof want);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_relative_bucket),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_attention_refuses),
        cmocka_unit_test(test_append),
        cmocka_unit_test(test_rms_norm),
        cmocka_unit_test(test_gated),
        cmocka_unit_test(test_exp),
        cmocka_unit_test(test_router),
        cmocka_unit_test(test_combine),
        cmocka_unit_test(test_embedding),
    };
    return cmocka_run_group_tests_name("ops", tests, NULL, NULL);
}
