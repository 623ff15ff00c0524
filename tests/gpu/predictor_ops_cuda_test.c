/* CUDA's LSTM and SparseMax attention against the CPU's on the same cases, and against themselves:
 * a sequence gives the same bytes alone, in a batch and step by step.
 *
 * `tight` serves both. An LSTM's gates are bounded and its sums, of up to 320 terms, differ in
 * order and in the last bits of exp; the recurrence shrinks errors with weights of this size.
 * SparseMax is a projection, so probabilities are off by no more than the scores are. */
#include "tests/gpu/op_case.h"

enum { MOST = 24 };

/* --- lstm */

typedef struct lstm_case {
    int32_t hidden, sequences, lengths[MOST];
    bool shifted; /* weights that are not aligned */
    /* From the last token to the first, into rows of outputs that are longer than need be. */
    bool reverse;
} lstm_case;

/* Everything that a call writes, on the host. */
typedef struct lstm_result {
    float *out, *gates, *cells, *state_h, *state_c;
} lstm_result;

static lstm_result lstm_room(int64_t n, int32_t sequences, int32_t hidden) {
    return (lstm_result){host(n * hidden + 1), host(4 * n * hidden + 1), host(n * hidden + 1),
                         host((int64_t)sequences * hidden), host((int64_t)sequences * hidden)};
}

/* One call on the device; to's state is its state before and after. */
typedef struct lstm_device {
    sida_lstm_call call;
    int64_t *offsets;
    float *state_h, *state_c;
} lstm_device;

static void lstm_run(const lstm_device *device, lstm_result to, const float *gates,
                     const int64_t *offsets, int32_t sequences, bool state) {
    sida_lstm_call call = device->call;
    const size_t row = (size_t)call.hidden * sizeof(float), rows = (size_t)offsets[sequences];
    const size_t states = (size_t)sequences * row;
    const size_t out_items = rows * (size_t)(call.ldo ? call.ldo : call.hidden);
    float *out = malloc((out_items + 1) * sizeof *out);
    assert_non_null(out);
    for (size_t i = 0; i < out_items; i++) out[i] = 7;
    call.sequences = sequences;
    call.offsets = device->offsets;
    if (rows) OK(sida_copy(stream, call.out, out, out_items * sizeof *out));
    OK(sida_copy(stream, device->offsets, offsets, ((size_t)sequences + 1) * sizeof *offsets));
    if (rows) OK(sida_copy(stream, call.gates, gates, 4 * rows * row));
    if (state) {
        call.state_h = device->state_h;
        call.state_c = device->state_c;
        OK(sida_copy(stream, call.state_h, to.state_h, states));
        OK(sida_copy(stream, call.state_c, to.state_c, states));
    }
    OK(cuda()->lstm(stream, &call));
    if (rows) {
        get(out, call.out, out_items * sizeof *out);
        for (size_t i = 0; i < out_items; i++) {
            const size_t width = out_items / rows, column = i % width;
            if (column < (size_t)call.hidden)
                to.out[i / width * (size_t)call.hidden + column] = out[i];
            else
                assert_true(out[i] == 7);
        }
        get(to.gates, call.gates, 4 * rows * row);
        get(to.cells, call.cells, rows * row);
    }
    if (state) {
        get(to.state_h, call.state_h, states);
        get(to.state_c, call.state_c, states);
    }
    OK(sida_stream_synchronize(stream));
    free(out);
}

static void expect_rows(const lstm_result *got, int64_t from, const lstm_result *want, int64_t at,
                        int64_t rows, int32_t hidden) {
    const size_t bytes = (size_t)(rows * hidden) * sizeof(float);
    assert_memory_equal(got->out + from * hidden, want->out + at * hidden, bytes);
    assert_memory_equal(got->cells + from * hidden, want->cells + at * hidden, bytes);
    assert_memory_equal(got->gates + 4 * from * hidden, want->gates + 4 * at * hidden, 4 * bytes);
}

