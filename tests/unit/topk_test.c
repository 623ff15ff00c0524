/* Models that choose k > 1 experts, decoder-only ones among them: scores counted by hand, labels,
 * what a trace says of renormalisation, and that a decoder's predictions see no later token. */
#include "tests/train_data.h"
#include "tests/train_folder.h"

#include "trainer/train.h"

static void good(sida_status status) {
    if (status != SIDA_OK) fail_msg("%s", sida_last_message());
}

static void close_to(double value, double expected) {
    if (!(fabs(value - expected) < 1e-5)) fail_msg("%.9g, expected %.9g", value, expected);
}

/* --- a source whose rank r is expert (id + r) mod 5 */

enum { EXPERTS = 5 };
static const float shares[EXPERTS] = {0.4f, 0.3f, 0.15f, 0.1f, 0.05f};

static sida_status no_state(const sida_hash_source *source, sida_hash_state **out) {
    (void)source;
    *out = NULL;
    return SIDA_OK;
}

static void no_destroy(sida_hash_state *state) {
    (void)state;
}

static sida_status no_encoder(const sida_hash_source *source, sida_hash_state *state,
                              const sida_ragged *input, int32_t k, sida_hash_table *out) {
    (void)source, (void)state;
    assert_int_equal(sida_ragged_tokens(input), 0);
    return sida_hash_table_reserve(out, 0, 0, k, 0);
}

static sida_status rotate(const sida_hash_source *source, sida_hash_state *state,
                          const sida_ragged *step, int32_t k, sida_hash_table *out) {
    (void)source, (void)state;
    int64_t n = sida_ragged_tokens(step);
    sida_status status = sida_hash_table_reserve(out, 1, 1, k, n);
    for (int64_t i = 0; status == SIDA_OK && i < n; i++)
        for (int32_t r = 0; r < k; r++) {
            out->experts[i * k + r] = (uint16_t)((step->ids[i] + r) % EXPERTS);
            out->alpha[i * k + r] = shares[r];
        }
    return status;
}

static const sida_hash_source_table rotation = {
    .state_create = no_state, .state_destroy = no_destroy, .encode = no_encoder, .decode = rotate};

/* Ranks of the chosen: {0, 1}, {1, 3}, {4, 3}. */
static void scores(void **state) {
    (void)state;
    static int64_t offsets[2][2] = {{0, 0}, {0, 3}};
    static int32_t ids[3] = {0, 1, 2};
    static uint16_t truth[6] = {0, 1, 2, 4, 1, 0};
    static float alpha[6] = {0.6f, 0.4f, 0.7f, 0.3f, 0.8f, 0.2f};
    static uint8_t dropped[3];
    sida_dataset data = {.path = (char *)(uintptr_t) "made",
                         .experts = EXPERTS,
                         .top_k = 2,
                         .d_model = 1,
                         .vocabulary = 3,
                         .sequences = 1,
                         .layers = {0, 1},
                         .renormalised = true};
    data.sides[0].offsets = offsets[0];
    data.sides[0].ids = ids; /* none of them */
    data.sides[1] = (sida_dataset_side){.tokens = 3,
                                        .offsets = offsets[1],
                                        .ids = ids,
                                        .experts = truth,
                                        .alpha = alpha,
                                        .dropped = dropped};
    sida_hash_source source = {&rotation,
                               {.name = "rotation", .experts = EXPERTS, .layers = {0, 1}}};
    sida_evaluation e;
    good(sida_evaluate(&e, &source, &data, 2, NULL, NULL));
    const sida_scores *s = &e.overall;
    assert_int_equal(s->pairs, 3);
    close_to(s->hit[0], 100.0 / 3);
    close_to(s->hit[1], 200.0 / 3);
    close_to(s->slot_recall[0], 100 * 3.0 / 6);
    close_to(s->slot_recall[1], 100 * 5.0 / 6);
    close_to(s->exact_set, 100.0 / 3);
    close_to(s->weight_recall[0], 100 * 1.7 / 3);
    close_to(s->weight_recall[1], 100 * 2.2 / 3);
    close_to(s->alpha_error, 100 * (fabs(0.4 / 0.7 - 0.6) + 0.05 + fabs(0.05 / 0.15 - 0.8)) / 3);
    json_t *json = sida_evaluation_to_json(&e), *overall = json_object_get(json, "overall");
    close_to(json_real_value(json_object_get(overall, "slot_recall_2k")), 100 * 5.0 / 6);
    close_to(json_real_value(json_object_get(overall, "exact_set")), 100.0 / 3);
    close_to(json_real_value(json_object_get(overall, "weight_recall")), 100 * 1.7 / 3);
    assert_null(json_object_get(json, "encoder"));
    json_decref(json);
    sida_evaluation_free(&e);

    data.renormalised = false;
    good(sida_evaluate(&e, &source, &data, 2, NULL, NULL));
    close_to(e.overall.alpha_error, 100 * (0.2 + 0.4 + 0.75) / 3);
    sida_evaluation_free(&e);

    /* One expert a token: the slot is the hit, and nothing more is printed. */
    data.top_k = 1;
    data.sides[1].experts = (uint16_t[]){0, 2, 2};
    good(sida_evaluate(&e, &source, &data, 1, NULL, NULL));
    assert_true(e.overall.slot_recall[0] == e.overall.hit[0] && e.overall.hit[0] > 0);
    assert_true(e.overall.exact_set == e.overall.hit[0]);
    json = sida_evaluation_to_json(&e);
    assert_null(json_object_get(json_object_get(json, "overall"), "slot_recall"));
    json_decref(json);
    sida_evaluation_free(&e);
}

