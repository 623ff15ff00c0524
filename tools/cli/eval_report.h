/* What sida eval says of the sources that it measured: text, JSON, a line a sequence. */
#ifndef SIDA_TOOLS_CLI_EVAL_REPORT_H
#define SIDA_TOOLS_CLI_EVAL_REPORT_H

#include "trainer/evaluate.h"

/* A source and its figures. The first row is what is measured, the others what it has to beat. */
typedef struct sida_eval_row {
    const char *name;
    sida_evaluation figures;
    sida_comparison better[3]; /* by how much the first row is better than this one */
} sida_eval_row;

void sida_eval_print_text(const sida_eval_row *rows, int32_t count);
/* trace: its path. */
sida_status sida_eval_print_json(const sida_eval_row *rows, int32_t count, const char *trace);
/* PATH appears complete or not at all: tab-separated, a header, then a line for each source,
 * sequence and side. The columns are sums over content tokens; rates are quotients of them. */
sida_status sida_eval_write_sequences(const sida_eval_row *rows, int32_t count, const char *path);

#endif
