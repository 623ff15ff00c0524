#include "tests/integration/identity_rig.h"

#include "formats/base/memory.h"
#include "formats/base/rng.h"
#include "tests/test.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

void rig_assert_ok(sida_status status) {
    if (status != SIDA_OK) fail_msg("%s: %s", sida_status_name(status), sida_last_message());
}

/* --- a checkpoint */

enum { vocabulary = 80, d_model = 16, d_kv = 8, heads = 2, d_ff = 24, layers = 4, experts = 10 };

typedef struct writer {
    char *header, *data;
    size_t header_used, used;
    FILE *header_file, *data_file;
    sida_rng rng;
} writer;

static void add_tensor(writer *w, const char *name, int rows, int cols, float scale, float mean) {
    size_t bytes = (size_t)rows * (size_t)(cols ? cols : 1) * sizeof(float);
    fprintf(w->header_file, "%s\"%s\":{\"dtype\":\"F32\",\"shape\":[%d", w->used ? "," : "{", name,
            rows);
    if (cols) fprintf(w->header_file, ",%d", cols);
    fprintf(w->header_file, "],\"data_offsets\":[%zu,%zu]}", w->used, w->used + bytes);
    w->used += bytes;
    for (size_t i = 0; i < bytes / sizeof(float); i++) {
        float value = mean + scale * sida_rng_normal(&w->rng);
        fwrite(&value, sizeof value, 1, w->data_file);
    }
}

static void add_block(writer *w, const char *stack, int block) {
    char name[160];
    bool decoder = stack[0] == 'd';
    static const char *const parts[] = {"q", "k", "v", "o"};
    for (int kind = 0; kind < (decoder ? 2 : 1); kind++) {
        for (int p = 0; p < 4; p++) {
            snprintf(name, sizeof name, "%s.block.%d.layer.%d.%s.%s.weight", stack, block, kind,
                     kind ? "EncDecAttention" : "SelfAttention", parts[p]);
            add_tensor(w, name, p == 3 ? d_model : heads * d_kv, p == 3 ? heads * d_kv : d_model,
                       0.2f, 0);
        }
        snprintf(name, sizeof name, "%s.block.%d.layer.%d.layer_norm.weight", stack, block, kind);
        add_tensor(w, name, d_model, 0, 0.1f, 1);
    }
    if (block == 0) {
        snprintf(name, sizeof name,
                 "%s.block.0.layer.0.SelfAttention.relative_attention_bias.weight", stack);
        add_tensor(w, name, 32, heads, 0.3f, 0);
    }
    int ff = decoder ? 2 : 1;
    snprintf(name, sizeof name, "%s.block.%d.layer.%d.layer_norm.weight", stack, block, ff);
    add_tensor(w, name, d_model, 0, 0.1f, 1);
    bool sparse = block % 2 == 1;
    if (sparse) {
        snprintf(name, sizeof name, "%s.block.%d.layer.%d.mlp.router.classifier.weight", stack,
                 block, ff);
        add_tensor(w, name, experts, d_model, 0.5f, 0);
    }
    for (int e = 0; e < (sparse ? experts : 1); e++)
        for (int out = 0; out < 2; out++) {
            const char *part = out ? "wo" : "wi";
            if (sparse)
                snprintf(name, sizeof name, "%s.block.%d.layer.%d.mlp.experts.expert_%d.%s.weight",
                         stack, block, ff, e, part);
            else
                snprintf(name, sizeof name, "%s.block.%d.layer.%d.mlp.%s.weight", stack, block, ff,
                         part);
            add_tensor(w, name, out ? d_model : d_ff, out ? d_ff : d_model, 0.4f, 0);
        }
}

