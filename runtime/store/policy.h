/* Which slot gives way to a load. Pure functions over a view of the slots that may be evicted, so
 * that they can be tested and simulated. A new policy is one function and one row of the table in
 * policy.c. */
#ifndef SIDA_RUNTIME_STORE_POLICY_H
#define SIDA_RUNTIME_STORE_POLICY_H

#include <stdbool.h>
#include <stdint.h>

/* Times are ticks of one counter that grows with every load and every use. */
typedef struct sida_slot_view {
    int32_t slot;
    int64_t loaded_at;
    int64_t last_used; /* loaded_at when it has not been used yet */
    int64_t next_use;  /* position of its next use in the announced plans; INT64_MAX: none */
    double heat;       /* how often its expert was used, older uses counting less; only the order
                          means something; -INFINITY: never */
    bool idle;         /* its last use is over: a copy into it need not wait */
} sida_slot_view;

/* The index of the victim among views[0 … count - 1], count >= 1, ascending by slot. */
typedef int32_t sida_policy_fn(const sida_slot_view *views, int32_t count);

typedef struct sida_policy {
    const char *name;
    sida_policy_fn *victim;
} sida_policy;

/* fifo: the oldest load (the paper's). lru: the oldest use. lookahead: idle before not; then the
 * furthest next use, ties to the lowest heat, then to the oldest use. Ties that are left go to the
 * lower slot. */
sida_policy_fn sida_policy_fifo, sida_policy_lru, sida_policy_lookahead;

/* NULL when `name` is no policy's. */
const sida_policy *sida_policy_find(const char *name);
/* "fifo, lru, lookahead", for messages. */
const char *sida_policy_names(void);

#endif
