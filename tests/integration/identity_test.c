/* Identity: exact routing gives the all-resident run's logits, byte for byte, whatever the budget,
 * policy, queue, prefetching and timing, and however bad the predictions. Tolerance: none. */
#include "runtime/engine/budget.h"
#include "runtime/predictor/sources.h"
#include "tests/integration/identity_rig.h"
#include "tests/test.h"

#include <string.h>
#include <unistd.h>

enum { sequences = 19 };

static const char *const policies[] = {"fifo", "lru", "lookahead"};
static const char *const budgets[] = {"2-experts", "3-experts", "10%", "50%", "100%"};

static void assert_digest(sida_fingerprint a, sida_fingerprint b, const char *what) {
    char texts[2][SIDA_FINGERPRINT_TEXT];
    sida_fingerprint_format(texts[0], a);
    sida_fingerprint_format(texts[1], b);
    if (strcmp(texts[0], texts[1]) != 0) fail_msg("%s: %s, not %s", what, texts[0], texts[1]);
}

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

/* What must hold of any finished pass. */
static void check_counts(const rig *r, const sida_pass_stats *stats, const reference *ref,
                         int32_t slots) {
    const sida_store_stats *store = &stats->store;
    assert_int_equal(store->hits + store->late_prefetches + store->demand_loads, ref->needs);
    assert_int_equal(store->bytes_moved, (store->demand_loads + store->prefetch_loads) *
                                             (int64_t)r->info->expert_bytes);
    assert_true(store->demand_loads + store->prefetch_loads >= ref->distinct);
    assert_true(store->peak_resident <= slots);
    assert_int_equal(stats->sequences, r->sequences);
    assert_int_equal(stats->input_tokens, r->offsets[r->sequences]);
    assert_int_equal(stats->generated_tokens, ref->logits);
}

static void test_exact_grid(void **state) {
    rig *r = *state;
    unsigned seed = 1;
    for (int32_t batch = 1; batch <= 16; batch += 15) {
        reference ref;
        rig_reference(r, &ref, SIDA_ROUTING_EXACT, 2, batch);
        assert_true(ref.finite && ref.logits > sequences && ref.distinct > 20);
        for (int b = 0; b < 5; b++)
            for (int p = 0; p < 3; p++)
                for (int32_t queue = 1; queue <= 3; queue += 2)
                    for (int prefetch = 0; prefetch < 2; prefetch++) {
                        int32_t slots = slots_of(r, budgets[b]);
                        char what[80];
                        snprintf(what, sizeof what, "%s %s queue %d prefetch %d batch %d",
                                 budgets[b], policies[p], queue, prefetch, batch);
                        sida_pass_stats stats;
                        rig_assert_ok(rig_pass(r, &stats,
                                               (sida_pass_options){
                                                   .source = &r->source,
                                                   .top_k = 2,
                                                   .slots = slots,
                                                   .queue = queue,
                                                   .prefetch = prefetch,
                                                   .policy = sida_policy_find(policies[p]),
                                               },
                                               batch, seed++));
                        assert_digest(stats.digest, ref.digest, what);
                        check_counts(r, &stats, &ref, slots);
                        if (!prefetch) assert_int_equal(stats.store.prefetch_loads, 0);
                        if (b == 4 && !prefetch)
                            assert_int_equal(stats.store.demand_loads, ref.distinct);
                        /* Two slots: a layer loads all it needs but two at least. */
                        if (b == 0) assert_true(stats.store.demand_loads >= ref.needs / 4);
                        sida_pass_stats_free(&stats);
                    }
        reference_free(&ref);
    }
}

