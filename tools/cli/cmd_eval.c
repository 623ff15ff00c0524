/* sida eval: measures a hash function on a held-out trace. */
#include "formats/base/file.h"
#include "formats/base/memory.h"
#include "runtime/predictor/sources.h"
#include "tools/cli/cli.h"
#include "tools/cli/eval_report.h"
#include "tools/cli/hidden_baseline.h"
#include "tools/cli/plot.h"
#include "tools/cli/router_baseline.h"
#include "trainer/fit.h"

#include <stdio.h>
#include <stdlib.h>

/* Counted from --baseline-trace. */
static const char *const counted[] = {"table", "popular", "bigram"};
enum { COUNTED = sizeof counted / sizeof *counted, MOST_BASELINES = 32 };

typedef struct options {
    const char *trace, *predictor, *counts, *model, *device, *sequences, *plot;
    const char *baselines[MOST_BASELINES]; /* predictors */
    int32_t baseline_count;
    int32_t k; /* 0: the model's own */
    int64_t threads;
    bool json;
    sida_progress progress;
    sida_eval_row rows[1 + COUNTED + 1 + MOST_BASELINES];
    int32_t row_count;
    sida_eval_refined refined;
} options;

enum {
    KEY_TRACE = 256,
    KEY_PREDICTOR,
    KEY_BASELINE,
    KEY_BASELINE_TRACE,
    KEY_MODEL,
    KEY_DEVICE,
    KEY_TOP_K,
    KEY_SEQUENCES,
    KEY_PLOT,
    KEY_THREADS,
    KEY_JSON
};

