/* The oracle: what it finds in a trace, and what it says where it finds nothing. */
#include "tests/sources_rig.h"
#include "tests/train_data.h"

#include "formats/base/log.h"
#include "trainer/evaluate.h"

#include <unistd.h>

static char folder[] = "/tmp/sida-oracle-XXXXXX";
static char trace_path[64], other_path[64];

static const sida_fingerprint model = {1, 2}; /* of no trace here */

static int setup(void **state) {
    (void)state;
    if (!mkdtemp(folder)) return -1;
    snprintf(trace_path, sizeof trace_path, "%s/T.h5", folder);
    snprintf(other_path, sizeof other_path, "%s/U.h5", folder);
    return 0;
}

static int teardown(void **state) {
    (void)state;
    unlink(trace_path);
    unlink(other_path);
    return rmdir(folder);
}

/* A table of all experts against the trace's rows from `row` on. */
static void expect_truth(const sida_dataset *data, int side, int64_t row,
                         const sida_hash_table *table) {
    const sida_dataset_side *from = &data->sides[side];
    int32_t layers = data->layers[side], experts = data->experts, k = data->top_k;
    assert_int_equal(table->layers, layers);
    for (int64_t i = 0; i < table->tokens * layers; i++) {
        const uint16_t *got = table->experts + i * table->k;
        int64_t pair = row * layers + i;
        double sum = 0;
        bool taken[256] = {false};
        for (int32_t r = 0; r < table->k; r++) {
            assert_true(got[r] < experts && !taken[got[r]]);
            taken[got[r]] = true;
            sum += (double)table->alpha[i * table->k + r];
            if (r < k) assert_int_equal(got[r], from->experts[pair * k + r]);
            if (r < k)
                assert_true(fabsf(table->alpha[i * table->k + r] - from->alpha[pair * k + r]) <
                            1e-3f); /* a trace keeps log-probabilities as fp16 */
            if (r < data->top) assert_int_equal(got[r], from->top_ids[pair * data->top + r]);
        }
        /* fp16 again: up to 2^-11 of each logarithm */
        if (table->k == experts) assert_true(fabs(sum - 1) < 2e-3);
    }
}

static void oracle_finds(const train_data *d) {
    sida_dataset data;
    sida_hash_source *source;
    asked a = {0};
    int64_t offsets[2], two[3];
    ok(sida_dataset_load(&data, trace_path, 0));
    ok(sida_hash_source_open(&source, trace_path, sida_dataset_embedding(&data), data.model));
    assert_string_equal(source->info.name, "oracle");
    ok(sida_hash_state_create(source, &a.state));
    for (int32_t s = d->sequences - 1; s >= 0; s--) {
        sida_ragged input = sequence(&data, 0, s, offsets);
        ok(sida_hash_encode(source, a.state, &input, s % 2 ? data.experts : data.top_k, &a.table));
        expect_truth(&data, 0, data.sides[0].offsets[s], &a.table);
        /* Token by token, then the next with nothing in between. */
        input = sequence(&data, 1, s, offsets);
        int64_t n = offsets[1];
        for (int64_t t = 0; t < n; t += 2) {
            const sida_ragged step = {1, (const int64_t[]){0, n - t < 2 ? 1 : 2}, input.ids + t};
            ok(sida_hash_decode(source, a.state, &step, data.experts, &a.table));
            expect_truth(&data, 1, data.sides[1].offsets[s] + t, &a.table);
        }
    }
    /* Two at a time. */
    const sida_dataset_side *encoder = &data.sides[0];
    for (int i = 0; i < 3; i++) two[i] = encoder->offsets[3 + i] - encoder->offsets[3];
    ok(sida_hash_encode(source, a.state, &(sida_ragged){2, two, encoder->ids + encoder->offsets[3]},
                        data.experts, &a.table));
    expect_truth(&data, 0, encoder->offsets[3], &a.table);
    forget(source, &a);
    /* The upper bound: nothing is missed. */
    sida_evaluation scores;
    ok(sida_evaluate(&scores, source, &data, data.top_k, NULL, NULL));
    assert_true(scores.overall.hit[0] == 100 && scores.overall.set_recall == 100 &&
                scores.overall.set_precision == 100 && scores.overall.set_recall_equal == 100);
    sida_evaluation_free(&scores);
    sida_hash_source_destroy(source);
    sida_dataset_free(&data);
}

