/* text, tsv, sst2, mrpc: fields of a line between tabs. */
#include "data/corpus_reader.h"

#include <string.h>

/* Cuts `line` at its tabs; the number of fields, at most `limit` + 1. */
static int split_tabs(char *line, char **fields, int limit) {
    int count = 0;
    for (char *rest = line; rest; count++) {
        char *field = rest;
        rest = strchr(rest, '\t');
        if (count == limit) return limit + 1;
        if (rest) *rest++ = 0;
        fields[count] = field;
    }
    return count;
}

/* "0" or "1". */
static sida_status read_label(const sida_corpus *corpus, int32_t *label, const char *text) {
    if (strcmp(text, "0") != 0 && strcmp(text, "1") != 0)
        return sida_corpus_fail(corpus, "the label \"%.40s\" is neither 0 nor 1", text);
    *label = text[0] - '0';
    return SIDA_OK;
}

static sida_status labelled(const sida_corpus *corpus, sida_record *record, int32_t label,
                            bool *more) {
    record->label = label;
    record->target = sida_corpus_labels(corpus->format)[label];
    *more = true;
    return SIDA_OK;
}

sida_status sida_corpus_next_text(sida_corpus *corpus, sida_record *record, bool *more) {
    char *line;
    size_t bytes;
    sida_status status = sida_lines_next(corpus->lines, &line, &bytes);
    if (status != SIDA_OK || !line) return status;
    if (sida_corpus_is_blank(line)) return sida_corpus_fail(corpus, "a blank line");
    record->input = line;
    *more = true;
    return SIDA_OK;
}

sida_status sida_corpus_next_tsv(sida_corpus *corpus, sida_record *record, bool *more) {
    char *line, *fields[2];
    size_t bytes;
    sida_status status = sida_lines_next(corpus->lines, &line, &bytes);
    if (status != SIDA_OK || !line) return status;
    int count = split_tabs(line, fields, 2);
    if (count > 2)
        return sida_corpus_fail(corpus, "more than two fields; expected input<TAB>target");
    for (int i = 0; i < count; i++)
        if (sida_corpus_is_blank(fields[i]))
            return sida_corpus_fail(corpus, "the %s is empty", i == 0 ? "input" : "target");
    record->input = fields[0];
    record->target = count == 2 ? fields[1] : NULL;
    *more = true;
    return SIDA_OK;
}

sida_status sida_corpus_next_sst2(sida_corpus *corpus, sida_record *record, bool *more) {
    char *line, *fields[2];
    size_t bytes;
    int32_t label = 0;
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_lines_next(corpus->lines, &line, &bytes));
    if (!corpus->started) {
        if (!line || strcmp(line, "sentence\tlabel") != 0)
            return line ? sida_corpus_fail(corpus, "the first line is not sentence<TAB>label")
                        : sida_fail(SIDA_ERROR_FORMAT, "%s:1: no header sentence<TAB>label",
                                    sida_lines_path(corpus->lines));
        corpus->started = true;
        SIDA_TRY(sida_lines_next(corpus->lines, &line, &bytes));
    }
    if (!line) goto out;
    if (split_tabs(line, fields, 2) != 2)
        return sida_corpus_fail(corpus, "not two fields; expected sentence<TAB>label");
    if (sida_corpus_is_blank(fields[0])) return sida_corpus_fail(corpus, "the sentence is empty");
    SIDA_TRY(read_label(corpus, &label, fields[1]));
    SIDA_TRY(sida_corpus_prompt(corpus, record, "sst2 sentence: ", fields[0], NULL));
    status = labelled(corpus, record, label, more);
out:
    return status;
}

sida_status sida_corpus_next_mrpc(sida_corpus *corpus, sida_record *record, bool *more) {
    char *line, *fields[5];
    size_t bytes;
    int32_t label = 0;
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_lines_next(corpus->lines, &line, &bytes));
    if (!corpus->started && line && strncmp(line, "Quality\t", 8) == 0)
        SIDA_TRY(sida_lines_next(corpus->lines, &line, &bytes));
    corpus->started = true;
    if (!line) goto out;
    if (split_tabs(line, fields, 5) != 5)
        return sida_corpus_fail(corpus, "not five fields; expected Quality, two ids, two strings");
    if (sida_corpus_is_blank(fields[3]) || sida_corpus_is_blank(fields[4]))
        return sida_corpus_fail(corpus, "a sentence is empty");
    SIDA_TRY(read_label(corpus, &label, fields[0]));
    SIDA_TRY(sida_corpus_prompt(corpus, record, "mrpc sentence1: ", fields[3],
                                " sentence2: ", fields[4], NULL));
    status = labelled(corpus, record, label, more);
out:
    return status;
}
