#include "trainer/evaluate.h"

#include "formats/base/memory.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* Tokens of a batch: bounds the memory, as every token's E scores are kept. */
enum { batch_tokens = 4096 };

static const int hit_k[3] = {1, 3, 5};

/* A probability of 1 counts as this one, whose logarithm is finite. */
static const double most_certain = 1 - 1e-6;

/* Sums of one layer. */
typedef struct tally {
    int64_t pairs, dropped, hits[3], slots[2], exact, used_sets, predicted_sets;
    double recall, precision, equal, alpha, applied, covered[2];
} tally;

void sida_evaluation_free(sida_evaluation *evaluation) {
    free(evaluation->per_layer);
    *evaluation = (sida_evaluation){0};
}

static int32_t rank_of(const uint16_t *predicted, int32_t experts, int32_t expert) {
    int32_t rank = 0;
    while (rank < experts - 1 && predicted[rank] != expert) rank++;
    return rank;
}

/* truth, applied [k]; predicted, alpha [experts]. */
static void count_pair(tally *t, const uint16_t *predicted, const float *alpha, int32_t experts,
                       const uint16_t *truth, const float *applied, int32_t k, bool renormalised) {
    int32_t best = rank_of(predicted, experts, truth[0]), inside = 0;
    double whole = 0;
    t->pairs++;
    for (int i = 0; i < 3; i++) t->hits[i] += best < hit_k[i];
    for (int32_t j = 0; j < k; j++) {
        int32_t rank = j == 0 ? best : rank_of(predicted, experts, truth[j]);
        whole += (double)alpha[rank];
        t->applied += (double)applied[j];
        inside += rank < k;
        for (int i = 0; i < 2; i++)
            if (rank < k << i) {
                t->slots[i]++;
                t->covered[i] += (double)applied[j];
            }
    }
    t->exact += inside == k;
    double factor = renormalised && whole > 0 ? (double)alpha[best] / whole : (double)alpha[best];
    t->alpha += fabs(factor - (double)applied[0]);
}

/* One sequence and layer. marks [experts]: 1 used, 2 predicted. */
static void count_set(tally *t, uint8_t *marks, int32_t experts) {
    int32_t used = 0, predicted = 0, both = 0;
    for (int32_t e = 0; e < experts; e++) {
        used += marks[e] & 1;
        predicted += marks[e] >> 1;
        both += marks[e] == 3;
    }
    if (used > 0) {
        t->used_sets++;
        t->recall += (double)both / used;
    }
    if (predicted > 0) {
        t->predicted_sets++;
        t->precision += (double)both / predicted;
    }
}

/* What one sequence and layer would load: experts by the best rank that a token gives them (in
 * steps of k, as a token uses k), then by how probable it is that some token uses them, were the
 * tokens independent: 1 - Π (1 - α). */
typedef struct wish {
    int32_t step;
    double weight; /* -Σ log(1 - α) */
} wish;

static bool wished_more(const wish *a, const wish *b) {
    return a->step != b->step ? a->step < b->step : a->weight > b->weight;
}

/* The recall where as many experts are loaded as were used. wishes [experts]: used up. */
static void count_equal(tally *t, const uint8_t *marks, wish *wishes, int32_t experts) {
    int32_t used = 0, both = 0;
    for (int32_t e = 0; e < experts; e++) used += marks[e] & 1;
    for (int32_t i = 0; i < used; i++) {
        int32_t best = 0;
        for (int32_t e = 1; e < experts; e++)
            if (wished_more(&wishes[e], &wishes[best])) best = e;
        wishes[best] = (wish){INT32_MAX, 0};
        both += marks[best] & 1;
    }
    if (used > 0) t->equal += (double)both / used;
}

/* One side of the sequences [first, last). */
static void count_side(tally *tallies, uint8_t *marks, wish *wishes, const sida_dataset *data,
                       int side, int32_t first, int32_t last, int32_t set_k,
                       const sida_hash_table *table) {
    const sida_dataset_side *s = &data->sides[side];
    int32_t layers = data->layers[side], experts = data->experts, k = data->top_k;
    int64_t origin = s->offsets[first];
    for (int32_t q = first; q < last; q++)
        for (int32_t l = 0; l < layers; l++) {
            memset(marks, 0, (size_t)experts);
            for (int32_t e = 0; e < experts; e++) wishes[e] = (wish){INT32_MAX - 1, 0};
            for (int64_t i = s->offsets[q]; i < s->offsets[q + 1]; i++) {
                const uint16_t *truth = s->experts + (i * layers + l) * k;
                const uint16_t *guess = table->experts + ((i - origin) * layers + l) * experts;
                const float *alpha = table->alpha + ((i - origin) * layers + l) * experts;
                bool dropped = s->dropped[i * layers + l] != 0;
                count_pair(&tallies[l], guess, alpha, experts, truth,
                           s->alpha + (i * layers + l) * k, k, data->renormalised);
                tallies[l].dropped += dropped;
                for (int32_t j = 0; j < k && !dropped; j++) marks[truth[j]] |= 1;
                for (int32_t j = 0; j < set_k; j++) marks[guess[j]] |= 2;
                for (int32_t j = 0; j < experts; j++) {
                    wish *w = &wishes[guess[j]];
                    if (j / k < w->step) w->step = j / k;
                    w->weight -= log1p(-fmin((double)alpha[j], most_certain));
                }
            }
            count_set(&tallies[l], marks, experts);
            count_equal(&tallies[l], marks, wishes, experts);
        }
}

