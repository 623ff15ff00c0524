/* Half precision, safetensors and checkpoint folders. */
#include "formats/base/file.h"
#include "formats/checkpoint.h"
#include "formats/dtype.h"
#include "formats/safetensors.h"
#include "tests/unit/formats_support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void test_halves(void **state) {
    (void)state;
    for (uint32_t bits = 0; bits < 65536; bits++) {
        float value = sida_f16_to_f32((uint16_t)bits);
        uint16_t back = sida_f16_from_f32(value);
        if ((bits & 0x7fff) > 0x7c00) {
            assert_true(isnan(value));
            assert_true((back & 0x7fff) > 0x7c00);
        } else {
            assert_int_equal(back, bits);
            int exponent = (int)(bits >> 10 & 31);
            double fraction = bits & 0x3ff;
            double expected = exponent == 31 ? INFINITY
                              : exponent     ? ldexp(1024 + fraction, exponent - 25)
                                             : ldexp(fraction, -24);
            assert_true((double)value == (bits & 0x8000 ? -expected : expected));
        }
    }
    /* Ties go to even, and just past the largest half lies infinity. */
    assert_int_equal(sida_f16_from_f32(1.0f + 0x1p-11f), 0x3c00);
    assert_int_equal(sida_f16_from_f32(1.0f + 3 * 0x1p-11f), 0x3c02);
    assert_int_equal(sida_f16_from_f32(65519.0f), 0x7bff);
    assert_int_equal(sida_f16_from_f32(65520.0f), 0x7c00);
    assert_int_equal(sida_f16_from_f32(0x1p-25f), 0);
    assert_int_equal(sida_f16_from_f32(0x1.8p-25f), 1);
    assert_true(sida_bf16_to_f32(0xbf80) == -1.0f);
}

/* length, header, `payload` bytes. */
static size_t build(uint8_t *out, const char *header, size_t payload) {
    uint64_t length = strlen(header);
    memcpy(out, &length, 8);
    memcpy(out + 8, header, length);
    for (size_t i = 0; i < payload; i++) out[8 + length + i] = (uint8_t)i;
    return 8 + (size_t)length + payload;
}

static void test_parse(void **state) {
    (void)state;
    uint8_t data[1024];
    sida_safetensors *file;
    size_t bytes = build(data,
                         "{\"__metadata__\":{\"format\":\"pt\"},"
                         "\"b\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[4,16]},"
                         "\"empty\":{\"dtype\":\"F16\",\"shape\":[0,7],\"data_offsets\":[8,8]},"
                         "\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}  ",
                         16);
    assert_ok(sida_safetensors_parse(&file, data, bytes, "x.safetensors"));
    assert_int_equal(sida_safetensors_count(file), 3);
    for (size_t i = 0; i < 3; i++) {
        const sida_tensor_view *view = sida_safetensors_at(file, i);
        if (strcmp(view->name, "b") != 0) continue;
        assert_int_equal(view->dtype, SIDA_BF16);
        assert_int_equal(view->rank, 2);
        assert_int_equal(view->shape[1], 3);
        assert_int_equal(view->bytes, 12);
        assert_int_equal(*(const uint8_t *)view->data, 4);
    }
    sida_safetensors_destroy(file);
    bytes = build(data, "{}", 0);
    assert_ok(sida_safetensors_parse(&file, data, bytes, "x"));
    assert_int_equal(sida_safetensors_count(file), 0);
    sida_safetensors_destroy(file);
    sida_safetensors_destroy(NULL);
}

