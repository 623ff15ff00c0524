#include "runtime/engine/routing.h"

#include "formats/base/memory.h"

#include <assert.h>
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

static uint8_t *set_at(const sida_router_sets *sets, int side, int32_t layer, int32_t sequence) {
    return sets->allowed[side] +
           ((size_t)layer * (size_t)sets->sequences + (size_t)sequence) * (size_t)sets->experts;
}

sida_status sida_router_sets_begin(sida_router_sets *sets, const sida_model_info *info,
                                   int32_t sequences) {
    sida_status status = SIDA_OK;
    sets->experts = info->experts;
    sets->sequences = sequences;
    for (int side = 0; side < 2; side++) {
        sets->layers[side] = info->moe_layers[side];
        size_t bytes = (size_t)info->moe_layers[side] * (size_t)sequences * (size_t)info->experts;
        SIDA_TRY(SIDA_GROW(&sets->allowed[side], &sets->capacity[side], bytes, "allowed experts"));
        memset(sets->allowed[side], 0, bytes);
    }
out:
    return status;
}

void sida_router_sets_add(sida_router_sets *sets, const sida_hash_table *table,
                          const int64_t *offsets) {
    assert(table->layers == sets->layers[table->side]);
    for (int32_t s = 0; s < sets->sequences; s++)
        for (int64_t i = offsets[s]; i < offsets[s + 1]; i++)
            for (int32_t layer = 0; layer < table->layers; layer++) {
                uint8_t *set = set_at(sets, table->side, layer, s);
                const uint16_t *row = table->experts + (i * table->layers + layer) * table->k;
                for (int32_t r = 0; r < table->k; r++) set[row[r]] = 1;
            }
}

const uint8_t *sida_router_sets_at(const sida_router_sets *sets, int side, int32_t layer,
                                   int32_t sequence) {
    return set_at(sets, side, layer, sequence);
}

void sida_router_sets_end(sida_router_sets *sets) {
    for (int side = 0; side < 2; side++)
        for (int32_t layer = 0; layer < sets->layers[side]; layer++)
            for (int32_t s = 0; s < sets->sequences; s++) {
                const uint8_t *set = set_at(sets, side, layer, s);
                int32_t size = 0;
                for (int32_t e = 0; e < sets->experts; e++) size += set[e];
                sets->share_sum[side] += (double)size / sets->experts;
                sets->share_count[side]++;
            }
}

void sida_router_sets_free(sida_router_sets *sets) {
    free(sets->allowed[0]);
    free(sets->allowed[1]);
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
