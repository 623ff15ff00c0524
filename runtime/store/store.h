/* The expert store: a few slots on the device, loaded in the order of use.
 *
 * Knows nothing of models: an expert is a number with bytes in host memory. One thread announces
 * uses ahead (position by position), one thread runs layers (begin, take, release … until all is
 * handed out), a third, the store's own, loads: what the running layer lacks first, then the plan.
 *
 * - A plan may be revised until its position begins, by the thread that runs layers or another.
 * - A prefetch takes a free slot or one whose next planned use lies behind its own position;
 *   otherwise it waits until that changes, and is dropped once its position has begun.
 * - A load on demand takes any slot that is not pinned, not reserved for the running layer and not
 *   being loaded; the copy waits on the copy stream for the slot's last use.
 * - A layer that needs more experts than there are slots gets them in waves. Two slots are enough.
 * - No lock is held across a copy, up to `depth` copies are under way at once: enough that the link
 *   does not wait for the host, and no more, for a load on demand waits for those before it.
 * - An error of a copy, and sida_store_cancel(), wake everybody; every later call returns it. */
#ifndef SIDA_RUNTIME_STORE_STORE_H
#define SIDA_RUNTIME_STORE_STORE_H

#include "runtime/backend/backend.h"
#include "runtime/store/policy.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct sida_store sida_store;

typedef struct sida_store_options {
    int32_t slots;   /* >= 2 */
    int32_t experts; /* ids 0 … experts - 1 */
    size_t expert_bytes;
    /* The bytes of an expert in host memory, unchanged while the store lives. Any thread. */
    const void *(*source)(void *context, int32_t expert);
    void *source_context;
    const sida_policy *policy;
    bool prefetch; /* false: plans only tell the policy what comes */
    int32_t depth; /* copies under way at once; 0: 16 MiB, but 2 … 16 copies */
    /* Tests: overwrite a slot with NaN bytes before a load, so that an early reader is seen. */
    bool poison;
    /* Tests: called on the loader's thread, without the lock, before it issues a load. */
    void (*before_load)(void *context);
    void *before_load_context;
} sida_store_options;

typedef struct sida_store_stats {
    int64_t hits;               /* needed, and resident when the layer began */
    int64_t late_prefetches;    /* needed, and still being loaded then */
    int64_t demand_loads;       /* needed, and loaded because of that */
    int64_t prefetch_loads;     /* loads of the plan */
    int64_t dropped_prefetches; /* planned uses that began before their load had */
    int64_t revised_in;         /* by revisions: uses planned anew */
    int64_t revised_out;        /* and uses forgotten whose load had not begun */
    int64_t bytes_moved;        /* host to device */
    int64_t bytes_wasted;       /* of these: prefetched and not used (yet) */
    int32_t resident, peak_resident;
    double wait_seconds; /* of the thread that runs layers, in take */
    /* In which at least one copy was issued and not known to be over: the union of the host's
     * intervals. bytes_moved / busy_seconds is the rate while loading, from below: a copy that
     * waits on the copy stream for its slot's last use counts, and so do, once each time the link
     * falls idle, the call that issued the first copy and the wait until the host knows the end of
     * the last (some 10 us together). */
    double busy_seconds;
} sida_store_stats;

/* Bytes that a slot takes of the device buffer. */
size_t sida_store_slot_bytes(size_t expert_bytes);

/* Takes slots * slot bytes of device memory. BUDGET, MEMORY, DEVICE. */
sida_status sida_store_create(sida_store **out, sida_backend *backend,
                              const sida_store_options *options);
/* Waits for copies under way; nobody may be inside a call. Takes NULL. */
void sida_store_destroy(sida_store *store);

/* Uses to come. Positions of one caller need not grow, but what lies behind the running layer is
 * forgotten. */
sida_status sida_store_announce(sida_store *store, int64_t position, const int32_t *experts,
                                int32_t count);

/* The uses at a position that has not begun are these instead of what was announced there, in this
 * order; nothing where it has. What is on the device stays, what is under way arrives: both may
 * give way. */
sida_status sida_store_revise(sida_store *store, int64_t position, const int32_t *experts,
                              int32_t count);

/* The layer at `position` (larger than all before) needs these distinct experts. Everything
 * planned up to it is done with. */
sida_status sida_store_begin(sida_store *store, int64_t position, const int32_t *needed,
                             int32_t count);
/* A wave: all needed experts that are resident and not handed out yet, at least one; waits for
 * it. They stay until released, which must happen before the next take. experts and weights have
 * room for all needed. */
sida_status sida_store_take(sida_store *store, int32_t *experts, const void **weights,
                            int32_t *count);
/* The wave's work has been issued to `stream`. */
sida_status sida_store_release(sida_store *store, const int32_t *experts, int32_t count,
                               sida_stream *stream);

/* Stops the loader and wakes who waits, with `reason` (not SIDA_OK) and the caller's message. The
 * first reason counts. */
void sida_store_cancel(sida_store *store, sida_status reason);

void sida_store_get_stats(sida_store *store, sida_store_stats *out);

#endif
