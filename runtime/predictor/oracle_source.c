/* The routing that a trace recorded, found again by the sequence's ids, as a hash source. */
#include "formats/base/log.h"
#include "formats/base/memory.h"
#include "formats/trace.h"
#include "runtime/predictor/select.h"
#include "runtime/predictor/sources.h"

#include <inttypes.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

typedef struct oracle_side {
    const int64_t *offsets; /* [sequences + 1], the trace's */
    sida_trace_rows rows;
    float *popular; /* [layers, E] how often each was chosen; for what the trace does not have */
} oracle_side;

/* A sequence by the hash of its encoder ids. */
typedef struct oracle_entry {
    uint64_t hash;
    int32_t sequence;
} oracle_entry;

typedef struct oracle_source {
    sida_hash_source base;
    sida_trace *trace; /* open for its offsets and its path */
    const sida_trace_info *info;
    oracle_side sides[2];
    oracle_entry *entries; /* [sequences] by hash, then by number */
    atomic_bool warned;
} oracle_source;

enum { LOST = -1 };

/* Where each sequence of the batch is in the trace. */
typedef struct oracle_state {
    int64_t *entry;  /* [sequences] LOST: the model left the trace */
    int64_t *tokens; /* [sequences] decoder tokens so far */
    int32_t sequences;
    size_t entry_items, token_items;
    float *alpha;   /* [E] */
    uint8_t *taken; /* [E] */
    uint64_t *keys; /* [E] */
} oracle_state;

static void oracle_destroy(sida_hash_source *source) {
    oracle_source *self = (oracle_source *)source;
    for (int side = 0; side < 2; side++) {
        sida_trace_rows_free(&self->sides[side].rows);
        free(self->sides[side].popular);
    }
    free(self->entries);
    sida_trace_close(self->trace);
    free(self);
}

static void oracle_state_destroy(sida_hash_state *state) {
    oracle_state *self = (oracle_state *)state;
    free(self->entry);
    free(self->tokens);
    free(self->alpha);
    free(self->taken);
    free(self->keys);
    free(self);
}

static sida_status oracle_state_create(const sida_hash_source *source, sida_hash_state **out) {
    *out = NULL;
    sida_status status = SIDA_OK;
    oracle_state *self = NULL;
    int32_t experts = source->info.experts;
    SIDA_TRY(SIDA_ALLOC(&self, 1, "an oracle's state"));
    SIDA_TRY(SIDA_ALLOC(&self->alpha, experts, "an oracle's state"));
    SIDA_TRY(SIDA_ALLOC(&self->taken, experts, "an oracle's state"));
    SIDA_TRY(SIDA_ALLOC(&self->keys, experts, "an oracle's state"));
    *out = (sida_hash_state *)self;
    self = NULL;
out:
    if (self) oracle_state_destroy((sida_hash_state *)self);
    return status;
}

/* --- finding sequences */

static uint64_t hash_ids(const int32_t *ids, int64_t count) {
    static const int32_t none;
    return sida_fingerprint_of(count > 0 ? ids : &none, (size_t)count * sizeof *ids).low;
}

static int64_t length(const oracle_source *self, int side, int32_t sequence) {
    return self->sides[side].offsets[sequence + 1] - self->sides[side].offsets[sequence];
}

static const int32_t *ids_of(const oracle_source *self, int side, int32_t sequence) {
    return self->sides[side].rows.tokens + self->sides[side].offsets[sequence];
}

static bool same_ids(const int32_t *a, const int32_t *b, int64_t count) {
    return count == 0 || memcmp(a, b, (size_t)count * sizeof *a) == 0;
}

