#include "formats/dtype.h"

const char *sida_dtype_name(sida_dtype dtype) {
    return dtype == SIDA_F32 ? "F32" : dtype == SIDA_F16 ? "F16" : "BF16";
}

float sida_f16_to_f32(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = (bits >> 10) & 31,
             fraction = bits & 0x3ff, wide;
    if (exponent == 31) {
        wide = sign | 0x7f800000 | fraction << 13;
    } else if (exponent > 0) {
        wide = sign | (exponent + 112) << 23 | fraction << 13;
    } else { /* zero or subnormal: fraction * 2^-24 is exact in fp32 */
        float value = (float)fraction * 0x1p-24f;
        memcpy(&wide, &value, sizeof wide);
        wide |= sign;
    }
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

uint16_t sida_f16_from_f32(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    uint16_t sign = (uint16_t)(wide >> 16 & 0x8000);
    wide &= 0x7fffffff;
    if (wide > 0x7f800000) return sign | 0x7e00;  /* NaN */
    if (wide >= 0x477ff000) return sign | 0x7c00; /* rounds past 65504 */
    if (wide < 0x38800000) {                      /* subnormal or zero */
        float magnitude;
        memcpy(&magnitude, &wide, sizeof magnitude);
        magnitude += 0.5f; /* the unit in the last place of [0.5, 1) is 2^-24 */
        memcpy(&wide, &magnitude, sizeof wide);
        return (uint16_t)(sign | (wide - 0x3f000000));
    }
    wide += 0xfff + (wide >> 13 & 1); /* nearest, ties to even */
    return (uint16_t)(sign | (wide - 0x38000000) >> 13);
}
