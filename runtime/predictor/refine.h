/* Refinement: once the true routing of MoE layers 0 … l of a call is known, the layers behind are
 * predicted again. Layers depend on each other (SiDA-MoE, arXiv 2310.18859, leaves that open), so
 * this is better than what was said up front; a token costs R (h + (L - 1 - l) E) products.
 *
 * Of a side with L MoE layers, at least 2, of E experts, and a network of width h; R is the
 * refinement's own width. For a token, with f what the network's heads read, s[m] its scores of
 * layer m, and l < m < L:
 *
 *     z     = relu(features f + bias[l] + Σ_{j <= l} Σ_{e chosen in j} known[j, e])      [R]
 *     s'[m] = s[m] + heads[m] z                                                          [E]
 *
 * A row depends on its own token alone, given f. heads start at zero: then s' is s. */
#ifndef SIDA_RUNTIME_PREDICTOR_REFINE_H
#define SIDA_RUNTIME_PREDICTOR_REFINE_H

#include "runtime/predictor/hash_source.h"
#include "runtime/predictor/net.h"

enum { SIDA_REFINE_WIDTH_MAX = 1024 };

typedef struct sida_refine_side {
    bool present;             /* L >= 2 */
    sida_net_linear features; /* weight [R, h]; no bias */
    float *bias;              /* [L - 1, R] of the last known layer l */
    float *known;             /* [(L - 1) E, R] of layers 0 … L - 2: row j E + e */
    sida_net_linear heads;    /* weight [(L - 1) E, R], bias [(L - 1) E]: layers 1 … L - 1 */
} sida_refine_side;

typedef struct sida_refine {
    sida_net_config net; /* whose it is */
    int32_t width;       /* R: 1 … SIDA_REFINE_WIDTH_MAX */
    sida_refine_side sides[2];
    sida_net_tensor *tensors; /* encoder.refine.features.weight, …bias, …known, …heads.weight, … */
    int32_t tensor_count;
    float *parameters; /* all of them, in the order of the tensors */
    int64_t parameter_count;
} sida_refine;

/* All zero. Also serves as the gradient of a refinement. ARGUMENT for a width out of range and
 * where neither side has two MoE layers. */
sida_status sida_refine_create(sida_refine **out, const sida_net_config *net, int32_t width);
void sida_refine_destroy(sida_refine *refine); /* takes NULL */
/* features: uniform, of standard deviation 1/sqrt(h); known: the same of 1/sqrt(R); the rest zero.
 */
void sida_refine_initialise(sida_refine *refine, uint64_t seed);

/* /tensors/NAME beside the network's. Reading: config["refine"]["width"] says that there is one;
 * *out is NULL where config has none. FORMAT for other shapes and values that are not finite. */
sida_status sida_refine_write(sida_h5_file *file, const sida_refine *refine);
sida_status sida_refine_read(sida_refine **out, sida_h5_file *file, const json_t *config,
                             const sida_net_config *net);

/* --- on the host; a row's bytes do not depend on the others. n tokens of a side */

/* sum [n, R] = features f, f [n, h]. */
sida_status sida_refine_begin(const sida_refine *refine, int side, float *sum, const float *f,
                              int64_t n);
/* sum [n, R] += known[layer, e] of the k experts of each token, experts [n, k] in 0 … E - 1. */
void sida_refine_know(const sida_refine *refine, int side, int32_t layer, float *sum,
                      const int32_t *experts, int32_t k, int64_t n);
/* With layers 0 … layer in the sum: scores [n, (L - 1 - layer) E] = s' of layers layer + 1 … L - 1.
 * s [n, L E]: the network's scores; z [n, R]: scratch, relu's outputs afterwards. */
sida_status sida_refine_scores(const sida_refine *refine, int side, int32_t layer, float *scores,
                               float *z, const float *sum, const float *s, int64_t n);

#endif
