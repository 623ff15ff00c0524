/* The predictor on a device: what runs through the back-end's ops says what the host's own pass
 * says. The CPU's back-end stands for the device; its memory starts as NaN. */
#include "tests/predictor_rig.h"

#include "runtime/ops/ops.h"

#include <pthread.h>

enum { VOCABULARY = 50, WIDTH = 24, EXPERTS = 10, SEQUENCES = 11, LONGEST = 23 };

static float embedding_rows[VOCABULARY * WIDTH];
static const sida_weight embedding = {embedding_rows, SIDA_F32, VOCABULARY, WIDTH};

static const sida_net_config config = {.d_model = WIDTH,
                                       .hidden = 19, /* no multiple of a vector */
                                       .lstm_layers = 2,
                                       .experts = EXPERTS,
                                       .vocabulary = VOCABULARY,
                                       .layers = {3, 2}};

static const sida_net_config transformer = {.kind = SIDA_NET_TRANSFORMER,
                                            .d_model = WIDTH,
                                            .hidden = 64,
                                            .blocks = 2,
                                            .experts = EXPERTS,
                                            .vocabulary = VOCABULARY,
                                            .layers = {3, 2}};

typedef struct rig {
    sida_backend *backend;
    sida_buffer *embedding; /* on the device */
    sida_net *net;
    sida_hash_source *host, *placed;
} rig;

static sida_weight device_embedding(const rig *r) {
    return (sida_weight){r->embedding->data, SIDA_F32, VOCABULARY, WIDTH};
}

static sida_hash_source *make_source(const sida_net *net) {
    sida_hash_source *source;
    RIG_OK(sida_lstm_source_create(&source, net, embedding, (sida_fingerprint){1, 2},
                                   (sida_fingerprint){3, 4}));
    return source;
}

static rig open_rig(const sida_net_config *of, const sida_hash_limits *limits) {
    rig r = {0};
    sida_stream *stream;
    sida_memory_usage before, after;
    RIG_OK(sida_backend_create_cpu(&r.backend, &(sida_cpu_options){.poison = true}));
    RIG_OK(sida_stream_create(r.backend, &stream, SIDA_STREAM_COMPUTE));
    RIG_OK(sida_buffer_create(r.backend, &r.embedding, SIDA_MEMORY_DEVICE, sizeof embedding_rows,
                              "an embedding"));
    RIG_OK(sida_copy(stream, r.embedding->data, embedding_rows, sizeof embedding_rows));
    RIG_OK(sida_stream_synchronize(stream));
    sida_stream_destroy(stream);
    RIG_OK(sida_net_create(&r.net, of));
    rig_parameters(r.net, 3);
    r.host = make_source(r.net);
    r.placed = make_source(r.net);
    assert_int_equal(r.placed->info.device_bytes, 0);
    if (!limits) return r;
    sida_backend_memory(r.backend, &before);
    RIG_OK(sida_hash_source_place(r.placed, r.backend, device_embedding(&r), limits));
    sida_backend_memory(r.backend, &after);
    assert_true(r.placed->info.device_bytes > r.placed->info.bytes / 2);
    assert_int_equal(after.used_bytes - before.used_bytes, r.placed->info.device_bytes);
    return r;
}

static void close_rig(rig *r) {
    sida_memory_usage usage;
    sida_hash_source_destroy(r->host);
    sida_hash_source_destroy(r->placed);
    sida_backend_memory(r->backend, &usage);
    assert_int_equal(usage.used_bytes, r->embedding->bytes);
    sida_buffer_destroy(r->embedding);
    sida_backend_destroy(r->backend);
    sida_net_destroy(r->net);
}

static int setup(void **state) {
    (void)state;
    sida_rng rng = sida_rng_seed(9);
    for (int i = 0; i < VOCABULARY * WIDTH; i++) embedding_rows[i] = sida_rng_normal(&rng);
    return 0;
}

/* Two batches at a time, their calls interleaved; then two others in the same states. The products
 * are the host's, so an LSTM's experts are the same; the softmax has another exp. A Transformer's
 * queries are scaled by way of their weights, so its scores differ in their last digits; with
 * weights in bf16 by more, and then only most experts must be the same. */
