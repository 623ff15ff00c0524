/* The trainer's parts: data sets, evaluation against figures counted by hand, AdamW, refusals. */
#include "tests/train_data.h"
#include "tests/train_folder.h"

#include "runtime/predictor/sources.h"
#include "trainer/adamw.h"
#include "trainer/checkpoint.h"
#include "trainer/train.h"

static void refused(sida_status status, sida_status code, const char *words) {
    if (status != code || !strstr(sida_last_message(), words))
        fail_msg("status %d, '%s': expected %d and '%s'", status, sida_last_message(), code, words);
}

static void dataset(void **state) {
    (void)state;
    train_data d = train_data_default();
    sida_dataset all, some, none;
    train_data_write(&d, train_path);
    assert_int_equal(sida_dataset_load(&all, train_path, 0), SIDA_OK);
    assert_int_equal(sida_dataset_load(&some, train_path, 2), SIDA_OK);
    assert_int_equal(sida_dataset_load(&none, train_path, -1), SIDA_OK);
    assert_int_equal(all.top, 5);
    assert_int_equal(some.top, 2);
    assert_null(none.sides[0].top_ids);
    for (int side = 0; side < 2; side++)
        for (int64_t i = 0; i < all.sides[side].tokens * all.layers[side]; i++) {
            assert_memory_equal(all.sides[side].top_ids + i * 5, some.sides[side].top_ids + i * 2,
                                4);
            assert_memory_equal(all.sides[side].top_logp + i * 5, some.sides[side].top_logp + i * 2,
                                4);
            assert_int_equal(all.sides[side].top_ids[i * 5], all.sides[side].experts[i]);
        }
    for (int64_t i = 0; i < all.sides[0].tokens; i++)
        assert_true(all.embedding[all.sides[0].ids[i] * 16 + 3] ==
                    train_data_score(all.sides[0].ids[i], 3, 0, 9));
    assert_true(sida_fingerprint_equal(all.file, some.file));

    int32_t order[60], seen[60] = {0}, other[60];
    sida_dataset_shuffle(order, 60, 5, 0);
    for (int i = 0; i < 60; i++) seen[order[i]]++;
    for (int i = 0; i < 60; i++) assert_int_equal(seen[i], 1);
    sida_dataset_shuffle(other, 60, 5, 1);
    assert_memory_not_equal(order, other, sizeof order);
    sida_dataset_shuffle(other, 60, 6, 0);
    assert_memory_not_equal(order, other, sizeof order);
    sida_dataset_shuffle(other, 60, 5, 0);
    assert_memory_equal(order, other, sizeof order);

    sida_minibatch batch = {0};
    assert_int_equal(sida_minibatch_fill(&batch, &some, order, 7), SIDA_OK);
    for (int side = 0; side < 2; side++)
        for (int i = 0; i < 7; i++) {
            const sida_dataset_side *from = &some.sides[side];
            const sida_minibatch_side *to = &batch.sides[side];
            int64_t n = to->offsets[i + 1] - to->offsets[i], at = from->offsets[order[i]];
            size_t row = (size_t)some.layers[side] * 2;
            assert_int_equal(n, from->offsets[order[i] + 1] - at);
            assert_memory_equal(to->ids + to->offsets[i], from->ids + at, (size_t)n * 4);
            assert_memory_equal(to->top_ids + (size_t)to->offsets[i] * row,
                                from->top_ids + (size_t)at * row, (size_t)n * row * 2);
        }
    sida_minibatch_free(&batch);
    sida_dataset_free(&all);
    sida_dataset_free(&some);
    sida_dataset_free(&none);
}

static void twice(train_data *d, int side, int64_t tokens, sida_trace_rows *rows) {
    (void)tokens;
    if (side == 1) rows->top_ids[1] = rows->top_ids[0];
    (void)d;
}
static void improbable(train_data *d, int side, int64_t tokens, sida_trace_rows *rows) {
    (void)tokens;
    if (side == 0) rows->top_logp[d->top * 3] = sida_f16_from_f32(2.5f);
}

static void without_row(train_data *d, int side, int64_t tokens, sida_trace_rows *rows) {
    (void)tokens;
    if (side == 0) rows->tokens[0] = d->vocabulary - 1;
}

