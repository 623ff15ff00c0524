/* A trace that is killed anywhere resumes to the same bytes, and finished parts are reused. */
#include "formats/base/file.h"
#include "tests/test.h"
#include "tracer/tracer.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
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
    long early_kib, late_kib; /* resident at most: by the 100th batch, by the last one */
    sida_status status;
    char message[256];
} outcome;

typedef struct run {
    int kill_at; /* the callback at which to die; -1: never */
    int limit, top;
    bool resume;
    int64_t part_tokens; /* 0: 200 */
    rlim_t file_bytes;   /* that the child may write to one file; 0: any */
    const char *input, *model;
    outcome *shared;
} run;

static bool on_progress(void *context, const char *stage, double fraction, int64_t tokens) {
    run *r = context;
    (void)fraction, (void)tokens;
    if (r->shared->callbacks++ == r->kill_at) kill(getpid(), SIGKILL);
    if (strcmp(stage, "trace") != 0) {
        r->shared->merge_callbacks++;
        return true;
    }
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    *(r->shared->callbacks <= 100 ? &r->shared->early_kib : &r->shared->late_kib) = usage.ru_maxrss;
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
        options.model = r.model ? r.model : model;
        options.format = SIDA_CORPUS_SST2;
        options.input = r.input ? r.input : corpus;
        options.output = output;
        options.batch = 4;
        options.limit = r.limit;
        options.top = r.top;
        options.part_tokens = r.part_tokens ? r.part_tokens : 200;
        options.resume = r.resume;
        if (r.file_bytes > 0) {
            signal(SIGXFSZ, SIG_IGN);
            setrlimit(RLIMIT_FSIZE, &(struct rlimit){r.file_bytes, r.file_bytes});
        }
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
    assert_true(with_reuse >= 12); /* a dozen batches at most are on their way to a part */
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

/* A part that cannot be written stops the run, by its writer's own words, and what is finished is
 * of use. */
static void stops_when_parts_cannot_be_written(void **state) {
    (void)state;
    outcome o;
    run r = plain;
    clean();
    assert_true(trace(r, 0, &o));
    const int callbacks = o.callbacks - o.merge_callbacks;
    test_bytes expected = test_read(output);
    clean();
    r.file_bytes = 20000; /* far less than a part */
    assert_true(trace(r, 0, &o));
    assert_int_equal(o.status, SIDA_ERROR_IO);
    if (!strstr(o.message, "part-000000.h5") || !strstr(o.message, strerror(EFBIG)))
        fail_msg("%s", o.message);
    assert_true(o.callbacks < callbacks); /* at once, not at the end */
    assert_false(sida_file_exists(output));
    r.file_bytes = 0;
    r.resume = true;
    assert_true(trace(r, 0, &o));
    assert_int_equal(o.status, SIDA_OK);
    test_bytes found = test_read(output);
    assert_int_equal(found.size, expected.size);
    assert_memory_equal(found.data, expected.data, expected.size);
    free(expected.data);
    free(found.data);
}

/* What goes wrong beside the model stops the model too. */
static void stops_at_a_broken_router(void **state) {
    (void)state;
    outcome o;
    run r = plain;
    char path[80], command[256];
    clean();
    snprintf(path, sizeof path, "%s/model", folder);
    snprintf(command, sizeof command, "cp -r %s %s", model, path);
    assert_int_equal(system(command), 0);
    snprintf(command, sizeof command, "%s/model.safetensors", path);
    test_bytes bytes = test_read(command);
    /* The header's length, the header, the tensors. */
    uint64_t header;
    memcpy(&header, bytes.data, sizeof header);
    const char *name = "decoder.block.1.layer.2.mlp.router.classifier.weight";
    char *entry = memmem(bytes.data + 8, header, name, strlen(name)), *offsets;
    unsigned long long first, end;
    assert_non_null(entry);
    assert_non_null(offsets = strstr(entry, "\"data_offsets\""));
    assert_int_equal(sscanf(offsets, "\"data_offsets\":[%llu,%llu]", &first, &end), 2);
    memset(bytes.data + 8 + header + first, 0xff, end - first); /* NaN */
    test_write(command, bytes.data, bytes.size);
    free(bytes.data);
    r.model = path;
    assert_true(trace(r, 0, &o));
    assert_int_equal(o.status, SIDA_ERROR_FORMAT);
    assert_non_null(strstr(o.message, "MoE layer 3's router gave logits that are not finite"));
    assert_true(o.callbacks < 10);
    assert_false(sida_file_exists(output) || sida_file_exists(parts));
    snprintf(command, sizeof command, "rm -r %s", path);
    assert_int_equal(system(command), 0);
}

/* Parts leave memory: 100 batches or 1,000, as much is resident. */
static void long_corpora_stream(void **state) {
    (void)state;
    enum { COPIES = 20 };
    outcome o;
    char path[80];
    run r = {.kill_at = -1, .top = 30, .part_tokens = 2000, .input = path};
    test_bytes once = test_read(corpus);
    const uint8_t *line = memchr(once.data, '\n', once.size);
    assert_non_null(line);
    const size_t head = (size_t)(line + 1 - once.data), body = once.size - head;
    uint8_t *many = malloc(head + COPIES * body);
    assert_non_null(many);
    memcpy(many, once.data, head);
    for (size_t i = 0; i < COPIES; i++) memcpy(many + head + i * body, once.data + head, body);
    snprintf(path, sizeof path, "%s/long.tsv", folder);
    test_write(path, many, head + COPIES * body);
    clean();
    assert_true(trace(r, 0, &o));
    if (o.status != SIDA_OK) fail_msg("%s", o.message);
    struct stat info;
    assert_int_equal(stat(output, &info), 0);
    print_message("%ld KiB by batch 100, %ld KiB by batch %d, trace of %ld KiB\n", o.early_kib,
                  o.late_kib, o.callbacks - o.merge_callbacks, (long)info.st_size / 1024);
    assert_true(o.callbacks - o.merge_callbacks >= 900);
    /* A tenth of the rows at 100 batches, and all of them would show. */
    assert_true((o.late_kib - o.early_kib) * 1024 < (long)info.st_size / 3);
    unlink(path);
    free(many);
    free(once.data);
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
        cmocka_unit_test(stops_when_parts_cannot_be_written),
        cmocka_unit_test(stops_at_a_broken_router),
        cmocka_unit_test(long_corpora_stream),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    clean();
    rmdir(folder);
    return failed;
}
