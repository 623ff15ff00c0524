/* A Switch Transformer in memory with random weights, so that speed can be measured without a
 * download. Only its routing is made to look trained: experts are used as unevenly as the trained
 * model's of routing_histogram.h. */
#ifndef SIDA_RUNTIME_MODEL_SYNTHETIC_H
#define SIDA_RUNTIME_MODEL_SYNTHETIC_H

#include "runtime/model/model.h"

typedef struct sida_synthetic_options {
    const char *name;  /* for messages */
    int32_t experts;   /* a MoE layer */
    sida_dtype dtype;  /* of every tensor: F32 or BF16 */
    int32_t layers[2]; /* blocks of a side, every second of them sparse; even */
    int32_t d_model, d_kv, heads, d_ff, vocabulary, capacity;
    uint64_t seed;
} sida_synthetic_options;

/* The published geometry of Switch-Base, but for the number of experts. */
#define SIDA_SYNTHETIC_BASE                                                                        \
    {                                                                                              \
        .name = "synthetic", .experts = 8, .dtype = SIDA_BF16, .layers = {12, 12}, .d_model = 768, \
        .d_kv = 64, .heads = 12, .d_ff = 3072, .vocabulary = 32128, .capacity = 64, .seed = 1      \
    }

/* Experts' matrices are windows at different offsets of one block of random numbers, copied into
 * the host slab: the model is there once, and made at the speed of a copy. Same options, same
 * bytes. A router's row of rank r is gain[r] times a random vector of unit length in expectation;
 * which expert has which rank differs from layer to layer. Errors: ARGUMENT, MEMORY, BUDGET and
 * what the family refuses. */
sida_status sida_model_open_synthetic(sida_model **out, sida_backend *backend,
                                      const sida_synthetic_options *options);

/* The shares of tokens that `experts` experts shall get, by rank, adding up to 1: the histogram
 * read at (rank + ½) / experts by linear interpolation. shares: [experts]. */
void sida_synthetic_shares(double *shares, int32_t experts);

#endif
