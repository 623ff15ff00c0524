/* The LSTM of training on cuDNN against the CPU's ops: outputs, the gradient of the input, and of
 * every tensor, over sequences of different lengths, in both layouts.
 *
 * `tight` serves outputs: gates are bounded, sums of 2 x 256 terms at most differ in order and in
 * the last bits of exp. Gradients go back through all tokens and are summed over them: 5e-5. With
 * TF32 factors keep 11 bits: 5e-3. */
#include "runtime/ops/gemm.h"
#include "runtime/ops/rnn.h"
#include "tests/gpu/op_case.h"

enum { MOST = 16 };
static const double backward = 5e-5, tf32_close = 5e-3;

typedef struct rnn_case {
    int32_t hidden, layers, sequences, lengths[MOST]; /* falling */
} rnn_case;

/* A layer's parameters or gradients on the host. */
static void make_layers(sida_rnn_weights *layers, const rnn_case *c, float scale) {
    const int64_t h = c->hidden;
    for (int l = 0; l < c->layers; l++) {
        float *block = normal(8 * h * h + 8 * h, scale / sqrtf((float)h));
        layers[l] = (sida_rnn_weights){block, block + 8 * h * h, block + 4 * h * h,
                                       block + 8 * h * h + 4 * h};
    }
}

/* Token t of the sequence of rank r, end to end. */
typedef struct reference {
    int64_t offsets[MOST + 1];
    float *x, *y, *d_y, *d_x;
    sida_rnn_weights weights[SIDA_RNN_LAYERS_MAX], gradients[SIDA_RNN_LAYERS_MAX];
} reference;

static void linear_backward(float *d_x, float *d_weight, float *d_bias, const float *d_y,
                            const float *x, const float *w, int64_t h, int64_t n) {
    sida_linear_backward_cpu(&(sida_linear_backward_call){.d_x = d_x,
                                                          .d_weight = d_weight,
                                                          .d_bias = d_bias,
                                                          .d_y = d_y,
                                                          .x = x,
                                                          .weight = {w, SIDA_F32, 4 * h, h},
                                                          .n = n});
}

