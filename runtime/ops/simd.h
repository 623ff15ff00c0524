/* One vector type for the kernels, as wide as the target that this translation unit is compiled
 * for; included by the cpu_kernels_*.c files only, each built with flags of its own.
 *
 * A product's bytes must not depend on how the compiler contracts a * b + c in one place and not in
 * another, so these files are built with -ffp-contract=off and fuse explicitly. */
#ifndef SIDA_RUNTIME_OPS_SIMD_H
#define SIDA_RUNTIME_OPS_SIMD_H

#include "formats/dtype.h"

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define SIDA_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
enum { LANES = 16, BLOCK_ROWS = 6 };
#elif defined(__AVX2__)
enum { LANES = 8, BLOCK_ROWS = 3 };
#elif defined(__aarch64__)
enum { LANES = 4, BLOCK_ROWS = 4 };
#else
enum { LANES = 4, BLOCK_ROWS = 3 };
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint16_t hvec __attribute__((vector_size(LANES * 2)));
typedef float vec4 __attribute__((vector_size(16)));

SIDA_INLINE vec vec_load(const float *from) {
    vec value;
    memcpy(&value, from, sizeof value);
    return value;
}
SIDA_INLINE void vec_store(float *to, vec value) {
    memcpy(to, &value, sizeof value);
}
SIDA_INLINE vec vec_set(float value) {
    return value - (vec){0}; /* -0 stays -0 */
}

/* a * b + c, rounded once where the target can. */
SIDA_INLINE vec vec_fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

SIDA_INLINE vec vec_max(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    ivec take = a > b;
    return (vec)((take & (ivec)a) | (~take & (ivec)b));
#endif
}

/* The largest lane, none being NaN. */
SIDA_INLINE float vec_largest(vec a) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)a);
#else
    vec4 b;
#if defined(__AVX2__)
    b = (vec4)_mm_max_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
#else
    b = a;
#endif
    const float c = b[0] > b[2] ? b[0] : b[2], d = b[1] > b[3] ? b[1] : b[3];
    return c > d ? c : d;
#endif
}

/* Bit l: whether a[l] == b[l]. */
SIDA_INLINE uint32_t vec_equal(vec a, vec b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)(a == b));
#else
    const ivec equal = a == b;
    uint32_t bits = 0;
    for (int l = 0; l < LANES; l++) bits |= (uint32_t)(equal[l] & 1) << l;
    return bits;
#endif
}

/* LANES weights of any stored type, from an address of any alignment, as fp32 (exactly). */
SIDA_INLINE vec vec_load_weights(const void *from, int64_t index, sida_dtype dtype) {
    if (dtype == SIDA_F32) return vec_load((const float *)from + index);
    hvec bits;
    memcpy(&bits, (const uint16_t *)from + index, sizeof bits);
    if (dtype == SIDA_BF16) return (vec)(__builtin_convertvector(bits, ivec) << 16);
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__)
    return (vec)_mm256_cvtph_ps((__m128i)bits);
#else
    vec value;
    for (int i = 0; i < LANES; i++) value[i] = sida_f16_to_f32(bits[i]);
    return value;
#endif
}

SIDA_INLINE float weight_at(const void *from, int64_t index, sida_dtype dtype) {
    uint16_t bits;
    if (dtype == SIDA_F32) {
        float value;
        memcpy(&value, (const float *)from + index, sizeof value);
        return value;
    }
    memcpy(&bits, (const uint16_t *)from + index, sizeof bits);
    return dtype == SIDA_BF16 ? sida_bf16_to_f32(bits) : sida_f16_to_f32(bits);
}

/* The first `count` lanes; the others are zero. */
SIDA_INLINE vec vec_load_part(const float *from, int64_t count) {
    float lanes[LANES] = {0};
    memcpy(lanes, from, (size_t)count * sizeof(float));
    return vec_load(lanes);
}
SIDA_INLINE vec vec_load_weights_part(const void *from, int64_t index, int64_t count,
                                      sida_dtype dtype) {
    float lanes[LANES] = {0};
    for (int64_t i = 0; i < count; i++) lanes[i] = weight_at(from, index + i, dtype);
    return vec_load(lanes);
}

/* Halves added until four lanes are left. */
SIDA_INLINE vec4 vec_fold(vec a) {
#if defined(__AVX512F__)
    typedef float vec8 __attribute__((vector_size(32)));
    vec8 b = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7) +
             __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(b, b, 0, 1, 2, 3) + __builtin_shufflevector(b, b, 4, 5, 6, 7);
#elif defined(__AVX2__)
    return __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
#else
    return a;
#endif
}

/* Sums of the lanes of four vectors, and of one: the same order, so the same bytes. */
SIDA_INLINE vec4 vec_sum4(vec a, vec b, vec c, vec d) {
    vec4 e = vec_fold(a), f = vec_fold(b), g = vec_fold(c), h = vec_fold(d);
    vec4 ef = __builtin_shufflevector(e, f, 0, 1, 4, 5) + __builtin_shufflevector(e, f, 2, 3, 6, 7);
    vec4 gh = __builtin_shufflevector(g, h, 0, 1, 4, 5) + __builtin_shufflevector(g, h, 2, 3, 6, 7);
    return __builtin_shufflevector(ef, gh, 0, 2, 4, 6) +
           __builtin_shufflevector(ef, gh, 1, 3, 5, 7);
}
SIDA_INLINE float vec_sum(vec a) {
    vec4 e = vec_fold(a);
    return (e[0] + e[2]) + (e[1] + e[3]);
}

/* exp(x) for x <= 88, within 2 ulp; 0 below -87.3 (denormals are flushed); NaN stays NaN. Range
 * reduction and polynomial: Cephes expf (Moshier). */
SIDA_INLINE vec vec_exp(vec x) {
    const vec magic = vec_set(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    ivec keep = ~(ivec)(x < vec_set(-87.3f));
    vec low = (vec)(keep & (ivec)x);
    vec shifted = vec_fma(low, vec_set(1.44269504088896341f), magic);
    vec n = shifted - magic;
    vec r = vec_fma(n, vec_set(-0.693359375f), low);
    r = vec_fma(n, vec_set(2.12194440e-4f), r);
    vec p = vec_fma(vec_set(1.9875691500e-4f), r, vec_set(1.3981999507e-3f));
    p = vec_fma(p, r, vec_set(8.3334519073e-3f));
    p = vec_fma(p, r, vec_set(4.1665795894e-2f));
    p = vec_fma(p, r, vec_set(1.6666665459e-1f));
    p = vec_fma(p, r, vec_set(5.0000001201e-1f));
    p = vec_fma(p * r, r, r) + vec_set(1.0f);
    ivec scale = ((ivec)shifted - (ivec)magic + 127) << 23;
    return (vec)(keep & (ivec)(p * (vec)scale));
}

#endif
