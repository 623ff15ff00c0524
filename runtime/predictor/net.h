/* The predictor's network: its configuration, its parameters, and the forward pass.
 *
 * Encoder: x = relu(compress(e)), h = LSTM(x), o = sparsemax attention of h over its own sequence
 * + residual(x), logits = heads(o). The decoder has a trunk of its own, causal, which also attends
 * with the same queries to the encoder's h. e is the token's input embedding. SiDA-MoE
 * (arXiv 2310.18859), section 3.4, for the encoder; the decoder is ours.
 *
 * Options of ours: the encoder's LSTM in two directions, each of hidden / 2 units, whose outputs
 * stand side by side, the forward one first, for what reads them; softmax in SparseMax's place; no
 * attention, then o = h + residual(x).
 *
 * The other kind of network, ours, is a small Transformer with T5's pre-norm and relative positions
 * (Raffel et al. 2020), of heads of SIDA_NET_HEAD_WIDTH columns, norm(x) = weight * x /
 * rms(x) with T5's epsilon 1e-6, and no biases but in compress and heads:
 *
 *     x = compress(norm_in(e))
 *     each block: x += output(attention(norm(x)));  x += down(relu(up(norm(x))))
 *     logits = heads(norm_out(x))
 *
 * attention: softmax(q kᵀ / √HEAD_WIDTH + positions[bucket(key - query)]) v, 32 buckets, distance
 * 128 at most, both ways in the encoder, causal in the decoder. A decoder's block has
 * cross-attention between the two: queries from norm(x), keys and values from norm_memory(the
 * encoder's last x), no positions. */
#ifndef SIDA_RUNTIME_PREDICTOR_NET_H
#define SIDA_RUNTIME_PREDICTOR_NET_H

#include "formats/predictor_file.h"
#include "formats/ragged.h"
#include "runtime/ops/linear.h"
#include "runtime/ops/sparsemax.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

/* Cells: layer l's only direction is cell l; with two directions they are 2 l, forward, and
 * 2 l + 1. */
enum { SIDA_NET_LSTM_MAX = 4, SIDA_NET_CELLS_MAX = 2 * SIDA_NET_LSTM_MAX };

typedef enum sida_net_attention {
    SIDA_NET_SPARSEMAX, /* the paper's */
    SIDA_NET_SOFTMAX,
    SIDA_NET_NO_ATTENTION
} sida_net_attention;
const char *sida_net_attention_name(sida_net_attention attention); /* sparsemax, softmax, none */
bool sida_net_attention_from_name(sida_net_attention *out, const char *name);

typedef enum sida_net_kind { SIDA_NET_LSTM, SIDA_NET_TRANSFORMER } sida_net_kind;
/* lstm, transformer: the names of their hash sources, too. */
const char *sida_net_kind_name(sida_net_kind kind);
bool sida_net_kind_from_name(sida_net_kind *out, const char *name);

enum {
    SIDA_NET_HEAD_WIDTH = 32, /* a Transformer's hidden is a multiple of it */
    SIDA_NET_BLOCKS_MAX = 8,
    SIDA_NET_BUCKETS = 32,
    SIDA_NET_DISTANCE = 128,
    SIDA_NET_UP = 2 /* up's rows over hidden */
};
#define SIDA_NET_EPSILON 1e-6f /* of a Transformer's norms */

typedef struct sida_net_config {
    sida_net_kind kind;
    int32_t d_model, hidden, experts, vocabulary;
    int32_t lstm_layers; /* LSTM: 1 … SIDA_NET_LSTM_MAX, else 0 */
    int32_t blocks;      /* Transformer, of each side: 1 … SIDA_NET_BLOCKS_MAX, else 0 */
    int32_t layers[2];   /* MoE layers of encoder and decoder; 0: no trunk for that side */
    sida_net_attention attention;
    bool bidirectional; /* the encoder's LSTM; hidden is even then */
} sida_net_config;

/* Directions of a side's LSTM: the decoder has one, as it is causal. */
int sida_net_directions(const sida_net_config *config, int side);

/* The paper's 768 to 256, for any width: d_model / 3 rounded up to a multiple of 64. */
int32_t sida_net_default_hidden(int32_t d_model);
/* ARGUMENT, naming the value, for sizes that no real predictor has and for two directions of an odd
 * width or of no encoder. */
sida_status sida_net_config_check(const sida_net_config *config);

/* A named view of the flat buffer, PyTorch's names and shapes: encoder.compress.weight,
 * encoder.lstm.weight_ih_l0, decoder.heads.bias ... */
typedef struct sida_net_tensor {
    char name[48];
    int rank;
    int64_t shape[2], count;
    float centre, bound; /* initial values are uniform within centre ± bound */
    float *data;
} sida_net_tensor;

typedef struct sida_net_linear {
    float *weight, *bias; /* [rows, cols], [rows] */
    int64_t rows, cols;
} sida_net_linear;

/* A norm's weight is [1, width], without bias. */
typedef struct sida_net_attend {
    sida_net_linear norm, query, key_value, output; /* key_value: [2 hidden, hidden], keys first */
    float *positions;                               /* [SIDA_NET_BUCKETS, heads]; cross: NULL */
} sida_net_attend;

