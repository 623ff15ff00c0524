/* The plan against a naive one: a list of uses, kept in order and looked through. */
#include "formats/base/memory.h"
#include "formats/base/rng.h"
#include "runtime/store/plan.h"
#include "tests/test.h"

#include <string.h>

enum { EXPERTS = 12, POSITIONS = 10, MOST = 4096 };

typedef struct use {
    int64_t position;
    int32_t expert;
    bool seen; /* the cursor has passed it */
} use;

typedef struct naive {
    use uses[MOST];
    int32_t count;
} naive;

static void insert(naive *n, int64_t position, int32_t expert) {
    int32_t at = n->count++;
    assert_true(n->count <= MOST);
    for (; at > 0 && n->uses[at - 1].position > position; at--) n->uses[at] = n->uses[at - 1];
    n->uses[at] = (use){position, expert, false};
}

static void take_out(naive *n, int32_t at) {
    n->count--;
    memmove(&n->uses[at], &n->uses[at + 1], (size_t)(n->count - at) * sizeof(use));
}

/* The cursor is one place: what lies behind a use that it has not seen it sees again. */
static void rewind_behind(naive *n) {
    bool again = false;
    for (int32_t i = 0; i < n->count; i++) {
        again |= !n->uses[i].seen;
        if (again) n->uses[i].seen = false;
    }
}

static int32_t first_unseen(const naive *n) {
    int32_t at = 0;
    while (at < n->count && n->uses[at].seen) at++;
    return at;
}

static void compare(const naive *n, const sida_plan *plan) {
    for (int32_t e = 0; e < EXPERTS; e++) {
        int64_t next = INT64_MAX;
        for (int32_t i = n->count - 1; i >= 0; i--)
            if (n->uses[i].expert == e) next = n->uses[i].position;
        assert_int_equal(sida_plan_next_use(plan, e), next);
    }
    for (int64_t position = 0; position < POSITIONS; position++) {
        int32_t count, found = 0;
        const int32_t *at = sida_plan_at(plan, position, &count);
        for (int32_t i = 0; i < n->count; i++) {
            if (n->uses[i].position != position) continue;
            assert_true(found < count);
            assert_int_equal(at[found++], n->uses[i].expert);
        }
        assert_int_equal(found, count);
    }
    int64_t position;
    int32_t expert, at = first_unseen(n);
    assert_int_equal(sida_plan_peek(plan, &position, &expert), at < n->count);
    if (at == n->count) return;
    assert_int_equal(position, n->uses[at].position);
    assert_int_equal(expert, n->uses[at].expert);
}

static void random_operations(uint64_t seed) {
    naive n = {0};
    sida_plan *plan;
    sida_rng rng = sida_rng_seed(seed);
    assert_int_equal(sida_plan_create(&plan, EXPERTS), SIDA_OK);
    for (int step = 0; step < 3000; step++) {
        int64_t position = sida_rng_below(&rng, POSITIONS);
        int32_t set[6], count = (int32_t)sida_rng_below(&rng, 6), expert;
        for (int32_t i = 0; i < count; i++) set[i] = (int32_t)sida_rng_below(&rng, EXPERTS);
        switch (sida_rng_below(&rng, n.count > MOST / 2 ? 3 : 7)) {
        case 0:
        case 1:
            /* Popped as the store does: the first, if it is not too late. */
            if (sida_plan_pop(plan, position, &expert)) {
                assert_true(n.count > 0 && n.uses[0].position <= position);
                assert_int_equal(expert, n.uses[0].expert);
                take_out(&n, 0);
            } else {
                assert_true(n.count == 0 || n.uses[0].position > position);
            }
            break;
        case 2:
            sida_plan_remove(plan, position);
            for (int32_t i = n.count - 1; i >= 0; i--)
                if (n.uses[i].position == position) take_out(&n, i);
            break;
        case 3:
            sida_plan_rewind(plan);
            for (int32_t i = 0; i < n.count; i++) n.uses[i].seen = false;
            break;
        case 4:
            for (int32_t i = 0; i < count; i++) {
                sida_plan_step(plan);
                int32_t at = first_unseen(&n);
                if (at < n.count) n.uses[at].seen = true;
            }
            break;
        default:
            assert_int_equal(sida_plan_add(plan, position, set, count), SIDA_OK);
            for (int32_t i = 0; i < count; i++) insert(&n, position, set[i]);
            rewind_behind(&n);
        }
        compare(&n, plan);
    }
    sida_plan_destroy(plan);
}

static void test_random(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 40; seed++) random_operations(seed);
}

/* By hand: a position planned anew, before, at and behind the cursor. */
static void test_remove(void **state) {
    (void)state;
    sida_plan *plan;
    int64_t position;
    int32_t expert, count;
    assert_int_equal(sida_plan_create(&plan, EXPERTS), SIDA_OK);
    assert_int_equal(sida_plan_add(plan, 1, (int32_t[]){1, 2}, 2), SIDA_OK);
    assert_int_equal(sida_plan_add(plan, 2, (int32_t[]){3, 1}, 2), SIDA_OK);
    assert_int_equal(sida_plan_add(plan, 3, (int32_t[]){4}, 1), SIDA_OK);
    for (int i = 0; i < 3; i++) sida_plan_step(plan); /* at 1 of position 2 */
    sida_plan_remove(plan, 2);
    assert_null(sida_plan_at(plan, 2, &count));
    assert_int_equal(count, 0);
    assert_int_equal(sida_plan_next_use(plan, 3), INT64_MAX);
    assert_int_equal(sida_plan_next_use(plan, 1), 1);
    assert_true(sida_plan_peek(plan, &position, &expert));
    assert_int_equal(expert, 4);
    assert_int_equal(sida_plan_add(plan, 2, (int32_t[]){5, 3}, 2), SIDA_OK);
    assert_true(sida_plan_peek(plan, &position, &expert));
    assert_int_equal(expert, 5);
    sida_plan_remove(plan, 7); /* nothing */
    for (int i = 0; i < 2; i++) assert_true(sida_plan_pop(plan, 1, &expert));
    assert_false(sida_plan_pop(plan, 1, &expert));
    assert_int_equal(sida_plan_next_use(plan, 3), 2);
    sida_plan_destroy(plan);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_random),
                                       cmocka_unit_test(test_remove)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
