/* What the backward passes of the two kinds of network share. */
#ifndef SIDA_TRAINER_GRADIENT_PRIVATE_H
#define SIDA_TRAINER_GRADIENT_PRIVATE_H

#include "trainer/gradient.h"

/* d_x += d_y W, and the gradients of W and of its bias. d_x may be NULL. */
void sida_gradient_linear(sida_net_linear *gradient, const sida_net_linear *layer, float *d_x,
                          const float *d_y, const float *x, int64_t n);
void sida_gradient_relu(float *d, const float *activated, int64_t count);
/* Room for `items` floats; the old contents do not matter. */
sida_status sida_gradient_reserve(sida_gradient_workspace *workspace, size_t items);

/* sida_gradient_add() of a Transformer. */
sida_status sida_gradient_add_transformer(sida_net *gradient, sida_gradient_workspace *workspace,
                                          const sida_net_pass *pass,
                                          const float *const d_logits[2]);

#endif
