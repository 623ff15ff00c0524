/* The forward pass against Hugging Face Transformers 4.57 (CPU, fp32): tiny random checkpoints and
 * goldens made by tools/reference/make_parity.py.
 *
 * Tolerance 1e-4, relative to a tensor's largest value and to its norm: both sides sum in fp32 but
 * in another order, about 1e-6 a layer; a wrong formula shows at 1e-2 and more. Choices (experts,
 * drops, tokens) must agree exactly; the goldens have margins of 2e-3 or more. */
#include "formats/base/file.h"
#include "formats/base/memory.h"
#include "formats/safetensors.h"
#include "runtime/backend/backend.h"
#include "runtime/model/model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { NEW_TOKENS = 32, MAX_SITES = 8 };
static const double tolerance = 1e-4;

#define OK(call)                                                                                   \
    do {                                                                                           \
        sida_status got = (call);                                                                  \
        if (got != SIDA_OK) fail_msg("%s: %s", #call, sida_last_message());                        \
    } while (0)

/* --- golden files */
typedef struct golden {
    sida_mapped_file map;
    sida_safetensors *file;
} golden;

static const sida_tensor_view *golden_find(const golden *from, const char *name) {
    for (size_t i = 0; i < sida_safetensors_count(from->file); i++) {
        const sida_tensor_view *view = sida_safetensors_at(from->file, i);
        if (strcmp(view->name, name) == 0) return view;
    }
    fail_msg("no golden tensor %s", name);
    return NULL;
}

/* A copy of a tensor's values; free(). */
static float *golden_values(const golden *from, const char *name, int64_t *count) {
    const sida_tensor_view *view = golden_find(from, name);
    float *values = NULL;
    assert_int_equal(view->dtype, SIDA_F32);
    *count = (int64_t)(view->bytes / sizeof *values);
    OK(SIDA_ALLOC(&values, *count, name));
    memcpy(values, view->data, view->bytes);
    return values;
}

typedef struct ragged {
    sida_ragged view;
    int64_t *offsets;
    int32_t *ids;
} ragged;

static ragged golden_ragged(const golden *from, const char *side) {
    char name[64];
    int64_t sequences, tokens;
    ragged out;
    snprintf(name, sizeof name, "%s.lengths", side);
    float *lengths = golden_values(from, name, &sequences);
    snprintf(name, sizeof name, "%s.ids", side);
    float *ids = golden_values(from, name, &tokens);
    OK(SIDA_ALLOC(&out.offsets, sequences + 1, "offsets"));
    OK(SIDA_ALLOC(&out.ids, tokens, "ids"));
    for (int64_t s = 0; s < sequences; s++)
        out.offsets[s + 1] = out.offsets[s] + (int64_t)lengths[s];
    for (int64_t i = 0; i < tokens; i++) out.ids[i] = (int32_t)ids[i];
    assert_int_equal(out.offsets[sequences], tokens);
    out.view = (sida_ragged){(int32_t)sequences, out.offsets, out.ids};
    free(lengths);
    free(ids);
    return out;
}

static void ragged_free(ragged *batch) {
    free(batch->offsets);
    free(batch->ids);
}

static void expect_close(const char *what, const float *got, const float *want, int64_t count) {
    double most = 0, worst = 0, error = 0, norm = 0;
    for (int64_t i = 0; i < count; i++) {
        double difference = fabs((double)got[i] - (double)want[i]);
        assert_true(isfinite(got[i]));
        if (fabs((double)want[i]) > most) most = fabs((double)want[i]);
        if (difference > worst) worst = difference;
        error += difference * difference;
        norm += (double)want[i] * (double)want[i];
    }
    if (worst > tolerance * most || sqrt(error) > tolerance * sqrt(norm))
        fail_msg("%s: off by %g of %g at most, normalised error %g", what, worst, most,
                 sqrt(error / norm));
}

/* --- one pass over a batch, and what was seen on the way */
typedef struct seen {
    float *logits; /* [tokens, E] */
    int32_t *experts;
    uint8_t *dropped;
    float *alpha;
    int64_t tokens;
} seen;

typedef struct pass {
    seen sites[MAX_SITES];
    float *logits; /* [target tokens, vocabulary] */
    int32_t *ids;  /* [sequences, NEW_TOKENS] */
    bool recording;
} pass;

static sida_status record(void *context, const sida_moe_call *call) {
    pass *out = context;
    seen *site = &out->sites[call->site];
    if (!out->recording) return SIDA_OK;
    size_t logits = (size_t)(call->tokens * call->experts_total);
    assert_int_equal(call->k, 1);
    assert_int_equal(call->offsets[call->sequences], call->tokens);
    site->tokens = call->tokens;
    OK(SIDA_ALLOC(&site->logits, logits, "logits"));
    OK(SIDA_ALLOC(&site->experts, call->tokens, "experts"));
    OK(SIDA_ALLOC(&site->alpha, call->tokens, "alpha"));
    OK(SIDA_ALLOC(&site->dropped, call->tokens, "dropped"));
    memcpy(site->logits, call->logits, logits * sizeof *site->logits);
    memcpy(site->experts, call->experts, (size_t)call->tokens * sizeof *site->experts);
    memcpy(site->alpha, call->alpha, (size_t)call->tokens * sizeof *site->alpha);
    memcpy(site->dropped, call->dropped, (size_t)call->tokens);
    return SIDA_OK;
}

static void pass_free(pass *out) {
    for (int i = 0; i < MAX_SITES; i++) {
        free(out->sites[i].logits);
        free(out->sites[i].experts);
        free(out->sites[i].alpha);
        free(out->sites[i].dropped);
    }
    free(out->logits);
    free(out->ids);
}

/* Encoder, teacher-forced decoder, then greedy generation after encoding again. */
static pass run_pass(sida_model *model, sida_resident *resident, const sida_ragged *input,
                     const sida_ragged *target) {
    const sida_model_info *info = sida_model_get_info(model);
    pass out = {.recording = true};
    sida_run *run = NULL;
    int64_t targets = sida_ragged_tokens(target);
    sida_run_limits limits = {.sequences = input->sequences,
                              .input_tokens = sida_ragged_tokens(input),
                              .step_tokens =
                                  targets > input->sequences ? targets : input->sequences,
                              .decoder_positions = NEW_TOKENS};
    const sida_moe_driver *driver = sida_resident_driver(resident, &out, NULL, record);
    int32_t *counts = NULL;
    OK(sida_run_create(&run, model, &limits));
    OK(SIDA_ALLOC(&out.logits, targets * info->vocabulary, "logits"));
    OK(SIDA_ALLOC(&out.ids, input->sequences * NEW_TOKENS, "ids"));
    OK(SIDA_ALLOC(&counts, input->sequences, "counts"));
    OK(sida_run_encode(run, input, driver));
    OK(sida_run_decode(run, target, driver));
    OK(sida_run_read_logits(run, 0, targets, out.logits));
    out.recording = false;
    OK(sida_run_encode(run, input, driver));
    sida_generate_options options = {.max_new_tokens = NEW_TOKENS};
    OK(sida_run_generate(run, &options, driver, out.ids, counts));
    for (int32_t s = 0; s < input->sequences; s++) assert_int_equal(counts[s], NEW_TOKENS);
    free(counts);
    sida_run_destroy(run);
    return out;
}

static void expect_golden(const golden *from, const sida_model_info *info, const pass *got,
                          int64_t target_tokens) {
    static const char *const sides[] = {"encoder", "decoder"};
    char name[64];
    int64_t count;
    for (int32_t site = 0; site < info->sites; site++) {
        int side = site >= info->moe_layers[0];
        int32_t layer = site - (side ? info->moe_layers[0] : 0);
        const seen *have = &got->sites[site];
        snprintf(name, sizeof name, "%s.%d.logits", sides[side], layer);
        float *want = golden_values(from, name, &count);
        assert_int_equal(count, have->tokens * info->experts);
        expect_close(name, have->logits, want, count);
        free(want);
        snprintf(name, sizeof name, "%s.%d.expert", sides[side], layer);
        want = golden_values(from, name, &count);
        for (int64_t i = 0; i < count; i++) assert_int_equal(have->experts[i], (int32_t)want[i]);
        free(want);
        snprintf(name, sizeof name, "%s.%d.dropped", sides[side], layer);
        want = golden_values(from, name, &count);
        for (int64_t i = 0; i < count; i++) assert_int_equal(have->dropped[i], want[i] != 0.0f);
        free(want);
    }
    float *want = golden_values(from, "logits", &count);
    assert_int_equal(count, target_tokens * info->vocabulary);
    expect_close("logits", got->logits, want, count);
    free(want);
    want = golden_values(from, "greedy", &count);
    for (int64_t i = 0; i < count; i++) assert_int_equal(got->ids[i], (int32_t)want[i]);
    free(want);
}

static sida_ragged one_of(const sida_ragged *batch, int32_t s, int64_t offsets[2]) {
    offsets[0] = 0;
    offsets[1] = batch->offsets[s + 1] - batch->offsets[s];
    return (sida_ragged){1, offsets, batch->ids + batch->offsets[s]};
}

/* A sequence alone gives the bytes that it gives in the batch. */
static void expect_same_alone(sida_model *model, sida_resident *resident, const sida_ragged *input,
                              const sida_ragged *target, const pass *batched) {
    const sida_model_info *info = sida_model_get_info(model);
    for (int32_t s = 0; s < input->sequences; s++) {
        int64_t input_offsets[2], target_offsets[2];
        sida_ragged alone_in = one_of(input, s, input_offsets);
        sida_ragged alone_out = one_of(target, s, target_offsets);
        pass alone = run_pass(model, resident, &alone_in, &alone_out);
        for (int32_t i = 0; i < info->sites; i++) {
            const sida_ragged *side = i >= info->moe_layers[0] ? target : input;
            const seen *a = &alone.sites[i], *b = &batched->sites[i];
            size_t first = (size_t)side->offsets[s], tokens = (size_t)a->tokens;
            size_t experts = (size_t)info->experts;
            assert_memory_equal(a->logits, b->logits + first * experts,
                                tokens * experts * sizeof *a->logits);
            assert_memory_equal(a->experts, b->experts + first, tokens * sizeof *a->experts);
            assert_memory_equal(a->alpha, b->alpha + first, tokens * sizeof *a->alpha);
            assert_memory_equal(a->dropped, b->dropped + first, tokens);
        }
        assert_memory_equal(alone.logits, batched->logits + target->offsets[s] * info->vocabulary,
                            (size_t)target_offsets[1] * (size_t)info->vocabulary * sizeof(float));
        assert_memory_equal(alone.ids, batched->ids + (size_t)s * NEW_TOKENS,
                            NEW_TOKENS * sizeof(int32_t));
        pass_free(&alone);
    }
}

static void test_case(void **state) {
    const char *name = *state;
    char path[256];
    golden from = {0};
    sida_backend *backend = NULL;
    sida_model *model = NULL;
    sida_resident *resident = NULL;
    snprintf(path, sizeof path, "tests/parity/%s/golden.safetensors", name);
    OK(sida_file_map(&from.map, path));
    OK(sida_safetensors_parse(&from.file, from.map.data, from.map.size, path));
    /* Device memory starts as NaN: what is read without having been written shows. */
    OK(sida_backend_create_cpu(&backend, &(sida_cpu_options){.poison = true}));
    snprintf(path, sizeof path, "tests/parity/%s", name);
    OK(sida_model_open(&model, backend, path));
    OK(sida_resident_create(&resident, model));
    assert_true(sida_model_get_info(model)->sites <= MAX_SITES);

    ragged input = golden_ragged(&from, "input"), target = golden_ragged(&from, "target");
    pass batched = run_pass(model, resident, &input.view, &target.view);
    expect_golden(&from, sida_model_get_info(model), &batched, sida_ragged_tokens(&target.view));
    expect_same_alone(model, resident, &input.view, &target.view, &batched);
    if (strcmp(name, "overflow") == 0) assert_non_null(memchr(batched.sites[0].dropped, 1, 150));
    pass_free(&batched);

    ragged_free(&input);
    ragged_free(&target);
    sida_resident_destroy(resident);
    sida_model_destroy(model);
    sida_backend_destroy(backend);
    sida_safetensors_destroy(from.file);
    sida_file_unmap(&from.map);
}

#define CASE(name)                                                                                 \
    { name, test_case, NULL, NULL, (void *)(uintptr_t)name }

int main(void) {
    const struct CMUnitTest tests[] = {
        CASE("base"),     CASE("wide-heads"),    CASE("every-layer"),  CASE("gated-untied"),
        CASE("overflow"), CASE("dense-decoder"), CASE("bf16-sharded"), CASE("mixed-types"),
    };
    return cmocka_run_group_tests_name("parity", tests, NULL, NULL);
}
