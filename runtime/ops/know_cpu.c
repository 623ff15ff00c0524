#include "runtime/ops/know.h"

#include "runtime/ops/cpu_kernels.h"

static void know(const sida_know_call *call, int64_t i) {
    const int64_t width = call->width;
    float *sum = call->sum + i * width, *z = call->z + i * width;
    for (int32_t j = 0; j < call->k; j++) {
        const float *row = call->known + call->experts[i * call->k + j] * width;
        for (int64_t c = 0; c < width; c++) sum[c] += row[c];
    }
    for (int64_t c = 0; c < width; c++) {
        const float value = sum[c] + call->bias[c];
        z[c] = value > 0 ? value : 0;
    }
}

sida_status sida_know_cpu(sida_stream *stream, const sida_know_call *call) {
    (void)stream;
    const int64_t work = call->n * call->width * (call->k + 1);
    int threads = work < SIDA_PARALLEL_WORK / 8 ? 1 : sida_ops_threads();
    (void)threads; /* without OpenMP */
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < call->n; i++) know(call, i);
    return SIDA_OK;
}
