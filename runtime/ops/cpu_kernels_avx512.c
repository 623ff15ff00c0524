#include "runtime/ops/attention_kernel.h"
#include "runtime/ops/product_kernel.h"
#include "runtime/ops/rows_kernel.h"

const sida_cpu_kernels sida_cpu_kernels_avx512 = {
    "avx512",    kernel_product, kernel_attention, kernel_rms_norm, kernel_gated,
    kernel_axpy, kernel_exp_sum, kernel_exp_one,   kernel_top,      kernel_shares};
