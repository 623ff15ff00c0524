#include "runtime/model/run_private.h"

#include "formats/base/memory.h"

#include <limits.h>
#include <stdlib.h>

enum {
    ALIGNMENT = 256,
    LOGITS_ROWS = 16, /* of one product with the head when many rows are read */
    MAX_SEQUENCES = 1 << 20,
    MAX_POSITIONS = 1 << 24
};
static const int64_t max_tokens = INT64_C(1) << 28;

/* Hands out parts of one block; base NULL only counts. */
typedef struct layout {
    char *base;
    size_t used, high;
    bool overflow;
} layout;

static void *part(layout *at, int64_t count, size_t size) {
    size_t bytes, end;
    if (sida_mul_overflow((size_t)count, size, &bytes) ||
        sida_add_overflow(bytes, ALIGNMENT - 1, &bytes) ||
        sida_add_overflow(at->used, bytes / ALIGNMENT * ALIGNMENT, &end)) {
        at->overflow = true;
        return NULL;
    }
    void *start = at->base ? at->base + at->used : NULL;
    at->used = end;
    if (end > at->high) at->high = end;
    return start;
}

static float *floats(layout *at, int64_t rows, int64_t width) {
    int64_t count;
    if (__builtin_mul_overflow(rows, width, &count)) {
        at->overflow = true;
        return NULL;
    }
    return part(at, count, sizeof(float));
}

static int64_t logits_rows_of(const sida_run_limits *limits) {
    int64_t rows = limits->step_tokens < LOGITS_ROWS ? limits->step_tokens : LOGITS_ROWS;
    return rows > limits->sequences ? rows : limits->sequences;
}

static int64_t most_tokens(const sida_run_limits *limits) {
    return limits->input_tokens > limits->step_tokens ? limits->input_tokens : limits->step_tokens;
}

/* Returns the bytes in front of the ids. */
static size_t lay_index(sida_run_index *out, layout *at, int64_t sequences, int64_t tokens) {
    size_t begin = at->used;
    out->q_start = part(at, sequences + 1, sizeof(int64_t));
    out->self_start = part(at, sequences, sizeof(int64_t));
    out->cross_start = part(at, sequences, sizeof(int64_t));
    out->q_count = part(at, sequences, sizeof(int32_t));
    out->q_position = part(at, sequences, sizeof(int32_t));
    out->self_count = part(at, sequences, sizeof(int32_t));
    out->cross_count = part(at, sequences, sizeof(int32_t));
    size_t bytes = at->used - begin;
    out->ids = part(at, 2 * tokens, sizeof(int32_t));
    return bytes;
}

static void lay_choice(sida_run_choice *out, layout *at, const sida_model_info *info,
                       int64_t tokens) {
    out->row_start = part(at, (int64_t)info->experts + 1, sizeof(int64_t));
    out->busy = part(at, info->experts, sizeof(int32_t));
    out->busy_count = part(at, 1, sizeof(int32_t));
    out->alpha = part(at, tokens * info->top_k, sizeof(float));
    out->experts = part(at, tokens * info->top_k, sizeof(int32_t));
    out->dropped = part(at, tokens, sizeof(uint8_t));
    out->rows = part(at, tokens * info->top_k, sizeof(int32_t));
}

size_t sida_run_choice_bytes(const sida_run *run, int64_t tokens) {
    sida_run_choice choice;
    layout at = {0};
    lay_choice(&choice, &at, &run->model->config.info, tokens);
    return at.used;
}

sida_run_choice sida_run_choice_at(const sida_run *run, char *choices, int32_t layer,
                                   int64_t tokens) {
    sida_run_choice choice;
    layout at = {.base = choices + (size_t)layer * sida_run_choice_bytes(run, tokens)};
    lay_choice(&choice, &at, &run->model->config.info, tokens);
    return choice;
}

/* Floats from one layer's recorded router logits to the next one's: each begins aligned. */
static int64_t logits_stride(const sida_model_info *info, int64_t tokens) {
    const int64_t unit = ALIGNMENT / sizeof(float);
    return (tokens * info->experts + unit - 1) / unit * unit;
}

