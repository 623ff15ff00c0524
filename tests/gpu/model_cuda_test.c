/* The model on CUDA: beside the CPU on the parity tests' checkpoints, and exact routing under every
 * budget, policy and prefetch setting. */
#include "formats/base/memory.h"
#include "formats/base/rng.h"
#include "runtime/engine/budget.h"
#include "tests/gpu/gpu.h"
#include "tests/integration/identity_rig.h"
#include "tests/read_backs.h"

#include <unistd.h>

enum { SEQUENCES = 5, MAX_SITES = 16 };
static const int32_t input_lengths[SEQUENCES] = {17, 1, 40, 3, 64};
static const int32_t target_lengths[SEQUENCES] = {6, 8, 1, 5, 3};

/* --- CPU and CUDA side by side */

typedef struct routing {
    int64_t count; /* tokens * k */
    int64_t tokens, experts;
    int32_t *chosen;
    float *alpha, *logits;
} routing;

/* The CPU's routing of every call, which the CUDA run replays: so one choice that is a tie but for
 * rounding does not hide what comes behind it. */
typedef struct recorder {
    routing sites[MAX_SITES];
    double tolerance;
    int64_t choices, changed; /* where CUDA's router would have chosen otherwise */
} recorder;

static sida_status record(void *context, const sida_moe_call *call) {
    recorder *r = context;
    assert_true(call->site < MAX_SITES);
    routing *to = &r->sites[call->site];
    *to = (routing){call->tokens * call->k, call->tokens, call->experts_total, NULL, NULL, NULL};
    OK(SIDA_ALLOC(&to->chosen, to->count, "choices"));
    OK(SIDA_ALLOC(&to->alpha, to->count, "choices"));
    OK(SIDA_ALLOC(&to->logits, to->tokens * to->experts, "choices"));
    memcpy(to->chosen, call->experts, (size_t)to->count * sizeof *to->chosen);
    memcpy(to->alpha, call->alpha, (size_t)to->count * sizeof *to->alpha);
    memcpy(to->logits, call->logits, (size_t)(to->tokens * to->experts) * sizeof *to->logits);
    return SIDA_OK;
}

static sida_status replay(void *context, sida_moe_call *call) {
    recorder *r = context;
    const routing *from = &r->sites[call->site];
    assert_int_equal(from->tokens, call->tokens);
    expect_close("router logits", call->logits, from->logits, from->tokens * from->experts,
                 r->tolerance);
    for (int64_t i = 0; i < call->tokens; i++) {
        int32_t best = 0;
        for (int32_t e = 1; e < call->experts_total; e++)
            if (call->logits[i * call->experts_total + e] >
                call->logits[i * call->experts_total + best])
                best = e;
        r->choices++;
        r->changed += best != from->chosen[i * call->k];
    }
    memcpy(call->experts, from->chosen, (size_t)from->count * sizeof *from->chosen);
    memcpy(call->alpha, from->alpha, (size_t)from->count * sizeof *from->alpha);
    return SIDA_OK;
}

static sida_ragged random_batch(const int32_t *lengths, int32_t vocabulary, uint64_t seed) {
    static int64_t offsets[2][SEQUENCES + 1];
    static int32_t ids[2][256];
    static int turn;
    turn = !turn;
    sida_rng rng = sida_rng_seed(seed);
    for (int s = 0; s < SEQUENCES; s++) offsets[turn][s + 1] = offsets[turn][s] + lengths[s];
    for (int64_t i = 0; i < offsets[turn][SEQUENCES]; i++)
        ids[turn][i] = (int32_t)sida_rng_below(&rng, (uint32_t)vocabulary);
    return (sida_ragged){SEQUENCES, offsets[turn], ids[turn]};
}

/* Logits of the teacher-forced decoder, [target tokens, vocabulary]; free(). */
static float *forward(sida_backend *backend, const char *folder, recorder *r, bool replays,
                      int64_t *count) {
    sida_model *model;
    sida_resident *resident;
    sida_run *run;
    float *logits;
    OK(sida_model_open(&model, backend, folder));
    OK(sida_resident_create(&resident, model));
    const sida_model_info *info = sida_model_get_info(model);
    sida_ragged input = random_batch(input_lengths, info->vocabulary, 3);
    sida_ragged target = random_batch(target_lengths, info->vocabulary, 4);
    int64_t rows = sida_ragged_tokens(&target);
    const sida_run_limits limits = {SEQUENCES, sida_ragged_tokens(&input), rows, 8, 0};
    const sida_moe_driver *driver =
        sida_resident_driver(resident, r, replays ? replay : NULL, replays ? NULL : record);
    OK(sida_run_create(&run, model, &limits));
    OK(sida_run_encode(run, &input, driver));
    OK(sida_run_decode(run, &target, driver));
    *count = rows * info->vocabulary;
    OK(SIDA_ALLOC(&logits, *count, "logits"));
    OK(sida_run_read_logits(run, 0, rows, logits));
    sida_run_destroy(run);
    sida_resident_destroy(resident);
    sida_model_destroy(model);
    return logits;
}

