#include "tracer/recorder.h"

#include "formats/base/memory.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

sida_status sida_recorder_init(sida_recorder *recorder, const sida_trace_info *info,
                               int32_t sequences) {
    *recorder = (sida_recorder){
        .top_k = info->top_k, .top = info->top, .layers = {info->layers[0], info->layers[1]}};
    return SIDA_ALLOC(&recorder->base, sequences, "a recorder");
}

void sida_recorder_free(sida_recorder *recorder) {
    sida_trace_rows_free(&recorder->rows);
    free(recorder->base);
}

static sida_status make_room(sida_recorder *recorder, int64_t rows) {
    sida_status status = SIDA_OK;
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

static bool is_nan(uint16_t half) {
    return (half & 0x7fff) > 0x7c00;
}

/* One MoE layer of one call: [tokens] there, [rows, layers] here. */
static sida_status gather_layer(sida_recorder *recorder, const sida_recorded_call *call,
                                int32_t layer, const sida_recorded_layer *from) {
    const size_t k = (size_t)recorder->top_k, top = (size_t)recorder->top;
    const sida_trace_rows *to = &recorder->rows;
    for (int32_t s = 0; s < call->sequences; s++) {
        size_t at = (size_t)((recorder->base[s] + call->position[s]) * call->layers + layer);
        for (size_t t = (size_t)call->offsets[s]; t < (size_t)call->offsets[s + 1];
             t++, at += (size_t)call->layers) {
            for (size_t r = 0; r < k; r++) {
                to->experts[at * k + r] = (uint16_t)from->experts[t * k + r];
                to->alpha[at * k + r] = from->alpha[t * k + r];
            }
            to->dropped[at] = from->dropped[t];
            memcpy(to->top_ids + at * top, from->top_ids + t * top, top * sizeof *to->top_ids);
            memcpy(to->top_logp + at * top, from->top_logp + t * top, top * sizeof *to->top_logp);
            if (is_nan(from->top_logp[t * top]))
                return sida_fail(SIDA_ERROR_FORMAT,
                                 "MoE layer %d's router gave logits that are not finite",
                                 layer + (call->side ? recorder->layers[SIDA_ENCODER] : 0));
        }
    }
    return SIDA_OK;
}

sida_status sida_recorder_gather(sida_recorder *recorder, const sida_recording *recording, int side,
                                 int32_t sequences, const int64_t *lengths) {
    sida_status status = SIDA_OK;
    int64_t rows = 0, found = 0;
    for (int32_t s = 0; s < sequences; s++) {
        recorder->base[s] = rows;
        rows += lengths[s];
    }
    SIDA_TRY(make_room(recorder, rows));
    for (int32_t i = 0; i < sida_recording_calls(recording); i++) {
        const sida_recorded_call call = sida_recording_call(recording, i);
        if (call.side != side) continue;
        assert(call.top == recorder->top && call.k == recorder->top_k);
        for (int32_t layer = 0; layer < call.layers; layer++) {
            const sida_recorded_layer from = sida_recording_layer(recording, i, layer);
            SIDA_TRY(gather_layer(recorder, &call, layer, &from));
        }
        found += call.tokens;
    }
    assert(found == rows);
    (void)found;
out:
    return status;
}