/* What is written is read back; the bytes are those of the format's own writer. */
static void test_write(void **state) {
    (void)state;
    static const float a[2] = {1, -2.5f};
    static const uint16_t b[6] = {1, 2, 3, 4, 5, 6};
    const sida_tensor_view tensors[3] = {
        {.name = "z", .dtype = SIDA_F32, .rank = 1, .shape = {2}, .data = a, .bytes = sizeof a},
        {.name = "none", .dtype = SIDA_F16, .rank = 2, .shape = {0, 4}, .data = a},
        {.name = "a \"b\"",
         .dtype = SIDA_BF16,
         .rank = 2,
         .shape = {3, 2},
         .data = b,
         .bytes = 12}};
    const char *path = support_path("w.safetensors");
    json_t *metadata = json_pack("{s:s, s:s}", "format", "pt", "n", "x y");
    size_t bytes;
    assert_ok(sida_safetensors_write(path, tensors, 3, metadata));
    uint8_t *data = support_read(path, &bytes);
    static const char header[] =
        "{\"__metadata__\":{\"format\":\"pt\",\"n\":\"x y\"},"
        "\"z\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
        "\"none\":{\"dtype\":\"F16\",\"shape\":[0,4],\"data_offsets\":[8,8]},"
        "\"a \\\"b\\\"\":{\"dtype\":\"BF16\",\"shape\":[3,2],\"data_offsets\":[8,20]}}";
    size_t padded = (strlen(header) + 7) / 8 * 8;
    assert_int_equal(data[0] | data[1] << 8, padded);
    assert_memory_equal(data + 8, header, strlen(header));
    for (size_t i = strlen(header); i < padded; i++) assert_int_equal(data[8 + i], ' ');
    assert_int_equal(bytes, 8 + padded + 20);
    assert_memory_equal(data + 8 + padded, a, sizeof a);
    assert_memory_equal(data + 8 + padded + sizeof a, b, sizeof b);
    sida_safetensors *file;
    assert_ok(sida_safetensors_parse(&file, data, bytes, path));
    assert_int_equal(sida_safetensors_count(file), 3);
    assert_string_equal(json_string_value(json_object_get(sida_safetensors_metadata(file), "n")),
                        "x y");
    sida_safetensors_destroy(file);
    free(data);

    assert_ok(sida_safetensors_write(path, NULL, 0, NULL));
    data = support_read(path, &bytes);
    assert_ok(sida_safetensors_parse(&file, data, bytes, path));
    assert_null(sida_safetensors_metadata(file));
    sida_safetensors_destroy(file);
    free(data);
    /* Refusals leave the file that is there. */
    const sida_tensor_view twice[2] = {tensors[0], tensors[0]};
    assert_fails(sida_safetensors_write(path, twice, 2, NULL), SIDA_ERROR_ARGUMENT, "z twice");
    json_object_set_new(metadata, "number", json_integer(3));
    assert_fails(sida_safetensors_write(path, tensors, 3, metadata), SIDA_ERROR_ARGUMENT, "number");
    assert_fails(sida_safetensors_write("/nonexistent/w", tensors, 3, NULL), SIDA_ERROR_IO,
                 "/nonexistent");
    data = support_read(path, &bytes);
    assert_int_equal(bytes, 16);
    free(data);
    json_decref(metadata);
}