/* fp32 checkpoints: both sides sum in fp32, about 1e-6 a layer. bf16: CUDA rounds the activations
 * in front of a dense product of many rows to bf16, about 2e-3 a layer. */
static void test_parity(void **state) {
    (void)state;
    static const struct {
        const char *folder;
        double tolerance;
    } cases[] = {
        {"base", 1e-4},     {"wide-heads", 1e-4},    {"every-layer", 1e-4},  {"gated-untied", 1e-4},
        {"overflow", 1e-4}, {"dense-decoder", 1e-4}, {"bf16-sharded", 2e-2}, {"mixed-types", 2e-2},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char folder[64];
        int64_t count, again;
        sida_backend *cpu, *cuda = gpu_open();
        recorder r = {.tolerance = cases[i].tolerance};
        snprintf(folder, sizeof folder, "tests/parity/%s", cases[i].folder);
        OK(sida_backend_create_cpu(&cpu, &(sida_cpu_options){.poison = true}));
        assert_non_null(cuda);
        float *want = forward(cpu, folder, &r, false, &count);
        float *got = forward(cuda, folder, &r, true, &again);
        assert_int_equal(count, again);
        expect_close(folder, got, want, count, cases[i].tolerance);
        /* Random ids have no margins: a few near ties may go the other way. */
        assert_true(r.choices > 0 && r.changed * 20 <= r.choices);
        printf("%s: %d of %d choices differ\n", folder, (int)r.changed, (int)r.choices);
        free(want);
        free(got);
        for (int s = 0; s < MAX_SITES; s++) {
            free(r.sites[s].chosen);
            free(r.sites[s].alpha);
            free(r.sites[s].logits);
        }
        sida_backend_destroy(cpu);
        sida_backend_destroy(cuda);
    }
}

static sida_status look(void *context, const sida_moe_call *call) {
    (void)context, (void)call;
    return SIDA_OK;
}

/* All experts resident: a pass is issued without waiting for the device, and gives the bytes of one
 * whose every layer is read back and grouped on the host. */
static void test_resident(void **state) {
    (void)state;
    static const char *const folders[] = {"base", "gated-untied", "bf16-sharded", "overflow"};
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i += (size_t)gpu_step(2)) {
        char folder[64];
        sida_backend *cuda = gpu_open();
        sida_model *model;
        sida_resident *resident;
        sida_run *run;
        float *logits[2];
        snprintf(folder, sizeof folder, "tests/parity/%s", folders[i]);
        assert_non_null(cuda);
        read_backs_watch(cuda);
        OK(sida_model_open(&model, cuda, folder));
        OK(sida_resident_create(&resident, model));
        const sida_model_info *info = sida_model_get_info(model);
        sida_ragged input = random_batch(input_lengths, info->vocabulary, 3);
        sida_ragged target = random_batch(target_lengths, info->vocabulary, 4);
        int64_t rows = sida_ragged_tokens(&target);
        const sida_run_limits limits = {SEQUENCES, sida_ragged_tokens(&input), rows, 8, 0};
        OK(sida_run_create(&run, model, &limits));
        for (int hooked = 0; hooked < 2; hooked++) {
            const sida_moe_driver *driver =
                sida_resident_driver(resident, NULL, NULL, hooked ? look : NULL);
            read_backs_reset();
            OK(sida_run_encode(run, &input, driver));
            OK(sida_run_decode(run, &target, driver));
            assert_int_equal(read_backs.waits, hooked * info->sites);
            assert_int_equal(read_backs.copies, hooked * 2 * info->sites);
            OK(SIDA_ALLOC(&logits[hooked], rows * info->vocabulary, "logits"));
            OK(sida_run_read_logits(run, 0, rows, logits[hooked]));
        }
        assert_memory_equal(logits[0], logits[1],
                            (size_t)(rows * info->vocabulary) * sizeof(float));
        for (int64_t at = 0; at < rows * info->vocabulary; at++)
            assert_true(isfinite(logits[0][at]));
        free(logits[0]);
        free(logits[1]);
        sida_run_destroy(run);
        sida_resident_destroy(resident);
        sida_model_destroy(model);
        sida_backend_destroy(cuda);
    }
}