static void agrees_in(sida_dtype weights, const sida_net_config *of, int32_t k, int32_t sequences,
                      int32_t longest) {
    sida_hash_limits limits = rig_limits(2, sequences, longest, k);
    bool narrow = weights == SIDA_BF16, lstm = of->kind == SIDA_NET_LSTM;
    float tolerance = narrow ? 0.05f
                      : lstm ? 1e-6f
                             : 1e-5f,
          ties = narrow ? 0.2f
                 : lstm ? 0
                        : 1e-5f;
    int64_t rows = 0, swapped = 0;
    limits.weights = weights;
    rig r = open_rig(of, &limits);
    sida_hash_state *states[2];
    sida_hash_table table = {0};
    int32_t fewer = sequences < 3 ? sequences : 3;
    for (int i = 0; i < 2; i++) RIG_OK(sida_hash_state_create(r.placed, &states[i]));
    for (uint64_t round = 0; round < 2; round++) {
        rig_batch batches[2];
        for (int i = 0; i < 2; i++) {
            /* The second is smaller: what the first left behind must not show. */
            batches[i] = rig_make(round == 1 ? fewer : sequences, longest, VOCABULARY, k,
                                  2 * round + (uint64_t)i);
            rig_expect(&batches[i], r.host);
        }
        for (int call = 0; call <= RIG_STEPS; call++)
            for (int i = 0; i < 2; i++) {
                rig_run(r.placed, states[i], &batches[i], call, k, &table);
                swapped += rig_compare(&batches[i], call, &table, tolerance, ties);
                rows += table.tokens * table.layers;
            }
        for (int i = 0; i < 2; i++) rig_free(&batches[i]);
    }
    assert_true(rows > 0);
    if (swapped * (narrow ? 20 : lstm ? INT32_MAX : 1000) > rows)
        fail_msg("%lld of %lld rows have experts in another order", (long long)swapped,
                 (long long)rows);
    for (int i = 0; i < 2; i++) sida_hash_state_destroy(r.placed, states[i]);
    sida_hash_table_free(&table);
    close_rig(&r);
}

static void agrees(const sida_net_config *of, int32_t k, int32_t sequences, int32_t longest) {
    agrees_in(SIDA_F32, of, k, sequences, longest);
}

static void both_sides(void **state) {
    (void)state;
    agrees(&config, 1, SEQUENCES, LONGEST);
    agrees(&config, 3, SEQUENCES, LONGEST);
    agrees(&config, EXPERTS, 1, LONGEST);
}

static void one_side(void **state) {
    (void)state;
    sida_net_config of = config;
    of.layers[0] = 0;
    agrees(&of, 3, SEQUENCES, LONGEST);
    of = config;
    of.layers[1] = 0;
    agrees(&of, 3, SEQUENCES, LONGEST);
}

/* Two directions and the other attentions, with and without somebody who attends. */
static void options(void **state) {
    (void)state;
    sida_net_config of = config;
    of.hidden = 22; /* 11 units a direction */
    of.bidirectional = true;
    for (int attention = SIDA_NET_SPARSEMAX; attention <= SIDA_NET_NO_ATTENTION; attention++) {
        of.attention = (sida_net_attention)attention;
        of.layers[1] = 2;
        agrees(&of, 3, SEQUENCES, LONGEST);
        of.layers[1] = 0;
        agrees(&of, 3, SEQUENCES, LONGEST);
    }
    of = config;
    of.layers[0] = 0;
    of.attention = SIDA_NET_NO_ATTENTION;
    agrees(&of, 3, SEQUENCES, LONGEST);
}

static void transformers(void **state) {
    (void)state;
    agrees(&transformer, 1, SEQUENCES, LONGEST);
    agrees(&transformer, 3, SEQUENCES, LONGEST);
    agrees(&transformer, EXPERTS, 1, LONGEST);
    agrees(&transformer, 2, 3, 200); /* beyond the furthest bucket */
    agrees_in(SIDA_BF16, &transformer, 1, SEQUENCES, LONGEST);
    sida_net_config of = transformer;
    of.blocks = SIDA_NET_BLOCKS_MAX;
    of.hidden = SIDA_NET_HEAD_WIDTH;
    agrees(&of, 3, SEQUENCES, LONGEST);
    of = transformer;
    of.layers[0] = 0; /* no cross-attention */
    agrees(&of, 3, SEQUENCES, LONGEST);
    agrees_in(SIDA_BF16, &of, 1, SEQUENCES, LONGEST);
    of = transformer;
    of.layers[1] = 0;
    agrees(&of, 3, SEQUENCES, LONGEST);
    agrees_in(SIDA_BF16, &of, 1, SEQUENCES, LONGEST);
}

