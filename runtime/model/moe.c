/* A MoE layer: route, group the rows by expert, run the experts, combine.
 *
 * Where the router chooses, the routing never leaves the device unless somebody looks at it. The
 * host learns what it must: nothing where all experts are resident, nothing either where the driver
 * says before the call which experts may be needed, else which experts have rows.
 *
 * What the device reads of the host's arrays has a place for each layer, since nobody waits between
 * them; the next call waits for `staged`. */
#include "runtime/model/run_private.h"

#include <assert.h>
#include <string.h>

static int32_t layer_of(const sida_run *run, const sida_run_call *call, int32_t site) {
    return site - (call->side ? run->model->config.info.moe_layers[SIDA_ENCODER] : 0);
}

static sida_run_choice device_choice(const sida_run *run, const sida_run_call *call,
                                     const sida_block *block) {
    return sida_run_choice_at(run, run->device.choices, layer_of(run, call, block->site),
                              call->tokens);
}

static sida_run_choice host_choice(const sida_run *run, const sida_run_call *call, int32_t layer) {
    return sida_run_choice_at(run, run->host.choices, layer, call->tokens);
}

/* What the driver is told of a layer; arrays are the host's. */
static sida_moe_call moe_call(const sida_run *run, const sida_run_call *call, int32_t layer) {
    const sida_model_info *info = &run->model->config.info;
    const sida_run_choice choice = host_choice(run, call, layer);
    return (sida_moe_call){
        .site = layer + (call->side ? info->moe_layers[SIDA_ENCODER] : 0),
        .side = call->side,
        .layer = layer,
        .sequences = run->sequences,
        .offsets = run->host.index.q_start,
        .position = call->side == SIDA_ENCODER ? run->host.zeros : run->host.position,
        .tokens = call->tokens,
        .experts_total = info->experts,
        .k = info->top_k,
        .experts = choice.experts,
        .alpha = choice.alpha,
        .dropped = choice.dropped,
    };
}

static sida_dispatch_call dispatch_of(const sida_run *run, const sida_run_call *call,
                                      const sida_run_choice *choice, const int64_t *offsets) {
    const sida_model_info *info = &run->model->config.info;
    return (sida_dispatch_call){.dropped = choice->dropped,
                                .rows = choice->rows,
                                .row_start = choice->row_start,
                                .busy = choice->busy,
                                .busy_count = choice->busy_count,
                                .experts = choice->experts,
                                .offsets = offsets,
                                .n = call->tokens,
                                .k = info->top_k,
                                .sequences = run->sequences,
                                .experts_total = info->experts,
                                .capacity = info->capacity};
}

/* --- before the call */

/* The driver's choice for one layer, grouped, on the host. */
static sida_status choose(sida_run *run, const sida_run_call *call, sida_moe_call *moe) {
    sida_status status = SIDA_OK;
    const sida_run_choice choice = host_choice(run, call, moe->layer);
    SIDA_TRY(call->driver->choose(call->driver->context, moe));
    for (int64_t i = 0; i < moe->tokens * moe->k; i++)
        if (moe->experts[i] < 0 || moe->experts[i] >= moe->experts_total)
            SIDA_FAIL(SIDA_ERROR_ARGUMENT, "expert %d was chosen of %d", moe->experts[i],
                      moe->experts_total);
    const sida_dispatch_call dispatch = dispatch_of(run, call, &choice, run->host.index.q_start);
    SIDA_TRY(sida_dispatch_cpu(NULL, &dispatch));
out:
    return status;
}

static sida_status upload_choices(sida_run *run, const sida_run_call *call, int32_t first,
                                  int32_t count) {
    size_t bytes = sida_run_choice_bytes(run, call->tokens);
    size_t before = (size_t)first * bytes;
    return sida_upload(run->stream, run->device.choices + before, run->host_buffer,
                       run->host.choices + before, (size_t)count * bytes);
}

static bool has_tokens(const sida_run *run, int32_t sequence) {
    return run->host.index.q_count[sequence] > 0;
}

/* The sets, and whose each token is. */
static sida_status prepare_allowed(sida_run *run, const sida_run_call *call,
                                   const uint8_t *allowed) {
    sida_status status = SIDA_OK;
    const sida_model_info *info = &run->model->config.info;
    size_t experts = (size_t)info->experts;
    size_t sets = (size_t)info->moe_layers[call->side] * (size_t)run->sequences;
    for (size_t set = 0; set < sets; set++) {
        int32_t count = 0, sequence = (int32_t)(set % (size_t)run->sequences);
        for (size_t e = 0; e < experts; e++) count += allowed[set * experts + e] != 0;
        if (count < info->top_k && has_tokens(run, sequence))
            SIDA_FAIL(SIDA_ERROR_ARGUMENT, "sequence %d may choose among %d experts, of %d at once",
                      sequence, count, info->top_k);
    }
    memcpy(run->host.allowed, allowed, sets * experts);
    SIDA_TRY(sida_upload(run->stream, run->device.allowed, run->host_buffer, run->host.allowed,
                         sets * experts));
out:
    return status;
}

