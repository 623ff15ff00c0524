#include "trainer/calibrate.h"

#include "formats/base/memory.h"

#include <math.h>
#include <stdlib.h>

enum { steps = 32, grid = 2 * steps + 1, batch_tokens = 4096 };

/* Step 0 is T = 1. */
static double temperature_of(int step) {
    return exp2((double)step / 16);
}

/* The grid from T = 1 outwards: of equally good ones the first, which changes least. */
static int step_of(int place) {
    return place % 2 ? (place + 1) / 2 : -(place / 2);
}

/* What softmax(scores / T) applies to the router's best; highest: of the scores. */
static double factor_at(const float *scores, int32_t experts, const uint16_t *truth, int32_t k,
                        bool renormalised, float highest, float inverse) {
    double sum = 0;
    if (renormalised) { /* relative to the best: all may be nothing beside the highest */
        for (int32_t j = 0; j < k; j++)
            sum += (double)expf((scores[truth[j]] - scores[truth[0]]) * inverse);
        return 1 / sum;
    }
    for (int32_t e = 0; e < experts; e++) sum += (double)expf((scores[e] - highest) * inverse);
    return (double)expf((scores[truth[0]] - highest) * inverse) / sum;
}

/* Adds a layer's pairs to errors [grid]. logits: of the tokens from `first` on. */
static void add_layer(double *errors, const sida_dataset *data, int side, int32_t layer,
                      const float *logits, int64_t first, int64_t tokens) {
    const sida_dataset_side *s = &data->sides[side];
    int32_t layers = data->layers[side], experts = data->experts, k = data->top_k;
    float inverse[grid];
    for (int p = 0; p < grid; p++) inverse[p] = (float)(1 / temperature_of(step_of(p)));
    for (int64_t i = 0; i < tokens; i++) {
        int64_t pair = (first + i) * layers + layer;
        if (s->dropped[pair] || !sida_dataset_is_content(s, first + i)) continue;
        const float *scores = logits + (i * layers + layer) * experts;
        float highest = scores[0];
        for (int32_t e = 1; e < experts; e++) highest = fmaxf(highest, scores[e]);
        for (int p = 0; p < grid; p++)
            errors[p] += fabs(factor_at(scores, experts, s->experts + pair * k, k,
                                        data->renormalised, highest, inverse[p]) -
                              (double)s->alpha[pair * k]);
    }
}

/* A layer's sums are one thread's, in the order of the tokens. */
static void add_side(double *errors, const sida_dataset *data, int side, const sida_net_pass *pass,
                     int64_t first, int64_t tokens) {
#pragma omp parallel for schedule(static)
    for (int32_t l = 0; l < data->layers[side]; l++)
        add_layer(errors + (int64_t)l * grid, data, side, l, pass->sides[side].logits, first,
                  tokens);
}

/* The distances of every layer at every temperature; errors: [layers of both sides, grid], zero. */
static sida_status measure(double *errors, const sida_net *net, const sida_dataset *data) {
    sida_status status = SIDA_OK;
    sida_net_pass *pass = NULL;
    int64_t *offsets = NULL;
    const sida_weight embedding = sida_dataset_embedding(data);
    SIDA_TRY(SIDA_ALLOC(&offsets, (size_t)data->sequences + 1, "a calibration"));
    SIDA_TRY(sida_net_pass_create(&pass, net, false));
    for (int32_t first = 0, last; first < data->sequences; first = last) {
        last = sida_dataset_batch_end(data, first, batch_tokens);
        for (int side = 0; side < 2; side++) {
            sida_ragged tokens = sida_dataset_slice(data, side, first, last, offsets);
            if (side == 0)
                SIDA_TRY(sida_net_encode(pass, embedding, &tokens));
            else if (data->layers[1] > 0)
                SIDA_TRY(sida_net_decode(pass, embedding, &tokens));
            add_side(side ? errors + (int64_t)data->layers[0] * grid : errors, data, side, pass,
                     data->sides[side].offsets[first], sida_ragged_tokens(&tokens));
        }
    }
out:
    sida_net_pass_destroy(pass);
    free(offsets);
    return status;
}

static void divide_rows(sida_net_linear *heads, int32_t layer, int32_t experts, double by) {
    int64_t from = (int64_t)layer * experts, to = from + experts;
    for (int64_t i = from * heads->cols; i < to * heads->cols; i++)
        heads->weight[i] = (float)((double)heads->weight[i] / by);
    for (int64_t i = from; i < to; i++) heads->bias[i] = (float)((double)heads->bias[i] / by);
}

sida_status sida_calibrate(double *temperatures, sida_net *net, const sida_dataset *data) {
    sida_status status = SIDA_OK;
    double *errors = NULL;
    SIDA_TRY(
        SIDA_ALLOC(&errors, (size_t)(data->layers[0] + data->layers[1]) * grid, "a calibration"));
    SIDA_TRY(measure(errors, net, data));
    for (int side = 0, at = 0; side < 2; side++)
        for (int32_t l = 0; l < data->layers[side]; l++, at++) {
            const double *row = errors + (int64_t)at * grid;
            int best = 0;
            for (int p = 1; p < grid; p++)
                if (row[p] < row[best]) best = p;
            temperatures[at] = temperature_of(step_of(best));
            divide_rows(&net->trunks[side].heads, l, data->experts, temperatures[at]);
        }
out:
    free(errors);
    return status;
}

json_t *sida_temperatures_to_json(const double *temperatures, const int32_t layers[2]) {
    static const char *const names[2] = {"encoder", "decoder"};
    json_t *root = json_object();
    for (int side = 0, at = 0; side < 2; side++) {
        json_t *list = json_array();
        for (int32_t l = 0; l < layers[side]; l++)
            json_array_append_new(list, json_real(temperatures[at++]));
        if (layers[side] > 0) json_object_set(root, names[side], list);
        json_decref(list);
    }
    return root;
}