static void oracle(void **state) {
    (void)state;
    train_data d = train_data_default();
    train_data_write(&d, trace_path);
    oracle_finds(&d);
    d.top_k = 2; /* chosen by the same scores: the first of the top list */
    train_data_write(&d, trace_path);
    oracle_finds(&d);
    d.top = d.experts;
    train_data_write(&d, trace_path);
    oracle_finds(&d);
    d.layers[0] = 0; /* found by the decoder's ids alone */
    train_data_write(&d, trace_path);
    oracle_finds(&d);
}

/* Other software's trace: HDF5 without our block. */
static void oracle_of_a_foreign_trace(void **state) {
    (void)state;
    train_data d = train_data_default();
    train_data_write(&d, trace_path);
    test_bytes bytes = test_read(trace_path);
    test_write(trace_path, bytes.data + 512, bytes.size - 512);
    oracle_finds(&d);
    test_write(trace_path, bytes.data + 512, bytes.size / 2);
    sida_hash_source *source;
    assert_int_not_equal(sida_hash_source_open(&source, trace_path, (sida_weight){0}, model),
                         SIDA_OK);
    assert_non_null(strstr(sida_last_message(), trace_path));
    free(bytes.data);
}

static int warnings;
static void count_warnings(void *context, sida_log_level level, const char *line) {
    (void)context;
    (void)line;
    warnings += level == SIDA_LOG_WARNING;
}

static void oracle_does_not_know(void **state) {
    (void)state;
    train_data d = train_data_default();
    d.layers[1] = 2;
    train_data_write(&d, trace_path);
    sida_dataset data;
    sida_hash_source *source;
    ok(sida_dataset_load(&data, trace_path, 0));
    const sida_weight table = sida_dataset_embedding(&data);
    ok(sida_hash_source_open(&source, trace_path, table, data.model));
    int64_t offsets[2];
    sida_ragged input = sequence(&data, 0, 5, offsets);
    asked a = ask(source, &input, 1);
    /* One token more, and one less. */
    int32_t longer[64] = {0};
    memcpy(longer, input.ids, (size_t)offsets[1] * sizeof *longer);
    for (int64_t n = offsets[1] - 1; n <= offsets[1] + 1; n += 2)
        refused(sida_hash_encode(source, a.state,
                                 &(sida_ragged){1, (const int64_t[]){0, n}, longer}, 1, &a.table),
                SIDA_ERROR_MISMATCH, "no sequence with these");
    refused(sida_hash_decode(source, a.state, &input, 1, &a.table), SIDA_ERROR_ARGUMENT,
            "another batch");
    /* The decoder leaves the trace: the popular experts, said once, until the next batch. */
    sida_log_set_sink(count_warnings, NULL);
    uint32_t most[2][8] = {{0}};
    for (int64_t i = 0; i < data.sides[1].tokens * 2; i++) most[i % 2][data.sides[1].experts[i]]++;
    const int64_t one[2] = {0, 1};
    int32_t elsewhere = -1;
    for (int round = 0; round < 2; round++) {
        ok(sida_hash_encode(source, a.state, &input, 1, &a.table));
        for (int step = 0; step < 2; step++) {
            int32_t first = data.sides[1].ids[data.sides[1].offsets[5]];
            elsewhere = step == 0 ? (first + 1) % d.vocabulary : first;
            ok(sida_hash_decode(source, a.state, &(sida_ragged){1, one, &elsewhere}, d.experts,
                                &a.table));
            for (int l = 0; l < 2; l++)
                for (int r = 1; r < d.experts; r++) {
                    const uint16_t *e = a.table.experts + l * d.experts;
                    assert_true(most[l][e[r - 1]] >= most[l][e[r]]);
                }
        }
    }
    assert_int_equal(warnings, 1);
    sida_log_set_sink(NULL, NULL);
    forget(source, &a);
    sida_hash_source_destroy(source);

    sida_weight wrong = table;
    wrong.rows--;
    refused(sida_hash_source_open(&source, trace_path, wrong, data.model), SIDA_ERROR_MISMATCH,
            "30 ids");
    refused(sida_hash_source_open(&source, trace_path, table, model), SIDA_ERROR_MISMATCH,
            "00000000000000010000000000000002");
    assert_null(source);
    d.kind = SIDA_H5_PART;
    train_data_write(&d, other_path);
    refused(sida_hash_source_open(&source, other_path, table, data.model), SIDA_ERROR_FORMAT,
            "part of an unfinished");
    d.kind = 0;
    d.sequences = 0;
    train_data_write(&d, other_path);
    refused(sida_hash_source_open(&source, other_path, table, data.model), SIDA_ERROR_FORMAT,
            "empty");
    /* Of a decoder alone there is no input to go by. */
    d = train_data_default();
    d.layers[0] = 0;
    train_data_write(&d, other_path);
    ok(sida_hash_source_open(&source, other_path, table, data.model));
    const int64_t none[2] = {0, 0}, three[2] = {0, 3};
    a = ask(source, &(sida_ragged){1, none, longer}, 1);
    const int32_t strange[3] = {29, 29, 29};
    refused(sida_hash_decode(source, a.state, &(sida_ragged){1, three, strange}, 1, &a.table),
            SIDA_ERROR_MISMATCH, "no sequence that begins so");
    forget(source, &a);
    sida_hash_source_destroy(source);
    sida_dataset_free(&data);
}

