#include "runtime/engine/routing.h"

#include "formats/base/memory.h"

#include <assert.h>
#include <float.h>
#include <stdlib.h>
#include <string.h>

static const char *const names[] = {"exact", "guided", "predicted"};

bool sida_routing_from_name(sida_routing *out, const char *name) {
    for (int i = 0; i < 3; i++)
        if (strcmp(names[i], name) == 0) {
            *out = (sida_routing)i;
            return true;
        }
    return false;
}

const char *sida_routing_name(sida_routing routing) {
    return names[routing];
}

static size_t index_of(const sida_router_sets *sets, int32_t layer, int32_t sequence) {
    return ((size_t)layer * (size_t)sets->sequences + (size_t)sequence) * (size_t)sets->experts;
}

sida_status sida_router_sets_begin(sida_router_sets *sets, const sida_model_info *info,
                                   int32_t sequences) {
    sida_status status = SIDA_OK;
    sets->experts = info->experts;
    sets->sequences = sequences;
    for (int side = 0; side < 2; side++) {
        sets->layers[side] = info->moe_layers[side];
        size_t items = (size_t)info->moe_layers[side] * (size_t)sequences * (size_t)info->experts;
        SIDA_TRY(SIDA_GROW(&sets->allowed[side], &sets->capacity[side], items, "allowed experts"));
        SIDA_TRY(SIDA_GROW(&sets->share_sum[side], &sets->share_capacity[side],
                           info->moe_layers[side], "allowed experts"));
        memset(sets->allowed[side], 0, items);
        if (sets->most == 0) continue;
        SIDA_TRY(
            SIDA_GROW(&sets->weight[side], &sets->weight_capacity[side], items, "allowed experts"));
        memset(sets->weight[side], 0, items * sizeof(float));
    }
out:
    return status;
}

/* Weights are >= 0, so they are ordered as their bits are. */
static uint32_t bits_of(float weight) {
    uint32_t bits;
    memcpy(&bits, &weight, sizeof bits);
    return bits;
}

static int32_t count_from(const float *weight, int32_t experts, uint32_t least) {
    int32_t count = 0;
    for (int32_t e = 0; e < experts; e++) count += bits_of(weight[e]) >= least;
    return count;
}

/* The `most` heaviest experts of those with a weight. */
static void keep_heaviest(uint8_t *set, const float *weight, int32_t experts, int32_t most) {
    /* The highest bar that `most` pass, bit by bit; 1: all that have a weight. */
    uint32_t bar = 0;
    for (uint32_t bit = UINT32_C(1) << 30; bit > 0; bit >>= 1)
        if (count_from(weight, experts, bar | bit) >= most) bar |= bit;
    if (bar == 0) bar = 1;
    int32_t ties = most - count_from(weight, experts, bar + 1);
    for (int32_t e = 0; e < experts; e++) {
        uint32_t bits = bits_of(weight[e]);
        set[e] = bits > bar || (bits == bar && ties-- > 0);
    }
}

/* α is how likely the expert is to be chosen, and then what its output is multiplied by: α² is what
 * the layer is expected to lose of the token without it. Predicted is predicted, however unlikely.
 */
static void weigh(float *weight, const sida_hash_table *table, int64_t at) {
    float alpha = table->alpha[at];
    weight[table->experts[at]] += alpha * alpha + FLT_MIN;
}

void sida_router_sets_add(sida_router_sets *sets, const sida_hash_table *table,
                          const int64_t *offsets) {
    assert(table->layers == sets->layers[table->side]);
    for (int32_t s = 0; s < sets->sequences; s++)
        for (int32_t layer = 0; layer < table->layers && offsets[s + 1] > offsets[s]; layer++) {
            size_t at = index_of(sets, layer, s);
            uint8_t *set = sets->allowed[table->side] + at;
            for (int64_t i = offsets[s]; i < offsets[s + 1]; i++) {
                int64_t row = (i * table->layers + layer) * table->k;
                for (int32_t r = 0; r < table->k; r++)
                    if (sets->most == 0)
                        set[table->experts[row + r]] = 1;
                    else
                        weigh(sets->weight[table->side] + at, table, row + r);
            }
            if (sets->most > 0)
                keep_heaviest(set, sets->weight[table->side] + at, sets->experts, sets->most);
        }
}

const uint8_t *sida_router_sets_at(const sida_router_sets *sets, int side, int32_t layer,
                                   int32_t sequence) {
    return sets->allowed[side] + index_of(sets, layer, sequence);
}

void sida_router_sets_union(uint8_t *out, const sida_router_sets *sets, int side, int32_t layer,
                            const int64_t *offsets) {
    memset(out, 0, (size_t)sets->experts);
    for (int32_t s = 0; s < sets->sequences; s++) {
        const uint8_t *set = sida_router_sets_at(sets, side, layer, s);
        for (int32_t e = 0; offsets[s + 1] > offsets[s] && e < sets->experts; e++) out[e] |= set[e];
    }
}

void sida_router_sets_end(sida_router_sets *sets) {
    for (int side = 0; side < 2; side++) {
        sets->share_count[side] += sets->sequences;
        for (int32_t layer = 0; layer < sets->layers[side]; layer++)
            for (int32_t s = 0; s < sets->sequences; s++) {
                const uint8_t *set = sida_router_sets_at(sets, side, layer, s);
                int32_t size = 0;
                for (int32_t e = 0; e < sets->experts; e++) size += set[e];
                sets->share_sum[side][layer] += (double)size / sets->experts;
            }
    }
}

void sida_router_sets_free(sida_router_sets *sets) {
    for (int side = 0; side < 2; side++) {
        free(sets->allowed[side]);
        free(sets->weight[side]);
        free(sets->share_sum[side]);
    }
    *sets = (sida_router_sets){0};
}

void sida_routing_predicted(const sida_hash_table *table, sida_moe_call *call, bool renormalise) {
    assert(table->side == call->side && table->tokens == call->tokens && table->k >= call->k);
    for (int64_t i = 0; i < call->tokens; i++) {
        int64_t row = (i * table->layers + call->layer) * table->k;
        int32_t *experts = call->experts + i * call->k;
        float *alpha = call->alpha + i * call->k, sum = 0;
        for (int32_t r = 0; r < call->k; r++) {
            experts[r] = table->experts[row + r];
            alpha[r] = table->alpha[row + r];
            sum += alpha[r];
        }
        for (int32_t r = 0; renormalise && r < call->k; r++) alpha[r] /= sum;
    }
}
