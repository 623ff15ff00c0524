#include "tools/cli/bench_source.h"

#include "formats/base/memory.h"
#include "formats/base/rng.h"

#include <stdlib.h>
#include <string.h>

enum { SEED = 11, MOST_DRAWS = 16 };

typedef struct record_source {
    sida_hash_source base;
    const sida_bench_record *record;
    int32_t k;
    uint16_t **tables[2]; /* [side][batches] [tokens, MoE layers of the side, k]; NULL: the truth */
} record_source;

struct sida_hash_state {
    int32_t batch; /* of the last encode, -1: none */
};

static void source_destroy(sida_hash_source *base) {
    record_source *source = (record_source *)base;
    for (int side = 0; side < 2; side++) {
        for (int32_t b = 0; source->tables[side] && b < source->record->count; b++)
            free(source->tables[side][b]);
        free(source->tables[side]);
    }
    free(source);
}

static sida_status source_state_create(const sida_hash_source *source, sida_hash_state **out) {
    (void)source;
    return SIDA_ALLOC(out, 1, "a benchmark's predictions");
}

static void source_state_destroy(sida_hash_state *state) {
    free(state);
}

static sida_status hand_out(const record_source *source, int32_t batch, int side, int32_t k,
                            sida_hash_table *out) {
    sida_status status = SIDA_OK;
    const sida_bench_record *record = source->record;
    int32_t layers = record->info->moe_layers[side];
    int64_t tokens = sida_bench_record_tokens(record, side);
    if (k != source->k)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "%d experts a token from tables of %d", k, source->k);
    SIDA_TRY(sida_hash_table_reserve(out, side, layers, k, tokens));
    memcpy(out->experts,
           source->tables[side] ? source->tables[side][batch]
                                : record->batches[batch].experts[side],
           (size_t)tokens * (size_t)layers * (size_t)k * sizeof *out->experts);
out:
    return status;
}

static sida_status source_encode(const sida_hash_source *base, sida_hash_state *state,
                                 const sida_ragged *input, int32_t k, sida_hash_table *out) {
    const record_source *source = (const record_source *)base;
    const sida_bench_record *record = source->record;
    int64_t tokens = sida_bench_record_tokens(record, SIDA_ENCODER);
    state->batch = -1;
    for (int32_t b = 0; b < record->count && state->batch < 0; b++)
        if (input->sequences == record->sequences && sida_ragged_tokens(input) == tokens &&
            memcmp(record->batches[b].ids, input->ids, (size_t)tokens * sizeof *input->ids) == 0)
            state->batch = b;
    if (state->batch < 0) return sida_fail(SIDA_ERROR_ARGUMENT, "a batch that was not recorded");
    return hand_out(source, state->batch, SIDA_ENCODER, k, out);
}

static sida_status source_decode(const sida_hash_source *base, sida_hash_state *state,
                                 const sida_ragged *step, int32_t k, sida_hash_table *out) {
    const record_source *source = (const record_source *)base;
    if (state->batch < 0 ||
        sida_ragged_tokens(step) != sida_bench_record_tokens(source->record, SIDA_DECODER))
        return sida_fail(SIDA_ERROR_ARGUMENT, "a decoder step that was not recorded");
    return hand_out(source, state->batch, SIDA_DECODER, k, out);
}

/* --- tables of limited recall */

typedef struct maker {
    const sida_bench_record *record;
    const sida_bench_recall *recall;
    int64_t *up_to; /* [sites, E] tokens that chose this expert or one before it */
    sida_rng rng;
    int64_t pairs, first, all;
} maker;

static bool holds(const uint16_t *places, int32_t count, int32_t e) {
    for (int32_t i = 0; i < count; i++)
        if (places[i] == e) return true;
    return false;
}

/* An expert as the layer's tokens choose it, but none of `used`. */
static uint16_t draw_other(maker *m, int32_t site, const uint16_t *used, int32_t count) {
    int32_t experts = m->record->info->experts, e = 0;
    const int64_t *up_to = m->up_to + (int64_t)site * experts;
    for (int i = 0; i < MOST_DRAWS; i++) {
        int64_t at = (int64_t)sida_rng_below(&m->rng, (uint32_t)up_to[experts - 1]);
        int32_t low = 0, high = experts - 1;
        while (low < high) {
            int32_t middle = (low + high) / 2;
            if (up_to[middle] > at)
                high = middle;
            else
                low = middle + 1;
        }
        e = low;
        if (!holds(used, count, e)) return (uint16_t)e;
    }
    /* The layer's tokens hardly choose any other. */
    while (holds(used, count, e)) e = (int32_t)sida_rng_below(&m->rng, (uint32_t)experts);
    return (uint16_t)e;
}

