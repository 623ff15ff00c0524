/* The reference: the state is trained in place. */
#include "formats/base/memory.h"
#include "trainer/learner.h"
#include "trainer/step.h"

#include <math.h>
#include <stdlib.h>

typedef struct cpu_learner {
    sida_learner base;
    sida_step *step;
} cpu_learner;

static void destroy(sida_learner *base) {
    cpu_learner *learner = (cpu_learner *)base;
    sida_step_destroy(learner->step);
    free(learner);
}

static sida_status take_step(sida_learner *base, int32_t count, double rate) {
    sida_status status = SIDA_OK;
    cpu_learner *learner = (cpu_learner *)base;
    sida_train_state *state = base->state;
    sida_net *gradient = sida_step_get_gradient(learner->step);
    double sum;
    int64_t pairs;
    SIDA_TRY(sida_step_gradient(learner->step, &sum, &pairs, base->data, base->order + base->next,
                                count));
    double norm =
        sida_gradient_clip(gradient->parameters, gradient->parameter_count, base->options.clip);
    if (!isfinite(norm)) SIDA_TRY(sida_learner_bad_gradient());
    sida_adamw_step(&state->optimiser, state->net->parameters, gradient->parameters, rate);
    state->loss_sum += sum;
    state->loss_pairs += pairs;
out:
    return status;
}

sida_status sida_learner_create_cpu(sida_learner **out, sida_train_state *state,
                                    const sida_dataset *data, const sida_learner_options *options) {
    static const sida_learner_table table = {.destroy = destroy, .step = take_step};
    sida_status status = SIDA_OK;
    cpu_learner *learner = NULL;
    *out = NULL;
    int32_t batch = options->batch < data->sequences ? options->batch : data->sequences;
    SIDA_TRY(SIDA_ALLOC(&learner, 1, "a learner"));
    learner->base = (sida_learner){&table, state, data, *options, NULL, 0, 0};
    SIDA_TRY(sida_step_create(&learner->step, state->net, batch, options->tkd, options->lambda));
    *out = &learner->base;
    learner = NULL;
out:
    free(learner);
    return status;
}
