#include "trainer/train.h"

#include "formats/base/clock.h"
#include "formats/base/file.h"
#include "formats/base/log.h"
#include "formats/base/memory.h"
#include "runtime/predictor/sources.h"
#include "trainer/calibrate.h"
#include "trainer/checkpoint.h"
#include "trainer/fit.h"
#include "trainer/learner.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char *sida_schedule_name(sida_schedule schedule) {
    return schedule == SIDA_SCHEDULE_COSINE ? "cosine" : "constant";
}

sida_train_options sida_train_defaults(void) {
    return (sida_train_options){.device = "auto",
                                .epochs = 30,
                                .batch = 16,
                                .lstm_layers = 2, /* the paper's */
                                .blocks = 3,
                                .warmup = 100,
                                .lr = 1e-2,
                                .lambda = 0.5,
                                .weight_decay = 0.01,
                                .clip = 1,
                                .tkd = SIDA_TKD_REST,
                                .schedule = SIDA_SCHEDULE_COSINE,
                                .calibrate = true,
                                .refine = true,
                                .refine_epochs = 8};
}

typedef struct training {
    const sida_train_options *options;
    sida_backend *backend;
    sida_dataset train, valid;
    sida_predictor_meta meta;
    sida_train_state state;
    sida_learner *learner;
    sida_hash_source *source; /* over state.net, for validation */
    int32_t *order;
    int32_t batches;              /* an epoch */
    int64_t steps;                /* in all */
    int64_t tokens;               /* trained on by this process */
    sida_refine_options refining; /* epochs 0: no refinement */
    sida_refine *refine;          /* NULL: none */
    json_t *refined;              /* what it is measured to do, or NULL */
    double refine_seconds;
    char *checkpoint;
    bool saved, kept; /* the checkpoint holds the present state; one of this training */
} training;

static json_t *fingerprint_json(sida_fingerprint value) {
    char text[SIDA_FINGERPRINT_TEXT];
    sida_fingerprint_format(text, value);
    return json_string(text);
}

/* Everything that shapes the result, and nothing else: no path, no time, no number of threads. The
 * device is left out where it is the CPU. */
static json_t *config_json(const training *t, const sida_net_config *net) {
    const sida_train_options *o = t->options;
    json_t *root = json_object(), *settings = json_object();
    json_object_set_new(root, "net", sida_net_config_to_json(net));
    json_object_set_new(settings, "epochs", json_integer(o->epochs));
    json_object_set_new(settings, "batch", json_integer(o->batch));
    json_object_set_new(settings, "lr", json_real(o->lr));
    json_object_set_new(settings, "schedule", json_string(sida_schedule_name(o->schedule)));
    json_object_set_new(settings, "warmup", json_integer(o->warmup));
    json_object_set_new(settings, "weight_decay", json_real(o->weight_decay));
    json_object_set_new(settings, "clip", json_real(o->clip));
    json_object_set_new(settings, "tkd", json_string(sida_tkd_name(o->tkd)));
    json_object_set_new(settings, "lambda", json_real(o->lambda));
    json_object_set_new(settings, "labels", json_string(sida_labels_name(o->labels)));
    json_object_set_new(settings, "top", json_integer(t->train.top));
    json_object_set_new(settings, "patience", json_integer(o->patience));
    json_object_set_new(settings, "seed", json_integer(o->seed));
    json_object_set_new(settings, "optimizer", json_string("adamw"));
    if (strcmp(t->backend->table->name, "cpu") != 0) {
        json_object_set_new(settings, "device", json_string(t->backend->table->name));
        json_object_set_new(settings, "products", json_string(o->fp32 ? "fp32" : "tf32"));
    }
    json_object_set_new(root, "training", settings);
    json_object_set_new(root, "trace", fingerprint_json(t->train.file));
    json_object_set_new(root, "valid", fingerprint_json(t->valid.file));
    json_object_set_new(root, "version", json_string(SIDA_VERSION));
    if (t->refining.epochs > 0)
        json_object_set_new(root, "refine", sida_refine_settings(&t->refining));
    return root;
}

