/* The backward of a Transformer's ops against differences.h, and of the whole network against
 * differences of its own forward pass. */
#include "tests/grad/differences.h"

#include "runtime/ops/attention.h"
#include "runtime/ops/norm.h"
#include "trainer/gradient.h"

#include <string.h>

/* --- RMS norm */
typedef struct norm_case {
    int n, d;
    double epsilon, x[MAX], w[MAX], d_out[MAX], out[MAX];
} norm_case;

static double norm_objective(void *context) {
    norm_case *c = context;
    double sum = 0;
    for (int i = 0; i < c->n; i++) {
        double squares = 0;
        for (int k = 0; k < c->d; k++) squares += c->x[i * c->d + k] * c->x[i * c->d + k];
        for (int k = 0; k < c->d; k++) {
            int at = i * c->d + k;
            c->out[at] = c->w[k] * c->x[at] / sqrt(squares / c->d + c->epsilon);
            sum += c->out[at] * c->d_out[at];
        }
    }
    return sum;
}

static void norm_backward(void **state) {
    (void)state;
    static norm_case c = {.n = 5, .d = 13};
    static float x[MAX], w[MAX], d_out[MAX], out[MAX];
    c.epsilon = (double)0.25f; /* large enough to be seen */
    fill(c.x, c.n * c.d, 1, 31);
    fill(c.w, c.d, 1, 32);
    fill(c.d_out, c.n * c.d, 1, 33);
    narrow(x, c.x, c.n * c.d);
    narrow(w, c.w, c.d);
    narrow(d_out, c.d_out, c.n * c.d);
    const sida_weight weight = {w, SIDA_F32, 1, c.d};
    assert_int_equal(sida_rms_norm_cpu(NULL, out, SIDA_F32, x, weight, c.n, 0.25f), SIDA_OK);
    norm_objective(&c);
    for (int i = 0; i < c.n * c.d; i++) near("out", i, (double)out[i], c.out[i]);
    /* Once for both gradients, once for each alone: outputs are added to, NULL is left out. */
    static float d_x[MAX], d_w[MAX];
    sida_rms_norm_backward_call call = {.d_x = d_x,
                                        .d_weight = d_w,
                                        .d_out = d_out,
                                        .x = x,
                                        .weight = weight,
                                        .n = c.n,
                                        .epsilon = 0.25f};
    sida_rms_norm_backward_cpu(&call);
    call.d_x = NULL;
    sida_rms_norm_backward_cpu(&call);
    call.d_x = d_x;
    call.d_weight = NULL;
    sida_rms_norm_backward_cpu(&call);
    for (int i = 0; i < c.n * c.d; i++) d_x[i] /= 2;
    for (int i = 0; i < c.d; i++) d_w[i] /= 2;
    check("d_x", norm_objective, &c, c.x, c.n * c.d, d_x);
    check("d_weight", norm_objective, &c, c.w, c.d, d_w);
}

/* --- T5 attention: both ways, causal, and over another sequence's keys without positions. Keys and
 * values stand side by side; more columns than are used lie between the rows. */
enum { SEQUENCES = 4, HEADS = 2, WIDTH = 5, BUCKETS = 8, DISTANCE = 6 };
enum { QUERIES = 16, KEYS = 20, LDQ = HEADS * WIDTH + 3, LDK = 2 * HEADS * WIDTH + 1 };
typedef struct attention_case {
    bool causal, positions;
    int64_t q_start[SEQUENCES], k_start[SEQUENCES];
    int32_t q_count[SEQUENCES], k_count[SEQUENCES], q_position[SEQUENCES];
    double q[QUERIES * LDQ], kv[KEYS * LDK], bias[BUCKETS * HEADS], d[QUERIES * LDQ],
        out[QUERIES * LDQ];
} attention_case;

static double attention_objective(void *context) {
    attention_case *c = context;
    double sum = 0;
    for (int s = 0; s < SEQUENCES; s++)
        for (int h = 0; h < HEADS; h++)
            for (int i = 0; i < c->q_count[s]; i++) {
                int64_t at = (c->q_start[s] + i) * LDQ + h * WIDTH;
                int position = c->q_position[s] + i;
                double p[KEYS], total = 0;
                for (int j = 0; j < c->k_count[s]; j++) {
                    const double *k = c->kv + (c->k_start[s] + j) * LDK + h * WIDTH;
                    double score = 0;
                    for (int w = 0; w < WIDTH; w++) score += c->q[at + w] * k[w];
                    if (c->positions)
                        score += c->bias[sida_relative_bucket(j - position, !c->causal, BUCKETS,
                                                              DISTANCE) *
                                             HEADS +
                                         h];
                    p[j] = c->causal && j > position ? 0 : exp(score);
                    total += p[j];
                }
                for (int w = 0; w < WIDTH; w++) {
                    c->out[at + w] = 0;
                    for (int j = 0; j < c->k_count[s]; j++)
                        c->out[at + w] +=
                            p[j] / total *
                            c->kv[(c->k_start[s] + j) * LDK + (HEADS + h) * WIDTH + w];
                    sum += c->out[at + w] * c->d[at + w];
                }
            }
    return sum;
}

