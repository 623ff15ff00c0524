/* sida train: fits a hash function to a trace. */
#include "tools/cli/cli.h"
#include "tools/cli/plot.h"
#include "trainer/fit.h"
#include "trainer/train.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct options {
    sida_train_options train;
    sida_progress progress;
    int64_t threads;
    bool json, refining; /* refining: the second bar */
    const char *plot;    /* FILE.svg or NULL */
    /* An option that was given and is of the training by steps only; of one kind of network only.
     */
    const char *stepwise, *of_kind[2];
    const char *of_refinement; /* the same of an option of the refinement */
} options;

enum {
    KEY_TRACE = 256,
    KEY_VALID,
    KEY_OUTPUT,
    KEY_EPOCHS,
    KEY_LR,
    KEY_BATCH,
    KEY_LAMBDA,
    KEY_TOP,
    KEY_HIDDEN,
    KEY_SEED,
    KEY_RESUME,
    KEY_TKD,
    KEY_WEIGHT_DECAY,
    KEY_WARMUP,
    KEY_CLIP,
    KEY_SCHEDULE,
    KEY_THREADS,
    KEY_JSON,
    KEY_CHECKPOINT_EVERY,
    KEY_DEVICE,
    KEY_DEVICE_BATCH,
    KEY_FP32,
    KEY_SOURCE,
    KEY_HASH,
    KEY_LABELS,
    KEY_PATIENCE,
    KEY_LSTM_LAYERS,
    KEY_BLOCKS,
    KEY_BIDIRECTIONAL,
    KEY_ATTENTION,
    KEY_NO_CALIBRATE,
    KEY_NO_REFINE,
    KEY_REFINE_WIDTH,
    KEY_REFINE_EPOCHS,
    KEY_PLOT
};

static const struct argp_option argp_options[] = {
    {"trace", KEY_TRACE, "FILE", 0, "trace to learn from", 0},
    {"valid", KEY_VALID, "FILE", 0,
     "trace to measure on after each epoch; sources that are not trained need none", 0},
    {"output", KEY_OUTPUT, "FILE", 0, "where the predictor goes", 0},
    {"source", KEY_SOURCE, "NAME", 0,
     "hash function: " SIDA_TRAIN_SOURCE " (a small one; default), lstm (the paper's network); "
     "counted from the trace: table (by token id), bigram (by the token before, too), popular (by "
     "layer alone); layer-hash (a fixed hash of the token id, learnt from nothing)",
     0},
    {"hash", KEY_HASH, "KIND", 0,
     "of --source layer-hash: balanced (by the ids' frequency; default) or random", 0},
    {"seed", KEY_SEED, "N", 0, "same seed, same bytes (0)", 0},
    {0, 0, 0, 0, "The training of a network", 1},
    {"epochs", KEY_EPOCHS, "N", 0, "passes over the trace (30)", 1},
    {"lr", KEY_LR, "X", 0, "learning rate (0.01)", 1},
    {"batch", KEY_BATCH, "N", 0, "sequences a step (16)", 1},
    {"lambda", KEY_LAMBDA, "X", 0, "weight of the cross-entropy against the router's choice (0.5)",
     1},
    {"labels", KEY_LABELS, "KIND", 0,
     "what the cross-entropy is against where the model chooses k experts: even (each 1/k; the "
     "default), weight (by applied factor) or best (the first alone)",
     1},
    {"top", KEY_TOP, "T", 0, "experts of a token that are distilled (all in the trace)", 1},
    {"hidden", KEY_HIDDEN, "N", 0,
     "width of the predictor, a Transformer's a multiple of 32 (a third of d_model, rounded up to "
     "a multiple of 64)",
     1},
    {"blocks", KEY_BLOCKS, "N", 0, "blocks of a Transformer, 1 to 8 (3)", 1},
    {"lstm-layers", KEY_LSTM_LAYERS, "N", 0, "of --source lstm: layers, 1 to 4 (2)", 1},
    {"bidirectional", KEY_BIDIRECTIONAL, NULL, 0,
     "of --source lstm: run the encoder's in both directions, each half as wide", 1},
    {"attention", KEY_ATTENTION, "KIND", 0,
     "of --source lstm: sparsemax (default), softmax or none", 1},
    {"tkd", KEY_TKD, "KIND", 0,
     "distillation: a distance (kl, l1, mse) of the experts' shares, -top: normalised inside the "
     "top "
     "T, -all: over all, what is outside the top being one class. kl-all is also named rest (the "
     "default), l1-top l1-renorm (the paper's; its row is --tkd l1-renorm --lambda 0.005)",
     1},
    {"schedule", KEY_SCHEDULE, "KIND", 0, "learning rate: cosine (default) or constant", 1},
    {"warmup", KEY_WARMUP, "N", 0, "steps of rising learning rate (100)", 1},
    {"weight-decay", KEY_WEIGHT_DECAY, "X", 0, "AdamW's weight decay (0.01)", 1},
    {"clip", KEY_CLIP, "X", 0, "largest gradient norm, 0: no limit (1)", 1},
    {"patience", KEY_PATIENCE, "N", 0,
     "stop after N epochs on end that were no better on the validation trace (0: never)", 1},
    {"no-calibrate", KEY_NO_CALIBRATE, NULL, 0,
     "leave out the temperatures that fit the factors to the validation trace's", 1},
    {"no-refine", KEY_NO_REFINE, NULL, 0,
     "leave out the refinement, which predicts a token's next MoE layers again once the routing of "
     "earlier ones is known",
     1},
    {"refine-width", KEY_REFINE_WIDTH, "N", 0, "its width, 1 to 1024 (twice --hidden)", 1},
    {"refine-epochs", KEY_REFINE_EPOCHS, "N", 0, "passes over the trace to train it (8)", 1},
    {"resume", KEY_RESUME, NULL, 0,
     "continue from OUTPUT.checkpoint, to the same bytes; without one, start", 1},
    {"checkpoint-every", KEY_CHECKPOINT_EVERY, "N", 0,
     "steps between checkpoints (0: one after each epoch)", 1},
    {"plot", KEY_PLOT, "FILE.svg", 0,
     "draw the training curve and the hit rates of every layer (needs gnuplot)", 1},
    {0, 0, 0, 0, "What is used and printed", 2},
    {"device", KEY_DEVICE, "NAME", 0,
     "cpu, cuda, or auto (default): cuda where a GPU and cuDNN are present", 2},
    {"device-batch", KEY_DEVICE_BATCH, "N", 0,
     "sequences of a batch that the GPU computes at a time (0: as many as have 16,384 tokens)", 2},
    {"fp32", KEY_FP32, NULL, 0, "on the GPU, round no factor of a product to TF32", 2},
    {"threads", KEY_THREADS, "N", 0, "CPU threads; the result does not depend on it", 2},
    {"json", KEY_JSON, NULL, 0, "print a summary to standard output", 2},
    {0}};

