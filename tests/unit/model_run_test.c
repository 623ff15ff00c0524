/* The run's contract over the tiny parity model: waves, hooks, cached decoding, limits, budgets,
 * damaged checkpoints. That the numbers are right is tests/parity's business. */
#include "formats/base/memory.h"
#include "runtime/backend/backend.h"
#include "runtime/model/model.h"
#include "tests/read_backs.h"

#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#define BASE "tests/parity/base"
enum { SEQUENCES = 3, TOKENS = 12, STEP = 6, VOCABULARY = 96, D_MODEL = 32 };

#define OK(call)                                                                                   \
    do {                                                                                           \
        sida_status got = (call);                                                                  \
        if (got != SIDA_OK) fail_msg("%s: %s", #call, sida_last_message());                        \
    } while (0)

static const int64_t offsets[] = {0, 5, 5, 12};
static const int32_t ids[] = {7, 8, 9, 10, 1, 20, 21, 22, 23, 24, 25, 1};
static const sida_ragged input = {SEQUENCES, offsets, ids};
static const int64_t step_offsets[] = {0, 2, 3, 6};
static const int32_t step_ids[] = {0, 5, 0, 0, 6, 7};
static const sida_ragged target = {SEQUENCES, step_offsets, step_ids};
static const sida_run_limits limits = {SEQUENCES, TOKENS, STEP, 8, 0};

typedef struct world {
    sida_backend *backend;
    sida_model *model;
    sida_resident *resident;
    sida_run *run;
} world;

static void open_world(world *w) {
    memset(w, 0, sizeof *w);
    OK(sida_backend_create_cpu(&w->backend, &(sida_cpu_options){.poison = true}));
    OK(sida_model_open(&w->model, w->backend, BASE));
    OK(sida_resident_create(&w->resident, w->model));
    OK(sida_run_create(&w->run, w->model, &limits));
}

static void close_world(world *w) {
    sida_run_destroy(w->run);
    sida_resident_destroy(w->resident);
    sida_model_destroy(w->model);
    sida_backend_destroy(w->backend);
}

/* Encodes, decodes and reads all logits. */
static void forward(world *w, const sida_moe_driver *driver, float *logits) {
    OK(sida_run_encode(w->run, &input, driver));
    OK(sida_run_decode(w->run, &target, driver));
    OK(sida_run_read_logits(w->run, 0, STEP, logits));
}

/* --- a driver that hands out experts one at a time, the last first, straight from the slab */
typedef struct one_by_one {
    const sida_model *model;
    int32_t site, left, experts, pinned;
    int32_t needed[64];
    bool twice; /* hands out the same expert again: an error */
} one_by_one;

static sida_status one_begin(void *context, const sida_moe_call *call, const int32_t *needed,
                             int32_t count) {
    one_by_one *d = context;
    for (int32_t i = 1; i < count; i++) assert_true(needed[i] > needed[i - 1]);
    memcpy(d->needed, needed, (size_t)count * sizeof *needed);
    d->site = call->site;
    d->left = count;
    d->experts = call->experts_total;
    return SIDA_OK;
}

static sida_status one_take(void *context, int32_t *experts, const void **weights, int32_t *count) {
    one_by_one *d = context;
    assert_true(d->left > 0);
    experts[0] = d->needed[d->twice ? 0 : d->left - 1];
    d->left--;
    weights[0] = sida_model_expert(d->model, d->site * d->experts + experts[0]);
    *count = 1;
    d->pinned++;
    return SIDA_OK;
}

static sida_status one_release(void *context, const int32_t *experts, int32_t count,
                               sida_stream *stream) {
    (void)experts, (void)stream;
    ((one_by_one *)context)->pinned -= count;
    return SIDA_OK;
}

static sida_status nothing(void *context, const sida_moe_call *call) {
    (void)context, (void)call;
    return SIDA_OK;
}

static sida_moe_driver one_driver(one_by_one *context) {
    return (sida_moe_driver){
        .context = context, .begin = one_begin, .take = one_take, .release = one_release};
}

static void test_waves(void **state) {
    (void)state;
    static float whole[STEP * VOCABULARY], waves[STEP * VOCABULARY];
    world w;
    open_world(&w);
    forward(&w, sida_resident_driver(w.resident, NULL, NULL, NULL), whole);
    one_by_one context = {.model = w.model};
    sida_moe_driver driver = one_driver(&context);
    forward(&w, &driver, waves);
    assert_memory_equal(waves, whole, sizeof whole);
    assert_int_equal(context.pinned, 0);
    /* A driver that breaks the protocol is an error, and its slots are released. */
    context.twice = true;
    assert_int_equal(sida_run_encode(w.run, &input, &driver), SIDA_ERROR_ARGUMENT);
    assert_int_equal(context.pinned, 0);
    assert_int_equal(sida_run_decode(w.run, &target, &driver), SIDA_ERROR_ARGUMENT);
    close_world(&w);
}

/* --- what is known before a call runs */
typedef struct ahead {
    one_by_one base; /* first: the context of begin, take, release too */
    uint8_t allowed[4 * SEQUENCES * 8];
    int32_t expert;
} ahead;

static const uint8_t *allow(void *context, int32_t side) {
    (void)side;
    return ((ahead *)context)->allowed;
}

static sida_status choose_ahead(void *context, sida_moe_call *call) {
    assert_null(call->logits);
    for (int64_t t = 0; t < call->tokens; t++) {
        call->experts[t] = ((ahead *)context)->expert + (int32_t)(t % 2);
        call->alpha[t] = 0.5f;
    }
    return SIDA_OK;
}

static sida_status look_ahead(void *context, const sida_moe_call *call) {
    const ahead *a = context;
    for (int64_t t = 0; t < call->tokens; t++)
        assert_int_equal(call->experts[t], a->expert + (int32_t)(t % 2));
    return SIDA_OK;
}

/* Sets and choices that come before the call: from slots and with all experts there, looked at or
 * not, the same bytes; the sets are all that is asked for. */
static void test_ahead(void **state) {
    (void)state;
    static float exact[STEP * VOCABULARY], made[2][STEP * VOCABULARY];
    world w;
    open_world(&w);
    forward(&w, sida_resident_driver(w.resident, NULL, NULL, NULL), exact);
    ahead a = {.base = {.model = w.model}};
    sida_moe_driver driver = one_driver(&a.base);
    driver.context = &a;
    driver.allow = allow;
    memset(a.allowed, 1, sizeof a.allowed);
    forward(&w, &driver, made[0]);
    assert_memory_equal(made[0], exact, sizeof exact);
    /* Even experts only; nothing for the sequence without tokens in the encoder. */
    for (size_t i = 0; i < sizeof a.allowed; i++) a.allowed[i] = i % 2 == 0;
    memset(a.allowed + 8, 0, 8);
    OK(sida_run_encode(w.run, &input, &driver));
    for (int i = 0; i < 4; i++) assert_int_equal(a.base.needed[i], 2 * i);
    a.allowed[8] = 1;
    forward(&w, &driver, made[0]);
    assert_memory_not_equal(made[0], exact, sizeof exact);
    sida_moe_driver resident = {
        .context = &a, .allow = allow, .resident = sida_resident_table(w.resident)};
    forward(&w, &resident, made[1]);
    assert_memory_equal(made[0], made[1], sizeof made[0]);
    memset(a.allowed, 0, 8);
    assert_int_equal(sida_run_encode(w.run, &input, &driver), SIDA_ERROR_ARGUMENT);
    assert_int_equal(a.base.pinned, 0);

    a.expert = 3;
    driver.choose = resident.choose = choose_ahead;
    driver.chooses_ahead = resident.chooses_ahead = true;
    forward(&w, &driver, made[0]);
    forward(&w, &resident, made[1]);
    assert_memory_equal(made[0], made[1], sizeof made[0]);
    driver.observe = resident.observe = look_ahead;
    forward(&w, &driver, made[1]);
    assert_memory_equal(made[0], made[1], sizeof made[0]);
    forward(&w, &resident, made[1]);
    assert_memory_equal(made[0], made[1], sizeof made[0]);
    a.expert = 7;
    assert_int_equal(sida_run_encode(w.run, &input, &driver), SIDA_ERROR_ARGUMENT);
    close_world(&w);
}

/* How often a pass waits for the device: never where all experts are there or where the driver says
 * before the call which ones may be needed, else once a MoE layer for E + 1 numbers. */
static void test_read_backs(void **state) {
    (void)state;
    world w = {0};
    OK(sida_backend_create_cpu(&w.backend, &(sida_cpu_options){.poison = true}));
    read_backs_watch(w.backend);
    OK(sida_model_open(&w.model, w.backend, BASE));
    OK(sida_resident_create(&w.resident, w.model));
    OK(sida_run_create(&w.run, w.model, &limits));
    const sida_model_info *info = sida_model_get_info(w.model);
    one_by_one context = {.model = w.model};
    sida_moe_driver one = one_driver(&context);
    ahead known = {.base = {.model = w.model}};
    sida_moe_driver sets = one_driver(&known.base), chosen = sets;
    memset(known.allowed, 1, sizeof known.allowed);
    sets.allow = allow;
    chosen.choose = choose_ahead;
    chosen.chooses_ahead = true;
    for (int i = 0; i < 2; i++) {
        read_backs_reset();
        OK(sida_run_encode(w.run, &input, i ? &chosen : &sets));
        OK(sida_run_decode(w.run, &target, i ? &chosen : &sets));
        assert_int_equal(read_backs.waits, 0);
        assert_int_equal(read_backs.copies, 0);
    }
    for (int kind = 0; kind < 3; kind++) {
        const sida_moe_driver *driver =
            kind == 1 ? &one
                      : sida_resident_driver(w.resident, NULL, NULL, kind == 2 ? nothing : NULL);
        read_backs_reset();
        OK(sida_run_encode(w.run, &input, driver));
        OK(sida_run_decode(w.run, &target, driver));
        assert_int_equal(read_backs.waits, kind == 0 ? 0 : info->sites);
        /* With a hook: the logits and the choice. */
        assert_int_equal(read_backs.copies, kind * info->sites);
        if (kind < 2)
            assert_int_equal(read_backs.bytes,
                             kind * info->sites * (info->experts + 1) * (int)sizeof(int64_t));
    }
    close_world(&w);
}

/* --- hooks */
typedef struct hooked {
    int32_t force; /* -2: what the router would choose */
    int calls[2];
} hooked;

static sida_status choose(void *context, sida_moe_call *call) {
    hooked *h = context;
    h->calls[call->side]++;
    for (int64_t t = 0; t < call->tokens; t++) {
        const float *logits = call->logits + t * call->experts_total;
        double sum = 0;
        int32_t best = 0;
        for (int32_t e = 1; e < call->experts_total; e++)
            if (logits[e] > logits[best]) best = e;
        for (int32_t e = 0; e < call->experts_total; e++)
            sum += exp((double)logits[e] - (double)logits[best]);
        call->experts[t] = h->force == -2 ? best : h->force;
        call->alpha[t] = (float)(1 / sum);
    }
    return SIDA_OK;
}

static sida_status observe(void *context, const sida_moe_call *call) {
    hooked *h = context;
    assert_int_equal(call->tokens, call->side ? STEP : TOKENS);
    assert_int_equal(call->sequences, SEQUENCES);
    for (int32_t s = 0; s < SEQUENCES; s++) assert_int_equal(call->position[s], 0);
    for (int64_t t = 0; t < call->tokens; t++)
        if (h->force >= 0) assert_int_equal(call->experts[t], h->force);
    return SIDA_OK;
}

static sida_status cancel(void *context, sida_moe_call *call) {
    (void)context, (void)call;
    return sida_fail(SIDA_ERROR_CANCELLED, "stop");
}

static void test_hooks(void **state) {
    (void)state;
    static float exact[STEP * VOCABULARY], chosen[STEP * VOCABULARY];
    world w;
    open_world(&w);
    forward(&w, sida_resident_driver(w.resident, NULL, NULL, NULL), exact);
    hooked h = {.force = -2};
    forward(&w, sida_resident_driver(w.resident, &h, choose, observe), chosen);
    assert_int_equal(h.calls[0], 2);
    assert_int_equal(h.calls[1], 2);
    /* Same experts, α rounded from double: 1e-5 is ten times what that can move. */
    for (int i = 0; i < STEP * VOCABULARY; i++)
        assert_true(fabsf(chosen[i] - exact[i]) < 1e-5f * (1 + fabsf(exact[i])));
    h.force = 3;
    forward(&w, sida_resident_driver(w.resident, &h, choose, observe), chosen);
    assert_memory_not_equal(chosen, exact, sizeof exact);
    h.force = 8;
    assert_int_equal(
        sida_run_encode(w.run, &input, sida_resident_driver(w.resident, &h, choose, NULL)),
        SIDA_ERROR_ARGUMENT);
    assert_int_equal(
        sida_run_encode(w.run, &input, sida_resident_driver(w.resident, &h, cancel, NULL)),
        SIDA_ERROR_CANCELLED);
    close_world(&w);
}

/* --- the residual stream behind the MoE layers */
typedef struct looked {
    one_by_one base; /* first: the context of begin, take, release too */
    int calls[2];
    float h[2][2][TOKENS * D_MODEL]; /* by side and MoE layer */
    bool stop;
} looked;

static sida_status look(void *context, const sida_moe_call *call, const float *h) {
    looked *l = context;
    if (l->stop) return sida_fail(SIDA_ERROR_CANCELLED, "stop");
    assert_int_equal(call->layer, l->calls[call->side]++);
    assert_int_equal(call->site, call->layer + 2 * call->side);
    assert_int_equal(call->tokens, call->side ? STEP : TOKENS);
    memcpy(l->h[call->side][call->layer], h, (size_t)call->tokens * D_MODEL * sizeof *h);
    return SIDA_OK;
}

static sida_weight stored(const sida_model *model, const char *name) {
    const sida_tensor_view *view = sida_checkpoint_find(sida_model_checkpoint(model), name);
    assert_non_null(view);
    return (sida_weight){view->data, view->dtype, view->rank == 2 ? view->shape[0] : 1, D_MODEL};
}

/* The decoder's last block is a MoE layer: what is seen behind it gives the logits. Whoever
 * supplies the experts, the same is seen, and looking changes nothing. */
static void test_hidden(void **state) {
    (void)state;
    static float exact[STEP * VOCABULARY], logits[STEP * VOCABULARY], normed[STEP * D_MODEL];
    static looked seen[3];
    world w;
    open_world(&w);
    forward(&w, sida_resident_driver(w.resident, NULL, NULL, NULL), exact);
    memset(seen, 0, sizeof seen);
    for (int kind = 0; kind < 3; kind++) {
        looked *l = &seen[kind];
        l->base.model = w.model;
        sida_moe_driver driver = one_driver(&l->base);
        driver.hidden = look;
        if (kind > 0) driver.resident = sida_resident_table(w.resident);
        if (kind == 2) driver.observe = nothing;
        forward(&w, &driver, logits);
        assert_memory_equal(logits, exact, sizeof exact);
        assert_true(l->calls[0] == 2 && l->calls[1] == 2 && l->base.pinned == 0);
        assert_memory_equal(l->h, seen[0].h, sizeof l->h);
    }
    assert_memory_not_equal(seen->h[0][0], seen->h[0][1], sizeof seen->h[0][0]);
    const sida_linear_call head = {.y = logits,
                                   .ldy = VOCABULARY,
                                   .x = seen->h[1][1],
                                   .ldx = D_MODEL,
                                   .n = STEP,
                                   .weight = stored(w.model, "shared.weight"),
                                   .scale = 1.0f / sqrtf((float)D_MODEL),
                                   .norm = stored(w.model, "decoder.final_layer_norm.weight"),
                                   .epsilon = 1e-6f,
                                   .normed = normed};
    memset(logits, 0, sizeof logits);
    OK(sida_linear_cpu(NULL, &head));
    assert_memory_equal(logits, exact, sizeof exact);
    sida_moe_driver driver = {
        .context = seen, .hidden = look, .resident = sida_resident_table(w.resident)};
    seen->stop = true;
    assert_int_equal(sida_run_encode(w.run, &input, &driver), SIDA_ERROR_CANCELLED);
    close_world(&w);
}

/* One token a call gives what one call with all of them gives, up to rounding (1e-5: sums of some
 * ten keys in another order). */
static void test_cached_decoding(void **state) {
    (void)state;
    static float whole[STEP * VOCABULARY], one[STEP * VOCABULARY];
    world w;
    open_world(&w);
    const sida_moe_driver *driver = sida_resident_driver(w.resident, NULL, NULL, NULL);
    forward(&w, driver, whole);
    OK(sida_run_encode(w.run, &input, driver));
    for (int64_t t = 0; t < 3; t++) {
        int64_t part_offsets[SEQUENCES + 1] = {0}, rows = 0;
        int32_t part_ids[SEQUENCES];
        int64_t row_of[SEQUENCES];
        for (int s = 0; s < SEQUENCES; s++) {
            if (step_offsets[s] + t < step_offsets[s + 1]) {
                row_of[rows] = step_offsets[s] + t;
                part_ids[rows++] = step_ids[step_offsets[s] + t];
            }
            part_offsets[s + 1] = rows;
        }
        OK(sida_run_decode(w.run, &(sida_ragged){SEQUENCES, part_offsets, part_ids}, driver));
        OK(sida_run_read_logits(w.run, 0, rows, one));
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < VOCABULARY; j++) {
                float want = whole[row_of[i] * VOCABULARY + j];
                assert_true(fabsf(one[i * VOCABULARY + j] - want) < 1e-5f * (1 + fabsf(want)));
            }
    }
    /* A step of no tokens is none. */
    static const int64_t none[SEQUENCES + 1] = {0};
    OK(sida_run_decode(w.run, &(sida_ragged){SEQUENCES, none, step_ids}, driver));
    assert_int_equal(sida_run_read_logits(w.run, 0, 1, one), SIDA_ERROR_ARGUMENT);
    close_world(&w);
}

