/* What training a Transformer computes on CUDA (transformer_train.h) against the formulas in double
 * precision (tests/attention_reference.h), and that every call gives the same bytes twice.
 *
 * Tolerances, of the norm: `tight` (op_case.h) where products are fp32; `coarse` for TF32, and
 * `fine` where what the rounded products give is subtracted: scores' gradients and what they make.
 * In fp32 the latter are within ten times `tight`. */
#include "tests/attention_reference.h"
#include "tests/gpu/op_case.h"

static const double coarse = 3e-3, fine = 1e-2;

enum { WIDTH = SIDA_ATTENTION_TRAIN_WIDTH, BUCKETS = SIDA_ATTENTION_TRAIN_BUCKETS };

static float *copy_of(const float *from, int64_t count) {
    float *to = host(count + 1);
    memcpy(to, from, (size_t)count * sizeof *to);
    return to;
}

static float *fetched(const float *device, int64_t count) {
    float *to = host(count + 1);
    get(to, device, (size_t)count * sizeof *to);
    return to;
}

/* --- the norm */

static void check_norm(int64_t n, int64_t width, bool input) {
    float *x = normal(n * width + 1, 2), *weight = normal(width, 1);
    float *d_x = normal(n * width + 1, 1), *d_weight = normal(width, 1);
    float *d_y = normal(n * width + 1, 1);
    for (int64_t c = 0; n > 3 && c < width; c++) x[3 * width + c] = 0; /* epsilon alone */
    sida_norm_train_call device = {.x = put_floats(x, n * width + 1),
                                   .weight = put_floats(weight, width),
                                   .n = n,
                                   .width = width,
                                   .epsilon = 1e-6f,
                                   .workspace = room(SIDA_COLUMN_SUM_BYTES(width))};
    OK(sida_zero_cuda(stream, device.workspace, SIDA_COLUMN_SUM_COUNTS));
    float *got[2][2];
    for (int time = 0; time < 2; time++) {
        float *to = put_floats(d_x, n * width + 1);
        device.d_x = input ? to : NULL;
        device.d_weight = put_floats(d_weight, width);
        device.d_y = put_floats(d_y, n * width + 1);
        OK(sida_norm_train_backward_cuda(stream, &device));
        got[time][0] = fetched(to, n * width);
        got[time][1] = fetched(device.d_weight, width);
    }
    assert_memory_equal(got[0][0], got[1][0], (size_t)(n * width) * sizeof(float));
    assert_memory_equal(got[0][1], got[1][1], (size_t)width * sizeof(float));
    sida_norm_train_call want = device;
    want.d_x = input ? d_x : NULL;
    want.d_weight = d_weight;
    want.d_y = d_y;
    want.x = x;
    want.weight = weight;
    reference_norm_backward(&want);
    char what[80];
    snprintf(what, sizeof what, "norm of %lld by %lld", (long long)n, (long long)width);
    expect_close(what, got[0][0], d_x, n * width, tight);
    expect_close(what, got[0][1], d_weight, width, tight);
    end_case();
}

static void test_norm(void **state) {
    (void)state;
    check_norm(1, 8, true);
    check_norm(0, 32, true);
    check_norm(5, 33, true);
    if (gpu_small()) return;
    check_norm(1000, 128, true);
    check_norm(1000, 256, false);
    check_norm(3001, 768, true);
}

/* --- attention */

typedef struct attention_case {
    int32_t sequences, q_longest, k_longest, heads, at_a_time;
    bool self, causal, positions, packed;
} attention_case;

/* Lengths on the host; rows packed as rnn.h has them where they fall, else end to end. */
typedef struct side {
    int32_t *start, *step, *count, longest;
    int64_t rows;
} side;

static int32_t *integers(int64_t count) {
    return (int32_t *)host(count + 1);
}

