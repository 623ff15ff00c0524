/* Text from outside. */
#ifndef SIDA_FORMATS_BASE_TEXT_H
#define SIDA_FORMATS_BASE_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Well-formed UTF-8 (no overlong forms, surrogates or values past U+10FFFF) without NUL bytes. */
bool sida_text_is_utf8(const char *text, size_t bytes);

/* The whole string as a number within [low, high]; false for anything else. */
bool sida_text_to_i64(int64_t *out, const char *text, int64_t low, int64_t high);
bool sida_text_to_f64(double *out, const char *text, double low, double high);

/* "2GiB", "300MiB", "1.5GB", "4096" to bytes; false for anything else. */
bool sida_text_to_bytes(uint64_t *out, const char *text);

#endif
