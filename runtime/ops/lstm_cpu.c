#include "runtime/ops/lstm.h"

#include "formats/base/memory.h"
#include "runtime/ops/gemm.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Sequences that walk through time together. A constant, so that the products' shapes (and with
 * OpenBLAS their bytes) do not depend on the number of threads. */
enum { group_sequences = 8 };

static float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

/* Right to 1e-7 of its range, which is all that the sums around it keep, and one expf instead of
 * libm's slower way that is right to the last bit near 0. */
static float squash(float x) {
    return 1.0f - 2.0f / (1.0f + expf(2.0f * x));
}

static int64_t length(const int64_t *offsets, int32_t s) {
    return offsets[s + 1] - offsets[s];
}

/* The row of the token that sequence s takes at time t; the one before it is `step` rows back. */
static int64_t row_at(const int64_t *offsets, int32_t s, int64_t t, bool reverse) {
    return reverse ? offsets[s + 1] - 1 - t : offsets[s] + t;
}
static int64_t step_of(bool reverse) {
    return reverse ? -1 : 1;
}

/* Sequence numbers by falling length, ties by number: those still running at a time step are then
 * the first of their group. */
static sida_status sort_by_length(int32_t **out, const int64_t *offsets, int32_t sequences) {
    sida_status status = SIDA_OK;
    int32_t *order = NULL, *spare = NULL;
    SIDA_TRY(SIDA_ALLOC(&order, sequences, "the order of sequences"));
    SIDA_TRY(SIDA_ALLOC(&spare, sequences, "the order of sequences"));
    for (int32_t s = 0; s < sequences; s++) order[s] = s;
    for (int64_t run = 1; run < sequences; run *= 2) { /* merge sort: stable */
        for (int64_t low = 0; low < sequences; low += 2 * run) {
            int64_t middle = low + run < sequences ? low + run : sequences;
            int64_t high = low + 2 * run < sequences ? low + 2 * run : sequences;
            for (int64_t i = low, j = middle, k = low; k < high; k++) {
                bool left = j >= high ||
                            (i < middle && length(offsets, order[i]) >= length(offsets, order[j]));
                spare[k] = left ? order[i++] : order[j++];
            }
        }
        int32_t *other = order;
        order = spare;
        spare = other;
    }
    *out = order;
    order = NULL;
out:
    free(order);
    free(spare);
    return status;
}

/* One token: gates [4 hidden] holds the sums of both products, h and c get the new state. */
static void cell(float *h, float *c, float *gates, const float *c_before, int32_t hidden) {
    float *in = gates, *forget = gates + hidden, *candidate = gates + 2 * hidden,
          *open = gates + 3 * hidden;
    for (int32_t k = 0; k < hidden; k++) {
        in[k] = sigmoid(in[k]);
        forget[k] = sigmoid(forget[k]);
        candidate[k] = squash(candidate[k]);
        open[k] = sigmoid(open[k]);
        c[k] = forget[k] * (c_before ? c_before[k] : 0) + in[k] * candidate[k];
        h[k] = open[k] * squash(c[k]);
    }
}

static sida_status forward_group(const sida_lstm_call *q, const int32_t *order, int32_t count,
                                 float *workspace) {
    sida_status status = SIDA_OK;
    sida_linear_fn *linear = q->linear ? q->linear : sida_linear_cpu;
    int32_t hidden = q->hidden;
    int64_t ldo = q->ldo ? q->ldo : hidden, step = step_of(q->reverse);
    size_t row = (size_t)hidden * sizeof(float);
    float *before = workspace, *product = workspace + (int64_t)count * hidden;
    for (int64_t t = 0; count > 0; t++) {
        while (count > 0 && length(q->offsets, order[count - 1]) <= t) count--;
        if (count == 0) break;
        bool zero = t == 0 && !q->state_h;
        for (int32_t a = 0; a < count; a++) {
            float *to = before + (int64_t)a * hidden;
            if (zero)
                memset(to, 0, row);
            else if (t == 0)
                memcpy(to, q->state_h + (int64_t)order[a] * hidden, row);
            else
                memcpy(to, q->out + row_at(q->offsets, order[a], t - 1, q->reverse) * ldo, row);
        }
        /* Also from a zero state: then a step of its own and a whole sequence do the same sums. */
        SIDA_TRY(linear(NULL, &(sida_linear_call){.y = product,
                                                  .ldy = 4 * (int64_t)hidden,
                                                  .x = before,
                                                  .ldx = hidden,
                                                  .n = count,
                                                  .weight = q->recurrent,
                                                  .bias = q->bias,
                                                  .scale = 1}));
        for (int32_t a = 0; a < count; a++) {
            int32_t s = order[a];
            int64_t i = row_at(q->offsets, s, t, q->reverse);
            float *gates = q->gates + i * 4 * hidden, *out = q->out + i * ldo;
            const float *sum = product + (int64_t)a * 4 * hidden;
            for (int32_t k = 0; k < 4 * hidden; k++) gates[k] += sum[k];
            const float *c_before = t > 0 ? q->cells + (i - step) * hidden
                                          : (q->state_c ? q->state_c + (int64_t)s * hidden : NULL);
            cell(out, q->cells + i * hidden, gates, c_before, hidden);
            if (q->state_h && t + 1 == length(q->offsets, s)) {
                memcpy(q->state_h + (int64_t)s * hidden, out, row);
                memcpy(q->state_c + (int64_t)s * hidden, q->cells + i * hidden, row);
            }
        }
    }
out:
    return status;
}

