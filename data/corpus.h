/* Readers of corpora: one record after another, with the line it came from. Plain or gzip.
 *
 *   text     one input a line; no target
 *   tsv      "input<TAB>target" a line, or "input"; no header
 *   jsonl    an object a line: "text" or "input", optional "target", optional "label"
 *   sst2     header "sentence<TAB>label"; "sst2 sentence: …" -> negative | positive
 *   mrpc     MSR's file: Quality, #1 ID, #2 ID, #1 String, #2 String (BOM allowed, header skipped
 *            when the first field is "Quality"); "mrpc sentence1: … sentence2: …" ->
 *            not_equivalent | equivalent
 *   multirc  SuperGLUE's JSONL; "multirc question: … answer: … paragraph: …" -> False | True, one
 *            record an answer
 *   span-corruption
 *            text, out of which the batcher (batch.h) cuts spans: what is left -> what was cut out
 * A byte order mark in front of the first line and a "\r" at the end of a line are dropped in all
 * formats. Members of JSON objects that are not named here are ignored; "label" is a whole number
 * from 0 on (multirc: 0 or 1, absent in its test set).
 *
 * Errors name FILE:LINE: FORMAT for a malformed line, an empty or blank one (the newline that ends
 * the file makes no line), non-UTF-8 or NUL bytes, a line over 16 MiB; IO for a truncated or
 * damaged gzip. A file without records is no error: the first next() says that there are no more.
 */
#ifndef SIDA_DATA_CORPUS_H
#define SIDA_DATA_CORPUS_H

#include "formats/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum sida_corpus_format {
    SIDA_CORPUS_TEXT,
    SIDA_CORPUS_JSONL,
    SIDA_CORPUS_TSV,
    SIDA_CORPUS_SST2,
    SIDA_CORPUS_MRPC,
    SIDA_CORPUS_MULTIRC,
    SIDA_CORPUS_SPANS
} sida_corpus_format;

/* False when `name` is no format's. */
bool sida_corpus_format_from_name(sida_corpus_format *out, const char *name);
/* "text" … "span-corruption". */
const char *sida_corpus_format_name(sida_corpus_format format);
/* "text|jsonl|tsv|sst2|mrpc|multirc|span-corruption", for messages. */
const char *sida_corpus_format_names(void);

/* How a labelled format is scored. */
typedef enum sida_score_kind {
    SIDA_SCORE_NONE,        /* no targets (text), or none to be met word for word (spans) */
    SIDA_SCORE_EXACT_MATCH, /* share of answers equal to the target (sst2: accuracy; tsv, jsonl) */
    SIDA_SCORE_F1           /* F1 of the positive label (equivalent, True) */
} sida_score_kind;
sida_score_kind sida_corpus_score_kind(sida_corpus_format format);
/* Names of labels 0 and 1; NULL for formats without labels. */
const char *const *sida_corpus_labels(sida_corpus_format format);

typedef struct sida_record {
    const char *input;  /* UTF-8, the task's prompt included; borrowed until the next call */
    const size_t *ends; /* [parts] where the input's parts end, in bytes: in turn a fixed one of the
                         * task and one of the text */
    int32_t parts;      /* 0: all of the input is text */
    const char *target; /* NULL: none */
    int32_t label;      /* -1: none */
    int64_t line;       /* 1-based, in the file */
} sida_record;

typedef struct sida_corpus sida_corpus;
sida_status sida_corpus_open(sida_corpus **out, sida_corpus_format format, const char *path);
void sida_corpus_close(sida_corpus *corpus);
/* The next record; *more = false (and no record) at the end. */
sida_status sida_corpus_next(sida_corpus *corpus, sida_record *record, bool *more);
sida_corpus_format sida_corpus_get_format(const sida_corpus *corpus);
/* The file's path, for messages; borrowed. */
const char *sida_corpus_path(const sida_corpus *corpus);
/* Bytes of the (packed) file consumed so far, and in all: for progress bars. */
void sida_corpus_progress(const sida_corpus *corpus, int64_t *done_bytes, int64_t *total_bytes);

#endif
