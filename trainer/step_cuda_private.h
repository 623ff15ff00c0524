/* Inside step_cuda: its memory is taken in step_cuda.c, its work is issued in step_cuda_run.c. */
#ifndef SIDA_TRAINER_STEP_CUDA_PRIVATE_H
#define SIDA_TRAINER_STEP_CUDA_PRIVATE_H

#include "runtime/ops/ops.h"
#include "runtime/ops/rnn.h"
#include "trainer/step_cuda.h"

enum {
    SIDA_STEP_CHUNK_ROWS = 8192,      /* of embedding rows and of logits that exist at a time */
    SIDA_STEP_SCORE_BYTES = 32 << 20, /* of scores that exist at a time */
    SIDA_STEPS_AHEAD = 2
};

/* Where a trunk's tensors are in the device's order, in floats. */
typedef struct sida_step_places {
    int64_t compress_weight, compress_bias, lstm, residual_weight, residual_bias, heads_weight,
        heads_bias;
} sida_step_places;

/* What forward leaves for backward; n rows of one side. */
typedef struct sida_step_activations {
    float *compressed;   /* [n, hidden] */
    float *out;          /* [n, hidden] of the LSTM */
    float *mixed;        /* [n, hidden] what the heads read, and after them its gradient */
    float *d_out;        /* [n, hidden] */
    float *self, *cross; /* [n, 2] thresholds of the two attentions */
} sida_step_activations;

struct sida_step_cuda {
    sida_stream *stream;
    const sida_ops *ops;
    sida_net_config config;
    sida_net_trunk shapes[2]; /* rows and cols; the pointers are not used */
    sida_step_cuda_options options;
    sida_rnn *rnn[2];
    sida_feed_limits limits; /* what there is memory for */
    /* Parameters, gradient, first and second moments: [count] each, in the order of `places`. */
    sida_buffer *parameters, *staging; /* staging: three of them on the host */
    int64_t count;
    sida_step_places places[2];
    sida_buffer *embedding;
    sida_weight table; /* in it */
    sida_buffer *work; /* activations and scratch */
    sida_step_activations sides[2];
    float *d_compressed; /* [most rows of a side, hidden] */
    float *d_outs;       /* both sides' d_out */
    void *scratch;       /* a chunk of embeddings or logits, or scores */
    size_t scratch_bytes;
    float *sums;          /* of column sums */
    double *partials[2];  /* a side's losses */
    double *partial_norm; /* [SIDA_TRAIN_PARTIALS] */
    sida_adamw_scalars *scalars;
    /* Of each step ahead, on both sides: losses that were summed early, and at the end the rest
     * with the norm. */
    sida_train_result *results[SIDA_STEPS_AHEAD], *host_results[SIDA_STEPS_AHEAD];
    sida_adamw_scalars *host_scalars[SIDA_STEPS_AHEAD];
    sida_buffer *host;
    sida_event *done[SIDA_STEPS_AHEAD];
    int32_t results_most, results_used[SIDA_STEPS_AHEAD];
    bool begun, open[2]; /* a step; its partials hold losses */
    int64_t steps;       /* ended */
};

static inline int64_t sida_step_smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* The device's arrays in their order. */
static inline float *sida_step_array(const sida_step_cuda *step, int which) {
    return (float *)step->parameters->data + which * step->count;
}
enum { SIDA_STEP_PARAMETERS, SIDA_STEP_GRADIENT, SIDA_STEP_FIRST, SIDA_STEP_SECOND };

/* Of the scores that exist at a time, by the shape alone: sums depend on their number. */
size_t sida_step_score_bytes(const sida_step_cuda *step, int32_t sequences, int32_t q_longest,
                             int32_t k_longest);

#endif
