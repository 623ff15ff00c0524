/* The export against PyTorch: golden/predictor*.safetensors are exports of ours, and
 * golden/predictor*_outputs.safetensors what tools/reference/sida_predictor.py makes of them
 * (tools/reference/export_golden.py). Called with "write" it writes the former anew. */
#include "tests/test.h"

#include "formats/base/file.h"
#include "formats/base/rng.h"
#include "formats/safetensors.h"
#include "runtime/predictor/export.h"
#include "runtime/predictor/refine.h"

#include <math.h>
#include <string.h>
#include <unistd.h>

static char folder[] = "/tmp/sida-export-XXXXXX";
static char predictor_path[64], output_path[64];

/* The paper's network, the options of ours, and a Transformer; two with refinements. */
static const struct golden {
    const char *name;
    sida_net_config config;
    int32_t refine; /* its width; 0: none */
} goldens[] = {{.name = "predictor",
                .config = {.d_model = 10,
                           .hidden = 12,
                           .lstm_layers = 2,
                           .experts = 6,
                           .vocabulary = 20,
                           .layers = {2, 1}}},
               {.name = "predictor_softmax",
                .config = {.d_model = 10,
                           .hidden = 12,
                           .lstm_layers = 2,
                           .experts = 6,
                           .vocabulary = 20,
                           .layers = {2, 1},
                           .attention = SIDA_NET_SOFTMAX,
                           .bidirectional = true}},
               {.name = "predictor_none",
                .config = {.d_model = 10,
                           .hidden = 12,
                           .lstm_layers = 1,
                           .experts = 6,
                           .vocabulary = 20,
                           .layers = {2, 1},
                           .attention = SIDA_NET_NO_ATTENTION}},
               {.name = "predictor_transformer",
                .config = {.kind = SIDA_NET_TRANSFORMER,
                           .d_model = 10,
                           .hidden = 64,
                           .blocks = 1,
                           .experts = 6,
                           .vocabulary = 20,
                           .layers = {2, 1}}},
               {.name = "predictor_refine",
                .config = {.d_model = 10,
                           .hidden = 12,
                           .lstm_layers = 1,
                           .experts = 6,
                           .vocabulary = 20,
                           .layers = {3, 2}},
                .refine = 9},
               {.name = "predictor_transformer_refine",
                .config = {.kind = SIDA_NET_TRANSFORMER,
                           .d_model = 10,
                           .hidden = 32,
                           .blocks = 1,
                           .experts = 6,
                           .vocabulary = 20,
                           .layers = {2, 3}},
                .refine = 7}};
enum { GOLDENS = sizeof goldens / sizeof *goldens };

static void ok(sida_status status) {
    if (status != SIDA_OK) fail_msg("%s", sida_last_message());
}

static void refused(sida_status status, sida_status code, const char *words) {
    if (status != code || !strstr(sida_last_message(), words))
        fail_msg("%d instead of %d, '%s' does not say '%s'", status, code, sida_last_message(),
                 words);
}

/* A file in memory with its tensors by name. */
typedef struct tensors {
    sida_mapped_file map;
    sida_safetensors *file;
} tensors;

static tensors open_tensors(const char *path) {
    tensors t;
    ok(sida_file_map(&t.map, path));
    ok(sida_safetensors_parse(&t.file, t.map.data, t.map.size, path));
    return t;
}

static void close_tensors(tensors *t) {
    sida_safetensors_destroy(t->file);
    sida_file_unmap(&t->map);
}

static const sida_tensor_view *find(const tensors *t, const char *name) {
    for (size_t i = 0; i < sida_safetensors_count(t->file); i++)
        if (strcmp(sida_safetensors_at(t->file, i)->name, name) == 0)
            return sida_safetensors_at(t->file, i);
    fail_msg("no tensor %s", name);
    return NULL;
}

/* A copy: values in a file may be unaligned. */
static float *floats(const tensors *t, const char *name, int64_t count) {
    const sida_tensor_view *view = find(t, name);
    assert_int_equal(view->dtype, SIDA_F32);
    assert_int_equal(view->bytes, (size_t)count * sizeof(float));
    float *values = malloc(view->bytes);
    memcpy(values, view->data, view->bytes);
    return values;
}