/* The first entry with that hash, or where it would be. */
static int64_t first_entry(const oracle_source *self, uint64_t hash) {
    int64_t low = 0, high = self->info->sequences;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (self->entries[middle].hash < hash)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The entry of a sequence with these encoder ids at or behind `from`, LOST where there is none. */
static int64_t find(const oracle_source *self, int64_t from, uint64_t hash, const int32_t *ids,
                    int64_t count) {
    for (int64_t i = from; i < self->info->sequences && self->entries[i].hash == hash; i++) {
        int32_t sequence = self->entries[i].sequence;
        if (length(self, 0, sequence) == count && same_ids(ids_of(self, 0, sequence), ids, count))
            return i;
    }
    return LOST;
}

/* From an entry whose decoder begins with the tokens so far to one that goes on with ids too. */
static int64_t follow(const oracle_source *self, int64_t entry, int64_t so_far, const int32_t *ids,
                      int64_t count) {
    const oracle_entry *now = &self->entries[entry];
    const int32_t *encoder = ids_of(self, 0, now->sequence);
    const int32_t *before = ids_of(self, 1, now->sequence);
    int64_t encoder_count = length(self, 0, now->sequence);
    for (int64_t i = entry; i != LOST; i = find(self, i + 1, now->hash, encoder, encoder_count)) {
        int32_t sequence = self->entries[i].sequence;
        const int32_t *there = ids_of(self, 1, sequence);
        if (length(self, 1, sequence) >= so_far + count && same_ids(there, before, so_far) &&
            same_ids(there + so_far, ids, count))
            return i;
    }
    return LOST;
}

/* --- tables */

/* One token and layer: chosen experts, then the top list, then the others. */
static void fill(const oracle_source *self, oracle_state *state, int side, int64_t row,
                 int32_t layer, sida_hash_table *out, int64_t to) {
    const sida_trace_info *info = self->info;
    const sida_trace_rows *rows = &self->sides[side].rows;
    int64_t pair = row * info->layers[side] + layer, at = (to * out->layers + layer) * out->k;
    const uint16_t *chosen = rows->experts + pair * info->top_k;
    const uint16_t *top = rows->top_ids + pair * info->top;
    const uint16_t *logp = rows->top_logp + pair * info->top;
    float rest = 1;
    memset(state->taken, 0, (size_t)info->experts);
    for (int32_t j = 0; j < info->top; j++) rest -= expf(fminf(sida_f16_to_f32(logp[j]), 0));
    rest = info->experts > info->top && rest > 0 ? rest / (float)(info->experts - info->top) : 0;
    for (int32_t e = 0; e < info->experts; e++) state->alpha[e] = rest;
    for (int32_t j = 0; j < info->top; j++)
        state->alpha[top[j]] = expf(fminf(sida_f16_to_f32(logp[j]), 0));
    int32_t listed = info->top_k + info->top;
    for (int32_t j = 0, found = 0; found < out->k; j++) {
        int32_t e = j < info->top_k ? chosen[j] : j < listed ? top[j - info->top_k] : j - listed;
        if (state->taken[e]) continue;
        state->taken[e] = 1;
        out->experts[at + found] = (uint16_t)e;
        out->alpha[at + found++] = state->alpha[e];
    }
}

static void fill_popular(const oracle_source *self, oracle_state *state, int side,
                         sida_hash_table *out, int64_t to) {
    int32_t experts = self->info->experts;
    for (int32_t l = 0; l < out->layers; l++)
        sida_select_weights(out, to, l, self->sides[side].popular + (int64_t)l * experts, experts,
                            state->keys);
}

static sida_status oracle_encode(const sida_hash_source *source, sida_hash_state *base,
                                 const sida_ragged *input, int32_t k, sida_hash_table *out) {
    const oracle_source *self = (const oracle_source *)source;
    oracle_state *state = (oracle_state *)base;
    sida_status status = SIDA_OK;
    size_t sequences = (size_t)input->sequences;
    state->sequences = 0;
    SIDA_TRY(sida_hash_table_reserve(out, 0, self->info->layers[0], k, sida_ragged_tokens(input)));
    SIDA_TRY(SIDA_GROW(&state->entry, &state->entry_items, sequences + 1, "an oracle's state"));
    SIDA_TRY(SIDA_GROW(&state->tokens, &state->token_items, sequences + 1, "an oracle's state"));
    for (int32_t s = 0; s < input->sequences; s++) {
        const int32_t *ids = input->ids + input->offsets[s];
        int64_t count = input->offsets[s + 1] - input->offsets[s];
        if (self->info->layers[0] == 0 && self->info->tokens[0] == 0) count = 0; /* left out */
        uint64_t hash = hash_ids(ids, count);
        int64_t entry = find(self, first_entry(self, hash), hash, ids, count);
        if (entry == LOST)
            SIDA_FAIL(SIDA_ERROR_MISMATCH,
                      "%s: has no sequence with these %" PRId64
                      " input ids: an oracle knows the inputs of its trace only; trace this input",
                      sida_trace_path(self->trace), count);
        state->entry[s] = entry;
        state->tokens[s] = 0;
        int64_t row = self->sides[0].offsets[self->entries[entry].sequence];
        for (int64_t i = 0; i < count; i++)
            for (int32_t l = 0; l < out->layers; l++)
                fill(self, state, 0, row + i, l, out, input->offsets[s] + i);
    }
    state->sequences = input->sequences;
out:
    return status;
}

/* Where the model leaves the trace: an error if the input alone was to be found, else said once. */
static sida_status lose(const oracle_source *self, bool prompt) {
    const char *path = sida_trace_path(self->trace);
    if (prompt && self->info->tokens[0] == 0)
        return sida_fail(SIDA_ERROR_MISMATCH,
                         "%s: has no sequence that begins so: an oracle knows the inputs of its "
                         "trace only; trace this input",
                         path);
    if (!atomic_exchange(&((oracle_source *)(uintptr_t)self)->warned, true))
        sida_log(SIDA_LOG_WARNING,
                 "%s: the decoder goes on otherwise than in the trace; from there on it gets the "
                 "trace's most popular experts",
                 path);
    return SIDA_OK;
}

static sida_status oracle_decode(const sida_hash_source *source, sida_hash_state *base,
                                 const sida_ragged *step, int32_t k, sida_hash_table *out) {
    const oracle_source *self = (const oracle_source *)source;
    oracle_state *state = (oracle_state *)base;
    sida_status status = SIDA_OK;
    if (!state->entry || step->sequences != state->sequences)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "a decoder step of another batch");
    SIDA_TRY(sida_hash_table_reserve(out, 1, self->info->layers[1], k, sida_ragged_tokens(step)));
    if (out->layers == 0) goto out;
    for (int32_t s = 0; s < step->sequences; s++) {
        const int32_t *ids = step->ids + step->offsets[s];
        int64_t count = step->offsets[s + 1] - step->offsets[s];
        if (count == 0) continue;
        if (state->entry[s] != LOST) {
            state->entry[s] = follow(self, state->entry[s], state->tokens[s], ids, count);
            if (state->entry[s] == LOST) SIDA_TRY(lose(self, state->tokens[s] == 0));
        }
        int64_t row = state->entry[s] == LOST
                          ? 0
                          : self->sides[1].offsets[self->entries[state->entry[s]].sequence] +
                                state->tokens[s];
        for (int64_t i = 0; i < count; i++) {
            if (state->entry[s] == LOST) fill_popular(self, state, 1, out, step->offsets[s] + i);
            for (int32_t l = 0; state->entry[s] != LOST && l < out->layers; l++)
                fill(self, state, 1, row + i, l, out, step->offsets[s] + i);
        }
        state->tokens[s] += count;
    }
out:
    return status;
}