static void bad_traces(void **state) {
    (void)state;
    train_data d = train_data_default();
    sida_dataset data;
    refused(sida_dataset_load(&data, train_path, 0), SIDA_OK, "");
    sida_dataset_free(&data);
    refused(sida_dataset_load(&data, "/nonexistent/T.h5", 0), SIDA_ERROR_IO, "/nonexistent/T.h5");
    train_data_write(&d, train_path);
    refused(sida_dataset_load(&data, train_path, 6), SIDA_ERROR_ARGUMENT, "top 5");
    d.sequences = 0;
    train_data_write(&d, train_path);
    refused(sida_dataset_load(&data, train_path, 0), SIDA_ERROR_FORMAT, "empty");
    d.sequences = 9;
    d.change = twice;
    train_data_write(&d, train_path);
    refused(sida_dataset_load(&data, train_path, 0), SIDA_ERROR_FORMAT, "twice");
    d.change = improbable;
    train_data_write(&d, train_path);
    refused(sida_dataset_load(&data, train_path, 0), SIDA_ERROR_FORMAT, "log-probability");
    d.change = without_row; /* of 5,000 ids few occur; the last is not one of them */
    d.vocabulary = 5000;
    train_data_write(&d, train_path);
    refused(sida_dataset_load(&data, train_path, 0), SIDA_ERROR_FORMAT, "no embedding row");
    d.change = NULL;
    d.kind = SIDA_H5_PART;
    train_data_write(&d, train_path);
    refused(sida_dataset_load(&data, train_path, 0), SIDA_ERROR_FORMAT, "part");
}

