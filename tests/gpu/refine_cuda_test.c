/* Refinements on the GPU: the op, the tables beside the host's, and in an engine, where they change
 * what is loaded and nothing else. */
#include "tests/gpu/gpu.h"
#include "tests/refine_rig.h"

#include "formats/base/memory.h"
#include "formats/tokenizer.h"
#include "runtime/model/model.h"
#include "runtime/ops/ops.h"
#include "runtime/sida.h"

#include <unistd.h>

#define SAMPLE_MODEL "data/sample/model"
#define SAMPLE_INPUT "data/sample/inputs/reviews-test.tsv"

enum { VOCABULARY = 500 };

/* --- the op: sums in one order, so the CPU's bytes */

static void know_case(sida_backend *backend, sida_stream *stream, int64_t n, int64_t width,
                      int32_t k, int32_t experts) {
    sida_rng rng = sida_rng_seed((uint64_t)(n * 1000 + width));
    /* sum, z, bias, known, then the experts. */
    int64_t floats = 2 * n * width + width + experts * width, all = floats + n * k;
    float *host, *got;
    sida_buffer *device;
    OK(SIDA_ALLOC(&host, all, "a case"));
    OK(SIDA_ALLOC(&got, all, "a case"));
    for (int64_t i = 0; i < floats; i++) host[i] = sida_rng_normal(&rng);
    for (int64_t i = 0; i < n * k; i++) {
        int32_t e = (int32_t)sida_rng_below(&rng, (uint32_t)experts);
        memcpy(&host[floats + i], &e, sizeof e);
    }
    OK(sida_buffer_create(backend, &device, SIDA_MEMORY_DEVICE, (size_t)all * sizeof *host,
                          "a case"));
    OK(sida_copy(stream, device->data, host, (size_t)all * sizeof *host));
    for (int where = 0; where < 2; where++) {
        float *base = where ? device->data : host;
        const sida_know_call call = {.sum = base,
                                     .z = base + n * width,
                                     .bias = base + 2 * n * width,
                                     .known = base + 2 * n * width + width,
                                     .experts = (const int32_t *)(const void *)(base + floats),
                                     .n = n,
                                     .width = width,
                                     .k = k};
        OK(where ? sida_ops_of(backend)->know(stream, &call) : sida_know_cpu(NULL, &call));
    }
    OK(sida_copy(stream, got, device->data, (size_t)all * sizeof *host));
    OK(sida_stream_synchronize(stream));
    if (memcmp(got, host, (size_t)all * sizeof *host) != 0)
        fail_msg("%lld tokens, width %lld, k %d: other bytes than the CPU's", (long long)n,
                 (long long)width, k);
    sida_buffer_destroy(device);
    free(host);
    free(got);
}

static void test_know(void **state) {
    (void)state;
    sida_backend *backend = gpu_open();
    sida_stream *stream;
    assert_non_null(backend);
    OK(sida_stream_create(backend, &stream, SIDA_STREAM_COMPUTE));
    know_case(backend, stream, 1, 1, 1, 1);
    know_case(backend, stream, 3, 64, 1, 128);
    know_case(backend, stream, 7, 100, 8, 10);
    know_case(backend, stream, gpu_cases(5000, 50), 257, 2, 64);
    OK(sida_ops_of(backend)->know(stream, &(sida_know_call){.width = 64, .k = 1}));
    sida_stream_destroy(stream);
    sida_backend_destroy(backend);
}

/* --- tables beside the host's */

