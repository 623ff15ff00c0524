/* Plans that change while the store runs, by hand and at random. */
#include "tests/unit/store_rig.h"

/* A position planned anew: what is on its way arrives, what is forgotten is not loaded and gives
 * way, what is new comes in its order; a position that has begun stays as it is. */
static void test_revise(void **state) {
    (void)state;
    rig r = {0};
    sida_store_stats stats;
    int32_t waves;
    rig_open(&r, 3, 12, "lookahead", true, 0);
    r.gate_closed = true;
    assert_ok(sida_store_announce(r.store, 10, (int32_t[]){1, 2, 3}, 3));
    assert_ok(sida_store_announce(r.store, 20, (int32_t[]){4, 5}, 2));
    do {
        usleep(100);
        sida_store_get_stats(r.store, &stats);
    } while (stats.prefetch_loads < 1); /* of 1 */
    assert_ok(sida_store_revise(r.store, 10, (int32_t[]){6, 2}, 2));
    assert_ok(sida_store_revise(r.store, 20, (int32_t[]){7, 4, 8}, 3));
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.revised_in, 3);  /* 6, 7, 8 */
    assert_int_equal(stats.revised_out, 2); /* 3, 5; 1 is under way */
    r.gate_closed = false;
    /* 1 came and is used nowhere, so 7 takes its slot; 4 and 8 wait. */
    do {
        usleep(100);
        sida_store_get_stats(r.store, &stats);
    } while (stats.prefetch_loads < 4);
    wait_resident(&r, 3);
    assert_ok(run_layer(&r, 10, (int32_t[]){2, 6}, 2, 3, &waves));
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.hits, 2);
    assert_int_equal(stats.demand_loads, 0);
    do {
        usleep(100);
        sida_store_get_stats(r.store, &stats);
    } while (stats.prefetch_loads < 6);
    wait_resident(&r, 3);
    /* Too late, and nothing: the plan of the layer that runs, and of one before. */
    assert_ok(sida_store_revise(r.store, 10, (int32_t[]){9}, 1));
    assert_ok(run_layer(&r, 20, (int32_t[]){4, 7, 8}, 3, 3, &waves));
    assert_ok(sida_store_revise(r.store, 20, (int32_t[]){9}, 1));
    usleep(2000);
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.hits, 5);
    assert_int_equal(stats.prefetch_loads, 6);
    assert_int_equal(stats.demand_loads, 0);
    assert_int_equal(stats.revised_in, 3);
    /* A revision may plan what nobody has announced, and forget all. */
    assert_ok(sida_store_revise(r.store, 30, (int32_t[]){9}, 1));
    do {
        usleep(100);
        sida_store_get_stats(r.store, &stats);
    } while (stats.prefetch_loads < 7);
    assert_ok(sida_store_revise(r.store, 40, (int32_t[]){4, 7}, 2));
    assert_ok(sida_store_revise(r.store, 40, NULL, 0));
    sida_store_cancel(r.store, sida_fail(SIDA_ERROR_CANCELLED, "enough"));
    assert_int_equal(sida_store_revise(r.store, 50, (int32_t[]){1}, 1), SIDA_ERROR_CANCELLED);
    rig_close(&r);
}

/* The policy goes by the plan as it was revised. */
static void test_revised_policy(void **state) {
    (void)state;
    rig r = {0};
    int32_t waves;
    sida_store_stats stats;
    rig_open(&r, 3, 8, "lookahead", false, 0);
    assert_ok(sida_store_announce(r.store, 5, (int32_t[]){0, 1}, 2));
    assert_ok(run_layer(&r, 1, (int32_t[]){0, 1, 2}, 3, 3, &waves));
    assert_ok(sida_store_revise(r.store, 5, (int32_t[]){2, 1}, 2));
    assert_ok(run_layer(&r, 2, (int32_t[]){3}, 1, 3, &waves)); /* 0 gives way */
    assert_ok(run_layer(&r, 5, (int32_t[]){1, 2}, 2, 3, &waves));
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.hits, 2);
    assert_int_equal(stats.demand_loads, 4);
    rig_close(&r);
}

/* --- stress: an announcing thread ahead of a running one, random plans, random needs */

typedef struct stress {
    rig *r;
    int32_t experts, layers;
    uint64_t seed;
    atomic_llong running; /* position that runs: plans stay at most 12 ahead */
} stress;

static int32_t random_set(sida_rng *rng, int32_t *out, int32_t experts) {
    int32_t count = 0, wanted = (int32_t)sida_rng_below(rng, 3);
    for (int32_t e = 0; e < experts; e++)
        if (sida_rng_below(rng, wanted == 0 ? 12 : wanted == 1 ? 4 : 2) == 0) out[count++] = e;
    return count;
}

static void *announce_ahead(void *argument) {
    stress *s = argument;
    sida_rng rng = sida_rng_seed(s->seed + 1);
    for (int64_t position = 1; position <= s->layers; position++) {
        while (position > s->running + 12) usleep(20);
        int32_t set[max_experts], count = random_set(&rng, set, s->experts);
        /* Some announcements come out of order, some layers have none. */
        int64_t at = position + sida_rng_below(&rng, 3);
        if (sida_store_announce(s->r->store, at, set, count) != SIDA_OK) break;
        delay(s->r);
    }
    return NULL;
}

static void stress_once(int32_t slots, int32_t experts, const char *policy, bool prefetch,
                        uint64_t seed) {
    rig r = {.delay_seed = (unsigned)seed | 1};
    rig_open(&r, slots, experts, policy, prefetch, 0);
    stress s = {.r = &r, .experts = experts, .layers = 150, .seed = seed};
    pthread_t thread;
    pthread_create(&thread, NULL, announce_ahead, &s);
    sida_rng rng = sida_rng_seed(seed);
    int64_t needs = 0;
    for (int64_t position = 1; position <= s.layers; position++) {
        s.running = position;
        int32_t set[max_experts], waves, count = random_set(&rng, set, experts);
        needs += count;
        assert_ok(run_layer(&r, position, set, count, slots, &waves));
        /* As a refinement does: layers behind, again and again, some not announced yet. */
        for (int64_t behind = position + 1; behind < position + 4; behind++) {
            count = random_set(&rng, set, experts);
            if (sida_rng_below(&rng, 2) == 0)
                assert_ok(sida_store_revise(r.store, behind, set, count));
        }
    }
    pthread_join(thread, NULL);
    sida_store_stats stats;
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.hits + stats.late_prefetches + stats.demand_loads, needs);
    assert_int_equal(stats.bytes_moved,
                     (stats.demand_loads + stats.prefetch_loads) * (int64_t)sizeof *r.experts);
    assert_true(stats.peak_resident <= slots && stats.resident <= slots);
    assert_true(stats.bytes_wasted <= stats.prefetch_loads * (int64_t)sizeof *r.experts);
    if (!prefetch) assert_int_equal(stats.prefetch_loads, 0);
    rig_close(&r);
}

static void test_stress(void **state) {
    (void)state;
    static const char *const policies[] = {"fifo", "lru", "lookahead"};
    static const int32_t slots[] = {2, 3, 9, max_experts};
    uint64_t seed = 1;
    for (int p = 0; p < 3; p++)
        for (int s = 0; s < 4; s++)
            for (int prefetch = 0; prefetch < 2; prefetch++)
                stress_once(slots[s], max_experts, policies[p], prefetch, seed++);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_revise),
        cmocka_unit_test(test_revised_policy),
        cmocka_unit_test(test_stress),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
