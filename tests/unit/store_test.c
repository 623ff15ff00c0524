/* The store alone: what a wave may hold, what loads are counted, and that it always moves on. */
#include "tests/unit/store_rig.h"

/* Two slots, five experts: at least three waves; everything is loaded exactly once a need. */
static void test_two_slots(void **state) {
    (void)state;
    rig r = {0};
    rig_open(&r, 2, 8, "lookahead", true, 0);
    const int32_t needed[] = {0, 2, 3, 5, 7};
    int32_t waves;
    assert_ok(run_layer(&r, 1, needed, 5, 2, &waves));
    assert_true(waves >= 3);
    sida_store_stats stats;
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.demand_loads, 5);
    assert_int_equal(stats.hits, 0);
    assert_int_equal(stats.bytes_moved, 5 * (int64_t)sizeof *r.experts);
    assert_int_equal(stats.bytes_wasted, 0);
    assert_int_equal(stats.peak_resident, 2);
    /* Again: at most two of five can still be there. */
    assert_ok(run_layer(&r, 2, needed, 5, 2, &waves));
    sida_store_get_stats(r.store, &stats);
    assert_true(stats.demand_loads >= 8);
    assert_int_equal(stats.hits + stats.demand_loads, 10);
    /* The arena is all that the device holds. */
    sida_memory_usage usage;
    sida_backend_memory(r.backend, &usage);
    assert_int_equal(usage.peak_bytes, 2 * sida_store_slot_bytes(sizeof *r.experts));
    /* A layer without needs passes. */
    assert_ok(run_layer(&r, 3, NULL, 0, 2, &waves));
    assert_int_equal(waves, 0);
    rig_close(&r);
}

static void test_prefetch(void **state) {
    (void)state;
    rig r = {0};
    sida_store_stats stats;
    int32_t waves;
    rig_open(&r, 3, 8, "lookahead", true, 0);
    assert_ok(sida_store_announce(r.store, 10, (int32_t[]){1, 2}, 2));
    assert_ok(sida_store_announce(r.store, 20, (int32_t[]){3, 4}, 2));
    /* 1, 2 and 3 fill the slots; 4 is needed behind all of them and waits. */
    wait_resident(&r, 3);
    usleep(2000);
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.prefetch_loads, 3);
    assert_int_equal(stats.bytes_wasted, 3 * (int64_t)sizeof *r.experts);
    assert_ok(run_layer(&r, 10, (int32_t[]){1, 2}, 2, 3, &waves));
    do {
        usleep(100);
        sida_store_get_stats(r.store, &stats);
    } while (stats.prefetch_loads < 4); /* 1 and 2 are done with: 4 comes by itself */
    wait_resident(&r, 3);
    assert_int_equal(stats.hits, 2);
    /* 4 was predicted wrongly, 6 not at all. */
    assert_ok(run_layer(&r, 20, (int32_t[]){3, 6}, 2, 3, &waves));
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.hits, 3);
    assert_int_equal(stats.demand_loads, 1);
    assert_int_equal(stats.late_prefetches, 0);
    assert_int_equal(stats.dropped_prefetches, 0);
    assert_int_equal(stats.bytes_moved, 5 * (int64_t)sizeof *r.experts);
    assert_int_equal(stats.bytes_wasted, (int64_t)sizeof *r.experts); /* 4 */
    rig_close(&r);
}

/* A layer that begins while its prefetch is under way waits for it and loads nothing twice; a
 * prefetch whose time has passed is dropped. */
static void test_late_and_dropped(void **state) {
    (void)state;
    rig r = {0};
    sida_store_stats stats;
    rig_open(&r, 2, 8, "lookahead", true, 0);
    r.gate_closed = true;
    assert_ok(sida_store_announce(r.store, 5, (int32_t[]){1, 2, 3}, 3));
    do {
        usleep(100);
        sida_store_get_stats(r.store, &stats);
    } while (stats.prefetch_loads < 1);
    assert_ok(sida_store_begin(r.store, 5, (int32_t[]){1}, 1));
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.late_prefetches, 1);
    assert_true(stats.dropped_prefetches >= 1);
    assert_int_equal(stats.dropped_prefetches + stats.prefetch_loads, 3);
    r.gate_closed = false;
    int32_t expert, n;
    const void *weights;
    assert_ok(sida_store_take(r.store, &expert, &weights, &n));
    assert_int_equal(n, 1);
    assert_int_equal(expert, 1);
    assert_ok(sida_store_release(r.store, &expert, 1, r.compute));
    /* What lies behind the running layer is not planned any more. */
    int64_t before = stats.prefetch_loads;
    assert_ok(sida_store_announce(r.store, 4, (int32_t[]){6, 7}, 2));
    usleep(2000);
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.prefetch_loads, before);
    rig_close(&r);
}

