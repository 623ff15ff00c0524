/* What training computes on CUDA against the CPU's functions on the same cases: products and their
 * gradients, SparseMax attention forward and backward, the loss, the end of a step. And every call
 * gives the same bytes twice. The LSTM has a test of its own (train_rnn_cuda_test.c).
 *
 * Tolerances, of the norm: `tight` (op_case.h) where both sides sum in fp32 in different orders.
 * TF32 keeps 11 bits of each factor: 2^-12 on average, independent of one another, so `coarse`. */
#include "runtime/ops/sparsemax.h"
#include "runtime/ops/train_ops.h"
#include "tests/gpu/op_case.h"
#include "trainer/adamw.h"
#include "trainer/loss.h"

static const double coarse = 1e-3;

static float *copy_of(const float *from, int64_t count) {
    float *to = host(count + 1);
    memcpy(to, from, (size_t)count * sizeof *to);
    return to;
}

/* What column sums and the end of a step count in. */
static void *zero_room(size_t bytes) {
    void *workspace = room(bytes);
    OK(sida_zero_cuda(stream, workspace, bytes));
    return workspace;
}

/* --- products */

typedef struct gemm_case {
    int64_t m, n, k;
    bool transpose_a, transpose_b, add;
    bool packed; /* rows end to end; else none of them is aligned */
} gemm_case;

static void check_gemm(gemm_case c) {
    const int64_t lda = (c.transpose_a ? c.m : c.k) + (c.packed ? 0 : 3),
                  ldb = (c.transpose_b ? c.k : c.n) + (c.packed ? 0 : 1),
                  ldc = c.n + (c.packed ? 0 : 2);
    const int64_t a_items = (c.transpose_a ? c.k : c.m) * lda + 1,
                  b_items = (c.transpose_b ? c.n : c.k) * ldb + 1, c_items = c.m * ldc + 1;
    float *a = normal(a_items, 1), *b = normal(b_items, 1), *want = normal(c_items, 1);
    float *got = copy_of(want, c_items), *before = put_floats(want, c_items);
    sida_gemm_call call = {.c = want,
                           .ldc = ldc,
                           .a = a,
                           .lda = lda,
                           .b = b,
                           .ldb = ldb,
                           .m = c.m,
                           .n = c.n,
                           .k = c.k,
                           .transpose_a = c.transpose_a,
                           .transpose_b = c.transpose_b,
                           .add = c.add};
    sida_gemm_call device = call;
    device.a = put_floats(a, a_items);
    device.b = put_floats(b, b_items);
    device.c = put_floats(want, c_items);
    sida_gemm_cpu(&call);
    char what[80];
    snprintf(what, sizeof what, "product %lld %lld %lld, %d %d %d", (long long)c.m, (long long)c.n,
             (long long)c.k, c.transpose_a, c.transpose_b, c.add);
    for (int tf32 = 0; tf32 < 2; tf32++) {
        OK(sida_copy(stream, device.c, before, (size_t)c_items * sizeof(float)));
        OK(sida_gemm_cuda(stream, &device, tf32));
        get(got, device.c, (size_t)c_items * sizeof(float));
        expect_close(what, got, want, c_items, tf32 ? coarse : tight);
    }
    end_case();
}

static void test_gemm(void **state) {
    (void)state;
    for (int flags = 0; flags < 8; flags += gpu_step(7)) {
        const bool a = flags & 1, b = flags & 2, add = flags & 4;
        for (int packed = 0; packed < 2; packed++) {
            check_gemm((gemm_case){1, 1, 1, a, b, add, packed});
            check_gemm((gemm_case){33, 20, 70, a, b, add, packed});
            check_gemm((gemm_case){128, 256, 64, a, b, add, packed});
            check_gemm((gemm_case){7, 5, 0, a, b, add, packed});
            check_gemm((gemm_case){300, 64, 2000, a, b, add, packed});
            check_gemm((gemm_case){1001, 24, 40, a, b, add, packed});
            check_gemm((gemm_case){24, 40, 1001, a, b, add, packed});
        }
    }
}

static void check_linear(int64_t n, int64_t rows, int64_t cols) {
    float *x = normal(n * cols + 1, 1), *w = normal(rows * cols, 1 / sqrtf((float)cols));
    float *bias = normal(rows, 1), *y = host(n * rows + 1), *got = host(n * rows + 1);
    sida_weight weight = {w, SIDA_F32, rows, cols}, device_weight = weight;
    device_weight.data = put_floats(w, rows * cols);
    float *device_x = put_floats(x, n * cols + 1), *device_bias = put_floats(bias, rows);
    float *device_y = put_floats(y, n * rows + 1);
    char what[80];
    for (int way = 0; way < 4; way++) {
        const sida_epilogue epilogue = way % 2 ? SIDA_EPILOGUE_RELU : SIDA_EPILOGUE_NONE;
        OK(sida_linear_gemm_cpu(NULL, &(sida_linear_call){.y = y,
                                                          .ldy = rows,
                                                          .x = x,
                                                          .ldx = cols,
                                                          .n = n,
                                                          .weight = weight,
                                                          .bias = way < 2 ? bias : NULL,
                                                          .scale = 1,
                                                          .epilogue = epilogue}));
        OK(sida_linear_train_cuda(stream, device_y, device_x, device_weight,
                                  way < 2 ? device_bias : NULL, epilogue, n, false));
        get(got, device_y, (size_t)(n * rows + 1) * sizeof(float));
        snprintf(what, sizeof what, "linear of %lld rows, %lld to %lld, way %d", (long long)n,
                 (long long)cols, (long long)rows, way);
        expect_close(what, got, y, n * rows, tight);
    }
    /* Gradients, onto what is there. */
    float *d_y = normal(n * rows + 1, 1), *d_x = normal(n * cols + 1, 1);
    float *d_w = normal(rows * cols, 1), *d_b = normal(rows, 1);
    float *device_workspace = zero_room(SIDA_COLUMN_SUM_BYTES(rows));
    const sida_linear_backward_call device = {.d_x = put_floats(d_x, n * cols + 1),
                                              .d_weight = put_floats(d_w, rows * cols),
                                              .d_bias = put_floats(d_b, rows),
                                              .d_y = put_floats(d_y, n * rows + 1),
                                              .x = device_x,
                                              .weight = device_weight,
                                              .n = n};
    sida_linear_backward_cpu(&(sida_linear_backward_call){
        .d_x = d_x, .d_weight = d_w, .d_bias = d_b, .d_y = d_y, .x = x, .weight = weight, .n = n});
    OK(sida_linear_backward_cuda(stream, &device, false, device_workspace));
    float *got_x = host(n * cols + 1), *got_w = host(rows * cols), *got_b = host(rows);
    get(got_x, device.d_x, (size_t)(n * cols) * sizeof(float) + 4);
    get(got_w, device.d_weight, (size_t)(rows * cols) * sizeof(float));
    get(got_b, device.d_bias, (size_t)rows * sizeof(float));
    expect_close("d x", got_x, d_x, n * cols, tight);
    expect_close("d weight", got_w, d_w, rows * cols, tight);
    expect_close("d bias", got_b, d_b, rows, tight);
    end_case();
}

