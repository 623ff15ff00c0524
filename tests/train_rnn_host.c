/* The LSTM of training (rnn.h) on the host, beside train_ops_host.c: the CPU's op, layer by layer,
 * on rows that lie end to end. */
#include "runtime/ops/gemm.h"
#include "runtime/ops/lstm.h"
#include "runtime/ops/lstm_train.h"
#include "runtime/ops/rnn.h"
#include "runtime/ops/train_ops.h"
#include "tests/streams_host.h"
#include "tests/test.h"

#include <string.h>

/* What set_lengths says. */
typedef struct batch {
    int32_t *lengths, sequences; /* without the empty ones */
    int64_t *offsets, rows;
    struct batch *before; /* work that was issued may still want it */
} batch;

struct sida_rnn {
    sida_rnn_options options;
    sida_stream *stream;
    sida_event *through;  /* the work on the stream that the gradients' waits for */
    sida_buffer *reserve; /* counts against the cap */
    batch *batch;         /* of the last call */
    float *x, *y, *d, *below, *gates[SIDA_RNN_LAYERS_MAX], *cells[SIDA_RNN_LAYERS_MAX],
        *out[SIDA_RNN_LAYERS_MAX], *d_gates, *workspace, *gradient;
};

bool sida_rnn_built(void) {
    return true;
}

static int directions(const sida_rnn *rnn) {
    return rnn->options.bidirectional ? 2 : 1;
}
static int32_t units(const sida_rnn *rnn) {
    return rnn->options.hidden / directions(rnn);
}
static int cells(const sida_rnn *rnn) { /* layer by layer, in each the forward one first */
    return rnn->options.layers * directions(rnn);
}

/* Floats of the parts of a direction of a layer, with a gap as cuDNN may have them. */
enum { GAP = 24 };
static int64_t cell_items(const sida_rnn *rnn) {
    int64_t h = rnn->options.hidden, u = units(rnn);
    return 4 * u * (h + u) + 8 * u + GAP;
}

sida_status sida_rnn_create(sida_rnn **out, sida_stream *stream, const sida_rnn_options *options) {
    int64_t n = options->tokens, h = options->hidden, s = options->sequences;
    sida_rnn *rnn = calloc(1, sizeof *rnn);
    *out = NULL;
    rnn->options = *options;
    sida_status status =
        sida_buffer_create(stream->backend, &rnn->reserve, SIDA_MEMORY_DEVICE,
                           (size_t)(n * h * 6 * options->layers) * sizeof(float), "the LSTM");
    if (status != SIDA_OK) {
        free(rnn);
        return status;
    }
    rnn->stream = stream;
    assert_int_equal(sida_event_create(stream->backend, &rnn->through), SIDA_OK);
    rnn->x = calloc((size_t)(n * h), sizeof(float));
    rnn->y = calloc((size_t)(n * h), sizeof(float));
    rnn->d = calloc((size_t)(n * h), sizeof(float));
    rnn->below = calloc((size_t)(n * h), sizeof(float));
    for (int l = 0; l < options->layers; l++) {
        rnn->gates[l] = calloc((size_t)(n * 4 * h), sizeof(float));
        rnn->cells[l] = calloc((size_t)(n * h), sizeof(float));
        rnn->out[l] = calloc((size_t)(n * h), sizeof(float));
    }
    rnn->d_gates = calloc((size_t)(n * 4 * h), sizeof(float));
    rnn->workspace = calloc((size_t)((n + 6 * s) * h), sizeof(float));
    rnn->gradient = calloc((size_t)(cell_items(rnn) * cells(rnn)), sizeof(float));
    *out = rnn;
    return SIDA_OK;
}

void sida_rnn_destroy(sida_rnn *rnn) {
    if (!rnn) return;
    sida_event_destroy(rnn->through);
    sida_buffer_destroy(rnn->reserve);
    for (int l = 0; l < rnn->options.layers; l++) {
        free(rnn->gates[l]);
        free(rnn->cells[l]);
        free(rnn->out[l]);
    }
    while (rnn->batch) {
        batch *before = rnn->batch->before;
        free(rnn->batch->lengths);
        free(rnn->batch->offsets);
        free(rnn->batch);
        rnn->batch = before;
    }
    free(rnn->x);
    free(rnn->y);
    free(rnn->d);
    free(rnn->below);
    free(rnn->d_gates);
    free(rnn->workspace);
    free(rnn->gradient);
    free(rnn);
}

size_t sida_rnn_bytes(const sida_rnn *rnn) {
    return rnn->reserve->bytes;
}
int64_t sida_rnn_weight_items(const sida_rnn *rnn) {
    return cell_items(rnn) * cells(rnn);
}

/* Biases first: unlike the state's order. */
static sida_rnn_weights view(const sida_rnn *rnn, float *space, int cell) {
    int64_t u = units(rnn);
    float *at = space + cell * cell_items(rnn);
    return (sida_rnn_weights){.recurrent_bias = at,
                              .input_bias = at + 4 * u,
                              .recurrent_weight = at + 8 * u + GAP,
                              .input_weight = at + 8 * u + GAP + 4 * u * u};
}