static void test_limits(void **state) {
    (void)state;
    world w;
    open_world(&w);
    const sida_moe_driver *driver = sida_resident_driver(w.resident, NULL, NULL, NULL);
    float logits[VOCABULARY];
    assert_int_equal(sida_run_decode(w.run, &target, driver), SIDA_ERROR_ARGUMENT);
    static const int64_t many[] = {0, 1, 2, 3, 4}, tall[] = {0, 13}, falling[] = {0, 4, 2};
    static const int32_t long_ids[13] = {2};
    sida_ragged wrong[] = {{4, many, ids}, {1, tall, long_ids}, {2, falling, ids}, {0, many, ids}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        assert_int_equal(sida_run_encode(w.run, &wrong[i], driver), SIDA_ERROR_ARGUMENT);
    static const int64_t single[] = {0, 1};
    static const int32_t high[] = {VOCABULARY}, negative[] = {-1};
    assert_int_equal(sida_run_encode(w.run, &(sida_ragged){1, single, high}, driver),
                     SIDA_ERROR_FORMAT);
    assert_int_equal(sida_run_encode(w.run, &(sida_ragged){1, single, negative}, driver),
                     SIDA_ERROR_FORMAT);
    OK(sida_run_encode(w.run, &(sida_ragged){1, single, ids}, driver));
    assert_int_equal(sida_run_decode(w.run, &target, driver), SIDA_ERROR_ARGUMENT);
    for (int t = 0; t < 8; t++) OK(sida_run_decode(w.run, &(sida_ragged){1, single, ids}, driver));
    assert_int_equal(sida_run_decode(w.run, &(sida_ragged){1, single, ids}, driver),
                     SIDA_ERROR_ARGUMENT);
    assert_int_equal(sida_run_read_logits(w.run, 0, 2, logits), SIDA_ERROR_ARGUMENT);
    int32_t out[SEQUENCES * 9], counts[SEQUENCES];
    sida_generate_options options = {.max_new_tokens = 9};
    assert_int_equal(sida_run_generate(w.run, &options, driver, out, counts), SIDA_ERROR_ARGUMENT);
    sida_run *bad = NULL;
    sida_run_limits zero = {0}, huge = {1 << 20, 1 << 28, 1 << 28, 1 << 24, 0};
    assert_int_equal(sida_run_create(&bad, w.model, &zero), SIDA_ERROR_ARGUMENT);
    assert_null(bad);
    OK(sida_backend_set_cap(w.backend, (size_t)1 << 30));
    assert_int_equal(sida_run_create(&bad, w.model, &huge), SIDA_ERROR_BUDGET);
    close_world(&w);
}

/* What a run takes on the device is what sida_run_bytes() says; under a cap it is refused. */
static void test_memory(void **state) {
    (void)state;
    world w;
    sida_memory_usage before, after;
    sida_run *second = NULL;
    open_world(&w);
    sida_backend_memory(w.backend, &before);
    OK(sida_run_create(&second, w.model, &limits));
    sida_backend_memory(w.backend, &after);
    assert_int_equal(after.used_bytes - before.used_bytes, sida_run_bytes(w.model, &limits));
    sida_run_destroy(second);
    OK(sida_backend_set_cap(w.backend, before.used_bytes + sida_run_bytes(w.model, &limits) - 1));
    assert_int_equal(sida_run_create(&second, w.model, &limits), SIDA_ERROR_BUDGET);
    assert_null(second);
    close_world(&w);
    sida_backend *backend;
    sida_model *model;
    OK(sida_backend_create_cpu(&backend, NULL));
    OK(sida_backend_set_cap(backend, 1000));
    assert_int_equal(sida_model_open(&model, backend, BASE), SIDA_ERROR_BUDGET);
    sida_backend_destroy(backend);
}

/* --- generation */
typedef struct watched {
    int32_t steps, logits, live[32];
} watched;

static sida_status before_step(void *context, int32_t t, const sida_ragged *step) {
    watched *w = context;
    assert_int_equal(t, w->steps++);
    w->live[t] = (int32_t)sida_ragged_tokens(step);
    return SIDA_OK;
}

static sida_status on_logits(void *context, int32_t t, int32_t sequence, const float *logits) {
    watched *w = context;
    assert_int_equal(t, w->steps - 1);
    assert_in_range(sequence, 0, SEQUENCES - 1);
    assert_true(isfinite(logits[VOCABULARY - 1]));
    w->logits++;
    return SIDA_OK;
}

/* A folder with the base model's weights and its config after one replacement. */
static void make_variant(char folder[64], const char *find, const char *replace) {
    char path[128], text[8192], target_path[512];
    strcpy(folder, "/tmp/sida-model-XXXXXX");
    assert_non_null(mkdtemp(folder));
    FILE *file = fopen(BASE "/config.json", "rb");
    assert_non_null(file);
    size_t size = fread(text, 1, sizeof text - 1, file);
    text[size] = 0;
    fclose(file);
    char *at = strstr(text, find);
    assert_non_null(at);
    snprintf(path, sizeof path, "%s/config.json", folder);
    file = fopen(path, "wb");
    assert_non_null(file);
    fwrite(text, 1, (size_t)(at - text), file);
    fputs(replace, file);
    fputs(at + strlen(find), file);
    fclose(file);
    assert_non_null(getcwd(target_path, 400));
    strcat(target_path, "/" BASE "/model.safetensors");
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    assert_int_equal(symlink(target_path, path), 0);
}

static void remove_variant(const char *folder) {
    char path[128];
    snprintf(path, sizeof path, "%s/config.json", folder);
    unlink(path);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    unlink(path);
    rmdir(folder);
}

static void test_generate_stops(void **state) {
    (void)state;
    enum { MOST = 8 };
    int32_t out[SEQUENCES * MOST], again[SEQUENCES * MOST], counts[SEQUENCES];
    char folder[64], eos[32];
    world w;
    open_world(&w);
    const sida_moe_driver *driver = sida_resident_driver(w.resident, NULL, NULL, NULL);
    watched seen = {0};
    sida_generate_options options = {.max_new_tokens = MOST,
                                     .context = &seen,
                                     .before_step = before_step,
                                     .on_logits = on_logits};
    OK(sida_run_encode(w.run, &input, driver));
    OK(sida_run_generate(w.run, &options, driver, out, counts));
    assert_int_equal(seen.steps, MOST);
    for (int s = 0; s < SEQUENCES; s++) assert_int_equal(counts[s], MOST);
    close_world(&w);

    /* The same model where the third token of sequence 0 ends a sequence. */
    int32_t end = out[2];
    snprintf(eos, sizeof eos, "\"eos_token_id\": %d", end);
    make_variant(folder, "\"eos_token_id\": 1", eos);
    OK(sida_backend_create_cpu(&w.backend, NULL));
    OK(sida_model_open(&w.model, w.backend, folder));
    OK(sida_resident_create(&w.resident, w.model));
    OK(sida_run_create(&w.run, w.model, &limits));
    driver = sida_resident_driver(w.resident, NULL, NULL, NULL);
    memset(&seen, 0, sizeof seen);
    OK(sida_run_encode(w.run, &input, driver));
    OK(sida_run_generate(w.run, &options, driver, again, counts));
    int32_t logits = 0;
    for (int s = 0; s < SEQUENCES; s++) {
        int32_t want = 0;
        while (want < MOST && out[s * MOST + want++] != end) {
        }
        assert_int_equal(counts[s], want);
        assert_memory_equal(again + s * MOST, out + s * MOST, (size_t)want * sizeof *out);
        logits += want;
    }
    assert_in_range(counts[0], 1, 3);
    assert_int_equal(seen.logits, logits);
    close_world(&w);
    remove_variant(folder);
}

typedef struct kept_logits {
    float rows[32][VOCABULARY];
    int32_t of[32], count;
} kept_logits;

static sida_status keep_logits(void *context, int32_t t, int32_t sequence, const float *logits) {
    kept_logits *k = context;
    (void)t;
    memcpy(k->rows[k->count], logits, sizeof k->rows[0]);
    k->of[k->count++] = sequence;
    return SIDA_OK;
}

/* Given targets go in whatever the logits say: each step's logits are those of the same tokens
 * decoded one a call. */
static void test_forced(void **state) {
    (void)state;
    enum { MOST = 6 };
    static const int64_t starts[] = {0, 4, 4, 10};
    static const int32_t words[] = {50, 1, 60, 1, /**/ 40, 41, 42, 43, 44, 45};
    static const sida_ragged targets = {SEQUENCES, starts, words};
    int32_t out[SEQUENCES * MOST], counts[SEQUENCES];
    world w;
    open_world(&w);
    const sida_moe_driver *driver = sida_resident_driver(w.resident, NULL, NULL, NULL);
    kept_logits *seen = calloc(1, sizeof *seen);
    sida_generate_options options = {
        .max_new_tokens = MOST, .forced = &targets, .context = seen, .on_logits = keep_logits};
    OK(sida_run_encode(w.run, &input, driver));
    OK(sida_run_generate(w.run, &options, driver, out, counts));
    assert_int_equal(counts[0], 4); /* past the </s> in it */
    assert_int_equal(counts[1], 0);
    assert_int_equal(counts[2], 6);
    assert_int_equal(seen->count, 10);
    OK(sida_run_encode(w.run, &input, driver));
    for (int32_t t = 0, row = 0; t < MOST; t++) {
        int64_t at[SEQUENCES + 1] = {0};
        int32_t step[SEQUENCES];
        float logits[SEQUENCES * VOCABULARY];
        for (int s = 0; s < SEQUENCES; s++) {
            at[s + 1] = at[s] + (starts[s] + t < starts[s + 1]);
            if (at[s + 1] > at[s]) step[at[s]] = t == 0 ? 0 : words[starts[s] + t - 1];
        }
        OK(sida_run_decode(w.run, &(sida_ragged){SEQUENCES, at, step}, driver));
        OK(sida_run_read_logits(w.run, 0, at[SEQUENCES], logits));
        for (int s = 0; s < SEQUENCES; s++) {
            if (at[s + 1] == at[s]) continue;
            assert_int_equal(seen->of[row], s);
            assert_int_equal(out[s * MOST + t], words[starts[s] + t]);
            assert_memory_equal(seen->rows[row++], logits + at[s] * VOCABULARY,
                                sizeof seen->rows[0]);
        }
    }
    options.max_new_tokens = 5;
    OK(sida_run_encode(w.run, &input, driver));
    assert_int_equal(sida_run_generate(w.run, &options, driver, out, counts), SIDA_ERROR_ARGUMENT);
    assert_non_null(strstr(sida_last_message(), "a target of 6 tokens"));
    options.forced = &(sida_ragged){1, starts, words};
    assert_int_equal(sida_run_generate(w.run, &options, driver, out, counts), SIDA_ERROR_ARGUMENT);
    free(seen);
    close_world(&w);
}

static void expect_refused(const char *find, const char *replace, sida_status want,
                           const char *names) {
    char folder[64];
    sida_backend *backend;
    sida_model *model;
    make_variant(folder, find, replace);
    OK(sida_backend_create_cpu(&backend, NULL));
    assert_int_equal(sida_model_open(&model, backend, folder), want);
    assert_null(model);
    if (!strstr(sida_last_message(), names)) fail_msg("%s", sida_last_message());
    sida_backend_destroy(backend);
    remove_variant(folder);
}

static void test_refused_checkpoints(void **state) {
    (void)state;
    expect_refused("\"d_ff\": 32", "\"d_ff\": 33", SIDA_ERROR_FORMAT,
                   "[32, 32], expected [33, 32]");
    expect_refused("\"num_experts\": 8", "\"num_experts\": 9", SIDA_ERROR_FORMAT, "classifier");
    expect_refused("\"num_layers\": 4", "\"num_layers\": 6", SIDA_ERROR_FORMAT,
                   "encoder.block.4.layer.0.layer_norm.weight");
    expect_refused("\"vocab_size\": 96", "\"vocab_size\": 4000000", SIDA_ERROR_FORMAT,
                   "shared.weight");
    expect_refused("\"switch_transformers\"", "\"mixtral\"", SIDA_ERROR_UNSUPPORTED, "mixtral");
    expect_refused("\"model_type\"", "\"other\"", SIDA_ERROR_FORMAT, "model_type is missing");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_waves),
        cmocka_unit_test(test_ahead),
        cmocka_unit_test(test_read_backs),
        cmocka_unit_test(test_hooks),
        cmocka_unit_test(test_hidden),
        cmocka_unit_test(test_cached_decoding),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_generate_stops),
        cmocka_unit_test(test_forced),
        cmocka_unit_test(test_refused_checkpoints),
    };
    return cmocka_run_group_tests_name("model_run", tests, NULL, NULL);
}
