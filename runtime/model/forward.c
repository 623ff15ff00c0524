/* The two stacks. Ragged throughout: no padding is ever computed. */
#include "runtime/model/run_private.h"

#include <math.h>
#include <string.h>

/* y = x Wᵀ, by rows of the call. */
static sida_status product(sida_run *run, float *y, const float *x, sida_weight weight, int64_t n,
                           sida_epilogue epilogue) {
    sida_linear_call call = {.y = y,
                             .ldy = weight.rows,
                             .x = x,
                             .ldx = weight.cols,
                             .n = n,
                             .weight = weight,
                             .scale = 1.0f,
                             .epilogue = epilogue};
    return run->ops->linear(run->stream, &call);
}

static sida_status norm(sida_run *run, float *out, const float *x, sida_weight weight, int64_t n) {
    return run->ops->rms_norm(run->stream, out, SIDA_F32, x, weight, n, run->model->config.epsilon);
}

static int64_t inner_of(const sida_run *run) {
    return (int64_t)run->model->config.info.heads * run->model->config.info.d_kv;
}

/* h += W_o · attention, from q in place and the k and v given. */
static sida_status attend(sida_run *run, const float *k, const float *v, const int64_t *k_start,
                          const int32_t *k_count, const sida_weight *bias, int side, sida_weight o,
                          int64_t tokens) {
    sida_status status = SIDA_OK;
    const sida_family_config *config = &run->model->config;
    sida_run_device *device = &run->device;
    int64_t inner = inner_of(run);
    sida_attention_call call = {.out = device->context,
                                .q = device->q,
                                .k = k,
                                .v = v,
                                .ldo = inner,
                                .ldq = inner,
                                .ldk = inner,
                                .ldv = inner,
                                .sequences = run->sequences,
                                .heads = config->info.heads,
                                .d_kv = config->info.d_kv,
                                .rows = tokens,
                                .q_start = device->index.q_start,
                                .k_start = k_start,
                                .q_count = device->index.q_count,
                                .k_count = k_count,
                                .q_position = device->index.q_position,
                                .causal = bias && side == SIDA_DECODER,
                                .bias_bidirectional = side == SIDA_ENCODER,
                                .bias_max_distance = config->max_distance};
    if (bias) call.bias = *bias;
    SIDA_TRY(run->ops->attention(run->stream, &call));
    SIDA_TRY(product(run, device->h, device->context, o, tokens, SIDA_EPILOGUE_ADD));
out:
    return status;
}

static sida_status dense_ff(sida_run *run, const sida_block *block, int64_t tokens) {
    sida_status status = SIDA_OK;
    const sida_family_config *config = &run->model->config;
    sida_run_device *device = &run->device;
    bool gated = config->gated;
    SIDA_TRY(norm(run, device->x, device->h, block->ff_norm, tokens));
    SIDA_TRY(product(run, device->hidden, device->x, block->wi, tokens,
                     gated ? SIDA_EPILOGUE_NONE : SIDA_EPILOGUE_RELU));
    if (gated) {
        int64_t elements = tokens * config->info.d_ff;
        float *up = device->hidden + elements;
        SIDA_TRY(product(run, up, device->x, block->wi_1, tokens, SIDA_EPILOGUE_NONE));
        SIDA_TRY(run->ops->gated(run->stream, device->hidden, device->hidden, up, elements,
                                 config->activation));
    }
    SIDA_TRY(product(run, device->h, device->hidden, block->wo, tokens, SIDA_EPILOGUE_ADD));
out:
    return status;
}

