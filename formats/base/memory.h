/* Host memory with checked sizes. */
#ifndef SIDA_FORMATS_BASE_MEMORY_H
#define SIDA_FORMATS_BASE_MEMORY_H

#include "formats/base/status.h"

#include <stdbool.h>
#include <stddef.h>

/* Alignment of every block from sida_alloc(): a cache line, and the widest vector register. */
#define SIDA_ALIGNMENT ((size_t)64)

/* Allocates count * size bytes, zeroed, 64-byte aligned. A product that overflows is an error, not
 * a small block. `what` names the block in the message ("the token ids of x.tsv"). A count of 0
 * gives a block of one byte, never NULL. Free with free(). */
sida_status sida_alloc(void **out, size_t count, size_t size, const char *what);

/* Grows *block (from sida_alloc or NULL) so that it holds at least `needed` items; *capacity is in
 * items. Doubles, keeps the contents, new items are zero. */
sida_status sida_grow(void **block, size_t *capacity, size_t needed, size_t size, const char *what);

/* a * b and a + b; true when the result does not fit. */
static inline bool sida_mul_overflow(size_t a, size_t b, size_t *out) {
    return __builtin_mul_overflow(a, b, out);
}
static inline bool sida_add_overflow(size_t a, size_t b, size_t *out) {
    return __builtin_add_overflow(a, b, out);
}

/* A copy of a string; NULL stays NULL. */
sida_status sida_strdup(char **out, const char *text);

/* printf into a new string. */
sida_status sida_strprintf(char **out, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Typed forms: SIDA_ALLOC(&pointer, count, "what"). */
#define SIDA_ALLOC(out, count, what)                                                               \
    sida_alloc((void **)(out), (size_t)(count), sizeof **(out), (what))
#define SIDA_GROW(block, capacity, needed, what)                                                   \
    sida_grow((void **)(block), (capacity), (size_t)(needed), sizeof **(block), (what))

#endif