static int32_t count(struct argp_state *state, const char *option, const char *text, int64_t low) {
    return (int32_t)sida_cli_i64(state, option, text, low, 1 << 30);
}

static _Noreturn void unknown(struct argp_state *state, const char *option, const char *text,
                              const char *expected) {
    fprintf(stderr, "%s: %s '%.40s': expected %s (see %s --help)\n", state->name, option, text,
            expected, state->name);
    exit(SIDA_EXIT_USAGE);
}

/* The index of `text` in a list of two names. */
static int choice(struct argp_state *state, const char *option, const char *text, const char *first,
                  const char *second) {
    if (strcmp(text, first) == 0) return 0;
    if (strcmp(text, second) == 0) return 1;
    fprintf(stderr, "%s: %s '%.40s': expected %s or %s (see %s --help)\n", state->name, option,
            text, first, second, state->name);
    exit(SIDA_EXIT_USAGE);
}

/* Options of group 1 mean nothing to sources that are not trained by steps, and some of them only
 * to one kind of network: said, not ignored. */
static void note_stepwise(options *o, int key) {
    for (const struct argp_option *option = argp_options; option->name || option->doc; option++)
        if (option->name && option->key == key && option->group == 1) o->stepwise = option->name;
    if (key == KEY_LSTM_LAYERS || key == KEY_BIDIRECTIONAL || key == KEY_ATTENTION)
        o->of_kind[SIDA_NET_LSTM] = o->stepwise;
    if (key == KEY_REFINE_WIDTH || key == KEY_REFINE_EPOCHS) o->of_refinement = o->stepwise;
    if (key == KEY_BLOCKS) o->of_kind[SIDA_NET_TRANSFORMER] = o->stepwise;
}

