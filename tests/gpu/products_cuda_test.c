/* CUDA's products (linear, experts, combination) against the CPU's on the same cases, and against
 * themselves: the same bytes twice. */
#include "tests/gpu/op_case.h"

static void check_linear(sida_dtype dtype, int64_t n, int64_t rows, int64_t cols, int variant) {
    int64_t ldx = cols + variant % 2 * 3, ldy = rows + variant % 3;
    float *x = normal(n * ldx, 1), *y = normal(n * ldy, 1), *bias = normal(rows, 1);
    void *w = stored(rows * cols, 1 / sqrtf((float)cols), dtype);
    float *got = host(n * ldy), *again = host(n * ldy);
    size_t bytes = (size_t)(n * ldy) * sizeof *y;
    sida_linear_call call = {
        .y = put(y, bytes),
        .ldy = ldy,
        .x = put_floats(x, n * ldx),
        .ldx = ldx,
        .n = n,
        .weight = {put(w, (size_t)(rows * cols) * sida_dtype_bytes(dtype)), dtype, rows, cols},
        .bias = variant % 4 < 2 ? put_floats(bias, rows) : NULL,
        .scale = variant % 5 == 0 ? 0.25f : 1,
        .epilogue = (sida_epilogue)(variant % 3)};
    float *first = call.y;
    OK(cuda()->linear(stream, &call));
    get(got, first, bytes);
    call.y = put(y, bytes);
    OK(cuda()->linear(stream, &call));
    get(again, call.y, bytes);
    assert_memory_equal(got, again, bytes);
    call.y = y;
    call.x = x;
    call.weight.data = w;
    if (call.bias) call.bias = bias;
    float *before = host(n * ldy);
    memcpy(before, y, bytes);
    OK(sida_linear_cpu(NULL, &call));
    for (int64_t i = 0; i < n; i++)
        assert_memory_equal(got + i * ldy + rows, before + i * ldy + rows,
                            (size_t)(ldy - rows) * sizeof *got);
    char what[80];
    snprintf(what, sizeof what, "linear %s n %d [%d, %d] variant %d", sida_dtype_name(dtype),
             (int)n, (int)rows, (int)cols, variant);
    expect_close(what, got, y, n * ldy, dtype == SIDA_BF16 && n > 16 ? rounded : tight);
    end_case();
}

static void test_linear(void **state) {
    (void)state;
    static const int64_t counts[] = {1, 2, 7, 8, 9, 16, 17, 33, 300};
    static const int64_t shapes[][2] = {{40, 24}, {768, 64}, {64, 768}, {33, 100}, {50, 27}};
    int variant = 0;
    for (int dtype = SIDA_F32; dtype <= SIDA_BF16; dtype++)
        for (int s = 0; s < 5; s++)
            for (int c = 0; c < 9; c++)
                check_linear((sida_dtype)dtype, counts[c], shapes[s][0], shapes[s][1], variant++);
    OK(cuda()->linear(stream, &(sida_linear_call){.n = 0, .weight = {NULL, SIDA_F32, 8, 8}}));
}

/* More rows than the scratch holds in bf16 at once. */
static void test_linear_chunks(void **state) {
    (void)state;
    check_linear(SIDA_BF16, 2100, 24, 2048, 1);
    check_linear(SIDA_BF16, 2100, 24, 2048, 2);
}

