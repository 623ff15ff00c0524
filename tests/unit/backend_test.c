/* The CPU back-end: the cap, poison, and the order that streams and events promise. */
#include "formats/base/status.h"
#include "runtime/backend/backend.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static void assert_ok(sida_status status) {
    if (status != SIDA_OK) fail_msg("%s: %s", sida_status_name(status), sida_last_message());
}

static void test_cap(void **state) {
    (void)state;
    sida_backend *backend;
    sida_buffer *a, *b, *host;
    sida_memory_usage usage;
    assert_ok(sida_backend_create_cpu(&backend, NULL));
    sida_backend_memory(backend, &usage);
    assert_true(usage.cap_bytes == SIZE_MAX);
    assert_ok(sida_backend_set_cap(backend, 1000));
    assert_ok(sida_buffer_create(backend, &a, SIDA_MEMORY_DEVICE, 600, "a"));
    assert_int_equal((uintptr_t)a->data % 256, 0);
    assert_int_equal(sida_buffer_create(backend, &b, SIDA_MEMORY_DEVICE, 401, "expert slots"),
                     SIDA_ERROR_BUDGET);
    assert_null(b);
    assert_non_null(strstr(sida_last_message(), "expert slots: 401 bytes"));
    assert_ok(sida_buffer_create(backend, &b, SIDA_MEMORY_DEVICE, 400, "b"));
    assert_ok(sida_buffer_create(backend, &host, SIDA_MEMORY_HOST, 5000, "host"));
    sida_buffer_destroy(a);
    sida_backend_memory(backend, &usage);
    assert_int_equal(usage.used_bytes, 400);
    assert_int_equal(usage.peak_bytes, 1000);
    assert_int_equal(sida_backend_set_cap(backend, 399), SIDA_ERROR_BUDGET);
    assert_ok(sida_backend_set_cap(backend, 400));
    sida_backend_memory(backend, &usage);
    assert_int_equal(usage.peak_bytes, 400);
    assert_int_equal(sida_buffer_create(backend, &a, SIDA_MEMORY_DEVICE, SIZE_MAX, "huge"),
                     SIDA_ERROR_BUDGET);
    assert_int_equal(sida_buffer_create(backend, &a, SIDA_MEMORY_HOST, SIZE_MAX, "huge"),
                     SIDA_ERROR_MEMORY);
    assert_ok(sida_backend_set_cap(backend, SIZE_MAX));
    assert_int_equal(sida_buffer_create(backend, &a, SIDA_MEMORY_DEVICE, SIZE_MAX, "huge"),
                     SIDA_ERROR_MEMORY);
    sida_backend_memory(backend, &usage);
    assert_int_equal(usage.used_bytes, 400);
    sida_buffer_destroy(b);
    sida_buffer_destroy(host);
    sida_buffer_destroy(NULL);
    sida_backend_destroy(backend);
    sida_backend_destroy(NULL);
}

/* A device whose driver says what the test wants. */
static sida_backend_table said_table;
static size_t said_bytes;
static bool said_fails;

static sida_status refuse(sida_buffer *buffer, const char *what) {
    (void)buffer;
    return sida_fail(SIDA_ERROR_DEVICE, "%s: the device has no more", what);
}

static sida_status say(sida_backend *backend, size_t *bytes, bool *alone) {
    (void)backend;
    *bytes = said_bytes;
    *alone = said_bytes != 5000;
    return said_fails ? sida_fail(SIDA_ERROR_DEVICE, "the driver is silent") : SIDA_OK;
}

