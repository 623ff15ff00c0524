/* The refinement itself: its definition, a row's bytes, initial values. */
#include "tests/refine_cases.h"

static const sida_net_config config = {
    .d_model = 4, .hidden = 19, .lstm_layers = 1, .experts = 10, .vocabulary = 9, .layers = {4, 3}};
enum { TOP_K = 2 };

/* Random shapes. All scores of all steps against the definition, and a token alone against the same
 * in the batch, to the byte. */
static void definition(void **state) {
    (void)state;
    sida_rng rng = sida_rng_seed(21);
    double worst = 0, largest = 0;
    for (int round = 0; round < 60; round++) {
        sida_net_config of = config;
        of.hidden = 1 + (int32_t)sida_rng_below(&rng, 70);
        of.experts = 3 + (int32_t)sida_rng_below(&rng, 40);
        for (int side = 0; side < 2; side++) of.layers[side] = 2 + (int32_t)sida_rng_below(&rng, 4);
        const int32_t width = 1 + (int32_t)sida_rng_below(&rng, 64);
        const int32_t k = 1 + (int32_t)sida_rng_below(&rng, 3);
        const int64_t n = (int64_t)sida_rng_below(&rng, 40), h = of.hidden;
        const int side = round % 2;
        const int32_t layers = of.layers[side], experts = of.experts;
        const int64_t all = (int64_t)layers * experts;
        sida_refine *refine = case_refine(&of, width);
        float *f = calloc((size_t)(n * h + 1), sizeof *f);
        float *s = calloc((size_t)(n * all + 1), sizeof *s);
        float *sum = calloc((size_t)(n * width + 1), sizeof *sum), *scores = malloc(1 << 20);
        int32_t *chosen = calloc((size_t)(layers * n * k + 1), sizeof *chosen);
        float z[40 * 64], one_sum[64], one_z[64], one_scores[5 * 43];
        case_noise(f, n * h, 1, (uint64_t)round);
        case_noise(s, n * all, 2, (uint64_t)round + 100);
        case_choose(chosen, layers * n, k, experts, &rng);
        const int64_t alone = n > 0 ? (int64_t)sida_rng_below(&rng, (uint32_t)n) : 0;
        case_ok(sida_refine_begin(refine, side, sum, f, n));
        if (n > 0) case_ok(sida_refine_begin(refine, side, one_sum, f + alone * h, 1));
        for (int32_t l = 0; l < layers - 1; l++) {
            const int32_t *of_layer = chosen + l * n * k;
            const int64_t rest = (int64_t)(layers - 1 - l) * experts;
            sida_refine_know(refine, side, l, sum, of_layer, k, n);
            case_ok(sida_refine_scores(refine, side, l, scores, z, sum, s, n));
            for (int64_t i = 0; i < n; i++)
                for (int32_t m = l + 1; m < layers; m++) {
                    double wanted[43];
                    case_evaluate(wanted, refine, side, l, m, f, s, chosen, n, i, k);
                    for (int32_t e = 0; e < experts; e++) {
                        const float got = scores[i * rest + (int64_t)(m - l - 1) * experts + e];
                        worst = fmax(worst, fabs((double)got - wanted[e]));
                        largest = fmax(largest, fabs(wanted[e]));
                    }
                }
            if (n == 0) continue;
            sida_refine_know(refine, side, l, one_sum, of_layer + alone * k, k, 1);
            case_ok(sida_refine_scores(refine, side, l, one_scores, one_z, one_sum, s + alone * all,
                                       1));
            assert_memory_equal(one_scores, scores + alone * rest, (size_t)rest * sizeof *scores);
            assert_memory_equal(one_z, z + alone * width, (size_t)width * sizeof *z);
        }
        free(f);
        free(s);
        free(sum);
        free(scores);
        free(chosen);
        sida_refine_destroy(refine);
    }
    /* Sums of some hundred products of order 1 in fp32, each within 1e-7 of its size. */
    printf("off by at most %.2g of %.2g\n", worst, largest);
    assert_true(largest > 10 && worst < 1e-4);
}

