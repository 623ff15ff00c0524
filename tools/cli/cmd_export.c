/* sida export: a trained predictor for other software. */
#include "runtime/predictor/export.h"
#include "tools/cli/cli.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct options {
    const char *predictor, *output;
} options;

enum { KEY_PREDICTOR = 'p', KEY_OUTPUT = 'o', KEY_FORMAT = 'f' };

static const struct argp_option argp_options[] = {
    {"predictor", KEY_PREDICTOR, "P.h5", 0, "predictor of `sida train`", 0},
    {"output", KEY_OUTPUT, "FILE", 0, "where it goes", 0},
    {"format", KEY_FORMAT, "FORMAT", 0, "safetensors (the only one, and the default)", 0},
    {0}};

static error_t parse(int key, char *text, struct argp_state *state) {
    options *o = state->input;
    switch (key) {
    case KEY_PREDICTOR:
        o->predictor = text;
        return 0;
    case KEY_OUTPUT:
        o->output = text;
        return 0;
    case KEY_FORMAT:
        if (strcmp(text, "safetensors") == 0) return 0;
        fprintf(stderr, "%s: --format '%.40s': expected safetensors (see %s --help)\n", state->name,
                text, state->name);
        exit(SIDA_EXIT_USAGE);
    case ARGP_KEY_END:
        sida_cli_require(state, "--predictor", o->predictor);
        sida_cli_require(state, "--output", o->output);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int sida_cmd_export(int argc, char **argv) {
    options o = {0};
    const struct argp argp = {argp_options,
                              parse,
                              NULL,
                              "Writes a trained network as safetensors, under PyTorch's names for "
                              "its tensors and with its "
                              "configuration in the file's meta data (formats/README.md); "
                              "tools/reference/sida_predictor.py loads it.",
                              NULL,
                              NULL,
                              NULL};
    sida_cli_parse(&argp, argc, argv, &o);
    return sida_cli_report(sida_predictor_export(o.output, o.predictor));
}