static void test_linear(void **state) {
    (void)state;
    check_linear(1, 1, 1);
    check_linear(0, 8, 4);
    check_linear(37, 30, 21);
    check_linear(200, 64, 768);
    if (gpu_small()) return;
    check_linear(3000, 128, 64);
    check_linear(129, 768, 256);
}

/* --- which kernel a product takes: by its size alone, rounded up where it is that of a batch */

enum { PRODUCT_OUTS = 5 };
typedef struct product_case {
    int64_t n, rows, cols;
    const float *x, *d_y, *weight, *bias, *before; /* of the host, or of the device */
    bool tf32;
} product_case;

static void sizes_of(int64_t *items, const product_case *c, int64_t n) {
    items[0] = items[1] = items[2] = n * c->rows;
    items[3] = n * c->cols;
    items[4] = c->rows * c->cols;
}

static void cpu_products(float *const out[PRODUCT_OUTS], const product_case *c) {
    static const sida_epilogue ways[] = {SIDA_EPILOGUE_NONE, SIDA_EPILOGUE_RELU, SIDA_EPILOGUE_ADD};
    const sida_weight weight = {c->weight, SIDA_F32, c->rows, c->cols};
    int64_t items[PRODUCT_OUTS];
    sizes_of(items, c, c->n);
    for (int i = 0; i < PRODUCT_OUTS; i++)
        memcpy(out[i], c->before, (size_t)items[i] * sizeof(float));
    for (int i = 0; i < 3; i++)
        OK(sida_linear_gemm_cpu(NULL, &(sida_linear_call){.y = out[i],
                                                          .ldy = c->rows,
                                                          .x = c->x,
                                                          .ldx = c->cols,
                                                          .n = c->n,
                                                          .weight = weight,
                                                          .bias = c->bias,
                                                          .scale = 1,
                                                          .epilogue = ways[i]}));
    sida_linear_backward_cpu(&(sida_linear_backward_call){
        .d_x = out[3], .d_weight = out[4], .d_y = c->d_y, .x = c->x, .weight = weight, .n = c->n});
}

static void cuda_products(sida_stream *on, float *const out[PRODUCT_OUTS], const product_case *c) {
    static const sida_epilogue ways[] = {SIDA_EPILOGUE_NONE, SIDA_EPILOGUE_RELU, SIDA_EPILOGUE_ADD};
    const sida_weight weight = {c->weight, SIDA_F32, c->rows, c->cols};
    int64_t items[PRODUCT_OUTS];
    sizes_of(items, c, c->n);
    for (int i = 2; i < PRODUCT_OUTS; i++) /* those that are added to */
        OK(sida_copy(on, out[i], c->before, (size_t)items[i] * sizeof(float)));
    for (int i = 0; i < 3; i++)
        OK(sida_linear_train_cuda(on, out[i], c->x, weight, c->bias, ways[i], c->n, c->tf32));
    OK(sida_linear_backward_cuda(on,
                                 &(sida_linear_backward_call){.d_x = out[3],
                                                              .d_weight = out[4],
                                                              .d_y = c->d_y,
                                                              .x = c->x,
                                                              .weight = weight,
                                                              .n = c->n},
                                 c->tf32, NULL));
    OK(sida_stream_synchronize(on));
}

/* A device copy that begins `shift` floats behind an aligned address. */
static float *put_at(const float *data, int64_t count, int64_t shift) {
    float *to = (float *)room((size_t)(count + shift) * sizeof *to) + shift;
    OK(sida_copy(stream, to, data, (size_t)count * sizeof *to));
    OK(sida_stream_synchronize(stream));
    return to;
}

/* Sizes of which several share a plan, on a stream and one beside it: what the CPU computes, and
 * the same bytes again after the other sizes, and on new streams in another order. */
