/* What sida eval says of the sources that it measured: text, JSON, a line a sequence. */
#ifndef SIDA_TOOLS_CLI_EVAL_REPORT_H
#define SIDA_TOOLS_CLI_EVAL_REPORT_H

#include "trainer/evaluate_refined.h"

/* A source and its figures. The first row is what is measured, the others what it has to beat. */
typedef struct sida_eval_row {
    const char *name;
    sida_evaluation figures;
    sida_comparison better[3]; /* by how much the first row is better than this one */
} sida_eval_row;

/* Of a first row that refines: what its refinement has to beat on the layers behind. */
enum { SIDA_EVAL_RIVALS = 2 };
typedef struct sida_eval_refined {
    sida_refined figures; /* no scopes: there is none */
    sida_refined hidden;  /* of the untrained routers on the hidden state, as far as known */
    sida_refined_rival rivals[SIDA_EVAL_RIVALS];
    sida_comparison *better[SIDA_EVAL_RIVALS];
    int32_t rival_count;
} sida_eval_refined;
/* Finds by how much it beats these, which are borrowed. name: what JSON calls
 * them. */
sida_status sida_eval_add_rival(sida_eval_refined *refined, const char *name,
                                const sida_behind *figures);
void sida_eval_refined_free(sida_eval_refined *refined);

void sida_eval_print_text(const sida_eval_row *rows, int32_t count,
                          const sida_eval_refined *refined);
/* trace: its path. */
sida_status sida_eval_print_json(const sida_eval_row *rows, int32_t count,
                                 const sida_eval_refined *refined, const char *trace);
/* PATH appears complete or not at all: tab-separated, a header, then a line for each source,
 * sequence and side. The columns are sums over content tokens; rates are quotients of them. */
sida_status sida_eval_write_sequences(const sida_eval_row *rows, int32_t count, const char *path);

#endif
