#include "formats/base/clock.h"
#include "formats/base/memory.h"
#include "runtime/engine/pass_private.h"
#include "runtime/engine/score.h"

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* --- the driver: model and store meet here */

static const uint8_t *driver_allow(void *context, int32_t side) {
    return ((const sida_pass *)context)->current->sets.allowed[side];
}

static sida_status driver_choose(void *context, sida_moe_call *call) {
    const sida_pass *p = context;
    sida_routing_predicted(&p->current->tables[call->side], call, p->info->renormalise);
    return SIDA_OK;
}

static sida_status driver_begin(void *context, const sida_moe_call *call, const int32_t *needed,
                                int32_t count) {
    sida_pass *p = context;
    sida_pass_pause(p);
    for (int32_t i = 0; i < count; i++) p->global[i] = call->site * p->info->experts + needed[i];
    return sida_store_begin(p->store, sida_pass_position(p->current->number, p->call, call->site),
                            p->global, count);
}

static sida_status driver_take(void *context, int32_t *experts, const void **weights,
                               int32_t *count) {
    sida_pass *p = context;
    sida_status status = sida_store_take(p->store, experts, weights, count);
    /* Remembered for the release; the model speaks of the layer's own numbers. */
    for (int32_t i = 0; i < *count; i++) {
        p->global[i] = experts[i];
        experts[i] %= p->info->experts;
    }
    return status;
}

static sida_status driver_release(void *context, const int32_t *experts, int32_t count,
                                  sida_stream *stream) {
    sida_pass *p = context;
    (void)experts;
    sida_status status = sida_store_release(p->store, p->global, count, stream);
    sida_pass_pause(p);
    return status;
}

static sida_status driver_chosen(void *context, const sida_moe_call *call) {
    return sida_pass_refine(context, call);
}

/* The decoder's step t: its table was built ahead for t = 0, and can be built now for the rest. */
static sida_status before_step(void *context, int32_t t, const sida_ragged *step) {
    sida_pass *p = context;
    p->call = 1 + t;
    if (!p->source || t == 0) return SIDA_OK;
    return sida_pass_build_step(p, step);
}

static sida_status on_logits(void *context, int32_t t, int32_t sequence, const float *logits) {
    sida_pass *p = context;
    int32_t vocabulary = p->info->vocabulary;
    if (p->options->digest)
        sida_hasher_update(p->hashers[sequence], logits, (size_t)vocabulary * sizeof *logits);
    if (p->options->score) {
        const sida_ragged *target = &p->current->batch->target;
        int32_t id = target->ids[target->offsets[sequence] + t];
        p->nll[sequence] += sida_score_nll(logits, vocabulary, id);
    }
    return SIDA_OK;
}

/* --- the inference thread */

static sida_status prepare_hashers(sida_pass *p, int32_t sequences) {
    sida_status status = SIDA_OK;
    SIDA_TRY(SIDA_GROW(&p->hashers, &p->hashers_capacity, sequences, "hashers"));
    for (; p->hashers_count < (size_t)sequences; p->hashers_count++)
        SIDA_TRY(sida_hasher_create(&p->hashers[p->hashers_count]));
    for (int32_t s = 0; s < sequences; s++) sida_hasher_reset(p->hashers[s]);
out:
    return status;
}

static sida_status count_batch(sida_pass *p, double latency_ms) {
    sida_pass_stats *stats = p->stats;
    const sida_ragged *input = &p->current->batch->input;
    sida_status status = SIDA_OK;
    SIDA_TRY(SIDA_GROW(&stats->latencies_ms, &stats->latencies_capacity, stats->batches + 1,
                       "latencies"));
    stats->latencies_ms[stats->batches++] = latency_ms;
    stats->batch_seconds += latency_ms / 1e3;
    stats->sequences += input->sequences;
    stats->input_tokens += sida_ragged_tokens(input);
    for (int32_t s = 0; s < input->sequences; s++) stats->generated_tokens += p->counts[s];
    for (int32_t s = 0; p->options->digest && s < input->sequences; s++) {
        sida_fingerprint one = sida_hasher_finish(p->hashers[s]);
        sida_hasher_update(p->digest, &one, sizeof one);
    }
out:
    return status;
}

