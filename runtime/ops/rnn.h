/* The predictor's stack of LSTM layers on cuDNN: forward for training and backward. All layers read
 * and write `hidden` columns, no dropout, zero initial states; gates in the order i, f, g, o, two
 * biases a gate, as PyTorch's nn.LSTM. With two directions each has half of the columns, the
 * forward one the first, and the layer above reads both.
 *
 * Rows. Sequences are ranked by falling length, ties as the caller likes. Token t of the sequence
 * of rank r lies in row step[t] + r (sida_rnn_steps): at time t only the sequences that are longer
 * than t have rows. */
#ifndef SIDA_RUNTIME_OPS_RNN_H
#define SIDA_RUNTIME_OPS_RNN_H

#include "runtime/backend/backend.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SIDA_RNN_LAYERS_MAX = 4 };

typedef enum sida_rnn_algorithm {
    SIDA_RNN_STANDARD, /* cuDNN's: a product a step */
    /* Ours (lstm_train.h): TF32, devices and widths of sida_lstm_train_possible(). */
    SIDA_RNN_CLUSTER
} sida_rnn_algorithm;

struct sida_row_map; /* train_ops.h */

typedef struct sida_rnn sida_rnn;

typedef struct sida_rnn_options {
    int32_t hidden, layers;
    bool bidirectional;         /* hidden is even */
    int32_t sequences, longest; /* of a batch, at most */
    int64_t tokens;             /* rows of a batch, at most */
    sida_rnn_algorithm algorithm;
    bool tf32; /* products may round their factors to TF32 */
    /* Another one on the same stream, or NULL: its cuDNN handle and workspace are used too, it is
     * to be destroyed after this one. */
    sida_rnn *beside;
    /* SIDA_RNN_CLUSTER issues the gradients of a layer's weights here, once the layer is through,
     * beside the layer below; the caller makes what reads them wait. NULL: on the same stream. */
    sida_stream *gradient_stream;
} sida_rnn_options;

/* Whether cuDNN was there at compile time. */
bool sida_rnn_built(void);

/* Takes the device memory for such batches: cuDNN's workspace, and what forward keeps for backward.
 * UNSUPPORTED: built without cuDNN, or cuDNN cannot do this; DEVICE: no cuDNN at run time; BUDGET,
 * MEMORY. The stream is borrowed, and all work is issued to it. */
sida_status sida_rnn_create(sida_rnn **out, sida_stream *stream, const sida_rnn_options *options);
void sida_rnn_destroy(sida_rnn *rnn); /* its work must have ended; takes NULL */
/* Device bytes that it holds. */
size_t sida_rnn_bytes(const sida_rnn *rnn);

/* --- parameters: cuDNN's weight space. It is to begin at a multiple of 256 bytes; items that no
 * tensor covers are 0, and so are their gradients, so an optimiser can work on it as it is. */

/* PyTorch's tensors of a direction of a layer, on the host; U units: hidden, or half of it. */
typedef struct sida_rnn_weights {
    float *input_weight, *input_bias;         /* weight_ih [4 U, hidden], bias_ih [4 U] */
    float *recurrent_weight, *recurrent_bias; /* weight_hh [4 U, U], bias_hh [4 U] */
} sida_rnn_weights;

/* Floats of the weight space of all layers. */
int64_t sida_rnn_weight_items(const sida_rnn *rnn);
/* Both ways, between host copies: weights [layers, directions], forward first; space
 * [weight_items]. Gradients too. */
void sida_rnn_pack(const sida_rnn *rnn, float *space, const sida_rnn_weights *weights);
void sida_rnn_unpack(const sida_rnn *rnn, const sida_rnn_weights *weights, const float *space);

/* --- a batch */

/* lengths [sequences], on the host, not rising, >= 0: of ranks 0 … sequences - 1. Holds until the
 * next call. A batch that cuDNN wants more memory for than create foresaw is given it. ARGUMENT
 * beyond the limits. */
sida_status sida_rnn_set_lengths(sida_rnn *rnn, const int32_t *lengths, int32_t sequences);
/* SIDA_RNN_CLUSTER is told the same on the device too, after set_lengths: rows as train_ops.h has
 * them, borrowed, of `sequences`. The others do not read it. */
void sida_rnn_set_rows(sida_rnn *rnn, const struct sida_row_map *rows, int32_t sequences);
/* Rows of the batch, and its longest sequence. */
int64_t sida_rnn_rows(const sida_rnn *rnn);
int32_t sida_rnn_longest(const sida_rnn *rnn);
/* step [longest + 1], on the host: the last item is the number of rows. */
void sida_rnn_steps(const sida_rnn *rnn, int32_t *step);

/* y, x, d_y, d_x: [rows, hidden] on the device, weights in the weight space. y and d_x are written,
 * d_weights is added to. Forward keeps what backward needs, which gets the same x, y and weights.
 * d_x may be d_y with SIDA_RNN_CLUSTER. */
sida_status sida_rnn_forward(sida_rnn *rnn, float *y, const float *x, const float *weights);
sida_status sida_rnn_backward(sida_rnn *rnn, float *d_x, float *d_weights, const float *d_y,
                              const float *x, const float *y, const float *weights);

#endif
