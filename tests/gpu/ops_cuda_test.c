/* Each CUDA op against the CPU op on the same cases, and against itself: the same bytes twice.
 *
 * Tolerances, of the norm: 1e-5 where both sides sum in fp32 in different orders (some thousand
 * terms of 6e-8 each); 4e-3 where the device rounds activations to bf16, half a step of 2^-8 at
 * most and independent of one another. A wrong element or formula shows at 1e-1. */
#include "formats/base/memory.h"
#include "formats/base/rng.h"
#include "runtime/ops/ops.h"
#include "tests/gpu/gpu.h"

static const double tight = 1e-5, rounded = 4e-3;

static sida_backend *backend;
static sida_stream *stream;
static sida_rng rng;

/* --- memory of one case */

enum { MOST_BUFFERS = 64 };
static sida_buffer *buffers[MOST_BUFFERS];
static float *blocks[MOST_BUFFERS];
static int buffer_count, block_count;

static void *room(size_t bytes) {
    assert_true(buffer_count < MOST_BUFFERS);
    OK(sida_buffer_create(backend, &buffers[buffer_count], SIDA_MEMORY_DEVICE, bytes, "case"));
    return buffers[buffer_count++]->data;
}

/* A device copy. */
static void *put(const void *data, size_t bytes) {
    void *to = room(bytes);
    OK(sida_copy(stream, to, data, bytes));
    OK(sida_stream_synchronize(stream));
    return to;
}

static float *put_floats(const float *data, int64_t count) {
    return put(data, (size_t)count * sizeof *data);
}

static void get(void *to, const void *from, size_t bytes) {
    OK(sida_copy(stream, to, from, bytes));
    OK(sida_stream_synchronize(stream));
}

/* Host memory of the case. */
static float *host(int64_t count) {
    assert_true(block_count < MOST_BUFFERS);
    OK(SIDA_ALLOC(&blocks[block_count], count, "case"));
    return blocks[block_count++];
}

static float *normal(int64_t count, float scale) {
    float *values = host(count);
    for (int64_t i = 0; i < count; i++) values[i] = scale * sida_rng_normal(&rng);
    return values;
}

/* Values in a stored type, in the first bytes of a block. */
static void *stored(int64_t count, float scale, sida_dtype dtype) {
    float *values = normal(count, scale);
    uint16_t *bits = (uint16_t *)values;
    for (int64_t i = 0; i < count && dtype != SIDA_F32; i++) {
        uint32_t wide;
        memcpy(&wide, &values[i], sizeof wide);
        bits[i] = dtype == SIDA_F16 ? sida_f16_from_f32(values[i]) : (uint16_t)(wide >> 16);
    }
    return values;
}

static void end_case(void) {
    while (buffer_count > 0) sida_buffer_destroy(buffers[--buffer_count]);
    while (block_count > 0) free(blocks[--block_count]);
}

static const sida_ops *cuda(void) {
    const sida_ops *ops = sida_ops_of(backend);
    assert_ptr_equal(ops, &sida_ops_cuda);
    return ops;
}

/* --- the ops */

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