static sida_status run_batch(sida_pass *p, const sida_moe_driver *driver) {
    const sida_pass_options *o = p->options;
    sida_pass_item *it = p->current;
    const sida_ragged *input = &it->batch->input;
    size_t sequences = (size_t)input->sequences;
    double begin = sida_clock_seconds();
    sida_status status = SIDA_OK;
    SIDA_TRY(SIDA_GROW(&p->ids, &p->ids_capacity, sequences * (size_t)o->max_new_tokens,
                       "generated ids"));
    SIDA_TRY(SIDA_GROW(&p->counts, &p->counts_capacity, sequences, "generated ids"));
    if (o->digest) SIDA_TRY(prepare_hashers(p, input->sequences));
    if (o->score) {
        SIDA_TRY(SIDA_GROW(&p->nll, &p->nll_capacity, sequences, "scores"));
        memset(p->nll, 0, sequences * sizeof *p->nll);
    }
    p->call = 0;
    SIDA_TRY(sida_run_encode(o->run, input, driver));
    const sida_generate_options generate = {.max_new_tokens = o->max_new_tokens,
                                            .forced = o->score ? &it->batch->target : NULL,
                                            .context = p,
                                            .before_step = before_step,
                                            .on_logits = o->digest || o->score ? on_logits : NULL};
    SIDA_TRY(sida_run_generate(o->run, &generate, driver, p->ids, p->counts));
    if (o->routing == SIDA_ROUTING_GUIDED) sida_router_sets_end(&it->sets);
    double latency_ms = (sida_clock_seconds() - begin) * 1e3;
    SIDA_TRY(count_batch(p, latency_ms));
    if (o->on_batch) {
        sida_pass_batch done = {.batch = it->batch,
                                .ids = p->ids,
                                .stride = o->max_new_tokens,
                                .counts = p->counts,
                                .nll = o->score ? p->nll : NULL,
                                .latency_ms = latency_ms};
        if (p->store) sida_store_get_stats(p->store, &done.store);
        SIDA_TRY(o->on_batch(o->on_batch_context, &done));
    }
out:
    return status;
}

static sida_status run_batches(sida_pass *p) {
    const sida_pass_options *o = p->options;
    const sida_moe_driver driver = {
        .context = p,
        .allow = o->routing == SIDA_ROUTING_GUIDED ? driver_allow : NULL,
        .choose = o->routing == SIDA_ROUTING_PREDICTED ? driver_choose : NULL,
        .chooses_ahead = true,
        .resident = o->resident ? sida_resident_table(o->resident) : NULL,
        .begin = driver_begin,
        .take = driver_take,
        .release = driver_release,
        .chosen = p->refines ? driver_chosen : NULL,
    };
    sida_status status = SIDA_OK;
    for (;;) {
        void *next;
        SIDA_TRY(sida_queue_pop(p->ready, &next, &p->queue_wait_seconds));
        if (!next) break;
        if (p->stats->batches == 0) {
            p->first_wait_seconds = p->queue_wait_seconds;
            p->first_taken = sida_clock_seconds();
        }
        p->current = next;
        sida_pass_pause(p);
        SIDA_TRY(run_batch(p, &driver));
        sida_batch_destroy(p->current->batch);
        p->current->batch = NULL;
        /* Refused only after an error, which `ready` was told first: the next pop says which. */
        (void)sida_queue_push(p->spare, p->current, NULL);
    }
out:
    return status;
}

static const void *expert_source(void *context, int32_t expert) {
    return sida_model_expert(context, expert);
}

static sida_status open_pass(sida_pass *p) {
    const sida_pass_options *o = p->options;
    const sida_model_info *info = p->info;
    sida_status status = SIDA_OK;
    p->item_count = sida_pass_batches(o->queue);
    SIDA_TRY(SIDA_ALLOC(&p->items, p->item_count, "the hash queue"));
    SIDA_TRY(sida_queue_create(&p->ready, (size_t)o->queue));
    SIDA_TRY(sida_queue_create(&p->spare, (size_t)p->item_count));
    for (int32_t i = 0; i < p->item_count; i++)
        SIDA_TRY(sida_queue_push(p->spare, &p->items[i], NULL));
    SIDA_TRY(SIDA_ALLOC(&p->ahead.list, info->experts, "a plan"));
    SIDA_TRY(SIDA_ALLOC(&p->ahead.left, info->experts, "a plan"));
    SIDA_TRY(SIDA_ALLOC(&p->here.list, info->experts, "a plan"));
    SIDA_TRY(SIDA_ALLOC(&p->here.left, info->experts, "a plan"));
    SIDA_TRY(SIDA_ALLOC(&p->global, info->experts, "a wave"));
    SIDA_TRY(sida_hasher_create(&p->digest));
    if (o->resident) goto out;
    SIDA_TRY(sida_store_create(&p->store, sida_model_backend(o->model),
                               &(sida_store_options){
                                   .slots = o->slots,
                                   .experts = info->sites * info->experts,
                                   .expert_bytes = info->expert_bytes,
                                   .source = expert_source,
                                   .source_context = o->model,
                                   .policy = o->policy,
                                   .prefetch = o->prefetch,
                                   .poison = o->poison,
                                   .before_load = o->pause,
                                   .before_load_context = o->pause_context,
                               }));
out:
    return status;
}

