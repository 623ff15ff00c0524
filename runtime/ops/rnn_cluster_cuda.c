#include "runtime/ops/rnn_cluster.h"

#include "formats/base/memory.h"
#include "runtime/ops/lstm_train.h"

#include <stdlib.h>
#include <string.h>

enum { gates = 4, directions_most = 2, alignment = 64 /* floats */ };

/* A direction of a layer: its parameters' places in the weight space, in floats, and what its
 * forward pass leaves to the backward pass. */
typedef struct cell {
    int64_t input_weight, recurrent_weight, input_bias, recurrent_bias;
    float *gates;    /* [tokens, 4 units] */
    float *cells;    /* [tokens, units] */
    float *d_biases; /* [clusters, 4 units] */
} cell;

struct sida_rnn_cluster {
    sida_stream *stream;
    sida_rnn_options options;
    int32_t directions, units;
    cell cells[SIDA_RNN_LAYERS_MAX][directions_most];
    float *outs[SIDA_RNN_LAYERS_MAX]; /* [tokens, hidden] of the layers below the top one */
    int64_t items;
    sida_buffer *memory;
    sida_event *through; /* NULL without a gradient_stream */
};

/* Takes `count` floats of something that is laid out. */
static int64_t take(int64_t *used, int64_t count) {
    int64_t at = *used;
    *used += (count + alignment - 1) / alignment * alignment;
    return at;
}
static float *take_at(float *base, int64_t *used, int64_t count) {
    int64_t at = take(used, count);
    return base ? base + at : NULL;
}

static void lay_weights(sida_rnn_cluster *rnn) {
    const int64_t rows = (int64_t)gates * rnn->units;
    for (int32_t l = 0; l < rnn->options.layers; l++)
        for (int32_t d = 0; d < rnn->directions; d++) {
            cell *c = &rnn->cells[l][d];
            c->input_weight = take(&rnn->items, rows * rnn->options.hidden);
            c->recurrent_weight = take(&rnn->items, rows * rnn->units);
            c->input_bias = take(&rnn->items, rows);
            c->recurrent_bias = take(&rnn->items, rows);
        }
}

/* base NULL only counts. */
static int64_t lay_memory(sida_rnn_cluster *rnn, float *base) {
    int64_t used = 0, n = rnn->options.tokens, u = rnn->units;
    for (int32_t l = 0; l < rnn->options.layers; l++) {
        for (int32_t d = 0; d < rnn->directions; d++) {
            cell *c = &rnn->cells[l][d];
            c->gates = take_at(base, &used, n * gates * u);
            c->cells = take_at(base, &used, n * u);
            c->d_biases = take_at(
                base, &used, (int64_t)sida_lstm_train_clusters(rnn->options.sequences) * gates * u);
        }
        if (l + 1 < rnn->options.layers)
            rnn->outs[l] = take_at(base, &used, n * rnn->options.hidden);
    }
    return used;
}

sida_status sida_rnn_cluster_create(sida_rnn_cluster **out, sida_stream *stream,
                                    const sida_rnn_options *options) {
    *out = NULL;
    sida_status status = SIDA_OK;
    sida_rnn_cluster *rnn = NULL;
    int32_t directions = options->bidirectional ? 2 : 1, units = options->hidden / directions;
    if (!options->tf32 || !sida_lstm_train_possible(stream->backend, units))
        SIDA_FAIL(SIDA_ERROR_UNSUPPORTED, "cuda: no kernels here for an LSTM of %d units%s", units,
                  options->tf32 ? "" : " in fp32");
    SIDA_TRY(SIDA_ALLOC(&rnn, 1, "an LSTM"));
    rnn->stream = stream;
    rnn->options = *options;
    rnn->directions = directions;
    rnn->units = units;
    lay_weights(rnn);
    SIDA_TRY(sida_buffer_create(stream->backend, &rnn->memory, SIDA_MEMORY_DEVICE,
                                (size_t)lay_memory(rnn, NULL) * sizeof(float),
                                "what the LSTM keeps for its backward pass"));
    (void)lay_memory(rnn, rnn->memory->data);
    if (options->gradient_stream) SIDA_TRY(sida_event_create(stream->backend, &rnn->through));
    *out = rnn;
    rnn = NULL;
out:
    sida_rnn_cluster_destroy(rnn);
    return status;
}

