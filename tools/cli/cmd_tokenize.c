/* sida tokenize: a line of ids for a line of text. */
#include "data/corpus.h"
#include "formats/base/file.h"
#include "formats/tokenizer.h"
#include "tools/cli/cli.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct options {
    const char *model, *input;
} options;

static const struct argp_option argp_options[] = {
    {"model", 'm', "DIR", 0, "Hugging Face directory with spiece.model", 0},
    {"input", 'i', "FILE", 0, "text, one input a line, plain or gzip", 0},
    {0}};

static error_t parse(int key, char *text, struct argp_state *state) {
    options *o = state->input;
    switch (key) {
    case 'm':
        o->model = text;
        return 0;
    case 'i':
        o->input = text;
        return 0;
    case ARGP_KEY_END:
        sida_cli_require(state, "--model", o->model);
        sida_cli_require(state, "--input", o->input);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static sida_status tokenize(const options *o) {
    char *path = NULL;
    sida_tokenizer *tokenizer = NULL;
    sida_corpus *corpus = NULL;
    int32_t *ids = NULL;
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_path_join(&path, o->model, "spiece.model"));
    SIDA_TRY(sida_tokenizer_open(&tokenizer, path));
    SIDA_TRY(sida_corpus_open(&corpus, SIDA_CORPUS_TEXT, o->input));
    for (;;) {
        sida_record record;
        bool more;
        SIDA_TRY(sida_corpus_next(corpus, &record, &more));
        if (!more) break;
        size_t count;
        SIDA_TRY(
            sida_tokenizer_encode(&ids, &count, tokenizer, record.input, strlen(record.input)));
        for (size_t i = 0; i < count; i++) printf(i ? " %d" : "%d", ids[i]);
        putchar('\n');
        free(ids);
        ids = NULL;
    }
    SIDA_TRY(sida_cli_flush());
out:
    free(ids);
    sida_corpus_close(corpus);
    sida_tokenizer_destroy(tokenizer);
    free(path);
    return status;
}

int sida_cmd_tokenize(int argc, char **argv) {
    options o = {0};
    const struct argp argp = {
        argp_options, parse, NULL, "Prints the token ids of each line, without the final </s>.",
        NULL,         NULL,  NULL};
    sida_cli_parse(&argp, argc, argv, &o);
    return sida_cli_report(tokenize(&o));
}
