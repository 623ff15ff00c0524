#include "runtime/store/store.h"

#include "formats/base/clock.h"
#include "formats/base/memory.h"
#include "runtime/store/plan.h"

#include <assert.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { slot_alignment = 256, least_depth = 2, most_depth = 16, bytes_under_way = 16 << 20 };
/* A use counts half after so many uses of each expert on average. */
enum { uses_in_half_life = 4 };

typedef enum slot_state { SLOT_FREE, SLOT_LOADING, SLOT_READY } slot_state;

typedef struct slot {
    slot_state state;
    int32_t expert; /* -1: none */
    bool reserved;  /* needed by the running layer and not handed out yet: stays */
    bool pinned;    /* handed out */
    bool unused;    /* prefetched, and not used yet */
    int64_t loaded_at, last_used;
    int32_t last_wave; /* index into waves: the event behind its last use; -1: none */
} slot;

/* The event behind a released wave, until none of its slots needs it. */
typedef struct wave {
    sida_event *event;
    int32_t references;
    int64_t released_at; /* tick */
} wave;

/* A copy under way. */
typedef struct flight {
    sida_event *event;
    int32_t slot;
} flight;

struct sida_store {
    sida_backend *backend;
    sida_store_options options;
    size_t slot_bytes;
    sida_buffer *arena;
    sida_buffer *nan; /* host, one expert of NaN bytes; NULL without poison */
    sida_stream *copy_stream;
    pthread_t loader;
    bool loader_started;

    pthread_mutex_t mutex;
    pthread_cond_t changed;
    /* Below: under the mutex. */
    bool stop;
    sida_status failure;
    char message[1024];
    slot *slots;
    int32_t *slot_of; /* [experts] -1: not on the device */
    sida_plan *plan;
    double *heat; /* [experts] log2 of Σ 2^(time of a use in half-lives): see use_expert */
    int64_t position, tick, uses;
    int64_t over_until; /* tick: waves released up to it are known to be over */
    int32_t *demands;   /* [experts] what the running layer lacks, in order */
    int32_t demand_first, demand_count;
    int32_t outstanding; /* needed and not handed out */
    int32_t pinned;
    int32_t occupied; /* slots that are not free */
    wave *waves;      /* [slots + 1]: one is always without references */
    flight *flights;  /* ring [depth], the loader's own */
    int32_t flight_first, flight_count;
    bool busy; /* a copy is under way, since: */
    double busy_since;
    sida_slot_view *views; /* [slots], the loader's scratch */
    sida_store_stats stats;
};

size_t sida_store_slot_bytes(size_t expert_bytes) {
    return (expert_bytes + slot_alignment - 1) & ~(size_t)(slot_alignment - 1);
}

static char *slot_data(const sida_store *store, int32_t index) {
    return (char *)store->arena->data + (size_t)index * store->slot_bytes;
}

/* Mutex held. */
static void set_failure(sida_store *store, sida_status reason, const char *message) {
    if (store->failure == SIDA_OK) {
        store->failure = reason;
        snprintf(store->message, sizeof store->message, "%s", message);
    }
    pthread_cond_broadcast(&store->changed);
}

static sida_status report_failure(sida_store *store) {
    return store->failure == SIDA_OK ? SIDA_OK : sida_fail(store->failure, "%s", store->message);
}

/* --- the loader. Mutex held in all helpers. */

/* Learns which waves are over. They end in the order of their release when one stream computes, so
 * the first that is not ends the search; with more streams later ones are found a little later. */
static sida_status find_idle(sida_store *store) {
    for (;;) {
        const wave *first = NULL;
        for (int32_t i = 0; i <= store->options.slots; i++) {
            const wave *w = &store->waves[i];
            if (w->references > 0 && w->released_at > store->over_until &&
                (!first || w->released_at < first->released_at))
                first = w;
        }
        if (!first) return SIDA_OK;
        bool over;
        sida_status status = sida_event_query(first->event, &over);
        if (status != SIDA_OK || !over) return status;
        store->over_until = first->released_at;
    }
}

static bool is_idle(const sida_store *store, const slot *s) {
    return s->last_wave < 0 || store->waves[s->last_wave].released_at <= store->over_until;
}

