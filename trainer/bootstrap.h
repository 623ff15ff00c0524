/* How far a figure would move with other sequences of the same kind. */
#ifndef SIDA_TRAINER_BOOTSTRAP_H
#define SIDA_TRAINER_BOOTSTRAP_H

#include "formats/base/status.h"

#include <stdint.h>

typedef struct sida_interval {
    double mean, low, high; /* low … high: 95 % */
} sida_interval;

/* The percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter
 * 13) of Σ numerators / Σ denominators over `units` >= 1, drawn with replacement `resamples` times.
 * All `columns` share the draws. For a paired difference of two sources, the numerators are the
 * differences of their sums in a unit. A column whose denominators are 0 has 0; a resample that has
 * none but 0 counts as the mean. numerators, denominators: [units, columns]. Same arguments, same
 * numbers. MEMORY. */
sida_status sida_bootstrap(sida_interval *out, const double *numerators, const double *denominators,
                           int64_t units, int32_t columns, int32_t resamples, uint64_t seed);

#endif