static void close_pass(sida_pass *p) {
    for (int32_t i = 0; p->items && i < p->item_count; i++) {
        sida_pass_item *it = &p->items[i];
        if (it->batch) sida_batch_destroy(it->batch);
        if (it->state) sida_hash_state_destroy(p->source, it->state);
        sida_hash_table_free(&it->tables[0]);
        sida_hash_table_free(&it->tables[1]);
        sida_router_sets_free(&it->sets);
    }
    free(p->items);
    sida_store_destroy(p->store);
    sida_queue_destroy(p->ready);
    sida_queue_destroy(p->spare);
    free(p->ahead.list);
    free(p->ahead.left);
    free(p->here.list);
    free(p->here.left);
    free(p->first_offsets);
    free(p->first_ids);
    for (size_t i = 0; i < p->hashers_count; i++) sida_hasher_destroy(p->hashers[i]);
    free(p->hashers);
    sida_hasher_destroy(p->digest);
    for (int side = 0; side < 2; side++) sida_hash_table_free(&p->refined[side]);
    free(p->ids);
    free(p->counts);
    free(p->nll);
    free(p->global);
}

/* Mean shares over the sequences of all items. */
static sida_status fill_shares(const sida_pass *p) {
    sida_pass_stats *stats = p->stats;
    sida_status status = SIDA_OK;
    if (p->options->routing != SIDA_ROUTING_GUIDED) goto out;
    for (int side = 0; side < 2; side++) {
        int32_t layers = p->info->moe_layers[side];
        double *shares;
        SIDA_TRY(SIDA_ALLOC(&stats->layer_share[side], layers, "shares"));
        shares = stats->layer_share[side];
        stats->layers[side] = layers;
        for (int32_t layer = 0; layer < layers && stats->sequences > 0; layer++) {
            for (int32_t i = 0; i < p->item_count; i++)
                if (p->items[i].sets.share_count[side] > 0)
                    shares[layer] += p->items[i].sets.share_sum[side][layer];
            shares[layer] /= (double)stats->sequences;
            stats->allowed_share[side] += shares[layer] / layers;
        }
    }
out:
    return status;
}

/* After both threads have ended. */
static void fill_stats(sida_pass *p, double begin) {
    sida_pass_stats *stats = p->stats;
    stats->seconds = sida_clock_seconds() - begin;
    if (p->store)
        sida_store_get_stats(p->store, &stats->store);
    else
        stats->store.resident = stats->store.peak_resident = p->info->sites * p->info->experts;
    stats->inference_wait_seconds = p->queue_wait_seconds + stats->store.wait_seconds;
    stats->hash_wait_seconds = p->hash_wait_seconds;
    stats->refine_seconds = p->refine_seconds;
    stats->hash_seconds = p->hash_seconds + p->step_hash_seconds;
    if (stats->batches > 0) {
        stats->table_wait_seconds = p->queue_wait_seconds - p->first_wait_seconds;
        stats->after_first_seconds = begin + stats->seconds - p->first_taken;
    }
    if (p->options->digest) stats->digest = sida_hasher_finish(p->digest);
}

sida_status sida_pass_run(sida_pass_stats *out, const sida_pass_options *options) {
    *out = (sida_pass_stats){0};
    const sida_model_info *info = sida_model_get_info(options->model);
    assert(options->source || options->routing == SIDA_ROUTING_EXACT);
    assert(!options->source || (options->top_k >= info->top_k && options->top_k <= info->experts));
    assert(options->queue >= 1 && options->max_new_tokens >= 1);
    sida_pass p = {.options = options, .info = info, .stats = out, .source = options->source};
    /* There is nothing to load ahead. */
    if (options->resident && options->routing == SIDA_ROUTING_EXACT) p.source = NULL;
    /* The hash table replaces the router: what lies behind the model's own k is never used. */
    p.k = options->routing == SIDA_ROUTING_PREDICTED ? info->top_k : options->top_k;
    p.refines = options->refine && options->prefetch && !options->resident && p.source &&
                p.source->info.refines && options->routing == SIDA_ROUTING_EXACT;
    pthread_t thread;
    bool started = false;
    sida_status status = SIDA_OK;
    double begin = sida_clock_seconds();
    SIDA_TRY(open_pass(&p));
    p.threads = sida_pass_hash_threads(&p);
    begin = sida_clock_seconds();
    if (pthread_create(&thread, NULL, sida_pass_build_ahead, &p))
        SIDA_FAIL(SIDA_ERROR_MEMORY, "cannot start the hash-building thread");
    started = true;
    SIDA_TRY(run_batches(&p));
out:
    if (started) {
        if (status != SIDA_OK) sida_pass_stop(&p, status);
        pthread_join(thread, NULL);
        fill_stats(&p, begin);
        if (status == SIDA_OK) status = fill_shares(&p);
    }
    close_pass(&p);
    return status;
}

void sida_pass_stats_free(sida_pass_stats *stats) {
    free(stats->latencies_ms);
    free(stats->layer_share[0]);
    free(stats->layer_share[1]);
    *stats = (sida_pass_stats){0};
}
