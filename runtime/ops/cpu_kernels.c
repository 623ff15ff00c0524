#include "runtime/ops/cpu_kernels.h"

static const sida_cpu_kernels *forced;

const sida_cpu_kernels *sida_cpu_kernels_at(int i) {
    const sida_cpu_kernels *sets[3];
    int count = 0;
#if SIDA_X86_KERNELS
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("fma"))
        sets[count++] = &sida_cpu_kernels_avx512;
    /* Every processor with AVX2 and FMA converts F16 too; gcc 12 has no name to ask for that. */
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        sets[count++] = &sida_cpu_kernels_avx2;
#endif
    sets[count++] = &sida_cpu_kernels_base;
    return i >= 0 && i < count ? sets[i] : 0;
}

const sida_cpu_kernels *sida_cpu_kernels_get(void) {
    return forced ? forced : sida_cpu_kernels_at(0);
}

void sida_cpu_kernels_force(const sida_cpu_kernels *kernels) {
    forced = kernels;
}
