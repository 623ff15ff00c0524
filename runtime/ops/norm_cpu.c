#include "runtime/ops/norm.h"

#include "runtime/ops/cpu_kernels.h"

#include <assert.h>

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
