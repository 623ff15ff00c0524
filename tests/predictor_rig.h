/* Batches for a hash source, run step by step, and the comparison of a source on a device with the
 * same one on the host. */
#ifndef SIDA_TESTS_PREDICTOR_RIG_H
#define SIDA_TESTS_PREDICTOR_RIG_H

#include "formats/base/rng.h"
#include "runtime/predictor/sources.h"
#include "tests/test.h"

#include <math.h>
#include <string.h>

enum { RIG_STEPS = 5 };

#define RIG_OK(call)                                                                               \
    do {                                                                                           \
        sida_status rig_status = (call);                                                           \
        if (rig_status != SIDA_OK) fail_msg("%s: %s", #call, sida_last_message());                 \
    } while (0)

/* Call 0 is the encoder's input, 1 … RIG_STEPS are the decoder's. */
typedef struct rig_batch {
    int32_t sequences, k;
    int64_t *offsets[RIG_STEPS + 1];
    int32_t *ids[RIG_STEPS + 1];
    /* What a source on the host says of each call: all experts, best first. */
    sida_hash_table full[RIG_STEPS + 1];
} rig_batch;

/* An LSTM's initial values times `factor`, so that SparseMax drops keys; a Transformer's, half of
 * whose tensors begin at zero, with noise. */
static inline void rig_parameters(sida_net *net, float factor) {
    sida_rng rng = sida_rng_seed(6);
    sida_net_initialise(net, 5);
    for (int64_t i = 0; i < net->parameter_count; i++)
        if (net->config.kind == SIDA_NET_TRANSFORMER)
            net->parameters[i] += 0.1f * sida_rng_normal(&rng);
        else
            net->parameters[i] *= factor;
}

/* Sequences of 0 … longest tokens; every decoder begins with one token, then sequences stand still,
 * go on by one or two tokens, or have ended. */
static inline rig_batch rig_make(int32_t sequences, int32_t longest, int32_t vocabulary, int32_t k,
                                 uint64_t seed) {
    rig_batch batch = {.sequences = sequences, .k = k};
    sida_rng rng = sida_rng_seed(seed);
    for (int call = 0; call <= RIG_STEPS; call++) {
        int64_t *offsets = calloc((size_t)sequences + 1, sizeof *offsets);
        for (int32_t s = 0; s < sequences; s++) {
            int64_t n = call == 1 ? 1 : (int64_t)sida_rng_below(&rng, 3);
            if (call == 0)
                n = s % 5 == 2 ? 0 : 1 + (int64_t)sida_rng_below(&rng, (uint32_t)longest);
            if (call > 1 && s % RIG_STEPS + 1 < call) n = 0; /* has ended */
            offsets[s + 1] = offsets[s] + n;
        }
        batch.offsets[call] = offsets;
        batch.ids[call] = calloc((size_t)offsets[sequences] + 1, sizeof(int32_t));
        for (int64_t i = 0; i < offsets[sequences]; i++)
            batch.ids[call][i] = (int32_t)sida_rng_below(&rng, (uint32_t)vocabulary);
    }
    return batch;
}

static inline void rig_free(rig_batch *batch) {
    for (int call = 0; call <= RIG_STEPS; call++) {
        free(batch->offsets[call]);
        free(batch->ids[call]);
        sida_hash_table_free(&batch->full[call]);
    }
}

static inline sida_hash_limits rig_limits(int32_t states, int32_t sequences, int32_t longest,
                                          int32_t k) {
    return (sida_hash_limits){.states = states,
                              .sequences = sequences,
                              .input_tokens = (int64_t)sequences * longest,
                              .step_tokens = 2 * (int64_t)sequences,
                              .decoder_positions = 2 * RIG_STEPS,
                              .k = k};
}

static inline void rig_run(const sida_hash_source *source, sida_hash_state *state,
                           const rig_batch *batch, int call, int32_t k, sida_hash_table *out) {
    const sida_ragged input = {batch->sequences, batch->offsets[call], batch->ids[call]};
    RIG_OK(call == 0 ? sida_hash_encode(source, state, &input, k, out)
                     : sida_hash_decode(source, state, &input, k, out));
}

/* Asks a source on the host. */
static inline void rig_expect(rig_batch *batch, const sida_hash_source *host) {
    sida_hash_state *state;
    RIG_OK(sida_hash_state_create(host, &state));
    for (int call = 0; call <= RIG_STEPS; call++)
        rig_run(host, state, batch, call, host->info.experts, &batch->full[call]);
    sida_hash_state_destroy(host, state);
}

/* Factors within `tolerance`; an expert may stand where another was expected only if the scores of
 * the two, known by their factors' ratio, are within `ties`. Returns how many do. */
static inline int64_t rig_compare(const rig_batch *batch, int call, const sida_hash_table *got,
                                  float tolerance, float ties) {
    const sida_hash_table *full = &batch->full[call];
    int32_t experts = full->k, k = got->k;
    int64_t swapped = 0;
    assert_int_equal(got->tokens, full->tokens);
    assert_int_equal(got->layers, full->layers);
    assert_int_equal(got->side, full->side);
    for (int64_t i = 0; i < got->tokens * got->layers; i++) {
        float alpha_of[512];
        assert_true(experts <= 512);
        for (int32_t r = 0; r < experts; r++)
            alpha_of[full->experts[i * experts + r]] = full->alpha[i * experts + r];
        for (int32_t r = 0; r < k; r++) {
            uint16_t expert = got->experts[i * k + r], wanted = full->experts[i * experts + r];
            if (expert >= experts) fail_msg("call %d, row %lld: %d", call, (long long)i, expert);
            for (int32_t before = 0; before < r; before++)
                assert_int_not_equal(expert, got->experts[i * k + before]);
            float alpha = got->alpha[i * k + r];
            if (!(fabsf(alpha - alpha_of[expert]) <= tolerance))
                fail_msg("call %d, row %lld, rank %d: factor %g, expected %g", call, (long long)i,
                         r, (double)alpha, (double)alpha_of[expert]);
            if (expert == wanted) continue;
            swapped++;
            if (!(fabsf(logf(alpha_of[expert] / alpha_of[wanted])) <= ties))
                fail_msg("call %d, row %lld, rank %d: expert %d of factor %g, expected %d of %g",
                         call, (long long)i, r, expert, (double)alpha_of[expert], wanted,
                         (double)alpha_of[wanted]);
        }
    }
    return swapped;
}

/* A thread that runs a batch from beginning to end, many times. */
typedef struct rig_worker {
    const sida_hash_source *source;
    const rig_batch *batch;
    float tolerance, ties;
    int rounds;
} rig_worker;

static inline void *rig_work(void *argument) {
    const rig_worker *w = argument;
    sida_hash_state *state;
    sida_hash_table table = {0};
    RIG_OK(sida_hash_state_create(w->source, &state));
    for (int round = 0; round < w->rounds; round++)
        for (int call = 0; call <= RIG_STEPS; call++) {
            rig_run(w->source, state, w->batch, call, w->batch->k, &table);
            rig_compare(w->batch, call, &table, w->tolerance, w->ties);
        }
    sida_hash_state_destroy(w->source, state);
    sida_hash_table_free(&table);
    return NULL;
}

#endif