static void check_lstm(lstm_case c) {
    int64_t offsets[MOST + 1] = {0}, longest = 0;
    for (int s = 0; s < c.sequences; s++) {
        offsets[s + 1] = offsets[s] + c.lengths[s];
        longest = c.lengths[s] > longest ? c.lengths[s] : longest;
    }
    const int64_t n = offsets[c.sequences], h = c.hidden, states = c.sequences * h;
    const size_t row = (size_t)h * sizeof(float);
    float *gates = normal(4 * n * h + 1, 1), *bias = normal(4 * h, 0.5f);
    float *weights = normal(4 * h * h, 1 / sqrtf((float)h)), *shifted = host(4 * h * h + 1);
    float *state_h = normal(states, 0.5f), *state_c = normal(states, 1);
    memcpy(shifted + 1, weights, 4 * (size_t)h * row);
    lstm_device device = {
        .call = {.out = room((size_t)n * (row + 20) + 4),
                 .ldo = c.reverse ? h + 5 : 0,
                 .reverse = c.reverse,
                 .gates = room(4 * (size_t)n * row + 4),
                 .cells = room((size_t)n * row + 4),
                 .recurrent = {c.shifted ? put_floats(shifted, 4 * h * h + 1) + 1
                                         : put_floats(weights, 4 * h * h),
                               SIDA_F32, 4 * h, h},
                 .bias = put_floats(bias, 4 * h),
                 .hidden = c.hidden},
        .offsets = room(sizeof offsets),
        .state_h = room((size_t)c.sequences * row),
        .state_c = room((size_t)c.sequences * row),
    };
    char what[80];
    lstm_result want = lstm_room(n, c.sequences, c.hidden), got[2];
    for (int state = 0; state < 2; state++) {
        lstm_result *to = &got[state];
        *to = lstm_room(n, c.sequences, c.hidden);
        memcpy(to->state_h, state_h, (size_t)states * sizeof(float));
        memcpy(to->state_c, state_c, (size_t)states * sizeof(float));
        lstm_run(&device, *to, gates, offsets, c.sequences, state);
        memcpy(want.gates, gates, 4 * (size_t)n * row);
        memcpy(want.state_h, state_h, (size_t)states * sizeof(float));
        memcpy(want.state_c, state_c, (size_t)states * sizeof(float));
        OK(sida_lstm_cpu(NULL, &(sida_lstm_call){.out = want.out,
                                                 .gates = want.gates,
                                                 .cells = want.cells,
                                                 .recurrent = {weights, SIDA_F32, 4 * h, h},
                                                 .bias = bias,
                                                 .sequences = c.sequences,
                                                 .hidden = c.hidden,
                                                 .offsets = offsets,
                                                 .reverse = c.reverse,
                                                 .state_h = state ? want.state_h : NULL,
                                                 .state_c = state ? want.state_c : NULL,
                                                 .workspace = host(5 * states)}));
        snprintf(what, sizeof what, "lstm of %d units, %d sequences, reverse %d, state %d",
                 c.hidden, c.sequences, c.reverse, state);
        expect_close(what, to->out, want.out, n * h, tight);
        expect_close(what, to->gates, want.gates, 4 * n * h, tight);
        expect_close(what, to->cells, want.cells, n * h, tight);
        expect_close(what, to->state_h, want.state_h, states, tight);
        expect_close(what, to->state_c, want.state_c, states, tight);
    }
    for (int s = 0; s < c.sequences; s++)
        if (c.lengths[s] == 0) {
            assert_memory_equal(got[1].state_h + s * h, state_h + s * h, row);
            assert_memory_equal(got[1].state_c + s * h, state_c + s * h, row);
        }
    /* Alone, from a zero state. */
    lstm_result one = lstm_room(n, c.sequences, c.hidden);
    for (int s = 0; s < c.sequences && s < 4; s++) {
        const int64_t alone[2] = {0, c.lengths[s]};
        lstm_run(&device, one, gates + 4 * offsets[s] * h, alone, 1, false);
        expect_rows(&one, 0, &got[0], offsets[s], c.lengths[s], c.hidden);
    }
    /* Step by step, from the given one. */
    float *step = host(4 * states);
    memcpy(one.state_h, state_h, (size_t)states * sizeof(float));
    memcpy(one.state_c, state_c, (size_t)states * sizeof(float));
    for (int64_t t = 0; t < longest; t++) {
        int64_t at[MOST + 1] = {0}, taken[MOST];
        for (int s = 0; s < c.sequences; s++) {
            taken[s] = c.reverse ? offsets[s + 1] - 1 - t : offsets[s] + t;
            at[s + 1] = at[s] + (t < c.lengths[s]);
            if (t < c.lengths[s]) memcpy(step + 4 * at[s] * h, gates + 4 * taken[s] * h, 4 * row);
        }
        lstm_run(&device, one, step, at, c.sequences, true);
        for (int s = 0; s < c.sequences; s++)
            if (t < c.lengths[s]) expect_rows(&one, at[s], &got[1], taken[s], 1, c.hidden);
    }
    assert_memory_equal(one.state_h, got[1].state_h, (size_t)states * sizeof(float));
    assert_memory_equal(one.state_c, got[1].state_c, (size_t)states * sizeof(float));
    end_case();
}

