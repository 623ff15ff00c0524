#include "trainer/evaluate_refined.h"

#include "formats/base/memory.h"
#include "trainer/tally.h"

#include <stdlib.h>

static const char *const scope_names[3] = {"overall", "encoder", "decoder"};

static void behind_free(sida_behind *behind) {
    free(behind->scores);
    free(behind->all_tokens);
    free(behind->per_sequence);
}

void sida_refined_free(sida_refined *refined) {
    free(refined->scopes);
    free(refined->members);
    behind_free(&refined->up_front);
    behind_free(&refined->refined);
    *refined = (sida_refined){0};
}

/* Sums of one way to predict. */
typedef struct way {
    sida_behind *out;
    sida_sums *content, *all; /* [columns] */
} way;

typedef struct evaluating {
    sida_refined *out;
    const sida_hash_source *source;
    sida_counter counter;
    way up_front, refined;
    sida_hash_table table;
    int32_t *truth; /* [tokens, top_k] */
    size_t truth_items;
} evaluating;

static int32_t known_layers(const sida_dataset *data, int side) {
    return data->layers[side] > 1 ? data->layers[side] - 1 : 0;
}

static int32_t column_of(const sida_dataset *data, int side, int32_t behind) {
    return (side ? known_layers(data, 0) : 0) + behind;
}

/* --- counting */

/* A sequence's layer, in columns [first, last). */
static void count(evaluating *e, const way *to, int side, int32_t sequence, int32_t layer,
                  const sida_hash_table *table, int64_t row, int32_t first, int32_t last) {
    sida_tally content = {.sums = {0}};
    sida_sums all = {0};
    int64_t at = row * e->counter.data->layers[side] * e->counter.data->experts;
    sida_tally_layer(&content, &all, &e->counter, side, sequence, layer, table->experts + at,
                     table->alpha + at);
    for (int32_t c = first; c < last; c++) {
        sida_sums_add(&to->content[c], &content.sums);
        sida_sums_add(&to->all[c], &all);
        sida_sums_add(&to->out->per_sequence[(int64_t)sequence * e->out->columns + c],
                      &content.sums);
    }
}

/* What the router chose in a layer, of the sequences [first, last). */
static sida_status gather_truth(evaluating *e, int side, int32_t layer, int32_t first,
                                int32_t last) {
    sida_status status = SIDA_OK;
    const sida_dataset *data = e->counter.data;
    const sida_dataset_side *s = &data->sides[side];
    const int64_t k = data->top_k, begin = s->offsets[first], end = s->offsets[last];
    SIDA_TRY(SIDA_GROW(&e->truth, &e->truth_items, (size_t)((end - begin) * k) + 1,
                       "an evaluation's routing"));
    for (int64_t i = begin; i < end; i++)
        for (int64_t j = 0; j < k; j++)
            e->truth[(i - begin) * k + j] = s->experts[(i * data->layers[side] + layer) * k + j];
out:
    return status;
}

static sida_status count_batch(void *walker, sida_hash_state *state, int side, int32_t first,
                               int32_t last, const sida_hash_table *table) {
    sida_status status = SIDA_OK;
    evaluating *e = walker;
    const sida_dataset *data = e->counter.data;
    const int64_t *offsets = data->sides[side].offsets;
    const int32_t layers = data->layers[side], base = column_of(data, side, 0);
    for (int32_t q = first; q < last; q++)
        for (int32_t m = 1; m < layers; m++)
            count(e, &e->up_front, side, q, m, table, offsets[q] - offsets[first], base, base + m);
    for (int32_t l = 0; l + 1 < layers; l++) {
        SIDA_TRY(gather_truth(e, side, l, first, last));
        SIDA_TRY(sida_hash_refine(e->source, state, side, l, e->truth, data->top_k, data->experts,
                                  &e->table));
        for (int32_t q = first; q < last; q++)
            for (int32_t m = l + 1; m < layers; m++)
                count(e, &e->refined, side, q, m, &e->table, offsets[q] - offsets[first], base + l,
                      base + l + 1);
    }
out:
    return status;
}

/* The mean α's error, which no prediction changes. */
static void add_constants(const evaluating *e) {
    const sida_dataset *data = e->counter.data;
    const way *ways[2] = {&e->up_front, &e->refined};
    for (int side = 0; side < 2; side++)
        for (int32_t m = 1; m < data->layers[side]; m++) {
            double content = sida_alpha_constant(data, side, m, false);
            double all = sida_alpha_constant(data, side, m, true);
            for (int32_t l = 0; l < m; l++)
                for (int w = 0; w < 2; w++) {
                    ways[w]->content[column_of(data, side, l)].alpha_constant += content;
                    ways[w]->all[column_of(data, side, l)].alpha_constant += all;
                }
        }
}

static void finish(const evaluating *e, const way *from) {
    const sida_refined *out = e->out;
    for (int32_t s = 0; s < out->scope_count; s++) {
        sida_sums content = {0}, all = {0};
        for (int32_t c = 0; c < out->columns; c++) {
            if (!out->members[s * out->columns + c]) continue;
            sida_sums_add(&content, &from->content[c]);
            sida_sums_add(&all, &from->all[c]);
        }
        from->out->scores[s] = sida_sums_finish(&content, out->chosen);
        from->out->all_tokens[s] = sida_sums_finish(&all, out->chosen);
    }
}