/* The places of one token and layer. used: scratch, [places + 1]. */
static void fill_places(maker *m, uint16_t *places, int32_t site, uint16_t truth, uint16_t *used) {
    int32_t k = m->recall->places, count = 1, at = -1;
    double chance = sida_rng_f32(&m->rng);
    if (chance < m->recall->first)
        at = 0;
    else if (chance < m->recall->all && k > 1)
        at = 1 + (int32_t)sida_rng_below(&m->rng, (uint32_t)k - 1);
    used[0] = truth;
    for (int32_t i = 0; i < k; i++) {
        if (i != at) used[count] = draw_other(m, site, used, count);
        places[i] = i == at ? truth : used[count++];
    }
    m->pairs++;
    m->first += at == 0;
    m->all += at >= 0;
}

static sida_status make_tables(record_source *source, maker *m) {
    sida_status status = SIDA_OK;
    const sida_model_info *info = m->record->info;
    uint16_t *used = NULL;
    int32_t k = m->recall->places;
    SIDA_TRY(SIDA_ALLOC(&used, k + 1, "tables"));
    for (int side = 0; side < 2; side++)
        SIDA_TRY(SIDA_ALLOC(&source->tables[side], m->record->count, "tables"));
    for (int32_t b = 0; b < m->record->count; b++)
        for (int side = 0; side < 2; side++) {
            int32_t layers = info->moe_layers[side];
            int32_t first_site = side == SIDA_DECODER ? info->moe_layers[SIDA_ENCODER] : 0;
            int64_t pairs = sida_bench_record_tokens(m->record, side) * layers;
            const uint16_t *truth = m->record->batches[b].experts[side];
            SIDA_TRY(SIDA_ALLOC(&source->tables[side][b], pairs * k, "tables"));
            for (int64_t i = 0; i < pairs; i++)
                fill_places(m, source->tables[side][b] + i * k, first_site + (int32_t)(i % layers),
                            truth[i], used);
        }
out:
    free(used);
    return status;
}

static sida_status add_mistakes(record_source *source, const sida_bench_recall *recall,
                                sida_bench_recall *measured) {
    sida_status status = SIDA_OK;
    const sida_model_info *info = source->record->info;
    maker m = {.record = source->record, .recall = recall, .rng = sida_rng_seed(SEED)};
    if (info->top_k != 1 || info->experts <= recall->places)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT,
                  "tables of limited recall with %d places need a model with one expert a token, "
                  "of more than %d; this one has %d of %d",
                  recall->places, recall->places, info->top_k, info->experts);
    size_t count = (size_t)info->sites * (size_t)info->experts;
    SIDA_TRY(SIDA_ALLOC(&m.up_to, count, "tables"));
    for (size_t i = 0; i < count; i++)
        m.up_to[i] =
            source->record->chosen[i] + (i % (size_t)info->experts ? m.up_to[i - 1] : (int64_t)0);
    SIDA_TRY(make_tables(source, &m));
    source->k = recall->places;
    if (measured)
        *measured = (sida_bench_recall){.places = recall->places,
                                        .first = (double)m.first / (double)m.pairs,
                                        .all = (double)m.all / (double)m.pairs};
out:
    free(m.up_to);
    return status;
}

sida_status sida_bench_source_create(sida_hash_source **out, const sida_bench_record *record,
                                     const sida_bench_recall *recall, sida_bench_recall *measured) {
    static const sida_hash_source_table table = {.destroy = source_destroy,
                                                 .state_create = source_state_create,
                                                 .state_destroy = source_state_destroy,
                                                 .encode = source_encode,
                                                 .decode = source_decode};
    record_source *source;
    *out = NULL;
    sida_status status = SIDA_ALLOC(&source, 1, "a benchmark's predictions");
    if (status != SIDA_OK) return status;
    source->base.table = &table;
    source->base.info = (sida_hash_source_info){
        .name = recall->places > 0 ? "recall" : "oracle",
        .model = record->info->fingerprint,
        .d_model = record->info->d_model,
        .experts = record->info->experts,
        .layers = {record->info->moe_layers[0], record->info->moe_layers[1]}};
    source->record = record;
    source->k = record->info->top_k;
    if (recall->places > 0) SIDA_TRY(add_mistakes(source, recall, measured));
    *out = &source->base;
    source = NULL;
out:
    if (source) source_destroy(&source->base);
    return status;
}
