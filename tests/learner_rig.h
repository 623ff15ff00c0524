/* What a learner on a device must do, beside the one on the CPU: run on a GPU, and on the host over
 * tests/train_ops_host.c. */
#ifndef SIDA_TESTS_LEARNER_RIG_H
#define SIDA_TESTS_LEARNER_RIG_H

#include "formats/base/rng.h"
#include "tests/test.h"
#include "trainer/learner.h"

#include <math.h>
#include <string.h>

#define RIG_OK(call)                                                                               \
    do {                                                                                           \
        sida_status rig_status = (call);                                                           \
        if (rig_status != SIDA_OK) fail_msg("%s: %s", #call, sida_last_message());                 \
    } while (0)

/* What makes learners; the second where the device's is to be tested. */
typedef sida_status rig_create(sida_learner **out, sida_backend *backend, sida_train_state *state,
                               const sida_dataset *data, const sida_learner_options *options);

static inline sida_status rig_cpu(sida_learner **out, sida_backend *backend,
                                  sida_train_state *state, const sida_dataset *data,
                                  const sida_learner_options *options) {
    (void)backend;
    return sida_learner_create_cpu(out, state, data, options);
}

typedef struct rig_shape {
    int32_t sequences, longest[2], layers[2], experts, top, vocabulary, d_model, hidden;
    bool equal; /* all sequences as long as the longest */
    uint64_t seed;
} rig_shape;

/* Sizes that are no multiples of a kernel's, sequences without tokens. */
static inline rig_shape rig_default(void) {
    return (rig_shape){.sequences = 40,
                       .longest = {21, 9},
                       .layers = {3, 2},
                       .experts = 12,
                       .top = 5,
                       .vocabulary = 50,
                       .d_model = 48,
                       .hidden = 64,
                       .seed = 1};
}

/* Lengths of 0 … longest; the teacher likes an expert that token and layer choose. */
static inline sida_dataset rig_data(rig_shape r) {
    sida_dataset d = {.path = strdup("made.h5"),
                      .experts = r.experts,
                      .top_k = 1,
                      .top = r.top,
                      .d_model = r.d_model,
                      .vocabulary = r.vocabulary,
                      .sequences = r.sequences,
                      .layers = {r.layers[0], r.layers[1]}};
    sida_rng rng = sida_rng_seed(r.seed);
    for (int side = 0; side < 2; side++) {
        sida_dataset_side *s = &d.sides[side];
        s->offsets = calloc((size_t)r.sequences + 1, sizeof *s->offsets);
        for (int32_t q = 0; q < r.sequences; q++) {
            int64_t n = (int64_t)sida_rng_below(&rng, (uint32_t)r.longest[side] + 1);
            if (r.equal || q == 1) n = r.longest[side];
            s->offsets[q + 1] = s->offsets[q] + (r.layers[side] > 0 ? n : 0);
        }
        s->tokens = s->offsets[r.sequences];
        size_t n = (size_t)s->tokens, pairs = n * (size_t)r.layers[side];
        s->ids = calloc(n + 1, sizeof *s->ids);
        s->top_ids = calloc(pairs * (size_t)r.top + 1, sizeof *s->top_ids);
        s->top_logp = calloc(pairs * (size_t)r.top + 1, sizeof *s->top_logp);
        for (size_t i = 0; i < n; i++)
            s->ids[i] = (int32_t)sida_rng_below(&rng, (uint32_t)r.vocabulary);
        for (size_t i = 0; i < pairs; i++) {
            uint32_t first = (uint32_t)s->ids[i / (size_t)r.layers[side]] * 7 +
                             (uint32_t)(i % (size_t)r.layers[side]);
            for (int32_t j = 0; j < r.top; j++) {
                size_t at = i * (size_t)r.top + (size_t)j;
                s->top_ids[at] = (uint16_t)((first + (uint32_t)j) % (uint32_t)r.experts);
                s->top_logp[at] = sida_f16_from_f32(-0.7f * (float)(j + 1));
            }
        }
    }
    d.embedding = calloc((size_t)(r.vocabulary * r.d_model), sizeof *d.embedding);
    for (int64_t i = 0; i < (int64_t)r.vocabulary * r.d_model; i++)
        d.embedding[i] = sida_rng_normal(&rng);
    return d;
}

static inline sida_train_state rig_state(rig_shape r) {
    sida_train_state state;
    const sida_net_config config = {.d_model = r.d_model,
                                    .hidden = r.hidden,
                                    .lstm_layers = 2,
                                    .experts = r.experts,
                                    .vocabulary = r.vocabulary,
                                    .layers = {r.layers[0], r.layers[1]}};
    RIG_OK(sida_train_state_create(&state, &config, 0.01, 1));
    sida_net_initialise(state.net, 5);
    return state;
}

static inline sida_learner_options rig_options(void) {
    return (sida_learner_options){
        .batch = 8, .tkd = SIDA_TKD_REST, .lambda = 0.3, .clip = 1, .tf32 = false};
}

static inline void rig_order(int32_t *order, int32_t count) {
    sida_dataset_shuffle(order, count, 9, 0);
}

/* Trains `steps` steps and hands the learner over, if wanted. */
static inline void rig_train(sida_train_state *state, rig_create *create, sida_backend *backend,
                             const sida_dataset *data, const sida_learner_options *options,
                             const int32_t *order, int32_t count, int steps, double rate) {
    sida_learner *learner;
    RIG_OK(create(&learner, backend, state, data, options));
    RIG_OK(sida_learner_begin(learner, order, count));
    for (int i = 0; i < steps; i++) RIG_OK(sida_learner_step(learner, rate));
    RIG_OK(sida_learner_finish(learner));
    sida_learner_destroy(learner);
}

static inline void rig_same_bytes(const sida_train_state *a, const sida_train_state *b) {
    size_t bytes = (size_t)a->net->parameter_count * sizeof(float);
    assert_memory_equal(a->net->parameters, b->net->parameters, bytes);
    assert_memory_equal(a->optimiser.first, b->optimiser.first, bytes);
    assert_memory_equal(a->optimiser.second, b->optimiser.second, bytes);
    assert_int_equal(a->optimiser.step, b->optimiser.step);
    assert_memory_equal(&a->loss_sum, &b->loss_sum, sizeof a->loss_sum);
    assert_int_equal(a->loss_pairs, b->loss_pairs);
}

/* A difference's norm is within `tolerance` of the tensor's, tensor by tensor, or where the whole
 * tensor is far below the largest, of a thousandth of that. */
static inline void rig_close(const sida_net *net, const float *got, const float *want,
                             double tolerance) {
    double largest = 0, worst = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int32_t i = 0; i < net->tensor_count; i++) {
            const sida_net_tensor *t = &net->tensors[i];
            int64_t at = t->data - net->parameters;
            double error = 0, norm = 0;
            for (int64_t k = 0; k < t->count; k++) {
                double difference = (double)got[at + k] - (double)want[at + k];
                error += difference * difference;
                norm += (double)want[at + k] * (double)want[at + k];
            }
            if (sqrt(norm) > largest) largest = sqrt(norm);
            if (pass == 0) continue;
            double against = sqrt(norm) > 1e-3 * largest ? sqrt(norm) : 1e-3 * largest;
            if (!(sqrt(error) <= tolerance * against))
                fail_msg("%s: off by %g of %g, allowed %g", t->name, sqrt(error), sqrt(norm),
                         tolerance * against);
            if (sqrt(error) / against > worst) worst = sqrt(error) / against;
        }
    printf("worst tensor off by %.2g, allowed %.2g\n", worst, tolerance);
}

