#include "runtime/ops/sparsemax.h"

#include "formats/base/memory.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Scores of up to this many keys are kept on the stack. */
enum { stack_keys = 2048 };
enum { parallel_work = 1 << 16 };

/* Michelot's algorithm: drop what lies below the threshold of what is left until nothing does. It
 * ends with the exact support. Values are taken relative to the maximum, which alone could carry
 * mass 1, so only those within 1 of it can be in the support and sums stay small. */
void sida_sparsemax(float *p, const float *z, int64_t n, float *scratch) {
    if (n == 0) return;
    float top = z[0];
    for (int64_t i = 1; i < n; i++) top = z[i] > top ? z[i] : top;
    int64_t count = 0;
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        float value = z[i] - top;
        if (!(value <= -1.0f)) { /* NaN gets in and poisons the sum: it must not vanish */
            scratch[count++] = value;
            sum += (double)value;
        }
    }
    double threshold;
    for (;;) {
        threshold = (sum - 1) / (double)count;
        int64_t kept = 0;
        sum = 0;
        for (int64_t i = 0; i < count; i++)
            if (!((double)scratch[i] <= threshold)) {
                sum += (double)scratch[i];
                scratch[kept++] = scratch[i];
            }
        if (kept == count) break;
        count = kept;
    }
    for (int64_t i = 0; i < n; i++) {
        double value = (double)(z[i] - top) - threshold;
        p[i] = value <= 0 ? 0.0f : (float)value;
    }
}

void sida_sparsemax_backward(float *d_z, const float *d_p, const float *p, int64_t n) {
    double sum = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++)
        if (p[i] != 0) {
            sum += (double)d_p[i];
            count++;
        }
    float mean = count > 0 ? (float)(sum / (double)count) : 0;
    for (int64_t i = 0; i < n; i++) d_z[i] = p[i] != 0 ? d_p[i] - mean : 0;
}

/* p over z. A score that is not finite makes all of them NaN. */
static void softmax(float *z, int64_t n) {
    float top = n > 0 ? z[0] : 0;
    double sum = 0;
    for (int64_t i = 1; i < n; i++) top = z[i] > top ? z[i] : top;
    for (int64_t i = 0; i < n; i++) {
        z[i] = expf(z[i] - top);
        sum += (double)z[i];
    }
    for (int64_t i = 0; i < n; i++) z[i] = (float)((double)z[i] / sum);
}

/* d_z over d_p: p (d_p - Σ p d_p). */
static void softmax_backward(float *d, const float *p, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)p[i] * (double)d[i];
    for (int64_t i = 0; i < n; i++) d[i] = p[i] * (float)((double)d[i] - sum);
}