static void write_model(const char *folder) {
    char path[128];
    writer w = {.rng = sida_rng_seed(77)};
    w.header_file = open_memstream(&w.header, &w.header_used);
    size_t data_used;
    w.data_file = open_memstream(&w.data, &data_used);
    add_tensor(&w, "shared.weight", vocabulary, d_model, 1, 0);
    for (int side = 0; side < 2; side++) {
        const char *stack = side ? "decoder" : "encoder";
        for (int block = 0; block < layers; block++) add_block(&w, stack, block);
        snprintf(path, sizeof path, "%s.final_layer_norm.weight", stack);
        add_tensor(&w, path, d_model, 0, 0.1f, 1);
    }
    fputc('}', w.header_file);
    fclose(w.header_file);
    fclose(w.data_file);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    FILE *file = fopen(path, "wb");
    uint64_t length = w.header_used;
    assert_non_null(file);
    fwrite(&length, sizeof length, 1, file);
    fwrite(w.header, 1, w.header_used, file);
    fwrite(w.data, 1, data_used, file);
    assert_int_equal(fclose(file), 0);
    free(w.header);
    free(w.data);
    snprintf(path, sizeof path, "%s/config.json", folder);
    file = fopen(path, "w");
    assert_non_null(file);
    /* A small capacity: tokens are dropped in nearly every batch. */
    fprintf(file,
            "{\"model_type\":\"switch_transformers\",\"vocab_size\":%d,\"d_model\":%d,"
            "\"d_kv\":%d,\"num_heads\":%d,\"d_ff\":%d,\"num_layers\":%d,"
            "\"num_decoder_layers\":%d,\"num_sparse_encoder_layers\":2,"
            "\"num_sparse_decoder_layers\":2,\"encoder_sparse_step\":2,"
            "\"decoder_sparse_step\":2,\"num_experts\":%d,\"expert_capacity\":3,"
            "\"feed_forward_proj\":\"relu\",\"tie_word_embeddings\":true,\"pad_token_id\":0,"
            "\"eos_token_id\":1,\"decoder_start_token_id\":0}",
            vocabulary, d_model, d_kv, heads, d_ff, layers, layers, experts);
    assert_int_equal(fclose(file), 0);
}

/* --- a hash source: a row is a function of its sequence's tokens so far, and of nothing that the
 * model does */

typedef struct dice_state {
    uint64_t *seen; /* [sequences] hash of the tokens so far */
    size_t capacity;
} dice_state;

static uint64_t mix(uint64_t seen, int32_t id) {
    sida_rng rng = sida_rng_seed(seen ^ (uint64_t)(uint32_t)id * UINT64_C(0x9e3779b97f4a7c15));
    return sida_rng_u64(&rng);
}

static void dice_row(uint16_t *out, float *alpha, uint64_t seen, int32_t layer, int32_t total,
                     int32_t k) {
    sida_rng rng = sida_rng_seed(seen + (uint64_t)layer * 1000003);
    for (int32_t r = 0; r < k; r++) {
        bool again;
        do {
            again = false;
            /* Skewed, so that some experts are worth keeping. */
            uint32_t a = sida_rng_below(&rng, (uint32_t)total);
            uint32_t b = sida_rng_below(&rng, (uint32_t)total);
            out[r] = (uint16_t)(a < b ? a : b);
            for (int32_t i = 0; i < r; i++) again |= out[i] == out[r];
        } while (again);
    }
    /* More ranks leave the first ones as they are. */
    sida_rng other = sida_rng_seed(seen - (uint64_t)layer * 1000003);
    for (int32_t r = 0; r < k; r++) alpha[r] = (0.1f + sida_rng_f32(&other)) / (float)(2 + r);
}

static void dice_destroy(sida_hash_source *source) {
    (void)source;
}

static sida_status dice_state_create(const sida_hash_source *source, sida_hash_state **out) {
    (void)source;
    dice_state *state;
    sida_status status = SIDA_ALLOC(&state, 1, "a state");
    *out = (sida_hash_state *)state;
    return status;
}

static void dice_state_destroy(sida_hash_state *state) {
    free(((dice_state *)state)->seen);
    free(state);
}

static sida_status dice_rows(const sida_hash_source *source, dice_state *state,
                             const sida_ragged *batch, int32_t side, int32_t k,
                             sida_hash_table *out) {
    int32_t count = source->info.layers[side];
    sida_status status = sida_hash_table_reserve(out, side, count, k, sida_ragged_tokens(batch));
    if (status != SIDA_OK) return status;
    for (int32_t s = 0; s < batch->sequences; s++)
        for (int64_t i = batch->offsets[s]; i < batch->offsets[s + 1]; i++) {
            state->seen[s] = mix(state->seen[s], batch->ids[i]);
            for (int32_t layer = 0; layer < count; layer++) {
                int64_t row = (i * count + layer) * k;
                dice_row(out->experts + row, out->alpha + row, state->seen[s], layer,
                         source->info.experts, k);
            }
        }
    return SIDA_OK;
}

