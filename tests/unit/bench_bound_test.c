/* The bound on loads against every schedule there is, on cases small enough for that. */
#include "formats/base/rng.h"
#include "tools/cli/bench_bound.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { EXPERTS = 5, SETS = 1 << EXPERTS, MOST_STEPS = 7, NEVER = 1000 };

/* Cheapest way to each set of residents with each set of experts still to be computed with, by
 * trying every single load and eviction, useful or not. passing: an expert may be loaded and
 * computed with without a slot. */
static void settle(int cost[SETS][SETS], int slots, bool passing) {
    for (bool changed = true; changed;) {
        changed = false;
        for (int held = 0; held < SETS; held++)
            for (int left = 0; left < SETS; left++) {
                int now = cost[held][left];
                if (now == NEVER) continue;
                if (now < cost[held][left & ~held]) {
                    cost[held][left & ~held] = now;
                    changed = true;
                }
                for (int e = 0; e < EXPERTS; e++) {
                    if (passing && now + 1 < cost[held][left & ~(1 << e)]) {
                        cost[held][left & ~(1 << e)] = now + 1;
                        changed = true;
                    }
                    int other = held ^ 1 << e; /* throws e out, or loads it */
                    int with = now + (other > held);
                    if (__builtin_popcount((unsigned)other) > slots) continue;
                    if (with >= cost[other][left]) continue;
                    cost[other][left] = with;
                    changed = true;
                }
            }
    }
}

static int try_everything(const int *sets, int steps, int slots, bool passing) {
    static int cost[SETS][SETS], best[SETS];
    for (int held = 0; held < SETS; held++) best[held] = held == 0 ? 0 : NEVER;
    for (int i = 0; i < steps; i++) {
        for (int held = 0; held < SETS; held++)
            for (int left = 0; left < SETS; left++)
                cost[held][left] = left == sets[i] ? best[held] : NEVER;
        settle(cost, slots, passing);
        for (int held = 0; held < SETS; held++) best[held] = cost[held][0];
    }
    int least = NEVER;
    for (int held = 0; held < SETS; held++)
        if (best[held] < least) least = best[held];
    return least;
}

static int64_t least_loads(const int *sets, int steps, int slots, int64_t *loads) {
    int64_t start[MOST_STEPS + 1] = {0}, sum = 0;
    int32_t experts[MOST_STEPS * EXPERTS];
    for (int i = 0; i < steps; i++) {
        start[i + 1] = start[i];
        for (int e = 0; e < EXPERTS; e++)
            if (sets[i] >> e & 1) experts[start[i + 1]++] = e;
    }
    assert_int_equal(sida_bench_least_loads(loads, start, experts, steps, EXPERTS, slots), SIDA_OK);
    for (int i = 0; i < steps; i++) sum += loads[i];
    return sum;
}

static void test_by_hand(void **state) {
    (void)state;
    int64_t loads[MOST_STEPS];
    /* Two slots: 0 and 1 stay, 2 passes through, and 3 takes the place of 1, which comes later than
     * 0. */
    assert_int_equal(least_loads((int[]){1, 2, 4, 8, 8, 1, 2}, 7, 2, loads), 5);
    const int64_t expected[] = {1, 1, 1, 1, 0, 0, 1};
    assert_memory_equal(loads, expected, sizeof expected);
    /* A step of four in two slots: two waves, of which one expert serves the next step. */
    assert_int_equal(least_loads((int[]){15, 8, 0, 8}, 4, 2, loads), 4);
    /* All fit: each is loaded once. */
    assert_int_equal(least_loads((int[]){31, 31, 5, 31}, 4, 5, loads), 5);
}

static void test_against_everything(void **state) {
    (void)state;
    sida_rng rng = sida_rng_seed(3);
    int saved = 0;
    for (int round = 0; round < 150; round++) {
        int sets[MOST_STEPS], needs = 0;
        int steps = 3 + (int)sida_rng_below(&rng, MOST_STEPS - 2);
        int slots = 2 + (int)sida_rng_below(&rng, 2);
        for (int i = 0; i < steps; i++) {
            /* Alternately few and many, so that some steps need waves. */
            sets[i] = (int)(sida_rng_below(&rng, SETS) & sida_rng_below(&rng, SETS));
            if (sida_rng_below(&rng, 3) == 0) sets[i] = (int)sida_rng_below(&rng, SETS);
            needs += __builtin_popcount((unsigned)sets[i]);
        }
        int64_t loads[MOST_STEPS], sum = least_loads(sets, steps, slots, loads);
        assert_int_equal(sum, try_everything(sets, steps, slots, true));
        int real = try_everything(sets, steps, slots, false);
        assert_true(sum <= real);
        assert_true(real <= least_loads(sets, steps, slots - 1, loads));
        saved += needs - (int)sum;
    }
    assert_true(saved > 150); /* or the cases are too easy */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_by_hand),
        cmocka_unit_test(test_against_everything),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
