/* The refinement's figures: a source made by hand whose layers follow from each other, so that what
 * it is told decides what it says; counted beside by loops of our own. */
#include "tests/test.h"

#include "runtime/predictor/hash_source.h"
#include "trainer/evaluate_refined.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { EXPERTS = 6, SEQUENCES = 5, MOST = 40, LAYERS = 3, MAX_K = 2 };
static const float shares[EXPERTS] = {0.5f, 0.2f, 0.12f, 0.08f, 0.06f, 0.04f};

static void close_to(double got, double wanted) {
    if (!(fabs(got - wanted) <= 1e-9)) fail_msg("%.9g, expected %.9g", got, wanted);
}

/* --- data: layer m of a token with number b chooses b + m, b + m + 1 … round */
typedef struct made {
    sida_dataset data;
    int64_t offsets[2][SEQUENCES + 1];
    int32_t ids[2][MOST];
    uint16_t truth[2][MOST * LAYERS * MAX_K];
    float alpha[2][MOST * LAYERS * MAX_K];
    uint8_t dropped[2][MOST * LAYERS], content[2][MOST];
} made;

static void make(made *m, int32_t encoder, int32_t decoder, int32_t k) {
    memset(m, 0, sizeof *m);
    m->data = (sida_dataset){.path = (char *)(uintptr_t) "made",
                             .experts = EXPERTS,
                             .top_k = k,
                             .d_model = 1,
                             .vocabulary = 100,
                             .sequences = SEQUENCES,
                             .layers = {encoder, decoder}};
    for (int side = 0; side < 2; side++) {
        sida_dataset_side *s = &m->data.sides[side];
        const int32_t layers = m->data.layers[side];
        for (int q = 0; q < SEQUENCES; q++)
            m->offsets[side][q + 1] = m->offsets[side][q] + (side ? 1 + q % 2 : 2 * q + 1);
        for (int i = 0; i < m->offsets[side][SEQUENCES]; i++) {
            m->ids[side][i] = (i * i + side * i) % 10;
            m->content[side][i] = i % 4 != 1;
            for (int l = 0; l < layers; l++) {
                m->dropped[side][i * layers + l] = i % 8 == 5; /* no content */
                for (int j = 0; j < k; j++) {
                    int at = (i * layers + l) * k + j;
                    m->truth[side][at] = (uint16_t)((i * i + i / 3 + l + j) % EXPERTS);
                    m->alpha[side][at] = 0.3f;
                }
            }
        }
        *s = (sida_dataset_side){.tokens = m->offsets[side][SEQUENCES],
                                 .offsets = m->offsets[side],
                                 .ids = m->ids[side],
                                 .experts = m->truth[side],
                                 .alpha = m->alpha[side],
                                 .dropped = m->dropped[side],
                                 .content = m->content[side]};
    }
}

/* --- source: up front expert id + layer; refined what follows from the layer that it is told,
 * `wrong` experts further on */
typedef struct follower {
    sida_hash_source base;
    int32_t wrong, k;
    int32_t refuses; /* at this layer; -1: none */
} follower;

typedef struct follower_state {
    int64_t tokens[2];
    int32_t known[2];
} follower_state;

static void say(sida_hash_table *out, int64_t token, int32_t layer, int32_t best) {
    for (int32_t r = 0; r < EXPERTS; r++) {
        int64_t at = (token * out->layers + layer) * EXPERTS + r;
        out->experts[at] = (uint16_t)((best + r) % EXPERTS);
        out->alpha[at] = shares[r];
    }
}

static sida_status follower_create(const sida_hash_source *source, sida_hash_state **out) {
    (void)source;
    *out = calloc(1, sizeof(follower_state));
    return SIDA_OK;
}

static void follower_destroy(sida_hash_state *state) {
    free(state);
}

static sida_status up_front(const sida_hash_source *source, sida_hash_state *of, int side,
                            const sida_ragged *input, sida_hash_table *out) {
    follower_state *state = (follower_state *)of;
    int32_t layers = source->info.layers[side];
    state->tokens[side] = sida_ragged_tokens(input);
    state->known[side] = 0;
    sida_status status = sida_hash_table_reserve(out, side, layers, EXPERTS, state->tokens[side]);
    for (int64_t i = 0; status == SIDA_OK && i < state->tokens[side]; i++)
        for (int32_t l = 0; l < layers; l++) say(out, i, l, input->ids[i] + l);
    return status;
}

