/* A trainer's state between two steps, and its file. */
#ifndef SIDA_TRAINER_CHECKPOINT_H
#define SIDA_TRAINER_CHECKPOINT_H

#include "runtime/predictor/refine.h"
#include "trainer/adamw.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

/* One row an epoch of what is kept as /curve/NAME in P.h5. */
enum { SIDA_CURVE_COLUMNS = 7 };
extern const char *const sida_curve_names[SIDA_CURVE_COLUMNS];

typedef struct sida_train_state {
    sida_net *net;
    sida_adamw optimiser;
    int32_t epoch;      /* epochs done */
    int32_t batch;      /* batches done of the one after */
    double loss_sum;    /* of that one, and its pairs so far */
    int64_t loss_pairs; /* */
    int32_t best_epoch; /* 1 …; 0: none yet */
    double best_hit;
    float *best;  /* [parameters] */
    float *curve; /* [epochs, SIDA_CURVE_COLUMNS], `epoch` rows are valid */
} sida_train_state;

sida_status sida_train_state_create(sida_train_state *out, const sida_net_config *config,
                                    double weight_decay, int32_t epochs);
void sida_train_state_free(sida_train_state *state);

/* meta->config holds everything that shapes the training. */
sida_status sida_checkpoint_write(const char *path, const sida_predictor_meta *meta,
                                  const sida_train_state *state);
/* Into a created state. MISMATCH, naming the first setting that differs, when the checkpoint is of
 * another model or another config; FORMAT when it does not fit its own. */
sida_status sida_checkpoint_read(sida_train_state *state, const char *path,
                                 const sida_predictor_meta *meta, int32_t epochs);

/* P.h5: the best parameters, the curve, the configuration, and the refinement (NULL: none), which
 * meta->config names. */
sida_status sida_predictor_write(const char *path, const sida_predictor_meta *meta,
                                 const sida_train_state *state, const sida_refine *refine);

#endif