/* The slot that a load may take, or -1. A prefetch for `position` leaves alone what is needed no
 * later than itself; a demand says INT64_MIN. */
static int32_t choose_slot(sida_store *store, int64_t position) {
    int32_t count = 0;
    for (int32_t i = 0; i < store->options.slots; i++) {
        const slot *s = &store->slots[i];
        if (s->state == SLOT_FREE) return i;
        if (s->state != SLOT_READY || s->reserved || s->pinned) continue;
        int64_t next_use = sida_plan_next_use(store->plan, s->expert);
        if (next_use <= position) continue;
        store->views[count++] = (sida_slot_view){.slot = i,
                                                 .loaded_at = s->loaded_at,
                                                 .last_used = s->last_used,
                                                 .next_use = next_use,
                                                 .heat = store->heat[s->expert],
                                                 .idle = is_idle(store, s)};
    }
    if (count == 0) return -1;
    int32_t victim = store->options.policy->victim(store->views, count);
    assert(victim >= 0 && victim < count);
    return store->views[victim].slot;
}

/* The next load: its expert and slot; false when there is nothing to do now. */
static bool choose_load(sida_store *store, int32_t *expert, int32_t *target, bool *demand) {
    *demand = store->demand_count > 0;
    if (*demand) {
        *expert = store->demands[store->demand_first];
        *target = choose_slot(store, INT64_MIN);
        return *target >= 0;
    }
    if (!store->options.prefetch) return false;
    int64_t position;
    while (sida_plan_peek(store->plan, &position, expert)) {
        if (store->slot_of[*expert] < 0) {
            *target = choose_slot(store, position);
            return *target >= 0;
        }
        sida_plan_step(store->plan);
    }
    return false;
}

static void drop_reference(sida_store *store, int32_t index) {
    if (index >= 0) store->waves[index].references--;
}

/* Gives the slot to the expert; returns the wave that the copy must wait for (the caller drops the
 * reference), -1: none. */
static int32_t assign_slot(sida_store *store, int32_t target, int32_t expert, bool demand) {
    slot *s = &store->slots[target];
    const bool idle = is_idle(store, s);
    if (s->state == SLOT_FREE) {
        if (++store->occupied > store->stats.peak_resident)
            store->stats.peak_resident = store->occupied;
    } else {
        store->slot_of[s->expert] = -1;
        if (s->unused) store->stats.bytes_wasted += (int64_t)store->options.expert_bytes;
        /* A demand may have thrown out what the cursor has passed already. */
        if (demand) sida_plan_rewind(store->plan);
    }
    int32_t last_wave = idle ? -1 : s->last_wave;
    if (idle) drop_reference(store, s->last_wave);
    *s = (slot){.state = SLOT_LOADING,
                .expert = expert,
                .reserved = demand,
                .unused = !demand,
                .last_wave = -1};
    s->loaded_at = s->last_used = ++store->tick;
    store->slot_of[expert] = target;
    if (demand) {
        store->demand_first++;
        store->demand_count--;
    } else {
        store->stats.prefetch_loads++;
    }
    store->stats.bytes_moved += (int64_t)store->options.expert_bytes;
    return last_wave;
}

/* Issues the copy, mutex not held. */
static sida_status issue_copy(sida_store *store, int32_t target, int32_t expert, int32_t last_wave,
                              sida_event *done) {
    sida_status status = SIDA_OK;
    size_t bytes = store->options.expert_bytes;
    if (store->options.before_load) store->options.before_load(store->options.before_load_context);
    if (last_wave >= 0)
        SIDA_TRY(sida_stream_wait(store->copy_stream, store->waves[last_wave].event));
    if (store->nan)
        SIDA_TRY(sida_copy(store->copy_stream, slot_data(store, target), store->nan->data, bytes));
    SIDA_TRY(sida_copy(store->copy_stream, slot_data(store, target),
                       store->options.source(store->options.source_context, expert), bytes));
    SIDA_TRY(sida_event_record(done, store->copy_stream));
out:
    return status;
}

