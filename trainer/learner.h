/* Who does the arithmetic of a training: the loop (train.c) says which sequences come when, and a
 * learner on the CPU or on a GPU computes gradients, clips them and moves the parameters. */
#ifndef SIDA_TRAINER_LEARNER_H
#define SIDA_TRAINER_LEARNER_H

#include "runtime/backend/backend.h"
#include "trainer/checkpoint.h"
#include "trainer/dataset.h"
#include "trainer/loss.h"

typedef struct sida_learner sida_learner;

typedef struct sida_learner_options {
    int32_t batch; /* sequences a step */
    /* Sequences that a device computes at a time; the gradients of a step's parts are added up. 0:
     * as many as have some thousand tokens (learner_cuda.c). The CPU has shards of its own. */
    int32_t device_batch;
    sida_tkd tkd;
    double lambda;
    double clip; /* largest gradient norm; 0: no limit */
    bool tf32;   /* a device may round the factors of products to TF32 */
} sida_learner_options;

/* Whether a learner of such a network can run there: UNSUPPORTED or DEVICE, with what is missing,
 * where it cannot. */
sida_status sida_learner_check(sida_backend *backend, sida_net_kind kind);

/* Trains `state` on `data`, both borrowed. Also fails as sida_learner_check(). Continues from what
 * is in state->net and state->optimiser. */
sida_status sida_learner_create(sida_learner **out, sida_backend *backend, sida_train_state *state,
                                const sida_dataset *data, const sida_learner_options *options);
void sida_learner_destroy(sida_learner *learner); /* takes NULL */

/* The sequences of the steps to come, borrowed until the last of them has been taken: each step
 * trains on the next `batch` of order[0 … count), the last one on the rest. Finishes what was
 * begun. BUDGET where the device has no memory for them: the state is whole. */
sida_status sida_learner_begin(sida_learner *learner, const int32_t *order, int32_t count);

/* One step with learning rate `rate`; counts it in state->optimiser.step and adds its loss and
 * pairs to state->loss_sum and loss_pairs. A device is still at work when this returns: only after
 * finish() is the state whole, and what went wrong may show two steps late. FORMAT where loss or
 * gradient are not finite. After an error the learner is of no more use. */
sida_status sida_learner_step(sida_learner *learner, double rate);
/* Waits for the steps taken and brings all of their results into the state, or fails as the first
 * of them did. */
sida_status sida_learner_finish(sida_learner *learner);

/* --- for learners */

typedef struct sida_learner_table {
    void (*destroy)(sida_learner *learner);
    /* For order[0 … count). NULL: nothing to prepare. */
    sida_status (*begin)(sida_learner *learner);
    /* On order[next … next + count). */
    sida_status (*step)(sida_learner *learner, int32_t count, double rate);
    sida_status (*finish)(sida_learner *learner); /* NULL: always finished */
} sida_learner_table;

struct sida_learner {
    const sida_learner_table *table;
    sida_train_state *state;
    const sida_dataset *data;
    sida_learner_options options;
    const int32_t *order;
    int32_t count, next;
};

sida_status sida_learner_create_cpu(sida_learner **out, sida_train_state *state,
                                    const sida_dataset *data, const sida_learner_options *options);
/* CUDA is built in: for any back-end with its training ops. */
sida_status sida_learner_create_cuda(sida_learner **out, sida_backend *backend,
                                     sida_train_state *state, const sida_dataset *data,
                                     const sida_learner_options *options);
sida_status sida_learner_check_cuda(sida_backend *backend, sida_net_kind kind);
/* What is said of a step whose loss or gradient is not finite. */
sida_status sida_learner_bad_loss(const sida_dataset *data);
sida_status sida_learner_bad_gradient(void);

#endif
