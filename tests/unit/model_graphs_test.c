/* When calls are recorded, replayed and forgotten, over a back-end whose graphs only count. */
#include "formats/base/memory.h"
#include "runtime/model/graphs.h"
#include "tests/test.h"

#include <string.h>

enum { SEGMENTS = 3 };

static struct {
    int begun, ended, launched, destroyed, alive, issued;
    bool recording, fail_begin, fail_issue, fail_end;
    int32_t last; /* tokens of the graph launched last */
    int32_t tokens;
} seen;

typedef struct graph {
    sida_graph base;
    int32_t tokens;
} graph;

static void assert_ok(sida_status status) {
    if (status != SIDA_OK) fail_msg("%s", sida_last_message());
}

static sida_status graph_begin(sida_stream *stream) {
    (void)stream;
    assert_false(seen.recording);
    seen.begun++;
    if (seen.fail_begin) return sida_fail(SIDA_ERROR_DEVICE, "no recording");
    seen.recording = true;
    return SIDA_OK;
}

static sida_status graph_end(sida_stream *stream, sida_graph **out) {
    assert_true(seen.recording);
    seen.recording = false;
    seen.ended++;
    if (seen.fail_end) return sida_fail(SIDA_ERROR_DEVICE, "no graph");
    graph *made = calloc(1, sizeof *made);
    made->base.backend = stream->backend;
    made->tokens = seen.tokens;
    seen.alive++;
    *out = &made->base;
    return SIDA_OK;
}

static sida_status graph_launch(sida_graph *it, sida_stream *stream) {
    (void)stream;
    assert_false(seen.recording);
    seen.last = ((graph *)it)->tokens;
    seen.launched++;
    return SIDA_OK;
}

static void graph_destroy(sida_graph *it) {
    seen.alive--;
    seen.destroyed++;
    free(it);
}

static sida_status issue(void *context) {
    (void)context;
    seen.issued++;
    if (seen.fail_issue && seen.recording) return sida_fail(SIDA_ERROR_DEVICE, "not in a graph");
    return SIDA_OK;
}

/* One call of all segments. */
static void call(sida_graphs *graphs, int32_t tokens) {
    const sida_graphs_key key = {.tokens = tokens, .sequences = 1};
    seen.tokens = tokens;
    assert_ok(sida_graphs_begin(graphs, &key));
    for (int32_t s = 0; s < SEGMENTS; s++) assert_ok(sida_graphs_issue(graphs, s, issue, NULL));
    assert_false(seen.recording);
}

typedef struct world {
    sida_backend *backend;
    sida_backend_table table;
    sida_stream *stream;
    sida_graphs *graphs;
} world;

static void open_world(world *w, bool supported) {
    memset(&seen, 0, sizeof seen);
    assert_ok(sida_backend_create_cpu(&w->backend, NULL));
    w->table = *w->backend->table;
    if (supported) {
        w->table.graph_begin = graph_begin;
        w->table.graph_end = graph_end;
        w->table.graph_launch = graph_launch;
        w->table.graph_destroy = graph_destroy;
    }
    w->backend->table = &w->table;
    assert_ok(sida_stream_create(w->backend, &w->stream, SIDA_STREAM_COMPUTE));
    assert_ok(sida_graphs_create(&w->graphs, w->stream, SEGMENTS));
}

static void close_world(world *w) {
    sida_graphs_destroy(w->graphs);
    assert_int_equal(seen.alive, 0);
    sida_stream_destroy(w->stream);
    sida_backend_destroy(w->backend);
}

static void assert_counts(int issued, int begun, int launched) {
    assert_int_equal(seen.issued, issued);
    assert_int_equal(seen.begun, begun);
    assert_int_equal(seen.launched, launched);
}

static void test_second_records(void **state) {
    (void)state;
    world w;
    open_world(&w, true);
    call(w.graphs, 5);
    assert_counts(3, 0, 0);
    call(w.graphs, 6);
    assert_counts(6, 0, 0);
    call(w.graphs, 5);
    assert_counts(9, 3, 3);
    call(w.graphs, 5);
    assert_counts(9, 3, 6);
    assert_int_equal(seen.last, 5);
    /* Any part of the key makes another kind. */
    const sida_graphs_key keys[] = {
        {.tokens = 5, .sequences = 2},
        {.tokens = 5, .sequences = 1, .side = 1},
        {.tokens = 5, .sequences = 1, .chooser = 1},
        {.tokens = 5, .sequences = 1, .stops = 1},
        {.tokens = 5, .sequences = 1, .records = 1},
        {.tokens = 5, .sequences = 1, .resident = &w},
    };
    for (int i = 0; i < 6; i++) {
        assert_ok(sida_graphs_begin(w.graphs, &keys[i]));
        assert_ok(sida_graphs_issue(w.graphs, 0, issue, NULL));
        assert_counts(10 + i, 3, 6);
    }
    close_world(&w);
}

/* The least recently used kind goes, and comes back as one never seen. */
static void test_room(void **state) {
    (void)state;
    world w;
    open_world(&w, true);
    for (int32_t t = 0; t < SIDA_GRAPHS_KINDS; t++)
        for (int i = 0; i < 2; i++) call(w.graphs, t);
    assert_int_equal(seen.alive, SIDA_GRAPHS_KINDS * SEGMENTS);
    call(w.graphs, 0);
    call(w.graphs, 1000); /* in place of 1 */
    assert_int_equal(seen.destroyed, SEGMENTS);
    int begun = seen.begun;
    call(w.graphs, 0);
    assert_int_equal(seen.begun, begun);
    assert_int_equal(seen.last, 0);
    int issued = seen.issued;
    call(w.graphs, 1); /* in place of 2 */
    assert_int_equal(seen.issued, issued + SEGMENTS);
    assert_int_equal(seen.begun, begun);
    call(w.graphs, 1);
    assert_int_equal(seen.begun, begun + SEGMENTS);
    assert_int_equal(seen.last, 1);
    close_world(&w);
}

static void test_failures(void **state) {
    (void)state;
    for (int kind = 0; kind < 3; kind++) {
        world w;
        open_world(&w, true);
        seen.fail_begin = kind == 0;
        seen.fail_issue = kind == 1;
        seen.fail_end = kind == 2;
        for (int i = 0; i < 4; i++) call(w.graphs, 9);
        /* One attempt; every segment of every call was issued for good. */
        assert_counts(4 * SEGMENTS + (kind > 0), 1, 0);
        assert_int_equal(seen.ended, kind > 0);
        close_world(&w);
    }
    /* Without graphs there is nothing to try. */
    world w;
    open_world(&w, false);
    for (int i = 0; i < 4; i++) call(w.graphs, 9);
    assert_counts(4 * SEGMENTS, 0, 0);
    close_world(&w);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_second_records),
        cmocka_unit_test(test_room),
        cmocka_unit_test(test_failures),
    };
    return cmocka_run_group_tests_name("model_graphs", tests, NULL, NULL);
}