static sida_status dice_encode(const sida_hash_source *source, sida_hash_state *base,
                               const sida_ragged *input, int32_t k, sida_hash_table *out) {
    rig *r = (rig *)((char *)(uintptr_t)source - offsetof(rig, source));
    dice_state *state = (dice_state *)base;
    sida_status status = SIDA_OK;
    if (r->tables++ == r->fail_tables_at) SIDA_FAIL(SIDA_ERROR_FORMAT, "the dice fell off");
    nanosleep(&(struct timespec){.tv_nsec = r->table_delay_ms * 1000000L}, NULL);
    SIDA_TRY(SIDA_GROW(&state->seen, &state->capacity, input->sequences, "a state"));
    for (int32_t s = 0; s < input->sequences; s++) state->seen[s] = 1;
    SIDA_TRY(dice_rows(source, state, input, SIDA_ENCODER, k, out));
out:
    return status;
}

static sida_status dice_decode(const sida_hash_source *source, sida_hash_state *state,
                               const sida_ragged *step, int32_t k, sida_hash_table *out) {
    return dice_rows(source, (dice_state *)state, step, SIDA_DECODER, k, out);
}

static const sida_hash_source_table dice_table = {
    .destroy = dice_destroy,
    .state_create = dice_state_create,
    .state_destroy = dice_state_destroy,
    .encode = dice_encode,
    .decode = dice_decode,
};

/* --- delays */

static void pause_randomly(void *context) {
    rig *r = context;
    unsigned seed = r->delay_seed;
    if (!seed) return;
    sida_rng rng = sida_rng_seed(seed);
    r->delay_seed = (unsigned)sida_rng_u64(&rng) | 1;
    uint32_t choice = sida_rng_below(&rng, 24);
    if (choice == 0) usleep(sida_rng_below(&rng, 150));
    if (choice < 4) sched_yield();
}

static void pause_copy(void *context, size_t bytes) {
    (void)bytes;
    pause_randomly(context);
}

/* --- the rig */

static void make_corpus(rig *r, int32_t sequences) {
    sida_rng rng = sida_rng_seed(9);
    r->sequences = sequences;
    rig_assert_ok(SIDA_ALLOC(&r->offsets, sequences + 1, "offsets"));
    rig_assert_ok(SIDA_ALLOC(&r->ids, sequences * 24, "ids"));
    for (int32_t s = 0; s < sequences; s++) {
        int64_t at = r->offsets[s], length = 1 + (int64_t)sida_rng_below(&rng, 20);
        for (int64_t i = 0; i < length; i++)
            r->ids[at++] = 3 + (int32_t)sida_rng_below(&rng, (uint32_t)r->info->vocabulary - 3);
        r->ids[at++] = r->info->eos;
        r->offsets[s + 1] = at;
    }
}

void rig_repeat(rig *r) {
    int32_t n = r->sequences;
    int64_t tokens = r->offsets[n], *offsets;
    int32_t *ids;
    rig_assert_ok(SIDA_ALLOC(&offsets, 2 * n + 1, "offsets"));
    rig_assert_ok(SIDA_ALLOC(&ids, 2 * tokens, "ids"));
    for (int32_t s = 0; s <= 2 * n; s++)
        offsets[s] = s <= n ? r->offsets[s] : tokens + r->offsets[s - n];
    for (int64_t i = 0; i < 2 * tokens; i++) ids[i] = r->ids[i % tokens];
    free(r->offsets);
    free(r->ids);
    r->offsets = offsets;
    r->ids = ids;
    r->sequences = 2 * n;
}

void rig_open(rig *r, const char *folder, int32_t sequences, int64_t fail_copy) {
    sida_backend *backend;
    sida_cpu_options cpu = {.poison = true,
                            .before_copy = pause_copy,
                            .before_copy_context = r,
                            .fail_copy = fail_copy};
    rig_assert_ok(sida_backend_create_cpu(&backend, &cpu));
    rig_open_on(r, backend, folder, sequences);
}

void rig_open_on(rig *r, sida_backend *backend, const char *folder, int32_t sequences) {
    char own[sizeof r->folder] = "";
    sida_model *model;
    *r = (rig){0}; /* a back-end that delays copies looks at it */
    if (!folder) {
        snprintf(own, sizeof own, "/tmp/sida_identity_XXXXXX");
        assert_non_null(mkdtemp(own));
        write_model(own);
        folder = own;
    }
    rig_assert_ok(sida_model_open(&model, backend, folder));
    rig_open_model(r, backend, model, sequences);
    memcpy(r->folder, own, sizeof own);
}

