/* The backward of every op against central differences of a plain double-precision forward, which
 * also checks the op's own forward.
 *
 * The reference's differences are good to about 1e-9 (step 1e-5, values of order 1), so what is
 * left is the op's fp32 rounding: sums of at most some hundred terms of order 1, about 1e-6. The
 * bound is 2e-5 of the larger of 1 and the value. Inputs are random: the chance that one lies
 * within 1e-5 of a kink of SparseMax or |x| is small, and the seed is fixed. */
#include "tests/test.h"

#include "formats/base/rng.h"
#include "formats/dtype.h"
#include "runtime/ops/gemm.h"
#include "runtime/ops/lstm.h"
#include "runtime/ops/sparsemax.h"
#include "trainer/loss.h"

#include <math.h>
#include <string.h>

enum { MAX = 2048 };

static void fill(double *to, int count, double scale, uint64_t seed) {
    sida_rng rng = sida_rng_seed(seed);
    for (int i = 0; i < count; i++) to[i] = scale * (double)sida_rng_normal(&rng);
}

/* fp32 copies; the double is set to what fp32 holds, so that both start from the same input. */
static void narrow(float *to, double *from, int count) {
    for (int i = 0; i < count; i++) {
        to[i] = (float)from[i];
        from[i] = (double)to[i];
    }
}

static void near(const char *what, int index, double got, double expected) {
    if (!(fabs(got - expected) <= 2e-5 * fmax(1, fabs(expected))))
        fail_msg("%s[%d]: %.9g, expected %.9g", what, index, got, expected);
}

/* Compares `got` [count] with the differences of `objective` in each of x [count]. */
static void check(const char *what, double (*objective)(void *), void *context, double *x,
                  int count, const float *got) {
    const double step = 1e-5;
    for (int i = 0; i < count; i++) {
        double held = x[i];
        x[i] = held + step;
        double high = objective(context);
        x[i] = held - step;
        double low = objective(context);
        x[i] = held;
        near(what, i, (double)got[i], (high - low) / (2 * step));
    }
}

/* --- linear */
typedef struct linear_case {
    int n, rows, cols;
    double x[MAX], w[MAX], b[MAX], d[MAX], y[MAX];
} linear_case;

static double linear_objective(void *context) {
    linear_case *c = context;
    double sum = 0;
    for (int i = 0; i < c->n; i++)
        for (int r = 0; r < c->rows; r++) {
            double y = c->b[r];
            for (int k = 0; k < c->cols; k++) y += c->x[i * c->cols + k] * c->w[r * c->cols + k];
            c->y[i * c->rows + r] = y;
            sum += y * c->d[i * c->rows + r];
        }
    return sum;
}

static void linear_backward(void **state) {
    (void)state;
    static linear_case c = {.n = 7, .rows = 9, .cols = 5};
    static float x[MAX], w[MAX], b[MAX], d[MAX], y[MAX], dx[MAX], dw[MAX], db[MAX];
    fill(c.x, c.n * c.cols, 1, 1);
    fill(c.w, c.rows * c.cols, 1, 2);
    fill(c.b, c.rows, 1, 3);
    fill(c.d, c.n * c.rows, 1, 4);
    narrow(x, c.x, c.n * c.cols);
    narrow(w, c.w, c.rows * c.cols);
    narrow(b, c.b, c.rows);
    narrow(d, c.d, c.n * c.rows);
    const sida_weight weight = {w, SIDA_F32, c.rows, c.cols};
    assert_int_equal(sida_linear_gemm_cpu(NULL, &(sida_linear_call){.y = y,
                                                                    .ldy = c.rows,
                                                                    .x = x,
                                                                    .ldx = c.cols,
                                                                    .n = c.n,
                                                                    .weight = weight,
                                                                    .bias = b,
                                                                    .scale = 1}),
                     SIDA_OK);
    linear_objective(&c);
    for (int i = 0; i < c.n * c.rows; i++) near("y", i, (double)y[i], c.y[i]);
    sida_linear_backward_cpu(&(sida_linear_backward_call){
        .d_x = dx, .d_weight = dw, .d_bias = db, .d_y = d, .x = x, .weight = weight, .n = c.n});
    check("d_x", linear_objective, &c, c.x, c.n * c.cols, dx);
    check("d_weight", linear_objective, &c, c.w, c.rows * c.cols, dw);
    check("d_bias", linear_objective, &c, c.b, c.rows, db);
}

