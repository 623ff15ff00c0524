#include "tools/cli/hidden_baseline.h"

#include "formats/base/memory.h"
#include "runtime/model/model.h"
#include "runtime/predictor/sources.h"
#include "tools/cli/router_baseline.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* Tokens of one run, unless a sequence has more. */
enum { RUN_TOKENS = 4096 };

/* Choices of the model that were compared with the trace's. */
typedef struct agreement {
    int64_t seen, same;
} agreement;

typedef struct hidden_source {
    sida_hash_source base;
    sida_hash_source *router;
    const char *trace;
    sida_backend *backend;
    sida_model *model;
    sida_resident *resident;
    sida_run_limits limits;
    agreement *agreed;
} hidden_source;

/* A side's last call: MoE layers but the last, its tokens end to end. */
typedef struct seen_side {
    int64_t tokens;
    float *h;         /* [layers - 1, tokens, d_model] */
    int32_t *experts; /* [layers - 1, tokens, k] */
    size_t h_items, expert_items;
} seen_side;

typedef struct hidden_state {
    const hidden_source *source;
    sida_hash_state *router;
    sida_run *run;
    seen_side sides[2];
    int64_t row; /* of the first token of the run at hand, in its side's */
    int64_t *input_offsets;
    int32_t *input_ids, input_sequences;
    int64_t *offsets; /* of a part of a batch */
    size_t input_items, input_id_items, offset_items;
} hidden_state;

/* --- what the model lets us see */

static sida_status observe(void *context, const sida_moe_call *call) {
    hidden_state *state = context;
    seen_side *side = &state->sides[call->side];
    if (call->layer + 1 >= state->source->base.info.layers[call->side]) return SIDA_OK;
    memcpy(side->experts + (call->layer * side->tokens + state->row) * call->k, call->experts,
           (size_t)(call->tokens * call->k) * sizeof *side->experts);
    return SIDA_OK;
}

static sida_status hidden(void *context, const sida_moe_call *call, const float *h) {
    hidden_state *state = context;
    seen_side *side = &state->sides[call->side];
    int64_t d = state->source->base.info.d_model;
    if (call->layer + 1 >= state->source->base.info.layers[call->side]) return SIDA_OK;
    memcpy(side->h + (call->layer * side->tokens + state->row) * d, h,
           (size_t)(call->tokens * d) * sizeof *h);
    return SIDA_OK;
}

static sida_moe_driver driver_of(hidden_state *state, bool looks) {
    return (sida_moe_driver){.context = state,
                             .observe = looks ? observe : NULL,
                             .hidden = looks ? hidden : NULL,
                             .resident = sida_resident_table(state->source->resident)};
}

/* --- batches */

static sida_status reserve(hidden_state *state, int side, int64_t tokens) {
    sida_status status = SIDA_OK;
    const hidden_source *source = state->source;
    const sida_model_info *info = sida_model_get_info(source->model);
    seen_side *to = &state->sides[side];
    size_t known = info->moe_layers[side] > 1 ? (size_t)info->moe_layers[side] - 1 : 0, rows, items;
    if (sida_mul_overflow(known, (size_t)tokens, &rows) ||
        sida_mul_overflow(rows, (size_t)info->d_model, &items))
        SIDA_FAIL(SIDA_ERROR_MEMORY, "too many tokens for one batch");
    SIDA_TRY(SIDA_GROW(&to->h, &to->h_items, items + 1, "hidden states"));
    SIDA_TRY(SIDA_GROW(&to->experts, &to->expert_items, rows * (size_t)info->top_k + 1,
                       "hidden states"));
    to->tokens = tokens;
out:
    return status;
}

/* Sequences [first, last) of a batch as one of their own. */
static sida_ragged part_of(hidden_state *state, const sida_ragged *batch, int32_t first,
                           int32_t last) {
    for (int32_t s = first; s <= last; s++)
        state->offsets[s - first] = batch->offsets[s] - batch->offsets[first];
    return (sida_ragged){last - first, state->offsets, batch->ids + batch->offsets[first]};
}

