/* That a recording holds what an observing driver sees, on any back-end. */
#ifndef SIDA_TESTS_RECORDING_RIG_H
#define SIDA_TESTS_RECORDING_RIG_H

#include "formats/base/memory.h"
#include "runtime/model/model.h"
#include "tests/read_backs.h"
#include "tests/test.h"

#include <math.h>
#include <string.h>

#define RIG_OK(call)                                                                               \
    do {                                                                                           \
        sida_status rig_status = (call);                                                           \
        if (rig_status != SIDA_OK) fail_msg("%s: %s", #call, sida_last_message());                 \
    } while (0)

enum { RIG_SEQUENCES = 4, RIG_TOKENS = 61, RIG_STEP = 13, RIG_NEW = 5, RIG_CALLS = 3 + RIG_NEW };

static const int64_t rig_offsets[] = {0, 20, 20, 21, RIG_TOKENS},
                     rig_step_offsets[] = {0, 4, 4, 5, RIG_STEP};

/* fp16 steps between two log-probabilities; infinity is one step behind the largest. */
static inline int rig_steps(uint16_t a, uint16_t b) {
    int x = a & 0x8000 ? -(a & 0x7fff) : a, y = b & 0x8000 ? -(b & 0x7fff) : b;
    return abs(x - y);
}

/* One MoE layer of one call. */
typedef struct rig_seen {
    int32_t side, layer, experts_total, k;
    int64_t tokens, offsets[RIG_SEQUENCES + 1];
    int32_t position[RIG_SEQUENCES];
    int32_t *experts;
    float *alpha, *logits;
    uint8_t *dropped;
} rig_seen;

typedef struct rig {
    sida_model *model;
    sida_resident *resident;
    sida_run *run;
    const sida_model_info *info;
    int32_t top, ids[RIG_TOKENS], target[RIG_STEP];
    rig_seen seen[RIG_CALLS * 8];
    int seen_count;
    int64_t rows, other_bits; /* compared, and log-probabilities that are not the same bits */
} rig;

static inline void *rig_copy(const void *data, size_t bytes) {
    void *copy = malloc(bytes + 1);
    assert_non_null(copy);
    memcpy(copy, data, bytes);
    return copy;
}

static inline sida_status rig_observe(void *context, const sida_moe_call *call) {
    rig *r = context;
    const size_t n = (size_t)call->tokens, k = (size_t)call->k;
    assert_true(r->seen_count < (int)(sizeof r->seen / sizeof *r->seen));
    rig_seen *to = &r->seen[r->seen_count++];
    *to = (rig_seen){
        .side = call->side,
        .layer = call->layer,
        .experts_total = call->experts_total,
        .k = call->k,
        .tokens = call->tokens,
        .experts = rig_copy(call->experts, n * k * sizeof *call->experts),
        .alpha = rig_copy(call->alpha, n * k * sizeof *call->alpha),
        .logits = rig_copy(call->logits, n * (size_t)call->experts_total * sizeof *call->logits),
        .dropped = rig_copy(call->dropped, n)};
    memcpy(to->offsets, call->offsets, sizeof to->offsets);
    memcpy(to->position, call->position, sizeof to->position);
    return SIDA_OK;
}

/* An encode with a teacher-forced decode, and one with generation: free() the logits. */
static inline float *rig_pass(rig *r, const sida_moe_driver *driver, bool watch) {
    const sida_ragged input = {RIG_SEQUENCES, rig_offsets, r->ids},
                      step = {RIG_SEQUENCES, rig_step_offsets, r->target};
    int32_t answers[RIG_SEQUENCES * RIG_NEW], counts[RIG_SEQUENCES];
    const sida_generate_options generate = {.max_new_tokens = RIG_NEW};
    float *logits = NULL;
    RIG_OK(SIDA_ALLOC(&logits, RIG_STEP * r->info->vocabulary, "logits"));
    read_backs_reset();
    RIG_OK(sida_run_encode(r->run, &input, driver));
    RIG_OK(sida_run_decode(r->run, &step, driver));
    if (watch) assert_int_equal(read_backs.waits, 0);
    RIG_OK(sida_run_read_logits(r->run, 0, RIG_STEP, logits));
    RIG_OK(sida_run_encode(r->run, &input, driver));
    RIG_OK(sida_run_generate(r->run, &generate, driver, answers, counts));
    return logits;
}

static inline void rig_compare_layer(rig *r, const rig_seen *want, const sida_recorded_layer *got,
                                     int steps) {
    const size_t n = (size_t)want->tokens, k = (size_t)want->k;
    const int64_t cells = want->tokens * r->top;
    uint16_t *ids = NULL, *logp = NULL;
    assert_memory_equal(got->experts, want->experts, n * k * sizeof *want->experts);
    assert_memory_equal(got->alpha, want->alpha, n * k * sizeof *want->alpha);
    assert_memory_equal(got->dropped, want->dropped, n);
    RIG_OK(SIDA_ALLOC(&ids, cells, "top"));
    RIG_OK(SIDA_ALLOC(&logp, cells, "top"));
    const sida_top_call top = {.ids = ids,
                               .logp = logp,
                               .logits = want->logits,
                               .n = want->tokens,
                               .experts_total = want->experts_total,
                               .top = r->top};
    RIG_OK(sida_top_cpu(NULL, &top));
    assert_memory_equal(got->top_ids, ids, (size_t)cells * sizeof *ids);
    for (int64_t i = 0; i < cells; i++) {
        assert_true(rig_steps(got->top_logp[i], logp[i]) <= steps);
        r->other_bits += got->top_logp[i] != logp[i];
    }
    r->rows += want->tokens;
    free(ids);
    free(logp);
}

static inline void rig_compare(rig *r, const sida_recording *recording, int steps) {
    int at = 0;
    RIG_OK(sida_recording_wait(recording));
    for (int32_t i = 0; i < sida_recording_calls(recording); i++) {
        const sida_recorded_call call = sida_recording_call(recording, i);
        assert_int_equal(call.top, r->top);
        for (int32_t layer = 0; layer < call.layers; layer++) {
            assert_true(at < r->seen_count);
            const rig_seen *want = &r->seen[at++];
            assert_int_equal(call.side, want->side);
            assert_int_equal(layer, want->layer);
            assert_int_equal(call.tokens, want->tokens);
            assert_memory_equal(call.offsets, want->offsets, sizeof want->offsets);
            assert_memory_equal(call.position, want->position, sizeof want->position);
            const sida_recorded_layer got = sida_recording_layer(recording, i, layer);
            rig_compare_layer(r, want, &got, steps);
        }
    }
    assert_int_equal(at, r->seen_count);
}

static inline void rig_refusals(rig *r, sida_recording *full, sida_recording *empty) {
    const sida_ragged input = {RIG_SEQUENCES, rig_offsets, r->ids};
    const sida_run_limits limits = {RIG_SEQUENCES, RIG_TOKENS, RIG_STEP, 8, r->info->experts + 1};
    sida_moe_driver driver = {.resident = sida_resident_table(r->resident), .record = full};
    sida_run *other;
    assert_int_equal(sida_run_create(&other, r->model, &limits), SIDA_ERROR_ARGUMENT);
    for (int i = sida_recording_calls(full); i < RIG_CALLS; i++)
        RIG_OK(sida_run_encode(r->run, &input, &driver));
    assert_int_equal(sida_run_encode(r->run, &input, &driver), SIDA_ERROR_ARGUMENT);
    /* Another run's, and one without room for it. */
    const sida_run_limits plain = {RIG_SEQUENCES, RIG_TOKENS, RIG_STEP, 8, 0};
    RIG_OK(sida_run_create(&other, r->model, &plain));
    driver.record = empty;
    assert_int_equal(sida_run_encode(other, &input, &driver), SIDA_ERROR_ARGUMENT);
    sida_run_destroy(other);
}

/* The model in `folder`, T of its experts. steps: between the device's log-probabilities and those
 * that the CPU makes of the device's logits. */
static inline void rig_check(sida_backend *backend, const char *folder, int32_t top, int steps) {
    rig r = {.top = top};
    sida_recording *recordings[2];
    read_backs_watch(backend);
    RIG_OK(sida_model_open(&r.model, backend, folder));
    RIG_OK(sida_resident_create(&r.resident, r.model));
    r.info = sida_model_get_info(r.model);
    const sida_run_limits limits = {RIG_SEQUENCES, RIG_TOKENS, RIG_STEP, 8, top};
    RIG_OK(sida_run_create(&r.run, r.model, &limits));
    for (int i = 0; i < RIG_TOKENS; i++) r.ids[i] = (i * 37 + 5) % r.info->vocabulary;
    for (int i = 0; i < RIG_STEP; i++) r.target[i] = (i * 11 + 3) % r.info->vocabulary;
    for (int i = 0; i < 2; i++) RIG_OK(sida_recording_create(&recordings[i], r.run, RIG_CALLS));
    size_t bytes = (size_t)RIG_STEP * (size_t)r.info->vocabulary * sizeof(float);
    float *want = rig_pass(&r, sida_resident_driver(r.resident, &r, NULL, rig_observe), false);
    assert_true(r.seen_count > 0);
    /* Issued, recorded as graphs, replayed; the one before is read while the next one runs. */
    for (int i = 0; i < 4; i++) {
        const sida_moe_driver driver = {.resident = sida_resident_table(r.resident),
                                        .record = recordings[i % 2]};
        float *got = rig_pass(&r, &driver, true);
        assert_memory_equal(got, want, bytes);
        free(got);
        if (i == 0) continue;
        rig_compare(&r, recordings[(i + 1) % 2], steps);
        sida_recording_reset(recordings[(i + 1) % 2]);
    }
    rig_compare(&r, recordings[1], steps);
    rig_refusals(&r, recordings[1], recordings[0]);
    printf("%s: %lld rows, %lld log-probabilities a step off\n", folder, (long long)r.rows,
           (long long)r.other_bits);
    free(want);
    for (int i = 0; i < r.seen_count; i++) {
        free(r.seen[i].experts);
        free(r.seen[i].alpha);
        free(r.seen[i].logits);
        free(r.seen[i].dropped);
    }
    for (int i = 0; i < 2; i++) sida_recording_destroy(recordings[i]);
    sida_run_destroy(r.run);
    sida_resident_destroy(r.resident);
    sida_model_destroy(r.model);
}

#endif