/* The driver's figures, and a cap on everything. */
static void test_overhead(void **state) {
    (void)state;
    sida_backend *backend;
    sida_buffer *a, *b;
    sida_memory_usage usage;
    size_t overhead;
    assert_ok(sida_backend_create_cpu(&backend, NULL));
    /* Buffers are all there is. */
    assert_ok(sida_buffer_create(backend, &a, SIDA_MEMORY_DEVICE, 600, "a"));
    assert_ok(sida_backend_measure_overhead(backend, &overhead));
    assert_int_equal(overhead, 0);
    sida_backend_memory(backend, &usage);
    assert_int_equal(usage.driver_bytes, 600);
    assert_int_equal(usage.driver_peak_bytes, 600);
    assert_true(usage.driver_alone);
    said_table = *backend->table;
    said_table.driver_used = say;
    backend->table = &said_table;
    said_bytes = 1000;
    assert_ok(sida_backend_measure_overhead(backend, &overhead));
    assert_int_equal(overhead, 400);
    /* Until it is asked for, the cap is on buffers. */
    assert_ok(sida_backend_set_cap(backend, 2000));
    sida_backend_memory(backend, &usage);
    assert_int_equal(usage.overhead_bytes, 0);
    assert_int_equal(usage.driver_peak_bytes, 1000);
    assert_int_equal(sida_backend_set_overhead(backend, 1401), SIDA_ERROR_BUDGET);
    assert_non_null(strstr(sida_last_message(), "1401 are for driver and libraries"));
    assert_ok(sida_backend_set_overhead(backend, 500));
    assert_int_equal(sida_buffer_create(backend, &b, SIDA_MEMORY_DEVICE, 901, "expert slots"),
                     SIDA_ERROR_BUDGET);
    assert_string_equal(sida_last_message(),
                        "expert slots: 901 bytes do not fit: of the device budget's 2000 bytes 600 "
                        "are in use and 500 are for driver and libraries");
    assert_ok(sida_buffer_create(backend, &b, SIDA_MEMORY_DEVICE, 900, "b"));
    sida_buffer_destroy(b);
    /* A sample that finds more counts, one that finds less does not. */
    said_bytes = 600 + 700;
    assert_ok(sida_backend_sample(backend));
    said_bytes = 5000;
    sida_backend_memory(backend, &usage);
    assert_int_equal(usage.overhead_bytes, 700);
    assert_int_equal(usage.driver_bytes, 1300);
    assert_true(usage.driver_alone);
    assert_int_equal(sida_buffer_create(backend, &b, SIDA_MEMORY_DEVICE, 701, "b"),
                     SIDA_ERROR_BUDGET);
    assert_ok(sida_backend_sample(backend));
    said_bytes = 900;
    assert_ok(sida_backend_sample(backend));
    sida_backend_memory(backend, &usage);
    assert_int_equal(usage.driver_bytes, 900);
    assert_int_equal(usage.driver_peak_bytes, 5000);
    assert_int_equal(usage.overhead_bytes, 4400);
    assert_int_equal(sida_buffer_create(backend, &b, SIDA_MEMORY_DEVICE, 1, "b"),
                     SIDA_ERROR_BUDGET);
    /* A new cap begins a new peak. */
    assert_ok(sida_backend_set_overhead(backend, 0));
    assert_ok(sida_backend_set_cap(backend, 3000));
    sida_backend_memory(backend, &usage);
    assert_int_equal(usage.driver_peak_bytes, 900);
    /* A large buffer asks by itself; a driver that fails to answer does not spoil the buffer. */
    assert_ok(sida_backend_set_cap(backend, SIZE_MAX));
    said_bytes = 77 << 20;
    assert_ok(sida_buffer_create(backend, &b, SIDA_MEMORY_DEVICE, 32 << 20, "b"));
    sida_backend_memory(backend, &usage);
    assert_int_equal(usage.driver_bytes, 77 << 20);
    sida_buffer_destroy(b);
    said_fails = true;
    assert_int_equal(sida_backend_sample(backend), SIDA_ERROR_DEVICE);
    assert_ok(sida_buffer_create(backend, &b, SIDA_MEMORY_DEVICE, 32 << 20, "b"));
    said_fails = false;
    sida_buffer_destroy(b);
    /* What the device refuses is not counted. */
    said_table.allocate = refuse;
    assert_int_equal(sida_buffer_create(backend, &b, SIDA_MEMORY_DEVICE, 1 << 20, "b"),
                     SIDA_ERROR_DEVICE);
    assert_null(b);
    sida_backend_memory(backend, &usage);
    assert_int_equal(usage.used_bytes, 600);
    sida_buffer_destroy(a);
    sida_backend_destroy(backend);
}

