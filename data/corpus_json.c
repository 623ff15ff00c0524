/* jsonl, multirc: one JSON object a line. */
#include "data/corpus_reader.h"

#include <string.h>

/* Reads the next line into corpus->object; NULL at the end. */
static sida_status next_object(sida_corpus *corpus) {
    char *line;
    size_t bytes;
    json_error_t error;
    json_decref(corpus->object);
    corpus->object = NULL;
    sida_status status = sida_lines_next(corpus->lines, &line, &bytes);
    if (status != SIDA_OK || !line) return status;
    json_t *object = json_loadb(line, bytes, JSON_REJECT_DUPLICATES, &error);
    if (!object)
        return sida_corpus_fail(corpus, "not JSON (column %d): %s", error.column, error.text);
    if (!json_is_object(object)) {
        json_decref(object);
        return sida_corpus_fail(corpus, "not a JSON object");
    }
    corpus->object = object;
    return SIDA_OK;
}

/* A member that must be text with something in it. */
static sida_status text_member(const sida_corpus *corpus, const char **out, const json_t *object,
                               const char *name) {
    *out = json_string_value(json_object_get(object, name));
    if (!*out || sida_corpus_is_blank(*out))
        return sida_corpus_fail(corpus, "\"%s\" is missing, empty or no text", name);
    return SIDA_OK;
}

/* An optional integer in [0, high]; -1 when it is absent or null. */
static sida_status label_member(const sida_corpus *corpus, int32_t *out, const json_t *object,
                                int32_t high) {
    const json_t *label = json_object_get(object, "label");
    json_int_t value = json_integer_value(label);
    *out = -1;
    if (!label || json_is_null(label)) return SIDA_OK;
    if (!json_is_integer(label) || value < 0 || value > high)
        return sida_corpus_fail(corpus, "\"label\" is not a whole number from 0 to %d", high);
    *out = (int32_t)value;
    return SIDA_OK;
}

sida_status sida_corpus_next_jsonl(sida_corpus *corpus, sida_record *record, bool *more) {
    sida_status status = SIDA_OK;
    SIDA_TRY(next_object(corpus));
    const json_t *object = corpus->object;
    if (!object) goto out;
    bool has_text = json_object_get(object, "text"), has_input = json_object_get(object, "input");
    if (has_text == has_input)
        return sida_corpus_fail(corpus, has_text ? "both \"text\" and \"input\""
                                                 : "neither \"text\" nor \"input\"");
    SIDA_TRY(text_member(corpus, &record->input, object, has_text ? "text" : "input"));
    const json_t *target = json_object_get(object, "target");
    if (target && !json_is_null(target))
        SIDA_TRY(text_member(corpus, &record->target, object, "target"));
    SIDA_TRY(label_member(corpus, &record->label, object, INT32_MAX));
    *more = true;
out:
    return status;
}

sida_status sida_corpus_next_multirc(sida_corpus *corpus, sida_record *record, bool *more) {
    sida_status status = SIDA_OK;
    const json_t *passage = NULL, *questions = NULL, *question = NULL, *answers = NULL, *answer;
    const char *paragraph, *question_text, *answer_text;
    for (;;) {
        if (!corpus->object) {
            corpus->question = corpus->answer = 0;
            SIDA_TRY(next_object(corpus));
            if (!corpus->object) goto out;
            questions = json_object_get(json_object_get(corpus->object, "passage"), "questions");
            if (json_array_size(questions) == 0)
                return sida_corpus_fail(corpus, "passage.questions is no array with a question");
        }
        passage = json_object_get(corpus->object, "passage");
        questions = json_object_get(passage, "questions");
        question = json_array_get(questions, corpus->question);
        if (!question) { /* the line is used up */
            json_decref(corpus->object);
            corpus->object = NULL;
            continue;
        }
        answers = json_object_get(question, "answers");
        if (json_array_size(answers) == 0)
            return sida_corpus_fail(corpus, "question %zu: \"answers\" is no array with an answer",
                                    corpus->question);
        answer = json_array_get(answers, corpus->answer);
        if (answer) break;
        corpus->question++;
        corpus->answer = 0;
    }
    corpus->answer++;
    SIDA_TRY(text_member(corpus, &paragraph, passage, "text"));
    SIDA_TRY(text_member(corpus, &question_text, question, "question"));
    /* SuperGLUE's own training set has an empty answer. */
    answer_text = json_string_value(json_object_get(answer, "text"));
    if (!answer_text) return sida_corpus_fail(corpus, "an answer without \"text\"");
    SIDA_TRY(label_member(corpus, &record->label, answer, 1));
    SIDA_TRY(sida_corpus_prompt(corpus, record, "multirc question: ", question_text,
                                " answer: ", answer_text, " paragraph: ", paragraph, NULL));
    if (record->label >= 0) record->target = sida_corpus_labels(corpus->format)[record->label];
    *more = true;
out:
    return status;
}
