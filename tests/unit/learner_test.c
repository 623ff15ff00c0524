/* The learner for a GPU, on the host: its input, the order of its work, its memory, what it does
 * when something fails. Its ops are tests/train_ops_host.c's; tests/gpu/train_cuda_test.c has the
 * real ones. */
#include "tests/learner_rig.h"
#include "tests/streams_host.h"
#include "trainer/feed.h"

#include <unistd.h>

/* ThreadSanitizer, which is slow, is to look at the threads; the other builds look at the numbers.
 */
#ifdef __SANITIZE_THREAD__
enum { NUMBERS = 0 };
#else
enum { NUMBERS = 1 };
#endif

/* Slow copies: what is not ordered by an event shows. */
static void before_copy(void *context, size_t bytes) {
    (void)context, (void)bytes;
    usleep(200);
}

static sida_backend *open_device(void) {
    sida_backend *backend;
    RIG_OK(sida_backend_create_cpu(
        &backend, &(sida_cpu_options){.poison = true, .before_copy = before_copy}));
    return backend;
}

/* Both compute with the same products; sums over sequences are in another order. */
static const double tolerance = 1e-5;

static void gradients(void **state) {
    (void)state;
    sida_backend *backend = open_device();
    static const int32_t layers[3][2] = {{3, 2}, {3, 0}, {0, 2}};
    for (int i = 0; i < (NUMBERS ? 3 : 1); i++)
        for (int way = 0; way < 2 * RIG_VARIANTS; way++) {
            int part = way % 2 ? 3 : 0;
            rig_shape shape = rig_variant(layers[i][0], layers[i][1], way / 2);
            sida_learner_options options = rig_options();
            options.device_batch = part;
            options.tkd = part ? SIDA_TKD_L1_RENORM : SIDA_TKD_REST;
            rig_gradient(backend, sida_learner_create_cuda, shape, options, tolerance);
            for (int32_t k = 1; way < 2 && k <= 5;
                 k += 2) { /* 1: a choice that is not the list's first */
                shape.top_k = k;
                shape.labels = part ? SIDA_LABELS_WEIGHT : SIDA_LABELS_EVEN;
                options.tkd = (sida_tkd)((k + 1 + (part > 0)) % SIDA_TKD_KINDS);
                rig_gradient(backend, sida_learner_create_cuda, shape, options, tolerance);
            }
        }
    if (!NUMBERS) goto out;
    /* More rows than are computed at a time. */
    rig_shape shape = rig_default();
    shape.sequences = shape.longest[0] = 100;
    shape.longest[1] = 90;
    shape.hidden = shape.d_model = shape.experts = 8;
    sida_learner_options options = rig_options();
    options.batch = 400;
    shape.equal = true;
    shape.bidirectional = true;
    rig_gradient(backend, sida_learner_create_cuda, shape, options, 5 * tolerance);
    shape.bidirectional = false;
    shape.blocks = 1;
    shape.hidden = 32;
    rig_gradient(backend, sida_learner_create_cuda, shape, options, 5 * tolerance);
out:
    sida_backend_destroy(backend);
}

static void curve(void **state) {
    (void)state;
    if (!NUMBERS) skip();
    sida_backend *backend = open_device();
    rig_curve(backend, sida_learner_create_cuda, rig_default(), rig_options(), 1e-3);
    rig_curve(backend, sida_learner_create_cuda, rig_variant(3, 2, 1), rig_options(), 1e-3);
    rig_curve(backend, sida_learner_create_cuda, rig_variant(3, 2, RIG_TRANSFORMER), rig_options(),
              1e-2);
    sida_backend_destroy(backend);
}

static void same_bytes(void **state) {
    (void)state;
    sida_backend *backend = open_device();
    sida_learner_options options = rig_options();
    for (int part = 0; part < 6; part += 5) {
        options.device_batch = part;
        rig_bytes(backend, sida_learner_create_cuda, rig_default(), options);
        rig_bytes(backend, sida_learner_create_cuda, rig_variant(3, 2, RIG_TRANSFORMER), options);
    }
    sida_backend_destroy(backend);
}

static void memory(void **state) {
    (void)state;
    sida_backend *backend = open_device();
    rig_memory(backend, sida_learner_create_cuda, rig_default(), rig_options());
    rig_memory(backend, sida_learner_create_cuda, rig_variant(3, 2, RIG_TRANSFORMER),
               rig_options());
    sida_backend_destroy(backend);
}

static void not_finite(void **state) {
    (void)state;
    sida_backend *backend = open_device();
    rig_not_finite(backend, sida_learner_create_cuda, rig_default());
    rig_not_finite(backend, sida_learner_create_cuda, rig_variant(3, 2, RIG_TRANSFORMER));
    sida_backend_destroy(backend);
}