static void test_hostile(void **state) {
    (void)state;
    static const struct {
        const char *header, *words;
    } cases[] = {
        {"[]", "not a JSON object"},
        {"{", "header"},
        {"{\"a\":1}", "not an object"},
        {"{\"a\":{\"dtype\":\"F64\",\"shape\":[1],\"data_offsets\":[0,8]}}", "dtype F64"},
        {"{\"a\":{\"dtype\":4,\"shape\":[1],\"data_offsets\":[0,4]}}", "dtype"},
        {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", "shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1],\"data_offsets\":[0,4]}}", "shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", "bad extent"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1.0],\"data_offsets\":[0,4]}}", "bad extent"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}",
         "overflows"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]}}",
         "overflows"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,8]}}", "8 bytes"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", "not within"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}", "not within"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[8],\"data_offsets\":[0,32]}}", "not within"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[\"0\",4]}}", "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,99999999999999999999]}}",
         "header"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
         "\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}",
         "overlap"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
         "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
         "duplicate"},
        {"{\"a\\u0000b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", "header"},
    };
    uint8_t data[1024];
    sida_safetensors *file;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t bytes = build(data, cases[i].header, 16);
        assert_fails(sida_safetensors_parse(&file, data, bytes, "evil.st"), SIDA_ERROR_FORMAT,
                     cases[i].words);
        assert_non_null(strstr(sida_last_message(), "evil.st"));
        assert_null(file);
    }
    /* Too short, and header lengths beyond the file or any memory. */
    for (size_t bytes = 0; bytes < 8; bytes++)
        assert_fails(sida_safetensors_parse(&file, data, bytes, "evil.st"), SIDA_ERROR_FORMAT,
                     "too short");
    static const uint64_t lengths[] = {100, 1 << 30, UINT64_MAX, INT64_MAX};
    for (size_t i = 0; i < 4; i++) {
        size_t bytes = build(data, "{}", 0);
        memcpy(data, &lengths[i], 8);
        assert_fails(sida_safetensors_parse(&file, data, bytes, "evil.st"), SIDA_ERROR_FORMAT,
                     "header of");
    }
    /* A depth bomb. */
    enum { DEPTH = 100000 };
    char *bomb = malloc(DEPTH + 1);
    uint8_t *large = malloc(DEPTH + 16);
    memset(bomb, '[', DEPTH);
    bomb[DEPTH] = 0;
    size_t bytes = build(large, bomb, 0);
    assert_fails(sida_safetensors_parse(&file, large, bytes, "evil.st"), SIDA_ERROR_FORMAT,
                 "header");
    free(bomb);
    free(large);
}

/* --- folders */

static const char *in_folder(const char *folder, const char *name) {
    static char path[2][512];
    static int next;
    snprintf(path[next ^= 1], sizeof path[0], "%s/%s", folder, name);
    return path[next];
}

static void write_text(const char *folder, const char *name, const char *text) {
    support_write(in_folder(folder, name), text, strlen(text));
}

static void write_tensors(const char *folder, const char *name, const char *header, size_t bytes,
                          int first) {
    uint8_t data[1024];
    size_t all = build(data, header, bytes);
    for (size_t i = 0; i < bytes; i++) data[all - bytes + i] = (uint8_t)(first + (int)i);
    support_write(in_folder(folder, name), data, all);
}

#define TENSOR(name, from, to)                                                                     \
    "\"" name "\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[" from "," to "]}"