/* --- gemm, at sizes that take several tiles, against double sums */
static void gemm_tiles(void **state) {
    (void)state;
    enum { m = 150, n = 300, k = 70 };
    float *a = malloc(m * k * sizeof *a), *b = malloc(n * k * sizeof *b),
          *c = malloc(m * n * sizeof *c);
    sida_rng rng = sida_rng_seed(5);
    for (int i = 0; i < m * k; i++) a[i] = sida_rng_normal(&rng);
    for (int i = 0; i < n * k; i++) b[i] = sida_rng_normal(&rng);
    for (int form = 0; form < 8; form++) {
        bool ta = form & 1, tb = form & 2, add = form & 4;
        for (int i = 0; i < m * n; i++) c[i] = 1;
        sida_gemm_cpu(&(sida_gemm_call){.c = c,
                                        .ldc = n,
                                        .a = a,
                                        .lda = ta ? m : k,
                                        .b = b,
                                        .ldb = tb ? k : n,
                                        .m = m,
                                        .n = n,
                                        .k = k,
                                        .transpose_a = ta,
                                        .transpose_b = tb,
                                        .add = add});
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) {
                double sum = add ? 1 : 0;
                for (int q = 0; q < k; q++)
                    sum += (double)a[ta ? q * m + i : i * k + q] *
                           (double)b[tb ? j * k + q : q * n + j];
                near("c", i * n + j, (double)c[i * n + j], sum);
            }
    }
    free(a);
    free(b);
    free(c);
}

/* --- LSTM */
enum { LSTM_H = 6, LSTM_S = 4 };
static const int64_t lstm_offsets[LSTM_S + 1] = {0, 3, 3, 8, 9}; /* one sequence is empty */
enum { LSTM_N = 9 };
typedef struct lstm_case {
    double gates[LSTM_N * 4 * LSTM_H], w[4 * LSTM_H * LSTM_H], b[4 * LSTM_H], d[LSTM_N * LSTM_H],
        out[LSTM_N * LSTM_H];
} lstm_case;

static double sigmoid(double x) {
    return 1 / (1 + exp(-x));
}

static double lstm_objective(void *context) {
    lstm_case *q = context;
    double sum = 0;
    for (int s = 0; s < LSTM_S; s++) {
        double h[LSTM_H] = {0}, c[LSTM_H] = {0};
        for (int64_t t = lstm_offsets[s]; t < lstm_offsets[s + 1]; t++) {
            double z[4 * LSTM_H];
            for (int r = 0; r < 4 * LSTM_H; r++) {
                z[r] = q->gates[t * 4 * LSTM_H + r] + q->b[r];
                for (int k = 0; k < LSTM_H; k++) z[r] += q->w[r * LSTM_H + k] * h[k];
            }
            for (int k = 0; k < LSTM_H; k++) {
                c[k] = sigmoid(z[LSTM_H + k]) * c[k] + sigmoid(z[k]) * tanh(z[2 * LSTM_H + k]);
                h[k] = sigmoid(z[3 * LSTM_H + k]) * tanh(c[k]);
                q->out[t * LSTM_H + k] = h[k];
                sum += h[k] * q->d[t * LSTM_H + k];
            }
        }
    }
    return sum;
}

