/* Training on the GPU beside the CPU's: gradients, losses, bytes, memory; and whole trainings, with
 * their files. */
#include "tests/gpu/gpu.h"
#include "tests/learner_rig.h"
#include "tests/train_data.h"
#include "trainer/train.h"

#include <unistd.h>

static sida_backend *backend;

/* In fp32 both round products and sums once an operation; a gradient is a sum of thousands of
 * terms in another order. TF32 rounds factors to 11 bits, 5e-4 each, through some six products. */
static const double fp32_tolerance = 1e-4, tf32_tolerance = 1e-2;

static void check_gradients(bool tf32, double tolerance) {
    static const int32_t layers[3][2] = {{3, 2}, {3, 0}, {0, 2}};
    for (int i = 0; i < gpu_cases(3, 1); i++)
        for (int variant = 0; variant < gpu_cases(2, 1); variant++) {
            rig_shape shape = rig_default();
            shape.layers[0] = layers[i][0];
            shape.layers[1] = layers[i][1];
            sida_learner_options options = rig_options();
            options.tf32 = tf32;
            options.device_batch = variant == 1 ? 3 : 0;
            options.tkd = variant == 1 ? SIDA_TKD_L1_RENORM : SIDA_TKD_REST;
            rig_gradient(backend, sida_learner_create, shape, options, tolerance);
            /* 1: a choice that is not the list's first. */
            for (int32_t k = 1; k <= 5; k += gpu_cases(2, 5)) {
                shape.top_k = k;
                shape.labels = variant == 1 ? SIDA_LABELS_WEIGHT : SIDA_LABELS_EVEN;
                options.tkd = (sida_tkd)((k + 1 + variant) % SIDA_TKD_KINDS);
                rig_gradient(backend, sida_learner_create, shape, options, tolerance);
            }
        }
    for (int i = 0; i < gpu_cases(3, 1); i++)
        for (int variant = 1; variant < RIG_VARIANTS; variant++) { /* of the network */
            rig_shape shape = rig_variant(layers[i][0], layers[i][1], variant);
            sida_learner_options options = rig_options();
            options.tf32 = tf32;
            options.device_batch = variant == 1 ? 3 : 0;
            rig_gradient(backend, sida_learner_create, shape, options, tolerance);
        }
}

static void gradients(void **state) {
    (void)state;
    check_gradients(false, fp32_tolerance);
}
static void gradients_tf32(void **state) {
    (void)state;
    check_gradients(true, tf32_tolerance);
}

/* The real widths; more rows than a chunk, sequences of equal length, more experts than a warp. */
static void wide_gradients(void **state) {
    (void)state;
    rig_shape shape = rig_default();
    shape.d_model = 768;
    shape.hidden = 256;
    shape.experts = 128;
    shape.top = 30;
    shape.vocabulary = 300;
    shape.layers[0] = 2;
    shape.layers[1] = 1;
    shape.longest[0] = 70;
    shape.longest[1] = 40;
    sida_learner_options options = rig_options();
    options.batch = 40;
    rig_gradient(backend, sida_learner_create, shape, options, fp32_tolerance);
    shape.bidirectional = true;
    shape.attention = SIDA_NET_SOFTMAX;
    rig_gradient(backend, sida_learner_create, shape, options, fp32_tolerance);
    shape.bidirectional = false;
    shape.attention = SIDA_NET_SPARSEMAX;
    shape.blocks = 2;
    shape.longest[0] = 200; /* beyond the distance of the positions */
    rig_gradient(backend, sida_learner_create, shape, options, fp32_tolerance);
    shape.blocks = 0;
    shape.bidirectional = true;
    shape.d_model = shape.hidden = 64;
    shape.experts = 8;
    shape.top = 8;
    shape.layers[0] = shape.layers[1] = 1;
    shape.sequences = 130;
    shape.longest[0] = 100;
    shape.equal = true;
    options.batch = 130;
    rig_gradient(backend, sida_learner_create, shape, options, fp32_tolerance);
    shape.bidirectional = false;
    shape.blocks = 1;
    rig_gradient(backend, sida_learner_create, shape, options, fp32_tolerance);
}

/* Rounding grows with the steps: measured on the CPU between two orders of the same sums it is
 * some 1e-7 after 200 of them. */
static void curve(void **state) {
    (void)state;
    rig_curve(backend, sida_learner_create, rig_default(), rig_options(), 1e-3);
    rig_curve(backend, sida_learner_create, rig_variant(3, 2, 1), rig_options(), 1e-3);
    rig_curve(backend, sida_learner_create, rig_variant(3, 2, RIG_TRANSFORMER), rig_options(),
              2e-2);
}
static void curve_tf32(void **state) {
    (void)state;
    sida_learner_options options = rig_options();
    options.tf32 = true;
    rig_curve(backend, sida_learner_create, rig_default(), options, 2e-2);
}

static void same_bytes(void **state) {
    (void)state;
    sida_learner_options options = rig_options();
    for (int tf32 = 0; tf32 < 2; tf32++)
        for (int part = 0; part < 6; part += 5) {
            options.tf32 = tf32;
            options.device_batch = part;
            rig_bytes(backend, sida_learner_create, rig_default(), options);
            rig_bytes(backend, sida_learner_create, rig_variant(3, 2, 1), options);
            rig_bytes(backend, sida_learner_create, rig_variant(3, 2, RIG_TRANSFORMER), options);
        }
}

