/* The `sida` program: finds the subcommand and hands over. */
#include "formats/base/log.h"
#include "tools/cli/cli.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct {
    const char *name;
    sida_command_fn *function;
    const char *description;
} commands[] = {
    {"trace", sida_cmd_trace, "run the full model over a corpus and record its routers"},
    {"train", sida_cmd_train, "fit a hash function to a trace"},
    {"eval", sida_cmd_eval, "measure a hash function on a held-out trace"},
    {"export", sida_cmd_export, "write a trained predictor for other software"},
    {"run", sida_cmd_run, "run a model under a memory budget, experts moved ahead of use"},
    {"generate", sida_cmd_generate, "print the full model's greedy answers"},
    {"tokenize", sida_cmd_tokenize, "print token ids"},
    {"inspect", sida_cmd_inspect, "say what is in a trace, a part, a predictor or a model"},
    {"bench", sida_cmd_bench,
     "time a model, synthetic ones too, beside what memory and link allow"},
    {"doctor", sida_cmd_doctor, "say what this machine has, and measure its link"},
};
enum { command_count = sizeof commands / sizeof *commands };

static void print_help(FILE *to) {
    fputs("Usage: sida COMMAND [OPTION...]\n"
          "Serve Mixture-of-Experts models on devices too small to hold them.\n\n",
          to);
    for (int i = 0; i < command_count; i++)
        fprintf(to, "  %-10s %s\n", commands[i].name, commands[i].description);
    fputs("\n`sida COMMAND --help` lists a command's options.\n", to);
}

static void log_to_stderr(void *context, sida_log_level level, const char *line) {
    (void)context;
    if (level >= SIDA_LOG_INFO)
        fprintf(stderr, "sida: %s%s\n", level == SIDA_LOG_WARNING ? "warning: " : "", line);
}

/* libgomp's threads spin for milliseconds at the end of every parallel loop. Ours last microseconds
 * and share the machine with other threads, so the spinning can take a hundred times longer than
 * the work. libgomp reads its settings when it is loaded: set them and start again, once. */
static void limit_spinning(char **argv) {
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
    if (setenv("GOMP_SPINCOUNT", "1000", 1) == 0) execv("/proc/self/exe", argv);
    /* Where that fails, the program is slower, not wrong. */
}

int main(int argc, char **argv) {
    limit_spinning(argv);
    /* A closed pipe or a file-size limit is an error of write(), reported like a full disk. */
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    sida_log_set_sink(log_to_stderr, NULL);
    if (argc < 2) {
        print_help(stderr);
        return SIDA_EXIT_USAGE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "help") == 0) {
        print_help(stdout);
        return SIDA_EXIT_OK;
    }
    if (strcmp(argv[1], "--version") == 0) {
        puts("sida " SIDA_VERSION);
        return SIDA_EXIT_OK;
    }
    for (int i = 0; i < command_count; i++)
        if (strcmp(argv[1], commands[i].name) == 0) {
            char name[64];
            snprintf(name, sizeof name, "sida %s", commands[i].name);
            argv[1] = name;
            return commands[i].function(argc - 1, argv + 1);
        }
    fprintf(stderr, "sida: unknown command '%s' (see sida --help)\n", argv[1]);
    return SIDA_EXIT_USAGE;
}