static sida_status check_options(const sida_train_options *o) {
    if (o->epochs < 1 || o->batch < 1 || o->device_batch < 0 || o->top < 0 || o->hidden < 0 ||
        o->refine_width < 0 || o->refine_width > SIDA_REFINE_WIDTH_MAX ||
        (o->refine && o->refine_epochs < 1) || o->warmup < 0 || o->patience < 0 || o->seed < 0 ||
        o->checkpoint_every < 0 || !(o->lr > 0) || !(o->lambda >= 0) || !(o->weight_decay >= 0) ||
        !(o->clip >= 0) || !isfinite(o->lr) || !isfinite(o->lambda) || !isfinite(o->weight_decay) ||
        !isfinite(o->clip))
        return sida_fail(SIDA_ERROR_ARGUMENT, "an option of the training is out of its range");
    return SIDA_OK;
}

static sida_net_kind kind_of(const sida_train_options *options) {
    sida_net_kind kind = SIDA_NET_TRANSFORMER;
    sida_net_kind_from_name(&kind, options->source ? options->source : SIDA_TRAIN_SOURCE);
    return kind;
}

/* Where auto finds a GPU that cannot train, the CPU does. */
static sida_status open_device(training *t) {
    sida_status status = SIDA_OK;
    const char *device = t->options->device;
    SIDA_TRY(sida_backend_create_named(&t->backend, device));
    status = sida_learner_check(t->backend, kind_of(t->options));
    if (status == SIDA_OK || (device && strcmp(device, "auto") != 0)) goto out;
    sida_log(SIDA_LOG_WARNING, "training on the CPU: %s", sida_last_message());
    sida_backend_destroy(t->backend);
    SIDA_TRY(sida_backend_create_named(&t->backend, "cpu"));
out:
    return status;
}

static sida_refine_options refine_options(const sida_train_options *o, int32_t hidden) {
    return (sida_refine_options){.width = o->refine_width > 0 ? o->refine_width
                                                              : sida_refine_default_width(hidden),
                                 .epochs = o->refine_epochs,
                                 .lambda = o->lambda,
                                 .weight_decay = o->weight_decay,
                                 .clip = o->clip,
                                 .tkd = o->tkd,
                                 .seed = (uint64_t)o->seed,
                                 .on_step = o->on_refine_step,
                                 .on_epoch = o->on_refine_epoch,
                                 .context = o->context};
}

/* Loads both traces and builds everything that does not depend on the checkpoint. */
static sida_status prepare(training *t) {
    sida_status status = SIDA_OK;
    const sida_train_options *o = t->options;
    SIDA_TRY(check_options(o));
    SIDA_TRY(open_device(t));
    SIDA_TRY(sida_strprintf(&t->checkpoint, "%s.checkpoint", o->output));
    SIDA_TRY(sida_file_check_writable(o->output));
    SIDA_TRY(sida_file_check_writable(t->checkpoint));
    SIDA_TRY(sida_dataset_load(&t->train, o->trace, o->top));
    t->train.labels = o->labels;
    SIDA_TRY(sida_dataset_load(&t->valid, o->valid, -1));
    SIDA_TRY(sida_dataset_check_pair(&t->train, &t->valid));
    sida_net_kind kind = kind_of(o);
    const sida_net_config config = {
        .kind = kind,
        .d_model = t->train.d_model,
        .hidden = o->hidden > 0 ? o->hidden : sida_net_default_hidden(t->train.d_model),
        .lstm_layers = kind == SIDA_NET_LSTM ? o->lstm_layers : 0,
        .blocks = kind == SIDA_NET_TRANSFORMER ? o->blocks : 0,
        .experts = t->train.experts,
        .vocabulary = t->train.vocabulary,
        .layers = {t->train.layers[0], t->train.layers[1]},
        .attention = o->attention,
        .bidirectional = o->bidirectional};
    t->meta.model = t->train.model;
    t->meta.tokenizer = t->train.tokenizer;
    SIDA_TRY(sida_strdup(&t->meta.source, sida_net_kind_name(kind)));
    if (o->refine && sida_refine_possible(config.layers))
        t->refining = refine_options(o, config.hidden);
    t->meta.config = config_json(t, &config);
    SIDA_TRY(sida_train_state_create(&t->state, &config, o->weight_decay, o->epochs));
    sida_net_initialise(t->state.net, (uint64_t)o->seed);
    SIDA_TRY(sida_lstm_source_create(&t->source, t->state.net, sida_dataset_embedding(&t->valid),
                                     t->train.model, t->train.tokenizer));
    SIDA_TRY(SIDA_ALLOC(&t->order, t->train.sequences, "the order of sequences"));
    t->batches = (t->train.sequences - 1) / o->batch + 1;
    t->steps = (int64_t)t->batches * o->epochs;
out:
    return status;
}