static side make_side(int32_t sequences, int32_t longest, bool packed) {
    side s = {integers(sequences), integers(longest), integers(sequences), longest, 0};
    for (int32_t i = 0; i < sequences; i++) {
        s.count[i] = i == 0   ? longest
                     : packed ? (int32_t)sida_rng_below(&rng, (uint32_t)s.count[i - 1]) + 1
                              : (int32_t)sida_rng_below(&rng, (uint32_t)longest + 1);
        s.start[i] = packed ? i : (int32_t)s.rows;
        s.rows += s.count[i];
    }
    for (int32_t t = 0, row = 0; t < longest; t++) {
        s.step[t] = packed ? row : t;
        for (int32_t i = 0; i < sequences; i++) row += s.count[i] > t;
    }
    return s;
}

static sida_row_map map_of(const side *s) {
    return (sida_row_map){s->start, s->step, s->count, s->longest};
}
static sida_row_map device_map(const side *s, int32_t sequences) {
    const size_t item = sizeof(int32_t);
    return (sida_row_map){put(s->start, (size_t)sequences * item),
                          put(s->step, (size_t)s->longest * item),
                          put(s->count, (size_t)sequences * item), s->longest};
}

static void check_attention(attention_case c) {
    const int64_t width = (int64_t)c.heads * WIDTH, table = (int64_t)BUCKETS * c.heads;
    const side q = make_side(c.sequences, c.q_longest, c.packed);
    /* A row of keys more than the maps name; it is not touched. */
    const side k = c.self ? q : make_side(c.sequences, c.k_longest, false);
    const int64_t q_items = q.rows * width, k_items = (k.rows + 1) * 2 * width;
    float *queries = normal(q_items + 1, 2), *key_value = normal(k_items, 1);
    float *positions = normal(table, 1), *d_out = normal(q_items + 1, 1);
    float *before_positions = normal(table, 1), *marks = normal(k_items, 1);
    sida_attention_train_call want = {.out = host(q_items + 1),
                                      .queries = queries,
                                      .key_value = key_value,
                                      .positions = c.positions ? positions : NULL,
                                      .q = map_of(&q),
                                      .k = map_of(&k),
                                      .sequences = c.sequences,
                                      .heads = c.heads,
                                      .causal = c.causal};
    float *d_queries = host(q_items + 1), *d_key_value = copy_of(marks, k_items);
    float *d_positions = copy_of(before_positions, table);
    reference_attention(NULL, NULL, NULL, NULL, &want);
    reference_attention(d_queries, d_key_value, d_positions, d_out, &want);
    sida_attention_train_call device = want;
    device.workspace_bytes =
        sida_attention_train_bytes(c.at_a_time, q.longest, k.longest, c.heads, true);
    device.workspace = room(device.workspace_bytes);
    device.queries = put_floats(queries, q_items + 1);
    device.key_value = put_floats(key_value, k_items);
    device.positions = c.positions ? put_floats(positions, table) : NULL;
    device.q = device_map(&q, c.sequences);
    device.k = c.self ? device.q : device_map(&k, c.sequences);
    char what[120], part[160];
    for (int tf32 = 0; tf32 < 2; tf32++) {
        float *first[4] = {0};
        device.tf32 = tf32;
        for (int time = 0; time < 2; time++) {
            device.out = room((size_t)(q_items + 1) * sizeof(float));
            float *gradient = put_floats(d_out, q_items + 1);
            /* The second time in d_out's place. */
            float *to = time ? gradient : room((size_t)(q_items + 1) * sizeof(float));
            float *to_keys = put_floats(marks, k_items);
            float *to_positions = put_floats(before_positions, table);
            OK(sida_attention_train_forward_cuda(stream, &device));
            OK(sida_attention_train_backward_cuda(stream, to, to_keys, to_positions, gradient,
                                                  &device));
            float *got[4] = {fetched(device.out, q_items), fetched(to, q_items),
                             fetched(to_keys, k_items), fetched(to_positions, table)};
            const int64_t items[4] = {q_items, q_items, k_items, table};
            const float *expected[4] = {want.out, d_queries, d_key_value, d_positions};
            static const char *const names[4] = {"out", "d queries", "d keys and values",
                                                 "d positions"};
            snprintf(what, sizeof what, "%d sequences of %d by %d, %d heads, %d %d %d %d%s",
                     c.sequences, q.longest, k.longest, c.heads, c.self, c.causal, c.positions,
                     c.packed, tf32 ? ", tf32" : "");
            for (int i = 0; i < 4; i++) {
                const double off = i == 0 ? (tf32 ? coarse : tight) : tf32 ? fine : 10 * tight;
                snprintf(part, sizeof part, "%s: %s", what, names[i]);
                expect_close(part, got[i], expected[i], items[i], off);
                if (time == 0)
                    first[i] = got[i];
                else
                    assert_memory_equal(got[i], first[i], (size_t)items[i] * sizeof(float));
            }
            if (!c.positions)
                assert_memory_equal(got[3], before_positions, (size_t)table * sizeof(float));
        }
    }
    end_case();
}

