/* What the predictor is trained on: truncated knowledge distillation from the router's distribution
 * plus λ times the cross-entropy against what it chose, in SiDA-MoE's terms TKD + λ·CE. */
#ifndef SIDA_TRAINER_LOSS_H
#define SIDA_TRAINER_LOSS_H

#include "runtime/ops/train_ops.h"

#include <stdint.h>

const char *sida_tkd_name(sida_tkd tkd); /* "rest", "l1-renorm" */

typedef struct sida_loss_call {
    float *d_logits;          /* [pairs, experts] out: gradient of scale * (sum of losses) */
    double *losses;           /* [pairs] out: one loss each */
    const float *logits;      /* [pairs, experts]; a pair is a token and a layer */
    const uint16_t *top_ids;  /* [pairs, top] distinct, best first */
    const uint16_t *top_logp; /* [pairs, top] fp16 bits, natural log of the softmax over all E */
    /* What the cross-entropy is against; NULL: the first of top_ids. */
    const uint16_t *labels;     /* [pairs, label_count] distinct */
    const float *label_weights; /* [pairs, label_count] of sum 1 */
    int64_t pairs;
    int32_t experts, top, label_count;
    sida_tkd tkd;
    float lambda, scale;
} sida_loss_call;

/* *sum: of the pairs' losses, added in order. Not finite when a logit is not. */
sida_status sida_loss(double *sum, const sida_loss_call *call);

#endif