static const struct argp_option argp_options[] = {
    {"trace", KEY_TRACE, "FILE", 0, "held-out trace", 0},
    {"predictor", KEY_PREDICTOR, "FILE", 0,
     "predictor to measure, of any source; a trace: the oracle, which knows the routing of the "
     "same "
     "inputs",
     0},
    {"baseline", KEY_BASELINE, "FILE", 0,
     "also measure this predictor, and by how much the first is better; may be repeated", 0},
    {"baseline-trace", KEY_BASELINE_TRACE, "FILE", 0,
     "also measure what counting this (training) trace gives: the token-id table, the most popular "
     "experts, the table of (token before, token)",
     0},
    {"model", KEY_MODEL, "DIR", 0,
     "also measure the model's own routers, untrained, on the normed input embedding; beside a "
     "refinement also on the hidden state, for which the model runs over the trace",
     0},
    {"device", KEY_DEVICE, "NAME", 0,
     "where the model runs: cpu, cuda, or auto (default): cuda where a GPU is present", 0},
    {"top-k", KEY_TOP_K, "K", 0,
     "experts predicted a token in set_recall and set_precision (the model's own k)", 0},
    {"per-sequence", KEY_SEQUENCES, "FILE.tsv", 0,
     "write the sums of each source, sequence and side to a table", 0},
    {"plot", KEY_PLOT, "FILE.svg", 0, "draw the hit rates of every layer (needs gnuplot)", 0},
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
        if (o->baseline_count == MOST_BASELINES) {
            fprintf(stderr, "%s: --baseline is given more than %d times (see %s --help)\n",
                    state->name, MOST_BASELINES, state->name);
            exit(SIDA_EXIT_USAGE);
        }
        o->baselines[o->baseline_count++] = text;
        return 0;
    case KEY_BASELINE_TRACE:
        o->counts = text;
        return 0;
    case KEY_SEQUENCES:
        o->sequences = text;
        return 0;
    case KEY_PLOT:
        o->plot = text;
        return 0;
    case KEY_MODEL:
        o->model = text;
        return 0;
    case KEY_DEVICE:
        o->device = text;
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

/* Measures a source as the next row. */
static sida_status measure(options *o, const char *name, const sida_hash_source *source,
                           const sida_dataset *data) {
    sida_status status = SIDA_OK;
    sida_eval_row *row = &o->rows[o->row_count];
    row->name = name;
    SIDA_TRY(
        sida_evaluate(&row->figures, source, data, o->k > 0 ? o->k : data->top_k, on_progress, o));
    o->row_count++;
    if (o->row_count > 1)
        SIDA_TRY(sida_evaluation_compare(row->better, &o->rows[0].figures, &row->figures));
out:
    return status;
}

static sida_status refine(options *o, sida_refined *out, const sida_hash_source *source,
                          const sida_dataset *data) {
    return sida_evaluate_refined(out, source, data, o->k > 0 ? o->k : data->top_k, on_progress, o);
}

/* name: NULL, its kind. */
static sida_status measure_predictor(options *o, const char *path, const char *name,
                                     const sida_dataset *data) {
    sida_status status = SIDA_OK;
    sida_hash_source *source = NULL;
    SIDA_TRY(sida_hash_source_open(&source, path, sida_dataset_embedding(data), data->model));
    SIDA_TRY(measure(o, name ? name : source->info.name, source, data));
    if (name || !source->info.refines) goto out;
    SIDA_TRY(refine(o, &o->refined.figures, source, data));
    SIDA_TRY(sida_eval_add_rival(&o->refined, "up_front", &o->refined.figures.up_front));
out:
    sida_hash_source_destroy(source);
    return status;
}

static sida_status measure_counts(options *o, const sida_dataset *data) {
    sida_status status = SIDA_OK;
    sida_dataset base = {0};
    sida_hash_source *source = NULL;
    SIDA_TRY(sida_dataset_load(&base, o->counts, -1));
    SIDA_TRY(sida_dataset_check_pair(data, &base));
    for (int i = 0; i < COUNTED; i++) {
        SIDA_TRY(sida_fit_source(&source, counted[i], 0, 0, &base));
        SIDA_TRY(measure(o, counted[i], source, data));
        sida_hash_source_destroy(source);
        source = NULL;
    }
out:
    sida_hash_source_destroy(source);
    sida_dataset_free(&base);
    return status;
}

static sida_status measure_router(options *o, const sida_dataset *data) {
    sida_status status = SIDA_OK;
    sida_hash_source *source = NULL;
    SIDA_TRY(sida_router_baseline(&source, o->model, data));
    SIDA_TRY(measure(o, "router", source, data));
out:
    sida_hash_source_destroy(source);
    return status;
}

/* A model that is too large to run here is left out. */
static sida_status measure_hidden(options *o, const sida_dataset *data) {
    sida_status status = SIDA_OK;
    sida_hash_source *source = NULL;
    status = sida_hidden_baseline(&source, o->model, o->device, data);
    if (status == SIDA_ERROR_MEMORY || status == SIDA_ERROR_BUDGET) {
        sida_progress_end(&o->progress);
        fprintf(stderr, "sida: the hidden state is left out: %s\n", sida_last_message());
        return SIDA_OK;
    }
    SIDA_TRY(status);
    SIDA_TRY(refine(o, &o->refined.hidden, source, data));
    SIDA_TRY(sida_hidden_baseline_check(source, o->model));
    SIDA_TRY(sida_eval_add_rival(&o->refined, "hidden_state", &o->refined.hidden.refined));
out:
    sida_hash_source_destroy(source);
    return status;
}

static sida_status draw(const options *o) {
    sida_status status = SIDA_OK;
    const char **names = NULL;
    json_t **figures = NULL;
    SIDA_TRY(SIDA_ALLOC(&names, o->row_count, "a picture"));
    SIDA_TRY(SIDA_ALLOC(&figures, o->row_count, "a picture"));
    for (int32_t r = 0; r < o->row_count; r++) {
        names[r] = o->rows[r].name;
        figures[r] = sida_evaluation_to_json(&o->rows[r].figures);
    }
    SIDA_TRY(sida_plot_layers(o->plot, names, figures, o->row_count));
out:
    for (int32_t r = 0; figures && r < o->row_count; r++) json_decref(figures[r]);
    free(names);
    free(figures);
    return status;
}

static sida_status evaluate(options *o) {
    sida_status status = SIDA_OK;
    sida_dataset data = {0};
    if (o->plot) SIDA_TRY(sida_plot_check(o->plot));
    if (o->sequences) SIDA_TRY(sida_file_check_writable(o->sequences));
    SIDA_TRY(sida_dataset_load(&data, o->trace, SIDA_DATASET_MARGINS));
    SIDA_TRY(measure_predictor(o, o->predictor, NULL, &data));
    if (o->counts) SIDA_TRY(measure_counts(o, &data));
    if (o->model) SIDA_TRY(measure_router(o, &data));
    if (o->model && o->refined.figures.scope_count > 0) SIDA_TRY(measure_hidden(o, &data));
    for (int32_t i = 0; i < o->baseline_count; i++)
        SIDA_TRY(measure_predictor(o, o->baselines[i], o->baselines[i], &data));
    sida_progress_end(&o->progress);
    if (o->sequences) SIDA_TRY(sida_eval_write_sequences(o->rows, o->row_count, o->sequences));
    if (o->plot) SIDA_TRY(draw(o));
    if (o->json) {
        SIDA_TRY(sida_eval_print_json(o->rows, o->row_count, &o->refined, o->trace));
    } else {
        sida_eval_print_text(o->rows, o->row_count, &o->refined);
        SIDA_TRY(sida_cli_flush());
    }
out:
    sida_progress_end(&o->progress);
    for (int32_t r = 0; r < o->row_count; r++) sida_evaluation_free(&o->rows[r].figures);
    sida_eval_refined_free(&o->refined);
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
        "trained on. The figures are of content tokens: not of a task's fixed words, sentinels, "
        "</s> and the token that starts the decoder; those of all tokens stand beside. hit@k: the "
        "router's best is among the k predicted. recall and precision, "
        "over one sequence and layer: used experts that were predicted, predicted (loaded) "
        "experts that were used. equal: the recall where as many experts are loaded as the "
        "sequence used, the most probable ones over its tokens, so that all rows load the same "
        "number. alpha err: mean distance of the predicted factor of the router's best, in "
        "points, and of a constant, the layer's mean. Better by: mean difference and its 95 % "
        "interval, paired over sequences by bootstrap. Where a model chooses k experts, also: "
        "slot@k, slot@2k: chosen ones among the k "
        "and 2 k predicted; exact: tokens whose k predicted are those chosen; weight@k: share of "
        "the applied factors that belongs to predicted experts. Padding is not in a trace; a "
        "token dropped for capacity counts in hit@k, as the router chose, uses no expert in the "
        "sets and has no alpha. Of a predictor that refines, behind MoE l: the layers behind it, "
        "with what the trace chose up to l known; up front, without; hidden state (--model): the "
        "model's own routers of these layers on what it had behind l.",
        NULL,
        NULL,
        NULL};
    sida_cli_parse(&argp, argc, argv, &o);
    sida_cli_set_threads(o.threads);
    sida_cli_catch_signals();
    o.progress = sida_progress_begin("eval", "tokens");
    return sida_cli_report(evaluate(&o));
}
