/* The public face: opens what an engine needs. */
#include "runtime/sida_private.h"

#include "formats/base/file.h"
#include "formats/base/memory.h"
#include "runtime/predictor/sources.h"

#include <stdlib.h>
#include <string.h>

enum { most_batch = 4096, most_tokens = 65536, most_queue = 1024 };

const char *sida_version(void) {
    return SIDA_VERSION;
}

const char *sida_error_message(void) {
    return sida_last_message();
}

sida_status sida_error_raise(sida_status status, const char *message) {
    return sida_fail(status, "%s", message);
}

const char *sida_error_name(sida_status status) {
    return sida_status_name(status);
}

/* --- opening */

sida_status sida_engine_check_number(const char *name, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return SIDA_OK;
    return sida_fail(SIDA_ERROR_ARGUMENT, "%s %lld: expected %lld to %lld", name, (long long)value,
                     (long long)low, (long long)high);
}

/* What can be said before any file is opened. */
static sida_status check_options(sida_engine *engine, const sida_engine_options *o) {
    sida_status status = SIDA_OK;
    if (o->version != SIDA_ENGINE_OPTIONS_VERSION)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "engine options of version %u: this library knows %d",
                  o->version, SIDA_ENGINE_OPTIONS_VERSION);
    if (!o->model) SIDA_FAIL(SIDA_ERROR_ARGUMENT, "no model directory is given");
    engine->policy = sida_policy_find(o->policy ? o->policy : "lookahead");
    if (!engine->policy)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "policy '%.40s': expected one of %s", o->policy,
                  sida_policy_names());
    if (!sida_routing_from_name(&engine->routing, o->routing ? o->routing : "exact"))
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "routing '%.40s': expected exact, guided or predicted",
                  o->routing);
    if (engine->routing != SIDA_ROUTING_EXACT && !o->predictor)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "routing %s needs a predictor",
                  sida_routing_name(engine->routing));
    if (!(o->active_share >= 0 && o->active_share <= 1))
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "active share %g: expected a share of the experts, 0 to 1",
                  o->active_share);
    if (o->active_share > 0 && engine->routing != SIDA_ROUTING_GUIDED)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "an active share is of guided routing, not of %s",
                  sida_routing_name(engine->routing));
    if (o->random_experts && engine->routing == SIDA_ROUTING_EXACT)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "random experts are a baseline of guided and predicted "
                                       "routing, not of exact");
    SIDA_TRY(sida_budget_parse(&engine->budget, o->budget ? o->budget : "100%"));
    SIDA_TRY(sida_engine_check_number("batch", o->batch, 1, most_batch));
    SIDA_TRY(sida_engine_check_number("queue", o->queue, 1, most_queue));
    SIDA_TRY(sida_engine_check_number("max-tokens", o->max_tokens, 2, most_tokens));
    SIDA_TRY(sida_engine_check_number("max-new-tokens", o->max_new_tokens, 1, most_tokens));
    SIDA_TRY(sida_engine_check_number("threads", o->threads, 0, 1024));
    engine->options = *o;
out:
    return status;
}

