/* Counts how often a run waits for the device: a back-end's own table with counters in front. */
#ifndef SIDA_TESTS_READ_BACKS_H
#define SIDA_TESTS_READ_BACKS_H

#include "runtime/backend/backend.h"

static struct {
    const sida_backend_table *real;
    sida_backend_table table;
    struct {
        const char *begin, *end;
    } host[32]; /* host buffers made since; none is expected to go before the counting ends */
    int host_count;
    int64_t waits;  /* stream synchronisations */
    int64_t copies; /* into those buffers */
    size_t bytes;   /* of those copies */
} read_backs;

static inline sida_status read_backs_buffer(sida_buffer *buffer, const char *what) {
    sida_status status = read_backs.real->allocate(buffer, what);
    if (status == SIDA_OK && buffer->kind == SIDA_MEMORY_HOST && read_backs.host_count < 32) {
        const char *begin = buffer->data;
        read_backs.host[read_backs.host_count].begin = begin;
        read_backs.host[read_backs.host_count++].end = begin + buffer->bytes;
    }
    return status;
}

static inline sida_status read_backs_wait(sida_stream *stream) {
    read_backs.waits++;
    return read_backs.real->stream_synchronize(stream);
}

static inline sida_status read_backs_copy(sida_stream *stream, void *to, const void *from,
                                          size_t bytes) {
    for (int i = 0; i < read_backs.host_count; i++)
        if ((const char *)to >= read_backs.host[i].begin &&
            (const char *)to < read_backs.host[i].end) {
            read_backs.copies++;
            read_backs.bytes += bytes;
        }
    return read_backs.real->copy(stream, to, from, bytes);
}

/* Before the run is created. */
static inline void read_backs_watch(sida_backend *backend) {
    read_backs.real = backend->table;
    read_backs.table = *backend->table;
    read_backs.table.allocate = read_backs_buffer;
    read_backs.table.stream_synchronize = read_backs_wait;
    read_backs.table.copy = read_backs_copy;
    read_backs.host_count = 0;
    backend->table = &read_backs.table;
}

static inline void read_backs_reset(void) {
    read_backs.waits = read_backs.copies = 0;
    read_backs.bytes = 0;
}

#endif
