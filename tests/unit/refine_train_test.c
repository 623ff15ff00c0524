/* Training a refinement where the first layer's choice is drawn and decides the layers behind it:
 * nothing can know them up front, and once it is known they are certain. */
#include "tests/train_data.h"
#include "tests/train_folder.h"

#include "trainer/refine.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#include <string.h>

static uint64_t draw;  /* of the first layer */
static bool dependent; /* whether it decides the others */

/* One list: `chosen` first, then the others as they come. */
static void set_pair(const train_data *d, sida_trace_rows *rows, int64_t pair, const int *chosen) {
    const float first = 0.9f / (float)d->top_k, rest = 0.1f / (float)(d->experts - d->top_k);
    int at = 0;
    for (; at < d->top_k; at++) {
        rows->experts[pair * d->top_k + at] = (uint16_t)chosen[at];
        rows->alpha[pair * d->top_k + at] = first;
        rows->top_ids[pair * d->top + at] = (uint16_t)chosen[at];
    }
    for (int e = 0; at < d->top; e++) {
        bool taken = false;
        for (int j = 0; j < d->top_k; j++) taken |= chosen[j] == e;
        if (!taken) rows->top_ids[pair * d->top + at++] = (uint16_t)e;
    }
    for (int j = 0; j < d->top; j++)
        rows->top_logp[pair * d->top + j] = sida_f16_from_f32(logf(j < d->top_k ? first : rest));
}

static void draw_layers(train_data *d, int side, int64_t tokens, sida_trace_rows *rows) {
    sida_rng rng = sida_rng_seed(draw + (uint64_t)side);
    for (int64_t i = 0; i < tokens; i++) {
        int chosen[2] = {0};
        for (int l = 0; l < d->layers[side]; l++) {
            if (l == 0 || !dependent) {
                chosen[0] = (int)sida_rng_below(&rng, (uint32_t)d->experts);
                chosen[1] = (chosen[0] + 1 + (int)sida_rng_below(&rng, 2)) % d->experts;
            } else {
                for (int j = 0; j < 2; j++) chosen[j] = (chosen[j] * 3 + l) % d->experts;
            }
            set_pair(d, rows, i * d->layers[side] + l, chosen);
        }
    }
}

typedef struct result {
    float *parameters;
    int64_t count;
    int32_t kept[2];
    double rates[2][2], up_front[2][2]; /* by side and last known layer */
    double first_loss, last_loss, hit;
    int32_t epochs;
    int64_t steps, stop; /* stop: the step that cancels, 0: none */
    sida_status status;
} result;

static sida_status on_step(void *context, double fraction, int64_t tokens) {
    result *r = context;
    (void)tokens;
    assert_true(fraction >= 0 && fraction <= 1);
    if (fraction > 0) r->steps++;
    return r->stop > 0 && r->steps == r->stop ? sida_fail(SIDA_ERROR_CANCELLED, "stopped")
                                              : SIDA_OK;
}

static void on_epoch(void *context, const sida_refine_epoch *epoch) {
    result *r = context;
    if (epoch->epoch == 1) r->first_loss = epoch->loss;
    r->last_loss = epoch->loss;
    r->epochs++;
    assert_int_equal(epoch->epoch, r->epochs);
}

static void read_rates(result *r, const json_t *kept, const json_t *measured, int32_t chosen) {
    static const char *const names[2] = {"encoder", "decoder"};
    for (int side = 0; side < 2; side++) {
        const json_t *list = json_object_get(measured, names[side]);
        r->kept[side] = (int32_t)json_integer_value(json_object_get(kept, names[side]));
        for (size_t l = 0; l < json_array_size(list); l++) {
            const json_t *row = json_array_get(list, l);
            assert_int_equal(json_integer_value(json_object_get(row, "known")), l);
            r->rates[side][l] =
                json_real_value(json_object_get(row, chosen > 1 ? "slot_recall" : "hit@1"));
            r->up_front[side][l] = json_real_value(json_object_get(row, "up_front"));
        }
    }
}

