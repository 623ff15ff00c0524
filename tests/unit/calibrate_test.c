/* Temperatures: scores that are made too sure or unsure are brought back, the distance on the data
 * does not grow, ranks stay; and what a training makes of them. */
#include "tests/train_data.h"
#include "tests/train_folder.h"

#include "runtime/predictor/sources.h"
#include "trainer/calibrate.h"
#include "trainer/evaluate.h"
#include "trainer/train.h"

static void ok(sida_status status) {
    if (status != SIDA_OK) fail_msg("%s", sida_last_message());
}

static sida_net *make_net(const sida_dataset *data, sida_net_kind kind) {
    const sida_net_config config = {.kind = kind,
                                    .d_model = data->d_model,
                                    .hidden = 32,
                                    .lstm_layers = kind == SIDA_NET_LSTM,
                                    .blocks = kind == SIDA_NET_TRANSFORMER,
                                    .experts = data->experts,
                                    .vocabulary = data->vocabulary,
                                    .layers = {data->layers[0], data->layers[1]}};
    sida_net *net;
    ok(sida_net_create(&net, &config));
    sida_net_initialise(net, 4);
    return net;
}

static void multiply(sida_net *net, int side, int32_t layer, float by) {
    sida_net_linear *heads = &net->trunks[side].heads;
    int64_t from = (int64_t)layer * net->config.experts, to = from + net->config.experts;
    for (int64_t i = from * heads->cols; i < to * heads->cols; i++) heads->weight[i] *= by;
    for (int64_t i = from; i < to; i++) heads->bias[i] *= by;
}

/* All experts of every token, best first; tables of both sides. */
static void predict(sida_hash_table tables[2], const sida_net *net, const sida_dataset *data) {
    sida_hash_source *source;
    sida_hash_state *state;
    ok(sida_lstm_source_create(&source, net, sida_dataset_embedding(data), data->model,
                               data->tokenizer));
    ok(sida_hash_state_create(source, &state));
    for (int side = 0; side < 2; side++) {
        const sida_dataset_side *s = &data->sides[side];
        const sida_ragged tokens = {data->sequences, s->offsets, s->ids};
        tables[side] = (sida_hash_table){0};
        ok((side ? sida_hash_decode : sida_hash_encode)(source, state, &tokens, data->experts,
                                                        &tables[side]));
    }
    sida_hash_state_destroy(source, state);
    sida_hash_source_destroy(source);
}

/* The data's routing becomes what the net says: its best k experts and their factors. */
static void agree(sida_dataset *data, const sida_net *net) {
    sida_hash_table tables[2];
    predict(tables, net, data);
    for (int side = 0; side < 2; side++) {
        sida_dataset_side *s = &data->sides[side];
        for (int64_t p = 0; p < s->tokens * data->layers[side]; p++) {
            double whole = 0;
            for (int32_t j = 0; j < data->top_k; j++)
                whole += (double)tables[side].alpha[p * data->experts + j];
            for (int32_t j = 0; j < data->top_k; j++) {
                float alpha = tables[side].alpha[p * data->experts + j];
                s->experts[p * data->top_k + j] = tables[side].experts[p * data->experts + j];
                s->alpha[p * data->top_k + j] =
                    data->renormalised ? (float)((double)alpha / whole) : alpha;
            }
        }
        sida_hash_table_free(&tables[side]);
    }
}

static double distance(const sida_net *net, const sida_dataset *data, int32_t layer) {
    sida_hash_source *source;
    sida_evaluation evaluation;
    ok(sida_lstm_source_create(&source, net, sida_dataset_embedding(data), data->model,
                               data->tokenizer));
    ok(sida_evaluate(&evaluation, source, data, data->top_k, NULL, NULL));
    double error = evaluation.per_layer[layer].alpha_error;
    sida_evaluation_free(&evaluation);
    sida_hash_source_destroy(source);
    return error;
}

/* Most pairs are dropped or not of content, and have factors that would mislead. */
static void mislead(sida_dataset *data) {
    for (int side = 0; side < 2; side++) {
        sida_dataset_side *s = &data->sides[side];
        free(s->content);
        s->content = malloc((size_t)s->tokens);
        for (int64_t i = 0; i < s->tokens; i++) s->content[i] = i % 3 == 1;
        for (int64_t p = 0; p < s->tokens * data->layers[side]; p++) {
            s->dropped[p] = p % 5 < 3;
            if (!s->dropped[p] && s->content[p / data->layers[side]]) continue;
            for (int32_t j = 0; j < data->top_k; j++) s->alpha[p * data->top_k + j] = 0.99f;
        }
    }
}