static void discard(training *t) {
    sida_learner_destroy(t->learner);
    sida_backend_destroy(t->backend);
    sida_dataset_free(&t->train);
    sida_dataset_free(&t->valid);
    sida_predictor_meta_free(&t->meta);
    sida_hash_source_destroy(t->source);
    sida_train_state_free(&t->state);
    sida_refine_destroy(t->refine);
    json_decref(t->refined);
    free(t->order);
    free(t->checkpoint);
}

/* Nothing is saved where a step that was under way turns out to have failed. */
static sida_status save(training *t) {
    sida_status status = sida_learner_finish(t->learner);
    if (status == SIDA_OK) status = sida_checkpoint_write(t->checkpoint, &t->meta, &t->state);
    if (status == SIDA_OK) t->saved = t->kept = true;
    return status;
}

static double learning_rate(const training *t, int64_t step) {
    const sida_train_options *o = t->options;
    double rate = o->lr;
    if (o->schedule == SIDA_SCHEDULE_COSINE)
        rate *= 0.5 * (1 + cos(3.14159265358979323846 * (double)step / (double)t->steps));
    if (step < o->warmup) rate *= (double)(step + 1) / o->warmup;
    return rate;
}

static sida_status run_step(training *t) {
    sida_status status = SIDA_OK;
    const sida_train_options *o = t->options;
    sida_train_state *s = &t->state;
    int32_t first = s->batch * o->batch, rest = t->train.sequences - first;
    int32_t count = rest < o->batch ? rest : o->batch;
    SIDA_TRY(sida_learner_step(t->learner, learning_rate(t, s->optimiser.step)));
    s->batch++;
    t->saved = false;
    for (int side = 0; side < 2; side++)
        for (int32_t i = first; i < first + count; i++) {
            const int64_t *offsets = t->train.sides[side].offsets + t->order[i];
            t->tokens += offsets[1] - offsets[0];
        }
    if (o->checkpoint_every > 0 && s->optimiser.step % o->checkpoint_every == 0) SIDA_TRY(save(t));
    if (o->on_step)
        SIDA_TRY(o->on_step(o->context, (double)s->optimiser.step / (double)t->steps, t->tokens));
out:
    return status;
}

/* Measures what the runtime will see: the inference pass, not the training one. */
static sida_status end_epoch(training *t, double begin) {
    sida_status status = SIDA_OK;
    sida_train_state *s = &t->state;
    sida_evaluation valid = {0};
    SIDA_TRY(sida_learner_finish(t->learner));
    double loss = s->loss_pairs > 0 ? s->loss_sum / (double)s->loss_pairs : 0;
    SIDA_TRY(sida_evaluate(&valid, t->source, &t->valid, t->valid.top_k, NULL, NULL));
    const sida_scores *all = &valid.overall;
    const double row[SIDA_CURVE_COLUMNS] = {loss,
                                            all->hit[0],
                                            all->hit[1],
                                            all->hit[2],
                                            all->set_recall,
                                            all->set_precision,
                                            all->alpha_error};
    for (int c = 0; c < SIDA_CURVE_COLUMNS; c++)
        s->curve[(int64_t)s->epoch * SIDA_CURVE_COLUMNS + c] = (float)row[c];
    s->epoch++;
    s->batch = 0;
    s->loss_sum = 0;
    s->loss_pairs = 0;
    if (s->best_epoch == 0 || all->slot_recall[0] > s->best_hit) {
        s->best_epoch = s->epoch;
        s->best_hit = all->slot_recall[0];
        memcpy(s->best, s->net->parameters, (size_t)s->net->parameter_count * sizeof *s->best);
    }
    t->saved = false;
    if (t->options->on_epoch)
        t->options->on_epoch(t->options->context,
                             &(sida_train_epoch){s->epoch, t->options->epochs, loss, &valid,
                                                 sida_clock_seconds() - begin});
    if (t->options->checkpoint_every == 0) SIDA_TRY(save(t));
out:
    sida_evaluation_free(&valid);
    return status;
}