static void test_rows(void **state) {
    (void)state;
    static const int64_t counts[] = {1, 2, 9, 33, 300}, widths[] = {24, 100, 768};
    for (int dtype = SIDA_F32; dtype <= SIDA_BF16; dtype++)
        for (int c = 0; c < 5; c++)
            for (int w = 0; w < 3; w++) {
                int64_t n = counts[c], d = widths[w], words = 50;
                size_t bytes = (size_t)(n * d) * sizeof(float);
                size_t size = sida_dtype_bytes((sida_dtype)dtype);
                float *x = normal(n * d, 3), *want = host(n * d), *got = host(n * d);
                float *out = room(bytes);
                void *weight = stored(d, 1, (sida_dtype)dtype);
                sida_weight on = {put(weight, (size_t)d * size), (sida_dtype)dtype, 1, d};
                OK(cuda()->rms_norm(stream, out, put_floats(x, n * d), on, n, 1e-6f));
                get(got, out, bytes);
                on.data = weight;
                OK(sida_rms_norm_cpu(NULL, want, x, on, n, 1e-6f));
                expect_close("norm", got, want, n * d, tight);

                int32_t *ids = (int32_t *)host(n);
                for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)sida_rng_below(&rng, 50);
                void *table = stored(words * d, 1, (sida_dtype)dtype);
                on = (sida_weight){put(table, (size_t)(words * d) * size), (sida_dtype)dtype, words,
                                   d};
                OK(cuda()->embedding(stream, out, on, put(ids, (size_t)n * sizeof *ids), n));
                get(got, out, bytes);
                on.data = table;
                OK(sida_embedding_cpu(NULL, want, on, ids, n));
                assert_memory_equal(got, want, bytes);

                float *up = normal(n * d, 1);
                sida_activation act = (sida_activation)dtype; /* three of each */
                OK(cuda()->gated(stream, out, put_floats(x, n * d), put_floats(up, n * d), n * d,
                                 act));
                get(got, out, bytes);
                OK(sida_gated_cpu(NULL, want, x, up, n * d, act));
                expect_close("gate", got, want, n * d, tight);
                end_case();
            }
}

enum { SEQUENCES = 5, HEADS = 3, BUCKETS = 32, DISTANCE = 128 };

static void check_attention(int32_t d_kv, int kind, sida_dtype dtype) {
    static const int32_t q_count[SEQUENCES] = {29, 0, 1, 53, 300};
    static const int32_t k_count[SEQUENCES] = {29, 3, 1, 280, 300};
    int32_t position[SEQUENCES];
    int64_t width = (int64_t)HEADS * d_kv, rows = 0, keys = 0;
    int64_t q_start[SEQUENCES], k_start[SEQUENCES];
    for (int s = 0; s < SEQUENCES; s++) {
        q_start[s] = rows;
        k_start[s] = keys;
        position[s] = kind == 1 ? k_count[s] - q_count[s] : 0;
        rows += q_count[s];
        keys += k_count[s];
    }
    float *q = normal(rows * width, 0.3f), *k = normal(keys * width, 1);
    float *v = normal(keys * width, 1), *want = host(rows * width), *got = host(rows * width);
    void *bias = stored(BUCKETS * HEADS, 1, dtype);
    size_t bytes = (size_t)(rows * width) * sizeof(float);
    float *out = room(bytes);
    sida_attention_call call = {
        .out = out,
        .q = put_floats(q, rows * width),
        .k = put_floats(k, keys * width),
        .v = put_floats(v, keys * width),
        .ldo = width,
        .ldq = width,
        .ldk = width,
        .ldv = width,
        .sequences = SEQUENCES,
        .heads = HEADS,
        .d_kv = d_kv,
        .rows = rows,
        .q_start = put(q_start, sizeof q_start),
        .k_start = put(k_start, sizeof k_start),
        .q_count = put(q_count, sizeof q_count),
        .k_count = put(k_count, sizeof k_count),
        .q_position = kind == 1 ? put(position, sizeof position) : NULL,
        .causal = kind == 1,
        .bias_bidirectional = kind == 0,
        .bias_max_distance = DISTANCE,
    };
    if (kind < 2)
        call.bias = (sida_weight){put(bias, BUCKETS * HEADS * sida_dtype_bytes(dtype)), dtype,
                                  BUCKETS, HEADS};
    OK(cuda()->attention(stream, &call));
    get(got, out, bytes);
    /* However the work is spread. */
    float *again = host(rows * width);
    call.rows = 1;
    OK(cuda()->attention(stream, &call));
    get(again, out, bytes);
    assert_memory_equal(got, again, bytes);
    call.out = want;
    call.q = q;
    call.k = k;
    call.v = v;
    call.q_start = q_start;
    call.k_start = k_start;
    call.q_count = q_count;
    call.k_count = k_count;
    call.q_position = kind == 1 ? position : NULL;
    if (kind < 2) call.bias.data = bias;
    OK(sida_attention_cpu(NULL, &call));
    char what[80];
    snprintf(what, sizeof what, "attention d_kv %d kind %d", d_kv, kind);
    expect_close(what, got, want, rows * width, tight);
    end_case();
}

