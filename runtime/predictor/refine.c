#include "runtime/predictor/refine.h"

#include "formats/base/memory.h"
#include "runtime/predictor/net_private.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Visits the tensors in their order. With refine->tensors NULL it only counts. */
static void add(sida_refine *refine, float **view, int side, const char *name, int rank,
                int64_t rows, int64_t cols, float bound) {
    static const char *const sides[2] = {"encoder", "decoder"};
    const int64_t count = rows * cols;
    if (refine->tensors) {
        sida_net_tensor *t = &refine->tensors[refine->tensor_count];
        snprintf(t->name, sizeof t->name, "%s.refine.%s", sides[side], name);
        t->rank = rank;
        t->shape[0] = rows;
        t->shape[1] = cols;
        t->count = count;
        t->bound = bound;
        t->data = *view = refine->parameters ? refine->parameters + refine->parameter_count : NULL;
    }
    refine->tensor_count++;
    refine->parameter_count += count;
}

/* Uniform within ± this: a standard deviation of 1/sqrt(width). */
static float initial_bound(int32_t width) {
    return sqrtf(3.0f / (float)width);
}

static void lay_out(sida_refine *refine) {
    const sida_net_config *c = &refine->net;
    const int64_t width = refine->width;
    refine->tensor_count = 0;
    refine->parameter_count = 0;
    for (int side = 0; side < 2; side++) {
        sida_refine_side *to = &refine->sides[side];
        const int64_t steps = c->layers[side] - 1, outputs = steps * c->experts;
        to->present = steps > 0;
        if (!to->present) continue;
        to->features.rows = to->heads.cols = width;
        to->features.cols = c->hidden;
        to->heads.rows = outputs;
        add(refine, &to->features.weight, side, "features.weight", 2, width, c->hidden,
            initial_bound(c->hidden));
        add(refine, &to->bias, side, "bias", 2, steps, width, 0);
        add(refine, &to->known, side, "known", 2, outputs, width, initial_bound(refine->width));
        add(refine, &to->heads.weight, side, "heads.weight", 2, outputs, width, 0);
        add(refine, &to->heads.bias, side, "heads.bias", 1, outputs, 1, 0);
    }
}

static sida_status check(const sida_net_config *net, int32_t width) {
    sida_status status = sida_net_config_check(net);
    if (status != SIDA_OK) return status;
    if (width < 1 || width > SIDA_REFINE_WIDTH_MAX)
        return sida_fail(SIDA_ERROR_ARGUMENT, "a width of %d: a refinement has 1 to %d", width,
                         SIDA_REFINE_WIDTH_MAX);
    if (net->layers[0] < 2 && net->layers[1] < 2)
        return sida_fail(SIDA_ERROR_ARGUMENT,
                         "a refinement needs two MoE layers on a side: this network's have %d and "
                         "%d",
                         net->layers[0], net->layers[1]);
    return SIDA_OK;
}

sida_status sida_refine_create(sida_refine **out, const sida_net_config *net, int32_t width) {
    *out = NULL;
    sida_status status = SIDA_OK;
    sida_refine *refine = NULL;
    SIDA_TRY(check(net, width));
    SIDA_TRY(SIDA_ALLOC(&refine, 1, "a refinement"));
    refine->net = *net;
    refine->width = width;
    lay_out(refine);
    SIDA_TRY(SIDA_ALLOC(&refine->tensors, refine->tensor_count, "a refinement's tensors"));
    SIDA_TRY(SIDA_ALLOC(&refine->parameters, refine->parameter_count, "a refinement's parameters"));
    lay_out(refine);
    *out = refine;
    refine = NULL;
out:
    sida_refine_destroy(refine);
    return status;
}

void sida_refine_destroy(sida_refine *refine) {
    if (!refine) return;
    free(refine->parameters);
    free(refine->tensors);
    free(refine);
}

void sida_refine_initialise(sida_refine *refine, uint64_t seed) {
    sida_net_tensors_initialise(refine->tensors, refine->tensor_count, seed);
}

/* --- files */

sida_status sida_refine_write(sida_h5_file *file, const sida_refine *refine) {
    return sida_net_tensors_write(file, refine->tensors, refine->tensor_count);
}

