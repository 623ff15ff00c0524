/* T5 attention over ragged sequences: softmax(q kᵀ + position bias) v, no 1/√d
 * (Raffel et al. 2020; bucket rule: REFERENCE of Hugging Face T5). */
#ifndef SIDA_RUNTIME_OPS_ATTENTION_H
#define SIDA_RUNTIME_OPS_ATTENTION_H

#include "runtime/ops/linear.h"

#include <stdbool.h>

/* Queries and keys of sequence s are rows of the matrices given: queries q_start[s] … + q_count[s],
 * at positions q_position[s] … ; keys and values k_start[s] … + k_count[s], at positions 0 … */
typedef struct sida_attention_call {
    float *out;             /* [rows of q, heads * d_kv], leading dimension ldo */
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

/* The bucket of relative position key - query. */
int32_t sida_relative_bucket(int32_t relative, bool bidirectional, int32_t buckets,
                             int32_t max_distance);

#endif
