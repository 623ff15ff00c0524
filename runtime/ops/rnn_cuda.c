#include "runtime/ops/rnn.h"

#include "formats/base/memory.h"
#include "runtime/backend/backend_cuda.h"
#include "runtime/ops/cudnn_cuda.h"
#include "runtime/ops/rnn_cluster.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* Matrices of a direction of a layer as cuDNN counts them: of the input for i, f, g, o, then of the
 * state. */
enum { gates = 4, matrices = 2 * gates };

/* A matrix and its bias in the weight space, in floats from its begin. */
typedef struct place {
    int64_t weight, bias;
} place;

struct sida_rnn {
    sida_stream *stream;
    const sida_cudnn *cudnn;
    sida_rnn_options options;
    cudnnHandle_t handle; /* NULL where another one's is used */
    cudnnRNNDescriptor_t rnn;
    cudnnRNNDataDescriptor_t data; /* x and y are alike */
    cudnnTensorDescriptor_t state; /* of h and c, which begin as zeros and are not kept */
    cudnnDropoutDescriptor_t dropout;
    sida_buffer *workspace;                /* NULL where another one's is used */
    sida_buffer *reserve;                  /* from forward to backward */
    size_t workspace_bytes, reserve_bytes; /* of the batch */
    size_t weight_bytes;
    place places[2 * SIDA_RNN_LAYERS_MAX][matrices]; /* of each pseudo-layer */
    int32_t *lengths;                                /* [options.sequences] of the batch */
    int32_t sequences;                               /* of the batch, without the empty ones */
    int32_t longest;
    int64_t rows;
    sida_rnn_cluster *cluster; /* not NULL: the rest is of no use but the options and the batch */
    sida_row_map map;          /* its rows */
    int32_t mapped;            /* sequences in it */
};

/* cuDNN's pseudo-layers: layer by layer, in each the forward direction, then the other. */
static int32_t pseudo_layers(const sida_rnn *rnn) {
    return rnn->options.layers * (rnn->options.bidirectional ? 2 : 1);
}

/* Of one direction. */
static int32_t units_of(const sida_rnn *rnn) {
    return rnn->options.hidden / (rnn->options.bidirectional ? 2 : 1);
}

/* Of a matrix that reads the layer's input, which is `hidden` wide in every layer, or the state. */
static int64_t columns_of(const sida_rnn *rnn, int32_t matrix) {
    return matrix < gates ? rnn->options.hidden : units_of(rnn);
}

bool sida_rnn_built(void) {
    return true;
}