static void brought_back(sida_net_kind kind, int32_t top_k, bool renormalised) {
    static const float factors[3] = {3, 1, 0.5f};
    train_data d = train_data_default();
    d.top_k = top_k;
    train_data_write(&d, valid_path);
    sida_dataset data;
    ok(sida_dataset_load(&data, valid_path, -1));
    data.renormalised = renormalised;
    sida_net *net = make_net(&data, kind);
    for (int l = 0; l < 3; l++) multiply(net, l / 2, l % 2, 2); /* or all are near 1 / E */
    agree(&data, net);
    mislead(&data);
    for (int l = 0; l < 3; l++) multiply(net, l / 2, l % 2, factors[l]);
    double far[3], temperatures[3];
    for (int l = 0; l < 3; l++) far[l] = distance(net, &data, l);
    sida_hash_table before[2], after[2];
    predict(before, net, &data);
    ok(sida_calibrate(temperatures, net, &data));
    predict(after, net, &data);
    for (int l = 0; l < 3; l++) {
        double near = distance(net, &data, l);
        if (fabs(log(temperatures[l] / (double)factors[l])) > 0.5 * log(2) / 16 + 1e-9)
            fail_msg("layer %d: T %g, not %g", l, temperatures[l], (double)factors[l]);
        if (factors[l] == 1 ? near > 1e-3 : near > 0.15 * far[l])
            fail_msg("layer %d: from %g to %g points", l, far[l], near);
    }
    for (int side = 0; side < 2; side++) {
        size_t items = (size_t)(data.sides[side].tokens * data.layers[side] * data.experts);
        assert_memory_equal(before[side].experts, after[side].experts, items * 2);
        assert_memory_not_equal(before[side].alpha, after[side].alpha, items * 4);
        sida_hash_table_free(&before[side]);
        sida_hash_table_free(&after[side]);
    }
    sida_net_destroy(net);
    sida_dataset_free(&data);
}

static void one_expert(void **state) {
    (void)state;
    brought_back(SIDA_NET_TRANSFORMER, 1, false);
    brought_back(SIDA_NET_LSTM, 1, false);
}

static void several_experts(void **state) {
    (void)state;
    brought_back(SIDA_NET_TRANSFORMER, 3, false);
    brought_back(SIDA_NET_TRANSFORMER, 3, true);
}

/* Of routing that the net knows nothing of, too. */
static void never_worse(void **state) {
    (void)state;
    train_data d = train_data_default();
    train_data_write(&d, valid_path);
    sida_dataset data;
    ok(sida_dataset_load(&data, valid_path, -1));
    for (int i = 0; i < 6; i++) {
        sida_net *net = make_net(&data, i % 2);
        double before[3], temperatures[3];
        sida_rng rng = sida_rng_seed((uint64_t)i);
        for (int l = 0; l < 3; l++)
            multiply(net, l / 2, l % 2, (float)exp2(sida_rng_normal(&rng) * 2));
        for (int l = 0; l < 3; l++) before[l] = distance(net, &data, l);
        ok(sida_calibrate(temperatures, net, &data));
        for (int l = 0; l < 3; l++) {
            double after = distance(net, &data, l);
            if (after > before[l] + 1e-4 || !(temperatures[l] >= 0.25 && temperatures[l] <= 4))
                fail_msg("net %d, layer %d: T %g, from %g to %g points", i, l, temperatures[l],
                         before[l], after);
            if (temperatures[l] == 1) assert_true(after == before[l]);
        }
        sida_net_destroy(net);
    }
    /* Nothing to tell by: nothing changes. */
    sida_net *net = make_net(&data, SIDA_NET_LSTM), *same = make_net(&data, SIDA_NET_LSTM);
    double temperatures[3];
    for (int side = 0; side < 2; side++)
        memset(data.sides[side].dropped, 1, (size_t)(data.sides[side].tokens * data.layers[side]));
    ok(sida_calibrate(temperatures, net, &data));
    for (int l = 0; l < 3; l++) assert_true(temperatures[l] == 1);
    assert_memory_equal(net->parameters, same->parameters,
                        (size_t)net->parameter_count * sizeof(float));
    sida_net_destroy(net);
    sida_net_destroy(same);
    sida_dataset_free(&data);
}

static double overall(const json_t *summary, const char *name) {
    const json_t *scores = json_object_get(json_object_get(summary, "valid"), "overall");
    return json_number_value(json_object_get(scores, name));
}

/* The file says what was done, and without it the weights are the training's own. */
static void of_a_training(void **state) {
    (void)state;
    train_data d = train_data_default();
    train_data_write(&d, train_path);
    d.seed = 2;
    train_data_write(&d, valid_path);
    double error[2], hit[2];
    for (int on = 0; on < 2; on++) {
        sida_train_options o = sida_train_defaults();
        json_t *summary;
        assert_true(o.calibrate);
        o.device = "cpu";
        o.trace = train_path;
        o.valid = valid_path;
        o.output = output_path;
        o.epochs = 3;
        o.lambda = 4; /* too sure */
        o.calibrate = on;
        ok(sida_train(&o, &summary));
        error[on] = overall(summary, "alpha_error");
        hit[on] = overall(summary, "hit@1");
        const json_t *training = json_object_get(json_object_get(summary, "config"), "training");
        const json_t *t = json_object_get(training, "temperatures");
        assert_int_equal(json_array_size(json_object_get(t, "encoder")), on ? 2 : 0);
        assert_int_equal(json_array_size(json_object_get(t, "decoder")), on ? 1 : 0);
        json_decref(summary);
    }
    if (error[1] >= error[0]) fail_msg("from %g to %g points", error[0], error[1]);
    assert_true(hit[0] == hit[1]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_expert),
        cmocka_unit_test(several_experts),
        cmocka_unit_test(never_worse),
        cmocka_unit_test(of_a_training),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