sida_status sida_run_moe_prepare(sida_run *run, sida_run_call *call) {
    sida_status status = SIDA_OK;
    const sida_moe_driver *driver = call->driver;
    int32_t layers = run->model->config.info.moe_layers[call->side];
    const uint8_t *allowed = driver->choose || !driver->allow || layers == 0
                                 ? NULL
                                 : driver->allow(driver->context, call->side);
    assert(driver->resident || (driver->begin && driver->take && driver->release));
    SIDA_TRY(sida_run_record_check(run, driver));
    call->chooser = allowed                 ? SIDA_CHOOSER_ALLOWED
                    : !driver->choose       ? SIDA_CHOOSER_ROUTER
                    : driver->chooses_ahead ? SIDA_CHOOSER_AHEAD
                                            : SIDA_CHOOSER_HOST;
    call->stops = !driver->resident || driver->observe || driver->hidden ||
                  call->chooser == SIDA_CHOOSER_HOST;
    if (allowed) SIDA_TRY(prepare_allowed(run, call, allowed));
    if (call->chooser != SIDA_CHOOSER_AHEAD || layers == 0) goto out;
    for (int32_t layer = 0; layer < layers; layer++) {
        sida_moe_call moe = moe_call(run, call, layer);
        SIDA_TRY(choose(run, call, &moe));
    }
    SIDA_TRY(upload_choices(run, call, 0, layers));
out:
    return status;
}

/* --- on the device */

sida_status sida_run_moe_route(sida_run *run, const sida_run_call *call, const sida_block *block) {
    sida_status status = SIDA_OK;
    const sida_model *model = run->model;
    const sida_model_info *info = &model->config.info;
    const sida_run_choice choice = device_choice(run, call, block);
    int64_t tokens = call->tokens;
    if (call->chooser == SIDA_CHOOSER_AHEAD)
        return run->ops->rms_norm(run->stream, run->device.x, model->activation, run->device.h,
                                  block->ff_norm, tokens, model->config.epsilon);
    float *logits = sida_run_router_logits(run, call, layer_of(run, call, block->site));
    SIDA_TRY(sida_run_normed_product(run, logits, info->experts, block->router, block->ff_norm,
                                     tokens, true));
    if (call->chooser == SIDA_CHOOSER_HOST) goto out;
    sida_router_call router = {.experts = choice.experts,
                               .alpha = choice.alpha,
                               .logits = logits,
                               .n = tokens,
                               .experts_total = info->experts,
                               .k = info->top_k,
                               .renormalise = info->renormalise};
    if (call->chooser == SIDA_CHOOSER_ALLOWED) {
        router.allowed = run->device.allowed + (size_t)layer_of(run, call, block->site) *
                                                   (size_t)run->sequences * (size_t)info->experts;
        router.set_of = run->device.index.ids + tokens;
    }
    const sida_dispatch_call dispatch = dispatch_of(run, call, &choice, run->device.index.q_start);
    if (run->ops->route) return run->ops->route(run->stream, &router, &dispatch);
    SIDA_TRY(run->ops->router(run->stream, &router));
    SIDA_TRY(run->ops->dispatch(run->stream, &dispatch));
out:
    return status;
}

bool sida_run_experts_add(const sida_run *run) {
    return run->ops->expert_adds && run->model->config.info.top_k == 1;
}

/* The caller adds which experts. */
static sida_expert_call expert_call(const sida_run *run, const sida_run_call *call,
                                    const sida_run_choice *choice) {
    const sida_model_info *info = &run->model->config.info;
    const sida_run_device *device = &run->device;
    return (sida_expert_call){.scratch = device->scratch,
                              .x = device->x,
                              .x_type = run->model->activation,
                              .k = info->top_k,
                              .shape = info->expert,
                              .row_start = choice->row_start,
                              .rows = choice->rows,
                              .rows_total = call->tokens * info->top_k,
                              .workspace = device->expert_workspace,
                              .h = sida_run_experts_add(run) ? device->h : NULL,
                              .alpha = choice->alpha};
}

