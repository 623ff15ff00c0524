/* Counts of a trace's routing by popularity, token and pair of tokens: the bars that a predictor
 * has to clear. */
#include "formats/base/memory.h"
#include "runtime/predictor/select.h"
#include "runtime/predictor/table_private.h"

#include <stdlib.h>
#include <string.h>

static const char *const names[SIDA_TABLE_ORDERS] = {"popular", "table", "bigram"};

/* What the shares of the order below weigh beside the counts. A token's own counts are many, the
 * popularity only breaks ties. A pair may have been seen once, which says less than its token: of
 * 0.3, 1, 3, 10 and 30 the last two did best on 3,000 rows of SST-2, measured on its dev set. */
static const float weights[SIDA_TABLE_ORDERS] = {0, 0.01f, 10};

typedef struct table_state {
    float *scores;
    uint64_t *keys;
    int32_t sequences;
    int32_t *before; /* [sequences] the decoder's last id, -1: none yet */
    size_t capacity;
} table_state;

const char *sida_table_name(sida_table_order order) {
    return names[order];
}

bool sida_table_order_from_name(sida_table_order *out, const char *name) {
    for (int i = 0; i < SIDA_TABLE_ORDERS; i++)
        if (strcmp(name, names[i]) == 0) {
            *out = (sida_table_order)i;
            return true;
        }
    return false;
}

static void table_destroy(sida_hash_source *source) {
    sida_table_source *self = (sida_table_source *)source;
    for (int side = 0; side < 2; side++)
        for (int i = 0; i < SIDA_TABLE_ORDERS; i++) {
            sida_table_level *level = &self->levels[side][i];
            free(level->keys);
            free(level->starts);
            free(level->experts);
            free(level->counts);
        }
    free(self);
}

static void table_state_destroy(sida_hash_state *state) {
    table_state *self = (table_state *)state;
    free(self->scores);
    free(self->keys);
    free(self->before);
    free(self);
}

static sida_status table_state_create(const sida_hash_source *source, sida_hash_state **out) {
    *out = NULL;
    sida_status status = SIDA_OK;
    table_state *self = NULL;
    SIDA_TRY(SIDA_ALLOC(&self, 1, "a table's state"));
    SIDA_TRY(SIDA_ALLOC(&self->scores, source->info.experts, "a table's state"));
    SIDA_TRY(SIDA_ALLOC(&self->keys, source->info.experts, "a table's state"));
    *out = (sida_hash_state *)self;
    self = NULL;
out:
    if (self) table_state_destroy((sida_hash_state *)self);
    return status;
}

int64_t sida_table_key(int order, int32_t before, int32_t id) {
    if (order == SIDA_TABLE_POPULAR) return 0;
    return order == SIDA_TABLE_TOKEN ? id : (int64_t)(before + 1) << 32 | id;
}

/* The row of a key, -1 for one that was not seen. */
static int64_t find(const sida_table_level *level, int64_t key) {
    int64_t low = 0, high = level->count;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (level->keys[middle] < key)
            low = middle + 1;
        else
            high = middle;
    }
    return low < level->count && level->keys[low] == key ? low : -1;
}

/* Shares of all experts; rows: of each order, -1 where it knows nothing. */
static void score(float *scores, const sida_table_source *self, int side, int32_t layer,
                  const int64_t rows[SIDA_TABLE_ORDERS]) {
    int32_t layers = self->base.info.layers[side], experts = self->base.info.experts;
    for (int32_t e = 0; e < experts; e++) scores[e] = 1.0f / (float)experts;
    for (int order = 0; order <= (int)self->order; order++) {
        if (rows[order] < 0) continue;
        const sida_table_level *level = &self->levels[side][order];
        const int64_t *run = level->starts + rows[order] * layers + layer;
        int64_t total = 0;
        for (int64_t i = run[0]; i < run[1]; i++) total += level->counts[i];
        if (total == 0) continue;
        float scale = 1 / ((float)total + weights[order]), below = weights[order] * scale;
        for (int32_t e = 0; e < experts; e++) scores[e] *= below;
        for (int64_t i = run[0]; i < run[1]; i++)
            scores[level->experts[i]] += (float)level->counts[i] * scale;
    }
}

