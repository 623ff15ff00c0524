/* A MoE layer: route, group the rows by expert, run the experts, combine.
 *
 * Without hooks the routing never leaves the device; the host learns what the driver makes it need:
 * nothing where all experts are resident, else which experts have rows. With hooks the host routes
 * and groups. Host arrays that the device reads or writes are written again behind the next layer's
 * synchronisation only. */
#include "runtime/model/run_private.h"

#include <assert.h>
#include <string.h>

/* Router logits on the host, and the choice there and on the device. */
static sida_status route_on_host(sida_run *run, const sida_moe_driver *driver,
                                 sida_moe_call *call) {
    sida_status status = SIDA_OK;
    sida_run_choice *device = &run->device.choice;
    size_t choices = (size_t)call->tokens * (size_t)call->k;
    SIDA_TRY(sida_copy(run->stream, run->host.logits_router, run->device.logits_router,
                       (size_t)call->tokens * (size_t)call->experts_total * sizeof *call->logits));
    if (!driver->choose) {
        SIDA_TRY(sida_copy(run->stream, call->experts, device->experts,
                           choices * sizeof *call->experts));
        SIDA_TRY(sida_copy(run->stream, call->alpha, device->alpha, choices * sizeof *call->alpha));
    }
    SIDA_TRY(sida_stream_synchronize(run->stream));
    if (!driver->choose) goto out;
    SIDA_TRY(driver->choose(driver->context, call));
    for (size_t i = 0; i < choices; i++)
        if (call->experts[i] < 0 || call->experts[i] >= call->experts_total)
            SIDA_FAIL(SIDA_ERROR_ARGUMENT, "expert %d was chosen of %d", call->experts[i],
                      call->experts_total);
    SIDA_TRY(sida_copy(run->stream, device->alpha, call->alpha, choices * sizeof *call->alpha));
out:
    return status;
}

static sida_dispatch_call dispatch_of(const sida_run *run, const sida_run_choice *choice,
                                      const sida_run_index *index, const sida_moe_call *call) {
    return (sida_dispatch_call){.dropped = choice->dropped,
                                .rows = choice->rows,
                                .row_start = choice->row_start,
                                .busy = choice->busy,
                                .busy_count = choice->busy_count,
                                .experts = choice->experts,
                                .offsets = index->q_start,
                                .n = call->tokens,
                                .k = call->k,
                                .sequences = call->sequences,
                                .experts_total = call->experts_total,
                                .capacity = run->model->config.info.capacity};
}

/* Routes and groups with the driver's hooks: on the host, and from there to the device. */
static sida_status dispatch_on_host(sida_run *run, const sida_moe_driver *driver,
                                    sida_moe_call *call) {
    sida_status status = SIDA_OK;
    const sida_run_choice *host = &run->host.choice;
    sida_run_choice *device = &run->device.choice;
    call->logits = run->host.logits_router;
    call->experts = host->experts;
    call->alpha = host->alpha;
    call->dropped = host->dropped;
    SIDA_TRY(route_on_host(run, driver, call));
    sida_dispatch_call dispatch = dispatch_of(run, host, &run->host.index, call);
    SIDA_TRY(sida_dispatch_cpu(NULL, &dispatch));
    if (driver->observe) SIDA_TRY(driver->observe(driver->context, call));
    SIDA_TRY(sida_copy(run->stream, device->dropped, host->dropped, (size_t)call->tokens));
    SIDA_TRY(sida_copy(run->stream, device->rows, host->rows,
                       (size_t)host->row_start[call->experts_total] * sizeof *host->rows));
    SIDA_TRY(sida_copy(run->stream, device->row_start, host->row_start,
                       ((size_t)call->experts_total + 1) * sizeof *host->row_start));
out:
    return status;
}

static sida_status run_experts(sida_run *run, const sida_moe_call *call, int32_t count,
                               const void *const *weights, const int32_t *ids) {
    const sida_expert_call experts = {.scratch = run->device.scratch,
                                      .x = run->device.x,
                                      .k = call->k,
                                      .shape = run->model->config.info.expert,
                                      .count = count,
                                      .ids = ids,
                                      .weights = weights,
                                      .row_start = run->device.choice.row_start,
                                      .rows = run->device.choice.rows,
                                      .rows_total = call->tokens * call->k,
                                      .workspace = run->device.expert_workspace};
    return run->ops->expert(run->stream, &experts);
}

