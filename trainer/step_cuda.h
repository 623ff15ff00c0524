/* One step of training on a GPU: parameters, their gradient and AdamW's moments live there, and so
 * does everything between a minibatch and the moved parameters. Work is issued to one stream; only
 * the functions that say so wait for it. */
#ifndef SIDA_TRAINER_STEP_CUDA_H
#define SIDA_TRAINER_STEP_CUDA_H

#include "runtime/ops/train_ops.h"
#include "trainer/checkpoint.h"
#include "trainer/feed.h"

typedef struct sida_step_cuda sida_step_cuda;

typedef struct sida_step_cuda_options {
    sida_tkd tkd;
    double lambda, clip;
    int32_t top;
    bool tf32; /* products may round their factors to TF32 */
} sida_step_cuda_options;

/* embedding: [vocabulary, d_model] on the host, copied. stream is borrowed. */
sida_status sida_step_cuda_create(sida_step_cuda **out, sida_stream *stream,
                                  const sida_net_config *config, sida_weight embedding,
                                  const sida_step_cuda_options *options);
void sida_step_cuda_destroy(sida_step_cuda *step); /* its work must have ended; takes NULL */

/* Takes the memory for such parts; waits for the stream where it has to take more. BUDGET where the
 * device has not so much. Call before all others. */
sida_status sida_step_cuda_reserve(sida_step_cuda *step, const sida_feed_limits *limits);

/* Parameters and moments to the device and back; both wait. */
sida_status sida_step_cuda_upload(sida_step_cuda *step, const sida_train_state *state);
sida_status sida_step_cuda_download(sida_step_cuda *step, sida_train_state *state);

/* Adds a part of a step: its gradient, times scale, and its losses. */
sida_status sida_step_cuda_add(sida_step_cuda *step, const sida_feed_part *part, float scale);
/* Ends a step: clips, and moves the parameters with learning rate `rate`; number is 1 for the first
 * step of a training. At most two steps may be on their way. */
sida_status sida_step_cuda_end(sida_step_cuda *step, const sida_adamw *optimiser, double rate,
                               int64_t number);
/* Waits for the step before the last `later` ones (0 or 1). losses: the sum over all pairs; norm:
 * of the gradient before clipping. Either may be not finite; then the parameters have not been
 * moved. */
sida_status sida_step_cuda_result(sida_step_cuda *step, int later, double *losses, double *norm);

#endif