/* Without a predictor: demand loading only. */
static void test_exact_alone(void **state) {
    rig *r = *state;
    reference ref;
    rig_reference(r, &ref, SIDA_ROUTING_EXACT, 2, 5);
    for (int32_t slots = 2; slots < 40; slots += 9) {
        sida_pass_stats stats;
        rig_assert_ok(rig_pass(
            r, &stats,
            (sida_pass_options){
                .slots = slots, .queue = 2, .prefetch = true, .policy = sida_policy_find("lru")},
            5, (unsigned)slots));
        assert_digest(stats.digest, ref.digest, "without a predictor");
        check_counts(r, &stats, &ref, slots);
        assert_int_equal(stats.store.prefetch_loads, 0);
        sida_pass_stats_free(&stats);
    }
    reference_free(&ref);
}

/* One bit of one expert's host bytes: the digest follows it, whichever way the expert gets to the
 * device, and does not care about experts that nobody uses. */
static void test_flipped_bit(void **state) {
    rig *r = *state;
    reference before, after;
    rig_reference(r, &before, SIDA_ROUTING_EXACT, 2, 16);
    int32_t all = r->info->sites * r->info->experts, changed = 0;
    for (int32_t e = 0; e < all; e++) {
        /* The highest bit of a mantissa in the last row of wo; another weight where the hidden unit
         * in front of it never fires. */
        uint8_t *end = (uint8_t *)(uintptr_t)sida_model_expert(r->model, e) + r->info->expert_bytes;
        bool same = true;
        for (int32_t tries = 1; same && tries <= (before.used[e] ? 6 : 1); tries++) {
            uint8_t *byte = end - 4 * tries + 2;
            *byte ^= 0x40;
            rig_reference(r, &after, SIDA_ROUTING_EXACT, 2, 16);
            same = sida_fingerprint_equal(before.digest, after.digest);
            sida_pass_stats stats;
            rig_assert_ok(rig_pass(r, &stats,
                                   (sida_pass_options){.source = &r->source,
                                                       .top_k = 2,
                                                       .slots = e % 2 ? 2 : all,
                                                       .queue = 2,
                                                       .prefetch = true,
                                                       .policy = sida_policy_find("lookahead")},
                                   16, 5));
            assert_digest(stats.digest, after.digest, "with a flipped bit");
            *byte ^= 0x40;
            sida_pass_stats_free(&stats);
            reference_free(&after);
        }
        if (!before.used[e]) assert_true(same);
        changed += !same;
    }
    /* Capacity and small inputs leave a few without any weight on the answer. */
    assert_true(changed >= before.distinct * 3 / 4);
    reference_free(&before);
}

static sida_status scribble(void *context, const sida_pass_batch *batch) {
    rig *r = context;
    if (batch->batch->index > 0) return SIDA_OK;
    for (int32_t e = 0; e < r->info->sites * r->info->experts; e++)
        memset((void *)(uintptr_t)sida_model_expert(r->model, e), 0xff, r->info->expert_bytes);
    return SIDA_OK;
}

/* Nothing computes from the host's copy: once everything is loaded, the host's experts turn to NaN
 * and the same batch comes again. */
static void test_host_slab(void **state) {
    rig r;
    rig_open(&r, ((rig *)*state)->folder, 16, 0);
    rig_repeat(&r);
    reference ref;
    rig_reference(&r, &ref, SIDA_ROUTING_EXACT, 2, 16);
    sida_pass_stats stats;
    rig_assert_ok(rig_pass(&r, &stats,
                           (sida_pass_options){.slots = r.info->sites * r.info->experts,
                                               .queue = 1,
                                               .policy = sida_policy_find("lru"),
                                               .on_batch = scribble,
                                               .on_batch_context = &r},
                           16, 1));
    assert_int_equal(stats.batches, 2);
    assert_int_equal(stats.store.demand_loads, ref.distinct);
    assert_digest(stats.digest, ref.digest, "with NaN in the host's experts");
    sida_pass_stats_free(&stats);
    reference_free(&ref);
    rig_close(&r);
}

/* guided and predicted: the reference's own idea of A gives the same bytes; a sequence alone and in
 * a batch too; and the budget changes nothing. */