/* Whichever of its two streams is ahead, as far as events let it: the same bytes. And when it is
 * thrown away with work on both. */
static void streams(void **state) {
    (void)state;
    static const sida_stream_kind eager[2] = {SIDA_STREAM_COMPUTE, SIDA_STREAM_BESIDE};
    static const int32_t layers[3][2] = {{3, 2}, {3, 0}, {0, 2}};
    int32_t order[64];
    for (int way = 0; way < 2 * RIG_VARIANTS; way++) {
        const int32_t *sides = layers[way % 3];
        rig_shape shape = rig_variant(sides[0], sides[1], way / 2);
        sida_dataset data = rig_data(shape);
        sida_learner_options options = rig_options();
        options.device_batch = way % 2 ? 3 : 0;
        rig_order(order, shape.sequences);
        sida_train_state plain = rig_state(shape);
        sida_backend *backend = open_device();
        rig_train(&plain, sida_learner_create_cuda, backend, &data, &options, order,
                  shape.sequences, 4, 1e-3);
        sida_backend_destroy(backend);
        for (int i = 0; i < 2; i++) {
            sida_train_state s = rig_state(shape);
            sida_learner *learner;
            backend = open_device();
            streams_host_begin(backend, eager[i]);
            rig_train(&s, sida_learner_create_cuda, backend, &data, &options, order,
                      shape.sequences, 4, 1e-3);
            rig_same_bytes(&s, &plain);
            RIG_OK(sida_learner_create_cuda(&learner, backend, &s, &data, &options));
            RIG_OK(sida_learner_begin(learner, order, shape.sequences));
            RIG_OK(sida_learner_step(learner, 1e-3));
            sida_learner_destroy(learner);
            sida_train_state_free(&s);
            sida_backend_destroy(backend);
        }
        sida_train_state_free(&plain);
        sida_dataset_free(&data);
    }
}

/* A copy that fails is an error of the step, not a wrong result. */
static void lost_device(void **state) {
    (void)state;
    sida_backend *backend;
    rig_shape shape = rig_default();
    sida_dataset data = rig_data(shape);
    sida_learner_options options = rig_options();
    int32_t order[64];
    rig_order(order, shape.sequences);
    for (int copy = 1; copy <= 3; copy++) {
        sida_train_state s = rig_state(shape);
        sida_learner *learner;
        sida_status status = SIDA_OK;
        RIG_OK(sida_backend_create_cpu(&backend, &(sida_cpu_options){.fail_copy = copy}));
        RIG_OK(sida_learner_create_cuda(&learner, backend, &s, &data, &options));
        RIG_OK(sida_learner_begin(learner, order, shape.sequences));
        for (int step = 0; step < 5 && status == SIDA_OK; step++)
            status = sida_learner_step(learner, 1e-3);
        rig_refused(status, SIDA_ERROR_DEVICE, "copy");
        assert_int_not_equal(sida_learner_finish(learner), SIDA_OK);
        sida_learner_destroy(learner);
        sida_train_state_free(&s);
        sida_backend_destroy(backend);
    }
    sida_dataset_free(&data);
}