static const sida_hash_source_table oracle_table = {.destroy = oracle_destroy,
                                                    .state_create = oracle_state_create,
                                                    .state_destroy = oracle_state_destroy,
                                                    .encode = oracle_encode,
                                                    .decode = oracle_decode};

/* --- opening */

static sida_status read_side(oracle_source *self, int side) {
    sida_status status = SIDA_OK;
    const sida_trace_info *info = self->info;
    oracle_side *to = &self->sides[side];
    int32_t layers = info->layers[side];
    int64_t n = info->tokens[side];
    to->offsets = sida_trace_offsets(self->trace, side);
    SIDA_TRY(sida_trace_rows_alloc(&to->rows, layers, info->top_k, info->top, n));
    /* Factors and drops are of no use here. */
    free(to->rows.alpha);
    free(to->rows.dropped);
    to->rows.alpha = NULL;
    to->rows.dropped = NULL;
    SIDA_TRY(sida_trace_read(self->trace, side, 0, n, &to->rows));
    size_t scores = (size_t)layers * (size_t)info->experts;
    SIDA_TRY(SIDA_ALLOC(&to->popular, scores, "an oracle"));
    /* One count each, so that their sum is positive. */
    for (size_t i = 0; i < scores; i++) to->popular[i] = 1;
    for (int64_t i = 0; i < n * layers; i++)
        for (int32_t j = 0; j < info->top_k; j++)
            to->popular[i % layers * info->experts + to->rows.experts[i * info->top_k + j]]++;
    size_t row = (size_t)layers * ((size_t)info->top_k + 2 * (size_t)info->top) * 2 + 4;
    self->base.info.bytes += row * (size_t)n + scores * sizeof(float);
out:
    return status;
}

