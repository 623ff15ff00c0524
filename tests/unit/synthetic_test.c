/* The synthetic model: the same options give the same finite logits, and its routers use experts as
 * unevenly as they should. */
#include "runtime/model/synthetic.h"
#include "tests/test.h"

#include <math.h>
#include <string.h>

enum { TOKENS = 1500, EXPERTS = 24, VOCABULARY = 2048, SITES = 4 };

#define OK(call)                                                                                   \
    do {                                                                                           \
        sida_status got = (call);                                                                  \
        if (got != SIDA_OK) fail_msg("%s: %s", #call, sida_last_message());                        \
    } while (0)

static sida_synthetic_options small(sida_dtype dtype, uint64_t seed) {
    return (sida_synthetic_options){.name = "small",
                                    .experts = EXPERTS,
                                    .dtype = dtype,
                                    .layers = {4, 4},
                                    .d_model = 192,
                                    .d_kv = 16,
                                    .heads = 4,
                                    .d_ff = 256,
                                    .vocabulary = VOCABULARY,
                                    .capacity = 64,
                                    .seed = seed};
}

typedef struct counts {
    double of[SITES][EXPERTS];
} counts;

static sida_status count(void *context, const sida_moe_call *call) {
    counts *c = context;
    for (int64_t t = 0; t < call->tokens; t++) c->of[call->site][call->experts[t]]++;
    return SIDA_OK;
}

/* Logits of one decoder token behind TOKENS distinct ids. */
static void forward(const sida_synthetic_options *options, float *logits, counts *c) {
    static const int64_t offsets[] = {0, TOKENS}, step_offsets[] = {0, 1};
    static const int32_t start[] = {0};
    static int32_t ids[TOKENS];
    const sida_run_limits limits = {1, TOKENS, 1, 1, 0};
    const sida_ragged input = {1, offsets, ids}, step = {1, step_offsets, start};
    sida_backend *backend;
    sida_model *model;
    sida_resident *resident;
    sida_run *run;
    for (int32_t i = 0; i < TOKENS; i++) ids[i] = 3 + i;
    OK(sida_backend_create_cpu(&backend, &(sida_cpu_options){.poison = true}));
    OK(sida_model_open_synthetic(&model, backend, options));
    const sida_model_info *info = sida_model_get_info(model);
    assert_int_equal(info->sites, SITES);
    assert_int_equal(info->experts, EXPERTS);
    assert_int_equal(info->expert.dtype, options->dtype);
    assert_null(sida_model_checkpoint(model));
    OK(sida_resident_create(&resident, model));
    OK(sida_run_create(&run, model, &limits));
    const sida_moe_driver *driver = sida_resident_driver(resident, c, NULL, c ? count : NULL);
    OK(sida_run_encode(run, &input, driver));
    OK(sida_run_decode(run, &step, driver));
    OK(sida_run_read_logits(run, 0, 1, logits));
    sida_run_destroy(run);
    sida_resident_destroy(resident);
    sida_model_destroy(model);
    sida_backend_destroy(backend);
}

static void test_same_options_same_logits(void **state) {
    static float a[VOCABULARY], b[VOCABULARY], other[VOCABULARY];
    (void)state;
    for (int i = 0; i < 2; i++) {
        sida_dtype dtype = i ? SIDA_F32 : SIDA_BF16;
        sida_synthetic_options options = small(dtype, 1), reseeded = small(dtype, 2);
        double squares = 0;
        forward(&options, a, NULL);
        forward(&options, b, NULL);
        forward(&reseeded, other, NULL);
        assert_memory_equal(a, b, sizeof a);
        assert_memory_not_equal(a, other, sizeof a);
        for (int v = 0; v < VOCABULARY; v++) {
            assert_true(isfinite(a[v]));
            squares += (double)a[v] * a[v];
        }
        assert_true(squares > 0);
    }
}

static int falling(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

/* With these random vectors the layers came within 0.05 of the target (half the sum of absolute
 * differences); a router of equal gains would be 0.39 away. */
static void test_shares_are_near_the_target(void **state) {
    static float logits[VOCABULARY];
    static counts c;
    double target[EXPERTS], even = 0;
    sida_synthetic_options options = small(SIDA_BF16, 1);
    (void)state;
    memset(&c, 0, sizeof c);
    sida_synthetic_shares(target, EXPERTS);
    forward(&options, logits, &c);
    for (int e = 0; e < EXPERTS; e++) even += fabs(1.0 / EXPERTS - target[e]) / 2;
    assert_true(even > 0.3);
    for (int site = 0; site < SITES / 2; site++) { /* the encoder's */
        double distance = 0;
        qsort(c.of[site], EXPERTS, sizeof *c.of[site], falling);
        for (int e = 0; e < EXPERTS; e++) distance += fabs(c.of[site][e] / TOKENS - target[e]) / 2;
        print_message("site %d: %.3f from the target, evenly spread %.3f\n", site, distance, even);
        assert_true(distance < 0.1);
    }
}

static void test_target(void **state) {
    double shares[300];
    (void)state;
    static const int32_t sizes[] = {1, 2, 8, 64, 128, 300};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        double sum = 0;
        sida_synthetic_shares(shares, sizes[i]);
        for (int32_t e = 0; e < sizes[i]; e++) {
            sum += shares[e];
            assert_true(shares[e] > 0);
            if (e > 0) assert_true(shares[e] <= shares[e - 1]);
        }
        assert_true(fabs(sum - 1) < 1e-9);
    }
}

static void refused(sida_synthetic_options options) {
    sida_backend *backend;
    sida_model *model;
    OK(sida_backend_create_cpu(&backend, NULL));
    assert_int_equal(sida_model_open_synthetic(&model, backend, &options), SIDA_ERROR_ARGUMENT);
    assert_null(model);
    assert_non_null(strstr(sida_last_message(), "small"));
    sida_backend_destroy(backend);
}

static void test_refusals(void **state) {
    (void)state;
    sida_synthetic_options options = small(SIDA_F16, 1);
    refused(options);
    options = small(SIDA_F32, 1);
    options.experts = 0;
    refused(options);
    options = small(SIDA_F32, 1);
    options.layers[1] = 3;
    refused(options);
    options = small(SIDA_F32, 1);
    options.d_kv = 0;
    refused(options);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_options_same_logits),
        cmocka_unit_test(test_shares_are_near_the_target),
        cmocka_unit_test(test_target),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
