/* linear and expert: right within rounding, and every row's bytes independent of what else is in
 * the call, of the number of threads and of how tiles fall. */
#include "formats/base/memory.h"
#include "formats/base/rng.h"
#include "runtime/ops/cpu_kernels.h"
#include "runtime/ops/expert.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#ifdef _OPENMP
#include <omp.h>
static void set_threads(int threads) {
    omp_set_num_threads(threads);
}
#else
static void set_threads(int threads) {
    (void)threads;
}
#endif

enum { MOST_ROWS = 40 };

static float *random_floats(sida_rng *rng, int64_t count) {
    float *values = NULL;
    assert_int_equal(SIDA_ALLOC(&values, count, "test"), SIDA_OK);
    for (int64_t i = 0; i < count; i++) values[i] = sida_rng_normal(rng);
    return values;
}

/* Random weights as stored in `dtype`, at an address that is only as aligned as its elements. */
static void *random_weights(sida_rng *rng, sida_dtype dtype, int64_t count, void **block) {
    assert_int_equal(sida_alloc(block, (size_t)count + 1, 4, "test"), SIDA_OK);
    void *weights = (char *)*block + sida_dtype_bytes(dtype);
    for (int64_t i = 0; i < count; i++) {
        float value = sida_rng_normal(rng) * 0.25f;
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        if (dtype == SIDA_F32)
            ((float *)weights)[i] = value;
        else
            ((uint16_t *)weights)[i] =
                dtype == SIDA_BF16 ? (uint16_t)(bits >> 16) : sida_f16_from_f32(value);
    }
    return weights;
}

static double weight_of(const void *weights, sida_dtype dtype, int64_t i) {
    if (dtype == SIDA_F32) return (double)((const float *)weights)[i];
    uint16_t bits = ((const uint16_t *)weights)[i];
    return (double)(dtype == SIDA_BF16 ? sida_bf16_to_f32(bits) : sida_f16_to_f32(bits));
}

typedef struct shape {
    int64_t rows, cols;
} shape;
/* Multiples of every block, remainders on either side, less than one vector, large enough for
 * threads (by columns, by rows), wider than the fp32 panel. */
static const shape shapes[] = {{8, 16},    {1, 1},     {7, 5},   {13, 37}, {96, 96},  {131, 200},
                               {515, 256}, {20, 4100}, {37, 32}, {96, 64}, {33, 128}, {40, 272}};
enum { SHAPES = sizeof shapes / sizeof *shapes };

static void linear(float *y, const float *x, int64_t n, sida_weight weight, const float *bias,
                   sida_epilogue epilogue) {
    sida_linear_call call = {.y = y,
                             .ldy = weight.rows,
                             .x = x,
                             .ldx = weight.cols,
                             .n = n,
                             .weight = weight,
                             .bias = bias,
                             .scale = 0.5f,
                             .epilogue = epilogue};
    assert_int_equal(sida_linear_cpu(NULL, &call), SIDA_OK);
}

/* A chain of fp32 fused multiply-adds over k terms errs by at most k eps Σ|x w|; the lanes make it
 * far less, and a wrong index is of the order of the sum itself. */
static void check_values(const float *y, const float *x, int64_t n, sida_weight weight,
                         const float *bias, sida_epilogue epilogue, const float *before) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < weight.rows; j++) {
            double sum = 0, size = 1;
            for (int64_t k = 0; k < weight.cols; k++) {
                double term = (double)x[i * weight.cols + k] *
                              weight_of(weight.data, weight.dtype, j * weight.cols + k);
                sum += term;
                size += fabs(term);
            }
            sum = 0.5 * sum + (bias ? (double)bias[j] : 0);
            if (epilogue == SIDA_EPILOGUE_RELU && sum < 0) sum = 0;
            if (epilogue == SIDA_EPILOGUE_ADD) sum += (double)before[i * weight.rows + j];
            assert_true(fabs((double)y[i * weight.rows + j] - sum) < 1e-6 * size);
        }
}