/* While one copy is under way the next is issued already, and no third. */
static void test_two_in_flight(void **state) {
    (void)state;
    rig r = {0};
    sida_store_stats stats;
    rig_open(&r, 4, 8, "lookahead", true, 0);
    r.copies_closed = true;
    assert_ok(sida_store_announce(r.store, 5, (int32_t[]){1, 2, 3}, 3));
    do {
        usleep(100);
        sida_store_get_stats(r.store, &stats);
    } while (stats.prefetch_loads < 2);
    usleep(2000);
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.prefetch_loads, 2);
    assert_int_equal(stats.resident, 0);
    r.copies_closed = false;
    wait_resident(&r, 3);
    rig_close(&r);
}

static void test_no_prefetch(void **state) {
    (void)state;
    rig r = {0};
    int32_t waves;
    rig_open(&r, 4, 8, "lookahead", false, 0);
    /* Plans still tell the policy: 0 and 1 come again, so 2 and 3 give way. */
    assert_ok(sida_store_announce(r.store, 3, (int32_t[]){0, 1}, 2));
    assert_ok(run_layer(&r, 1, (int32_t[]){0, 1, 2, 3}, 4, 4, &waves));
    assert_ok(run_layer(&r, 2, (int32_t[]){4, 5}, 2, 4, &waves));
    assert_ok(run_layer(&r, 3, (int32_t[]){0, 1}, 2, 4, &waves));
    sida_store_stats stats;
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.prefetch_loads, 0);
    assert_int_equal(stats.demand_loads, 6);
    assert_int_equal(stats.hits, 2);
    rig_close(&r);
    /* fifo throws them out. */
    r = (rig){0};
    rig_open(&r, 4, 8, "fifo", false, 0);
    for (int32_t e = 0; e < 4; e++) assert_ok(run_layer(&r, e, &e, 1, 4, &waves));
    assert_ok(run_layer(&r, 5, (int32_t[]){4, 5}, 2, 4, &waves));
    assert_ok(run_layer(&r, 6, (int32_t[]){0, 1}, 2, 4, &waves));
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.demand_loads, 8);
    rig_close(&r);
}

/* Without plans what was used often stays: 0 and 1, though 2 to 5 came later. */
static void test_heat(void **state) {
    (void)state;
    rig r = {0};
    int32_t waves;
    sida_store_stats stats;
    rig_open(&r, 3, 8, "lookahead", false, 0);
    int64_t position = 0;
    for (int i = 0; i < 3; i++)
        assert_ok(run_layer(&r, ++position, (int32_t[]){0, 1}, 2, 3, &waves));
    for (int32_t e = 2; e < 6; e++) assert_ok(run_layer(&r, ++position, &e, 1, 3, &waves));
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.demand_loads, 6);
    assert_ok(run_layer(&r, ++position, (int32_t[]){0, 1}, 2, 3, &waves));
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.demand_loads, 6);
    /* Uses fade: 64 of others, two half-lives, and 6 and 7 have been used more. */
    for (int i = 0; i < 32; i++)
        assert_ok(run_layer(&r, ++position, (int32_t[]){6, 7}, 2, 3, &waves));
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.demand_loads, 8);
    assert_ok(run_layer(&r, ++position, (int32_t[]){6, 7}, 2, 3, &waves));
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.demand_loads, 8);
    rig_close(&r);
}

/* A load takes a slot whose use is over, though one that is still computed with would be better;
 * when there is no other it waits for that one on the copy stream. */
static void test_idle_first(void **state) {
    (void)state;
    rig r = {0};
    int32_t waves, expert, n;
    const void *weights;
    char long_from[3], long_to[3] = {0};
    sida_store_stats stats;
    sida_stream *computing;
    rig_open(&r, 2, 8, "lookahead", false, 0);
    assert_ok(sida_stream_create(r.backend, &computing, SIDA_STREAM_COPY));
    assert_ok(run_layer(&r, 1, (int32_t[]){0}, 1, 2, &waves));
    /* 1 is computed with, by work that does not end for now. 0 comes again, 1 does not. */
    assert_ok(sida_store_begin(r.store, 2, (int32_t[]){1}, 1));
    assert_ok(sida_store_take(r.store, &expert, &weights, &n));
    r.held_bytes = sizeof long_from;
    memset(long_from, 1, sizeof long_from);
    assert_ok(sida_copy(computing, long_to, long_from, sizeof long_from));
    assert_ok(sida_store_release(r.store, &expert, 1, computing));
    assert_ok(sida_store_announce(r.store, 9, (int32_t[]){0}, 1));
    assert_ok(run_layer(&r, 3, (int32_t[]){2}, 1, 2, &waves)); /* would hang behind 1's slot */
    assert_ok(run_layer(&r, 4, (int32_t[]){1}, 1, 2, &waves));
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.hits, 1);
    assert_int_equal(stats.demand_loads, 3);
    /* Both in use: the load starts, and ends with the work. */
    assert_ok(sida_copy(computing, long_to, long_from, sizeof long_from));
    for (int32_t e = 1; e <= 2; e++) {
        assert_ok(sida_store_begin(r.store, 4 + e, &e, 1));
        assert_ok(sida_store_take(r.store, &expert, &weights, &n));
        assert_ok(sida_store_release(r.store, &expert, 1, computing));
    }
    assert_ok(sida_store_begin(r.store, 7, (int32_t[]){5}, 1));
    do {
        usleep(100);
        sida_store_get_stats(r.store, &stats);
    } while (stats.bytes_moved < 4 * (int64_t)sizeof *r.experts);
    usleep(2000);
    sida_store_get_stats(r.store, &stats);
    assert_int_equal(stats.resident, 1);
    r.held_bytes = 0;
    assert_ok(sida_store_take(r.store, &expert, &weights, &n));
    assert_int_equal(expert, 5);
    assert_memory_equal(weights, r.experts[5], sizeof *r.experts);
    assert_ok(sida_store_release(r.store, &expert, 1, r.compute));
    sida_stream_destroy(computing);
    rig_close(&r);
}