static void check_expert(sida_expert_shape shape) {
    enum { EXPERTS = 6, TOKENS = 160, K = 2, ROWS = TOKENS * K };
    static const int64_t sizes[EXPERTS] = {1, 8, 0, 9, 33, 200};
    int64_t row_start[EXPERTS + 1] = {0};
    int32_t rows[ROWS];
    /* Experts as a wave gives them. */
    static const int32_t order[EXPERTS] = {4, 0, 2, 5, 1, 3};
    static const int32_t busy[EXPERTS] = {0, 1, 3, 4, 5, -1}, busy_count = 5;
    const void *wave_weights[EXPERTS];
    for (int e = 0; e < EXPERTS; e++) row_start[e + 1] = row_start[e] + sizes[e];
    for (int i = 0; i < ROWS; i++) rows[i] = i;
    for (int i = ROWS - 1; i > 0; i--) {
        int j = (int)sida_rng_below(&rng, (uint32_t)i + 1), kept = rows[i];
        rows[i] = rows[j];
        rows[j] = kept;
    }
    int64_t d = shape.d_model, used = row_start[EXPERTS];
    size_t bytes = (size_t)(ROWS * d) * sizeof(float), one = sida_expert_bytes(&shape);
    float *x = normal(TOKENS * d, 1), *scratch = normal(ROWS * d, 1), *got = host(ROWS * d);
    float *again = host(ROWS * d);
    size_t room_floats = sida_expert_workspace_floats(&shape, used);
    const void *weights[EXPERTS], *on_device[EXPERTS];
    for (int e = 0; e < EXPERTS; e++) {
        int64_t count = (int64_t)(one / sida_dtype_bytes(shape.dtype));
        weights[e] = stored(count, 0.1f, shape.dtype);
        on_device[e] = put(weights[e], one);
    }
    float *first = put(scratch, bytes), *second = put(scratch, bytes);
    sida_expert_call call = {.scratch = first,
                             .x = put_floats(x, TOKENS * d),
                             .k = K,
                             .shape = shape,
                             .count = EXPERTS,
                             .weights = put(on_device, sizeof on_device),
                             .row_start = put(row_start, sizeof row_start),
                             .rows = put(rows, (size_t)used * sizeof *rows),
                             .rows_total = used,
                             .workspace = room(room_floats * sizeof(float))};
    OK(cuda()->expert(stream, &call));
    get(got, first, bytes);
    /* In two waves, in another order: the same bytes. */
    for (int i = 0; i < EXPERTS; i++) wave_weights[i] = on_device[order[i]];
    call.scratch = second;
    call.count = 2;
    call.ids = put(order, sizeof order);
    call.weights = put(wave_weights, sizeof wave_weights);
    OK(cuda()->expert(stream, &call));
    call.count = EXPERTS - 2;
    call.weights += 2;
    call.ids += 2;
    OK(cuda()->expert(stream, &call));
    get(again, second, bytes);
    assert_memory_equal(got, again, bytes);
    /* The busy ones alone, how many is known to the device only. */
    call.scratch = put(scratch, bytes);
    call.count = EXPERTS;
    call.ids = put(busy, sizeof busy);
    call.count_of = put(&busy_count, sizeof busy_count);
    call.weights = put(on_device, sizeof on_device);
    call.weights_by_expert = true;
    OK(cuda()->expert(stream, &call));
    get(again, call.scratch, bytes);
    assert_memory_equal(got, again, bytes);
    call = (sida_expert_call){.scratch = scratch,
                              .x = x,
                              .k = K,
                              .shape = shape,
                              .count = EXPERTS,
                              .weights = weights,
                              .row_start = row_start,
                              .rows = rows,
                              .rows_total = used,
                              .workspace = host((int64_t)room_floats)};
    OK(sida_expert_cpu(NULL, &call));
    for (int64_t i = used; i < ROWS; i++) /* nobody's rows stay */
        assert_memory_equal(got + rows[i] * d, scratch + rows[i] * d, (size_t)d * sizeof *got);
    char what[80];
    snprintf(what, sizeof what, "expert %s d %d ff %d gated %d", sida_dtype_name(shape.dtype),
             shape.d_model, shape.d_ff, shape.gated);
    expect_close(what, got, scratch, ROWS * d, tight);
    end_case();
}

static void test_expert(void **state) {
    (void)state;
    static const int32_t shapes[][2] = {{24, 40}, {64, 96}, {27, 50}, {768, 136}};
    for (int dtype = SIDA_F32; dtype <= SIDA_BF16; dtype++)
        for (int s = 0; s < 4; s++)
            for (int act = 0; act < 4; act++)
                check_expert((sida_expert_shape){.d_model = shapes[s][0],
                                                 .d_ff = shapes[s][1],
                                                 .gated = act > 0,
                                                 .activation = (sida_activation)(act % 3),
                                                 .dtype = (sida_dtype)dtype});
}

static void test_combine(void **state) {
    (void)state;
    for (int32_t k = 1; k <= 3; k++)
        for (int drops = 0; drops < 2; drops++) {
            int64_t n = 33, d = 100;
            size_t bytes = (size_t)(n * d) * sizeof(float);
            float *h = normal(n * d, 1), *scratch = normal(n * k * d, 1), *alpha = normal(n * k, 1);
            float *got = host(n * d);
            uint8_t *dropped = (uint8_t *)host(n);
            for (int64_t i = 0; i < n; i++) dropped[i] = sida_rng_below(&rng, 3) == 0;
            float *out = put(h, bytes);
            OK(cuda()->combine(stream, out, put_floats(scratch, n * k * d),
                               put_floats(alpha, n * k), drops ? put(dropped, (size_t)n) : NULL, n,
                               k, d));
            get(got, out, bytes);
            OK(sida_combine_cpu(NULL, h, scratch, alpha, drops ? dropped : NULL, n, k, d));
            expect_close("combine", got, h, n * d, tight);
            end_case();
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linear),
        cmocka_unit_test(test_linear_chunks),
        cmocka_unit_test(test_expert),
        cmocka_unit_test(test_combine),
    };
    return run_op_tests(tests, sizeof tests / sizeof *tests);
}