static void check_shape(sida_rng *rng, shape of, sida_dtype dtype) {
    void *block = NULL;
    sida_weight weight = {random_weights(rng, dtype, of.rows * of.cols, &block), dtype, of.rows,
                          of.cols};
    float *x = random_floats(rng, MOST_ROWS * of.cols), *bias = random_floats(rng, of.rows);
    float *before = random_floats(rng, MOST_ROWS * of.rows);
    float *want = random_floats(rng, MOST_ROWS * of.rows);
    float *got = random_floats(rng, MOST_ROWS * of.rows);
    size_t row_bytes = (size_t)of.rows * sizeof *want;
    int epilogues = of.rows * of.cols < 10000 ? 3 : 1;
    for (int e = 0; e < epilogues; e++) {
        sida_epilogue epilogue = (sida_epilogue)e;
        /* The truth: each row in a call of its own, on one thread. */
        set_threads(1);
        memcpy(want, before, MOST_ROWS * row_bytes);
        for (int64_t i = 0; i < MOST_ROWS; i++)
            linear(want + i * of.rows, x + i * of.cols, 1, weight, e == 1 ? NULL : bias, epilogue);
        check_values(want, x, 3, weight, e == 1 ? NULL : bias, epilogue, before);
        for (int threads = 1; threads <= 2; threads++) {
            set_threads(threads);
            for (int64_t n = 1; n <= MOST_ROWS; n++) {
                memcpy(got, before, MOST_ROWS * row_bytes);
                linear(got, x, n, weight, e == 1 ? NULL : bias, epilogue);
                assert_memory_equal(got, want, (size_t)n * row_bytes);
                assert_memory_equal(got + n * of.rows, before + n * of.rows,
                                    (size_t)(MOST_ROWS - n) * row_bytes);
            }
            for (int split = 0; split < 6; split++) {
                memcpy(got, before, MOST_ROWS * row_bytes);
                for (int64_t i = 0; i < MOST_ROWS;) {
                    int64_t n = 1 + sida_rng_below(rng, 13);
                    n = n < MOST_ROWS - i ? n : MOST_ROWS - i;
                    linear(got + i * of.rows, x + i * of.cols, n, weight, e == 1 ? NULL : bias,
                           epilogue);
                    i += n;
                }
                assert_memory_equal(got, want, MOST_ROWS * row_bytes);
            }
        }
    }
    free(block);
    free(x);
    free(bias);
    free(before);
    free(want);
    free(got);
}

static void test_linear_bytes(void **state) {
    (void)state;
    for (int i = 0; sida_cpu_kernels_at(i); i++) {
        sida_rng rng = sida_rng_seed(7);
        sida_cpu_kernels_force(sida_cpu_kernels_at(i));
        for (int s = 0; s < SHAPES; s++)
            for (int dtype = 0; dtype < 3; dtype++) check_shape(&rng, shapes[s], (sida_dtype)dtype);
    }
    sida_cpu_kernels_force(NULL);
}

/* A row of NaN stays in its row, and NaN passes the ReLU. */
static void test_linear_nan(void **state) {
    (void)state;
    sida_rng rng = sida_rng_seed(3);
    float *x = random_floats(&rng, 9 * 32), *w = random_floats(&rng, 24 * 32);
    float *y = random_floats(&rng, 9 * 24);
    for (int i = 0; i < 32; i++) x[4 * 32 + i] = NAN;
    linear(y, x, 9, (sida_weight){w, SIDA_F32, 24, 32}, NULL, SIDA_EPILOGUE_RELU);
    for (int i = 0; i < 9 * 24; i++) assert_int_equal(isnan(y[i]), i / 24 == 4);
    free(x);
    free(w);
    free(y);
}

enum { TOKENS = 30, EXPERTS = 5, D = 160, FF = 320 };

typedef struct expert_case {
    sida_expert_shape shape;
    void *blocks[EXPERTS];
    const void *weights[EXPERTS];
    float *x, *scratch, *workspace;
} expert_case;