/* Starts one load if there is one; true when it did. Drops the mutex meanwhile. */
static bool start_load(sida_store *store) {
    int32_t expert, target;
    bool demand;
    if (store->flight_count == store->options.depth) return false;
    sida_status status = find_idle(store);
    if (status != SIDA_OK) {
        set_failure(store, status, sida_last_message());
        return true;
    }
    if (!choose_load(store, &expert, &target, &demand)) return false;
    int32_t last_wave = assign_slot(store, target, expert, demand);
    flight *f = &store->flights[(store->flight_first + store->flight_count) % store->options.depth];
    f->slot = target;
    if (!store->busy) store->busy_since = sida_clock_seconds();
    store->busy = true;
    pthread_mutex_unlock(&store->mutex);
    status = issue_copy(store, target, expert, last_wave, f->event);
    pthread_mutex_lock(&store->mutex);
    drop_reference(store, last_wave);
    if (status != SIDA_OK)
        set_failure(store, status, sida_last_message());
    else
        store->flight_count++;
    return true;
}

/* Waits for the oldest copy; true when there was one. Drops the mutex meanwhile. */
static bool finish_load(sida_store *store) {
    if (store->flight_count == 0) return false;
    flight *f = &store->flights[store->flight_first];
    pthread_mutex_unlock(&store->mutex);
    sida_status status = sida_event_synchronize(f->event);
    double now = sida_clock_seconds();
    pthread_mutex_lock(&store->mutex);
    store->flight_first = (store->flight_first + 1) % store->options.depth;
    store->flight_count--;
    if (store->flight_count == 0) {
        store->stats.busy_seconds += now - store->busy_since;
        store->busy = false;
    }
    if (status != SIDA_OK) {
        set_failure(store, status, sida_last_message());
        return true;
    }
    store->slots[f->slot].state = SLOT_READY;
    pthread_cond_broadcast(&store->changed);
    return true;
}

static void *run_loader(void *argument) {
    sida_store *store = argument;
    pthread_mutex_lock(&store->mutex);
    while (!store->stop) {
        if (store->failure == SIDA_OK && (start_load(store) || finish_load(store))) continue;
        pthread_cond_wait(&store->changed, &store->mutex);
    }
    pthread_mutex_unlock(&store->mutex);
    return NULL;
}

/* --- create and destroy */

static sida_status allocate(sida_store *store) {
    const sida_store_options *o = &store->options;
    sida_status status = SIDA_OK;
    size_t arena_bytes;
    if (sida_mul_overflow(store->slot_bytes, (size_t)o->slots, &arena_bytes))
        SIDA_FAIL(SIDA_ERROR_BUDGET, "expert slots: %d slots of %zu bytes are too many", o->slots,
                  store->slot_bytes);
    SIDA_TRY(SIDA_ALLOC(&store->slots, o->slots, "expert slots"));
    SIDA_TRY(SIDA_ALLOC(&store->views, o->slots, "expert slots"));
    SIDA_TRY(SIDA_ALLOC(&store->waves, o->slots + 1, "expert slots"));
    SIDA_TRY(SIDA_ALLOC(&store->flights, o->depth, "copies under way"));
    SIDA_TRY(SIDA_ALLOC(&store->slot_of, o->experts, "the expert table"));
    SIDA_TRY(SIDA_ALLOC(&store->demands, o->experts, "the expert table"));
    SIDA_TRY(SIDA_ALLOC(&store->heat, o->experts, "the expert table"));
    for (int32_t i = 0; i < o->slots; i++) store->slots[i].expert = store->slots[i].last_wave = -1;
    for (int32_t i = 0; i < o->experts; i++) {
        store->slot_of[i] = -1;
        store->heat[i] = -INFINITY;
    }
    for (int32_t i = 0; i <= o->slots; i++)
        SIDA_TRY(sida_event_create(store->backend, &store->waves[i].event));
    for (int32_t i = 0; i < o->depth; i++)
        SIDA_TRY(sida_event_create(store->backend, &store->flights[i].event));
    SIDA_TRY(sida_plan_create(&store->plan, o->experts));
    SIDA_TRY(sida_stream_create(store->backend, &store->copy_stream, SIDA_STREAM_COPY));
    SIDA_TRY(sida_buffer_create(store->backend, &store->arena, SIDA_MEMORY_DEVICE, arena_bytes,
                                "expert slots"));
    if (o->poison) {
        SIDA_TRY(sida_buffer_create(store->backend, &store->nan, SIDA_MEMORY_HOST, o->expert_bytes,
                                    "poison"));
        memset(store->nan->data, 0xff, o->expert_bytes);
    }
out:
    return status;
}

