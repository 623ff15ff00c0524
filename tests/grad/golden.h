/* tests/grad/golden/train*.safetensors (tools/reference/train_golden.py) in memory. */
#ifndef SIDA_TESTS_GRAD_GOLDEN_H
#define SIDA_TESTS_GRAD_GOLDEN_H

#include "tests/test.h"

#include "formats/base/file.h"
#include "formats/safetensors.h"
#include "runtime/predictor/net.h"
#include "trainer/dataset.h"

#include <string.h>

enum { GOLDEN_TOP = 4, GOLDEN_EXPERTS = 6 };

typedef struct golden {
    sida_mapped_file map;
    sida_safetensors *file;
    sida_dataset data;
    sida_net *net;
} golden;

static inline const sida_tensor_view *golden_find(const golden *g, const char *name) {
    for (size_t i = 0; i < sida_safetensors_count(g->file); i++) {
        const sida_tensor_view *view = sida_safetensors_at(g->file, i);
        if (strcmp(view->name, name) == 0) return view;
    }
    fail_msg("the golden has no %s", name);
    return NULL;
}

/* A copy of an F32 or F16 tensor in F32; *count its elements. */
static inline float *golden_floats(const golden *g, const char *name, size_t *count) {
    const sida_tensor_view *view = golden_find(g, name);
    const bool half = view->dtype == SIDA_F16;
    assert_true(half || view->dtype == SIDA_F32);
    *count = view->bytes / (half ? 2 : sizeof(float));
    float *values = malloc(*count * sizeof *values + 1);
    if (!half) memcpy(values, view->data, view->bytes);
    for (size_t i = 0; half && i < *count; i++) {
        uint16_t bits;
        memcpy(&bits, (const char *)view->data + 2 * i, sizeof bits);
        values[i] = sida_f16_to_f32(bits);
    }
    return values;
}

static inline void golden_side(golden *g, int side, const char *prefix) {
    sida_dataset_side *s = &g->data.sides[side];
    char name[64];
    size_t count;
    snprintf(name, sizeof name, "%s.offsets", prefix);
    float *values = golden_floats(g, name, &count);
    g->data.sequences = (int32_t)count - 1;
    s->offsets = malloc(count * sizeof *s->offsets);
    for (size_t i = 0; i < count; i++) s->offsets[i] = (int64_t)values[i];
    free(values);
    snprintf(name, sizeof name, "%s.tokens", prefix);
    values = golden_floats(g, name, &count);
    s->tokens = (int64_t)count;
    s->ids = malloc(count * sizeof *s->ids);
    for (size_t i = 0; i < count; i++) s->ids[i] = (int32_t)values[i];
    free(values);
    snprintf(name, sizeof name, "%s.top_ids", prefix);
    values = golden_floats(g, name, &count);
    s->top_ids = malloc(count * sizeof *s->top_ids);
    for (size_t i = 0; i < count; i++) s->top_ids[i] = (uint16_t)values[i];
    free(values);
    snprintf(name, sizeof name, "%s.top_logp", prefix);
    const sida_tensor_view *view = golden_find(g, name);
    assert_int_equal(view->dtype, SIDA_F16);
    assert_int_equal(view->bytes, count * 2);
    s->top_logp = malloc(view->bytes);
    memcpy(s->top_logp, view->data, view->bytes);
    g->data.layers[side] = (int32_t)((int64_t)count / s->tokens / GOLDEN_TOP);
}

/* Puts the initial tensors back. */
static inline void golden_reset(golden *g) {
    for (int32_t i = 0; i < g->net->tensor_count; i++) {
        const sida_net_tensor *t = &g->net->tensors[i];
        char name[80];
        size_t count;
        snprintf(name, sizeof name, "initial.%s", t->name);
        float *values = golden_floats(g, name, &count);
        assert_int_equal(count, t->count);
        memcpy(t->data, values, count * sizeof *values);
        free(values);
    }
}

/* OPTIONS: two directions and softmax. */
typedef enum golden_kind { GOLDEN_PAPER, GOLDEN_OPTIONS, GOLDEN_TRANSFORMER } golden_kind;

static inline void golden_open(golden *g, golden_kind kind) {
    static const char *const paths[] = {"tests/grad/golden/train.safetensors",
                                        "tests/grad/golden/train_options.safetensors",
                                        "tests/grad/golden/train_transformer.safetensors"};
    const char *path = paths[kind];
    const bool options = kind == GOLDEN_OPTIONS, transformer = kind == GOLDEN_TRANSFORMER;
    memset(g, 0, sizeof *g);
    assert_int_equal(sida_file_map(&g->map, path), SIDA_OK);
    assert_int_equal(sida_safetensors_parse(&g->file, g->map.data, g->map.size, path), SIDA_OK);
    size_t count;
    const sida_tensor_view *table = golden_find(g, "embedding");
    g->data.path = strdup(path);
    g->data.vocabulary = (int32_t)table->shape[0];
    g->data.d_model = (int32_t)table->shape[1];
    g->data.embedding = golden_floats(g, "embedding", &count);
    g->data.experts = GOLDEN_EXPERTS;
    g->data.top_k = 1;
    g->data.top = GOLDEN_TOP;
    golden_side(g, 0, "encoder");
    golden_side(g, 1, "decoder");
    const sida_net_config config = {
        .kind = transformer ? SIDA_NET_TRANSFORMER : SIDA_NET_LSTM,
        .d_model = g->data.d_model,
        .hidden = (int32_t)golden_find(g, "initial.encoder.compress.weight")->shape[0],
        .lstm_layers = transformer ? 0 : 2,
        .blocks = transformer ? 2 : 0,
        .experts = GOLDEN_EXPERTS,
        .vocabulary = g->data.vocabulary,
        .layers = {g->data.layers[0], g->data.layers[1]},
        .attention = options ? SIDA_NET_SOFTMAX : SIDA_NET_SPARSEMAX,
        .bidirectional = options};
    assert_int_equal(sida_net_create(&g->net, &config), SIDA_OK);
    golden_reset(g);
}

static inline void golden_close(golden *g) {
    sida_net_destroy(g->net);
    sida_dataset_free(&g->data);
    sida_safetensors_destroy(g->file);
    sida_file_unmap(&g->map);
}

#endif