static sida_status feed_forward(sida_run *run, const sida_moe_driver *driver, int side, int32_t i,
                                const int32_t *position, int64_t tokens) {
    const sida_block *block = &run->model->blocks[side][i];
    return block->site >= 0 ? sida_run_moe(run, driver, side, i, position, tokens)
                            : dense_ff(run, block, tokens);
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

/* Carries the call's index arrays to the device and embeds its ids. The caller has waited for
 * `staged`. */
static sida_status begin_call(sida_run *run, const sida_ragged *batch) {
    sida_status status = SIDA_OK;
    sida_run_host *host = &run->host;
    int64_t tokens = sida_ragged_tokens(batch);
    memcpy(host->index.ids, batch->ids, (size_t)tokens * sizeof *batch->ids);
    memcpy(host->index.q_start, batch->offsets,
           ((size_t)batch->sequences + 1) * sizeof *batch->offsets);
    for (int32_t s = 0; s < batch->sequences; s++)
        host->index.q_count[s] = (int32_t)(batch->offsets[s + 1] - batch->offsets[s]);
    SIDA_TRY(sida_copy(run->stream, run->device.index.q_start, host->index.q_start,
                       run->index_ids_bytes + (size_t)tokens * sizeof *host->index.ids));
    SIDA_TRY(sida_event_record(run->staged, run->stream));
    SIDA_TRY(run->ops->embedding(run->stream, run->device.h, run->model->embedding,
                                 run->device.index.ids, tokens));
out:
    return status;
}

/* Keys and values of the encoder's output for every decoder block. */
static sida_status cross_keys(sida_run *run) {
    sida_status status = SIDA_OK;
    const sida_model *model = run->model;
    int64_t stride = run->limits.input_tokens * inner_of(run);
    for (int32_t i = 0; i < model->config.info.layers[SIDA_DECODER]; i++) {
        const sida_block *block = &model->blocks[SIDA_DECODER][i];
        SIDA_TRY(product(run, run->device.cross_k + i * stride, run->device.encoder, block->cross_k,
                         run->input_tokens, SIDA_EPILOGUE_NONE));
        SIDA_TRY(product(run, run->device.cross_v + i * stride, run->device.encoder, block->cross_v,
                         run->input_tokens, SIDA_EPILOGUE_NONE));
    }
out:
    return status;
}

sida_status sida_run_encode(sida_run *run, const sida_ragged *input,
                            const sida_moe_driver *driver) {
    sida_status status = SIDA_OK;
    const sida_model *model = run->model;
    sida_run_device *device = &run->device;
    sida_run_index *index = &run->host.index;
    run->sequences = 0;
    run->decoded_tokens = 0;
    if (input->sequences < 1 || input->sequences > run->limits.sequences)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "an input of %d sequences in a run of %d", input->sequences,
                  run->limits.sequences);
    SIDA_TRY(check_ragged(run, input, run->limits.input_tokens, "the input"));
    int64_t tokens = sida_ragged_tokens(input);
    SIDA_TRY(sida_event_synchronize(run->staged));
    run->input_tokens = tokens;
    for (int32_t s = 0; s < input->sequences; s++) {
        index->self_start[s] = index->cross_start[s] = input->offsets[s];
        index->self_count[s] = index->cross_count[s] =
            (int32_t)(input->offsets[s + 1] - input->offsets[s]);
        index->q_position[s] = run->host.position[s] = 0;
    }
    run->sequences = input->sequences;
    SIDA_TRY(begin_call(run, input));
    for (int32_t i = 0; i < model->config.info.layers[SIDA_ENCODER]; i++) {
        const sida_block *block = &model->blocks[SIDA_ENCODER][i];
        SIDA_TRY(norm(run, device->x, device->h, block->self_norm, tokens));
        SIDA_TRY(product(run, device->q, device->x, block->q, tokens, SIDA_EPILOGUE_NONE));
        SIDA_TRY(product(run, device->k, device->x, block->k, tokens, SIDA_EPILOGUE_NONE));
        SIDA_TRY(product(run, device->v, device->x, block->v, tokens, SIDA_EPILOGUE_NONE));
        SIDA_TRY(attend(run, device->k, device->v, device->index.self_start,
                        device->index.self_count, &model->bias[SIDA_ENCODER], SIDA_ENCODER,
                        block->o, tokens));
        SIDA_TRY(feed_forward(run, driver, SIDA_ENCODER, i, run->host.zeros, tokens));
    }
    SIDA_TRY(norm(run, device->encoder, device->h, model->final_norm[SIDA_ENCODER], tokens));
    SIDA_TRY(cross_keys(run));
out:
    if (status != SIDA_OK) run->sequences = 0;
    return status;
}

sida_status sida_run_read_encoder(sida_run *run, float *out) {
    sida_status status = SIDA_OK;
    if (run->sequences == 0) SIDA_FAIL(SIDA_ERROR_ARGUMENT, "nothing has been encoded");
    SIDA_TRY(sida_copy(run->stream, out, run->device.encoder,
                       (size_t)run->input_tokens * (size_t)run->model->config.info.d_model *
                           sizeof *out));
    SIDA_TRY(sida_stream_synchronize(run->stream));
out:
    return status;
}

/* New keys or values join each sequence's cache. Where there is one sequence the product writes
 * there itself. */
