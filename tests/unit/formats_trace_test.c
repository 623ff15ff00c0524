/* Traces: what is written is read, the same calls give the same bytes, and damage is reported. */
#include "formats/base/file.h"
#include "formats/trace.h"
#include "tests/unit/formats_support.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { EXPERTS = 64, TOP = 30, VOCABULARY = 1000, D_MODEL = 8, LENGTH = 50 };

static sida_trace_info make_info(int layers_encoder, int layers_decoder, int k, bool targets) {
    return (sida_trace_info){.model = {1, 2},
                             .tokenizer = {3, 4},
                             .input = {5, 6},
                             .config = (char *)(uintptr_t) "{\"d_model\":8}",
                             .options = (char *)(uintptr_t) "{}",
                             .family = (char *)(uintptr_t) "switch_transformers",
                             .experts = EXPERTS,
                             .top_k = k,
                             .top = TOP,
                             .d_model = D_MODEL,
                             .vocabulary = VOCABULARY,
                             .layers = {layers_encoder, layers_decoder},
                             .has_targets = targets};
}

/* n tokens of plausible rows. */
typedef struct side_rows {
    sida_trace_rows rows;
    int64_t n;
} side_rows;

static void free_side(side_rows *side) {
    free(side->rows.tokens);
    free(side->rows.experts);
    free(side->rows.alpha);
    free(side->rows.dropped);
    free(side->rows.top_ids);
    free(side->rows.top_logp);
}

static side_rows alloc_side(int64_t n, int layers, int k) {
    size_t cells = (size_t)n * (size_t)layers + 1;
    side_rows side = {{calloc((size_t)n + 1, 4), calloc(cells * (size_t)k, 2),
                       calloc(cells * (size_t)k, 4), calloc(cells, 1), calloc(cells * TOP, 2),
                       calloc(cells * TOP, 2)},
                      n};
    return side;
}

static side_rows make_side(sida_rng *rng, int64_t n, int layers, int k) {
    side_rows side = alloc_side(n, layers, k);
    for (int64_t i = 0; i < n; i++) side.rows.tokens[i] = (int32_t)sida_rng_below(rng, VOCABULARY);
    for (int64_t cell = 0; cell < n * layers; cell++) {
        uint32_t first = sida_rng_below(rng, EXPERTS);
        for (int i = 0; i < TOP; i++) {
            side.rows.top_ids[cell * TOP + i] = (uint16_t)((first + 7 * (uint32_t)i) % EXPERTS);
            side.rows.top_logp[cell * TOP + i] = sida_f16_from_f32(-3.0f - 0.1f * (float)i);
        }
        for (int i = 0; i < k; i++) {
            side.rows.experts[cell * k + i] = side.rows.top_ids[cell * TOP + i];
            side.rows.alpha[cell * k + i] = sida_rng_f32(rng);
        }
        side.rows.dropped[cell] = sida_rng_below(rng, 10) == 0;
    }
    return side;
}

typedef struct trace_sample {
    sida_trace_info info;
    int32_t sequences, batches;
    bool embedding;
} trace_sample;

