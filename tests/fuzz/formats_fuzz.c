/* Every parser of formats/ and data/ on damaged input: it may refuse or accept, but never crash,
 * and a refusal has a message that names the file. Deterministic; the argument is the number of
 * mutations of each kind of file (default: quick). */
#include "data/corpus.h"
#include "formats/base/file.h"
#include "formats/checkpoint.h"
#include "formats/predictor_file.h"
#include "formats/tokenizer.h"
#include "formats/trace.h"
#include "tests/fuzz/mutate.h"
#include "tests/unit/formats_support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <zlib.h>

static int rounds = 200;

/* Refusals must be told, with the file's name; *refused counts them. */
static void judge(sida_status status, const char *name, int *refused) {
    if (status == SIDA_OK) return;
    ++*refused;
    if (!strstr(sida_last_message(), name)) {
        print_error("no file name in: %s\n", sida_last_message());
        fail();
    }
}

typedef sida_status parse_fn(const blob *input, const char *path);

/* checked: the file has a checksum, so whatever is accepted must be the seed itself. */
static void run(const char *what, const blob *seed, const char *path, parse_fn *parse, int count,
                bool checked) {
    sida_rng rng = sida_rng_seed(20240101);
    int refused = 0;
    assert_ok(parse(seed, path));
    for (int i = 0; i < count; i++) {
        blob input = mutate(&rng, seed);
        sida_status status = parse(&input, path);
        judge(status, path, &refused);
        if (checked && status == SIDA_OK)
            assert_true(input.bytes == seed->bytes &&
                        memcmp(input.data, seed->data, seed->bytes) == 0);
        free(input.data);
    }
    print_message("%s: %d of %d refused\n", what, refused, count);
}

/* --- safetensors */

static const char weights_header[] =
    "{\"__metadata__\":{\"format\":\"pt\"},"
    "\"shared.weight\":{\"dtype\":\"F32\",\"shape\":[4,2],\"data_offsets\":[0,32]},"
    "\"encoder.a\":{\"dtype\":\"BF16\",\"shape\":[2,2,2,1],\"data_offsets\":[32,48]},"
    "\"encoder.b\":{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[48,50]}}";

static blob make_weights(void) {
    uint64_t length = strlen(weights_header);
    blob out = {calloc(1, 8 + length + 50), 8 + length + 50};
    memcpy(out.data, &length, 8);
    memcpy(out.data + 8, weights_header, length);
    return out;
}

static sida_status parse_weights(const blob *input, const char *path) {
    sida_safetensors *file;
    /* A block of its own size: reads past the end are seen by the sanitizer. */
    blob exact = {malloc(input->bytes ? input->bytes : 1), input->bytes};
    memcpy(exact.data, input->data, input->bytes);
    sida_status status = sida_safetensors_parse(&file, exact.data, exact.bytes, path);
    uint64_t sum = 0;
    for (size_t i = 0; status == SIDA_OK && i < sida_safetensors_count(file); i++) {
        const sida_tensor_view *view = sida_safetensors_at(file, i);
        for (size_t b = 0; b < view->bytes; b++) sum += ((const uint8_t *)view->data)[b];
    }
    if (status == SIDA_OK) sida_safetensors_destroy(file);
    assert_true(sum <=
                255 * (uint64_t)exact.bytes * 64); /* the sum is used, so the bytes are read */
    free(exact.data);
    return status;
}

static void test_safetensors(void **state) {
    (void)state;
    blob seed = make_weights();
    run("safetensors", &seed, "weights.st", parse_weights, 20 * rounds, false);
    free(seed.data);
}

/* --- checkpoint folders: config.json and the index */

static sida_status open_folder(const blob *input, const char *path) {
    support_write(path, input->data, input->bytes);
    char folder[256];
    snprintf(folder, sizeof folder, "%s", path);
    *strrchr(folder, '/') = 0;
    sida_checkpoint *checkpoint;
    sida_status status = sida_checkpoint_open(&checkpoint, folder);
    if (status == SIDA_OK) sida_checkpoint_destroy(checkpoint);
    /* The fault may be told of the weight file that the index names. */
    if (status != SIDA_OK && strstr(sida_last_message(), folder))
        return sida_fail_context(status, "%s", path);
    return status;
}

