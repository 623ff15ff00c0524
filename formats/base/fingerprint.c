#include "formats/base/fingerprint.h"

#include "formats/base/memory.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

/* The public type is only a name for the library's state. */
static XXH3_state_t *state_of(sida_hasher *hasher) {
    return (XXH3_state_t *)hasher;
}

sida_status sida_hasher_create(sida_hasher **out) {
    XXH3_state_t *state = XXH3_createState();
    *out = (sida_hasher *)state;
    if (!state) return sida_fail(SIDA_ERROR_MEMORY, "out of memory creating a hasher");
    XXH3_128bits_reset(state);
    return SIDA_OK;
}

void sida_hasher_destroy(sida_hasher *hasher) {
    XXH3_freeState(state_of(hasher));
}

void sida_hasher_reset(sida_hasher *hasher) {
    XXH3_128bits_reset(state_of(hasher));
}

void sida_hasher_update(sida_hasher *hasher, const void *data, size_t bytes) {
    XXH3_128bits_update(state_of(hasher), data, bytes);
}

sida_fingerprint sida_hasher_finish(const sida_hasher *hasher) {
    XXH128_hash_t hash = XXH3_128bits_digest((const XXH3_state_t *)hasher);
    return (sida_fingerprint){hash.high64, hash.low64};
}

sida_fingerprint sida_fingerprint_of(const void *data, size_t bytes) {
    XXH128_hash_t hash = XXH3_128bits(data, bytes);
    return (sida_fingerprint){hash.high64, hash.low64};
}

sida_status sida_fingerprint_of_file(sida_fingerprint *out, const char *path) {
    enum { block_bytes = 1 << 20 };
    sida_status status = SIDA_OK;
    sida_hasher *hasher = NULL;
    char *block = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return sida_fail(SIDA_ERROR_IO, "%s: %s", path, strerror(errno));
    SIDA_TRY(sida_hasher_create(&hasher));
    SIDA_TRY(SIDA_ALLOC(&block, block_bytes, path));
    for (;;) {
        ssize_t got = read(fd, block, block_bytes);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) SIDA_FAIL(SIDA_ERROR_IO, "%s: %s", path, strerror(errno));
        if (got == 0) break;
        sida_hasher_update(hasher, block, (size_t)got);
    }
    *out = sida_hasher_finish(hasher);
out:
    free(block);
    sida_hasher_destroy(hasher);
    close(fd);
    return status;
}

bool sida_fingerprint_equal(sida_fingerprint a, sida_fingerprint b) {
    return a.high == b.high && a.low == b.low;
}

void sida_fingerprint_format(char text[SIDA_FINGERPRINT_TEXT], sida_fingerprint value) {
    snprintf(text, SIDA_FINGERPRINT_TEXT, "%016llx%016llx", (unsigned long long)value.high,
             (unsigned long long)value.low);
}

bool sida_fingerprint_parse(sida_fingerprint *out, const char *text) {
    if (strlen(text) != 32 || strspn(text, "0123456789abcdef") != 32) return false;
    char high[17] = {0};
    memcpy(high, text, 16);
    out->high = strtoull(high, NULL, 16);
    out->low = strtoull(text + 16, NULL, 16);
    return true;
}
