/* One step of training: forward, loss and backward of a batch.
 *
 * A batch is cut into shards of whole sequences, by its size alone. A thread takes a shard from
 * end to end; the shards' gradients are added in order. So the bytes do not depend on the number of
 * threads, and threads meet twice a step only. */
#ifndef SIDA_TRAINER_STEP_H
#define SIDA_TRAINER_STEP_H

#include "runtime/predictor/net.h"
#include "trainer/dataset.h"
#include "trainer/loss.h"

typedef struct sida_step sida_step;

/* Buffers for training `net`, borrowed, on batches of at most `batch` sequences. */
sida_status sida_step_create(sida_step **out, const sida_net *net, int32_t batch, sida_tkd tkd,
                             double lambda);
void sida_step_destroy(sida_step *step); /* takes NULL */

/* Trains on the sequences order[0 … count) of the data. *sum: the losses of all pairs (a token and
 * an MoE layer) of both sides, *pairs of them. The gradient left behind is that of sum / pairs.
 * Fails with FORMAT where a loss is not finite. */
sida_status sida_step_gradient(sida_step *step, double *sum, int64_t *pairs,
                               const sida_dataset *data, const int32_t *order, int32_t count);
sida_net *sida_step_get_gradient(sida_step *step);

#endif
