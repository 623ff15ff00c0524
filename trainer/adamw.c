#include "trainer/adamw.h"

#include "formats/base/memory.h"

#include <math.h>
#include <stdlib.h>

sida_status sida_adamw_create(sida_adamw *out, int64_t count, double weight_decay) {
    *out = (sida_adamw){.count = count,
                        .beta1 = 0.9,
                        .beta2 = 0.999,
                        .epsilon = 1e-8,
                        .weight_decay = weight_decay};
    sida_status status = SIDA_ALLOC(&out->first, count, "the optimiser's moments");
    if (status == SIDA_OK) status = SIDA_ALLOC(&out->second, count, "the optimiser's moments");
    if (status != SIDA_OK) sida_adamw_free(out);
    return status;
}

void sida_adamw_free(sida_adamw *state) {
    free(state->first);
    free(state->second);
    state->first = state->second = NULL;
}

void sida_adamw_step(sida_adamw *state, float *parameters, const float *gradient, double lr) {
    double step = (double)++state->step;
    float beta1 = (float)state->beta1, beta2 = (float)state->beta2;
    float rest1 = (float)(1 - state->beta1), rest2 = (float)(1 - state->beta2);
    float decay = (float)(1 - lr * state->weight_decay), epsilon = (float)state->epsilon;
    float rate = (float)(lr / (1 - pow(state->beta1, step)));
    float root = (float)sqrt(1 - pow(state->beta2, step));
    float *first = state->first, *second = state->second;
#pragma omp parallel for schedule(static) if (state->count > 1 << 18)
    for (int64_t i = 0; i < state->count; i++) {
        float g = gradient[i];
        first[i] = beta1 * first[i] + rest1 * g;
        second[i] = beta2 * second[i] + rest2 * g * g;
        parameters[i] =
            parameters[i] * decay - rate * first[i] / (sqrtf(second[i]) / root + epsilon);
    }
}

double sida_gradient_clip(float *gradient, int64_t count, double limit) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += (double)gradient[i] * (double)gradient[i];
    double norm = sqrt(sum);
    if (limit > 0 && norm > limit) {
        float factor = (float)(limit / norm);
        for (int64_t i = 0; i < count; i++) gradient[i] *= factor;
    }
    return norm;
}