/* Two threads that want the last bytes: the cap holds, and nothing is lost. */
static void *take_and_give(void *context) {
    for (int i = 0; i < 20000; i++) {
        sida_buffer *buffer;
        sida_memory_usage usage;
        if (sida_buffer_create(context, &buffer, SIDA_MEMORY_DEVICE, 600, "a") == SIDA_OK)
            sida_buffer_destroy(buffer);
        sida_backend_memory(context, &usage);
        if (usage.used_bytes > 1000 || usage.peak_bytes > 1000) return context;
    }
    return NULL;
}

static void test_cap_of_threads(void **state) {
    (void)state;
    sida_backend *backend;
    sida_memory_usage usage;
    pthread_t threads[3];
    assert_ok(sida_backend_create_cpu(&backend, NULL));
    assert_ok(sida_backend_set_cap(backend, 1000));
    for (int i = 0; i < 3; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, take_and_give, backend), 0);
    for (int i = 0; i < 3; i++) {
        void *failed;
        pthread_join(threads[i], &failed);
        assert_null(failed);
    }
    sida_backend_memory(backend, &usage);
    assert_int_equal(usage.used_bytes, 0);
    assert_int_equal(usage.peak_bytes, 600);
    sida_backend_destroy(backend);
}

static void test_poison(void **state) {
    (void)state;
    sida_backend *backend;
    sida_buffer *buffer;
    assert_ok(sida_backend_create_cpu(&backend, &(sida_cpu_options){.poison = true}));
    assert_ok(sida_buffer_create(backend, &buffer, SIDA_MEMORY_DEVICE, 64, "slots"));
    for (int i = 0; i < 16; i++) {
        float value = ((float *)buffer->data)[i];
        assert_true(value != value);
    }
    sida_buffer_destroy(buffer);
    sida_backend_destroy(backend);
}

/* A gate holds the copy thread until the test has looked. */
typedef struct gate {
    atomic_bool open;
    atomic_int begun;
} gate;

static void wait_gate(void *context, size_t bytes) {
    (void)bytes;
    gate *g = context;
    g->begun++;
    while (!g->open) usleep(100);
}

