/* HDF5 files: commit or nothing, checksum, kinds, types, foreign files; and the predictor's file.
 */
#include "formats/base/file.h"
#include "formats/h5.h"
#include "formats/predictor_file.h"
#include "tests/unit/formats_support.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#define ANY (1u << SIDA_H5_TRACE | 1u << SIDA_H5_PREDICTOR)

static sida_status write_small(const char *path, sida_h5_kind kind) {
    sida_h5_file *file;
    sida_status status = sida_h5_create(&file, path, kind);
    if (status != SIDA_OK) return status;
    const uint16_t halves[3] = {0x3c00, 0xbc00, 0x0001};
    const int32_t values[6] = {1, -2, 3, 4, 5, 6};
    assert_ok(sida_h5_write(file, "a/b/halves", SIDA_H5_F16, 1, (const int64_t[]){3}, halves));
    assert_ok(sida_h5_write(file, "a/values", SIDA_H5_I32, 2, (const int64_t[]){2, 3}, values));
    for (int i = 0; i < 3; i++)
        assert_ok(sida_h5_append(file, "rows", SIDA_H5_I32, 2, (const int64_t[]){3}, 2, values));
    assert_ok(sida_h5_set_text(file, "name", "first"));
    assert_ok(sida_h5_set_text(file, "name", "größer"));
    assert_ok(sida_h5_set_i64(file, "number", -5));
    assert_true(sida_h5_exists(file, "rows"));
    assert_true(sida_h5_exists(file, "a/b/halves"));
    assert_false(sida_h5_exists(file, "a/c"));
    return sida_h5_commit(file);
}

static void test_round_trip(void **state) {
    (void)state;
    const char *path = support_path("small.h5");
    sida_h5_file *file;
    assert_ok(write_small(path, SIDA_H5_TRACE));
    assert_ok(sida_h5_open(&file, path, ANY, false));
    assert_int_equal(sida_h5_file_kind(file), SIDA_H5_TRACE);
    int64_t shape[3], number;
    uint16_t halves[3];
    int32_t rows[18];
    float wide[3];
    char *text;
    assert_ok(sida_h5_shape(file, "a/b/halves", SIDA_H5_F16, 1, shape));
    assert_int_equal(shape[0], 3);
    assert_ok(sida_h5_read_rows(file, "a/b/halves", SIDA_H5_F16, 0, 3, halves));
    assert_int_equal(halves[2], 1);
    assert_ok(sida_h5_read_rows(file, "a/b/halves", SIDA_H5_F32, 0, 3, wide));
    assert_true(wide[1] == -1.0f && wide[2] == 0x1p-24f);
    assert_ok(sida_h5_shape(file, "rows", SIDA_H5_I32, 2, shape));
    assert_int_equal(shape[0], 6);
    assert_ok(sida_h5_read_rows(file, "rows", SIDA_H5_I32, 3, 2, rows));
    assert_int_equal(rows[0], 4);
    assert_int_equal(rows[4], -2);
    assert_ok(sida_h5_get_text(file, "name", &text));
    assert_string_equal(text, "größer");
    free(text);
    assert_ok(sida_h5_get_i64(file, "number", &number));
    assert_int_equal(number, -5);

    char **paths;
    size_t count;
    assert_ok(sida_h5_list(file, &paths, &count));
    assert_int_equal(count, 3);
    assert_string_equal(paths[0], "a/b/halves");
    assert_string_equal(paths[2], "rows");
    for (size_t i = 0; i < count; i++) free(paths[i]);
    free(paths);

    assert_fails(sida_h5_shape(file, "none", SIDA_H5_I32, 1, shape), SIDA_ERROR_FORMAT,
                 "small.h5: dataset none is missing");
    assert_fails(sida_h5_shape(file, "rows", SIDA_H5_I32, 1, shape), SIDA_ERROR_FORMAT, "2 axes");
    assert_fails(sida_h5_shape(file, "rows", SIDA_H5_U16, 2, shape), SIDA_ERROR_FORMAT, "u16");
    assert_fails(sida_h5_shape(file, "rows", SIDA_H5_F32, 2, shape), SIDA_ERROR_FORMAT, "f32");
    assert_ok(sida_h5_shape(file, "rows", SIDA_H5_I64, 2, shape));
    assert_fails(sida_h5_read_rows(file, "rows", SIDA_H5_I32, 5, 2, rows), SIDA_ERROR_ARGUMENT,
                 "rows 5 to 7");
    assert_fails(sida_h5_get_text(file, "number", &text), SIDA_ERROR_FORMAT, "number");
    assert_fails(sida_h5_get_i64(file, "name", &number), SIDA_ERROR_FORMAT, "name");
    assert_fails(sida_h5_get_text(file, "none", &text), SIDA_ERROR_FORMAT, "none is missing");
    sida_h5_close(file);
}