/* Asked to stop, or without device memory for the next step, between two steps: nothing is lost.
 * A device that failed has taken what was not saved. The reason stays the message. */
static sida_status give_up(training *t, sida_status status) {
    const bool whole = status == SIDA_ERROR_CANCELLED ||
                       (status == SIDA_ERROR_BUDGET && t->state.optimiser.step > 0);
    if (!whole && !(status == SIDA_ERROR_DEVICE && t->kept)) return status;
    char reason[512];
    snprintf(reason, sizeof reason, "%s",
             status == SIDA_ERROR_CANCELLED ? "stopped" : sida_last_message());
    if (whole && !t->saved) {
        sida_status saved = save(t);
        if (saved != SIDA_OK) return saved;
    }
    return sida_fail(status, "%s; sida train --resume continues from %s", reason, t->checkpoint);
}

/* By the state alone: a training that is resumed ends where it would have. */
static bool out_of_patience(const training *t) {
    const sida_train_state *s = &t->state;
    return t->options->patience > 0 && s->epoch - s->best_epoch >= t->options->patience;
}

static sida_status loop(training *t) {
    sida_status status = SIDA_OK;
    sida_train_state *s = &t->state;
    while (s->epoch < t->options->epochs && !out_of_patience(t)) {
        double begin = sida_clock_seconds();
        sida_dataset_shuffle(t->order, t->train.sequences, (uint64_t)t->options->seed, s->epoch);
        int32_t done = s->batch < t->batches ? s->batch * t->options->batch : t->train.sequences;
        SIDA_TRY(sida_learner_begin(t->learner, t->order + done, t->train.sequences - done));
        while (s->batch < t->batches) SIDA_TRY(run_step(t));
        SIDA_TRY(end_epoch(t, begin));
    }
    if (s->epoch < t->options->epochs)
        sida_log(SIDA_LOG_INFO, "stopped after epoch %d: none was better since epoch %d", s->epoch,
                 s->best_epoch);
out:
    return give_up(t, status);
}

static sida_status start(training *t) {
    const sida_train_options *o = t->options;
    bool exists = sida_file_exists(t->checkpoint);
    if (o->resume && exists) {
        sida_status status = sida_checkpoint_read(&t->state, t->checkpoint, &t->meta, o->epochs);
        if (status != SIDA_OK) return status;
        if (t->state.batch > t->batches ||
            t->state.optimiser.step != (int64_t)t->state.epoch * t->batches + t->state.batch)
            return sida_fail(SIDA_ERROR_FORMAT, "%s: its step and epoch do not agree",
                             t->checkpoint);
        t->saved = t->kept = true;
        sida_log(SIDA_LOG_INFO, "resuming after step %lld of %lld",
                 (long long)t->state.optimiser.step, (long long)t->steps);
    } else if (exists) {
        sida_log(SIDA_LOG_WARNING,
                 "%s is of an unfinished training and will be replaced; --resume continues it",
                 t->checkpoint);
    }
    return sida_learner_create(&t->learner, t->backend, &t->state, &t->train,
                               &(sida_learner_options){.batch = o->batch,
                                                       .device_batch = o->device_batch,
                                                       .tkd = o->tkd,
                                                       .lambda = o->lambda,
                                                       .clip = o->clip,
                                                       .tf32 = !o->fp32});
}

/* The weights that are kept go where the source reads them, calibrated where that is asked for. A
 * checkpoint never has calibrated ones: a training that is resumed calibrates once, too. */
static sida_status calibrate(training *t) {
    sida_status status = SIDA_OK;
    sida_train_state *s = &t->state;
    const size_t bytes = (size_t)s->net->parameter_count * sizeof *s->best;
    const int32_t *layers = s->net->config.layers;
    double *temperatures = NULL;
    memcpy(s->net->parameters, s->best, bytes);
    if (!t->options->calibrate) return SIDA_OK;
    SIDA_TRY(SIDA_ALLOC(&temperatures, (size_t)(layers[0] + layers[1]), "a calibration"));
    SIDA_TRY(sida_calibrate(temperatures, s->net, &t->valid));
    memcpy(s->best, s->net->parameters, bytes);
    json_object_set_new(json_object_get(t->meta.config, "training"), "temperatures",
                        sida_temperatures_to_json(temperatures, layers));
out:
    free(temperatures);
    return status;
}