static void lstm_backward(void **state) {
    (void)state;
    static lstm_case q;
    static float gates[LSTM_N * 4 * LSTM_H], w[4 * LSTM_H * LSTM_H], b[4 * LSTM_H],
        d[LSTM_N * LSTM_H], out[LSTM_N * LSTM_H], cells[LSTM_N * LSTM_H],
        d_gates[LSTM_N * 4 * LSTM_H], dw[4 * LSTM_H * LSTM_H], db[4 * LSTM_H],
        workspace[(LSTM_N + 6 * LSTM_S) * LSTM_H];
    fill(q.gates, LSTM_N * 4 * LSTM_H, 1, 11);
    fill(q.w, 4 * LSTM_H * LSTM_H, 0.5, 12);
    fill(q.b, 4 * LSTM_H, 0.5, 13);
    fill(q.d, LSTM_N * LSTM_H, 1, 14);
    narrow(gates, q.gates, LSTM_N * 4 * LSTM_H);
    narrow(w, q.w, 4 * LSTM_H * LSTM_H);
    narrow(b, q.b, 4 * LSTM_H);
    narrow(d, q.d, LSTM_N * LSTM_H);
    const sida_weight recurrent = {w, SIDA_F32, 4 * LSTM_H, LSTM_H};
    assert_int_equal(sida_lstm_cpu(NULL, &(sida_lstm_call){.out = out,
                                                           .gates = gates,
                                                           .cells = cells,
                                                           .recurrent = recurrent,
                                                           .bias = b,
                                                           .sequences = LSTM_S,
                                                           .hidden = LSTM_H,
                                                           .offsets = lstm_offsets,
                                                           .workspace = workspace,
                                                           .linear = sida_linear_gemm_cpu}),
                     SIDA_OK);
    lstm_objective(&q);
    for (int i = 0; i < LSTM_N * LSTM_H; i++) near("h", i, (double)out[i], q.out[i]);
    assert_int_equal(sida_lstm_backward_cpu(&(sida_lstm_backward_call){.d_gates = d_gates,
                                                                       .d_recurrent = dw,
                                                                       .d_bias = db,
                                                                       .d_out = d,
                                                                       .out = out,
                                                                       .gates = gates,
                                                                       .cells = cells,
                                                                       .recurrent = recurrent,
                                                                       .sequences = LSTM_S,
                                                                       .hidden = LSTM_H,
                                                                       .offsets = lstm_offsets,
                                                                       .workspace = workspace}),
                     SIDA_OK);
    check("d_gates", lstm_objective, &q, q.gates, LSTM_N * 4 * LSTM_H, d_gates);
    check("d_recurrent", lstm_objective, &q, q.w, 4 * LSTM_H * LSTM_H, dw);
    check("d_bias", lstm_objective, &q, q.b, 4 * LSTM_H, db);
}

/* --- SparseMax attention: full, causal, and over another sequence's memory */
enum { AT_W = 5, AT_S = 3, AT_Q = 10, AT_K = 13 };
typedef struct attention_case {
    bool causal, shared; /* shared: keys are the queries */
    int64_t q_start[AT_S], k_start[AT_S], p_start[AT_S];
    int32_t q_count[AT_S], k_count[AT_S];
    double q[AT_K * AT_W], k[AT_K * AT_W], d[AT_K * AT_W], out[AT_K * AT_W];
    int supported, pairs; /* keys with mass, and all */
} attention_case;

/* By bisection of the threshold: nothing in common with the code under test. */
static void sparsemax_reference(double *p, const double *z, int n) {
    double low = -1e3, high = 1e3;
    for (int round = 0; round < 200; round++) {
        double middle = (low + high) / 2, sum = 0;
        for (int i = 0; i < n; i++) sum += fmax(z[i] - middle, 0);
        *(sum > 1 ? &low : &high) = middle;
    }
    for (int i = 0; i < n; i++) p[i] = fmax(z[i] - low, 0);
}

