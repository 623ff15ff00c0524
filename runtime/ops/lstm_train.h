/* A direction of a layer of LSTM in training, on CUDA devices that have clusters of blocks (compute
 * capability 9.0): W_hh stays in the registers of a cluster for all steps, eight sequences share
 * its tensor cores, and h_t, or what goes back to it, passes between the blocks' shared memories.
 * cuDNN launches a kernel or more a step.
 *
 * Factors are rounded to 11 bits, as TF32 has them: W_hh and h_t to fp16 on the way forward, W_hh
 * and the gates' gradients to TF32 on the way back; sums are fp32, in a fixed order. A weight below
 * 6e-5 or above 65504 is outside of fp16's normal range.
 *
 * Here a unit's four gates i, f, g, o lie together: column 4 u + g of a row of gates, and so the
 * rows of the weights and the biases. */
#ifndef SIDA_RUNTIME_OPS_LSTM_TRAIN_H
#define SIDA_RUNTIME_OPS_LSTM_TRAIN_H

#include "runtime/ops/train_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sida_lstm_train_call {
    /* [rows, 4 units]. Forward: in x W_ihᵀ, out activated. Backward: in activated, out their
     * gradient before activation. */
    float *gates;
    /* [rows, units]. Forward: out c_t. Backward: in c_t, out h_{t-1} of the direction's order, 0
     * before the first: the other factor of W_hh's gradient. */
    float *cells;
    float *out;         /* [rows, ld]: h_t in the first `units` columns; backward reads it */
    const float *d_out; /* [rows, ld] backward: gradient of h_t from outside */
    int64_t ld;
    const float *recurrent; /* W_hh [4 units, units] */
    const float *biases[2]; /* [4 units] each: forward */
    /* [sida_lstm_train_clusters, 4 units] backward, out: parts of a bias's gradient. */
    float *d_biases;
    sida_row_map rows; /* of sequences in any order */
    int32_t sequences, units;
    bool reverse; /* takes a sequence's tokens from the last to the first */
} sida_lstm_train_call;

/* Whether the device and this number of units are served. */
bool sida_lstm_train_possible(const sida_backend *backend, int32_t units);
static inline int32_t sida_lstm_train_clusters(int32_t sequences) {
    return (sequences + 7) / 8;
}

sida_status sida_lstm_train_forward_cuda(sida_stream *stream, const sida_lstm_train_call *call);
sida_status sida_lstm_train_backward_cuda(sida_stream *stream, const sida_lstm_train_call *call);
/* The sum of the parts is added to both biases' gradients [4 units]. */
sida_status sida_lstm_train_biases_cuda(sida_stream *stream, float *const d_biases[2],
                                        const sida_lstm_train_call *call);

#ifdef __cplusplus
}
#endif

#endif
