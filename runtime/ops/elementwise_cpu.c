#include "runtime/ops/elementwise.h"

#include "runtime/ops/cpu_kernels.h"

enum { TASK_ELEMENTS = 4096 };

sida_status sida_gated_cpu(sida_stream *stream, float *out, const float *gate, const float *up,
                           int64_t count, sida_activation activation) {
    (void)stream;
    const sida_cpu_kernels *kernels = sida_cpu_kernels_get();
    int64_t tasks = (count + TASK_ELEMENTS - 1) / TASK_ELEMENTS;
    int threads = tasks < 4 ? 1 : sida_ops_threads();
    (void)threads; /* without OpenMP */
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t first = task * TASK_ELEMENTS;
        kernels->gated(out + first, gate + first, up + first,
                       count - first < TASK_ELEMENTS ? count - first : TASK_ELEMENTS, activation);
    }
    return SIDA_OK;
}
