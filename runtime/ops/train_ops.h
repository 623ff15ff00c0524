/* What training computes on CUDA beside the LSTM (rnn.h): products and their gradients, SparseMax
 * attention forward and backward, the loss, AdamW. All pointers are device pointers, fp32, and all
 * work is issued to a compute stream of a CUDA back-end; nothing waits for the host and nothing is
 * allocated. No atomics, sums in a fixed order: the same calls give the same bytes. */
#ifndef SIDA_RUNTIME_OPS_TRAIN_OPS_H
#define SIDA_RUNTIME_OPS_TRAIN_OPS_H

#include "runtime/backend/backend.h"
#include "runtime/ops/gemm.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The first `bytes` at `data` become 0. */
sida_status sida_zero_cuda(sida_stream *stream, void *data, size_t bytes);

/* Before the first product on `beside`: it gets cuBLAS's handle and a quarter of its workspace from
 * `stream`. The two streams' work may run at the same time; it is issued by one thread, and
 * `beside` is destroyed first. */
sida_status sida_beside_cuda(sida_stream *beside, sida_stream *stream);

/* --- products. tf32: their factors may be rounded to TF32 (11 bits); sums are fp32. */

/* sida_gemm_cpu's contract (gemm.h). */
sida_status sida_gemm_cuda(sida_stream *stream, const sida_gemm_call *call, bool tf32);

/* y [n, rows] = x [n, cols] Wᵀ + bias, through `epilogue` (linear.h); bias may be NULL. Relu of NaN
 * is NaN or 0. */
sida_status sida_linear_train_cuda(sida_stream *stream, float *y, const float *x, sida_weight w,
                                   const float *bias, sida_epilogue epilogue, int64_t n, bool tf32);

/* sida_linear_backward_cpu's contract (gemm.h): outputs are added to, NULL ones are not computed.
 * workspace: SIDA_COLUMN_SUM_BYTES(weight.rows). d_bias may be computed at another time by the
 * function below. */
sida_status sida_linear_backward_cuda(sida_stream *stream, const sida_linear_backward_call *call,
                                      bool tf32, float *workspace);

/* out[c] += Σ_r x[r, c]. With `activated` [rows, cols] x is first set to 0 where that is 0: the
 * backward pass of relu and its bias in one; `out` may be NULL then. workspace:
 * SIDA_COLUMN_SUM_BYTES(cols), the first SIDA_COLUMN_SUM_COUNTS bytes of it 0 before the first of
 * all calls, which leave them so; each stream has its own. */
enum { SIDA_COLUMN_SUM_PARTS = 64, SIDA_COLUMN_SUM_COUNTS = 4096 };
#define SIDA_COLUMN_SUM_BYTES(cols)                                                                \
    (SIDA_COLUMN_SUM_COUNTS + (size_t)SIDA_COLUMN_SUM_PARTS * (size_t)(cols) * sizeof(float))
sida_status sida_column_sum_cuda(sida_stream *stream, float *out, float *x, const float *activated,
                                 int64_t rows, int64_t cols, float *workspace);

/* --- SparseMax attention, or with softmax (sparsemax.h) */

/* Where the tokens of sequences lie: token t of sequence s in row start[s] + step[t], t < count[s].
 * Rows in rnn.h's order: start[s] = its rank; end to end: start = offsets, step[t] = t. */
typedef struct sida_row_map {
    const int32_t *start; /* [sequences] */
    const int32_t *step;  /* [longest] */
    const int32_t *count; /* [sequences] <= longest; may be 0 */
    int32_t longest;
} sida_row_map;

typedef struct sida_sparsemax_train_call {
    float *out;           /* [rows of queries, width]: added to */
    float *thresholds;    /* [rows of queries, 2]: out of forward, into backward */
    const float *queries; /* [rows of queries, width] */
    const float *memory;  /* [rows of keys, width]; keys and values */
    sida_row_map q, k;    /* of the same sequences in the same order; equal for self-attention */
    int32_t sequences, width;
    bool causal; /* query i sees keys 0 … i */
    bool softmax;
    bool tf32;
    /* sida_sparsemax_train_bytes() of some number of sequences, which are computed at a time. The
     * number may change sums in the last bits. 256-byte aligned. */
    void *workspace;
    size_t workspace_bytes;
    sida_event *out_ready; /* what forward awaits before it adds to `out`, or NULL */
} sida_sparsemax_train_call;

/* What `sequences` take at a time; longest as in the maps. Forward needs less than backward. */
size_t sida_sparsemax_train_bytes(int32_t sequences, int32_t q_longest, int32_t k_longest,
                                  int32_t width, bool backward);

/* A query without keys adds nothing. */
sida_status sida_sparsemax_train_forward_cuda(sida_stream *stream,
                                              const sida_sparsemax_train_call *call);

/* d_queries [rows of queries, width], d_memory [rows of keys, width]: added to; the same array for
 * self-attention. d_out [rows of queries, width]. The call's out is not read; scores are computed
 * again. */
