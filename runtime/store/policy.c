#include "runtime/store/policy.h"

#include <stddef.h>
#include <string.h>

int32_t sida_policy_fifo(const sida_slot_view *views, int32_t count) {
    int32_t best = 0;
    for (int32_t i = 1; i < count; i++)
        if (views[i].loaded_at < views[best].loaded_at) best = i;
    return best;
}

int32_t sida_policy_lru(const sida_slot_view *views, int32_t count) {
    int32_t best = 0;
    for (int32_t i = 1; i < count; i++)
        if (views[i].last_used < views[best].last_used) best = i;
    return best;
}

/* What has just been used is often what is needed last, but its kernels still run: a copy into it
 * would hold up the link. The next best is nearly as good, and this one is there for the next load.
 */
static bool gives_way_before(const sida_slot_view *a, const sida_slot_view *b) {
    if (a->idle != b->idle) return a->idle;
    if (a->next_use != b->next_use) return a->next_use > b->next_use;
    if (a->heat < b->heat || a->heat > b->heat) return a->heat < b->heat;
    return a->last_used < b->last_used;
}

int32_t sida_policy_lookahead(const sida_slot_view *views, int32_t count) {
    int32_t best = 0;
    for (int32_t i = 1; i < count; i++)
        if (gives_way_before(&views[i], &views[best])) best = i;
    return best;
}

static const sida_policy policies[] = {
    {"fifo", sida_policy_fifo},
    {"lru", sida_policy_lru},
    {"lookahead", sida_policy_lookahead},
};

const sida_policy *sida_policy_find(const char *name) {
    for (size_t i = 0; i < sizeof policies / sizeof *policies; i++)
        if (strcmp(policies[i].name, name) == 0) return &policies[i];
    return NULL;
}

const char *sida_policy_names(void) {
    return "fifo, lru, lookahead";
}
