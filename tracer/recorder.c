#include "tracer/recorder.h"

#include "formats/base/memory.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

sida_status sida_recorder_init(sida_recorder *recorder, const sida_model_info *info, int32_t top) {
    *recorder = (sida_recorder){.experts = info->experts,
                                .top_k = info->top_k,
                                .top = top,
                                .layers = {info->moe_layers[0], info->moe_layers[1]}};
    return SIDA_ALLOC(&recorder->order, info->experts, "a recorder");
}

void sida_recorder_free(sida_recorder *recorder) {
    sida_trace_rows_free(&recorder->rows);
    free(recorder->order);
}

sida_status sida_recorder_start(sida_recorder *recorder, int side, int64_t rows,
                                const int64_t *base) {
    sida_status status = SIDA_OK;
    recorder->side = side;
    recorder->base = base;
    if (rows <= recorder->capacity) return SIDA_OK;
    int32_t most =
        recorder->layers[0] > recorder->layers[1] ? recorder->layers[0] : recorder->layers[1];
    recorder->capacity = 0;
    sida_trace_rows_free(&recorder->rows);
    SIDA_TRY(sida_trace_rows_alloc(&recorder->rows, most, recorder->top_k, recorder->top, rows));
    recorder->capacity = rows;
out:
    return status;
}

/* The T best experts by logit, ties to the lower id, by insertion: T is small beside E. */
static void find_top(uint32_t *best, const float *logits, int32_t experts, int32_t top) {
    int32_t held = 0;
    for (int32_t e = 0; e < experts; e++) {
        if (held == top && !(logits[e] > logits[best[top - 1]])) continue;
        int32_t at = held < top ? held++ : top - 1;
        for (; at > 0 && logits[e] > logits[best[at - 1]]; at--) best[at] = best[at - 1];
        best[at] = (uint32_t)e;
    }
}

static float log_sum_exp(const float *logits, int32_t experts) {
    double largest = logits[0], sum = 0;
    for (int32_t e = 1; e < experts; e++) largest = fmax(largest, logits[e]);
    for (int32_t e = 0; e < experts; e++) sum += exp(logits[e] - largest);
    return (float)(largest + log(sum));
}

sida_status sida_recorder_observe(void *context, const sida_moe_call *call) {
    sida_recorder *recorder = context;
    const int32_t k = recorder->top_k, top = recorder->top, experts = recorder->experts;
    if (call->side != recorder->side) return SIDA_OK;
    for (int32_t s = 0; s < call->sequences; s++) {
        int64_t row = recorder->base[s] + call->position[s];
        for (int64_t t = call->offsets[s]; t < call->offsets[s + 1]; t++, row++) {
            int64_t at = row * recorder->layers[call->side] + call->layer;
            const float *logits = call->logits + t * experts;
            for (int32_t r = 0; r < k; r++) {
                recorder->rows.experts[at * k + r] = (uint16_t)call->experts[t * k + r];
                recorder->rows.alpha[at * k + r] = call->alpha[t * k + r];
            }
            recorder->rows.dropped[at] = call->dropped[t];
            find_top(recorder->order, logits, experts, top);
            float norm = log_sum_exp(logits, experts);
            if (!isfinite(norm))
                return sida_fail(SIDA_ERROR_FORMAT,
                                 "MoE layer %d's router gave logits that are not finite",
                                 call->site);
            for (int32_t i = 0; i < top; i++) {
                uint32_t e = recorder->order[i];
                recorder->rows.top_ids[at * top + i] = (uint16_t)e;
                recorder->rows.top_logp[at * top + i] = sida_f16_from_f32(logits[e] - norm);
            }
        }
    }
    return SIDA_OK;
}

static void move_rows(void *data, size_t row_bytes, int64_t to, int64_t from, int64_t count) {
    char *bytes = data;
    memmove(bytes + (size_t)to * row_bytes, bytes + (size_t)from * row_bytes,
            (size_t)count * row_bytes);
}

void sida_recorder_compact(sida_recorder *recorder, int32_t sequences, const int64_t *lengths) {
    const size_t layers = (size_t)recorder->layers[recorder->side], k = (size_t)recorder->top_k,
                 top = (size_t)recorder->top;
    sida_trace_rows *rows = &recorder->rows;
    int64_t to = 0;
    for (int32_t s = 0; s < sequences; s++) {
        int64_t from = recorder->base[s], count = lengths[s];
        if (from != to) {
            move_rows(rows->tokens, sizeof *rows->tokens, to, from, count);
            move_rows(rows->experts, layers * k * sizeof *rows->experts, to, from, count);
            move_rows(rows->alpha, layers * k * sizeof *rows->alpha, to, from, count);
            move_rows(rows->dropped, layers * sizeof *rows->dropped, to, from, count);
            move_rows(rows->top_ids, layers * top * sizeof *rows->top_ids, to, from, count);
            move_rows(rows->top_logp, layers * top * sizeof *rows->top_logp, to, from, count);
        }
        to += count;
    }
}
