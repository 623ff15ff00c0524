/* The LSTM of training on cuDNN against the CPU's ops: outputs, the gradient of the input, and of
 * every tensor, over sequences of different lengths, in one direction and in two; the kernels of
 * our own with a stream beside for the gradients of the weights and without.
 *
 * `tight` serves outputs: gates are bounded, sums of 2 x 256 terms at most differ in order and in
 * the last bits of exp. Gradients go back through all tokens and are summed over them: 5e-5. With
 * TF32 factors keep 11 bits: 5e-3. */
#include "runtime/ops/gemm.h"
#include "runtime/ops/rnn.h"
#include "runtime/ops/train_ops.h"
#include "tests/gpu/op_case.h"

enum { MOST = 24 };
static const double backward = 5e-5, tf32_close = 5e-3;

typedef struct rnn_case {
    int32_t hidden, layers, sequences, lengths[MOST]; /* falling */
    bool both;                                        /* directions */
} rnn_case;

static int directions(const rnn_case *c) {
    return c->both ? 2 : 1;
}
static int32_t units(const rnn_case *c) {
    return c->hidden / directions(c);
}
enum { CELLS = 2 * SIDA_RNN_LAYERS_MAX };
static int cells_of(const rnn_case *c) {
    return c->layers * directions(c);
}

/* Floats of a cell's tensors, which are one block. */
static int64_t cell_items(const rnn_case *c) {
    const int64_t h = c->hidden, u = units(c);
    return 4 * u * (h + u) + 8 * u;
}

/* Parameters or gradients on the host. */
static void make_cells(sida_rnn_weights *cells, const rnn_case *c, float scale) {
    const int64_t h = c->hidden, u = units(c);
    for (int i = 0; i < cells_of(c); i++) {
        float *block = normal(cell_items(c), scale / sqrtf((float)u));
        float *recurrent = block + 4 * u * h, *bias = recurrent + 4 * u * u;
        cells[i] = (sida_rnn_weights){block, bias, recurrent, bias + 4 * u};
    }
}

/* Token t of the sequence of rank r, end to end. */
typedef struct reference {
    int64_t offsets[MOST + 1];
    float *x, *y, *d_y, *d_x;
    sida_rnn_weights weights[CELLS], gradients[CELLS];
} reference;

static void linear_backward(float *d_x, float *d_weight, float *d_bias, const float *d_y,
                            const float *x, const float *w, int64_t u, int64_t h, int64_t n) {
    sida_linear_backward_cpu(&(sida_linear_backward_call){.d_x = d_x,
                                                          .d_weight = d_weight,
                                                          .d_bias = d_bias,
                                                          .d_y = d_y,
                                                          .x = x,
                                                          .weight = {w, SIDA_F32, 4 * u, h},
                                                          .n = n});
}

static void run_reference(reference *r, const rnn_case *c) {
    const int64_t h = c->hidden, u = units(c), n = r->offsets[c->sequences];
    float *outs[SIDA_RNN_LAYERS_MAX], *gates[CELLS], *cells[CELLS];
    float *workspace = host((n + 6 * c->sequences) * h + 1);
    for (int cell = 0; cell < cells_of(c); cell++) {
        const sida_rnn_weights *w = &r->weights[cell];
        const int l = cell / directions(c), way = cell % directions(c);
        if (way == 0) outs[l] = host(n * h + 1);
        gates[cell] = host(4 * n * u + 1);
        cells[cell] = host(n * u + 1);
        OK(sida_linear_gemm_cpu(NULL,
                                &(sida_linear_call){.y = gates[cell],
                                                    .ldy = 4 * u,
                                                    .x = l ? outs[l - 1] : r->x,
                                                    .ldx = h,
                                                    .n = n,
                                                    .weight = {w->input_weight, SIDA_F32, 4 * u, h},
                                                    .bias = w->input_bias,
                                                    .scale = 1}));
        OK(sida_lstm_cpu(NULL,
                         &(sida_lstm_call){.out = outs[l] + way * u,
                                           .ldo = h,
                                           .gates = gates[cell],
                                           .cells = cells[cell],
                                           .recurrent = {w->recurrent_weight, SIDA_F32, 4 * u, u},
                                           .bias = w->recurrent_bias,
                                           .sequences = c->sequences,
                                           .hidden = units(c),
                                           .offsets = r->offsets,
                                           .reverse = way == 1,
                                           .workspace = workspace}));
    }
    r->y = outs[c->layers - 1];
    float *above = r->d_y, *d_gates = host(4 * n * u + 1), *below = NULL;
    for (int cell = cells_of(c) - 1; cell >= 0; cell--) {
        const sida_rnn_weights *w = &r->weights[cell];
        sida_rnn_weights *g = &r->gradients[cell];
        const int l = cell / directions(c), way = cell % directions(c);
        if (way == directions(c) - 1) below = host(n * h + 1); /* zeros */
        OK(sida_lstm_backward_cpu(
            &(sida_lstm_backward_call){.d_gates = d_gates,
                                       .d_recurrent = g->recurrent_weight,
                                       .d_bias = g->recurrent_bias,
                                       .d_out = above + way * u,
                                       .out = outs[l] + way * u,
                                       .ldo = h,
                                       .gates = gates[cell],
                                       .cells = cells[cell],
                                       .recurrent = {w->recurrent_weight, SIDA_F32, 4 * u, u},
                                       .sequences = c->sequences,
                                       .hidden = units(c),
                                       .offsets = r->offsets,
                                       .reverse = way == 1,
                                       .workspace = workspace}));
        linear_backward(below, g->input_weight, g->input_bias, d_gates, l ? outs[l - 1] : r->x,
                        w->input_weight, u, h, n);
        if (way == 0) above = below;
    }
    r->d_x = above;
}

