/* Refinements while a pass runs, right ones and as wrong as dice: exact routing gives the same
 * bytes, the source is told what the router has chosen and nothing else, and what it says of the
 * layers behind is what gets loaded. On the CPU, and with SIDA_TEST_CUDA on the GPU. */
#include "formats/base/rng.h"
#include "runtime/engine/budget.h"
#include "tests/integration/identity_rig.h"
#include "tests/test.h"

#include <string.h>
#include <time.h>
#ifdef SIDA_TEST_CUDA
#include "tests/gpu/gpu.h"
#endif

enum { SEQUENCES = 13, MOST_CALLS = SEQUENCES * (1 + rig_max_new_tokens), MOST_LAYERS = 8 };

/* What the router chose, call by call in the order of a pass. */
typedef struct truth {
    int32_t calls;
    struct {
        int32_t side;
        int64_t tokens;
        int32_t *experts[MOST_LAYERS]; /* [tokens] */
    } call[MOST_CALLS];
} truth;

static sida_status write_down(void *context, const sida_moe_call *call) {
    truth *t = context;
    if (call->layer == 0) t->calls++;
    assert_true(t->calls <= MOST_CALLS && call->layer < MOST_LAYERS && call->k == 1);
    t->call[t->calls - 1].side = call->side;
    t->call[t->calls - 1].tokens = call->tokens;
    size_t bytes = (size_t)call->tokens * sizeof *call->experts;
    int32_t *copy = malloc(bytes);
    memcpy(copy, call->experts, bytes);
    t->call[t->calls - 1].experts[call->layer] = copy;
    return SIDA_OK;
}

static truth *find_truth(rig *r, int32_t batch) {
    truth *t = calloc(1, sizeof *t);
    sida_resident *resident;
    int32_t ids[rig_max_batch * rig_max_new_tokens], counts[rig_max_batch];
    rig_assert_ok(sida_resident_create(&resident, r->model));
    const sida_moe_driver *driver = sida_resident_driver(resident, t, NULL, write_down);
    const sida_generate_options generate = {.max_new_tokens = rig_max_new_tokens};
    for (int32_t first = 0; first < r->sequences; first += batch) {
        int32_t count = r->sequences - first < batch ? r->sequences - first : batch;
        int64_t offsets[rig_max_batch + 1];
        for (int32_t s = 0; s <= count; s++) offsets[s] = r->offsets[first + s] - r->offsets[first];
        const sida_ragged input = {count, offsets, r->ids + r->offsets[first]};
        rig_assert_ok(sida_run_encode(r->run, &input, driver));
        rig_assert_ok(sida_run_generate(r->run, &generate, driver, ids, counts));
    }
    sida_resident_destroy(resident);
    return t;
}

static void free_truth(truth *t) {
    for (int32_t c = 0; c < t->calls; c++)
        for (int layer = 0; layer < MOST_LAYERS; layer++) free(t->call[c].experts[layer]);
    free(t);
}

/* The rig's dice up front; behind a layer more dice, or the truth. */
typedef struct refining_source {
    sida_hash_source base;
    const sida_hash_source *dice;
    const truth *truth;
    bool right;
    int32_t calls; /* that layers have told of */
} refining_source;

static sida_status refining_state(const sida_hash_source *source, sida_hash_state **out) {
    return sida_hash_state_create(((const refining_source *)source)->dice, out);
}

static const sida_hash_source_table *dice_table;
static void refining_state_destroy(sida_hash_state *state) {
    dice_table->state_destroy(state);
}

static sida_status refining_encode(const sida_hash_source *source, sida_hash_state *state,
                                   const sida_ragged *input, int32_t k, sida_hash_table *out) {
    return sida_hash_encode(((const refining_source *)source)->dice, state, input, k, out);
}

static sida_status refining_decode(const sida_hash_source *source, sida_hash_state *state,
                                   const sida_ragged *step, int32_t k, sida_hash_table *out) {
    return sida_hash_decode(((const refining_source *)source)->dice, state, step, k, out);
}

