/* libsida as a program outside sees it: this file includes runtime/sida.h alone, so that header
 * must stand on its own, and links the shared library, so all it needs must be visible. */
#include "runtime/sida.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

/* The header's own list of codes is the library's. */
static void test_codes(void **state) {
    (void)state;
    static const struct {
        sida_status code;
        const char *name;
    } codes[] = {
        {SIDA_OK, "ok"},
        {SIDA_ERROR_ARGUMENT, "argument"},
        {SIDA_ERROR_MEMORY, "memory"},
        {SIDA_ERROR_IO, "io"},
        {SIDA_ERROR_FORMAT, "format"},
        {SIDA_ERROR_MISMATCH, "mismatch"},
        {SIDA_ERROR_BUDGET, "budget"},
        {SIDA_ERROR_DEVICE, "device"},
        {SIDA_ERROR_CANCELLED, "cancelled"},
        {SIDA_ERROR_UNSUPPORTED, "unsupported"},
    };
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        assert_string_equal(sida_error_name(codes[i].code), codes[i].name);
    assert_true(strlen(sida_version()) >= 5);
    assert_int_equal(sida_error_raise(SIDA_ERROR_CANCELLED, "100% enough"), SIDA_ERROR_CANCELLED);
    assert_string_equal(sida_error_message(), "100% enough");
}

static void refuse(const sida_engine_options *options, sida_status code, const char *words) {
    sida_engine *engine = (sida_engine *)options; /* must be set to NULL */
    assert_int_equal(sida_engine_open(&engine, options), code);
    assert_null(engine);
    if (!strstr(sida_error_message(), words))
        fail_msg("'%s' is not in '%s'", words, sida_error_message());
}

static void test_refusals(void **state) {
    (void)state;
    const sida_engine_options good = SIDA_ENGINE_OPTIONS_INIT;
    sida_engine_options options = good;
    refuse(&options, SIDA_ERROR_ARGUMENT, "no model");
    options.model = "no/such/model";
    refuse(&options, SIDA_ERROR_IO, "no/such/model");
    options.version = 7;
    refuse(&options, SIDA_ERROR_ARGUMENT, "version 7");
    options.version = good.version;
    /* Built without CUDA, no GPU, or one that gets as far as the model. */
    options.device = "cuda";
    sida_engine *engine;
    sida_status status = sida_engine_open(&engine, &options);
    assert_null(engine);
    if (status == SIDA_ERROR_UNSUPPORTED || status == SIDA_ERROR_DEVICE)
        assert_non_null(strstr(sida_error_message(), "use --device cpu"));
    else
        assert_int_equal(status, SIDA_ERROR_IO);
    options.device = "tpu";
    refuse(&options, SIDA_ERROR_ARGUMENT, "tpu");
    options.device = good.device;
    options.policy = "mru";
    refuse(&options, SIDA_ERROR_ARGUMENT, "fifo, lru, lookahead");
    options.policy = good.policy;
    options.routing = "vague";
    refuse(&options, SIDA_ERROR_ARGUMENT, "vague");
    options.routing = "guided";
    refuse(&options, SIDA_ERROR_ARGUMENT, "needs a predictor");
    options.routing = good.routing;
    options.budget = "much";
    refuse(&options, SIDA_ERROR_ARGUMENT, "much");
    options.budget = good.budget;
    options.batch = 0;
    refuse(&options, SIDA_ERROR_ARGUMENT, "batch 0");
    options.batch = 1;
    options.queue = 0;
    refuse(&options, SIDA_ERROR_ARGUMENT, "queue 0");
    options.queue = 1;
    options.max_new_tokens = 0;
    refuse(&options, SIDA_ERROR_ARGUMENT, "max-new-tokens 0");
    sida_engine_close(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_codes),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