/* One step from zero moments without a clip: then the first moments are a tenth of the gradient. */
static inline void rig_gradient(sida_backend *backend, rig_create *device, rig_shape shape,
                                sida_learner_options options, double tolerance) {
    sida_dataset data = rig_data(shape);
    int32_t order[512];
    assert_true(shape.sequences <= 512);
    rig_order(order, shape.sequences);
    sida_train_state a = rig_state(shape), b = rig_state(shape);
    sida_learner_options cpu = options;
    options.clip = cpu.clip = 0;
    cpu.device_batch = 0;
    rig_train(&a, device, backend, &data, &options, order, shape.sequences, 1, 1e-3);
    rig_train(&b, rig_cpu, NULL, &data, &cpu, order, shape.sequences, 1, 1e-3);
    assert_int_equal(a.loss_pairs, b.loss_pairs);
    assert_true(a.loss_pairs > 0);
    if (!(fabs(a.loss_sum - b.loss_sum) <= tolerance * b.loss_sum))
        fail_msg("loss %.9g, expected %.9g", a.loss_sum, b.loss_sum);
    rig_close(a.net, a.optimiser.first, b.optimiser.first, tolerance);
    sida_train_state_free(&a);
    sida_train_state_free(&b);
    sida_dataset_free(&data);
}

