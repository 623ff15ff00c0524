/* What the training of a refinement measures after each epoch: the experts chosen, of content
 * tokens and in the layers behind each known one, that are among the k predicted. The full figures
 * are evaluate_refined.h's. */
#ifndef SIDA_TRAINER_REFINE_MEASURE_H
#define SIDA_TRAINER_REFINE_MEASURE_H

#include "runtime/predictor/refine.h"
#include "trainer/dataset.h"

/* What a network's heads read of every token of the data, as the runtime computes it; of the sides
 * with two MoE layers, others stay NULL. out[side]: [n, hidden], to be freed, also after an error.
 * on_batch: may be NULL; ends it where it does not return OK. */
sida_status sida_refine_features(float *out[2], const sida_net *net, const sida_dataset *data,
                                 sida_status (*on_batch)(void *context), void *context);

/* A row is a last known layer: the encoder's L - 1, where it is refined, then the decoder's. */
typedef struct sida_refine_measure {
    const sida_net *net; /* borrowed, as the data is */
    const sida_dataset *data;
    int32_t rows, first[2]; /* first: a side's first row */
    int64_t *slots;         /* [rows] experts chosen in the layers behind */
    int64_t *up_front;      /* [rows] of them, predicted up front */
    float *features[2];
} sida_refine_measure;

sida_status sida_refine_measure_create(sida_refine_measure **out, const sida_net *net,
                                       const sida_dataset *data,
                                       sida_status (*on_batch)(void *context), void *context);
void sida_refine_measure_destroy(sida_refine_measure *measure); /* takes NULL */

/* hits [rows]: predicted again by the refinement. */
sida_status sida_refine_measure_run(const sida_refine_measure *measure, int64_t *hits,
                                    const sida_refine *refine);

#endif
