/* formats/base: status, memory, queue, files, text, fingerprints, rng. */
#include "formats/base/file.h"
#include "formats/base/fingerprint.h"
#include "formats/base/memory.h"
#include "formats/base/queue.h"
#include "formats/base/rng.h"
#include "formats/base/text.h"
#include "tests/unit/formats_support.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void test_status(void **state) {
    (void)state;
    assert_int_equal(sida_fail(SIDA_ERROR_IO, "%s:\n%d\x1b[31m", "x", 7), SIDA_ERROR_IO);
    assert_string_equal(sida_last_message(), "x: 7 [31m");
    assert_int_equal(sida_fail_context(SIDA_ERROR_FORMAT, "%s", "front"), SIDA_ERROR_FORMAT);
    assert_string_equal(sida_last_message(), "front: x: 7 [31m");
    /* The message may be its own argument, and is cut to fit. */
    (void)!sida_fail(SIDA_ERROR_IO, "again: %s", sida_last_message());
    assert_string_equal(sida_last_message(), "again: front: x: 7 [31m");
    char large[3000];
    memset(large, 'a', sizeof large);
    large[sizeof large - 1] = 0;
    (void)!sida_fail(SIDA_ERROR_IO, "%s", large);
    assert_int_equal(strlen(sida_last_message()), 1023);
    for (int code = 0; code >= -9; code--)
        assert_string_not_equal(sida_status_name((sida_status)code), "unknown");
    assert_string_equal(sida_status_name((sida_status)-77), "unknown");
}

static void test_memory(void **state) {
    (void)state;
    int32_t *block;
    size_t capacity = 0;
    assert_ok(SIDA_ALLOC(&block, 100, "block"));
    assert_int_equal((uintptr_t)block % SIDA_ALIGNMENT, 0);
    for (int i = 0; i < 100; i++) assert_int_equal(block[i], 0);
    free(block);
    assert_fails(SIDA_ALLOC(&block, SIZE_MAX / 2, "huge"), SIDA_ERROR_MEMORY, "huge");
    assert_null(block);
    assert_fails(SIDA_ALLOC(&block, PTRDIFF_MAX / 4 + 1, "huge"), SIDA_ERROR_MEMORY, "huge");
    assert_ok(SIDA_ALLOC(&block, 0, "none"));
    assert_non_null(block);
    free(block);
    block = NULL;
    for (int i = 0; i < 1000; i++) {
        assert_ok(SIDA_GROW(&block, &capacity, i + 1, "grown"));
        assert_int_equal(block[i], 0);
        block[i] = i;
    }
    for (int i = 0; i < 1000; i++) assert_int_equal(block[i], i);
    assert_fails(SIDA_GROW(&block, &capacity, SIZE_MAX, "grown"), SIDA_ERROR_MEMORY, "grown");
    assert_int_equal(block[999], 999);
    free(block);
    char *text;
    assert_ok(sida_strdup(&text, NULL));
    assert_null(text);
    assert_ok(sida_strprintf(&text, "%d-%s", 3, "x"));
    assert_string_equal(text, "3-x");
    free(text);
}

/* --- queue */

enum { ITEMS = 20000 };

static void *push_all(void *context) {
    for (intptr_t i = 1; i <= ITEMS; i++)
        if (sida_queue_push(context, (void *)i, NULL) != SIDA_OK) return context;
    sida_queue_close(context, SIDA_OK);
    return NULL;
}

static void *pop_until_error(void *context) {
    void *item;
    sida_status status;
    do status = sida_queue_pop(context, &item, NULL);
    while (status == SIDA_OK && item);
    return strcmp(sida_last_message(), "the disk burns") == 0 ? (void *)(intptr_t)status : NULL;
}

static void *push_until_closed(void *context) {
    sida_status status;
    do status = sida_queue_push(context, context, NULL);
    while (status == SIDA_OK);
    return (void *)(intptr_t)status;
}

