/* A store on the CPU's back-end, its experts, and a layer that checks every byte of every wave. */
#ifndef SIDA_TESTS_STORE_RIG_H
#define SIDA_TESTS_STORE_RIG_H

#include "formats/base/rng.h"
#include "runtime/store/store.h"
#include "tests/test.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { max_experts = 24, words = 33 };

/* Host experts: `words` floats that name the expert. */
typedef struct rig {
    sida_backend *backend;
    sida_stream *compute;
    sida_store *store;
    float experts[max_experts][words];
    atomic_uint delay_seed;                 /* 0: no delays */
    atomic_bool gate_closed, copies_closed; /* hold the loader, the copy thread */
    atomic_size_t held_bytes;               /* hold copies of this size alone; 0: none */
} rig;

static inline void assert_ok(sida_status status) {
    if (status != SIDA_OK) fail_msg("%s: %s", sida_status_name(status), sida_last_message());
}

static inline const void *source(void *context, int32_t expert) {
    return ((rig *)context)->experts[expert];
}

static inline void delay(void *context) {
    rig *r = context;
    while (r->gate_closed) usleep(50);
    unsigned seed = r->delay_seed;
    if (!seed) return;
    sida_rng rng = sida_rng_seed(seed);
    r->delay_seed = (unsigned)sida_rng_u64(&rng) | 1;
    uint32_t choice = sida_rng_below(&rng, 8);
    if (choice == 0) usleep(sida_rng_below(&rng, 200));
    if (choice < 3) sched_yield();
}

static inline void delay_copy(void *context, size_t bytes) {
    rig *r = context;
    while (r->copies_closed || r->held_bytes == bytes) usleep(50);
    delay(context);
}

static inline void rig_open(rig *r, int32_t slots, int32_t experts, const char *policy,
                            bool prefetch, int64_t fail_copy) {
    for (int32_t e = 0; e < max_experts; e++)
        for (int32_t i = 0; i < words; i++) r->experts[e][i] = (float)(e * 1000 + i);
    sida_cpu_options cpu = {.poison = true,
                            .before_copy = delay_copy,
                            .before_copy_context = r,
                            .fail_copy = fail_copy};
    assert_ok(sida_backend_create_cpu(&r->backend, &cpu));
    assert_ok(sida_stream_create(r->backend, &r->compute, SIDA_STREAM_COMPUTE));
    sida_store_options options = {.slots = slots,
                                  .experts = experts,
                                  .expert_bytes = sizeof *r->experts,
                                  .source = source,
                                  .source_context = r,
                                  .policy = sida_policy_find(policy),
                                  .prefetch = prefetch,
                                  .depth = 2,
                                  .poison = true,
                                  .before_load = delay,
                                  .before_load_context = r};
    assert_ok(sida_store_create(&r->store, r->backend, &options));
}

static inline void rig_close(rig *r) {
    sida_store_destroy(r->store);
    sida_stream_destroy(r->compute);
    sida_backend_destroy(r->backend);
}

/* Runs one layer, checks every byte of every wave; the number of waves. */
static inline sida_status run_layer(rig *r, int64_t position, const int32_t *needed, int32_t count,
                                    int32_t slots, int32_t *waves) {
    bool seen[max_experts] = {false};
    int32_t left = count;
    *waves = 0;
    sida_status status = sida_store_begin(r->store, position, needed, count);
    while (status == SIDA_OK && left > 0) {
        int32_t experts[max_experts], n;
        const void *weights[max_experts];
        status = sida_store_take(r->store, experts, weights, &n);
        if (status != SIDA_OK) break;
        ++*waves;
        assert_true(n >= 1 && n <= left && n <= slots);
        left -= n;
        delay(r);
        for (int32_t i = 0; i < n; i++) {
            bool wanted = false;
            for (int32_t j = 0; j < count; j++) wanted |= needed[j] == experts[i];
            assert_true(wanted && !seen[experts[i]]);
            seen[experts[i]] = true;
            /* On the device, not the host slab on the side. */
            assert_ptr_not_equal(weights[i], r->experts[experts[i]]);
            assert_memory_equal(weights[i], r->experts[experts[i]], sizeof *r->experts);
        }
        status = sida_store_release(r->store, experts, n, r->compute);
    }
    return status;
}

static inline void wait_resident(rig *r, int32_t resident) {
    sida_store_stats stats;
    do {
        usleep(100);
        sida_store_get_stats(r->store, &stats);
    } while (stats.resident < resident);
}

#endif
