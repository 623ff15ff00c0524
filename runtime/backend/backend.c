/* The wrappers: arguments are checked and memory is counted here once, for every back-end. */
#include "runtime/backend/backend.h"

#include "formats/base/memory.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* A device buffer of this size is worth asking the driver. */
static const size_t large_bytes = (size_t)16 << 20;

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

void sida_backend_begin(sida_backend *backend, const sida_backend_table *table) {
    backend->table = table;
    backend->usage = (sida_memory_usage){.cap_bytes = SIZE_MAX};
    backend->objects = 0;
    pthread_mutex_init(&backend->account_mutex, NULL);
}

void sida_backend_end(sida_backend *backend) {
    assert(backend->objects == 0 && "buffers, streams and events go before their back-end");
    pthread_mutex_destroy(&backend->account_mutex);
}

static void count_object(sida_backend *backend, int64_t change) {
    pthread_mutex_lock(&backend->account_mutex);
    backend->objects += change;
    pthread_mutex_unlock(&backend->account_mutex);
}

/* --- memory */

/* What the cap leaves; mutex held. */
static size_t left_bytes(const sida_memory_usage *usage) {
    size_t taken;
    if (sida_add_overflow(usage->used_bytes, usage->overhead_bytes, &taken)) return 0;
    return taken < usage->cap_bytes ? usage->cap_bytes - taken : 0;
}

/* Device bytes count before they are there, so that two threads cannot both have the last ones. */
static sida_status count_bytes(sida_backend *backend, size_t bytes, const char *what) {
    pthread_mutex_lock(&backend->account_mutex);
    bool fits = bytes <= left_bytes(&backend->usage);
    if (fits) backend->usage.used_bytes += bytes;
    const sida_memory_usage usage = backend->usage;
    pthread_mutex_unlock(&backend->account_mutex);
    if (fits) return SIDA_OK;
    if (usage.cap_bytes == SIZE_MAX)
        return sida_fail(SIDA_ERROR_MEMORY, "%s: %zu bytes is more than memory can be", what,
                         bytes);
    if (usage.overhead_bytes == 0)
        return sida_fail(SIDA_ERROR_BUDGET,
                         "%s: %zu bytes do not fit: %zu of the device budget's %zu bytes are in "
                         "use",
                         what, bytes, usage.used_bytes, usage.cap_bytes);
    return sida_fail(SIDA_ERROR_BUDGET,
                     "%s: %zu bytes do not fit: of the device budget's %zu bytes %zu are in use "
                     "and %zu are for driver and libraries",
                     what, bytes, usage.cap_bytes, usage.used_bytes, usage.overhead_bytes);
}

sida_status sida_buffer_create(sida_backend *backend, sida_buffer **out, sida_memory_kind kind,
                               size_t bytes, const char *what) {
    assert(backend && out && what);
    sida_status status = SIDA_OK;
    sida_buffer *buffer = NULL;
    bool device = kind == SIDA_MEMORY_DEVICE, counted = false;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&buffer, 1, "a buffer"));
    *buffer = (sida_buffer){.bytes = bytes, .kind = kind, .backend = backend};
    if (device) SIDA_TRY(count_bytes(backend, bytes, what));
    counted = device;
    SIDA_TRY(backend->table->allocate(buffer, what));
    *out = buffer;
    buffer = NULL;
out:
    pthread_mutex_lock(&backend->account_mutex);
    sida_memory_usage *usage = &backend->usage;
    if (status != SIDA_OK && counted) usage->used_bytes -= bytes;
    if (usage->used_bytes > usage->peak_bytes) usage->peak_bytes = usage->used_bytes;
    backend->objects += status == SIDA_OK;
    pthread_mutex_unlock(&backend->account_mutex);
    free(buffer);
    /* What the driver cannot say now it says at the next sample. */
    if (status == SIDA_OK && device && bytes >= large_bytes) (void)sida_backend_sample(backend);
    return status;
}

/* The bytes are given back first: what counts is never less than what is there. */
void sida_buffer_destroy(sida_buffer *buffer) {
    if (!buffer) return;
    sida_backend *backend = buffer->backend;
    backend->table->release(buffer);
    pthread_mutex_lock(&backend->account_mutex);
    if (buffer->kind == SIDA_MEMORY_DEVICE) backend->usage.used_bytes -= buffer->bytes;
    backend->objects--;
    pthread_mutex_unlock(&backend->account_mutex);
    free(buffer);
}

void sida_backend_memory(sida_backend *backend, sida_memory_usage *out) {
    pthread_mutex_lock(&backend->account_mutex);
    sida_memory_usage *usage = &backend->usage;
    if (!backend->table->driver_used) {
        usage->driver_bytes = usage->used_bytes;
        usage->driver_peak_bytes = usage->peak_bytes;
        usage->driver_alone = true;
    }
    *out = *usage;
    pthread_mutex_unlock(&backend->account_mutex);
}

