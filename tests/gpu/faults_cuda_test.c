/* A device that refuses, and one that goes: what is said, that nothing hangs, that nothing leaks.
 */
#include "formats/base/log.h"
#include "tests/gpu/gpu.h"
#include "tests/integration/identity_rig.h"

#include <unistd.h>

enum { SEQUENCES = 12, HANGS_AFTER_S = 60 };

static int warnings;
static char last_warning[512];

static void on_note(void *context, sida_log_level level, const char *line) {
    (void)context;
    if (level != SIDA_LOG_WARNING) return;
    warnings++;
    snprintf(last_warning, sizeof last_warning, "%s", line);
}

static sida_backend *open_with(sida_cuda_options options) {
    sida_backend *backend;
    options.poison = true;
    OK(sida_backend_create_cuda(&backend, &options));
    return backend;
}

static sida_pass_options options_of(rig *r, int32_t slots) {
    return (sida_pass_options){.source = &r->source,
                               .top_k = 2,
                               .slots = slots,
                               .queue = 2,
                               .prefetch = true,
                               .policy = sida_policy_find("lookahead")};
}

static sida_fingerprint digest_of(sida_cuda_options options) {
    rig r;
    sida_pass_stats stats;
    rig_open_on(&r, open_with(options), NULL, SEQUENCES);
    OK(rig_pass(&r, &stats, options_of(&r, 5), 4, 3));
    sida_fingerprint digest = stats.digest;
    sida_pass_stats_free(&stats);
    rig_close(&r);
    return digest;
}

/* Refused pinned memory costs time, nothing else, and is said once. */
static void test_no_pinned(void **state) {
    (void)state;
    sida_buffer *buffer;
    warnings = 0;
    sida_log_set_sink(on_note, NULL);
    sida_fingerprint pinned = digest_of((sida_cuda_options){0});
    assert_int_equal(warnings, 0);
    sida_fingerprint ordinary = digest_of((sida_cuda_options){.no_pinned = true});
    assert_int_equal(warnings, 1);
    assert_non_null(strstr(last_warning, "refused"));
    assert_non_null(strstr(last_warning, "ulimit -l"));
    assert_non_null(strstr(last_warning, "two to four times as long"));
    assert_true(sida_fingerprint_equal(pinned, ordinary));
    sida_log_set_sink(NULL, NULL);
    for (int refused = 0; refused < 2; refused++) {
        sida_backend *backend = open_with((sida_cuda_options){.no_pinned = refused});
        OK(sida_buffer_create(backend, &buffer, SIDA_MEMORY_HOST, 100, "host"));
        assert_true(buffer->pinned == !refused);
        sida_buffer_destroy(buffer);
        sida_backend_destroy(backend);
    }
}

/* The N-th copy and everything behind it fails. */
static void test_lost(void **state) {
    (void)state;
    for (int64_t at = 1; at <= 61; at += gpu_cases(12, 60)) {
        rig r;
        sida_pass_stats stats;
        rig_open_on(&r, open_with((sida_cuda_options){.fail_copy = at}), NULL, SEQUENCES);
        alarm((unsigned)gpu_cases(HANGS_AFTER_S, 10 * HANGS_AFTER_S)); /* ends the test */
        assert_int_equal(rig_pass(&r, &stats, options_of(&r, 3), 1, (unsigned)at),
                         SIDA_ERROR_DEVICE);
        alarm(0);
        assert_non_null(strstr(sida_last_message(), "start again"));
        assert_non_null(strstr(sida_last_message(), "nvidia-smi"));
        sida_pass_stats_free(&stats);
        rig_close(&r);
    }
}

/* More than the device has: what is free is said, and it goes on. */
static void test_too_large(void **state) {
    (void)state;
    sida_backend *backend = open_with((sida_cuda_options){0});
    sida_device_info info;
    sida_memory_usage usage;
    sida_buffer *buffer;
    char total[40];
    OK(sida_backend_describe(backend, &info));
    OK(sida_backend_set_cap(backend, 2 * info.total_bytes));
    assert_int_equal(sida_buffer_create(backend, &buffer, SIDA_MEMORY_DEVICE,
                                        info.total_bytes + (1 << 20), "expert slots"),
                     SIDA_ERROR_DEVICE);
    assert_null(buffer);
    snprintf(total, sizeof total, "of %zu are free", info.total_bytes);
    assert_non_null(strstr(sida_last_message(), total));
    assert_non_null(strstr(sida_last_message(), "smaller budget"));
    sida_backend_memory(backend, &usage);
    assert_int_equal(usage.used_bytes, 0);
    OK(sida_buffer_create(backend, &buffer, SIDA_MEMORY_DEVICE, 1 << 20, "a buffer"));
    sida_buffer_destroy(buffer);
    sida_backend_destroy(backend);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_pinned),
        cmocka_unit_test(test_lost),
        cmocka_unit_test(test_too_large),
    };
    sida_backend *backend = gpu_open();
    if (!backend) return test_skip(sida_last_message());
    sida_backend_destroy(backend);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
