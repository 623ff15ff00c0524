/* The LSTM's forward and backward alone, as the trainer runs them on a GPU (runtime/ops/rnn.h):
 * what a whole step is held against. Gradients of the input and of all weights.
 *
 *   bench_lstm SEQUENCES HIDDEN BLOCKS BLOCK LENGTH...
 *
 * cuDNN in fp32 and with TF32, and our own kernels; a way that is refused for a shape is told on
 * stderr and left out. Prints JSON lines as trainer_torch.py does: a header, then a row a case. A
 * sample is the mean time in a block of BLOCK runs, waited for at its end. */
#include "formats/base/clock.h"
#include "formats/base/memory.h"
#include "formats/base/rng.h"
#include "runtime/ops/rnn.h"
#include "runtime/ops/train_ops.h"

#include <stdio.h>
#include <stdlib.h>

enum { LSTM_LAYERS = 2, WARMUP = 5, SEED = 7 };

typedef struct bench {
    int32_t sequences, hidden, blocks, block, length;
    bool tf32;
    sida_rnn_algorithm algorithm;
    sida_backend *backend;
    sida_stream *stream;
    sida_rnn *rnn;
    sida_buffer *weights, *d_weights, *x, *y, *d_x, *d_y, *indices;
    double *samples_ms; /* [blocks] */
} bench;

/* Uniform in [-1/16, 1/16), PyTorch's range for 256 columns. */
static sida_status make(bench *b, sida_buffer **out, int64_t items) {
    sida_status status = SIDA_OK;
    sida_rng rng = sida_rng_seed(SEED);
    float *values = NULL;
    SIDA_TRY(SIDA_ALLOC(&values, items, "random numbers"));
    for (int64_t i = 0; i < items; i++) values[i] = (sida_rng_f32(&rng) - 0.5f) / 8;
    SIDA_TRY(sida_buffer_create(b->backend, out, SIDA_MEMORY_DEVICE, (size_t)items * sizeof *values,
                                "random numbers"));
    SIDA_TRY(sida_copy(b->stream, (*out)->data, values, (size_t)items * sizeof *values));
    SIDA_TRY(sida_stream_synchronize(b->stream));
out:
    free(values);
    return status;
}

static void close_case(bench *b) {
    sida_buffer **buffers[] = {&b->weights, &b->d_weights, &b->x,      &b->y,
                               &b->d_x,     &b->d_y,       &b->indices};
    if (b->stream) (void)sida_stream_synchronize(b->stream);
    sida_rnn_destroy(b->rnn);
    b->rnn = NULL;
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) {
        sida_buffer_destroy(*buffers[i]);
        *buffers[i] = NULL;
    }
}

static sida_status open_case(bench *b) {
    sida_status status = SIDA_OK;
    int64_t items = (int64_t)b->sequences * b->length * b->hidden;
    int32_t *lengths = NULL;
    const int32_t *starts, *counts;
    SIDA_TRY(sida_rnn_create(&b->rnn, b->stream,
                             &(sida_rnn_options){.hidden = b->hidden,
                                                 .layers = LSTM_LAYERS,
                                                 .sequences = b->sequences,
                                                 .longest = b->length,
                                                 .tokens = (int64_t)b->sequences * b->length,
                                                 .algorithm = b->algorithm,
                                                 .tf32 = b->tf32}));
    SIDA_TRY(make(b, &b->weights, sida_rnn_weight_items(b->rnn)));
    SIDA_TRY(make(b, &b->d_weights, sida_rnn_weight_items(b->rnn)));
    SIDA_TRY(make(b, &b->x, items));
    SIDA_TRY(make(b, &b->y, items));
    SIDA_TRY(make(b, &b->d_x, items));
    SIDA_TRY(make(b, &b->d_y, items));
    /* lengths, then on the device the ranks, the lengths and the steps. */
    int64_t indices = 2 * (int64_t)b->sequences + b->length + 1;
    SIDA_TRY(SIDA_ALLOC(&lengths, indices, "lengths"));
    for (int32_t s = 0; s < b->sequences; s++) lengths[s] = b->length;
    SIDA_TRY(sida_rnn_set_lengths(b->rnn, lengths, b->sequences));
    for (int32_t s = 0; s < b->sequences; s++) lengths[b->sequences + s] = s;
    sida_rnn_steps(b->rnn, lengths + 2 * b->sequences);
    SIDA_TRY(sida_buffer_create(b->backend, &b->indices, SIDA_MEMORY_DEVICE,
                                (size_t)indices * sizeof *lengths, "indices"));
    SIDA_TRY(sida_copy(b->stream, b->indices->data, lengths, (size_t)indices * sizeof *lengths));
    SIDA_TRY(sida_stream_synchronize(b->stream));
    counts = b->indices->data;
    starts = counts + b->sequences;
    sida_rnn_set_rows(b->rnn, &(sida_row_map){starts, starts + b->sequences, counts, b->length},
                      b->sequences);
out:
    free(lengths);
    return status;
}

