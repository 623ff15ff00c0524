/* What the tests of CUDA's ops share: the device, and the memory of one case. */
#ifndef SIDA_TESTS_GPU_OP_CASE_H
#define SIDA_TESTS_GPU_OP_CASE_H

#include "formats/base/memory.h"
#include "formats/base/rng.h"
#include "runtime/ops/ops.h"
#include "tests/gpu/gpu.h"

/* Tolerances, of the norm: 1e-5 where both sides sum in fp32 in different orders (some thousand
 * terms of 6e-8 each); 4e-3 where the device rounds activations to bf16, half a step of 2^-8 at
 * most and independent of one another. A wrong element or formula shows at 1e-1. */
static const double tight = 1e-5, rounded = 4e-3;

static sida_backend *backend;
static sida_stream *stream;
static sida_rng rng;

/* --- memory of one case */

enum { MOST_BUFFERS = 128 };
static sida_buffer *buffers[MOST_BUFFERS];
static float *blocks[MOST_BUFFERS];
static int buffer_count, block_count;

static inline void *room(size_t bytes) {
    assert_true(buffer_count < MOST_BUFFERS);
    OK(sida_buffer_create(backend, &buffers[buffer_count], SIDA_MEMORY_DEVICE, bytes, "case"));
    return buffers[buffer_count++]->data;
}

/* A device copy. */
static inline void *put(const void *data, size_t bytes) {
    void *to = room(bytes);
    OK(sida_copy(stream, to, data, bytes));
    OK(sida_stream_synchronize(stream));
    return to;
}

static inline float *put_floats(const float *data, int64_t count) {
    return put(data, (size_t)count * sizeof *data);
}

static inline void get(void *to, const void *from, size_t bytes) {
    OK(sida_copy(stream, to, from, bytes));
    OK(sida_stream_synchronize(stream));
}

/* Host memory of the case. */
static inline float *host(int64_t count) {
    assert_true(block_count < MOST_BUFFERS);
    OK(SIDA_ALLOC(&blocks[block_count], count, "case"));
    return blocks[block_count++];
}

static inline float *normal(int64_t count, float scale) {
    float *values = host(count);
    for (int64_t i = 0; i < count; i++) values[i] = scale * sida_rng_normal(&rng);
    return values;
}

/* Values in a stored type, in the first bytes of a block. */
static inline void *stored(int64_t count, float scale, sida_dtype dtype) {
    float *values = normal(count, scale);
    uint16_t *bits = (uint16_t *)values;
    for (int64_t i = 0; i < count && dtype != SIDA_F32; i++) {
        uint32_t wide;
        memcpy(&wide, &values[i], sizeof wide);
        bits[i] = dtype == SIDA_F16 ? sida_f16_from_f32(values[i]) : (uint16_t)(wide >> 16);
    }
    return values;
}

/* Rounded to the nearest, ties to even; not for NaN. */
static inline uint16_t bf16_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline void end_case(void) {
    while (buffer_count > 0) sida_buffer_destroy(buffers[--buffer_count]);
    while (block_count > 0) free(blocks[--block_count]);
}

static inline const sida_ops *cuda(void) {
    const sida_ops *ops = sida_ops_of(backend);
    assert_ptr_equal(ops, &sida_ops_cuda);
    return ops;
}

/* Opens the device and runs the tests; their process's exit status. */
static inline int run_op_tests(const struct CMUnitTest *tests, size_t count) {
    backend = gpu_open();
    if (!backend) return test_skip(sida_last_message());
    rng = sida_rng_seed(11);
    int failed = 1;
    if (sida_stream_create(backend, &stream, SIDA_STREAM_COMPUTE) == SIDA_OK) {
        failed = _cmocka_run_group_tests("ops on CUDA", tests, count, NULL, NULL);
        sida_stream_destroy(stream);
    }
    sida_backend_destroy(backend);
    return failed;
}

#endif