static int compare_entries(const void *a, const void *b) {
    const oracle_entry *x = a, *y = b;
    if (x->hash != y->hash) return x->hash < y->hash ? -1 : 1;
    return (x->sequence > y->sequence) - (x->sequence < y->sequence);
}

static sida_status index_sequences(oracle_source *self) {
    sida_status status = SIDA_OK;
    int64_t count = self->info->sequences;
    SIDA_TRY(SIDA_ALLOC(&self->entries, count, "an oracle"));
    for (int32_t s = 0; s < count; s++)
        self->entries[s] = (oracle_entry){hash_ids(ids_of(self, 0, s), length(self, 0, s)), s};
    qsort(self->entries, (size_t)count, sizeof *self->entries, compare_entries);
    self->base.info.bytes += (size_t)count * sizeof *self->entries;
out:
    return status;
}

sida_status sida_oracle_source_open(sida_hash_source **out, const char *path, sida_weight embedding,
                                    sida_fingerprint model) {
    *out = NULL;
    sida_status status = SIDA_OK;
    oracle_source *self = NULL;
    SIDA_TRY(SIDA_ALLOC(&self, 1, "an oracle"));
    self->base.table = &oracle_table;
    atomic_init(&self->warned, false);
    SIDA_TRY(sida_trace_open(&self->trace, path));
    const sida_trace_info *info = self->info = sida_trace_get_info(self->trace);
    SIDA_TRY(sida_source_check_model(path, info->model, model));
    if (sida_trace_kind(self->trace) == SIDA_H5_PART)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: a part of an unfinished trace; finish it with --resume",
                  path);
    if (info->sequences == 0 || info->tokens[0] + info->tokens[1] == 0)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: an empty trace", path);
    if (info->sequences > INT32_MAX / 2)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: %" PRId64 " sequences are too many", path,
                  info->sequences);
    if (info->layers[0] + info->layers[1] == 0)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: a trace without MoE layers", path);
    SIDA_TRY(sida_source_check_embedding(
        path, &(sida_source_shape){.vocabulary = info->vocabulary, .d_model = info->d_model},
        embedding));
    self->base.info = (sida_hash_source_info){.name = "oracle",
                                              .model = info->model,
                                              .tokenizer = info->tokenizer,
                                              .d_model = info->d_model,
                                              .experts = info->experts,
                                              .layers = {info->layers[0], info->layers[1]}};
    for (int side = 0; side < 2; side++) SIDA_TRY(read_side(self, side));
    SIDA_TRY(index_sequences(self));
    *out = &self->base;
    self = NULL;
out:
    if (self) oracle_destroy(&self->base);
    return status;
}
