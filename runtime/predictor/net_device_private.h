/* Inside net_device: its memory, taken by net_device.c, and what runs in it, net_device_run.c and,
 * of a Transformer, net_device_transformer.c; refinements: net_device_refine.c. */
#ifndef SIDA_RUNTIME_PREDICTOR_NET_DEVICE_PRIVATE_H
#define SIDA_RUNTIME_PREDICTOR_NET_DEVICE_PRIVATE_H

#include "runtime/backend/graphs.h"
#include "runtime/predictor/net_device.h"

#include <pthread.h>

enum {
    /* Rows whose embeddings, and later whose scores, are in memory at once. A constant, so that no
     * product's shape depends on the limits. */
    SIDA_NET_CHUNK_ROWS = 4096,
    SIDA_NET_ZERO_BYTES = 128 << 10 /* one upload of zeros */
};
enum { SIDA_LANE_AHEAD, SIDA_LANE_STEPS, SIDA_LANES };

/* Small arrays of a call with S sequences and n tokens, in one block that goes to the device. */
typedef struct sida_net_index {
    int64_t *offsets;      /* [S + 1] the call's tokens */
    int64_t *memory_start; /* [S] rows of the decoder's memory */
    int64_t *trunk_start;  /* [S] rows of the encoder's outputs */
    int32_t *counts;       /* [S] tokens of the call */
    int32_t *positions;    /* [S] tokens before it */
    int32_t *memory_count; /* [S] with those of the call */
    int32_t *trunk_count;  /* [S] the encoder's */
    int32_t *ids;          /* [n] */
    size_t bytes;
} sida_net_index;

/* Memory, laid out as it is taken; base NULL only counts. */
typedef struct sida_net_layout {
    char *base;
    size_t used;
    bool overflow;
} sida_net_layout;
void *sida_net_layout_part(sida_net_layout *at, int64_t rows, int64_t width, size_t size);
sida_weight sida_net_layout_weight(sida_net_layout *at, sida_dtype dtype, int64_t rows,
                                   int64_t cols);
/* Fills rows `first` and on of a weight in host memory. */
void sida_net_fill(const sida_weight *to, int64_t first, const float *from, int64_t rows,
                   float factor);
/* A buffer as large as was counted. */
sida_status sida_net_device_buffer(sida_net_device *device, sida_buffer **out,
                                   sida_memory_kind kind, const sida_net_layout *counted,
                                   const char *what);

typedef struct sida_net_lane {
    pthread_mutex_t mutex;
    sida_stream *stream;
    size_t stream_bytes; /* that its ops take */
    sida_graphs *graphs; /* a Transformer's */
    sida_buffer *device, *host;
    int64_t rows; /* of a call, at most */
    char *index, *host_index;
    float *wide;       /* [chunk, d_model], then [rows, 4 hidden] gates, then [chunk, outputs] */
    float *compressed; /* [rows, hidden] */
    float *mixed;      /* [rows, hidden]; the LSTM's cells before it */
    float *out;        /* [rows of a call whose outputs no state keeps, hidden] */
    float *workspace;  /* [sequences, 5 hidden] */
    /* A Transformer's residual stream is `compressed`, and its queries, keys and values and what is
     * between up and down are in `wide`; mixed, out and workspace are an LSTM's. */
    void *normed; /* [chunk, d_model], then [rows, hidden], of sida_net_device.activations */
    char *results, *host_results; /* experts [n, layers, k] int32, then alpha */
} sida_net_lane;

/* Of a side's last call, for refinements; features NULL: there is none of that side. */
typedef struct sida_net_device_told {
    float *features; /* [tokens, hidden] what the heads read */
    float *sum;      /* [tokens, R] refine.h */
    bool called;
    int64_t tokens;
    int32_t layers; /* that have told what they chose */
} sida_net_device_told;

struct sida_net_device_state {
    sida_net_device *device;
    bool taken, encoded, stepped;
    int32_t sequences;
    float *trunk;  /* [input tokens, hidden]; NULL where nobody attends to it */
    float *carry;  /* [LSTM layers][2][sequences, hidden] h and c of the batch's sequences */
    float *memory; /* [sequences, positions, hidden] the decoder's outputs so far; as trunk */
    /* A Transformer has no carry; trunk is [input tokens][blocks][2][hidden], the keys and values
     * of cross-attention, and memory [blocks][2][sequences, positions, hidden], those of the
     * decoder's own tokens. */
    /* The host's. */
    int64_t *offsets;  /* [sequences + 1] the encoder's */
    int32_t *position; /* [sequences] the decoder's tokens so far */
    sida_net_device_told told[2];
};

