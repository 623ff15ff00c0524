/* The hash sources there are, and how to make them from what is in memory. */
#ifndef SIDA_RUNTIME_PREDICTOR_SOURCES_H
#define SIDA_RUNTIME_PREDICTOR_SOURCES_H

#include "runtime/predictor/hash_source.h"
#include "runtime/predictor/net.h"
#include "runtime/predictor/refine.h"

/* --- lstm: the paper's network; transformer: ours */

/* Over a network in memory. net and embedding are borrowed; the network may change between
 * batches. */
sida_status sida_lstm_source_create(sida_hash_source **out, const sida_net *net,
                                    sida_weight embedding, sida_fingerprint model,
                                    sida_fingerprint tokenizer);
/* Gives such a source a refinement of its network, borrowed, once, before it is placed. The
 * refinement's values may change between batches. */
void sida_lstm_source_refine(sida_hash_source *source, const sida_refine *refine);
/* From an open P.h5 whose meta data has been read; with its refinement, if it has one. */
sida_status sida_lstm_source_read(sida_hash_source **out, sida_h5_file *file,
                                  const sida_predictor_meta *meta, sida_weight embedding);

/* --- what the sources below learn from: the routing of a trace */

typedef struct sida_source_shape {
    int32_t experts, vocabulary, d_model;
    int32_t layers[2];
} sida_source_shape;

/* Borrowed. Sequences end to end on each side; top_k chosen experts a token and layer, best first,
 * and the factors that the model applied. Ids are below the vocabulary, experts below E. */
typedef struct sida_routed {
    sida_source_shape shape;
    sida_fingerprint model, tokenizer;
    int32_t top_k;
    sida_ragged tokens[2];      /* n tokens each */
    const uint16_t *experts[2]; /* [n, layers, top_k] */
    const float *alpha[2];      /* [n, layers, top_k] */
} sida_routed;

/* --- popular, table, bigram: how often each expert was chosen, by what is known of the token
 *
 * Contexts of order 0 are nothing (the layer's popularity), of order 1 the token's id, of order 2
 * the id before it in the sequence and its own. A source of order n starts from equal shares and
 * refines them with the counts c of each order that has seen the context:
 *
 *     share_j(e) = (c_j(e) + w_j share_{j-1}(e)) / (Σ c_j + w_j)      w = 0, 0.01, 10
 *
 * which is the hierarchical Dirichlet model of MacKay and Peto (A hierarchical Dirichlet language
 * model, 1995) with fixed weights. All top_k choices count alike; α is the share. */
typedef enum sida_table_order {
    SIDA_TABLE_POPULAR, /* the layer's most popular experts: "popular" */
    SIDA_TABLE_TOKEN,   /* the token-id table: "table" */
    SIDA_TABLE_BIGRAM   /* (token before, token): "bigram" */
} sida_table_order;
const char *sida_table_name(sida_table_order order);
/* False when there is no such table. */
bool sida_table_order_from_name(sida_table_order *out, const char *name);

sida_status sida_table_source_create(sida_hash_source **out, sida_table_order order,
                                     const sida_routed *from);
/* P.h5. about: the config's other keys, NULL for none. */
sida_status sida_table_source_write(const sida_hash_source *source, const char *path,
                                    const json_t *about);
sida_status sida_table_source_read(sida_hash_source **out, sida_h5_file *file,
                                   const sida_predictor_meta *meta, sida_weight embedding);

/* --- layer-hash: a fixed hash of the token id for each layer, learnt from nothing
 *
 * Roller et al. 2021 (arXiv 2106.04426), section 3.2. Random: every id has an expert drawn evenly.
 * Balanced: ids are dealt by falling frequency in the trace, each to the expert with the fewest
 * tokens so far; ids that the trace does not have are drawn. There a token's hash is its expert,
 * here it predicts the choice of a router: rank r is expert (hash + r) mod E, which keeps the
 * balance. α of the first top_k ranks is their mean factor in the trace; the rest of 1 is shared
 * evenly. */