static sida_status refining_refine(const sida_hash_source *source, sida_hash_state *state, int side,
                                   int32_t layer, const int32_t *experts, int32_t top_k, int32_t k,
                                   sida_hash_table *out) {
    refining_source *self = (refining_source *)(uintptr_t)source;
    const int32_t layers = source->info.layers[side];
    sida_status status = SIDA_OK;
    (void)state;
    if (layer == 0) self->calls++;
    assert_true(self->calls <= self->truth->calls && top_k == 1);
    const int32_t call = self->calls - 1;
    const int64_t tokens = self->truth->call[call].tokens;
    assert_int_equal(side, self->truth->call[call].side);
    assert_memory_equal(experts, self->truth->call[call].experts[layer],
                        (size_t)tokens * sizeof *experts);
    SIDA_TRY(sida_hash_table_reserve(out, side, layers, k, tokens));
    sida_rng rng = sida_rng_seed((uint64_t)(call * 64 + layer));
    for (int64_t i = 0; i < tokens; i++)
        for (int32_t behind = layer + 1; behind < layers; behind++)
            for (int32_t j = 0; j < k; j++) {
                int32_t e = (int32_t)sida_rng_below(&rng, (uint32_t)source->info.experts);
                if (self->right) e = self->truth->call[call].experts[behind][i];
                out->experts[(i * layers + behind) * k + j] = (uint16_t)e;
            }
out:
    return status;
}

static const sida_hash_source_table refining_table = {
    .state_create = refining_state,
    .state_destroy = refining_state_destroy,
    .encode = refining_encode,
    .decode = refining_decode,
    .refine = refining_refine,
};

static int32_t slots_of(const rig *r, const char *text) {
    sida_budget budget;
    int32_t slots;
    size_t cap_bytes;
    const sida_budget_needs needs = {.experts = (int64_t)r->info->sites * r->info->experts,
                                     .slot_bytes = sida_store_slot_bytes(r->info->expert_bytes),
                                     .dense_bytes = r->fixed_bytes};
    rig_assert_ok(sida_budget_parse(&budget, text));
    rig_assert_ok(sida_budget_slots(&slots, &cap_bytes, &budget, &needs));
    return slots;
}

/* Layers that have others behind them, in all calls. */
static int64_t layers_that_tell(const rig *r, const truth *t) {
    int64_t count = 0;
    for (int32_t c = 0; c < t->calls; c++) count += r->info->moe_layers[t->call[c].side] - 1;
    return count;
}

/* Of the grid, which tools that slow a device down see less of. */
static int small_step(int small) {
#ifdef SIDA_TEST_CUDA
    return gpu_step(small);
#else
    (void)small;
    return 1;
#endif
}

static void test_grid(void **state) {
    rig *r = *state;
    static const char *const policies[] = {"fifo", "lru", "lookahead"};
    static const char *const budgets[] = {"2-experts", "3-experts", "20%", "50%", "90%"};
    unsigned seed = 1;
    for (int32_t batch = 1; batch <= 16; batch += 5 * small_step(3)) {
        reference ref;
        truth *t = find_truth(r, batch);
        rig_reference(r, &ref, SIDA_ROUTING_EXACT, 2, batch);
        assert_true(t->calls >= 5 && layers_that_tell(r, t) >= t->calls);
        for (int b = 0; b < 5; b += small_step(5))
            for (int p = 0; p < 3; p += small_step(2))
                for (int way = 0; way < 4; way++) {
                    refining_source source = {.base = {&refining_table, r->source.info},
                                              .dice = &r->source,
                                              .truth = t,
                                              .right = way == 1};
                    source.base.info.refines = true;
                    const bool refine = way < 2, prefetch = way != 3;
                    sida_pass_stats stats;
                    rig_assert_ok(rig_pass(r, &stats,
                                           (sida_pass_options){
                                               .source = &source.base,
                                               .top_k = 2,
                                               .slots = slots_of(r, budgets[b]),
                                               .queue = 1 + b,
                                               .prefetch = prefetch,
                                               .refine = refine || !prefetch,
                                               .policy = sida_policy_find(policies[p]),
                                           },
                                           batch, seed++));
                    if (!sida_fingerprint_equal(stats.digest, ref.digest))
                        fail_msg("%s %s batch %d, way %d: another digest", budgets[b], policies[p],
                                 batch, way);
                    const sida_store_stats *store = &stats.store;
                    assert_int_equal(store->hits + store->late_prefetches + store->demand_loads,
                                     ref.needs);
                    assert_int_equal(stats.refinements, refine ? layers_that_tell(r, t) : 0);
                    assert_int_equal(source.calls, refine ? t->calls : 0);
                    assert_true(refine ? store->revised_in > 0 && stats.refine_seconds > 0
                                       : store->revised_in == 0 && stats.refine_seconds == 0);
                    assert_true(stats.hash_seconds > 0);
                    sida_pass_stats_free(&stats);
                }
        reference_free(&ref);
        free_truth(t);
    }
}

