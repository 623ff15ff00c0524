/* Kernels that work along one row: norm, gate, sums. */
#ifndef SIDA_RUNTIME_OPS_ROWS_KERNEL_H
#define SIDA_RUNTIME_OPS_ROWS_KERNEL_H

#include "runtime/ops/cpu_kernels.h"
#include "runtime/ops/simd.h"

#include <assert.h>
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

/* LANES values from `i`; past the end -inf. */
SIDA_INLINE vec row_load(const float *x, int64_t i, int64_t count) {
    if (i + LANES <= count) return vec_load(x + i);
    float lanes[LANES];
    for (int l = 0; l < LANES; l++) lanes[l] = i + l < count ? x[i + l] : -INFINITY;
    return vec_load(lanes);
}

static float kernel_exp_sum(const float *x, float shift, int64_t count) {
    vec sum = vec_set(0.0f);
    for (int64_t i = 0; i < count; i += LANES)
        sum = sum + vec_exp(row_load(x, i, count) - vec_set(shift));
    return vec_sum(sum);
}

static float kernel_exp_one(float x) {
    return vec_exp(vec_set(x))[0];
}

enum { TOP_STEP = 4 * LANES };
static_assert(TOP_STEP <= 64 && SIDA_TOP_COUNT % 64 == 0, "a step's bits fit a word");

SIDA_INLINE float top_high(const vec *of) {
    return vec_largest(vec_max(vec_max(of[0], of[1]), vec_max(of[2], of[3])));
}
/* Where the first of these is `value`; TOP_STEP or more: nowhere. */
SIDA_INLINE int32_t top_find(const vec *in, vec value) {
    uint64_t found = 0;
    for (int j = 0; j < 4; j++) found |= (uint64_t)vec_equal(in[j], value) << (j * LANES);
    return found ? __builtin_ctzll(found) : 64;
}
SIDA_INLINE vec top_without(vec a, ivec taken) {
    return (vec)((taken & (ivec)vec_set(-INFINITY)) | (~taken & (ivec)a));
}

/* Takes the highest out of left [padded], and says where it was. */
static int32_t top_take(float *left, int32_t padded, ivec lanes) {
    vec high[4];
    for (int j = 0; j < 4; j++) high[j] = vec_load(left + j * LANES);
    for (int32_t i = TOP_STEP; i < padded; i += TOP_STEP)
        for (int j = 0; j < 4; j++) high[j] = vec_max(high[j], vec_load(left + i + j * LANES));
    const vec highest = vec_set(top_high(high));
    for (int32_t i = 0;; i += TOP_STEP) {
        for (int j = 0; j < 4; j++) high[j] = vec_load(left + i + j * LANES);
        int32_t at = top_find(high, highest);
        if (at >= TOP_STEP) continue;
        at += i;
        /* By a whole vector: a load of one cannot be served from a store of a part. */
        const int32_t from = at - at % LANES;
        vec_store(left + from, top_without(vec_load(left + from), lanes == (ivec){0} + at % LANES));
        return at;
    }
}

/* A pass for each that is chosen, over a copy from which it is then taken out. */
static bool kernel_top(uint16_t *chosen, const float *x, int32_t count, int32_t k) {
    float left[SIDA_TOP_COUNT] __attribute__((aligned(64)));
    const int32_t padded = (count + TOP_STEP - 1) / TOP_STEP * TOP_STEP;
    float odd = 0;
    int32_t i = 0;
    ivec lanes;
    for (int l = 0; l < LANES; l++) lanes[l] = l;
    vec odds = vec_set(0.0f);
    for (; i + LANES <= count; i += LANES) {
        const vec value = vec_load(x + i);
        odds = odds + (value - value); /* NaN where it is not finite */
        vec_store(left + i, value);
    }
    for (; i < count; i++) {
        odd = odd + (x[i] - x[i]);
        left[i] = x[i];
    }
    if (!(odd + vec_sum(odds) == 0.0f)) return false;
    for (; i < padded; i++) left[i] = -INFINITY;
    for (int32_t r = 0; r < k && padded > TOP_STEP; r++)
        chosen[r] = (uint16_t)top_take(left, padded, lanes);
    if (padded > TOP_STEP) return true;
    /* The same in registers. */
    vec few[4];
    for (int j = 0; j < 4; j++) few[j] = vec_load(left + j * LANES);
    for (int32_t r = 0; r < k; r++) {
        const int32_t at = top_find(few, vec_set(top_high(few)));
        chosen[r] = (uint16_t)at;
        for (int j = 0; j < 4; j++)
            few[j] = top_without(few[j], lanes == (ivec){0} + at - j * LANES);
    }
    return true;
}

static void kernel_shares(float *share, const uint16_t *chosen, int32_t k, const float *x,
                          int32_t count) {
    float powers[SIDA_TOP_COUNT] __attribute__((aligned(64)));
    const float top = x[chosen[0]];
    if (count > SIDA_TOP_COUNT) {
        const float sum = kernel_exp_sum(x, top, count);
        for (int32_t i = 0; i < k; i++) share[i] = kernel_exp_one(x[chosen[i]] - top) / sum;
        return;
    }
    vec sum = vec_set(0.0f);
    for (int32_t i = 0; i < count; i += LANES) {
        const vec power = vec_exp(row_load(x, i, count) - vec_set(top));
        vec_store(powers + i, power);
        sum = sum + power;
    }
    const float whole = vec_sum(sum);
    for (int32_t i = 0; i < k; i++) share[i] = powers[chosen[i]] / whole;
}

#endif
