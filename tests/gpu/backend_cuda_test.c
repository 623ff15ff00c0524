/* The CUDA back-end: copies, order, the cap, refusals. */
#include "tests/gpu/gpu.h"

static sida_backend *backend;

static void fill(uint32_t *words, size_t count, uint32_t seed) {
    for (size_t i = 0; i < count; i++) words[i] = seed + (uint32_t)i * 2654435761u;
}

static void test_copies(void **state) {
    (void)state;
    enum { COUNT = 100003 };
    const size_t bytes = COUNT * sizeof(uint32_t);
    sida_buffer *host, *back, *device;
    sida_stream *stream;
    OK(sida_buffer_create(backend, &host, SIDA_MEMORY_HOST, bytes, "host"));
    OK(sida_buffer_create(backend, &back, SIDA_MEMORY_HOST, bytes, "back"));
    OK(sida_buffer_create(backend, &device, SIDA_MEMORY_DEVICE, bytes, "device"));
    OK(sida_stream_create(backend, &stream, SIDA_STREAM_COPY));
    assert_int_equal((uintptr_t)device->data % 256, 0);
    /* Poison, then data; from pinned memory and from anywhere. */
    OK(sida_copy(stream, back->data, device->data, bytes));
    OK(sida_stream_synchronize(stream));
    for (size_t i = 0; i < COUNT; i++) assert_int_equal(((uint32_t *)back->data)[i], UINT32_MAX);
    fill(host->data, COUNT, 5);
    OK(sida_copy(stream, device->data, host->data, bytes));
    OK(sida_copy(stream, back->data, device->data, bytes));
    OK(sida_stream_synchronize(stream));
    assert_memory_equal(back->data, host->data, bytes);
    uint32_t *words = malloc(bytes), *answer = malloc(bytes);
    fill(words, COUNT, 77);
    OK(sida_copy(stream, device->data, words, bytes));
    OK(sida_copy(stream, answer, device->data, bytes));
    OK(sida_stream_synchronize(stream));
    assert_memory_equal(answer, words, bytes);
    OK(sida_copy(stream, NULL, NULL, 0));
    free(words);
    free(answer);
    sida_stream_destroy(stream);
    sida_buffer_destroy(host);
    sida_buffer_destroy(back);
    sida_buffer_destroy(device);
}

/* A slot is filled on one stream, read on another, and filled again behind the reader. */
static void test_order(void **state) {
    (void)state;
    enum { ROUNDS = 12, WORDS = 1 << 22 };
    const size_t bytes = (size_t)WORDS * sizeof(uint32_t);
    sida_buffer *host[ROUNDS], *back[ROUNDS], *slot, *copy;
    sida_stream *fills, *reads;
    sida_event *filled, *read;
    OK(sida_buffer_create(backend, &slot, SIDA_MEMORY_DEVICE, bytes, "slot"));
    OK(sida_buffer_create(backend, &copy, SIDA_MEMORY_DEVICE, bytes, "copy"));
    OK(sida_stream_create(backend, &fills, SIDA_STREAM_COPY));
    OK(sida_stream_create(backend, &reads, SIDA_STREAM_COMPUTE));
    OK(sida_event_create(backend, &filled));
    OK(sida_event_create(backend, &read));
    bool done = false;
    OK(sida_event_query(read, &done)); /* never recorded: has happened */
    assert_true(done);
    for (int i = 0; i < ROUNDS; i++) {
        OK(sida_buffer_create(backend, &host[i], SIDA_MEMORY_HOST, bytes, "host"));
        OK(sida_buffer_create(backend, &back[i], SIDA_MEMORY_HOST, bytes, "back"));
        fill(host[i]->data, WORDS, (uint32_t)i * 1000);
    }
    for (int i = 0; i < ROUNDS; i++) {
        OK(sida_stream_wait(fills, read));
        OK(sida_copy(fills, slot->data, host[i]->data, bytes));
        OK(sida_event_record(filled, fills));
        OK(sida_stream_wait(reads, filled));
        OK(sida_copy(reads, copy->data, slot->data, bytes));
        OK(sida_copy(reads, back[i]->data, copy->data, bytes));
        OK(sida_event_record(read, reads));
    }
    OK(sida_event_synchronize(read));
    OK(sida_event_query(read, &done));
    assert_true(done);
    for (int i = 0; i < ROUNDS; i++) {
        assert_memory_equal(back[i]->data, host[i]->data, bytes);
        sida_buffer_destroy(host[i]);
        sida_buffer_destroy(back[i]);
    }
    sida_event_destroy(filled);
    sida_event_destroy(read);
    sida_stream_destroy(fills);
    sida_stream_destroy(reads);
    sida_buffer_destroy(slot);
    sida_buffer_destroy(copy);
}