/* Between the rows of the reference and those of the plan. */
static void reorder(float *to, const float *from, const reference *r, const rnn_case *c,
                    const int32_t *step, bool back) {
    const int64_t h = c->hidden;
    for (int s = 0; s < c->sequences; s++)
        for (int32_t t = 0; t < c->lengths[s]; t++) {
            const int64_t ragged = (r->offsets[s] + t) * h, ranked = ((int64_t)step[t] + s) * h;
            memcpy(to + (back ? ragged : ranked), from + (back ? ranked : ragged),
                   (size_t)h * sizeof *to);
        }
}

/* What one run leaves. */
typedef struct outcome {
    float *y, *d_x, *space;
} outcome;

static void expect_cell(const char *what, const sida_rnn_weights *got, const sida_rnn_weights *want,
                        const rnn_case *c, double tolerance) {
    const int64_t h = c->hidden, u = units(c);
    char text[200];
    const struct {
        const char *name;
        const float *got, *want;
        int64_t count;
    } tensors[] = {{"weight_ih", got->input_weight, want->input_weight, 4 * u * h},
                   {"bias_ih", got->input_bias, want->input_bias, 4 * u},
                   {"weight_hh", got->recurrent_weight, want->recurrent_weight, 4 * u * u},
                   {"bias_hh", got->recurrent_bias, want->recurrent_bias, 4 * u}};
    for (int i = 0; i < 4; i++) {
        snprintf(text, sizeof text, "%s, %s", what, tensors[i].name);
        expect_close(text, tensors[i].got, tensors[i].want, tensors[i].count, tolerance);
    }
}

