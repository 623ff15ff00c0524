/* Steps of the trainer, timed: random sequences of one length with random teachers, through the
 * learner that `sida train` uses, data in the host's memory as a loaded trace is. An encoder alone;
 * time and memory depend on sizes, not on values.
 *
 *   bench_train --experts 128 --length 64 --device cuda
 *
 * Prints JSON. A sample is the mean time of a step in a block of --block steps, from the return of
 * one step to that of another, without waiting in between; `with_finish_ms` is the same of all
 * blocks together up to the end of the device's work and the parameters' way back. Products may use
 * TF32 on a GPU, unless --fp32. With --timeline one more block is run at the end under CUPTI
 * (timeline.h): its times are not samples. */
#include "formats/base/clock.h"
#include "formats/base/memory.h"
#include "formats/base/rng.h"
#include "formats/dtype.h"
#include "tools/bench/timeline.h"
#include "trainer/learner.h"

#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LSTM_LAYERS = 2, FIRST_ID = 3, SEED = 7, BATCHES = 4, TEACHERS = 64, AROUND = 4 };

typedef struct bench {
    int32_t experts, length, batch, d_model, hidden, layers, top, vocabulary;
    int32_t warmup, blocks, block;
    double lambda, clip;
    sida_tkd tkd;
    bool tf32, timeline;
    const char *device;
    sida_backend *backend;
    sida_learner *learner;
    sida_train_state state;
    sida_dataset data;
    int32_t *order;
    double *samples_ms, with_finish_ms;
    size_t driver_bytes_before; /* the context's */
} bench;

typedef struct teacher {
    float *score;   /* [experts] scratch */
    uint16_t *ids;  /* [TEACHERS, top] distinct, best first */
    uint16_t *logp; /* [TEACHERS, top] fp16 bits */
} teacher;

/* Distributions of normal scores; the top T by selection, since T is small. */
static void draw_teachers(const bench *b, teacher *t, sida_rng *rng) {
    for (int32_t i = 0; i < TEACHERS; i++) {
        double sum = 0;
        for (int32_t e = 0; e < b->experts; e++) {
            t->score[e] = 2 * sida_rng_normal(rng);
            sum += exp((double)t->score[e]);
        }
        for (int32_t j = 0; j < b->top; j++) {
            int32_t best = 0;
            for (int32_t e = 1; e < b->experts; e++)
                if (t->score[e] > t->score[best]) best = e;
            t->ids[i * b->top + j] = (uint16_t)best;
            t->logp[i * b->top + j] = sida_f16_from_f32((float)((double)t->score[best] - log(sum)));
            t->score[best] = -INFINITY;
        }
    }
}

/* A pair's teacher is one of a few, its experts renumbered. */
static sida_status fill_teachers(bench *b, sida_rng *rng) {
    sida_status status = SIDA_OK;
    sida_dataset_side *side = &b->data.sides[0];
    int64_t pairs = side->tokens * b->layers, top = b->top;
    teacher t = {0};
    SIDA_TRY(SIDA_ALLOC(&t.score, b->experts, "teachers"));
    SIDA_TRY(SIDA_ALLOC(&t.ids, TEACHERS * top, "teachers"));
    SIDA_TRY(SIDA_ALLOC(&t.logp, TEACHERS * top, "teachers"));
    SIDA_TRY(SIDA_ALLOC(&side->top_ids, pairs * top, "a data set"));
    SIDA_TRY(SIDA_ALLOC(&side->top_logp, pairs * top, "a data set"));
    draw_teachers(b, &t, rng);
    for (int64_t p = 0; p < pairs; p++) {
        int64_t from = sida_rng_below(rng, TEACHERS) * top;
        int32_t shift = (int32_t)sida_rng_below(rng, (uint32_t)b->experts);
        memcpy(side->top_logp + p * top, t.logp + from, (size_t)top * sizeof *t.logp);
        for (int64_t j = 0; j < top; j++)
            side->top_ids[p * top + j] = (uint16_t)((t.ids[from + j] + shift) % b->experts);
    }
out:
    free(t.score);
    free(t.ids);
    free(t.logp);
    return status;
}

static sida_status fill_data(bench *b) {
    sida_status status = SIDA_OK;
    sida_dataset *data = &b->data;
    sida_dataset_side *side = &data->sides[0];
    sida_rng rng = sida_rng_seed(SEED);
    int64_t values = (int64_t)b->vocabulary * b->d_model;
    data->experts = b->experts;
    data->top_k = 1;
    data->top = b->top;
    data->d_model = b->d_model;
    data->vocabulary = b->vocabulary;
    data->sequences = BATCHES * b->batch;
    data->layers[0] = b->layers;
    side->tokens = (int64_t)data->sequences * b->length;
    SIDA_TRY(sida_strdup(&data->path, "random data"));
    SIDA_TRY(SIDA_ALLOC(&side->offsets, (int64_t)data->sequences + 1, "a data set"));
    SIDA_TRY(SIDA_ALLOC(&data->sides[1].offsets, (int64_t)data->sequences + 1, "a data set"));
    SIDA_TRY(SIDA_ALLOC(&side->ids, side->tokens, "a data set"));
    SIDA_TRY(SIDA_ALLOC(&data->embedding, values, "an embedding"));
    for (int32_t s = 0; s <= data->sequences; s++) side->offsets[s] = (int64_t)s * b->length;
    for (int64_t i = 0; i < side->tokens; i++)
        side->ids[i] = FIRST_ID + (int32_t)sida_rng_below(&rng, (uint32_t)b->vocabulary - FIRST_ID);
    for (int64_t i = 0; i < values; i++) data->embedding[i] = 2 * sida_rng_f32(&rng) - 1;
    SIDA_TRY(fill_teachers(b, &rng));
out:
    return status;
}

