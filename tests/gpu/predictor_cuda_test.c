/* The predictor on the GPU beside the same one on the host, by two threads at once, and in an
 * engine under a budget that it counts against. */
#include "tests/gpu/gpu.h"
#include "tests/predictor_rig.h"

#include "formats/tokenizer.h"
#include "runtime/model/model.h"
#include "runtime/sida.h"

#include <pthread.h>
#include <unistd.h>

#define SAMPLE_MODEL "data/sample/model"
#define SAMPLE_INPUT "data/sample/inputs/reviews-test.tsv"

/* Other kernels sum in other orders: of scores up to about 20, through two LSTM layers. */
static const float tolerance = 1e-4f, ties = 1e-4f;

enum { VOCABULARY = 500 };

typedef struct rig {
    sida_backend *backend;
    sida_buffer *embedding; /* on the device */
    uint16_t *rows;         /* bf16, on the host */
    sida_net *net;
    sida_hash_source *host, *placed;
} rig;

static rig open_rig(const sida_net_config *of, const sida_hash_limits *limits) {
    rig r = {.backend = gpu_open()};
    sida_stream *stream;
    sida_memory_usage before, after;
    sida_rng rng = sida_rng_seed(9);
    size_t count = (size_t)VOCABULARY * (size_t)of->d_model, bytes = count * sizeof *r.rows;
    assert_non_null(r.backend);
    r.rows = malloc(bytes);
    assert_non_null(r.rows);
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        float value = sida_rng_normal(&rng);
        memcpy(&bits, &value, sizeof bits);
        r.rows[i] = (uint16_t)(bits >> 16);
    }
    OK(sida_buffer_create(r.backend, &r.embedding, SIDA_MEMORY_DEVICE, bytes, "an embedding"));
    OK(sida_stream_create(r.backend, &stream, SIDA_STREAM_COMPUTE));
    OK(sida_copy(stream, r.embedding->data, r.rows, bytes));
    OK(sida_stream_synchronize(stream));
    sida_stream_destroy(stream);
    OK(sida_net_create(&r.net, of));
    rig_parameters(r.net, 2);
    const sida_weight host = {r.rows, SIDA_BF16, VOCABULARY, of->d_model};
    const sida_weight device = {r.embedding->data, SIDA_BF16, VOCABULARY, of->d_model};
    sida_hash_source **sources[2] = {&r.host, &r.placed};
    for (int i = 0; i < 2; i++)
        OK(sida_lstm_source_create(sources[i], r.net, host, (sida_fingerprint){1, 2},
                                   (sida_fingerprint){3, 4}));
    sida_backend_memory(r.backend, &before);
    OK(sida_hash_source_place(r.placed, r.backend, device, limits));
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
    free(r->rows);
}

/* A whole batch, its tables one behind the other. */
static void run_all(const rig *r, const rig_batch *batch, sida_hash_table tables[RIG_STEPS + 1]) {
    sida_hash_state *state;
    OK(sida_hash_state_create(r->placed, &state));
    for (int call = 0; call <= RIG_STEPS; call++)
        rig_run(r->placed, state, batch, call, batch->k, &tables[call]);
    sida_hash_state_destroy(r->placed, state);
}

