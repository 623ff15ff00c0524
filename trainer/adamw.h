/* AdamW (Loshchilov and Hutter 2019), PyTorch's form: decoupled decay, corrected moments. */
#ifndef SIDA_TRAINER_ADAMW_H
#define SIDA_TRAINER_ADAMW_H

#include "formats/base/status.h"

#include <stdint.h>

typedef struct sida_adamw {
    float *first, *second; /* [count] moments */
    int64_t count, step;   /* steps done */
    double beta1, beta2, epsilon, weight_decay;
} sida_adamw;

/* β = 0.9, 0.999, ε = 1e-8. */
sida_status sida_adamw_create(sida_adamw *out, int64_t count, double weight_decay);
void sida_adamw_free(sida_adamw *state);
void sida_adamw_step(sida_adamw *state, float *parameters, const float *gradient, double lr);

/* The norm of all gradients, and where it is above `limit` (> 0) a scaling down to it. Returns the
 * norm before; the sum is in a fixed order. */
double sida_gradient_clip(float *gradient, int64_t count, double limit);

#endif
