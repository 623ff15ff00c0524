/* The feed-forward of chosen experts, and the combination of their outputs. */
#ifndef SIDA_RUNTIME_OPS_EXPERT_H
#define SIDA_RUNTIME_OPS_EXPERT_H

#include "runtime/ops/elementwise.h"
#include "runtime/ops/linear.h"

/* An expert's matrices lie end to end, as stored: wi [d_ff, d_model], (wi_1 [d_ff, d_model] when
 * gated,) wo [d_model, d_ff]. */
typedef struct sida_expert_shape {
    int32_t d_model, d_ff;
    bool gated;
    sida_activation activation; /* RELU when not gated */
    sida_dtype dtype;
} sida_expert_shape;

static inline size_t sida_expert_bytes(const sida_expert_shape *shape) {
    return (size_t)shape->d_model * (size_t)shape->d_ff * (shape->gated ? 3 : 2) *
           sida_dtype_bytes(shape->dtype);
}

/* One wave: experts ids[0] … ids[count - 1], each with all the rows that dispatch gave it, in any
 * order, none twice. A row is token * k + rank. Reads x[token], writes scratch[row]. Each expert
 * sees all its tokens in one product; one without rows costs next to nothing, and its weights may
 * be NULL. */
typedef struct sida_expert_call {
    float *scratch;    /* [n * k, d_model] */
    const void *x;     /* [n, d_model] of x_type */
    sida_dtype x_type; /* F32, or BF16 where the device takes it (sida_ops.bf16_activations) and the
                          weights are BF16 */
    int32_t k;
    sida_expert_shape shape;
    const int32_t *ids; /* [count] of 0 … E - 1; NULL: 0 … count - 1 */
    int32_t count;
    /* On the device: how many of ids there are, at most count; NULL: count. */
    const int32_t *count_of;
    /* Device pointers: [E] by expert, or [count] beside ids. */
    const void *const *weights;
    bool weights_by_expert;
    const int64_t *row_start; /* [E + 1] dispatch's */
    const int32_t *rows;      /* dispatch's */
    int64_t rows_total;       /* none is beyond it: all that the host need know of them */
    float *workspace;         /* sida_expert_workspace_floats(shape, rows_total) */
    /* Where sida_ops.expert_adds and k is 1: h[token] += alpha[token] * its output, and scratch is
     * not written; then there is nothing to combine. h NULL: not so. */
    float *h;           /* [n, d_model] */
    const float *alpha; /* [n] */
} sida_expert_call;

size_t sida_expert_workspace_floats(const sida_expert_shape *shape, int64_t rows);

typedef sida_status sida_expert_fn(sida_stream *stream, const sida_expert_call *call);
sida_expert_fn sida_expert_cpu;

/* h[t] += Σ over ranks r, in order, of alpha[t, r] * scratch[t * k + r]; a dropped token adds
 * nothing (its scratch rows are not read). h [n, d], dropped [n] or NULL. */
typedef sida_status sida_combine_fn(sida_stream *stream, float *h, const float *scratch,
                                    const float *alpha, const uint8_t *dropped, int64_t n,
                                    int32_t k, int64_t d);
sida_combine_fn sida_combine_cpu;

#endif