static void test_checkpoint(void **state) {
    (void)state;
    char folder[256], path[300];
    snprintf(folder, sizeof folder, "%s", support_path("model"));
    mkdir(folder, 0700);
    blob weights = make_weights();
    snprintf(path, sizeof path, "%s/part.safetensors", folder);
    support_write(path, weights.data, weights.bytes);
    free(weights.data);
    static const char index[] = "{\"metadata\":{\"total_size\":50},\"weight_map\":{"
                                "\"shared.weight\":\"part.safetensors\","
                                "\"encoder.a\":\"part.safetensors\"}}";
    static const char config[] =
        "{\"d_model\":64,\"num_experts\":8,\"a\":[1,2.5,null,{\"b\":true}],"
        "\"model_type\":\"switch_transformers\"}";
    blob seed = blob_of(config, strlen(config));
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
    support_write(path, index, strlen(index));
    snprintf(path, sizeof path, "%s/config.json", folder);
    run("config.json", &seed, path, open_folder, rounds, false);
    support_write(path, seed.data, seed.bytes);
    free(seed.data);
    seed = blob_of(index, strlen(index));
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
    run("index.json", &seed, path, open_folder, rounds, false);
    free(seed.data);
}

/* --- tokenizer */

static sida_status parse_tokenizer(const blob *input, const char *path) {
    static const char text[] =
        "Hello \xef\xac\x81 world <extra_id_3> \xc3\xa9\xe3\x80\x80\xf0\x9f\x98\x80 12";
    sida_tokenizer *tokenizer;
    sida_status status = sida_tokenizer_parse(&tokenizer, input->data, input->bytes, path);
    if (status != SIDA_OK) return status;
    int32_t *ids = NULL;
    size_t count;
    char *words = NULL;
    if (sida_tokenizer_encode(&ids, &count, tokenizer, text, strlen(text)) == SIDA_OK)
        (void)!sida_tokenizer_decode(&words, tokenizer, ids, count);
    free(ids);
    free(words);
    sida_tokenizer_destroy(tokenizer);
    return SIDA_OK;
}

/* The real model's normaliser with few of its pieces: loads in a moment. */
static blob small_model(const blob *whole) {
    blob out = {malloc(whole->bytes), 0};
    size_t at = 0, pieces = 0;
    while (at < whole->bytes) {
        size_t begin = at, bytes = 0;
        uint8_t key = whole->data[at++];
        for (unsigned shift = 0;; shift += 7) {
            bytes |= (size_t)(whole->data[at] & 0x7f) << shift;
            if (whole->data[at++] < 0x80) break;
        }
        at += bytes;
        if (key == 0x0a && ++pieces > 200) continue;
        memcpy(out.data + out.bytes, whole->data + begin, at - begin);
        out.bytes += at - begin;
    }
    return out;
}

static void test_tokenizer(void **state) {
    (void)state;
    const char *path = support_tokenizer_path();
    if (!path) skip();
    blob whole;
    whole.data = support_read(path, &whole.bytes);
    blob seed = small_model(&whole);
    run("spiece.model", &seed, "spiece.model", parse_tokenizer, rounds, false);
    free(seed.data);
    free(whole.data);
}

/* --- corpora */

static sida_corpus_format current_format;

static sida_status read_corpus(const blob *input, const char *path) {
    sida_corpus *corpus;
    sida_record record;
    bool more = true;
    support_write(path, input->data, input->bytes);
    sida_status status = sida_corpus_open(&corpus, current_format, path);
    if (status != SIDA_OK) return status;
    while (status == SIDA_OK && more) {
        status = sida_corpus_next(corpus, &record, &more);
        if (status == SIDA_OK && more) assert_true(record.input[0] && record.line > 0);
    }
    sida_corpus_close(corpus);
    return status;
}

static void test_corpora(void **state) {
    (void)state;
    static const char *const seeds[] = {
        [SIDA_CORPUS_TEXT] = "one line\nanother \xc3\xa9\nlast",
        [SIDA_CORPUS_JSONL] = "{\"text\":\"a\",\"label\":1}\n{\"input\":\"b\",\"target\":\"c\"}\n",
        [SIDA_CORPUS_TSV] = "a\tb\nc\nd\te\n",
        [SIDA_CORPUS_SST2] = "sentence\tlabel\ngood\t1\nbad\t0\n",
        [SIDA_CORPUS_MRPC] = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\tA b\tC d\n",
        [SIDA_CORPUS_MULTIRC] =
            ("{\"passage\":{\"text\":\"P\",\"questions\":[{\"question\":\"Q\",\"answers\":["
             "{\"text\":\"A\",\"label\":1},{\"text\":\"B\",\"label\":0}]}]}}\n"),
    };
    for (size_t i = 0; i < sizeof seeds / sizeof *seeds; i++) {
        blob seed = blob_of(seeds[i], strlen(seeds[i]));
        current_format = (sida_corpus_format)i;
        run("corpus", &seed, support_path("corpus"), read_corpus, rounds, false);
        free(seed.data);
    }
    const char *path = support_path("packed");
    gzFile gz = gzopen(path, "wb");
    for (int i = 0; i < 300; i++) gzprintf(gz, "line %d of the text\n", i * 7919 % 1000);
    gzclose(gz);
    blob seed;
    seed.data = support_read(path, &seed.bytes);
    current_format = SIDA_CORPUS_TEXT;
    run("gzip", &seed, support_path("corpus"), read_corpus, rounds, false);
    free(seed.data);
}

