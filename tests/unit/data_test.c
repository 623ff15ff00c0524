/* Corpora in every format, their errors with FILE:LINE, and batches. */
#include "data/batch.h"
#include "data/corpus.h"
#include "data/spans.h"
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

    /* Each label of a record in turn; the limit counts records, and a batch may end between. */
    options.each_label = true;
    options.max_tokens = 16;
    options.limit = 2;
    options.sequences = 3;
    corpus = open_text(SIDA_CORPUS_SST2, "sentence\tlabel\nHello\t1\nworld\t0\nlast\t0\n");
    assert_ok(sida_batcher_create(&batcher, corpus, tokenizer, &options));
    static const char *const targets[] = {"negative", "positive"};
    for (int i = 0; i < 4;) {
        assert_ok(sida_batcher_next(batcher, &batch));
        assert_int_equal(batch->input.sequences, i == 0 ? 3 : 1);
        for (int32_t s = 0; s < batch->input.sequences; s++, i++) {
            assert_string_equal(batch->targets[s], targets[i % 2]);
            assert_int_equal(batch->labels[s], i < 2);
            assert_int_equal(batch->lines[s], 2 + i / 2);
        }
        sida_batch_destroy(batch);
    }
    assert_ok(sida_batcher_next(batcher, &batch));
    assert_null(batch);
    sida_batcher_destroy(batcher);
    sida_corpus_close(corpus);
    options.each_label = false;
    options.max_tokens = 8;
    options.limit = 5;
    options.sequences = 2;

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

/* The flags of a corpus' first record, one character a token: input, a space, target. */
static void flags_of(char *out, sida_corpus_format format, const char *text) {
    sida_batch_options options = {
        .sequences = 1, .max_tokens = 64, .vocabulary = 32128, .eos = 1, .content = true};
    sida_corpus *corpus = open_text(format, text);
    sida_batcher *batcher;
    sida_batch *batch;
    assert_ok(sida_batcher_create(&batcher, corpus, tokenizer, &options));
    assert_ok(sida_batcher_next(batcher, &batch));
    for (int side = 0; side < 2; side++) {
        int64_t n = sida_ragged_tokens(side ? &batch->target : &batch->input);
        if (side == 1) *out++ = ' ';
        for (int64_t i = 0; i < n; i++) *out++ = (char)('0' + batch->content[side][i]);
    }
    *out = 0;
    sida_batch_destroy(batch);
    sida_batcher_destroy(batcher);
    sida_corpus_close(corpus);
}

static void test_content(void **state) {
    (void)state;
    if (!tokenizer) skip();
    char flags[160];
    flags_of(flags, SIDA_CORPUS_TSV, "Hello world\tHello\n");
    assert_string_equal(flags, "110 10");
    /* "▁ s s t 2 ▁sentence :", two words, </s> */
    flags_of(flags, SIDA_CORPUS_SST2, "sentence\tlabel\nHello world\t1\n");
    assert_string_equal(flags, "0000000110 10");
    /* "▁ m r p c ▁sentence 1 :", Hello, "▁sentence 2 :", two words */
    flags_of(flags, SIDA_CORPUS_MRPC, "1\t2\t3\tHello\tHello world\n");
    assert_true(strncmp(flags, "00000000100011", 14) == 0);
    /* "▁multi r c ▁question :", two words, "▁answer :", nothing, "▁paragraph :", a word */
    flags_of(flags, SIDA_CORPUS_MULTIRC,
             "{\"passage\":{\"text\":\"Hello\",\"questions\":[{\"question\":\"Hello world\","
             "\"answers\":[{\"text\":\"\",\"label\":1}]}]}}\n");
    assert_true(strncmp(flags, "0000011000010", 13) == 0);
    /* The words of the prompt in the text itself are content. */
    flags_of(flags, SIDA_CORPUS_SST2, "sentence\tlabel\nsentence : sentence\t1\n");
    assert_true(strncmp(flags, "0000000", 7) == 0 && strspn(flags + 7, "1") >= 3);
    /* One span of three, or of one: sentinels and </s> are none of the text. */
    flags_of(flags, SIDA_CORPUS_SPANS, "Hello world Hello world Hello world\n");
    size_t zeros = 0, target = strcspn(flags, " ");
    for (size_t i = 0; i < target; i++) zeros += flags[i] == '0';
    assert_int_equal(zeros, 2);
    assert_string_equal(flags + target + 1, "0100");
}

/* --- span corruption */

/* Puts the spans back where their sentinels are, and counts them and the tokens cut out. */
static void check_spans(const int32_t *input, size_t in, const int32_t *target, size_t out,
                        const int32_t *ids, size_t count, size_t *spans, size_t *noise) {
    enum { FIRST = 32099 };
    size_t at = 0, t = 0;
    *spans = *noise = 0;
    for (size_t i = 0; i < in; i++) {
        if (input[i] <= FIRST - SIDA_SPANS_SENTINELS) {
            assert_int_equal(input[i], ids[at++]);
            continue;
        }
        assert_int_equal(input[i], FIRST - (int32_t)*spans);
        assert_true(i + 1 == in || input[i + 1] < FIRST - SIDA_SPANS_SENTINELS); /* apart */
        assert_int_equal(target[t++], FIRST - (int32_t)(*spans)++);
        for (; target[t] <= FIRST - SIDA_SPANS_SENTINELS; t++, ++*noise)
            assert_int_equal(target[t], ids[at++]);
    }
    assert_int_equal(target[t++], FIRST - (int32_t)*spans);
    assert_int_equal(t, out);
    assert_int_equal(at, count);
}

