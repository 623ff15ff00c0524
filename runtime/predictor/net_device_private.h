/* Inside net_device: its memory, taken by net_device.c, and what runs in it, net_device_run.c. */
#ifndef SIDA_RUNTIME_PREDICTOR_NET_DEVICE_PRIVATE_H
#define SIDA_RUNTIME_PREDICTOR_NET_DEVICE_PRIVATE_H

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

typedef struct sida_net_lane {
    pthread_mutex_t mutex;
    sida_stream *stream;
    size_t stream_bytes; /* that its ops take */
    sida_buffer *device, *host;
    int64_t rows; /* of a call, at most */
    char *index, *host_index;
    float *wide;       /* [chunk, d_model], then [rows, 4 hidden] gates, then [chunk, outputs] */
    float *compressed; /* [rows, hidden] */
    float *mixed;      /* [rows, hidden]; the LSTM's cells before it */
    float *out;        /* [rows of a call whose outputs no state keeps, hidden] */
    float *workspace;  /* [sequences, 5 hidden] */
    char *results, *host_results; /* experts [n, layers, k] int32, then alpha */
} sida_net_lane;

struct sida_net_device_state {
    sida_net_device *device;
    bool taken, encoded, stepped;
    int32_t sequences;
    float *trunk;  /* [input tokens, hidden]; NULL where nobody attends to it */
    float *carry;  /* [LSTM layers][2][sequences, hidden] h and c of the batch's sequences */
    float *memory; /* [sequences, positions, hidden] the decoder's outputs so far; as trunk */
    /* The host's. */
    int64_t *offsets;  /* [sequences + 1] the encoder's */
    int32_t *position; /* [sequences] the decoder's tokens so far */
};

struct sida_net_device {
    sida_backend *backend;
    const sida_ops *ops;
    sida_net_config config;
    sida_net_trunk trunks[2]; /* on the device */
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

#endif