/* --- room */

static void add_scope(sida_refined *out, const sida_dataset *data, int32_t behind, int32_t side) {
    uint8_t *members = out->members + (size_t)out->scope_count * (size_t)out->columns;
    for (int s = 0; s < 2; s++)
        if (behind < known_layers(data, s) && (side < 0 || side == s))
            members[column_of(data, s, behind)] = 1;
    out->scopes[out->scope_count++] = (sida_refined_scope){behind, side};
}

static sida_status make_scopes(sida_refined *out, const sida_dataset *data) {
    sida_status status = SIDA_OK;
    const int32_t known[2] = {known_layers(data, 0), known_layers(data, 1)};
    const int32_t most = known[0] > known[1] ? known[0] : known[1];
    out->columns = known[0] + known[1];
    size_t scopes = (size_t)most + (size_t)out->columns;
    SIDA_TRY(SIDA_ALLOC(&out->scopes, scopes, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&out->members, scopes * (size_t)out->columns, "an evaluation"));
    for (int32_t l = 0; l < most; l++)
        for (int32_t side = -1; side < 2; side++)
            if (side < 0 || l < known[side]) add_scope(out, data, l, side);
out:
    return status;
}

static sida_status make_way(way *to, sida_behind *behind, const sida_refined *out) {
    sida_status status = SIDA_OK;
    const size_t scopes = (size_t)out->scope_count, columns = (size_t)out->columns;
    to->out = behind;
    SIDA_TRY(SIDA_ALLOC(&to->content, columns, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&to->all, columns, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&behind->scores, scopes, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&behind->all_tokens, scopes, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&behind->per_sequence, (size_t)out->sequences * columns, "an evaluation"));
out:
    return status;
}

static void free_way(way *w) {
    free(w->content);
    free(w->all);
}

sida_status sida_evaluate_refined(
    sida_refined *out, const sida_hash_source *source, const sida_dataset *data, int32_t set_k,
    sida_status (*on_progress)(void *context, double fraction, int64_t tokens), void *context) {
    *out = (sida_refined){.chosen = data->top_k, .sequences = data->sequences};
    sida_status status = SIDA_OK;
    evaluating e = {.out = out, .source = source, .counter = {.data = data, .set_k = set_k}};
    SIDA_TRY(sida_evaluate_check(source, data, set_k));
    if (!source->info.refines)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "a '%s' without a refinement says nothing anew",
                  source->info.name);
    SIDA_TRY(make_scopes(out, data));
    SIDA_TRY(make_way(&e.up_front, &out->up_front, out));
    SIDA_TRY(make_way(&e.refined, &out->refined, out));
    SIDA_TRY(sida_set_create(&e.counter.set, data->experts));
    SIDA_TRY(sida_evaluate_walk(source, data, count_batch, &e, on_progress, context));
    add_constants(&e);
    finish(&e, &e.up_front);
    finish(&e, &e.refined);
out:
    free_way(&e.up_front);
    free_way(&e.refined);
    sida_set_free(&e.counter.set);
    sida_hash_table_free(&e.table);
    free(e.truth);
    if (status != SIDA_OK) sida_refined_free(out);
    return status;
}

/* --- beside others */

sida_status sida_refined_compare(sida_comparison *out, const sida_refined *ours,
                                 const sida_behind *theirs) {
    return sida_sums_compare(out, ours->members, ours->scope_count, ours->refined.per_sequence,
                             theirs->per_sequence, ours->sequences, ours->columns, ours->chosen);
}

static json_t *ways_json(const sida_refined *r, const sida_refined_rival *rivals, int32_t count,
                         int32_t scope, bool all) {
    json_t *object = json_object();
    const sida_behind *ours = &r->refined;
    json_object_set_new(
        object, "refined",
        sida_scores_to_json(all ? &ours->all_tokens[scope] : &ours->scores[scope], r->chosen));
    for (int32_t i = 0; i < count; i++) {
        const sida_behind *b = rivals[i].figures;
        json_object_set_new(
            object, rivals[i].name,
            sida_scores_to_json(all ? &b->all_tokens[scope] : &b->scores[scope], r->chosen));
    }
    return object;
}

json_t *sida_refined_to_json(const sida_refined *refined, const sida_refined_rival *rivals,
                             int32_t count) {
    json_t *root = json_array(), *behind = NULL;
    for (int32_t s = 0; s < refined->scope_count; s++) {
        const sida_refined_scope *scope = &refined->scopes[s];
        if (scope->side < 0) {
            behind = json_pack("{s:i}", "behind", (int)scope->behind);
            json_array_append_new(root, behind);
        }
        json_t *object = ways_json(refined, rivals, count, s, false), *better = json_object();
        for (int32_t i = 0; i < count; i++)
            json_object_set_new(better, rivals[i].name,
                                sida_comparison_to_json(&rivals[i].better[s], refined->chosen));
        json_object_set_new(object, "better_by", better);
        json_object_set_new(object, "all_tokens", ways_json(refined, rivals, count, s, true));
        json_object_set_new(behind, scope_names[scope->side + 1], object);
    }
    return root;
}