static void pairs_that_do_not_fit(void **state) {
    (void)state;
    static const struct {
        int field;
        const char *words;
    } cases[] = {{0, "another model"}, {1, "experts"}, {2, "encoder"},
                 {3, "decoder"},       {4, "columns"}, {5, "vocabulary"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        train_data a = train_data_default(), b = a;
        b.seed = 2;
        if (cases[i].field == 0) b.model++;
        if (cases[i].field == 1) b.experts++;
        if (cases[i].field == 2) b.layers[0]++;
        if (cases[i].field == 3) b.layers[1]++;
        if (cases[i].field == 4) b.d_model++;
        if (cases[i].field == 5) b.vocabulary++;
        train_data_write(&a, train_path);
        train_data_write(&b, valid_path);
        sida_train_options o = sida_train_defaults();
        o.trace = train_path;
        o.valid = valid_path;
        o.device = "cpu";
        o.output = output_path;
        refused(sida_train(&o, NULL), SIDA_ERROR_MISMATCH, cases[i].words);
        assert_int_equal(access(output_path, F_OK), -1);
    }
}

static void bad_options(void **state) {
    (void)state;
    train_data d = train_data_default();
    train_data_write(&d, train_path);
    sida_train_options good = sida_train_defaults(), o;
    good.trace = good.valid = train_path;
    good.output = output_path;
    good.device = "cpu";
    o = good;
    o.device = "abacus";
    refused(sida_train(&o, NULL), SIDA_ERROR_ARGUMENT, "'abacus'");
    o = good;
    o.device_batch = -1;
    refused(sida_train(&o, NULL), SIDA_ERROR_ARGUMENT, "range");
    o = good;
    o.epochs = 0;
    refused(sida_train(&o, NULL), SIDA_ERROR_ARGUMENT, "range");
    o = good;
    o.lr = (double)NAN;
    refused(sida_train(&o, NULL), SIDA_ERROR_ARGUMENT, "range");
    o = good;
    o.top = 6;
    refused(sida_train(&o, NULL), SIDA_ERROR_ARGUMENT, "top 5");
    o = good;
    o.hidden = 20000;
    refused(sida_train(&o, NULL), SIDA_ERROR_ARGUMENT, "hidden");
    o = good;
    o.output = "/nonexistent/P.h5";
    refused(sida_train(&o, NULL), SIDA_ERROR_IO, "/nonexistent");
    /* A rate that blows up is said, not written down. */
    o = good;
    o.lr = 1e30;
    o.warmup = 0;
    o.clip = 0;
    o.epochs = 3;
    refused(sida_train(&o, NULL), SIDA_ERROR_FORMAT, "finite");
    assert_int_equal(access(output_path, F_OK), -1);
}

/* Two sequences, one layer a side, four experts, counted by hand. The source is a token table whose
 * ids map to one expert each, so its prediction is known. */
static void evaluation(void **state) {
    (void)state;
    static int64_t offsets[2][3] = {{0, 3, 5}, {0, 1, 2}};
    static int32_t ids[2][5] = {{0, 1, 0, 2, 2}, {0, 1}};
    static uint16_t truth[2][5] = {{0, 3, 0, 2, 1}, {3, 1}};
    static float alpha[2][5] = {{0.5f, 0.25f, 0.5f, 1, 1}, {0.5f, 1}};
    static uint8_t dropped[2][5] = {{0, 0, 0, 1, 0}, {0, 0}};
    sida_dataset data = {.path = (char *)(uintptr_t) "made",
                         .experts = 4,
                         .top_k = 1,
                         .d_model = 1,
                         .vocabulary = 3,
                         .sequences = 2,
                         .layers = {1, 1}};
    for (int side = 0; side < 2; side++)
        data.sides[side] = (sida_dataset_side){.tokens = offsets[side][2],
                                               .offsets = offsets[side],
                                               .ids = ids[side],
                                               .experts = truth[side],
                                               .alpha = alpha[side],
                                               .dropped = dropped[side]};
    static const int32_t tokens[3] = {0, 1, 2};
    static const int64_t one[2] = {0, 3};
    static const uint16_t chosen[3] = {0, 1, 2};
    const sida_ragged seen = {1, one, tokens};
    sida_hash_source *source;
    assert_int_equal(sida_table_source_create(&source, SIDA_TABLE_TOKEN,
                                              &(sida_routed){.shape = {4, 3, 1, {1, 1}},
                                                             .top_k = 1,
                                                             .tokens = {seen, seen},
                                                             .experts = {chosen, chosen}}),
                     SIDA_OK);
    sida_evaluation e;
    assert_int_equal(sida_evaluate(&e, source, &data, 1, NULL, NULL), SIDA_OK);
    /* Encoder: guesses 0 1 0 2 2, truth 0 3 0 2 1: three of five. Rank of 3 for id 1 is 4th (order
     * 1 0 2 3), of 1 for id 2 is 3rd (2 0 1 3). */
    assert_int_equal(e.sides[0].pairs, 5);
    assert_true(fabs(e.sides[0].hit[0] - 60) < 1e-9);
    assert_true(fabs(e.sides[0].hit[1] - 80) < 1e-9);
    assert_true(fabs(e.sides[0].hit[2] - 100) < 1e-9);
    assert_int_equal(e.sides[0].dropped, 1);
    /* Sequence 1 uses {0, 3}, predicted {0, 1}: 1/2, 1/2. Sequence 2 uses {1} (2 was dropped),
     * predicted {2}: 0, 0. */
    assert_true(fabs(e.sides[0].set_recall - 25) < 1e-9);
    assert_true(fabs(e.sides[0].set_precision - 25) < 1e-9);
    /* Two loaded for {0, 3}: 0 and 1, the first ranks. One for {1}: 2. */
    assert_true(fabs(e.sides[0].set_recall_equal - 25) < 1e-9);
    /* Decoder: guesses 0, 1, truth 3, 1. */
    assert_true(fabs(e.sides[1].hit[0] - 50) < 1e-9);
    assert_true(fabs(e.sides[1].set_recall_equal - 50) < 1e-9);
    assert_true(fabs(e.overall.hit[0] - 100 * 4.0 / 7) < 1e-9);
    assert_true(fabs(e.overall.set_recall - 100 * 1.5 / 4) < 1e-9);
    /* α: a seen id gives its expert (1 + 0.01/3) / 1.01, another seen expert 0.01/3/1.01, the
     * never seen expert 3 nothing. */
    double high = (1 + 0.01 / 3) / 1.01, low = 0.01 / 3 / 1.01;
    double expected = 100 * (fabs(high - 0.5) * 2 + 0.25 + fabs(low - 1)) / 4; /* not the dropped */
    assert_true(fabs(e.sides[0].alpha_error - expected) < 1e-4);
    sida_evaluation_free(&e);
    /* Three predicted a token: sets {0 1 2} against {0 3}, {0 1 2} against {1}. */
    assert_int_equal(sida_evaluate(&e, source, &data, 3, NULL, NULL), SIDA_OK);
    assert_true(fabs(e.sides[0].set_recall - 75) < 1e-9);
    assert_true(fabs(e.sides[0].set_precision - 100.0 / 3) < 1e-9);
    json_t *json = sida_evaluation_to_json(&e);
    assert_int_equal(json_array_size(json_object_get(json, "layers")), 2);
    assert_true(json_is_real(json_object_get(json_object_get(json, "overall"), "hit@5")));
    json_decref(json);
    sida_evaluation_free(&e);
    refused(sida_evaluate(&e, source, &data, 5, NULL, NULL), SIDA_ERROR_ARGUMENT, "5 experts");
    data.model.low++;
    refused(sida_evaluate(&e, source, &data, 1, NULL, NULL), SIDA_ERROR_MISMATCH, "model");
    data.model.low--;
    data.layers[1] = 0;
    refused(sida_evaluate(&e, source, &data, 1, NULL, NULL), SIDA_ERROR_MISMATCH, "layers");
    sida_hash_source_destroy(source);
}

/* Three steps worked out in double precision. */
static void adamw(void **state) {
    (void)state;
    float parameters[2] = {0.5f, -2}, gradient[2] = {0.1f, -3};
    double p[2] = {0.5, -2}, m[2] = {0}, v[2] = {0};
    sida_adamw optimiser;
    assert_int_equal(sida_adamw_create(&optimiser, 2, 0.1), SIDA_OK);
    for (int step = 1; step <= 3; step++) {
        sida_adamw_step(&optimiser, parameters, gradient, 0.01);
        for (int i = 0; i < 2; i++) {
            double g = (double)gradient[i];
            m[i] = 0.9 * m[i] + 0.1 * g;
            v[i] = 0.999 * v[i] + 0.001 * g * g;
            p[i] *= 1 - 0.01 * 0.1;
            p[i] -=
                0.01 * (m[i] / (1 - pow(0.9, step))) / (sqrt(v[i] / (1 - pow(0.999, step))) + 1e-8);
            assert_true(fabs((double)parameters[i] - p[i]) < 1e-6);
        }
    }
    sida_adamw_free(&optimiser);
    float clip[2] = {3, 4};
    assert_true(fabs(sida_gradient_clip(clip, 2, 0) - 5) < 1e-12 && clip[0] == 3);
    assert_true(fabs(sida_gradient_clip(clip, 2, 10) - 5) < 1e-12 && clip[0] == 3);
    assert_true(fabs(sida_gradient_clip(clip, 2, 1) - 5) < 1e-12);
    assert_true(fabsf(clip[0] - 0.6f) < 1e-6f && fabsf(clip[1] - 0.8f) < 1e-6f);
}

/* A checkpoint knows its device; without one it is the CPU's. */
static void devices(void **state) {
    (void)state;
    const sida_net_config net = {.d_model = 4,
                                 .hidden = 2,
                                 .lstm_layers = 1,
                                 .experts = 3,
                                 .vocabulary = 5,
                                 .layers = {1, 0}};
    sida_predictor_meta cpu = {.source = (char *)(uintptr_t) "lstm"}, cuda = cpu;
    cpu.config = json_pack("{s:o, s:{}}", "net", sida_net_config_to_json(&net), "training");
    cuda.config = json_deep_copy(cpu.config);
    json_object_set_new(json_object_get(cuda.config, "training"), "device", json_string("cuda"));
    sida_train_state s;
    assert_int_equal(sida_train_state_create(&s, &net, 0, 1), SIDA_OK);
    assert_int_equal(sida_checkpoint_write(output_path, &cuda, &s), SIDA_OK);
    assert_int_equal(sida_checkpoint_read(&s, output_path, &cuda, 1), SIDA_OK);
    refused(sida_checkpoint_read(&s, output_path, &cpu, 1), SIDA_ERROR_MISMATCH, "--device cuda");
    assert_int_equal(sida_checkpoint_write(output_path, &cpu, &s), SIDA_OK);
    assert_int_equal(sida_checkpoint_read(&s, output_path, &cpu, 1), SIDA_OK);
    refused(sida_checkpoint_read(&s, output_path, &cuda, 1), SIDA_ERROR_MISMATCH, "--device cpu");
    sida_train_state_free(&s);
    json_decref(cpu.config);
    json_decref(cuda.config);
    unlink(output_path);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(dataset),
                                       cmocka_unit_test(bad_traces),
                                       cmocka_unit_test(pairs_that_do_not_fit),
                                       cmocka_unit_test(bad_options),
                                       cmocka_unit_test(evaluation),
                                       cmocka_unit_test(adamw),
                                       cmocka_unit_test(devices)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
