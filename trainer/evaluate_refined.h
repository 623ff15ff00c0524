/* How well the MoE layers behind a layer are predicted once that layer's true routing is known: a
 * source's refinement (sida_hash_refine(), fed what the trace's router chose) beside what the same
 * source said up front. Counted as in evaluate.h. */
#ifndef SIDA_TRAINER_EVALUATE_REFINED_H
#define SIDA_TRAINER_EVALUATE_REFINED_H

#include "trainer/evaluate.h"

/* The pairs and sets of the MoE layers behind layer `behind`, which is any but its side's last. */
typedef struct sida_refined_scope {
    int32_t behind;
    int32_t side; /* -1: both */
} sida_refined_scope;

/* One way to predict them. */
typedef struct sida_behind {
    sida_scores *scores;     /* [scopes] of content tokens */
    sida_scores *all_tokens; /* [scopes] */
    sida_sums *per_sequence; /* [sequences, columns] of content tokens */
} sida_behind;

typedef struct sida_refined {
    int32_t chosen; /* k of the model */
    int32_t sequences;
    int32_t scope_count;
    sida_refined_scope *scopes; /* by `behind`; of each both sides, encoder, decoder */
    int32_t columns;            /* a side and `behind` */
    uint8_t *members;           /* [scopes, columns] not 0: the scope has the column */
    sida_behind up_front, refined;
} sida_refined;
void sida_refined_free(sida_refined *refined);

/* For a source with info.refines. set_k, on_progress and errors as in sida_evaluate(). */
sida_status sida_evaluate_refined(
    sida_refined *out, const sida_hash_source *source, const sida_dataset *data, int32_t set_k,
    sida_status (*on_progress)(void *context, double fraction, int64_t tokens), void *context);

/* By how much the refinement is better than another way on the same data: out [scopes]. MEMORY. */
sida_status sida_refined_compare(sida_comparison *out, const sida_refined *ours,
                                 const sida_behind *theirs);

/* What the refinement has to beat. */
typedef struct sida_refined_rival {
    const char *name; /* "up_front" … */
    const sida_behind *figures;
    const sida_comparison *better; /* [scopes] by how much the refinement is better */
} sida_refined_rival;
/* [{"behind": 0, "overall": {"refined": {…}, NAME: {…}, "better_by": {NAME: {…}}, "all_tokens":
 * {"refined": {…}, NAME: {…}}}, "encoder": …, "decoder": …}, …]; a side without layers behind is
 * left out. */
json_t *sida_refined_to_json(const sida_refined *refined, const sida_refined_rival *rivals,
                             int32_t count);

#endif