/* 200 steps, each compared: the largest relative difference is printed. */
static inline void rig_curve(sida_backend *backend, rig_create *device, rig_shape shape,
                             sida_learner_options options, double tolerance) {
    sida_dataset data = rig_data(shape);
    int32_t order[512];
    sida_train_state states[2] = {rig_state(shape), rig_state(shape)};
    sida_learner *learners[2];
    double losses[2] = {0}, begin = 0, worst = 0;
    assert_true(shape.sequences <= 512);
    RIG_OK(device(&learners[0], backend, &states[0], &data, &options));
    RIG_OK(sida_learner_create_cpu(&learners[1], &states[1], &data, &options));
    for (int step = 0, left = 0; step < 200; step++, left--) {
        if (left == 0) {
            sida_dataset_shuffle(order, shape.sequences, 3, step);
            left = (shape.sequences - 1) / options.batch + 1;
            for (int i = 0; i < 2; i++)
                RIG_OK(sida_learner_begin(learners[i], order, shape.sequences));
        }
        for (int i = 0; i < 2; i++) {
            double sum = states[i].loss_sum;
            int64_t pairs = states[i].loss_pairs;
            RIG_OK(sida_learner_step(learners[i], 5e-3));
            RIG_OK(sida_learner_finish(learners[i]));
            losses[i] = (states[i].loss_sum - sum) / (double)(states[i].loss_pairs - pairs);
        }
        double error = fabs(losses[0] - losses[1]) / losses[1];
        if (step == 0) begin = losses[1];
        if (error > worst) worst = error;
        if (!(error <= tolerance))
            fail_msg("step %d: loss %g, expected %g", step, losses[0], losses[1]);
    }
    printf("200 steps, loss from %.4f to %.4f: off by %.2g at most, allowed %.2g\n", begin,
           losses[1], worst, tolerance);
    assert_true(losses[1] < 0.8 * begin);
    for (int i = 0; i < 2; i++) {
        sida_learner_destroy(learners[i]);
        sida_train_state_free(&states[i]);
    }
    sida_dataset_free(&data);
}

/* The same bytes when it is done again; when the host waits for every step; and when the state is
 * taken up by another learner in the middle. Two epochs in different orders. */
static inline void rig_bytes(sida_backend *backend, rig_create *device, rig_shape shape,
                             sida_learner_options options) {
    enum { AGAIN, WAITING, RESUMED, WAYS };
    sida_dataset data = rig_data(shape);
    int32_t orders[2][512], batches = (shape.sequences - 1) / options.batch + 1;
    assert_true(shape.sequences <= 512 && batches > 2);
    for (int epoch = 0; epoch < 2; epoch++)
        sida_dataset_shuffle(orders[epoch], shape.sequences, 3, epoch);
    sida_train_state reference = {0};
    for (int way = -1; way < WAYS; way++) {
        sida_train_state state = rig_state(shape);
        sida_learner *learner;
        RIG_OK(device(&learner, backend, &state, &data, &options));
        for (int epoch = 0; epoch < 2; epoch++) {
            RIG_OK(sida_learner_begin(learner, orders[epoch], shape.sequences));
            for (int b = 0; b < batches; b++) {
                RIG_OK(sida_learner_step(learner, 5e-3));
                if (way == WAITING) RIG_OK(sida_learner_finish(learner));
                if (way != RESUMED || b != 1) continue;
                RIG_OK(sida_learner_finish(learner));
                sida_learner_destroy(learner);
                RIG_OK(device(&learner, backend, &state, &data, &options));
                int32_t done = 2 * options.batch;
                RIG_OK(sida_learner_begin(learner, orders[epoch] + done, shape.sequences - done));
            }
        }
        RIG_OK(sida_learner_finish(learner));
        sida_learner_destroy(learner);
        assert_int_equal(state.optimiser.step, 2 * batches);
        if (way < 0) {
            reference = state;
            continue;
        }
        rig_same_bytes(&state, &reference);
        sida_train_state_free(&state);
    }
    sida_train_state_free(&reference);
    sida_dataset_free(&data);
}

static inline void rig_refused(sida_status status, sida_status code, const char *words) {
    if (status != code || !strstr(sida_last_message(), words))
        fail_msg("status %d, '%s': expected %d and '%s'", status, sida_last_message(), code, words);
}