static sida_status look_up(const sida_table_source *self, table_state *state, int side,
                           const sida_ragged *input, int32_t k, sida_hash_table *out) {
    int32_t layers = self->base.info.layers[side], experts = self->base.info.experts;
    sida_status status = sida_hash_table_reserve(out, side, layers, k, sida_ragged_tokens(input));
    if (status != SIDA_OK) return status;
    for (int32_t s = 0; s < input->sequences; s++) {
        int32_t before = side == 1 ? state->before[s] : -1;
        for (int64_t i = input->offsets[s]; i < input->offsets[s + 1]; i++) {
            int64_t rows[SIDA_TABLE_ORDERS];
            for (int order = 0; order <= (int)self->order; order++)
                rows[order] =
                    find(&self->levels[side][order], sida_table_key(order, before, input->ids[i]));
            for (int32_t l = 0; l < layers; l++) {
                score(state->scores, self, side, l, rows);
                sida_select_weights(out, i, l, state->scores, experts, state->keys);
            }
            before = input->ids[i];
        }
        if (side == 1) state->before[s] = before;
    }
    return SIDA_OK;
}

static sida_status table_encode(const sida_hash_source *source, sida_hash_state *state,
                                const sida_ragged *input, int32_t k, sida_hash_table *out) {
    table_state *own = (table_state *)state;
    sida_status status =
        SIDA_GROW(&own->before, &own->capacity, (size_t)input->sequences + 1, "a table's state");
    if (status != SIDA_OK) return status;
    own->sequences = input->sequences;
    for (int32_t s = 0; s < input->sequences; s++) own->before[s] = -1;
    return look_up((const sida_table_source *)source, own, 0, input, k, out);
}

static sida_status table_decode(const sida_hash_source *source, sida_hash_state *state,
                                const sida_ragged *step, int32_t k, sida_hash_table *out) {
    table_state *own = (table_state *)state;
    if (!own->before || step->sequences != own->sequences)
        return sida_fail(SIDA_ERROR_ARGUMENT, "a decoder step of another batch");
    return look_up((const sida_table_source *)source, own, 1, step, k, out);
}

static const sida_hash_source_table table_table = {.destroy = table_destroy,
                                                   .state_create = table_state_create,
                                                   .state_destroy = table_state_destroy,
                                                   .encode = table_encode,
                                                   .decode = table_decode};

sida_status sida_table_source_alloc(sida_table_source **out, sida_table_order order,
                                    const sida_source_shape *shape, sida_fingerprint model,
                                    sida_fingerprint tokenizer) {
    sida_status status = SIDA_ALLOC(out, 1, "a table");
    if (status != SIDA_OK) return status;
    (*out)->order = order;
    (*out)->vocabulary = shape->vocabulary;
    (*out)->base.table = &table_table;
    (*out)->base.info = (sida_hash_source_info){.name = names[order],
                                                .model = model,
                                                .tokenizer = tokenizer,
                                                .d_model = shape->d_model,
                                                .experts = shape->experts,
                                                .layers = {shape->layers[0], shape->layers[1]}};
    return SIDA_OK;
}

void sida_table_source_measure(sida_table_source *source) {
    source->base.info.bytes = 0;
    for (int side = 0; side < 2; side++)
        for (int order = 0; order <= (int)source->order; order++) {
            const sida_table_level *level = &source->levels[side][order];
            int64_t starts = level->count * source->base.info.layers[side] + 1;
            source->base.info.bytes +=
                (size_t)(level->count + starts) * sizeof(int64_t) +
                (size_t)level->entries * (sizeof *level->experts + sizeof *level->counts);
        }
}

/* --- counting */