float *sida_run_router_logits(const sida_run *run, const sida_run_call *call, int32_t layer) {
    if (!call->driver->record) return run->device.logits_router;
    return run->device.recorded_logits +
           layer * logits_stride(&run->model->config.info, call->tokens);
}

static int64_t most_layers(const sida_model_info *info) {
    const int32_t *layers = info->moe_layers;
    return layers[0] > layers[1] ? layers[0] : layers[1];
}

/* What has the same layout on both sides beside the index. top: entries behind the choices, that a
 * run which records keeps of each row. */
static void lay_choices(char **choices, uint8_t **allowed, layout *at, const sida_model_info *info,
                        const sida_run_limits *limits, int32_t top) {
    sida_run_choice choice;
    layout one = {0};
    int64_t tokens = most_tokens(limits);
    lay_choice(&choice, &one, info, tokens);
    at->overflow |= one.overflow;
    *choices = part(at, most_layers(info), one.used);
    part(at, most_layers(info) * tokens, 2 * (size_t)top * sizeof(uint16_t));
    *allowed = part(at, most_layers(info) * limits->sequences, (size_t)info->experts);
}

static void *activations(layout *at, const sida_model *model, int64_t rows, int64_t width) {
    int64_t count;
    at->overflow |= __builtin_mul_overflow(rows, width, &count);
    return part(at, count, sida_dtype_bytes(model->activation));
}

static void lay_device(sida_run_device *out, layout *at, const sida_model *model,
                       const sida_run_limits *limits) {
    const sida_model_info *info = &model->config.info;
    int64_t tokens = most_tokens(limits), d = info->d_model;
    int64_t inner = (int64_t)info->heads * info->d_kv, layers = info->layers[SIDA_DECODER];
    int64_t choices = tokens * info->top_k;
    bool adds = model->ops->expert_adds && info->top_k == 1;
    lay_index(&out->index, at, limits->sequences, tokens);
    lay_choices(&out->choices, &out->allowed, at, info, limits, limits->record_top);
    out->waves = part(at, info->experts, SIDA_WAVE_BYTES);
    if (limits->record_top > 0)
        out->recorded_logits = floats(at, most_layers(info), logits_stride(info, tokens));
    out->h = floats(at, tokens, d);
    out->x = activations(at, model, tokens, d);
    out->cross = floats(at, limits->input_tokens, layers * 2 * inner);
    out->self_k = floats(at, layers * limits->sequences * limits->decoder_positions, inner);
    out->self_v = floats(at, layers * limits->sequences * limits->decoder_positions, inner);
    out->logits = floats(at, logits_rows_of(limits), info->vocabulary);
    /* Attention, dense feed-forward and MoE follow one another: they share what comes last. */
    size_t shared = at->used;
    out->qkv = floats(at, tokens, 3 * inner);
    out->context = activations(at, model, tokens, inner);
    at->used = shared;
    out->hidden = model->config.gated ? floats(at, tokens, (int64_t)info->d_ff * 2)
                                      : activations(at, model, tokens, info->d_ff);
    at->used = shared;
    out->logits_router = floats(at, tokens, info->experts);
    out->scratch = floats(at, adds ? 0 : choices, d);
    out->expert_workspace =
        floats(at, 1, (int64_t)sida_expert_workspace_floats(&info->expert, choices));
    at->used = at->high;
}

static size_t lay_host(sida_run_host *out, layout *at, const sida_model *model,
                       const sida_run_limits *limits) {
    const sida_model_info *info = &model->config.info;
    int64_t tokens = most_tokens(limits), sequences = limits->sequences;
    size_t bytes = lay_index(&out->index, at, sequences, tokens);
    lay_choices(&out->choices, &out->allowed, at, info, limits, 0);
    out->waves = part(at, most_layers(info) * info->experts, SIDA_WAVE_BYTES);
    out->logits_router = floats(at, tokens, info->experts);
    out->zeros = part(at, sequences, sizeof(int32_t));
    out->position = part(at, sequences, sizeof(int32_t));
    out->needed = part(at, info->experts, sizeof(int32_t));
    out->pending = part(at, info->experts, sizeof(bool));
    out->wave = part(at, info->experts, sizeof(int32_t));
    out->weights = part(at, info->experts, sizeof(void *));
    out->logits = floats(at, logits_rows_of(limits), info->vocabulary);
    out->step_offsets = part(at, sequences + 1, sizeof(int64_t));
    out->step_ids = part(at, sequences, sizeof(int32_t));
    out->live = part(at, sequences, sizeof(uint8_t));
    return bytes;
}