static void test_attention(void **state) {
    (void)state;
    static const int32_t widths[] = {8, 20, 64, 128, 200};
    for (int w = 0; w < 5; w++)
        for (int kind = 0; kind < 3; kind++)
            check_attention(widths[w], kind, (sida_dtype)((w + kind) % 3));
}

/* Every distance falls into the CPU's bucket: one query a distance, the bias alone decides. */
static void test_buckets(void **state) {
    (void)state;
    static const int32_t cases[][2] = {{32, 128}, {8, 20}, {64, 4096}, {256, 300}};
    enum { LENGTH = 400 };
    for (int c = 0; c < 4; c++)
        for (int both = 0; both < 2; both++) {
            const int32_t count = LENGTH, buckets = cases[c][0];
            const int64_t start = 0;
            float *zeros = host(LENGTH), *v = normal(LENGTH, 1), *want = host(LENGTH);
            float *got = host(LENGTH), *bias = normal(buckets, 1), *out = room(LENGTH * 4);
            sida_attention_call call = {.out = out,
                                        .q = put_floats(zeros, LENGTH),
                                        .k = put_floats(zeros, LENGTH),
                                        .v = put_floats(v, LENGTH),
                                        .ldo = 1,
                                        .ldq = 1,
                                        .ldk = 1,
                                        .ldv = 1,
                                        .sequences = 1,
                                        .heads = 1,
                                        .d_kv = 1,
                                        .rows = LENGTH,
                                        .q_start = put(&start, sizeof start),
                                        .k_start = put(&start, sizeof start),
                                        .q_count = put(&count, sizeof count),
                                        .k_count = put(&count, sizeof count),
                                        .bias_bidirectional = both,
                                        .bias_max_distance = cases[c][1],
                                        .bias = {put_floats(bias, buckets), SIDA_F32, buckets, 1}};
            OK(cuda()->attention(stream, &call));
            get(got, out, LENGTH * sizeof *got);
            call.out = want;
            call.q = call.k = zeros;
            call.v = v;
            call.q_start = call.k_start = &start;
            call.q_count = call.k_count = &count;
            call.bias.data = bias;
            OK(sida_attention_cpu(NULL, &call));
            expect_close("buckets", got, want, LENGTH, tight);
            end_case();
        }
}

static void check_router(int64_t n, int32_t total, int32_t k, bool renormalise, bool guided) {
    enum { SETS = 3 };
    float *logits = host(n * total), *alpha = host(n * k), *got_alpha = host(n * k);
    int32_t *experts = (int32_t *)host(n * k), *got = (int32_t *)host(n * k);
    int32_t *set_of = (int32_t *)host(n);
    uint8_t *allowed = (uint8_t *)host(SETS * total);
    /* Steps of a half: many ties; some zeros of either sign. */
    for (int64_t i = 0; i < n * total; i++) {
        logits[i] = roundf(4 * sida_rng_normal(&rng)) / 2;
        if (logits[i] == 0 && sida_rng_below(&rng, 2)) logits[i] = -0.0f;
    }
    for (int32_t i = 0; i < SETS * total; i++) allowed[i] = sida_rng_below(&rng, 3) == 0;
    for (int32_t s = 0; s < SETS; s++)
        for (int32_t r = 0; r < k; r++) allowed[s * total + total - 1 - r] = 1;
    for (int64_t i = 0; i < n; i++) set_of[i] = (int32_t)sida_rng_below(&rng, SETS);
    size_t choices = (size_t)(n * k);
    sida_router_call call = {.experts = room(choices * sizeof *experts),
                             .alpha = room(choices * sizeof *alpha),
                             .logits = put_floats(logits, n * total),
                             .n = n,
                             .experts_total = total,
                             .k = k,
                             .renormalise = renormalise};
    if (guided) {
        call.allowed = put(allowed, (size_t)(SETS * total));
        call.set_of = put(set_of, (size_t)n * sizeof *set_of);
    }
    OK(cuda()->router(stream, &call));
    get(got, call.experts, choices * sizeof *experts);
    get(got_alpha, call.alpha, choices * sizeof *alpha);
    call.experts = experts;
    call.alpha = alpha;
    call.logits = logits;
    if (guided) {
        call.allowed = allowed;
        call.set_of = set_of;
    }
    OK(sida_router_cpu(NULL, &call));
    for (int64_t i = 0; i < n * k; i++) assert_int_equal(got[i], experts[i]);
    expect_close("alpha", got_alpha, alpha, n * k, tight);
    end_case();
}

