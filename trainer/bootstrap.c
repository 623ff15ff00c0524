#include "trainer/bootstrap.h"

#include "formats/base/memory.h"
#include "formats/base/rng.h"

#include <assert.h>
#include <stdlib.h>

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Linear between the neighbours in rank; values rise. */
static double quantile(const double *values, int32_t count, double p) {
    double at = p * (count - 1);
    int32_t low = (int32_t)at;
    if (low + 1 >= count) return values[count - 1];
    return values[low] + (at - low) * (values[low + 1] - values[low]);
}

static double ratio(double numerator, double denominator, double otherwise) {
    return denominator != 0 ? numerator / denominator : otherwise;
}

sida_status sida_bootstrap(sida_interval *out, const double *numerators, const double *denominators,
                           int64_t units, int32_t columns, int32_t resamples, uint64_t seed) {
    sida_status status = SIDA_OK;
    double *draws = NULL, *sums = NULL;
    sida_rng rng = sida_rng_seed(seed);
    assert(units >= 1 && units <= UINT32_MAX && columns >= 1 && resamples >= 1);
    SIDA_TRY(SIDA_ALLOC(&draws, (size_t)columns * (size_t)resamples, "a bootstrap"));
    SIDA_TRY(SIDA_ALLOC(&sums, (size_t)columns * 2, "a bootstrap"));
    double *over = sums, *under = sums + columns;
    for (int64_t i = 0; i < units * columns; i++) {
        over[i % columns] += numerators[i];
        under[i % columns] += denominators[i];
    }
    for (int32_t c = 0; c < columns; c++) out[c].mean = ratio(over[c], under[c], 0);
    for (int32_t r = 0; r < resamples; r++) {
        for (int32_t c = 0; c < columns; c++) over[c] = under[c] = 0;
        for (int64_t i = 0; i < units; i++) {
            int64_t at = (int64_t)sida_rng_below(&rng, (uint32_t)units) * columns;
            for (int32_t c = 0; c < columns; c++) {
                over[c] += numerators[at + c];
                under[c] += denominators[at + c];
            }
        }
        for (int32_t c = 0; c < columns; c++)
            draws[(int64_t)c * resamples + r] = ratio(over[c], under[c], out[c].mean);
    }
    for (int32_t c = 0; c < columns; c++) {
        double *values = draws + (int64_t)c * resamples;
        qsort(values, (size_t)resamples, sizeof *values, compare);
        out[c].low = quantile(values, resamples, 0.025);
        out[c].high = quantile(values, resamples, 0.975);
    }
out:
    free(draws);
    free(sums);
    return status;
}