sida_status sida_run_moe_resident(sida_run *run, const sida_run_call *call,
                                  const sida_block *block) {
    int32_t total = run->model->config.info.experts;
    const sida_run_choice choice = device_choice(run, call, block);
    sida_expert_call experts = expert_call(run, call, &choice);
    experts.ids = choice.busy;
    experts.count = experts.rows_total < total ? (int32_t)experts.rows_total : total;
    experts.count_of = choice.busy_count;
    experts.weights = call->driver->resident + (size_t)block->site * (size_t)total;
    experts.weights_by_expert = true;
    return run->ops->expert(run->stream, &experts);
}

sida_status sida_run_moe_combine(sida_run *run, const sida_run_call *call,
                                 const sida_block *block) {
    const sida_model_info *info = &run->model->config.info;
    if (sida_run_experts_add(run)) return SIDA_OK;
    const sida_run_choice choice = device_choice(run, call, block);
    return run->ops->combine(run->stream, run->device.h, run->device.scratch, choice.alpha,
                             choice.dropped, call->tokens, info->top_k, info->d_model);
}

/* --- the host's part */

/* Issues one wave's products; `used`: how many experts earlier waves of the layer had. */
static sida_status run_wave(sida_run *run, const sida_run_call *call, const sida_moe_call *moe,
                            int32_t used, int32_t count) {
    sida_status status = SIDA_OK;
    sida_run_host *host = &run->host;
    const sida_run_choice choice =
        sida_run_choice_at(run, run->device.choices, moe->layer, call->tokens);
    size_t before = (size_t)used * SIDA_WAVE_BYTES;
    size_t layer = (size_t)moe->layer * (size_t)moe->experts_total * SIDA_WAVE_BYTES;
    const void **weights = (const void **)(void *)(host->waves + layer + before);
    int32_t *ids = (int32_t *)(void *)(weights + count);
    for (int32_t i = 0; i < count; i++) {
        int32_t e = host->wave[i];
        /* A driver that hands out an expert twice, or one that nobody needs, is wrong. */
        if (e < 0 || e >= moe->experts_total || !host->pending[e])
            SIDA_FAIL(SIDA_ERROR_ARGUMENT, "expert %d of MoE layer %d was not asked for", e,
                      moe->site);
        host->pending[e] = false;
        weights[i] = host->weights[i];
        ids[i] = e;
    }
    char *device = run->device.waves + before;
    SIDA_TRY(sida_upload(run->stream, device, run->host_buffer, weights,
                         (size_t)count * SIDA_WAVE_BYTES));
    sida_expert_call experts = expert_call(run, call, &choice);
    experts.weights = (const void *const *)(void *)device;
    experts.ids = (const int32_t *)(const void *)(experts.weights + count);
    experts.count = count;
    SIDA_TRY(run->ops->expert(run->stream, &experts));
out:
    return status;
}

/* host.pending says which. */
static sida_status run_waves(sida_run *run, const sida_run_call *call, const sida_moe_call *moe) {
    sida_status status = SIDA_OK;
    sida_run_host *host = &run->host;
    const sida_moe_driver *driver = call->driver;
    int32_t needed = 0;
    for (int32_t e = 0; e < moe->experts_total; e++)
        if (host->pending[e]) host->needed[needed++] = e;
    if (needed == 0) goto out;
    SIDA_TRY(driver->begin(driver->context, moe, host->needed, needed));
    for (int32_t used = 0, count; used < needed; used += count) {
        count = 0;
        SIDA_TRY(driver->take(driver->context, host->wave, host->weights, &count));
        if (count < 1 || count > needed - used)
            SIDA_FAIL(SIDA_ERROR_ARGUMENT, "a wave of %d experts where %d are left", count,
                      needed - used);
        status = run_wave(run, call, moe, used, count);
        /* Its slots must come back whatever happened. */
        sida_status released = driver->release(driver->context, host->wave, count, run->stream);
        if (status != SIDA_OK) goto out;
        SIDA_TRY(released);
    }
out:
    return status;
}

/* Which experts the layer needs, as far as the host knows: those that have rows, or all that may
 * have some. */
static void find_needed(sida_run *run, const sida_run_call *call, const sida_moe_call *moe) {
    size_t experts = (size_t)moe->experts_total;
    bool *pending = run->host.pending;
    if (call->chooser != SIDA_CHOOSER_ALLOWED) {
        const int64_t *row_start = host_choice(run, call, moe->layer).row_start;
        for (size_t e = 0; e < experts; e++) pending[e] = row_start[e + 1] > row_start[e];
        return;
    }
    const uint8_t *set = run->host.allowed + (size_t)(moe->layer * moe->sequences) * experts;
    memset(pending, 0, experts * sizeof *pending);
    for (int32_t s = 0; s < moe->sequences; s++, set += experts)
        for (size_t e = 0; has_tokens(run, s) && e < experts; e++) pending[e] |= set[e] != 0;
}