static void test_lstm(void **state) {
    (void)state;
    /* Up to 256 units on 9.0 and beyond a cluster's kernel, the other one for more. Not multiples
     * of four, of a warp's units, of a cluster's; all warps of a block and not all. */
    static const int32_t widths[] = {1, 3, 20, 30, 64, 130, 254, 256, 257, 320};
    for (int w = 0; w < 10; w += gpu_step(3)) { /* 1, 30, 254, 320 */
        check_lstm((lstm_case){widths[w], 1, {5}, false, false});
        check_lstm((lstm_case){widths[w], 6, {3, 0, 1, 6, 0, 2}, false, false});
    }
    check_lstm((lstm_case){64, 3, {4, 1, 2}, true, false});
    check_lstm((lstm_case){320, 1, {4}, true, false});
    /* More sequences than run at a time, of one token and of none among them: 8 clusters take every
     * 8th. */
    static const int32_t many[MOST] = {2, 0, 1, 1, 1, 5, 0, 3, 1, 4, 1, 1,
                                       0, 0, 0, 2, 3, 1, 0, 6, 1, 1, 0, 1};
    lstm_case c = {64, MOST, {0}, false, false};
    memcpy(c.lengths, many, sizeof many);
    check_lstm(c);
    if (gpu_small()) return;
    c.hidden = 20;
    check_lstm(c);
    c.hidden = 260;
    check_lstm(c);
    /* Errors do not grow with time. */
    check_lstm((lstm_case){64, 2, {60, 33}, false, false});
    check_lstm((lstm_case){256, 1, {40}, false, false});
}

static void test_lstm_reverse(void **state) {
    (void)state;
    static const int32_t widths[] = {3, 32, 64, 128, 256, 257, 320};
    for (int w = 0; w < 7; w += gpu_step(4)) {
        check_lstm((lstm_case){widths[w], 1, {5}, false, true});
        check_lstm((lstm_case){widths[w], 6, {3, 0, 1, 6, 0, 2}, false, true});
        check_lstm(
            (lstm_case){widths[w], 13, {2, 1, 5, 1, 9, 0, 3, 1, 1, 4, 1, 2, 6}, false, true});
    }
}

