/* What the forward pass of a Transformer leaves, for its backward pass. Inference runs some
 * sequences at a time through the whole network, and has room for one block's of these, which all
 * share. */
#ifndef SIDA_RUNTIME_PREDICTOR_NET_TRANSFORMER_H
#define SIDA_RUNTIME_PREDICTOR_NET_TRANSFORMER_H

#include "runtime/ops/attention.h"
#include "runtime/predictor/net.h"

/* n: the side's tokens; in inference those of the sequences at a time. */
typedef struct sida_net_attend_pass {
    float *x, *normed;        /* [n, hidden] the residual stream, and what query reads */
    float *query;             /* [n, hidden], scaled by 1/√HEAD_WIDTH */
    float *key_value;         /* [n or, of cross-attention, the encoder's tokens, 2 hidden] */
    float *mixed;             /* [n, hidden] what output reads */
    sida_attention_call call; /* in training its keys and values are key_value */
} sida_net_attend_pass;

typedef struct sida_net_block_pass {
    sida_net_attend_pass self, cross;
    float *x, *normed; /* [n, hidden] */
    float *up;         /* [n, UP hidden] */
} sida_net_block_pass;

struct sida_net_transformer_side {
    float *normed_in; /* [n, d_model] */
    sida_net_block_pass blocks[SIDA_NET_BLOCKS_MAX];
    float *last; /* [n, hidden] the residual stream's end */
    /* Of an encoder that a decoder reads: norm_memory(last), [n, hidden], and of all tokens the
     * keys and values, [blocks, tokens, 2 hidden]. */
    float *memory, *memory_pairs;
};

#endif
