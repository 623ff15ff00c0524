/* Refinements for the tests: random ones, and their definition evaluated plainly. */
#ifndef SIDA_TESTS_REFINE_CASES_H
#define SIDA_TESTS_REFINE_CASES_H

#include "formats/base/rng.h"
#include "runtime/predictor/sources.h"
#include "tests/test.h"

#include <math.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
static inline void case_threads(int threads) {
    omp_set_num_threads(threads);
}
#else
static inline void case_threads(int threads) {
    (void)threads;
}
#endif

static inline void case_ok(sida_status status) {
    if (status != SIDA_OK) fail_msg("%s", sida_last_message());
}

static inline void case_refused(sida_status status, sida_status code, const char *words) {
    if (status != code || !strstr(sida_last_message(), words))
        fail_msg("%d instead of %d, '%s' does not say '%s'", status, code, sida_last_message(),
                 words);
}

static inline void case_noise(float *values, int64_t count, float deviation, uint64_t seed) {
    sida_rng rng = sida_rng_seed(seed);
    for (int64_t i = 0; i < count; i++) values[i] += deviation * sida_rng_normal(&rng);
}

static inline sida_net *case_net(const sida_net_config *of) {
    sida_net *net;
    case_ok(sida_net_create(&net, of));
    sida_net_initialise(net, 5);
    case_noise(net->parameters, net->parameter_count, 0.1f, 6);
    return net;
}

static inline sida_refine *case_refine(const sida_net_config *of, int32_t width) {
    sida_refine *refine;
    case_ok(sida_refine_create(&refine, of, width));
    case_noise(refine->parameters, refine->parameter_count, 0.4f, 7);
    return refine;
}

/* Distinct experts a token: [n, k]. */
static inline void case_choose(int32_t *chosen, int64_t n, int32_t k, int32_t experts,
                               sida_rng *rng) {
    for (int64_t i = 0; i < n; i++)
        for (int32_t r = 0; r < k;) {
            chosen[i * k + r] = (int32_t)sida_rng_below(rng, (uint32_t)experts);
            bool fresh = true;
            for (int32_t b = 0; b < r; b++) fresh &= chosen[i * k + b] != chosen[i * k + r];
            r += fresh;
        }
}

/* s' of one token, layer m, once layers 0 … l have chosen; refine.h word by word. chosen: [layers,
 * n, k]. */
static inline void case_evaluate(double *out, const sida_refine *refine, int side, int32_t l,
                                 int32_t m, const float *f, const float *s, const int32_t *chosen,
                                 int64_t n, int64_t i, int32_t k) {
    const sida_refine_side *of = &refine->sides[side];
    const int64_t width = refine->width, h = refine->net.hidden, experts = refine->net.experts;
    double z[64];
    for (int64_t r = 0; r < width; r++) {
        z[r] = (double)of->bias[l * width + r];
        for (int64_t c = 0; c < h; c++)
            z[r] += (double)of->features.weight[r * h + c] * (double)f[i * h + c];
        for (int32_t j = 0; j <= l; j++)
            for (int32_t q = 0; q < k; q++)
                z[r] += (double)of->known[(j * experts + chosen[(j * n + i) * k + q]) * width + r];
        z[r] = fmax(z[r], 0);
    }
    for (int64_t e = 0; e < experts; e++) {
        const int64_t row = (m - 1) * experts + e;
        out[e] = (double)s[(i * refine->net.layers[side] + m) * experts + e] +
                 (double)of->heads.bias[row];
        for (int64_t r = 0; r < width; r++)
            out[e] += (double)of->heads.weight[row * width + r] * z[r];
    }
}

#endif
