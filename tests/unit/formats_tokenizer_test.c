/* The tokenizer against the golden of tools/reference/tokenizer_golden.py, and damaged models. */
#include "formats/base/file.h"
#include "formats/tokenizer.h"
#include "tests/unit/formats_support.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static sida_tokenizer *tokenizer;

static void test_golden(void **state) {
    (void)state;
    FILE *file = fopen("tests/unit/formats_tokenizer_golden.jsonl", "r");
    assert_non_null(file);
    char line[65536];
    int lines = 0;
    for (; fgets(line, sizeof line, file); lines++) {
        json_t *object = json_loads(line, 0, NULL);
        const json_t *expected = json_object_get(object, "ids");
        const char *text = json_string_value(json_object_get(object, "text"));
        int32_t *ids;
        size_t count;
        assert_non_null(text);
        assert_ok(sida_tokenizer_encode(&ids, &count, tokenizer, text, strlen(text)));
        bool same = count == json_array_size(expected);
        for (size_t i = 0; same && i < count; i++)
            same = ids[i] == json_integer_value(json_array_get(expected, i));
        if (!same) {
            print_error("%sgot:", line);
            for (size_t i = 0; i < count; i++) print_error(" %d", ids[i]);
            print_error("\n");
        }
        assert_true(same);
        free(ids);
        json_decref(object);
    }
    fclose(file);
    assert_true(lines >= 30);
}

static void check_text(const int32_t *ids, size_t count, const char *expected) {
    char *text;
    assert_ok(sida_tokenizer_decode(&text, tokenizer, ids, count));
    assert_string_equal(text, expected);
    free(text);
}

static void test_decode(void **state) {
    (void)state;
    check_text((const int32_t[]){8774, 296, 1, 0, 0}, 5, "Hello world");
    check_text((const int32_t[]){0, 32099, 8774, 32000, 1}, 5, "<extra_id_0> Hello <extra_id_99>");
    check_text((const int32_t[]){8774, 2, 32127}, 3, "Hello <unk> <unk>");
    check_text(NULL, 0, "");
    char *text;
    assert_fails(sida_tokenizer_decode(&text, tokenizer, (const int32_t[]){-1}, 1),
                 SIDA_ERROR_ARGUMENT, "-1");
}

static void test_bad_text(void **state) {
    (void)state;
    int32_t *ids;
    size_t count;
    assert_fails(sida_tokenizer_encode(&ids, &count, tokenizer, "a\0b", 3), SIDA_ERROR_FORMAT,
                 NULL);
    assert_fails(sida_tokenizer_encode(&ids, &count, tokenizer, "a\xff", 2), SIDA_ERROR_FORMAT,
                 NULL);
    assert_null(ids);
    assert_int_equal(sida_tokenizer_pieces(tokenizer), 32000);
}

/* --- small models, built by hand */

typedef struct hand_model {
    uint8_t data[4096];
    size_t bytes;
} hand_model;

static void put_piece(hand_model *out, const char *text, float score, int type) {
    size_t length = strlen(text);
    uint8_t *at = out->data + out->bytes;
    *at++ = 0x0a;
    *at++ = (uint8_t)(length + 9);
    *at++ = 0x0a;
    *at++ = (uint8_t)length;
    memcpy(at, text, length);
    at += length;
    *at++ = 0x15;
    memcpy(at, &score, 4);
    at += 4;
    *at++ = 0x18;
    *at++ = (uint8_t)type;
    out->bytes = (size_t)(at - out->data);
}

static void put_trainer(hand_model *out, int type) {
    const uint8_t field[] = {0x12, 2, 0x18, (uint8_t)type};
    memcpy(out->data + out->bytes, field, sizeof field);
    out->bytes += sizeof field;
}

static void assert_refused(const hand_model *model, const char *words) {
    sida_tokenizer *other;
    assert_fails(sida_tokenizer_parse(&other, model->data, model->bytes, "evil.model"),
                 SIDA_ERROR_FORMAT, words);
    assert_non_null(strstr(sida_last_message(), "evil.model"));
    assert_null(other);
}