static sida_status open_learner(bench *b) {
    sida_status status = SIDA_OK;
    sida_memory_usage usage;
    const sida_net_config config = {.d_model = b->d_model,
                                    .hidden = b->hidden,
                                    .lstm_layers = LSTM_LAYERS,
                                    .experts = b->experts,
                                    .vocabulary = b->vocabulary,
                                    .layers = {b->layers, 0}};
    if (b->timeline) SIDA_TRY(bench_timeline_open());
    SIDA_TRY(sida_backend_create_named(&b->backend, b->device));
    SIDA_TRY(sida_backend_sample(b->backend));
    sida_backend_memory(b->backend, &usage);
    b->driver_bytes_before = usage.driver_bytes;
    SIDA_TRY(sida_train_state_create(&b->state, &config, 0.01, 1));
    sida_net_initialise(b->state.net, SEED);
    SIDA_TRY(sida_learner_create(
        &b->learner, b->backend, &b->state, &b->data,
        &(sida_learner_options){
            .batch = b->batch, .tkd = b->tkd, .lambda = b->lambda, .clip = b->clip}));
out:
    return status;
}

static sida_status take_steps(bench *b, int32_t count) {
    sida_status status = SIDA_OK;
    for (int32_t i = 0; i < count; i++) SIDA_TRY(sida_learner_step(b->learner, 5e-5));
out:
    return status;
}

static sida_status begin(bench *b, int32_t steps) {
    for (int64_t i = 0; i < (int64_t)steps * b->batch; i++)
        b->order[i] = (int32_t)(i % b->data.sequences);
    return sida_learner_begin(b->learner, b->order, steps * b->batch);
}

static sida_status measure(bench *b) {
    sida_status status = SIDA_OK;
    int32_t steps = b->blocks * b->block, most = b->warmup + (steps > AROUND ? steps : AROUND);
    most += b->block + AROUND;
    SIDA_TRY(SIDA_ALLOC(&b->order, (int64_t)most * b->batch, "an order"));
    SIDA_TRY(SIDA_ALLOC(&b->samples_ms, b->blocks, "samples"));
    SIDA_TRY(begin(b, b->warmup));
    SIDA_TRY(take_steps(b, b->warmup));
    SIDA_TRY(sida_learner_finish(b->learner));
    /* The first steps of a queue return before any has run: they are of no block. */
    SIDA_TRY(begin(b, AROUND + steps));
    double first = sida_clock_seconds();
    SIDA_TRY(take_steps(b, AROUND));
    for (int32_t i = 0; i < b->blocks; i++) {
        double start = sida_clock_seconds();
        SIDA_TRY(take_steps(b, b->block));
        b->samples_ms[i] = (sida_clock_seconds() - start) * 1e3 / b->block;
    }
    SIDA_TRY(sida_learner_finish(b->learner));
    b->with_finish_ms = (sida_clock_seconds() - first) * 1e3 / (steps + AROUND);
    SIDA_TRY(sida_backend_sample(b->backend));
    if (!b->timeline) goto out;
    SIDA_TRY(begin(b, 2 * AROUND + b->block));
    SIDA_TRY(take_steps(b, AROUND));
    SIDA_TRY(bench_timeline_begin());
    SIDA_TRY(take_steps(b, b->block));
    SIDA_TRY(bench_timeline_end());
    SIDA_TRY(take_steps(b, AROUND));
    SIDA_TRY(sida_learner_finish(b->learner));
out:
    return status;
}

