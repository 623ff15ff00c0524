#include "trainer/learner.h"

#include <assert.h>
#include <string.h>

#ifdef SIDA_HAVE_CUDA
static bool on_cuda(const sida_backend *backend) {
    return strcmp(backend->table->name, "cuda") == 0;
}
#endif

sida_status sida_learner_check(sida_backend *backend) {
#ifdef SIDA_HAVE_CUDA
    if (on_cuda(backend)) return sida_learner_check_cuda(backend);
#else
    (void)backend; /* there is none but the CPU's */
#endif
    return SIDA_OK;
}

sida_status sida_learner_create(sida_learner **out, sida_backend *backend, sida_train_state *state,
                                const sida_dataset *data, const sida_learner_options *options) {
    assert(options->batch > 0 && options->device_batch >= 0);
    *out = NULL;
#ifdef SIDA_HAVE_CUDA
    if (on_cuda(backend)) return sida_learner_create_cuda(out, backend, state, data, options);
#else
    (void)backend;
#endif
    return sida_learner_create_cpu(out, state, data, options);
}

void sida_learner_destroy(sida_learner *learner) {
    if (learner) learner->table->destroy(learner);
}

sida_status sida_learner_begin(sida_learner *learner, const int32_t *order, int32_t count) {
    learner->order = order;
    learner->count = count;
    learner->next = 0;
    return learner->table->begin ? learner->table->begin(learner) : SIDA_OK;
}

sida_status sida_learner_step(sida_learner *learner, double rate) {
    int32_t rest = learner->count - learner->next, batch = learner->options.batch;
    int32_t count = rest < batch ? rest : batch;
    assert(count > 0);
    sida_status status = learner->table->step(learner, count, rate);
    learner->next += count;
    return status;
}

sida_status sida_learner_finish(sida_learner *learner) {
    return learner->table->finish ? learner->table->finish(learner) : SIDA_OK;
}

sida_status sida_learner_bad_loss(const sida_dataset *data) {
    return sida_fail(SIDA_ERROR_FORMAT,
                     "%s: the loss is not finite: lower --lr, or its embedding holds values that "
                     "are too large",
                     data->path);
}

sida_status sida_learner_bad_gradient(void) {
    return sida_fail(SIDA_ERROR_FORMAT, "the gradient is not finite: lower --lr");
}
