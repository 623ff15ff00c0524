/* A MoE layer: route, ask the driver for the experts, run them wave by wave, combine. */
#include "runtime/model/run_private.h"

#include <assert.h>
#include <string.h>

/* Router logits, and the choice: the driver's or the router's. Afterwards the host knows it. */
static sida_status route(sida_run *run, const sida_moe_driver *driver, sida_moe_call *call) {
    sida_status status = SIDA_OK;
    sida_run_device *device = &run->device;
    sida_run_host *host = &run->host;
    size_t choices = (size_t)call->tokens * (size_t)call->k;
    size_t logits = (size_t)call->tokens * (size_t)call->experts_total * sizeof(float);
    if (driver->choose || driver->observe)
        SIDA_TRY(sida_copy(run->stream, host->logits_router, device->logits_router, logits));
    if (driver->choose) {
        SIDA_TRY(sida_stream_synchronize(run->stream));
        SIDA_TRY(driver->choose(driver->context, call));
        for (size_t i = 0; i < choices; i++)
            if (call->experts[i] < 0 || call->experts[i] >= call->experts_total)
                SIDA_FAIL(SIDA_ERROR_ARGUMENT, "expert %d was chosen of %d", call->experts[i],
                          call->experts_total);
        SIDA_TRY(sida_copy(run->stream, device->choice.alpha, call->alpha,
                           choices * sizeof *call->alpha));
        return SIDA_OK;
    }
    sida_router_call router = {.experts = device->choice.experts,
                               .alpha = device->choice.alpha,
                               .logits = device->logits_router,
                               .n = call->tokens,
                               .experts_total = call->experts_total,
                               .k = call->k,
                               .renormalise = run->model->config.info.renormalise};
    SIDA_TRY(run->ops->router(run->stream, &router));
    SIDA_TRY(sida_copy(run->stream, call->experts, device->choice.experts,
                       choices * sizeof *call->experts));
    if (driver->observe)
        SIDA_TRY(sida_copy(run->stream, call->alpha, device->choice.alpha,
                           choices * sizeof *call->alpha));
    SIDA_TRY(sida_stream_synchronize(run->stream));
out:
    return status;
}

/* Groups the rows that are computed by their expert (stable), and lists the experts that have any.
 * Returns how many those are. */
static int32_t group_rows(sida_run_host *host, const sida_moe_call *call) {
    int32_t total = call->experts_total, count = 0;
    memset(host->expert_start, 0, ((size_t)total + 1) * sizeof *host->expert_start);
    for (int64_t t = 0; t < call->tokens; t++)
        for (int32_t r = 0; r < call->k && !call->dropped[t]; r++)
            host->expert_start[call->experts[t * call->k + r] + 1]++;
    for (int32_t e = 0; e < total; e++) {
        if (host->expert_start[e + 1] > 0) host->needed[count++] = e;
        host->expert_start[e + 1] += host->expert_start[e];
        host->counts[e] = 0;
    }
    for (int64_t t = 0; t < call->tokens; t++)
        for (int32_t r = 0; r < call->k && !call->dropped[t]; r++) {
            int64_t row = t * call->k + r;
            int32_t e = call->experts[row];
            host->by_expert[host->expert_start[e] + host->counts[e]++] = (int32_t)row;
        }
    return count;
}

/* Issues one wave's products. Slices of the staging arrays are not reused within a layer: copies
 * may still be reading them. */