/* Writes `sequences` of LENGTH tokens (decoder: 2) in `batches` batches. */
static sida_status write_trace(const char *path, sida_h5_kind kind, const trace_sample *sample) {
    sida_rng rng = sida_rng_seed(42);
    sida_trace_writer *writer;
    sida_status status = sida_trace_create(&writer, path, kind, &sample->info);
    int32_t each = sample->sequences / sample->batches;
    int64_t *lengths = calloc((size_t)each * 2, 8), *lines = calloc((size_t)each, 8);
    int32_t *labels = calloc((size_t)each, 4), *targets = calloc((size_t)each * 2, 4);
    uint8_t *generated = calloc((size_t)each, 1);
    for (int32_t b = 0; status == SIDA_OK && b < sample->batches; b++) {
        for (int side = 0; side < 2 && status == SIDA_OK; side++) {
            int64_t length = side == 0 ? LENGTH : 2;
            if (side == 0 && sample->info.layers[0] == 0) length = 0;
            for (int32_t s = 0; s < each; s++) lengths[s] = length;
            side_rows rows =
                make_side(&rng, length * each, sample->info.layers[side], sample->info.top_k);
            status = sida_trace_append_side(writer, side, each, lengths, &rows.rows);
            free_side(&rows);
        }
        for (int32_t s = 0; s < each; s++) {
            lines[s] = 1 + b * each + s;
            labels[s] = s % 3 - 1;
            generated[s] = s % 2 == 0;
            lengths[s] = s % 3;
            targets[s] = s % VOCABULARY;
        }
        if (status == SIDA_OK)
            status =
                sida_trace_append_sequences(writer, each, lines, labels, generated,
                                            sample->info.has_targets ? lengths : NULL, targets);
    }
    int32_t ids[VOCABULARY];
    float *rows = calloc((size_t)VOCABULARY * D_MODEL, 4);
    for (int i = 0; i < VOCABULARY; i++) ids[i] = i;
    for (int i = 0; i < VOCABULARY * D_MODEL; i++) rows[i] = (float)i;
    if (status == SIDA_OK && sample->embedding)
        status = sida_trace_write_embedding(writer, VOCABULARY, ids, rows);
    free(rows);
    free(lengths);
    free(lines);
    free(labels);
    free(targets);
    free(generated);
    if (status == SIDA_OK) return sida_trace_commit(writer);
    sida_trace_abandon(writer);
    return status;
}

static void test_round_trip(void **state) {
    (void)state;
    trace_sample sample = {make_info(2, 1, 2, true), 30, 3, true};
    const char *path = support_path("trace.h5");
    sida_trace *trace;
    assert_ok(write_trace(path, SIDA_H5_TRACE, &sample));
    assert_false(sida_file_exists(support_path("trace.h5.tmp")));
    assert_ok(sida_trace_open(&trace, path));
    assert_ok(sida_trace_check(trace));
    const sida_trace_info *info = sida_trace_get_info(trace);
    assert_int_equal(info->sequences, 30);
    assert_int_equal(info->tokens[0], 30 * LENGTH);
    assert_int_equal(info->tokens[1], 60);
    assert_true(info->has_targets);
    assert_string_equal(info->family, "switch_transformers");
    assert_string_equal(info->config, "{\"d_model\":8}");
    assert_true(sida_fingerprint_equal(info->input, (sida_fingerprint){5, 6}));
    assert_int_equal(sida_trace_kind(trace), SIDA_H5_TRACE);
    assert_int_equal(sida_trace_offsets(trace, 0)[3], 3 * LENGTH);
    assert_int_equal(sida_trace_offsets(trace, 1)[30], 60);

    sida_rng rng = sida_rng_seed(42);
    int64_t n = 10 * LENGTH;
    side_rows expected = make_side(&rng, n, 2, 2), got = alloc_side(n, 2, 2);
    assert_ok(sida_trace_read(trace, 0, 0, n, &got.rows));
    assert_memory_equal(got.rows.tokens, expected.rows.tokens, n * 4);
    assert_memory_equal(got.rows.experts, expected.rows.experts, n * 4 * 2);
    assert_memory_equal(got.rows.alpha, expected.rows.alpha, n * 4 * 4);
    assert_memory_equal(got.rows.dropped, expected.rows.dropped, n * 2);
    assert_memory_equal(got.rows.top_ids, expected.rows.top_ids, n * 2 * TOP * 2);
    assert_memory_equal(got.rows.top_logp, expected.rows.top_logp, n * 2 * TOP * 2);
    /* A part of it, with some pointers only. */
    sida_trace_rows tokens = {.tokens = got.rows.tokens};
    assert_ok(sida_trace_read(trace, 0, 7, 5, &tokens));
    assert_memory_equal(got.rows.tokens, expected.rows.tokens + 7, 5 * 4);
    assert_fails(sida_trace_read(trace, 0, 30 * LENGTH - 1, 2, &tokens), SIDA_ERROR_ARGUMENT, path);
    free_side(&expected);
    free_side(&got);

    int64_t lines[2], *offsets;
    int32_t labels[2], *ids, count;
    uint8_t generated[2];
    float *rows;
    assert_ok(sida_trace_read_sequences(trace, 11, 2, lines, labels, generated));
    assert_int_equal(lines[0], 12);
    assert_int_equal(labels[0], 0);
    assert_int_equal(generated[0], 0);
    assert_int_equal(generated[1], 1);
    assert_ok(sida_trace_read_targets(trace, 1, 2, &offsets, &ids));
    assert_int_equal(offsets[0], 0);
    assert_int_equal(offsets[1], 1);
    assert_int_equal(offsets[2], 3);
    assert_int_equal(ids[2], 2);
    free(offsets);
    free(ids);
    assert_ok(sida_trace_read_embedding(trace, &count, &ids, &rows));
    assert_int_equal(count, VOCABULARY);
    assert_int_equal(ids[999], 999);
    assert_true(rows[999 * D_MODEL + 7] == 7999.0f);
    free(ids);
    free(rows);
    sida_trace_close(trace);
}