static int32_t choose_depth(size_t expert_bytes) {
    size_t depth = (bytes_under_way + expert_bytes - 1) / expert_bytes;
    return depth < least_depth ? least_depth : depth > most_depth ? most_depth : (int32_t)depth;
}

sida_status sida_store_create(sida_store **out, sida_backend *backend,
                              const sida_store_options *options) {
    assert(options->slots >= 2 && options->experts >= 1 && options->expert_bytes > 0);
    assert(options->source && options->policy);
    *out = NULL;
    sida_store *store;
    sida_status status = SIDA_ALLOC(&store, 1, "the expert store");
    if (status != SIDA_OK) return status;
    store->backend = backend;
    store->options = *options;
    if (store->options.depth <= 0) store->options.depth = choose_depth(options->expert_bytes);
    store->slot_bytes = sida_store_slot_bytes(options->expert_bytes);
    store->position = INT64_MIN;
    pthread_mutex_init(&store->mutex, NULL);
    pthread_cond_init(&store->changed, NULL);
    SIDA_TRY(allocate(store));
    if (pthread_create(&store->loader, NULL, run_loader, store))
        SIDA_FAIL(SIDA_ERROR_DEVICE, "the expert store: cannot start its loader thread");
    store->loader_started = true;
    *out = store;
    store = NULL;
out:
    sida_store_destroy(store);
    return status;
}

void sida_store_destroy(sida_store *store) {
    if (!store) return;
    pthread_mutex_lock(&store->mutex);
    store->stop = true;
    pthread_cond_broadcast(&store->changed);
    pthread_mutex_unlock(&store->mutex);
    if (store->loader_started) pthread_join(store->loader, NULL);
    sida_stream_destroy(store->copy_stream); /* waits for copies under way */
    for (int32_t i = 0; store->waves && i <= store->options.slots; i++)
        sida_event_destroy(store->waves[i].event);
    for (int32_t i = 0; store->flights && i < store->options.depth; i++)
        sida_event_destroy(store->flights[i].event);
    sida_buffer_destroy(store->arena);
    sida_buffer_destroy(store->nan);
    sida_plan_destroy(store->plan);
    free(store->slots);
    free(store->views);
    free(store->waves);
    free(store->flights);
    free(store->slot_of);
    free(store->demands);
    free(store->heat);
    pthread_cond_destroy(&store->changed);
    pthread_mutex_destroy(&store->mutex);
    free(store);
}

/* --- callers' side */

sida_status sida_store_announce(sida_store *store, int64_t position, const int32_t *experts,
                                int32_t count) {
    pthread_mutex_lock(&store->mutex);
    sida_status status = report_failure(store);
    if (status == SIDA_OK && position > store->position) {
        status = sida_plan_add(store->plan, position, experts, count);
        pthread_cond_broadcast(&store->changed);
    }
    pthread_mutex_unlock(&store->mutex);
    return status;
}

/* Adds 1 to the expert's decayed count of uses. Kept as a logarithm of a sum whose new terms grow
 * instead of old ones shrinking, so that experts compare without being touched. */
static void use_expert(sida_store *store, int32_t expert) {
    double now = (double)++store->uses / ((double)store->options.experts * uses_in_half_life);
    store->heat[expert] = now + log2(1 + exp2(store->heat[expert] - now));
}

