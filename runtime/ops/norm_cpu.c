#include "runtime/ops/norm.h"

#include "runtime/ops/cpu_kernels.h"

#include <assert.h>
#include <math.h>

enum { TASK_ROWS = 16 };

sida_status sida_rms_norm_cpu(sida_stream *stream, void *out_rows, sida_dtype out_type,
                              const float *x, sida_weight weight, int64_t n, float epsilon) {
    (void)stream;
    (void)out_type;
    assert(out_type == SIDA_F32);
    float *out = out_rows;
    const sida_cpu_kernels *kernels = sida_cpu_kernels_get();
    int64_t d = weight.cols, tasks = (n + TASK_ROWS - 1) / TASK_ROWS;
    int threads = n * d < SIDA_PARALLEL_WORK / 8 ? 1 : sida_ops_threads();
    (void)threads; /* without OpenMP */
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t first = task * TASK_ROWS;
        kernels->rms_norm(out + first * d, x + first * d, weight,
                          n - first < TASK_ROWS ? n - first : TASK_ROWS, epsilon);
    }
    return SIDA_OK;
}

/* Σ a b, and with c Σ a b c: eight partial sums, so that the compiler may use vectors. */
static float dot(const float *a, const float *b, const float *c, int64_t d) {
    float sum[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= d; i += 8)
        for (int k = 0; k < 8; k++) sum[k] += a[i + k] * b[i + k] * (c ? c[i + k] : 1.0f);
    for (int k = 0; i + k < d; k++) sum[k] += a[i + k] * b[i + k] * (c ? c[i + k] : 1.0f);
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

/* With r = 1 / rms(x) and g = d_out weight: d_x = r g - x r³ (g · x) / d. */
void sida_rms_norm_backward_cpu(const sida_rms_norm_backward_call *call) {
    const int64_t d = call->weight.cols;
    const float *weight = call->weight.data;
    assert(call->weight.dtype == SIDA_F32);
    for (int64_t i = 0; i < call->n; i++) {
        const float *x = call->x + i * d, *d_out = call->d_out + i * d;
        float r = 1.0f / sqrtf(dot(x, x, NULL, d) / (float)d + call->epsilon);
        if (call->d_weight)
            for (int64_t k = 0; k < d; k++) call->d_weight[k] += d_out[k] * x[k] * r;
        if (!call->d_x) continue;
        float *d_x = call->d_x + i * d;
        float pull = dot(x, d_out, weight, d) / (float)d * r * r * r;
        for (int64_t k = 0; k < d; k++) d_x[k] += r * d_out[k] * weight[k] - pull * x[k];
    }
}