static void test_lossy(void **state) {
    rig *r = *state;
    unsigned seed = 100;
    sida_fingerprint digests[3];
    for (int routing = SIDA_ROUTING_EXACT; routing <= SIDA_ROUTING_PREDICTED; routing++) {
        reference ref;
        rig_reference(r, &ref, (sida_routing)routing, 2, 1);
        digests[routing] = ref.digest;
        for (int32_t batch = 1; batch <= 16; batch += 5)
            for (int b = 0; b < 5; b += 2) {
                sida_pass_stats stats;
                int32_t slots = slots_of(r, budgets[b]);
                rig_assert_ok(rig_pass(r, &stats,
                                       (sida_pass_options){
                                           .source = &r->source,
                                           .routing = (sida_routing)routing,
                                           .top_k = 2,
                                           .slots = slots,
                                           .queue = 1 + b,
                                           .prefetch = b != 2,
                                           .policy = sida_policy_find(policies[b % 3]),
                                       },
                                       batch, seed++));
                assert_digest(stats.digest, ref.digest, sida_routing_name((sida_routing)routing));
                if (routing == SIDA_ROUTING_GUIDED)
                    for (int side = 0; side < 2; side++)
                        assert_true(stats.allowed_share[side] >= 0.2 &&
                                    stats.allowed_share[side] < 1);
                sida_pass_stats_free(&stats);
            }
        reference_free(&ref);
    }
    assert_false(sida_fingerprint_equal(digests[0], digests[1]));
    assert_false(sida_fingerprint_equal(digests[0], digests[2]));
    assert_false(sida_fingerprint_equal(digests[1], digests[2]));
}

/* Without a store: the same bytes, nothing loaded, and in exact routing nothing predicted. */
static void test_resident(void **state) {
    rig *r = *state;
    sida_resident *resident;
    rig_assert_ok(sida_resident_create(&resident, r->model));
    for (int routing = SIDA_ROUTING_EXACT; routing <= SIDA_ROUTING_PREDICTED; routing++) {
        reference ref;
        rig_reference(r, &ref, (sida_routing)routing, 2, 4);
        for (int32_t batch = 1; batch <= 16; batch += 5) {
            sida_pass_stats stats;
            rig_assert_ok(rig_pass(r, &stats,
                                   (sida_pass_options){.resident = resident,
                                                       .source = &r->source,
                                                       .routing = (sida_routing)routing,
                                                       .top_k = 2,
                                                       .queue = 2},
                                   batch, (unsigned)batch));
            assert_digest(stats.digest, ref.digest, sida_routing_name((sida_routing)routing));
            assert_int_equal(stats.generated_tokens, ref.logits);
            assert_int_equal(stats.store.bytes_moved, 0);
            assert_int_equal(stats.store.resident, r->info->sites * r->info->experts);
            if (routing == SIDA_ROUTING_EXACT) assert_int_equal(r->tables, 0);
            sida_pass_stats_free(&stats);
        }
        reference_free(&ref);
    }
    sida_pass_stats stats;
    r->fail_at = 3;
    assert_int_equal(
        rig_pass(r, &stats, (sida_pass_options){.resident = resident, .queue = 1}, 1, 1),
        SIDA_ERROR_IO);
    r->fail_at = -1;
    sida_pass_stats_free(&stats);
    sida_resident_destroy(resident);
}

/* With every expert predicted, guided is exact. */
static void test_guided_by_all(void **state) {
    rig *r = *state;
    reference ref;
    rig_reference(r, &ref, SIDA_ROUTING_EXACT, 2, 4);
    sida_pass_stats stats;
    rig_assert_ok(rig_pass(r, &stats,
                           (sida_pass_options){.source = &r->source,
                                               .routing = SIDA_ROUTING_GUIDED,
                                               .top_k = r->info->experts,
                                               .slots = 5,
                                               .queue = 2,
                                               .prefetch = true,
                                               .policy = sida_policy_find("lookahead")},
                           4, 3));
    assert_digest(stats.digest, ref.digest, "guided by all experts");
    sida_pass_stats_free(&stats);
    reference_free(&ref);
}

