#include "tools/cli/bench_record.h"

#include "formats/base/memory.h"
#include "formats/base/rng.h"

#include <stdlib.h>
#include <string.h>

enum { FIRST_ID = 3, END_ID = 32000, SEED = 7 };

int64_t sida_bench_record_tokens(const sida_bench_record *record, int side) {
    return (int64_t)record->sequences * (side == SIDA_ENCODER ? record->length : 1);
}

static sida_status make_batch(sida_bench_record *record, sida_bench_batch *batch, sida_rng *rng) {
    sida_status status = SIDA_OK;
    const sida_model_info *info = record->info;
    int32_t end = info->vocabulary < END_ID ? info->vocabulary : END_ID;
    int32_t first = end > FIRST_ID ? FIRST_ID : 0;
    int64_t tokens = sida_bench_record_tokens(record, SIDA_ENCODER);
    SIDA_TRY(SIDA_ALLOC(&batch->offsets, record->sequences + 1, "a batch"));
    SIDA_TRY(SIDA_ALLOC(&batch->ids, tokens, "a batch"));
    for (int side = 0; side < 2; side++)
        SIDA_TRY(SIDA_ALLOC(&batch->experts[side],
                            sida_bench_record_tokens(record, side) * info->moe_layers[side] *
                                info->top_k,
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
    SIDA_TRY(SIDA_ALLOC(&record->start, (int64_t)count * info->sites + 1, "routing counts"));
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
    free(record->start);
    free(record->needs);
    free(record->seen);
    free(record);
}

sida_status sida_bench_record_observe(void *context, const sida_moe_call *call) {
    sida_bench_record *record = context;
    sida_bench_batch *batch = &record->batches[record->current];
    sida_status status = SIDA_OK;
    int32_t k = call->k, layers = record->info->moe_layers[call->side];
    int64_t *chosen = record->chosen + (int64_t)call->site * call->experts_total;
    int64_t *start = record->start + (int64_t)record->current * record->info->sites + call->site;
    int64_t count = *start;
    SIDA_TRY(SIDA_GROW(&record->needs, &record->needs_capacity, count + call->experts_total,
                       "a benchmark's needs"));
    memset(record->seen, 0, (size_t)call->experts_total);
    for (int64_t t = 0; t < call->tokens; t++)
        for (int32_t r = 0; r < k; r++) {
            int32_t e = call->experts[t * k + r];
            batch->experts[call->side][(t * layers + call->layer) * k + r] = (uint16_t)e;
            chosen[e]++;
            if (call->dropped[t] || record->seen[e]) continue;
            record->seen[e] = 1;
            record->needs[count++] = call->site * call->experts_total + e;
        }
    start[1] = count;
out:
    return status;
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

double sida_bench_record_touched(const sida_bench_record *record, int32_t first, int32_t end) {
    const int64_t sites = record->info->sites;
    return (double)(record->start[end * sites] - record->start[first * sites]) / (end - first);
}
