/* The batches of sida bench: recorded, then timed, resident or through the engine's pass. */
#include "formats/base/clock.h"
#include "formats/base/memory.h"
#include "tools/cli/bench.h"
#include "tools/cli/bench_bound.h"
#include "tools/cli/cli.h"

#include <stdlib.h>
#include <string.h>

static bool counts(const sida_bench *s, int32_t batch) {
    return batch >= s->options->warmup && batch < s->options->warmup + s->options->runs;
}

/* --- one batch */

static sida_status run_batch(sida_bench *s, const sida_bench_batch *batch,
                             const sida_moe_driver *driver, int64_t *offsets, int32_t *ids,
                             sida_buffer *logits) {
    sida_status status = SIDA_OK;
    int32_t sequences = batch->input.sequences;
    sida_ragged step = {sequences, offsets, ids};
    SIDA_TRY(sida_run_encode(s->run, &batch->input, driver));
    SIDA_TRY(sida_run_decode(s->run, &step, driver));
    SIDA_TRY(sida_run_read_logits(s->run, 0, sequences, logits->data));
out:
    return status;
}

/* As the engine's pass does it: one hash a sequence, and one over them. */
static sida_status add_digest(sida_hasher *all, const float *logits, int32_t sequences,
                              int32_t vocabulary) {
    sida_status status = SIDA_OK;
    sida_hasher *hasher = NULL;
    SIDA_TRY(sida_hasher_create(&hasher));
    for (int32_t i = 0; i < sequences; i++) {
        sida_hasher_reset(hasher);
        sida_hasher_update(hasher, logits + (int64_t)i * vocabulary,
                           (size_t)vocabulary * sizeof *logits);
        sida_fingerprint one = sida_hasher_finish(hasher);
        sida_hasher_update(all, &one, sizeof one);
    }
out:
    sida_hasher_destroy(hasher);
    return status;
}

/* All batches, one after the other; those that count are timed when `timed`. */
static sida_status run_batches(sida_bench *s, const sida_moe_driver *driver, bool timed) {
    sida_status status = SIDA_OK;
    int64_t *offsets = NULL;
    int32_t *ids = NULL, sequences = s->options->batch;
    sida_buffer *logits = NULL;
    sida_hasher *digest = NULL;
    size_t bytes = (size_t)sequences * (size_t)s->info->vocabulary * sizeof(float);
    SIDA_TRY(SIDA_ALLOC(&offsets, sequences + 1, "a step"));
    SIDA_TRY(SIDA_ALLOC(&ids, sequences, "a step"));
    SIDA_TRY(sida_buffer_create(s->backend, &logits, SIDA_MEMORY_HOST, bytes, "logits"));
    SIDA_TRY(sida_hasher_create(&digest));
    for (int32_t i = 0; i < sequences; i++) {
        offsets[i + 1] = i + 1;
        ids[i] = s->info->decoder_start;
    }
    for (int32_t b = 0; b < s->record->count; b++) {
        if (sida_cli_interrupted()) SIDA_FAIL(SIDA_ERROR_CANCELLED, "interrupted");
        if (!timed) s->record->current = b;
        double begin = sida_clock_seconds();
        SIDA_TRY(run_batch(s, &s->record->batches[b], driver, offsets, ids, logits));
        double end = sida_clock_seconds();
        if (timed && counts(s, b)) s->samples_ms[b - s->options->warmup] = (end - begin) * 1e3;
        if (timed && s->options->digest)
            SIDA_TRY(add_digest(digest, logits->data, sequences, s->info->vocabulary));
    }
    s->digest = sida_hasher_finish(digest);
out:
    sida_hasher_destroy(digest);
    sida_buffer_destroy(logits);
    free(offsets);
    free(ids);
    return status;
}

/* --- recording under a budget: experts on demand through a store */

typedef struct loader {
    sida_bench *bench;
    sida_store *store;
    int64_t position;
    int32_t *global, *wave; /* [E] */
} loader;

static sida_status loader_observe(void *context, const sida_moe_call *call) {
    return sida_bench_record_observe(((loader *)context)->bench->record, call);
}

static sida_status loader_begin(void *context, const sida_moe_call *call, const int32_t *needed,
                                int32_t count) {
    loader *l = context;
    for (int32_t i = 0; i < count; i++) l->global[i] = call->site * call->experts_total + needed[i];
    return sida_store_begin(l->store, ++l->position, l->global, count);
}

static sida_status loader_take(void *context, int32_t *experts, const void **weights,
                               int32_t *count) {
    loader *l = context;
    sida_status status = sida_store_take(l->store, experts, weights, count);
    for (int32_t i = 0; status == SIDA_OK && i < *count; i++) {
        l->wave[i] = experts[i];
        experts[i] %= l->bench->info->experts;
    }
    return status;
}

static sida_status loader_release(void *context, const int32_t *experts, int32_t count,
                                  sida_stream *stream) {
    loader *l = context;
    (void)experts;
    return sida_store_release(l->store, l->wave, count, stream);
}

static const void *expert_source(void *context, int32_t expert) {
    return sida_model_expert(context, expert);
}

