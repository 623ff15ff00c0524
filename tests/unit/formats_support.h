/* Helpers of the tests of formats/ and data/: a temporary folder and files in it. */
#ifndef SIDA_TESTS_FORMATS_SUPPORT_H
#define SIDA_TESTS_FORMATS_SUPPORT_H

#include "formats/base/rng.h"
#include "formats/base/status.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

/* Makes and removes the folder; group set-up and tear-down of cmocka. */
int support_setup(void **state);
int support_teardown(void **state);

/* "FOLDER/NAME" in one of a few static buffers. */
const char *support_path(const char *name);
void support_write(const char *path, const void *data, size_t bytes);
/* The whole file; free(). */
uint8_t *support_read(const char *path, size_t *bytes);
bool support_same_files(const char *a, const char *b);

/* The call must fail with the code, and the message must hold `words` (NULL: any, not empty). */
#define assert_fails(call, code, words)                                                            \
    support_assert_fails((call), (code), (words), __FILE__, __LINE__)
void support_assert_fails(sida_status status, sida_status code, const char *words, const char *file,
                          int line);
#define assert_ok(call) support_assert_ok((call), __FILE__, __LINE__)
void support_assert_ok(sida_status status, const char *file, int line);

/* The tokenizer of the bundled sample, or NULL. */
const char *support_tokenizer_path(void);

#endif