/* More tokens than the embeddings and scores that are in memory at once. */
static void many_tokens(void **state) {
    (void)state;
    sida_net_config of = config;
    of.lstm_layers = 1;
    agrees(&of, 2, 24, 500);
    of = transformer;
    of.hidden = 32;
    of.blocks = 1;
    agrees(&of, 2, 24, 500);
}

static void expect_refusal(sida_status got, sida_status code, const char *words) {
    assert_int_equal(got, code);
    if (!strstr(sida_last_message(), words))
        fail_msg("'%s' does not say '%s'", sida_last_message(), words);
}

static void refusals(void **state) {
    (void)state;
    const sida_hash_limits limits = {.states = 2,
                                     .sequences = 2,
                                     .input_tokens = 4,
                                     .step_tokens = 2,
                                     .decoder_positions = 3,
                                     .k = 2};
    rig r = open_rig(&config, &limits);
    const sida_hash_source *source = r.placed;
    sida_hash_state *own, *second, *third;
    sida_hash_table table = {0};
    const int64_t zero[4] = {0, 0, 0, 0}, ones[4] = {0, 1, 2, 3}, uneven[3] = {0, 3, 5};
    const int32_t ids[5] = {1, 2, 3, 4, 5}, outside[2] = {VOCABULARY, 0}, negative[2] = {0, -1};
    const sida_ragged step = {2, ones, ids};
    RIG_OK(sida_hash_state_create(source, &own));
    RIG_OK(sida_hash_state_create(source, &second));
    expect_refusal(sida_hash_state_create(source, &third), SIDA_ERROR_ARGUMENT, "2 batches");
    assert_null(third);
    sida_hash_state_destroy(source, second);
    RIG_OK(sida_hash_state_create(source, &third));
    expect_refusal(sida_hash_decode(source, own, &step, 1, &table), SIDA_ERROR_ARGUMENT,
                   "another batch");
    expect_refusal(sida_hash_encode(source, own, &(sida_ragged){3, ones, ids}, 1, &table),
                   SIDA_ERROR_ARGUMENT, "3 sequences");
    expect_refusal(sida_hash_encode(source, own, &(sida_ragged){2, uneven, ids}, 1, &table),
                   SIDA_ERROR_ARGUMENT, "5 tokens");
    expect_refusal(sida_hash_encode(source, own, &step, 3, &table), SIDA_ERROR_ARGUMENT,
                   "3 experts");
    expect_refusal(sida_hash_encode(source, own, &(sida_ragged){2, ones, outside}, 1, &table),
                   SIDA_ERROR_FORMAT, "token id 50");
    expect_refusal(sida_hash_encode(source, own, &(sida_ragged){2, ones, negative}, 1, &table),
                   SIDA_ERROR_FORMAT, "token id -1");
    RIG_OK(sida_hash_encode(source, own, &step, 2, &table));
    /* No tokens: no rows, and the next step is still the first. */
    RIG_OK(sida_hash_decode(source, own, &(sida_ragged){2, zero, ids}, 2, &table));
    assert_int_equal(table.tokens, 0);
    expect_refusal(sida_hash_decode(source, own, &(sida_ragged){1, ones, ids}, 2, &table),
                   SIDA_ERROR_ARGUMENT, "another batch");
    for (int t = 0; t < limits.decoder_positions; t++)
        RIG_OK(sida_hash_decode(source, own, &step, 2, &table));
    expect_refusal(sida_hash_decode(source, own, &step, 2, &table), SIDA_ERROR_ARGUMENT,
                   "4 decoder tokens");
    /* A batch without a token, and one after it. */
    RIG_OK(sida_hash_encode(source, own, &(sida_ragged){2, zero, ids}, 2, &table));
    assert_int_equal(table.tokens, 0);
    RIG_OK(sida_hash_decode(source, own, &step, 2, &table));
    assert_int_equal(table.tokens, 2);
    sida_hash_state_destroy(source, own);
    sida_hash_state_destroy(source, third);
    sida_hash_table_free(&table);
    close_rig(&r);
}