typedef enum sida_layer_hash { SIDA_LAYER_HASH_BALANCED, SIDA_LAYER_HASH_RANDOM } sida_layer_hash;
const char *sida_layer_hash_name(sida_layer_hash kind); /* "balanced", "random" */

sida_status sida_layer_hash_source_create(sida_hash_source **out, sida_layer_hash kind,
                                          uint64_t seed, const sida_routed *from);
sida_status sida_layer_hash_source_write(const sida_hash_source *source, const char *path,
                                         const json_t *about);
sida_status sida_layer_hash_source_read(sida_hash_source **out, sida_h5_file *file,
                                        const sida_predictor_meta *meta, sida_weight embedding);

/* --- oracle: the routing that a trace recorded, the upper bound
 *
 * A sequence is found by its ids. Encoder: MISMATCH for one that the trace does not have. Decoder:
 * followed token by token; where the model goes on otherwise than in the trace (it answered
 * something else than the target), the rest of that sequence gets the popular experts of its
 * layers, with a warning; MISMATCH where there is no encoder to know the sequence by. The chosen
 * experts come first, then the trace's top T, then the others; α is the softmax, its rest beyond T
 * shared evenly. */
sida_status sida_oracle_source_open(sida_hash_source **out, const char *path, sida_weight embedding,
                                    sida_fingerprint model);

/* --- router: the model's own routers applied to the normed input embedding
 *
 * logits_l = W_l · rms_norm(e; w_l): what layer l's router would say if no layer before it had
 * changed the residual stream. Nothing is learnt. */
typedef struct sida_router_weights {
    sida_weight router; /* [E, d_model] */
    sida_weight norm;   /* [1, d_model], before the layer */
} sida_router_weights;
/* weights: [layers[0] + layers[1]], the encoder's first, copied; embedding is borrowed, in memory
 * of the host. */
sida_status sida_router_source_create(sida_hash_source **out, const sida_source_shape *shape,
                                      const sida_router_weights *weights, float epsilon,
                                      sida_weight embedding, sida_fingerprint model,
                                      sida_fingerprint tokenizer);

/* The routers of layers first … of a side applied to normed residual streams hidden [n, d_model]
 * instead, by such a source and a state of it: rows of all layers, of which those before `first`
 * mean nothing. FORMAT for scores that are not finite. */
sida_status sida_router_source_apply(const sida_hash_source *source, sida_hash_state *state,
                                     int side, int32_t first, const float *hidden, int64_t n,
                                     int32_t k, sida_hash_table *out);

/* --- random: what another source predicts, with the experts' names drawn anew for each sequence
 * and layer (the same for all its tokens)
 *
 * A baseline for what predictions are worth: as many distinct experts of every layer, with the same
 * factors, and none of it from the input. Takes `inner` over, in an error too. */
sida_status sida_random_source_create(sida_hash_source **out, sida_hash_source *inner,
                                      uint64_t seed);

/* --- for the sources themselves */

/* MISMATCH, naming both fingerprints. */
sida_status sida_source_check_model(const char *path, sida_fingerprint theirs,
                                    sida_fingerprint ours);
/* MISMATCH for another width or vocabulary; path: what to name. */
sida_status sida_source_check_embedding(const char *path, const sida_source_shape *shape,
                                        sida_weight embedding);
/* Creates P.h5: config {"shape", NAME: settings, and what `about` has}. Takes settings over. */
sida_status sida_source_file_create(sida_h5_file **out, const char *path,
                                    const sida_hash_source_info *info, int32_t vocabulary,
                                    json_t *settings, const json_t *about);
/* The shape that a file's config gives, checked; *settings: borrowed, an object. */
sida_status sida_source_file_shape(sida_source_shape *out, const json_t **settings,
                                   const sida_predictor_meta *meta, const char *path);
/* A whole number of a file's settings. FORMAT when it is missing or outside its range. */
sida_status sida_source_setting(int64_t *out, const json_t *settings, const char *name, int64_t low,
                                int64_t high, const char *path);

#endif
