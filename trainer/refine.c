#include "trainer/refine.h"

#include "formats/base/clock.h"
#include "formats/base/memory.h"
#include "trainer/adamw.h"
#include "trainer/learner.h"
#include "trainer/refine_measure.h"
#include "trainer/refine_step.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Measured (trainer/README.md). batch_tokens: of the side that has more. */
enum { batch_tokens = 256, warmup_most = 50 };
static const double rate_highest = 5e-3;

static const char *const side_names[2] = {"encoder", "decoder"};

typedef struct refining {
    const sida_refine_options *options;
    const sida_net *net;
    const sida_dataset *train, *valid;
    sida_refine *refine;
    sida_refine *best; /* of each side, what is kept so far */
    int32_t kept[2];
    sida_refine_measure *measure;
    int64_t *hits, *kept_hits; /* its rows, now and of what is kept */
    sida_refine_step *step;
    sida_adamw optimiser;
    float *features[2];
    int32_t *order[2];
    int64_t steps;  /* an epoch */
    int64_t tokens; /* done */
} refining;

bool sida_refine_possible(const int32_t layers[2]) {
    return layers[0] > 1 || layers[1] > 1;
}

int32_t sida_refine_default_width(int32_t hidden) {
    return hidden < SIDA_REFINE_WIDTH_MAX / 2 ? 2 * hidden : SIDA_REFINE_WIDTH_MAX;
}

json_t *sida_refine_settings(const sida_refine_options *options) {
    return json_pack("{s:i, s:i, s:i, s:f}", "width", (int)options->width, "epochs",
                     (int)options->epochs, "batch", (int)batch_tokens, "lr", rate_highest);
}

/* Between two steps. fraction: of this training. */
static sida_status report(const refining *r, double fraction) {
    const sida_refine_options *o = r->options;
    return o->on_step ? o->on_step(o->context, fraction, r->tokens) : SIDA_OK;
}

static sida_status still_reading(void *context) {
    return report(context, 0);
}

static sida_status prepare(refining *r) {
    sida_status status = SIDA_OK;
    const sida_refine_options *o = r->options;
    int64_t most = 0;
    SIDA_TRY(sida_refine_create(&r->refine, &r->net->config, o->width));
    SIDA_TRY(sida_refine_create(&r->best, &r->net->config, o->width));
    sida_refine_initialise(r->refine, o->seed);
    SIDA_TRY(sida_adamw_create(&r->optimiser, r->refine->parameter_count, o->weight_decay));
    for (int side = 0; side < 2; side++) {
        const int64_t n = r->train->sides[side].tokens;
        if (!r->refine->sides[side].present) continue;
        if (n > INT32_MAX)
            SIDA_FAIL(SIDA_ERROR_MEMORY, "%s: too many tokens for a refinement; --no-refine",
                      r->train->path);
        SIDA_TRY(SIDA_ALLOC(&r->order[side], n, "the order of tokens"));
        most = n > most ? n : most;
    }
    r->steps = (most + batch_tokens - 1) / batch_tokens;
    SIDA_TRY(sida_refine_measure_create(&r->measure, r->net, r->valid, still_reading, r));
    SIDA_TRY(SIDA_ALLOC(&r->hits, r->measure->rows, "a refinement"));
    SIDA_TRY(SIDA_ALLOC(&r->kept_hits, r->measure->rows, "a refinement"));
    memcpy(r->kept_hits, r->measure->up_front, (size_t)r->measure->rows * sizeof *r->hits);
    SIDA_TRY(sida_refine_features(r->features, r->net, r->train, still_reading, r));
    SIDA_TRY(sida_refine_step_create(&r->step, r->refine, r->net, r->train,
                                     (const float *const[2]){r->features[0], r->features[1]},
                                     batch_tokens, o->tkd, o->lambda));
out:
    return status;
}

static void discard(refining *r) {
    sida_refine_destroy(r->refine);
    sida_refine_destroy(r->best);
    sida_refine_measure_destroy(r->measure);
    sida_refine_step_destroy(r->step);
    sida_adamw_free(&r->optimiser);
    free(r->hits);
    free(r->kept_hits);
    for (int side = 0; side < 2; side++) {
        free(r->features[side]);
        free(r->order[side]);
    }
}

/* A tenth of the steps of rising rate, then a cosine to 0. */
static double learning_rate(const refining *r) {
    const int64_t step = r->optimiser.step, steps = r->steps * r->options->epochs;
    const int64_t warmup = steps / 10 < warmup_most ? steps / 10 : warmup_most;
    const double rate =
        0.5 * rate_highest * (1 + cos(3.14159265358979323846 * (double)step / (double)steps));
    return step < warmup ? rate * (double)(step + 1) / (double)warmup : rate;
}

