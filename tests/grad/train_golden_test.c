/* The whole step against PyTorch: the loss and every gradient of a batch, then 200 steps; for the
 * paper's network, with an encoder of two directions and softmax, and for a Transformer. */
#include "tests/grad/golden.h"

#include "trainer/adamw.h"
#include "trainer/step.h"

#include <math.h>

static const float lambda = 0.3f;

/* Both sides compute in fp32 in different orders; a gradient here is a sum of some 300 terms, whose
 * error is about 1e-6 of the largest. 1e-4 of the tensor's largest value is the bound. */
static void compare_gradient(const golden *g, const sida_net *gradient, const char *kind) {
    for (int32_t i = 0; i < gradient->tensor_count; i++) {
        const sida_net_tensor *t = &gradient->tensors[i];
        char name[96];
        size_t count;
        snprintf(name, sizeof name, "%s.gradient.%s", kind, t->name);
        float *expected = golden_floats(g, name, &count);
        assert_int_equal(count, t->count);
        double largest = 0, worst = 0;
        for (size_t k = 0; k < count; k++) {
            largest = fmax(largest, fabs((double)expected[k]));
            worst = fmax(worst, fabs((double)t->data[k] - (double)expected[k]));
        }
        assert_true(largest > 0);
        if (!(worst <= 1e-4 * largest)) fail_msg("%s: off by %g, largest %g", name, worst, largest);
        free(expected);
    }
}

static void check_gradient(sida_tkd tkd, golden_kind kind) {
    golden g;
    golden_open(&g, kind);
    sida_step *step;
    int32_t order[64];
    for (int32_t i = 0; i < g.data.sequences; i++) order[i] = i;
    assert_int_equal(sida_step_create(&step, g.net, g.data.sequences, tkd, (double)lambda),
                     SIDA_OK);
    double sum;
    int64_t pairs;
    char name[64];
    size_t count;
    snprintf(name, sizeof name, "%s.loss", sida_tkd_name(tkd));
    float *loss = golden_floats(&g, name, &count);
    /* Twice: a step leaves nothing behind that the next one sees. */
    for (int i = 0; i < 2; i++) {
        assert_int_equal(sida_step_gradient(step, &sum, &pairs, &g.data, order, g.data.sequences),
                         SIDA_OK);
        assert_int_equal(pairs, g.data.sides[0].tokens * g.data.layers[0] +
                                    g.data.sides[1].tokens * g.data.layers[1]);
        double error = fabs(sum / (double)pairs - (double)loss[0]);
        if (!(error <= 1e-4 * (double)loss[0])) fail_msg("%s: off by %g", name, error);
        compare_gradient(&g, sida_step_get_gradient(step), sida_tkd_name(tkd));
    }
    free(loss);
    sida_step_destroy(step);
    golden_close(&g);
}

/* 200 steps from the same tensors over the same batches: 1e-3, the bound, as the rounding
 * of each step is amplified by all that follow. */
static void check_losses(sida_tkd tkd, golden_kind kind) {
    golden g;
    golden_open(&g, kind);
    size_t order_count, steps;
    char name[64];
    snprintf(name, sizeof name, "%s.losses", sida_tkd_name(tkd));
    float *expected = golden_floats(&g, name, &steps),
          *orders = golden_floats(&g, "orders", &order_count);
    int32_t batch = (int32_t)(order_count / steps), order[64];
    assert_int_equal(steps, 200);
    sida_step *step;
    sida_adamw optimiser;
    assert_int_equal(sida_step_create(&step, g.net, batch, tkd, (double)lambda), SIDA_OK);
    assert_int_equal(sida_adamw_create(&optimiser, g.net->parameter_count, 0.01), SIDA_OK);
    double worst = 0;
    for (size_t i = 0; i < steps; i++) {
        double sum;
        int64_t pairs;
        for (int32_t k = 0; k < batch; k++)
            order[k] = (int32_t)orders[i * (size_t)batch + (size_t)k];
        assert_int_equal(sida_step_gradient(step, &sum, &pairs, &g.data, order, batch), SIDA_OK);
        double error = fabs(sum / (double)pairs - (double)expected[i]) / (double)expected[i];
        worst = fmax(worst, error);
        if (!(error <= 1e-3)) fail_msg("%s: step %zu is off by %g", name, i, error);
        sida_adamw_step(&optimiser, g.net->parameters, sida_step_get_gradient(step)->parameters,
                        kind == GOLDEN_TRANSFORMER ? 5e-4 : 5e-3);
    }
    printf("%s: worst relative error %.2g\n", name, worst);
    assert_true(expected[steps - 1] < 0.6f * expected[0]);
    sida_adamw_free(&optimiser);
    sida_step_destroy(step);
    free(expected);
    free(orders);
    golden_close(&g);
}

static void gradient_rest(void **state) {
    (void)state;
    check_gradient(SIDA_TKD_REST, GOLDEN_PAPER);
    check_gradient(SIDA_TKD_REST, GOLDEN_OPTIONS);
    check_gradient(SIDA_TKD_REST, GOLDEN_TRANSFORMER);
}
static void gradient_l1(void **state) {
    (void)state;
    check_gradient(SIDA_TKD_L1_RENORM, GOLDEN_PAPER);
    check_gradient(SIDA_TKD_L1_RENORM, GOLDEN_OPTIONS);
}
static void losses_rest(void **state) {
    (void)state;
    check_losses(SIDA_TKD_REST, GOLDEN_PAPER);
    check_losses(SIDA_TKD_REST, GOLDEN_OPTIONS);
    check_losses(SIDA_TKD_REST, GOLDEN_TRANSFORMER);
}
static void losses_l1(void **state) {
    (void)state;
    check_losses(SIDA_TKD_L1_RENORM, GOLDEN_PAPER);
    check_losses(SIDA_TKD_L1_RENORM, GOLDEN_OPTIONS);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(gradient_rest),
                                       cmocka_unit_test(gradient_l1), cmocka_unit_test(losses_rest),
                                       cmocka_unit_test(losses_l1)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
