/* The hash sources there are, and how to make them from what is in memory. */
#ifndef SIDA_RUNTIME_PREDICTOR_SOURCES_H
#define SIDA_RUNTIME_PREDICTOR_SOURCES_H

#include "runtime/predictor/hash_source.h"
#include "runtime/predictor/net.h"

/* Over a network in memory. net and embedding are borrowed; the network may change between
 * batches. */
sida_status sida_lstm_source_create(sida_hash_source **out, const sida_net *net,
                                    sida_weight embedding, sida_fingerprint model,
                                    sida_fingerprint tokenizer);
/* From an open P.h5 whose meta data has been read. */
sida_status sida_lstm_source_read(sida_hash_source **out, sida_h5_file *file,
                                  const sida_predictor_meta *meta, sida_weight embedding);

/* The token-id table: how often each id chose each expert, backed off to the layer's popularity.
 * score(id, layer, e) = count(id, layer, e) + 0.01 · share(layer, e): an id that was never seen
 * gets the popularity alone. */
typedef struct sida_table_shape {
    int32_t experts, vocabulary, d_model;
    int32_t layers[2];
} sida_table_shape;
/* ids: ascending, [id_count], copied. Tokens of other ids are not counted. */
sida_status sida_table_source_create(sida_hash_source **out, const sida_table_shape *shape,
                                     const int32_t *ids, int32_t id_count, sida_fingerprint model,
                                     sida_fingerprint tokenizer);
/* Counts tokens [count] of a side; chosen: [count, layers, stride], the first is the choice. */
void sida_table_source_add(sida_hash_source *source, int side, const int32_t *tokens,
                           const uint16_t *chosen, int32_t stride, int64_t count);
/* Call once after the last add: computes the popularity. */
void sida_table_source_finish(sida_hash_source *source);

#endif