static bool asks_what_was_chosen(const sida_run *run, const sida_run_call *call, int32_t layer) {
    return call->driver->chosen && !call->driver->resident &&
           call->chooser == SIDA_CHOOSER_ROUTER &&
           layer + 1 < run->model->config.info.moe_layers[call->side];
}

/* Brings to the host what it lacks of a layer's routing. */
static sida_status read_back(sida_run *run, const sida_run_call *call, const sida_block *block,
                             sida_moe_call *moe) {
    sida_status status = SIDA_OK;
    const sida_run_choice from = device_choice(run, call, block);
    const sida_run_choice to = host_choice(run, call, moe->layer);
    const bool routed =
        call->chooser == SIDA_CHOOSER_ROUTER || call->chooser == SIDA_CHOOSER_ALLOWED;
    size_t bytes = 0; /* of the choice, which begins with row_start */
    if (routed && call->driver->observe)
        bytes = sida_run_choice_bytes(run, call->tokens);
    else if (call->chooser == SIDA_CHOOSER_ROUTER && !call->driver->resident)
        bytes = asks_what_was_chosen(run, call, moe->layer)
                    ? (size_t)((char *)(to.experts + moe->tokens * moe->k) - (char *)to.row_start)
                    : ((size_t)moe->experts_total + 1) * sizeof *to.row_start;
    if (call->chooser == SIDA_CHOOSER_HOST || (routed && call->driver->observe)) {
        moe->logits = run->host.logits_router;
        SIDA_TRY(sida_copy(run->stream, run->host.logits_router,
                           sida_run_router_logits(run, call, moe->layer),
                           (size_t)moe->tokens * (size_t)moe->experts_total * sizeof *moe->logits));
    }
    if (bytes > 0) SIDA_TRY(sida_copy(run->stream, to.row_start, from.row_start, bytes));
    if (bytes > 0 || moe->logits) SIDA_TRY(sida_stream_synchronize(run->stream));
out:
    return status;
}

sida_status sida_run_moe_stop(sida_run *run, const sida_run_call *call, const sida_block *block) {
    sida_status status = SIDA_OK;
    const sida_moe_driver *driver = call->driver;
    sida_moe_call moe = moe_call(run, call, layer_of(run, call, block->site));
    SIDA_TRY(read_back(run, call, block, &moe));
    if (call->chooser == SIDA_CHOOSER_HOST) {
        SIDA_TRY(choose(run, call, &moe));
        SIDA_TRY(upload_choices(run, call, moe.layer, 1));
    }
    if (driver->observe) SIDA_TRY(driver->observe(driver->context, &moe));
    if (driver->resident) return sida_run_moe_resident(run, call, block);
    find_needed(run, call, &moe);
    SIDA_TRY(run_waves(run, call, &moe));
out:
    return status;
}

sida_status sida_run_moe_tell(const sida_run *run, const sida_run_call *call,
                              const sida_block *block) {
    int32_t layer = layer_of(run, call, block->site);
    if (!asks_what_was_chosen(run, call, layer)) return SIDA_OK;
    const sida_moe_call moe = moe_call(run, call, layer);
    return call->driver->chosen(call->driver->context, &moe);
}

sida_status sida_run_moe_show(sida_run *run, const sida_run_call *call, const sida_block *block) {
    sida_status status = SIDA_OK;
    const sida_moe_driver *driver = call->driver;
    const size_t row = (size_t)run->model->config.info.d_model * sizeof(float);
    const int64_t most = run->limits.input_tokens > run->limits.step_tokens
                             ? run->limits.input_tokens
                             : run->limits.step_tokens;
    const sida_moe_call moe = moe_call(run, call, layer_of(run, call, block->site));
    if (!run->hidden)
        SIDA_TRY(sida_buffer_create(run->model->backend, &run->hidden, SIDA_MEMORY_HOST,
                                    (size_t)most * row, "hidden states"));
    SIDA_TRY(sida_run_moe_combine(run, call, block));
    SIDA_TRY(sida_copy(run->stream, run->hidden->data, run->device.h, (size_t)call->tokens * row));
    SIDA_TRY(sida_stream_synchronize(run->stream));
    SIDA_TRY(driver->hidden(driver->context, &moe, run->hidden->data));
out:
    return status;
}