static void test_kinds(void **state) {
    (void)state;
    sida_h5_file *file;
    const char *path = support_path("kind.h5");
    assert_ok(write_small(path, SIDA_H5_CHECKPOINT));
    assert_fails(sida_h5_open(&file, path, ANY, true), SIDA_ERROR_FORMAT,
                 "is a training checkpoint");
}

static void test_large_text(void **state) {
    (void)state;
    const char *path = support_path("text.h5");
    size_t bytes = 300000;
    char *text = malloc(bytes + 1), *got;
    memset(text, 'x', bytes);
    text[bytes] = 0;
    sida_h5_file *file;
    assert_ok(sida_h5_create(&file, path, SIDA_H5_TRACE));
    assert_ok(sida_h5_set_text(file, "long", text));
    assert_ok(sida_h5_set_text(file, "empty", ""));
    assert_ok(sida_h5_commit(file));
    assert_ok(sida_h5_open(&file, path, ANY, false));
    assert_ok(sida_h5_get_text(file, "long", &got));
    assert_string_equal(got, text);
    free(got);
    assert_ok(sida_h5_get_text(file, "empty", &got));
    assert_string_equal(got, "");
    free(got);
    sida_h5_close(file);
    free(text);
}

static void test_damage(void **state) {
    (void)state;
    const char *path = support_path("damage.h5"), *bad = support_path("bad.h5");
    sida_h5_file *file;
    size_t bytes;
    assert_ok(write_small(path, SIDA_H5_TRACE));
    uint8_t *data = support_read(path, &bytes);
    for (size_t i = 0; i < bytes; i += i < 520 ? 1 : 97) {
        data[i] ^= 0x10;
        support_write(bad, data, bytes);
        assert_fails(sida_h5_open(&file, bad, ANY, false), SIDA_ERROR_FORMAT, "bad.h5");
        data[i] ^= 0x10;
    }
    data[12] = SIDA_H5_PREDICTOR; /* another kind that is accepted here */
    support_write(bad, data, bytes);
    assert_fails(sida_h5_open(&file, bad, ANY, false), SIDA_ERROR_FORMAT, "checksum");
    data[12] = SIDA_H5_TRACE;
    for (size_t cut = 0; cut < bytes; cut += 61) {
        support_write(bad, data, cut);
        assert_fails(sida_h5_open(&file, bad, ANY, false), SIDA_ERROR_FORMAT, "bad.h5");
    }
    free(data);
}

/* A full disk, played by a limit on the size of files. */
static void test_full_disk(void **state) {
    (void)state;
    struct rlimit old, low;
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    static const size_t limits[] = {100, 4096, 100000, 40 << 20};
    size_t bytes = 1 << 20;
    uint8_t *data = calloc(1, bytes);
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        const char *path = support_path("full.h5");
        sida_h5_file *file;
        low = (struct rlimit){limits[i], old.rlim_max};
        setrlimit(RLIMIT_FSIZE, &low);
        sida_status status = sida_h5_create(&file, path, SIDA_H5_TRACE);
        if (status == SIDA_OK) {
            for (int m = 0; m < 64 && status == SIDA_OK; m++)
                status = sida_h5_append(file, "big", SIDA_H5_U8, 1, NULL, (int64_t)bytes, data);
            sida_status end = sida_h5_commit(file);
            assert_int_equal(end, SIDA_ERROR_IO);
            assert_non_null(strstr(sida_last_message(), "full.h5"));
        } else {
            assert_int_equal(status, SIDA_ERROR_IO);
        }
        setrlimit(RLIMIT_FSIZE, &old);
        assert_false(sida_file_exists(path));
        assert_false(sida_file_exists(support_path("full.h5.tmp")));
    }
    free(data);
    signal(SIGXFSZ, SIG_DFL);
    /* The library still works. */
    assert_ok(write_small(support_path("full.h5"), SIDA_H5_TRACE));
}

