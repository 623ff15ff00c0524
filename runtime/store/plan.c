/* Two views of the same uses: groups of one position each in a list sorted by position, and for
 * each expert the list of its positions. */
#include "runtime/store/plan.h"

#include "formats/base/memory.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

typedef struct group {
    struct group *previous, *next;
    int64_t position;
    int32_t *experts;
    size_t capacity, count, taken; /* taken: popped from the front */
} group;

typedef struct use {
    int64_t position;
    int32_t next; /* index into uses, -1: none */
} use;

struct sida_plan {
    group *first, *last, *spare; /* spare: emptied groups, linked by next */
    use *uses;
    size_t uses_capacity;
    int32_t uses_count, uses_spare; /* uses_spare: head of the free list, -1: none */
    int32_t experts;
    int32_t *head; /* [experts] first use, -1: none */
    group *cursor; /* NULL: the end */
    size_t cursor_index;
};

sida_status sida_plan_create(sida_plan **out, int32_t experts) {
    *out = NULL;
    sida_plan *plan;
    sida_status status = SIDA_ALLOC(&plan, 1, "a plan");
    if (status != SIDA_OK) return status;
    status = SIDA_ALLOC(&plan->head, experts, "a plan's experts");
    if (status != SIDA_OK) {
        free(plan);
        return status;
    }
    for (int32_t i = 0; i < experts; i++) plan->head[i] = -1;
    plan->experts = experts;
    plan->uses_spare = -1;
    *out = plan;
    return SIDA_OK;
}

static void free_groups(group *g) {
    while (g) {
        group *next = g->next;
        free(g->experts);
        free(g);
        g = next;
    }
}

void sida_plan_destroy(sida_plan *plan) {
    if (!plan) return;
    free_groups(plan->first);
    free_groups(plan->spare);
    free(plan->uses);
    free(plan->head);
    free(plan);
}

/* A group of `position` with room for `count` more, linked in; a new one is empty. */
static sida_status find_group(sida_plan *plan, group **out, int64_t position, int32_t count) {
    group *before = plan->last;
    while (before && before->position > position) before = before->previous;
    group *g = before;
    sida_status status = SIDA_OK;
    if (!g || g->position != position) {
        if (plan->spare) {
            g = plan->spare;
            plan->spare = g->next;
        } else {
            SIDA_TRY(SIDA_ALLOC(&g, 1, "a plan's group"));
        }
        g->position = position;
        g->count = g->taken = 0;
        g->previous = before;
        g->next = before ? before->next : plan->first;
        *(g->previous ? &g->previous->next : &plan->first) = g;
        *(g->next ? &g->next->previous : &plan->last) = g;
    }
    SIDA_TRY(SIDA_GROW(&g->experts, &g->capacity, g->count + (size_t)count, "a plan's group"));
    *out = g;
out:
    return status;
}

static void unlink_group(sida_plan *plan, group *g) {
    *(g->previous ? &g->previous->next : &plan->first) = g->next;
    *(g->next ? &g->next->previous : &plan->last) = g->previous;
    if (plan->cursor == g) {
        plan->cursor = g->next;
        plan->cursor_index = g->next ? g->next->taken : 0;
    }
    g->next = plan->spare;
    plan->spare = g;
}

/* Links a use of the expert behind its uses up to the same position. The store was made: cannot
 * fail. */
static void add_use(sida_plan *plan, int32_t expert, int64_t position) {
    int32_t index = plan->uses_spare;
    if (index >= 0)
        plan->uses_spare = plan->uses[index].next;
    else
        index = plan->uses_count++;
    int32_t *link = &plan->head[expert];
    while (*link >= 0 && plan->uses[*link].position <= position) link = &plan->uses[*link].next;
    plan->uses[index] = (use){position, *link};
    *link = index;
}

sida_status sida_plan_add(sida_plan *plan, int64_t position, const int32_t *experts,
                          int32_t count) {
    if (count == 0) return SIDA_OK;
    group *g;
    sida_status status = SIDA_OK;
    SIDA_TRY(SIDA_GROW(&plan->uses, &plan->uses_capacity, plan->uses_count + count, "a plan"));
    SIDA_TRY(find_group(plan, &g, position, count));
    if (!plan->cursor || plan->cursor->position > position) {
        /* The cursor is at the end or further on: these are the first it has not seen. */
        plan->cursor = g;
        plan->cursor_index = g->count;
    }
    for (int32_t i = 0; i < count; i++) {
        assert(experts[i] >= 0 && experts[i] < plan->experts);
        g->experts[g->count++] = experts[i];
        add_use(plan, experts[i], position);
    }
out:
    return status;
}

/* Positions that are asked for lie near the front. */
static group *group_at(const sida_plan *plan, int64_t position) {
    group *g = plan->first;
    while (g && g->position < position) g = g->next;
    return g && g->position == position ? g : NULL;
}

const int32_t *sida_plan_at(const sida_plan *plan, int64_t position, int32_t *count) {
    const group *g = group_at(plan, position);
    *count = g ? (int32_t)(g->count - g->taken) : 0;
    return *count > 0 ? g->experts + g->taken : NULL;
}

/* Takes *link out of the expert's list. */
static void free_use(sida_plan *plan, int32_t *link) {
    int32_t index = *link;
    *link = plan->uses[index].next;
    plan->uses[index].next = plan->uses_spare;
    plan->uses_spare = index;
}

void sida_plan_remove(sida_plan *plan, int64_t position) {
    group *g = group_at(plan, position);
    if (!g) return;
    for (; g->taken < g->count; g->taken++) {
        int32_t *link = &plan->head[g->experts[g->taken]];
        while (plan->uses[*link].position != position) link = &plan->uses[*link].next;
        free_use(plan, link);
    }
    unlink_group(plan, g);
}

bool sida_plan_pop(sida_plan *plan, int64_t through, int32_t *expert) {
    group *g = plan->first;
    /* A group is only empty when adding to it failed. */
    while (g && g->taken == g->count) {
        unlink_group(plan, g);
        g = plan->first;
    }
    if (!g || g->position > through) return false;
    *expert = g->experts[g->taken++];
    assert(plan->uses[plan->head[*expert]].position == g->position);
    free_use(plan, &plan->head[*expert]);
    if (plan->cursor == g && plan->cursor_index < g->taken) plan->cursor_index = g->taken;
    if (g->taken == g->count) unlink_group(plan, g);
    return true;
}

int64_t sida_plan_next_use(const sida_plan *plan, int32_t expert) {
    int32_t index = plan->head[expert];
    return index < 0 ? INT64_MAX : plan->uses[index].position;
}

bool sida_plan_peek(const sida_plan *plan, int64_t *position, int32_t *expert) {
    const group *g = plan->cursor;
    size_t index = plan->cursor_index;
    while (g && index >= g->count) {
        g = g->next;
        index = g ? g->taken : 0;
    }
    if (!g) return false;
    *position = g->position;
    *expert = g->experts[index];
    return true;
}

void sida_plan_step(sida_plan *plan) {
    group *g = plan->cursor;
    while (g && plan->cursor_index >= g->count) {
        g = g->next;
        plan->cursor_index = g ? g->taken : 0;
    }
    if (g) plan->cursor_index++;
    while (g && plan->cursor_index >= g->count) {
        g = g->next;
        plan->cursor_index = g ? g->taken : 0;
    }
    plan->cursor = g;
}

void sida_plan_rewind(sida_plan *plan) {
    plan->cursor = plan->first;
    plan->cursor_index = plan->first ? plan->first->taken : 0;
}
