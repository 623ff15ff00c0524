/* Refinements on a device say what those on the host say. The CPU's back-end stands for the device;
 * its memory starts as NaN. */
#include "runtime/ops/ops.h"
#include "tests/refine_rig.h"

enum { VOCABULARY = 50, WIDTH = 24, EXPERTS = 10, SEQUENCES = 11, LONGEST = 23 };

static float embedding_rows[VOCABULARY * WIDTH];
static const sida_weight embedding = {embedding_rows, SIDA_F32, VOCABULARY, WIDTH};

static const sida_net_config lstm = {.d_model = WIDTH,
                                     .hidden = 19, /* no multiple of a vector */
                                     .lstm_layers = 2,
                                     .experts = EXPERTS,
                                     .vocabulary = VOCABULARY,
                                     .layers = {4, 3}};

static const sida_net_config transformer = {.kind = SIDA_NET_TRANSFORMER,
                                            .d_model = WIDTH,
                                            .hidden = 64,
                                            .blocks = 2,
                                            .experts = EXPERTS,
                                            .vocabulary = VOCABULARY,
                                            .layers = {3, 4}};

typedef struct rig {
    sida_backend *backend;
    sida_net *net;
    sida_refine *refine;
    sida_hash_source *host, *placed;
} rig;

static sida_hash_source *make_source(const rig *r) {
    sida_hash_source *source;
    RIG_OK(sida_lstm_source_create(&source, r->net, embedding, (sida_fingerprint){1, 2},
                                   (sida_fingerprint){3, 4}));
    sida_lstm_source_refine(source, r->refine);
    assert_true(source->info.refines);
    return source;
}

static rig open_rig(const sida_net_config *of, int32_t width, const sida_hash_limits *limits) {
    rig r = {0};
    sida_memory_usage usage;
    RIG_OK(sida_backend_create_cpu(&r.backend, &(sida_cpu_options){.poison = true}));
    RIG_OK(sida_net_create(&r.net, of));
    RIG_OK(sida_refine_create(&r.refine, of, width));
    rig_parameters(r.net, 3);
    rig_refine_parameters(r.refine);
    r.host = make_source(&r);
    r.placed = make_source(&r);
    RIG_OK(sida_hash_source_place(r.placed, r.backend, embedding, limits));
    assert_int_equal(r.placed->info.refines, limits->refines);
    sida_backend_memory(r.backend, &usage);
    assert_int_equal(usage.used_bytes, r.placed->info.device_bytes);
    return r;
}

static void close_rig(rig *r) {
    sida_hash_source_destroy(r->host);
    sida_hash_source_destroy(r->placed);
    sida_backend_destroy(r->backend);
    sida_refine_destroy(r->refine);
    sida_net_destroy(r->net);
}

static int setup(void **state) {
    (void)state;
    sida_rng rng = sida_rng_seed(9);
    for (int i = 0; i < VOCABULARY * WIDTH; i++) embedding_rows[i] = sida_rng_normal(&rng);
    return 0;
}

/* Two batches, one behind the other, in the same states: the second is smaller. */
static void agrees_in(sida_dtype weights, const sida_net_config *of, int32_t width, int32_t top_k,
                      int32_t k, int32_t sequences, int32_t longest) {
    sida_hash_limits limits = rig_limits(1, sequences, longest, k > top_k ? k : top_k);
    const bool narrow = weights == SIDA_BF16;
    const float tolerance = narrow ? 0.06f : 1e-5f, ties = narrow ? 0.3f : 1e-4f;
    int64_t rows = 0, swapped = 0;
    limits.weights = weights;
    limits.refines = true;
    rig r = open_rig(of, width, &limits);
    sida_hash_state *on_host, *on_device;
    RIG_OK(sida_hash_state_create(r.host, &on_host));
    RIG_OK(sida_hash_state_create(r.placed, &on_device));
    for (uint64_t round = 0; round < 2; round++) {
        int32_t fewer = sequences < 3 ? sequences : 3;
        rig_batch batch = rig_make(round == 1 ? fewer : sequences, longest, VOCABULARY, k, round);
        rows += rig_refine_batch(r.host, r.placed, on_host, on_device, &batch, top_k, tolerance,
                                 ties, &swapped);
        rig_free(&batch);
    }
    assert_true(rows > 0);
    if (swapped * (narrow ? 10 : 500) > rows)
        fail_msg("%lld of %lld rows have experts in another order", (long long)swapped,
                 (long long)rows);
    sida_hash_state_destroy(r.host, on_host);
    sida_hash_state_destroy(r.placed, on_device);
    close_rig(&r);
}

static void agrees(const sida_net_config *of, int32_t width, int32_t top_k, int32_t k,
                   int32_t sequences, int32_t longest) {
    agrees_in(SIDA_F32, of, width, top_k, k, sequences, longest);
}

static void lstms(void **state) {
    (void)state;
    agrees(&lstm, 16, 1, 1, SEQUENCES, LONGEST);
    agrees(&lstm, 7, 3, 2, SEQUENCES, LONGEST);
    agrees(&lstm, 7, 1, EXPERTS, 1, LONGEST);
    sida_net_config of = lstm;
    of.attention = SIDA_NET_NO_ATTENTION;
    agrees(&of, 16, 2, 3, SEQUENCES, LONGEST);
}

