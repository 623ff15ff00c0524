/* The two stacks. Ragged throughout: no padding is ever computed.
 *
 * A call is issued in segments, from one MoE layer that the host has to do with to the next, or as
 * one where there is none; graphs.h records them. So what a segment issues depends on the key of
 * the call alone, and all that differs from call to call is in index arrays on the device. */
#include "runtime/model/run_private.h"

#include <math.h>
#include <string.h>

/* y = x Wᵀ, by rows of the call, y's of ldy; x dense. */
static sida_status product(sida_run *run, void *y, sida_dtype y_type, int64_t ldy, const void *x,
                           sida_dtype x_type, sida_weight weight, int64_t n,
                           sida_epilogue epilogue) {
    const sida_linear_call call = {.y = y,
                                   .ldy = ldy,
                                   .x = x,
                                   .ldx = weight.cols,
                                   .n = n,
                                   .weight = weight,
                                   .scale = 1.0f,
                                   .epilogue = epilogue,
                                   .x_type = x_type,
                                   .y_type = y_type};
    return run->ops->linear(run->stream, &call);
}

static sida_linear_call normed_call(const sida_run *run, void *y, int64_t ldy, sida_weight weight,
                                    sida_weight norm, int64_t n) {
    return (sida_linear_call){.y = y,
                              .ldy = ldy,
                              .x = run->device.h,
                              .ldx = weight.cols,
                              .n = n,
                              .weight = weight,
                              .scale = 1.0f,
                              .norm = norm,
                              .epsilon = run->model->config.epsilon,
                              .normed = run->device.x,
                              .normed_type = run->model->activation};
}

sida_status sida_run_normed_product(sida_run *run, float *y, int64_t ldy, sida_weight weight,
                                    sida_weight norm, int64_t n, bool keep) {
    sida_linear_call call = normed_call(run, y, ldy, weight, norm, n);
    call.keep_normed = keep;
    return run->ops->linear(run->stream, &call);
}

/* h += x Wᵀ */
static sida_status add_product(sida_run *run, const void *x, sida_dtype x_type, sida_weight weight,
                               int64_t n) {
    return product(run, run->device.h, SIDA_F32, weight.rows, x, x_type, weight, n,
                   SIDA_EPILOGUE_ADD);
}

static int64_t inner_of(const sida_run *run) {
    return (int64_t)run->model->config.info.heads * run->model->config.info.d_kv;
}

/* q, k and v of norm(h), side by side in device.qkv. */
static sida_status self_products(sida_run *run, const sida_block *block, int64_t tokens) {
    sida_status status = SIDA_OK;
    sida_run_device *device = &run->device;
    sida_dtype type = run->model->activation;
    int64_t inner = inner_of(run);
    bool whole = block->qkv.data != NULL;
    SIDA_TRY(sida_run_normed_product(run, device->qkv, 3 * inner, whole ? block->qkv : block->q,
                                     block->self_norm, tokens, !whole));
    if (whole) goto out;
    SIDA_TRY(product(run, device->qkv + inner, SIDA_F32, 3 * inner, device->x, type, block->k,
                     tokens, SIDA_EPILOGUE_NONE));
    SIDA_TRY(product(run, device->qkv + 2 * inner, SIDA_F32, 3 * inner, device->x, type, block->v,
                     tokens, SIDA_EPILOGUE_NONE));
out:
    return status;
}

/* h += W_o · attention, from q in device.qkv; the caller has filled in its keys and how q lies. */
static sida_status attend(sida_run *run, sida_attention_call *call, sida_weight o, int64_t tokens) {
    sida_status status = SIDA_OK;
    const sida_family_config *config = &run->model->config;
    const sida_run_device *device = &run->device;
    call->out = device->context;
    call->out_type = run->model->activation;
    call->ldo = inner_of(run);
    call->q = device->qkv;
    call->sequences = run->sequences;
    call->heads = config->info.heads;
    call->d_kv = config->info.d_kv;
    call->rows = tokens;
    call->q_start = device->index.q_start;
    call->q_count = device->index.q_count;
    call->q_position = device->index.q_position;
    call->bias_max_distance = config->max_distance;
    SIDA_TRY(run->ops->attention(run->stream, call));
    SIDA_TRY(add_product(run, device->context, call->out_type, o, tokens));
out:
    return status;
}

