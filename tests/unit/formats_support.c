#include "tests/unit/formats_support.h"

#include "formats/base/file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char folder[64];

int support_setup(void **state) {
    (void)state;
    const char *base = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%.40s/sida-XXXXXX", base && *base ? base : "/tmp");
    return mkdtemp(folder) ? 0 : -1;
}

int support_teardown(void **state) {
    (void)state;
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    return system(command);
}

const char *support_path(const char *name) {
    static char paths[8][256];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

void support_write(const char *path, const void *data, size_t bytes) {
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
}

uint8_t *support_read(const char *path, size_t *bytes) {
    char *data;
    assert_ok(sida_file_read(&data, bytes, path, (size_t)1 << 30));
    return (uint8_t *)data;
}

bool support_same_files(const char *a, const char *b) {
    size_t bytes_a, bytes_b;
    uint8_t *data_a = support_read(a, &bytes_a), *data_b = support_read(b, &bytes_b);
    bool same = bytes_a == bytes_b && memcmp(data_a, data_b, bytes_a) == 0;
    free(data_a);
    free(data_b);
    return same;
}

void support_assert_fails(sida_status status, sida_status code, const char *words, const char *file,
                          int line) {
    const char *message = sida_last_message();
    if (status != code || !message[0] || (words && !strstr(message, words))) {
        print_error("status %s (expected %s): %s (expected words: %s)\n", sida_status_name(status),
                    sida_status_name(code), message, words ? words : "any");
        _fail(file, line);
    }
}

void support_assert_ok(sida_status status, const char *file, int line) {
    if (status == SIDA_OK) return;
    print_error("status %s: %s\n", sida_status_name(status), sida_last_message());
    _fail(file, line);
}

const char *support_tokenizer_path(void) {
    static const char *const paths[] = {"data/sample/model/spiece.model",
                                        "../shared/data/t5_tokenizer/spiece.model"};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
        if (access(paths[i], R_OK) == 0) return paths[i];
    return NULL;
}
