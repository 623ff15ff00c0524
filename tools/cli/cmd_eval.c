/* sida eval: measures a hash function on a held-out trace. */
#include "runtime/predictor/sources.h"
#include "tools/cli/cli.h"
#include "tools/cli/router_baseline.h"
#include "trainer/evaluate.h"
#include "trainer/fit.h"

#include <stdio.h>

typedef struct options {
    const char *trace, *predictor, *baseline, *model;
    int32_t k; /* 0: the model's own */
    int64_t threads;
    bool json;
    sida_progress progress;
} options;

enum { KEY_TRACE = 256, KEY_PREDICTOR, KEY_BASELINE, KEY_MODEL, KEY_TOP_K, KEY_THREADS, KEY_JSON };

/* What the predictor has to beat. */
enum { TABLE, POPULAR, BIGRAM, ROUTER, BASELINES };
static const char *const baseline_names[BASELINES] = {"table", "popular", "bigram", "router"};

static const struct argp_option argp_options[] = {
    {"trace", KEY_TRACE, "FILE", 0, "held-out trace", 0},
    {"predictor", KEY_PREDICTOR, "FILE", 0,
     "predictor to measure, of any source; a trace: the oracle, which knows the routing of the "
     "same "
     "inputs",
     0},
    {"baseline-trace", KEY_BASELINE, "FILE", 0,
     "also measure what counting this (training) trace gives: the token-id table, the most popular "
     "experts, the table of (token before, token)",
     0},
    {"model", KEY_MODEL, "DIR", 0,
     "also measure the model's own routers, untrained, on the normed input embedding", 0},
    {"top-k", KEY_TOP_K, "K", 0,
     "experts predicted a token in set_recall and set_precision (the model's own k)", 0},
    {"threads", KEY_THREADS, "N", 0, "CPU threads", 0},
    {"json", KEY_JSON, NULL, 0, "print JSON", 0},
    {0}};