static void check_plans(int64_t rows, int64_t cols, int64_t shift, bool tf32) {
    static const int64_t sizes[] = {1, 7, 63, 64, 65, 66, 68, 69, 130, 1000, 1001, 3000, 3001};
    static const char *const names[] = {"y", "relu", "added", "d x", "d weight"};
    const int count = gpu_cases(sizeof sizes / sizeof *sizes, 3);
    const int64_t most = sizes[count - 1], widest = rows > cols ? rows : cols;
    const int64_t longest = most > widest ? most : widest;
    const product_case on_host = {.rows = rows,
                                  .cols = cols,
                                  .x = normal(most * cols, 1),
                                  .d_y = normal(most * rows, 1),
                                  .weight = normal(rows * cols, 1 / sqrtf((float)cols)),
                                  .bias = normal(rows, 1),
                                  .before = normal(longest * widest, 1),
                                  .tf32 = tf32};
    const product_case on_device = {.rows = rows,
                                    .cols = cols,
                                    .x = put_at(on_host.x, most * cols, shift),
                                    .d_y = put_at(on_host.d_y, most * rows, shift),
                                    .weight = put_at(on_host.weight, rows * cols, shift),
                                    .bias = put_at(on_host.bias, rows, shift),
                                    .before = put_at(on_host.before, longest * widest, shift),
                                    .tf32 = tf32};
    int64_t items[PRODUCT_OUTS];
    float *want[PRODUCT_OUTS], *out[PRODUCT_OUTS], *got = host(longest * widest);
    float *kept[2][sizeof sizes / sizeof *sizes][PRODUCT_OUTS];
    sida_stream *streams[2] = {NULL, NULL};
    sizes_of(items, &on_host, most);
    for (int i = 0; i < PRODUCT_OUTS; i++) {
        want[i] = host(items[i]);
        out[i] = (float *)room((size_t)(items[i] + shift) * sizeof(float)) + shift;
    }
    for (int time = 0; time < 3; time++) {
        if (time != 1) {
            sida_stream_destroy(streams[1]);
            sida_stream_destroy(streams[0]);
            OK(sida_stream_create(backend, &streams[0], SIDA_STREAM_COMPUTE));
            OK(sida_stream_create(backend, &streams[1], SIDA_STREAM_BESIDE));
            OK(sida_beside_cuda(streams[1], streams[0]));
        }
        for (int j = 0; j < count; j++) {
            const int at = time == 0 ? j : time == 1 ? count - 1 - j : (j * 5 + 3) % count;
            product_case host_case = on_host, device_case = on_device;
            host_case.n = device_case.n = sizes[at];
            sizes_of(items, &on_host, sizes[at]);
            if (time == 0) cpu_products(want, &host_case);
            for (int s = 0; s < 2; s++) {
                cuda_products(streams[s], out, &device_case);
                for (int i = 0; i < PRODUCT_OUTS; i++) {
                    const size_t bytes = (size_t)items[i] * sizeof(float);
                    char what[120];
                    get(got, out[i], bytes);
                    if (time > 0) {
                        assert_memory_equal(got, kept[s][at][i], bytes);
                        continue;
                    }
                    snprintf(what, sizeof what, "%s of %lld rows, %lld to %lld, tf32 %d, stream %d",
                             names[i], (long long)sizes[at], (long long)cols, (long long)rows, tf32,
                             s);
                    expect_close(what, got, want[i], items[i], tf32 ? coarse : tight);
                    OK(SIDA_ALLOC(&kept[s][at][i], items[i], "case"));
                    memcpy(kept[s][at][i], got, bytes);
                }
            }
        }
    }
    sida_stream_destroy(streams[1]);
    sida_stream_destroy(streams[0]);
    for (int s = 0; s < 2; s++)
        for (int at = 0; at < count; at++)
            for (int i = 0; i < PRODUCT_OUTS; i++) free(kept[s][at][i]);
    end_case();
}

static void test_plans(void **state) {
    (void)state;
    for (int tf32 = 0; tf32 < 2; tf32++) {
        check_plans(128, 64, 0, tf32);
        check_plans(30, 21, 0, tf32); /* rows that are not aligned */
        if (gpu_small()) continue;
        check_plans(64, 128, 1, tf32); /* nor their beginnings */
        check_plans(256, 768, 0, tf32);
        if (!tf32) check_plans(1, 5, 0, tf32);
    }
}

/* Two streams at a time, each with its part of the workspace: the bytes of each alone. */
static void test_beside(void **state) {
    (void)state;
    enum { N = 3000, ROWS = 256, COLS = 128, TIMES = 20 };
    sida_stream *streams[2] = {stream};
    float *x = put_floats(normal(N * COLS, 1), N * COLS);
    float *d_y = put_floats(normal(N * ROWS, 1), N * ROWS);
    const size_t weight_bytes = ROWS * COLS * sizeof(float), bias_bytes = ROWS * sizeof(float);
    float *d_w[2], *d_b[2], *alone_w[2], *alone_b[2], *workspace[2];
    float *got_w = host(ROWS * COLS), *got_b = host(ROWS);
    OK(sida_stream_create(backend, &streams[1], SIDA_STREAM_BESIDE));
    OK(sida_beside_cuda(streams[1], stream));
    for (int i = 0; i < 2; i++) {
        d_w[i] = room(weight_bytes);
        d_b[i] = room(bias_bytes);
        alone_w[i] = host(ROWS * COLS);
        alone_b[i] = host(ROWS);
        workspace[i] = zero_room(SIDA_COLUMN_SUM_BYTES(ROWS));
    }
    OK(sida_stream_synchronize(stream));
    for (int time = -2; time < TIMES; time++) { /* -2 and -1: one of them alone */
        for (int i = 0; i < 2; i++) {
            if (time < 0 && i != time + 2) continue;
            OK(sida_zero_cuda(streams[i], d_w[i], weight_bytes));
            OK(sida_zero_cuda(streams[i], d_b[i], bias_bytes));
            OK(sida_linear_backward_cuda(
                streams[i],
                &(sida_linear_backward_call){.d_weight = d_w[i],
                                             .d_bias = d_b[i],
                                             .d_y = d_y,
                                             .x = x,
                                             .weight = {x, SIDA_F32, ROWS, COLS},
                                             .n = N},
                true, workspace[i]));
        }
        for (int i = 0; i < 2; i++) OK(sida_stream_synchronize(streams[i]));
        for (int i = 0; i < 2; i++) {
            if (time < 0 && i != time + 2) continue;
            get(time < 0 ? alone_w[i] : got_w, d_w[i], weight_bytes);
            get(time < 0 ? alone_b[i] : got_b, d_b[i], bias_bytes);
            if (time < 0) continue;
            assert_memory_equal(got_w, alone_w[i], weight_bytes);
            assert_memory_equal(got_b, alone_b[i], bias_bytes);
        }
    }
    sida_stream_destroy(streams[1]);
    expect_close("weights' gradients on two streams", alone_w[1], alone_w[0], ROWS * COLS, coarse);
    expect_close("biases' gradients on two streams", alone_b[1], alone_b[0], ROWS, tight);
    end_case();
}

