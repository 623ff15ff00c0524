/* libsida from end to end on the bundled sample: budgets, routings and reports, with a predictor
 * of random weights (identity must hold whatever it predicts). */
#include "data/batch.h"
#include "formats/predictor_file.h"
#include "formats/tokenizer.h"
#include "runtime/model/model.h"
#include "runtime/predictor/refine.h"
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
    sida_refine *refine;
    sida_h5_file *file;
    assert_ok(sida_net_create(&net, &config));
    sida_net_initialise(net, 3);
    assert_ok(sida_refine_create(&refine, &config, 8));
    sida_refine_initialise(refine, 4);
    for (int64_t i = 0; i < refine->parameter_count; i++) refine->parameters[i] += 0.1f;
    json_t *object =
        json_pack("{s:o, s:{s:i}}", "net", sida_net_config_to_json(&config), "refine", "width", 8);
    char source[] = "lstm";
    const sida_predictor_meta meta = {model, tokenizer, source, object};
    assert_ok(sida_predictor_file_create(&file, path, SIDA_H5_PREDICTOR, &meta));
    assert_ok(sida_net_write(file, net));
    assert_ok(sida_refine_write(file, refine));
    assert_ok(sida_h5_commit(file));
    json_decref(object);
    sida_refine_destroy(refine);
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
    /* As a size: room for ten, with a predictor for fewer. */
    snprintf(
        size, sizeof size, "%llu",
        (unsigned long long)(all.cap_bytes - all.slots * all.slot_bytes + 10 * all.slot_bytes));
    for (int i = 0; i < 6; i++) {
        sida_engine_options options = init;
        options.predictor = i % 2 ? predictor : NULL;
        options.budget = i / 2 == 2 ? size : budgets[i / 2];
        options.no_prefetch = i == 3;
        options.no_refine = i == 5;
        options.batch = 1 + 6 * (i / 2 == 1);
        options.policy = i % 2 ? "lookahead" : "fifo";
        run(options, &report, &facts, &b, false);
        assert_string_equal(report.digest, first.digest);
        for (int r = 0; r < records; r++) assert_string_equal(a.texts[r], b.texts[r]);
        if (i == 1) assert_true(report.prefetch_loads > 0);
        if (i == 3) assert_int_equal(report.prefetch_loads, 0);
        assert_int_equal(report.refinements > 0, i == 1);
        assert_int_equal(report.refine_ms_per_batch > 0, i == 1);
        assert_true(fabs(report.refine_share -
                         report.refine_ms_per_batch / report.inference_ms_per_batch) < 1e-9);
        if (i / 2 == 1) assert_int_equal(facts.slots, all.experts / 5);
        if (i == 4) {
            assert_int_equal(facts.slots, 10);
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

/* --- scoring */

typedef struct scores {
    double nll[records];
    int64_t tokens[records], count;
    int right, positive;
} scores;

static sida_status keep_score(void *context, const sida_answer *answer) {
    scores *s = context;
    assert_int_equal(answer->index, s->count);
    s->nll[s->count] = answer->nll;
    s->tokens[s->count++] = answer->tokens;
    s->right += strcmp(answer->text, answer->target) == 0;
    s->positive += strcmp(answer->text, "positive") == 0;
    return SIDA_OK;
}

static void score(sida_engine_options options, sida_report *report, scores *s, const char *format,
                  uint64_t seed) {
    sida_engine *engine;
    sida_job job = SIDA_JOB_INIT;
    *s = (scores){0};
    options.model = SAMPLE_MODEL;
    options.device = "cpu";
    options.max_new_tokens = 64;
    options.max_tokens = 128;
    job.format = format;
    job.input = strcmp(format, "sst2") == 0 ? SAMPLE_INPUT : "data/sample/inputs/prose-test.txt";
    job.limit = records;
    job.score = true;
    job.seed = seed;
    job.on_answer = keep_score;
    job.context = s;
    assert_ok(sida_engine_open(&engine, &options));
    assert_ok(sida_engine_run(engine, &job, report));
    sida_engine_close(engine);
    assert_int_equal(s->count, records);
    double nll = 0;
    int64_t tokens = 0;
    for (int r = 0; r < records; r++) {
        nll += s->nll[r];
        tokens += s->tokens[r];
    }
    assert_int_equal(report->target_tokens, tokens);
    assert_true(fabs(report->loss - nll / (double)tokens) < 1e-12);
}

/* -log p of the first two records' targets, by the model alone: the whole target in one call. */
static void score_by_hand(double nll[2]) {
    sida_backend *backend;
    sida_model *model;
    sida_tokenizer *tokenizer;
    sida_run *run;
    sida_resident *resident;
    sida_corpus *corpus;
    sida_batcher *batcher;
    sida_batch *batch;
    assert_ok(sida_backend_create_cpu(&backend, NULL));
    assert_ok(sida_model_open(&model, backend, SAMPLE_MODEL));
    assert_ok(sida_tokenizer_open(&tokenizer, SAMPLE_MODEL "/spiece.model"));
    assert_ok(sida_resident_create(&resident, model));
    const sida_model_info *info = sida_model_get_info(model);
    const sida_run_limits limits = {
        .sequences = 1, .input_tokens = 128, .step_tokens = 8, .decoder_positions = 8};
    assert_ok(sida_run_create(&run, model, &limits));
    assert_ok(sida_corpus_open(&corpus, SIDA_CORPUS_SST2, SAMPLE_INPUT));
    assert_ok(sida_batcher_create(
        &batcher, corpus, tokenizer,
        &(sida_batch_options){
            .sequences = 1, .max_tokens = 128, .vocabulary = info->vocabulary, .eos = info->eos}));
    float *logits = malloc(8 * (size_t)info->vocabulary * sizeof *logits);
    for (int r = 0; r < 2; r++) {
        assert_ok(sida_batcher_next(batcher, &batch));
        const sida_moe_driver *driver = sida_resident_driver(resident, NULL, NULL, NULL);
        int64_t tokens = sida_ragged_tokens(&batch->target);
        int32_t inputs[8] = {info->decoder_start};
        for (int64_t i = 1; i < tokens; i++) inputs[i] = batch->target.ids[i - 1];
        assert_ok(sida_run_encode(run, &batch->input, driver));
        assert_ok(sida_run_decode(run, &(sida_ragged){1, batch->target.offsets, inputs}, driver));
        assert_ok(sida_run_read_logits(run, 0, tokens, logits));
        nll[r] = 0;
        for (int64_t i = 0; i < tokens; i++) {
            const float *row = logits + i * info->vocabulary;
            double sum = 0;
            for (int32_t v = 0; v < info->vocabulary; v++) sum += exp((double)row[v]);
            nll[r] += log(sum) - (double)row[batch->target.ids[i]];
        }
        sida_batch_destroy(batch);
    }
    free(logits);
    sida_batcher_destroy(batcher);
    sida_corpus_close(corpus);
    sida_run_destroy(run);
    sida_resident_destroy(resident);
    sida_tokenizer_destroy(tokenizer);
    sida_model_destroy(model);
    sida_backend_destroy(backend);
}

static void test_score(void **state) {
    (void)state;
    const sida_engine_options init = SIDA_ENGINE_OPTIONS_INIT;
    sida_engine_options options = init;
    sida_report exact, report, dice;
    scores full, s;
    double nll[2];
    score(options, &exact, &full, "sst2", 0);
    assert_int_equal(exact.sequences, 2 * records); /* each label is one */
    assert_true(fabs(exact.score - (double)full.right / records) < 1e-12);
    assert_true(full.positive > 0 && full.positive < records);
    assert_true(exact.constant_score >= 0.5 && exact.constant_score < 1);
    assert_true(exact.full_loss == exact.loss && exact.label_flips == 0 && exact.mcnemar_p == 1);
    score_by_hand(nll);
    for (int r = 0; r < 2; r++) /* measured 5e-9 */
        assert_true(fabs(nll[r] - full.nll[r]) < 1e-6 * (1 + nll[r]));
    /* As any exact output: the same bytes. */
    options.budget = "10%";
    options.batch = 5; /* a record's labels come apart */
    options.predictor = predictor;
    score(options, &report, &s, "sst2", 0);
    assert_memory_equal(s.nll, full.nll, sizeof s.nll);
    assert_true(report.score == exact.score && report.loss == exact.loss);
    /* Predicting took time of its own, and is told beside the batch's. */
    assert_true(report.hash_ms_per_batch > 0 && report.inference_ms_per_batch > 0);
    assert_true(fabs(report.hash_share - report.hash_ms_per_batch / report.inference_ms_per_batch) <
                1e-9);
    assert_true(report.table_wait_share >= 0 && report.table_wait_share <= 1);
    assert_true(exact.hash_ms_per_batch == 0 && exact.hash_share == 0);

    options = init;
    options.predictor = predictor;
    options.routing = "guided";
    options.active_share = 0.1;
    options.top_k = 8;
    score(options, &report, &s, "sst2", 0);
    assert_true(report.full_loss == exact.loss && report.full_score == exact.score);
    assert_true(report.loss != exact.loss);
    assert_int_equal(report.answers_lost + report.answers_gained, report.label_flips);
    assert_int_equal(report.answers_gained - report.answers_lost, s.right - full.right);
    assert_true(report.mcnemar_p > 0 && report.mcnemar_p <= 1);
    double mean = 0;
    assert_int_equal(report.allowed_layers[0], 3);
    for (int32_t layer = 0; layer < 3; layer++) {
        assert_true(report.allowed_layer_share[0][layer] <= 6.0 / 64 + 1e-12);
        mean += report.allowed_layer_share[0][layer] / 3;
    }
    assert_true(fabs(mean - report.allowed_share[0]) < 1e-12);
    /* Others, but as many. */
    options.random_experts = true;
    score(options, &dice, &s, "sst2", 0);
    assert_true(dice.loss != report.loss);
    options.active_share = 0;
    score(options, &dice, &s, "sst2", 0);
    options.random_experts = false;
    score(options, &report, &s, "sst2", 0);
    assert_memory_equal(dice.allowed_layer_share, report.allowed_layer_share,
                        sizeof dice.allowed_layer_share);
    assert_true(dice.loss != report.loss);

    options = init;
    score(options, &exact, &full, "span-corruption", 1);
    assert_true(isnan(exact.score) && isnan(exact.fidelity) && isnan(exact.constant_score));
    assert_int_equal(exact.label_flips, -1);
    assert_true(exact.loss > 0 && exact.loss < log(32128));
    score(options, &report, &s, "span-corruption", 2);
    assert_true(report.loss != exact.loss);
}

static void refuse(const sida_engine_options *options, const char *words) {
    sida_engine *engine;
    assert_int_equal(sida_engine_open(&engine, options), SIDA_ERROR_ARGUMENT);
    if (!strstr(sida_error_message(), words)) fail_msg("%s", sida_error_message());
}

static void test_refused_options(void **state) {
    (void)state;
    sida_engine_options options = SIDA_ENGINE_OPTIONS_INIT;
    options.model = SAMPLE_MODEL;
    options.predictor = predictor;
    options.active_share = 0.4;
    refuse(&options, "of guided routing, not of exact");
    options.routing = "guided";
    options.active_share = 0.015;
    refuse(&options, "1.5% is 0 of 64 experts");
    options.active_share = NAN;
    refuse(&options, "active share nan");
    options.active_share = 0;
    options.routing = "exact";
    options.random_experts = true;
    refuse(&options, "random experts are a baseline");
    options.random_experts = false;
    options.max_new_tokens = 1;
    sida_engine *engine;
    sida_report report;
    sida_job job = SIDA_JOB_INIT;
    assert_ok(sida_engine_open(&engine, &options));
    job.score = true;
    job.format = "text";
    job.input = SAMPLE_INPUT;
    assert_int_equal(sida_engine_run(engine, &job, &report), SIDA_ERROR_ARGUMENT);
    assert_non_null(strstr(sida_error_message(), "no targets to score"));
    job.format = "sst2";
    assert_int_equal(sida_engine_run(engine, &job, &report), SIDA_ERROR_ARGUMENT);
    assert_non_null(strstr(sida_error_message(), "a target of 2 tokens"));
    job.format = "tsv";
    job.input = "data/sample/inputs/prose-test.txt";
    job.limit = 1;
    assert_int_equal(sida_engine_run(engine, &job, &report), SIDA_ERROR_FORMAT);
    assert_non_null(strstr(sida_error_message(), "prose-test.txt:1: no target"));
    sida_engine_close(engine);
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
        cmocka_unit_test(test_exact),    cmocka_unit_test(test_lossy),
        cmocka_unit_test(test_score),    cmocka_unit_test(test_refused_options),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