typedef struct sida_net_block {
    sida_net_attend self, cross; /* cross: of a decoder that has an encoder, else all NULL */
    sida_net_linear norm, up, down;
} sida_net_block;

typedef struct sida_net_trunk {
    bool present;
    sida_net_linear compress; /* d_model -> hidden */
    /* Of a Transformer, else NULL; norm_memory where there is cross-attention. */
    sida_net_linear norm_in, norm_memory, norm_out;
    sida_net_block blocks[SIDA_NET_BLOCKS_MAX];
    /* The rest but heads is of an LSTM, else NULL. */
    /* By cell, of U units: hidden, or half of it. */
    sida_net_linear input[SIDA_NET_CELLS_MAX];     /* weight_ih, bias_ih: hidden -> 4 U */
    sida_net_linear recurrent[SIDA_NET_CELLS_MAX]; /* weight_hh, bias_hh: U -> 4 U */
    sida_net_linear residual;                      /* hidden -> hidden */
    sida_net_linear heads;                         /* hidden -> layers * experts */
} sida_net_trunk;

typedef struct sida_net {
    sida_net_config config;
    sida_net_trunk trunks[2];
    sida_net_tensor *tensors;
    int32_t tensor_count;
    float *parameters; /* all of them, in the order of the tensors */
    int64_t parameter_count;
} sida_net;

/* All parameters zero. Also serves as the gradient of a net. */
sida_status sida_net_create(sida_net **out, const sida_net_config *config);
void sida_net_destroy(sida_net *net); /* takes NULL */
/* From a seed of ours: an LSTM's as PyTorch's default; a Transformer's weights uniform, of standard
 * deviation 1/sqrt(fan_in), what writes to the residual stream, positions and biases zero. */
void sida_net_initialise(sida_net *net, uint64_t seed);
sida_weight sida_net_weight(const sida_net_linear *layer);
/* FORMAT for an id that is no row of the embedding. */
sida_status sida_net_check_ids(sida_weight embedding, const sida_ragged *input);

/* The configuration as a JSON object and back: FORMAT when it is incomplete or absurd. Options that
 * are the paper's (one direction, SparseMax) are left out. */
json_t *sida_net_config_to_json(const sida_net_config *config);
sida_status sida_net_config_from_json(sida_net_config *out, const json_t *object, const char *file);
/* /tensors/NAME. Reading checks every shape before memory is taken, and that values are finite. */
sida_status sida_net_write(sida_h5_file *file, const sida_net *net);
sida_status sida_net_read(sida_net **out, sida_h5_file *file, const sida_net_config *config);

/* --- the forward pass */

/* What the last call left of one side; n tokens. A Transformer's inference leaves mixed and logits
 * alone. What is of an LSTM alone: layer l of it reads
 * input(l): compressed, or the layer below. Gates and cells are by direction: [directions, n, 4 U]
 * and [directions, n, U].
 */
typedef struct sida_net_activations {
    int64_t tokens;
    int64_t *offsets;  /* [sequences + 1] */
    float *embedded;   /* [n, d_model] */
    float *compressed; /* [n, hidden] */
    float *gates[SIDA_NET_LSTM_MAX], *cells[SIDA_NET_LSTM_MAX], *out[SIDA_NET_LSTM_MAX];
    float *mixed;  /* [n, hidden] what the heads read */
    float *logits; /* [n, layers * experts] */
    /* An LSTM's, ready to be given to the backward op; without tokens or attention: no sequences.
     */
    sida_sparsemax_attention_call self, cross;
    struct sida_net_transformer_side *transformer; /* net_transformer.h; NULL of an LSTM */
    void *storage[4]; /* behind the pointers above, kept between calls */
    size_t storage_items[4];
} sida_net_activations;

typedef struct sida_net_pass {
    const sida_net *net;
    bool training;
    int32_t sequences;
    sida_net_activations sides[2];
    /* The decoder's state. */
    float *state_h[SIDA_NET_LSTM_MAX], *state_c[SIDA_NET_LSTM_MAX]; /* [sequences, hidden] */
    /* [planes, sequences, capacity, hidden]: its LSTM's outputs so far, one plane; a Transformer's
     * keys and values of block b: planes 2 b and 2 b + 1. */
    float *memory;
    int32_t *counts;  /* [sequences] tokens so far */
    int32_t capacity; /* rows a sequence */
    size_t state_items, count_items, memory_items;
} sida_net_pass;

/* training: products by OpenBLAS (fast; a row's bytes depend on the batch) and attention keeps its
 * probabilities. Otherwise a sequence gives the same bytes alone, in any batch, and (decoder) token
 * by token. Borrows the net; one thread at a time. */
sida_status sida_net_pass_create(sida_net_pass **out, const sida_net *net, bool training);
void sida_net_pass_destroy(sida_net_pass *pass); /* takes NULL */

/* Starts a batch: runs the encoder's trunk and empties the decoder's state. ids are rows of the
 * embedding (FORMAT otherwise). */
sida_status sida_net_encode(sida_net_pass *pass, sida_weight embedding, const sida_ragged *input);
/* The next 0 … n tokens of each sequence of the batch. A Transformer that trains decodes once a
 * batch. */
sida_status sida_net_decode(sida_net_pass *pass, sida_weight embedding, const sida_ragged *step);

#endif