static void add_tally(tally *to, const tally *from) {
    to->pairs += from->pairs;
    to->dropped += from->dropped;
    for (int i = 0; i < 3; i++) to->hits[i] += from->hits[i];
    for (int i = 0; i < 2; i++) {
        to->slots[i] += from->slots[i];
        to->covered[i] += from->covered[i];
    }
    to->exact += from->exact;
    to->applied += from->applied;
    to->used_sets += from->used_sets;
    to->predicted_sets += from->predicted_sets;
    to->recall += from->recall;
    to->precision += from->precision;
    to->equal += from->equal;
    to->alpha += from->alpha;
}

static double per_cent(double part, int64_t whole) {
    return whole > 0 ? 100 * part / (double)whole : 0;
}

static sida_scores finish(const tally *t, int32_t k) {
    sida_scores scores = {.pairs = t->pairs,
                          .dropped = t->dropped,
                          .sets = t->used_sets,
                          .set_recall = per_cent(t->recall, t->used_sets),
                          .set_precision = per_cent(t->precision, t->predicted_sets),
                          .set_recall_equal = per_cent(t->equal, t->used_sets),
                          .alpha_error = per_cent(t->alpha, t->pairs)};
    for (int i = 0; i < 3; i++) scores.hit[i] = per_cent((double)t->hits[i], t->pairs);
    for (int i = 0; i < 2; i++) {
        scores.slot_recall[i] = per_cent((double)t->slots[i], t->pairs * k);
        scores.weight_recall[i] = t->applied > 0 ? 100 * t->covered[i] / t->applied : 0;
    }
    scores.exact_set = per_cent((double)t->exact, t->pairs);
    return scores;
}

static sida_status check(const sida_hash_source *source, const sida_dataset *data, int32_t set_k) {
    const sida_hash_source_info *info = &source->info;
    if (!sida_fingerprint_equal(info->model, data->model)) {
        char theirs[SIDA_FINGERPRINT_TEXT], ours[SIDA_FINGERPRINT_TEXT];
        sida_fingerprint_format(theirs, info->model);
        sida_fingerprint_format(ours, data->model);
        return sida_fail(SIDA_ERROR_MISMATCH, "the predictor is of model %s, %s of model %s",
                         theirs, data->path, ours);
    }
    if (info->experts != data->experts || info->layers[0] != data->layers[0] ||
        info->layers[1] != data->layers[1])
        return sida_fail(SIDA_ERROR_MISMATCH,
                         "the predictor has %d + %d layers of %d experts, %s %d + %d of %d",
                         info->layers[0], info->layers[1], info->experts, data->path,
                         data->layers[0], data->layers[1], data->experts);
    if (set_k < 1 || set_k > data->experts)
        return sida_fail(SIDA_ERROR_ARGUMENT, "%d experts a token: %s has %d", set_k, data->path,
                         data->experts);
    return SIDA_OK;
}

/* The sequence behind the batch that starts at `first`. */
static int32_t batch_end(const sida_dataset *data, int32_t first) {
    int64_t tokens = 0;
    int32_t last = first;
    while (last < data->sequences) {
        for (int side = 0; side < 2; side++)
            tokens += data->sides[side].offsets[last + 1] - data->sides[side].offsets[last];
        if (last > first && tokens > batch_tokens) break;
        last++;
    }
    return last;
}

static sida_ragged slice(const sida_dataset *data, int side, int32_t first, int32_t last,
                         int64_t *offsets) {
    const sida_dataset_side *s = &data->sides[side];
    for (int32_t q = first; q <= last; q++) offsets[q - first] = s->offsets[q] - s->offsets[first];
    return (sida_ragged){last - first, offsets, s->ids + s->offsets[first]};
}