static void test_spans(void **state) {
    (void)state;
    enum { MOST = 3000 };
    static int32_t ids[MOST], input[MOST], target[MOST + 1];
    size_t in, out, spans, noise, first, lengths[8] = {0}, places[20] = {0};
    for (int32_t i = 0; i < MOST; i++) ids[i] = i + 2;
    sida_rng rng = sida_rng_seed(1);
    static const size_t counts[][3] = {/* tokens, cut out, spans */
                                       {2, 1, 1},  {3, 1, 1},    {10, 2, 1},    {20, 3, 1},
                                       {30, 5, 2}, {100, 15, 5}, {512, 77, 26}, {3000, 450, 99}};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        for (int round = 0; round < 50; round++) {
            assert_ok(sida_spans_corrupt(input, &in, target, &out, ids, counts[i][0], 32099, &rng));
            check_spans(input, in, target, out, ids, counts[i][0], &spans, &noise);
            assert_int_equal(noise, counts[i][1]);
            assert_int_equal(spans, counts[i][2]);
        }
    /* 20 tokens, one span of 3: each of the 18 places as often. 30 tokens, 5 in two spans: each
     * length of 1 to 4 as often. Of 18,000 draws a place has 1,000, standard deviation 31. */
    for (int round = 0; round < 18000; round++) {
        assert_ok(sida_spans_corrupt(input, &in, target, &out, ids, 20, 32099, &rng));
        for (size_t i = 0; i < in; i++)
            if (input[i] == 32099) places[i]++;
        assert_ok(sida_spans_corrupt(input, &in, target, &out, ids, 30, 32099, &rng));
        for (first = 1; target[first] != 32098;) first++;
        lengths[first - 1]++;
    }
    for (size_t i = 0; i < 18; i++) assert_in_range(places[i], 850, 1150);
    assert_int_equal(places[18], 0);
    for (size_t i = 1; i <= 4; i++) assert_in_range(lengths[i], 4200, 4800);
}

static const char prose[] = "The quick brown fox jumps over the lazy dog and runs away from here.\n"
                            "It is a truth universally acknowledged, that a single man must be "
                            "in want of a wife.\n"
                            "Hello world Hello world Hello world\n";

/* What the batches of `sequences` hold of `record`, as one text of ids. */
static void corrupted(char *out, size_t size, uint64_t seed, int32_t sequences, int64_t record) {
    sida_batch_options options = {
        .sequences = sequences, .max_tokens = 64, .vocabulary = 32128, .eos = 1, .seed = seed};
    sida_corpus *corpus = open_text(SIDA_CORPUS_SPANS, prose);
    sida_batcher *batcher;
    sida_batch *batch;
    size_t used = 0;
    assert_ok(sida_batcher_create(&batcher, corpus, tokenizer, &options));
    assert_ok(sida_batcher_skip(batcher, record / sequences));
    assert_ok(sida_batcher_next(batcher, &batch));
    int32_t s = (int32_t)(record % sequences);
    assert_true(batch->has_targets);
    for (int side = 0; side < 2; side++) {
        const sida_ragged *ragged = side ? &batch->target : &batch->input;
        assert_int_equal(ragged->ids[ragged->offsets[s + 1] - 1], 1);
        for (int64_t i = ragged->offsets[s]; i < ragged->offsets[s + 1]; i++)
            used += (size_t)snprintf(out + used, size - used, "%d ", ragged->ids[i]);
    }
    snprintf(out + used, size - used, "%s", batch->targets[s]);
    assert_non_null(strstr(batch->targets[s], "<extra_id_0>"));
    sida_batch_destroy(batch);
    sida_batcher_destroy(batcher);
    sida_corpus_close(corpus);
}

static void test_span_batches(void **state) {
    (void)state;
    if (!tokenizer) skip();
    char alone[1024], together[1024], other[1024];
    for (int64_t record = 0; record < 3; record++) {
        corrupted(alone, sizeof alone, 7, 1, record);
        corrupted(together, sizeof together, 7, 3, record);
        assert_string_equal(alone, together);
    }
    corrupted(alone, sizeof alone, 7, 1, 1);
    corrupted(other, sizeof other, 8, 1, 1);
    assert_string_not_equal(alone, other);

    sida_batch_options options = {.sequences = 1, .max_tokens = 16, .vocabulary = 32128, .eos = 1};
    static const struct {
        const char *text, *words;
        int32_t vocabulary;
    } cases[] = {{"Hello\n", "corpus:1: the text has a single token", 32128},
                 {"Hello world\n", "needs <extra_id_0>, id 32099", 32099},
                 {prose, "corpus:1: the input has", 32128}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        sida_corpus *corpus = open_text(SIDA_CORPUS_SPANS, cases[i].text);
        sida_batcher *batcher;
        sida_batch *batch;
        options.vocabulary = cases[i].vocabulary;
        assert_ok(sida_batcher_create(&batcher, corpus, tokenizer, &options));
        assert_fails(sida_batcher_next(batcher, &batch), SIDA_ERROR_FORMAT, cases[i].words);
        sida_batcher_destroy(batcher);
        sida_corpus_close(corpus);
    }
}

int main(void) {
    const char *path = support_tokenizer_path();
    if (path && sida_tokenizer_open(&tokenizer, path) != SIDA_OK) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_formats),      cmocka_unit_test(test_tables),
        cmocka_unit_test(test_errors),       cmocka_unit_test(test_gzip),
        cmocka_unit_test(test_batches),      cmocka_unit_test(test_batch_errors),
        cmocka_unit_test(test_content),      cmocka_unit_test(test_spans),
        cmocka_unit_test(test_span_batches),
    };
    int failed = cmocka_run_group_tests(tests, support_setup, support_teardown);
    sida_tokenizer_destroy(tokenizer);
    return failed;
}
