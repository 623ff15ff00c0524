/* SparseMax (Martins and Astudillo 2016), and attention with it, or with softmax, over ragged
 * sequences. The correct one: the Euclidean projection onto the simplex; its gradient is the
 * projection's. */
#ifndef SIDA_RUNTIME_OPS_SPARSEMAX_H
#define SIDA_RUNTIME_OPS_SPARSEMAX_H

#include "runtime/backend/backend.h"

#include <stdbool.h>
#include <stdint.h>

/* out[i] += Σ_j p[i, j] memory[j], p[i] = sparsemax (or softmax) over the keys of i's sequence of
 * queries[i] · memory[j]; one head, unscaled; keys and values are the same vectors (SiDA-MoE,
 * section 3.4). With causal, query i of a sequence sees keys 0 … q_position + i. A query without
 * keys adds nothing. */
typedef struct sida_sparsemax_attention_call {
    float *out;           /* [nq, width]: added to */
    const float *queries; /* [nq, width] */
    const float *memory;  /* [nk, width] */
    int32_t sequences, width;
    const int64_t *q_start, *k_start; /* [sequences] rows */
    const int32_t *q_count, *k_count; /* [sequences] */
    const int32_t *q_position;        /* [sequences]; NULL: 0 */
    bool causal, softmax;
    /* Queries of all sequences together as far as the host knows, by which CUDA spreads the work;
     * 0: unknown. Changes no result. */
    int64_t rows;
    /* Training keeps p: row i of sequence s starts at probabilities + p_start[s] + i * k_count[s].
     * NULL: not kept. CUDA keeps none: UNSUPPORTED. */
    float *probabilities;
    const int64_t *p_start; /* [sequences] */
} sida_sparsemax_attention_call;

typedef sida_status sida_sparsemax_attention_fn(sida_stream *stream,
                                                const sida_sparsemax_attention_call *call);
sida_sparsemax_attention_fn sida_sparsemax_attention_cpu;

/* Gradients of the attention; the forward call must have kept its probabilities. Where the
 * projection has a kink (a score exactly at the threshold) it takes the side of the support. */
typedef struct sida_sparsemax_attention_backward_call {
    float *d_queries;   /* [nq, width]: added to */
    float *d_memory;    /* [nk, width]: added to; may be d_queries (self-attention) */
    const float *d_out; /* [nq, width] */
    const sida_sparsemax_attention_call *forward; /* its out is not read */
} sida_sparsemax_attention_backward_call;
sida_status
sida_sparsemax_attention_backward_cpu(const sida_sparsemax_attention_backward_call *call);

/* d_z [n] = the gradient of p = sparsemax(z) applied to d_p: on the support d_p minus its mean over
 * the support, zero elsewhere. d_z may be d_p. */
void sida_sparsemax_backward(float *d_z, const float *d_p, const float *p, int64_t n);

/* p = sparsemax(z), both [n]; p may be z. scratch [n]. Exact threshold in fp32, ties handled. */
void sida_sparsemax(float *p, const float *z, int64_t n, float *scratch);

#endif
