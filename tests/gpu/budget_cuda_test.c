/* A size as budget caps what the driver says that we take, and what is said when it is too small.
 */
#include "runtime/sida.h"
#include "tests/gpu/gpu.h"

#include <unistd.h>

#define SAMPLE_MODEL "data/sample/model"
#define SAMPLE_INPUT "data/sample/inputs/reviews-test.tsv"

static void run(const char *budget, sida_engine_facts *facts, sida_report *first,
                sida_report *second) {
    sida_engine *engine;
    sida_engine_options options = SIDA_ENGINE_OPTIONS_INIT;
    sida_job job = SIDA_JOB_INIT;
    options.model = SAMPLE_MODEL;
    options.device = "cuda";
    options.budget = budget;
    options.batch = 4;
    options.max_tokens = gpu_cases(128, 24);
    options.truncate = true;
    options.max_new_tokens = gpu_cases(4, 2);
    job.format = "sst2";
    job.input = SAMPLE_INPUT;
    job.limit = gpu_cases(48, 4);
    job.digest = true;
    OK(sida_engine_open(&engine, &options));
    OK(sida_engine_run(engine, &job, first));
    /* Another job on the same engine finds the libraries grown. */
    OK(sida_engine_run(engine, &job, second));
    sida_engine_get_facts(engine, facts);
    sida_engine_close(engine);
    printf("budget %s: %d slots; driver %.1f MiB at peak, buffers %.1f; %.1f set aside for driver "
           "and libraries\n",
           budget, facts->slots, (double)second->driver_bytes_peak / (1 << 20),
           (double)second->device_bytes_peak / (1 << 20), (double)facts->driver_bytes / (1 << 20));
}

static void test_size(void **state) {
    (void)state;
    sida_engine_facts all, few;
    const uint64_t room = 5 << 20; /* less than half of the sample's experts */
    sida_report resident[2], part[2];
    char budget[32];
    run("100%", &all, &resident[0], &resident[1]);
    assert_true(all.resident && all.slots == all.experts);
    assert_true(resident[0].driver_bytes_peak > resident[0].device_bytes_peak);
    assert_int_equal(resident[0].bytes_moved, 0);
    /* Once more, now that the process has loaded its kernels. */
    run("100%", &all, &resident[0], &resident[1]);
    uint64_t bytes = all.dense_bytes + all.workspace_bytes + all.driver_bytes + room;
    snprintf(budget, sizeof budget, "%llu", (unsigned long long)bytes);
    if (gpu_small()) snprintf(budget, sizeof budget, "8-experts");
    run(budget, &few, part, part + 1);
    assert_false(few.resident);
    assert_true(few.slots >= 2 && few.slots < few.experts);
    for (int i = 0; i < 2; i++) {
        assert_string_equal(part[i].digest, resident[i].digest);
        assert_true(part[i].bytes_moved > 0);
        if (!gpu_small() && part[i].driver_bytes_peak > bytes)
            fail_msg("%llu bytes by the driver, budget %s",
                     (unsigned long long)part[i].driver_bytes_peak, budget);
    }
}

/* Twice the device: all experts are there, nothing is asked for in vain. */
static void test_larger_than_device(void **state) {
    (void)state;
    sida_engine_facts facts;
    sida_report first, second;
    if (gpu_small()) skip(); /* as test_size, from another size */
    run("100TiB", &facts, &first, &second);
    assert_true(facts.resident);
}

static void test_too_small(void **state) {
    (void)state;
    sida_engine *engine;
    sida_engine_options options = SIDA_ENGINE_OPTIONS_INIT;
    options.model = SAMPLE_MODEL;
    options.device = "cuda";
    options.budget = "40MiB"; /* enough for weights, not for the driver */
    assert_int_equal(sida_engine_open(&engine, &options), SIDA_ERROR_BUDGET);
    assert_null(engine);
    static const char *const parts[] = {"dense weights", "workspace", "predictor",
                                        "driver and libraries", "2 slots of"};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (!strstr(sida_error_message(), parts[i]))
            fail_msg("'%s' is not in '%s'", parts[i], sida_error_message());
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_size),
        cmocka_unit_test(test_larger_than_device),
        cmocka_unit_test(test_too_small),
    };
    if (access(SAMPLE_MODEL "/config.json", R_OK) != 0)
        return test_skip("no " SAMPLE_MODEL " in this tree");
    sida_backend *backend = gpu_open();
    if (!backend) return test_skip(sida_last_message());
    sida_backend_destroy(backend);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