/* Scores that overflow are the host's error. */
static void not_finite(void **state) {
    (void)state;
    const sida_hash_limits limits = rig_limits(1, 1, 3, 2);
    rig r = open_rig(&config, NULL);
    const sida_net_linear *heads = &r.net->trunks[0].heads;
    for (int64_t i = 0; i < heads->rows * heads->cols; i++) heads->weight[i] = 3e38f;
    RIG_OK(sida_hash_source_place(r.placed, r.backend, device_embedding(&r), &limits));
    const int64_t offsets[2] = {0, 3};
    const int32_t ids[3] = {1, 2, 3};
    char words[256];
    for (int i = 0; i < 2; i++) {
        sida_hash_source *source = i == 0 ? r.host : r.placed;
        sida_hash_state *own;
        sida_hash_table table = {0};
        RIG_OK(sida_hash_state_create(source, &own));
        assert_int_equal(sida_hash_encode(source, own, &(sida_ragged){1, offsets, ids}, 1, &table),
                         SIDA_ERROR_FORMAT);
        if (i == 0)
            snprintf(words, sizeof words, "%s", sida_last_message());
        else
            assert_string_equal(sida_last_message(), words);
        sida_hash_table_free(&table);
        sida_hash_state_destroy(source, own);
    }
    close_rig(&r);
}

/* All device memory counts against the cap: with one byte less nothing is taken, and the source is
 * as it was. */
static void capped(const sida_net_config *of) {
    const sida_hash_limits limits = rig_limits(3, SEQUENCES, LONGEST, 3);
    rig first = open_rig(of, &limits), r = open_rig(of, NULL);
    size_t bytes = first.placed->info.device_bytes, held = r.embedding->bytes;
    sida_memory_usage usage;
    RIG_OK(sida_backend_set_cap(r.backend, held + bytes - 1));
    assert_int_equal(sida_hash_source_place(r.placed, r.backend, device_embedding(&r), &limits),
                     SIDA_ERROR_BUDGET);
    sida_backend_memory(r.backend, &usage);
    assert_int_equal(usage.used_bytes, held);
    assert_int_equal(r.placed->info.device_bytes, 0);
    RIG_OK(sida_backend_set_cap(r.backend, held + bytes));
    RIG_OK(sida_hash_source_place(r.placed, r.backend, device_embedding(&r), &limits));
    close_rig(&first);
    close_rig(&r);
}

static void cap(void **state) {
    (void)state;
    capped(&config);
    capped(&transformer);
}

/* Where the device lacks an op the source goes on on the host. */
static void stays(const sida_net_config *of, const sida_ops *ops) {
    const sida_hash_limits limits = rig_limits(1, 1, 3, 2);
    rig r = open_rig(of, NULL);
    r.backend->ops = ops;
    RIG_OK(sida_hash_source_place(r.placed, r.backend, device_embedding(&r), &limits));
    assert_int_equal(r.placed->info.device_bytes, 0);
    rig_batch batch = rig_make(1, 3, VOCABULARY, 2, 30);
    rig_expect(&batch, r.placed);
    assert_true(batch.full[0].tokens > 0);
    rig_free(&batch);
    close_rig(&r);
}

static void no_ops(void **state) {
    (void)state;
    sida_ops ops = sida_ops_cpu;
    ops.lstm = NULL;
    stays(&config, &ops);
    ops = sida_ops_cpu;
    ops.attention = NULL;
    stays(&transformer, &ops);
}

/* As the pass has it: one thread ahead, one in the steps; whoever comes first. */
static void by_two(const sida_net_config *of, float tolerance, float ties) {
    const sida_hash_limits limits = rig_limits(2, SEQUENCES, LONGEST, 3);
    rig r = open_rig(of, &limits);
    rig_batch batches[2];
    rig_worker workers[2];
    pthread_t thread;
    for (int i = 0; i < 2; i++) {
        batches[i] = rig_make(SEQUENCES, LONGEST, VOCABULARY, 3, 20 + (uint64_t)i);
        rig_expect(&batches[i], r.host);
        workers[i] = (rig_worker){r.placed, &batches[i], tolerance, ties, 40};
    }
    assert_int_equal(pthread_create(&thread, NULL, rig_work, &workers[1]), 0);
    rig_work(&workers[0]);
    pthread_join(thread, NULL);
    for (int i = 0; i < 2; i++) rig_free(&batches[i]);
    close_rig(&r);
}

static void two_threads(void **state) {
    (void)state;
    by_two(&config, 1e-6f, 0);
    by_two(&transformer, 1e-5f, 1e-5f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(both_sides), cmocka_unit_test(transformers), cmocka_unit_test(one_side),
        cmocka_unit_test(options),    cmocka_unit_test(many_tokens),  cmocka_unit_test(refusals),
        cmocka_unit_test(not_finite), cmocka_unit_test(cap),          cmocka_unit_test(no_ops),
        cmocka_unit_test(two_threads)};
    return cmocka_run_group_tests(tests, setup, NULL);
}
