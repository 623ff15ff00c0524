/* Policies and plans: pure functions and a pure data structure. */
#include "formats/base/rng.h"
#include "runtime/store/plan.h"
#include "runtime/store/policy.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void test_policies(void **state) {
    (void)state;
    const sida_slot_view views[] = {
        {.slot = 0, .loaded_at = 5, .last_used = 9, .next_use = 100},
        {.slot = 2, .loaded_at = 3, .last_used = 12, .next_use = 300},
        {.slot = 3, .loaded_at = 8, .last_used = 8, .next_use = 300},
        {.slot = 7, .loaded_at = 6, .last_used = 20, .next_use = 200},
    };
    assert_int_equal(sida_policy_fifo(views, 4), 1);
    assert_int_equal(sida_policy_lru(views, 4), 2);
    assert_int_equal(sida_policy_lookahead(views, 4), 2); /* the tie goes to the oldest use */
    assert_int_equal(sida_policy_lookahead(views, 2), 1);
    assert_int_equal(sida_policy_lookahead(views + 3, 1), 0);
    /* Of the furthest two the cold one gives way; an idle slot before any that is in use. */
    sida_slot_view warm[4];
    memcpy(warm, views, sizeof warm);
    warm[2].heat = 1.5;
    warm[1].heat = 1;
    assert_int_equal(sida_policy_lookahead(warm, 4), 1);
    warm[1].heat = -INFINITY;
    assert_int_equal(sida_policy_lookahead(warm, 4), 1);
    warm[0].idle = warm[3].idle = true;
    assert_int_equal(sida_policy_lookahead(warm, 4), 3);
    warm[1].idle = true;
    assert_int_equal(sida_policy_lookahead(warm, 4), 1);
    assert_int_equal(sida_policy_lru(warm, 4), 2);
    const sida_slot_view same[] = {{.slot = 4, .next_use = INT64_MAX},
                                   {.slot = 5, .next_use = INT64_MAX}};
    assert_int_equal(sida_policy_fifo(same, 2), 0);
    assert_int_equal(sida_policy_lru(same, 2), 0);
    assert_int_equal(sida_policy_lookahead(same, 2), 0);
    assert_ptr_equal(sida_policy_find("lookahead")->victim, sida_policy_lookahead);
    assert_ptr_equal(sida_policy_find("fifo")->victim, sida_policy_fifo);
    assert_ptr_equal(sida_policy_find("lru")->victim, sida_policy_lru);
    assert_null(sida_policy_find("mru"));
    assert_non_null(strstr(sida_policy_names(), "lookahead"));
}

/* Loads that a policy needs for a trace of uses with `slots` slots. */
static int64_t simulate(sida_policy_fn *policy, const int32_t *uses, int32_t count, int32_t slots) {
    sida_slot_view views[16];
    int32_t experts[16], used = 0;
    int64_t loads = 0;
    for (int32_t t = 0; t < count; t++) {
        int32_t at = 0;
        while (at < used && experts[at] != uses[t]) at++;
        if (at == used) {
            loads++;
            if (used < slots) {
                used++;
            } else {
                for (int32_t i = 0; i < used; i++) {
                    int32_t next = t + 1;
                    while (next < count && uses[next] != experts[i]) next++;
                    views[i].next_use = next < count ? next : INT64_MAX;
                }
                at = policy(views, used);
            }
            experts[at] = uses[t];
            views[at] = (sida_slot_view){.slot = at, .loaded_at = t};
        }
        views[at].last_used = t;
    }
    return loads;
}

/* Layers visited in a cycle: fifo and lru load everything every time, lookahead keeps a part. */
static void test_cycle(void **state) {
    (void)state;
    int32_t uses[60];
    for (int32_t i = 0; i < 60; i++) uses[i] = i % 6;
    assert_int_equal(simulate(sida_policy_fifo, uses, 60, 4), 60);
    assert_int_equal(simulate(sida_policy_lru, uses, 60, 4), 60);
    int64_t lookahead = simulate(sida_policy_lookahead, uses, 60, 4);
    assert_true(lookahead < 30);
    /* Furthest next use is optimal (Belady): never more than the others. */
    sida_rng rng = sida_rng_seed(1);
    for (int round = 0; round < 50; round++) {
        for (int32_t i = 0; i < 60; i++) uses[i] = (int32_t)sida_rng_below(&rng, 9);
        int64_t best = simulate(sida_policy_lookahead, uses, 60, 5);
        assert_true(best <= simulate(sida_policy_fifo, uses, 60, 5));
        assert_true(best <= simulate(sida_policy_lru, uses, 60, 5));
    }
}

static void assert_order(sida_plan *plan, const int64_t *positions, const int32_t *experts,
                         int count) {
    int64_t position;
    int32_t expert;
    sida_plan_rewind(plan);
    for (int i = 0; i < count; i++) {
        assert_true(sida_plan_peek(plan, &position, &expert));
        assert_int_equal(position, positions[i]);
        assert_int_equal(expert, experts[i]);
        sida_plan_step(plan);
    }
    assert_false(sida_plan_peek(plan, &position, &expert));
}