/* Limited sets: whatever the budget, the queue and the batch, the same bytes, which are others than
 * those of sets without a limit; a limit of all experts is none. */
static void test_limited(void **state) {
    rig *r = *state;
    reference ref;
    rig_reference(r, &ref, SIDA_ROUTING_GUIDED, 2, 1);
    sida_fingerprint first = {0};
    for (int limit = 0; limit < 2; limit++)
        for (int32_t batch = 1; batch <= 16; batch += 5)
            for (int b = 0; b < 5; b += 2) {
                sida_pass_stats stats;
                int32_t most = limit ? 3 : r->info->experts;
                rig_assert_ok(rig_pass(r, &stats,
                                       (sida_pass_options){
                                           .source = &r->source,
                                           .routing = SIDA_ROUTING_GUIDED,
                                           .top_k = 2,
                                           .most_allowed = most,
                                           .slots = slots_of(r, budgets[b]),
                                           .queue = 1 + b,
                                           .prefetch = b != 2,
                                           .policy = sida_policy_find(policies[b % 3]),
                                       },
                                       batch, (unsigned)(batch + b)));
                if (limit && batch == 1 && b == 0) first = stats.digest;
                assert_digest(stats.digest, limit ? first : ref.digest, "limited sets");
                for (int side = 0; side < 2; side++)
                    for (int32_t layer = 0; layer < stats.layers[side]; layer++) {
                        double share = stats.layer_share[side][layer];
                        assert_true(share >= 0.2 && share <= (limit ? 0.3 : 0.99) + 1e-12);
                    }
                assert_int_equal(stats.layers[SIDA_DECODER], r->info->moe_layers[SIDA_DECODER]);
                sida_pass_stats_free(&stats);
            }
    assert_false(sida_fingerprint_equal(first, ref.digest));
    reference_free(&ref);
}

/* Tables that take their time: the inference thread is seen to wait for them, and not for the first
 * ones; and what they take is counted. */
static void test_slow_tables(void **state) {
    rig *r = *state;
    enum { DELAY_MS = 30 };
    for (int slow = 0; slow < 2; slow++) {
        sida_pass_stats stats;
        r->table_delay_ms = slow ? DELAY_MS : 0;
        rig_assert_ok(rig_pass(r, &stats,
                               (sida_pass_options){.source = &r->source,
                                                   .top_k = 2,
                                                   .slots = r->info->experts,
                                                   .queue = 1,
                                                   .prefetch = true,
                                                   .policy = sida_policy_find("lookahead")},
                               8, 0));
        int64_t batches = stats.batches;
        assert_true(batches >= 3);
        assert_true(stats.hash_seconds > 0 && stats.batch_seconds > 0);
        assert_true(stats.table_wait_seconds <= stats.after_first_seconds);
        assert_true(stats.after_first_seconds <= stats.seconds);
        assert_true(stats.batch_seconds <= stats.after_first_seconds);
        assert_true(stats.table_wait_seconds <= stats.inference_wait_seconds);
        if (slow) {
            double all = (double)batches * DELAY_MS / 1e3;
            assert_true(stats.hash_seconds >= all);
            /* All but the first delay, less what the batches in between took; half of it, since a
             * busy machine may keep the thread that would wait from running. */
            assert_true(stats.table_wait_seconds >=
                        (all - DELAY_MS / 1e3 - stats.batch_seconds) / 2);
            assert_true(stats.inference_wait_seconds - stats.store.wait_seconds >=
                        stats.table_wait_seconds);
        }
        sida_pass_stats_free(&stats);
    }
    r->table_delay_ms = 0;
}

static sida_status refuse(void *context, const sida_pass_batch *batch) {
    if (++*(int *)context < 3) return SIDA_OK;
    return sida_fail(SIDA_ERROR_CANCELLED, "enough after batch %d", (int)batch->batch->index);
}

