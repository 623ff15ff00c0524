/* What the subcommands share. A cmd_*.c file owns its options (glibc argp), prints results to
 * stdout and everything else to stderr, and returns the program's exit status. */
#ifndef SIDA_TOOLS_CLI_CLI_H
#define SIDA_TOOLS_CLI_CLI_H

#include "data/corpus.h"
#include "formats/base/status.h"

#include <argp.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

enum { SIDA_EXIT_OK = 0, SIDA_EXIT_FAILURE = 1, SIDA_EXIT_USAGE = 2 };

/* argv[0] is the subcommand's name, as "sida trace". */
typedef int sida_command_fn(int argc, char **argv);
sida_command_fn sida_cmd_tokenize, sida_cmd_generate, sida_cmd_trace, sida_cmd_train, sida_cmd_eval,
    sida_cmd_export, sida_cmd_run, sida_cmd_bench, sida_cmd_inspect, sida_cmd_doctor;

/* Prints "sida: MESSAGE" (the thread's last message) and returns SIDA_EXIT_FAILURE; prints nothing
 * and returns SIDA_EXIT_OK for SIDA_OK. */
int sida_cli_report(sida_status status);

/* argp_parse with our conventions: usage errors exit with SIDA_EXIT_USAGE and one line; an
 * argument that the parser leaves (ARGP_KEY_ARG not handled) is refused. */
void sida_cli_parse(const struct argp *argp, int argc, char **argv, void *input);

/* Option values; on anything else one line on stderr and SIDA_EXIT_USAGE. */
int64_t sida_cli_i64(struct argp_state *state, const char *option, const char *text, int64_t low,
                     int64_t high);
double sida_cli_f64(struct argp_state *state, const char *option, const char *text, double low,
                    double high);
/* The corpus format of that name. */
sida_corpus_format sida_cli_format(struct argp_state *state, const char *text);
/* Refuses a required option that is missing (value NULL). */
void sida_cli_require(struct argp_state *state, const char *option, const void *value);

/* Threads of every parallel loop from now on; 0 leaves OpenMP's choice. */
void sida_cli_set_threads(int64_t threads);

/* Prints a JSON value (indented, keys in the order of insertion) to stdout and takes it over. IO
 * when stdout does not take it. */
sida_status sida_cli_print_json(json_t *value);

/* IO unless all of stdout was written (a full disk shows here). Call before returning success. */
sida_status sida_cli_flush(void);

/* A progress bar on stderr when that is a terminal (redrawn at most ten times a second), nothing
 * otherwise: "trace  42% [=======>     ] 12,345 tokens/s  0:12 left". */
typedef struct sida_progress {
    const char *label, *unit;
    bool on;
    double begin, last;
} sida_progress;
sida_progress sida_progress_begin(const char *label, const char *unit);
/* fraction in [0, 1]; units done so far; note: NULL or a few words at the end. */
void sida_progress_update(sida_progress *progress, double fraction, int64_t units,
                          const char *note);
/* Clears the line. */
void sida_progress_end(sida_progress *progress);

/* SIGINT and SIGTERM set it: long loops look and stop with SIDA_ERROR_CANCELLED. */
bool sida_cli_interrupted(void);
void sida_cli_catch_signals(void);

#endif