static void run_reference(reference *r, const rnn_case *c) {
    const int64_t h = c->hidden, n = r->offsets[c->sequences];
    float *outs[SIDA_RNN_LAYERS_MAX], *gates[SIDA_RNN_LAYERS_MAX], *cells[SIDA_RNN_LAYERS_MAX];
    float *workspace = host((n + 6 * c->sequences) * h + 1);
    for (int l = 0; l < c->layers; l++) {
        const sida_rnn_weights *w = &r->weights[l];
        outs[l] = host(n * h + 1);
        gates[l] = host(4 * n * h + 1);
        cells[l] = host(n * h + 1);
        OK(sida_linear_gemm_cpu(NULL,
                                &(sida_linear_call){.y = gates[l],
                                                    .ldy = 4 * h,
                                                    .x = l ? outs[l - 1] : r->x,
                                                    .ldx = h,
                                                    .n = n,
                                                    .weight = {w->input_weight, SIDA_F32, 4 * h, h},
                                                    .bias = w->input_bias,
                                                    .scale = 1}));
        OK(sida_lstm_cpu(NULL,
                         &(sida_lstm_call){.out = outs[l],
                                           .gates = gates[l],
                                           .cells = cells[l],
                                           .recurrent = {w->recurrent_weight, SIDA_F32, 4 * h, h},
                                           .bias = w->recurrent_bias,
                                           .sequences = c->sequences,
                                           .hidden = c->hidden,
                                           .offsets = r->offsets,
                                           .workspace = workspace}));
    }
    r->y = outs[c->layers - 1];
    float *above = r->d_y, *d_gates = host(4 * n * h + 1);
    for (int l = c->layers - 1; l >= 0; l--) {
        const sida_rnn_weights *w = &r->weights[l];
        sida_rnn_weights *g = &r->gradients[l];
        OK(sida_lstm_backward_cpu(
            &(sida_lstm_backward_call){.d_gates = d_gates,
                                       .d_recurrent = g->recurrent_weight,
                                       .d_bias = g->recurrent_bias,
                                       .d_out = above,
                                       .out = outs[l],
                                       .gates = gates[l],
                                       .cells = cells[l],
                                       .recurrent = {w->recurrent_weight, SIDA_F32, 4 * h, h},
                                       .sequences = c->sequences,
                                       .hidden = c->hidden,
                                       .offsets = r->offsets,
                                       .workspace = workspace}));
        float *below = host(n * h + 1); /* zeros */
        linear_backward(below, g->input_weight, g->input_bias, d_gates, l ? outs[l - 1] : r->x,
                        w->input_weight, h, n);
        above = below;
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

static void expect_layer(const char *what, const sida_rnn_weights *got,
                         const sida_rnn_weights *want, int64_t h, double tolerance) {
    char text[160];
    const struct {
        const char *name;
        const float *got, *want;
        int64_t count;
    } tensors[] = {{"weight_ih", got->input_weight, want->input_weight, 4 * h * h},
                   {"bias_ih", got->input_bias, want->input_bias, 4 * h},
                   {"weight_hh", got->recurrent_weight, want->recurrent_weight, 4 * h * h},
                   {"bias_hh", got->recurrent_bias, want->recurrent_bias, 4 * h}};
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
    snprintf(what, sizeof what, "LSTM of %d x %d, %d sequences, layout %d, algorithm %d, tf32 %d",
             c->layers, c->hidden, c->sequences, options.layout, options.algorithm, options.tf32);
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
    if (options.layout == SIDA_RNN_PACKED) assert_int_equal(rows, r->offsets[c->sequences]);

    const int64_t space = sida_rnn_weight_items(rnn);
    const size_t space_bytes = (size_t)space * sizeof(float), bytes = (size_t)items * sizeof(float);
    assert_true(space >= c->layers * (8 * h * h + 8 * h));
    float *weights = host(space), *start = host(space);
    sida_rnn_pack(rnn, weights, r->weights);
    sida_rnn_pack(rnn, start, before);
    float *ranked = host(items + 1), *got = host(items + 1);
    float *device_weights = put_floats(weights, space), *device_gradient = put_floats(start, space);
    for (int64_t i = 0; i < items; i++) ranked[i] = 3; /* padding, of no influence */
    reorder(ranked, r->x, r, c, step, false);
    float *x = put_floats(ranked, items), *y = room(bytes), *d_x = room(bytes);
    reorder(ranked, r->d_y, r, c, step, false);
    float *d_y = put_floats(ranked, items);
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
        OK(sida_rnn_backward_data(rnn, d_x, d_y, y, device_weights));
        OK(sida_rnn_backward_weights(rnn, device_gradient, x, y));
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
        sida_rnn_weights gradients[SIDA_RNN_LAYERS_MAX];
        make_layers(gradients, c, 1);
        sida_rnn_unpack(rnn, gradients, runs[0].space);
        for (int l = 0; l < c->layers; l++)
            expect_layer(what, &gradients[l], &r->gradients[l], h,
                         options.tf32 ? tf32_close : backward);
        if (options.layout == SIDA_RNN_PADDED)
            for (int s = 0; s < c->sequences; s++)
                for (int32_t t = c->lengths[s]; t < longest && c->lengths[s] > 0; t++)
                    for (int64_t k = 0; k < h; k++)
                        assert_true(runs[0].y[(step[t] + s) * h + k] == 0);
    }
    OK(sida_stream_synchronize(stream));
    sida_rnn_destroy(rnn);
}

static void check_rnn(rnn_case c) {
    reference r = {0};
    sida_rnn_weights before[SIDA_RNN_LAYERS_MAX] = {0};
    int32_t longest = 0;
    for (int s = 0; s < c.sequences; s++) {
        r.offsets[s + 1] = r.offsets[s] + c.lengths[s];
        longest = c.lengths[s] > longest ? c.lengths[s] : longest;
    }
    const int64_t h = c.hidden, n = r.offsets[c.sequences];
    r.x = normal(n * h + 1, 1);
    r.d_y = normal(n * h + 1, 1);
    make_layers(r.weights, &c, 1);
    make_layers(before, &c, 0.5f); /* gradients are added to */
    make_layers(r.gradients, &c, 0);
    for (int l = 0; l < c.layers; l++) /* the tensors of a layer are one block */
        memcpy(r.gradients[l].input_weight, before[l].input_weight,
               (size_t)(8 * h * h + 8 * h) * sizeof(float));
    run_reference(&r, &c);
    const int kept_blocks = block_count, kept_buffers = buffer_count;
    for (int way = 0; way < 8; way++) {
        sida_rnn_options options = {.hidden = c.hidden,
                                    .layers = c.layers,
                                    .sequences = c.sequences,
                                    .longest = longest,
                                    .tokens = (int64_t)c.sequences * longest,
                                    .layout = way & 1 ? SIDA_RNN_PADDED : SIDA_RNN_PACKED,
                                    .algorithm = way & 2 ? SIDA_RNN_PERSISTENT : SIDA_RNN_STANDARD,
                                    .tf32 = way & 4};
        check_plan(&c, &r, before, options, options.algorithm == SIDA_RNN_PERSISTENT);
        while (buffer_count > kept_buffers) sida_buffer_destroy(buffers[--buffer_count]);
        while (block_count > kept_blocks) free(blocks[--block_count]);
    }
    end_case();
}

static void test_rnn(void **state) {
    (void)state;
    check_rnn((rnn_case){64, 1, 1, {1}});
    check_rnn((rnn_case){64, 2, 4, {9, 9, 9, 9}});
    check_rnn((rnn_case){64, 2, 6, {12, 7, 7, 3, 1, 0}});
    check_rnn((rnn_case){256, 2, 3, {20, 11, 2}});
    check_rnn((rnn_case){128, 4, 2, {5, 4}});
    check_rnn((rnn_case){192, 3, 16, {6, 6, 5, 5, 5, 4, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1}});
}

/* One plan for batches of different shapes, beside another whose workspace it shares; and beyond
 * its limits. */
static void test_rnn_batches(void **state) {
    (void)state;
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
    OK(sida_rnn_backward_data(first, y[1], x, y[0], weights)); /* of 40 rows */
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
