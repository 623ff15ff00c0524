#include "tools/cli/bench_record.h"

#include "formats/base/memory.h"
#include "formats/base/rng.h"

#include <stdlib.h>
#include <string.h>

enum { FIRST_ID = 3, END_ID = 32000, SEED = 7 };

static int64_t tokens_of(const sida_bench_record *record, int side) {
    return (int64_t)record->sequences * (side == SIDA_ENCODER ? record->length : 1);
}

static sida_status make_batch(sida_bench_record *record, sida_bench_batch *batch, sida_rng *rng) {
    sida_status status = SIDA_OK;
    const sida_model_info *info = record->info;
    int32_t end = info->vocabulary < END_ID ? info->vocabulary : END_ID;
    int32_t first = end > FIRST_ID ? FIRST_ID : 0;
    int64_t tokens = tokens_of(record, SIDA_ENCODER);
    SIDA_TRY(SIDA_ALLOC(&batch->offsets, record->sequences + 1, "a batch"));
    SIDA_TRY(SIDA_ALLOC(&batch->ids, tokens, "a batch"));
    for (int side = 0; side < 2; side++)
        SIDA_TRY(SIDA_ALLOC(&batch->experts[side],
                            tokens_of(record, side) * info->moe_layers[side] * info->top_k,
                            "a batch's routing"));
    for (int32_t s = 0; s <= record->sequences; s++)
        batch->offsets[s] = (int64_t)s * record->length;
    for (int64_t t = 0; t < tokens; t++)
        batch->ids[t] = first + (int32_t)sida_rng_below(rng, (uint32_t)(end - first));
    batch->input = (sida_ragged){record->sequences, batch->offsets, batch->ids};
out:
    return status;
}

sida_status sida_bench_record_create(sida_bench_record **out, const sida_model_info *info,
                                     int32_t count, int32_t sequences, int32_t length) {
    sida_status status = SIDA_OK;
    sida_bench_record *record = NULL;
    sida_rng rng = sida_rng_seed(SEED);
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&record, 1, "a benchmark's batches"));
    record->info = info;
    record->sequences = sequences;
    record->length = length;
    SIDA_TRY(SIDA_ALLOC(&record->batches, count, "a benchmark's batches"));
    SIDA_TRY(SIDA_ALLOC(&record->chosen, (int64_t)info->sites * info->experts, "routing counts"));
    SIDA_TRY(SIDA_ALLOC(&record->seen, info->experts, "routing counts"));
    record->count = count;
    for (int32_t b = 0; b < count; b++) SIDA_TRY(make_batch(record, &record->batches[b], &rng));
    *out = record;
    record = NULL;
out:
    sida_bench_record_destroy(record);
    return status;
}

void sida_bench_record_destroy(sida_bench_record *record) {
    if (!record) return;
    for (int32_t b = 0; b < record->count; b++) {
        free(record->batches[b].offsets);
        free(record->batches[b].ids);
        free(record->batches[b].experts[0]);
        free(record->batches[b].experts[1]);
    }
    free(record->batches);
    free(record->chosen);
    free(record->seen);
    free(record);
}

sida_status sida_bench_record_observe(void *context, const sida_moe_call *call) {
    sida_bench_record *record = context;
    sida_bench_batch *batch = &record->batches[record->current];
    int32_t k = call->k, layers = record->info->moe_layers[call->side];
    int64_t *chosen = record->chosen + (int64_t)call->site * call->experts_total;
    memset(record->seen, 0, (size_t)call->experts_total);
    for (int64_t t = 0; t < call->tokens; t++)
        for (int32_t r = 0; r < k; r++) {
            int32_t e = call->experts[t * k + r];
            batch->experts[call->side][(t * layers + call->layer) * k + r] = (uint16_t)e;
            chosen[e]++;
            if (call->dropped[t] || record->seen[e]) continue;
            record->seen[e] = 1;
            batch->touched++;
        }
    return SIDA_OK;
}

