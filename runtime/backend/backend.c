/* The wrappers: arguments are checked here once, for every back-end. */
#include "runtime/backend/backend.h"

#include <assert.h>
#include <string.h>

sida_status sida_backend_create_named(sida_backend **out, const char *device) {
    *out = NULL;
    if (!device || strcmp(device, "auto") == 0) device = sida_cuda_present() ? "cuda" : "cpu";
    if (strcmp(device, "cuda") == 0) return sida_backend_create_cuda(out, NULL);
    if (strcmp(device, "cpu") == 0) return sida_backend_create_cpu(out, NULL);
    return sida_fail(SIDA_ERROR_ARGUMENT, "device '%.40s': expected cpu, cuda or auto", device);
}

void sida_backend_destroy(sida_backend *backend) {
    if (backend) backend->table->destroy(backend);
}

sida_status sida_buffer_create(sida_backend *backend, sida_buffer **out, sida_memory_kind kind,
                               size_t bytes, const char *what) {
    assert(backend && out && what);
    *out = NULL;
    return backend->table->buffer_create(backend, out, kind, bytes, what);
}

void sida_buffer_destroy(sida_buffer *buffer) {
    if (buffer) buffer->backend->table->buffer_destroy(buffer);
}

sida_status sida_stream_create(sida_backend *backend, sida_stream **out, sida_stream_kind kind) {
    assert(backend && out);
    *out = NULL;
    return backend->table->stream_create(backend, out, kind);
}

void sida_stream_destroy(sida_stream *stream) {
    if (stream) stream->backend->table->stream_destroy(stream);
}

sida_status sida_stream_synchronize(sida_stream *stream) {
    return stream->backend->table->stream_synchronize(stream);
}

sida_status sida_copy(sida_stream *stream, void *to, const void *from, size_t bytes) {
    assert(bytes == 0 || (to && from));
    if (bytes == 0) return SIDA_OK;
    return stream->backend->table->copy(stream, to, from, bytes);
}

sida_status sida_event_create(sida_backend *backend, sida_event **out) {
    assert(backend && out);
    *out = NULL;
    return backend->table->event_create(backend, out);
}

void sida_event_destroy(sida_event *event) {
    if (event) event->backend->table->event_destroy(event);
}

sida_status sida_event_record(sida_event *event, sida_stream *stream) {
    assert(event->backend == stream->backend);
    return event->backend->table->event_record(event, stream);
}

sida_status sida_stream_wait(sida_stream *stream, sida_event *event) {
    assert(event->backend == stream->backend);
    return stream->backend->table->stream_wait(stream, event);
}

sida_status sida_event_synchronize(sida_event *event) {
    return event->backend->table->event_synchronize(event);
}

sida_status sida_event_query(sida_event *event, bool *done) {
    return event->backend->table->event_query(event, done);
}

bool sida_graph_supported(const sida_backend *backend) {
    return backend->table->graph_begin != NULL;
}

sida_status sida_graph_begin(sida_stream *stream) {
    assert(sida_graph_supported(stream->backend));
    return stream->backend->table->graph_begin(stream);
}

sida_status sida_graph_end(sida_stream *stream, sida_graph **out) {
    *out = NULL;
    return stream->backend->table->graph_end(stream, out);
}

sida_status sida_graph_launch(sida_graph *graph, sida_stream *stream) {
    assert(graph->backend == stream->backend);
    return graph->backend->table->graph_launch(graph, stream);
}

void sida_graph_destroy(sida_graph *graph) {
    if (graph) graph->backend->table->graph_destroy(graph);
}

void sida_backend_memory(sida_backend *backend, sida_memory_usage *out) {
    backend->table->memory_usage(backend, out);
}

sida_status sida_backend_sample(sida_backend *backend) {
    return backend->table->sample(backend);
}

sida_status sida_backend_set_cap(sida_backend *backend, size_t cap_bytes) {
    return backend->table->set_cap(backend, cap_bytes);
}

sida_status sida_backend_describe(sida_backend *backend, sida_device_info *out) {
    *out = (sida_device_info){0};
    return backend->table->describe(backend, out);
}
