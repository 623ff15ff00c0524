#include "runtime/engine/pass.h"

#include "formats/base/clock.h"
#include "formats/base/memory.h"
#include "formats/base/queue.h"
#include "runtime/engine/score.h"

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* A batch on its way, with its tables. Recycled: nothing is allocated once all have been used. */
typedef struct item {
    sida_batch *batch;
    int64_t number; /* within the pass */
    sida_hash_state *state;
    sida_hash_table tables[2]; /* the decoder's: of its next step */
    sida_router_sets sets;     /* guided: of all that has been predicted so far */
} item;

/* Distinct experts of a table's layer; each thread that announces has one. */
typedef struct collector {
    int32_t *list; /* [experts] */
    uint8_t *left; /* [experts] that may be collected yet */
} collector;

typedef struct pass {
    const sida_pass_options *options;
    const sida_model_info *info;
    sida_pass_stats *stats;
    sida_store *store;              /* NULL: all experts are resident */
    const sida_hash_source *source; /* NULL: nothing to predict */
    sida_queue *ready, *spare;      /* of item */
    item *items;                    /* [item_count] */
    int32_t item_count;
    int32_t k; /* of the tables */
    /* The hash thread's. */
    int threads; /* for the source's work on the host */
    collector ahead;
    int64_t *first_offsets; /* the decoder's first step: one token a sequence */
    int32_t *first_ids;
    size_t first_offsets_capacity, first_ids_capacity;
    double hash_wait_seconds, hash_seconds;
    /* The inference thread's. */
    collector here;
    item *current;
    int64_t call;          /* 0: the encoder, 1 + t: decoder step t */
    sida_hasher **hashers; /* [hashers_count] one a sequence of the batch */
    size_t hashers_capacity, hashers_count;
    sida_hasher *digest;
    int32_t *ids, *counts, *global;
    size_t ids_capacity, counts_capacity;
    double *nll; /* [sequences] */
    size_t nll_capacity;
    double queue_wait_seconds, first_wait_seconds, first_taken, step_hash_seconds;
} pass;

static void pause_here(const pass *p) {
    if (p->options->pause) p->options->pause(p->options->pause_context);
}

/* Positions grow in the order of use: batch, forward call, site. */
static int64_t position_of(int64_t batch, int64_t call, int32_t site) {
    return batch << 40 | call << 16 | site;
}

/* --- hash tables */

static void collect(collector *c, int32_t site, int32_t experts, int32_t e, int32_t *count) {
    assert(e < experts);
    if (!c->left[e]) return;
    c->left[e] = 0;
    c->list[(*count)++] = site * experts + e;
}

/* All experts; guided: those in a set of a sequence with tokens in the call. */
static void begin_collecting(const pass *p, collector *c, const item *it, int side, int32_t layer,
                             const int64_t *offsets) {
    if (p->options->routing == SIDA_ROUTING_GUIDED)
        sida_router_sets_union(c->left, &it->sets, side, layer, offsets);
    else
        memset(c->left, 1, (size_t)p->info->experts);
}

/* Tells the store which distinct experts a call will use, best predictions of its tokens first; in
 * guided routing these and all others that it may choose. offsets: of the call's tokens. */
static sida_status announce(pass *p, collector *c, const item *it, int64_t call, int side,
                            const int64_t *offsets) {
    const sida_hash_table *table = &it->tables[side];
    int32_t experts = p->info->experts;
    sida_status status = SIDA_OK;
    if (!p->store) goto out;
    pause_here(p);
    for (int32_t layer = 0; layer < table->layers; layer++) {
        int32_t site = layer + (side == SIDA_DECODER ? p->info->moe_layers[SIDA_ENCODER] : 0);
        int32_t count = 0;
        begin_collecting(p, c, it, side, layer, offsets);
        for (int32_t r = 0; r < table->k; r++)
            for (int64_t i = 0; i < table->tokens; i++)
                collect(c, site, experts,
                        table->experts[(i * table->layers + layer) * table->k + r], &count);
        for (int32_t e = 0; p->options->routing == SIDA_ROUTING_GUIDED && e < experts; e++)
            collect(c, site, experts, e, &count);
        SIDA_TRY(
            sida_store_announce(p->store, position_of(it->number, call, site), c->list, count));
    }
out:
    return status;
}