static sida_status encoder_attention(sida_run *run, const sida_block *block, int64_t tokens) {
    sida_status status = SIDA_OK;
    const sida_run_device *device = &run->device;
    int64_t inner = inner_of(run);
    sida_attention_call call = {.k = device->qkv + inner,
                                .v = device->qkv + 2 * inner,
                                .ldq = 3 * inner,
                                .ldk = 3 * inner,
                                .ldv = 3 * inner,
                                .k_start = device->index.self_start,
                                .k_count = device->index.self_count,
                                .bias = run->model->bias[SIDA_ENCODER],
                                .bias_bidirectional = true};
    SIDA_TRY(self_products(run, block, tokens));
    SIDA_TRY(attend(run, &call, block->o, tokens));
out:
    return status;
}

static sida_status decoder_attention(sida_run *run, int32_t i, int64_t tokens) {
    sida_status status = SIDA_OK;
    const sida_model *model = run->model;
    const sida_block *block = &model->blocks[SIDA_DECODER][i];
    const sida_run_device *device = &run->device;
    int64_t inner = inner_of(run), both = 2 * inner;
    int64_t own = i * (int64_t)run->limits.sequences * run->limits.decoder_positions * inner;
    const sida_append_call append = {.k_cache = device->self_k + own,
                                     .v_cache = device->self_v + own,
                                     .k = device->qkv + inner,
                                     .v = device->qkv + both,
                                     .width = inner,
                                     .ld = 3 * inner,
                                     .sequences = run->sequences,
                                     .rows = tokens,
                                     .q_start = device->index.q_start,
                                     .start = device->index.self_start,
                                     .q_count = device->index.q_count,
                                     .position = device->index.q_position};
    sida_attention_call self = {.k = append.k_cache,
                                .v = append.v_cache,
                                .ldq = 3 * inner,
                                .ldk = inner,
                                .ldv = inner,
                                .k_start = device->index.self_start,
                                .k_count = device->index.self_count,
                                .causal = true,
                                .bias = model->bias[SIDA_DECODER]};
    int64_t width = model->config.info.layers[SIDA_DECODER] * both;
    sida_attention_call cross = {.k = device->cross + i * both,
                                 .v = device->cross + i * both + inner,
                                 .ldq = inner,
                                 .ldk = width,
                                 .ldv = width,
                                 .k_start = device->index.cross_start,
                                 .k_count = device->index.cross_count};
    SIDA_TRY(self_products(run, block, tokens));
    SIDA_TRY(run->ops->append(run->stream, &append));
    SIDA_TRY(attend(run, &self, block->o, tokens));
    SIDA_TRY(sida_run_normed_product(run, device->qkv, inner, block->cross_q, block->cross_norm,
                                     tokens, false));
    SIDA_TRY(attend(run, &cross, block->cross_o, tokens));
out:
    return status;
}

static sida_status dense_ff(sida_run *run, const sida_block *block, int64_t tokens) {
    sida_status status = SIDA_OK;
    const sida_family_config *config = &run->model->config;
    sida_run_device *device = &run->device;
    sida_dtype type = run->model->activation;
    int64_t d_ff = config->info.d_ff, elements = tokens * d_ff;
    sida_linear_call in = normed_call(run, device->hidden, d_ff, block->wi, block->ff_norm, tokens);
    in.keep_normed = config->gated;
    in.epilogue = config->gated ? SIDA_EPILOGUE_NONE : SIDA_EPILOGUE_RELU;
    in.y_type = config->gated ? SIDA_F32 : type;
    SIDA_TRY(run->ops->linear(run->stream, &in));
    if (config->gated) {
        float *up = device->hidden + elements;
        SIDA_TRY(product(run, up, SIDA_F32, d_ff, device->x, type, block->wi_1, tokens,
                         SIDA_EPILOGUE_NONE));
        SIDA_TRY(run->ops->gated(run->stream, device->hidden, device->hidden, up, elements,
                                 config->activation));
    }
    SIDA_TRY(add_product(run, device->hidden, in.y_type, block->wo, tokens));
out:
    return status;
}

