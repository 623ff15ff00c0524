/* sida eval: measures a hash function on a held-out trace. */
#include "tools/cli/cli.h"
#include "trainer/evaluate.h"

#include <stdio.h>

typedef struct options {
    const char *trace, *predictor, *baseline;
    int32_t k; /* 0: the model's own */
    int64_t threads;
    bool json;
    sida_progress progress;
} options;

enum { KEY_TRACE = 256, KEY_PREDICTOR, KEY_BASELINE, KEY_TOP_K, KEY_THREADS, KEY_JSON };

static const struct argp_option argp_options[] = {
    {"trace", KEY_TRACE, "FILE", 0, "held-out trace", 0},
    {"predictor", KEY_PREDICTOR, "FILE", 0, "predictor to measure", 0},
    {"baseline-trace", KEY_BASELINE, "FILE", 0,
     "also measure the token-id table fitted on this (training) trace", 0},
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

static sida_status measure_table(options *o, sida_evaluation *out, const sida_dataset *data,
                                 int32_t k) {
    sida_status status = SIDA_OK;
    sida_dataset base = {0};
    sida_hash_source *table = NULL;
    SIDA_TRY(sida_dataset_load(&base, o->baseline, -1));
    SIDA_TRY(sida_dataset_check_pair(data, &base));
    SIDA_TRY(sida_baseline_table(&table, &base));
    SIDA_TRY(sida_evaluate(out, table, data, k, on_progress, o));
out:
    sida_hash_source_destroy(table);
    sida_dataset_free(&base);
    return status;
}

static void print_row(const char *name, int layer, const sida_scores *s) {
    char label[40];
    if (layer < 0)
        snprintf(label, sizeof label, "%s", name);
    else
        snprintf(label, sizeof label, "  %s MoE %d", name, layer);
    printf("%-18s %7.2f %7.2f %7.2f %9.2f %9.2f %9.2f\n", label, s->hit[0], s->hit[1], s->hit[2],
           s->set_recall, s->set_precision, s->alpha_error);
}

static void print_text(const char *title, const sida_evaluation *e) {
    static const char *const sides[2] = {"encoder", "decoder"};
    printf("%-18s %7s %7s %7s %9s %9s %9s\n", title, "hit@1", "hit@3", "hit@5", "recall",
           "precision", "alpha err");
    print_row("overall", -1, &e->overall);
    for (int side = 0, at = 0; side < 2; side++) {
        if (e->layers[side] == 0) continue;
        print_row(sides[side], -1, &e->sides[side]);
        for (int l = 0; l < e->layers[side]; l++) print_row(sides[side], l, &e->per_layer[at++]);
    }
}

static sida_status evaluate(options *o) {
    sida_status status = SIDA_OK;
    sida_dataset data = {0};
    sida_hash_source *source = NULL;
    sida_evaluation ours = {0}, table = {0};
    SIDA_TRY(sida_dataset_load(&data, o->trace, -1));
    SIDA_TRY(
        sida_hash_source_open(&source, o->predictor, sida_dataset_embedding(&data), data.model));
    int32_t k = o->k > 0 ? o->k : data.top_k;
    SIDA_TRY(sida_evaluate(&ours, source, &data, k, on_progress, o));
    if (o->baseline) SIDA_TRY(measure_table(o, &table, &data, k));
    sida_progress_end(&o->progress);
    if (o->json) {
        json_t *root = sida_evaluation_to_json(&ours), *baselines = json_object();
        if (o->baseline) json_object_set_new(baselines, "table", sida_evaluation_to_json(&table));
        json_object_set_new(root, "baselines", baselines);
        json_object_set_new(root, "top_k", json_integer(k));
        SIDA_TRY(sida_cli_print_json(root));
    } else {
        print_text("predictor, %", &ours);
        if (o->baseline) print_text("token table, %", &table);
        SIDA_TRY(sida_cli_flush());
    }
out:
    sida_progress_end(&o->progress);
    sida_evaluation_free(&ours);
    sida_evaluation_free(&table);
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
        "trained on. hit@k: the router's best is among the k predicted. recall and precision, over "
        "one sequence and layer: used experts that were predicted, predicted (loaded) experts that "
        "were used. alpha err: mean distance of the predicted factor, in points. Padding is not in "
        "a trace; a token dropped for capacity counts in hit@k, as the router chose, and uses no "
        "expert in the sets.",
        NULL,
        NULL,
        NULL};
    sida_cli_parse(&argp, argc, argv, &o);
    sida_cli_set_threads(o.threads);
    sida_cli_catch_signals();
    o.progress = sida_progress_begin("eval", "tokens");
    return sida_cli_report(evaluate(&o));
}