static void test_part_and_decoder_only(void **state) {
    (void)state;
    trace_sample sample = {make_info(0, 3, 1, false), 4, 2, false};
    const char *path = support_path("part.h5");
    sida_trace *trace;
    assert_ok(write_trace(path, SIDA_H5_PART, &sample));
    assert_ok(sida_trace_open(&trace, path));
    assert_ok(sida_trace_check(trace));
    const sida_trace_info *info = sida_trace_get_info(trace);
    assert_int_equal(sida_trace_kind(trace), SIDA_H5_PART);
    assert_int_equal(info->tokens[0], 0);
    assert_int_equal(info->tokens[1], 8);
    assert_int_equal(sida_trace_offsets(trace, 0)[4], 0);
    assert_false(info->has_targets);
    int64_t *offsets;
    int32_t *ids, count;
    float *rows;
    assert_ok(sida_trace_read_targets(trace, 0, 4, &offsets, &ids));
    assert_int_equal(offsets[4], 0);
    free(offsets);
    free(ids);
    assert_fails(sida_trace_read_embedding(trace, &count, &ids, &rows), SIDA_ERROR_FORMAT,
                 "embedding/ids is missing");
    sida_trace_close(trace);
}

static void test_encoder_experts_only(void **state) {
    (void)state;
    /* A decoder without MoE layers still has its tokens. */
    trace_sample sample = {make_info(1, 0, 1, false), 4, 1, true};
    sida_trace *trace;
    assert_ok(write_trace(support_path("encoder.h5"), SIDA_H5_TRACE, &sample));
    assert_ok(sida_trace_open(&trace, support_path("encoder.h5")));
    assert_ok(sida_trace_check(trace));
    assert_int_equal(sida_trace_get_info(trace)->tokens[1], 8);
    sida_trace_close(trace);
}

static void test_empty(void **state) {
    (void)state;
    trace_sample info = {make_info(1, 1, 1, true), 0, 1, true};
    sida_trace_writer *writer;
    sida_trace *trace;
    const char *path = support_path("empty.h5");
    assert_ok(sida_trace_create(&writer, path, SIDA_H5_TRACE, &info.info));
    assert_ok(sida_trace_commit(writer));
    assert_ok(sida_trace_open(&trace, path));
    assert_int_equal(sida_trace_get_info(trace)->sequences, 0);
    sida_trace_close(trace);
}

static double bytes_per_token(int32_t sequences) {
    struct stat info;
    trace_sample sample = {make_info(6, 0, 1, false), sequences, 10, true};
    const char *path = support_path("size.h5");
    assert_ok(write_trace(path, SIDA_H5_TRACE, &sample));
    assert_int_equal(stat(path, &info), 0);
    sida_trace *trace;
    assert_ok(sida_trace_open(&trace, path));
    assert_ok(sida_trace_check(trace));
    sida_trace_close(trace);
    /* Not the tokens' own: the rows of the embedding. */
    double embedding = VOCABULARY * (4.0 + 4.0 * D_MODEL);
    return ((double)info.st_size - embedding) / ((double)sequences * LENGTH);
}

/* Six layers, 64 experts, T = 30, k = 1: 766 bytes of values a token, below 800 in the file, at
 * any length: in particular just beyond the size at which a dataset becomes chunked. */