/* Two directions at once say what each says alone, to the byte, side by side in the same rows. */
static void check_pair(int32_t hidden, int32_t sequences, const int32_t *lengths) {
    int64_t offsets[MOST + 1] = {0};
    for (int s = 0; s < sequences; s++) offsets[s + 1] = offsets[s] + lengths[s];
    const int64_t n = offsets[sequences], h = hidden, rows = 2 * n * h;
    const size_t bytes = (size_t)rows * sizeof(float);
    float *out = room(bytes + 4), *before[2], *got[2] = {host(rows + 1), host(rows + 1)};
    sida_lstm_call calls[2];
    for (int way = 0; way < 2; way++) {
        before[way] = put_floats(normal(4 * n * h + 1, 1), 4 * n * h + 1);
        calls[way] = (sida_lstm_call){
            .out = out + way * h,
            .ldo = 2 * h,
            .gates = room(2 * bytes + 4),
            .cells = room(bytes + 4),
            .recurrent = {put_floats(normal(4 * h * h, 1 / sqrtf((float)h)), 4 * h * h), SIDA_F32,
                          4 * h, h},
            .bias = put_floats(normal(4 * h, 0.5f), 4 * h),
            .sequences = sequences,
            .hidden = hidden,
            .offsets = put(offsets, sizeof offsets),
            .reverse = way == 1};
    }
    for (int pair = 0; pair < 2; pair++) {
        for (int way = 0; way < 2; way++)
            OK(sida_copy(stream, calls[way].gates, before[way], 2 * bytes));
        if (pair) calls[0].beside = &calls[1];
        for (int way = 0; way < 2 - pair; way++) OK(cuda()->lstm(stream, &calls[way]));
        get(got[pair], out, bytes);
        OK(sida_copy(stream, out, before[0], bytes)); /* something else */
    }
    assert_memory_equal(got[0], got[1], bytes);
    end_case();
}

static void test_lstm_pair(void **state) {
    (void)state;
    static const int32_t lengths[13] = {2, 1, 5, 1, 9, 0, 3, 1, 1, 4, 1, 2, 6},
                         widths[] = {3, 32, 128, 256, 257, 320};
    for (int w = 0; w < 6; w += gpu_step(2)) {
        check_pair(widths[w], 1, lengths + 4);
        check_pair(widths[w], 13, lengths);
    }
}

static void test_lstm_nothing(void **state) {
    (void)state;
    OK(cuda()->lstm(stream, &(sida_lstm_call){.recurrent = {.dtype = SIDA_F32}, .hidden = 64}));
    const sida_lstm_call halves = {.recurrent = {.dtype = SIDA_BF16}, .sequences = 1, .hidden = 64};
    assert_int_equal(cuda()->lstm(stream, &halves), SIDA_ERROR_UNSUPPORTED);
}

/* --- SparseMax attention */

enum values { RANDOM, SHARP, TIES, EQUAL };

typedef struct attend_case {
    int32_t width, sequences, q_count[MOST], k_count[MOST];
    bool causal, positions; /* queries are the last of the keys */
    enum values values;
    bool softmax;
} attend_case;