sida_status sida_refine_read(sida_refine **out, sida_h5_file *file, const json_t *config,
                             const sida_net_config *net) {
    *out = NULL;
    sida_status status = SIDA_OK;
    sida_refine *refine = NULL, shapes = {.net = *net};
    const json_t *about = json_object_get(config, "refine"),
                 *width = json_object_get(about, "width");
    if (!about) return SIDA_OK;
    if (!json_is_integer(width) || json_integer_value(width) < 1 ||
        json_integer_value(width) > SIDA_REFINE_WIDTH_MAX)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: its config's refine.width is no whole number of 1 to %d",
                  sida_h5_path(file), SIDA_REFINE_WIDTH_MAX);
    shapes.width = (int32_t)json_integer_value(width);
    if (check(net, shapes.width) != SIDA_OK) {
        status = sida_fail_context(SIDA_ERROR_FORMAT, "%s", sida_h5_path(file));
        goto out;
    }
    /* Shapes alone first: a small file must not make us take much memory. */
    lay_out(&shapes);
    SIDA_TRY(SIDA_ALLOC(&shapes.tensors, shapes.tensor_count, "a refinement's tensors"));
    lay_out(&shapes);
    SIDA_TRY(sida_net_tensors_check(file, shapes.tensors, shapes.tensor_count));
    SIDA_TRY(sida_refine_create(&refine, net, shapes.width));
    SIDA_TRY(sida_net_tensors_read(file, refine->tensors, refine->tensor_count));
    *out = refine;
    refine = NULL;
out:
    sida_refine_destroy(refine);
    free(shapes.tensors);
    return status;
}

/* --- what a token is told */

/* Below this many floats a loop over tokens is one thread's. */
enum { parallel_floats = 1 << 15 };

sida_status sida_refine_begin(const sida_refine *refine, int side, float *sum, const float *f,
                              int64_t n) {
    const sida_refine_side *of = &refine->sides[side];
    assert(of->present);
    return sida_linear_cpu(NULL, &(sida_linear_call){.y = sum,
                                                     .ldy = of->features.rows,
                                                     .x = f,
                                                     .ldx = of->features.cols,
                                                     .n = n,
                                                     .weight = sida_net_weight(&of->features),
                                                     .scale = 1});
}

void sida_refine_know(const sida_refine *refine, int side, int32_t layer, float *sum,
                      const int32_t *experts, int32_t k, int64_t n) {
    const int64_t width = refine->width;
    const float *known = refine->sides[side].known + (int64_t)layer * refine->net.experts * width;
    assert(refine->sides[side].present && layer >= 0 && layer < refine->net.layers[side] - 1);
#pragma omp parallel for schedule(static) if (n * k * width > parallel_floats)
    for (int64_t i = 0; i < n; i++)
        for (int32_t j = 0; j < k; j++) {
            const float *row = known + experts[i * k + j] * width;
            float *to = sum + i * width;
            for (int64_t c = 0; c < width; c++) to[c] += row[c];
        }
}

sida_status sida_refine_scores(const sida_refine *refine, int side, int32_t layer, float *scores,
                               float *z, const float *sum, const float *s, int64_t n) {
    const sida_refine_side *of = &refine->sides[side];
    const int32_t layers = refine->net.layers[side], experts = refine->net.experts;
    const int64_t width = refine->width, skipped = (int64_t)(layer + 1) * experts;
    const int64_t all = (int64_t)layers * experts, rest = all - skipped;
    const float *bias = of->bias + layer * width;
    assert(of->present && layer >= 0 && layer < layers - 1);
#pragma omp parallel for schedule(static) if (n * (width + rest) > parallel_floats)
    for (int64_t i = 0; i < n; i++) {
        for (int64_t c = 0; c < width; c++) {
            const float value = sum[i * width + c] + bias[c];
            z[i * width + c] = value > 0 ? value : 0;
        }
        memcpy(scores + i * rest, s + i * all + skipped, (size_t)rest * sizeof *scores);
    }
    /* heads begin with layer 1's. */
    const int64_t first = (int64_t)layer * experts;
    return sida_linear_cpu(NULL, &(sida_linear_call){.y = scores,
                                                     .ldy = rest,
                                                     .x = z,
                                                     .ldx = width,
                                                     .n = n,
                                                     .weight = {of->heads.weight + first * width,
                                                                SIDA_F32, rest, width},
                                                     .bias = of->heads.bias + first,
                                                     .scale = 1,
                                                     .epilogue = SIDA_EPILOGUE_ADD});
}