/* Compares a plan with the reference; a plan that cuDNN refuses is passed over where it may. */
static void check_plan(const rnn_case *c, const reference *r, const sida_rnn_weights *before,
                       sida_rnn_options options, bool optional) {
    const int64_t h = c->hidden;
    char what[120];
    snprintf(what, sizeof what, "LSTM of %d x %d, %d ways, %d sequences, algorithm %d, tf32 %d",
             c->layers, c->hidden, directions(c), c->sequences, options.algorithm, options.tf32);
    sida_rnn *rnn;
    const sida_status made = sida_rnn_create(&rnn, stream, &options);
    if (made == SIDA_ERROR_UNSUPPORTED && optional) {
        print_message("%s: %s\n", what, sida_last_message());
        return;
    }
    if (made != SIDA_OK) fail_msg("%s: %s", what, sida_last_message());
    assert_true(sida_rnn_bytes(rnn) > 0);
    OK(sida_rnn_set_lengths(rnn, c->lengths, c->sequences));
    const int64_t rows = sida_rnn_rows(rnn), items = rows * h;
    const int32_t longest = sida_rnn_longest(rnn);
    int32_t *step = (int32_t *)host(longest + 1);
    sida_rnn_steps(rnn, step);
    assert_int_equal(longest, c->lengths[0]);
    assert_int_equal(step[longest], rows);
    assert_int_equal(rows, r->offsets[c->sequences]);

    const int64_t space = sida_rnn_weight_items(rnn);
    const size_t space_bytes = (size_t)space * sizeof(float), bytes = (size_t)items * sizeof(float);
    assert_true(space >= cells_of(c) * cell_items(c));
    float *weights = host(space), *start = host(space);
    sida_rnn_pack(rnn, weights, r->weights);
    sida_rnn_pack(rnn, start, before);
    float *ranked = host(items + 1), *got = host(items + 1);
    float *device_weights = put_floats(weights, space), *device_gradient = put_floats(start, space);
    reorder(ranked, r->x, r, c, step, false);
    float *x = put_floats(ranked, items), *y = room(bytes), *d_x = room(bytes);
    reorder(ranked, r->d_y, r, c, step, false);
    float *d_y = put_floats(ranked, items);
    int32_t ranks[MOST];
    for (int s = 0; s < c->sequences; s++) ranks[s] = s;
    const size_t index_bytes = (size_t)c->sequences * sizeof(int32_t);
    const sida_row_map map = {.start = put(ranks, index_bytes),
                              .step = put(step, ((size_t)longest + 1) * sizeof *step),
                              .count = put(c->lengths, index_bytes),
                              .longest = longest};
    sida_rnn_set_rows(rnn, &map, c->sequences);
    const bool in_place = options.algorithm == SIDA_RNN_CLUSTER;
    outcome runs[2];
    bool refused = false;
    for (int run = 0; run < 2 && !refused; run++) {
        runs[run] = (outcome){host(items + 1), host(items + 1), host(space)};
        OK(sida_copy(stream, device_gradient, start, space_bytes));
        const sida_status status = sida_rnn_forward(rnn, y, x, device_weights);
        refused = status == SIDA_ERROR_UNSUPPORTED && optional;
        if (refused) {
            print_message("%s: %s\n", what, sida_last_message());
            break;
        }
        if (status != SIDA_OK) fail_msg("%s: %s", what, sida_last_message());
        if (in_place) OK(sida_copy(stream, d_x, d_y, bytes));
        OK(sida_rnn_backward(rnn, d_x, device_gradient, in_place ? d_x : d_y, x, y,
                             device_weights));
        if (options.gradient_stream) OK(sida_stream_synchronize(options.gradient_stream));
        get(runs[run].y, y, bytes);
        get(runs[run].d_x, d_x, bytes);
        get(runs[run].space, device_gradient, space_bytes);
    }
    if (!refused) {
        assert_memory_equal(runs[0].y, runs[1].y, bytes);
        assert_memory_equal(runs[0].space, runs[1].space, space_bytes);
        const int64_t real = r->offsets[c->sequences] * h;
        reorder(got, runs[0].y, r, c, step, true);
        expect_close(what, got, r->y, real, options.tf32 ? tf32_close : tight);
        reorder(ranked, runs[1].d_x, r, c, step, true);
        reorder(got, runs[0].d_x, r, c, step, true);
        assert_memory_equal(ranked, got, (size_t)real * sizeof(float));
        expect_close(what, got, r->d_x, real, options.tf32 ? tf32_close : backward);
        sida_rnn_weights gradients[CELLS];
        make_cells(gradients, c, 1);
        sida_rnn_unpack(rnn, gradients, runs[0].space);
        for (int i = 0; i < cells_of(c); i++) {
            char cell[160];
            snprintf(cell, sizeof cell, "%s, cell %d", what, i);
            expect_cell(cell, &gradients[i], &r->gradients[i], c,
                        options.tf32 ? tf32_close : backward);
        }
    }
    OK(sida_stream_synchronize(stream));
    sida_rnn_destroy(rnn);
}

static void check_rnn(rnn_case c) {
    reference r = {0};
    sida_rnn_weights before[CELLS] = {0};
    int32_t longest = 0;
    for (int s = 0; s < c.sequences; s++) {
        r.offsets[s + 1] = r.offsets[s] + c.lengths[s];
        longest = c.lengths[s] > longest ? c.lengths[s] : longest;
    }
    const int64_t h = c.hidden, n = r.offsets[c.sequences];
    r.x = normal(n * h + 1, 1);
    r.d_y = normal(n * h + 1, 1);
    make_cells(r.weights, &c, 1);
    make_cells(before, &c, 0.5f); /* gradients are added to */
    make_cells(r.gradients, &c, 0);
    for (int i = 0; i < cells_of(&c); i++)
        memcpy(r.gradients[i].input_weight, before[i].input_weight,
               (size_t)cell_items(&c) * sizeof(float));
    run_reference(&r, &c);
    const int kept_blocks = block_count, kept_buffers = buffer_count;
    sida_stream *beside;
    OK(sida_stream_create(backend, &beside, SIDA_STREAM_BESIDE));
    OK(sida_beside_cuda(beside, stream));
    for (int way = gpu_cases(0, 2); way < 4; way++) { /* not cuDNN's kernels in small */
        const bool own = way >= 2;
        sida_rnn_options options = {.hidden = c.hidden,
                                    .layers = c.layers,
                                    .bidirectional = c.both,
                                    .sequences = c.sequences,
                                    .longest = longest,
                                    .tokens = (int64_t)c.sequences * longest,
                                    .algorithm = own ? SIDA_RNN_CLUSTER : SIDA_RNN_STANDARD,
                                    .tf32 = way > 0,
                                    .gradient_stream = way == 3 ? beside : NULL};
        check_plan(&c, &r, before, options, own);
        while (buffer_count > kept_buffers) sida_buffer_destroy(buffers[--buffer_count]);
        while (block_count > kept_blocks) free(blocks[--block_count]);
    }
    sida_stream_destroy(beside);
    end_case();
}