/* A Transformer's parameters on the device, of one type but for positions and biases. */
typedef struct sida_net_device_block {
    sida_weight norm, project, output; /* project: queries, keys, values: [3 hidden, hidden] */
    sida_weight positions;
    sida_weight cross_norm, cross_query, cross_output; /* without an encoder NULL */
    sida_weight up_norm, up, down;
} sida_net_device_block;

typedef struct sida_net_device_transformer {
    sida_weight norm_in, compress, norm_out, heads;
    float *compress_bias, *heads_bias;
    /* A decoder's: all blocks' keys and values of the encoder's outputs as one product, [blocks * 2
     * hidden, hidden]. */
    sida_weight norm_memory, memory;
    sida_net_device_block blocks[SIDA_NET_BLOCKS_MAX];
} sida_net_device_transformer;

/* The refinement's parameters on the device, products' of one type with the network's, and where
 * refinements compute: beside the lane of steps, on its stream and under its lock. */
typedef struct sida_net_device_refine {
    int32_t width; /* R; 0: no refinement, and nothing of this is there */
    struct {
        sida_weight features, heads;      /* heads begin with layer 1's */
        float *bias, *known, *heads_bias; /* refine.h */
    } sides[2];
    sida_buffer *device, *host;
    char *chosen, *host_chosen;   /* [tokens, k] int32 */
    char *results, *host_results; /* experts [tokens, layers, k] int32, then alpha */
    float *z;                     /* [tokens, R] */
    float *scores;                /* [chunk, layers * E] of the layers behind */
} sida_net_device_refine;

struct sida_net_device {
    sida_backend *backend;
    const sida_ops *ops;
    sida_net_config config;
    sida_net_trunk trunks[2]; /* an LSTM's on the device */
    sida_net_device_transformer transformers[2];
    sida_net_device_refine refine;
    sida_dtype weights, activations; /* a Transformer's: of its products, and of what they read */
    sida_weight embedding;
    sida_hash_limits limits;
    sida_net_lane lanes[SIDA_LANES];
    sida_buffer *parameters, *states_memory;
    sida_buffer *zeros;    /* host */
    pthread_mutex_t mutex; /* of the states' `taken` */
    sida_net_device_state *states;
    int64_t *offsets; /* behind the states' pointers */
    int32_t *positions;
};

static inline bool sida_net_device_attends(const sida_net_device *device) {
    return device->config.attention != SIDA_NET_NO_ATTENTION;
}

typedef struct sida_net_call {
    const sida_net_device *device;
    sida_net_lane *lane;
    sida_net_device_state *state;
    int side;
    int32_t sequences, k;
    int64_t tokens;
    sida_net_index host, index; /* the same on the device */
    float *top;                 /* [tokens, hidden] the last LSTM layer's outputs */
} sida_net_call;

/* --- refinements; each does nothing where there are none */

/* Where parameters and states' arrays lie; the parameters' values, once they lie in host memory. */
void sida_net_device_refine_lay(sida_net_device *device, sida_net_layout *at);
void sida_net_device_refine_lay_state(sida_net_device_state *state, sida_net_layout *at,
                                      const sida_net_device *device);
void sida_net_device_refine_fill(const sida_net_device *device, const sida_refine *refine);
/* Takes the memory to compute in. */
sida_status sida_net_device_refine_open(sida_net_device *device);
/* After a call: keeps what a refinement of it starts from. */
sida_status sida_net_device_refine_keep(const sida_net_call *call);

/* --- a Transformer's */

/* Where the parameters lie, and their values, once they lie in host memory. */
void sida_net_device_transformer_lay(sida_net_device *device, sida_net_layout *at);
void sida_net_device_transformer_fill(sida_net_device *device, const sida_net *net);
/* All below the heads: leaves the residual stream in the lane. */
sida_status sida_net_device_transformer_run(const sida_net_call *call);
/* After an encoder's call: puts in the state what the decoder will attend to. */
sida_status sida_net_device_transformer_keep(const sida_net_call *call);
/* The scores of some rows, in the lane's `wide`. */
sida_status sida_net_device_transformer_score(const sida_net_call *call, int64_t first,
                                              int64_t rows);

#endif
