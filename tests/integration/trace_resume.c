/* A trace that is killed anywhere resumes to the same bytes, and finished parts are reused. */
#include "formats/base/file.h"
#include "tests/test.h"
#include "tracer/tracer.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *const model = "data/sample/model";
static const char *const corpus = "data/sample/inputs/reviews-test.tsv";

static char folder[] = "/tmp/sida-trace-resume-XXXXXX";
static char output[64], parts[80];

/* What a child reports: it ends before it can report anything else when it is killed. */
typedef struct outcome {
    int callbacks, merge_callbacks, reused;
    sida_status status;
    char message[256];
} outcome;

typedef struct run {
    int kill_at; /* the callback at which to die; -1: never */
    int limit, top;
    bool resume;
    const char *input;
    outcome *shared;
} run;

static bool on_progress(void *context, const char *stage, double fraction, int64_t tokens) {
    run *r = context;
    (void)fraction, (void)tokens;
    if (r->shared->callbacks++ == r->kill_at) kill(getpid(), SIGKILL);
    if (strcmp(stage, "trace") != 0) r->shared->merge_callbacks++;
    return true;
}

/* Runs the tracer in a child, so that it can be killed and its threads do not outlive it. Kills it
 * after delay_us when that is not 0. Returns false when the child was killed. */
static bool trace(run r, unsigned delay_us, outcome *out) {
    r.shared = test_shared_memory(sizeof *r.shared);
    memset(r.shared, 0, sizeof *r.shared);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        sida_tracer_options options = SIDA_TRACER_OPTIONS_INIT;
        sida_tracer_report report;
        options.model = model;
        options.format = SIDA_CORPUS_SST2;
        options.input = r.input ? r.input : corpus;
        options.output = output;
        options.batch = 4;
        options.limit = r.limit;
        options.top = r.top;
        options.part_tokens = 200;
        options.resume = r.resume;
        options.progress = on_progress;
        options.context = &r;
        r.shared->status = sida_tracer_run(&options, &report);
        r.shared->reused = report.parts_reused;
        snprintf(r.shared->message, sizeof r.shared->message, "%s", sida_last_message());
        _exit(0);
    }
    if (delay_us > 0) {
        usleep(delay_us);
        kill(child, SIGKILL);
    }
    int state;
    assert_int_equal(waitpid(child, &state, 0), child);
    *out = *r.shared;
    test_shared_free(r.shared, sizeof *r.shared);
    return WIFEXITED(state);
}

static const run plain = {.kill_at = -1, .limit = 96, .top = 8};

static void clean(void) {
    char command[256];
    snprintf(command, sizeof command, "rm -rf %s %s %s.tmp", output, parts, output);
    assert_int_equal(system(command), 0);
}

static void killed_anywhere(void **state) {
    (void)state;
    outcome full, killed, resumed;
    test_bytes expected, found;
    clean();
    assert_true(trace(plain, 0, &full));
    assert_int_equal(full.status, SIDA_OK);
    assert_true(full.callbacks >= 30);
    assert_true(full.merge_callbacks >= 5);
    assert_int_equal(full.reused, 0);
    expected = test_read(output);
    int with_reuse = 0, in_merge = 0;
    for (int point = 0; point < 20; point++) {
        run r = plain;
        clean();
        /* Spread over all callbacks, the merge's last one included. */
        r.kill_at = point * (full.callbacks - 1) / 19;
        assert_false(trace(r, 0, &killed));
        assert_false(sida_file_exists(output)); /* complete, or not there */
        if (r.kill_at >= full.callbacks - full.merge_callbacks) in_merge++;
        r.kill_at = -1;
        r.resume = true;
        assert_true(trace(r, 0, &resumed));
        if (resumed.status != SIDA_OK) fail_msg("%s", resumed.message);
        if (resumed.reused > 0) with_reuse++;
        found = test_read(output);
        assert_int_equal(found.size, expected.size);
        assert_memory_equal(found.data, expected.data, expected.size);
        assert_false(sida_file_exists(parts));
        free(found.data);
    }
    print_message("20 kills, %d in the merge, %d resumed from finished parts\n", in_merge,
                  with_reuse);
    assert_true(in_merge >= 2);
    assert_true(with_reuse >= 14);
    free(expected.data);
}

/* Kills by the clock: between callbacks, inside a write, during the clean-up. */
static void killed_by_the_clock(void **state) {
    (void)state;
    outcome o;
    test_bytes expected, found;
    clean();
    double begin = test_seconds();
    assert_true(trace(plain, 0, &o));
    double seconds = test_seconds() - begin;
    expected = test_read(output);
    for (int i = 1; i <= 10; i++) {
        run r = plain;
        clean();
        trace(r, (unsigned)(seconds * 1e6 * i / 10), &o);
        r.resume = true;
        trace(r, (unsigned)(seconds * 1e6 * i / 20), &o); /* twice killed */
        assert_true(trace(r, 0, &o));
        if (o.status != SIDA_OK) fail_msg("%s", o.message);
        found = test_read(output);
        assert_int_equal(found.size, expected.size);
        assert_memory_equal(found.data, expected.data, expected.size);
        assert_false(sida_file_exists(parts));
        free(found.data);
    }
    free(expected.data);
}

static void refuses_what_changed(void **state) {
    (void)state;
    outcome o;
    run r = plain;
    clean();
    r.kill_at = 15;
    assert_false(trace(r, 0, &o));
    /* Without --resume the parts of an unfinished run are not thrown away. */
    r.kill_at = -1;
    assert_true(trace(r, 0, &o));
    assert_int_equal(o.status, SIDA_ERROR_ARGUMENT);
    r.resume = true;
    r.top = 9;
    assert_true(trace(r, 0, &o));
    assert_int_equal(o.status, SIDA_ERROR_MISMATCH);
    assert_non_null(strstr(o.message, "options"));
    r.top = plain.top;
    r.input = "data/sample/inputs/reviews-train.tsv";
    assert_true(trace(r, 0, &o));
    assert_int_equal(o.status, SIDA_ERROR_MISMATCH);
    assert_non_null(strstr(o.message, "another input"));
    r.input = corpus;
    assert_true(trace(r, 0, &o));
    assert_int_equal(o.status, SIDA_OK);
    assert_true(o.reused > 0);
    /* A finished trace resumes to itself. */
    assert_true(trace(r, 0, &o));
    assert_int_equal(o.status, SIDA_OK);
    assert_int_equal(o.callbacks, 0);
}

int main(void) {
    if (!sida_file_exists("data/sample/model/config.json")) return test_skip("no sample model");
    if (!mkdtemp(folder)) return 1;
    snprintf(output, sizeof output, "%s/t.h5", folder);
    snprintf(parts, sizeof parts, "%s.parts", output);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(killed_anywhere),
        cmocka_unit_test(killed_by_the_clock),
        cmocka_unit_test(refuses_what_changed),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    clean();
    rmdir(folder);
    return failed;
}
