/* A layer of LSTM (Hochreiter and Schmidhuber 1997; PyTorch's gate order i, f, g, o) over ragged
 * sequences, forward and backward. A layer of two directions is two calls that write halves of the
 * same rows. */
#ifndef SIDA_RUNTIME_OPS_LSTM_H
#define SIDA_RUNTIME_OPS_LSTM_H

#include "runtime/ops/linear.h"

#include <stdbool.h>

typedef struct sida_lstm_call {
    float *out;            /* [n, ldo] h_t in the first `hidden` columns */
    int64_t ldo;           /* >= hidden; 0: hidden */
    float *gates;          /* [n, 4 * hidden] in: x W_ihᵀ + b_ih; out: activated i, f, g, o */
    float *cells;          /* [n, hidden] out: c_t */
    sida_weight recurrent; /* W_hh [4 * hidden, hidden], F32 */
    const float *bias;     /* b_hh [4 * hidden] */
    int32_t sequences, hidden;
    const int64_t *offsets; /* [sequences + 1] */
    bool reverse;           /* takes a sequence's tokens from the last to the first */
    /* State: [sequences, hidden], read before the first token taken and written after the last of
     * each sequence (untouched for one without tokens). NULL: zeros, not kept. */
    float *state_h, *state_c;
    float *workspace; /* [sequences, 5 * hidden]; not used on CUDA */
    /* The recurrent product; NULL: sida_linear_cpu, with which a sequence gives the same bytes
     * alone, in a batch and step by step. Training passes sida_linear_gemm_cpu, which is faster.
     * Ignored on CUDA, whose kernels give a sequence the same bytes in any company too. */
    sida_linear_fn *linear;
    /* The other direction, of the same sequences and as many units, or NULL: done by this call too,
     * on CUDA at the same time. Neither reads what the other writes; on the host they may share a
     * workspace. Its own `beside` is NULL. */
    const struct sida_lstm_call *beside;
} sida_lstm_call;

typedef sida_status sida_lstm_fn(sida_stream *stream, const sida_lstm_call *call);
sida_lstm_fn sida_lstm_cpu;

/* Back-propagation through time, from a zero initial state. With d_gates the caller has
 * d x = d_gates W_ih, d W_ih = d_gatesᵀ x and d b_ih = Σ d_gates: sida_linear_backward_cpu. */
typedef struct sida_lstm_backward_call {
    float *d_gates;     /* [n, 4 * hidden] out: gradient of the gates before activation */
    float *d_recurrent; /* [4 * hidden, hidden]: added to */
    float *d_bias;      /* [4 * hidden], b_hh: added to */
    const float *d_out; /* [n, ldo] gradient of h_t from outside */
    const float *out;   /* [n, ldo], with gates and cells what the forward call left */
    int64_t ldo;        /* as the forward call's */
    const float *gates; /* [n, 4 * hidden] activated */
    const float *cells; /* [n, hidden] */
    sida_weight recurrent;
    int32_t sequences, hidden;
    const int64_t *offsets; /* [sequences + 1] */
    bool reverse;
    float *workspace; /* [n + 6 * sequences, hidden] */
} sida_lstm_backward_call;
sida_status sida_lstm_backward_cpu(const sida_lstm_backward_call *call);

#endif