static void check_column_sum(int64_t rows, int64_t cols, bool masked) {
    const int64_t items = rows * cols;
    float *x = normal(items + 1, 1), *activated = normal(items + 1, 1), *sum = normal(cols, 1);
    for (int64_t i = 0; i < items; i++)
        if (activated[i] < 0) activated[i] = 0;
    float *device_x = put_floats(x, items + 1), *device_sum = put_floats(sum, cols);
    float *device_mask = put_floats(activated, items + 1), *got = host(items + cols + 1);
    float *device_workspace = zero_room(SIDA_COLUMN_SUM_BYTES(cols));
    OK(sida_column_sum_cuda(stream, device_sum, device_x, masked ? device_mask : NULL, rows, cols,
                            device_workspace));
    for (int64_t i = 0; masked && i < items; i++)
        if (activated[i] == 0) x[i] = 0;
    sida_column_sum_cpu(sum, x, rows, cols);
    get(got, device_sum, (size_t)cols * sizeof(float));
    expect_close("sums of columns", got, sum, cols, tight);
    get(got, device_x, (size_t)(items + 1) * sizeof(float));
    assert_memory_equal(got, x, (size_t)items * sizeof(float));
    /* Without sums the mask alone. */
    if (masked) {
        OK(sida_copy(stream, device_x, device_mask, (size_t)items * sizeof(float)));
        OK(sida_column_sum_cuda(stream, NULL, device_x, device_mask, rows, cols, device_workspace));
        get(got, device_x, (size_t)(items + 1) * sizeof(float));
        assert_memory_equal(got, activated, (size_t)items * sizeof(float));
    }
    end_case();
}

static void test_column_sum(void **state) {
    (void)state;
    for (int masked = 0; masked < 2; masked++) {
        check_column_sum(0, 5, masked);
        check_column_sum(1, 1, masked);
        check_column_sum(63, 33, masked);
        check_column_sum(65, 32, masked);
        check_column_sum(gpu_cases(5000, 500), 100, masked);
        check_column_sum(70, 33000, masked); /* more columns than there are counters for */
    }
}

/* --- SparseMax attention */

enum { MOST_SEQUENCES = 12 };

typedef struct attend_case {
    int32_t width, sequences, q_count[MOST_SEQUENCES], k_count[MOST_SEQUENCES];
    bool self, causal;
    int32_t at_a_time; /* sequences that the workspace holds */
    bool softmax;
} attend_case;

/* Rows of both orders: the CPU's end to end, the device's by rank and time, as the LSTM has them
 * (rnn.h). */
typedef struct rows_of {
    int32_t longest, start[MOST_SEQUENCES];
    int32_t *step;
    int64_t ragged[MOST_SEQUENCES + 1];
} rows_of;

static rows_of order_rows(const int32_t *counts, int32_t sequences) {
    rows_of r = {0};
    for (int s = 0; s < sequences; s++) {
        r.ragged[s + 1] = r.ragged[s] + counts[s];
        r.longest = counts[s] > r.longest ? counts[s] : r.longest;
        for (int other = 0; other < sequences; other++) /* its rank */
            r.start[s] += counts[other] > counts[s] || (counts[other] == counts[s] && other < s);
    }
    r.step = (int32_t *)host(r.longest + 1);
    for (int32_t t = 0; t < r.longest; t++) {
        int32_t running = 0;
        for (int s = 0; s < sequences; s++) running += counts[s] > t;
        r.step[t + 1] = r.step[t] + running;
    }
    return r;
}

static void reorder(float *to, const float *from, const rows_of *r, const int32_t *counts,
                    int32_t sequences, int64_t width, bool back) {
    for (int s = 0; s < sequences; s++)
        for (int32_t t = 0; t < counts[s]; t++) {
            const int64_t ragged = (r->ragged[s] + t) * width,
                          ranked = ((int64_t)r->start[s] + r->step[t]) * width;
            memcpy(to + (back ? ragged : ranked), from + (back ? ranked : ragged),
                   (size_t)width * sizeof *to);
        }
}

static float *put_rows(const float *from, const rows_of *r, const int32_t *counts,
                       int32_t sequences, int64_t width) {
    const int64_t items = r->ragged[sequences] * width + 1;
    float *ranked = host(items);
    reorder(ranked, from, r, counts, sequences, width, false);
    return put_floats(ranked, items);
}

static void expect_rows(const char *what, const float *device, const float *want, const rows_of *r,
                        const attend_case *c, const int32_t *counts, double tolerance) {
    const int64_t items = r->ragged[c->sequences] * c->width;
    float *ranked = host(items + 1), *got = host(items + 1);
    get(ranked, device, (size_t)items * sizeof(float));
    reorder(got, ranked, r, counts, c->sequences, c->width, true);
    char text[120];
    snprintf(text, sizeof text, "%s, width %d, %d by %d first, self %d, causal %d", what, c->width,
             c->q_count[0], c->k_count[0], c->self, c->causal);
    expect_close(text, got, want, items, tolerance);
}

static int32_t seen_by(const attend_case *c, int s, int32_t i) {
    return c->causal && i + 1 < c->k_count[s] ? i + 1 : c->k_count[s];
}

/* How close a score comes to its query's threshold, in shares of the largest score. A score that
 * rounding can push over it changes gradients by jumps, on the CPU as well. */
static double margin_of(const sida_sparsemax_attention_call *q, const attend_case *c) {
    double margin = INFINITY, largest = 1;
    for (int s = 0; s < c->sequences; s++)
        for (int32_t i = 0; i < c->q_count[s]; i++) {
            const float *p = q->probabilities + q->p_start[s] + (int64_t)i * c->k_count[s];
            const int32_t keys = seen_by(c, s, i);
            double threshold = 0, score[600];
            for (int32_t j = 0; j < keys; j++) {
                const float *a = q->queries + (q->q_start[s] + i) * c->width;
                const float *b = q->memory + (q->k_start[s] + j) * c->width;
                score[j] = 0;
                for (int32_t k = 0; k < c->width; k++) score[j] += (double)a[k] * (double)b[k];
                if (fabs(score[j]) > largest) largest = fabs(score[j]);
            }
            float most = -1;
            for (int32_t j = 0; j < keys; j++)
                if (p[j] > most) {
                    most = p[j];
                    threshold = score[j] - (double)p[j];
                }
            for (int32_t j = 0; j < keys && keys > 1; j++)
                if (fabs(score[j] - threshold) < margin) margin = fabs(score[j] - threshold);
        }
    return margin / largest;
}