static void test_checkpoint(void **state) {
    (void)state;
    char one[256], two[256];
    strcpy(one, support_path("one"));
    strcpy(two, support_path("two"));
    mkdir(one, 0700);
    mkdir(two, 0700);
    write_text(one, "config.json", "{\"d_model\": 64}");
    write_text(two, "config.json", "{\"d_model\": 64}");
    write_tensors(one, "model.safetensors",
                  "{" TENSOR("b", "0", "8") "," TENSOR("a", "8", "16") "}", 16, 0);
    write_tensors(two, "m-1.safetensors", "{" TENSOR("a", "0", "8") "}", 8, 8);
    write_tensors(two, "m-2.safetensors", "{" TENSOR("b", "0", "8") "," TENSOR("c", "8", "16") "}",
                  16, 0);
    write_text(two, "model.safetensors.index.json",
               "{\"weight_map\":{\"a\":\"m-1.safetensors\",\"b\":\"m-2.safetensors\"}}");
    sida_checkpoint *checkpoints[2];
    sida_fingerprint prints[2];
    const char *folders[2] = {one, two};
    for (int i = 0; i < 2; i++) {
        sida_checkpoint *checkpoint;
        const sida_tensor_view *view;
        assert_ok(sida_checkpoint_open(&checkpoint, folders[i]));
        checkpoints[i] = checkpoint;
        assert_string_equal(sida_checkpoint_folder(checkpoint), folders[i]);
        assert_int_equal(
            json_integer_value(json_object_get(sida_checkpoint_config(checkpoint), "d_model")), 64);
        assert_int_equal(sida_checkpoint_count(checkpoint), 2);
        assert_string_equal(sida_checkpoint_at(checkpoint, 0)->name, "a");
        assert_string_equal(sida_checkpoint_at(checkpoint, 1)->name, "b");
        assert_null(sida_checkpoint_find(checkpoint, "c"));
        assert_ok(sida_checkpoint_tensor(&view, checkpoint, "a", 1, (const int64_t[]){2}));
        assert_int_equal(*(const uint8_t *)view->data, 8);
        assert_fails(sida_checkpoint_tensor(&view, checkpoint, "a", 2, (const int64_t[]){2, 3}),
                     SIDA_ERROR_FORMAT, "has shape [2], expected [2, 3]");
        assert_fails(sida_checkpoint_tensor(&view, checkpoint, "z", 1, (const int64_t[]){2}),
                     SIDA_ERROR_FORMAT, "z [2] is missing");
        assert_ok(sida_checkpoint_fingerprint(&prints[i], checkpoint));
    }
    assert_true(sida_fingerprint_equal(prints[0], prints[1]));
    for (int i = 0; i < 2; i++) sida_checkpoint_destroy(checkpoints[i]);
    sida_checkpoint_destroy(NULL);

    /* One weight differs. */
    sida_checkpoint *checkpoint;
    write_tensors(two, "m-1.safetensors", "{" TENSOR("a", "0", "8") "}", 8, 9);
    assert_ok(sida_checkpoint_open(&checkpoint, two));
    assert_ok(sida_checkpoint_fingerprint(&prints[1], checkpoint));
    assert_false(sida_fingerprint_equal(prints[0], prints[1]));
    sida_checkpoint_destroy(checkpoint);

    static const struct {
        const char *index, *words;
    } cases[] = {
        {"{\"weight_map\":{\"a\":\"../one/model.safetensors\"}}", "not a file name"},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "not a file name"},
        {"{\"weight_map\":{\"a\":\"..\"}}", "not a file name"},
        {"{\"weight_map\":{\"a\":\"\"}}", "not a file name"},
        {"{\"weight_map\":{\"a\":7}}", "not a file name"},
        {"{\"weight_map\":[]}", "weight_map"},
        {"{}", "weight_map"},
        {"[]", "not a JSON object"},
        {"{\"weight_map\":{\"a\":\"m-1.safetensors\",\"a\":\"m-2.safetensors\"}}", "duplicate"},
        {"{\"weight_map\":{\"b\":\"m-1.safetensors\"}}", "b is not in m-1.safetensors"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_text(two, "model.safetensors.index.json", cases[i].index);
        assert_fails(sida_checkpoint_open(&checkpoint, two), SIDA_ERROR_FORMAT, cases[i].words);
        assert_non_null(strstr(sida_last_message(), "index.json"));
    }
    write_text(two, "model.safetensors.index.json", "{\"weight_map\":{\"a\":\"none\"}}");
    assert_fails(sida_checkpoint_open(&checkpoint, two), SIDA_ERROR_IO, "two/none");

    write_text(one, "config.json", "{\"d_model\": 64, \"d_model\": 65}");
    assert_fails(sida_checkpoint_open(&checkpoint, one), SIDA_ERROR_FORMAT, "config.json");
    write_text(one, "config.json", "");
    assert_fails(sida_checkpoint_open(&checkpoint, one), SIDA_ERROR_FORMAT, "config.json");
    unlink(in_folder(one, "config.json"));
    assert_fails(sida_checkpoint_open(&checkpoint, one), SIDA_ERROR_IO, "config.json");
    write_text(one, "config.json", "{}");
    unlink(in_folder(one, "model.safetensors"));
    assert_fails(sida_checkpoint_open(&checkpoint, one), SIDA_ERROR_IO, "model.safetensors");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_halves),     cmocka_unit_test(test_parse),
        cmocka_unit_test(test_write),      cmocka_unit_test(test_hostile),
        cmocka_unit_test(test_checkpoint),
    };
    return cmocka_run_group_tests(tests, support_setup, support_teardown);
}