static void move(const sida_rnn *rnn, const sida_rnn_weights *weights, float *space, bool back) {
    size_t h = (size_t)rnn->options.hidden, u = (size_t)units(rnn);
    const size_t items[4] = {4 * u * h, 4 * u * u, 4 * u, 4 * u};
    for (int cell = 0; cell < cells(rnn); cell++) {
        sida_rnn_weights ours = view(rnn, space, cell), theirs = weights[cell];
        float *const pairs[4][2] = {{ours.input_weight, theirs.input_weight},
                                    {ours.recurrent_weight, theirs.recurrent_weight},
                                    {ours.input_bias, theirs.input_bias},
                                    {ours.recurrent_bias, theirs.recurrent_bias}};
        for (int i = 0; i < 4; i++)
            memcpy(pairs[i][back], pairs[i][!back], items[i] * sizeof(float));
    }
}
void sida_rnn_pack(const sida_rnn *rnn, float *space, const sida_rnn_weights *weights) {
    memset(space, 0, (size_t)sida_rnn_weight_items(rnn) * sizeof(float));
    move(rnn, weights, space, false);
}
void sida_rnn_unpack(const sida_rnn *rnn, const sida_rnn_weights *weights, const float *space) {
    move(rnn, weights, (float *)(uintptr_t)space, true);
}

void sida_rnn_set_rows(sida_rnn *rnn, const sida_row_map *rows, int32_t sequences) {
    assert_int_equal(rows->longest, sida_rnn_longest(rnn));
    assert_int_equal(sequences, rnn->batch->sequences);
}

bool sida_lstm_train_possible(const sida_backend *backend, int32_t units) {
    (void)backend;
    return units < 0; /* the LSTM above is cuDNN's double */
}

sida_status sida_rnn_set_lengths(sida_rnn *rnn, const int32_t *lengths, int32_t sequences) {
    assert_true(sequences <= rnn->options.sequences);
    batch *b = calloc(1, sizeof *b);
    b->lengths = calloc((size_t)sequences + 1, sizeof *b->lengths);
    b->offsets = calloc((size_t)sequences + 1, sizeof *b->offsets);
    b->before = rnn->batch;
    rnn->batch = b;
    for (int32_t s = 0; s < sequences; s++) {
        assert_true(s == 0 || lengths[s] <= lengths[s - 1]);
        b->lengths[s] = lengths[s];
        b->rows += lengths[s];
        b->offsets[s + 1] = b->rows;
        b->sequences += lengths[s] > 0;
    }
    assert_true(b->rows <= rnn->options.tokens && sida_rnn_longest(rnn) <= rnn->options.longest);
    return SIDA_OK;
}
int64_t sida_rnn_rows(const sida_rnn *rnn) {
    return rnn->batch->rows;
}
int32_t sida_rnn_longest(const sida_rnn *rnn) {
    return rnn->batch->sequences > 0 ? rnn->batch->lengths[0] : 0;
}

static void steps_of(const batch *b, int32_t *step) {
    step[0] = 0;
    for (int32_t t = 0; b->sequences > 0 && t < b->lengths[0]; t++) {
        step[t + 1] = step[t];
        for (int32_t s = 0; s < b->sequences; s++) step[t + 1] += b->lengths[s] > t;
    }
}
void sida_rnn_steps(const sida_rnn *rnn, int32_t *step) {
    steps_of(rnn->batch, step);
}

/* Between rows in time's order and rows end to end. */
static void reorder(const sida_rnn *rnn, const batch *b, float *to, const float *from, bool back) {
    size_t h = (size_t)rnn->options.hidden;
    int32_t *step = calloc((size_t)b->lengths[0] + 1, sizeof *step);
    steps_of(b, step);
    for (int32_t s = 0; s < b->sequences; s++)
        for (int32_t t = 0; t < b->lengths[s]; t++) {
            size_t ours = (size_t)(b->offsets[s] + t) * h, theirs = (size_t)(step[t] + s) * h;
            memcpy(to + (back ? theirs : ours), from + (back ? ours : theirs), h * sizeof *to);
        }
    free(step);
}

static sida_weight matrix(const sida_rnn *rnn, const float *data, int64_t cols) {
    return (sida_weight){data, SIDA_F32, 4 * (int64_t)units(rnn), cols};
}

typedef struct rnn_arguments {
    sida_rnn *rnn;
    const batch *batch;
    float *out;
    const float *in, *weights;
} rnn_arguments;