/* Of the network as it will be in the file. */
static sida_status refine(training *t) {
    sida_status status = SIDA_OK;
    json_t *kept = NULL, *about = json_object_get(t->meta.config, "refine");
    const double begin = sida_clock_seconds();
    SIDA_TRY(sida_refine_train(&t->refine, &kept, &t->refined, t->state.net, &t->train, &t->valid,
                               &t->refining));
    t->refine_seconds = sida_clock_seconds() - begin;
    if (t->refine) {
        json_object_set(about, "kept_epoch", kept);
    } else {
        sida_log(SIDA_LOG_INFO, "no refinement: none was better than what is said up front");
        json_object_del(t->meta.config, "refine");
    }
out:
    json_decref(kept);
    return give_up(t, status);
}

/* Stopped in there, a training goes on from its last step: the state is saved as that left it. */
static sida_status finish(training *t) {
    sida_status status = SIDA_OK;
    const bool refines = t->refining.epochs > 0;
    if (refines && !t->saved) SIDA_TRY(save(t));
    SIDA_TRY(calibrate(t));
    if (refines) SIDA_TRY(refine(t));
out:
    return status;
}

static sida_status summarise(training *t, json_t **summary, double seconds) {
    sida_status status = SIDA_OK;
    sida_evaluation valid = {0};
    const sida_train_state *s = &t->state;
    SIDA_TRY(sida_evaluate(&valid, t->source, &t->valid, t->valid.top_k, NULL, NULL));
    json_t *root = json_object(), *loss = json_array();
    json_object_set_new(root, "output", json_string(t->options->output));
    json_object_set_new(root, "model", fingerprint_json(t->meta.model));
    json_object_set(root, "config", t->meta.config);
    json_object_set_new(root, "parameters", json_integer(s->net->parameter_count));
    json_object_set_new(root, "epochs", json_integer(s->epoch));
    json_object_set_new(root, "steps", json_integer(s->optimiser.step));
    json_object_set_new(root, "kept_epoch", json_integer(s->best_epoch));
    for (int32_t i = 0; i < s->epoch; i++)
        json_array_append_new(loss, json_real((double)s->curve[i * SIDA_CURVE_COLUMNS]));
    json_object_set_new(root, "loss", loss);
    json_object_set_new(root, "valid", sida_evaluation_to_json(&valid));
    if (t->refined) {
        json_object_set_new(t->refined, "seconds", json_real(t->refine_seconds));
        json_object_set(root, "refine", t->refined);
    }
    sida_memory_usage usage;
    sida_backend_memory(t->backend, &usage);
    json_object_set_new(root, "device", json_string(t->backend->table->name));
    json_object_set_new(root, "device_bytes_peak", json_integer((json_int_t)usage.peak_bytes));
    json_object_set_new(root, "seconds", json_real(seconds));
    json_object_set_new(root, "tokens_per_s",
                        json_real(seconds > t->refine_seconds
                                      ? (double)t->tokens / (seconds - t->refine_seconds)
                                      : 0));
    *summary = root;
out:
    sida_evaluation_free(&valid);
    return status;
}

sida_status sida_train(const sida_train_options *options, json_t **summary) {
    if (summary) *summary = NULL;
    sida_net_kind kind;
    if (options->source && !sida_net_kind_from_name(&kind, options->source))
        return sida_fit(options, summary);
    sida_status status = SIDA_OK;
    training t = {.options = options};
    SIDA_TRY(prepare(&t));
    SIDA_TRY(start(&t));
    double begin = sida_clock_seconds();
    SIDA_TRY(loop(&t));
    SIDA_TRY(finish(&t));
    double seconds = sida_clock_seconds() - begin;
    SIDA_TRY(sida_predictor_write(options->output, &t.meta, &t.state, t.refine));
    if (unlink(t.checkpoint) != 0 && errno != ENOENT)
        sida_log(SIDA_LOG_WARNING, "%s: %s", t.checkpoint, strerror(errno));
    if (summary) SIDA_TRY(summarise(&t, summary, seconds));
out:
    discard(&t);
    return status;
}