static void compare_in(sida_dtype weights, const sida_net_config *of, int32_t sequences,
                       int32_t longest, int32_t k) {
    sida_hash_limits limits = rig_limits(2, sequences, longest, k);
    bool narrow = weights == SIDA_BF16;
    limits.weights = weights;
    rig r = open_rig(of, &limits);
    sida_hash_table first[RIG_STEPS + 1] = {0}, again[RIG_STEPS + 1] = {0};
    int64_t rows = 0, swapped = 0;
    for (uint64_t seed = 0; seed < (uint64_t)gpu_cases(3, 1); seed++) {
        rig_batch batch = rig_make(sequences, longest, VOCABULARY, k, seed);
        rig_expect(&batch, r.host);
        run_all(&r, &batch, first);
        run_all(&r, &batch, again);
        for (int call = 0; call <= RIG_STEPS; call++) {
            size_t count = (size_t)(first[call].tokens * first[call].layers * k);
            swapped += rig_compare(&batch, call, &first[call], narrow ? 0.1f : tolerance,
                                   narrow ? 0.5f : ties);
            rows += first[call].tokens * first[call].layers;
            assert_int_equal(again[call].tokens, first[call].tokens);
            assert_memory_equal(again[call].experts, first[call].experts,
                                count * sizeof *first[call].experts);
            assert_memory_equal(again[call].alpha, first[call].alpha,
                                count * sizeof *first[call].alpha);
        }
        rig_free(&batch);
    }
    printf("%s %s, d_model %d, E %d, %d sequences of up to %d, k %d: %lld rows, %lld experts in "
           "another order\n",
           sida_net_kind_name(of->kind), sida_dtype_name(weights), of->d_model, of->experts,
           sequences, longest, k, (long long)rows, (long long)swapped);
    /* Where most were ties the comparison would say nothing. */
    assert_true(swapped * (narrow ? 10 : 50) <= rows);
    for (int call = 0; call <= RIG_STEPS; call++) {
        sida_hash_table_free(&first[call]);
        sida_hash_table_free(&again[call]);
    }
    close_rig(&r);
}

static void compare(const sida_net_config *of, int32_t sequences, int32_t longest, int32_t k) {
    compare_in(SIDA_F32, of, sequences, longest, k);
}

static sida_net_config config_of(int32_t d_model, int32_t hidden, int32_t experts) {
    return (sida_net_config){.d_model = d_model,
                             .hidden = hidden,
                             .lstm_layers = 2,
                             .experts = experts,
                             .vocabulary = VOCABULARY,
                             .layers = {6, 6}};
}

static void test_published(void **state) {
    (void)state;
    const sida_net_config of = config_of(768, 256, 128);
    compare(&of, 1, 25, 1);
    compare(&of, 5, gpu_cases(60, 20), 3);
    if (gpu_small()) return;
    compare(&of, 1, 300, 3);
    compare(&of, 33, 40, 3);
}

static void test_odd(void **state) {
    (void)state;
    sida_net_config of = config_of(50, 19, 10);
    compare(&of, 7, 23, 3);
    if (gpu_small()) return; /* test_options has the wide ones */
    compare(&of, 1, 1, 10);
    of = config_of(96, 64, 256);
    of.lstm_layers = 1;
    compare(&of, 4, 30, 2);
    of.layers[0] = 0;
    compare(&of, 4, 30, 2);
    of.layers[0] = 3;
    of.layers[1] = 0;
    compare(&of, 4, 30, 2);
    of = config_of(960, 320, 64); /* wider than the recurrence keeps in registers */
    compare(&of, 3, 30, 3);
}

/* Two directions and the other attentions. */
static void test_options(void **state) {
    (void)state;
    for (int attention = SIDA_NET_SPARSEMAX; attention <= SIDA_NET_NO_ATTENTION; attention++) {
        sida_net_config of = config_of(768, 256, 128);
        of.attention = (sida_net_attention)attention;
        of.bidirectional = true;
        compare(&of, 5, gpu_cases(60, 10), 3);
        of = config_of(50, 38, 10); /* 19 units a direction */
        of.attention = (sida_net_attention)attention;
        of.bidirectional = true;
        compare(&of, 7, gpu_cases(23, 9), 3);
        if (gpu_small()) continue;
        of.layers[1] = 0;
        compare(&of, 7, 23, 3);
    }
    sida_net_config of = config_of(960, 640, 64); /* wider than the recurrence keeps in registers */
    of.bidirectional = true;
    of.attention = SIDA_NET_SOFTMAX;
    compare(&of, 3, gpu_cases(30, 6), 3);
}

static sida_net_config transformer_of(int32_t d_model, int32_t hidden, int32_t experts) {
    return (sida_net_config){.kind = SIDA_NET_TRANSFORMER,
                             .d_model = d_model,
                             .hidden = hidden,
                             .blocks = 3,
                             .experts = experts,
                             .vocabulary = VOCABULARY,
                             .layers = {6, 6}};
}