static void test_size(void **state) {
    (void)state;
    static const int32_t sequences[] = {100, 1000, 1870, 4000};
    for (size_t i = 0; i < sizeof sequences / sizeof *sequences; i++) {
        double bytes = bytes_per_token(sequences[i]);
        print_message("%d tokens: %.1f bytes a token\n", sequences[i] * LENGTH, bytes);
        assert_true(bytes > 766 && bytes < 800);
    }
}

static void test_same_bytes(void **state) {
    (void)state;
    /* Small, and large enough for chunks. */
    static const int32_t sequences[] = {30, 2100};
    for (size_t i = 0; i < 2; i++) {
        trace_sample sample = {make_info(6, 1, 1, true), sequences[i], 10, true};
        const char *a = support_path("a.h5"), *b = support_path("b.h5");
        assert_ok(write_trace(a, SIDA_H5_TRACE, &sample));
        /* Another state of the heap must not show. */
        void *noise = malloc(3 << 20);
        memset(noise, 0xa5, 3 << 20);
        free(noise);
        assert_ok(write_trace(b, SIDA_H5_TRACE, &sample));
        assert_true(support_same_files(a, b));
    }
}

static void test_refusals(void **state) {
    (void)state;
    sida_trace_writer *writer;
    sida_trace *trace;
    sida_trace_info info = make_info(1, 1, 1, false);
    info.top = EXPERTS + 1;
    assert_fails(sida_trace_create(&writer, support_path("x.h5"), SIDA_H5_TRACE, &info),
                 SIDA_ERROR_ARGUMENT, "not possible");
    info = make_info(1, 1, 1, false);
    assert_fails(sida_trace_create(&writer, support_path("no/x.h5"), SIDA_H5_TRACE, &info),
                 SIDA_ERROR_IO, "no/x.h5");
    assert_fails(sida_trace_open(&trace, support_path("none.h5")), SIDA_ERROR_IO, "none.h5");

    /* One side lags behind. */
    assert_ok(sida_trace_create(&writer, support_path("x.h5"), SIDA_H5_TRACE, &info));
    sida_rng rng = sida_rng_seed(1);
    side_rows rows = make_side(&rng, 3, 1, 1);
    assert_ok(sida_trace_append_side(writer, 0, 1, (const int64_t[]){3}, &rows.rows));
    assert_fails(sida_trace_commit(writer), SIDA_ERROR_ARGUMENT, "x.h5");
    assert_false(sida_file_exists(support_path("x.h5")));
    assert_false(sida_file_exists(support_path("x.h5.tmp")));

    /* Contents: the file is ours, but its values are not a trace's. */
    static const char *const words[] = {"top_logp", "experts", "top_ids", "tokens", "alpha"};
    for (int fault = 0; fault < 5; fault++) {
        const char *path = support_path("bad.h5");
        assert_ok(sida_trace_create(&writer, path, SIDA_H5_TRACE, &info));
        side_rows bad = make_side(&rng, 3, 1, 1);
        if (fault == 0) bad.rows.top_logp[4] = 0x7e00;
        if (fault == 1) bad.rows.experts[1] = EXPERTS;
        if (fault == 2) bad.rows.top_ids[1] = EXPERTS;
        if (fault == 3) bad.rows.tokens[1] = VOCABULARY;
        if (fault == 4) bad.rows.alpha[1] = NAN;
        assert_ok(sida_trace_append_side(writer, 0, 1, (const int64_t[]){3}, &bad.rows));
        assert_ok(sida_trace_append_side(writer, 1, 1, (const int64_t[]){0}, &bad.rows));
        assert_ok(sida_trace_append_sequences(writer, 1, (const int64_t[]){1}, (const int32_t[]){0},
                                              (const uint8_t[]){0}, NULL, NULL));
        assert_ok(sida_trace_commit(writer));
        assert_ok(sida_trace_open(&trace, path));
        assert_fails(sida_trace_check(trace), SIDA_ERROR_FORMAT, words[fault]);
        sida_trace_close(trace);
        free_side(&bad);
    }
    free_side(&rows);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_part_and_decoder_only),
        cmocka_unit_test(test_encoder_experts_only),
        cmocka_unit_test(test_empty),
        cmocka_unit_test(test_size),
        cmocka_unit_test(test_same_bytes),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, support_setup, support_teardown);
}
