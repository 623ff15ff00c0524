#include "runtime/store/store_private.h"

#include "formats/base/clock.h"
#include "formats/base/memory.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { slot_alignment = 256, least_depth = 2, most_depth = 16, bytes_under_way = 16 << 20 };
/* A use counts half after so many uses of each expert on average. */
enum { uses_in_half_life = 4 };

size_t sida_store_slot_bytes(size_t expert_bytes) {
    return (expert_bytes + slot_alignment - 1) & ~(size_t)(slot_alignment - 1);
}

void sida_store_fail(sida_store *store, sida_status reason, const char *message) {
    if (store->failure == SIDA_OK) {
        store->failure = reason;
        snprintf(store->message, sizeof store->message, "%s", message);
    }
    pthread_cond_broadcast(&store->changed);
}

static sida_status report_failure(sida_store *store) {
    return store->failure == SIDA_OK ? SIDA_OK : sida_fail(store->failure, "%s", store->message);
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
    SIDA_TRY(SIDA_ALLOC(&store->planned, o->experts, "the expert table"));
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
    if (pthread_create(&store->loader, NULL, sida_store_load, store))
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
    free(store->planned);
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

/* Mutex held. */
static void count_revision(sida_store *store, int64_t position, const int32_t *experts,
                           int32_t count) {
    int32_t before;
    const int32_t *planned = sida_plan_at(store->plan, position, &before);
    for (int32_t i = 0; i < before; i++) store->planned[planned[i]] = true;
    for (int32_t i = 0; i < count; i++) {
        store->stats.revised_in += !store->planned[experts[i]];
        store->planned[experts[i]] = false;
    }
    for (int32_t i = 0; i < before; i++) {
        bool forgotten = store->planned[planned[i]];
        store->stats.revised_out += forgotten && store->slot_of[planned[i]] < 0;
        store->planned[planned[i]] = false;
    }
}

sida_status sida_store_revise(sida_store *store, int64_t position, const int32_t *experts,
                              int32_t count) {
    pthread_mutex_lock(&store->mutex);
    sida_status status = report_failure(store);
    if (status == SIDA_OK && position > store->position) {
        count_revision(store, position, experts, count);
        sida_plan_remove(store->plan, position);
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
        sida_store_slot *s = &store->slots[i];
        if (!s->reserved || s->state != SLOT_READY) continue;
        s->reserved = false;
        s->pinned = true;
        s->unused = false;
        experts[count] = s->expert;
        weights[count++] = sida_store_slot_data(store, i);
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
    if (status != SIDA_OK) sida_store_fail(store, status, sida_last_message());
    for (int32_t i = 0; i < count; i++) {
        sida_store_slot *s = &store->slots[store->slot_of[experts[i]]];
        assert(s->pinned && s->expert == experts[i]);
        sida_store_drop_wave(store, s->last_wave);
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
    sida_store_fail(store, reason, sida_last_message());
    pthread_mutex_unlock(&store->mutex);
}

void sida_store_get_stats(sida_store *store, sida_store_stats *out) {
    pthread_mutex_lock(&store->mutex);
    *out = store->stats;
    if (store->busy) out->busy_seconds += sida_clock_seconds() - store->busy_since;
    out->resident = 0;
    for (int32_t i = 0; i < store->options.slots; i++) {
        const sida_store_slot *s = &store->slots[i];
        if (s->state == SLOT_READY) out->resident++;
        if (s->state != SLOT_FREE && s->unused)
            out->bytes_wasted += (int64_t)store->options.expert_bytes;
    }
    pthread_mutex_unlock(&store->mutex);
}
