/* Inside step_cuda: its memory is taken in step_cuda.c, its work is issued in step_cuda_run.c; what
 * the two kinds of network differ in is in step_cuda_lstm.c and step_cuda_transformer.c. */
#ifndef SIDA_TRAINER_STEP_CUDA_PRIVATE_H
#define SIDA_TRAINER_STEP_CUDA_PRIVATE_H

#include "runtime/ops/ops.h"
#include "runtime/ops/rnn.h"
#include "trainer/step_cuda.h"

enum {
    SIDA_STEP_CHUNK_ROWS = 8192,      /* of embedding rows and of logits that exist at a time */
    SIDA_STEP_SCORE_BYTES = 32 << 20, /* of scores that exist at a time */
    SIDA_STEP_ALIGNMENT = 256
};

/* Of an attention of several heads; h: hidden. */
typedef struct sida_step_attend {
    float *query;     /* [n, h] */
    float *key_value; /* [rows of keys, 2 h] */
    float *out;       /* [n, h] before its last product */
} sida_step_attend;

enum { SIDA_STEP_STATES = 3 * SIDA_NET_BLOCKS_MAX + 1 };

/* What forward leaves for backward; n rows of one side. */
typedef struct sida_step_activations {
    float *mixed; /* [n, hidden] what the heads read, and after them its gradient */
    /* [n, hidden] the gradient of what the other side reads: the LSTM's outputs, a Transformer's
     * last x, and then of every x before it. */
    float *d_out;
    union {
        struct {
            float *compressed;   /* [n, hidden] */
            float *out;          /* [n, hidden] of the LSTM */
            float *self, *cross; /* [n, 2] thresholds of the two attentions */
        } lstm;
        struct {
            float *x[SIDA_STEP_STATES]; /* [n, hidden] before and behind all that adds to it */
            sida_step_attend self[SIDA_NET_BLOCKS_MAX], cross[SIDA_NET_BLOCKS_MAX];
            float *up[SIDA_NET_BLOCKS_MAX]; /* [n, SIDA_NET_UP * hidden] behind relu */
        } transformer;
    } of;
} sida_step_activations;

typedef struct sida_step_kind sida_step_kind;

struct sida_step_cuda {
    const sida_step_kind *kind;
    sida_stream *stream;
    /* The second stream, for what the first need not wait for: it fills the processors that a
     * recurrence leaves, and the gaps between kernels. */
    struct {
        sida_stream *stream;
        sida_event *fork, *mark;
        float *sums; /* as below */
    } beside;
    const sida_ops *ops;
    sida_net_config config;
    sida_net *net; /* shapes; its parameters are not used, but their addresses name tensors */
    sida_step_cuda_options options;
    sida_feed_limits limits; /* what there is memory for */
    /* Parameters, gradient, first and second moments: [count] each, in the order of `places`. */
    sida_buffer *parameters, *staging; /* staging: three of them on the host */
    int64_t count;
    int64_t *places;  /* [tensor_count] in floats; -1 for an LSTM's */
    int64_t lstms[2]; /* where a side's LSTM has its weight space */
    sida_buffer *embedding;
    sida_weight table; /* in it */
    sida_buffer *work; /* activations and scratch */
    sida_step_activations sides[2];
    float *d_outs; /* both sides' d_out */
    void *scratch; /* a chunk of embeddings or logits, or scores */
    size_t scratch_bytes;
    float *sums;         /* of column sums */
    double *partials[2]; /* a side's losses */
    void *finish;        /* sida_train_finish_cuda's workspace */
    struct {
        sida_rnn *rnn[2];
        bool in_place[2];    /* its d_x may be its d_y */
        float *d_compressed; /* [most rows of a side, hidden]; NULL: always in place of d_out */
    } lstm;
    struct {
        float *memory, *d_memory; /* [rows of the encoder, hidden] what cross-attention reads */
        /* [most rows of a side, hidden]: a norm's output and its gradient, that of an attention's
         * output and queries; […, 2 hidden or more] of keys and values, of up's output. */
        float *normed, *d_normed, *d_attended, *d_wide;
    } transformer;
    /* Of each step ahead, on both sides: losses that were summed early, and at the end the rest
     * with the norm. */
    sida_train_result *results[SIDA_STEPS_AHEAD], *host_results[SIDA_STEPS_AHEAD];
    sida_buffer *host;
    sida_event *done[SIDA_STEPS_AHEAD];
    int32_t results_most, results_used[SIDA_STEPS_AHEAD];
    bool begun, open[2]; /* a step; its partials hold losses */
    int64_t steps;       /* ended */
};

static inline int64_t sida_step_smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t sida_step_larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}
static inline bool sida_step_present(const sida_step_cuda *step, int side) {
    return step->config.layers[side] > 0;
}

/* The device's arrays in their order. */
static inline float *sida_step_array(const sida_step_cuda *step, int which) {
    return (float *)step->parameters->data + which * step->count;
}
enum { SIDA_STEP_PARAMETERS, SIDA_STEP_GRADIENT, SIDA_STEP_FIRST, SIDA_STEP_SECOND };