/* The table of a call's tokens, as the routing uses it: `call` 0 is the encoder. seconds: what the
 * source takes is added to it. */
static sida_status build_table(pass *p, collector *c, item *it, int64_t call,
                               const sida_ragged *tokens, double *seconds) {
    int side = call == 0 ? SIDA_ENCODER : SIDA_DECODER;
    sida_hash_table *table = &it->tables[side];
    double begin = sida_clock_seconds();
    sida_status status = SIDA_OK;
    SIDA_TRY(side == SIDA_ENCODER ? sida_hash_encode(p->source, it->state, tokens, p->k, table)
                                  : sida_hash_decode(p->source, it->state, tokens, p->k, table));
    *seconds += sida_clock_seconds() - begin;
    if (p->options->routing == SIDA_ROUTING_GUIDED)
        sida_router_sets_add(&it->sets, table, tokens->offsets);
    SIDA_TRY(announce(p, c, it, call, side, tokens->offsets));
out:
    return status;
}

/* Tables of the encoder and of the decoder's first step. */
static sida_status build_tables(pass *p, item *it) {
    const sida_ragged *input = &it->batch->input;
    int32_t sequences = input->sequences;
    sida_status status = SIDA_OK;
    if (!p->source) goto out;
    if (!it->state) SIDA_TRY(sida_hash_state_create(p->source, &it->state));
    if (p->options->routing == SIDA_ROUTING_GUIDED) {
        it->sets.most = p->options->most_allowed;
        SIDA_TRY(sida_router_sets_begin(&it->sets, p->info, sequences));
    }
    SIDA_TRY(build_table(p, &p->ahead, it, 0, input, &p->hash_seconds));
    SIDA_TRY(SIDA_GROW(&p->first_offsets, &p->first_offsets_capacity, sequences + 1, "a step"));
    SIDA_TRY(SIDA_GROW(&p->first_ids, &p->first_ids_capacity, sequences, "a step"));
    for (int32_t s = 0; s < sequences; s++) {
        p->first_offsets[s + 1] = s + 1;
        p->first_ids[s] = p->info->decoder_start;
    }
    const sida_ragged first = {sequences, p->first_offsets, p->first_ids};
    SIDA_TRY(build_table(p, &p->ahead, it, 1, &first, &p->hash_seconds));
out:
    return status;
}

static sida_status build_ahead(pass *p) {
    sida_status status = SIDA_OK;
    for (int64_t number = 0;; number++) {
        void *spare;
        SIDA_TRY(sida_queue_pop(p->spare, &spare, &p->hash_wait_seconds));
        item *it = spare;
        assert(it); /* `spare` closes with an error only */
        SIDA_TRY(p->options->next(p->options->next_context, &it->batch));
        if (!it->batch) break;
        it->number = number;
        SIDA_TRY(build_tables(p, it));
        pause_here(p);
        SIDA_TRY(sida_queue_push(p->ready, it, &p->hash_wait_seconds));
    }
out:
    return status;
}

/* Ends both sides with one reason. */
static void stop(pass *p, sida_status reason) {
    sida_queue_close(p->ready, reason);
    sida_queue_close(p->spare, reason);
    if (p->store) sida_store_cancel(p->store, reason);
}

/* Where the model runs on the CPU the cores are the inference thread's. Beside a GPU that thread
 * takes one, to issue work and to wait, and a source on the host may have the others. */
static int hash_threads(const pass *p) {
    bool on_cpu = strcmp(sida_model_backend(p->options->model)->table->name, "cpu") == 0;
    int threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads() - 1;
#endif
    if (on_cpu || !p->source || p->source->info.device_bytes > 0 || threads < 1) return 1;
    return threads;
}

static void *hash_thread(void *argument) {
    pass *p = argument;
#ifdef _OPENMP
    omp_set_num_threads(p->threads); /* this thread's own setting */
#endif
    sida_status status = build_ahead(p);
    if (status != SIDA_OK)
        stop(p, status);
    else
        sida_queue_close(p->ready, SIDA_OK);
    return NULL;
}

/* --- the driver: model and store meet here */