static void check_source(const options *o, struct argp_state *state) {
    const sida_train_options *t = &o->train;
    const char *source = t->source ? t->source : SIDA_TRAIN_SOURCE, *reason = NULL;
    sida_net_kind kind;
    if (sida_net_kind_from_name(&kind, source)) {
        sida_cli_require(state, "--valid", t->valid);
        const char *foreign = o->of_kind[!kind];
        if (o->of_refinement && !t->refine) {
            fprintf(stderr, "%s: --%s: of a refinement, beside --no-refine (see %s --help)\n",
                    state->name, o->of_refinement, state->name);
            exit(SIDA_EXIT_USAGE);
        }
        if (!foreign) return;
        if (t->source)
            fprintf(stderr, "%s: --%s: not an option of --source %s (see %s --help)\n", state->name,
                    foreign, source, state->name);
        else
            fprintf(stderr,
                    "%s: --%s: an option of another network; add --source %s (see %s --help)\n",
                    state->name, foreign, sida_net_kind_name(!kind), state->name);
        exit(SIDA_EXIT_USAGE);
    }
    if (strcmp(source, "oracle") == 0)
        reason = "needs no training: give the trace itself to sida eval or run as --predictor";
    else if (!sida_fit_known(source))
        reason = "unknown";
    if (reason) {
        fprintf(
            stderr,
            "%s: --source '%.40s': %s; expected transformer, lstm or one of %s (see %s --help)\n",
            state->name, source, reason, sida_fit_sources, state->name);
        exit(SIDA_EXIT_USAGE);
    }
    if (o->stepwise) {
        fprintf(stderr, "%s: --%s: nothing is trained by steps with --source %s (see %s --help)\n",
                state->name, o->stepwise, source, state->name);
        exit(SIDA_EXIT_USAGE);
    }
}