static error_t parse(int key, char *text, struct argp_state *state) {
    options *o = state->input;
    switch (key) {
    case KEY_TRACE:
        o->trace = text;
        return 0;
    case KEY_PREDICTOR:
        o->predictor = text;
        return 0;
    case KEY_BASELINE:
        o->baseline = text;
        return 0;
    case KEY_MODEL:
        o->model = text;
        return 0;
    case KEY_TOP_K:
        o->k = (int32_t)sida_cli_i64(state, "--top-k", text, 1, 65535);
        return 0;
    case KEY_THREADS:
        o->threads = sida_cli_i64(state, "--threads", text, 1, 1024);
        return 0;
    case KEY_JSON:
        o->json = true;
        return 0;
    case ARGP_KEY_END:
        sida_cli_require(state, "--trace", o->trace);
        sida_cli_require(state, "--predictor", o->predictor);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static sida_status on_progress(void *context, double fraction, int64_t tokens) {
    options *o = context;
    sida_progress_update(&o->progress, fraction, tokens, NULL);
    if (sida_cli_interrupted()) return sida_fail(SIDA_ERROR_CANCELLED, "stopped");
    return SIDA_OK;
}

static sida_status measure_counts(options *o, sida_evaluation out[BASELINES],
                                  const sida_dataset *data, int32_t k) {
    sida_status status = SIDA_OK;
    sida_dataset base = {0};
    sida_hash_source *source = NULL;
    SIDA_TRY(sida_dataset_load(&base, o->baseline, -1));
    SIDA_TRY(sida_dataset_check_pair(data, &base));
    for (int i = TABLE; i <= BIGRAM; i++) {
        SIDA_TRY(sida_fit_source(&source, baseline_names[i], 0, 0, &base));
        SIDA_TRY(sida_evaluate(&out[i], source, data, k, on_progress, o));
        sida_hash_source_destroy(source);
        source = NULL;
    }
out:
    sida_hash_source_destroy(source);
    sida_dataset_free(&base);
    return status;
}

static sida_status measure_router(options *o, sida_evaluation *out, const sida_dataset *data,
                                  int32_t k) {
    sida_status status = SIDA_OK;
    sida_hash_source *source = NULL;
    SIDA_TRY(sida_router_baseline(&source, o->model, data));
    SIDA_TRY(sida_evaluate(out, source, data, k, on_progress, o));
out:
    sida_hash_source_destroy(source);
    return status;
}

static void print_slots(const char *label, const sida_scores *s) {
    printf("%-18s %7.2f %7.2f %7.2f %9.2f %9.2f\n", label, s->slot_recall[0], s->slot_recall[1],
           s->exact_set, s->weight_recall[0], s->weight_recall[1]);
}

static void print_scores(const char *label, const sida_scores *s) {
    printf("%-18s %7.2f %7.2f %7.2f %9.2f %9.2f %9.2f %9.2f\n", label, s->hit[0], s->hit[1],
           s->hit[2], s->set_recall, s->set_precision, s->set_recall_equal, s->alpha_error);
}

static void print_rows(const sida_evaluation *e,
                       void (*print)(const char *label, const sida_scores *s)) {
    static const char *const sides[2] = {"encoder", "decoder"};
    char label[40];
    print("overall", &e->overall);
    for (int side = 0, at = 0; side < 2; side++) {
        if (e->layers[side] == 0) continue;
        print(sides[side], &e->sides[side]);
        for (int l = 0; l < e->layers[side]; l++) {
            snprintf(label, sizeof label, "  %s MoE %d", sides[side], l);
            print(label, &e->per_layer[at++]);
        }
    }
}

static void print_text(const char *name, const sida_evaluation *e) {
    char title[40];
    snprintf(title, sizeof title, "%s, %%", name);
    printf("%-18s %7s %7s %7s %9s %9s %9s %9s\n", title, "hit@1", "hit@3", "hit@5", "recall",
           "precision", "equal", "alpha err");
    print_rows(e, print_scores);
    if (e->chosen == 1) return;
    snprintf(title, sizeof title, "  its %d experts, %%", e->chosen);
    printf("%-18s %7s %7s %7s %9s %9s\n", title, "slot@k", "slot@2k", "exact", "weight@k",
           "weight@2k");
    print_rows(e, print_slots);
}

static sida_status print_json(const options *o, const char *source, const sida_evaluation *ours,
                              const sida_evaluation baselines[BASELINES], int32_t k) {
    json_t *root = sida_evaluation_to_json(ours), *others = json_object();
    for (int i = 0; i < BASELINES; i++)
        if (i == ROUTER ? o->model : o->baseline)
            json_object_set_new(others, baseline_names[i], sida_evaluation_to_json(&baselines[i]));
    json_object_set_new(root, "baselines", others);
    json_object_set_new(root, "source", json_string(source));
    json_object_set_new(root, "top_k", json_integer(k));
    return sida_cli_print_json(root);
}

static sida_status evaluate(options *o) {
    sida_status status = SIDA_OK;
    sida_dataset data = {0};
    sida_hash_source *source = NULL;
    sida_evaluation ours = {0}, baselines[BASELINES] = {{0}};
    SIDA_TRY(sida_dataset_load(&data, o->trace, -1));
    SIDA_TRY(
        sida_hash_source_open(&source, o->predictor, sida_dataset_embedding(&data), data.model));
    int32_t k = o->k > 0 ? o->k : data.top_k;
    SIDA_TRY(sida_evaluate(&ours, source, &data, k, on_progress, o));
    if (o->baseline) SIDA_TRY(measure_counts(o, baselines, &data, k));
    if (o->model) SIDA_TRY(measure_router(o, &baselines[ROUTER], &data, k));
    sida_progress_end(&o->progress);
    if (o->json) {
        SIDA_TRY(print_json(o, source->info.name, &ours, baselines, k));
    } else {
        print_text(source->info.name, &ours);
        for (int i = 0; i < BASELINES; i++)
            if (i == ROUTER ? o->model : o->baseline) print_text(baseline_names[i], &baselines[i]);
        SIDA_TRY(sida_cli_flush());
    }
out:
    sida_progress_end(&o->progress);
    sida_evaluation_free(&ours);
    for (int i = 0; i < BASELINES; i++) sida_evaluation_free(&baselines[i]);
    sida_hash_source_destroy(source);
    sida_dataset_free(&data);
    return status;
}

int sida_cmd_eval(int argc, char **argv) {
    options o = {0};
    const struct argp argp = {
        argp_options,
        parse,
        NULL,
        "Measures, in per cent, how well a predictor knows the experts of a trace it was not "
        "trained on. hit@k: the router's best is among the k predicted. recall and precision, "
        "over one sequence and layer: used experts that were predicted, predicted (loaded) "
        "experts that were used. equal: the recall where as many experts are loaded as the "
        "sequence used, the most probable ones over its tokens, so that all rows load the same "
        "number. alpha err: mean distance of the predicted factor of the router's best, in "
        "points. Where a model chooses k experts, also: slot@k, slot@2k: chosen ones among the k "
        "and 2 k predicted; exact: tokens whose k predicted are those chosen; weight@k: share of "
        "the applied factors that belongs to predicted experts. Padding is not in a trace; a "
        "token dropped for capacity counts in hit@k, as the router chose, and uses no expert in "
        "the sets.",
        NULL,
        NULL,
        NULL};
    sida_cli_parse(&argp, argc, argv, &o);
    sida_cli_set_threads(o.threads);
    sida_cli_catch_signals();
    o.progress = sida_progress_begin("eval", "tokens");
    return sida_cli_report(evaluate(&o));
}
