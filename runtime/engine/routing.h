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

/* The sets A(layer, sequence) of guided routing for one batch at a time. On the decoder's side they
 * grow with the positions. */
typedef struct sida_router_sets {
    int32_t experts;
    int32_t layers[2], sequences;
    uint8_t *allowed[2]; /* [layers, sequences, experts] non-zero: in A */
    size_t capacity[2];
    /* Σ |A| / E over the finished (layer, sequence), and how many */
    double share_sum[2];
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
/* Counts the sets' sizes at the end of a batch. */
void sida_router_sets_end(sida_router_sets *sets);
void sida_router_sets_free(sida_router_sets *sets);

/* sida_moe_driver.choose of predicted routing: `table` holds a row for each token of the call.
 * Guided routing is sida_moe_driver.allow, which answers with the sets of the side. */
void sida_routing_predicted(const sida_hash_table *table, sida_moe_call *call, bool renormalise);

#endif
