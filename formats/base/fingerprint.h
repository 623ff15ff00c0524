/* 128-bit fingerprints (XXH3), for "is this the same input?"; not against an adversary. */
#ifndef SIDA_FORMATS_BASE_FINGERPRINT_H
#define SIDA_FORMATS_BASE_FINGERPRINT_H

#include "formats/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct sida_fingerprint {
    uint64_t high, low;
} sida_fingerprint;

/* 32 hexadecimal digits and a NUL. */
#define SIDA_FINGERPRINT_TEXT 33

typedef struct sida_hasher sida_hasher;

sida_status sida_hasher_create(sida_hasher **out);
void sida_hasher_destroy(sida_hasher *hasher);
void sida_hasher_reset(sida_hasher *hasher);
void sida_hasher_update(sida_hasher *hasher, const void *data, size_t bytes);
sida_fingerprint sida_hasher_finish(const sida_hasher *hasher);

/* Of one block of memory. */
sida_fingerprint sida_fingerprint_of(const void *data, size_t bytes);

/* Of a whole file, streamed. */
sida_status sida_fingerprint_of_file(sida_fingerprint *out, const char *path);

bool sida_fingerprint_equal(sida_fingerprint a, sida_fingerprint b);
void sida_fingerprint_format(char text[SIDA_FINGERPRINT_TEXT], sida_fingerprint value);
/* False when `text` is not 32 hexadecimal digits. */
bool sida_fingerprint_parse(sida_fingerprint *out, const char *text);

#endif
