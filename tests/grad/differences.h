/* Central differences of a plain double-precision forward, against which the backward ops are held.
 *
 * The reference's differences are good to about 1e-9 (step 1e-5, values of order 1), so what is
 * left is the op's fp32 rounding: sums of at most some hundred terms of order 1, about 1e-6. The
 * bound is 2e-5 of the larger of 1 and the value. */
#ifndef SIDA_TESTS_GRAD_DIFFERENCES_H
#define SIDA_TESTS_GRAD_DIFFERENCES_H

#include "tests/test.h"

#include "formats/base/rng.h"

#include <math.h>

enum { MAX = 2048 };

static inline void fill(double *to, int count, double scale, uint64_t seed) {
    sida_rng rng = sida_rng_seed(seed);
    for (int i = 0; i < count; i++) to[i] = scale * (double)sida_rng_normal(&rng);
}

/* fp32 copies; the double is set to what fp32 holds, so that both start from the same input. */
static inline void narrow(float *to, double *from, int count) {
    for (int i = 0; i < count; i++) {
        to[i] = (float)from[i];
        from[i] = (double)to[i];
    }
}

static inline void near(const char *what, int index, double got, double expected) {
    if (!(fabs(got - expected) <= 2e-5 * fmax(1, fabs(expected))))
        fail_msg("%s[%d]: %.9g, expected %.9g", what, index, got, expected);
}

/* Compares `got` [count] with the differences of `objective` in each of x [count]. */
static inline void check(const char *what, double (*objective)(void *), void *context, double *x,
                         int count, const float *got) {
    const double step = 1e-5;
    for (int i = 0; i < count; i++) {
        double held = x[i];
        x[i] = held + step;
        double high = objective(context);
        x[i] = held - step;
        double low = objective(context);
        x[i] = held;
        near(what, i, (double)got[i], (high - low) / (2 * step));
    }
}

#endif