/* --- HDF5 */

static void make_trace(const char *path) {
    sida_trace_info info = {.config = (char *)(uintptr_t) "{}",
                            .options = (char *)(uintptr_t) "{}",
                            .family = (char *)(uintptr_t) "switch_transformers",
                            .experts = 4,
                            .top_k = 1,
                            .top = 2,
                            .d_model = 2,
                            .vocabulary = 10,
                            .layers = {1, 1}};
    sida_trace_writer *writer;
    int32_t tokens[3] = {1, 2, 3};
    uint16_t experts[3] = {0, 1, 2}, top_ids[6] = {0, 1, 1, 2, 2, 3};
    uint16_t logp[6] = {0xbc00, 0xbc00, 0xbc00, 0xbc00, 0xbc00, 0xbc00}; /* -1 */
    float alpha[3] = {0.5f, 0.5f, 0.5f}, embedding[6] = {0};
    uint8_t dropped[3] = {0};
    const sida_trace_rows rows = {tokens, experts, alpha, dropped, top_ids, logp};
    assert_ok(sida_trace_create(&writer, path, SIDA_H5_TRACE, &info));
    for (int side = 0; side < 2; side++)
        assert_ok(sida_trace_append_side(writer, side, 2, (const int64_t[]){1, 2}, &rows));
    assert_ok(sida_trace_append_sequences(writer, 2, (const int64_t[]){1, 2},
                                          (const int32_t[]){0, 1}, (const uint8_t[]){0, 0}, NULL,
                                          NULL));
    assert_ok(sida_trace_write_embedding(writer, 3, tokens, embedding));
    assert_ok(sida_trace_commit(writer));
}

static void count_line(void *context, const char *line) {
    assert_true(*line);
    ++*(int *)context;
}

static sida_status open_trace(const blob *input, const char *path) {
    sida_trace *trace;
    int lines = 0;
    support_write(path, input->data, input->bytes);
    /* Goes on where opening stops. */
    sida_status told = sida_trace_diagnose(path, count_line, &lines);
    if (told == SIDA_OK && lines == 0) {
        assert_ok(sida_trace_open(&trace, path));
        sida_trace_close(trace);
    }
    sida_status status = sida_trace_open(&trace, path);
    if (status != SIDA_OK) return status;
    status = sida_trace_check(trace);
    sida_trace_close(trace);
    return status;
}

static sida_status open_predictor(const blob *input, const char *path) {
    sida_h5_file *file;
    sida_predictor_meta meta;
    support_write(path, input->data, input->bytes);
    sida_status status = sida_predictor_file_open(&file, &meta, path);
    if (status != SIDA_OK) return status;
    sida_predictor_meta_free(&meta);
    sida_h5_close(file);
    return SIDA_OK;
}

static void test_h5(void **state) {
    (void)state;
    blob seed;
    const char *path = support_path("seed.h5");
    make_trace(path);
    seed.data = support_read(path, &seed.bytes);
    run("trace", &seed, support_path("fuzz.h5"), open_trace, rounds, true);
    /* Without its block the same file is foreign: a child process tries it first. */
    blob foreign = blob_of(seed.data + 512, seed.bytes - 512);
    run("foreign trace", &foreign, support_path("fuzz.h5"), open_trace, rounds / 2, false);
    free(foreign.data);
    free(seed.data);

    sida_predictor_meta meta = {{1, 2}, {3, 4}, (char *)(uintptr_t) "lstm", json_object()};
    sida_h5_file *file;
    const float weights[4] = {1, 2, 3, 4};
    assert_ok(sida_predictor_file_create(&file, path, SIDA_H5_PREDICTOR, &meta));
    assert_ok(sida_h5_write(file, "tensors/w", SIDA_H5_F32, 1, (const int64_t[]){4}, weights));
    assert_ok(sida_h5_commit(file));
    json_decref(meta.config);
    seed.data = support_read(path, &seed.bytes);
    run("predictor", &seed, support_path("fuzz.h5"), open_predictor, rounds, true);
    free(seed.data);
}

int main(int argc, char **argv) {
    if (argc > 1) rounds = atoi(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_safetensors), cmocka_unit_test(test_checkpoint),
        cmocka_unit_test(test_tokenizer),   cmocka_unit_test(test_corpora),
        cmocka_unit_test(test_h5),
    };
    return cmocka_run_group_tests(tests, support_setup, support_teardown);
}