static hand_model small_model(void) {
    hand_model model = {.bytes = 0};
    put_piece(&model, "<unk>", 0, 2);
    put_piece(&model, "a", -1, 1);
    put_piece(&model, "\xe2\x96\x81", -2, 1);
    return model;
}

static void test_small_models(void **state) {
    (void)state;
    sida_tokenizer *other;
    int32_t *ids;
    size_t count;
    hand_model model = small_model();
    put_trainer(&model, 1);
    assert_ok(sida_tokenizer_parse(&other, model.data, model.bytes, "small"));
    /* Without </s> and <pad> in the model, their names are plain text. */
    assert_ok(sida_tokenizer_encode(&ids, &count, other, "a<extra_id_1>", 13));
    assert_int_equal(count, 3);
    assert_int_equal(ids[2], 3 + 99 - 1);
    free(ids);
    sida_tokenizer_destroy(other);

    model.bytes = 0;
    assert_refused(&model, "0 bytes");
    put_trainer(&model, 1);
    assert_refused(&model, "0 pieces");
    model = small_model();
    put_trainer(&model, 3);
    assert_refused(&model, "neither unigram nor bpe");
    model = small_model();
    put_piece(&model, "<unk2>", 0, 2);
    assert_refused(&model, "unknown");
    model = small_model();
    put_piece(&model, "a", -1, 1);
    assert_refused(&model, NULL); /* twice */
    model = small_model();
    put_piece(&model, "", -1, 1);
    assert_refused(&model, "piece 3");
    model = small_model();
    put_piece(&model, "\xff", -1, 1);
    assert_refused(&model, "UTF-8");
    model = small_model();
    put_piece(&model, "b", __builtin_nanf(""), 1);
    assert_refused(&model, "score");
    model = small_model();
    put_piece(&model, "b", 0, 9);
    assert_refused(&model, "type 9");
    model = small_model();
    model.bytes -= 3;
    assert_refused(&model, NULL);
    /* A normaliser whose table leads outside of itself. */
    model = small_model();
    const uint8_t head[] = {0x1a, 0x8a, 0x08, 0x12, 0x87, 0x08, 0x00, 0x04, 0x00, 0x00};
    memcpy(model.data + model.bytes, head, sizeof head);
    memset(model.data + model.bytes + sizeof head, 0x77, 1024 + 3);
    model.data[model.bytes + sizeof head + 1024 + 2] = 0;
    model.bytes += sizeof head + 1024 + 3;
    assert_refused(&model, "normalisation table");
}

static void test_files(void **state) {
    (void)state;
    sida_tokenizer *other;
    assert_fails(sida_tokenizer_open(&other, support_path("none")), SIDA_ERROR_IO, "none");
    support_write(support_path("garbage"), "garbage", 7);
    assert_fails(sida_tokenizer_open(&other, support_path("garbage")), SIDA_ERROR_FORMAT,
                 "garbage");
    assert_ok(sida_tokenizer_open(&other, support_tokenizer_path()));
    assert_true(sida_fingerprint_equal(sida_tokenizer_fingerprint(other),
                                       sida_tokenizer_fingerprint(tokenizer)));
    sida_tokenizer_destroy(other);
    sida_tokenizer_destroy(NULL);
}

int main(void) {
    const char *path = support_tokenizer_path();
    if (!path) {
        print_message("skipped: data/sample/model/spiece.model is not there\n");
        return 77;
    }
    if (sida_tokenizer_open(&tokenizer, path) != SIDA_OK) {
        print_error("%s\n", sida_last_message());
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden),   cmocka_unit_test(test_decode),
        cmocka_unit_test(test_bad_text), cmocka_unit_test(test_small_models),
        cmocka_unit_test(test_files),
    };
    int failed = cmocka_run_group_tests(tests, support_setup, support_teardown);
    sida_tokenizer_destroy(tokenizer);
    return failed;
}