/* Enough of everything that loops are shared among threads. */
static void threads_of_many(void **state) {
    (void)state;
    enum { N = 700, WIDE = 96, MANY = 64, HIDDEN = 48 };
    sida_net_config of = config;
    of.hidden = HIDDEN;
    of.experts = MANY;
    sida_refine *refine = case_refine(&of, WIDE);
    float *f = calloc(N * HIDDEN, sizeof *f), *s = calloc(N * 4 * MANY, sizeof *s);
    float *sums[2] = {malloc(N * WIDE * 4), malloc(N * WIDE * 4)}, *z = malloc(N * WIDE * 4);
    float *scores[2] = {malloc(N * 3 * MANY * 4), malloc(N * 3 * MANY * 4)};
    int32_t *chosen = calloc(N * TOP_K, sizeof *chosen);
    sida_rng rng = sida_rng_seed(4);
    case_noise(f, N * HIDDEN, 1, 1);
    case_noise(s, N * 4 * MANY, 1, 2);
    case_choose(chosen, N, TOP_K, MANY, &rng);
    for (int threads = 1; threads <= 4; threads++) {
        const int to = threads > 1;
        case_threads(threads);
        case_ok(sida_refine_begin(refine, 0, sums[to], f, N));
        sida_refine_know(refine, 0, 0, sums[to], chosen, TOP_K, N);
        case_ok(sida_refine_scores(refine, 0, 0, scores[to], z, sums[to], s, N));
        assert_memory_equal(sums[0], sums[to], N * WIDE * 4);
        assert_memory_equal(scores[0], scores[to], N * 3 * MANY * 4);
    }
    case_threads(1);
    for (int i = 0; i < 2; i++) {
        free(sums[i]);
        free(scores[i]);
    }
    free(f);
    free(s);
    free(z);
    free(chosen);
    sida_refine_destroy(refine);
}

static void initial_values(void **state) {
    (void)state;
    sida_net_config of = config;
    of.hidden = 64;
    of.experts = 32;
    sida_refine *refine[2];
    for (int i = 0; i < 2; i++) {
        case_ok(sida_refine_create(&refine[i], &of, 256));
        for (int64_t k = 0; k < refine[i]->parameter_count; k++)
            assert_true(refine[i]->parameters[k] == 0);
        sida_refine_initialise(refine[i], 8);
    }
    assert_memory_equal(refine[0]->parameters, refine[1]->parameters,
                        (size_t)refine[0]->parameter_count * 4);
    for (int32_t i = 0; i < refine[0]->tensor_count; i++) {
        const sida_net_tensor *t = &refine[0]->tensors[i];
        const double wanted = strstr(t->name, "features") ? 1 / 8.0
                              : strstr(t->name, "known")  ? 1 / 16.0
                                                          : 0;
        double squares = 0;
        for (int64_t k = 0; k < t->count; k++) squares += (double)t->data[k] * (double)t->data[k];
        assert_true(fabs(sqrt(squares / (double)t->count) - wanted) <= 0.02 * wanted);
    }
    sida_refine *none = NULL;
    case_refused(sida_refine_create(&none, &of, 0), SIDA_ERROR_ARGUMENT, "a width of 0");
    case_refused(sida_refine_create(&none, &of, SIDA_REFINE_WIDTH_MAX + 1), SIDA_ERROR_ARGUMENT,
                 "a width of 1025");
    of.layers[0] = of.layers[1] = 1;
    case_refused(sida_refine_create(&none, &of, 8), SIDA_ERROR_ARGUMENT, "two MoE layers");
    assert_null(none);
    for (int i = 0; i < 2; i++) sida_refine_destroy(refine[i]);
    sida_refine_destroy(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(definition),
                                       cmocka_unit_test(threads_of_many),
                                       cmocka_unit_test(initial_values)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