/* Rows of every kind of product: normalised on the way, on tensor cores, the libraries'. In bf16
 * the scores differ by what rounding does, so only the best experts are counted. */
static void test_transformer(void **state) {
    (void)state;
    for (int i = 0; i < 2; i++) {
        sida_dtype weights = i == 0 ? SIDA_F32 : SIDA_BF16;
        int32_t k = i == 0 ? 3 : 1;
        sida_net_config of = transformer_of(768, 256, 128);
        compare_in(weights, &of, 1, 7, k);
        compare_in(weights, &of, 1, 25, k);
        compare_in(weights, &of, 5, 60, k);
        if (gpu_small()) continue;
        compare_in(weights, &of, 1, 300, k);
        compare_in(weights, &of, 33, 40, k);
        of.layers[0] = 0; /* no cross-attention */
        compare_in(weights, &of, 4, 30, k);
        of.layers[0] = 3;
        of.layers[1] = 0;
        compare_in(weights, &of, 4, 30, k);
        of = transformer_of(50, 32, 10);
        compare_in(weights, &of, 7, 23, k);
        compare_in(weights, &of, 1, 1, k);
        of.blocks = 1;
        compare_in(weights, &of, 24, 500, k); /* more tokens than are in memory at once */
    }
}

static const sida_backend_table *unwatched;
static int replays;

static sida_status count_launch(sida_graph *graph, sida_stream *stream) {
    replays++;
    return unwatched->graph_launch(graph, stream);
}

/* Other ids, and the sequences' lengths the other way round: the shape stays. */
static void turn(rig_batch *batch) {
    for (int call = 0; call <= RIG_STEPS; call++) {
        int64_t *offsets = batch->offsets[call], total = offsets[batch->sequences];
        for (int32_t low = 0, high = batch->sequences; low <= high; low++, high--) {
            int64_t first = offsets[low];
            offsets[low] = total - offsets[high];
            offsets[high] = total - first;
        }
        for (int64_t i = 0; i < total; i++)
            batch->ids[call][i] = (batch->ids[call][i] + 101) % VOCABULARY;
    }
}

/* A Transformer's calls are recorded when their shape comes back. */
static void test_replayed(void **state) {
    (void)state;
    const sida_net_config of = transformer_of(192, 64, 32);
    const sida_hash_limits limits = rig_limits(1, 5, 40, 3);
    rig r = open_rig(&of, &limits);
    rig_batch batch = rig_make(5, 40, VOCABULARY, 3, 4);
    sida_hash_table tables[RIG_STEPS + 1] = {0};
    unwatched = r.backend->table;
    sida_backend_table watched = *unwatched;
    watched.graph_launch = count_launch;
    r.backend->table = &watched;
    int calls = 0;
    for (int call = 0; call <= RIG_STEPS; call++) calls += batch.offsets[call][batch.sequences] > 0;
    assert_true(calls >= 3);
    for (int round = 0; round < gpu_cases(5, 3); round++) {
        replays = 0;
        rig_expect(&batch, r.host);
        run_all(&r, &batch, tables);
        for (int call = 0; call <= RIG_STEPS; call++)
            rig_compare(&batch, call, &tables[call], tolerance, ties);
        if (round > 0) assert_int_equal(replays, calls);
        turn(&batch);
    }
    r.backend->table = unwatched;
    for (int call = 0; call <= RIG_STEPS; call++) sida_hash_table_free(&tables[call]);
    rig_free(&batch);
    close_rig(&r);
}

/* More tokens than the embeddings and scores that are in memory at once. */
static void test_many(void **state) {
    (void)state;
    const sida_net_config of = config_of(96, 64, 16);
    if (gpu_small()) skip(); /* the same kernels more often */
    compare(&of, 24, 500, 2);
}

