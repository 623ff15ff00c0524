/* What training a small Transformer takes beside train_ops.h, under its rules: the gradient of the
 * RMS norm, and attention of several heads with T5's relative positions, forward and backward. */
#ifndef SIDA_RUNTIME_OPS_TRANSFORMER_TRAIN_H
#define SIDA_RUNTIME_OPS_TRANSFORMER_TRAIN_H

#include "runtime/ops/train_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y = weight * x * rsqrt(mean(x²) + epsilon), as norm.h. */
typedef struct sida_norm_train_call {
    float *d_x;      /* [n, width]: added to; NULL: not computed */
    float *d_weight; /* [width]: added to */
    float *d_y;      /* [n, width]: its values are lost */
    const float *x, *weight;
    int64_t n, width;
    float epsilon;
    float *workspace; /* SIDA_COLUMN_SUM_BYTES(width) */
} sida_norm_train_call;
sida_status sida_norm_train_backward_cuda(sida_stream *stream, const sida_norm_train_call *call);

enum {
    SIDA_ATTENTION_TRAIN_WIDTH = 32,   /* of a head */
    SIDA_ATTENTION_TRAIN_BUCKETS = 32, /* of relative positions, attention.h's */
    SIDA_ATTENTION_TRAIN_DISTANCE = 128
};

/* out = softmax(q kᵀ / √WIDTH + positions[bucket(key - query)]) v, head by head; width below is
 * heads * WIDTH. All arrays begin at multiples of 16 bytes. */
typedef struct sida_attention_train_call {
    float *out;             /* [rows of queries, width]: written; 0 for a query without keys */
    const float *queries;   /* [rows of queries, width] */
    const float *key_value; /* [rows of keys, 2 width]: keys, then values */
    const float *positions; /* [BUCKETS, heads], or NULL: none */
    sida_row_map q, k;      /* of the same sequences in the same order */
    int32_t sequences, heads;
    bool causal; /* query i sees keys 0 … i, and the buckets are those of one direction */
    bool tf32;
    /* sida_attention_train_bytes() of some number of sequences, which are computed at a time. The
     * number may change sums in the last bits. 256-byte aligned. */
    void *workspace;
    size_t workspace_bytes;
} sida_attention_train_call;

/* What `sequences` take at a time; longest as in the maps. Forward needs less than backward. */
size_t sida_attention_train_bytes(int32_t sequences, int32_t q_longest, int32_t k_longest,
                                  int32_t heads, bool backward);

sida_status sida_attention_train_forward_cuda(sida_stream *stream,
                                              const sida_attention_train_call *call);

/* d_queries [rows of queries, width] and d_key_value [rows of keys, 2 width]: written, at the rows
 * that the maps name; d_queries may be d_out [rows of queries, width]. d_positions [BUCKETS,
 * heads]: added to, where there are positions. The call's out is not read; scores are computed
 * again. */
sida_status sida_attention_train_backward_cuda(sida_stream *stream, float *d_queries,
                                               float *d_key_value, float *d_positions,
                                               const float *d_out,
                                               const sida_attention_train_call *call);

#ifdef __cplusplus
}
#endif

#endif