/* The link's busy time is that of copies, not of the pauses between them. */
static void test_busy(void **state) {
    (void)state;
    rig r = {0};
    int32_t waves;
    sida_store_stats stats, later;
    rig_open(&r, 3, 8, "lookahead", true, 0);
    sida_store_get_stats(r.store, &stats);
    assert_true(stats.busy_seconds == 0);
    r.copies_closed = true;
    assert_ok(sida_store_announce(r.store, 1, (int32_t[]){1, 2}, 2));
    do {
        usleep(100);
        sida_store_get_stats(r.store, &stats);
    } while (stats.prefetch_loads < 2);
    sida_store_get_stats(r.store, &stats);
    usleep(5000);
    sida_store_get_stats(r.store, &later); /* counts while a copy runs */
    assert_true(later.busy_seconds >= stats.busy_seconds + 0.005);
    r.copies_closed = false;
    assert_ok(run_layer(&r, 1, (int32_t[]){1, 2}, 2, 3, &waves));
    usleep(1000);
    sida_store_get_stats(r.store, &stats);
    assert_true(stats.busy_seconds >= later.busy_seconds);
    usleep(5000);
    sida_store_get_stats(r.store, &later);
    assert_true(later.busy_seconds == stats.busy_seconds);
    rig_close(&r);
}

static void *cancel_soon(void *argument) {
    rig *r = argument;
    usleep(3000);
    sida_store_cancel(r->store, sida_fail(SIDA_ERROR_CANCELLED, "stopped by the test"));
    return NULL;
}

static void test_errors_wake(void **state) {
    (void)state;
    rig r = {0};
    int32_t waves;
    /* The copies of a poisoned load come in pairs: the fourth belongs to the second load. */
    rig_open(&r, 2, 8, "lru", true, 4);
    assert_int_equal(run_layer(&r, 1, (int32_t[]){0, 1, 2}, 3, 2, &waves), SIDA_ERROR_DEVICE);
    assert_non_null(strstr(sida_last_message(), "copy"));
    assert_int_equal(sida_store_announce(r.store, 9, (int32_t[]){1}, 1), SIDA_ERROR_DEVICE);
    assert_int_equal(sida_store_begin(r.store, 9, NULL, 0), SIDA_ERROR_DEVICE);
    rig_close(&r);

    r = (rig){0};
    rig_open(&r, 2, 8, "lru", true, 0);
    r.gate_closed = true; /* the load never ends */
    pthread_t thread;
    pthread_create(&thread, NULL, cancel_soon, &r);
    assert_int_equal(run_layer(&r, 1, (int32_t[]){0}, 1, 2, &waves), SIDA_ERROR_CANCELLED);
    assert_string_equal(sida_last_message(), "stopped by the test");
    pthread_join(thread, NULL);
    r.gate_closed = false;
    rig_close(&r);
}

static void test_cap(void **state) {
    (void)state;
    rig r = {0};
    rig_open(&r, 2, 8, "lru", true, 0);
    sida_store *second;
    sida_store_options options = {.slots = 4,
                                  .experts = 8,
                                  .expert_bytes = sizeof *r.experts,
                                  .source = source,
                                  .source_context = &r,
                                  .policy = sida_policy_find("lru")};
    assert_ok(sida_backend_set_cap(r.backend, 5 * sida_store_slot_bytes(sizeof *r.experts)));
    assert_int_equal(sida_store_create(&second, r.backend, &options), SIDA_ERROR_BUDGET);
    assert_null(second);
    assert_non_null(strstr(sida_last_message(), "expert slots"));
    rig_close(&r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_two_slots),        cmocka_unit_test(test_prefetch),
        cmocka_unit_test(test_late_and_dropped), cmocka_unit_test(test_no_prefetch),
        cmocka_unit_test(test_two_in_flight),    cmocka_unit_test(test_heat),
        cmocka_unit_test(test_idle_first),       cmocka_unit_test(test_busy),
        cmocka_unit_test(test_errors_wake),      cmocka_unit_test(test_cap),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
