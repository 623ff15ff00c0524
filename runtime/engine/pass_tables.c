/* What is coming: hash tables, and the plans that the store gets of them. */
#include "formats/base/clock.h"
#include "formats/base/memory.h"
#include "runtime/engine/pass_private.h"

#include <assert.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

static void collect(sida_pass_collector *c, int32_t site, int32_t experts, int32_t e,
                    int32_t *count) {
    assert(e < experts);
    if (!c->left[e]) return;
    c->left[e] = 0;
    c->list[(*count)++] = site * experts + e;
}

/* All experts; guided: those in a set of a sequence with tokens in the call. */
static void begin_collecting(const sida_pass *p, sida_pass_collector *c, const sida_pass_item *it,
                             int side, int32_t layer, const int64_t *offsets) {
    if (p->options->routing == SIDA_ROUTING_GUIDED)
        sida_router_sets_union(c->left, &it->sets, side, layer, offsets);
    else
        memset(c->left, 1, (size_t)p->info->experts);
}

typedef sida_status say_fn(sida_store *store, int64_t position, const int32_t *experts,
                           int32_t count);

/* Tells the store, by sida_store_announce or _revise, which distinct experts a call will use from
 * layer `first` on, best predictions of its tokens first; in guided routing these and all others
 * that it may choose. offsets: of the call's tokens. */
static sida_status tell(sida_pass *p, sida_pass_collector *c, const sida_pass_item *it,
                        int64_t call, const sida_hash_table *table, int32_t first,
                        const int64_t *offsets, say_fn *say) {
    int32_t experts = p->info->experts;
    sida_status status = SIDA_OK;
    if (!p->store) goto out;
    sida_pass_pause(p);
    for (int32_t layer = first; layer < table->layers; layer++) {
        int32_t site = layer;
        if (table->side == SIDA_DECODER) site += p->info->moe_layers[SIDA_ENCODER];
        int32_t count = 0;
        begin_collecting(p, c, it, table->side, layer, offsets);
        for (int32_t r = 0; r < table->k; r++)
            for (int64_t i = 0; i < table->tokens && count < experts; i++)
                collect(c, site, experts,
                        table->experts[(i * table->layers + layer) * table->k + r], &count);
        for (int32_t e = 0; p->options->routing == SIDA_ROUTING_GUIDED && e < experts; e++)
            collect(c, site, experts, e, &count);
        SIDA_TRY(say(p->store, sida_pass_position(it->number, call, site), c->list, count));
    }
out:
    return status;
}

/* The table of a call's tokens, as the routing uses it: `call` 0 is the encoder. seconds: what the
 * source takes is added to it. */
static sida_status build_table(sida_pass *p, sida_pass_collector *c, sida_pass_item *it,
                               int64_t call, const sida_ragged *tokens, double *seconds) {
    int side = call == 0 ? SIDA_ENCODER : SIDA_DECODER;
    sida_hash_table *table = &it->tables[side];
    double begin = sida_clock_seconds();
    sida_status status = SIDA_OK;
    SIDA_TRY(side == SIDA_ENCODER ? sida_hash_encode(p->source, it->state, tokens, p->k, table)
                                  : sida_hash_decode(p->source, it->state, tokens, p->k, table));
    *seconds += sida_clock_seconds() - begin;
    if (p->options->routing == SIDA_ROUTING_GUIDED)
        sida_router_sets_add(&it->sets, table, tokens->offsets);
    SIDA_TRY(tell(p, c, it, call, table, 0, tokens->offsets, sida_store_announce));
out:
    return status;
}

sida_status sida_pass_build_step(sida_pass *p, const sida_ragged *step) {
    return build_table(p, &p->here, p->current, p->call, step, &p->step_hash_seconds);
}

sida_status sida_pass_refine(sida_pass *p, const sida_moe_call *layer) {
    sida_hash_table *table = &p->refined[layer->side];
    double begin = sida_clock_seconds();
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_hash_refine(p->source, p->current->state, layer->side, layer->layer,
                              layer->experts, layer->k, p->k, table));
    SIDA_TRY(tell(p, &p->here, p->current, p->call, table, layer->layer + 1, layer->offsets,
                  sida_store_revise));
    p->stats->refinements++;
    p->refine_seconds += sida_clock_seconds() - begin;
out:
    return status;
}

/* Tables of the encoder and of the decoder's first step. */
static sida_status build_tables(sida_pass *p, sida_pass_item *it) {
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

static sida_status build_ahead(sida_pass *p) {
    sida_status status = SIDA_OK;
    for (int64_t number = 0;; number++) {
        void *spare;
        SIDA_TRY(sida_queue_pop(p->spare, &spare, &p->hash_wait_seconds));
        sida_pass_item *it = spare;
        assert(it); /* `spare` closes with an error only */
        SIDA_TRY(p->options->next(p->options->next_context, &it->batch));
        if (!it->batch) break;
        it->number = number;
        SIDA_TRY(build_tables(p, it));
        sida_pass_pause(p);
        SIDA_TRY(sida_queue_push(p->ready, it, &p->hash_wait_seconds));
    }
out:
    return status;
}

void sida_pass_stop(sida_pass *p, sida_status reason) {
    sida_queue_close(p->ready, reason);
    sida_queue_close(p->spare, reason);
    if (p->store) sida_store_cancel(p->store, reason);
}

/* Where the model runs on the CPU the cores are the inference thread's. Beside a GPU that thread
 * takes one, to issue work and to wait, and a source on the host may have the others. */
int sida_pass_hash_threads(const sida_pass *p) {
    bool on_cpu = strcmp(sida_model_backend(p->options->model)->table->name, "cpu") == 0;
    int threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads() - 1;
#endif
    if (on_cpu || !p->source || p->source->info.device_bytes > 0 || threads < 1) return 1;
    return threads;
}

void *sida_pass_build_ahead(void *argument) {
    sida_pass *p = argument;
#ifdef _OPENMP
    omp_set_num_threads(p->threads); /* this thread's own setting */
#endif
    sida_status status = build_ahead(p);
    if (status != SIDA_OK)
        sida_pass_stop(p, status);
    else
        sida_queue_close(p->ready, SIDA_OK);
    return NULL;
}