static void compare_in(sida_dtype weights, const sida_net_config *of, int32_t width,
                       int32_t sequences, int32_t longest, int32_t top_k, int32_t k) {
    const bool narrow = weights == SIDA_BF16;
    sida_hash_limits limits = rig_limits(1, sequences, longest, k > top_k ? k : top_k);
    limits.weights = weights;
    limits.refines = true;
    sida_backend *backend = gpu_open();
    sida_stream *stream;
    sida_buffer *device;
    sida_net *net;
    sida_refine *refine;
    sida_hash_source *host, *placed;
    sida_hash_state *on_host, *on_device;
    sida_memory_usage before, after;
    sida_rng rng = sida_rng_seed(9);
    const int64_t count = VOCABULARY * (int64_t)of->d_model;
    float *rows;
    assert_non_null(backend);
    OK(SIDA_ALLOC(&rows, count, "an embedding"));
    for (int64_t i = 0; i < count; i++) rows[i] = sida_rng_normal(&rng);
    OK(sida_buffer_create(backend, &device, SIDA_MEMORY_DEVICE, (size_t)count * sizeof *rows,
                          "an embedding"));
    OK(sida_stream_create(backend, &stream, SIDA_STREAM_COMPUTE));
    OK(sida_copy(stream, device->data, rows, (size_t)count * sizeof *rows));
    OK(sida_stream_synchronize(stream));
    sida_stream_destroy(stream);
    OK(sida_net_create(&net, of));
    OK(sida_refine_create(&refine, of, width));
    rig_parameters(net, 2);
    rig_refine_parameters(refine);
    sida_hash_source **sources[2] = {&host, &placed};
    for (int i = 0; i < 2; i++) {
        OK(sida_lstm_source_create(sources[i], net,
                                   (sida_weight){rows, SIDA_F32, VOCABULARY, of->d_model},
                                   (sida_fingerprint){1, 2}, (sida_fingerprint){3, 4}));
        sida_lstm_source_refine(*sources[i], refine);
    }
    sida_backend_memory(backend, &before);
    OK(sida_hash_source_place(
        placed, backend, (sida_weight){device->data, SIDA_F32, VOCABULARY, of->d_model}, &limits));
    sida_backend_memory(backend, &after);
    assert_true(placed->info.refines);
    assert_int_equal(after.used_bytes - before.used_bytes, placed->info.device_bytes);
    OK(sida_hash_state_create(host, &on_host));
    OK(sida_hash_state_create(placed, &on_device));
    int64_t compared = 0, swapped = 0;
    for (uint64_t seed = 0; seed < (uint64_t)gpu_cases(2, 1); seed++) {
        rig_batch batch = rig_make(sequences, longest, VOCABULARY, k, seed);
        compared += rig_refine_batch(host, placed, on_host, on_device, &batch, top_k,
                                     narrow ? 0.1f : 2e-4f, narrow ? 0.5f : 2e-4f, &swapped);
        rig_free(&batch);
    }
    printf("%s %s, R %d, E %d, %d sequences of up to %d, %d chosen, k %d: %lld rows, %lld experts "
           "in another order\n",
           sida_net_kind_name(of->kind), sida_dtype_name(weights), width, of->experts, sequences,
           longest, top_k, k, (long long)compared, (long long)swapped);
    assert_true(compared > 0 && swapped * (narrow ? 10 : 50) <= compared);
    sida_hash_state_destroy(host, on_host);
    sida_hash_state_destroy(placed, on_device);
    sida_hash_source_destroy(host);
    sida_hash_source_destroy(placed);
    sida_refine_destroy(refine);
    sida_net_destroy(net);
    sida_buffer_destroy(device);
    sida_backend_destroy(backend);
    free(rows);
}

static sida_net_config config_of(sida_net_kind kind, int32_t d_model, int32_t hidden,
                                 int32_t experts) {
    const bool lstm = kind == SIDA_NET_LSTM;
    return (sida_net_config){.kind = kind,
                             .d_model = d_model,
                             .hidden = hidden,
                             .lstm_layers = lstm ? 2 : 0,
                             .blocks = lstm ? 0 : 2,
                             .experts = experts,
                             .vocabulary = VOCABULARY,
                             .layers = {4, 3}};
}

static void test_tables(void **state) {
    (void)state;
    sida_net_config lstm = config_of(SIDA_NET_LSTM, 96, 64, 32);
    sida_net_config transformer = config_of(SIDA_NET_TRANSFORMER, 96, 64, 32);
    compare_in(SIDA_F32, &lstm, 64, 5, gpu_cases(60, 10), 1, 3);
    compare_in(SIDA_F32, &transformer, 64, 5, gpu_cases(60, 10), 1, 3);
    compare_in(SIDA_BF16, &transformer, 64, 5, gpu_cases(60, 10), 1, 1);
    compare_in(SIDA_F32, &transformer, 64, 1, 7, 1, 3);
    if (gpu_small()) return;
    compare_in(SIDA_BF16, &transformer, 64, 1, 7, 1, 1);
    compare_in(SIDA_BF16, &transformer, 33, 9, 60, 2, 1);  /* rows that suit no tensor core */
    compare_in(SIDA_F32, &transformer, 19, 24, 500, 2, 2); /* more than are in memory at once */
    lstm = config_of(SIDA_NET_LSTM, 50, 19, 10);
    compare_in(SIDA_F32, &lstm, 7, 7, 23, 3, 2);
    lstm = config_of(SIDA_NET_LSTM, 768, 256, 128);
    compare_in(SIDA_F32, &lstm, 128, 1, 300, 1, 3);
    transformer = config_of(SIDA_NET_TRANSFORMER, 768, 256, 128);
    compare_in(SIDA_F32, &transformer, 128, 16, 60, 1, 3);
    compare_in(SIDA_BF16, &transformer, 128, 16, 60, 1, 1);
    transformer.layers[0] = 1; /* nothing behind the encoder's only layer */
    compare_in(SIDA_F32, &transformer, 64, 3, 20, 1, 3);
}