static void test_abandon(void **state) {
    (void)state;
    sida_h5_file *file;
    assert_ok(sida_h5_create(&file, support_path("left.h5"), SIDA_H5_TRACE));
    assert_true(sida_file_exists(support_path("left.h5.tmp")));
    sida_h5_abandon(file);
    assert_false(sida_file_exists(support_path("left.h5.tmp")));
    sida_h5_abandon(NULL);
}

/* A close that fails leaves buffers behind inside of libhdf5; that is not ours to free. */
__attribute__((visibility("default"))) const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void) {
    return "leak:libhdf5";
}

/* --- foreign files, made with plain HDF5 */

static void make_foreign(const char *path, int fault) {
    hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    hid_t list = H5Pcreate(H5P_DATASET_CREATE), text = H5Tcopy(H5T_C_S1);
    hsize_t shape[1] = {1000}, chunk[1] = {100};
    int32_t values[1000] = {1, 2, 3};
    if (fault == 1) H5Pset_external(list, "/etc/passwd", 0, 4000);
    if (fault == 2 || fault == 5) shape[0] = (hsize_t)1 << 50;
    if (fault != 1) H5Pset_chunk(list, 1, chunk);
    if (fault == 3) H5Lcreate_external("/etc/hosts", "/", file, "out", H5P_DEFAULT, H5P_DEFAULT);
    if (fault != 1) H5Pset_deflate(list, 1);
    hid_t space = H5Screate_simple(1, shape, NULL), scalar = H5Screate(H5S_SCALAR);
    hid_t data = H5Dcreate2(file, "values", fault == 4 ? H5T_IEEE_F64BE : H5T_STD_I32BE, space,
                            H5P_DEFAULT, list, H5P_DEFAULT);
    if (fault == 0 || fault == 4)
        H5Dwrite(data, H5T_NATIVE_INT32, H5S_ALL, H5S_ALL, H5P_DEFAULT, values);
    H5Tset_size(text, H5T_VARIABLE);
    hid_t attribute = H5Acreate2(file, "name", text, scalar, H5P_DEFAULT, H5P_DEFAULT);
    const char *value = "foreign";
    H5Awrite(attribute, text, &value);
    H5Aclose(attribute);
    H5Dclose(data);
    H5Sclose(space);
    H5Sclose(scalar);
    H5Tclose(text);
    H5Pclose(list);
    H5Fclose(file);
}

static void test_foreign(void **state) {
    (void)state;
    const char *path = support_path("foreign.h5");
    sida_h5_file *file;
    int64_t shape[1];
    int32_t values[3];
    char *text;
    make_foreign(path, 0);
    assert_fails(sida_h5_open(&file, path, ANY, false), SIDA_ERROR_FORMAT, "not a file written by");
    assert_ok(sida_h5_open(&file, path, ANY, true));
    assert_int_equal(sida_h5_file_kind(file), 0);
    assert_ok(sida_h5_shape(file, "values", SIDA_H5_I32, 1, shape));
    assert_ok(sida_h5_read_rows(file, "values", SIDA_H5_I32, 1, 2, values));
    assert_int_equal(values[1], 3);
    assert_ok(sida_h5_get_text(file, "name", &text));
    assert_string_equal(text, "foreign");
    free(text);
    sida_h5_close(file);

    make_foreign(path, 1);
    assert_fails(sida_h5_open(&file, path, ANY, true), SIDA_ERROR_FORMAT,
                 "dataset values keeps its values in other files");
    make_foreign(path, 3);
    assert_fails(sida_h5_open(&file, path, ANY, true), SIDA_ERROR_FORMAT, "without outside links");
    make_foreign(path, 4);
    assert_ok(sida_h5_open(&file, path, ANY, true));
    assert_fails(sida_h5_shape(file, "values", SIDA_H5_F32, 1, shape), SIDA_ERROR_FORMAT, "f32");
    sida_h5_close(file);
    /* 2^50 values that take no room in the file. */
    make_foreign(path, 2);
    assert_fails(sida_h5_open(&file, path, ANY, true), SIDA_ERROR_FORMAT,
                 "dataset values claims far more values");
    support_write(path, "not HDF5 at all", 15);
    assert_fails(sida_h5_open(&file, path, ANY, true), SIDA_ERROR_FORMAT, "foreign.h5");
    support_write(path, "", 0);
    assert_fails(sida_h5_open(&file, path, ANY, true), SIDA_ERROR_FORMAT, "foreign.h5");
}

