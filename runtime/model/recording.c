/* The routing of whole forward calls: gathered on the device, layer by layer, and brought to the
 * host in one go behind each call. */
#include "runtime/model/run_private.h"

#include "formats/base/memory.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* One call. The buffer holds what the run's choices and top hold on the device: [layers] of
 * sida_run_choice, then [layers] of top. */
typedef struct recorded {
    sida_buffer *buffer; /* kept from reset to reset */
    int32_t side, sequences;
    int64_t tokens;
    int64_t *offsets;  /* [S + 1] */
    int32_t *position; /* [S] */
} recorded;

struct sida_recording {
    const sida_run *run;
    sida_event *copied; /* everything so far is on the host */
    int32_t count, capacity;
    recorded *calls;
    int64_t *offsets; /* of all calls */
    int32_t *position;
};

enum { LEAST_BYTES = 1 << 16 }; /* of a call's buffer */

sida_status sida_recording_create(sida_recording **out, const sida_run *run, int32_t calls) {
    sida_status status = SIDA_OK;
    sida_recording *recording = NULL;
    size_t sequences = (size_t)run->limits.sequences;
    *out = NULL;
    assert(calls >= 1);
    SIDA_TRY(SIDA_ALLOC(&recording, 1, "a recording"));
    recording->run = run;
    recording->capacity = calls;
    SIDA_TRY(SIDA_ALLOC(&recording->calls, calls, "a recording"));
    SIDA_TRY(SIDA_ALLOC(&recording->offsets, (size_t)calls * (sequences + 1), "a recording"));
    SIDA_TRY(SIDA_ALLOC(&recording->position, (size_t)calls * sequences, "a recording"));
    for (size_t i = 0; i < (size_t)calls; i++) {
        recording->calls[i].offsets = recording->offsets + i * (sequences + 1);
        recording->calls[i].position = recording->position + i * sequences;
    }
    SIDA_TRY(sida_event_create(run->model->backend, &recording->copied));
    *out = recording;
    recording = NULL;
out:
    sida_recording_destroy(recording);
    return status;
}

void sida_recording_destroy(sida_recording *recording) {
    if (!recording) return;
    /* A device that is lost copies nothing any more. */
    if (recording->count > 0) (void)sida_recording_wait(recording);
    for (int32_t i = 0; recording->calls && i < recording->capacity; i++)
        sida_buffer_destroy(recording->calls[i].buffer);
    sida_event_destroy(recording->copied);
    free(recording->calls);
    free(recording->offsets);
    free(recording->position);
    free(recording);
}

void sida_recording_reset(sida_recording *recording) {
    recording->count = 0;
}

sida_status sida_recording_wait(const sida_recording *recording) {
    return recording->count > 0 ? sida_event_synchronize(recording->copied) : SIDA_OK;
}

int32_t sida_recording_calls(const sida_recording *recording) {
    return recording->count;
}

sida_recorded_call sida_recording_call(const sida_recording *recording, int32_t index) {
    assert(index >= 0 && index < recording->count);
    const recorded *call = &recording->calls[index];
    const sida_model_info *info = &recording->run->model->config.info;
    return (sida_recorded_call){.side = call->side,
                                .layers = info->moe_layers[call->side],
                                .sequences = call->sequences,
                                .k = info->top_k,
                                .top = recording->run->limits.record_top,
                                .tokens = call->tokens,
                                .offsets = call->offsets,
                                .position = call->position};
}

/* Elements of one layer's top, ids and log-probabilities. */
static size_t top_values(const sida_run *run, int64_t tokens) {
    return 2 * (size_t)tokens * (size_t)run->limits.record_top;
}

sida_recorded_layer sida_recording_layer(const sida_recording *recording, int32_t index,
                                         int32_t layer) {
    const sida_run *run = recording->run;
    assert(index >= 0 && index < recording->count);
    const recorded *call = &recording->calls[index];
    int32_t layers = run->model->config.info.moe_layers[call->side];
    assert(layer >= 0 && layer < layers);
    char *choices = call->buffer->data;
    const sida_run_choice choice = sida_run_choice_at(run, choices, layer, call->tokens);
    const uint16_t *top =
        (const uint16_t *)(const void *)(choices +
                                         (size_t)layers * sida_run_choice_bytes(run, call->tokens));
    top += (size_t)layer * top_values(run, call->tokens);
    return (sida_recorded_layer){.experts = choice.experts,
                                 .alpha = choice.alpha,
                                 .dropped = choice.dropped,
                                 .top_ids = top,
                                 .top_logp = top + top_values(run, call->tokens) / 2};
}

/* --- the run's part */

sida_status sida_run_record_check(const sida_run *run, const sida_moe_driver *driver) {
    if (!driver->record) return SIDA_OK;
    if (driver->record->run != run || run->limits.record_top == 0 || driver->choose)
        return sida_fail(SIDA_ERROR_ARGUMENT, "a recording of another run, of one without room for "
                                              "it, or of experts that the router does not choose");
    if (driver->record->count == driver->record->capacity)
        return sida_fail(SIDA_ERROR_ARGUMENT, "a recording of %d calls is full",
                         driver->record->count);
    return SIDA_OK;
}

sida_status sida_run_record_top(sida_run *run, const sida_run_call *call, int32_t layer) {
    if (!call->driver->record) return SIDA_OK;
    uint16_t *ids = run->device.top + (size_t)layer * top_values(run, call->tokens);
    const sida_top_call top = {.ids = ids,
                               .logp = ids + top_values(run, call->tokens) / 2,
                               .logits = run->device.logits_router,
                               .n = call->tokens,
                               .experts_total = run->model->config.info.experts,
                               .top = run->limits.record_top};
    return run->ops->top(run->stream, &top);
}

/* Buffers grow to powers of two: batches of many sizes then make few of them. */
static sida_status make_room(const sida_run *run, recorded *call, size_t bytes) {
    size_t room = LEAST_BYTES;
    if (call->buffer && call->buffer->bytes >= bytes) return SIDA_OK;
    while (room < bytes) room *= 2;
    sida_buffer_destroy(call->buffer);
    call->buffer = NULL;
    return sida_buffer_create(run->model->backend, &call->buffer, SIDA_MEMORY_HOST, room,
                              "a recorded call");
}

sida_status sida_run_record(sida_run *run, const sida_run_call *call) {
    sida_status status = SIDA_OK;
    sida_recording *recording = call->driver->record;
    if (!recording) return SIDA_OK;
    recorded *at = &recording->calls[recording->count];
    size_t layers = (size_t)run->model->config.info.moe_layers[call->side];
    size_t choices = layers * sida_run_choice_bytes(run, call->tokens),
           tops = layers * top_values(run, call->tokens) * sizeof *run->device.top;
    at->side = call->side;
    at->sequences = run->sequences;
    at->tokens = call->tokens;
    memcpy(at->offsets, run->host.index.q_start,
           ((size_t)run->sequences + 1) * sizeof *at->offsets);
    memcpy(at->position, call->side == SIDA_ENCODER ? run->host.zeros : run->host.position,
           (size_t)run->sequences * sizeof *at->position);
    SIDA_TRY(make_room(run, at, choices + tops));
    recording->count++;
    SIDA_TRY(sida_copy(run->stream, at->buffer->data, run->device.choices, choices));
    SIDA_TRY(sida_copy(run->stream, (char *)at->buffer->data + choices, run->device.top, tops));
    SIDA_TRY(sida_event_record(recording->copied, run->stream));
out:
    return status;
}