static void memory(void **state) {
    (void)state;
    rig_memory(backend, sida_learner_create, rig_default(), rig_options());
    rig_memory(backend, sida_learner_create, rig_variant(3, 2, RIG_TRANSFORMER), rig_options());
}

static void not_finite(void **state) {
    (void)state;
    rig_not_finite(backend, sida_learner_create, rig_default());
    rig_not_finite(backend, sida_learner_create, rig_variant(3, 2, RIG_TRANSFORMER));
}

/* --- whole trainings */

static char folder[] = "/tmp/sida-train-cuda-XXXXXX";
static const char *source;
static char train_path[64], valid_path[64], output_path[64], checkpoint[80];

typedef struct stop {
    int64_t steps, at;
} stop;

static sida_status on_step(void *context, double fraction, int64_t tokens) {
    stop *s = context;
    (void)fraction;
    (void)tokens;
    return ++s->steps == s->at ? sida_fail(SIDA_ERROR_CANCELLED, "stopped") : SIDA_OK;
}

static sida_train_options small_options(stop *s) {
    sida_train_options o = sida_train_defaults();
    o.trace = train_path;
    o.valid = valid_path;
    o.output = output_path;
    o.device = "cuda";
    o.source = source;
    o.epochs = 3;
    o.warmup = 3;
    o.lr = 0.01;
    o.on_step = on_step;
    o.context = s;
    return o;
}

static void expect_same(const test_bytes *reference) {
    test_bytes bytes = test_read(output_path);
    assert_int_equal(bytes.size, reference->size);
    assert_memory_equal(bytes.data, reference->data, bytes.size);
    free(bytes.data);
    assert_int_equal(access(checkpoint, F_OK), -1);
    assert_int_equal(unlink(output_path), 0);
}

static void files_of(const char *name) {
    source = name;
    stop none = {0};
    sida_train_options o = small_options(&none);
    json_t *summary;
    OK(sida_train(&o, &summary));
    assert_string_equal(json_string_value(json_object_get(summary, "device")), "cuda");
    assert_true(json_integer_value(json_object_get(summary, "device_bytes_peak")) > 0);
    const json_t *loss = json_object_get(summary, "loss");
    assert_true(json_real_value(json_array_get(loss, 2)) <
                json_real_value(json_array_get(loss, 0)));
    json_decref(summary);
    test_bytes reference = test_read(output_path);
    unlink(output_path);
    OK(sida_train(&o, NULL));
    expect_same(&reference);
    /* Stopped in the middle of an epoch, at its end, and after a checkpoint; 4 steps an epoch. */
    static const int steps[] = {1, 4, 6, 9};
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        stop s = {.at = steps[i]};
        o = small_options(&s);
        o.checkpoint_every = i == 3 ? 2 : 0;
        assert_int_equal(sida_train(&o, NULL), SIDA_ERROR_CANCELLED);
        assert_int_equal(access(checkpoint, F_OK), 0);
        if (i == 0) { /* another device, other products */
            sida_train_options other = small_options(&none);
            other.resume = true;
            other.device = "cpu";
            rig_refused(sida_train(&other, NULL), SIDA_ERROR_MISMATCH, "--device cuda");
            other = small_options(&none);
            other.resume = true;
            other.fp32 = true;
            rig_refused(sida_train(&other, NULL), SIDA_ERROR_MISMATCH, "training.products");
        }
        o = small_options(&none);
        o.resume = true;
        OK(sida_train(&o, NULL));
        expect_same(&reference);
    }
    /* A rate that blows up is said, not written down. */
    o = small_options(&none);
    o.lr = 1e30;
    o.warmup = 0;
    o.clip = 0;
    rig_refused(sida_train(&o, NULL), SIDA_ERROR_FORMAT, "finite");
    assert_int_equal(access(output_path, F_OK), -1);
    assert_int_equal(access(checkpoint, F_OK), -1);
    free(reference.data);
}

static void files(void **state) {
    (void)state;
    train_data d = train_data_default();
    assert_non_null(mkdtemp(folder));
    snprintf(train_path, sizeof train_path, "%s/T.h5", folder);
    snprintf(valid_path, sizeof valid_path, "%s/V.h5", folder);
    snprintf(output_path, sizeof output_path, "%s/P.h5", folder);
    snprintf(checkpoint, sizeof checkpoint, "%s.checkpoint", output_path);
    train_data_write(&d, train_path);
    d.seed = 2;
    train_data_write(&d, valid_path);
    files_of("transformer");
    files_of("lstm");
    unlink(train_path);
    unlink(valid_path);
    rmdir(folder);
}

int main(void) {
    backend = gpu_open();
    if (!backend) return test_skip(sida_last_message());
    if (sida_learner_check(backend, SIDA_NET_LSTM) != SIDA_OK) {
        sida_backend_destroy(backend);
        return test_skip(sida_last_message());
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gradients),      cmocka_unit_test(gradients_tf32),
        cmocka_unit_test(wide_gradients), cmocka_unit_test(curve),
        cmocka_unit_test(curve_tf32),     cmocka_unit_test(same_bytes),
        cmocka_unit_test(memory),         cmocka_unit_test(not_finite),
        cmocka_unit_test(files)};
    /* The others launch the same kernels of ours more often, or cuDNN's. */
    const struct CMUnitTest few[] = {cmocka_unit_test(gradients_tf32)};
    int failed = gpu_small() ? cmocka_run_group_tests(few, NULL, NULL)
                             : cmocka_run_group_tests(tests, NULL, NULL);
    sida_backend_destroy(backend);
    return failed;
}