static sida_status print(bench *b) {
    sida_status status = SIDA_OK;
    sida_device_info info = {0};
    sida_memory_usage usage;
    bool cpu = strcmp(b->backend->table->name, "cpu") == 0;
    SIDA_TRY(sida_backend_describe(b->backend, &info));
    sida_backend_memory(b->backend, &usage);
    printf("{\"experts\": %d, \"batch\": %d, \"length\": %d, \"d_model\": %d, \"hidden\": %d, "
           "\"moe_layers\": %d, \"top\": %d, \"tkd\": \"%s\", \"lambda\": %g, \"clip\": %g, "
           "\"tf32\": %s, \"parameters\": %lld, \"block\": %d, ",
           b->experts, b->batch, b->length, b->d_model, b->hidden, b->layers, b->top,
           sida_tkd_name(b->tkd), b->lambda, b->clip, b->tf32 ? "true" : "false",
           (long long)b->state.net->parameter_count, b->block);
    printf("\"device\": \"%s\", \"cuda_driver\": %d, \"cuda_runtime\": %d, "
           "\"device_bytes_peak\": %zu, \"driver_bytes_before\": %zu, \"driver_bytes_peak\": %zu, "
           "\"driver_alone\": %s, ",
           cpu ? "cpu" : info.name, info.driver, info.runtime, usage.peak_bytes,
           b->driver_bytes_before, usage.driver_peak_bytes, usage.driver_alone ? "true" : "false");
    printf("\"loss\": %.9g, \"with_finish_ms\": %.6f, \"samples_ms\": [",
           b->state.loss_sum / (double)b->state.loss_pairs, b->with_finish_ms);
    for (int32_t i = 0; i < b->blocks; i++) printf("%s%.6f", i > 0 ? ", " : "", b->samples_ms[i]);
    printf("]");
    if (b->timeline) {
        printf(", \"timeline\": ");
        SIDA_TRY(bench_timeline_print(b->block));
    }
    puts("}");
out:
    return status;
}

static int usage(const char *why) {
    fprintf(stderr,
            "bench_train: %s\n"
            "usage: bench_train [--experts N] [--length N] [--batch N] [--d-model N] [--hidden N]\n"
            "    [--layers N] [--top N] [--vocabulary N] [--warmup N] [--blocks N] [--block N]\n"
            "    [--tkd rest|l1-renorm] [--lambda X] [--clip X] [--fp32]\n"
            "    [--device NAME] [--timeline]\n",
            why);
    return 2;
}

/* NULL, or what is wrong. */
static const char *parse(bench *b, int argc, char **argv) {
    const struct {
        const char *name;
        int32_t *value;
    } numbers[] = {{"experts", &b->experts}, {"length", &b->length},        {"batch", &b->batch},
                   {"d-model", &b->d_model}, {"hidden", &b->hidden},        {"layers", &b->layers},
                   {"top", &b->top},         {"warmup", &b->warmup},        {"blocks", &b->blocks},
                   {"block", &b->block},     {"vocabulary", &b->vocabulary}};
    enum {
        NUMBERS = sizeof numbers / sizeof *numbers,
        TKD = NUMBERS,
        LAMBDA,
        CLIP,
        DEVICE,
        FP32,
        TIMELINE,
        ALL
    };
    struct option options[ALL + 1] = {
        [TKD] = {"tkd", 1, NULL, TKD},    [LAMBDA] = {"lambda", 1, NULL, LAMBDA},
        [CLIP] = {"clip", 1, NULL, CLIP}, [DEVICE] = {"device", 1, NULL, DEVICE},
        [FP32] = {"fp32", 0, NULL, FP32}, [TIMELINE] = {"timeline", 0, NULL, TIMELINE}};
    for (int i = 0; i < NUMBERS; i++) options[i] = (struct option){numbers[i].name, 1, NULL, i};
    for (int key; (key = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (key == '?') return "an option it does not have";
        if (key < NUMBERS) {
            *numbers[key].value = atoi(optarg);
            if (*numbers[key].value < 1 || *numbers[key].value > 1 << 17)
                return "a number out of its range";
        }
        if (key == TKD) {
            b->tkd = strcmp(optarg, "rest") == 0 ? SIDA_TKD_REST : SIDA_TKD_L1_RENORM;
            if (strcmp(optarg, sida_tkd_name(b->tkd)) != 0) return "--tkd: rest or l1-renorm";
        }
        if (key == LAMBDA) b->lambda = atof(optarg);
        if (key == CLIP) b->clip = atof(optarg);
        if (key == DEVICE) b->device = optarg;
        if (key == FP32) b->tf32 = false;
        if (key == TIMELINE) b->timeline = true;
    }
    if (b->top > b->experts) b->top = b->experts;
    if (b->vocabulary <= FIRST_ID) return "a vocabulary without words";
    return optind < argc ? "too many arguments" : NULL;
}

int main(int argc, char **argv) {
    bench b = {.experts = 128,
               .length = 64,
               .batch = 64,
               .d_model = 768,
               .hidden = 256,
               .layers = 6,
               .top = 30,
               .vocabulary = 32128,
               .warmup = 10,
               .blocks = 8,
               .block = 20,
               .tkd = SIDA_TKD_L1_RENORM,
               .lambda = 0.005,
               .tf32 = true,
               .device = "auto"};
    const char *wrong = parse(&b, argc, argv);
    if (wrong) return usage(wrong);
    sida_status status = fill_data(&b);
    if (status == SIDA_OK) status = open_learner(&b);
    if (status == SIDA_OK) status = measure(&b);
    if (status == SIDA_OK) status = print(&b);
    if (status != SIDA_OK) fprintf(stderr, "bench_train: %s\n", sida_last_message());
    sida_learner_destroy(b.learner);
    sida_train_state_free(&b.state);
    sida_backend_destroy(b.backend);
    sida_dataset_free(&b.data);
    free(b.order);
    free(b.samples_ms);
    return status == SIDA_OK ? 0 : 1;
}
