#include "formats/base/memory.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

sida_status sida_alloc(void **out, size_t count, size_t size, const char *what) {
    *out = NULL;
    size_t bytes, rounded;
    if (sida_mul_overflow(count, size, &bytes) ||
        sida_add_overflow(bytes ? bytes : 1, SIDA_ALIGNMENT - 1, &rounded) || rounded > PTRDIFF_MAX)
        return sida_fail(SIDA_ERROR_MEMORY, "%s: %zu items of %zu bytes is more than memory can be",
                         what, count, size);
    rounded &= ~(SIDA_ALIGNMENT - 1);
    void *block = aligned_alloc(SIDA_ALIGNMENT, rounded);
    if (!block)
        return sida_fail(SIDA_ERROR_MEMORY, "%s: out of memory asking for %zu bytes", what, bytes);
    memset(block, 0, rounded);
    *out = block;
    return SIDA_OK;
}

sida_status sida_grow(void **block, size_t *capacity, size_t needed, size_t size,
                      const char *what) {
    if (needed <= *capacity && *block) return SIDA_OK;
    size_t wanted = *capacity > SIZE_MAX / 2 ? needed : *capacity * 2;
    if (wanted < needed) wanted = needed;
    if (wanted < 16) wanted = 16;
    void *bigger;
    sida_status status = sida_alloc(&bigger, wanted, size, what);
    if (status != SIDA_OK) return status;
    if (*block) memcpy(bigger, *block, *capacity * size);
    free(*block);
    *block = bigger;
    *capacity = wanted;
    return SIDA_OK;
}

sida_status sida_strdup(char **out, const char *text) {
    *out = NULL;
    if (!text) return SIDA_OK;
    *out = strdup(text);
    return *out ? SIDA_OK : sida_fail(SIDA_ERROR_MEMORY, "out of memory copying a string");
}

sida_status sida_strprintf(char **out, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vasprintf(out, format, arguments);
    va_end(arguments);
    if (length >= 0) return SIDA_OK;
    *out = NULL;
    return sida_fail(SIDA_ERROR_MEMORY, "out of memory formatting a string");
}