static const uint8_t *driver_allow(void *context, int32_t side) {
    return ((const pass *)context)->current->sets.allowed[side];
}

static sida_status driver_choose(void *context, sida_moe_call *call) {
    const pass *p = context;
    sida_routing_predicted(&p->current->tables[call->side], call, p->info->renormalise);
    return SIDA_OK;
}

static sida_status driver_begin(void *context, const sida_moe_call *call, const int32_t *needed,
                                int32_t count) {
    pass *p = context;
    pause_here(p);
    for (int32_t i = 0; i < count; i++) p->global[i] = call->site * p->info->experts + needed[i];
    return sida_store_begin(p->store, position_of(p->current->number, p->call, call->site),
                            p->global, count);
}

static sida_status driver_take(void *context, int32_t *experts, const void **weights,
                               int32_t *count) {
    pass *p = context;
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
    pass *p = context;
    (void)experts;
    sida_status status = sida_store_release(p->store, p->global, count, stream);
    pause_here(p);
    return status;
}

/* The decoder's step t: its table was built ahead for t = 0, and can be built now for the rest. */
static sida_status before_step(void *context, int32_t t, const sida_ragged *step) {
    pass *p = context;
    p->call = 1 + t;
    if (!p->source || t == 0) return SIDA_OK;
    return build_table(p, &p->here, p->current, p->call, step, &p->step_hash_seconds);
}

static sida_status on_logits(void *context, int32_t t, int32_t sequence, const float *logits) {
    pass *p = context;
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

static sida_status prepare_hashers(pass *p, int32_t sequences) {
    sida_status status = SIDA_OK;
    SIDA_TRY(SIDA_GROW(&p->hashers, &p->hashers_capacity, sequences, "hashers"));
    for (; p->hashers_count < (size_t)sequences; p->hashers_count++)
        SIDA_TRY(sida_hasher_create(&p->hashers[p->hashers_count]));
    for (int32_t s = 0; s < sequences; s++) sida_hasher_reset(p->hashers[s]);
out:
    return status;
}

static sida_status count_batch(pass *p, double latency_ms) {
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

static sida_status run_batch(pass *p, const sida_moe_driver *driver) {
    const sida_pass_options *o = p->options;
    item *it = p->current;
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

static sida_status run_batches(pass *p) {
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
        pause_here(p);
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

static sida_status open_pass(pass *p) {
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

static void close_pass(pass *p) {
    for (int32_t i = 0; p->items && i < p->item_count; i++) {
        item *it = &p->items[i];
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
    free(p->ids);
    free(p->counts);
    free(p->nll);
    free(p->global);
}

/* Mean shares over the sequences of all items. */
static sida_status fill_shares(const pass *p) {
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
static void fill_stats(pass *p, double begin) {
    sida_pass_stats *stats = p->stats;
    stats->seconds = sida_clock_seconds() - begin;
    if (p->store)
        sida_store_get_stats(p->store, &stats->store);
    else
        stats->store.resident = stats->store.peak_resident = p->info->sites * p->info->experts;
    stats->inference_wait_seconds = p->queue_wait_seconds + stats->store.wait_seconds;
    stats->hash_wait_seconds = p->hash_wait_seconds;
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
    pass p = {.options = options, .info = info, .stats = out, .source = options->source};
    /* There is nothing to load ahead. */
    if (options->resident && options->routing == SIDA_ROUTING_EXACT) p.source = NULL;
    /* The hash table replaces the router: what lies behind the model's own k is never used. */
    p.k = options->routing == SIDA_ROUTING_PREDICTED ? info->top_k : options->top_k;
    pthread_t thread;
    bool started = false;
    sida_status status = SIDA_OK;
    double begin = sida_clock_seconds();
    SIDA_TRY(open_pass(&p));
    p.threads = hash_threads(&p);
    begin = sida_clock_seconds();
    if (pthread_create(&thread, NULL, hash_thread, &p))
        SIDA_FAIL(SIDA_ERROR_MEMORY, "cannot start the hash-building thread");
    started = true;
    SIDA_TRY(run_batches(&p));
out:
    if (started) {
        if (status != SIDA_OK) stop(&p, status);
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
