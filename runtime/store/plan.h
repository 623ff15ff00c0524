/* What will be used when: the announced experts in the order of use. No threads in here; the store
 * calls it under its lock. */
#ifndef SIDA_RUNTIME_STORE_PLAN_H
#define SIDA_RUNTIME_STORE_PLAN_H

#include "formats/base/status.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct sida_plan sida_plan;

/* For experts 0 … experts - 1. */
sida_status sida_plan_create(sida_plan **out, int32_t experts);
void sida_plan_destroy(sida_plan *plan); /* takes NULL */

/* Adds uses at `position`, behind everything that is planned there already. Positions may come in
 * any order; what grows with each call is cheapest. */
sida_status sida_plan_add(sida_plan *plan, int64_t position, const int32_t *experts, int32_t count);

/* What is planned at `position`, in order: a pointer into the plan, until it changes. NULL, and
 * *count 0: nothing. */
const int32_t *sida_plan_at(const sida_plan *plan, int64_t position, int32_t *count);
/* Forgets all uses at `position`. What is added there afterwards, the cursor sees. */
void sida_plan_remove(sida_plan *plan, int64_t position);

/* The first use, taken out when its position is <= through; false when there is none. */
bool sida_plan_pop(sida_plan *plan, int64_t through, int32_t *expert);

/* The position of an expert's next use; INT64_MAX when none is planned. */
int64_t sida_plan_next_use(const sida_plan *plan, int32_t expert);

/* A cursor in the order of use: peek at it (false at the end), step behind it, or put it back to
 * the first use. Uses added before it put it back by themselves. */
bool sida_plan_peek(const sida_plan *plan, int64_t *position, int32_t *expert);
void sida_plan_step(sida_plan *plan);
void sida_plan_rewind(sida_plan *plan);

#endif
