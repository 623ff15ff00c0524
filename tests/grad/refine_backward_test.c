/* The gradient of a refinement's training step against differences.h: of every parameter, on a
 * model that chooses two experts, with the shapes and the last known layers of both sides. */
#include "tests/grad/differences.h"
#include "tests/train_data.h"
#include "tests/train_folder.h"

#include "formats/dtype.h"
#include "trainer/refine_step.h"

#include <string.h>

/* Several shards a side, the last one not full. */
enum { token_count = 75 };

typedef struct refined {
    const sida_refine *shapes;
    const sida_net *net;
    const sida_dataset *data;
    const float *features[2];
    sida_refine_tokens tokens;
    double lambda, weights[MAX]; /* weights: the refinement's parameters, in their order */
} refined;

/* -log of the softmax's share, TKD and cross-entropy of one pair: loss.c's `rest`. */
static double pair_loss(const refined *r, int side, int64_t pair, const double *scores) {
    const sida_dataset_side *s = &r->data->sides[side];
    const int experts = r->data->experts, top = r->data->top, k = r->data->top_k;
    double all = 0, inside = 0, taught = 0, loss = 0;
    for (int e = 0; e < experts; e++) all += exp(scores[e]);
    for (int i = 0; i < top; i++) {
        const double z = scores[s->top_ids[pair * top + i]];
        const double t = exp((double)sida_f16_to_f32(s->top_logp[pair * top + i]));
        inside += exp(z);
        taught += t;
        loss -= t * (z - log(all));
    }
    loss -= (1 - taught) * log((all - inside) / all);
    for (int j = 0; j < k; j++)
        loss -= r->lambda / k * (scores[s->experts[pair * k + j]] - log(all));
    return loss;
}

/* The double that stands for a parameter. */
static double at(const refined *r, const float *parameter) {
    return r->weights[parameter - r->shapes->parameters];
}

static double token_loss(const refined *r, int side, int64_t token) {
    const sida_refine_side *of = &r->shapes->sides[side];
    const sida_net_linear *heads = &r->net->trunks[side].heads;
    const int width = r->shapes->width, hidden = r->net->config.hidden;
    const int experts = r->data->experts, layers = r->data->layers[side], k = r->data->top_k;
    const float *f = r->features[side] + token * hidden;
    double sum[8] = {0}, scores[32], loss = 0;
    for (int c = 0; c < width; c++)
        for (int i = 0; i < hidden; i++)
            sum[c] += at(r, of->features.weight + c * hidden + i) * (double)f[i];
    for (int l = 0; l + 1 < layers; l++) {
        for (int j = 0; j < k; j++) {
            const int e = r->data->sides[side].experts[(token * layers + l) * k + j];
            for (int c = 0; c < width; c++)
                sum[c] += at(r, of->known + (l * experts + e) * width + c);
        }
        for (int m = l + 1; m < layers; m++) {
            for (int e = 0; e < experts; e++) {
                const int row = m * experts + e, own = row - experts;
                scores[e] = (double)heads->bias[row] + at(r, of->heads.bias + own);
                for (int i = 0; i < hidden; i++)
                    scores[e] += (double)heads->weight[row * hidden + i] * (double)f[i];
                for (int c = 0; c < width; c++)
                    scores[e] += fmax(0, sum[c] + at(r, of->bias + l * width + c)) *
                                 at(r, of->heads.weight + own * width + c);
            }
            loss += pair_loss(r, side, token * layers + m, scores);
        }
    }
    return loss;
}

static double mean_loss(void *context) {
    const refined *r = context;
    double sum = 0;
    int64_t pairs = 0;
    for (int side = 0; side < 2; side++)
        for (int i = 0; i < r->tokens.count[side]; i++) {
            sum += token_loss(r, side, r->tokens.index[side][i]);
            pairs += r->data->layers[side] * (r->data->layers[side] - 1) / 2;
        }
    return sum / (double)pairs;
}

/* turns: after so many a shard has had every layer as the last known one, once. */
static void compare(int first_layers, int second_layers, uint32_t turns) {
    static refined r;
    static float got[MAX];
    train_data d = train_data_default();
    d.sequences = 80;
    d.top_k = 2;
    d.layers[0] = first_layers;
    d.layers[1] = second_layers;
    train_data_write(&d, train_path);
    sida_dataset data;
    sida_net *net;
    sida_refine *refine;
    sida_refine_step *step;
    int32_t index[2][token_count];
    assert_int_equal(sida_dataset_load(&data, train_path, 0), SIDA_OK);
    const sida_net_config config = {.kind = SIDA_NET_LSTM,
                                    .d_model = data.d_model,
                                    .hidden = 5,
                                    .lstm_layers = 1,
                                    .experts = data.experts,
                                    .vocabulary = data.vocabulary,
                                    .layers = {first_layers, second_layers}};
    assert_int_equal(sida_net_create(&net, &config), SIDA_OK);
    sida_net_initialise(net, 4);
    assert_int_equal(sida_refine_create(&refine, &config, 3), SIDA_OK);
    assert_true(refine->parameter_count <= MAX);
    const int count = (int)refine->parameter_count;
    r = (refined){.shapes = refine, .net = net, .data = &data, .lambda = 0.5};
    fill(r.weights, count, 0.7, 5);
    narrow(refine->parameters, r.weights, count);
    sida_rng rng = sida_rng_seed(6);
    for (int side = 0; side < 2; side++) {
        const int64_t n = data.sides[side].tokens;
        if (data.layers[side] < 2) continue;
        float *all = calloc((size_t)(n * config.hidden), sizeof *all);
        for (int64_t i = 0; i < n * config.hidden; i++) all[i] = sida_rng_normal(&rng);
        r.features[side] = all;
        r.tokens.index[side] = index[side];
        r.tokens.count[side] = side == 0 ? token_count : 10;
        for (int i = 0; i < r.tokens.count[side]; i++)
            index[side][i] = (int32_t)sida_rng_below(&rng, (uint32_t)n);
    }
    assert_int_equal(sida_refine_step_create(&step, refine, net, &data, r.features, token_count,
                                             SIDA_TKD_REST, r.lambda),
                     SIDA_OK);
    double whole = 0, sum;
    int64_t all_pairs = 0, pairs;
    memset(got, 0, sizeof got);
    for (uint32_t t = 0; t < turns; t++) {
        r.tokens.turn = t;
        assert_int_equal(sida_refine_step_gradient(step, &sum, &pairs, &r.tokens), SIDA_OK);
        whole += sum;
        all_pairs += pairs;
        for (int i = 0; i < count; i++)
            got[i] += (float)pairs * sida_refine_step_get_gradient(step)->parameters[i];
    }
    for (int i = 0; i < count; i++) got[i] /= (float)all_pairs;
    near("loss", 0, whole / (double)all_pairs, mean_loss(&r));
    check("gradient", mean_loss, &r, r.weights, count, got);
    sida_refine_step_destroy(step);
    sida_refine_destroy(refine);
    sida_net_destroy(net);
    for (int side = 0; side < 2; side++) free((void *)(uintptr_t)r.features[side]);
    sida_dataset_free(&data);
}

static void both_sides(void **state) {
    (void)state;
    compare(3, 2, 1);
}

static void one_side(void **state) {
    (void)state;
    compare(1, 4, 1);
}

/* So many layers that a shard trains with every other one as the last known. */
static void many_layers(void **state) {
    (void)state;
    compare(7, 1, 2);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(both_sides), cmocka_unit_test(one_side),
                                       cmocka_unit_test(many_layers)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