typedef struct occurrence {
    int64_t key, row;
} occurrence;

static int compare_occurrences(const void *a, const void *b) {
    const occurrence *x = a, *y = b;
    if (x->key != y->key) return x->key < y->key ? -1 : 1;
    return (x->row > y->row) - (x->row < y->row);
}

static sida_status find_occurrences(occurrence **out, const sida_ragged *tokens, int order) {
    sida_status status = SIDA_ALLOC(out, sida_ragged_tokens(tokens), "a table's contexts");
    if (status != SIDA_OK) return status;
    for (int32_t s = 0; s < tokens->sequences; s++) {
        int32_t before = -1;
        for (int64_t i = tokens->offsets[s]; i < tokens->offsets[s + 1]; i++) {
            (*out)[i] = (occurrence){sida_table_key(order, before, tokens->ids[i]), i};
            before = tokens->ids[i];
        }
    }
    qsort(*out, (size_t)sida_ragged_tokens(tokens), sizeof **out, compare_occurrences);
    return SIDA_OK;
}

static sida_status count_level(sida_table_level *level, const sida_routed *from, int side,
                               int order) {
    sida_status status = SIDA_OK;
    int32_t layers = from->shape.layers[side], experts = from->shape.experts, k = from->top_k;
    int64_t n = layers > 0 ? sida_ragged_tokens(&from->tokens[side]) : 0;
    occurrence *at = NULL;
    int32_t *sums = NULL;
    size_t starts = 0, expert_items = 0, count_items = 0;
    if (n > 0) SIDA_TRY(find_occurrences(&at, &from->tokens[side], order));
    for (int64_t i = 0; i < n; i++) level->count += i == 0 || at[i].key != at[i - 1].key;
    if (sida_mul_overflow((size_t)level->count, (size_t)layers, &starts))
        SIDA_FAIL(SIDA_ERROR_MEMORY, "a table of so many contexts is too large");
    SIDA_TRY(SIDA_ALLOC(&level->keys, level->count, "a table's contexts"));
    SIDA_TRY(SIDA_ALLOC(&level->starts, starts + 1, "a table's contexts"));
    SIDA_TRY(SIDA_ALLOC(&sums, experts, "a table's counts"));
    int64_t *start = level->starts;
    for (int64_t first = 0, last, row = 0; first < n; first = last, row++) {
        level->keys[row] = at[first].key;
        for (last = first; last < n && at[last].key == at[first].key;) last++;
        for (int32_t l = 0; l < layers; l++) {
            memset(sums, 0, (size_t)experts * sizeof *sums);
            for (int64_t i = first; i < last; i++)
                for (int32_t j = 0; j < k; j++)
                    sums[from->experts[side][(at[i].row * layers + l) * k + j]]++;
            size_t most = (size_t)level->entries + (size_t)experts;
            SIDA_TRY(SIDA_GROW(&level->experts, &expert_items, most, "a table's counts"));
            SIDA_TRY(SIDA_GROW(&level->counts, &count_items, most, "a table's counts"));
            for (int32_t e = 0; e < experts; e++)
                if (sums[e] > 0) {
                    level->experts[level->entries] = (uint16_t)e;
                    level->counts[level->entries++] = sums[e];
                }
            *++start = level->entries;
        }
    }
out:
    free(at);
    free(sums);
    return status;
}

sida_status sida_table_source_create(sida_hash_source **out, sida_table_order order,
                                     const sida_routed *from) {
    *out = NULL;
    sida_status status = SIDA_OK;
    sida_table_source *self = NULL;
    SIDA_TRY(sida_table_source_alloc(&self, order, &from->shape, from->model, from->tokenizer));
    for (int side = 0; side < 2; side++)
        for (int i = 0; i <= (int)order; i++)
            SIDA_TRY(count_level(&self->levels[side][i], from, side, i));
    sida_table_source_measure(self);
    *out = &self->base;
    self = NULL;
out:
    if (self) table_destroy(&self->base);
    return status;
}