static void test_plan(void **state) {
    (void)state;
    sida_plan *plan;
    int64_t position;
    int32_t expert;
    assert_int_equal(sida_plan_create(&plan, 10), SIDA_OK);
    assert_false(sida_plan_peek(plan, &position, &expert));
    assert_false(sida_plan_pop(plan, INT64_MAX, &expert));
    assert_int_equal(sida_plan_add(plan, 5, (int32_t[]){3, 1}, 2), SIDA_OK);
    assert_int_equal(sida_plan_add(plan, 9, (int32_t[]){3, 4}, 2), SIDA_OK);
    assert_int_equal(sida_plan_add(plan, 7, (int32_t[]){8}, 1), SIDA_OK);
    assert_int_equal(sida_plan_add(plan, 5, (int32_t[]){2}, 1), SIDA_OK);
    assert_int_equal(sida_plan_add(plan, 8, NULL, 0), SIDA_OK);
    assert_order(plan, (int64_t[]){5, 5, 5, 7, 9, 9}, (int32_t[]){3, 1, 2, 8, 3, 4}, 6);
    assert_int_equal(sida_plan_next_use(plan, 3), 5);
    assert_int_equal(sida_plan_next_use(plan, 4), 9);
    assert_true(sida_plan_next_use(plan, 0) == INT64_MAX);
    /* A passed cursor comes back to what is added before it, and only to that. */
    sida_plan_rewind(plan);
    for (int i = 0; i < 4; i++) sida_plan_step(plan);
    assert_int_equal(sida_plan_add(plan, 6, (int32_t[]){7}, 1), SIDA_OK);
    assert_true(sida_plan_peek(plan, &position, &expert));
    assert_int_equal(expert, 7);
    /* Adding to the cursor's own position keeps what it has not seen. */
    assert_int_equal(sida_plan_add(plan, 6, (int32_t[]){0}, 1), SIDA_OK);
    assert_true(sida_plan_peek(plan, &position, &expert));
    assert_int_equal(expert, 7);
    for (int i = 0; i < 5; i++) sida_plan_step(plan);
    assert_false(sida_plan_peek(plan, &position, &expert));
    assert_int_equal(sida_plan_add(plan, 9, (int32_t[]){9}, 1), SIDA_OK);
    assert_true(sida_plan_peek(plan, &position, &expert));
    assert_int_equal(expert, 9);
    /* Taking out in order; next uses follow. */
    const int32_t order[] = {3, 1, 2, 7, 0, 8};
    for (int i = 0; i < 6; i++) {
        assert_true(sida_plan_pop(plan, 8, &expert));
        assert_int_equal(expert, order[i]);
    }
    assert_false(sida_plan_pop(plan, 8, &expert));
    assert_int_equal(sida_plan_next_use(plan, 3), 9);
    assert_true(sida_plan_next_use(plan, 8) == INT64_MAX);
    assert_order(plan, (int64_t[]){9, 9, 9}, (int32_t[]){3, 4, 9}, 3);
    sida_plan_destroy(plan);
    sida_plan_destroy(NULL);
}

/* Against a plain sorted array. */
static void test_plan_random(void **state) {
    (void)state;
    typedef struct entry {
        int64_t position;
        int32_t expert;
    } entry;
    enum { limit = 400, experts = 12 };
    entry list[limit];
    sida_rng rng = sida_rng_seed(5);
    sida_plan *plan;
    assert_int_equal(sida_plan_create(&plan, experts), SIDA_OK);
    int count = 0;
    int64_t now = 0;
    for (int round = 0; round < 3000; round++) {
        if (count + 3 < limit && sida_rng_below(&rng, 2)) {
            int64_t position = now + 1 + sida_rng_below(&rng, 30);
            int32_t added[3], n = 1 + (int32_t)sida_rng_below(&rng, 3);
            for (int32_t i = 0; i < n; i++) {
                added[i] = (int32_t)sida_rng_below(&rng, experts);
                int at = count++;
                while (at > 0 && list[at - 1].position > position) {
                    list[at] = list[at - 1];
                    at--;
                }
                list[at] = (entry){position, added[i]};
            }
            assert_int_equal(sida_plan_add(plan, position, added, n), SIDA_OK);
        } else {
            now += sida_rng_below(&rng, 3);
            int32_t expert;
            int popped = 0;
            while (sida_plan_pop(plan, now, &expert)) {
                assert_true(popped < count);
                assert_int_equal(list[popped].expert, expert);
                popped++;
            }
            assert_true(popped == count || list[popped].position > now);
            memmove(list, list + popped, (size_t)(count - popped) * sizeof *list);
            count -= popped;
        }
        for (int32_t e = 0; e < experts; e++) {
            int64_t next = INT64_MAX;
            for (int i = count - 1; i >= 0; i--)
                if (list[i].expert == e) next = list[i].position;
            assert_true(sida_plan_next_use(plan, e) == next);
        }
        /* The cursor never skips: from the start it sees everything. */
        if (round % 10 == 0) {
            sida_plan_rewind(plan);
            int64_t position;
            int32_t expert;
            for (int i = 0; i < count; i++, sida_plan_step(plan)) {
                assert_true(sida_plan_peek(plan, &position, &expert));
                assert_int_equal(position, list[i].position);
                assert_int_equal(expert, list[i].expert);
            }
            assert_false(sida_plan_peek(plan, &position, &expert));
        }
    }
    sida_plan_destroy(plan);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_policies),
        cmocka_unit_test(test_cycle),
        cmocka_unit_test(test_plan),
        cmocka_unit_test(test_plan_random),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
