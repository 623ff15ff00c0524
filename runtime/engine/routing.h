/* Who decides which expert a token goes to: the router (exact), the router among the predicted
 * experts (guided), or the hash table (predicted). */
#ifndef SIDA_RUNTIME_ENGINE_ROUTING_H
#define SIDA_RUNTIME_ENGINE_ROUTING_H

#include "runtime/model/model.h"
#include "runtime/predictor/hash_source.h"

#include <stdbool.h>
#include <stdint.h>

typedef enum sida_routing {
    SIDA_ROUTING_EXACT,
    SIDA_ROUTING_GUIDED,
    SIDA_ROUTING_PREDICTED
} sida_routing;

bool sida_routing_from_name(sida_routing *out, const char *name);
const char *sida_routing_name(sida_routing routing);

/* The sets A(layer, sequence) of guided routing for one batch at a time: the union of what is
 * predicted for the sequence's tokens, on the decoder's side for the positions so far. With a limit
 * they are the experts of that union that are missed most: those with the largest Σα² over these
 * tokens, ties to the lower id. */
typedef struct sida_router_sets {
    int32_t most; /* the limit; 0: none. Set before the first begin */
    int32_t experts;
    int32_t layers[2], sequences;
    uint8_t *allowed[2]; /* [layers, sequences, experts] non-zero: in A */
    size_t capacity[2];
    float *weight[2]; /* [layers, sequences, experts] Σα²; with a limit only */
    size_t weight_capacity[2];
    /* Over the finished sequences: Σ |A| / E of each layer, and how many there were. */
    double *share_sum[2]; /* [layers] */
    size_t share_capacity[2];
    int64_t share_count[2];
} sida_router_sets;

/* A new batch: all sets are empty. */
sida_status sida_router_sets_begin(sida_router_sets *sets, const sida_model_info *info,
                                   int32_t sequences);
/* Adds the predictions of a call's tokens; on the encoder's side, each sequence's sets are then
 * complete. offsets [sequences + 1]. */
void sida_router_sets_add(sida_router_sets *sets, const sida_hash_table *table,
                          const int64_t *offsets);
/* A of one layer of a side and one sequence, [experts]. */
const uint8_t *sida_router_sets_at(const sida_router_sets *sets, int side, int32_t layer,
                                   int32_t sequence);
/* Which experts are in a set of a sequence that has tokens in a call, [experts]. */
void sida_router_sets_union(uint8_t *out, const sida_router_sets *sets, int side, int32_t layer,
                            const int64_t *offsets);
/* Counts the sets' sizes at the end of a batch. */
void sida_router_sets_end(sida_router_sets *sets);
void sida_router_sets_free(sida_router_sets *sets);

/* sida_moe_driver.choose of predicted routing: `table` holds a row for each token of the call.
 * Guided routing is sida_moe_driver.allow, which answers with the sets of the side. */
void sida_routing_predicted(const sida_hash_table *table, sida_moe_call *call, bool renormalise);

#endif
