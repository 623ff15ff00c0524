/* Inside runtime/store: the store's state, which the callers' side (store.c) and the loader's
 * thread (loader.c) share under its mutex. */
#ifndef SIDA_RUNTIME_STORE_STORE_PRIVATE_H
#define SIDA_RUNTIME_STORE_STORE_PRIVATE_H

#include "runtime/store/plan.h"
#include "runtime/store/store.h"

#include <pthread.h>

typedef enum sida_store_slot_state { SLOT_FREE, SLOT_LOADING, SLOT_READY } sida_store_slot_state;

typedef struct sida_store_slot {
    sida_store_slot_state state;
    int32_t expert; /* -1: none */
    bool reserved;  /* needed by the running layer and not handed out yet: stays */
    bool pinned;    /* handed out */
    bool unused;    /* prefetched, and not used yet */
    int64_t loaded_at, last_used;
    int32_t last_wave; /* index into waves: the event behind its last use; -1: none */
} sida_store_slot;

/* The event behind a released wave, until none of its slots needs it. */
typedef struct sida_store_wave {
    sida_event *event;
    int32_t references;
    int64_t released_at; /* tick */
} sida_store_wave;

/* A copy under way. */
typedef struct sida_store_flight {
    sida_event *event;
    int32_t slot;
} sida_store_flight;

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
    sida_store_slot *slots;
    int32_t *slot_of; /* [experts] -1: not on the device */
    bool *planned;    /* [experts] scratch of a revision, false */
    sida_plan *plan;
    double *heat; /* [experts] log2 of Σ 2^(time of a use in half-lives): see use_expert */
    int64_t position, tick, uses;
    int64_t over_until; /* tick: waves released up to it are known to be over */
    int32_t *demands;   /* [experts] what the running layer lacks, in order */
    int32_t demand_first, demand_count;
    int32_t outstanding; /* needed and not handed out */
    int32_t pinned;
    int32_t occupied;           /* slots that are not free */
    sida_store_wave *waves;     /* [slots + 1]: one is always without references */
    sida_store_flight *flights; /* ring [depth], the loader's own */
    int32_t flight_first, flight_count;
    bool busy; /* a copy is under way, since: */
    double busy_since;
    sida_slot_view *views; /* [slots], the loader's scratch */
    sida_store_stats stats;
};

static inline char *sida_store_slot_data(const sida_store *store, int32_t index) {
    return (char *)store->arena->data + (size_t)index * store->slot_bytes;
}
/* Mutex held: a slot needs the wave no longer; -1: there is none. */
static inline void sida_store_drop_wave(sida_store *store, int32_t index) {
    if (index >= 0) store->waves[index].references--;
}
/* Mutex held: the first reason counts; wakes everybody. */
void sida_store_fail(sida_store *store, sida_status reason, const char *message);

/* The loader's thread, until `stop`. */
void *sida_store_load(void *store);

#endif