static void check_weights(attend_case c) {
    if (c.self) memcpy(c.k_count, c.q_count, sizeof c.k_count);
    const size_t counts = sizeof c.q_count;
    rows_of q = order_rows(c.q_count, c.sequences), k = order_rows(c.k_count, c.sequences);
    const int64_t q_items = q.ragged[c.sequences] * c.width,
                  k_items = k.ragged[c.sequences] * c.width;
    int64_t p_start[MOST_SEQUENCES] = {0}, p_items = 0;
    for (int s = 0; s < c.sequences; s++) {
        p_start[s] = p_items;
        p_items += (int64_t)c.q_count[s] * c.k_count[s];
    }
    float *queries = host(q_items + 1), *memory = c.self ? queries : host(k_items + 1);
    float *out = normal(q_items + 1, 1), *d_out = normal(q_items + 1, 1);
    float *d_queries = normal(q_items + 1, 1);
    float *d_memory = c.self ? d_queries : normal(k_items + 1, 1);
    sida_sparsemax_attention_call call = {.out = out,
                                          .queries = queries,
                                          .memory = memory,
                                          .sequences = c.sequences,
                                          .width = c.width,
                                          .q_start = q.ragged,
                                          .k_start = k.ragged,
                                          .q_count = c.q_count,
                                          .k_count = c.k_count,
                                          .causal = c.causal,
                                          .softmax = c.softmax,
                                          .probabilities = host(p_items + 1),
                                          .p_start = p_start};
    /* Scores spread by about 1, so that supports are neither single nor full. */
    const float scale = 1 / sqrtf(sqrtf((float)c.width));
    float *before = copy_of(out, q_items);
    int tries = 0;
    do {
        assert_true(tries++ < 100);
        for (int64_t i = 0; i < q_items; i++) queries[i] = scale * sida_rng_normal(&rng);
        for (int64_t i = 0; i < k_items && !c.self; i++) memory[i] = scale * sida_rng_normal(&rng);
        memcpy(out, before, (size_t)q_items * sizeof(float));
        OK(sida_sparsemax_attention_cpu(NULL, &call));
    } while (!c.softmax && margin_of(&call, &c) < 2e-6);

    int32_t *q_counts = put(c.q_count, counts), *k_counts = put(c.k_count, counts);
    const sida_row_map q_map = {put(q.start, sizeof q.start),
                                put(q.step, (size_t)(q.longest + 1) * 4), q_counts, q.longest};
    const sida_row_map k_map = {put(k.start, sizeof k.start),
                                put(k.step, (size_t)(k.longest + 1) * 4), k_counts, k.longest};
    sida_sparsemax_train_call device = {
        .out = put_rows(before, &q, c.q_count, c.sequences, c.width),
        .thresholds = room((size_t)q.ragged[c.sequences] * 8 + 4),
        .queries = put_rows(queries, &q, c.q_count, c.sequences, c.width),
        .q = q_map,
        .k = c.self ? q_map : k_map,
        .sequences = c.sequences,
        .width = c.width,
        .causal = c.causal,
        .softmax = c.softmax};
    device.memory = c.self ? device.queries : put_rows(memory, &k, c.k_count, c.sequences, c.width);
    float *device_before = put_rows(before, &q, c.q_count, c.sequences, c.width);
    float *device_d_out = put_rows(d_out, &q, c.q_count, c.sequences, c.width);
    float *device_d_queries = put_rows(d_queries, &q, c.q_count, c.sequences, c.width);
    float *device_d_memory =
        c.self ? device_d_queries : put_rows(d_memory, &k, c.k_count, c.sequences, c.width);
    float *d_queries_before = put_rows(d_queries, &q, c.q_count, c.sequences, c.width);
    float *d_memory_before = put_rows(d_memory, &k, c.k_count, c.sequences, c.width);
    device.workspace_bytes =
        sida_sparsemax_train_bytes(c.at_a_time, q.longest, k.longest, c.width, true);
    device.workspace = room(device.workspace_bytes + 4);
    OK(sida_sparsemax_attention_backward_cpu(&(sida_sparsemax_attention_backward_call){
        .d_queries = d_queries, .d_memory = d_memory, .d_out = d_out, .forward = &call}));
    float *first = host(2 * q_items + k_items + 1), *second = host(2 * q_items + k_items + 1);
    for (int run = 0; run < 2; run++) {
        float *bytes = run ? second : first;
        OK(sida_copy(stream, device.out, device_before, (size_t)q_items * sizeof(float)));
        OK(sida_copy(stream, device_d_queries, d_queries_before, (size_t)q_items * sizeof(float)));
        if (!c.self)
            OK(sida_copy(stream, device_d_memory, d_memory_before,
                         (size_t)k_items * sizeof(float)));
        OK(sida_sparsemax_train_forward_cuda(stream, &device));
        OK(sida_sparsemax_train_backward_cuda(stream, device_d_queries, device_d_memory,
                                              device_d_out, &device));
        get(bytes, device.out, (size_t)q_items * sizeof(float));
        get(bytes + q_items, device_d_queries, (size_t)q_items * sizeof(float));
        get(bytes + 2 * q_items, device_d_memory, (size_t)k_items * sizeof(float));
    }
    assert_memory_equal(first, second, (size_t)(2 * q_items + k_items) * sizeof(float));
    expect_rows(c.softmax ? "softmax" : "SparseMax", device.out, out, &q, &c, c.q_count, tight);
    expect_rows(c.softmax ? "softmax d queries" : "SparseMax d queries", device_d_queries,
                d_queries, &q, &c, c.q_count, tight);
    expect_rows(c.softmax ? "softmax d memory" : "SparseMax d memory", device_d_memory, d_memory,
                &k, &c, c.k_count, tight);
    end_case();
}