sida_status sida_evaluate(
    sida_evaluation *out, const sida_hash_source *source, const sida_dataset *data, int32_t set_k,
    sida_status (*on_progress)(void *context, double fraction, int64_t tokens), void *context) {
    *out = (sida_evaluation){
        .chosen = data->top_k, .set_k = set_k, .layers = {data->layers[0], data->layers[1]}};
    sida_status status = SIDA_OK;
    sida_hash_state *state = NULL;
    sida_hash_table table = {0};
    tally *tallies = NULL, sums[3] = {{0}};
    uint8_t *marks = NULL;
    wish *wishes = NULL;
    int64_t *offsets = NULL, done = 0;
    int32_t total = data->layers[0] + data->layers[1];
    SIDA_TRY(check(source, data, set_k));
    SIDA_TRY(SIDA_ALLOC(&tallies, total, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&out->per_layer, total, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&marks, data->experts, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&wishes, data->experts, "an evaluation"));
    SIDA_TRY(SIDA_ALLOC(&offsets, (size_t)data->sequences + 1, "an evaluation"));
    SIDA_TRY(sida_hash_state_create(source, &state));
    for (int32_t first = 0, last; first < data->sequences; first = last) {
        last = batch_end(data, first);
        sida_ragged input = slice(data, 0, first, last, offsets);
        done += sida_ragged_tokens(&input);
        SIDA_TRY(sida_hash_encode(source, state, &input, data->experts, &table));
        if (data->layers[0] > 0)
            count_side(tallies, marks, wishes, data, 0, first, last, set_k, &table);
        if (data->layers[1] > 0) {
            sida_ragged step = slice(data, 1, first, last, offsets);
            done += sida_ragged_tokens(&step);
            SIDA_TRY(sida_hash_decode(source, state, &step, data->experts, &table));
            count_side(tallies + data->layers[0], marks, wishes, data, 1, first, last, set_k,
                       &table);
        }
        if (on_progress) SIDA_TRY(on_progress(context, (double)last / data->sequences, done));
    }
    for (int32_t l = 0; l < total; l++) {
        out->per_layer[l] = finish(&tallies[l], data->top_k);
        add_tally(&sums[l < data->layers[0] ? 0 : 1], &tallies[l]);
        add_tally(&sums[2], &tallies[l]);
    }
    for (int side = 0; side < 2; side++) out->sides[side] = finish(&sums[side], data->top_k);
    out->overall = finish(&sums[2], data->top_k);
out:
    sida_hash_state_destroy(source, state);
    sida_hash_table_free(&table);
    free(tallies);
    free(marks);
    free(wishes);
    free(offsets);
    if (status != SIDA_OK) sida_evaluation_free(out);
    return status;
}

static void add_scores(json_t *object, const sida_scores *scores, int32_t chosen) {
    static const char *const names[3] = {"hit@1", "hit@3", "hit@5"};
    for (int i = 0; i < 3; i++) json_object_set_new(object, names[i], json_real(scores->hit[i]));
    json_object_set_new(object, "set_recall", json_real(scores->set_recall));
    json_object_set_new(object, "set_precision", json_real(scores->set_precision));
    json_object_set_new(object, "set_recall_equal", json_real(scores->set_recall_equal));
    if (chosen > 1) {
        const double *slot = scores->slot_recall, *weight = scores->weight_recall;
        json_object_set_new(object, "slot_recall", json_real(slot[0]));
        json_object_set_new(object, "slot_recall_2k", json_real(slot[1]));
        json_object_set_new(object, "exact_set", json_real(scores->exact_set));
        json_object_set_new(object, "weight_recall", json_real(weight[0]));
        json_object_set_new(object, "weight_recall_2k", json_real(weight[1]));
    }
    json_object_set_new(object, "alpha_error", json_real(scores->alpha_error));
    json_object_set_new(object, "pairs", json_integer(scores->pairs));
    json_object_set_new(object, "dropped", json_integer(scores->dropped));
}

json_t *sida_evaluation_to_json(const sida_evaluation *evaluation) {
    static const char *const sides[2] = {"encoder", "decoder"};
    json_t *root = json_object(), *overall = json_object(), *layers = json_array();
    add_scores(overall, &evaluation->overall, evaluation->chosen);
    json_object_set_new(root, "overall", overall);
    for (int side = 0, at = 0; side < 2; side++) {
        if (evaluation->layers[side] == 0) continue;
        json_t *object = json_object();
        add_scores(object, &evaluation->sides[side], evaluation->chosen);
        json_object_set_new(root, sides[side], object);
        for (int32_t l = 0; l < evaluation->layers[side]; l++, at++) {
            json_t *layer = json_object();
            json_object_set_new(layer, "side", json_string(sides[side]));
            json_object_set_new(layer, "layer", json_integer(l));
            add_scores(layer, &evaluation->per_layer[at], evaluation->chosen);
            json_array_append_new(layers, layer);
        }
    }
    json_object_set_new(root, "layers", layers);
    return root;
}