static void by_two(const sida_net_config *of) {
    const sida_hash_limits limits = rig_limits(2, 9, 40, 3);
    rig r = open_rig(of, &limits);
    rig_batch batches[2];
    rig_worker workers[2];
    pthread_t thread;
    for (int i = 0; i < 2; i++) {
        batches[i] = rig_make(9, 40, VOCABULARY, 3, 20 + (uint64_t)i);
        rig_expect(&batches[i], r.host);
        workers[i] = (rig_worker){r.placed, &batches[i], tolerance, ties, gpu_cases(100, 2)};
    }
    assert_int_equal(pthread_create(&thread, NULL, rig_work, &workers[1]), 0);
    rig_work(&workers[0]);
    pthread_join(thread, NULL);
    for (int i = 0; i < 2; i++) rig_free(&batches[i]);
    close_rig(&r);
}

static void test_two_threads(void **state) {
    (void)state;
    const sida_net_config lstm = config_of(192, 64, 32), transformer = transformer_of(192, 64, 32);
    by_two(&lstm);
    by_two(&transformer);
}

static void test_not_finite(void **state) {
    (void)state;
    const sida_net_config of = config_of(96, 64, 16);
    const sida_hash_limits limits = rig_limits(1, 1, 3, 2);
    rig r = open_rig(&of, &limits);
    const int64_t offsets[2] = {0, 3};
    const int32_t ids[3] = {1, 2, 3};
    sida_hash_state *own;
    sida_hash_table table = {0};
    sida_hash_source *source;
    for (int64_t i = 0; i < r.net->trunks[0].heads.rows * r.net->trunks[0].heads.cols; i++)
        r.net->trunks[0].heads.weight[i] = 3e38f;
    OK(sida_lstm_source_create(&source, r.net,
                               (sida_weight){r.rows, SIDA_BF16, VOCABULARY, of.d_model},
                               (sida_fingerprint){1, 2}, (sida_fingerprint){3, 4}));
    OK(sida_hash_source_place(source, r.backend,
                              (sida_weight){r.embedding->data, SIDA_BF16, VOCABULARY, of.d_model},
                              &limits));
    OK(sida_hash_state_create(source, &own));
    assert_int_equal(sida_hash_encode(source, own, &(sida_ragged){1, offsets, ids}, 1, &table),
                     SIDA_ERROR_FORMAT);
    assert_non_null(strstr(sida_last_message(), "not finite"));
    sida_hash_table_free(&table);
    sida_hash_state_destroy(source, own);
    sida_hash_source_destroy(source);
    close_rig(&r);
}

/* --- in an engine */

static char path[40];

/* A predictor of the sample that was never trained: what it says is no matter here. */
static void write_predictor(sida_net_kind kind) {
    sida_backend *backend;
    sida_model *model;
    sida_tokenizer *tokenizer;
    sida_net *net;
    sida_h5_file *file;
    bool lstm = kind == SIDA_NET_LSTM;
    snprintf(path, sizeof path, "/tmp/sida-predictor-cuda-XXXXXX");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    OK(sida_backend_create_cpu(&backend, NULL));
    OK(sida_model_open(&model, backend, SAMPLE_MODEL));
    OK(sida_tokenizer_open(&tokenizer, SAMPLE_MODEL "/spiece.model"));
    const sida_model_info *info = sida_model_get_info(model);
    const sida_net_config config = {.kind = kind,
                                    .d_model = info->d_model,
                                    .hidden = sida_net_default_hidden(info->d_model),
                                    .lstm_layers = lstm ? 2 : 0,
                                    .blocks = lstm ? 0 : 3,
                                    .experts = info->experts,
                                    .vocabulary = info->vocabulary,
                                    .layers = {info->moe_layers[0], info->moe_layers[1]}};
    OK(sida_net_create(&net, &config));
    sida_net_initialise(net, 3);
    json_t *root = json_object();
    json_object_set_new(root, "net", sida_net_config_to_json(&config));
    char source[16];
    snprintf(source, sizeof source, "%s", sida_net_kind_name(kind));
    const sida_predictor_meta meta = {info->fingerprint, sida_tokenizer_fingerprint(tokenizer),
                                      source, root};
    OK(sida_predictor_file_create(&file, path, SIDA_H5_PREDICTOR, &meta));
    OK(sida_net_write(file, net));
    OK(sida_h5_commit(file));
    json_decref(root);
    sida_net_destroy(net);
    sida_tokenizer_destroy(tokenizer);
    sida_model_destroy(model);
    sida_backend_destroy(backend);
}