/* The model over a batch in parts that the run has room for: the encoder, then a decoder's `step`.
 * looks_at: the side that is looked at. */
static sida_status run_model(hidden_state *state, const sida_ragged *input, const sida_ragged *step,
                             int looks_at) {
    sida_status status = SIDA_OK;
    const int32_t most = state->source->limits.sequences;
    SIDA_TRY(SIDA_GROW(&state->offsets, &state->offset_items, (size_t)most + 1, "a batch"));
    for (int32_t first = 0; first < input->sequences; first += most) {
        int32_t last = input->sequences - first > most ? first + most : input->sequences;
        const sida_ragged encoded = part_of(state, input, first, last);
        sida_moe_driver driver = driver_of(state, looks_at == SIDA_ENCODER);
        state->row = input->offsets[first];
        SIDA_TRY(sida_run_encode(state->run, &encoded, &driver));
        if (!step) continue;
        const sida_ragged decoded = part_of(state, step, first, last);
        driver = driver_of(state, true);
        state->row = step->offsets[first];
        SIDA_TRY(sida_run_decode(state->run, &decoded, &driver));
    }
out:
    return status;
}

static sida_status hidden_encode(const sida_hash_source *source, sida_hash_state *of,
                                 const sida_ragged *input, int32_t k, sida_hash_table *out) {
    sida_status status = SIDA_OK;
    const hidden_source *self = (const hidden_source *)source;
    hidden_state *state = (hidden_state *)of;
    const size_t sequences = (size_t)input->sequences, tokens = (size_t)sida_ragged_tokens(input);
    SIDA_TRY(sida_hash_encode(self->router, state->router, input, k, out));
    /* The decoder will need it again. */
    SIDA_TRY(SIDA_GROW(&state->input_offsets, &state->input_items, sequences + 1, "a batch"));
    SIDA_TRY(SIDA_GROW(&state->input_ids, &state->input_id_items, tokens + 1, "a batch"));
    memcpy(state->input_offsets, input->offsets, (sequences + 1) * sizeof *input->offsets);
    memcpy(state->input_ids, input->ids, tokens * sizeof *input->ids);
    state->input_sequences = input->sequences;
    SIDA_TRY(reserve(state, SIDA_ENCODER, (int64_t)tokens));
    if (source->info.layers[SIDA_ENCODER] > 1)
        SIDA_TRY(run_model(state, input, NULL, SIDA_ENCODER));
out:
    return status;
}

static sida_status hidden_decode(const sida_hash_source *source, sida_hash_state *of,
                                 const sida_ragged *step, int32_t k, sida_hash_table *out) {
    sida_status status = SIDA_OK;
    const hidden_source *self = (const hidden_source *)source;
    hidden_state *state = (hidden_state *)of;
    const sida_ragged input = {state->input_sequences, state->input_offsets, state->input_ids};
    SIDA_TRY(sida_hash_decode(self->router, state->router, step, k, out));
    SIDA_TRY(reserve(state, SIDA_DECODER, sida_ragged_tokens(step)));
    if (source->info.layers[SIDA_DECODER] > 1)
        SIDA_TRY(run_model(state, &input, step, SIDA_DECODER));
out:
    return status;
}

static sida_status hidden_refine(const sida_hash_source *source, sida_hash_state *of, int side,
                                 int32_t layer, const int32_t *experts, int32_t top_k, int32_t k,
                                 sida_hash_table *out) {
    const hidden_source *self = (const hidden_source *)source;
    hidden_state *state = (hidden_state *)of;
    const seen_side *seen = &state->sides[side];
    const int32_t *ours = seen->experts + layer * seen->tokens * top_k;
    for (int64_t i = 0; i < seen->tokens * top_k; i++) self->agreed->same += ours[i] == experts[i];
    self->agreed->seen += seen->tokens * top_k;
    return sida_router_source_apply(self->router, state->router, side, layer + 1,
                                    seen->h + layer * seen->tokens * source->info.d_model,
                                    seen->tokens, k, out);
}