/* Every thread takes its time, so that loads have theirs. */
static void wait_a_little(void *context) {
    (void)context;
    nanosleep(&(struct timespec){.tv_nsec = 300000}, NULL);
}

/* Predictions that are dice load little of what is needed; right refinements all behind a side's
 * first layer. */
static void test_loads(void **state) {
    rig *r = *state;
    int64_t demands[2];
    truth *t = find_truth(r, 1);
    for (int right = 0; right < 2; right++) {
        refining_source source = {.base = {&refining_table, r->source.info},
                                  .dice = &r->source,
                                  .truth = t,
                                  .right = right};
        source.base.info.refines = true;
        sida_pass_stats stats;
        rig_assert_ok(rig_pass(r, &stats,
                               (sida_pass_options){.source = &source.base,
                                                   .top_k = 1,
                                                   .slots = slots_of(r, "60%"),
                                                   .queue = 1,
                                                   .prefetch = true,
                                                   .refine = right,
                                                   .policy = sida_policy_find("lookahead"),
                                                   .pause = wait_a_little},
                               1, 0));
        demands[right] = stats.store.demand_loads;
        sida_pass_stats_free(&stats);
    }
    assert_true(demands[0] > 20);
    if (demands[1] * 4 > demands[0] * 3)
        fail_msg("%lld loads on demand with right refinements, %lld without", (long long)demands[1],
                 (long long)demands[0]);
    free_truth(t);
}

/* Guided and predicted routing are fixed by the tables: nobody asks. */
static void test_exact_alone(void **state) {
    rig *r = *state;
    for (int routing = SIDA_ROUTING_GUIDED; routing <= SIDA_ROUTING_PREDICTED; routing++) {
        refining_source source = {.base = {&refining_table, r->source.info}, .dice = &r->source};
        source.base.info.refines = true;
        sida_pass_stats stats;
        rig_assert_ok(rig_pass(r, &stats,
                               (sida_pass_options){.source = &source.base,
                                                   .routing = (sida_routing)routing,
                                                   .top_k = 2,
                                                   .slots = 5,
                                                   .queue = 1,
                                                   .prefetch = true,
                                                   .refine = true,
                                                   .policy = sida_policy_find("lookahead")},
                               4, 3));
        assert_int_equal(stats.refinements, 0);
        assert_int_equal(stats.store.revised_in + stats.store.revised_out, 0);
        sida_pass_stats_free(&stats);
    }
}

static int open_rig(void **state) {
    rig *r = calloc(1, sizeof *r);
#ifdef SIDA_TEST_CUDA
    rig_open_on(r, gpu_open(), NULL, SEQUENCES);
#else
    rig_open(r, NULL, SEQUENCES, 0);
#endif
    dice_table = r->source.table;
    *state = r;
    return 0;
}

static int close_rig(void **state) {
    rig_close(*state);
    free(*state);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_grid),
        cmocka_unit_test(test_loads),
        cmocka_unit_test(test_exact_alone),
    };
#ifdef SIDA_TEST_CUDA
    sida_backend *backend = gpu_open();
    if (!backend) return test_skip(sida_last_message());
    sida_backend_destroy(backend);
#endif
    return cmocka_run_group_tests(tests, open_rig, close_rig);
}