/* Memory runs out at the beginning of a training, and of its second epoch: the message names the
 * option, the state is that after the last step, and with the option it goes on. */
static inline void rig_memory(sida_backend *backend, rig_create *device, rig_shape shape,
                              sida_learner_options options) {
    sida_dataset data = rig_data(shape);
    int32_t same[512];
    sida_train_state a = rig_state(shape), b = rig_state(shape);
    sida_learner *learner;
    sida_memory_usage usage;
    assert_true(options.batch > 2 && options.batch <= 512);
    for (int i = 0; i < 512; i++) same[i] = 1; /* all alike, so that their memory is known */
    RIG_OK(device(&learner, backend, &a, &data, &options));
    sida_backend_memory(backend, &usage);
    RIG_OK(sida_backend_set_cap(backend, usage.used_bytes + 1000));
    rig_refused(sida_learner_begin(learner, same, options.batch), SIDA_ERROR_BUDGET,
                "--device-batch");
    RIG_OK(sida_learner_finish(learner));
    rig_same_bytes(&a, &b);
    sida_learner_destroy(learner);
    RIG_OK(sida_backend_set_cap(backend, SIZE_MAX));

    RIG_OK(device(&learner, backend, &a, &data, &options));
    RIG_OK(sida_learner_begin(learner, same, 2)); /* two sequences */
    RIG_OK(sida_learner_step(learner, 1e-3));
    sida_backend_memory(backend, &usage);
    RIG_OK(sida_backend_set_cap(backend, usage.used_bytes + 1000));
    RIG_OK(sida_learner_begin(learner, same, 2));
    RIG_OK(sida_learner_step(learner, 1e-3));
    rig_refused(sida_learner_begin(learner, same, options.batch), SIDA_ERROR_BUDGET,
                "--device-batch");
    RIG_OK(sida_learner_finish(learner));
    sida_learner_destroy(learner);
    RIG_OK(sida_backend_set_cap(backend, SIZE_MAX));
    for (int i = 0; i < 2; i++) rig_train(&b, device, backend, &data, &options, same, 2, 1, 1e-3);
    rig_same_bytes(&a, &b);

    /* Two at a time take what two alone took. */
    RIG_OK(sida_backend_set_cap(backend, usage.used_bytes + 1000));
    options.device_batch = 2;
    rig_train(&a, device, backend, &data, &options, same, options.batch, 1, 1e-3);
    RIG_OK(sida_backend_set_cap(backend, SIZE_MAX));
    assert_int_equal(a.optimiser.step, 3);
    sida_train_state_free(&a);
    sida_train_state_free(&b);
    sida_dataset_free(&data);
}

/* A rate that blows up shows within two steps, and what it did is never handed out as a state. */
static inline void rig_not_finite(sida_backend *backend, rig_create *device, rig_shape shape) {
    sida_dataset data = rig_data(shape);
    int32_t order[512];
    assert_true(shape.sequences <= 512);
    rig_order(order, shape.sequences);
    sida_learner_options options = rig_options();
    options.clip = 0;
    for (int wait = 0; wait < 2; wait++) {
        sida_train_state state = rig_state(shape);
        sida_learner *learner;
        sida_status status = SIDA_OK;
        RIG_OK(device(&learner, backend, &state, &data, &options));
        RIG_OK(sida_learner_begin(learner, order, shape.sequences));
        int step = 0;
        for (; step < 5 && status == SIDA_OK; step++) {
            status = sida_learner_step(learner, 1e30);
            if (status == SIDA_OK && wait) status = sida_learner_finish(learner);
        }
        rig_refused(status, SIDA_ERROR_FORMAT, "finite");
        assert_true(step <= 3);
        assert_int_not_equal(sida_learner_finish(learner), SIDA_OK);
        sida_learner_destroy(learner);
        sida_train_state_free(&state);
    }
    /* Thrown away in the middle of an epoch. */
    sida_train_state state = rig_state(shape);
    sida_learner *learner;
    RIG_OK(device(&learner, backend, &state, &data, &options));
    RIG_OK(sida_learner_begin(learner, order, shape.sequences));
    RIG_OK(sida_learner_step(learner, 1e-3));
    sida_learner_destroy(learner);
    sida_train_state_free(&state);
    sida_dataset_free(&data);
}

#endif