/* All inputs are the same; the decoders share beginnings and part somewhere. The routing follows
 * the token, as it does where what came before is the same. */
static void same_input(train_data *d, int side, int64_t tokens, sida_trace_rows *rows) {
    int32_t layers = d->layers[side];
    for (int64_t i = 0; i < tokens; i++) {
        rows->tokens[i] = side == 0 ? 3 : 1 + (int32_t)(0x5b2d3 >> i % 19 & 1);
        for (int64_t pair = i * layers; pair < (i + 1) * layers; pair++) {
            for (int j = 0; j < d->top; j++) {
                rows->top_ids[pair * d->top + j] =
                    (uint16_t)((3 * rows->tokens[i] + j) % d->experts);
                rows->top_logp[pair * d->top + j] = sida_f16_from_f32(-1 - (float)j);
            }
            rows->experts[pair] = rows->top_ids[pair * d->top];
            rows->alpha[pair] = expf(-1);
        }
    }
}

static void oracle_of_twins(void **state) {
    (void)state;
    train_data d = train_data_default();
    d.longest = 1; /* every input is "3" */
    d.sequences = 9;
    d.vocabulary = 4; /* all of them occur before the change, and so have a row */
    d.change = same_input;
    train_data_write(&d, trace_path);
    sida_dataset data;
    sida_hash_source *source;
    ok(sida_dataset_load(&data, trace_path, 0));
    ok(sida_hash_source_open(&source, trace_path, sida_dataset_embedding(&data), data.model));
    for (int32_t s = 0; s < d.sequences; s++) {
        int64_t offsets[2];
        sida_ragged input = sequence(&data, 0, s, offsets);
        asked a = ask(source, &input, 1);
        input = sequence(&data, 1, s, offsets);
        for (int64_t t = 0; t < offsets[1]; t++) {
            ok(sida_hash_decode(source, a.state,
                                &(sida_ragged){1, (const int64_t[]){0, 1}, input.ids + t},
                                data.experts, &a.table));
            expect_truth(&data, 1, data.sides[1].offsets[s] + t, &a.table);
        }
        forget(source, &a);
    }
    sida_hash_source_destroy(source);
    sida_dataset_free(&data);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(oracle), cmocka_unit_test(oracle_does_not_know),
        cmocka_unit_test(oracle_of_twins), cmocka_unit_test(oracle_of_a_foreign_trace)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
