/* libsida from end to end on the bundled sample: budgets, routings and reports, with a predictor
 * of random weights (identity must hold whatever it predicts). */
#include "formats/predictor_file.h"
#include "formats/tokenizer.h"
#include "runtime/model/model.h"
#include "runtime/predictor/net.h"
#include "runtime/sida.h"
#include "tests/test.h"

#include <math.h>
#include <string.h>
#include <unistd.h>

#ifndef SAMPLE_MODEL
#define SAMPLE_MODEL "data/sample/model"
#endif
#define SAMPLE_INPUT "data/sample/inputs/reviews-test.tsv"

enum { records = 24 };

static char predictor[] = "/tmp/sida_run_XXXXXX/p.h5";
static char foreign[] = "/tmp/sida_run_XXXXXX/q.h5";

static void assert_ok(sida_status status) {
    if (status != SIDA_OK) fail_msg("%s: %s", sida_error_name(status), sida_error_message());
}

static void write_predictor(const char *path, sida_fingerprint model, sida_fingerprint tokenizer,
                            const sida_model_info *info) {
    const sida_net_config config = {.d_model = info->d_model,
                                    .hidden = 32,
                                    .lstm_layers = 2,
                                    .experts = info->experts,
                                    .vocabulary = info->vocabulary,
                                    .layers = {info->moe_layers[0], info->moe_layers[1]}};
    sida_net *net;
    sida_h5_file *file;
    assert_ok(sida_net_create(&net, &config));
    sida_net_initialise(net, 3);
    json_t *object = json_pack("{s:o}", "net", sida_net_config_to_json(&config));
    char source[] = "lstm";
    const sida_predictor_meta meta = {model, tokenizer, source, object};
    assert_ok(sida_predictor_file_create(&file, path, SIDA_H5_PREDICTOR, &meta));
    assert_ok(sida_net_write(file, net));
    assert_ok(sida_h5_commit(file));
    json_decref(object);
    sida_net_destroy(net);
}

static int set_up(void **state) {
    (void)state;
    sida_backend *backend;
    sida_model *model;
    sida_tokenizer *tokenizer;
    char folder[] = "/tmp/sida_run_XXXXXX";
    assert_non_null(mkdtemp(folder));
    memcpy(predictor, folder, strlen(folder));
    memcpy(foreign, folder, strlen(folder));
    assert_ok(sida_backend_create_cpu(&backend, NULL));
    assert_ok(sida_model_open(&model, backend, SAMPLE_MODEL));
    assert_ok(sida_tokenizer_open(&tokenizer, SAMPLE_MODEL "/spiece.model"));
    const sida_model_info *info = sida_model_get_info(model);
    sida_fingerprint other = info->fingerprint, pieces = sida_tokenizer_fingerprint(tokenizer);
    other.low ^= 1;
    write_predictor(predictor, info->fingerprint, pieces, info);
    write_predictor(foreign, other, pieces, info);
    sida_tokenizer_destroy(tokenizer);
    sida_model_destroy(model);
    sida_backend_destroy(backend);
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    unlink(predictor);
    unlink(foreign);
    *strrchr(predictor, '/') = 0;
    rmdir(predictor);
    return 0;
}

typedef struct answers {
    char *texts[records];
    int64_t count;
    double fraction;
    int stop_after; /* progress calls; 0: never */
} answers;

static sida_status keep(void *context, const sida_answer *answer) {
    answers *a = context;
    assert_int_equal(answer->index, a->count);
    assert_int_equal(answer->line, a->count + 2); /* behind the header */
    assert_non_null(answer->target);
    a->texts[a->count++] = strdup(answer->text);
    return SIDA_OK;
}

static sida_status look(void *context, double fraction, int64_t tokens) {
    answers *a = context;
    assert_true(fraction >= a->fraction && fraction <= 1 && tokens > 0);
    a->fraction = fraction;
    if (a->stop_after == 0 || --a->stop_after > 0) return SIDA_OK;
    return sida_error_raise(SIDA_ERROR_CANCELLED, "the caller has seen enough");
}

static void run(sida_engine_options options, sida_report *report, sida_engine_facts *facts,
                answers *a, bool no_compare) {
    sida_engine *engine;
    sida_job job = SIDA_JOB_INIT;
    *a = (answers){0};
    options.model = SAMPLE_MODEL;
    options.device = "cpu"; /* a batch of another size gives the same bytes here only */
    options.max_tokens = 128;
    options.truncate = true;
    options.max_new_tokens = 4;
    job.format = "sst2";
    job.input = SAMPLE_INPUT;
    job.limit = records;
    job.digest = true;
    job.no_compare = no_compare;
    job.on_answer = keep;
    job.on_progress = look;
    job.context = a;
    assert_ok(sida_engine_open(&engine, &options));
    sida_engine_get_facts(engine, facts);
    assert_ok(sida_engine_run(engine, &job, report));
    sida_engine_close(engine);
    assert_int_equal(a->count, records);
    assert_int_equal(report->sequences, records);
    assert_true(report->device_bytes_peak <= facts->cap_bytes);
    assert_true(report->experts_resident_peak <= facts->slots);
    assert_int_equal(strlen(report->digest), 32);
    assert_true(a->fraction > 0.999);
}

static void forget(answers *a) {
    for (int64_t i = 0; i < a->count; i++) free(a->texts[i]);
}

