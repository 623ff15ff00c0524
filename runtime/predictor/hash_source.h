/* Where hash tables come from: the interface of every hash function. A source is read-only once
 * open and may serve several threads; what a batch needs is in its state. */
#ifndef SIDA_RUNTIME_PREDICTOR_HASH_SOURCE_H
#define SIDA_RUNTIME_PREDICTOR_HASH_SOURCE_H

#include "formats/base/fingerprint.h"
#include "formats/base/status.h"
#include "formats/ragged.h"
#include "runtime/ops/linear.h"

#include <stdbool.h>
#include <stdint.h>

/* A hash table: for each token and MoE layer of one side, the predicted experts and their α. */
typedef struct sida_hash_table {
    int32_t side, layers, k;
    int64_t tokens, capacity; /* used and allocated rows */
    uint16_t *experts;        /* [tokens, layers, k] best first, ties to the lower id */
    float *alpha;             /* [tokens, layers, k] softmax over all E */
} sida_hash_table;
void sida_hash_table_free(sida_hash_table *table);
/* Makes room for `tokens` rows and sets the sizes. */
sida_status sida_hash_table_reserve(sida_hash_table *table, int32_t side, int32_t layers, int32_t k,
                                    int64_t tokens);

typedef struct sida_hash_source sida_hash_source;
typedef struct sida_hash_state sida_hash_state; /* of one batch: encoder trunk, decoder state */

typedef struct sida_hash_source_info {
    const char *name; /* "lstm", "table", "oracle" ... */
    sida_fingerprint model, tokenizer;
    int32_t d_model, experts, layers[2];
    size_t bytes;        /* of its parameters */
    size_t device_bytes; /* all that it takes of the device where it was placed; 0: on the host */
    bool refines;        /* sida_hash_refine() may be called */
} sida_hash_source_info;

/* What a source on a device must have room for. */
typedef struct sida_hash_limits {
    int32_t states;            /* batches at a time */
    int32_t sequences;         /* of a batch */
    int64_t input_tokens;      /* of a batch, all sequences together */
    int64_t step_tokens;       /* of a decode, all sequences together */
    int32_t decoder_positions; /* of one sequence */
    int32_t k;                 /* experts a token and layer, chosen ones of a refinement too */
    bool refines;              /* refinements will be asked for; else info.refines gets false */
    /* A Transformer's weights there: F32 (0), or BF16, which is half the memory and rounds. */
    sida_dtype weights;
} sida_hash_limits;

typedef struct sida_hash_source_table {
    void (*destroy)(sida_hash_source *source);
    sida_status (*state_create)(const sida_hash_source *source, sida_hash_state **out);
    void (*state_destroy)(sida_hash_state *state);
    /* Encoder tables of a new batch; resets the state. */
    sida_status (*encode)(const sida_hash_source *source, sida_hash_state *state,
                          const sida_ragged *input, int32_t k, sida_hash_table *out);
    /* Tables of the decoder's next tokens (0 … n a sequence of that batch). */
    sida_status (*decode)(const sida_hash_source *source, sida_hash_state *state,
                          const sida_ragged *step, int32_t k, sida_hash_table *out);
    /* NULL: what was said up front stays. */
    sida_status (*refine)(const sida_hash_source *source, sida_hash_state *state, int side,
                          int32_t layer, const int32_t *experts, int32_t top_k, int32_t k,
                          sida_hash_table *out);
    /* NULL: computes on the host, wherever the model does. */
    sida_status (*place)(sida_hash_source *source, sida_backend *backend, sida_weight embedding,
                         const sida_hash_limits *limits);
} sida_hash_source_table;

struct sida_hash_source {
    const sida_hash_source_table *table;
    sida_hash_source_info info;
};

/* Opens P.h5, of any source, or a trace, which is an oracle (sources.h says what each does).
 * `embedding` is the model's input embedding in host-readable memory, borrowed.
 * MISMATCH (both fingerprints named) when the predictor was trained for another model. */
sida_status sida_hash_source_open(sida_hash_source **out, const char *path, sida_weight embedding,
                                  sida_fingerprint model);
void sida_hash_source_destroy(sida_hash_source *source); /* takes NULL */
/* Moves the source to the device of a back-end, once, before any state is made: parameters are
 * copied, memory for the limits is taken there; embedding is the model's on the device. A source
 * that the device has no ops for stays on the host, and info.device_bytes is 0. Batches beyond the
 * limits are then refused (ARGUMENT). Errors: those of taking memory.
 *
 * On the host and on the CPU's back-end a row depends on its own sequence alone, to the byte. On
 * CUDA the same build, device and batches give the same bytes; the same sequence in another batch
 * may get factors that differ in the last places, and another expert where two are as good. */
sida_status sida_hash_source_place(sida_hash_source *source, sida_backend *backend,
                                   sida_weight embedding, const sida_hash_limits *limits);
sida_status sida_hash_state_create(const sida_hash_source *source, sida_hash_state **out);
void sida_hash_state_destroy(const sida_hash_source *source, sida_hash_state *state);
/* k: experts a token and layer, 1 … E. Two threads may call at once, each on a state of its own. */
sida_status sida_hash_encode(const sida_hash_source *source, sida_hash_state *state,
                             const sida_ragged *input, int32_t k, sida_hash_table *out);
sida_status sida_hash_decode(const sida_hash_source *source, sida_hash_state *state,
                             const sida_ragged *step, int32_t k, sida_hash_table *out);
/* For a source with info.refines (refine.h): MoE layer `layer` of the last call of a side of that
 * state has chosen experts [tokens, top_k], a host array; *out gets a row of all layers for each
 * token, of which those behind `layer` are predicted again and the others mean nothing. Layers of a
 * call in order, from 0, none left out, each once; not the last. ARGUMENT otherwise and for an
 * expert out of range. */
sida_status sida_hash_refine(const sida_hash_source *source, sida_hash_state *state, int side,
                             int32_t layer, const int32_t *experts, int32_t top_k, int32_t k,
                             sida_hash_table *out);

#endif