static void transformers(void **state) {
    (void)state;
    agrees(&transformer, 16, 1, 1, SEQUENCES, LONGEST);
    agrees(&transformer, 33, 2, 3, SEQUENCES, LONGEST);
    agrees_in(SIDA_BF16, &transformer, 32, 1, 1, SEQUENCES, LONGEST);
}

/* A side without layers behind the first, and none at all. */
static void one_side(void **state) {
    (void)state;
    for (int32_t layers = 0; layers < 2; layers++)
        for (int side = 0; side < 2; side++) {
            sida_net_config of = side ? lstm : transformer;
            of.layers[side] = layers;
            agrees(&of, 8, 1, 2, SEQUENCES, LONGEST);
            of = side ? transformer : lstm;
            of.layers[side] = layers;
            agrees(&of, 8, 1, 2, SEQUENCES, LONGEST);
        }
}

/* More tokens than scores that are in memory at once. */
static void many_tokens(void **state) {
    (void)state;
    sida_net_config of = transformer;
    of.hidden = 32;
    of.blocks = 1;
    agrees(&of, 8, 1, 2, 24, 500);
}

static void expect_refusal(sida_status got, const char *words) {
    assert_int_equal(got, SIDA_ERROR_ARGUMENT);
    if (!strstr(sida_last_message(), words))
        fail_msg("'%s' does not say '%s'", sida_last_message(), words);
}

/* What is not asked for takes no memory. What is out of turn is refused, on either side alike. */
static void refusals(void **state) {
    (void)state;
    sida_hash_limits limits = rig_limits(1, 2, 4, 2);
    rig without = open_rig(&lstm, 16, &limits);
    limits.refines = true;
    rig r = open_rig(&lstm, 16, &limits);
    assert_true(without.placed->info.device_bytes < r.placed->info.device_bytes);
    const int64_t offsets[3] = {0, 2, 3};
    const int32_t ids[3] = {1, 2, 3}, chosen[6] = {0, 1, 2, 3, 4, 5}, wrong[3] = {0, EXPERTS, 1};
    const sida_ragged input = {2, offsets, ids};
    sida_hash_state *own;
    sida_hash_table table = {0};
    RIG_OK(sida_hash_state_create(without.placed, &own));
    RIG_OK(sida_hash_encode(without.placed, own, &input, 2, &table));
    expect_refusal(sida_hash_refine(without.placed, own, 0, 0, chosen, 1, 2, &table),
                   "without a refinement");
    sida_hash_state_destroy(without.placed, own);
    for (int i = 0; i < 2; i++) {
        const sida_hash_source *source = i ? r.placed : r.host;
        RIG_OK(sida_hash_state_create(source, &own));
        expect_refusal(sida_hash_refine(source, own, 0, 0, chosen, 1, 2, &table), "nothing");
        RIG_OK(sida_hash_encode(source, own, &input, 2, &table));
        expect_refusal(sida_hash_refine(source, own, 1, 0, chosen, 1, 2, &table), "nothing");
        expect_refusal(sida_hash_refine(source, own, 0, 1, chosen, 1, 2, &table), "layer 0 is");
        expect_refusal(sida_hash_refine(source, own, 0, 3, chosen, 1, 2, &table), "none behind");
        expect_refusal(sida_hash_refine(source, own, 0, 0, wrong, 1, 2, &table), "expert 10 of");
        if (i)
            expect_refusal(sida_hash_refine(source, own, 0, 0, chosen, 1, 3, &table), "placed for");
        RIG_OK(sida_hash_refine(source, own, 0, 0, chosen, 2, 2, &table));
        expect_refusal(sida_hash_refine(source, own, 0, 0, chosen, 1, 2, &table), "layer 1 is");
        RIG_OK(sida_hash_encode(source, own, &input, 2, &table));
        RIG_OK(sida_hash_refine(source, own, 0, 0, chosen, 1, 2, &table));
        RIG_OK(sida_hash_refine(source, own, 0, 1, chosen, 1, 2, &table));
        sida_hash_state_destroy(source, own);
    }
    sida_hash_table_free(&table);
    close_rig(&without);
    close_rig(&r);
}

/* By hand: 2 tokens of 2 experts each; NaN behind what the op may touch. */
static void know(void **state) {
    (void)state;
    const float known[3 * 3] = {1, 2, 3, 10, 20, 30, -100, 200, -300}, bias[3] = {0.5f, -1, 0};
    const int32_t experts[4] = {0, 1, 2, 2};
    float sum[6] = {0, 0, 0, 1, 1, 1}, z[7] = {9, 9, 9, 9, 9, 9, 9};
    sida_know_call call = {.sum = sum,
                           .z = z,
                           .known = known,
                           .bias = bias,
                           .experts = experts,
                           .n = 2,
                           .width = 3,
                           .k = 2};
    RIG_OK(sida_know_cpu(NULL, &call));
    const float sums[6] = {11, 22, 33, -199, 401, -599}, relu[7] = {11.5f, 21, 33, 0, 400, 0, 9};
    assert_memory_equal(sum, sums, sizeof sum);
    assert_memory_equal(z, relu, sizeof z);
    call.n = 0;
    RIG_OK(sida_know_cpu(NULL, &call));
    assert_memory_equal(sum, sums, sizeof sum);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(know),     cmocka_unit_test(lstms),    cmocka_unit_test(transformers),
        cmocka_unit_test(one_side), cmocka_unit_test(refusals), cmocka_unit_test(many_tokens),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}
