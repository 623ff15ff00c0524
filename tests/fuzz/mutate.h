/* Seeded damage to a file's bytes: the same on every run. */
#ifndef SIDA_TESTS_FUZZ_MUTATE_H
#define SIDA_TESTS_FUZZ_MUTATE_H

#include "formats/base/rng.h"

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct blob {
    uint8_t *data;
    size_t bytes;
} blob;

static inline blob blob_of(const void *data, size_t bytes) {
    blob copy = {malloc(bytes + 1), bytes};
    memcpy(copy.data, data, bytes);
    return copy;
}

/* 1 to 4 of: bits, bytes with a meaning, a cut, a run of noise, a piece copied elsewhere. */
static inline blob mutate(sida_rng *rng, const blob *seed) {
    static const uint8_t special[] = {0, 1, 0x7f, 0x80, 0xff, '"', '{', '[', '\n', '\t', '-', '9'};
    blob out = blob_of(seed->data, seed->bytes);
    for (uint32_t left = 1 + sida_rng_below(rng, 4); left > 0 && out.bytes > 0; left--) {
        /* Half of the changes lie in front, where the headers are. */
        size_t room = sida_rng_below(rng, 2) && out.bytes > 600 ? 600 : out.bytes;
        size_t at = sida_rng_below(rng, (uint32_t)room);
        size_t span = 1 + sida_rng_below(rng, 64);
        if (span > out.bytes - at) span = out.bytes - at;
        switch (sida_rng_below(rng, 6)) {
        case 0:
        case 1:
            out.data[at] ^= (uint8_t)(1u << sida_rng_below(rng, 8));
            break;
        case 2:
            out.data[at] = special[sida_rng_below(rng, sizeof special)];
            break;
        case 3:
            if (sida_rng_below(rng, 3) == 0) out.bytes = at;
            break;
        case 4:
            for (size_t i = 0; i < span; i++) out.data[at + i] = (uint8_t)sida_rng_u64(rng);
            break;
        default: {
            size_t to = sida_rng_below(rng, (uint32_t)(out.bytes - span + 1));
            memmove(out.data + to, out.data + at, span);
        }
        }
    }
    return out;
}

#endif
