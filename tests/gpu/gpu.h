/* What the GPU's tests share. */
#ifndef SIDA_TESTS_GPU_H
#define SIDA_TESTS_GPU_H

#include "runtime/backend/backend.h"
#include "tests/test.h"

#include <math.h>
#include <string.h>

#define OK(call)                                                                                   \
    do {                                                                                           \
        sida_status ok_status = (call);                                                            \
        if (ok_status != SIDA_OK) fail_msg("%s: %s", #call, sida_last_message());                  \
    } while (0)

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