/* --- in an engine */

static char path[40];

/* A predictor of the sample that was never trained: what it says is no matter here. */
static void write_predictor(sida_net_kind kind) {
    sida_backend *backend;
    sida_model *model;
    sida_tokenizer *tokenizer;
    sida_net *net;
    sida_refine *refine;
    sida_h5_file *file;
    snprintf(path, sizeof path, "/tmp/sida-refine-cuda-XXXXXX");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    OK(sida_backend_create_cpu(&backend, NULL));
    OK(sida_model_open(&model, backend, SAMPLE_MODEL));
    OK(sida_tokenizer_open(&tokenizer, SAMPLE_MODEL "/spiece.model"));
    const sida_model_info *info = sida_model_get_info(model);
    sida_net_config config = config_of(kind, info->d_model, 64, info->experts);
    config.vocabulary = info->vocabulary;
    config.layers[0] = info->moe_layers[0];
    config.layers[1] = info->moe_layers[1];
    OK(sida_net_create(&net, &config));
    sida_net_initialise(net, 3);
    OK(sida_refine_create(&refine, &config, 32));
    rig_refine_parameters(refine);
    json_t *root =
        json_pack("{s:o, s:{s:i}}", "net", sida_net_config_to_json(&config), "refine", "width", 32);
    char source[16];
    snprintf(source, sizeof source, "%s", sida_net_kind_name(kind));
    const sida_predictor_meta meta = {info->fingerprint, sida_tokenizer_fingerprint(tokenizer),
                                      source, root};
    OK(sida_predictor_file_create(&file, path, SIDA_H5_PREDICTOR, &meta));
    OK(sida_net_write(file, net));
    OK(sida_refine_write(file, refine));
    OK(sida_h5_commit(file));
    json_decref(root);
    sida_refine_destroy(refine);
    sida_net_destroy(net);
    sida_tokenizer_destroy(tokenizer);
    sida_model_destroy(model);
    sida_backend_destroy(backend);
}

static void run(int32_t batch, const char *budget, bool refine, sida_engine_facts *facts,
                sida_report *report) {
    sida_engine *engine;
    sida_engine_options options = SIDA_ENGINE_OPTIONS_INIT;
    sida_job job = SIDA_JOB_INIT;
    options.model = SAMPLE_MODEL;
    options.predictor = path;
    options.device = "cuda";
    options.budget = budget;
    options.batch = batch;
    options.queue = 3;
    options.no_refine = !refine;
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

/* One sequence a batch: steps of one token, whose products are no library's, beside refinements of
 * the encoder's many. */
static void in_engine(sida_net_kind kind, int32_t batch) {
    static const char *const budgets[] = {"20%", "2-experts", "60%"};
    sida_engine_facts facts, without;
    sida_report all, report, plain;
    write_predictor(kind);
    run(batch, "100%", true, &facts, &all);
    assert_int_equal(all.refinements, 0); /* nothing to load */
    for (int i = 0; i < gpu_cases(3, 1); i++) {
        run(batch, budgets[i], true, &facts, &report);
        run(batch, budgets[i], false, &without, &plain);
        assert_string_equal(report.digest, all.digest);
        assert_string_equal(plain.digest, all.digest);
        assert_true(report.refinements > 0 && report.revised_in > 0);
        assert_int_equal(plain.refinements + plain.revised_in + plain.revised_out, 0);
        assert_true(facts.predictor_bytes > without.predictor_bytes);
        printf("%s, batch %d, %s: refinements take %.3f of %.3f ms a batch\n",
               sida_net_kind_name(kind), batch, budgets[i], report.refine_ms_per_batch,
               report.inference_ms_per_batch);
    }
    unlink(path);
}

static void test_engine(void **state) {
    (void)state;
    if (access(SAMPLE_MODEL "/config.json", R_OK) != 0) {
        printf("skipped: no " SAMPLE_MODEL " in this tree\n");
        return;
    }
    in_engine(SIDA_NET_TRANSFORMER, 1);
    if (gpu_small()) return;
    in_engine(SIDA_NET_TRANSFORMER, 8);
    in_engine(SIDA_NET_LSTM, 1);
    in_engine(SIDA_NET_LSTM, 8);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_know),
        cmocka_unit_test(test_tables),
        cmocka_unit_test(test_engine),
    };
    sida_backend *backend = gpu_open();
    if (!backend) return test_skip(sida_last_message());
    sida_backend_destroy(backend);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
