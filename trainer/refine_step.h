/* One step of a refinement's training (runtime/predictor/refine.h): loss and gradient of some
 * tokens, whose network is fixed. As in step.h the tokens are cut into shards by their number alone
 * and the shards' gradients are added in order, so that the bytes do not depend on the number of
 * threads. */
#ifndef SIDA_TRAINER_REFINE_STEP_H
#define SIDA_TRAINER_REFINE_STEP_H

#include "runtime/predictor/refine.h"
#include "trainer/dataset.h"
#include "trainer/loss.h"

typedef struct sida_refine_step sida_refine_step;

/* Tokens of the data, by side, to train on. */
typedef struct sida_refine_tokens {
    const int32_t *index[2]; /* [count] */
    int32_t count[2];        /* 0 where the side is not refined */
    uint32_t turn;           /* which layers are the last known ones: another number, others */
} sida_refine_tokens;

/* For steps of at most `tokens` tokens a side. Everything is borrowed; features[side]: [n, hidden],
 * what the network's heads read of every token of the data (NULL where the side is not refined). */
sida_status sida_refine_step_create(sida_refine_step **out, const sida_refine *refine,
                                    const sida_net *net, const sida_dataset *data,
                                    const float *const features[2], int32_t tokens, sida_tkd tkd,
                                    double lambda);
void sida_refine_step_destroy(sida_refine_step *step); /* takes NULL */

/* *sum: the losses of all pairs (a token and a layer behind the last known one), *pairs of them.
 * The gradient left behind is that of sum / pairs. FORMAT where a loss is not finite. */
sida_status sida_refine_step_gradient(sida_refine_step *step, double *sum, int64_t *pairs,
                                      const sida_refine_tokens *tokens);
sida_refine *sida_refine_step_get_gradient(sida_refine_step *step);

#endif