sida_status sida_store_begin(sida_store *store, int64_t position, const int32_t *needed,
                             int32_t count) {
    pthread_mutex_lock(&store->mutex);
    sida_status status = report_failure(store);
    if (status != SIDA_OK) goto out;
    assert(position > store->position && store->outstanding == 0 && store->pinned == 0);
    store->position = position;
    int32_t expert;
    while (sida_plan_pop(store->plan, position, &expert))
        if (store->options.prefetch && store->slot_of[expert] < 0)
            store->stats.dropped_prefetches++;
    store->demand_first = store->demand_count = 0;
    for (int32_t i = 0; i < count; i++) {
        int32_t index = store->slot_of[needed[i]];
        use_expert(store, needed[i]);
        if (index < 0) {
            store->demands[store->demand_count++] = needed[i];
            store->stats.demand_loads++;
            continue;
        }
        store->slots[index].reserved = true;
        if (store->slots[index].state == SLOT_READY)
            store->stats.hits++;
        else
            store->stats.late_prefetches++;
    }
    store->outstanding = count;
    pthread_cond_broadcast(&store->changed);
out:
    pthread_mutex_unlock(&store->mutex);
    return status;
}

/* Mutex held: hands out what is there. */
static int32_t collect_wave(sida_store *store, int32_t *experts, const void **weights) {
    int32_t count = 0;
    for (int32_t i = 0; i < store->options.slots; i++) {
        slot *s = &store->slots[i];
        if (!s->reserved || s->state != SLOT_READY) continue;
        s->reserved = false;
        s->pinned = true;
        s->unused = false;
        experts[count] = s->expert;
        weights[count++] = slot_data(store, i);
    }
    store->outstanding -= count;
    store->pinned += count;
    return count;
}

sida_status sida_store_take(sida_store *store, int32_t *experts, const void **weights,
                            int32_t *count) {
    sida_status status;
    double begin = 0;
    *count = 0;
    pthread_mutex_lock(&store->mutex);
    assert(store->failure != SIDA_OK || (store->outstanding > 0 && store->pinned == 0));
    while ((status = report_failure(store)) == SIDA_OK) {
        *count = collect_wave(store, experts, weights);
        if (*count > 0) break;
        if (begin == 0) begin = sida_clock_seconds();
        pthread_cond_wait(&store->changed, &store->mutex);
    }
    if (begin != 0) store->stats.wait_seconds += sida_clock_seconds() - begin;
    pthread_mutex_unlock(&store->mutex);
    return status;
}

sida_status sida_store_release(sida_store *store, const int32_t *experts, int32_t count,
                               sida_stream *stream) {
    if (count == 0) return SIDA_OK;
    pthread_mutex_lock(&store->mutex);
    int32_t w = 0;
    while (store->waves[w].references > 0) w++;
    assert(w <= store->options.slots);
    store->waves[w].references = count;
    pthread_mutex_unlock(&store->mutex);
    sida_status status = sida_event_record(store->waves[w].event, stream);
    pthread_mutex_lock(&store->mutex);
    if (status != SIDA_OK) set_failure(store, status, sida_last_message());
    for (int32_t i = 0; i < count; i++) {
        slot *s = &store->slots[store->slot_of[experts[i]]];
        assert(s->pinned && s->expert == experts[i]);
        drop_reference(store, s->last_wave);
        s->last_wave = w;
        s->pinned = false;
        s->last_used = ++store->tick;
    }
    store->waves[w].released_at = store->tick;
    store->pinned -= count;
    pthread_cond_broadcast(&store->changed);
    pthread_mutex_unlock(&store->mutex);
    return status;
}

void sida_store_cancel(sida_store *store, sida_status reason) {
    pthread_mutex_lock(&store->mutex);
    set_failure(store, reason, sida_last_message());
    pthread_mutex_unlock(&store->mutex);
}

void sida_store_get_stats(sida_store *store, sida_store_stats *out) {
    pthread_mutex_lock(&store->mutex);
    *out = store->stats;
    if (store->busy) out->busy_seconds += sida_clock_seconds() - store->busy_since;
    out->resident = 0;
    for (int32_t i = 0; i < store->options.slots; i++) {
        const slot *s = &store->slots[i];
        if (s->state == SLOT_READY) out->resident++;
        if (s->state != SLOT_FREE && s->unused)
            out->bytes_wasted += (int64_t)store->options.expert_bytes;
    }
    pthread_mutex_unlock(&store->mutex);
}