static sida_net *make_net(const struct golden *g) {
    sida_net *net;
    ok(sida_net_create(&net, &g->config));
    sida_net_initialise(net, 41);
    /* Larger than initial values, so that SparseMax drops keys; none of a Transformer's is zero. */
    sida_rng rng = sida_rng_seed(42);
    for (int64_t i = 0; i < net->parameter_count; i++)
        if (g->config.kind == SIDA_NET_TRANSFORMER)
            net->parameters[i] += 0.1f * sida_rng_normal(&rng);
        else
            net->parameters[i] *= 3;
    return net;
}

/* NULL where there is none. */
static sida_refine *make_refine(const struct golden *g) {
    sida_refine *refine = NULL;
    if (g->refine == 0) return NULL;
    ok(sida_refine_create(&refine, &g->config, g->refine));
    sida_rng rng = sida_rng_seed(43);
    for (int64_t i = 0; i < refine->parameter_count; i++)
        refine->parameters[i] = 0.5f * sida_rng_normal(&rng);
    return refine;
}

static void write_predictor(const sida_net *net, const sida_refine *refine, const char *source,
                            sida_h5_kind kind, bool with_config) {
    sida_h5_file *file;
    json_t *root = json_object();
    if (refine)
        json_object_set_new(root, "refine", json_pack("{s:i}", "width", (int)refine->width));
    if (with_config) json_object_set_new(root, "net", sida_net_config_to_json(&net->config));
    const sida_predictor_meta meta = {{1, 2}, {3, 4}, (char *)(uintptr_t)source, root};
    ok(sida_predictor_file_create(&file, predictor_path, kind, &meta));
    ok(sida_net_write(file, net));
    if (refine) ok(sida_refine_write(file, refine));
    ok(sida_h5_commit(file));
    json_decref(root);
}

static int setup(void **state) {
    (void)state;
    if (!mkdtemp(folder)) return -1;
    snprintf(predictor_path, sizeof predictor_path, "%s/P.h5", folder);
    snprintf(output_path, sizeof output_path, "%s/P.safetensors", folder);
    return 0;
}

static int teardown(void **state) {
    (void)state;
    unlink(predictor_path);
    unlink(output_path);
    return rmdir(folder);
}

/* What PyTorch loaded is what we export: the same tensors and meta data, to the byte. */
static void check_export(const struct golden *g) {
    char golden_path[80];
    snprintf(golden_path, sizeof golden_path, "tests/unit/golden/%s.safetensors", g->name);
    sida_net *net = make_net(g);
    sida_refine *refine = make_refine(g);
    const int32_t refined = refine ? refine->tensor_count : 0;
    write_predictor(net, refine, sida_net_kind_name(g->config.kind), SIDA_H5_PREDICTOR, true);
    ok(sida_predictor_export(output_path, predictor_path));
    tensors ours = open_tensors(output_path), golden = open_tensors(golden_path);
    assert_int_equal(sida_safetensors_count(ours.file), net->tensor_count + refined);
    assert_int_equal(sida_safetensors_count(golden.file), net->tensor_count + refined);
    for (int32_t i = 0; i < net->tensor_count + refined; i++) {
        const sida_net_tensor *t =
            i < net->tensor_count ? &net->tensors[i] : &refine->tensors[i - net->tensor_count];
        const sida_tensor_view *views[2] = {find(&ours, t->name), find(&golden, t->name)};
        for (int k = 0; k < 2; k++) {
            assert_int_equal(views[k]->dtype, SIDA_F32);
            assert_int_equal(views[k]->rank, t->rank);
            for (int d = 0; d < t->rank; d++) assert_int_equal(views[k]->shape[d], t->shape[d]);
            assert_memory_equal(views[k]->data, t->data, (size_t)t->count * sizeof *t->data);
        }
    }
    const json_t *about = sida_safetensors_metadata(ours.file);
    assert_non_null(about);
    assert_string_equal(json_string_value(json_object_get(about, "source")),
                        sida_net_kind_name(g->config.kind));
    assert_string_equal(json_string_value(json_object_get(about, "model")),
                        "00000000000000010000000000000002");
    assert_string_equal(json_string_value(json_object_get(about, "tokenizer")),
                        "00000000000000030000000000000004");
    json_t *root = json_loads(json_string_value(json_object_get(about, "config")), 0, NULL);
    json_t *wanted = sida_net_config_to_json(&g->config);
    sida_net_config got;
    ok(sida_net_config_from_json(&got, json_object_get(root, "net"), output_path));
    json_t *back = sida_net_config_to_json(&got);
    assert_true(json_equal(back, wanted));
    assert_int_equal(got.attention, g->config.attention);
    assert_int_equal(got.bidirectional, g->config.bidirectional);
    json_decref(back);
    json_decref(wanted);
    json_decref(root);
    close_tensors(&ours);
    close_tensors(&golden);
    sida_refine_destroy(refine);
    sida_net_destroy(net);
}