static void test_exact(void **state) {
    (void)state;
    const sida_engine_options init = SIDA_ENGINE_OPTIONS_INIT;
    sida_report first, report;
    sida_engine_facts facts, all;
    answers a, b;
    run(init, &first, &all, &a, false);
    assert_int_equal(all.slots, all.experts);
    assert_true(first.fidelity == 1 && first.label_flips == 0);
    assert_true(first.score == first.full_score || isnan(first.score));
    const char *const budgets[] = {"2-experts", "20%", NULL};
    char size[32];
    /* As a size: room for seven. */
    snprintf(size, sizeof size, "%llu",
             (unsigned long long)(all.cap_bytes - all.slots * all.slot_bytes + 8 * all.slot_bytes));
    for (int i = 0; i < 6; i++) {
        sida_engine_options options = init;
        options.predictor = i % 2 ? predictor : NULL;
        options.budget = i / 2 == 2 ? size : budgets[i / 2];
        options.no_prefetch = i == 3;
        options.batch = 1 + 6 * (i / 2 == 1);
        options.policy = i % 2 ? "lookahead" : "fifo";
        run(options, &report, &facts, &b, false);
        assert_string_equal(report.digest, first.digest);
        for (int r = 0; r < records; r++) assert_string_equal(a.texts[r], b.texts[r]);
        if (i == 1) assert_true(report.prefetch_loads > 0);
        if (i == 3) assert_int_equal(report.prefetch_loads, 0);
        if (i / 2 == 1) assert_int_equal(facts.slots, all.experts / 5);
        if (i == 4) {
            assert_int_equal(facts.slots, 8);
            assert_true(report.device_bytes_peak <= strtoull(size, NULL, 10));
        }
        forget(&b);
    }
    forget(&a);
}

static void test_lossy(void **state) {
    (void)state;
    sida_engine_options options = SIDA_ENGINE_OPTIONS_INIT;
    sida_report exact, alone, batched;
    sida_engine_facts facts;
    answers full, a, b;
    run(options, &exact, &facts, &full, false);
    static const char *const routings[] = {"guided", "predicted"};
    for (int i = 0; i < 2; i++) {
        options = (sida_engine_options)SIDA_ENGINE_OPTIONS_INIT;
        options.predictor = predictor;
        options.routing = routings[i];
        options.budget = "30%";
        run(options, &alone, &facts, &a, false);
        options.batch = 9;
        options.budget = "2-experts";
        run(options, &batched, &facts, &b, true);
        assert_string_equal(alone.digest, batched.digest);
        assert_string_not_equal(alone.digest, exact.digest);
        assert_true(isnan(batched.full_score) && batched.label_flips == -1);
        int64_t flips = 0;
        for (int r = 0; r < records; r++) {
            flips += strcmp(a.texts[r], full.texts[r]) != 0;
            assert_string_equal(a.texts[r], b.texts[r]);
        }
        assert_int_equal(alone.label_flips, flips);
        assert_true(alone.full_score == exact.score);
        if (exact.score > 0) assert_true(fabs(alone.fidelity - alone.score / exact.score) < 1e-12);
        if (i == 0)
            assert_true(alone.allowed_share[0] > 0 && alone.allowed_share[0] < 1 &&
                        alone.allowed_share[1] > 0);
        else
            assert_true(isnan(alone.allowed_share[0]));
        forget(&a);
        forget(&b);
    }
    forget(&full);
}

static void test_refusals(void **state) {
    (void)state;
    sida_engine *engine;
    sida_engine_options options = SIDA_ENGINE_OPTIONS_INIT;
    options.model = SAMPLE_MODEL;
    options.predictor = foreign;
    assert_int_equal(sida_engine_open(&engine, &options), SIDA_ERROR_MISMATCH);
    assert_null(engine);
    assert_non_null(strstr(sida_error_message(), "q.h5"));
    options.predictor = predictor;
    options.top_k = 100000;
    assert_int_equal(sida_engine_open(&engine, &options), SIDA_ERROR_ARGUMENT);
    options.top_k = 3;
    options.budget = "1MiB";
    assert_int_equal(sida_engine_open(&engine, &options), SIDA_ERROR_BUDGET);
    assert_non_null(strstr(sida_error_message(), "dense weights"));
    options.budget = "10%";
    assert_ok(sida_engine_open(&engine, &options));
    sida_report report;
    sida_job job = SIDA_JOB_INIT;
    job.format = "sst2";
    job.input = "no/such/file";
    assert_int_equal(sida_engine_run(engine, &job, &report), SIDA_ERROR_IO);
    job.input = SAMPLE_INPUT;
    job.format = "csv";
    assert_int_equal(sida_engine_run(engine, &job, &report), SIDA_ERROR_ARGUMENT);
    /* A caller that stops; the engine serves on. */
    answers a = {.stop_after = 3};
    job.format = "sst2";
    job.on_progress = look;
    job.context = &a;
    job.limit = records;
    assert_int_equal(sida_engine_run(engine, &job, &report), SIDA_ERROR_CANCELLED);
    assert_string_equal(sida_error_message(), "the caller has seen enough");
    a = (answers){0};
    assert_ok(sida_engine_run(engine, &job, &report));
    assert_int_equal(report.sequences, records);
    sida_engine_close(engine);
}

int main(void) {
    if (access(SAMPLE_MODEL "/config.json", R_OK) != 0)
        return test_skip("no " SAMPLE_MODEL " in this tree");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exact),
        cmocka_unit_test(test_lossy),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