static void test_cap(void **state) {
    (void)state;
    sida_buffer *a, *b;
    sida_memory_usage usage;
    sida_backend_memory(backend, &usage);
    assert_int_equal(usage.used_bytes, 0);
    assert_true(usage.cap_bytes == SIZE_MAX);
    OK(sida_backend_set_cap(backend, 1000));
    OK(sida_buffer_create(backend, &a, SIDA_MEMORY_DEVICE, 600, "a"));
    assert_int_equal(sida_buffer_create(backend, &b, SIDA_MEMORY_DEVICE, 401, "the second"),
                     SIDA_ERROR_BUDGET);
    assert_null(b);
    assert_non_null(strstr(sida_last_message(), "the second: 401 bytes"));
    OK(sida_buffer_create(backend, &b, SIDA_MEMORY_DEVICE, 400, "b"));
    sida_buffer_destroy(a);
    sida_backend_memory(backend, &usage);
    assert_int_equal(usage.used_bytes, 400);
    assert_int_equal(usage.peak_bytes, 1000);
    assert_int_equal(sida_backend_set_cap(backend, 399), SIDA_ERROR_BUDGET);
    /* Host memory does not count. */
    OK(sida_buffer_create(backend, &a, SIDA_MEMORY_HOST, 5000, "host"));
    sida_buffer_destroy(a);
    sida_buffer_destroy(b);
    OK(sida_backend_set_cap(backend, SIZE_MAX));
}

/* What the device refuses comes out as a status, and leaves the back-end usable. */
static void test_refusals(void **state) {
    (void)state;
    sida_buffer *buffer;
    sida_memory_usage usage;
    assert_int_equal(
        sida_buffer_create(backend, &buffer, SIDA_MEMORY_DEVICE, (size_t)1 << 44, "too much"),
        SIDA_ERROR_DEVICE);
    assert_null(buffer);
    assert_non_null(strstr(sida_last_message(), "17592186044416"));
    sida_backend_memory(backend, &usage);
    assert_int_equal(usage.used_bytes, 0);
    sida_backend *other;
    assert_int_equal(sida_backend_create_cuda(&other, &(sida_cuda_options){.device = 4711}),
                     SIDA_ERROR_ARGUMENT);
    assert_null(other);
    assert_int_equal(sida_backend_create_named(&other, "tpu"), SIDA_ERROR_ARGUMENT);
    OK(sida_backend_create_named(&other, "auto"));
    assert_string_equal(other->table->name, "cuda");
    sida_backend_destroy(other);
    OK(sida_buffer_create(backend, &buffer, SIDA_MEMORY_DEVICE, 0, "nothing"));
    sida_buffer_destroy(buffer);
}

/* What the driver says of the device moves with what is allocated. */
static void test_describe(void **state) {
    (void)state;
    enum { BYTES = 64 << 20 };
    sida_device_info before, during;
    sida_buffer *buffer;
    OK(sida_backend_describe(backend, &before));
    assert_true(before.name[0] != 0 && before.processors > 0);
    assert_true(before.capability[0] >= 1);
    /* Our own code, or PTX that the driver compiled. */
    assert_true(before.code > 0 && before.ptx >= 0);
    assert_true(before.driver >= before.runtime / 1000 * 1000 && before.runtime > 0);
    assert_true(before.free_bytes <= before.total_bytes);
    OK(sida_buffer_create(backend, &buffer, SIDA_MEMORY_DEVICE, BYTES, "a buffer"));
    OK(sida_backend_describe(backend, &during));
    assert_true(during.total_bytes == before.total_bytes);
    assert_true(during.free_bytes < before.free_bytes);
    sida_buffer_destroy(buffer);
}

/* The driver's figure follows our buffers, and what is beside them counts when it is asked to. */
static void test_driver(void **state) {
    (void)state;
    enum { BYTES = 256 << 20, ROUNDING = 8 << 20 };
    sida_memory_usage usage;
    sida_buffer *buffer, *other;
    size_t before, during, after;
    OK(sida_backend_set_cap(backend, SIZE_MAX));
    OK(sida_backend_measure_overhead(backend, &before));
    assert_true(before > 0); /* the context */
    OK(sida_buffer_create(backend, &buffer, SIDA_MEMORY_DEVICE, BYTES, "a buffer"));
    sida_backend_memory(backend, &usage);
    assert_true(usage.driver_bytes >= BYTES + before - ROUNDING);
    assert_true(usage.driver_peak_bytes >= usage.driver_bytes);
    OK(sida_backend_measure_overhead(backend, &during));
    if (usage.driver_alone) assert_true(during <= before + ROUNDING);
    /* 16 MiB are left beside driver and buffer. */
    OK(sida_backend_set_cap(backend, BYTES + during + (16 << 20)));
    OK(sida_backend_set_overhead(backend, during));
    assert_int_equal(
        sida_buffer_create(backend, &other, SIDA_MEMORY_DEVICE, (16 << 20) + 1, "expert slots"),
        SIDA_ERROR_BUDGET);
    assert_non_null(strstr(sida_last_message(), "for driver and libraries"));
    OK(sida_buffer_create(backend, &other, SIDA_MEMORY_DEVICE, 4 << 20, "a buffer"));
    sida_buffer_destroy(other);
    sida_buffer_destroy(buffer);
    OK(sida_backend_set_overhead(backend, 0));
    OK(sida_backend_set_cap(backend, SIZE_MAX));
    OK(sida_backend_measure_overhead(backend, &after));
    sida_backend_memory(backend, &usage);
    if (usage.driver_alone) {
        assert_true(after <= before + ROUNDING);
        assert_true(usage.driver_peak_bytes < BYTES + before); /* of this cap */
    }
    printf("driver and libraries take %.1f MiB; %s\n", (double)after / (1 << 20),
           usage.driver_alone ? "NVML tells what others take" : "no NVML, others count");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_copies),   cmocka_unit_test(test_order),
        cmocka_unit_test(test_cap),      cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_describe), cmocka_unit_test(test_driver),
    };
    backend = gpu_open();
    if (!backend) return test_skip(sida_last_message());
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    sida_backend_destroy(backend);
    return failed;
}
