#include "data/corpus.h"

#include "data/corpus_reader.h"
#include "formats/base/memory.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const sst2_labels[] = {"negative", "positive"};
static const char *const mrpc_labels[] = {"not_equivalent", "equivalent"};
static const char *const multirc_labels[] = {"False", "True"};

static const struct {
    const char *name;
    sida_corpus_next_fn *next;
    sida_score_kind score;
    const char *const *labels;
} formats[] = {
    [SIDA_CORPUS_TEXT] = {"text", sida_corpus_next_text, SIDA_SCORE_NONE, NULL},
    [SIDA_CORPUS_JSONL] = {"jsonl", sida_corpus_next_jsonl, SIDA_SCORE_EXACT_MATCH, NULL},
    [SIDA_CORPUS_TSV] = {"tsv", sida_corpus_next_tsv, SIDA_SCORE_EXACT_MATCH, NULL},
    [SIDA_CORPUS_SST2] = {"sst2", sida_corpus_next_sst2, SIDA_SCORE_EXACT_MATCH, sst2_labels},
    [SIDA_CORPUS_MRPC] = {"mrpc", sida_corpus_next_mrpc, SIDA_SCORE_F1, mrpc_labels},
    [SIDA_CORPUS_MULTIRC] = {"multirc", sida_corpus_next_multirc, SIDA_SCORE_F1, multirc_labels},
    [SIDA_CORPUS_SPANS] = {"span-corruption", sida_corpus_next_text, SIDA_SCORE_NONE, NULL},
};
enum { FORMATS = sizeof formats / sizeof *formats };

bool sida_corpus_format_from_name(sida_corpus_format *out, const char *name) {
    for (int i = 0; i < FORMATS; i++)
        if (strcmp(formats[i].name, name) == 0) {
            *out = (sida_corpus_format)i;
            return true;
        }
    return false;
}

const char *sida_corpus_format_name(sida_corpus_format format) {
    return formats[format].name;
}

const char *sida_corpus_format_names(void) {
    return "text|jsonl|tsv|sst2|mrpc|multirc|span-corruption";
}

sida_score_kind sida_corpus_score_kind(sida_corpus_format format) {
    return formats[format].score;
}

const char *const *sida_corpus_labels(sida_corpus_format format) {
    return formats[format].labels;
}

sida_status sida_corpus_open(sida_corpus **out, sida_corpus_format format, const char *path) {
    sida_status status = SIDA_OK;
    sida_corpus *corpus = NULL;
    assert((unsigned)format < FORMATS);
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&corpus, 1, path));
    corpus->format = format;
    SIDA_TRY(sida_lines_open(&corpus->lines, path));
    *out = corpus;
    corpus = NULL;
out:
    sida_corpus_close(corpus);
    return status;
}

void sida_corpus_close(sida_corpus *corpus) {
    if (!corpus) return;
    json_decref(corpus->object);
    sida_lines_close(corpus->lines);
    free(corpus->prompt.text);
    free(corpus);
}

sida_status sida_corpus_next(sida_corpus *corpus, sida_record *record, bool *more) {
    *record = (sida_record){.label = -1};
    *more = false;
    sida_status status = formats[corpus->format].next(corpus, record, more);
    if (status != SIDA_OK) *more = false;
    if (*more) record->line = sida_lines_number(corpus->lines);
    return status;
}

sida_corpus_format sida_corpus_get_format(const sida_corpus *corpus) {
    return corpus->format;
}

const char *sida_corpus_path(const sida_corpus *corpus) {
    return sida_lines_path(corpus->lines);
}

void sida_corpus_progress(const sida_corpus *corpus, int64_t *done_bytes, int64_t *total_bytes) {
    sida_lines_progress(corpus->lines, done_bytes, total_bytes);
}

sida_status sida_corpus_fail(const sida_corpus *corpus, const char *format, ...) {
    char reason[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reason, sizeof reason, format, arguments);
    va_end(arguments);
    return sida_fail(SIDA_ERROR_FORMAT, "%s:%lld: %s", sida_lines_path(corpus->lines),
                     (long long)sida_lines_number(corpus->lines), reason);
}

sida_status sida_corpus_prompt(sida_corpus *corpus, sida_record *record, const char *first, ...) {
    sida_text_buffer *prompt = &corpus->prompt;
    sida_status status = SIDA_OK;
    va_list parts;
    va_start(parts, first);
    prompt->used = 0;
    prompt->parts = 0;
    for (const char *part = first; part && status == SIDA_OK; part = va_arg(parts, const char *)) {
        size_t bytes = strlen(part);
        status = SIDA_GROW(&prompt->text, &prompt->capacity, prompt->used + bytes + 1, "a prompt");
        if (status != SIDA_OK) break;
        memcpy(prompt->text + prompt->used, part, bytes + 1);
        prompt->used += bytes;
        assert(prompt->parts < SIDA_CORPUS_PARTS);
        prompt->ends[prompt->parts++] = prompt->used;
    }
    va_end(parts);
    record->input = prompt->text;
    record->ends = prompt->ends;
    record->parts = prompt->parts;
    return status;
}

bool sida_corpus_is_blank(const char *text) {
    return text[strspn(text, " \t\r\n\v\f")] == 0;
}
