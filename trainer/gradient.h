/* The predictor's backward pass: from gradients of the logits to gradients of every parameter. */
#ifndef SIDA_TRAINER_GRADIENT_H
#define SIDA_TRAINER_GRADIENT_H

#include "runtime/predictor/net.h"

typedef struct sida_gradient_workspace {
    float *block;
    size_t items;
} sida_gradient_workspace;
void sida_gradient_workspace_free(sida_gradient_workspace *workspace);

/* Adds to `gradient`, a net of the same shapes, what the last encode (and decode, if d_logits[1] is
 * not NULL) of a training pass contributes. d_logits[side]: [tokens, layers * experts], NULL for a
 * side that has no trunk. */
sida_status sida_gradient_add(sida_net *gradient, sida_gradient_workspace *workspace,
                              const sida_net_pass *pass, const float *const d_logits[2]);

#endif