/* Keys and values of the encoder's normed output for every decoder block. */
static sida_status finish_encoder(sida_run *run, int64_t tokens) {
    sida_status status = SIDA_OK;
    const sida_model *model = run->model;
    const sida_block *blocks = model->blocks[SIDA_DECODER];
    sida_weight norm = model->final_norm[SIDA_ENCODER];
    int32_t layers = model->config.info.layers[SIDA_DECODER];
    int64_t inner = inner_of(run), width = layers * 2 * inner;
    if (model->cross_kv.data)
        return sida_run_normed_product(run, run->device.cross, width, model->cross_kv, norm, tokens,
                                       false);
    SIDA_TRY(run->ops->rms_norm(run->stream, run->device.x, model->activation, run->device.h, norm,
                                tokens, model->config.epsilon));
    for (int32_t i = 0; i < 2 * layers; i++)
        SIDA_TRY(product(run, run->device.cross + i * inner, SIDA_F32, width, run->device.x,
                         model->activation, i % 2 ? blocks[i / 2].cross_v : blocks[i / 2].cross_k,
                         tokens, SIDA_EPILOGUE_NONE));
out:
    return status;
}

/* From the experts of block `from` (-1: from the ids) to where block `to` needs the host (the
 * number of blocks: to the end). */
typedef struct segment {
    sida_run *run;
    const sida_run_call *call;
    int32_t from, to;
} segment;

static sida_status issue(void *context) {
    sida_status status = SIDA_OK;
    const segment *part = context;
    const sida_run_call *call = part->call;
    sida_run *run = part->run;
    const sida_block *blocks = run->model->blocks[call->side];
    int32_t layers = run->model->config.info.layers[call->side];
    int64_t tokens = call->tokens;
    if (part->from < 0)
        SIDA_TRY(run->ops->embedding(run->stream, run->device.h, run->model->embedding,
                                     run->device.index.ids, tokens));
    else if (!call->driver->hidden)
        SIDA_TRY(sida_run_moe_combine(run, call, &blocks[part->from]));
    for (int32_t i = part->from + 1; i < layers && i <= part->to; i++) {
        if (call->side == SIDA_ENCODER)
            SIDA_TRY(encoder_attention(run, &blocks[i], tokens));
        else
            SIDA_TRY(decoder_attention(run, i, tokens));
        if (blocks[i].site < 0) {
            SIDA_TRY(dense_ff(run, &blocks[i], tokens));
            continue;
        }
        SIDA_TRY(sida_run_moe_route(run, call, &blocks[i]));
        if (i == part->to) goto out;
        SIDA_TRY(sida_run_moe_resident(run, call, &blocks[i]));
        SIDA_TRY(sida_run_moe_combine(run, call, &blocks[i]));
    }
    if (call->side == SIDA_ENCODER) SIDA_TRY(finish_encoder(run, tokens));
out:
    return status;
}