/* Runs tokens [first, first + n), token t on expert t % EXPERTS. */
static void run_experts(expert_case *at, int64_t first, int64_t n) {
    int64_t row_start[EXPERTS + 1] = {0};
    int32_t rows[TOKENS], count = 0;
    for (int e = 0; e < EXPERTS; e++) {
        for (int64_t t = first; t < first + n; t++)
            if (t % EXPERTS == e) rows[count++] = (int32_t)t;
        row_start[e + 1] = count;
    }
    sida_expert_call call = {.scratch = at->scratch,
                             .x = at->x,
                             .k = 1,
                             .shape = at->shape,
                             .count = EXPERTS,
                             .weights = at->weights,
                             .row_start = row_start,
                             .rows = rows,
                             .rows_total = n,
                             .workspace = at->workspace};
    assert_int_equal(sida_expert_cpu(NULL, &call), SIDA_OK);
}

/* Against two products and the activation, row by row. */
static void check_expert_values(const expert_case *at) {
    float hidden[FF], up[FF], out[D];
    size_t matrix = (size_t)D * FF * sida_dtype_bytes(at->shape.dtype);
    for (int64_t t = 0; t < TOKENS; t++) {
        const char *w = at->weights[t % EXPERTS];
        sida_product p = {.n = 1,
                          .scale = 1.0f,
                          .dtype = at->shape.dtype,
                          .x = at->x + t * D,
                          .w = w,
                          .ldw = D,
                          .cols = D,
                          .rows = FF,
                          .y = hidden,
                          .ldy = FF,
                          .epilogue = at->shape.gated ? SIDA_EPILOGUE_NONE : SIDA_EPILOGUE_RELU};
        sida_product_run(&p);
        if (at->shape.gated) {
            p.w = w + matrix;
            p.y = up;
            sida_product_run(&p);
            sida_gated_cpu(NULL, hidden, hidden, up, FF, at->shape.activation);
        }
        sida_product back = {.n = 1,
                             .scale = 1.0f,
                             .dtype = at->shape.dtype,
                             .x = hidden,
                             .w = w + matrix * (at->shape.gated ? 2 : 1),
                             .ldw = FF,
                             .cols = FF,
                             .rows = D,
                             .y = out,
                             .ldy = D};
        sida_product_run(&back);
        assert_memory_equal(out, at->scratch + t * D, sizeof out);
    }
}

static void test_expert(void **state) {
    (void)state;
    for (int variant = 0; variant < 6; variant++) {
        sida_rng rng = sida_rng_seed(11);
        expert_case at = {.shape = {D, FF, variant % 2 == 1,
                                    variant % 2 ? SIDA_ACT_GELU_NEW : SIDA_ACT_RELU,
                                    (sida_dtype)(variant / 2)}};
        for (int e = 0; e < EXPERTS; e++)
            at.weights[e] = random_weights(&rng, at.shape.dtype, 3 * D * FF, &at.blocks[e]);
        at.x = random_floats(&rng, TOKENS * D);
        at.scratch = random_floats(&rng, TOKENS * D);
        at.workspace =
            random_floats(&rng, (int64_t)sida_expert_workspace_floats(&at.shape, TOKENS));
        float *whole = random_floats(&rng, TOKENS * D);
        for (int threads = 1; threads <= 2; threads++) {
            set_threads(threads);
            run_experts(&at, 0, TOKENS);
            check_expert_values(&at);
            memcpy(whole, at.scratch, TOKENS * D * sizeof *whole);
            memset(at.scratch, 0, TOKENS * D * sizeof *whole);
            for (int64_t t = 0; t < TOKENS; t += 7)
                run_experts(&at, t, t + 7 < TOKENS ? 7 : TOKENS - t);
            assert_memory_equal(at.scratch, whole, TOKENS * D * sizeof *whole);
        }
        for (int e = 0; e < EXPERTS; e++) free(at.blocks[e]);
        free(at.x);
        free(at.scratch);
        free(at.workspace);
        free(whole);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linear_bytes),
        cmocka_unit_test(test_linear_nan),
        cmocka_unit_test(test_expert),
    };
    return cmocka_run_group_tests_name("ops_product", tests, NULL, NULL);
}
