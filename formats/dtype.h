/* Element types of stored tensors. */
#ifndef SIDA_FORMATS_DTYPE_H
#define SIDA_FORMATS_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef enum sida_dtype { SIDA_F32, SIDA_F16, SIDA_BF16 } sida_dtype;

static inline size_t sida_dtype_bytes(sida_dtype dtype) {
    return dtype == SIDA_F32 ? 4 : 2;
}
const char *sida_dtype_name(sida_dtype dtype); /* "F32", "F16", "BF16" */

static inline float sida_bf16_to_f32(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Round to nearest even, overflow to infinity; value is no NaN. */
static inline uint16_t sida_bf16_from_f32(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    return (uint16_t)((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

float sida_f16_to_f32(uint16_t bits);
uint16_t sida_f16_from_f32(float value); /* round to nearest even; overflow to infinity */

#endif