/* Issues a call whose index is on its way to the device. */
static sida_status run_segments(sida_run *run, const sida_run_call *call) {
    sida_status status = SIDA_OK;
    const sida_block *blocks = run->model->blocks[call->side];
    int32_t layers = run->model->config.info.layers[call->side];
    const sida_graphs_key key = {.subject = call->driver->resident,
                                 .tokens = call->tokens,
                                 .sequences = run->sequences,
                                 .side = call->side,
                                 .chooser = call->chooser,
                                 .stops = (int16_t)(call->stops + (call->driver->hidden != NULL)),
                                 .records = call->driver->record != NULL};
    segment part = {.run = run, .call = call, .from = -1};
    /* A device that runs by itself gets what follows the layer first. */
    const bool beside = sida_graph_supported(run->stream->backend);
    SIDA_TRY(sida_graphs_begin(run->graphs, &key));
    for (int32_t n = 0; part.from < layers; n++, part.from = part.to) {
        part.to = part.from + 1;
        while (part.to < layers && !(call->stops && blocks[part.to].site >= 0)) part.to++;
        /* Behind the decoder's last experts nothing may be left. */
        if (part.from == layers - 1 && call->side == SIDA_DECODER &&
            (sida_run_experts_add(run) || call->driver->hidden))
            break;
        SIDA_TRY(sida_graphs_issue(run->graphs, n, issue, &part));
        if (beside && part.from >= 0) SIDA_TRY(sida_run_moe_tell(run, call, &blocks[part.from]));
        if (part.to == layers) break;
        SIDA_TRY(sida_run_moe_stop(run, call, &blocks[part.to]));
        if (!beside) SIDA_TRY(sida_run_moe_tell(run, call, &blocks[part.to]));
        if (call->driver->hidden) SIDA_TRY(sida_run_moe_show(run, call, &blocks[part.to]));
    }
    if (call->stops) SIDA_TRY(sida_event_record(run->staged, run->stream));
out:
    return status;
}

/* Offsets that rise from 0, and ids inside the vocabulary. */
static sida_status check_ragged(const sida_run *run, const sida_ragged *batch, int64_t most,
                                const char *what) {
    int32_t vocabulary = run->model->config.info.vocabulary;
    for (int32_t s = 0; s < batch->sequences; s++)
        if (batch->offsets[0] != 0 || batch->offsets[s + 1] < batch->offsets[s])
            return sida_fail(SIDA_ERROR_ARGUMENT, "%s: offsets of sequence %d do not rise", what,
                             s);
    int64_t tokens = sida_ragged_tokens(batch);
    if (tokens > most)
        return sida_fail(SIDA_ERROR_ARGUMENT, "%s: %lld tokens, more than this run's %lld", what,
                         (long long)tokens, (long long)most);
    for (int64_t i = 0; i < tokens; i++)
        if (batch->ids[i] < 0 || batch->ids[i] >= vocabulary)
            return sida_fail(SIDA_ERROR_FORMAT, "%s: token id %d is not below the vocabulary's %d",
                             what, batch->ids[i], vocabulary);
    return SIDA_OK;
}

/* Carries the call's index arrays to the device, then runs it. The caller has waited for `staged`
 * and filled in what differs between the sides. */
static sida_status run_call(sida_run *run, int side, const sida_ragged *batch,
                            const sida_moe_driver *driver) {
    sida_status status = SIDA_OK;
    sida_run_index *index = &run->host.index;
    int64_t tokens = sida_ragged_tokens(batch);
    sida_run_call call = {.driver = driver, .side = side, .tokens = tokens};
    memcpy(index->ids, batch->ids, (size_t)tokens * sizeof *batch->ids);
    memcpy(index->q_start, batch->offsets, ((size_t)batch->sequences + 1) * sizeof *batch->offsets);
    int32_t *sequence_of = index->ids + tokens;
    for (int32_t s = 0; s < batch->sequences; s++) {
        index->q_count[s] = (int32_t)(batch->offsets[s + 1] - batch->offsets[s]);
        for (int64_t i = batch->offsets[s]; i < batch->offsets[s + 1]; i++) sequence_of[i] = s;
    }
    SIDA_TRY(sida_upload(run->stream, run->device.index.q_start, run->host_buffer, index->q_start,
                         run->index_ids_bytes + 2 * (size_t)tokens * sizeof *index->ids));
    SIDA_TRY(sida_run_moe_prepare(run, &call));
    SIDA_TRY(sida_event_record(run->staged, run->stream));
    SIDA_TRY(run_segments(run, &call));
    SIDA_TRY(sida_run_record(run, &call));
out:
    return status;
}