static sida_status run_forward(const void *arguments) {
    const rnn_arguments *a = arguments;
    sida_rnn *rnn = a->rnn;
    const batch *b = a->batch;
    int32_t h = rnn->options.hidden, u = units(rnn);
    reorder(rnn, b, rnn->x, a->in, false);
    for (int cell = 0; cell < cells(rnn); cell++) {
        int l = cell / directions(rnn), way = cell % directions(rnn);
        sida_rnn_weights w = view(rnn, (float *)(uintptr_t)a->weights, cell);
        float *gates = rnn->gates[l] + way * b->rows * 4 * u;
        assert_int_equal(
            sida_linear_gemm_cpu(NULL, &(sida_linear_call){.y = gates,
                                                           .ldy = 4 * u,
                                                           .x = l ? rnn->out[l - 1] : rnn->x,
                                                           .ldx = h,
                                                           .n = b->rows,
                                                           .weight = matrix(rnn, w.input_weight, h),
                                                           .bias = w.input_bias,
                                                           .scale = 1}),
            SIDA_OK);
        assert_int_equal(
            sida_lstm_cpu(NULL, &(sida_lstm_call){.out = rnn->out[l] + way * u,
                                                  .ldo = h,
                                                  .gates = gates,
                                                  .cells = rnn->cells[l] + way * b->rows * u,
                                                  .recurrent = matrix(rnn, w.recurrent_weight, u),
                                                  .bias = w.recurrent_bias,
                                                  .sequences = b->sequences,
                                                  .hidden = u,
                                                  .offsets = b->offsets,
                                                  .reverse = way == 1,
                                                  .workspace = rnn->workspace,
                                                  .linear = sida_linear_gemm_cpu}),
            SIDA_OK);
    }
    reorder(rnn, b, a->out, rnn->out[rnn->options.layers - 1], true);
    return SIDA_OK;
}

sida_status sida_rnn_forward(sida_rnn *rnn, float *y, const float *x, const float *weights) {
    const rnn_arguments a = {rnn, rnn->batch, y, x, weights};
    return streams_host_issue(rnn->stream, run_forward, &a, sizeof a);
}

static sida_status run_backward(const void *arguments) {
    const rnn_arguments *a = arguments;
    sida_rnn *rnn = a->rnn;
    const batch *b = a->batch;
    int32_t h = rnn->options.hidden, u = units(rnn);
    memset(rnn->gradient, 0, (size_t)sida_rnn_weight_items(rnn) * sizeof(float));
    reorder(rnn, b, rnn->d, a->in, false);
    for (int l = rnn->options.layers - 1; l >= 0; l--) {
        memset(rnn->below, 0, (size_t)(b->rows * h) * sizeof(float));
        for (int way = 0; way < directions(rnn); way++) {
            int cell = l * directions(rnn) + way;
            sida_rnn_weights w = view(rnn, (float *)(uintptr_t)a->weights, cell),
                             g = view(rnn, rnn->gradient, cell);
            assert_int_equal(sida_lstm_backward_cpu(&(sida_lstm_backward_call){
                                 .d_gates = rnn->d_gates,
                                 .d_recurrent = g.recurrent_weight,
                                 .d_bias = g.recurrent_bias,
                                 .d_out = rnn->d + way * u,
                                 .out = rnn->out[l] + way * u,
                                 .ldo = h,
                                 .gates = rnn->gates[l] + way * b->rows * 4 * u,
                                 .cells = rnn->cells[l] + way * b->rows * u,
                                 .recurrent = matrix(rnn, w.recurrent_weight, u),
                                 .sequences = b->sequences,
                                 .hidden = u,
                                 .offsets = b->offsets,
                                 .reverse = way == 1,
                                 .workspace = rnn->workspace}),
                             SIDA_OK);
            sida_linear_backward_cpu(
                &(sida_linear_backward_call){.d_x = rnn->below,
                                             .d_weight = g.input_weight,
                                             .d_bias = g.input_bias,
                                             .d_y = rnn->d_gates,
                                             .x = l ? rnn->out[l - 1] : rnn->x,
                                             .weight = matrix(rnn, w.input_weight, h),
                                             .n = b->rows});
        }
        float *other = rnn->d;
        rnn->d = rnn->below;
        rnn->below = other;
    }
    reorder(rnn, b, a->out, rnn->d, true);
    return SIDA_OK;
}

static sida_status run_gradients(const void *arguments) {
    const rnn_arguments *a = arguments;
    for (int64_t i = 0; i < sida_rnn_weight_items(a->rnn); i++) a->out[i] += a->rnn->gradient[i];
    return SIDA_OK;
}

sida_status sida_rnn_backward(sida_rnn *rnn, float *d_x, float *d_weights, const float *d_y,
                              const float *x, const float *y, const float *weights) {
    const rnn_arguments a = {rnn, rnn->batch, d_x, d_y, weights};
    const rnn_arguments gradients = {.rnn = rnn, .out = d_weights};
    sida_stream *other = rnn->options.gradient_stream;
    (void)x, (void)y;
    assert_int_equal(streams_host_issue(rnn->stream, run_backward, &a, sizeof a), SIDA_OK);
    assert_int_equal(sida_event_record(rnn->through, rnn->stream), SIDA_OK);
    if (other) assert_int_equal(sida_stream_wait(other, rnn->through), SIDA_OK);
    return streams_host_issue(other ? other : rnn->stream, run_gradients, &gradients,
                              sizeof gradients);
}