static void *write_many(void *context) {
    for (int i = 0; i < 10; i++)
        if (write_small(context, SIDA_H5_TRACE) != SIDA_OK) return context;
    return NULL;
}

static void test_threads(void **state) {
    (void)state;
    char a[256], b[256];
    pthread_t threads[2];
    void *results[2];
    strcpy(a, support_path("thread-a.h5"));
    strcpy(b, support_path("thread-b.h5"));
    pthread_create(&threads[0], NULL, write_many, a);
    pthread_create(&threads[1], NULL, write_many, b);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], &results[i]);
    assert_null(results[0]);
    assert_null(results[1]);
    assert_true(support_same_files(a, b));
}

static void test_predictor(void **state) {
    (void)state;
    sida_predictor_meta meta = {{1, 2}, {3, 4}, (char *)(uintptr_t) "lstm", json_object()}, got;
    json_object_set_new(meta.config, "width", json_integer(256));
    static const sida_h5_kind kinds[] = {SIDA_H5_PREDICTOR, SIDA_H5_CHECKPOINT};
    const float weights[4] = {1, 2, 3, 4};
    for (int i = 0; i < 2; i++) {
        const char *path = support_path("predictor.h5");
        sida_h5_file *file;
        assert_ok(sida_predictor_file_create(&file, path, kinds[i], &meta));
        assert_ok(
            sida_h5_write(file, "tensors/w", SIDA_H5_F32, 2, (const int64_t[]){2, 2}, weights));
        assert_ok(sida_h5_commit(file));
        assert_ok(sida_predictor_file_open(&file, &got, path));
        assert_int_equal(sida_h5_file_kind(file), kinds[i]);
        assert_string_equal(got.source, "lstm");
        assert_true(sida_fingerprint_equal(got.tokenizer, meta.tokenizer));
        assert_true(json_equal(got.config, meta.config));
        sida_predictor_meta_free(&got);
        sida_h5_close(file);
    }
    /* Ours and sound, but no predictor. */
    sida_h5_file *file;
    assert_ok(write_small(support_path("p.h5"), SIDA_H5_PREDICTOR));
    assert_fails(sida_predictor_file_open(&file, &got, support_path("p.h5")), SIDA_ERROR_FORMAT,
                 "p.h5: attribute format is missing");
    assert_ok(write_small(support_path("p.h5"), SIDA_H5_TRACE));
    assert_fails(sida_predictor_file_open(&file, &got, support_path("p.h5")), SIDA_ERROR_FORMAT,
                 "is a trace");
    make_foreign(support_path("p.h5"), 0);
    assert_fails(sida_predictor_file_open(&file, &got, support_path("p.h5")), SIDA_ERROR_FORMAT,
                 "p.h5");
    json_decref(meta.config);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_kinds),
        cmocka_unit_test(test_large_text), cmocka_unit_test(test_damage),
        cmocka_unit_test(test_full_disk),  cmocka_unit_test(test_abandon),
        cmocka_unit_test(test_foreign),    cmocka_unit_test(test_threads),
        cmocka_unit_test(test_predictor),
    };
    return cmocka_run_group_tests(tests, support_setup, support_teardown);
}
