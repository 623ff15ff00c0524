/* Refinements on a device beside those on the host: the same calls, the same choices, layer by
 * layer. */
#ifndef SIDA_TESTS_REFINE_RIG_H
#define SIDA_TESTS_REFINE_RIG_H

#include "tests/predictor_rig.h"

/* All tensors random: heads start at zero, which would refine nothing. */
static inline void rig_refine_parameters(sida_refine *refine) {
    sida_rng rng = sida_rng_seed(8);
    sida_refine_initialise(refine, 7);
    for (int64_t i = 0; i < refine->parameter_count; i++)
        refine->parameters[i] += 0.1f * sida_rng_normal(&rng);
}

/* What layers 0 … layer have chosen of a call's tokens, whatever was predicted. */
static inline int32_t *rig_choices(int call, int32_t layer, int64_t tokens, int32_t top_k,
                                   int32_t experts) {
    sida_rng rng = sida_rng_seed((uint64_t)(call * 100 + layer));
    int32_t *chosen = calloc((size_t)(tokens * top_k) + 1, sizeof *chosen);
    for (int64_t i = 0; i < tokens * top_k; i++)
        chosen[i] = (int32_t)sida_rng_below(&rng, (uint32_t)experts);
    return chosen;
}

/* Runs a batch on both, and behind each call, as far as `refined` says, tells both what its layers
 * have chosen. Checks the rows of the layers behind. Returns how many rows were compared; those
 * that have experts in another order are added to *swapped. */
static inline int64_t rig_refine_batch(const sida_hash_source *host, const sida_hash_source *placed,
                                       sida_hash_state *on_host, sida_hash_state *on_device,
                                       rig_batch *batch, int32_t top_k, float tolerance, float ties,
                                       int64_t *swapped) {
    const int32_t experts = host->info.experts;
    sida_hash_table table = {0}, got = {0};
    int64_t rows = 0;
    /* The decoder's first step before the encoder's layers tell, as an engine does. */
    static const int order[] = {0, 1, -1, -2, 2, -3, 3, -4, 4, 5, -6};
    for (size_t o = 0; o < sizeof order / sizeof *order; o++) {
        const int call = order[o] < 0 ? -order[o] - 1 : order[o], side = call > 0;
        const int32_t layers = host->info.layers[side];
        const int64_t tokens = batch->offsets[call][batch->sequences];
        if (order[o] >= 0) {
            rig_run(host, on_host, batch, call, experts, &batch->full[call]);
            rig_run(placed, on_device, batch, call, batch->k, &table);
            *swapped += rig_compare(batch, call, &table, tolerance, ties);
            continue;
        }
        for (int32_t layer = 0; layer + 1 < layers; layer++) {
            int32_t *chosen = rig_choices(call, layer, tokens, top_k, experts);
            RIG_OK(sida_hash_refine(host, on_host, side, layer, chosen, top_k, experts,
                                    &batch->full[call]));
            RIG_OK(
                sida_hash_refine(placed, on_device, side, layer, chosen, top_k, batch->k, &table));
            free(chosen);
            assert_int_equal(table.layers, layers);
            assert_int_equal(table.tokens, tokens);
            /* The rows behind, as a table of their own. */
            sida_hash_table *full = &batch->full[call];
            const int32_t behind = layers - 1 - layer;
            sida_hash_table whole = *full;
            *full = (sida_hash_table){0};
            RIG_OK(sida_hash_table_reserve(full, side, behind, experts, tokens));
            RIG_OK(sida_hash_table_reserve(&got, side, behind, batch->k, tokens));
            for (int64_t i = 0; i < tokens; i++)
                for (int32_t m = 0; m < behind; m++)
                    for (int32_t r = 0; r < experts; r++) {
                        const int64_t to = i * behind + m, from = i * layers + layer + 1 + m;
                        full->experts[to * experts + r] = whole.experts[from * experts + r];
                        full->alpha[to * experts + r] = whole.alpha[from * experts + r];
                        if (r >= batch->k) continue;
                        got.experts[to * batch->k + r] = table.experts[from * batch->k + r];
                        got.alpha[to * batch->k + r] = table.alpha[from * batch->k + r];
                    }
            *swapped += rig_compare(batch, call, &got, tolerance, ties);
            rows += tokens * behind;
            sida_hash_table_free(&whole);
        }
    }
    sida_hash_table_free(&table);
    sida_hash_table_free(&got);
    return rows;
}

#endif