typedef struct shown {
    int64_t calls, d;
    float *h; /* of the last */
} shown;

static sida_status show(void *context, const sida_moe_call *call, const float *h) {
    shown *s = context;
    s->calls++;
    memcpy(s->h, h, (size_t)(call->tokens * s->d) * sizeof *h);
    return SIDA_OK;
}

/* The residual stream behind the MoE layers, issued, recorded and replayed: looking changes
 * nothing, and what is behind the last block, of a model that ends with a MoE layer, gives the
 * logits. */
static void test_hidden(void **state) {
    (void)state;
    sida_backend *cuda = gpu_open();
    sida_model *model;
    sida_resident *resident;
    sida_run *run;
    float *logits, *exact, *normed, *first;
    assert_non_null(cuda);
    OK(sida_model_open(&model, cuda, "tests/parity/base"));
    OK(sida_resident_create(&resident, model));
    const sida_model_info *info = sida_model_get_info(model);
    sida_ragged input = random_batch(input_lengths, info->vocabulary, 3);
    sida_ragged target = random_batch(target_lengths, info->vocabulary, 4);
    const int64_t rows = sida_ragged_tokens(&target), d = info->d_model, words = info->vocabulary;
    const sida_run_limits limits = {SEQUENCES, sida_ragged_tokens(&input), rows, 8, 0};
    shown seen = {.d = d};
    OK(SIDA_ALLOC(&seen.h, limits.input_tokens * d, "hidden states"));
    OK(SIDA_ALLOC(&first, rows * d, "hidden states"));
    OK(SIDA_ALLOC(&normed, rows * d, "hidden states"));
    OK(SIDA_ALLOC(&exact, rows * words, "logits"));
    OK(SIDA_ALLOC(&logits, rows * words, "logits"));
    OK(sida_run_create(&run, model, &limits));
    for (int round = 0; round < 4; round++) {
        const sida_moe_driver driver = {.context = &seen,
                                        .hidden = round > 0 ? show : NULL,
                                        .resident = sida_resident_table(resident)};
        seen.calls = 0;
        OK(sida_run_encode(run, &input, &driver));
        OK(sida_run_decode(run, &target, &driver));
        OK(sida_run_read_logits(run, 0, rows, round > 0 ? logits : exact));
        if (round == 0) continue;
        assert_int_equal(seen.calls, info->sites);
        assert_memory_equal(logits, exact, (size_t)(rows * words) * sizeof *logits);
        if (round == 1) memcpy(first, seen.h, (size_t)(rows * d) * sizeof *first);
        assert_memory_equal(first, seen.h, (size_t)(rows * d) * sizeof *first);
    }
    const sida_tensor_view *norm =
        sida_checkpoint_find(sida_model_checkpoint(model), "decoder.final_layer_norm.weight");
    assert_non_null(norm);
    const sida_linear_call head = {.y = logits,
                                   .ldy = words,
                                   .x = seen.h,
                                   .ldx = d,
                                   .n = rows,
                                   .weight = sida_model_embedding_host(model),
                                   .scale = 1.0f / sqrtf((float)d),
                                   .norm = {norm->data, norm->dtype, 1, d},
                                   .epsilon = 1e-6f,
                                   .normed = normed};
    OK(sida_linear_cpu(NULL, &head));
    expect_close("logits of the hidden state", exact, logits, rows * words, 1e-4);
    free(seen.h);
    free(first);
    free(normed);
    free(exact);
    free(logits);
    sida_run_destroy(run);
    sida_resident_destroy(resident);
    sida_model_destroy(model);
    sida_backend_destroy(cuda);
}

/* The host's view of the embedding is the device's. */
static void test_embedding(void **state) {
    (void)state;
    sida_backend *cuda = gpu_open();
    sida_model *model;
    sida_stream *stream;
    OK(sida_model_open(&model, cuda, "tests/parity/base"));
    OK(sida_stream_create(cuda, &stream, SIDA_STREAM_COMPUTE));
    sida_weight on_device = sida_model_embedding(model), on_host = sida_model_embedding_host(model);
    size_t bytes = (size_t)(on_host.rows * on_host.cols) * sida_dtype_bytes(on_host.dtype);
    char *copy = malloc(bytes);
    OK(sida_copy(stream, copy, on_device.data, bytes));
    OK(sida_stream_synchronize(stream));
    assert_ptr_not_equal(on_device.data, on_host.data);
    assert_memory_equal(copy, on_host.data, bytes);
    free(copy);
    sida_stream_destroy(stream);
    sida_model_destroy(model);
    sida_backend_destroy(cuda);
}