/* A sample; *overhead: what is not our buffers'. */
static sida_status sample(sida_backend *backend, size_t *overhead) {
    sida_status status = SIDA_OK;
    size_t bytes;
    bool alone;
    *overhead = 0;
    if (!backend->table->driver_used) return SIDA_OK;
    SIDA_TRY(backend->table->driver_used(backend, &bytes, &alone));
    pthread_mutex_lock(&backend->account_mutex);
    sida_memory_usage *usage = &backend->usage;
    usage->driver_bytes = bytes;
    usage->driver_alone = alone;
    if (bytes > usage->driver_peak_bytes) usage->driver_peak_bytes = bytes;
    if (bytes > usage->used_bytes) *overhead = bytes - usage->used_bytes;
    if (usage->overhead_bytes > 0 && *overhead > usage->overhead_bytes)
        usage->overhead_bytes = *overhead;
    pthread_mutex_unlock(&backend->account_mutex);
out:
    return status;
}

sida_status sida_backend_sample(sida_backend *backend) {
    size_t overhead;
    return sample(backend, &overhead);
}

sida_status sida_backend_measure_overhead(sida_backend *backend, size_t *bytes) {
    return sample(backend, bytes);
}

/* Both may pass what is in use already. */
static sida_status set_limits(sida_backend *backend, const size_t *cap, const size_t *overhead) {
    pthread_mutex_lock(&backend->account_mutex);
    sida_memory_usage wanted = backend->usage;
    if (cap) wanted.cap_bytes = *cap;
    if (overhead) wanted.overhead_bytes = *overhead;
    bool fits = wanted.used_bytes <= wanted.cap_bytes &&
                wanted.overhead_bytes <= wanted.cap_bytes - wanted.used_bytes;
    if (fits && cap) wanted.peak_bytes = wanted.used_bytes;
    if (fits) backend->usage = wanted;
    pthread_mutex_unlock(&backend->account_mutex);
    if (fits) return SIDA_OK;
    return sida_fail(SIDA_ERROR_BUDGET,
                     "a device budget of %zu bytes: %zu bytes are in use, %zu are for driver and "
                     "libraries",
                     wanted.cap_bytes, wanted.used_bytes, wanted.overhead_bytes);
}

sida_status sida_backend_set_cap(sida_backend *backend, size_t cap_bytes) {
    sida_status status = set_limits(backend, &cap_bytes, NULL);
    if (status != SIDA_OK) return status;
    pthread_mutex_lock(&backend->account_mutex);
    backend->usage.driver_peak_bytes = 0;
    pthread_mutex_unlock(&backend->account_mutex);
    (void)sida_backend_sample(backend); /* the cap stands whatever the driver says */
    return SIDA_OK;
}

sida_status sida_backend_set_overhead(sida_backend *backend, size_t overhead_bytes) {
    return set_limits(backend, NULL, &overhead_bytes);
}

/* --- streams, events, graphs */

sida_status sida_stream_create(sida_backend *backend, sida_stream **out, sida_stream_kind kind) {
    assert(backend && out);
    *out = NULL;
    sida_status status = backend->table->stream_create(backend, out, kind);
    if (status == SIDA_OK) count_object(backend, 1);
    return status;
}

void sida_stream_destroy(sida_stream *stream) {
    if (!stream) return;
    sida_backend *backend = stream->backend;
    backend->table->stream_destroy(stream);
    count_object(backend, -1);
}

sida_status sida_stream_synchronize(sida_stream *stream) {
    return stream->backend->table->stream_synchronize(stream);
}

sida_status sida_copy(sida_stream *stream, void *to, const void *from, size_t bytes) {
    assert(bytes == 0 || (to && from));
    if (bytes == 0) return SIDA_OK;
    return stream->backend->table->copy(stream, to, from, bytes);
}

sida_status sida_upload(sida_stream *stream, void *to, const sida_buffer *buffer, const void *from,
                        size_t bytes) {
    const sida_backend_table *table = stream->backend->table;
    assert(stream->kind == SIDA_STREAM_COMPUTE && buffer->kind == SIDA_MEMORY_HOST);
    if (bytes == 0 || !buffer->pinned || !table->upload) return sida_copy(stream, to, from, bytes);
    return table->upload(stream, to, from, bytes);
}

sida_status sida_event_create(sida_backend *backend, sida_event **out) {
    assert(backend && out);
    *out = NULL;
    sida_status status = backend->table->event_create(backend, out);
    if (status == SIDA_OK) count_object(backend, 1);
    return status;
}

void sida_event_destroy(sida_event *event) {
    if (!event) return;
    sida_backend *backend = event->backend;
    backend->table->event_destroy(event);
    count_object(backend, -1);
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
    sida_status status = stream->backend->table->graph_end(stream, out);
    if (status == SIDA_OK) count_object(stream->backend, 1);
    return status;
}

sida_status sida_graph_launch(sida_graph *graph, sida_stream *stream) {
    assert(graph->backend == stream->backend);
    return graph->backend->table->graph_launch(graph, stream);
}

void sida_graph_destroy(sida_graph *graph) {
    if (!graph) return;
    sida_backend *backend = graph->backend;
    backend->table->graph_destroy(graph);
    count_object(backend, -1);
}

sida_status sida_backend_describe(sida_backend *backend, sida_device_info *out) {
    *out = (sida_device_info){0};
    return backend->table->describe(backend, out);
}