void rig_open_model(rig *r, sida_backend *backend, sida_model *model, int32_t sequences) {
    *r = (rig){.backend = backend, .model = model, .fail_at = -1, .fail_tables_at = -1};
    r->info = sida_model_get_info(model);
    make_corpus(r, sequences);
    const sida_run_limits limits = {.sequences = rig_max_batch,
                                    .input_tokens = rig_max_batch * 24,
                                    .step_tokens = rig_max_batch,
                                    .decoder_positions = rig_max_new_tokens};
    rig_assert_ok(sida_run_create(&r->run, r->model, &limits));
    sida_memory_usage usage;
    sida_backend_memory(r->backend, &usage);
    r->fixed_bytes = usage.used_bytes;
    r->source = (sida_hash_source){
        &dice_table,
        {.name = "dice",
         .d_model = r->info->d_model,
         .experts = r->info->experts,
         .layers = {r->info->moe_layers[0], r->info->moe_layers[1]}},
    };
}

void rig_close(rig *r) {
    sida_run_destroy(r->run);
    sida_model_destroy(r->model);
    sida_backend_destroy(r->backend);
    free(r->offsets);
    free(r->ids);
    if (r->folder[0]) {
        char path[128];
        snprintf(path, sizeof path, "%s/model.safetensors", r->folder);
        unlink(path);
        snprintf(path, sizeof path, "%s/config.json", r->folder);
        unlink(path);
        rmdir(r->folder);
    }
}

/* Sequences first … first + count - 1 with offsets of their own. */
static void cut_batch(const rig *r, int32_t first, int32_t count, int64_t *offsets, int32_t *ids) {
    int64_t begin = r->offsets[first];
    for (int32_t s = 0; s <= count; s++) offsets[s] = r->offsets[first + s] - begin;
    memcpy(ids, r->ids + begin, (size_t)offsets[count] * sizeof *ids);
}

static int32_t batch_size(const rig *r, int32_t first, int32_t batch) {
    return first + batch <= r->sequences ? batch : r->sequences - first;
}

static sida_status next_batch(void *context, sida_batch **out) {
    rig *r = context;
    sida_batch *batch = NULL;
    sida_status status = SIDA_OK;
    *out = NULL;
    int32_t first = r->fed * r->batch;
    if (r->fed == r->fail_at) SIDA_FAIL(SIDA_ERROR_IO, "the test's corpus broke");
    if (first >= r->sequences) return SIDA_OK;
    int32_t count = batch_size(r, first, r->batch);
    SIDA_TRY(SIDA_ALLOC(&batch, 1, "a batch"));
    for (int side = 0; side < 2; side++) {
        SIDA_TRY(SIDA_ALLOC(&batch->offsets[side], count + 1, "a batch"));
        SIDA_TRY(SIDA_ALLOC(&batch->ids[side], count * 24, "a batch"));
    }
    SIDA_TRY(SIDA_ALLOC(&batch->lines, count, "a batch"));
    SIDA_TRY(SIDA_ALLOC(&batch->labels, count, "a batch"));
    SIDA_TRY(SIDA_ALLOC(&batch->targets, count, "a batch"));
    cut_batch(r, first, count, batch->offsets[0], batch->ids[0]);
    batch->index = r->fed++;
    batch->input = (sida_ragged){count, batch->offsets[0], batch->ids[0]};
    batch->target = (sida_ragged){count, batch->offsets[1], batch->ids[1]};
    *out = batch;
out:
    return status;
}

sida_status rig_pass(rig *r, sida_pass_stats *stats, sida_pass_options options, int32_t batch,
                     unsigned seed) {
    size_t slot_bytes = sida_store_slot_bytes(r->info->expert_bytes);
    sida_memory_usage before, usage;
    sida_backend_memory(r->backend, &before);
    if (!options.resident)
        rig_assert_ok(
            sida_backend_set_cap(r->backend, r->fixed_bytes + (size_t)options.slots * slot_bytes));
    r->batch = batch;
    r->fed = 0;
    r->tables = 0;
    r->delay_seed = seed;
    options.model = r->model;
    options.run = r->run;
    options.digest = true;
    options.max_new_tokens = rig_max_new_tokens;
    options.next = next_batch;
    options.next_context = r;
    options.poison = true;
    if (!options.pause) {
        options.pause = pause_randomly;
        options.pause_context = r;
    }
    sida_status status = sida_pass_run(stats, &options);
    r->delay_seed = 0;
    sida_backend_memory(r->backend, &usage);
    assert_int_equal(usage.used_bytes, before.used_bytes);
    assert_true(usage.peak_bytes <= usage.cap_bytes || status != SIDA_OK);
    rig_assert_ok(sida_backend_set_cap(r->backend, SIZE_MAX));
    return status;
}

