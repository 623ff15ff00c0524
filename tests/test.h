/* What the tests share: cmocka in the order of headers that it wants, files, time. */
#ifndef SIDA_TESTS_TEST_H
#define SIDA_TESTS_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka.h wants the four above first. */
#include <cmocka.h>

#include "formats/base/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

/* SIDA_TEST_FILTER=PATTERN runs the tests of a program whose names match, * and ? as in a shell. */
__attribute__((constructor)) static void test_filter(void) {
    const char *pattern = getenv("SIDA_TEST_FILTER");
    if (pattern) cmocka_set_test_filter(pattern);
}

/* CTest reads it as "skipped" (SKIP_RETURN_CODE). */
static inline int test_skip(const char *reason) {
    printf("skipped: %s\n", reason);
    return 77;
}

static inline double test_seconds(void) {
    return sida_clock_seconds();
}

typedef struct test_bytes {
    uint8_t *data;
    size_t size;
} test_bytes;

/* A whole file; fails the test when it cannot be read. */
static inline test_bytes test_read(const char *path) {
    test_bytes bytes = {0};
    FILE *file = fopen(path, "rb");
    if (!file) fail_msg("%s: cannot open", path);
    fseek(file, 0, SEEK_END);
    bytes.size = (size_t)ftell(file);
    rewind(file);
    bytes.data = malloc(bytes.size + 1);
    if (fread(bytes.data, 1, bytes.size, file) != bytes.size) fail_msg("%s: short read", path);
    fclose(file);
    return bytes;
}

static inline void test_write(const char *path, const void *data, size_t size) {
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(data, 1, size, file) != size || fclose(file) != 0)
        fail_msg("%s: cannot write", path);
}

/* Memory that a forked child shares with its parent. */
static inline void *test_shared_memory(size_t bytes) {
    void *block = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(block != MAP_FAILED);
    return block;
}
static inline void test_shared_free(void *block, size_t bytes) {
    munmap(block, bytes);
}

#endif