/* A step has its share of each side's tokens. */
static sida_status run_step(refining *r, int64_t at, double *loss, int64_t *pairs) {
    sida_status status = SIDA_OK;
    sida_refine *gradient = sida_refine_step_get_gradient(r->step);
    sida_refine_tokens tokens = {.turn = (uint32_t)r->optimiser.step};
    double sum;
    int64_t count;
    for (int side = 0; side < 2; side++) {
        if (!r->order[side]) continue;
        const int64_t n = r->train->sides[side].tokens;
        const int64_t first = at * n / r->steps, last = (at + 1) * n / r->steps;
        tokens.index[side] = r->order[side] + first;
        tokens.count[side] = (int32_t)(last - first);
        r->tokens += last - first;
    }
    SIDA_TRY(sida_refine_step_gradient(r->step, &sum, &count, &tokens));
    const double norm =
        sida_gradient_clip(gradient->parameters, gradient->parameter_count, r->options->clip);
    if (!isfinite(norm)) SIDA_TRY(sida_learner_bad_gradient());
    sida_adamw_step(&r->optimiser, r->refine->parameters, gradient->parameters, learning_rate(r));
    *loss += sum;
    *pairs += count;
    SIDA_TRY(report(r, (double)r->optimiser.step / (double)(r->steps * r->options->epochs)));
out:
    return status;
}

static int64_t sum_of(const int64_t *rows, int64_t count) {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += rows[i];
    return sum;
}

/* A side's parameters lie side by side. */
static void keep(refining *r, int side, int32_t epoch) {
    const sida_refine_side *from = &r->refine->sides[side], *to = &r->best->sides[side];
    const ptrdiff_t count = from->heads.bias + from->heads.rows - from->features.weight;
    memcpy(to->features.weight, from->features.weight, (size_t)count * sizeof(float));
    r->kept[side] = epoch;
}

static sida_status end_epoch(refining *r, int32_t epoch, double loss, double begin) {
    sida_status status = SIDA_OK;
    const sida_refine_measure *measure = r->measure;
    SIDA_TRY(sida_refine_measure_run(measure, r->hits, r->refine));
    for (int side = 0; side < 2; side++) {
        const int64_t steps = r->train->layers[side] - 1;
        int64_t *now = r->hits + measure->first[side], *best = r->kept_hits + measure->first[side];
        if (steps < 1 || sum_of(now, steps) <= sum_of(best, steps)) continue;
        memcpy(best, now, (size_t)steps * sizeof *best);
        keep(r, side, epoch);
    }
    const double slots = (double)sum_of(measure->slots, measure->rows),
                 scale = slots > 0 ? 100 / slots : 0;
    if (r->options->on_epoch)
        r->options->on_epoch(
            r->options->context,
            &(sida_refine_epoch){.epoch = epoch,
                                 .epochs = r->options->epochs,
                                 .loss = loss,
                                 .chosen = r->valid->top_k,
                                 .hit = scale * (double)sum_of(r->hits, measure->rows),
                                 .up_front =
                                     scale * (double)sum_of(measure->up_front, measure->rows),
                                 .seconds = sida_clock_seconds() - begin});
out:
    return status;
}

static sida_status loop(refining *r) {
    sida_status status = SIDA_OK;
    for (int32_t epoch = 0; epoch < r->options->epochs; epoch++) {
        const double begin = sida_clock_seconds();
        double loss = 0;
        int64_t pairs = 0;
        for (int side = 0; side < 2; side++)
            if (r->order[side])
                sida_dataset_shuffle(r->order[side], (int32_t)r->train->sides[side].tokens,
                                     r->options->seed + (uint64_t)side, epoch);
        for (int64_t at = 0; at < r->steps; at++) SIDA_TRY(run_step(r, at, &loss, &pairs));
        SIDA_TRY(end_epoch(r, epoch + 1, pairs > 0 ? loss / (double)pairs : 0, begin));
    }
out:
    return status;
}

/* By side: the epoch kept, and by last known layer what it predicts. */
static void describe(const refining *r, json_t **kept, json_t **measured) {
    const sida_refine_measure *measure = r->measure;
    const char *name = r->valid->top_k > 1 ? "slot_recall" : "hit@1";
    *kept = json_object();
    *measured = json_object();
    for (int side = 0; side < 2; side++) {
        if (!r->order[side]) continue;
        json_t *list = json_array();
        for (int32_t l = 0; l + 1 < r->train->layers[side]; l++) {
            const int32_t row = measure->first[side] + l;
            const double slots = (double)measure->slots[row], scale = slots > 0 ? 100 / slots : 0;
            json_array_append_new(list, json_pack("{s:i, s:f, s:f}", "known", (int)l, name,
                                                  scale * (double)r->kept_hits[row], "up_front",
                                                  scale * (double)measure->up_front[row]));
        }
        json_object_set_new(*measured, side_names[side], list);
        json_object_set_new(*kept, side_names[side], json_integer(r->kept[side]));
    }
}

sida_status sida_refine_train(sida_refine **out, json_t **kept, json_t **measured,
                              const sida_net *net, const sida_dataset *train,
                              const sida_dataset *valid, const sida_refine_options *options) {
    *out = NULL;
    *kept = *measured = NULL;
    sida_status status = SIDA_OK;
    refining r = {.options = options, .net = net, .train = train, .valid = valid};
    SIDA_TRY(prepare(&r));
    SIDA_TRY(loop(&r));
    describe(&r, kept, measured);
    if (r.kept[0] == 0 && r.kept[1] == 0) goto out;
    *out = r.best;
    r.best = NULL;
out:
    discard(&r);
    return status;
}