static void test_router(void **state) {
    (void)state;
    static const int64_t counts[] = {1, 2, 7, 33, 300};
    static const int32_t totals[] = {5, 64, 300};
    for (int c = 0; c < 5; c++)
        for (int e = 0; e < 3; e++)
            for (int32_t k = 1; k <= 3; k++)
                for (int kind = 0; kind < 4; kind++)
                    check_router(counts[c], totals[e], k, kind % 2, kind / 2);
    /* NaN still gives experts that exist, and different ones. */
    float *nan = host(70);
    for (int i = 0; i < 70; i++) nan[i] = NAN;
    int32_t experts[2];
    sida_router_call call = {.experts = room(sizeof experts),
                             .alpha = room(sizeof experts),
                             .logits = put_floats(nan, 70),
                             .n = 1,
                             .experts_total = 70,
                             .k = 2};
    OK(cuda()->router(stream, &call));
    get(experts, call.experts, sizeof experts);
    assert_true(experts[0] >= 0 && experts[0] < 70 && experts[1] >= 0 && experts[1] < 70);
    assert_true(experts[0] != experts[1]);
    end_case();
}

/* skew: most choices are of expert 0. */
static void check_dispatch(int64_t n, int32_t total, int32_t capacity, int32_t k, int cuts,
                           bool skew) {
    enum { MOST_CUTS = 9 };
    int64_t offsets[MOST_CUTS + 2] = {0};
    size_t rows = (size_t)(n * k), starts = (size_t)total + 1;
    int32_t *experts = (int32_t *)host(n * k + 1), *want_rows = (int32_t *)host(n * k + 1);
    int32_t *got_rows = (int32_t *)host(n * k + 1);
    uint8_t *want_dropped = (uint8_t *)host(n + 1), *got_dropped = (uint8_t *)host(n + 1);
    int64_t *want_start = (int64_t *)host(2 * (int64_t)starts);
    int64_t *got_start = (int64_t *)host(2 * (int64_t)starts);
    for (int64_t t = 0; t < n; t++)
        for (int32_t r = 0; r < k; r++) {
            int32_t e = (int32_t)sida_rng_below(&rng, (uint32_t)total);
            if (skew && sida_rng_below(&rng, 4)) e = 0;
            experts[t * k + r] = r ? (experts[t * k] + r) % total : e;
        }
    /* Some sequences are empty, the first and the last too. */
    for (int i = 1; i < cuts; i++) offsets[i + 1] = n * (i / 2) * 2 / cuts;
    offsets[cuts + 1] = n;
    if (cuts > 2) offsets[cuts] = n;
    sida_dispatch_call call = {.dropped = room((size_t)n + 1),
                               .rows = room((rows + 1) * sizeof *experts),
                               .row_start = room(starts * sizeof *want_start),
                               .experts = put(experts, (rows + 1) * sizeof *experts),
                               .offsets = put(offsets, sizeof offsets),
                               .n = n,
                               .k = k,
                               .sequences = cuts + 1,
                               .experts_total = total,
                               .capacity = capacity};
    OK(cuda()->dispatch(stream, &call));
    get(got_dropped, call.dropped, (size_t)n);
    get(got_rows, call.rows, rows * sizeof *got_rows);
    get(got_start, call.row_start, starts * sizeof *got_start);
    call.dropped = want_dropped;
    call.rows = want_rows;
    call.row_start = want_start;
    call.experts = experts;
    call.offsets = offsets;
    OK(sida_dispatch_cpu(NULL, &call));
    assert_memory_equal(got_start, want_start, starts * sizeof *got_start);
    if (n > 0) assert_memory_equal(got_dropped, want_dropped, (size_t)n);
    size_t kept = (size_t)want_start[total];
    if (kept > 0) assert_memory_equal(got_rows, want_rows, kept * sizeof *got_rows);
    end_case();
}