/* A predictor must have been made for this model and this tokenizer. */
static sida_status open_predictor(sida_engine *engine) {
    const sida_engine_options *o = &engine->options;
    const sida_model_info *info = sida_model_get_info(engine->model);
    sida_status status = SIDA_OK;
    if (!o->predictor) goto out;
    SIDA_TRY(sida_engine_check_number("top-k", o->top_k, info->top_k, info->experts));
    SIDA_TRY(sida_hash_source_open(&engine->source, o->predictor,
                                   sida_model_embedding_host(engine->model), info->fingerprint));
    const sida_hash_source_info *made = &engine->source->info;
    if (made->experts != info->experts || made->layers[0] != info->moe_layers[0] ||
        made->layers[1] != info->moe_layers[1])
        SIDA_FAIL(SIDA_ERROR_MISMATCH,
                  "%s: predicts %d experts in %d + %d layers, the model has %d in %d + %d",
                  o->predictor, made->experts, made->layers[0], made->layers[1], info->experts,
                  info->moe_layers[0], info->moe_layers[1]);
    sida_fingerprint tokenizer = sida_tokenizer_fingerprint(engine->tokenizer);
    if (!sida_fingerprint_equal(made->tokenizer, tokenizer)) {
        char wanted[SIDA_FINGERPRINT_TEXT], given[SIDA_FINGERPRINT_TEXT];
        sida_fingerprint_format(wanted, made->tokenizer);
        sida_fingerprint_format(given, tokenizer);
        SIDA_FAIL(SIDA_ERROR_MISMATCH, "%s: was made with tokenizer %s, %s/spiece.model is %s",
                  o->predictor, wanted, o->model, given);
    }
    if (o->active_share > 0) {
        /* 29 % of 100 is 29 although 0.29 * 100 is 28.999999999999996. */
        engine->most_allowed = (int32_t)(o->active_share * (double)info->experts + 1e-9);
        if (engine->most_allowed < info->top_k)
            SIDA_FAIL(SIDA_ERROR_ARGUMENT,
                      "an active share of %g%% is %d of %d experts, a token takes %d",
                      o->active_share * 100, engine->most_allowed, info->experts, info->top_k);
    }
    if (o->random_experts) {
        sida_hash_source *predictor = engine->source;
        SIDA_TRY(sida_random_source_create(&engine->source, predictor, o->random_seed));
    }
out:
    return status;
}

/* Puts the predictor where it computes, and counts what it takes. On the CPU it stays as it is, in
 * the host's memory, which is the device's. */
static sida_status place_predictor(sida_engine *engine, const sida_run_limits *limits,
                                   size_t *bytes) {
    sida_hash_source *source = engine->source;
    const sida_hash_limits needed = {
        .states = sida_pass_batches(engine->options.queue),
        .sequences = limits->sequences,
        .input_tokens = limits->input_tokens,
        .step_tokens = limits->step_tokens,
        .decoder_positions = limits->decoder_positions,
        .k = engine->options.top_k,
        .refines = engine->routing == SIDA_ROUTING_EXACT && !engine->options.no_refine &&
                   !engine->options.no_prefetch,
    };
    *bytes = 0;
    if (!source) return SIDA_OK;
    if (strcmp(engine->backend->table->name, "cpu") == 0) {
        *bytes = source->info.bytes;
        return SIDA_OK;
    }
    sida_status status = sida_hash_source_place(source, engine->backend,
                                                sida_model_embedding(engine->model), &needed);
    *bytes = source->info.device_bytes;
    return status;
}

/* What driver and libraries take now, and may take yet. */
static sida_status measure_driver(sida_engine *engine) {
    size_t overhead;
    sida_status status = sida_backend_measure_overhead(engine->backend, &overhead);
    if (status != SIDA_OK) return status;
    size_t reserve = engine->backend->table->driver_used ? SIDA_BUDGET_DRIVER_RESERVE_BYTES : 0;
    if (engine->needs.driver_bytes < overhead + reserve)
        engine->needs.driver_bytes = overhead + reserve;
    return SIDA_OK;
}

/* The slots that the needs leave, and whether that is everybody. Then there is no store, but a
 * table of pointers, and room for that is needed as well. */
static sida_status count_slots(sida_engine *engine, size_t *cap_bytes) {
    sida_engine_facts *facts = &engine->facts;
    sida_budget_needs needs = engine->needs;
    needs.workspace_bytes += (size_t)needs.experts * sizeof(void *);
    sida_status status = sida_budget_slots(&facts->slots, cap_bytes, &engine->budget, &needs);
    facts->resident = status == SIDA_OK && facts->slots >= needs.experts;
    if (facts->resident) {
        engine->needs = needs;
        return SIDA_OK;
    }
    return sida_budget_slots(&facts->slots, cap_bytes, &engine->budget, &engine->needs);
}