static sida_status run(bench *b, int32_t count) {
    sida_status status = SIDA_OK;
    for (int32_t i = 0; i < count; i++) {
        SIDA_TRY(sida_rnn_forward(b->rnn, b->y->data, b->x->data, b->weights->data));
        SIDA_TRY(sida_rnn_backward(b->rnn, b->d_x->data, b->d_weights->data, b->d_y->data,
                                   b->x->data, b->y->data, b->weights->data));
    }
    SIDA_TRY(sida_stream_synchronize(b->stream));
out:
    return status;
}

static const char *algorithm_name(sida_rnn_algorithm algorithm) {
    return algorithm == SIDA_RNN_STANDARD ? "cudnn" : "cluster";
}

static sida_status measure(bench *b) {
    sida_status status = SIDA_OK;
    SIDA_TRY(open_case(b));
    SIDA_TRY(run(b, WARMUP));
    for (int32_t i = 0; i < b->blocks; i++) {
        double begin = sida_clock_seconds();
        SIDA_TRY(run(b, b->block));
        b->samples_ms[i] = (sida_clock_seconds() - begin) * 1e3 / b->block;
    }
    printf("{\"kind\": \"row\", \"mode\": \"lstm-sida-%s-%s\", \"experts\": 0, \"batch\": %d, "
           "\"length\": %d, \"hidden\": %d, \"device_bytes\": %zu, \"samples_ms\": [",
           algorithm_name(b->algorithm), b->tf32 ? "tf32" : "fp32", b->sequences, b->length,
           b->hidden, sida_rnn_bytes(b->rnn));
    for (int32_t i = 0; i < b->blocks; i++) printf("%s%.6f", i > 0 ? ", " : "", b->samples_ms[i]);
    puts("]}");
out:
    close_case(b);
    return status;
}

static sida_status measure_all(bench *b, const int32_t *lengths, int32_t count) {
    sida_status status = SIDA_OK;
    sida_device_info info;
    SIDA_TRY(sida_backend_create_named(&b->backend, "cuda"));
    SIDA_TRY(sida_backend_describe(b->backend, &info));
    SIDA_TRY(sida_stream_create(b->backend, &b->stream, SIDA_STREAM_COMPUTE));
    SIDA_TRY(SIDA_ALLOC(&b->samples_ms, b->blocks, "samples"));
    printf("{\"kind\": \"header\", \"device\": \"%s\"}\n", info.name);
    for (int32_t i = 0; i < count; i++)
        for (int32_t way = 0; way < 3; way++) {
            b->length = lengths[i];
            b->tf32 = way > 0;
            b->algorithm = way == 2 ? SIDA_RNN_CLUSTER : SIDA_RNN_STANDARD;
            status = measure(b);
            if (status == SIDA_ERROR_UNSUPPORTED && sida_rnn_built()) {
                fprintf(stderr, "bench_lstm: left out: %s\n", sida_last_message());
                status = SIDA_OK;
            }
            if (status != SIDA_OK) goto out;
        }
out:
    return status;
}

int main(int argc, char **argv) {
    bench b = {0};
    int32_t *const numbers[] = {&b.sequences, &b.hidden, &b.blocks, &b.block};
    int32_t fixed = sizeof numbers / sizeof *numbers, lengths[16], count = argc - 1 - fixed;
    bool good = count >= 1 && count <= (int32_t)(sizeof lengths / sizeof *lengths);
    for (int32_t i = 0; good && i < argc - 1; i++) {
        int32_t value = atoi(argv[i + 1]);
        *(i < fixed ? numbers[i] : &lengths[i - fixed]) = value;
        good = value >= 1 && value <= 1 << 13;
    }
    if (!good) {
        fprintf(stderr, "usage: bench_lstm SEQUENCES HIDDEN BLOCKS BLOCK LENGTH...\n");
        return 2;
    }
    sida_status status = measure_all(&b, lengths, count);
    if (status != SIDA_OK) fprintf(stderr, "bench_lstm: %s\n", sida_last_message());
    sida_stream_destroy(b.stream);
    sida_backend_destroy(b.backend);
    free(b.samples_ms);
    return status == SIDA_OK ? 0 : 1;
}