static void test_queue(void **state) {
    (void)state;
    sida_queue *queue;
    pthread_t thread;
    void *result, *item;
    double waited = 0;
    assert_ok(sida_queue_create(&queue, 3));
    pthread_create(&thread, NULL, push_all, queue);
    for (intptr_t i = 1; i <= ITEMS; i++) {
        assert_ok(sida_queue_pop(queue, &item, &waited));
        assert_int_equal((intptr_t)item, i);
    }
    assert_ok(sida_queue_pop(queue, &item, NULL));
    assert_null(item);
    assert_true(waited >= 0);
    pthread_join(thread, &result);
    assert_null(result);
    assert_fails(sida_queue_push(queue, queue, NULL), SIDA_ERROR_CANCELLED, "closed");
    sida_queue_destroy(queue);
    sida_queue_destroy(NULL);

    /* An error wakes a sleeping reader, with its message. */
    assert_ok(sida_queue_create(&queue, 1));
    pthread_create(&thread, NULL, pop_until_error, queue);
    usleep(20000);
    sida_queue_close(queue, sida_fail(SIDA_ERROR_IO, "the disk burns"));
    sida_queue_close(queue, SIDA_OK); /* the first counts */
    pthread_join(thread, &result);
    assert_int_equal((intptr_t)result, SIDA_ERROR_IO);
    sida_queue_destroy(queue);

    /* And a sleeping writer; what is inside is only drained. */
    assert_ok(sida_queue_create(&queue, 1));
    pthread_create(&thread, NULL, push_until_closed, queue);
    usleep(20000);
    sida_queue_close(queue, sida_fail(SIDA_ERROR_DEVICE, "gone"));
    pthread_join(thread, &result);
    assert_int_equal((intptr_t)result, SIDA_ERROR_CANCELLED);
    assert_fails(sida_queue_pop(queue, &item, NULL), SIDA_ERROR_DEVICE, "gone");
    assert_null(item);
    assert_ptr_equal(sida_queue_drain(queue), queue);
    assert_null(sida_queue_drain(queue));
    sida_queue_destroy(queue);
}

static void test_files(void **state) {
    (void)state;
    const char *path = support_path("file"), *temporary = support_path("file.tmp");
    sida_mapped_file map;
    char *text;
    size_t bytes;
    support_write(path, "old", 3);
    support_write(temporary, "newer", 5);
    assert_ok(sida_file_commit(temporary, path));
    assert_false(sida_file_exists(temporary));
    assert_ok(sida_file_map(&map, path));
    assert_int_equal(map.size, 5);
    assert_memory_equal(map.data, "newer", 5);
    sida_file_unmap(&map);
    /* A failed commit takes the temporary away and leaves the old file. */
    support_write(temporary, "x", 1);
    assert_fails(sida_file_commit(temporary, support_path("no/file")), SIDA_ERROR_IO, "no/file");
    assert_false(sida_file_exists(temporary));
    assert_fails(sida_file_commit(temporary, path), SIDA_ERROR_IO, "file.tmp");
    assert_ok(sida_file_read(&text, &bytes, path, 5));
    assert_string_equal(text, "newer");
    free(text);
    assert_fails(sida_file_read(&text, &bytes, path, 4), SIDA_ERROR_FORMAT, "limit");
    assert_fails(sida_file_read(&text, &bytes, support_path(""), 4), SIDA_ERROR_IO, "regular");
    assert_int_equal(mkfifo(support_path("fifo"), 0600), 0);
    assert_fails(sida_file_map(&map, support_path("fifo")), SIDA_ERROR_IO, "regular");
    support_write(path, "", 0);
    assert_ok(sida_file_map(&map, path));
    assert_int_equal(map.size, 0);
    assert_non_null(map.data);
    sida_file_unmap(&map);
    assert_ok(sida_file_check_writable(support_path("new")));
    assert_false(sida_file_exists(support_path("new")));
    assert_fails(sida_file_check_writable(""), SIDA_ERROR_ARGUMENT, "empty");
    assert_fails(sida_file_check_writable(support_path("no/file")), SIDA_ERROR_IO, "folder");
    assert_fails(sida_file_check_writable(support_path("file/x")), SIDA_ERROR_IO, "file/x");
    assert_fails(sida_file_check_writable(support_path(".")), SIDA_ERROR_IO, "regular");
    assert_ok(sida_path_join(&text, "a/", "b"));
    assert_string_equal(text, "a/b");
    free(text);
}

