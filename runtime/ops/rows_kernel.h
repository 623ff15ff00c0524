/* Kernels that work along one row: norm, gate, sums. */
#ifndef SIDA_RUNTIME_OPS_ROWS_KERNEL_H
#define SIDA_RUNTIME_OPS_ROWS_KERNEL_H

#include "runtime/ops/cpu_kernels.h"
#include "runtime/ops/simd.h"

#include <math.h>

static void kernel_rms_norm(float *out, const float *x, sida_weight weight, int64_t rows,
                            float epsilon) {
    int64_t d = weight.cols;
    for (int64_t i = 0; i < rows; i++, x += d, out += d) {
        vec sum = vec_set(0.0f);
        int64_t k = 0;
        for (; k + LANES <= d; k += LANES) sum = vec_fma(vec_load(x + k), vec_load(x + k), sum);
        if (k < d) {
            vec rest = vec_load_part(x + k, d - k);
            sum = vec_fma(rest, rest, sum);
        }
        float factor = 1.0f / sqrtf(vec_sum(sum) / (float)d + epsilon);
        for (k = 0; k + LANES <= d; k += LANES)
            vec_store(out + k, vec_load(x + k) * vec_set(factor) *
                                   vec_load_weights(weight.data, k, weight.dtype));
        for (; k < d; k++) out[k] = x[k] * factor * weight_at(weight.data, k, weight.dtype);
    }
}

/* 1 / (1 + exp(-x)); exp's argument stays where it is finite. */
SIDA_INLINE vec vec_sigmoid(vec x) {
    const vec limit = vec_set(-87.0f);
    ivec low = x < limit;
    x = (vec)((low & (ivec)limit) | (~low & (ivec)x));
    return vec_set(1.0f) / (vec_set(1.0f) + vec_exp(-x));
}

SIDA_INLINE vec vec_activate(vec x, sida_activation activation) {
    if (activation == SIDA_ACT_RELU) return (vec)(~(ivec)(x < vec_set(0.0f)) & (ivec)x);
    if (activation == SIDA_ACT_SILU) return x * vec_sigmoid(x);
    /* 0.5 (1 + tanh(u)) = sigmoid(2u) */
    vec u = x * vec_set(0.7978845608028654f) * vec_fma(x * x, vec_set(0.044715f), vec_set(1.0f));
    return x * vec_sigmoid(u + u);
}

static void kernel_gated(float *out, const float *gate, const float *up, int64_t count,
                         sida_activation activation) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        vec_store(out + i, vec_activate(vec_load(gate + i), activation) * vec_load(up + i));
    if (i < count) {
        vec rest = vec_activate(vec_load_part(gate + i, count - i), activation) *
                   vec_load_part(up + i, count - i);
        memcpy(out + i, &rest, (size_t)(count - i) * sizeof(float));
    }
}

static void kernel_axpy(float *y, const float *x, float a, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        vec_store(y + i, vec_fma(vec_load(x + i), vec_set(a), vec_load(y + i)));
    if (i < count) {
        vec rest =
            vec_fma(vec_load_part(x + i, count - i), vec_set(a), vec_load_part(y + i, count - i));
        memcpy(y + i, &rest, (size_t)(count - i) * sizeof(float));
    }
}

static float kernel_exp_sum(const float *x, float shift, int64_t count) {
    vec sum = vec_set(0.0f);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sum = sum + vec_exp(vec_load(x + i) - vec_set(shift));
    if (i < count) {
        float lanes[LANES];
        for (int l = 0; l < LANES; l++) lanes[l] = i + l < count ? x[i + l] - shift : -INFINITY;
        sum = sum + vec_exp(vec_load(lanes));
    }
    return vec_sum(sum);
}

static float kernel_exp_one(float x) {
    return vec_exp(vec_set(x))[0];
}

#endif
