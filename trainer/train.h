/* Training a predictor: the loop, its options, what it reports and what it leaves behind. */
#ifndef SIDA_TRAINER_TRAIN_H
#define SIDA_TRAINER_TRAIN_H

#include "runtime/predictor/net.h"
#include "runtime/predictor/sources.h"
#include "trainer/evaluate.h"
#include "trainer/loss.h"
#include "trainer/refine.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#define SIDA_TRAIN_SOURCE "transformer" /* where no source is given */

typedef enum sida_schedule {
    SIDA_SCHEDULE_CONSTANT,
    SIDA_SCHEDULE_COSINE /* from lr to 0 over the whole training */
} sida_schedule;
const char *sida_schedule_name(sida_schedule schedule); /* "constant", "cosine" */

typedef struct sida_train_epoch {
    int32_t epoch, epochs; /* 1 … epochs */
    double loss;           /* training loss, mean over the epoch's pairs */
    const sida_evaluation *valid;
    double seconds; /* of this epoch, evaluation included */
} sida_train_epoch;

typedef struct sida_train_options {
    const char *trace, *valid, *output;
    const char *device; /* cpu, cuda, or auto (NULL too): cuda where it can train */
    /* NULL: SIDA_TRAIN_SOURCE; "transformer", "lstm", or one of fit.h, which has no use for most of
     * these. */
    const char *source;
    sida_layer_hash hash;         /* of the source "layer-hash" */
    int32_t epochs, batch;        /* batch: sequences */
    int32_t device_batch;         /* sequences that a GPU computes at a time; 0: by length */
    bool fp32;                    /* a GPU's products round no factor to TF32 */
    int32_t top;                  /* of the trace's T; 0: all of them */
    int32_t hidden;               /* 0: sida_net_default_hidden */
    int32_t lstm_layers;          /* of an LSTM: 1 … SIDA_NET_LSTM_MAX */
    int32_t blocks;               /* of a Transformer: 1 … SIDA_NET_BLOCKS_MAX */
    bool bidirectional;           /* an LSTM's encoder */
    sida_net_attention attention; /* an LSTM's */
    int32_t warmup;               /* steps of rising lr */
    double lr, lambda, weight_decay;
    double clip; /* largest gradient norm; 0: no limit */
    /* Ends the training after so many epochs on end without a better one (by what is kept, below);
     * 0: never. */
    int32_t patience;
    sida_tkd tkd;
    sida_labels labels; /* of the cross-entropy, where the model chooses more than one expert */
    sida_schedule schedule;
    bool calibrate;       /* sida_calibrate() what is kept */
    bool refine;          /* train a refinement of it, where a side has two MoE layers */
    int32_t refine_width; /* 0: sida_refine_default_width */
    int32_t refine_epochs;
    int64_t seed;             /* >= 0 */
    int64_t checkpoint_every; /* steps; 0: an epoch */
    bool resume;
    /* Any may be NULL. What on_step returns, if not OK, ends the training; on CANCELLED a
     * checkpoint is left. fraction: of the whole training. */
    sida_status (*on_step)(void *context, double fraction, int64_t tokens);
    void (*on_epoch)(void *context, const sida_train_epoch *epoch);
    /* The same of the refinement's training, which comes after. */
    sida_status (*on_refine_step)(void *context, double fraction, int64_t tokens);
    void (*on_refine_epoch)(void *context, const sida_refine_epoch *epoch);
    void *context;
} sida_train_options;

/* The defaults of `sida train`; the three paths are NULL. */
sida_train_options sida_train_defaults(void);

/* Trains and writes options->output. The same seed, traces and options give the same bytes whatever
 * the number of threads; on a GPU, on that kind of device with the same device_batch and libraries.
 * State goes to OUTPUT.checkpoint (complete or absent) every checkpoint_every steps, and is removed
 * at the end; with `resume` a checkpoint is continued to the same bytes, MISMATCH when it is of
 * other traces, options or device (CPU or CUDA), and without one the training starts from the
 * beginning. BUDGET where the device's memory ran out; a checkpoint is left if a step was done. The
 * weights kept are those of the epoch with the best validation slot
 * recall, which is hit@1 where the model chooses one expert; with `calibrate` their heads are
 * divided by temperatures then, which the file names (training.temperatures); with `refine` a
 * refinement of them is trained, on the CPU, which the file holds where it is better than nothing
 * (config.refine). A training that is stopped there is whole in its checkpoint but for that.
 * *summary: JSON of what was done, may be NULL. */
sida_status sida_train(const sida_train_options *options, json_t **summary);

#endif
