/* The store's own thread: what to load next, into which slot, and the copies under way. The mutex
 * is held in all helpers but where one says otherwise. */
#include "formats/base/clock.h"
#include "runtime/store/store_private.h"

#include <assert.h>

/* Learns which waves are over. They end in the order of their release when one stream computes, so
 * the first that is not ends the search; with more streams later ones are found a little later. */
static sida_status find_idle(sida_store *store) {
    for (;;) {
        const sida_store_wave *first = NULL;
        for (int32_t i = 0; i <= store->options.slots; i++) {
            const sida_store_wave *w = &store->waves[i];
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

static bool is_idle(const sida_store *store, const sida_store_slot *s) {
    return s->last_wave < 0 || store->waves[s->last_wave].released_at <= store->over_until;
}

/* The slot that a load may take, or -1. A prefetch for `position` leaves alone what is needed no
 * later than itself; a demand says INT64_MIN. */
static int32_t choose_slot(sida_store *store, int64_t position) {
    int32_t count = 0;
    for (int32_t i = 0; i < store->options.slots; i++) {
        const sida_store_slot *s = &store->slots[i];
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

/* Gives the slot to the expert; returns the wave that the copy must wait for (the caller drops the
 * reference), -1: none. */
static int32_t assign_slot(sida_store *store, int32_t target, int32_t expert, bool demand) {
    sida_store_slot *s = &store->slots[target];
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
    if (idle) sida_store_drop_wave(store, s->last_wave);
    *s = (sida_store_slot){.state = SLOT_LOADING,
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
        SIDA_TRY(sida_copy(store->copy_stream, sida_store_slot_data(store, target),
                           store->nan->data, bytes));
    SIDA_TRY(sida_copy(store->copy_stream, sida_store_slot_data(store, target),
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
        sida_store_fail(store, status, sida_last_message());
        return true;
    }
    if (!choose_load(store, &expert, &target, &demand)) return false;
    int32_t last_wave = assign_slot(store, target, expert, demand);
    sida_store_flight *f =
        &store->flights[(store->flight_first + store->flight_count) % store->options.depth];
    f->slot = target;
    if (!store->busy) store->busy_since = sida_clock_seconds();
    store->busy = true;
    pthread_mutex_unlock(&store->mutex);
    status = issue_copy(store, target, expert, last_wave, f->event);
    pthread_mutex_lock(&store->mutex);
    sida_store_drop_wave(store, last_wave);
    if (status != SIDA_OK)
        sida_store_fail(store, status, sida_last_message());
    else
        store->flight_count++;
    return true;
}

/* Waits for the oldest copy; true when there was one. Drops the mutex meanwhile. */
static bool finish_load(sida_store *store) {
    if (store->flight_count == 0) return false;
    sida_store_flight *f = &store->flights[store->flight_first];
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
        sida_store_fail(store, status, sida_last_message());
        return true;
    }
    store->slots[f->slot].state = SLOT_READY;
    pthread_cond_broadcast(&store->changed);
    return true;
}

void *sida_store_load(void *argument) {
    sida_store *store = argument;
    pthread_mutex_lock(&store->mutex);
    while (!store->stop) {
        if (store->failure == SIDA_OK && (start_load(store) || finish_load(store))) continue;
        pthread_cond_wait(&store->changed, &store->mutex);
    }
    pthread_mutex_unlock(&store->mutex);
    return NULL;
}
