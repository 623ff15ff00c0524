/* Inside data/: a corpus and the functions that turn one line into records. */
#ifndef SIDA_DATA_CORPUS_READER_H
#define SIDA_DATA_CORPUS_READER_H

#include "data/corpus.h"
#include "data/lines.h"

#include <jansson.h>

/* Strings of the longest prompt. */
enum { SIDA_CORPUS_PARTS = 6 };

typedef struct sida_text_buffer {
    char *text;
    size_t used, capacity;
    size_t ends[SIDA_CORPUS_PARTS]; /* of a prompt's parts */
    int32_t parts;
} sida_text_buffer;

struct sida_corpus {
    sida_corpus_format format;
    sida_lines *lines;
    sida_text_buffer prompt;
    json_t *object;          /* jsonl, multirc: the current line */
    size_t question, answer; /* multirc: the next one of the line */
    bool started;            /* a header was looked for */
};

/* A FORMAT error at the corpus' current line. */
sida_status sida_corpus_fail(const sida_corpus *corpus, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Makes the record's input of the given strings end to end, in turn a fixed one of the task and one
 * of the text; NULL ends the list. */
sida_status sida_corpus_prompt(sida_corpus *corpus, sida_record *record, const char *first, ...)
    __attribute__((sentinel));

/* True when `text` has no character but ASCII white space. */
bool sida_corpus_is_blank(const char *text);

/* One a format: fills `record` from the next line(s), or *more = false. */
typedef sida_status sida_corpus_next_fn(sida_corpus *corpus, sida_record *record, bool *more);
sida_corpus_next_fn sida_corpus_next_text, sida_corpus_next_tsv, sida_corpus_next_sst2,
    sida_corpus_next_mrpc, sida_corpus_next_jsonl, sida_corpus_next_multirc;

#endif
