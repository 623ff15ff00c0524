/* T5 attention over ragged sequences: softmax(q kᵀ + position bias) v, no 1/√d
 * (Raffel et al. 2020; bucket rule: REFERENCE of Hugging Face T5). */
#ifndef SIDA_RUNTIME_OPS_ATTENTION_H
#define SIDA_RUNTIME_OPS_ATTENTION_H

#include "runtime/ops/linear.h"

#include <stdbool.h>

/* Queries and keys of sequence s are rows of the matrices given: queries q_start[s] … + q_count[s],
 * at positions q_position[s] … ; keys and values k_start[s] … + k_count[s], at positions 0 … */
typedef struct sida_attention_call {
    void *out;              /* [rows of q, heads * d_kv] of out_type, leading dimension ldo */
    sida_dtype out_type;    /* F32, or BF16 where the device takes it (sida_ops.bf16_activations) */
    const float *q, *k, *v; /* leading dimensions ldq, ldk, ldv */
    int64_t ldo, ldq, ldk, ldv;
    int32_t sequences, heads, d_kv;
    /* Queries of all sequences together, as far as the host knows: says how a device spreads the
     * work, not what is computed. */
    int64_t rows;
    const int64_t *q_start, *k_start; /* [sequences] */
    const int32_t *q_count, *k_count; /* [sequences] */
    const int32_t *q_position;        /* [sequences]; NULL: 0 */
    bool causal;                      /* a query sees keys at positions <= its own */
    /* Relative position bias, [buckets, heads]; data NULL: none. */
    sida_weight bias;
    bool bias_bidirectional;
    int32_t bias_max_distance;
} sida_attention_call;

typedef sida_status sida_attention_fn(sida_stream *stream, const sida_attention_call *call);
sida_attention_fn sida_attention_cpu;

/* New keys and values join each sequence's cache: row q_start[s] + i of k and v becomes row
 * start[s] + position[s] + i of k_cache and v_cache, for i in 0 … q_count[s] - 1. Index arrays as
 * above. */
typedef struct sida_append_call {
    float *k_cache, *v_cache; /* leading dimension width */
    const float *k, *v;       /* leading dimension ld */
    int64_t width, ld;        /* width: heads * d_kv */
    int32_t sequences;
    int64_t rows;                      /* of k and v, all sequences together */
    const int64_t *q_start, *start;    /* [sequences] */
    const int32_t *q_count, *position; /* [sequences] */
} sida_append_call;

typedef sida_status sida_append_fn(sida_stream *stream, const sida_append_call *call);
sida_append_fn sida_append_cpu;

/* Gradients of the attention, in fp32. Scores are computed again, with sida_gemm_cpu: each head of
 * each sequence on the calling thread, one after the other. */
typedef struct sida_attention_backward_call {
    float *d_q, *d_k, *d_v;             /* as q, k and v; added to */
    float *d_bias;                      /* [buckets, heads]: added to; NULL without a bias */
    const float *d_out;                 /* as out */
    const sida_attention_call *forward; /* its out is not read; a bias is F32 */
} sida_attention_backward_call;
sida_status sida_attention_backward_cpu(const sida_attention_backward_call *call);

/* The bucket of relative position key - query. */
int32_t sida_relative_bucket(int32_t relative, bool bidirectional, int32_t buckets,
                             int32_t max_distance);

#endif