static void check_weights(attend_case c) {
    const size_t starts = sizeof(int64_t[MOST]), counts = sizeof(int32_t[MOST]);
    int64_t q_start[MOST] = {0}, k_start[MOST] = {0}, rows = 0, keys = 0;
    int32_t position[MOST] = {0};
    for (int s = 0; s < c.sequences; s++) {
        int32_t before = c.k_count[s] - c.q_count[s];
        position[s] = c.positions && before > 0 ? before : 0;
        q_start[s] = rows;
        k_start[s] = keys;
        rows += c.q_count[s];
        keys += c.k_count[s];
    }
    const int64_t width = c.width;
    const size_t row = (size_t)width * sizeof(float), bytes = (size_t)rows * row;
    /* Scores spread by some units, by tens, in steps of a half, not at all. */
    const float scale = (c.values == SHARP ? 20.0f : 2.0f) / sqrtf((float)width);
    float *queries = normal(rows * width + 1, scale), *memory = normal(keys * width + 1, 1);
    if (c.values == TIES) {
        for (int64_t i = 0; i < rows * width; i++) queries[i] = i % width ? 0.0f : 0.5f;
        for (int64_t i = 0; i < keys; i++) memory[i * width] = roundf(2 * memory[i * width]);
    }
    if (c.values == EQUAL) memset(queries, 0, bytes);
    float *before = normal(rows * width + 1, 1), *want = host(rows * width + 1);
    float *got = host(rows * width + 1), *again = host(rows * width + 1);
    memcpy(want, before, bytes);
    sida_sparsemax_attention_call call = {.out = room(bytes + 4),
                                          .queries = put_floats(queries, rows * width + 1),
                                          .memory = put_floats(memory, keys * width + 1),
                                          .sequences = c.sequences,
                                          .width = c.width,
                                          .q_start = put(q_start, starts),
                                          .k_start = put(k_start, starts),
                                          .q_count = put(c.q_count, counts),
                                          .k_count = put(c.k_count, counts),
                                          .q_position = c.positions ? put(position, counts) : NULL,
                                          .causal = c.causal,
                                          .softmax = c.softmax,
                                          .rows = rows};
    const sida_sparsemax_attention_call on_host = {.out = want,
                                                   .queries = queries,
                                                   .memory = memory,
                                                   .sequences = c.sequences,
                                                   .width = c.width,
                                                   .q_start = q_start,
                                                   .k_start = k_start,
                                                   .q_count = c.q_count,
                                                   .k_count = c.k_count,
                                                   .q_position = c.positions ? position : NULL,
                                                   .causal = c.causal,
                                                   .softmax = c.softmax};
    OK(sida_copy(stream, call.out, before, bytes));
    OK(cuda()->sparsemax_attention(stream, &call));
    get(got, call.out, bytes);
    OK(sida_sparsemax_attention_cpu(NULL, &on_host));
    char what[100];
    snprintf(what, sizeof what, "%s of width %d, %d keys first, causal %d, values %d",
             c.softmax ? "softmax" : "SparseMax", c.width, c.k_count[0], c.causal, c.values);
    expect_close(what, got, want, rows * width, tight);
    for (int s = 0; s < c.sequences; s++) /* nothing to see */
        if (c.k_count[s] == 0)
            assert_memory_equal(got + q_start[s] * width, before + q_start[s] * width,
                                (size_t)c.q_count[s] * row);
    /* However the work is spread. */
    static const int64_t hints[] = {0, 1, 1000000};
    for (int i = 0; i < 3; i++) {
        call.rows = hints[i];
        OK(sida_copy(stream, call.out, before, bytes));
        OK(cuda()->sparsemax_attention(stream, &call));
        get(again, call.out, bytes);
        assert_memory_equal(again, got, bytes);
    }
    /* A query alone: the last of the first sequence, over the keys that it saw. */
    const int32_t last = c.q_count[0] - 1;
    if (last >= 0) {
        static const int32_t single[MOST] = {1};
        int32_t seen = c.k_count[0];
        if (c.causal && seen > position[0] + last + 1) seen = position[0] + last + 1;
        const int64_t at[MOST] = {last};
        call.sequences = 1;
        call.causal = false;
        call.rows = 1;
        OK(sida_copy(stream, (int64_t *)call.q_start, at, starts));
        OK(sida_copy(stream, (int32_t *)call.q_count, single, counts));
        OK(sida_copy(stream, (int32_t *)call.k_count, &seen, sizeof seen));
        OK(sida_copy(stream, call.out, before, bytes));
        OK(cuda()->sparsemax_attention(stream, &call));
        get(again, call.out, bytes);
        assert_memory_equal(again + last * width, got + last * width, row);
    }
    end_case();
}

static void check_sparsemax(attend_case c) {
    check_weights(c);
    c.softmax = true;
    check_weights(c);
}