sida_status sida_run_encode(sida_run *run, const sida_ragged *input,
                            const sida_moe_driver *driver) {
    sida_status status = SIDA_OK;
    sida_run_index *index = &run->host.index;
    run->sequences = 0;
    run->decoded_tokens = 0;
    if (input->sequences < 1 || input->sequences > run->limits.sequences)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "an input of %d sequences in a run of %d", input->sequences,
                  run->limits.sequences);
    SIDA_TRY(check_ragged(run, input, run->limits.input_tokens, "the input"));
    SIDA_TRY(sida_event_synchronize(run->staged));
    for (int32_t s = 0; s < input->sequences; s++) {
        index->self_start[s] = index->cross_start[s] = input->offsets[s];
        index->self_count[s] = index->cross_count[s] =
            (int32_t)(input->offsets[s + 1] - input->offsets[s]);
        index->q_position[s] = run->host.position[s] = 0;
    }
    run->sequences = input->sequences;
    SIDA_TRY(run_call(run, SIDA_ENCODER, input, driver));
out:
    if (status != SIDA_OK) run->sequences = 0;
    return status;
}

sida_status sida_run_decode(sida_run *run, const sida_ragged *step, const sida_moe_driver *driver) {
    sida_status status = SIDA_OK;
    sida_run_index *index = &run->host.index;
    int32_t positions = run->limits.decoder_positions;
    if (run->sequences == 0 || step->sequences != run->sequences)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "a step of %d sequences after encoding %d", step->sequences,
                  run->sequences);
    SIDA_TRY(check_ragged(run, step, run->limits.step_tokens, "a decoder step"));
    int64_t tokens = sida_ragged_tokens(step);
    for (int32_t s = 0; s < step->sequences; s++)
        if (step->offsets[s + 1] - step->offsets[s] > positions - run->host.position[s])
            SIDA_FAIL(SIDA_ERROR_ARGUMENT, "sequence %d: %d + %lld decoder tokens, limit %d", s,
                      run->host.position[s], (long long)(step->offsets[s + 1] - step->offsets[s]),
                      positions);
    SIDA_TRY(sida_event_synchronize(run->staged));
    run->decoded_tokens = tokens;
    if (tokens == 0) return SIDA_OK;
    for (int32_t s = 0; s < step->sequences; s++) {
        int32_t count = (int32_t)(step->offsets[s + 1] - step->offsets[s]);
        index->self_start[s] = (int64_t)s * positions;
        index->self_count[s] = run->host.position[s] + count;
        index->q_position[s] = run->host.position[s];
    }
    SIDA_TRY(run_call(run, SIDA_DECODER, step, driver));
    for (int32_t s = 0; s < step->sequences; s++) run->host.position[s] += index->q_count[s];
out:
    if (status != SIDA_OK) run->decoded_tokens = 0;
    return status;
}

/* h is the last decode's until the next call. */
sida_status sida_run_read_logits(sida_run *run, int64_t first, int64_t rows, float *out) {
    sida_status status = SIDA_OK;
    const sida_family_config *config = &run->model->config;
    int64_t d = config->info.d_model, vocabulary = config->info.vocabulary;
    if (first < 0 || rows < 0 || first > run->decoded_tokens || rows > run->decoded_tokens - first)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "logits of rows %lld … +%lld of %lld", (long long)first,
                  (long long)rows, (long long)run->decoded_tokens);
    for (int64_t done = 0; done < rows;) {
        int64_t count = rows - done < run->logits_rows ? rows - done : run->logits_rows;
        sida_linear_call head = normed_call(run, run->device.logits, vocabulary, run->model->head,
                                            run->model->final_norm[SIDA_DECODER], count);
        head.x = run->device.h + (first + done) * d;
        if (config->tied) head.scale = 1.0f / sqrtf((float)d);
        SIDA_TRY(run->ops->linear(run->stream, &head));
        SIDA_TRY(sida_copy(run->stream, out + done * vocabulary, run->device.logits,
                           (size_t)count * (size_t)vocabulary * sizeof *out));
        SIDA_TRY(sida_stream_synchronize(run->stream));
        done += count;
    }
out:
    return status;
}