/* --- life */

static void hidden_state_destroy(sida_hash_state *of) {
    hidden_state *state = (hidden_state *)of;
    sida_hash_state_destroy(state->source->router, state->router);
    sida_run_destroy(state->run);
    for (int side = 0; side < 2; side++) {
        free(state->sides[side].h);
        free(state->sides[side].experts);
    }
    free(state->input_offsets);
    free(state->input_ids);
    free(state->offsets);
    free(state);
}

static sida_status hidden_state_create(const sida_hash_source *source, sida_hash_state **out) {
    sida_status status = SIDA_OK;
    const hidden_source *self = (const hidden_source *)source;
    hidden_state *state = NULL;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&state, 1, "a baseline's state"));
    state->source = self;
    SIDA_TRY(sida_hash_state_create(self->router, &state->router));
    SIDA_TRY(sida_run_create(&state->run, self->model, &self->limits));
    *out = (sida_hash_state *)state;
    state = NULL;
out:
    if (state) hidden_state_destroy((sida_hash_state *)state);
    return status;
}

static void hidden_destroy(sida_hash_source *source) {
    hidden_source *self = (hidden_source *)source;
    sida_hash_source_destroy(self->router);
    sida_resident_destroy(self->resident);
    sida_model_destroy(self->model);
    sida_backend_destroy(self->backend);
    free(self->agreed);
    free(self);
}

static const sida_hash_source_table hidden_table = {.destroy = hidden_destroy,
                                                    .state_create = hidden_state_create,
                                                    .state_destroy = hidden_state_destroy,
                                                    .encode = hidden_encode,
                                                    .decode = hidden_decode,
                                                    .refine = hidden_refine};

static int64_t longest(const sida_dataset *data, int side) {
    const int64_t *offsets = data->sides[side].offsets;
    int64_t most = 1;
    for (int32_t s = 0; s < data->sequences; s++)
        if (offsets[s + 1] - offsets[s] > most) most = offsets[s + 1] - offsets[s];
    return most;
}

sida_status sida_hidden_baseline(sida_hash_source **out, const char *folder, const char *device,
                                 const sida_dataset *data) {
    sida_status status = SIDA_OK;
    hidden_source *self = NULL;
    const int64_t lengths[2] = {longest(data, 0), longest(data, 1)};
    const int64_t fit = RUN_TOKENS / (lengths[0] > lengths[1] ? lengths[0] : lengths[1]);
    const int64_t sequences = fit > 1 ? fit : 1;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&self, 1, "a baseline"));
    self->base.table = &hidden_table;
    self->trace = data->path;
    self->limits = (sida_run_limits){.sequences = (int32_t)sequences,
                                     .input_tokens = sequences * lengths[0],
                                     .step_tokens = sequences * lengths[1],
                                     .decoder_positions = (int32_t)lengths[1]};
    SIDA_TRY(SIDA_ALLOC(&self->agreed, 1, "a baseline"));
    SIDA_TRY(sida_router_baseline(&self->router, folder, data));
    self->base.info = self->router->info;
    self->base.info.name = "hidden state";
    self->base.info.refines = true;
    SIDA_TRY(sida_backend_create_named(&self->backend, device));
    SIDA_TRY(sida_model_open(&self->model, self->backend, folder));
    SIDA_TRY(sida_resident_create(&self->resident, self->model));
    *out = &self->base;
    self = NULL;
out:
    if (self) hidden_destroy(&self->base);
    return status;
}

sida_status sida_hidden_baseline_check(const sida_hash_source *source, const char *folder) {
    const hidden_source *self = (const hidden_source *)source;
    const agreement *a = self->agreed;
    if (a->same * 100 < a->seen * 99)
        return sida_fail(SIDA_ERROR_MISMATCH,
                         "%s: the model in %s chose otherwise in %" PRId64 " of %" PRId64
                         " cases: the trace is not of this model",
                         self->trace, folder, a->seen - a->same, a->seen);
    return SIDA_OK;
}