/* Eight partial sums: the order depends on the width alone. */
static float dot(const float *a, const float *b, int32_t width) {
    float sum[8] = {0};
    int32_t i = 0;
    for (; i + 8 <= width; i += 8)
        for (int32_t k = 0; k < 8; k++) sum[k] += a[i + k] * b[i + k];
    for (int32_t k = 0; i + k < width; k++) sum[k] += a[i + k] * b[i + k];
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

static void add_scaled(float *to, const float *from, float factor, int32_t width) {
    for (int32_t i = 0; i < width; i++) to[i] += factor * from[i];
}

/* Keys that query i of sequence s sees. */
static int32_t visible(const sida_sparsemax_attention_call *q, int32_t s, int32_t i) {
    if (!q->causal) return q->k_count[s];
    int64_t end = (int64_t)(q->q_position ? q->q_position[s] : 0) + i + 1;
    return end < q->k_count[s] ? (int32_t)end : q->k_count[s];
}

static void attend(const sida_sparsemax_attention_call *q, int32_t s, int32_t i, float *scores) {
    int32_t keys = visible(q, s, i), width = q->width;
    const float *query = q->queries + (q->q_start[s] + i) * width;
    const float *memory = q->memory + q->k_start[s] * width;
    float *out = q->out + (q->q_start[s] + i) * width;
    for (int32_t j = 0; j < keys; j++) scores[j] = dot(query, memory + (int64_t)j * width, width);
    if (q->softmax)
        softmax(scores, keys);
    else
        sida_sparsemax(scores, scores, keys, scores + q->k_count[s]);
    for (int32_t j = 0; j < keys; j++)
        if (scores[j] != 0) add_scaled(out, memory + (int64_t)j * width, scores[j], width);
    if (!q->probabilities) return;
    float *kept = q->probabilities + q->p_start[s] + (int64_t)i * q->k_count[s];
    memcpy(kept, scores, (size_t)keys * sizeof *kept);
    memset(kept + keys, 0, (size_t)(q->k_count[s] - keys) * sizeof *kept);
}

/* The sequence that holds the query with the running number `index`. */
static int32_t sequence_of(const int64_t *before, int32_t sequences, int64_t index) {
    int32_t low = 0, high = sequences;
    while (high - low > 1) {
        int32_t middle = low + (high - low) / 2;
        if (before[middle] <= index)
            low = middle;
        else
            high = middle;
    }
    return low;
}

sida_status sida_sparsemax_attention_cpu(sida_stream *stream,
                                         const sida_sparsemax_attention_call *call) {
    (void)stream;
    sida_status status = SIDA_OK;
    int64_t *before = NULL, queries = 0, work = 0;
    int32_t longest = 0;
    bool failed = false;
    SIDA_TRY(SIDA_ALLOC(&before, call->sequences + 1, "the queries of a SparseMax attention"));
    for (int32_t s = 0; s < call->sequences; s++) {
        before[s] = queries;
        queries += call->q_count[s];
        work += (int64_t)call->q_count[s] * call->k_count[s] * call->width;
        longest = call->k_count[s] > longest ? call->k_count[s] : longest;
    }
    before[call->sequences] = queries;
    (void)work;
#pragma omp parallel if (work > parallel_work)
    {
        float small[2 * stack_keys];
        float *scores =
            longest <= stack_keys ? small : malloc(2 * (size_t)longest * sizeof *scores);
        if (!scores) {
#pragma omp atomic write
            failed = true;
        }
#pragma omp for schedule(dynamic, 8)
        for (int64_t i = 0; i < queries; i++) {
            if (!scores) continue;
            int32_t s = sequence_of(before, call->sequences, i);
            attend(call, s, (int32_t)(i - before[s]), scores);
        }
        if (scores != small) free(scores);
    }
    if (failed) SIDA_FAIL(SIDA_ERROR_MEMORY, "no memory for %d attention scores", longest);
out:
    free(before);
    return status;
}

static void attend_backward(const sida_sparsemax_attention_backward_call *b, int32_t s, int32_t i,
                            float *scores) {
    const sida_sparsemax_attention_call *q = b->forward;
    int32_t keys = visible(q, s, i), width = q->width;
    int64_t row = (q->q_start[s] + i) * width, first = q->k_start[s] * width;
    const float *p = q->probabilities + q->p_start[s] + (int64_t)i * q->k_count[s];
    const float *query = q->queries + row, *d_out = b->d_out + row;
    for (int32_t j = 0; j < keys; j++) {
        scores[j] = 0;
        if (p[j] == 0) continue;
        int64_t key = first + (int64_t)j * width;
        scores[j] = dot(d_out, q->memory + key, width);
        add_scaled(b->d_memory + key, d_out, p[j], width);
    }
    if (q->softmax)
        softmax_backward(scores, p, keys);
    else
        sida_sparsemax_backward(scores, scores, p, keys);
    for (int32_t j = 0; j < keys; j++) {
        if (p[j] == 0) continue;
        int64_t key = first + (int64_t)j * width;
        add_scaled(b->d_queries + row, q->memory + key, scores[j], width);
        add_scaled(b->d_memory + key, query, scores[j], width);
    }
}

/* One thread takes a whole sequence: its keys' gradients are summed in the order of the queries. */
sida_status
sida_sparsemax_attention_backward_cpu(const sida_sparsemax_attention_backward_call *call) {
    const sida_sparsemax_attention_call *q = call->forward;
    assert(q->probabilities && q->p_start);
    sida_status status = SIDA_OK;
    int64_t *start = NULL, total = 0, work = 0;
    float *scores = NULL;
    SIDA_TRY(SIDA_ALLOC(&start, q->sequences, "the scores of a SparseMax attention"));
    for (int32_t s = 0; s < q->sequences; s++) {
        start[s] = total;
        total += q->k_count[s];
        work += (int64_t)q->q_count[s] * q->k_count[s] * q->width;
    }
    (void)work;
    SIDA_TRY(SIDA_ALLOC(&scores, total, "the scores of a SparseMax attention"));
#pragma omp parallel for schedule(dynamic) if (work > parallel_work)
    for (int32_t s = 0; s < q->sequences; s++)
        for (int32_t i = 0; i < q->q_count[s]; i++) attend_backward(call, s, i, scores + start[s]);
out:
    free(scores);
    free(start);
    return status;
}