/* A tensor of step->net in such an array. */
float *sida_step_tensor(const sida_step_cuda *step, int which, const float *tensor);

/* --- memory, laid out as it is taken; base NULL only counts */

typedef struct sida_step_layout {
    char *base;
    size_t used;
} sida_step_layout;
void *sida_step_area(sida_step_layout *at, int64_t rows, int64_t width, size_t size);
static inline float *sida_step_floats(sida_step_layout *at, int64_t rows, int64_t width) {
    return sida_step_area(at, rows, width, sizeof(float));
}

/* Of the scores that exist at a time, by the shape alone: sums depend on their number. */
size_t sida_step_score_bytes(const sida_step_cuda *step, int32_t sequences, int32_t q_longest,
                             int32_t k_longest);

/* --- the two streams */

/* What is issued beside from now on waits for all that the step's stream has been issued. */
sida_status sida_step_fork(sida_step_cuda *step);
/* What the step's stream is issued from await on waits for all that was beside it at the mark. */
sida_status sida_step_mark(sida_step_cuda *step);
sida_status sida_step_await(sida_step_cuda *step);

/* --- a step */

/* One side of a part under way, and where its work is issued. */
typedef struct sida_step_side {
    sida_step_cuda *step;
    sida_stream *stream;
    float *sums; /* for column sums on it */
    const sida_feed_part *part;
    const sida_feed_side *rows;
    const sida_step_activations *a;
    int side;
    int64_t n;
    float scale;
    bool embedded; /* the first chunk's rows of the embedding are in the scratch */
} sida_step_side;

/* The same, beside. */
static inline sida_step_side sida_step_beside(const sida_step_side *q) {
    sida_step_side beside = *q;
    beside.stream = q->step->beside.stream;
    beside.sums = q->step->beside.sums;
    return beside;
}

static inline sida_row_map sida_step_rows(const sida_step_side *q) {
    return (sida_row_map){q->rows->start, q->rows->step, q->rows->count, q->rows->longest};
}
/* The rows of side `keys` of the same sequences. */
static inline sida_row_map sida_step_keys(const sida_step_side *q, int keys) {
    const sida_feed_side *k = &q->part->sides[keys];
    if (keys == q->side) return sida_step_rows(q);
    return (sida_row_map){q->rows->other_start, k->step, q->rows->other_count, k->longest};
}
/* Of [n, hidden]. */
static inline size_t sida_step_activation_bytes(const sida_step_side *q) {
    return (size_t)(q->n * q->step->config.hidden) * sizeof(float);
}

static inline sida_weight sida_step_weight(const sida_step_side *q, const sida_net_linear *layer) {
    return (sida_weight){sida_step_tensor(q->step, SIDA_STEP_PARAMETERS, layer->weight), SIDA_F32,
                         layer->rows, layer->cols};
}
/* y [n, rows] of x [n, cols]. */
sida_status sida_step_linear(const sida_step_side *q, float *y, const float *x,
                             const sida_net_linear *layer, sida_epilogue epilogue, int64_t n);
/* Gradients of the layer's weight and, where `bias`, of its bias, and of what it read where d_x is
 * not NULL: all added. */
sida_status sida_step_linear_backward(const sida_step_side *q, float *d_x, const float *d_y,
                                      const float *x, const sida_net_linear *layer, int64_t n,
                                      bool bias);
/* d_x [n, cols] = d_y [n, rows] W, or += with `add`. */
sida_status sida_step_input_gradient(const sida_step_side *q, float *d_x, const float *d_y,
                                     const sida_net_linear *layer, int64_t n, bool add);
/* Rows of the embedding for rows of the part, into the scratch. */
sida_status sida_step_embed(const sida_step_side *q, int64_t first);
/* The same on the way forward, where the first of all may be there already. */
sida_status sida_step_embed_forward(const sida_step_side *q, int64_t first);
/* Rows of the chunk that begins with row `first`. */
static inline int64_t sida_step_chunk(const sida_step_side *q, int64_t first) {
    return sida_step_smaller(q->n - first, SIDA_STEP_CHUNK_ROWS);
}

/* What the kinds of network do; NULL where one needs nothing. */
struct sida_step_kind {
    /* Memory of its own, before the parameters' are laid out, and its release. */
    sida_status (*reserve)(sida_step_cuda *step, const sida_feed_limits *limits);
    void (*release)(sida_step_cuda *step);
    /* Takes activations and scratch of the work's memory. */
    void (*lay)(sida_step_cuda *step, sida_step_layout *at, const sida_feed_limits *limits);
    size_t (*score_bytes)(const sida_step_cuda *step, int32_t sequences, int32_t q_longest,
                          int32_t k_longest);
    int64_t (*widest)(const sida_step_cuda *step); /* columns that are summed, but the heads' */
    int embeddings;                                /* chunks of embedding rows in the scratch */
    /* Up to what the heads read, and back from its gradient; d_out is 0 before the first. */
    sida_status (*forward)(const sida_step_side *q);
    sida_status (*backward)(const sida_step_side *q);
};
extern const sida_step_kind sida_step_lstm, sida_step_transformer;

#endif
