/* Corpora in every format, their errors with FILE:LINE, and batches. */
#include "data/batch.h"
#include "data/corpus.h"
#include "tests/unit/formats_support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

static sida_corpus *open_text(sida_corpus_format format, const char *text) {
    sida_corpus *corpus;
    support_write(support_path("corpus"), text, strlen(text));
    assert_ok(sida_corpus_open(&corpus, format, support_path("corpus")));
    return corpus;
}

static void expect(sida_corpus *corpus, const char *input, const char *target, int label,
                   int64_t line) {
    sida_record record;
    bool more;
    assert_ok(sida_corpus_next(corpus, &record, &more));
    assert_true(more);
    assert_string_equal(record.input, input);
    if (target)
        assert_string_equal(record.target, target);
    else
        assert_null(record.target);
    assert_int_equal(record.label, label);
    assert_int_equal(record.line, line);
}

static void expect_end(sida_corpus *corpus) {
    sida_record record;
    bool more;
    int64_t done, all;
    assert_ok(sida_corpus_next(corpus, &record, &more));
    assert_false(more);
    assert_ok(sida_corpus_next(corpus, &record, &more));
    assert_false(more);
    sida_corpus_progress(corpus, &done, &all);
    assert_int_equal(done, all);
    sida_corpus_close(corpus);
}

static void test_formats(void **state) {
    (void)state;
    sida_corpus *corpus = open_text(SIDA_CORPUS_TEXT, "\xef\xbb\xbfone\ttab\r\n two");
    expect(corpus, "one\ttab", NULL, -1, 1);
    expect(corpus, " two", NULL, -1, 2);
    expect_end(corpus);
    expect_end(open_text(SIDA_CORPUS_TEXT, ""));

    corpus = open_text(SIDA_CORPUS_TSV, "in\tout\nonly\n");
    expect(corpus, "in", "out", -1, 1);
    expect(corpus, "only", NULL, -1, 2);
    expect_end(corpus);

    corpus = open_text(SIDA_CORPUS_JSONL, "{\"text\":\"a\\nb\",\"x\":[1]}\n"
                                          "{\"input\":\"c\",\"target\":\"d\",\"label\":7}\n"
                                          "{\"input\":\"e\",\"target\":null,\"label\":null}\n");
    expect(corpus, "a\nb", NULL, -1, 1);
    expect(corpus, "c", "d", 7, 2);
    expect(corpus, "e", NULL, -1, 3);
    expect_end(corpus);

    corpus = open_text(SIDA_CORPUS_SST2, "sentence\tlabel\nfine film \t1\nbad\t0\n");
    expect(corpus, "sst2 sentence: fine film ", "positive", 1, 2);
    expect(corpus, "sst2 sentence: bad", "negative", 0, 3);
    expect_end(corpus);

    corpus = open_text(SIDA_CORPUS_MRPC, "\xef\xbb\xbfQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
                                         "1\t2\t3\tA \"b\".\tC.\n");
    expect(corpus, "mrpc sentence1: A \"b\". sentence2: C.", "equivalent", 1, 2);
    expect_end(corpus);
    corpus = open_text(SIDA_CORPUS_MRPC, "0\t2\t3\tA\tC");
    expect(corpus, "mrpc sentence1: A sentence2: C", "not_equivalent", 0, 1);
    expect_end(corpus);

    corpus = open_text(SIDA_CORPUS_MULTIRC,
                       "{\"passage\":{\"text\":\"P\",\"questions\":["
                       "{\"question\":\"Q\",\"answers\":[{\"text\":\"A\",\"label\":1},"
                       "{\"text\":\"\",\"label\":0}]},"
                       "{\"question\":\"R\",\"answers\":[{\"text\":\"B\"}]}]}}\n");
    expect(corpus, "multirc question: Q answer: A paragraph: P", "True", 1, 1);
    expect(corpus, "multirc question: Q answer:  paragraph: P", "False", 0, 1);
    expect(corpus, "multirc question: R answer: B paragraph: P", NULL, -1, 1);
    expect_end(corpus);
}