static void same_as_golden(void **state) {
    (void)state;
    for (int i = 0; i < GOLDENS; i++) check_export(&goldens[i]);
}

/* Both compute in fp32, in other orders of summing: some 1e-6 of logits of order 1 to 10. */
static void near(const char *name, const char *what, const float *ours, const float *expected,
                 int64_t count) {
    double worst = 0, largest = 0;
    for (int64_t i = 0; i < count; i++) {
        worst = fmax(worst, fabs((double)ours[i] - (double)expected[i]));
        largest = fmax(largest, fabs((double)expected[i]));
    }
    printf("%s, %s: off by at most %.2g of %.2g\n", name, what, worst, largest);
    assert_true(largest > 0.5 && worst < 2e-5);
}

/* What a side's refinement says once the layers before are known, one after the other. */
static void check_refined(const struct golden *g, const sida_refine *refine, const tensors *golden,
                          int side, const char *side_name, const sida_net_activations *a) {
    enum { TOP_K = 2 };
    const int32_t layers = g->config.layers[side], experts = g->config.experts;
    const int64_t n = a->tokens;
    char name[32];
    snprintf(name, sizeof name, "%s.chosen", side_name);
    float *chosen = floats(golden, name, n * (layers - 1) * TOP_K);
    assert_in_range(refine->width, 1, 16);
    float sum[64 * 16], z[64 * 16], scores[64 * 2 * 6], all[64 * 3 * 6];
    ok(sida_refine_begin(refine, side, sum, a->mixed, n));
    for (int32_t layer = 0; layer < layers - 1; layer++) {
        const int64_t row = (int64_t)layers * experts, rest = (layers - 1 - layer) * experts;
        int32_t ids[64 * TOP_K];
        for (int64_t i = 0; i < n * TOP_K; i++)
            ids[i] = (int32_t)chosen[(i / TOP_K * (layers - 1) + layer) * TOP_K + i % TOP_K];
        sida_refine_know(refine, side, layer, sum, ids, TOP_K, n);
        ok(sida_refine_scores(refine, side, layer, scores, z, sum, a->logits, n));
        memcpy(all, a->logits, (size_t)(n * row) * sizeof *all);
        for (int64_t i = 0; i < n; i++)
            memcpy(all + (i + 1) * row - rest, scores + i * rest, (size_t)rest * sizeof *all);
        snprintf(name, sizeof name, "%s.refined%d", side_name, layer);
        float *expected = floats(golden, name, n * row);
        near(g->name, name, all, expected, n * row);
        free(expected);
    }
    free(chosen);
}