static sida_status record_by_store(sida_bench *s) {
    sida_status status = SIDA_OK;
    loader l = {.bench = s};
    const sida_moe_driver driver = {.context = &l,
                                    .observe = loader_observe,
                                    .begin = loader_begin,
                                    .take = loader_take,
                                    .release = loader_release};
    SIDA_TRY(SIDA_ALLOC(&l.global, s->info->experts, "a wave"));
    SIDA_TRY(SIDA_ALLOC(&l.wave, s->info->experts, "a wave"));
    SIDA_TRY(sida_store_create(&l.store, s->backend,
                               &(sida_store_options){.slots = s->slots,
                                                     .experts = s->info->sites * s->info->experts,
                                                     .expert_bytes = s->info->expert_bytes,
                                                     .source = expert_source,
                                                     .source_context = s->model,
                                                     .policy = sida_policy_find("lru")}));
    SIDA_TRY(run_batches(s, &driver, false));
out:
    sida_store_destroy(l.store);
    free(l.global);
    free(l.wave);
    return status;
}

/* --- the engine's pass */

static sida_status next_batch(void *context, sida_batch **out) {
    sida_status status = SIDA_OK;
    sida_bench *s = context;
    sida_batch *batch = NULL;
    *out = NULL;
    if (s->handed_out == s->record->count) return SIDA_OK;
    const sida_ragged *from = &s->record->batches[s->handed_out].input;
    int64_t tokens = sida_ragged_tokens(from);
    SIDA_TRY(SIDA_ALLOC(&batch, 1, "a batch"));
    SIDA_TRY(SIDA_ALLOC(&batch->offsets[0], from->sequences + 1, "a batch"));
    SIDA_TRY(SIDA_ALLOC(&batch->ids[0], tokens, "a batch"));
    SIDA_TRY(SIDA_ALLOC(&batch->targets, from->sequences, "a batch"));
    memcpy(batch->offsets[0], from->offsets, ((size_t)from->sequences + 1) * sizeof *from->offsets);
    memcpy(batch->ids[0], from->ids, (size_t)tokens * sizeof *from->ids);
    batch->input = (sida_ragged){from->sequences, batch->offsets[0], batch->ids[0]};
    batch->index = s->handed_out++;
    *out = batch;
    batch = NULL;
out:
    sida_batch_destroy(batch);
    return status;
}

/* From one batch's end to the next one's: a batch pays for what was not loaded in time. */
static sida_status on_batch(void *context, const sida_pass_batch *done) {
    sida_bench *s = context;
    double now = sida_clock_seconds();
    int32_t index = s->finished++;
    if (counts(s, index)) s->samples_ms[index - s->options->warmup] = (now - s->last) * 1e3;
    if (counts(s, index)) s->after = done->store;
    if (index + 1 == s->options->warmup) s->before = done->store;
    /* Always a warm-up: asking takes a while. That it fails is no failure of the benchmark. */
    if (index == 0) (void)sida_backend_sample(s->backend);
    s->last = sida_clock_seconds();
    if (sida_cli_interrupted()) return sida_fail(SIDA_ERROR_CANCELLED, "interrupted");
    return SIDA_OK;
}

static sida_status run_pass(sida_bench *s) {
    sida_status status = SIDA_OK;
    sida_hash_source *source = NULL;
    const bool predicted = s->prefetch != SIDA_BENCH_NONE;
    int32_t k = s->recall.places > 0 ? s->recall.places : s->info->top_k;
    s->handed_out = s->finished = 0;
    if (predicted) SIDA_TRY(sida_bench_source_create(&source, s->record, &s->recall, &s->measured));
    SIDA_TRY(sida_pass_run(&s->stats, &(sida_pass_options){.model = s->model,
                                                           .run = s->run,
                                                           .source = source,
                                                           .routing = SIDA_ROUTING_EXACT,
                                                           .top_k = k,
                                                           .slots = s->slots,
                                                           .queue = s->options->queue,
                                                           .prefetch = predicted,
                                                           .digest = s->options->digest,
                                                           .policy = s->policy,
                                                           .max_new_tokens = 1,
                                                           .next = next_batch,
                                                           .next_context = s,
                                                           .on_batch = on_batch,
                                                           .on_batch_context = s}));
    s->digest = s->stats.digest;
out:
    sida_hash_source_destroy(source);
    return status;
}

/* The bytes of Belady's schedule on the true routing of all batches, from empty slots, of its loads
 * for those that count. The store's own are counted between the same two ends. */
static sida_status count_belady(sida_bench *s) {
    sida_status status = SIDA_OK;
    const sida_bench_record *record = s->record;
    int32_t sites = s->info->sites;
    int64_t *loads = NULL;
    SIDA_TRY(SIDA_ALLOC(&loads, (int64_t)record->count * sites, "a schedule"));
    SIDA_TRY(sida_bench_least_loads(loads, record->start, record->needs, record->count * sites,
                                    sites * s->info->experts, s->slots));
    s->belady_bytes = 0;
    for (int32_t i = 0; i < record->count * sites; i++)
        if (counts(s, i / sites)) s->belady_bytes += loads[i] * (int64_t)s->info->expert_bytes;
out:
    free(loads);
    return status;
}

/* --- both ways */

sida_status sida_bench_run_resident(sida_bench *s) {
    sida_status status = SIDA_OK;
    SIDA_TRY(run_batches(
        s, sida_resident_driver(s->resident, s->record, NULL, sida_bench_record_observe), false));
    SIDA_TRY(run_batches(s, sida_resident_driver(s->resident, NULL, NULL, NULL), true));
    (void)sida_backend_sample(s->backend);
out:
    return status;
}

sida_status sida_bench_run_budget(sida_bench *s) {
    sida_status status = SIDA_OK;
    SIDA_TRY(record_by_store(s));
    SIDA_TRY(count_belady(s));
    SIDA_TRY(run_pass(s));
out:
    return status;
}