static void test_tables(void **state) {
    (void)state;
    sida_corpus_format format;
    assert_true(sida_corpus_format_from_name(&format, "mrpc"));
    assert_int_equal(format, SIDA_CORPUS_MRPC);
    assert_false(sida_corpus_format_from_name(&format, "csv"));
    char names[64];
    strcpy(names, sida_corpus_format_names());
    for (char *name = strtok(names, "|"); name; name = strtok(NULL, "|"))
        assert_true(sida_corpus_format_from_name(&format, name));
    assert_int_equal(sida_corpus_score_kind(SIDA_CORPUS_SST2), SIDA_SCORE_EXACT_MATCH);
    assert_int_equal(sida_corpus_score_kind(SIDA_CORPUS_MULTIRC), SIDA_SCORE_F1);
    assert_int_equal(sida_corpus_score_kind(SIDA_CORPUS_TEXT), SIDA_SCORE_NONE);
    assert_string_equal(sida_corpus_labels(SIDA_CORPUS_MULTIRC)[1], "True");
    assert_null(sida_corpus_labels(SIDA_CORPUS_TSV));
}

static void test_errors(void **state) {
    (void)state;
    static const struct {
        sida_corpus_format format;
        const char *text, *words;
    } cases[] = {
        {SIDA_CORPUS_TEXT, "a\n\nb\n", "corpus:2: an empty line"},
        {SIDA_CORPUS_TEXT, "a\n \t\nb\n", "corpus:2: a blank line"},
        {SIDA_CORPUS_TEXT, "a\nb\xff\n", "corpus:2: not UTF-8"},
        {SIDA_CORPUS_TEXT, "\n", "corpus:1: an empty line"},
        {SIDA_CORPUS_TSV, "a\tb\tc\n", "corpus:1: more than two"},
        {SIDA_CORPUS_TSV, "a\n\tb\n", "corpus:2: the input is empty"},
        {SIDA_CORPUS_TSV, "a\t\n", "corpus:1: the target is empty"},
        {SIDA_CORPUS_JSONL, "{\"text\":\"a\"\n", "corpus:1: not JSON"},
        {SIDA_CORPUS_JSONL, "[1]\n", "corpus:1: not a JSON object"},
        {SIDA_CORPUS_JSONL, "{}\n", "corpus:1: neither"},
        {SIDA_CORPUS_JSONL, "{\"text\":\"a\",\"input\":\"b\"}\n", "corpus:1: both"},
        {SIDA_CORPUS_JSONL, "{\"text\":1}\n", "corpus:1: \"text\""},
        {SIDA_CORPUS_JSONL, "{\"text\":\"a\",\"text\":\"b\"}\n", "duplicate"},
        {SIDA_CORPUS_JSONL, "{\"text\":\"a\",\"label\":-1}\n", "\"label\""},
        {SIDA_CORPUS_JSONL, "{\"text\":\"a\",\"label\":\"1\"}\n", "\"label\""},
        {SIDA_CORPUS_JSONL, "{\"text\":\"a\",\"target\":\"\"}\n", "\"target\""},
        {SIDA_CORPUS_JSONL, "{\"text\":\"a\\u0000b\"}\n", "corpus:1: not JSON"},
        {SIDA_CORPUS_SST2, "", "corpus:1: no header"},
        {SIDA_CORPUS_SST2, "a\t1\n", "corpus:1: the first line"},
        {SIDA_CORPUS_SST2, "sentence\tlabel\na\t2\n", "corpus:2: the label \"2\""},
        {SIDA_CORPUS_SST2, "sentence\tlabel\na\n", "corpus:2: not two fields"},
        {SIDA_CORPUS_MRPC, "1\t2\t3\t4\n", "corpus:1: not five fields"},
        {SIDA_CORPUS_MRPC, "1\t2\t3\t4\t5\t6\n", "corpus:1: not five fields"},
        {SIDA_CORPUS_MRPC, "1\t2\t3\t\t5\n", "corpus:1: a sentence is empty"},
        {SIDA_CORPUS_MULTIRC, "{\"passage\":{\"text\":\"P\",\"questions\":[]}}\n",
         "corpus:1: passage"},
        {SIDA_CORPUS_MULTIRC, "{\"passage\":7}\n", "corpus:1: passage"},
        {SIDA_CORPUS_MULTIRC,
         "{\"passage\":{\"text\":\"P\",\"questions\":[{\"question\":\"Q\",\"answers\":{}}]}}\n",
         "corpus:1: question 0"},
        {SIDA_CORPUS_MULTIRC,
         "{\"passage\":{\"text\":\"P\",\"questions\":[{\"question\":\"Q\",\"answers\":[{\"text\":"
         "\"A\",\"label\":2}]}]}}\n",
         "corpus:1: \"label\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        sida_corpus *corpus = open_text(cases[i].format, cases[i].text);
        sida_record record;
        bool more = true;
        sida_status status = SIDA_OK;
        while (status == SIDA_OK && more) status = sida_corpus_next(corpus, &record, &more);
        assert_fails(status, SIDA_ERROR_FORMAT, cases[i].words);
        sida_corpus_close(corpus);
    }
    sida_corpus *corpus;
    assert_fails(sida_corpus_open(&corpus, SIDA_CORPUS_TEXT, support_path("none")), SIDA_ERROR_IO,
                 "none");
    assert_fails(sida_corpus_open(&corpus, SIDA_CORPUS_TEXT, support_path(".")), SIDA_ERROR_IO,
                 "regular");
    /* NUL bytes, and a line over the limit. */
    sida_record record;
    bool more;
    size_t bytes = (16 << 20) + 2;
    char *large = malloc(bytes);
    memset(large, 'a', bytes);
    support_write(support_path("corpus"), "a\0b\n", 4);
    assert_ok(sida_corpus_open(&corpus, SIDA_CORPUS_TEXT, support_path("corpus")));
    assert_fails(sida_corpus_next(corpus, &record, &more), SIDA_ERROR_FORMAT, "corpus:1");
    sida_corpus_close(corpus);
    support_write(support_path("corpus"), large, bytes);
    assert_ok(sida_corpus_open(&corpus, SIDA_CORPUS_TEXT, support_path("corpus")));
    assert_fails(sida_corpus_next(corpus, &record, &more), SIDA_ERROR_FORMAT, "corpus:1");
    sida_corpus_close(corpus);
    free(large);
}

static void test_gzip(void **state) {
    (void)state;
    const char *path = support_path("packed.gz"), *cut = support_path("cut.gz");
    gzFile gz = gzopen(path, "wb");
    sida_rng rng = sida_rng_seed(3);
    for (int i = 0; i < 20000; i++)
        gzprintf(gz, "line %d %llx\n", i, (unsigned long long)sida_rng_u64(&rng));
    gzclose(gz);
    size_t bytes;
    uint8_t *data = support_read(path, &bytes);
    for (int part = 0; part < 3; part++) {
        support_write(cut, data, part == 0 ? bytes : part == 1 ? bytes - 3 : bytes / 2);
        sida_corpus *corpus;
        sida_record record;
        bool more = true;
        sida_status status = SIDA_OK;
        int lines = 0;
        assert_ok(sida_corpus_open(&corpus, SIDA_CORPUS_TEXT, cut));
        while (status == SIDA_OK && more) {
            status = sida_corpus_next(corpus, &record, &more);
            lines += status == SIDA_OK && more;
        }
        if (part == 0) {
            assert_ok(status);
            assert_int_equal(lines, 20000);
        } else {
            assert_fails(status, SIDA_ERROR_IO, "cut.gz:");
        }
        sida_corpus_close(corpus);
    }
    free(data);
}

/* --- batches */

static sida_tokenizer *tokenizer;

static void test_batches(void **state) {
    (void)state;
    if (!tokenizer) skip();
    sida_batch_options options = {
        .sequences = 2, .limit = 5, .max_tokens = 8, .vocabulary = 32128, .eos = 1};
    sida_corpus *corpus =
        open_text(SIDA_CORPUS_TSV, "Hello world\tHello\nHello\nHello world </s>\tb\n"
                                   "a\tb\nlast\tb\nbeyond the limit\n");
    sida_batcher *batcher;
    sida_batch *batch;
    assert_ok(sida_batcher_create(&batcher, corpus, tokenizer, &options));
    assert_ok(sida_batcher_next(batcher, &batch));
    assert_int_equal(batch->index, 0);
    assert_int_equal(batch->input.sequences, 2);
    assert_int_equal(sida_ragged_tokens(&batch->input), 5);
    assert_memory_equal(batch->input.ids, ((const int32_t[]){8774, 296, 1, 8774, 1}), 20);
    assert_int_equal(batch->target.offsets[1], 2);
    assert_int_equal(batch->target.offsets[2], 2);
    assert_false(batch->has_targets);
    assert_string_equal(batch->targets[0], "Hello");
    assert_null(batch->targets[1]);
    assert_int_equal(batch->lines[1], 2);
    assert_int_equal(batch->labels[1], -1);
    sida_batch_destroy(batch);
    assert_ok(sida_batcher_next(batcher, &batch));
    assert_true(batch->has_targets);
    assert_int_equal(batch->input.offsets[1], 3); /* one </s>, not two */
    sida_batch_destroy(batch);
    assert_ok(sida_batcher_next(batcher, &batch));
    assert_int_equal(batch->index, 2);
    assert_int_equal(batch->input.sequences, 1);
    sida_batch_destroy(batch);
    assert_ok(sida_batcher_next(batcher, &batch));
    assert_null(batch);
    sida_batcher_destroy(batcher);
    sida_corpus_close(corpus);

    /* Skipped batches keep the indices of the rest. */
    corpus = open_text(SIDA_CORPUS_TEXT, "a\nb\nc\nd\ne\n");
    assert_ok(sida_batcher_create(&batcher, corpus, tokenizer, &options));
    assert_ok(sida_batcher_skip(batcher, 2));
    assert_ok(sida_batcher_next(batcher, &batch));
    assert_int_equal(batch->index, 2);
    assert_int_equal(batch->lines[0], 5);
    sida_batch_destroy(batch);
    assert_ok(sida_batcher_skip(batcher, 100));
    assert_ok(sida_batcher_next(batcher, &batch));
    assert_null(batch);
    sida_batcher_destroy(batcher);
    sida_corpus_close(corpus);
}

static void test_batch_errors(void **state) {
    (void)state;
    if (!tokenizer) skip();
    static const struct {
        const char *text, *words;
        int32_t vocabulary;
    } cases[] = {
        {"Hello\nHello world Hello world Hello world Hello world\n", "corpus:2: the input has 9",
         32128},
        {"Hello\n</s>\n", "corpus:2: the input has no tokens", 32128},
        {"Hello\n\xe2\x80\x8b\n", "corpus:2: the input has no tokens", 32128},
        {"a\nHello\n", "corpus:2: token id 8774", 1000},
    };
    sida_batch_options options = {.sequences = 4, .max_tokens = 8, .eos = 1};
    sida_batcher *batcher;
    sida_batch *batch;
    sida_corpus *corpus;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        options.vocabulary = cases[i].vocabulary;
        corpus = open_text(SIDA_CORPUS_TEXT, cases[i].text);
        assert_ok(sida_batcher_create(&batcher, corpus, tokenizer, &options));
        assert_fails(sida_batcher_next(batcher, &batch), SIDA_ERROR_FORMAT, cases[i].words);
        assert_null(batch);
        sida_batcher_destroy(batcher);
        sida_corpus_close(corpus);
    }
    options.truncate = true;
    options.vocabulary = 32128;
    corpus = open_text(SIDA_CORPUS_TEXT, "Hello world Hello world Hello world Hello world\n");
    assert_ok(sida_batcher_create(&batcher, corpus, tokenizer, &options));
    assert_ok(sida_batcher_next(batcher, &batch));
    assert_int_equal(sida_ragged_tokens(&batch->input), 8);
    assert_int_equal(batch->input.ids[7], 1);
    sida_batch_destroy(batch);
    sida_batcher_destroy(batcher);
    options.sequences = 0;
    assert_fails(sida_batcher_create(&batcher, corpus, tokenizer, &options), SIDA_ERROR_ARGUMENT,
                 "1 sequence");
    sida_corpus_close(corpus);
}

int main(void) {
    const char *path = support_tokenizer_path();
    if (path && sida_tokenizer_open(&tokenizer, path) != SIDA_OK) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_formats), cmocka_unit_test(test_tables),
        cmocka_unit_test(test_errors),  cmocka_unit_test(test_gzip),
        cmocka_unit_test(test_batches), cmocka_unit_test(test_batch_errors),
    };
    int failed = cmocka_run_group_tests(tests, support_setup, support_teardown);
    sida_tokenizer_destroy(tokenizer);
    return failed;
}