static error_t parse(int key, char *text, struct argp_state *state) {
    options *o = state->input;
    sida_train_options *t = &o->train;
    note_stepwise(o, key);
    switch (key) {
    case KEY_TRACE:
        t->trace = text;
        return 0;
    case KEY_VALID:
        t->valid = text;
        return 0;
    case KEY_OUTPUT:
        t->output = text;
        return 0;
    case KEY_EPOCHS:
        t->epochs = (int32_t)sida_cli_i64(state, "--epochs", text, 1, 100000);
        return 0;
    case KEY_LR:
        t->lr = sida_cli_f64(state, "--lr", text, 1e-12, 100);
        return 0;
    case KEY_BATCH:
        t->batch = count(state, "--batch", text, 1);
        return 0;
    case KEY_LAMBDA:
        t->lambda = sida_cli_f64(state, "--lambda", text, 0, 1e6);
        return 0;
    case KEY_TOP:
        t->top = (int32_t)sida_cli_i64(state, "--top", text, 1, 65535);
        return 0;
    case KEY_HIDDEN:
        t->hidden = (int32_t)sida_cli_i64(state, "--hidden", text, 1, 16384);
        return 0;
    case KEY_LSTM_LAYERS:
        t->lstm_layers = (int32_t)sida_cli_i64(state, "--lstm-layers", text, 1, SIDA_NET_LSTM_MAX);
        return 0;
    case KEY_BLOCKS:
        t->blocks = (int32_t)sida_cli_i64(state, "--blocks", text, 1, SIDA_NET_BLOCKS_MAX);
        return 0;
    case KEY_BIDIRECTIONAL:
        t->bidirectional = true;
        return 0;
    case KEY_ATTENTION:
        if (!sida_net_attention_from_name(&t->attention, text))
            unknown(state, "--attention", text, "sparsemax, softmax or none");
        return 0;
    case KEY_SEED:
        t->seed = sida_cli_i64(state, "--seed", text, 0, INT64_MAX);
        return 0;
    case KEY_RESUME:
        t->resume = true;
        return 0;
    case KEY_TKD:
        if (!sida_tkd_from_name(&t->tkd, text)) unknown(state, "--tkd", text, sida_tkd_names);
        return 0;
    case KEY_LABELS:
        if (!sida_labels_from_name(&t->labels, text))
            unknown(state, "--labels", text, "even, weight or best");
        return 0;
    case KEY_WEIGHT_DECAY:
        t->weight_decay = sida_cli_f64(state, "--weight-decay", text, 0, 100);
        return 0;
    case KEY_WARMUP:
        t->warmup = count(state, "--warmup", text, 0);
        return 0;
    case KEY_CLIP:
        t->clip = sida_cli_f64(state, "--clip", text, 0, 1e12);
        return 0;
    case KEY_PATIENCE:
        t->patience = count(state, "--patience", text, 0);
        return 0;
    case KEY_SCHEDULE:
        t->schedule = choice(state, "--schedule", text, "cosine", "constant")
                          ? SIDA_SCHEDULE_CONSTANT
                          : SIDA_SCHEDULE_COSINE;
        return 0;
    case KEY_NO_CALIBRATE:
        t->calibrate = false;
        return 0;
    case KEY_NO_REFINE:
        t->refine = false;
        return 0;
    case KEY_REFINE_WIDTH:
        t->refine_width =
            (int32_t)sida_cli_i64(state, "--refine-width", text, 1, SIDA_REFINE_WIDTH_MAX);
        return 0;
    case KEY_REFINE_EPOCHS:
        t->refine_epochs = (int32_t)sida_cli_i64(state, "--refine-epochs", text, 1, 100000);
        return 0;
    case KEY_THREADS:
        o->threads = sida_cli_i64(state, "--threads", text, 1, 1024);
        return 0;
    case KEY_JSON:
        o->json = true;
        return 0;
    case KEY_PLOT:
        o->plot = text;
        return 0;
    case KEY_CHECKPOINT_EVERY:
        t->checkpoint_every = count(state, "--checkpoint-every", text, 0);
        return 0;
    case KEY_DEVICE:
        t->device = text;
        return 0;
    case KEY_DEVICE_BATCH:
        t->device_batch = count(state, "--device-batch", text, 0);
        return 0;
    case KEY_FP32:
        t->fp32 = true;
        return 0;
    case KEY_SOURCE:
        t->source = text;
        return 0;
    case KEY_HASH:
        t->hash = choice(state, "--hash", text, "balanced", "random") ? SIDA_LAYER_HASH_RANDOM
                                                                      : SIDA_LAYER_HASH_BALANCED;
        return 0;
    case ARGP_KEY_END:
        sida_cli_require(state, "--trace", t->trace);
        sida_cli_require(state, "--output", t->output);
        check_source(o, state);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static sida_status on_step(void *context, double fraction, int64_t tokens) {
    options *o = context;
    sida_progress_update(&o->progress, fraction, tokens, NULL);
    if (sida_cli_interrupted()) return sida_fail(SIDA_ERROR_CANCELLED, "stopped");
    return SIDA_OK;
}

static void on_epoch(void *context, const sida_train_epoch *epoch) {
    options *o = context;
    const sida_scores *valid = &epoch->valid->overall;
    if (o->progress.on) fputs("\r\033[K", stderr);
    char slots[32] = "";
    if (epoch->valid->chosen > 1)
        snprintf(slots, sizeof slots, "  slot@k %.2f %%", valid->slot_recall[0]);
    fprintf(stderr, "epoch %d/%d  loss %.4f  valid hit@1 %.2f %%  hit@3 %.2f %%%s  %.1f s\n",
            epoch->epoch, epoch->epochs, epoch->loss, valid->hit[0], valid->hit[1], slots,
            epoch->seconds);
}

static sida_status on_refine_step(void *context, double fraction, int64_t tokens) {
    options *o = context;
    if (!o->refining) {
        o->refining = true;
        sida_progress_end(&o->progress);
        o->progress = sida_progress_begin("refine", "tokens");
    }
    return on_step(context, fraction, tokens);
}

static void on_refine_epoch(void *context, const sida_refine_epoch *epoch) {
    options *o = context;
    if (o->progress.on) fputs("\r\033[K", stderr);
    fprintf(stderr,
            "refinement %d/%d  loss %.4f  valid %s %.2f %% behind a known layer, up front %.2f %%  "
            "%.1f s\n",
            epoch->epoch, epoch->epochs, epoch->loss, epoch->chosen > 1 ? "slot@k" : "hit@1",
            epoch->hit, epoch->up_front, epoch->seconds);
}

int sida_cmd_train(int argc, char **argv) {
    options o = {.train = sida_train_defaults()};
    const struct argp argp = {
        argp_options,
        parse,
        NULL,
        "Makes a predictor of a model's experts from a trace of it. A network's OUTPUT holds the "
        "weights of the epoch with the best hit@1 (of a model that chooses k experts: slot@k) on "
        "the validation trace, the curve, the configuration, and a refinement of them. The "
        "defaults are those measured "
        "best on the sample model; figures are in trainer/README.md.",
        NULL,
        NULL,
        NULL};
    sida_cli_parse(&argp, argc, argv, &o);
    sida_cli_set_threads(o.threads);
    sida_cli_catch_signals();
    o.train.on_step = on_step;
    o.train.on_epoch = on_epoch;
    o.train.on_refine_step = on_refine_step;
    o.train.on_refine_epoch = on_refine_epoch;
    o.train.context = &o;
    o.progress = sida_progress_begin("train", "tokens");
    json_t *summary = NULL;
    sida_status status = o.plot ? sida_plot_check(o.plot) : SIDA_OK;
    if (status == SIDA_OK) status = sida_train(&o.train, o.json || o.plot ? &summary : NULL);
    sida_progress_end(&o.progress);
    if (status == SIDA_OK && o.plot)
        status = sida_plot_training(o.plot, o.train.output, json_object_get(summary, "valid"));
    if (status == SIDA_OK && o.json) status = sida_cli_print_json(json_incref(summary));
    json_decref(summary);
    return sida_cli_report(status);
}
