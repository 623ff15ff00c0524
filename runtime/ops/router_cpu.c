#include "runtime/ops/router.h"

#include "runtime/ops/cpu_kernels.h"

#include <assert.h>
#include <math.h>

/* The k best of the allowed, best first, ties to the lower id. */
static void choose(int32_t *out, const float *logits, const uint8_t *allowed, int32_t experts,
                   int32_t k) {
    int32_t count = 0;
    for (int32_t e = 0; e < experts; e++) {
        if (allowed && !allowed[e]) continue;
        int32_t at = count < k ? count++ : k;
        for (; at > 0 && logits[e] > logits[out[at - 1]]; at--)
            if (at < k) out[at] = out[at - 1];
        if (at < k) out[at] = e;
    }
    /* Comparisons with NaN are false, so even then every place holds an expert. */
    assert(count == k);
}

static void route(const sida_cpu_kernels *kernels, const sida_router_call *call, int64_t i) {
    const float *logits = call->logits + i * call->experts_total;
    const uint8_t *allowed =
        call->allowed ? call->allowed + (int64_t)call->set_of[i] * call->experts_total : NULL;
    int32_t *experts = call->experts + i * call->k;
    float *alpha = call->alpha + i * call->k;
    choose(experts, logits, allowed, call->experts_total, call->k);
    float high = logits[experts[0]], sum = 0.0f;
    if (call->renormalise) {
        for (int32_t r = 0; r < call->k; r++) sum += kernels->exp_one(logits[experts[r]] - high);
    } else {
        for (int32_t e = 0; allowed && e < call->experts_total; e++)
            high = logits[e] > high ? logits[e] : high;
        sum = kernels->exp_sum(logits, high, call->experts_total);
    }
    for (int32_t r = 0; r < call->k; r++)
        alpha[r] = kernels->exp_one(logits[experts[r]] - high) / sum;
}

sida_status sida_router_cpu(sida_stream *stream, const sida_router_call *call) {
    (void)stream;
    const sida_cpu_kernels *kernels = sida_cpu_kernels_get();
    assert(call->k >= 1 && call->k <= call->experts_total);
    int threads = call->n * call->experts_total < SIDA_PARALLEL_WORK / 8 ? 1 : sida_ops_threads();
    (void)threads; /* without OpenMP */
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < call->n; i++) route(kernels, call, i);
    return SIDA_OK;
}