static void check_attention(attention_case *c) {
    static float q[QUERIES * LDQ], kv[KEYS * LDK], bias[BUCKETS * HEADS], d[QUERIES * LDQ],
        out[QUERIES * LDQ], d_q[QUERIES * LDQ], d_kv[KEYS * LDK], d_bias[BUCKETS * HEADS];
    memset(out, 0, sizeof out);
    memset(d_q, 0, sizeof d_q);
    memset(d_kv, 0, sizeof d_kv);
    memset(d_bias, 0, sizeof d_bias);
    fill(c->q, QUERIES * LDQ, 0.7, 41);
    fill(c->kv, KEYS * LDK, 0.7, 42);
    fill(c->bias, BUCKETS * HEADS, 0.7, 43);
    fill(c->d, QUERIES * LDQ, 1, 44);
    narrow(q, c->q, QUERIES * LDQ);
    narrow(kv, c->kv, KEYS * LDK);
    narrow(bias, c->bias, BUCKETS * HEADS);
    narrow(d, c->d, QUERIES * LDQ);
    const sida_attention_call call = {
        .out = out,
        .q = q,
        .k = kv,
        .v = kv + HEADS * WIDTH,
        .ldo = LDQ,
        .ldq = LDQ,
        .ldk = LDK,
        .ldv = LDK,
        .sequences = SEQUENCES,
        .heads = HEADS,
        .d_kv = WIDTH,
        .rows = QUERIES,
        .q_start = c->q_start,
        .k_start = c->k_start,
        .q_count = c->q_count,
        .k_count = c->k_count,
        .q_position = c->q_position,
        .causal = c->causal,
        .bias = {c->positions ? bias : NULL, SIDA_F32, BUCKETS, HEADS},
        .bias_bidirectional = !c->causal,
        .bias_max_distance = DISTANCE,
    };
    assert_int_equal(sida_attention_cpu(NULL, &call), SIDA_OK);
    attention_objective(c);
    for (int i = 0; i < QUERIES * LDQ; i++) near("out", i, (double)out[i], c->out[i]);
    assert_int_equal(sida_attention_backward_cpu(
                         &(sida_attention_backward_call){.d_q = d_q,
                                                         .d_k = d_kv,
                                                         .d_v = d_kv + HEADS * WIDTH,
                                                         .d_bias = c->positions ? d_bias : NULL,
                                                         .d_out = d,
                                                         .forward = &call}),
                     SIDA_OK);
    check("d_q", attention_objective, c, c->q, QUERIES * LDQ, d_q);
    check("d_k and d_v", attention_objective, c, c->kv, KEYS * LDK, d_kv);
    check("d_bias", attention_objective, c, c->bias, BUCKETS * HEADS, d_bias);
}

static void attention_both_ways(void **state) {
    (void)state;
    static attention_case c = {.positions = true,
                               .q_start = {0, 9, 9, 15},
                               .k_start = {0, 9, 9, 15},
                               .q_count = {9, 0, 6, 1},
                               .k_count = {9, 0, 6, 1}};
    check_attention(&c);
}
static void attention_causal(void **state) {
    (void)state;
    static attention_case c = {.positions = true,
                               .causal = true,
                               .q_start = {0, 9, 9, 12},
                               .k_start = {0, 9, 9, 15},
                               .q_count = {9, 0, 3, 1},
                               .k_count = {9, 0, 6, 5},
                               .q_position = {0, 0, 3, 4}};
    check_attention(&c);
}
static void attention_cross(void **state) {
    (void)state;
    static attention_case c = {.q_start = {0, 7, 7, 9},
                               .k_start = {12, 8, 0, 8},
                               .q_count = {7, 0, 2, 3},
                               .k_count = {8, 4, 7, 0}};
    check_attention(&c);
}

/* --- the network: along each tensor's gradient the objective, Σ d logits, must rise as its length
 * says. The forward pass is fp32, so that differences are good to about 1e-3 of it; 1e-2 of it and
 * 2e-3, where a tensor has almost no influence, are far below what a wrong term makes. */
enum { VOCABULARY = 30, D_MODEL = 12, BATCH = 5, MOST = 64 };
typedef struct network {
    sida_net *net;
    sida_net_pass *pass;
    float embedding[VOCABULARY * D_MODEL];
    int32_t ids[2][MOST];
    int64_t offsets[2][BATCH + 1];
    float *d_logits[2];
} network;

