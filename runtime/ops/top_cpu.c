#include "runtime/ops/top.h"

#include "formats/dtype.h"
#include "runtime/ops/cpu_kernels.h"

#include <assert.h>
#include <math.h>

/* By insertion: T is small beside E. */
static void find_top(uint16_t *best, const float *logits, int32_t experts, int32_t top) {
    int32_t held = 0;
    for (int32_t e = 0; e < experts; e++) {
        if (held == top && !(logits[e] > logits[best[top - 1]])) continue;
        int32_t at = held < top ? held++ : top - 1;
        for (; at > 0 && logits[e] > logits[best[at - 1]]; at--) best[at] = best[at - 1];
        best[at] = (uint16_t)e;
    }
}

static float log_sum_exp(const float *logits, int32_t experts) {
    double largest = logits[0], sum = 0;
    for (int32_t e = 1; e < experts; e++) largest = fmax(largest, logits[e]);
    for (int32_t e = 0; e < experts; e++) sum += exp(logits[e] - largest);
    return (float)(largest + log(sum));
}

sida_status sida_top_cpu(sida_stream *stream, const sida_top_call *call) {
    (void)stream;
    const int32_t top = call->top;
    assert(top >= 1 && top <= call->experts_total && call->experts_total <= UINT16_MAX + 1);
    int threads = call->n * call->experts_total < SIDA_PARALLEL_WORK / 8 ? 1 : sida_ops_threads();
    (void)threads; /* without OpenMP */
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < call->n; i++) {
        const float *logits = call->logits + i * call->experts_total;
        uint16_t *ids = call->ids + i * top, *logp = call->logp + i * top;
        find_top(ids, logits, call->experts_total, top);
        float norm = log_sum_exp(logits, call->experts_total);
        for (int32_t r = 0; r < top; r++)
            logp[r] = isfinite(norm) ? sida_f16_from_f32(logits[ids[r]] - norm)
                                     : (uint16_t)SIDA_TOP_NOT_FINITE;
    }
    return SIDA_OK;
}