static sida_status run_wave(sida_run *run, const sida_moe_call *call, const int32_t *experts,
                            int32_t count, int64_t *rows_used, int64_t *starts_used,
                            int64_t *weights_used) {
    sida_status status = SIDA_OK;
    sida_run_host *host = &run->host;
    sida_run_choice *from = &host->choice, *to = &run->device.choice;
    int64_t rows = *rows_used, starts = *starts_used, weights = *weights_used;
    int64_t *row_start = from->row_start + starts;
    row_start[0] = 0;
    for (int32_t i = 0; i < count; i++) {
        int32_t e = experts[i];
        /* counts[e] is what is still to be computed: a driver that hands out an expert twice, or
         * one that nobody needs, is wrong. */
        if (e < 0 || e >= call->experts_total || host->counts[e] == 0)
            SIDA_FAIL(SIDA_ERROR_ARGUMENT, "expert %d of MoE layer %d was not asked for", e,
                      call->site);
        memcpy(from->rows + rows + row_start[i], host->by_expert + host->expert_start[e],
               (size_t)host->counts[e] * sizeof *from->rows);
        row_start[i + 1] = row_start[i] + host->counts[e];
        host->counts[e] = 0;
    }
    SIDA_TRY(sida_copy(run->stream, to->rows + rows, from->rows + rows,
                       (size_t)row_start[count] * sizeof *to->rows));
    SIDA_TRY(sida_copy(run->stream, to->row_start + starts, row_start,
                       ((size_t)count + 1) * sizeof *row_start));
    SIDA_TRY(sida_copy(run->stream, to->weights + weights, from->weights + weights,
                       (size_t)count * sizeof *from->weights));
    sida_expert_call wave = {.scratch = run->device.scratch,
                             .x = run->device.x,
                             .k = call->k,
                             .shape = run->model->config.info.expert,
                             .count = count,
                             .weights = to->weights + weights,
                             .row_start = to->row_start + starts,
                             .rows = to->rows + rows,
                             .workspace = run->device.expert_workspace};
    SIDA_TRY(run->ops->expert(run->stream, &wave));
    *rows_used += row_start[count];
    *starts_used += count + 1;
    *weights_used += count;
out:
    return status;
}

static sida_status run_waves(sida_run *run, const sida_moe_driver *driver,
                             const sida_moe_call *call, int32_t needed) {
    sida_status status = SIDA_OK;
    sida_run_host *host = &run->host;
    int64_t rows = 0, starts = 0, weights = 0;
    SIDA_TRY(driver->begin(driver->context, call, host->needed, needed));
    for (int32_t left = needed; left > 0;) {
        int32_t count = 0;
        SIDA_TRY(driver->take(driver->context, host->wave, host->choice.weights + weights, &count));
        if (count < 1 || count > left)
            SIDA_FAIL(SIDA_ERROR_ARGUMENT, "a wave of %d experts where %d are left", count, left);
        status = run_wave(run, call, host->wave, count, &rows, &starts, &weights);
        /* Its slots must come back whatever happened. */
        sida_status released = driver->release(driver->context, host->wave, count, run->stream);
        if (status != SIDA_OK) goto out;
        SIDA_TRY(released);
        left -= count;
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
    sida_run_host *host = &run->host;
    assert(driver->begin && driver->take && driver->release);
    SIDA_TRY(run->ops->rms_norm(run->stream, device->x, device->h, block->ff_norm, tokens,
                                model->config.epsilon));
    sida_linear_call router = {.y = device->logits_router,
                               .ldy = info->experts,
                               .x = device->x,
                               .ldx = info->d_model,
                               .n = tokens,
                               .weight = block->router,
                               .scale = 1.0f};
    SIDA_TRY(run->ops->linear(run->stream, &router));
    sida_moe_call call = {.site = block->site,
                          .side = side,
                          .layer = block->site - (side ? info->moe_layers[SIDA_ENCODER] : 0),
                          .sequences = run->sequences,
                          .offsets = host->offsets,
                          .position = position,
                          .tokens = tokens,
                          .experts_total = info->experts,
                          .k = info->top_k,
                          .logits = host->logits_router,
                          .experts = host->choice.experts,
                          .alpha = host->choice.alpha,
                          .dropped = host->choice.dropped};
    SIDA_TRY(route(run, driver, &call));
    sida_router_capacity(call.dropped, call.experts, call.sequences, call.offsets, info->experts,
                         info->capacity, host->counts);
    bool drops = memchr(call.dropped, 1, (size_t)tokens) != NULL;
    if (drops)
        SIDA_TRY(sida_copy(run->stream, device->choice.dropped, call.dropped, (size_t)tokens));
    if (driver->observe) SIDA_TRY(driver->observe(driver->context, &call));
    int32_t needed = group_rows(host, &call);
    if (needed > 0) SIDA_TRY(run_waves(run, driver, &call, needed));
    SIDA_TRY(run->ops->combine(run->stream, device->h, device->scratch, device->choice.alpha,
                               drops ? device->choice.dropped : NULL, tokens, info->top_k,
                               info->d_model));
out:
    return status;
}
