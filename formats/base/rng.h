/* A small seeded generator: the same numbers on every machine. Not for secrets. */
#ifndef SIDA_FORMATS_BASE_RNG_H
#define SIDA_FORMATS_BASE_RNG_H

#include <stdint.h>

typedef struct sida_rng {
    uint64_t state;
} sida_rng;

static inline sida_rng sida_rng_seed(uint64_t seed) {
    return (sida_rng){seed};
}

/* splitmix64 (Steele, Lea and Flood 2014). */
static inline uint64_t sida_rng_u64(sida_rng *rng) {
    uint64_t z = (rng->state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* Uniform in [0, bound); bound > 0. The bias of the multiply is below 2^-32 for small bounds. */
static inline uint32_t sida_rng_below(sida_rng *rng, uint32_t bound) {
    return (uint32_t)(((sida_rng_u64(rng) >> 32) * bound) >> 32);
}

/* Uniform in [0, 1), 24 bits. */
static inline float sida_rng_f32(sida_rng *rng) {
    return (float)(sida_rng_u64(rng) >> 40) * 0x1p-24f;
}

/* Standard normal (Box-Muller, one of the pair). */
float sida_rng_normal(sida_rng *rng);

#endif