static double attention_objective(void *context) {
    attention_case *c = context;
    const double *memory = c->shared ? c->q : c->k;
    double sum = 0;
    c->supported = c->pairs = 0;
    for (int s = 0; s < AT_S; s++)
        for (int i = 0; i < c->q_count[s]; i++) {
            int keys = c->causal ? i + 1 : c->k_count[s];
            double z[AT_K], p[AT_K];
            const double *q = c->q + (c->q_start[s] + i) * AT_W;
            for (int j = 0; j < keys; j++) {
                z[j] = 0;
                for (int w = 0; w < AT_W; w++)
                    z[j] += q[w] * memory[(c->k_start[s] + j) * AT_W + w];
            }
            sparsemax_reference(p, z, keys);
            for (int w = 0; w < AT_W; w++) {
                double value = 0;
                for (int j = 0; j < keys; j++)
                    value += p[j] * memory[(c->k_start[s] + j) * AT_W + w];
                c->out[(c->q_start[s] + i) * AT_W + w] = value;
                sum += value * c->d[(c->q_start[s] + i) * AT_W + w];
            }
            for (int j = 0; j < keys; j++) c->supported += p[j] > 0;
            c->pairs += keys;
        }
    return sum;
}

static void check_attention(attention_case *c) {
    static float q[AT_K * AT_W], k[AT_K * AT_W], d[AT_K * AT_W], out[AT_K * AT_W], dq[AT_K * AT_W],
        dk[AT_K * AT_W], p[AT_K * AT_K];
    memset(out, 0, sizeof out);
    memset(dq, 0, sizeof dq);
    memset(dk, 0, sizeof dk);
    fill(c->q, AT_K * AT_W, 0.7, 21);
    fill(c->k, AT_K * AT_W, 0.7, 22);
    fill(c->d, AT_K * AT_W, 1, 23);
    narrow(q, c->q, AT_K * AT_W);
    narrow(k, c->k, AT_K * AT_W);
    narrow(d, c->d, AT_K * AT_W);
    const sida_sparsemax_attention_call call = {.out = out,
                                                .queries = q,
                                                .memory = c->shared ? q : k,
                                                .sequences = AT_S,
                                                .width = AT_W,
                                                .q_start = c->q_start,
                                                .k_start = c->k_start,
                                                .q_count = c->q_count,
                                                .k_count = c->k_count,
                                                .causal = c->causal,
                                                .probabilities = p,
                                                .p_start = c->p_start};
    assert_int_equal(sida_sparsemax_attention_cpu(NULL, &call), SIDA_OK);
    attention_objective(c);
    /* A case without dropped keys, or with one key a query, would prove little. */
    assert_true(c->supported < c->pairs && c->supported > AT_Q);
    for (int i = 0; i < AT_Q * AT_W; i++) near("out", i, (double)out[i], c->out[i]);
    assert_int_equal(
        sida_sparsemax_attention_backward_cpu(&(sida_sparsemax_attention_backward_call){
            .d_queries = dq, .d_memory = c->shared ? dq : dk, .d_out = d, .forward = &call}),
        SIDA_OK);
    check("d_queries", attention_objective, c, c->q, AT_Q * AT_W, dq);
    if (!c->shared) check("d_memory", attention_objective, c, c->k, AT_K * AT_W, dk);
}

static void attention_self(void **state) {
    (void)state;
    static attention_case c = {.shared = true,
                               .q_start = {0, 4, 9},
                               .k_start = {0, 4, 9},
                               .p_start = {0, 16, 41},
                               .q_count = {4, 5, 1},
                               .k_count = {4, 5, 1}};
    check_attention(&c);
}
static void attention_causal(void **state) {
    (void)state;
    static attention_case c = {.shared = true,
                               .causal = true,
                               .q_start = {0, 4, 9},
                               .k_start = {0, 4, 9},
                               .p_start = {0, 16, 41},
                               .q_count = {4, 5, 1},
                               .k_count = {4, 5, 1}};
    check_attention(&c);
}
static void attention_cross(void **state) {
    (void)state;
    static attention_case c = {.q_start = {0, 4, 8},
                               .k_start = {0, 6, 6},
                               .p_start = {0, 24, 24},
                               .q_count = {4, 4, 2},
                               .k_count = {6, 0, 7}}; /* the second has no keys */
    check_attention(&c);
}