static double network_objective(network *t) {
    double sum = 0;
    const sida_weight embedding = {t->embedding, SIDA_F32, VOCABULARY, D_MODEL};
    assert_int_equal(
        sida_net_encode(t->pass, embedding, &(sida_ragged){BATCH, t->offsets[0], t->ids[0]}),
        SIDA_OK);
    if (t->net->trunks[1].present)
        assert_int_equal(
            sida_net_decode(t->pass, embedding, &(sida_ragged){BATCH, t->offsets[1], t->ids[1]}),
            SIDA_OK);
    for (int side = 0; side < 2; side++)
        for (int64_t i = 0; t->net->trunks[side].present &&
                            i < t->offsets[side][BATCH] * t->net->trunks[side].heads.rows;
             i++)
            sum += (double)t->pass->sides[side].logits[i] * (double)t->d_logits[side][i];
    return sum;
}

static void check_network(int32_t encoder_layers, int32_t decoder_layers) {
    static const int32_t lengths[2][BATCH] = {{9, 0, 1, 17, 3}, {4, 2, 1, 7, 0}};
    const sida_net_config config = {.kind = SIDA_NET_TRANSFORMER,
                                    .d_model = D_MODEL,
                                    .hidden = 64,
                                    .blocks = 2,
                                    .experts = 6,
                                    .vocabulary = VOCABULARY,
                                    .layers = {encoder_layers, decoder_layers}};
    static network t;
    sida_net *gradient;
    sida_gradient_workspace workspace = {0};
    sida_rng rng = sida_rng_seed(51);
    assert_int_equal(sida_net_create(&t.net, &config), SIDA_OK);
    assert_int_equal(sida_net_create(&gradient, &config), SIDA_OK);
    assert_int_equal(sida_net_pass_create(&t.pass, t.net, true), SIDA_OK);
    sida_net_initialise(t.net, 3);
    for (int64_t i = 0; i < t.net->parameter_count; i++)
        t.net->parameters[i] += 0.05f * sida_rng_normal(&rng);
    for (int i = 0; i < VOCABULARY * D_MODEL; i++) t.embedding[i] = sida_rng_normal(&rng);
    for (int side = 0; side < 2; side++) {
        for (int s = 0; s < BATCH; s++)
            t.offsets[side][s + 1] =
                t.offsets[side][s] + (t.net->trunks[side].present ? lengths[side][s] : 0);
        for (int64_t i = 0; i < t.offsets[side][BATCH]; i++)
            t.ids[side][i] = (int32_t)sida_rng_below(&rng, VOCABULARY);
        int64_t count = t.offsets[side][BATCH] * t.net->trunks[side].heads.rows;
        t.d_logits[side] = malloc((size_t)(count + 1) * sizeof(float));
        for (int64_t i = 0; i < count; i++) t.d_logits[side][i] = 0.1f * sida_rng_normal(&rng);
    }
    network_objective(&t);
    const float *d_logits[2] = {encoder_layers > 0 ? t.d_logits[0] : NULL,
                                decoder_layers > 0 ? t.d_logits[1] : NULL};
    assert_int_equal(sida_gradient_add(gradient, &workspace, t.pass, d_logits), SIDA_OK);
    for (int32_t i = 0; i < t.net->tensor_count; i++) {
        const sida_net_tensor *at = &t.net->tensors[i], *g = &gradient->tensors[i];
        double squares = 0, values[2];
        for (int64_t k = 0; k < g->count; k++) squares += (double)g->data[k] * (double)g->data[k];
        assert_true(squares > 0);
        const double length = sqrt(squares), step = 0.002;
        float *held = malloc((size_t)at->count * sizeof *held);
        memcpy(held, at->data, (size_t)at->count * sizeof *held);
        for (int way = 0; way < 2; way++) {
            for (int64_t k = 0; k < at->count; k++)
                at->data[k] = held[k] + (float)((way ? step : -step) * (double)g->data[k] / length);
            values[way] = network_objective(&t);
        }
        memcpy(at->data, held, (size_t)at->count * sizeof *held);
        free(held);
        double rise = (values[1] - values[0]) / (2 * step);
        if (!(fabs(rise - length) <= 1e-2 * length + 2e-3))
            fail_msg("%s: rises by %g, its gradient's length is %g", at->name, rise, length);
    }
    sida_gradient_workspace_free(&workspace);
    for (int side = 0; side < 2; side++) free(t.d_logits[side]);
    sida_net_pass_destroy(t.pass);
    sida_net_destroy(gradient);
    sida_net_destroy(t.net);
}

static void whole_network(void **state) {
    (void)state;
    check_network(2, 1);
    check_network(0, 2);
    check_network(3, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(norm_backward), cmocka_unit_test(attention_both_ways),
        cmocka_unit_test(attention_causal), cmocka_unit_test(attention_cross),
        cmocka_unit_test(whole_network)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
