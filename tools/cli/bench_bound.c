#include "tools/cli/bench_bound.h"

#include "formats/base/memory.h"

#include <stdbool.h>
#include <stdlib.h>

typedef struct held {
    int64_t next_use; /* a step; INT64_MAX: none */
    int32_t expert;
} held;

static int by_next_use(const void *a, const void *b) {
    const held *x = a, *y = b;
    if (x->next_use != y->next_use) return x->next_use < y->next_use ? -1 : 1;
    return (x->expert > y->expert) - (x->expert < y->expert);
}

sida_status sida_bench_least_loads(int64_t *loads, const int64_t *start, const int32_t *experts,
                                   int32_t steps, int32_t experts_total, int32_t slots) {
    sida_status status = SIDA_OK;
    int64_t *next = NULL, *next_of = NULL;
    held *list = NULL;
    bool *resident = NULL;
    int32_t count = 0;
    SIDA_TRY(SIDA_ALLOC(&next, start[steps], "next uses"));
    SIDA_TRY(SIDA_ALLOC(&next_of, experts_total, "next uses"));
    SIDA_TRY(SIDA_ALLOC(&resident, experts_total, "next uses"));
    SIDA_TRY(SIDA_ALLOC(&list, experts_total, "next uses"));
    for (int32_t e = 0; e < experts_total; e++) next_of[e] = INT64_MAX;
    for (int32_t i = steps - 1; i >= 0; i--)
        for (int64_t j = start[i]; j < start[i + 1]; j++) {
            next[j] = next_of[experts[j]];
            next_of[experts[j]] = i;
        }
    for (int32_t i = 0; i < steps; i++) {
        loads[i] = 0;
        for (int64_t j = start[i]; j < start[i + 1]; j++) {
            int32_t e = experts[j];
            next_of[e] = next[j];
            if (resident[e]) continue;
            resident[e] = true;
            list[count++] = (held){.expert = e};
            loads[i]++;
        }
        if (count <= slots) continue;
        for (int32_t h = 0; h < count; h++) {
            list[h].next_use = next_of[list[h].expert];
            resident[list[h].expert] = false;
        }
        qsort(list, (size_t)count, sizeof *list, by_next_use);
        count = slots;
        for (int32_t h = 0; h < count; h++) resident[list[h].expert] = true;
    }
out:
    free(next);
    free(next_of);
    free(resident);
    free(list);
    return status;
}