/* An error on either side ends both, with its code and its words, and leaves nothing behind. */
static void test_errors(void **state) {
    rig *r = *state;
    const sida_pass_options options = {.source = &r->source,
                                       .top_k = 2,
                                       .slots = 3,
                                       .queue = 1,
                                       .prefetch = true,
                                       .policy = sida_policy_find("lookahead")};
    sida_pass_stats stats;
    for (unsigned seed = 0; seed < 6; seed++) {
        r->fail_at = 4;
        assert_int_equal(rig_pass(r, &stats, options, 1, seed), SIDA_ERROR_IO);
        assert_string_equal(sida_last_message(), "the test's corpus broke");
        sida_pass_stats_free(&stats);
        r->fail_at = -1;
        r->fail_tables_at = 3;
        assert_int_equal(rig_pass(r, &stats, options, 1, seed), SIDA_ERROR_FORMAT);
        assert_string_equal(sida_last_message(), "the dice fell off");
        sida_pass_stats_free(&stats);
        r->fail_tables_at = -1;
        sida_pass_options refused = options;
        int calls = 0;
        refused.on_batch = refuse;
        refused.on_batch_context = &calls;
        assert_int_equal(rig_pass(r, &stats, refused, 1, seed), SIDA_ERROR_CANCELLED);
        assert_string_equal(sida_last_message(), "enough after batch 2");
        assert_int_equal(calls, 3);
        sida_pass_stats_free(&stats);
    }
    /* Copy number 40 fails. */
    rig broken;
    rig_open(&broken, r->folder, 8, 40);
    assert_int_equal(rig_pass(&broken, &stats,
                              (sida_pass_options){.source = &broken.source,
                                                  .top_k = 2,
                                                  .slots = 3,
                                                  .queue = 1,
                                                  .prefetch = true,
                                                  .policy = sida_policy_find("lru")},
                              1, 1),
                     SIDA_ERROR_DEVICE);
    assert_non_null(strstr(sida_last_message(), "copy"));
    sida_pass_stats_free(&stats);
    rig_close(&broken);
    /* And after all that it still works. */
    rig_assert_ok(rig_pass(r, &stats, options, 1, 7));
    sida_pass_stats_free(&stats);
}

static void check_folder(const char *folder) {
    rig r;
    rig_open(&r, folder, 6, 0);
    for (int32_t batch = 1; batch <= 6; batch += 5) {
        reference ref;
        rig_reference(&r, &ref, SIDA_ROUTING_EXACT, 3, batch);
        assert_true(ref.finite);
        for (int b = 0; b < 5; b += 2) {
            /* A tenth of a tiny model is no slot at all. */
            int32_t slots = slots_of(&r, b == 2 ? "50%" : budgets[b]);
            sida_pass_stats stats;
            rig_assert_ok(rig_pass(&r, &stats,
                                   (sida_pass_options){.source = &r.source,
                                                       .top_k = 3,
                                                       .slots = slots,
                                                       .queue = 2,
                                                       .prefetch = true,
                                                       .policy = sida_policy_find("lookahead")},
                                   batch, 11));
            assert_digest(stats.digest, ref.digest, folder);
            check_counts(&r, &stats, &ref, slots);
            sida_pass_stats_free(&stats);
        }
        reference_free(&ref);
    }
    rig_close(&r);
}

/* A predictor on the model's device, under the threads of a pass: it says the experts that the same
 * one says on the host, so guided routing answers the same, and exact routing as ever. */