static void test_streams(void **state) {
    (void)state;
    gate g = {0};
    sida_backend *backend;
    sida_stream *copy, *second, *compute;
    sida_event *event, *never;
    sida_cpu_options options = {.before_copy = wait_gate, .before_copy_context = &g};
    assert_ok(sida_backend_create_cpu(&backend, &options));
    assert_ok(sida_stream_create(backend, &copy, SIDA_STREAM_COPY));
    assert_ok(sida_stream_create(backend, &second, SIDA_STREAM_COPY));
    assert_ok(sida_stream_create(backend, &compute, SIDA_STREAM_COMPUTE));
    assert_ok(sida_event_create(backend, &event));
    assert_ok(sida_event_create(backend, &never));
    int from = 7, middle = 0, to = 0;
    bool done;
    assert_ok(sida_event_query(never, &done));
    assert_true(done);
    assert_ok(sida_stream_wait(compute, never));
    /* Behind the gate nothing happens, and a stream that waits for it neither. */
    assert_ok(sida_copy(copy, &middle, &from, sizeof from));
    assert_ok(sida_event_record(event, copy));
    assert_ok(sida_stream_wait(second, event));
    assert_ok(sida_copy(second, &to, &middle, sizeof to));
    assert_ok(sida_event_query(event, &done));
    assert_false(done);
    while (g.begun == 0) usleep(100);
    usleep(2000);
    assert_int_equal(g.begun, 1);
    g.open = true;
    assert_ok(sida_stream_synchronize(second));
    assert_int_equal(to, 7);
    assert_ok(sida_event_synchronize(event));
    /* Recorded again, it is pending again. */
    g.open = false;
    from = 8;
    assert_ok(sida_copy(copy, &middle, &from, sizeof from));
    assert_ok(sida_event_record(event, copy));
    assert_ok(sida_event_query(event, &done));
    assert_false(done);
    g.open = true;
    assert_ok(sida_stream_wait(compute, event));
    assert_int_equal(middle, 8);
    assert_ok(sida_copy(compute, &to, &middle, sizeof to));
    assert_int_equal(to, 8);
    assert_ok(sida_event_record(event, compute));
    assert_ok(sida_event_query(event, &done));
    assert_true(done);
    /* More commands than the ring starts with; destroying the stream waits for them. */
    int ladder[200] = {1};
    for (int i = 1; i < 200; i++)
        assert_ok(sida_copy(copy, &ladder[i], &ladder[i - 1], sizeof *ladder));
    sida_stream_destroy(copy);
    assert_int_equal(ladder[199], 1);
    sida_stream_destroy(second);
    sida_stream_destroy(compute);
    sida_event_destroy(event);
    sida_event_destroy(never);
    sida_backend_destroy(backend);
}

static void test_failed_copy(void **state) {
    (void)state;
    sida_backend *backend;
    sida_stream *copy, *second;
    sida_event *before, *after;
    assert_ok(sida_backend_create_cpu(&backend, &(sida_cpu_options){.fail_copy = 2}));
    assert_ok(sida_stream_create(backend, &copy, SIDA_STREAM_COPY));
    assert_ok(sida_stream_create(backend, &second, SIDA_STREAM_COPY));
    assert_ok(sida_event_create(backend, &before));
    assert_ok(sida_event_create(backend, &after));
    int from = 1, a = 0, b = 0, c = 0;
    assert_ok(sida_copy(copy, &a, &from, sizeof a));
    assert_ok(sida_event_record(before, copy));
    assert_ok(sida_copy(copy, &b, &from, sizeof b));
    assert_ok(sida_event_record(after, copy));
    assert_ok(sida_copy(copy, &c, &from, sizeof c));
    assert_ok(sida_event_synchronize(before));
    assert_int_equal(sida_event_synchronize(after), SIDA_ERROR_DEVICE);
    assert_int_equal(sida_stream_synchronize(copy), SIDA_ERROR_DEVICE);
    assert_int_equal(a, 1);
    assert_int_equal(b, 0);
    assert_int_equal(c, 0);
    /* Who waits for a failure fails too. */
    assert_ok(sida_stream_wait(second, after));
    assert_int_equal(sida_stream_synchronize(second), SIDA_ERROR_DEVICE);
    sida_stream_destroy(copy);
    sida_stream_destroy(second);
    sida_event_destroy(before);
    sida_event_destroy(after);
    sida_backend_destroy(backend);
}

static void test_describe(void **state) {
    (void)state;
    sida_backend *backend;
    sida_device_info info;
    assert_ok(sida_backend_create_cpu(&backend, NULL));
    assert_ok(sida_backend_describe(backend, &info));
    assert_true(info.name[0] != 0);
    assert_true(info.processors >= 1);
    assert_true(info.free_bytes > 0 && info.free_bytes <= info.total_bytes);
    assert_int_equal(info.driver, 0);
    sida_backend_destroy(backend);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cap),
        cmocka_unit_test(test_overhead),
        cmocka_unit_test(test_cap_of_threads),
        cmocka_unit_test(test_poison),
        cmocka_unit_test(test_streams),
        cmocka_unit_test(test_failed_copy),
        cmocka_unit_test(test_describe),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