static void test_dispatch(void **state) {
    (void)state;
    static const int64_t counts[] = {0, 1, 31, 32, 33, 300, 5000};
    static const int32_t totals[] = {1, 8, 64, 256}, capacities[] = {0, 1, 64};
    for (int c = 0; c < 7; c++)
        for (int e = 0; e < 4; e++)
            for (int kind = 0; kind < 6; kind++) {
                for (int cuts = 0; cuts <= 9; cuts += 3)
                    check_dispatch(counts[c], totals[e], capacities[kind % 3], 1, cuts, kind / 3);
                if (totals[e] > 1)
                    check_dispatch(counts[c], totals[e], 0, 2 + kind % 2, 3, kind / 3);
            }
    check_dispatch(20000, 2048, 64, 1, 9, false);
}

static void check_expert(sida_expert_shape shape) {
    enum { EXPERTS = 6, TOKENS = 160, K = 2, ROWS = TOKENS * K, MANY = 2 * ROWS };
    static const int64_t sizes[EXPERTS] = {1, 8, 0, 9, 33, 200};
    int64_t row_start[EXPERTS + 1] = {0};
    int32_t rows[ROWS];
    /* Experts as a wave gives them, and among many without rows, whose weights are not there. */
    static const int order[EXPERTS] = {4, 0, 2, 5, 1, 3};
    int64_t wave_start[EXPERTS], wave_end[EXPERTS], many_start[MANY] = {0}, many_end[MANY] = {0};
    const void *wave_weights[EXPERTS], *many_weights[MANY] = {NULL};
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
    call.row_end = call.row_start + 1;
    OK(cuda()->expert(stream, &call));
    get(got, first, bytes);
    /* In two waves, in another order: the same bytes. */
    for (int i = 0; i < EXPERTS; i++) {
        wave_start[i] = row_start[order[i]];
        wave_end[i] = row_start[order[i] + 1];
        wave_weights[i] = on_device[order[i]];
        int at = i * 101 + 31;
        many_start[at] = row_start[i];
        many_end[at] = row_start[i + 1];
        many_weights[at] = on_device[i];
    }
    call.scratch = second;
    call.count = 2;
    call.weights = put(wave_weights, sizeof wave_weights);
    call.row_start = put(wave_start, sizeof wave_start);
    call.row_end = put(wave_end, sizeof wave_end);
    OK(cuda()->expert(stream, &call));
    call.count = EXPERTS - 2;
    call.weights += 2;
    call.row_start += 2;
    call.row_end += 2;
    OK(cuda()->expert(stream, &call));
    get(again, second, bytes);
    assert_memory_equal(got, again, bytes);
    /* More experts than rows. */
    call.scratch = put(scratch, bytes);
    call.count = MANY;
    call.weights = put(many_weights, sizeof many_weights);
    call.row_start = put(many_start, sizeof many_start);
    call.row_end = put(many_end, sizeof many_end);
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
                              .row_end = row_start + 1,
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
        cmocka_unit_test(test_linear),   cmocka_unit_test(test_linear_chunks),
        cmocka_unit_test(test_rows),     cmocka_unit_test(test_attention),
        cmocka_unit_test(test_buckets),  cmocka_unit_test(test_router),
        cmocka_unit_test(test_dispatch), cmocka_unit_test(test_expert),
        cmocka_unit_test(test_combine),
    };
    backend = gpu_open();
    if (!backend) return test_skip(sida_last_message());
    rng = sida_rng_seed(11);
    int failed = 1;
    if (sida_stream_create(backend, &stream, SIDA_STREAM_COMPUTE) == SIDA_OK) {
        failed = cmocka_run_group_tests(tests, NULL, NULL);
        sida_stream_destroy(stream);
    }
    sida_backend_destroy(backend);
    return failed;
}