static bool limits_are_sane(const sida_run_limits *limits) {
    return limits->sequences >= 1 && limits->sequences <= MAX_SEQUENCES &&
           limits->input_tokens >= 1 && limits->input_tokens <= max_tokens &&
           limits->step_tokens >= 1 && limits->step_tokens <= max_tokens &&
           limits->decoder_positions >= 1 && limits->decoder_positions <= MAX_POSITIONS &&
           limits->record_top >= 0 && limits->record_top <= UINT16_MAX + 1;
}

size_t sida_run_bytes(const sida_model *model, const sida_run_limits *limits) {
    sida_run_device device;
    layout at = {0};
    if (!limits_are_sane(limits)) return SIZE_MAX;
    lay_device(&device, &at, model, limits);
    size_t bytes;
    if (at.overflow || sida_add_overflow(at.high, model->ops->stream_bytes, &bytes))
        return SIZE_MAX;
    return bytes;
}

sida_status sida_run_create(sida_run **out, sida_model *model, const sida_run_limits *limits) {
    sida_status status = SIDA_OK;
    sida_run *run = NULL;
    layout at = {0};
    *out = NULL;
    if (!limits_are_sane(limits))
        SIDA_FAIL(SIDA_ERROR_ARGUMENT,
                  "a run of %d sequences, %lld and %lld tokens and %d decoder positions",
                  limits->sequences, (long long)limits->input_tokens,
                  (long long)limits->step_tokens, limits->decoder_positions);
    if (limits->record_top > model->config.info.experts)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "the best %d of %d experts cannot be recorded",
                  limits->record_top, model->config.info.experts);
    size_t bytes = sida_run_bytes(model, limits);
    if (bytes < SIZE_MAX) bytes -= model->ops->stream_bytes; /* prepare takes these */
    SIDA_TRY(SIDA_ALLOC(&run, 1, "a run"));
    run->model = model;
    run->ops = model->ops;
    run->limits = *limits;
    run->logits_rows = logits_rows_of(limits);
    SIDA_TRY(sida_buffer_create(model->backend, &run->device_buffer, SIDA_MEMORY_DEVICE, bytes,
                                "activations and caches"));
    at.base = run->device_buffer->data;
    lay_device(&run->device, &at, model, limits);
    at = (layout){0};
    lay_host(&run->host, &at, model, limits);
    if (at.overflow) SIDA_FAIL(SIDA_ERROR_MEMORY, "a run larger than memory can be");
    SIDA_TRY(sida_buffer_create(model->backend, &run->host_buffer, SIDA_MEMORY_HOST, at.high,
                                "a run's host arrays"));
    at = (layout){.base = run->host_buffer->data};
    run->index_ids_bytes = lay_host(&run->host, &at, model, limits);
    for (int32_t s = 0; s < limits->sequences; s++) run->host.zeros[s] = 0;
    SIDA_TRY(sida_stream_create(model->backend, &run->stream, SIDA_STREAM_COMPUTE));
    SIDA_TRY(sida_event_create(model->backend, &run->staged));
    SIDA_TRY(sida_graphs_create(&run->graphs, run->stream,
                                (int32_t)most_layers(&model->config.info) + 1));
    if (run->ops->prepare) SIDA_TRY(run->ops->prepare(run->stream));
    *out = run;
    run = NULL;
out:
    sida_run_destroy(run);
    return status;
}

void sida_run_destroy(sida_run *run) {
    if (!run) return;
    sida_stream_destroy(run->stream);
    sida_graphs_destroy(run->graphs);
    sida_event_destroy(run->staged);
    sida_buffer_destroy(run->device_buffer);
    sida_buffer_destroy(run->host_buffer);
    sida_buffer_destroy(run->hidden);
    free(run);
}

sida_stream *sida_run_stream(sida_run *run) {
    return run->stream;
}