/* --- data */

static void renormalise(train_data *d, int side, int64_t tokens, sida_trace_rows *rows) {
    for (int64_t i = 0; i < tokens * d->layers[side]; i++) {
        float sum = 0, *alpha = rows->alpha + i * d->top_k;
        for (int j = 0; j < d->top_k; j++) sum += alpha[j];
        for (int j = 0; j < d->top_k; j++) alpha[j] /= sum;
    }
}

static void without_factors(train_data *d, int side, int64_t tokens, sida_trace_rows *rows) {
    if (tokens > 0) memset(rows->alpha, 0, (size_t)d->top_k * sizeof *rows->alpha);
    (void)side;
}

static train_data decoder_only(void) {
    train_data d = train_data_default();
    d.layers[0] = 0;
    d.layers[1] = 2;
    d.top_k = 3;
    d.sequences = 120;
    return d;
}

static void renormalised(void **state) {
    (void)state;
    train_data d = decoder_only();
    sida_dataset data;
    train_data_write(&d, train_path);
    good(sida_dataset_load(&data, train_path, 0));
    assert_false(data.renormalised);
    sida_dataset_free(&data);
    d.change = renormalise;
    train_data_write(&d, train_path);
    good(sida_dataset_load(&data, train_path, 0));
    assert_true(data.renormalised);
    sida_dataset_free(&data);
    d.top_k = 1; /* its factor is 1 then, which says nothing */
    train_data_write(&d, train_path);
    good(sida_dataset_load(&data, train_path, 0));
    assert_false(data.renormalised);
    sida_dataset_free(&data);
}