static void check_sparsemax(attend_case c) {
    check_weights(c);
    c.softmax = true;
    check_weights(c);
}

static void test_sparsemax(void **state) {
    (void)state;
    for (int self = 0; self < 2; self++)
        for (int causal = gpu_cases(0, self); causal < 2; causal += gpu_step(2)) {
            check_sparsemax((attend_case){4, 1, {1}, {1}, self, causal, 1, false});
            check_sparsemax(
                (attend_case){64, 5, {7, 32, 0, 1, 20}, {9, 3, 5, 0, 40}, self, causal, 5, false});
            check_sparsemax(
                (attend_case){30, 3, {33, 65, 12}, {70, 20, 64}, self, causal, 2, false});
            check_sparsemax(
                (attend_case){17, 4, {5, 5, 5, 5}, {3, 3, 3, 3}, self, causal, 3, false});
            check_sparsemax((attend_case){256, 2, {130, 90}, {257, 140}, self, causal, 1, false});
        }
    if (!gpu_small()) check_sparsemax((attend_case){64, 2, {512, 300}, {0}, true, false, 2, false});
    check_sparsemax(
        (attend_case){32, 1, {20}, {600}, false, false, 1, false}); /* scores read again */
}

static void test_sparsemax_limits(void **state) {
    (void)state;
    int32_t counts[2] = {3, 2}, start[2] = {0, 1}, step[3] = {0, 2, 4};
    const sida_row_map map = {put(start, sizeof start), put(step, sizeof step),
                              put(counts, sizeof counts), 3};
    float *rows = put_floats(normal(5 * 8, 1), 5 * 8);
    sida_sparsemax_train_call call = {.out = put_floats(normal(5 * 8, 1), 5 * 8),
                                      .thresholds = room(40),
                                      .queries = rows,
                                      .memory = rows,
                                      .q = map,
                                      .k = map,
                                      .sequences = 2,
                                      .width = 8,
                                      .workspace = room(64),
                                      .workspace_bytes = 64};
    assert_int_equal(sida_sparsemax_train_forward_cuda(stream, &call), SIDA_ERROR_ARGUMENT);
    assert_int_equal(sida_sparsemax_train_backward_cuda(stream, call.out, call.out, rows, &call),
                     SIDA_ERROR_ARGUMENT);
    call.sequences = 0;
    OK(sida_sparsemax_train_forward_cuda(stream, &call));
    end_case();
}

/* --- the loss */

typedef struct loss_case {
    int64_t tokens;
    int32_t layers, experts, top;
    sida_tkd tkd;
    float lambda;
    bool bias, source, in_place;
    int32_t labels; /* of a pair; 0: the first of the top */
} loss_case;

/* A teacher's top: distinct experts with falling log-probabilities of a softmax over all. */
static void make_teacher(uint16_t *ids, uint16_t *logp, int32_t experts, int32_t top) {
    float *z = normal(experts, 2);
    double sum = 0, largest = -INFINITY;
    for (int32_t e = 0; e < experts; e++) largest = fmax(largest, (double)z[e]);
    for (int32_t e = 0; e < experts; e++) sum += exp((double)z[e] - largest);
    const double log_sum = largest + log(sum);
    for (int32_t i = 0; i < top; i++) {
        int32_t best = 0;
        for (int32_t e = 1; e < experts; e++)
            if (z[e] > z[best]) best = e;
        ids[i] = (uint16_t)best;
        logp[i] = sida_f16_from_f32((float)((double)z[best] - log_sum));
        z[best] = -INFINITY;
    }
    free(blocks[--block_count]); /* z: a case has many teachers */
}

