/* A run beside the full model on the same records: what became of each answer. */
#ifndef SIDA_RUNTIME_ENGINE_COMPARE_H
#define SIDA_RUNTIME_ENGINE_COMPARE_H

#include "formats/base/status.h"

#include <stddef.h>
#include <stdint.h>

/* Zero to begin with. */
typedef struct sida_comparison {
    char **answers; /* [count] of the run */
    int8_t *right;  /* [count] 1: it met its target; 0: it did not; -1: there was none */
    size_t count, answers_capacity, right_capacity;
    /* Of the records of the full model so far. */
    size_t seen;
    int64_t changed;      /* answers that differ */
    int64_t lost, gained; /* right in the full model and wrong in the run; the other way about */
} sida_comparison;

/* The run's next answer. target NULL: none. */
sida_status sida_comparison_add(sida_comparison *comparison, const char *answer,
                                const char *target);
/* The full model's next answer, to the same record. */
void sida_comparison_check(sida_comparison *comparison, const char *answer, const char *target);
void sida_comparison_free(sida_comparison *comparison);

/* McNemar's test, exact and two-sided: how probable it is that `lost` and `gained`, or counts as
 * uneven or more so, come from changes that do harm as often as good (a fair coin tossed
 * lost + gained times). 1 where nothing changed. */
double sida_mcnemar_p(int64_t lost, int64_t gained);

#endif
