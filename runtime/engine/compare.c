#include "runtime/engine/compare.h"

#include "formats/base/memory.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int8_t is_right(const char *answer, const char *target) {
    return target ? (int8_t)(strcmp(answer, target) == 0) : -1;
}

sida_status sida_comparison_add(sida_comparison *comparison, const char *answer,
                                const char *target) {
    size_t count = comparison->count;
    sida_status status = SIDA_OK;
    SIDA_TRY(SIDA_GROW(&comparison->answers, &comparison->answers_capacity, count + 1, "answers"));
    SIDA_TRY(SIDA_GROW(&comparison->right, &comparison->right_capacity, count + 1, "answers"));
    SIDA_TRY(sida_strdup(&comparison->answers[count], answer));
    comparison->right[count] = is_right(answer, target);
    comparison->count++;
out:
    return status;
}

void sida_comparison_check(sida_comparison *comparison, const char *answer, const char *target) {
    size_t i = comparison->seen++;
    if (i >= comparison->count || strcmp(answer, comparison->answers[i]) != 0)
        comparison->changed++;
    if (i >= comparison->count || !target) return;
    int8_t before = is_right(answer, target);
    comparison->lost += before == 1 && comparison->right[i] == 0;
    comparison->gained += before == 0 && comparison->right[i] == 1;
}

void sida_comparison_free(sida_comparison *comparison) {
    for (size_t i = 0; i < comparison->count; i++) free(comparison->answers[i]);
    free(comparison->answers);
    free(comparison->right);
    *comparison = (sida_comparison){0};
}

double sida_mcnemar_p(int64_t lost, int64_t gained) {
    int64_t n = lost + gained, least = lost < gained ? lost : gained;
    double tail = 0, scale = (double)n * log(2);
    for (int64_t i = 0; i <= least; i++)
        tail += exp(lgamma((double)n + 1) - lgamma((double)i + 1) - lgamma((double)(n - i) + 1) -
                    scale);
    return fmin(1, 2 * tail);
}
