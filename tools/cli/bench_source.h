/* Predictions for a benchmark: the record of the routers' own choices, whole or with the mistakes
 * of a trained predictor. */
#ifndef SIDA_TOOLS_CLI_BENCH_SOURCE_H
#define SIDA_TOOLS_CLI_BENCH_SOURCE_H

#include "runtime/predictor/hash_source.h"
#include "tools/cli/bench_record.h"

/* Tables that hold the truth with these probabilities; with places = 0 they are the truth. */
typedef struct sida_bench_recall {
    int32_t places;    /* experts a token and layer: 0, 1 or more */
    double first, all; /* the chance that the true expert is in the first place, in any */
} sida_bench_recall;

/* Knows a batch by its ids. The record is borrowed and must be complete.
 *
 * With recall, for each token and layer by itself, from a fixed seed: the true expert is in the
 * first place with probability `first`, in one of the others, each as likely, with all - first, and
 * nowhere with the rest. The other places hold distinct experts drawn from those that the layer's
 * tokens chose, as often as they were. A trained predictor misses rare experts more often and the
 * same token in several layers; these tables do not. *measured (may be NULL): what became of the
 * probabilities. ARGUMENT: a model with more than one expert a token, or fewer experts than places.
 */
sida_status sida_bench_source_create(sida_hash_source **out, const sida_bench_record *record,
                                     const sida_bench_recall *recall, sida_bench_recall *measured);

#endif
