/* The backward pass of T5 attention. */
#include "formats/base/memory.h"
#include "runtime/ops/attention.h"
#include "runtime/ops/gemm.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* One head of one sequence: rows of nq queries and nk keys. */
typedef struct head_task {
    const sida_attention_backward_call *call;
    const int32_t *buckets; /* of distances low, low + 1, …; NULL without a bias */
    float *p, *d_p;         /* [nq, nk] */
    int64_t nq, nk, q_row, k_row, column;
    int32_t head, position; /* of the first query */
} head_task;

static int64_t visible(const head_task *t, int64_t query) {
    int64_t end = t->position + query + 1;
    return t->call->forward->causal && end < t->nk ? end : t->nk;
}

/* The bucket of key 0 as `query` sees it; those of the keys behind follow. */
static const int32_t *buckets_of(const head_task *t, int64_t query) {
    return t->buckets + (t->nq - 1 - query);
}

/* p over the scores; keys that are not seen get 0. */
static void softmax_row(const head_task *t, int64_t query) {
    const sida_attention_call *f = t->call->forward;
    const float *bias = f->bias.data;
    const int64_t seen = visible(t, query);
    float *p = t->p + query * t->nk, high = -INFINITY;
    if (bias) {
        const int32_t *buckets = buckets_of(t, query);
        for (int64_t j = 0; j < seen; j++) p[j] += bias[buckets[j] * f->bias.cols + t->head];
    }
    for (int64_t j = 0; j < seen; j++) high = p[j] > high ? p[j] : high;
    double sum = 0;
    for (int64_t j = 0; j < seen; j++) {
        p[j] = expf(p[j] - high);
        sum += (double)p[j];
    }
    for (int64_t j = 0; j < seen; j++) p[j] = (float)((double)p[j] / sum);
    memset(p + seen, 0, (size_t)(t->nk - seen) * sizeof *p);
}

/* The gradient of the scores in place of that of p: p (d_p - Σ p d_p); it is the bias's, too. */
static void softmax_backward_row(const head_task *t, int64_t query) {
    const float *p = t->p + query * t->nk;
    float *d = t->d_p + query * t->nk;
    double sum = 0;
    for (int64_t j = 0; j < t->nk; j++) sum += (double)p[j] * (double)d[j];
    for (int64_t j = 0; j < t->nk; j++) d[j] = p[j] * (float)((double)d[j] - sum);
    if (!t->call->d_bias || !t->buckets) return;
    const int32_t *buckets = buckets_of(t, query);
    const int64_t heads = t->call->forward->bias.cols, seen = visible(t, query);
    for (int64_t j = 0; j < seen; j++) t->call->d_bias[buckets[j] * heads + t->head] += d[j];
}

static void run_head(const head_task *t) {
    const sida_attention_call *f = t->call->forward;
    const int64_t width = f->d_kv, q = t->q_row * f->ldq + t->column;
    const int64_t k = t->k_row * f->ldk + t->column, v = t->k_row * f->ldv + t->column;
    const float *d_out = t->call->d_out + t->q_row * f->ldo + t->column;
    sida_gemm_call scores = {.c = t->p,
                             .ldc = t->nk,
                             .a = f->q + q,
                             .lda = f->ldq,
                             .b = f->k + k,
                             .ldb = f->ldk,
                             .m = t->nq,
                             .n = t->nk,
                             .k = width,
                             .transpose_b = true};
    sida_gemm_cpu(&scores);
    for (int64_t i = 0; i < t->nq; i++) softmax_row(t, i);
    scores.c = t->d_p;
    scores.a = d_out;
    scores.lda = f->ldo;
    scores.b = f->v + v;
    scores.ldb = f->ldv;
    sida_gemm_cpu(&scores);
    for (int64_t i = 0; i < t->nq; i++) softmax_backward_row(t, i);
    /* Of what was weighed: c += op(weights) b. */
    sida_gemm_call product = {.c = t->call->d_q + q,
                              .ldc = f->ldq,
                              .a = t->d_p,
                              .lda = t->nk,
                              .b = f->k + k,
                              .ldb = f->ldk,
                              .m = t->nq,
                              .n = width,
                              .k = t->nk,
                              .add = true};
    sida_gemm_cpu(&product);
    product.c = t->call->d_k + k;
    product.ldc = f->ldk;
    product.b = f->q + q;
    product.ldb = f->ldq;
    product.m = t->nk;
    product.k = t->nq;
    product.transpose_a = true;
    sida_gemm_cpu(&product);
    product.c = t->call->d_v + v;
    product.ldc = f->ldv;
    product.a = t->p;
    product.b = d_out;
    product.ldb = f->ldo;
    sida_gemm_cpu(&product);
}

sida_status sida_attention_backward_cpu(const sida_attention_backward_call *call) {
    sida_status status = SIDA_OK;
    const sida_attention_call *f = call->forward;
    int64_t area = 1, span = 1;
    float *scores = NULL;
    int32_t *buckets = NULL;
    assert(!f->bias.data || f->bias.dtype == SIDA_F32);
    for (int32_t s = 0; s < f->sequences; s++) {
        int64_t product = (int64_t)f->q_count[s] * f->k_count[s];
        int64_t sum = (int64_t)f->q_count[s] + f->k_count[s];
        area = product > area ? product : area;
        span = sum > span ? sum : span;
    }
    SIDA_TRY(SIDA_ALLOC(&scores, 2 * area, "the scores of an attention"));
    SIDA_TRY(SIDA_ALLOC(&buckets, span, "the scores of an attention"));
    for (int32_t s = 0; s < f->sequences; s++) {
        head_task task = {.call = call,
                          .p = scores,
                          .d_p = scores + area,
                          .nq = f->q_count[s],
                          .nk = f->k_count[s],
                          .q_row = f->q_start[s],
                          .k_row = f->k_start[s],
                          .position = f->q_position ? f->q_position[s] : 0};
        if (task.nq == 0 || task.nk == 0) continue;
        if (f->bias.data) {
            int64_t low = -(task.position + task.nq - 1);
            for (int64_t i = 0; i < task.nq + task.nk - 1; i++)
                buckets[i] = sida_relative_bucket((int32_t)(low + i), f->bias_bidirectional,
                                                  (int32_t)f->bias.rows, f->bias_max_distance);
            task.buckets = buckets;
        }
        for (task.head = 0; task.head < f->heads; task.head++) {
            task.column = (int64_t)task.head * f->d_kv;
            run_head(&task);
        }
    }
out:
    free(buckets);
    free(scores);
    return status;
}