/* --- the reference */

typedef struct watcher {
    rig *r;
    reference *out;
    sida_routing routing;
    sida_hash_table table[2]; /* encoder; decoder, the running step */
    uint8_t *allowed;         /* [layers of the decoder, sequences, experts] so far */
    int32_t most;             /* sequences that allowed has room for */
} watcher;

static sida_status watch(void *context, const sida_moe_call *call) {
    watcher *w = context;
    uint8_t seen[512] = {0};
    assert_true(call->experts_total <= 512);
    for (int64_t i = 0; i < call->tokens; i++)
        for (int32_t k = 0; k < call->k && !call->dropped[i]; k++) {
            int32_t e = call->experts[i * call->k + k];
            w->out->needs += !seen[e];
            seen[e] = 1;
            uint8_t *used = &w->out->used[call->site * call->experts_total + e];
            w->out->distinct += !*used;
            *used = 1;
        }
    return SIDA_OK;
}

/* Each token's α for the expert chosen for it: the last bits come from the exponential of the
 * device's router, so that is asked, with a set of one a token. */
static void fill_alpha(const rig *r, const sida_moe_call *call) {
    size_t tokens = (size_t)call->tokens, total = (size_t)call->experts_total;
    size_t logits = tokens * total * sizeof(float), words = tokens * sizeof(int32_t);
    sida_buffer *device;
    sida_stream *stream;
    uint8_t *sets = calloc(tokens, total);
    int32_t *set_of = malloc(words + 1);
    for (size_t i = 0; i < tokens; i++) {
        sets[i * total + (size_t)call->experts[i]] = 1;
        set_of[i] = (int32_t)i;
    }
    rig_assert_ok(sida_buffer_create(r->backend, &device, SIDA_MEMORY_DEVICE,
                                     logits + 3 * words + tokens * total, "a router"));
    rig_assert_ok(sida_stream_create(r->backend, &stream, SIDA_STREAM_COMPUTE));
    char *at = device->data;
    const sida_router_call router = {.experts = (int32_t *)(void *)(at + logits),
                                     .alpha = (float *)(void *)(at + logits + words),
                                     .logits = (const float *)(const void *)at,
                                     .n = call->tokens,
                                     .experts_total = call->experts_total,
                                     .k = 1,
                                     .allowed = (uint8_t *)at + logits + 3 * words,
                                     .set_of = (int32_t *)(void *)(at + logits + 2 * words)};
    rig_assert_ok(sida_copy(stream, at, call->logits, logits));
    rig_assert_ok(sida_copy(stream, at + logits + 2 * words, set_of, words));
    rig_assert_ok(sida_copy(stream, at + logits + 3 * words, sets, tokens * total));
    rig_assert_ok(sida_ops_of(r->backend)->router(stream, &router));
    rig_assert_ok(sida_copy(stream, call->alpha, router.alpha, words));
    rig_assert_ok(sida_stream_synchronize(stream));
    sida_stream_destroy(stream);
    sida_buffer_destroy(device);
    free(sets);
    free(set_of);
}

/* The best allowed expert and its share of the softmax over all. */
static sida_status choose(void *context, sida_moe_call *call) {
    watcher *w = context;
    const sida_hash_table *table = &w->table[call->side];
    int32_t total = call->experts_total;
    assert_int_equal(call->k, 1);
    uint8_t set[512];
    for (int32_t s = 0; s < call->sequences; s++) {
        uint8_t *allowed =
            w->allowed + ((size_t)call->layer * (size_t)w->most + (size_t)s) * (size_t)total;
        if (call->side == SIDA_ENCODER) allowed = memset(set, 0, (size_t)total);
        for (int64_t i = call->offsets[s]; i < call->offsets[s + 1]; i++)
            for (int32_t k = 0; k < table->k; k++)
                allowed[table->experts[(i * table->layers + call->layer) * table->k + k]] = 1;
        for (int64_t i = call->offsets[s]; i < call->offsets[s + 1]; i++) {
            int64_t row = (i * table->layers + call->layer) * table->k;
            if (w->routing == SIDA_ROUTING_PREDICTED) {
                call->experts[i] = table->experts[row];
                call->alpha[i] = table->alpha[row];
                continue;
            }
            const float *logits = call->logits + i * total;
            int32_t best = -1;
            for (int32_t e = 0; e < total; e++)
                if (allowed[e] && (best < 0 || logits[e] > logits[best])) best = e;
            call->experts[i] = best;
        }
    }
    if (w->routing == SIDA_ROUTING_GUIDED) fill_alpha(w->r, call);
    return SIDA_OK;
}