static void test_attention(void **state) {
    (void)state;
    check_attention((attention_case){1, 1, 1, 1, 1, true, false, true, false});
    check_attention((attention_case){7, 21, 21, 2, 7, true, false, true, true});
    check_attention((attention_case){7, 21, 21, 2, 3, true, true, true, true});
    if (gpu_small()) { /* a case of each kernel */
        static const int32_t keys[] = {40, 100, 200, 400, 600};
        for (int i = 0; i < 5; i++)
            check_attention((attention_case){2, 10, keys[i], 1, 2, false, false, false, true});
        return;
    }
    check_attention((attention_case){9, 60, 60, 4, 9, true, true, true, false});
    check_attention((attention_case){9, 9, 30, 2, 4, false, false, false, true});
    check_attention((attention_case){5, 40, 3, 1, 5, false, false, false, false});
    check_attention((attention_case){6, 130, 130, 3, 4, true, false, true, true}); /* far away */
    check_attention((attention_case){4, 200, 200, 8, 2, true, true, true, true});
    check_attention((attention_case){3, 512, 512, 2, 1, true, false, true, true});
    check_attention((attention_case){2, 700, 700, 1, 2, true, true, true, true}); /* not kept */
    check_attention((attention_case){2, 10, 600, 2, 2, false, false, false, true});
}

/* More blocks than a grid has in its second dimension. */
static void test_many_sequences(void **state) {
    (void)state;
    if (gpu_small()) skip(); /* only more of it */
    check_attention((attention_case){9000, 3, 3, 4, 9000, true, false, true, false});
}

static void test_small_workspace(void **state) {
    (void)state;
    int32_t *zeros = put((int32_t[2]){0, 0}, sizeof(int32_t[2]));
    float *rows = room(4096);
    sida_attention_train_call call = {.out = rows,
                                      .queries = rows,
                                      .key_value = rows,
                                      .q = {zeros, zeros, zeros, 2},
                                      .k = {zeros, zeros, zeros, 2},
                                      .sequences = 1,
                                      .heads = 1,
                                      .workspace = rows,
                                      .workspace_bytes = 64};
    assert_int_equal(sida_attention_train_forward_cuda(stream, &call), SIDA_ERROR_ARGUMENT);
    assert_non_null(strstr(sida_last_message(), "workspace"));
    call.sequences = 0;
    OK(sida_attention_train_forward_cuda(stream, &call));
    OK(sida_attention_train_backward_cuda(stream, rows, rows, NULL, rows, &call));
    end_case();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_norm), cmocka_unit_test(test_attention),
        cmocka_unit_test(test_many_sequences), cmocka_unit_test(test_small_workspace)};
    return run_op_tests(tests, sizeof tests / sizeof *tests);
}
