/* What the GPU's tests share. */
#ifndef SIDA_TESTS_GPU_H
#define SIDA_TESTS_GPU_H

#include "runtime/backend/backend.h"
#include "runtime/backend/symbol.h"
#include "tests/test.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <string.h>

#define OK(call)                                                                                   \
    do {                                                                                           \
        sida_status ok_status = (call);                                                            \
        if (ok_status != SIDA_OK) fail_msg("%s: %s", #call, sida_last_message());                  \
    } while (0)

/* SIDA_TEST_SMALL=1: for tools under which a kernel takes a hundred to a thousand times as long
 * (tests/gpu/sanitize). Fewer and smaller cases, which together still launch every instance of
 * every kernel of ours; and what depends on how much of the device the process holds is not asked,
 * since the tool holds some. */
static inline bool gpu_small(void) {
    const char *value = getenv("SIDA_TEST_SMALL");
    return value && *value && strcmp(value, "0") != 0;
}
static inline int gpu_cases(int all, int small) {
    return gpu_small() ? small : all;
}
/* From a case to the next. */
static inline int gpu_step(int small) {
    return gpu_cases(1, small);
}

/* In front of the runtime's. The back-end lowers the stack of the device's threads to what our
 * kernels take; what a tool adds to a kernel saves its registers there, 1 KiB of them at most. */
cudaError_t cudaDeviceSetLimit(enum cudaLimit limit, size_t value) {
    enum { TOOLS_STACK = 4096 };
    cudaError_t (*set)(enum cudaLimit, size_t);
    if (!sida_symbol(RTLD_NEXT, &set, "cudaDeviceSetLimit")) return cudaErrorNotSupported;
    if (limit == cudaLimitStackSize && gpu_small() && value < TOOLS_STACK) value = TOOLS_STACK;
    return set(limit, value);
}

/* The tests' back-end; NULL where there is no GPU, and then the reason is the last message. Device
 * memory starts as NaN: what is read without having been written shows. */
static inline sida_backend *gpu_open(void) {
    sida_backend *backend;
    sida_status status = sida_backend_create_cuda(&backend, &(sida_cuda_options){.poison = true});
    return status == SIDA_OK ? backend : NULL;
}

/* ‖got - want‖ <= tolerance ‖want‖, and no element further off than 20 times that share of the
 * largest. NaN never passes. */
static inline void expect_close(const char *what, const float *got, const float *want,
                                int64_t count, double tolerance) {
    double most = 0, worst = 0, error = 0, norm = 0;
    for (int64_t i = 0; i < count; i++) {
        double difference = fabs((double)got[i] - (double)want[i]);
        if (!isfinite(got[i])) fail_msg("%s: element %lld is %g", what, (long long)i, got[i]);
        if (fabs((double)want[i]) > most) most = fabs((double)want[i]);
        if (difference > worst) worst = difference;
        error += difference * difference;
        norm += (double)want[i] * (double)want[i];
    }
    if (worst > 20 * tolerance * most || sqrt(error) > tolerance * sqrt(norm))
        fail_msg("%s: off by %g of %g at most, normalised error %g, allowed %g", what, worst, most,
                 sqrt(error / norm), tolerance);
}

#endif