/* --- loss */
enum { LOSS_E = 7, LOSS_PAIRS = 3 };
typedef struct loss_case {
    int top, label_count; /* 0 labels: the first of the top */
    sida_tkd tkd;
    uint16_t labels[LOSS_PAIRS * LOSS_E];
    float label_weights[LOSS_PAIRS * LOSS_E];
    double z[LOSS_PAIRS * LOSS_E], lambda, scale, logp[LOSS_PAIRS * LOSS_E];
    uint16_t ids[LOSS_PAIRS * LOSS_E];
} loss_case;

static double loss_objective(void *context) {
    const loss_case *c = context;
    double total = 0;
    for (int i = 0; i < LOSS_PAIRS; i++) {
        const double *z = c->z + i * LOSS_E, *logp = c->logp + i * c->top;
        const uint16_t *ids = c->ids + i * c->top;
        double sum = 0, mass = 0, inside = 0, teacher = 0, loss = 0;
        for (int e = 0; e < LOSS_E; e++) sum += exp(z[e]);
        for (int j = 0; j < c->top; j++) {
            mass += exp(logp[j]);
            inside += exp(z[ids[j]]);
        }
        if (c->tkd == SIDA_TKD_REST) {
            double whole = c->top == LOSS_E || mass > 1 ? mass : 1;
            for (int j = 0; j < c->top; j++) loss -= exp(logp[j]) / whole * (z[ids[j]] - log(sum));
            if (c->top < LOSS_E) {
                double outside = sum - inside;
                loss -= fmax(1 - mass / whole, 0) * (log(outside) - log(sum));
            }
        } else {
            for (int j = 0; j < c->top; j++) teacher += exp(logp[j]);
            for (int j = 0; j < c->top; j++)
                loss += fabs(exp(z[ids[j]]) / inside - exp(logp[j]) / teacher) / c->top;
        }
        if (c->label_count == 0) loss -= c->lambda * (z[ids[0]] - log(sum));
        for (int j = 0; j < c->label_count; j++) {
            int at = i * c->label_count + j;
            loss -= c->lambda * (double)c->label_weights[at] * (z[c->labels[at]] - log(sum));
        }
        total += loss;
    }
    return total * c->scale;
}