static result trained(int32_t chosen, int threads, int64_t stop) {
    train_data d = train_data_default();
    d.sequences = 300;
    d.layers[0] = 3;
    d.layers[1] = 2;
    d.top_k = chosen;
    d.change = draw_layers;
    draw = 10;
    train_data_write(&d, train_path);
    d.sequences = 60;
    d.seed = draw = 2;
    train_data_write(&d, valid_path);
    sida_dataset train, valid;
    sida_net *net;
    sida_refine *refine;
    json_t *kept, *measured;
    assert_int_equal(sida_dataset_load(&train, train_path, 0), SIDA_OK);
    assert_int_equal(sida_dataset_load(&valid, valid_path, -1), SIDA_OK);
    const sida_net_config config = {.kind = SIDA_NET_LSTM,
                                    .d_model = train.d_model,
                                    .hidden = 8,
                                    .lstm_layers = 1,
                                    .experts = train.experts,
                                    .vocabulary = train.vocabulary,
                                    .layers = {3, 2}};
    assert_int_equal(sida_net_create(&net, &config), SIDA_OK);
    sida_net_initialise(net, 1);
    result r = {.stop = stop};
    const sida_refine_options options = {.width = 16,
                                         .epochs = 40,
                                         .lambda = 0.5,
                                         .weight_decay = 0.01,
                                         .clip = 1,
                                         .tkd = SIDA_TKD_REST,
                                         .seed = 3,
                                         .on_step = on_step,
                                         .on_epoch = on_epoch,
                                         .context = &r};
#ifdef _OPENMP
    omp_set_num_threads(threads);
#else
    (void)threads;
#endif
    r.status = sida_refine_train(&refine, &kept, &measured, net, &train, &valid, &options);
    if (r.status == SIDA_OK) read_rates(&r, kept, measured, chosen);
    if (refine) {
        r.count = refine->parameter_count;
        r.parameters = calloc((size_t)r.count, sizeof(float));
        memcpy(r.parameters, refine->parameters, (size_t)r.count * sizeof(float));
    }
    json_decref(kept);
    json_decref(measured);
    sida_refine_destroy(refine);
    sida_net_destroy(net);
    sida_dataset_free(&train);
    sida_dataset_free(&valid);
    return r;
}

static void learns_what_depends(void **state) {
    (void)state;
    dependent = true;
    for (int32_t chosen = 1; chosen <= 2; chosen++) {
        result r = trained(chosen, 2, 0);
        assert_int_equal(r.status, SIDA_OK);
        assert_int_equal(r.epochs, 40);
        assert_true(r.parameters && r.kept[0] > 0 && r.kept[1] > 0);
        assert_true(r.last_loss < r.first_loss - 0.5);
        for (int side = 0; side < 2; side++)
            for (int l = 0; l < 2 - side; l++) {
                printf("k = %d, side %d, layer %d known: %.1f %%, up front %.1f %%\n", chosen, side,
                       l, r.rates[side][l], r.up_front[side][l]);
                assert_true(r.rates[side][l] > 95);
                assert_true(r.up_front[side][l] < 20 * chosen);
            }
        free(r.parameters);
    }
}

/* What is known says nothing: then it is as good as chance. */
static void learns_nothing_else(void **state) {
    (void)state;
    dependent = false;
    result r = trained(1, 2, 0);
    assert_int_equal(r.status, SIDA_OK);
    for (int side = 0; side < 2; side++)
        for (int l = 0; l < 2 - side; l++) assert_true(r.rates[side][l] < 25);
    free(r.parameters);
}

static void any_number_of_threads(void **state) {
    (void)state;
    dependent = true;
    result one = trained(2, 1, 0);
    for (int threads = 2; threads <= 5; threads += 3) {
        result more = trained(2, threads, 0);
        assert_int_equal(one.count, more.count);
        assert_memory_equal(one.parameters, more.parameters, (size_t)one.count * sizeof(float));
        assert_memory_equal(one.rates, more.rates, sizeof one.rates);
        free(more.parameters);
    }
    free(one.parameters);
}

static void stops(void **state) {
    (void)state;
    result r = trained(1, 1, 7);
    assert_int_equal(r.status, SIDA_ERROR_CANCELLED);
    assert_int_equal(r.steps, 7);
    assert_null(r.parameters);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(learns_what_depends), cmocka_unit_test(learns_nothing_else),
        cmocka_unit_test(any_number_of_threads), cmocka_unit_test(stops)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