/* The network in C over the same inputs. */
static void check_outputs(const struct golden *g) {
    static const char *const names[2] = {"encoder", "decoder"};
    const sida_net_config *config = &g->config;
    char outputs_path[80];
    snprintf(outputs_path, sizeof outputs_path, "tests/unit/golden/%s_outputs.safetensors",
             g->name);
    tensors golden = open_tensors(outputs_path);
    float *table = floats(&golden, "embedding", config->vocabulary * config->d_model);
    const sida_weight embedding = {table, SIDA_F32, config->vocabulary, config->d_model};
    sida_net *net = make_net(g);
    sida_refine *refine = make_refine(g);
    sida_net_pass *pass;
    ok(sida_net_pass_create(&pass, net, false));
    for (int side = 0; side < 2; side++) {
        char name[32];
        snprintf(name, sizeof name, "%s.offsets", names[side]);
        int32_t sequences = (int32_t)find(&golden, name)->shape[0] - 1;
        float *values = floats(&golden, name, sequences + 1);
        int64_t offsets[16];
        assert_in_range(sequences, 2, 15);
        for (int32_t s = 0; s <= sequences; s++) offsets[s] = (int64_t)values[s];
        free(values);
        int64_t n = offsets[sequences], row = config->layers[side] * config->experts;
        int32_t ids[64];
        assert_in_range(n, 4, 64);
        snprintf(name, sizeof name, "%s.tokens", names[side]);
        values = floats(&golden, name, n);
        for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)values[i];
        free(values);
        const sida_ragged input = {sequences, offsets, ids};
        ok(side ? sida_net_decode(pass, embedding, &input)
                : sida_net_encode(pass, embedding, &input));
        snprintf(name, sizeof name, "%s.logits", names[side]);
        float *expected = floats(&golden, name, n * row);
        near(g->name, names[side], pass->sides[side].logits, expected, n * row);
        if (refine) check_refined(g, refine, &golden, side, names[side], &pass->sides[side]);
        free(expected);
    }
    sida_net_pass_destroy(pass);
    sida_refine_destroy(refine);
    sida_net_destroy(net);
    free(table);
    close_tensors(&golden);
}

static void same_outputs(void **state) {
    (void)state;
    for (int i = 0; i < GOLDENS; i++) check_outputs(&goldens[i]);
}

static void bad_input(void **state) {
    (void)state;
    sida_net *net = make_net(&goldens[0]);
    unlink(output_path);
    refused(sida_predictor_export(output_path, "/nonexistent/P.h5"), SIDA_ERROR_IO, "/nonexistent");
    write_predictor(net, NULL, "table", SIDA_H5_PREDICTOR, false);
    refused(sida_predictor_export(output_path, predictor_path), SIDA_ERROR_UNSUPPORTED,
            "a 'table' has no network");
    write_predictor(net, NULL, "lstm", SIDA_H5_PREDICTOR, false);
    refused(sida_predictor_export(output_path, predictor_path), SIDA_ERROR_FORMAT, "net.d_model");
    write_predictor(net, NULL, "lstm", SIDA_H5_CHECKPOINT, true);
    refused(sida_predictor_export(output_path, predictor_path), SIDA_ERROR_FORMAT, "checkpoint");
    write_predictor(net, NULL, "lstm", SIDA_H5_PREDICTOR, true);
    refused(sida_predictor_export("/nonexistent/P.safetensors", predictor_path), SIDA_ERROR_IO,
            "/nonexistent");
    assert_int_equal(access(output_path, F_OK), -1);
    sida_net_destroy(net);
}

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "write") == 0) {
        if (setup(NULL) != 0) return 1;
        sida_status status = SIDA_OK;
        for (int i = 0; i < GOLDENS && status == SIDA_OK; i++) {
            char path[80];
            snprintf(path, sizeof path, "tests/unit/golden/%s.safetensors", goldens[i].name);
            sida_net *net = make_net(&goldens[i]);
            sida_refine *refine = make_refine(&goldens[i]);
            write_predictor(net, refine, sida_net_kind_name(net->config.kind), SIDA_H5_PREDICTOR,
                            true);
            sida_refine_destroy(refine);
            sida_net_destroy(net);
            status = sida_predictor_export(path, predictor_path);
            if (status != SIDA_OK) fprintf(stderr, "%s\n", sida_last_message());
        }
        return teardown(NULL) != 0 || status != SIDA_OK;
    }
    const struct CMUnitTest tests[] = {cmocka_unit_test(same_as_golden),
                                       cmocka_unit_test(same_outputs), cmocka_unit_test(bad_input)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