/* What is on the device is measured, not estimated: the cap is enforced to the byte. */
static sida_status divide_memory(sida_engine *engine) {
    const sida_engine_options *o = &engine->options;
    const sida_model_info *info = sida_model_get_info(engine->model);
    sida_memory_usage before, after;
    sida_status status = SIDA_OK;
    size_t cap_bytes;
    const sida_run_limits limits = {.sequences = o->batch,
                                    .input_tokens = (int64_t)o->batch * o->max_tokens,
                                    .step_tokens = o->batch,
                                    .decoder_positions = o->max_new_tokens};
    sida_backend_memory(engine->backend, &before);
    engine->needs = (sida_budget_needs){
        .experts = (int64_t)info->sites * info->experts,
        .slot_bytes = sida_store_slot_bytes(info->expert_bytes),
        .dense_bytes = before.used_bytes,
        .workspace_bytes = sida_run_bytes(engine->model, &limits),
    };
    SIDA_TRY(place_predictor(engine, &limits, &engine->needs.predictor_bytes));
    sida_backend_memory(engine->backend, &before);
    /* Twice: before the workspace is taken, and when it has shown what the libraries want. */
    SIDA_TRY(measure_driver(engine));
    SIDA_TRY(count_slots(engine, &cap_bytes));
    SIDA_TRY(sida_run_create(&engine->run, engine->model, &limits));
    sida_backend_memory(engine->backend, &after);
    engine->needs.workspace_bytes = after.used_bytes - before.used_bytes;
    SIDA_TRY(measure_driver(engine));
    SIDA_TRY(count_slots(engine, &cap_bytes));
    SIDA_TRY(sida_backend_set_cap(engine->backend, cap_bytes));
    if (engine->budget.kind == SIDA_BUDGET_BYTES)
        SIDA_TRY(sida_backend_set_overhead(engine->backend, engine->needs.driver_bytes));
    if (engine->facts.resident) SIDA_TRY(sida_resident_create(&engine->resident, engine->model));
    engine->facts.experts = (int32_t)engine->needs.experts;
    engine->facts.slot_bytes = engine->needs.slot_bytes;
    engine->facts.dense_bytes = engine->needs.dense_bytes;
    engine->facts.workspace_bytes = engine->needs.workspace_bytes;
    engine->facts.predictor_bytes = engine->needs.predictor_bytes;
    engine->facts.driver_bytes = engine->needs.driver_bytes;
    engine->facts.cap_bytes = cap_bytes;
    engine->facts.device = engine->backend->table->name;
out:
    return status;
}

sida_status sida_engine_divide_again(sida_engine *engine) {
    sida_status status = SIDA_OK;
    sida_memory_usage usage;
    size_t cap_bytes;
    if (engine->budget.kind != SIDA_BUDGET_BYTES || engine->resident) return SIDA_OK;
    SIDA_TRY(sida_backend_sample(engine->backend));
    sida_backend_memory(engine->backend, &usage);
    if (usage.overhead_bytes <= engine->needs.driver_bytes) goto out;
    engine->needs.driver_bytes = usage.overhead_bytes;
    SIDA_TRY(count_slots(engine, &cap_bytes));
    engine->facts.driver_bytes = usage.overhead_bytes;
out:
    return status;
}

sida_status sida_engine_open(sida_engine **out, const sida_engine_options *options) {
    *out = NULL;
    char *path = NULL;
    sida_engine *engine;
    sida_status status = SIDA_ALLOC(&engine, 1, "an engine");
    if (status != SIDA_OK) return status;
    SIDA_TRY(check_options(engine, options));
    SIDA_TRY(sida_backend_create_named(&engine->backend, options->device));
    SIDA_TRY(sida_path_join(&path, options->model, "spiece.model"));
    SIDA_TRY(sida_tokenizer_open(&engine->tokenizer, path));
    SIDA_TRY(sida_model_open(&engine->model, engine->backend, options->model));
    SIDA_TRY(open_predictor(engine));
    SIDA_TRY(divide_memory(engine));
    /* The caller's strings end here. */
    engine->options.model = engine->options.predictor = engine->options.device = NULL;
    engine->options.budget = engine->options.policy = engine->options.routing = NULL;
    *out = engine;
    engine = NULL;
out:
    free(path);
    sida_engine_close(engine);
    return status;
}

void sida_engine_close(sida_engine *engine) {
    if (!engine) return;
    sida_hash_source_destroy(engine->source);
    sida_run_destroy(engine->run);
    sida_resident_destroy(engine->resident);
    sida_model_destroy(engine->model);
    sida_tokenizer_destroy(engine->tokenizer);
    sida_backend_destroy(engine->backend);
    free(engine);
}

void sida_engine_get_facts(const sida_engine *engine, sida_engine_facts *out) {
    *out = engine->facts;
}