sida_status sida_lstm_cpu(sida_stream *stream, const sida_lstm_call *call) {
    assert(call->recurrent.dtype == SIDA_F32 && !call->state_h == !call->state_c);
    sida_status status = SIDA_OK, first = SIDA_OK;
    int32_t *order = NULL;
    SIDA_TRY(sort_by_length(&order, call->offsets, call->sequences));
#pragma omp parallel for schedule(dynamic) if (call->sequences > group_sequences)
    for (int32_t g = 0; g < call->sequences; g += group_sequences) {
        int32_t count =
            call->sequences - g < group_sequences ? call->sequences - g : group_sequences;
        sida_status one =
            forward_group(call, order + g, count, call->workspace + (int64_t)g * 5 * call->hidden);
        if (one != SIDA_OK) {
#pragma omp critical
            first = one;
        }
    }
    /* Its message is the other thread's. */
    if (first != SIDA_OK) SIDA_FAIL(first, "the LSTM's recurrent product failed");
    if (call->beside) SIDA_TRY(sida_lstm_cpu(stream, call->beside));
out:
    free(order);
    return status;
}

/* Before: d_h and d_c are the gradients of h_t and c_t from everything but this token's own output
 * (already added to d_h). After: d_gates of the token, d_c of c_{t-1}. */
static void cell_backward(float *d_gates, float *d_c, const float *d_h, const float *gates,
                          const float *c, const float *c_before, int32_t hidden) {
    for (int32_t k = 0; k < hidden; k++) {
        float in = gates[k], forget = gates[hidden + k], candidate = gates[2 * hidden + k],
              open = gates[3 * hidden + k], squashed = squash(c[k]);
        float grad = d_c[k] + d_h[k] * open * (1 - squashed * squashed);
        d_gates[k] = grad * candidate * in * (1 - in);
        d_gates[hidden + k] = grad * (c_before ? c_before[k] : 0) * forget * (1 - forget);
        d_gates[2 * hidden + k] = grad * in * (1 - candidate * candidate);
        d_gates[3 * hidden + k] = d_h[k] * squashed * open * (1 - open);
        d_c[k] = grad * forget;
    }
}

/* workspace: d_h and d_c of the group [count, hidden] each, then a step's d_gates in one block. */
static void backward_group(const sida_lstm_backward_call *q, const int32_t *order, int32_t count,
                           float *workspace) {
    int32_t hidden = q->hidden;
    int64_t ldo = q->ldo ? q->ldo : hidden, step = step_of(q->reverse);
    float *d_h = workspace, *d_c = d_h + (int64_t)count * hidden,
          *block = d_c + (int64_t)count * hidden;
    memset(workspace, 0, 2 * (size_t)count * (size_t)hidden * sizeof *workspace);
    int32_t running = 0;
    for (int64_t t = count > 0 ? length(q->offsets, order[0]) - 1 : -1; t >= 0; t--) {
        while (running < count && length(q->offsets, order[running]) > t) running++;
        for (int32_t a = 0; a < running; a++) {
            int64_t i = row_at(q->offsets, order[a], t, q->reverse);
            float *dh = d_h + (int64_t)a * hidden, *dg = block + (int64_t)a * 4 * hidden;
            for (int32_t k = 0; k < hidden; k++) dh[k] += q->d_out[i * ldo + k];
            cell_backward(dg, d_c + (int64_t)a * hidden, dh, q->gates + i * 4 * hidden,
                          q->cells + i * hidden, t > 0 ? q->cells + (i - step) * hidden : NULL,
                          hidden);
            memcpy(q->d_gates + i * 4 * hidden, dg, 4 * (size_t)hidden * sizeof *dg);
        }
        sida_gemm_cpu(&(sida_gemm_call){.c = d_h,
                                        .ldc = hidden,
                                        .a = block,
                                        .lda = 4 * (int64_t)hidden,
                                        .b = q->recurrent.data,
                                        .ldb = hidden,
                                        .m = running,
                                        .n = hidden,
                                        .k = 4 * (int64_t)hidden});
    }
}

sida_status sida_lstm_backward_cpu(const sida_lstm_backward_call *call) {
    assert(call->recurrent.dtype == SIDA_F32);
    sida_status status = SIDA_OK;
    int32_t *order = NULL;
    int32_t hidden = call->hidden;
    int64_t tokens = call->offsets[call->sequences], ldo = call->ldo ? call->ldo : hidden;
    size_t row = (size_t)hidden * sizeof(float);
    float *before = call->workspace, *groups = before + tokens * hidden;
    SIDA_TRY(sort_by_length(&order, call->offsets, call->sequences));
#pragma omp parallel for schedule(dynamic) if (call->sequences > group_sequences)
    for (int32_t g = 0; g < call->sequences; g += group_sequences) {
        int32_t count =
            call->sequences - g < group_sequences ? call->sequences - g : group_sequences;
        backward_group(call, order + g, count, groups + (int64_t)g * 6 * hidden);
    }
    for (int32_t s = 0; s < call->sequences; s++) {
        int64_t n = length(call->offsets, s);
        if (n == 0) continue;
        memset(before + row_at(call->offsets, s, 0, call->reverse) * hidden, 0, row);
        for (int64_t t = 1; t < n; t++)
            memcpy(before + row_at(call->offsets, s, t, call->reverse) * hidden,
                   call->out + row_at(call->offsets, s, t - 1, call->reverse) * ldo, row);
    }
    sida_linear_backward_cpu(&(sida_linear_backward_call){.d_weight = call->d_recurrent,
                                                          .d_bias = call->d_bias,
                                                          .d_y = call->d_gates,
                                                          .x = before,
                                                          .weight = call->recurrent,
                                                          .n = tokens});
out:
    free(order);
    return status;
}