/* --- identity */

static int32_t slots_of(const rig *r, const char *text) {
    sida_budget budget;
    int32_t slots;
    size_t cap_bytes;
    const sida_budget_needs needs = {.experts = (int64_t)r->info->sites * r->info->experts,
                                     .slot_bytes = sida_store_slot_bytes(r->info->expert_bytes),
                                     .dense_bytes = r->fixed_bytes};
    OK(sida_budget_parse(&budget, text));
    OK(sida_budget_slots(&slots, &cap_bytes, &budget, &needs));
    return slots;
}

/* The same batches give the all-resident run's bytes; batches of another size may not. */
static void check_grid(const char *folder, int32_t sequences, const char *least,
                       sida_routing kind) {
    static const char *const policies[] = {"fifo", "lru", "lookahead"};
    const char *const budgets[] = {"2-experts", least, "100%"};
    rig r;
    unsigned seed = 1;
    if (gpu_small()) sequences = 3;
    rig_open_on(&r, gpu_open(), folder, sequences);
    for (int32_t batch = gpu_cases(1, 3); batch <= 16; batch += 15) {
        reference ref;
        rig_reference(&r, &ref, kind, 2, batch);
        assert_true(ref.finite);
        for (int b = 0; b < 3; b += gpu_step(3))
            for (int p = 0; p < 3; p += gpu_step(3))
                for (int prefetch = gpu_cases(0, 1); prefetch < 2; prefetch++) {
                    sida_pass_stats stats;
                    char what[160], texts[2][SIDA_FINGERPRINT_TEXT];
                    snprintf(what, sizeof what, "%s %s %s %s prefetch %d batch %d",
                             folder ? folder : "rig", sida_routing_name(kind), budgets[b],
                             policies[p], prefetch, batch);
                    OK(rig_pass(&r, &stats,
                                (sida_pass_options){.source = &r.source,
                                                    .routing = kind,
                                                    .top_k = 2,
                                                    .slots = slots_of(&r, budgets[b]),
                                                    .queue = 1 + 2 * prefetch,
                                                    .prefetch = prefetch,
                                                    .policy = sida_policy_find(policies[p])},
                                batch, seed++));
                    sida_fingerprint_format(texts[0], stats.digest);
                    sida_fingerprint_format(texts[1], ref.digest);
                    if (strcmp(texts[0], texts[1]) != 0)
                        fail_msg("%s: %s, not %s", what, texts[0], texts[1]);
                    assert_int_equal(stats.generated_tokens, ref.logits);
                    sida_pass_stats_free(&stats);
                }
        reference_free(&ref);
    }
    rig_close(&r);
}

static void test_exact(void **state) {
    (void)state;
    check_grid(NULL, 19, "10%", SIDA_ROUTING_EXACT);
}

static void test_lossy(void **state) {
    (void)state;
    check_grid(NULL, 19, "10%", SIDA_ROUTING_GUIDED);
    check_grid(NULL, 19, "10%", SIDA_ROUTING_PREDICTED);
}

/* Other shapes and types. A tenth of a tiny model is no slot at all. */
static void test_other_models(void **state) {
    (void)state;
    check_grid("tests/parity/bf16-sharded", 17, "50%", SIDA_ROUTING_EXACT);
    check_grid("tests/parity/gated-untied", 17, "50%", SIDA_ROUTING_EXACT);
    check_grid("tests/parity/mixed-types", 17, "50%", SIDA_ROUTING_EXACT);
    if (gpu_small()) return; /* other sizes of the same */
    check_grid("tests/parity/wide-heads", 17, "50%", SIDA_ROUTING_EXACT);
    if (access("data/sample/model/config.json", R_OK) == 0)
        check_grid("data/sample/model", 17, "10%", SIDA_ROUTING_EXACT);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_parity),       cmocka_unit_test(test_resident),
        cmocka_unit_test(test_hidden),       cmocka_unit_test(test_embedding),
        cmocka_unit_test(test_exact),        cmocka_unit_test(test_lossy),
        cmocka_unit_test(test_other_models),
    };
    sida_backend *backend = gpu_open();
    if (!backend) return test_skip(sida_last_message());
    sida_backend_destroy(backend);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