sida_status sida_sparsemax_train_backward_cuda(sida_stream *stream, float *d_queries,
                                               float *d_memory, const float *d_out,
                                               const sida_sparsemax_train_call *call);

/* --- the loss: truncated knowledge distillation plus λ times cross-entropy, TKD + λ·CE */

/* How far a pair's student, with logits z over E experts, is from its teacher t, of which the top T
 * are known. Both are compared as shares of n classes:
 *   over the top:  the T experts; p = softmax(z[top]), q = t / Σ t; n = T
 *   over all:      the T experts and, where T < E, all others as one class more; p = softmax(z) and
 *                  1 - Σ p of the top, q = t and 1 - Σ t; n = T + 1, or T = E
 * (A Σ t above 1, as fp16 may round it, is divided out.) The distances are
 *   kl:   -Σ q log p, which is KL(q ‖ p) up to the entropy of q, which is constant
 *   l1:   Σ |p - q| / n
 *   mse:  Σ (p - q)² / n */
typedef enum sida_tkd {
    SIDA_TKD_REST, /* kl over all */
    SIDA_TKD_KL_TOP,
    SIDA_TKD_L1_ALL,
    SIDA_TKD_L1_RENORM, /* l1 over the top: the paper's */
    SIDA_TKD_MSE_ALL,
    SIDA_TKD_MSE_TOP
} sida_tkd;
enum { SIDA_TKD_KINDS = SIDA_TKD_MSE_TOP + 1 };

/* A pair is a row and a layer. */
typedef struct sida_loss_cuda_call {
    float *d_logits;          /* [rows, layers, experts] out: of scale * (sum of losses); may be
                               * logits. NULL: the losses alone */
    double *partials;         /* [SIDA_TRAIN_PARTIALS] out: the losses of all pairs, for
                               * sida_train_finish_cuda */
    const float *logits;      /* [rows, layers, experts] */
    const float *bias;        /* [layers, experts] added to every row of logits first, or NULL */
    const uint16_t *top_ids;  /* [tokens, layers, top] distinct, best first */
    const uint16_t *top_logp; /* [tokens, layers, top] fp16 bits: log of the softmax over all E */
    /* What the cross-entropy is against; NULL: the first of top_ids. */
    const uint16_t *labels;     /* [tokens, layers, label_count] distinct */
    const float *label_weights; /* [tokens, layers, label_count] of sum 1 */
    const int32_t *source;      /* [rows] the row's token in these lists; NULL: the row itself */
    int64_t rows;
    int32_t layers, experts, top; /* 1 <= top <= experts <= 65535 */
    int32_t label_count;          /* where labels is not NULL: 1 … experts */
    sida_tkd tkd;
    float lambda, scale;
} sida_loss_cuda_call;
sida_status sida_loss_cuda(sida_stream *stream, const sida_loss_cuda_call *call);

/* --- the end of a step */

enum { SIDA_TRAIN_PARTIALS = 1024 };

/* On the device, read by the host with one copy. */
typedef struct sida_train_result {
    double losses[2]; /* sums over the pairs of a side */
    double norm;      /* of all gradients, before clipping */
    double finite;    /* 1: all of these are finite; 0: sida_adamw_cuda changes nothing */
} sida_train_result;

/* Fills *result. loss_partials: what sida_loss_cuda left, NULL for a side without; gradient
 * [count]; workspace: SIDA_TRAIN_FINISH_BYTES, the first SIDA_TRAIN_FINISH_COUNT of them 0 before
 * the first of all calls, which leave them so. */
enum { SIDA_TRAIN_FINISH_COUNT = 256 };
#define SIDA_TRAIN_FINISH_BYTES (SIDA_TRAIN_FINISH_COUNT + SIDA_TRAIN_PARTIALS * sizeof(double))
sida_status sida_train_finish_cuda(sida_stream *stream, sida_train_result *result,
                                   const double *const loss_partials[2], const float *gradient,
                                   int64_t count, void *workspace);

/* A step of AdamW (trainer/adamw.h) in numbers. */
typedef struct sida_adamw_scalars {
    float beta1, beta2, rest1, rest2, decay, rate, root, epsilon;
    double clip; /* the gradient's norm is scaled down to it; 0: no clipping */
} sida_adamw_scalars;
/* step: 1 for the first. */
sida_adamw_scalars sida_adamw_scalars_of(double beta1, double beta2, double epsilon, double lr,
                                         double weight_decay, int64_t step, double clip);

/* parameters, first, second, gradient: [count]; result on the device, scalars on the host, read
 * before this returns. The gradient is clipped as it is read and set to 0 behind it where
 * `zero_gradient`. */
sida_status sida_adamw_cuda(sida_stream *stream, float *parameters, float *first, float *second,
                            float *gradient, int64_t count, const sida_adamw_scalars *scalars,
                            const sida_train_result *result, bool zero_gradient);

#ifdef __cplusplus
}
#endif

#endif