static void reference_batch(watcher *w, const sida_moe_driver *driver, const sida_ragged *input,
                            int32_t top_k, sida_hasher *total) {
    rig *r = w->r;
    int32_t n = input->sequences, words = r->info->vocabulary;
    size_t row = (size_t)words * sizeof(float);
    float *logits = malloc((size_t)n * rig_max_new_tokens * row), *step_logits = malloc(n * row);
    int32_t last[rig_max_batch], counts[rig_max_batch] = {0};
    sida_hash_state *state;
    rig_assert_ok(dice_state_create(&r->source, &state));
    rig_assert_ok(dice_encode(&r->source, state, input, top_k, &w->table[0]));
    memset(w->allowed, 0,
           (size_t)r->info->moe_layers[1] * (size_t)w->most * (size_t)r->info->experts);
    rig_assert_ok(sida_run_encode(r->run, input, driver));
    for (int32_t s = 0; s < n; s++) last[s] = r->info->decoder_start;
    for (int32_t t = 0; t < rig_max_new_tokens; t++) {
        int64_t offsets[rig_max_batch + 1] = {0};
        int32_t ids[rig_max_batch];
        for (int32_t s = 0; s < n; s++) {
            bool live = last[s] != r->info->eos;
            if (live) ids[offsets[s]] = last[s];
            offsets[s + 1] = offsets[s] + live;
        }
        if (offsets[n] == 0) break;
        const sida_ragged step = {n, offsets, ids};
        rig_assert_ok(dice_decode(&r->source, state, &step, top_k, &w->table[1]));
        rig_assert_ok(sida_run_decode(r->run, &step, driver));
        rig_assert_ok(sida_run_read_logits(r->run, 0, offsets[n], step_logits));
        for (int32_t s = 0; s < n; s++) {
            if (offsets[s] == offsets[s + 1]) continue;
            const float *mine = step_logits + offsets[s] * words;
            int32_t best = 0;
            for (int32_t i = 0; i < words; i++) {
                if (mine[i] > mine[best]) best = i;
                if (!isfinite(mine[i])) w->out->finite = false;
            }
            memcpy(logits + ((size_t)s * rig_max_new_tokens + (size_t)counts[s]++) * words, mine,
                   row);
            last[s] = best;
            w->out->logits++;
        }
    }
    for (int32_t s = 0; s < n; s++) {
        sida_fingerprint one = sida_fingerprint_of(logits + (size_t)s * rig_max_new_tokens * words,
                                                   (size_t)counts[s] * row);
        sida_hasher_update(total, &one, sizeof one);
    }
    dice_state_destroy(state);
    free(step_logits);
    free(logits);
}

void rig_reference(rig *r, reference *out, sida_routing routing, int32_t top_k, int32_t batch) {
    *out = (reference){.finite = true};
    sida_resident *resident;
    sida_hasher *total;
    watcher w = {.r = r, .out = out, .routing = routing, .most = rig_max_batch};
    rig_assert_ok(SIDA_ALLOC(&out->used, r->info->sites * r->info->experts, "used"));
    rig_assert_ok(
        SIDA_ALLOC(&w.allowed, r->info->moe_layers[1] * w.most * r->info->experts, "allowed"));
    rig_assert_ok(sida_resident_create(&resident, r->model));
    rig_assert_ok(sida_hasher_create(&total));
    const sida_moe_driver *driver =
        sida_resident_driver(resident, &w, routing == SIDA_ROUTING_EXACT ? NULL : choose, watch);
    r->fail_tables_at = -1;
    for (int32_t first = 0; first < r->sequences; first += batch) {
        int32_t count = batch_size(r, first, batch);
        int64_t offsets[rig_max_batch + 1];
        int32_t ids[rig_max_batch * 24];
        cut_batch(r, first, count, offsets, ids);
        reference_batch(&w, driver, &(sida_ragged){count, offsets, ids}, top_k, total);
    }
    out->digest = sida_hasher_finish(total);
    sida_hasher_destroy(total);
    sida_resident_destroy(resident);
    sida_hash_table_free(&w.table[0]);
    sida_hash_table_free(&w.table[1]);
    free(w.allowed);
}

void reference_free(reference *ref) {
    free(ref->used);
}