double sida_bench_record_top_share(const sida_bench_record *record) {
    const sida_model_info *info = record->info;
    int32_t layers = info->moe_layers[SIDA_ENCODER];
    double sum = 0;
    for (int32_t l = 0; l < layers; l++) {
        int64_t all = 0, most = 0;
        for (int32_t e = 0; e < info->experts; e++) {
            int64_t count = record->chosen[(int64_t)l * info->experts + e];
            all += count;
            if (count > most) most = count;
        }
        if (all > 0) sum += (double)most / (double)all;
    }
    return layers > 0 ? sum / layers : 0;
}

double sida_bench_record_touched(const sida_bench_record *record, int32_t first) {
    double sum = 0;
    for (int32_t b = first; b < record->count; b++) sum += (double)record->batches[b].touched;
    return sum / (record->count - first);
}

/* --- the oracle */

typedef struct oracle {
    sida_hash_source base;
    const sida_bench_record *record;
} oracle;

struct sida_hash_state {
    const sida_bench_batch *batch; /* of the last encode */
};

static void oracle_destroy(sida_hash_source *source) {
    free(source);
}

static sida_status oracle_state_create(const sida_hash_source *source, sida_hash_state **out) {
    (void)source;
    return SIDA_ALLOC(out, 1, "an oracle's state");
}

static void oracle_state_destroy(sida_hash_state *state) {
    free(state);
}

static sida_status hand_out(const sida_bench_record *record, const sida_bench_batch *batch,
                            int side, int32_t k, sida_hash_table *out) {
    sida_status status = SIDA_OK;
    const sida_model_info *info = record->info;
    int32_t layers = info->moe_layers[side];
    int64_t tokens = tokens_of(record, side);
    if (k != info->top_k)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "%d experts a token from a record of %d", k, info->top_k);
    SIDA_TRY(sida_hash_table_reserve(out, side, layers, k, tokens));
    memcpy(out->experts, batch->experts[side],
           (size_t)tokens * (size_t)layers * (size_t)k * sizeof *out->experts);
out:
    return status;
}

static sida_status oracle_encode(const sida_hash_source *source, sida_hash_state *state,
                                 const sida_ragged *input, int32_t k, sida_hash_table *out) {
    const sida_bench_record *record = ((const oracle *)source)->record;
    size_t bytes = (size_t)tokens_of(record, SIDA_ENCODER) * sizeof *input->ids;
    state->batch = NULL;
    for (int32_t b = 0; b < record->count && !state->batch; b++)
        if (input->sequences == record->sequences &&
            sida_ragged_tokens(input) == tokens_of(record, SIDA_ENCODER) &&
            memcmp(record->batches[b].ids, input->ids, bytes) == 0)
            state->batch = &record->batches[b];
    if (!state->batch) return sida_fail(SIDA_ERROR_ARGUMENT, "a batch that was not recorded");
    return hand_out(record, state->batch, SIDA_ENCODER, k, out);
}

static sida_status oracle_decode(const sida_hash_source *source, sida_hash_state *state,
                                 const sida_ragged *step, int32_t k, sida_hash_table *out) {
    const sida_bench_record *record = ((const oracle *)source)->record;
    if (!state->batch || sida_ragged_tokens(step) != tokens_of(record, SIDA_DECODER))
        return sida_fail(SIDA_ERROR_ARGUMENT, "a decoder step that was not recorded");
    return hand_out(record, state->batch, SIDA_DECODER, k, out);
}

sida_status sida_bench_oracle_create(sida_hash_source **out, const sida_bench_record *record) {
    static const sida_hash_source_table table = {.destroy = oracle_destroy,
                                                 .state_create = oracle_state_create,
                                                 .state_destroy = oracle_state_destroy,
                                                 .encode = oracle_encode,
                                                 .decode = oracle_decode};
    oracle *source;
    *out = NULL;
    sida_status status = SIDA_ALLOC(&source, 1, "an oracle");
    if (status != SIDA_OK) return status;
    source->base.table = &table;
    source->base.info = (sida_hash_source_info){
        .name = "oracle",
        .model = record->info->fingerprint,
        .d_model = record->info->d_model,
        .experts = record->info->experts,
        .layers = {record->info->moe_layers[0], record->info->moe_layers[1]}};
    source->record = record;
    *out = &source->base;
    return SIDA_OK;
}
