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
    expect_close(what, got, y, n * ldy, dtype == SIDA_BF16 ? rounded : tight);
    end_case();
}

static void test_linear(void **state) {
    (void)state;
    static const int64_t counts[] = {1, 2, 7, 8, 9, 16, 17, 33, 300};
    static const int64_t shapes[][2] = {{40, 24}, {768, 64}, {64, 768}, {33, 100}, {50, 27}};
    int variant = 0;
    for (int dtype = SIDA_F32; dtype <= SIDA_BF16; dtype++)
        for (int s = 0; s < 5; s++)
            for (int c = 0; c < 9; c += gpu_step(2))
                check_linear((sida_dtype)dtype, counts[c], shapes[s][0], shapes[s][1], variant++);
    OK(cuda()->linear(stream, &(sida_linear_call){.n = 0, .weight = {NULL, SIDA_F32, 8, 8}}));
}

/* More rows than the scratch holds in bf16 at once. */
static void test_linear_chunks(void **state) {
    (void)state;
    check_linear(SIDA_BF16, 2100, 24, 2048, 1);
    check_linear(SIDA_BF16, 2100, 24, 2048, 2);
}

/* bf16 as the device stores it, from and to fp32. */
static void *narrowed(const float *values, int64_t count) {
    uint16_t *bits = (uint16_t *)host(count);
    for (int64_t i = 0; i < count; i++) {
        uint32_t wide;
        memcpy(&wide, &values[i], sizeof wide);
        bits[i] = (uint16_t)((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    }
    return bits;
}

static float *widened(const void *device, int64_t count) {
    uint16_t *bits = (uint16_t *)host(count);
    float *values = host(count);
    get(bits, device, (size_t)count * sizeof *bits);
    for (int64_t i = 0; i < count; i++) values[i] = sida_bf16_to_f32(bits[i]);
    return values;
}

/* bf16 weights with activations in either type, a norm in front, normed rows kept. */
static void check_fused(int64_t n, int64_t rows, int64_t cols, bool norm, bool keep,
                        sida_dtype x_type, sida_dtype y_type, sida_epilogue epilogue) {
    float *x = normal(n * cols, 2), *y = normal(n * rows, 1), *normed = host(n * cols);
    void *w = stored(rows * cols, 1 / sqrtf((float)cols), SIDA_BF16);
    void *scale = stored(cols, 1, SIDA_BF16);
    bool x_bf16 = x_type == SIDA_BF16, y_bf16 = y_type == SIDA_BF16;
    sida_linear_call call = {.ldy = rows,
                             .x = x_bf16 ? put(narrowed(x, n * cols), (size_t)(n * cols) * 2)
                                         : put_floats(x, n * cols),
                             .ldx = cols,
                             .n = n,
                             .weight = {put(w, (size_t)(rows * cols) * 2), SIDA_BF16, rows, cols},
                             .scale = norm ? 1 : 0.5f,
                             .epilogue = epilogue,
                             .x_type = x_type,
                             .y_type = y_type};
    call.y = y_bf16 ? room((size_t)(n * rows) * 2) : put_floats(y, n * rows);
    if (norm) {
        call.norm = (sida_weight){put(scale, (size_t)cols * 2), SIDA_BF16, 1, cols};
        call.epsilon = 1e-6f;
        call.normed = room((size_t)(n * cols) * 2);
        call.normed_type = SIDA_BF16;
        call.keep_normed = keep;
    }
    OK(cuda()->linear(stream, &call));
    float *got = host(n * rows);
    if (y_bf16)
        got = widened(call.y, n * rows);
    else
        get(got, call.y, (size_t)(n * rows) * sizeof *got);
    float *kept = norm && keep ? widened(call.normed, n * cols) : NULL;
    if (x_bf16) {
        const uint16_t *bits = narrowed(x, n * cols);
        for (int64_t i = 0; i < n * cols; i++) x[i] = sida_bf16_to_f32(bits[i]);
    }
    call.x = x;
    call.y = y;
    call.weight.data = w;
    call.norm.data = norm ? scale : NULL;
    call.normed = normed;
    call.normed_type = call.x_type = call.y_type = SIDA_F32;
    OK(sida_linear_cpu(NULL, &call));
    char what[120];
    snprintf(what, sizeof what, "fused n %d [%d, %d] norm %d x %s y %s epilogue %d", (int)n,
             (int)rows, (int)cols, norm, sida_dtype_name(x_type), sida_dtype_name(y_type),
             (int)epilogue);
    /* Once in x and once in y; a case may have a handful of elements. */
    expect_close(what, got, y, n * rows, 2 * rounded);
    if (kept) expect_close("normed rows", kept, normed, n * cols, rounded);
    end_case();
}

static void test_fused(void **state) {
    (void)state;
    static const int64_t counts[] = {1, 9, 25, 70, 8, 32, 33, 300, 600};
    static const int64_t shapes[][2] = {{48, 64},   {33, 96},   {768, 768},
                                        {72, 2056}, {8200, 64}, {40, 20}};
    for (int s = 0; s < 6; s++)
        for (int c = 0; c < gpu_cases(9, 4); c++) {
            int64_t n = counts[c], rows = shapes[s][0], cols = shapes[s][1];
            if (n * rows > 1 << 18) continue;
            for (int norm = 0; norm < 3; norm++)
                check_fused(n, rows, cols, norm > 0, norm > 1, SIDA_F32,
                            norm ? SIDA_BF16 : SIDA_F32,
                            norm == 1 ? SIDA_EPILOGUE_RELU : SIDA_EPILOGUE_NONE);
            check_fused(n, rows, cols, false, false, SIDA_BF16, SIDA_F32, SIDA_EPILOGUE_ADD);
            check_fused(n, rows, cols, false, false, SIDA_BF16, SIDA_BF16, SIDA_EPILOGUE_RELU);
        }
}

/* x and hidden rows in bf16, outputs added to h. */
static void check_expert_bf16(sida_expert_shape shape, bool adds, bool many) {
    enum { EXPERTS = 5, TOKENS = 1200 };
    static const int64_t few[EXPERTS] = {1, 0, 12, 37, 100}, more[EXPERTS] = {1, 0, 32, 167, 1000};
    const int64_t *sizes = many ? more : few;
    static const int32_t busy[EXPERTS] = {0, 2, 3, 4, -1}, busy_count = 4;
    int64_t row_start[EXPERTS + 1] = {0}, d = shape.d_model;
    int32_t rows[TOKENS];
    for (int e = 0; e < EXPERTS; e++) row_start[e + 1] = row_start[e] + sizes[e];
    for (int i = 0; i < TOKENS; i++) rows[i] = (i * 7 + 3) % TOKENS;
    const int64_t used = row_start[EXPERTS];
    float *x = normal(TOKENS * d, 1), *h = normal(TOKENS * d, 1), *alpha = normal(TOKENS, 1);
    uint16_t *bits = (uint16_t *)narrowed(x, TOKENS * d);
    for (int64_t i = 0; i < TOKENS * d; i++) x[i] = sida_bf16_to_f32(bits[i]);
    size_t one = sida_expert_bytes(&shape), bytes = (size_t)(TOKENS * d) * sizeof *h;
    size_t room_floats = sida_expert_workspace_floats(&shape, TOKENS);
    const void *weights[EXPERTS], *on_device[EXPERTS];
    for (int e = 0; e < EXPERTS; e++) {
        weights[e] = stored((int64_t)one / 2, 0.1f, SIDA_BF16);
        on_device[e] = put(weights[e], one);
    }
    float *scratch = put(h, bytes), *sum = put(h, bytes);
    sida_expert_call call = {.scratch = scratch,
                             .x = put(bits, (size_t)(TOKENS * d) * 2),
                             .x_type = SIDA_BF16,
                             .k = 1,
                             .shape = shape,
                             .ids = put(busy, sizeof busy),
                             .count = EXPERTS,
                             .count_of = put(&busy_count, sizeof busy_count),
                             .weights = put(on_device, sizeof on_device),
                             .weights_by_expert = true,
                             .row_start = put(row_start, sizeof row_start),
                             .rows = put(rows, sizeof rows),
                             .rows_total = used,
                             .workspace = room(room_floats * sizeof(float)),
                             .h = adds ? sum : NULL,
                             .alpha = put_floats(alpha, TOKENS)};
    OK(cuda()->expert(stream, &call));
    float *got = host(TOKENS * d), *want = host(TOKENS * d);
    get(got, adds ? sum : scratch, bytes);
    memcpy(want, h, bytes);
    call = (sida_expert_call){.scratch = want,
                              .x = x,
                              .k = 1,
                              .shape = shape,
                              .count = EXPERTS,
                              .weights = weights,
                              .row_start = row_start,
                              .rows = rows,
                              .rows_total = used,
                              .workspace = host((int64_t)room_floats)};
    OK(sida_expert_cpu(NULL, &call));
    for (int64_t i = 0; adds && i < used; i++) {
        const int64_t at = rows[i] * d;
        for (int64_t c = 0; c < d; c++) want[at + c] = h[at + c] + alpha[rows[i]] * want[at + c];
    }
    char what[80];
    snprintf(what, sizeof what, "expert bf16 d %d ff %d gated %d adds %d many %d", shape.d_model,
             shape.d_ff, shape.gated, adds, many);
    expect_close(what, got, want, TOKENS * d, rounded);
    end_case();
}

static void test_expert_bf16(void **state) {
    (void)state;
    static const int32_t shapes[][2] = {{24, 40}, {64, 96}, {96, 2048}, {2056, 64}};
    for (int s = gpu_cases(0, 1); s < 4; s++)
        for (int act = 0; act < 4; act += gpu_step(3))
            for (int variant = 0; variant < (s < 2 ? 4 : gpu_cases(2, 1)); variant += gpu_step(3))
                check_expert_bf16((sida_expert_shape){.d_model = shapes[s][0],
                                                      .d_ff = shapes[s][1],
                                                      .gated = act > 0,
                                                      .activation = (sida_activation)(act % 3),
                                                      .dtype = SIDA_BF16},
                                  variant % 2, variant / 2);
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
        cmocka_unit_test(test_linear), cmocka_unit_test(test_linear_chunks),
        cmocka_unit_test(test_fused),  cmocka_unit_test(test_expert_bf16),
        cmocka_unit_test(test_expert), cmocka_unit_test(test_combine),
    };
    return run_op_tests(tests, sizeof tests / sizeof *tests);
}