static sida_status check(const sida_rnn *rnn, cudnnStatus_t code, const char *call) {
    if (code == CUDNN_STATUS_SUCCESS) return SIDA_OK;
    (void)cudaGetLastError();
    const char *what = rnn->cudnn->status_string(code);
    if (CUDNN_STATUS_CATEGORY(code) == CUDNN_STATUS_NOT_SUPPORTED)
        return sida_fail(SIDA_ERROR_UNSUPPORTED,
                         "cuda: %s: %s, for an LSTM of %d layers of %d%s; train with --device cpu",
                         call, what, rnn->options.layers, rnn->options.hidden,
                         rnn->options.bidirectional ? " in two directions" : "");
    bool memory = CUDNN_STATUS_CATEGORY(code) == CUDNN_STATUS_INTERNAL_ERROR ||
                  code == CUDNN_STATUS_NOT_INITIALIZED;
    return sida_fail(SIDA_ERROR_DEVICE, "cuda: %s: %s%s", call, what,
                     memory ? ": is there device memory left?" : "");
}
/* As SIDA_TRY, for a function of cuDNN's table. */
#define CUDNN_TRY(rnn, function, ...)                                                              \
    SIDA_TRY(check((rnn), (rnn)->cudnn->function(__VA_ARGS__), "cuDNN's " #function))

static sida_rnn *owner(sida_rnn *rnn) {
    while (rnn->options.beside) rnn = rnn->options.beside;
    return rnn;
}

/* --- making one */

static sida_status describe(sida_rnn *rnn) {
    sida_status status = SIDA_OK;
    const sida_rnn_options *o = &rnn->options;
    cudnnHandle_t handle = owner(rnn)->handle;
    int32_t units = units_of(rnn);
    CUDNN_TRY(rnn, create_dropout, &rnn->dropout);
    CUDNN_TRY(rnn, set_dropout, rnn->dropout, handle, 0, NULL, 0, 0);
    CUDNN_TRY(rnn, create_rnn, &rnn->rnn);
    CUDNN_TRY(rnn, set_rnn, rnn->rnn, CUDNN_RNN_ALGO_STANDARD, CUDNN_LSTM, CUDNN_RNN_DOUBLE_BIAS,
              o->bidirectional ? CUDNN_BIDIRECTIONAL : CUDNN_UNIDIRECTIONAL, CUDNN_LINEAR_INPUT,
              CUDNN_DATA_FLOAT, CUDNN_DATA_FLOAT, o->tf32 ? CUDNN_DEFAULT_MATH : CUDNN_FMA_MATH,
              o->hidden, units, units, o->layers, rnn->dropout, CUDNN_RNN_PADDED_IO_DISABLED);
    CUDNN_TRY(rnn, create_data, &rnn->data);
    CUDNN_TRY(rnn, create_tensor, &rnn->state);
    CUDNN_TRY(rnn, weight_bytes, handle, rnn->rnn, &rnn->weight_bytes);
out:
    return status;
}

static int64_t tensor_items(const sida_rnn *rnn, cudnnTensorDescriptor_t tensor) {
    cudnnDataType_t type;
    int rank = 0, shape[3] = {0}, strides[3];
    if (rnn->cudnn->get_tensor(tensor, 3, &type, &rank, shape, strides) != CUDNN_STATUS_SUCCESS ||
        rank != 3 || type != CUDNN_DATA_FLOAT)
        return -1;
    return (int64_t)shape[0] * shape[1] * shape[2];
}

/* Where cuDNN has the matrices. It answers with addresses in a weight space at `base`, which it
 * does not touch. */
static sida_status find_places(sida_rnn *rnn) {
    sida_status status = SIDA_OK;
    const int64_t units = units_of(rnn);
    cudnnTensorDescriptor_t weight = NULL, bias = NULL;
    char *base = rnn->reserve->data;
    CUDNN_TRY(rnn, create_tensor, &weight);
    CUDNN_TRY(rnn, create_tensor, &bias);
    for (int32_t l = 0; l < pseudo_layers(rnn); l++)
        for (int32_t m = 0; m < matrices; m++) {
            void *weights = NULL, *biases = NULL;
            CUDNN_TRY(rnn, weight_parameters, owner(rnn)->handle, rnn->rnn, l, rnn->weight_bytes,
                      base, m, weight, &weights, bias, &biases);
            if (!weights || !biases || tensor_items(rnn, weight) != units * columns_of(rnn, m) ||
                tensor_items(rnn, bias) != units)
                SIDA_FAIL(SIDA_ERROR_UNSUPPORTED,
                          "cuda: cuDNN %zu lays an LSTM's weights out in a way that is not known; "
                          "train with --device cpu",
                          rnn->cudnn->version());
            rnn->places[l][m] = (place){((char *)weights - base) / (int64_t)sizeof(float),
                                        ((char *)biases - base) / (int64_t)sizeof(float)};
        }
out:
    if (weight) (void)rnn->cudnn->destroy_tensor(weight);
    if (bias) (void)rnn->cudnn->destroy_tensor(bias);
    return status;
}

/* The batch of the limits, which takes the most memory as far as can be said. */
static sida_status foresee(sida_rnn *rnn) {
    sida_status status = SIDA_OK;
    const sida_rnn_options *o = &rnn->options;
    int32_t *lengths = NULL;
    int64_t count = o->sequences < o->tokens ? o->sequences : o->tokens;
    int64_t longest = o->longest < o->tokens ? o->longest : o->tokens;
    SIDA_TRY(SIDA_ALLOC(&lengths, count, "the lengths of a batch"));
    int64_t left = o->tokens - count; /* one for each, the others from the front */
    for (int64_t s = 0; s < count; s++) {
        int64_t more = left < longest - 1 ? left : longest - 1;
        lengths[s] = 1 + (int32_t)more;
        left -= more;
    }
    SIDA_TRY(sida_rnn_set_lengths(rnn, lengths, (int32_t)count));
out:
    free(lengths);
    return status;
}

sida_status sida_rnn_create(sida_rnn **out, sida_stream *stream, const sida_rnn_options *options) {
    *out = NULL;
    sida_status status = SIDA_OK;
    sida_rnn *rnn = NULL;
    assert(stream->kind == SIDA_STREAM_COMPUTE && options->hidden > 0 && options->layers > 0 &&
           options->layers <= SIDA_RNN_LAYERS_MAX && options->sequences > 0 &&
           options->longest > 0 && options->tokens > 0 &&
           (!options->bidirectional || options->hidden % 2 == 0));
    assert(!options->beside || options->beside->stream == stream);
    SIDA_TRY(sida_cuda_use(stream->backend));
    SIDA_TRY(SIDA_ALLOC(&rnn, 1, "an LSTM on cuDNN"));
    rnn->stream = stream;
    rnn->options = *options;
    SIDA_TRY(SIDA_ALLOC(&rnn->lengths, options->sequences, "the lengths of a batch"));
    if (options->algorithm == SIDA_RNN_CLUSTER) {
        SIDA_TRY(sida_rnn_cluster_create(&rnn->cluster, stream, options));
        *out = rnn;
        rnn = NULL;
        goto out;
    }
    SIDA_TRY(sida_cudnn_load(&rnn->cudnn));
    if (!options->beside) {
        CUDNN_TRY(rnn, create, &rnn->handle);
        CUDNN_TRY(rnn, set_stream, rnn->handle, sida_cuda_stream_of(stream)->stream);
    }
    SIDA_TRY(describe(rnn));
    SIDA_TRY(foresee(rnn));
    SIDA_TRY(find_places(rnn));
    *out = rnn;
    rnn = NULL;
out:
    sida_rnn_destroy(rnn);
    return status;
}

void sida_rnn_destroy(sida_rnn *rnn) {
    if (!rnn) return;
    const sida_cudnn *cudnn = rnn->cudnn;
    sida_rnn_cluster_destroy(rnn->cluster);
    sida_buffer_destroy(rnn->workspace);
    sida_buffer_destroy(rnn->reserve);
    if (rnn->state) (void)cudnn->destroy_tensor(rnn->state);
    if (rnn->data) (void)cudnn->destroy_data(rnn->data);
    if (rnn->rnn) (void)cudnn->destroy_rnn(rnn->rnn);
    if (rnn->dropout) (void)cudnn->destroy_dropout(rnn->dropout);
    if (rnn->handle) (void)cudnn->destroy(rnn->handle);
    free(rnn->lengths);
    free(rnn);
}

size_t sida_rnn_bytes(const sida_rnn *rnn) {
    if (rnn->cluster) return sida_rnn_cluster_bytes(rnn->cluster);
    return (rnn->workspace ? rnn->workspace->bytes : 0) + (rnn->reserve ? rnn->reserve->bytes : 0);
}

/* --- parameters */

int64_t sida_rnn_weight_items(const sida_rnn *rnn) {
    if (rnn->cluster) return sida_rnn_cluster_items(rnn->cluster);
    return (int64_t)(rnn->weight_bytes / sizeof(float));
}

/* One matrix and its bias in PyTorch's tensors: gate by gate, cuDNN's order. */
typedef struct piece {
    float *weight, *bias;
    size_t weight_bytes, bias_bytes;
} piece;

static piece piece_of(const sida_rnn *rnn, const sida_rnn_weights *layer, int32_t matrix) {
    int64_t gate = matrix % gates, units = units_of(rnn), items = units * columns_of(rnn, matrix);
    bool input = matrix < gates;
    return (piece){(input ? layer->input_weight : layer->recurrent_weight) + gate * items,
                   (input ? layer->input_bias : layer->recurrent_bias) + gate * units,
                   (size_t)items * sizeof(float), (size_t)units * sizeof(float)};
}

void sida_rnn_pack(const sida_rnn *rnn, float *space, const sida_rnn_weights *weights) {
    if (rnn->cluster) return sida_rnn_cluster_reorder(rnn->cluster, space, weights, false);
    memset(space, 0, rnn->weight_bytes);
    for (int32_t l = 0; l < pseudo_layers(rnn); l++)
        for (int32_t m = 0; m < matrices; m++) {
            piece from = piece_of(rnn, &weights[l], m);
            memcpy(space + rnn->places[l][m].weight, from.weight, from.weight_bytes);
            memcpy(space + rnn->places[l][m].bias, from.bias, from.bias_bytes);
        }
}

void sida_rnn_unpack(const sida_rnn *rnn, const sida_rnn_weights *weights, const float *space) {
    if (rnn->cluster)
        return sida_rnn_cluster_reorder(rnn->cluster, (float *)(uintptr_t)space, weights, true);
    for (int32_t l = 0; l < pseudo_layers(rnn); l++)
        for (int32_t m = 0; m < matrices; m++) {
            piece to = piece_of(rnn, &weights[l], m);
            memcpy(to.weight, space + rnn->places[l][m].weight, to.weight_bytes);
            memcpy(to.bias, space + rnn->places[l][m].bias, to.bias_bytes);
        }
}

/* --- a batch */

/* At least `bytes` of room, whose contents do not matter. */
static sida_status reserve_bytes(sida_rnn *rnn, sida_buffer **buffer, size_t bytes,
                                 const char *what) {
    sida_status status = SIDA_OK;
    if (*buffer && (*buffer)->bytes >= bytes) return SIDA_OK;
    if (*buffer) SIDA_TRY(sida_stream_synchronize(rnn->stream));
    sida_buffer_destroy(*buffer);
    *buffer = NULL;
    SIDA_TRY(sida_buffer_create(rnn->stream->backend, buffer, SIDA_MEMORY_DEVICE,
                                bytes > 0 ? bytes : 1, what));
out:
    return status;
}

/* The batch to cuDNN. */
static sida_status describe_batch(sida_rnn *rnn) {
    sida_status status = SIDA_OK;
    const sida_rnn_options *o = &rnn->options;
    float padding = 0;
    const int units = units_of(rnn), shape[3] = {pseudo_layers(rnn), rnn->sequences, units},
              strides[3] = {rnn->sequences * units, units, 1};
    CUDNN_TRY(rnn, set_tensor, rnn->state, CUDNN_DATA_FLOAT, 3, shape, strides);
    CUDNN_TRY(rnn, set_data, rnn->data, CUDNN_DATA_FLOAT, CUDNN_RNN_DATA_LAYOUT_SEQ_MAJOR_PACKED,
              rnn->longest, rnn->sequences, o->hidden, rnn->lengths, &padding);
    CUDNN_TRY(rnn, space_sizes, owner(rnn)->handle, rnn->rnn, CUDNN_FWD_MODE_TRAINING, rnn->data,
              &rnn->workspace_bytes, &rnn->reserve_bytes);
    SIDA_TRY(reserve_bytes(rnn, &owner(rnn)->workspace, rnn->workspace_bytes, "cuDNN's workspace"));
    SIDA_TRY(reserve_bytes(rnn, &rnn->reserve, rnn->reserve_bytes,
                           "what the LSTM keeps for its backward pass"));
out:
    return status;
}

sida_status sida_rnn_set_lengths(sida_rnn *rnn, const int32_t *lengths, int32_t sequences) {
    sida_status status = SIDA_OK;
    const sida_rnn_options *o = &rnn->options;
    int64_t rows = 0;
    int32_t count = 0; /* cuDNN takes no empty sequences */
    for (int32_t s = 0; s < sequences; s++) {
        assert(lengths[s] >= 0 && (s == 0 || lengths[s] <= lengths[s - 1]));
        if (lengths[s] > 0) count = s + 1;
        rows += lengths[s];
    }
    rnn->sequences = rnn->longest = 0;
    rnn->rows = 0;
    if (count == 0) return SIDA_OK;
    if (count > o->sequences || lengths[0] > o->longest || rows > o->tokens || rows > INT32_MAX)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT,
                  "a batch of %d sequences of at most %d tokens, %" PRId64
                  " rows: the LSTM was made for %d, %d and %" PRId64,
                  count, lengths[0], rows, o->sequences, o->longest, o->tokens);
    SIDA_TRY(sida_cuda_use(rnn->stream->backend));
    memcpy(rnn->lengths, lengths, (size_t)count * sizeof *lengths);
    rnn->sequences = count;
    rnn->longest = lengths[0];
    rnn->rows = rows;
    rnn->mapped = 0;
    if (!rnn->cluster) SIDA_TRY(describe_batch(rnn));
out:
    if (status != SIDA_OK) rnn->rows = 0;
    return status;
}

void sida_rnn_set_rows(sida_rnn *rnn, const sida_row_map *rows, int32_t sequences) {
    assert(!rnn->cluster || sequences <= rnn->options.sequences);
    rnn->map = *rows;
    rnn->mapped = sequences;
}

int64_t sida_rnn_rows(const sida_rnn *rnn) {
    return rnn->rows;
}

int32_t sida_rnn_longest(const sida_rnn *rnn) {
    return rnn->longest;
}

void sida_rnn_steps(const sida_rnn *rnn, int32_t *step) {
    int32_t running = rnn->sequences;
    step[0] = 0;
    for (int32_t t = 0; t < rnn->longest; t++) {
        while (running > 0 && rnn->lengths[running - 1] <= t) running--;
        step[t + 1] = step[t] + running;
    }
}

/* cuDNN has its own copy of the lengths in `data`; since 8.9 it wants none on the device. */
sida_status sida_rnn_forward(sida_rnn *rnn, float *y, const float *x, const float *weights) {
    sida_status status = SIDA_OK;
    if (rnn->rows == 0) return SIDA_OK;
    if (rnn->cluster)
        return sida_rnn_cluster_forward(rnn->cluster, &rnn->map, rnn->mapped, rnn->rows, y, x,
                                        weights);
    SIDA_TRY(sida_cuda_use(rnn->stream->backend));
    CUDNN_TRY(rnn, forward, owner(rnn)->handle, rnn->rnn, CUDNN_FWD_MODE_TRAINING, NULL, rnn->data,
              x, rnn->data, y, rnn->state, NULL, NULL, rnn->state, NULL, NULL, rnn->weight_bytes,
              weights, rnn->workspace_bytes, owner(rnn)->workspace->data, rnn->reserve_bytes,
              rnn->reserve->data);
out:
    return status;
}

sida_status sida_rnn_backward(sida_rnn *rnn, float *d_x, float *d_weights, const float *d_y,
                              const float *x, const float *y, const float *weights) {
    sida_status status = SIDA_OK;
    if (rnn->rows == 0) return SIDA_OK;
    if (rnn->cluster)
        return sida_rnn_cluster_backward(rnn->cluster, &rnn->map, rnn->mapped, rnn->rows, d_x,
                                         d_weights, d_y, x, y, weights);
    SIDA_TRY(sida_cuda_use(rnn->stream->backend));
    CUDNN_TRY(rnn, backward_data, owner(rnn)->handle, rnn->rnn, NULL, rnn->data, y, d_y, rnn->data,
              d_x, rnn->state, NULL, NULL, NULL, rnn->state, NULL, NULL, NULL, rnn->weight_bytes,
              weights, rnn->workspace_bytes, owner(rnn)->workspace->data, rnn->reserve_bytes,
              rnn->reserve->data);
    CUDNN_TRY(rnn, backward_weights, owner(rnn)->handle, rnn->rnn, CUDNN_WGRAD_MODE_ADD, NULL,
              rnn->data, x, rnn->state, NULL, rnn->data, y, rnn->weight_bytes, d_weights,
              rnn->workspace_bytes, owner(rnn)->workspace->data, rnn->reserve_bytes,
              rnn->reserve->data);
out:
    return status;
}
