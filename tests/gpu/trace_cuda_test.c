/* Tracing on CUDA: the best log-probabilities against the CPU's op, recordings against what an
 * observing driver sees, and whole traces. */
#include "formats/trace.h"
#include "tests/recording_rig.h"
#include "tracer/tracer.h"

#include "tests/gpu/op_case.h" /* last: its globals have the names of others' parameters */

#include <unistd.h>

static int64_t top_values, top_others; /* compared, and of these not the same bits */

static void check_top(const float *logits, int64_t n, int32_t experts, int32_t top) {
    const size_t values = (size_t)(n * top), bytes = values * sizeof(uint16_t);
    uint16_t *ids = (uint16_t *)host(n * top), *logp = (uint16_t *)host(n * top),
             *want_ids = (uint16_t *)host(n * top), *want_logp = (uint16_t *)host(n * top);
    sida_top_call call = {room(bytes), room(bytes), put_floats(logits, n * experts),
                          n,           experts,     top};
    OK(cuda()->top(stream, &call));
    get(ids, call.ids, bytes);
    get(logp, call.logp, bytes);
    call.ids = want_ids;
    call.logp = want_logp;
    call.logits = logits;
    OK(sida_top_cpu(NULL, &call));
    for (size_t i = 0; i < values; i++) {
        if (want_logp[i] == SIDA_TOP_NOT_FINITE) { /* then the ids say nothing */
            assert_int_equal(logp[i], SIDA_TOP_NOT_FINITE);
            continue;
        }
        if (ids[i] != want_ids[i] || rig_steps(logp[i], want_logp[i]) > 1)
            fail_msg("%d of %d experts, value %d: id %d, %d expected, bits %04x, %04x expected",
                     top, experts, (int)i, ids[i], want_ids[i], logp[i], want_logp[i]);
        top_others += logp[i] != want_logp[i];
    }
    top_values += (int64_t)values;
    end_case();
}

static void test_top(void **state) {
    (void)state;
    static const int32_t experts[] = {1, 8, 33, 64, 128, 256, 512, 700, 2048},
                         tops[] = {1, 2, 30, 32, 33, 64, 700};
    static const int64_t rows[] = {1, 5, 130};
    for (int e = 0; e < 9; e += gpu_step(2))
        for (int t = 0; t < 7; t += gpu_step(3))
            for (int r = 0; r < gpu_cases(3, 2); r++)
                for (int kind = 0; kind < 3; kind++) {
                    if (tops[t] > experts[e]) continue;
                    /* Plain; many ties; one that is all but certain. */
                    float *logits = normal(rows[r] * experts[e], kind == 2 ? 12 : 2);
                    for (int64_t i = 0; kind == 1 && i < rows[r] * experts[e]; i++)
                        logits[i] = rintf(logits[i]);
                    check_top(logits, rows[r], experts[e], tops[t]);
                }
    printf("%lld of %lld log-probabilities have other bits than the CPU's\n", (long long)top_others,
           (long long)top_values);
}

static void test_extremes(void **state) {
    (void)state;
    const float logits[6][4] = {{-1e30f, 1e30f, 0, 1e5f}, {NAN, 1, 2, 3},
                                {1, 2, 3, INFINITY},      {1, 2, NAN, 3},
                                {0, 1, -INFINITY, 0},     {NAN, NAN, NAN, NAN}};
    check_top(&logits[0][0], 6, 4, 4);
    check_top(&logits[0][0], 6, 4, 1);
}

static void test_recording(void **state) {
    (void)state;
    static const char *const folders[] = {"base",         "every-layer", "dense-decoder",
                                          "gated-untied", "overflow",    "bf16-sharded"};
    for (int i = gpu_cases(0, 3); i < gpu_cases(6, 4); i++) {
        char folder[64];
        sida_backend *device = gpu_open();
        assert_non_null(device);
        snprintf(folder, sizeof folder, "tests/parity/%s", folders[i]);
        rig_check(device, folder, 1 + i % 4, 1);
        sida_backend_destroy(device);
    }
}

/* --- whole traces, of the sample */

static void run_tracer(const char *output, const char *device, bool targets) {
    sida_tracer_options options = SIDA_TRACER_OPTIONS_INIT;
    sida_tracer_report report;
    options.model = "data/sample/model";
    options.format = targets ? SIDA_CORPUS_SST2 : SIDA_CORPUS_TEXT;
    options.input =
        targets ? "data/sample/inputs/reviews-test.tsv" : "data/sample/inputs/prose-test.txt";
    options.output = output;
    options.device = device;
    options.truncate = true;
    options.batch = 7;
    options.limit = gpu_cases(60, 7);
    options.generate = gpu_cases(6, 2);
    options.part_tokens = 500;
    OK(sida_tracer_run(&options, &report));
    assert_string_equal(report.device, device);
    assert_int_equal(report.sequences, options.limit);
}

/* The share of tokens and layers for which both chose the same experts. */
static double agreement(const char *a, const char *b, int side) {
    const char *const paths[2] = {a, b};
    uint16_t *experts[2] = {NULL, NULL};
    size_t values = 0, same = 0;
    for (int i = 0; i < 2; i++) {
        sida_trace *trace;
        OK(sida_trace_open(&trace, paths[i]));
        OK(sida_trace_check(trace));
        const sida_trace_info *info = sida_trace_get_info(trace);
        values = (size_t)(info->tokens[side] * info->layers[side] * info->top_k);
        OK(SIDA_ALLOC(&experts[i], values, "experts"));
        OK(sida_trace_read(trace, side, 0, info->tokens[side],
                           &(sida_trace_rows){.experts = experts[i]}));
        sida_trace_close(trace);
    }
    for (size_t i = 0; i < values; i++) same += experts[0][i] == experts[1][i];
    free(experts[0]);
    free(experts[1]);
    return (double)same / (double)values;
}

static void test_traces(void **state) {
    (void)state;
    char folder[] = "/tmp/sida-trace-cuda-XXXXXX", paths[3][64], command[64];
    assert_non_null(mkdtemp(folder));
    for (int targets = 0; targets < 2; targets++) {
        for (int i = 0; i < 3; i++) {
            snprintf(paths[i], sizeof paths[i], "%s/%d-%d.h5", folder, targets, i);
            run_tracer(paths[i], i < 2 ? "cuda" : "cpu", targets);
        }
        test_bytes first = test_read(paths[0]), again = test_read(paths[1]);
        assert_int_equal(first.size, again.size);
        assert_memory_equal(first.data, again.data, first.size);
        free(first.data);
        free(again.data);
        if (!targets) continue; /* answers may part at a near tie */
        for (int side = 0; side < 2; side++) {
            double share = agreement(paths[0], paths[2], side);
            printf("side %d: %.2f %% of the choices are the CPU's\n", side, 100 * share);
            /* The GPU's activations are rounded to bf16: near ties go either way. */
            assert_true(share > 0.9);
        }
    }
    snprintf(command, sizeof command, "rm -rf %s", folder);
    assert_int_equal(system(command), 0);
}

int main(void) {
    const struct CMUnitTest ops[] = {cmocka_unit_test(test_top), cmocka_unit_test(test_extremes)};
    const struct CMUnitTest passes[] = {cmocka_unit_test(test_recording),
                                        cmocka_unit_test(test_traces)};
    int failed = run_op_tests(ops, 2);
    return failed ? failed : cmocka_run_group_tests(passes, NULL, NULL);
}