static sida_status extend_cache(sida_run *run, float *cache, float *fresh, sida_weight weight,
                                int64_t tokens) {
    sida_status status = SIDA_OK;
    const sida_run_index *index = &run->host.index;
    int64_t inner = inner_of(run);
    if (run->sequences == 1)
        return product(run, cache + run->host.position[0] * inner, run->device.x, weight, tokens,
                       SIDA_EPILOGUE_NONE);
    SIDA_TRY(product(run, fresh, run->device.x, weight, tokens, SIDA_EPILOGUE_NONE));
    for (int32_t s = 0; s < run->sequences; s++)
        if (index->q_count[s] > 0)
            SIDA_TRY(sida_copy(run->stream,
                               cache + (index->self_start[s] + index->q_position[s]) * inner,
                               fresh + index->q_start[s] * inner,
                               (size_t)index->q_count[s] * (size_t)inner * sizeof *fresh));
out:
    return status;
}

static sida_status decoder_block(sida_run *run, const sida_moe_driver *driver, int32_t i,
                                 int64_t tokens) {
    sida_status status = SIDA_OK;
    const sida_model *model = run->model;
    const sida_block *block = &model->blocks[SIDA_DECODER][i];
    sida_run_device *device = &run->device;
    int64_t inner = inner_of(run);
    int64_t own = i * (int64_t)run->limits.sequences * run->limits.decoder_positions * inner;
    int64_t cross = i * run->limits.input_tokens * inner;
    SIDA_TRY(norm(run, device->x, device->h, block->self_norm, tokens));
    SIDA_TRY(product(run, device->q, device->x, block->q, tokens, SIDA_EPILOGUE_NONE));
    SIDA_TRY(extend_cache(run, device->self_k + own, device->k, block->k, tokens));
    SIDA_TRY(extend_cache(run, device->self_v + own, device->v, block->v, tokens));
    SIDA_TRY(attend(run, device->self_k + own, device->self_v + own, device->index.self_start,
                    device->index.self_count, &model->bias[SIDA_DECODER], SIDA_DECODER, block->o,
                    tokens));
    SIDA_TRY(norm(run, device->x, device->h, block->cross_norm, tokens));
    SIDA_TRY(product(run, device->q, device->x, block->cross_q, tokens, SIDA_EPILOGUE_NONE));
    SIDA_TRY(attend(run, device->cross_k + cross, device->cross_v + cross,
                    device->index.cross_start, device->index.cross_count, NULL, SIDA_DECODER,
                    block->cross_o, tokens));
    SIDA_TRY(feed_forward(run, driver, SIDA_DECODER, i, run->host.position, tokens));
out:
    return status;
}

sida_status sida_run_decode(sida_run *run, const sida_ragged *step, const sida_moe_driver *driver) {
    sida_status status = SIDA_OK;
    const sida_model *model = run->model;
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
    SIDA_TRY(begin_call(run, step));
    for (int32_t i = 0; i < model->config.info.layers[SIDA_DECODER]; i++)
        SIDA_TRY(decoder_block(run, driver, i, tokens));
    SIDA_TRY(
        norm(run, run->device.decoder, run->device.h, model->final_norm[SIDA_DECODER], tokens));
    for (int32_t s = 0; s < step->sequences; s++) run->host.position[s] += index->q_count[s];
out:
    if (status != SIDA_OK) run->decoded_tokens = 0;
    return status;
}

sida_status sida_run_read_logits(sida_run *run, int64_t first, int64_t rows, float *out) {
    sida_status status = SIDA_OK;
    const sida_family_config *config = &run->model->config;
    int64_t d = config->info.d_model, vocabulary = config->info.vocabulary;
    if (first < 0 || rows < 0 || first > run->decoded_tokens || rows > run->decoded_tokens - first)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "logits of rows %lld … +%lld of %lld", (long long)first,
                  (long long)rows, (long long)run->decoded_tokens);
    for (int64_t done = 0; done < rows;) {
        int64_t count = rows - done < run->logits_rows ? rows - done : run->logits_rows;
        sida_linear_call head = {.y = run->device.logits,
                                 .ldy = vocabulary,
                                 .x = run->device.decoder + (first + done) * d,
                                 .ldx = d,
                                 .n = count,
                                 .weight = run->model->head,
                                 .scale = config->tied ? 1.0f / sqrtf((float)d) : 1.0f};
        SIDA_TRY(run->ops->linear(run->stream, &head));
        SIDA_TRY(sida_copy(run->stream, out + done * vocabulary, run->device.logits,
                           (size_t)count * (size_t)vocabulary * sizeof *out));
        SIDA_TRY(sida_stream_synchronize(run->stream));
        done += count;
    }
out:
    return status;
}
