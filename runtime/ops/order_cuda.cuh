/* Logits as numbers that a warp's integer maximum orders. */
#ifndef SIDA_RUNTIME_OPS_ORDER_CUDA_CUH
#define SIDA_RUNTIME_OPS_ORDER_CUDA_CUH

/* Larger for a larger logit; -0 is 0, NaN below all. */
static __device__ inline unsigned order_of(float logit) {
    const unsigned bits = __float_as_uint(logit + 0.0f);
    return isnan(logit) ? 0u : (bits >> 31 ? ~bits : bits | 0x80000000u);
}
static __device__ inline float logit_of(unsigned order) {
    return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order); /* 0: a NaN */
}

#endif