static void labels(void **state) {
    (void)state;
    train_data d = decoder_only();
    sida_dataset data;
    sida_minibatch batch = {0};
    const int32_t order[2] = {3, 0};
    d.change = without_factors; /* of the first pair */
    train_data_write(&d, train_path);
    good(sida_dataset_load(&data, train_path, 0));
    const sida_dataset_side *from = &data.sides[1];
    for (int kind = 0; kind < 3; kind++) {
        data.labels = (sida_labels)kind;
        good(sida_minibatch_fill(&batch, &data, order, 2));
        const sida_minibatch_side *to = &batch.sides[1];
        for (int i = 0; i < 2; i++)
            for (int64_t p = 0; p < (to->offsets[i + 1] - to->offsets[i]) * 2; p++) {
                const float *weights = to->label_weights + (to->offsets[i] * 2 + p) * 3;
                int64_t pair = from->offsets[order[i]] * 2 + p;
                const float *alpha = from->alpha + pair * 3;
                float sum = alpha[0] + alpha[1] + alpha[2];
                assert_memory_equal(to->labels + (to->offsets[i] * 2 + p) * 3,
                                    from->experts + pair * 3, 3 * sizeof *from->experts);
                assert_int_equal(sum > 0, pair != 0);
                for (int j = 0; j < 3; j++) {
                    double expected = kind == SIDA_LABELS_BEST                   ? j == 0
                                      : kind == SIDA_LABELS_WEIGHT && sum > 0.0f ? alpha[j] / sum
                                                                                 : 1.0 / 3;
                    close_to((double)weights[j], expected);
                }
            }
    }
    sida_labels kind;
    assert_true(sida_labels_from_name(&kind, "weight") && kind == SIDA_LABELS_WEIGHT);
    assert_false(sida_labels_from_name(&kind, "first"));
    assert_string_equal(sida_labels_name(SIDA_LABELS_EVEN), "even");
    sida_minibatch_free(&batch);
    sida_dataset_free(&data);
}

/* --- a decoder-only model from end to end */

static void training(void **state) {
    (void)state;
    train_data d = decoder_only(), v = d;
    sida_dataset data;
    sida_hash_source *source;
    sida_hash_state *batch;
    json_t *summary;
    v.seed = 2;
    v.sequences = 30;
    train_data_write(&d, train_path);
    train_data_write(&v, valid_path);
    sida_train_options o = sida_train_defaults();
    o.trace = train_path;
    o.valid = valid_path;
    o.output = output_path;
    o.epochs = 12;
    o.warmup = 3;
    good(sida_train(&o, &summary));
    json_t *overall = json_object_get(json_object_get(summary, "valid"), "overall");
    double slots = json_real_value(json_object_get(overall, "slot_recall"));
    print_message("slot recall %.1f\n", slots);
    assert_true(slots > 60); /* 3 of 8: chance is 37.5 */
    assert_string_equal(
        json_string_value(json_object_get(
            json_object_get(json_object_get(summary, "config"), "training"), "labels")),
        "even");
    json_decref(summary);

    /* The first tokens alone get the bytes that they get with all that follows. */
    good(sida_dataset_load(&data, valid_path, -1));
    good(sida_hash_source_open(&source, output_path, sida_dataset_embedding(&data), data.model));
    sida_hash_table whole = {0}, start = {0};
    const int64_t none[2] = {0};
    const sida_ragged nothing = {1, none, data.sides[0].ids};
    for (int32_t s = 0; s < data.sequences; s++) {
        const int64_t *at = data.sides[1].offsets + s, all[2] = {0, at[1] - at[0]};
        const int32_t *ids = data.sides[1].ids + at[0];
        good(sida_hash_state_create(source, &batch));
        good(sida_hash_encode(source, batch, &nothing, 3, &whole));
        good(sida_hash_decode(source, batch, &(sida_ragged){1, all, ids}, 3, &whole));
        for (int64_t n = 1; n < all[1]; n++) {
            const int64_t some[2] = {0, n};
            good(sida_hash_encode(source, batch, &nothing, 3, &start));
            good(sida_hash_decode(source, batch, &(sida_ragged){1, some, ids}, 3, &start));
            assert_memory_equal(start.experts, whole.experts, (size_t)n * 6 * sizeof(uint16_t));
            assert_memory_equal(start.alpha, whole.alpha, (size_t)n * 6 * sizeof(float));
        }
        sida_hash_state_destroy(source, batch);
    }
    sida_hash_table_free(&whole);
    sida_hash_table_free(&start);
    sida_hash_source_destroy(source);
    sida_dataset_free(&data);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(scores), cmocka_unit_test(renormalised),
                                       cmocka_unit_test(labels), cmocka_unit_test(training)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