static void run(const char *routing, const char *budget, bool predict, sida_engine_facts *facts,
                sida_report *report) {
    sida_engine *engine;
    sida_engine_options options = SIDA_ENGINE_OPTIONS_INIT;
    sida_job job = SIDA_JOB_INIT;
    options.model = SAMPLE_MODEL;
    options.predictor = predict ? path : NULL;
    options.device = "cuda";
    options.budget = budget;
    options.routing = routing;
    options.batch = 4;
    options.queue = 3;
    options.max_tokens = gpu_cases(128, 24);
    options.truncate = true;
    options.max_new_tokens = gpu_cases(4, 2);
    job.format = "sst2";
    job.input = SAMPLE_INPUT;
    job.limit = gpu_cases(48, 4);
    job.digest = true;
    OK(sida_engine_open(&engine, &options));
    sida_engine_get_facts(engine, facts);
    OK(sida_engine_run(engine, &job, report));
    sida_engine_close(engine);
}

static void in_engine(sida_net_kind kind) {
    static const char *const routings[] = {"exact", "guided", "predicted"};
    sida_engine_facts facts, without;
    sida_report all, report, again;
    char budget[32];
    write_predictor(kind);
    run("exact", "100%", false, &without, &all);
    assert_int_equal(without.predictor_bytes, 0);
    for (int i = 0; i < 3; i += gpu_step(2)) {
        run(routings[i], "20%", true, &facts, &report);
        run(routings[i], "20%", true, &facts, &again);
        assert_true(facts.predictor_bytes > 0);
        assert_false(facts.resident);
        assert_string_equal(report.digest, again.digest);
        assert_true(report.prefetch_loads > 0);
        if (i == 0) assert_string_equal(report.digest, all.digest);
    }
    if (gpu_small()) {
        unlink(path);
        return;
    }
    /* The same size has room for fewer experts beside a predictor. */
    uint64_t bytes = facts.dense_bytes + facts.workspace_bytes + facts.predictor_bytes +
                     facts.driver_bytes + ((uint64_t)5 << 20); /* less than half of the experts */
    snprintf(budget, sizeof budget, "%llu", (unsigned long long)bytes);
    run("exact", budget, true, &facts, &report);
    run("exact", budget, false, &without, &again);
    assert_true(facts.slots < without.slots);
    assert_true(facts.dense_bytes + facts.workspace_bytes + facts.predictor_bytes +
                    facts.driver_bytes + (uint64_t)facts.slots * facts.slot_bytes <=
                bytes);
    assert_true(report.device_bytes_peak <= bytes);
    assert_string_equal(report.digest, all.digest);
    assert_string_equal(again.digest, all.digest);
    unlink(path);
}

static void test_engine(void **state) {
    (void)state;
    if (access(SAMPLE_MODEL "/config.json", R_OK) != 0) {
        printf("skipped: no " SAMPLE_MODEL " in this tree\n");
        return;
    }
    in_engine(SIDA_NET_LSTM);
    if (!gpu_small()) in_engine(SIDA_NET_TRANSFORMER);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_published),   cmocka_unit_test(test_odd),
        cmocka_unit_test(test_options),     cmocka_unit_test(test_transformer),
        cmocka_unit_test(test_replayed),    cmocka_unit_test(test_many),
        cmocka_unit_test(test_two_threads), cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_engine),
    };
    sida_backend *backend = gpu_open();
    if (!backend) return test_skip(sida_last_message());
    sida_backend_destroy(backend);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
