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

/* One wave: `count` experts, expert i works on rows[row_start[i]] … rows[row_end[i] - 1]: any
 * subset of what dispatch grouped, in any order, none twice. A row is token * k + rank. Reads
 * x[token], writes scratch[row]. Each expert sees all its tokens in one product; one without rows
 * costs next to nothing, and its weights may be NULL. */
typedef struct sida_expert_call {
    float *scratch; /* [n * k, d_model] */
    const float *x; /* [n, d_model] */
    int32_t k;
    sida_expert_shape shape;
    int32_t count;
    const void *const *weights; /* [count] device pointers */
    const int64_t *row_start;   /* [count] */
    const int64_t *row_end;     /* [count] */
    const int32_t *rows;        /* [rows_total] */
    int64_t rows_total;         /* no range ends beyond it: all that the host need know of them */
    float *workspace;           /* sida_expert_workspace_floats(shape, rows_total) */
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