static void check_loss(loss_case c) {
    const int64_t pairs = c.tokens * c.layers, items = pairs * c.experts, tops = pairs * c.top;
    float *logits = normal(items + 1, 2), *bias = normal((int64_t)c.layers * c.experts, 1);
    float *summed = host(items + 1), *want = host(items + 1), *got = host(items + 1);
    uint16_t *ids = (uint16_t *)host(tops + 1), *logp = (uint16_t *)host(tops + 1);
    uint16_t *row_ids = (uint16_t *)host(tops + 1), *row_logp = (uint16_t *)host(tops + 1);
    int32_t *source = (int32_t *)host(c.tokens + 1);
    double *losses = (double *)host(2 * pairs + 2), partials[SIDA_TRAIN_PARTIALS], sum;
    const int64_t marks = pairs * c.labels, label_row = (int64_t)c.layers * c.labels;
    uint16_t *labels = (uint16_t *)host(marks + 1), *row_labels = (uint16_t *)host(marks + 1);
    float *weights = host(marks + 1), *row_weights = host(marks + 1);
    for (int64_t i = 0; i < marks; i++) {
        const int64_t j = i % c.labels;
        labels[i] = (uint16_t)((i / c.labels * 3 + j * 5) % c.experts);
        weights[i] = (float)(2 * (c.labels - j)) / (float)(c.labels * (c.labels + 1));
    }
    for (int64_t i = 0; i < pairs; i++)
        make_teacher(ids + i * c.top, logp + i * c.top, c.experts, c.top);
    for (int64_t i = 0; i < items; i++)
        summed[i] = logits[i] + (c.bias ? bias[i % ((int64_t)c.layers * c.experts)] : 0);
    const int64_t row = (int64_t)c.layers * c.top;
    for (int64_t i = 0; i < c.tokens; i++) {
        source[i] = c.source ? (int32_t)((i * 7 + 3) % c.tokens) : (int32_t)i;
        memcpy(row_ids + i * row, ids + source[i] * row, (size_t)row * sizeof *ids);
        memcpy(row_logp + i * row, logp + source[i] * row, (size_t)row * sizeof *ids);
        if (label_row == 0) continue;
        memcpy(row_labels + i * label_row, labels + source[i] * label_row,
               (size_t)label_row * sizeof *labels);
        memcpy(row_weights + i * label_row, weights + source[i] * label_row,
               (size_t)label_row * sizeof *weights);
    }
    const float scale = 1.0f / (float)(pairs > 0 ? pairs : 1);
    OK(sida_loss(&sum, &(sida_loss_call){.d_logits = want,
                                         .losses = losses,
                                         .logits = summed,
                                         .top_ids = row_ids,
                                         .top_logp = row_logp,
                                         .labels = c.labels > 0 ? row_labels : NULL,
                                         .label_weights = row_weights,
                                         .label_count = c.labels,
                                         .pairs = pairs,
                                         .experts = c.experts,
                                         .top = c.top,
                                         .tkd = c.tkd,
                                         .lambda = c.lambda,
                                         .scale = scale}));
    float *device_logits = put_floats(logits, items + 1);
    sida_loss_cuda_call call = {
        .d_logits = c.in_place ? device_logits : room((size_t)items * sizeof(float) + 4),
        .partials = room(sizeof partials),
        .logits = device_logits,
        .bias = c.bias ? put_floats(bias, (int64_t)c.layers * c.experts) : NULL,
        .top_ids = put(ids, (size_t)tops * sizeof *ids + 2),
        .top_logp = put(logp, (size_t)tops * sizeof *logp + 2),
        .labels = c.labels > 0 ? put(labels, (size_t)marks * sizeof *labels + 2) : NULL,
        .label_weights = c.labels > 0 ? put_floats(weights, marks + 1) : NULL,
        .label_count = c.labels,
        .source = c.source ? put(source, (size_t)c.tokens * sizeof *source + 4) : NULL,
        .rows = c.tokens,
        .layers = c.layers,
        .experts = c.experts,
        .top = c.top,
        .tkd = c.tkd,
        .lambda = c.lambda,
        .scale = scale};
    char what[120];
    snprintf(what, sizeof what, "loss of %lld x %d, %d experts, top %d, %s, %d labels",
             (long long)c.tokens, c.layers, c.experts, c.top, sida_tkd_name(c.tkd), c.labels);
    double total[2] = {0, 0};
    for (int run = 0; run < 2; run++) { /* the first without gradients */
        sida_loss_cuda_call one = call;
        if (run == 0) one.d_logits = NULL;
        OK(sida_loss_cuda(stream, &one));
        get(partials, call.partials, sizeof partials);
        for (int i = 0; i < SIDA_TRAIN_PARTIALS; i++) total[run] += partials[i];
    }
    assert_true(total[0] == total[1]);
    /* A pair's loss is right to some 1e-6 of the logits it comes from. */
    if (fabs(total[1] - sum) > 1e-5 * (fabs(sum) + 1e-3 * (double)pairs))
        fail_msg("%s: %.9g instead of %.9g", what, total[1], sum);
    get(got, call.d_logits, (size_t)items * sizeof(float) + 4);
    expect_close(what, got, want, items, tight);
    end_case();
}

static void test_loss(void **state) {
    (void)state;
    static const int32_t experts[] = {8, 64, 128}, labels[] = {0, 1, 2, 8};
    for (int kind = 0; kind < SIDA_TKD_KINDS; kind += gpu_step(2)) {
        const sida_tkd tkd = (sida_tkd)kind;
        check_loss((loss_case){0, 2, 8, 4, tkd, 0.5f, false, false, false, 0});
        check_loss((loss_case){5, 1, 1, 1, tkd, 0.5f, false, false, false, 0});
        check_loss((loss_case){40, 3, 8, 8, tkd, 0.5f, true, true, true, 0});
        check_loss((loss_case){40, 3, 8, 3, tkd, 0, false, false, false, 0});
        check_loss((loss_case){50, 2, 33, 10, tkd, 0.5f, true, false, true, 0});
        check_loss((loss_case){70, 6, 128, 30, tkd, 0.005f, true, true, true, 0});
        check_loss((loss_case){30, 6, 256, 33, tkd, 2, false, true, false, 0});
        check_loss((loss_case){20, 2, 300, 70, tkd, 0.5f, true, true, true, 0});
        check_loss((loss_case){20, 2, 600, 600, tkd, 0.5f, true, true, true, 0});
        check_loss((loss_case){9, 2, 700, 30, tkd, 0.5f, false, false, true, 0});
        if (!gpu_small()) check_loss((loss_case){2, 1, 40000, 20, tkd, 0.5f, true, false, true, 0});
        check_loss(
            (loss_case){1400, 6, 8, 2, tkd, 0.5f, false, false, true, 0}); /* several a warp */
        for (int e = 0; e < 3; e++)
            for (int l = 0; l < 4; l += gpu_step(2))
                for (int whole = 0; whole < 2; whole++)
                    check_loss((loss_case){40, 2, experts[e], whole ? experts[e] : experts[e] / 4,
                                           tkd, 0.5f, true, l % 2 == 0, whole == 0, labels[l]});
        check_loss((loss_case){9, 2, 700, 30, tkd, 0.5f, true, true, true, 40});
    }
}

/* Logits far apart: nothing overflows, nothing becomes NaN. One that is not a number shows. */
static void test_loss_extremes(void **state) {
    (void)state;
    enum { experts = 8, top = 3 };
    const uint16_t ids[top] = {2, 5, 0};
    uint16_t logp[top];
    for (int i = 0; i < top; i++) logp[i] = sida_f16_from_f32(-0.5f - 2 * (float)i);
    float got[experts], want[experts];
    double losses, sum, partials[SIDA_TRAIN_PARTIALS];
    for (int round = 0; round < 2 * SIDA_TKD_KINDS; round++) {
        const bool nan = round % 2;
        const sida_tkd tkd = (sida_tkd)(round / 2);
        float logits[experts] = {-300, 200, 80, nan ? NAN : -90, 1, 0, -1, 30};
        const sida_loss_call on_host = {.d_logits = want,
                                        .losses = &losses,
                                        .logits = logits,
                                        .top_ids = ids,
                                        .top_logp = logp,
                                        .pairs = 1,
                                        .experts = experts,
                                        .top = top,
                                        .tkd = tkd,
                                        .lambda = 0.5f,
                                        .scale = 1};
        sida_loss_cuda_call call = {.d_logits = room(sizeof got),
                                    .partials = room(sizeof partials),
                                    .logits = put(logits, sizeof logits),
                                    .top_ids = put(ids, sizeof ids),
                                    .top_logp = put(logp, sizeof logp),
                                    .rows = 1,
                                    .layers = 1,
                                    .experts = experts,
                                    .top = top,
                                    .tkd = tkd,
                                    .lambda = 0.5f,
                                    .scale = 1};
        OK(sida_loss_cuda(stream, &call));
        get(partials, call.partials, sizeof partials);
        get(got, call.d_logits, sizeof got);
        if (nan) {
            assert_true(isnan(partials[0]));
            end_case();
            continue;
        }
        OK(sida_loss(&sum, &on_host));
        assert_true(fabs(partials[0] - sum) <= 1e-5 * fabs(sum));
        expect_close("loss of far logits", got, want, experts, tight);
        end_case();
    }
}