void sida_rnn_cluster_destroy(sida_rnn_cluster *rnn) {
    if (!rnn) return;
    sida_event_destroy(rnn->through);
    sida_buffer_destroy(rnn->memory);
    free(rnn);
}

size_t sida_rnn_cluster_bytes(const sida_rnn_cluster *rnn) {
    return rnn->memory->bytes;
}

int64_t sida_rnn_cluster_items(const sida_rnn_cluster *rnn) {
    return rnn->items;
}

/* Rows of PyTorch's tensors are gate by gate, ours unit by unit. */
static void swap_rows(float *ours, float *theirs, int64_t units, int64_t cols, bool back) {
    for (int64_t u = 0; u < units; u++)
        for (int64_t g = 0; g < gates; g++) {
            float *here = ours + (u * gates + g) * cols, *there = theirs + (g * units + u) * cols;
            memcpy(back ? there : here, back ? here : there, (size_t)cols * sizeof(float));
        }
}

void sida_rnn_cluster_reorder(const sida_rnn_cluster *rnn, float *space,
                              const sida_rnn_weights *weights, bool back) {
    if (!back) memset(space, 0, (size_t)rnn->items * sizeof(float));
    for (int32_t l = 0; l < rnn->options.layers; l++)
        for (int32_t d = 0; d < rnn->directions; d++) {
            const cell *c = &rnn->cells[l][d];
            const sida_rnn_weights *w = &weights[l * rnn->directions + d];
            const int64_t u = rnn->units;
            swap_rows(space + c->input_weight, w->input_weight, u, rnn->options.hidden, back);
            swap_rows(space + c->recurrent_weight, w->recurrent_weight, u, u, back);
            swap_rows(space + c->input_bias, w->input_bias, u, 1, back);
            swap_rows(space + c->recurrent_bias, w->recurrent_bias, u, 1, back);
        }
}

/* --- a batch */

/* What layer l reads and writes. */
static const float *input_of(const sida_rnn_cluster *rnn, int32_t l, const float *x) {
    return l > 0 ? rnn->outs[l - 1] : x;
}

static sida_lstm_train_call call_of(const sida_rnn_cluster *rnn, int32_t l, int32_t d,
                                    const sida_row_map *rows, int32_t sequences,
                                    const float *weights) {
    const cell *c = &rnn->cells[l][d];
    return (sida_lstm_train_call){.gates = c->gates,
                                  .cells = c->cells,
                                  .ld = rnn->options.hidden,
                                  .recurrent = weights + c->recurrent_weight,
                                  .biases = {weights + c->input_bias, weights + c->recurrent_bias},
                                  .d_biases = c->d_biases,
                                  .rows = *rows,
                                  .sequences = sequences,
                                  .units = rnn->units,
                                  .reverse = d == 1};
}

sida_status sida_rnn_cluster_forward(sida_rnn_cluster *rnn, const sida_row_map *rows,
                                     int32_t sequences, int64_t n, float *y, const float *x,
                                     const float *weights) {
    sida_status status = SIDA_OK;
    const int64_t h = rnn->options.hidden, u = rnn->units;
    for (int32_t l = 0; l < rnn->options.layers; l++)
        for (int32_t d = 0; d < rnn->directions; d++) {
            const cell *c = &rnn->cells[l][d];
            sida_lstm_train_call call = call_of(rnn, l, d, rows, sequences, weights);
            call.out = (l + 1 < rnn->options.layers ? rnn->outs[l] : y) + d * u;
            SIDA_TRY(sida_gemm_cuda(rnn->stream,
                                    &(sida_gemm_call){.c = c->gates,
                                                      .ldc = gates * u,
                                                      .a = input_of(rnn, l, x),
                                                      .lda = h,
                                                      .b = weights + c->input_weight,
                                                      .ldb = h,
                                                      .m = n,
                                                      .n = gates * u,
                                                      .k = h,
                                                      .transpose_b = true},
                                    true));
            SIDA_TRY(sida_lstm_train_forward_cuda(rnn->stream, &call));
        }
out:
    return status;
}