static void test_sparsemax(void **state) {
    (void)state;
    static const int32_t widths[] = {1, 20, 30, 64, 256, 320};
    for (int w = 0; w < 6; w += gpu_step(2)) /* 1, 30, 256 */
        for (int values = RANDOM; values <= EQUAL; values += gpu_step(2)) {
            /* None, one, more keys than a warp has lanes; a self-attention; a decoder's step. */
            attend_case c = {.width = widths[w],
                             .sequences = 6,
                             .q_count = {5, 0, 1, 4, 3, 9},
                             .k_count = {5, 3, 1, 40, 0, 9},
                             .values = (enum values)values};
            if (!gpu_small()) check_sparsemax(c);
            c.causal = true;
            if (!gpu_small()) check_sparsemax(c);
            c.positions = true;
            check_sparsemax(c);
        }
    for (int values = RANDOM; values <= EQUAL; values++) {
        attend_case c = {.width = 64,
                         .sequences = 2,
                         .q_count = {7, 1},
                         .k_count = {300, 65},
                         .causal = values % 2,
                         .positions = true,
                         .values = (enum values)values};
        check_sparsemax(c);
    }
}

/* More keys than shared memory holds: as many as it does, one more, several times that. */
static void test_sparsemax_many_keys(void **state) {
    (void)state;
    for (int values = RANDOM; values <= EQUAL; values += gpu_step(2))
        for (int causal = 0; causal < 2; causal += gpu_step(2)) {
            attend_case c = {.width = 8,
                             .sequences = 3,
                             .q_count = {3, 2, 5},
                             .k_count = {gpu_cases(2500, 3), 1024, 1027},
                             .causal = causal,
                             .positions = true,
                             .values = (enum values)values};
            check_sparsemax(c);
        }
}

static void test_sparsemax_limits(void **state) {
    (void)state;
    /* NaN comes out as NaN, of its own query only. */
    enum { WIDTH = 8, KEYS = 5 };
    float *values = normal(KEYS * WIDTH, 1), got[2 * WIDTH], queries[2 * WIDTH] = {1};
    for (int i = WIDTH; i < 2 * WIDTH; i++) queries[i] = NAN;
    const int64_t start = 0;
    const int32_t two = 2, keys = KEYS;
    sida_sparsemax_attention_call call = {.out = put_floats(values, 2 * WIDTH),
                                          .queries = put_floats(queries, 2 * WIDTH),
                                          .memory = put_floats(values, KEYS * WIDTH),
                                          .sequences = 1,
                                          .width = WIDTH,
                                          .q_start = put(&start, sizeof start),
                                          .k_start = put(&start, sizeof start),
                                          .q_count = put(&two, sizeof two),
                                          .k_count = put(&keys, sizeof keys)};
    for (int softmax = 0; softmax < 2; softmax++) {
        call.softmax = softmax;
        OK(sida_copy(stream, call.out, values, sizeof got));
        OK(cuda()->sparsemax_attention(stream, &call));
        get(got, call.out, sizeof got);
        for (int i = 0; i < WIDTH; i++) assert_true(isfinite(got[i]) && isnan(got[WIDTH + i]));
    }
    call.probabilities = call.out;
    assert_int_equal(cuda()->sparsemax_attention(stream, &call), SIDA_ERROR_UNSUPPORTED);
    call.probabilities = NULL;
    call.sequences = 0;
    OK(cuda()->sparsemax_attention(stream, &call));
    end_case();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lstm),
        cmocka_unit_test(test_lstm_reverse),
        cmocka_unit_test(test_lstm_pair),
        cmocka_unit_test(test_lstm_nothing),
        cmocka_unit_test(test_sparsemax),
        cmocka_unit_test(test_sparsemax_many_keys),
        cmocka_unit_test(test_sparsemax_limits),
    };
    return run_op_tests(tests, sizeof tests / sizeof *tests);
}
