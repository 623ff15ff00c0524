/* Evaluations as JSON. */
#include "trainer/tally.h"

static const char *const side_names[2] = {"encoder", "decoder"};
static const char *const hit_names[3] = {"hit@1", "hit@3", "hit@5"};

json_t *sida_scores_to_json(const sida_scores *scores, int32_t chosen) {
    json_t *object = json_object();
    for (int i = 0; i < 3; i++)
        json_object_set_new(object, hit_names[i], json_real(scores->hit[i]));
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
    json_object_set_new(object, "alpha_constant_error", json_real(scores->alpha_constant_error));
    json_object_set_new(object, "pairs", json_integer(scores->pairs));
    json_object_set_new(object, "dropped", json_integer(scores->dropped));
    return object;
}

static void add_scores(json_t *root, const sida_evaluation *e, const sida_scores *overall,
                       const sida_scores *sides, const sida_scores *per_layer) {
    json_t *layers = json_array();
    json_object_set_new(root, "overall", sida_scores_to_json(overall, e->chosen));
    for (int side = 0, at = 0; side < 2; side++) {
        if (e->layers[side] == 0) continue;
        json_object_set_new(root, side_names[side], sida_scores_to_json(&sides[side], e->chosen));
        for (int32_t l = 0; l < e->layers[side]; l++, at++) {
            json_t *layer = json_pack("{s:s, s:i}", "side", side_names[side], "layer", (int)l);
            json_t *scores = sida_scores_to_json(&per_layer[at], e->chosen);
            json_object_update(layer, scores);
            json_decref(scores);
            json_array_append_new(layers, layer);
        }
    }
    json_object_set_new(root, "layers", layers);
}

json_t *sida_evaluation_to_json(const sida_evaluation *e) {
    json_t *root = json_object(), *all = json_object(), *curve = json_array();
    add_scores(root, e, &e->overall, e->sides, e->per_layer);
    for (int b = 0; b < SIDA_CALIBRATION_BINS; b++) {
        const sida_calibration *bin = &e->calibration[b];
        json_array_append_new(curve, json_pack("{s:f, s:f, s:I, s:f, s:f}", "from",
                                               (double)b / SIDA_CALIBRATION_BINS, "to",
                                               (b + 1.0) / SIDA_CALIBRATION_BINS, "pairs",
                                               (json_int_t)bin->pairs, "predicted", bin->predicted,
                                               "applied", bin->applied));
    }
    json_object_set_new(root, "calibration", curve);
    if (e->has_margins) {
        json_t *margins = json_array();
        for (int b = 0; b < SIDA_MARGIN_BINS; b++) {
            const sida_margin *bin = &e->margins[b];
            json_t *object = json_pack("{s:f, s:f, s:I}", "from", bin->from, "to", bin->to, "pairs",
                                       (json_int_t)bin->pairs);
            for (int i = 0; i < 3; i++)
                json_object_set_new(object, hit_names[i], json_real(bin->hit[i]));
            json_array_append_new(margins, object);
        }
        json_object_set_new(root, "margins", margins);
    }
    add_scores(all, e, &e->all.overall, e->all.sides, e->all.per_layer);
    json_object_set_new(root, "all_tokens", all);
    return root;
}

static json_t *interval_json(const sida_interval *interval) {
    return json_pack("{s:f, s:f, s:f}", "mean", interval->mean, "low", interval->low, "high",
                     interval->high);
}

json_t *sida_comparison_to_json(const sida_comparison *c, int32_t chosen) {
    json_t *object = json_object();
    for (int h = 0; h < 2; h++)
        json_object_set_new(object, hit_names[h], interval_json(&c->hit[h]));
    json_object_set_new(object, "set_recall_equal", interval_json(&c->set_recall_equal));
    if (chosen > 1) json_object_set_new(object, "slot_recall", interval_json(&c->slot_recall));
    return object;
}

json_t *sida_comparisons_to_json(const sida_comparison comparison[3],
                                 const sida_evaluation *evaluation) {
    static const char *const names[3] = {"overall", "encoder", "decoder"};
    json_t *root = json_object();
    for (int i = 0; i < 3; i++)
        if (i == 0 || evaluation->layers[i - 1] > 0)
            json_object_set_new(root, names[i],
                                sida_comparison_to_json(&comparison[i], evaluation->chosen));
    return root;
}