static sida_status encode(const sida_hash_source *source, sida_hash_state *state,
                          const sida_ragged *input, int32_t k, sida_hash_table *out) {
    assert_int_equal(k, EXPERTS);
    return up_front(source, state, 0, input, out);
}

static sida_status decode(const sida_hash_source *source, sida_hash_state *state,
                          const sida_ragged *step, int32_t k, sida_hash_table *out) {
    assert_int_equal(k, EXPERTS);
    return up_front(source, state, 1, step, out);
}

static sida_status refine(const sida_hash_source *source, sida_hash_state *of, int side,
                          int32_t layer, const int32_t *experts, int32_t top_k, int32_t k,
                          sida_hash_table *out) {
    const follower *self = (const follower *)source;
    follower_state *state = (follower_state *)of;
    int32_t layers = source->info.layers[side];
    assert_int_equal(k, EXPERTS);
    assert_int_equal(top_k, self->k);
    assert_int_equal(layer, state->known[side]++);
    if (layer == self->refuses) return sida_fail(SIDA_ERROR_FORMAT, "not this layer");
    sida_status status = sida_hash_table_reserve(out, side, layers, k, state->tokens[side]);
    for (int64_t i = 0; status == SIDA_OK && i < state->tokens[side]; i++)
        for (int32_t m = layer + 1; m < layers; m++)
            say(out, i, m, experts[i * top_k] + m - layer + self->wrong);
    return status;
}

static const sida_hash_source_table follows = {.state_create = follower_create,
                                               .state_destroy = follower_destroy,
                                               .encode = encode,
                                               .decode = decode,
                                               .refine = refine};

static follower made_follower(const made *m, int32_t wrong) {
    return (follower){.base = {&follows,
                               {.name = "follower",
                                .experts = EXPERTS,
                                .layers = {m->data.layers[0], m->data.layers[1]},
                                .refines = true}},
                      .wrong = wrong,
                      .k = m->data.top_k,
                      .refuses = -1};
}

/* Pairs behind `behind`, and those whose best is within the `most` experts from id + layer on. */
static int64_t pairs_behind(const made *m, int side, int32_t behind, bool all, int32_t most,
                            int64_t *hits) {
    int64_t pairs = 0;
    int32_t layers = m->data.layers[side], k = m->data.top_k;
    for (int64_t i = 0; i < m->data.sides[side].tokens; i++)
        for (int32_t l = behind + 1; (all || m->content[side][i]) && l < layers; l++) {
            int32_t truth = m->truth[side][(i * layers + l) * k];
            pairs++;
            *hits += (truth - (m->ids[side][i] + l) % EXPERTS + EXPERTS) % EXPERTS < most;
        }
    return pairs;
}

