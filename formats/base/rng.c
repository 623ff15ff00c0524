#include "formats/base/rng.h"

#include <math.h>

float sida_rng_normal(sida_rng *rng) {
    double u = 1.0 - (double)(sida_rng_u64(rng) >> 11) * 0x1p-53; /* (0, 1] */
    double v = (double)(sida_rng_u64(rng) >> 11) * 0x1p-53;
    return (float)(sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v));
}