/* --- the end of a step */

static void check_adamw(int64_t count, double clip, bool shifted) {
    float *parameters = normal(count + 1, 1), *got = host(count + 1);
    double partials[SIDA_TRAIN_PARTIALS];
    const int64_t at = shifted ? 1 : 0; /* off 16 bytes: one by one */
    sida_adamw adamw;
    OK(sida_adamw_create(&adamw, count, 0.01));
    float *device[4]; /* parameters, first, second, gradient */
    for (int i = 0; i < 4; i++) {
        device[i] = (float *)room((size_t)(count + at + 1) * sizeof(float)) + at;
        OK(sida_zero_cuda(stream, device[i], (size_t)count * sizeof(float)));
    }
    if (count) OK(sida_copy(stream, device[0], parameters, (size_t)count * sizeof(float)));
    for (int i = 0; i < SIDA_TRAIN_PARTIALS; i++) partials[i] = (double)i / 7;
    double *losses = put(partials, sizeof partials);
    void *workspace = zero_room(SIDA_TRAIN_FINISH_BYTES);
    sida_train_result result, *device_result = room(sizeof result);
    for (int step = 1; step <= 6; step++) {
        const double lr = 0.01 / step;
        float *gradient = normal(count + 1, 0.1f);
        /* A step that the CPU does not take: a gradient that is not finite changes nothing. */
        const bool broken = step == 4 && count > 0;
        const sida_adamw_scalars scalars = sida_adamw_scalars_of(
            adamw.beta1, adamw.beta2, adamw.epsilon, lr, adamw.weight_decay, adamw.step + 1, clip);
        if (broken) gradient[count / 2] = INFINITY;
        if (count) OK(sida_copy(stream, device[3], gradient, (size_t)count * sizeof(float)));
        OK(sida_train_finish_cuda(stream, device_result,
                                  (const double *const[2]){losses, step % 2 ? losses : NULL},
                                  device[3], count, workspace));
        OK(sida_adamw_cuda(stream, device[0], device[1], device[2], device[3], count, &scalars,
                           device_result, step > 2));
        get(&result, device_result, sizeof result);
        double loss = 0;
        for (int i = 0; i < SIDA_TRAIN_PARTIALS; i++) loss += partials[i];
        assert_true(fabs(result.losses[0] - loss) <= 1e-12 * loss);
        assert_true(fabs(result.losses[1] - (step % 2 ? loss : 0)) <= 1e-12 * loss);
        assert_true(result.finite == (broken ? 0 : 1));
        if (count) get(got, device[3], (size_t)count * sizeof(float));
        for (int64_t i = 0; i < count; i++) assert_true(got[i] == (step > 2 ? 0 : gradient[i]));
        if (broken) continue;
        const double norm = sida_gradient_clip(gradient, count, clip);
        assert_true(fabs(result.norm - norm) <= 1e-11 * norm);
        sida_adamw_step(&adamw, parameters, gradient, lr);
    }
    /* The same operations in fp32; only what the compilers fuse may differ, in the last bit. */
    const float *want[3] = {parameters, adamw.first, adamw.second};
    for (int i = 0; i < 3 && count; i++) {
        get(got, device[i], (size_t)count * sizeof(float));
        expect_close("AdamW", got, want[i], count, 1e-6);
    }
    sida_adamw_free(&adamw);
    end_case();
}

static void test_adamw(void **state) {
    (void)state;
    check_adamw(0, 1, false);
    check_adamw(1, 0, false);
    check_adamw(1023, 1, false);
    check_adamw(5000, 1e9, true);
    check_adamw(gpu_cases(300000, 5000), 1, false);
    /* A loss that is not finite stops the update too. */
    float *parameters = put_floats(normal(8, 1), 8), before[8], after[8];
    double partials[SIDA_TRAIN_PARTIALS] = {0};
    partials[1000] = NAN;
    sida_train_result result, *device_result = room(sizeof result);
    const sida_adamw_scalars scalars = sida_adamw_scalars_of(0.9, 0.999, 1e-8, 0.1, 0, 1, 0);
    float *zeros = host(24), *rest = put_floats(zeros, 24);
    get(before, parameters, sizeof before);
    OK(sida_train_finish_cuda(stream, device_result,
                              (const double *const[2]){NULL, put(partials, sizeof partials)}, rest,
                              8, zero_room(SIDA_TRAIN_FINISH_BYTES)));
    OK(sida_adamw_cuda(stream, parameters, rest + 8, rest + 16, rest, 8, &scalars, device_result,
                       false));
    get(&result, device_result, sizeof result);
    get(after, parameters, sizeof after);
    assert_true(isnan(result.losses[1]) && result.losses[0] == 0 && result.finite == 0);
    assert_memory_equal(before, after, sizeof before);
    end_case();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gemm),
        cmocka_unit_test(test_linear),
        cmocka_unit_test(test_plans),
        cmocka_unit_test(test_beside),
        cmocka_unit_test(test_column_sum),
        cmocka_unit_test(test_sparsemax),
        cmocka_unit_test(test_sparsemax_limits),
        cmocka_unit_test(test_loss),
        cmocka_unit_test(test_loss_extremes),
        cmocka_unit_test(test_adamw),
    };
    return run_op_tests(tests, sizeof tests / sizeof *tests);
}