static void test_placed(void **state) {
    rig *r = *state;
    enum { queue = 2 };
    const sida_model_info *info = r->info;
    const sida_weight embedding = sida_model_embedding(r->model);
    const sida_net_config config = {.d_model = info->d_model,
                                    .hidden = 24,
                                    .lstm_layers = 2,
                                    .experts = info->experts,
                                    .vocabulary = info->vocabulary,
                                    .layers = {info->moe_layers[0], info->moe_layers[1]}};
    const sida_hash_limits limits = {.states = sida_pass_batches(queue),
                                     .sequences = rig_max_batch,
                                     .input_tokens = rig_max_batch * 24,
                                     .step_tokens = rig_max_batch,
                                     .decoder_positions = rig_max_new_tokens,
                                     .k = 3};
    sida_net *net;
    sida_hash_source *sources[2]; /* on the host, on the device */
    rig_assert_ok(sida_net_create(&net, &config));
    sida_net_initialise(net, 3);
    for (int i = 0; i < 2; i++)
        rig_assert_ok(sida_lstm_source_create(&sources[i], net, embedding, info->fingerprint,
                                              (sida_fingerprint){0}));
    rig_assert_ok(sida_hash_source_place(sources[1], r->backend, embedding, &limits));
    size_t bytes = sources[1]->info.device_bytes;
    assert_true(bytes > 0);
    r->fixed_bytes += bytes;
    unsigned seed = 500;
    for (int32_t batch = 3; batch <= 16; batch += 13) {
        reference ref;
        sida_fingerprint guided[2];
        rig_reference(r, &ref, SIDA_ROUTING_EXACT, 2, batch);
        for (int i = 0; i < 2; i++)
            for (int routing = SIDA_ROUTING_EXACT; routing <= SIDA_ROUTING_GUIDED; routing++) {
                sida_pass_stats stats;
                rig_assert_ok(rig_pass(r, &stats,
                                       (sida_pass_options){
                                           .source = sources[i],
                                           .routing = (sida_routing)routing,
                                           .top_k = 3,
                                           .slots = slots_of(r, "20%"),
                                           .queue = queue,
                                           .prefetch = true,
                                           .policy = sida_policy_find("lookahead"),
                                       },
                                       batch, seed++));
                assert_true(stats.store.prefetch_loads > 0);
                if (routing == SIDA_ROUTING_EXACT)
                    assert_digest(stats.digest, ref.digest, "a placed predictor");
                else
                    guided[i] = stats.digest;
                sida_pass_stats_free(&stats);
            }
        assert_digest(guided[1], guided[0], "guided by a placed predictor");
        assert_false(sida_fingerprint_equal(guided[0], ref.digest));
        reference_free(&ref);
    }
    r->fixed_bytes -= bytes;
    for (int i = 0; i < 2; i++) sida_hash_source_destroy(sources[i]);
    sida_net_destroy(net);
}

/* Other shapes of model: the parity tests' tiny checkpoints, and the trained sample. */
static void test_other_models(void **state) {
    (void)state;
    static const char *const folders[] = {
        "tests/parity/base",        "tests/parity/bf16-sharded", "tests/parity/dense-decoder",
        "tests/parity/every-layer", "tests/parity/gated-untied", "tests/parity/mixed-types",
        "tests/parity/overflow",    "tests/parity/wide-heads",   "data/sample/model",
    };
    int checked = 0;
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        char path[64];
        snprintf(path, sizeof path, "%s/config.json", folders[i]);
        if (access(path, R_OK) != 0) continue;
        check_folder(folders[i]);
        checked++;
    }
    if (checked == 0) skip();
}

static int open_rig(void **state) {
    rig *r = calloc(1, sizeof *r);
    rig_open(r, NULL, sequences, 0);
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
        cmocka_unit_test(test_exact_grid),    cmocka_unit_test(test_exact_alone),
        cmocka_unit_test(test_flipped_bit),   cmocka_unit_test(test_host_slab),
        cmocka_unit_test(test_lossy),         cmocka_unit_test(test_resident),
        cmocka_unit_test(test_guided_by_all), cmocka_unit_test(test_limited),
        cmocka_unit_test(test_slow_tables),   cmocka_unit_test(test_errors),
        cmocka_unit_test(test_placed),        cmocka_unit_test(test_other_models),
    };
    return cmocka_run_group_tests(tests, open_rig, close_rig);
}
