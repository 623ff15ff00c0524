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
                     SIDA_ERROR_MEMORY);
    sida_buffer_destroy(b);
    sida_buffer_destroy(host);
    sida_buffer_destroy(NULL);
    sida_backend_destroy(backend);
    sida_backend_destroy(NULL);
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
        cmocka_unit_test(test_cap),      cmocka_unit_test(test_poison),
        cmocka_unit_test(test_streams),  cmocka_unit_test(test_failed_copy),
        cmocka_unit_test(test_describe),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