/* Every token of every sequence, once, where the maps say that it is. */
static void check_input(int32_t top_k, sida_labels labels) {
    sida_backend *backend = open_device();
    rig_shape shape = rig_default();
    shape.top_k = top_k;
    shape.labels = labels;
    sida_dataset data = rig_data(shape);
    sida_stream *stream;
    sida_feed *feed;
    int32_t order[64], batch = 9, at_a_time = 4;
    rig_order(order, shape.sequences);
    RIG_OK(sida_stream_create(backend, &stream, SIDA_STREAM_COMPUTE));
    RIG_OK(sida_feed_create(&feed, backend, &data, batch, at_a_time, NULL));
    for (int round = 0; round < 2; round++) {
        RIG_OK(sida_feed_begin(feed, order, shape.sequences));
        assert_int_equal(sida_feed_get_limits(feed)->parts, 3);
        for (int32_t first = 0; first < shape.sequences; first += batch)
            for (int32_t at = first; at < first + batch && at < shape.sequences; at += at_a_time) {
                int32_t end = first + batch < shape.sequences ? first + batch : shape.sequences;
                int32_t count = end - at < at_a_time ? end - at : at_a_time;
                sida_feed_part *part;
                RIG_OK(sida_feed_take(feed, stream, &part));
                for (int side = 0; side < 2; side++) {
                    const sida_dataset_side *from = &data.sides[side];
                    const sida_feed_side *s = &part->sides[side], *other = &part->sides[!side];
                    int64_t tokens = 0, width = (int64_t)data.layers[side] * data.top;
                    int64_t chosen = (int64_t)data.layers[side] * top_k;
                    uint16_t want[3 * 5]; /* of a token: layers, top_k */
                    float weights[3 * 5];
                    assert_true((s->labels != NULL) == (top_k > 0));
                    for (int32_t i = 0; i < count; i++) {
                        int32_t q = order[at + i], r = 0;
                        int64_t begin = from->offsets[q], n = from->offsets[q + 1] - begin;
                        int64_t there =
                            data.sides[!side].offsets[q + 1] - data.sides[!side].offsets[q];
                        if (n == 0) continue;
                        /* Its rank is the one whose first token is the next of the part. */
                        while (r < s->sequences && s->source[s->start[r] + s->step[0]] != tokens)
                            r++;
                        assert_true(r < s->sequences);
                        assert_int_equal(s->count[r], n);
                        assert_int_equal(s->lengths[r], n);
                        assert_int_equal(s->other_count[r], there);
                        if (there > 0) assert_int_equal(other->count[s->other_start[r]], there);
                        for (int64_t t = 0; t < n; t++) {
                            int32_t row = s->start[r] + s->step[t], source = s->source[row];
                            assert_int_equal(s->ids[row], from->ids[begin + t]);
                            assert_int_equal(source, tokens + t);
                            assert_memory_equal(s->top_ids + source * width,
                                                from->top_ids + (begin + t) * width,
                                                (size_t)width * 2);
                            assert_memory_equal(s->top_logp + source * width,
                                                from->top_logp + (begin + t) * width,
                                                (size_t)width * 2);
                            if (top_k == 0) continue;
                            sida_dataset_labels(want, weights, &data, side, begin + t, 1);
                            assert_memory_equal(s->labels + source * chosen, want,
                                                (size_t)chosen * sizeof *want);
                            assert_memory_equal(s->label_weights + source * chosen, weights,
                                                (size_t)chosen * sizeof *weights);
                        }
                        tokens += n;
                    }
                    assert_int_equal(tokens, s->tokens);
                    assert_int_equal(s->step[s->longest], tokens);
                    for (int32_t r = 1; r < s->sequences; r++)
                        assert_true(s->count[r] <= s->count[r - 1] && s->start[r] == r);
                }
                RIG_OK(sida_feed_give(feed, stream, part));
                if (round == 0 && first > 0) goto next; /* begun again in the middle */
            }
    next:;
    }
    sida_feed_destroy(feed);
    sida_stream_destroy(stream);
    sida_dataset_free(&data);
    sida_backend_destroy(backend);
}

static void input(void **state) {
    (void)state;
    check_input(0, SIDA_LABELS_EVEN);
    check_input(1, SIDA_LABELS_EVEN);
    check_input(5, SIDA_LABELS_WEIGHT);
}

/* A model of one expert that chose the first of each list needs no labels on the device. */
static void no_labels(void **state) {
    (void)state;
    sida_backend *backend = open_device();
    rig_shape shape = rig_default();
    shape.top_k = 1;
    sida_dataset data = rig_data(shape);
    sida_stream *stream;
    int32_t order[64];
    rig_order(order, shape.sequences);
    RIG_OK(sida_stream_create(backend, &stream, SIDA_STREAM_COMPUTE));
    for (int other = 0; other < 2; other++) {
        sida_feed *feed;
        sida_feed_part *part;
        for (int side = 0; side < 2; side++)
            for (int64_t i = 0; i < data.sides[side].tokens * data.layers[side]; i++)
                data.sides[side].experts[i] = data.sides[side].top_ids[i * data.top];
        if (other) data.sides[1].experts[3] ^= 1;
        RIG_OK(sida_feed_create(&feed, backend, &data, 8, 0, NULL));
        RIG_OK(sida_feed_begin(feed, order, shape.sequences));
        RIG_OK(sida_feed_take(feed, stream, &part));
        for (int side = 0; side < 2; side++)
            assert_true((part->sides[side].labels != NULL) == (other == 1));
        RIG_OK(sida_feed_give(feed, stream, part));
        sida_feed_destroy(feed);
    }
    sida_stream_destroy(stream);
    sida_dataset_free(&data);
    sida_backend_destroy(backend);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(input),      cmocka_unit_test(no_labels),   cmocka_unit_test(gradients),
        cmocka_unit_test(curve),      cmocka_unit_test(same_bytes),  cmocka_unit_test(memory),
        cmocka_unit_test(not_finite), cmocka_unit_test(lost_device), cmocka_unit_test(streams)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