static void check_loss(sida_tkd tkd, int top, double shift, int labels) {
    static loss_case c;
    static float z[LOSS_PAIRS * LOSS_E], d[LOSS_PAIRS * LOSS_E];
    static uint16_t logp[LOSS_PAIRS * LOSS_E];
    double losses[LOSS_PAIRS], sum, teacher[LOSS_PAIRS * LOSS_E];
    c = (loss_case){.top = top, .label_count = labels, .tkd = tkd, .lambda = 0.4, .scale = 0.5};
    for (int i = 0; i < LOSS_PAIRS; i++)
        for (int j = 0; j < labels; j++) {
            c.labels[i * labels + j] = (uint16_t)((5 * j + i) % LOSS_E);
            c.label_weights[i * labels + j] =
                2 * (float)(labels - j) / (float)(labels * (labels + 1));
        }
    fill(c.z, LOSS_PAIRS * LOSS_E, 1.5, 31);
    fill(teacher, LOSS_PAIRS * LOSS_E, 1.5, 32);
    narrow(z, c.z, LOSS_PAIRS * LOSS_E);
    for (int i = 0; i < LOSS_PAIRS; i++) {
        bool taken[LOSS_E] = {false};
        double all = 0;
        for (int e = 0; e < LOSS_E; e++) all += exp(teacher[i * LOSS_E + e]);
        for (int j = 0; j < top; j++) {
            int best = -1;
            for (int e = 0; e < LOSS_E; e++)
                if (!taken[e] && (best < 0 || teacher[i * LOSS_E + e] > teacher[i * LOSS_E + best]))
                    best = e;
            taken[best] = true;
            c.ids[i * top + j] = (uint16_t)best;
            /* shift > 0: a list whose mass is above 1, as fp16 may round it */
            logp[i * top + j] =
                sida_f16_from_f32((float)(teacher[i * LOSS_E + best] - log(all) + shift));
            c.logp[i * top + j] = (double)sida_f16_to_f32(logp[i * top + j]);
        }
    }
    assert_int_equal(sida_loss(&sum, &(sida_loss_call){.d_logits = d,
                                                       .losses = losses,
                                                       .logits = z,
                                                       .top_ids = c.ids,
                                                       .top_logp = logp,
                                                       .labels = labels > 0 ? c.labels : NULL,
                                                       .label_weights = c.label_weights,
                                                       .label_count = labels,
                                                       .pairs = LOSS_PAIRS,
                                                       .experts = LOSS_E,
                                                       .top = top,
                                                       .tkd = tkd,
                                                       .lambda = (float)c.lambda,
                                                       .scale = (float)c.scale}),
                     SIDA_OK);
    near("loss", 0, sum * c.scale, loss_objective(&c));
    check("d_logits", loss_objective, &c, c.z, LOSS_PAIRS * LOSS_E, d);
}

static void loss_backward(void **state) {
    (void)state;
    check_loss(SIDA_TKD_REST, 3, 0, 0);
    check_loss(SIDA_TKD_REST, 6, 0.2, 0);
    check_loss(SIDA_TKD_REST, LOSS_E, 0, 1);
    check_loss(SIDA_TKD_REST, 1, 0, 0);
    check_loss(SIDA_TKD_REST, 4, 0, 3);
    check_loss(SIDA_TKD_L1_RENORM, 4, 0, 0);
    check_loss(SIDA_TKD_L1_RENORM, LOSS_E, 0, 2);
}

/* Far apart logits: nothing overflows, and the loss is what the largest terms say. */
static void loss_extremes(void **state) {
    (void)state;
    float z[4] = {1e4f, -1e4f, 0, 3e4f}, d[4];
    uint16_t ids[2] = {1, 0}, logp[2] = {sida_f16_from_f32(-0.5f), sida_f16_from_f32(-1.5f)};
    double losses[1], sum;
    assert_int_equal(sida_loss(&sum, &(sida_loss_call){.d_logits = d,
                                                       .losses = losses,
                                                       .logits = z,
                                                       .top_ids = ids,
                                                       .top_logp = logp,
                                                       .pairs = 1,
                                                       .experts = 4,
                                                       .top = 2,
                                                       .scale = 1}),
                     SIDA_OK);
    double expected = exp(-0.5) * 4e4 + exp(-1.5) * 2e4;
    assert_true(fabs(sum - expected) < 1e-3 * expected);
    for (int e = 0; e < 4; e++) assert_true(isfinite(d[e]));
    z[2] = NAN;
    assert_int_equal(sida_loss(&sum, &(sida_loss_call){.d_logits = d,
                                                       .losses = losses,
                                                       .logits = z,
                                                       .top_ids = ids,
                                                       .top_logp = logp,
                                                       .pairs = 1,
                                                       .experts = 4,
                                                       .top = 2,
                                                       .scale = 1}),
                     SIDA_OK);
    assert_false(isfinite(sum));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(linear_backward),  cmocka_unit_test(gemm_tiles),
        cmocka_unit_test(lstm_backward),    cmocka_unit_test(attention_self),
        cmocka_unit_test(attention_causal), cmocka_unit_test(attention_cross),
        cmocka_unit_test(loss_backward),    cmocka_unit_test(loss_extremes)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
