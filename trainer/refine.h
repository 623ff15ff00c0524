/* Training a refinement (runtime/predictor/refine.h), once the network is as it will stay: the same
 * loss as the network's, of the layers behind the known ones, over the same trace. */
#ifndef SIDA_TRAINER_REFINE_H
#define SIDA_TRAINER_REFINE_H

#include "runtime/predictor/refine.h"
#include "trainer/dataset.h"
#include "trainer/loss.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct sida_refine_epoch {
    int32_t epoch, epochs; /* 1 … epochs */
    double loss;           /* training loss, mean over the epoch's pairs */
    /* Per cent of the experts chosen in layers behind a known one, of the validation trace's
     * content tokens, that are among the k predicted again; and up front. hit@1 where k is 1. */
    double hit, up_front;
    int32_t chosen; /* k */
    double seconds; /* of this epoch */
} sida_refine_epoch;

typedef struct sida_refine_options {
    int32_t width, epochs;
    double lambda, weight_decay, clip; /* the network's */
    sida_tkd tkd;
    uint64_t seed;
    /* As in train.h; fraction: of this training. */
    sida_status (*on_step)(void *context, double fraction, int64_t tokens);
    void (*on_epoch)(void *context, const sida_refine_epoch *epoch);
    void *context;
} sida_refine_options;

/* Whether a side has the two MoE layers that it takes. */
bool sida_refine_possible(const int32_t layers[2]);
/* Twice the network's width, as far as that is allowed. */
int32_t sida_refine_default_width(int32_t hidden);
/* What shapes the result beside the network's settings. */
json_t *sida_refine_settings(const sida_refine_options *options);

/* Trains on `train`, of which top lists are loaded, and keeps of each side the epoch with the best
 * slot recall on `valid`; a side where none is better than what was said up front stays zero, and
 * *out is NULL where that is so of both. The same bytes for any number of threads. Holds the
 * network's features of both traces: 4 hidden bytes a token.
 *
 * *kept: {"encoder": epoch, …}, 0 where none was better. *measured: for each side, by the last
 * known layer, the slot recall of the layers behind it and the same up front. Errors: those of
 * memory; what on_step returns; FORMAT where the loss is not finite. */
sida_status sida_refine_train(sida_refine **out, json_t **kept, json_t **measured,
                              const sida_net *net, const sida_dataset *train,
                              const sida_dataset *valid, const sida_refine_options *options);

#endif
