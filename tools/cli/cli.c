#include "tools/cli/cli.h"

#include "formats/base/clock.h"
#include "formats/base/text.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

int sida_cli_report(sida_status status) {
    if (status == SIDA_OK) return SIDA_EXIT_OK;
    fprintf(stderr, "sida: %s\n", sida_last_message());
    return SIDA_EXIT_FAILURE;
}

/* argp prints a usage error and "Try …" itself, in two lines, and exits with
 * argp_err_exit_status; one line names the subcommand and the reason. */
static void usage_error(const struct argp_state *state, const char *reason) {
    fprintf(stderr, "%s: %s (see %s --help)\n", state->name, reason, state->name);
    exit(SIDA_EXIT_USAGE);
}

/* The parser of the command in hand: argp hands no closure to a wrapper. */
static argp_parser_t command_parser;

static error_t parse_quietly(int key, char *text, struct argp_state *state) {
    /* Without a stream argp leaves out its second line ("Try …") and returns the error; getopt's
     * own line, which names the option, stays. */
    if (key == ARGP_KEY_INIT) state->err_stream = NULL;
    return command_parser(key, text, state);
}

void sida_cli_parse(const struct argp *argp, int argc, char **argv, void *input) {
    struct argp quiet = *argp;
    int stray = argc;
    command_parser = argp->parser;
    quiet.parser = parse_quietly;
    error_t error = argp_parse(&quiet, argc, argv, 0, &stray, input);
    if (stray < argc) {
        fprintf(stderr, "%s: unexpected argument '%s' (see %s --help)\n", argv[0], argv[stray],
                argv[0]);
        exit(SIDA_EXIT_USAGE);
    }
    if (error) exit(SIDA_EXIT_USAGE);
}

int64_t sida_cli_i64(struct argp_state *state, const char *option, const char *text, int64_t low,
                     int64_t high) {
    int64_t value = 0;
    if (!sida_text_to_i64(&value, text, low, high)) {
        char reason[256];
        snprintf(reason, sizeof reason,
                 "%s '%.40s': expected a whole number from %" PRId64 " to %" PRId64, option, text,
                 low, high);
        usage_error(state, reason);
    }
    return value;
}

double sida_cli_f64(struct argp_state *state, const char *option, const char *text, double low,
                    double high) {
    double value = 0;
    if (!sida_text_to_f64(&value, text, low, high)) {
        char reason[256];
        snprintf(reason, sizeof reason, "%s '%.40s': expected a number from %g to %g", option, text,
                 low, high);
        usage_error(state, reason);
    }
    return value;
}

sida_corpus_format sida_cli_format(struct argp_state *state, const char *text) {
    sida_corpus_format format = SIDA_CORPUS_TEXT;
    if (!sida_corpus_format_from_name(&format, text)) {
        char reason[160];
        snprintf(reason, sizeof reason, "--format '%.40s': expected %s", text,
                 sida_corpus_format_names());
        usage_error(state, reason);
    }
    return format;
}

void sida_cli_require(struct argp_state *state, const char *option, const void *value) {
    if (value) return;
    char reason[128];
    snprintf(reason, sizeof reason, "%s is required", option);
    usage_error(state, reason);
}

void sida_cli_set_threads(int64_t threads) {
#ifdef _OPENMP
    if (threads > 0) omp_set_num_threads((int)threads);
#else
    (void)threads;
#endif
}

sida_status sida_cli_flush(void) {
    if (fflush(stdout) == 0 && !ferror(stdout)) return SIDA_OK;
    return sida_fail(SIDA_ERROR_IO, "standard output: %s", strerror(errno));
}

sida_status sida_cli_print_json(json_t *value) {
    int failed = json_dumpf(value, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(10));
    putchar('\n');
    json_decref(value);
    if (failed) return sida_fail(SIDA_ERROR_IO, "standard output: cannot print JSON");
    return sida_cli_flush();
}

sida_progress sida_progress_begin(const char *label, const char *unit) {
    return (sida_progress){label, unit, isatty(STDERR_FILENO) != 0, sida_clock_seconds(), 0};
}

/* 1234567 as "1,234,567". */
static void format_thousands(char *text, size_t size, int64_t value) {
    char digits[32];
    int length = snprintf(digits, sizeof digits, "%" PRId64, value);
    size_t used = 0;
    for (int i = 0; i < length && used + 2 < size; i++) {
        text[used++] = digits[i];
        int left = length - 1 - i;
        if (left > 0 && left % 3 == 0 && digits[i] != '-') text[used++] = ',';
    }
    text[used] = 0;
}

void sida_progress_update(sida_progress *progress, double fraction, int64_t units,
                          const char *note) {
    enum { bar_width = 24 };
    double now = sida_clock_seconds();
    if (!progress->on || now - progress->last < 0.1) return;
    progress->last = now;
    fraction = fmin(fmax(fraction, 0), 1);
    double seconds = now - progress->begin;
    int filled = (int)(fraction * bar_width);
    char bar[bar_width + 1], rate[40], left[32] = "";
    memset(bar, ' ', bar_width);
    memset(bar, '=', (size_t)filled);
    if (filled < bar_width) bar[filled] = '>';
    bar[bar_width] = 0;
    format_thousands(rate, sizeof rate, seconds > 0 ? (int64_t)((double)units / seconds) : 0);
    if (fraction > 0.001) {
        int64_t rest = (int64_t)(seconds * (1 - fraction) / fraction + 0.5);
        snprintf(left, sizeof left, "  %" PRId64 ":%02" PRId64 " left", rest / 60, rest % 60);
    }
    fprintf(stderr, "\r%-8s %3.0f%% [%s] %s %s/s%s  %s\033[K", progress->label, fraction * 100, bar,
            rate, progress->unit, left, note ? note : "");
    fflush(stderr);
}

void sida_progress_end(sida_progress *progress) {
    if (progress->on) fputs("\r\033[K", stderr);
    progress->on = false;
}

static volatile sig_atomic_t interrupted;

static void on_signal(int number) {
    (void)number;
    interrupted = 1;
}

void sida_cli_catch_signals(void) {
    /* The second Ctrl-C takes the default way out. */
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

bool sida_cli_interrupted(void) {
    return interrupted != 0;
}
