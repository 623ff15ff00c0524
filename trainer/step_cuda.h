/* One step of training on a GPU: parameters, their gradient and AdamW's moments live there, and so
 * does everything between a minibatch and the moved parameters. Work is issued to the given stream
 * and to one beside it (step_cuda_private.h); only the functions that say so wait for it. */
#ifndef SIDA_TRAINER_STEP_CUDA_H
#define SIDA_TRAINER_STEP_CUDA_H

#include "runtime/ops/train_ops.h"
#include "trainer/checkpoint.h"
#include "trainer/feed.h"

typedef struct sida_step_cuda sida_step_cuda;

/* Enough that the host, woken late, still finds the device at work. */
enum { SIDA_STEPS_AHEAD = 3 };

typedef struct sida_step_cuda_options {
    sida_tkd tkd;
    double lambda, clip;
    int32_t top, label_count; /* the data's top and top_k */
    bool tf32;                /* products may round their factors to TF32 */
} sida_step_cuda_options;

/* embedding: [rows that the feed's ids name, d_model] on the host, copied. stream is borrowed. */
sida_status sida_step_cuda_create(sida_step_cuda **out, sida_stream *stream,
                                  const sida_net_config *config, sida_weight embedding,
                                  const sida_step_cuda_options *options);
void sida_step_cuda_destroy(sida_step_cuda *step); /* waits for its work; takes NULL */

/* Takes the memory for such parts; waits for its work where it has to take more. BUDGET where the
 * device has not so much. Call before all others. */
sida_status sida_step_cuda_reserve(sida_step_cuda *step, const sida_feed_limits *limits);

/* Parameters and moments to the device and back; both wait. */
sida_status sida_step_cuda_upload(sida_step_cuda *step, const sida_train_state *state);
sida_status sida_step_cuda_download(sida_step_cuda *step, sida_train_state *state);

/* The stream that reads a part first: it, and by it the step, waits for the part's upload. What
 * reads the part has ended once the given stream has done the step's work. */
sida_stream *sida_step_cuda_reader(sida_step_cuda *step);
/* Adds a part of a step: its gradient, times scale, and its losses. */
sida_status sida_step_cuda_add(sida_step_cuda *step, const sida_feed_part *part, float scale);
/* Ends a step: clips, and moves the parameters with learning rate `rate`; number is 1 for the first
 * step of a training. At most SIDA_STEPS_AHEAD steps may be on their way. */
sida_status sida_step_cuda_end(sida_step_cuda *step, const sida_adamw *optimiser, double rate,
                               int64_t number);
/* Waits for the step before the last `later` ones (0 … SIDA_STEPS_AHEAD - 1). losses: the sum over
 * all pairs; norm: of the gradient before clipping. Either may be not finite; then the parameters
 * have not been moved. */
sida_status sida_step_cuda_result(sida_step_cuda *step, int later, double *losses, double *norm);

#endif