static void figures(void **state) {
    (void)state;
    made m;
    for (int32_t k = 1; k <= MAX_K; k++) {
        sida_refined right, wrong;
        make(&m, LAYERS, 2, k);
        follower knows = made_follower(&m, 0), errs = made_follower(&m, 1);
        assert_int_equal(sida_evaluate_refined(&right, &knows.base, &m.data, k, NULL, NULL),
                         SIDA_OK);
        assert_int_equal(sida_evaluate_refined(&wrong, &errs.base, &m.data, k, NULL, NULL),
                         SIDA_OK);
        /* Behind 0: both, encoder, decoder; behind 1: both, encoder. */
        static const sida_refined_scope scopes[] = {{0, -1}, {0, 0}, {0, 1}, {1, -1}, {1, 0}};
        assert_int_equal(right.scope_count, 5);
        assert_memory_equal(right.scopes, scopes, sizeof scopes);
        sida_comparison better[5], over_wrong[5];
        assert_int_equal(sida_refined_compare(better, &right, &right.up_front), SIDA_OK);
        assert_int_equal(sida_refined_compare(over_wrong, &right, &wrong.refined), SIDA_OK);
        for (int s = 0; s < 5; s++) {
            int64_t hits[2] = {0}, pairs = 0, all = 0, all_hits = 0;
            for (int side = 0; side < 2; side++)
                if (scopes[s].side < 0 || scopes[s].side == side) {
                    pairs += pairs_behind(&m, side, scopes[s].behind, false, 1, &hits[0]);
                    pairs_behind(&m, side, scopes[s].behind, false, 3, &hits[1]);
                    all += pairs_behind(&m, side, scopes[s].behind, true, 1, &all_hits);
                }
            const sida_scores *before = &right.up_front.scores[s],
                              *after = &right.refined.scores[s];
            assert_true(hits[0] > 0 && hits[1] > hits[0] && hits[1] < pairs && all > pairs);
            for (int i = 0; i < 2; i++)
                close_to(before->hit[i], 100.0 * (double)hits[i] / (double)pairs);
            close_to(right.up_front.all_tokens[s].hit[0], 100.0 * (double)all_hits / (double)all);
            assert_true(before->pairs == pairs && after->pairs == pairs);
            assert_true(right.refined.all_tokens[s].pairs == all);
            assert_memory_equal(before, &wrong.up_front.scores[s], sizeof *before);
            close_to(after->hit[0], 100);
            close_to(after->set_recall_equal, 100);
            close_to(after->slot_recall[0], 100);
            assert_true(before->set_recall_equal < 90);
            /* One further on: the best is last, of k chosen k - 1 are there. */
            close_to(wrong.refined.scores[s].hit[2], 0);
            close_to(wrong.refined.scores[s].slot_recall[0], 100.0 * (k - 1) / k);
            /* Of a constant difference, nothing is left to draw. */
            close_to(better[s].hit[0].mean, 100 - before->hit[0]);
            close_to(better[s].set_recall_equal.mean, 100 - before->set_recall_equal);
            close_to(better[s].slot_recall.mean, 100 - before->slot_recall[0]);
            assert_true(better[s].hit[0].low < better[s].hit[0].mean &&
                        better[s].hit[0].high > better[s].hit[0].mean);
            close_to(over_wrong[s].hit[0].low, 100);
            close_to(over_wrong[s].slot_recall.high, 100.0 / k);
            close_to(after->alpha_constant_error, before->alpha_constant_error);
        }
        const sida_refined_rival rivals[] = {{"up_front", &right.up_front, better},
                                             {"other", &wrong.refined, over_wrong}};
        json_t *json = sida_refined_to_json(&right, rivals, 2);
        assert_int_equal(json_array_size(json), 2);
        json_t *behind = json_array_get(json, 1), *overall = json_object_get(behind, "overall");
        assert_int_equal(json_integer_value(json_object_get(behind, "behind")), 1);
        assert_null(json_object_get(behind, "decoder"));
        json_t *other = json_object_get(json_object_get(overall, "better_by"), "other");
        close_to(json_real_value(json_object_get(json_object_get(other, "hit@1"), "low")), 100);
        assert_true((json_object_get(other, "slot_recall") != NULL) == (k > 1));
        json_t *all = json_object_get(json_object_get(overall, "all_tokens"), "up_front");
        close_to(json_real_value(json_object_get(all, "hit@1")),
                 right.up_front.all_tokens[3].hit[0]);
        json_decref(json);
        sida_refined_free(&right);
        sida_refined_free(&wrong);
    }
}

static sida_status stop(void *context, double fraction, int64_t tokens) {
    (void)context, (void)fraction, (void)tokens;
    return sida_fail(SIDA_ERROR_CANCELLED, "stop");
}

static void refused(void **state) {
    (void)state;
    made m;
    sida_refined r;
    make(&m, LAYERS, 0, 1);
    follower f = made_follower(&m, 0);
    assert_int_equal(sida_evaluate_refined(&r, &f.base, &m.data, 1, NULL, NULL), SIDA_OK);
    assert_int_equal(r.scope_count, 4); /* twice both and encoder */
    sida_refined_free(&r);
    assert_int_equal(sida_evaluate_refined(&r, &f.base, &m.data, 1, stop, NULL),
                     SIDA_ERROR_CANCELLED);
    assert_int_equal(sida_evaluate_refined(&r, &f.base, &m.data, EXPERTS + 1, NULL, NULL),
                     SIDA_ERROR_ARGUMENT);
    f.refuses = 1;
    assert_int_equal(sida_evaluate_refined(&r, &f.base, &m.data, 1, NULL, NULL), SIDA_ERROR_FORMAT);
    assert_null(r.scopes);
    f.base.info.refines = false;
    assert_int_equal(sida_evaluate_refined(&r, &f.base, &m.data, 1, NULL, NULL),
                     SIDA_ERROR_ARGUMENT);
    f.base.info.layers[0] = 2;
    assert_int_equal(sida_evaluate_refined(&r, &f.base, &m.data, 1, NULL, NULL),
                     SIDA_ERROR_MISMATCH);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(figures), cmocka_unit_test(refused)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