static void test_rnn(void **state) {
    (void)state;
    for (int both = 0; both < 2; both++) {
        check_rnn((rnn_case){64, 1, 1, {1}, both});
        check_rnn((rnn_case){64, 2, 4, {9, 9, 9, 9}, both});
        check_rnn((rnn_case){64, 2, 6, {12, 7, 7, 3, 1, 0}, both});
        check_rnn((rnn_case){256, 2, 3, {20, 11, 2}, both});
        check_rnn((rnn_case){128, gpu_cases(4, 1), 2, {5, 4}, both});
        check_rnn((rnn_case){192, 3, 16, {6, 6, 5, 5, 5, 4, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1}, both});
        if (gpu_small()) continue;
        check_rnn((rnn_case){
            256, 1, 19, {33, 33, 30, 29, 9, 9, 9, 9, 9, 8, 8, 8, 8, 8, 8, 8, 7, 3, 0}, both});
    }
}

/* One plan for batches of different shapes, beside another whose workspace it shares; and beyond
 * its limits. */
static void test_rnn_batches(void **state) {
    (void)state;
    if (gpu_small()) skip(); /* cuDNN's */
    enum { hidden = 64, rows = 40 };
    sida_rnn_options options = {
        .hidden = hidden, .layers = 2, .sequences = 4, .longest = 10, .tokens = rows};
    sida_rnn *first, *second;
    OK(sida_rnn_create(&first, stream, &options));
    options.beside = first;
    OK(sida_rnn_create(&second, stream, &options));
    const int64_t space = sida_rnn_weight_items(first);
    float *weights = put_floats(normal(space, 0.1f), space);
    float *x = put_floats(normal(rows * hidden, 1), rows * hidden);
    float *y[2] = {room(rows * hidden * 4), room(rows * hidden * 4)};
    float *got[2] = {host(rows * hidden), host(rows * hidden)};
    static const int64_t batch_rows[3] = {40, 5, 0};
    static const int32_t batches[3][4] = {{10, 10, 10, 10}, {3, 2, 0, 0}, {0, 0, 0, 0}};
    for (int b = 2; b >= 0; b--) {
        OK(sida_rnn_set_lengths(first, batches[b], 4));
        OK(sida_rnn_set_lengths(second, batches[b], 4));
        const int64_t n = sida_rnn_rows(first);
        assert_int_equal(n, batch_rows[b]);
        OK(sida_rnn_forward(first, y[0], x, weights));
        OK(sida_rnn_forward(second, y[1], x, weights));
        for (int i = 0; i < 2 && n; i++) get(got[i], y[i], (size_t)n * hidden * sizeof(float));
        assert_memory_equal(got[0], got[1], (size_t)n * hidden * sizeof(float));
    }
    float *gradient = put_floats(normal(space, 1), space);
    OK(sida_rnn_backward(first, y[1], gradient, x, x, y[0], weights)); /* of 40 rows */
    OK(sida_stream_synchronize(stream));
    const int32_t too_long[1] = {11}, too_many[5] = {1, 1, 1, 1, 1};
    assert_int_equal(sida_rnn_set_lengths(first, too_long, 1), SIDA_ERROR_ARGUMENT);
    assert_int_equal(sida_rnn_set_lengths(first, too_many, 5), SIDA_ERROR_ARGUMENT);
    sida_rnn_destroy(second);
    sida_rnn_destroy(first);
    end_case();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rnn),
        cmocka_unit_test(test_rnn_batches),
    };
    if (!sida_rnn_built()) return test_skip("built without cuDNN");
    return run_op_tests(tests, sizeof tests / sizeof *tests);
}