/* Issues one wave's products; `used`: how many experts earlier waves of the layer had. */
static sida_status run_wave(sida_run *run, const sida_moe_call *call, int32_t used, int32_t count) {
    sida_status status = SIDA_OK;
    sida_run_host *host = &run->host;
    size_t before = (size_t)used * SIDA_WAVE_BYTES;
    const void **weights = (const void **)(void *)(host->choice.waves + before);
    int32_t *ids = (int32_t *)(void *)(weights + count);
    for (int32_t i = 0; i < count; i++) {
        int32_t e = host->wave[i];
        /* A driver that hands out an expert twice, or one that nobody needs, is wrong. */
        if (e < 0 || e >= call->experts_total || !host->pending[e])
            SIDA_FAIL(SIDA_ERROR_ARGUMENT, "expert %d of MoE layer %d was not asked for", e,
                      call->site);
        host->pending[e] = false;
        weights[i] = host->weights[i];
        ids[i] = e;
    }
    char *device = run->device.choice.waves + before;
    SIDA_TRY(sida_copy(run->stream, device, weights, (size_t)count * SIDA_WAVE_BYTES));
    const void *const *on_device = (const void *const *)(void *)device;
    SIDA_TRY(run_experts(run, call, count, on_device,
                         (const int32_t *)(const void *)(on_device + count)));
out:
    return status;
}

/* host.choice.row_start is known. */
static sida_status run_waves(sida_run *run, const sida_moe_driver *driver,
                             const sida_moe_call *call) {
    sida_status status = SIDA_OK;
    sida_run_host *host = &run->host;
    int32_t needed = 0;
    for (int32_t e = 0; e < call->experts_total; e++) {
        host->pending[e] = host->choice.row_start[e + 1] > host->choice.row_start[e];
        if (host->pending[e]) host->needed[needed++] = e;
    }
    if (needed == 0) goto out;
    SIDA_TRY(driver->begin(driver->context, call, host->needed, needed));
    for (int32_t used = 0, count; used < needed; used += count) {
        count = 0;
        SIDA_TRY(driver->take(driver->context, host->wave, host->weights, &count));
        if (count < 1 || count > needed - used)
            SIDA_FAIL(SIDA_ERROR_ARGUMENT, "a wave of %d experts where %d are left", count,
                      needed - used);
        status = run_wave(run, call, used, count);
        /* Its slots must come back whatever happened. */
        sida_status released = driver->release(driver->context, host->wave, count, run->stream);
        if (status != SIDA_OK) goto out;
        SIDA_TRY(released);
    }
out:
    return status;
}

sida_status sida_run_moe(sida_run *run, const sida_moe_driver *driver, int side, int32_t index,
                         const int32_t *position, int64_t tokens) {
    sida_status status = SIDA_OK;
    const sida_model *model = run->model;
    const sida_model_info *info = &model->config.info;
    const sida_block *block = &model->blocks[side][index];
    sida_run_device *device = &run->device;
    const sida_run_choice *choice = &device->choice;
    SIDA_TRY(run->ops->rms_norm(run->stream, device->x, SIDA_F32, device->h, block->ff_norm, tokens,
                                model->config.epsilon));
    sida_linear_call logits = {.y = device->logits_router,
                               .ldy = info->experts,
                               .x = device->x,
                               .ldx = info->d_model,
                               .n = tokens,
                               .weight = block->router,
                               .scale = 1.0f};
    SIDA_TRY(run->ops->linear(run->stream, &logits));
    if (!driver->choose) {
        sida_router_call router = {.experts = choice->experts,
                                   .alpha = choice->alpha,
                                   .logits = device->logits_router,
                                   .n = tokens,
                                   .experts_total = info->experts,
                                   .k = info->top_k,
                                   .renormalise = info->renormalise};
        SIDA_TRY(run->ops->router(run->stream, &router));
    }
    sida_moe_call call = {.site = block->site,
                          .side = side,
                          .layer = block->site - (side ? info->moe_layers[SIDA_ENCODER] : 0),
                          .sequences = run->sequences,
                          .offsets = run->host.index.q_start,
                          .position = position,
                          .tokens = tokens,
                          .experts_total = info->experts,
                          .k = info->top_k};
    const bool hooked = driver->choose || driver->observe;
    if (hooked) {
        SIDA_TRY(dispatch_on_host(run, driver, &call));
    } else {
        sida_dispatch_call dispatch = dispatch_of(run, choice, &device->index, &call);
        SIDA_TRY(run->ops->dispatch(run->stream, &dispatch));
    }
    const void *const *weights =
        driver->resident ? driver->resident(driver->context, block->site) : NULL;
    if (weights) {
        SIDA_TRY(run_experts(run, &call, info->experts, weights, NULL));
    } else {
        assert(driver->begin && driver->take && driver->release);
        if (!hooked) {
            SIDA_TRY(sida_copy(run->stream, run->host.choice.row_start, choice->row_start,
                               ((size_t)info->experts + 1) * sizeof *choice->row_start));
            SIDA_TRY(sida_stream_synchronize(run->stream));
        }
        SIDA_TRY(run_waves(run, driver, &call));
    }
    SIDA_TRY(run->ops->combine(run->stream, device->h, device->scratch, choice->alpha,
                               choice->dropped, tokens, info->top_k, info->d_model));
out:
    return status;
}