/* Of a layer that is through. */
static sida_status weight_gradients(sida_rnn_cluster *rnn, int32_t l, int32_t sequences, int64_t n,
                                    float *d_weights, const float *x) {
    sida_status status = SIDA_OK;
    const int64_t h = rnn->options.hidden, u = rnn->units;
    sida_stream *stream = rnn->stream;
    if (rnn->options.gradient_stream) {
        stream = rnn->options.gradient_stream;
        SIDA_TRY(sida_event_record(rnn->through, rnn->stream));
        SIDA_TRY(sida_stream_wait(stream, rnn->through));
    }
    for (int32_t d = 0; d < rnn->directions; d++) {
        const cell *c = &rnn->cells[l][d];
        sida_gemm_call product = {.c = d_weights + c->input_weight,
                                  .ldc = h,
                                  .a = c->gates,
                                  .lda = gates * u,
                                  .b = input_of(rnn, l, x),
                                  .ldb = h,
                                  .m = gates * u,
                                  .n = h,
                                  .k = n,
                                  .transpose_a = true,
                                  .add = true};
        SIDA_TRY(sida_gemm_cuda(stream, &product, true));
        product.c = d_weights + c->recurrent_weight;
        product.b = c->cells; /* the outputs, a step later */
        product.ldc = product.ldb = product.n = u;
        SIDA_TRY(sida_gemm_cuda(stream, &product, true));
        float *const biases[2] = {d_weights + c->input_bias, d_weights + c->recurrent_bias};
        SIDA_TRY(sida_lstm_train_biases_cuda(stream, biases,
                                             &(sida_lstm_train_call){.d_biases = c->d_biases,
                                                                     .sequences = sequences,
                                                                     .units = rnn->units}));
    }
out:
    return status;
}

sida_status sida_rnn_cluster_backward(sida_rnn_cluster *rnn, const sida_row_map *rows,
                                      int32_t sequences, int64_t n, float *d_x, float *d_weights,
                                      const float *d_y, const float *x, const float *y,
                                      const float *weights) {
    sida_status status = SIDA_OK;
    const int64_t h = rnn->options.hidden, u = rnn->units;
    const float *above = d_y;
    for (int32_t l = rnn->options.layers - 1; l >= 0; l--) {
        for (int32_t d = 0; d < rnn->directions; d++) {
            sida_lstm_train_call call = call_of(rnn, l, d, rows, sequences, weights);
            /* Only read on the way back. */
            call.out = (float *)(l + 1 < rnn->options.layers ? rnn->outs[l] : y) + d * u;
            call.d_out = above + d * u;
            SIDA_TRY(sida_lstm_train_backward_cuda(rnn->stream, &call));
        }
        SIDA_TRY(weight_gradients(rnn, l, sequences, n, d_weights, x));
        for (int32_t d = 0; d < rnn->directions; d++) {
            const cell *c = &rnn->cells[l][d];
            SIDA_TRY(sida_gemm_cuda(rnn->stream,
                                    &(sida_gemm_call){.c = d_x,
                                                      .ldc = h,
                                                      .a = c->gates,
                                                      .lda = gates * u,
                                                      .b = weights + c->input_weight,
                                                      .ldb = h,
                                                      .m = n,
                                                      .n = h,
                                                      .k = gates * u,
                                                      .add = d > 0},
                                    true));
        }
        above = d_x;
    }
out:
    return status;
}