static void test_text(void **state) {
    (void)state;
    static const char *const good[] = {
        "", "a", "\xc2\x80", "\xe0\xa0\x80", "\xed\x9f\xbf", "\xf4\x8f\xbf\xbf"};
    static const char *const bad[] = {"\x80",
                                      "\xc0\x80",
                                      "\xc1\xbf",
                                      "\xc2",
                                      "\xe0\x9f\xbf",
                                      "\xed\xa0\x80",
                                      "\xf4\x90\x80\x80",
                                      "\xf5\x80\x80\x80",
                                      "\xf0\x8f\xbf\xbf",
                                      "a\xff"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        assert_true(sida_text_is_utf8(good[i], strlen(good[i])));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_false(sida_text_is_utf8(bad[i], strlen(bad[i])));
    assert_false(sida_text_is_utf8("a\0b", 3));
    int64_t number;
    double value;
    uint64_t bytes;
    assert_true(sida_text_to_i64(&number, "-12", -12, 5) && number == -12);
    assert_false(sida_text_to_i64(&number, "6", -12, 5));
    assert_false(sida_text_to_i64(&number, "", 0, 5));
    assert_false(sida_text_to_i64(&number, "1x", 0, 5));
    assert_false(sida_text_to_i64(&number, "99999999999999999999", 0, INT64_MAX));
    assert_true(sida_text_to_f64(&value, "1e-3", 0, 1) && value == 1e-3);
    assert_false(sida_text_to_f64(&value, "nan", -INFINITY, INFINITY));
    assert_true(sida_text_to_bytes(&bytes, "2GiB") && bytes == (uint64_t)2 << 30);
    assert_true(sida_text_to_bytes(&bytes, "1.5KB") && bytes == 1500);
    assert_true(sida_text_to_bytes(&bytes, "4096") && bytes == 4096);
    assert_false(sida_text_to_bytes(&bytes, "-1"));
    assert_false(sida_text_to_bytes(&bytes, "1 GiB"));
    assert_false(sida_text_to_bytes(&bytes, "1e99"));
    assert_false(sida_text_to_bytes(&bytes, "1gib"));
}

static void test_fingerprint(void **state) {
    (void)state;
    sida_fingerprint whole = sida_fingerprint_of("hello world", 11), other;
    sida_hasher *hasher;
    char text[SIDA_FINGERPRINT_TEXT];
    assert_ok(sida_hasher_create(&hasher));
    sida_hasher_update(hasher, "hello ", 6);
    sida_hasher_update(hasher, "world", 5);
    assert_true(sida_fingerprint_equal(sida_hasher_finish(hasher), whole));
    sida_hasher_reset(hasher);
    assert_false(sida_fingerprint_equal(sida_hasher_finish(hasher), whole));
    sida_hasher_destroy(hasher);
    support_write(support_path("hashed"), "hello world", 11);
    assert_ok(sida_fingerprint_of_file(&other, support_path("hashed")));
    assert_true(sida_fingerprint_equal(other, whole));
    assert_fails(sida_fingerprint_of_file(&other, support_path("none")), SIDA_ERROR_IO, "none");
    sida_fingerprint_format(text, whole);
    assert_int_equal(strlen(text), 32);
    assert_true(sida_fingerprint_parse(&other, text) && sida_fingerprint_equal(other, whole));
    text[31] = 'g';
    assert_false(sida_fingerprint_parse(&other, text));
    assert_false(sida_fingerprint_parse(&other, ""));
}

static void test_rng(void **state) {
    (void)state;
    sida_rng rng = sida_rng_seed(0);
    assert_true(sida_rng_u64(&rng) == UINT64_C(0xe220a8397b1dcdaf)); /* the published first value */
    double sum = 0, squares = 0;
    for (int i = 0; i < 100000; i++) {
        double value = sida_rng_normal(&rng);
        sum += value;
        squares += value * value;
        assert_true(sida_rng_below(&rng, 7) < 7);
        float unit = sida_rng_f32(&rng);
        assert_true(unit >= 0 && unit < 1);
    }
    /* Standard errors: 0.003 and 0.0045. */
    assert_true(fabs(sum / 1e5) < 0.015 && fabs(squares / 1e5 - 1) < 0.025);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_status), cmocka_unit_test(test_memory),
        cmocka_unit_test(test_queue),  cmocka_unit_test(test_files),
        cmocka_unit_test(test_text),   cmocka_unit_test(test_fingerprint),
        cmocka_unit_test(test_rng),
    };
    return cmocka_run_group_tests(tests, support_setup, support_teardown);
}
