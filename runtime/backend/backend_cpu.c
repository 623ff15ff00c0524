/* The CPU as a device: an arena of its own with an enforced cap, copy streams that are threads.
 *
 * The compute stream is the calling thread, so whatever is issued to it has finished when the call
 * returns. A copy stream is a thread with a list of commands; events are counters: a record takes
 * the next ticket, the event has happened once `done` has reached the last ticket. */
#include "formats/base/memory.h"
#include "runtime/backend/backend.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { device_alignment = 256, poison_byte = 0xff };

typedef struct cpu_backend {
    sida_backend base;
    sida_cpu_options options;
    /* One lock and one condition for command lists and events: all short. */
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int64_t copies; /* begun on copy threads */
} cpu_backend;

typedef struct cpu_event {
    sida_event base;
    uint64_t issued, done; /* tickets */
    sida_status result;    /* of the stream when the last record happened */
    int pending;           /* commands that still name the event */
} cpu_event;

typedef enum command_kind { COMMAND_COPY, COMMAND_RECORD, COMMAND_WAIT } command_kind;

typedef struct command {
    command_kind kind;
    void *to;
    const void *from;
    size_t bytes;
    cpu_event *event;
    uint64_t ticket;
} command;

typedef struct cpu_stream {
    sida_stream base;
    pthread_t thread;
    command *ring; /* [capacity] */
    size_t capacity, first, count;
    bool busy, stop;
    sida_status result; /* sticky: what is issued after a failed copy does not happen */
} cpu_stream;

static cpu_backend *of(sida_backend *backend) {
    return (cpu_backend *)backend;
}

/* --- memory */

static sida_status cpu_allocate(sida_buffer *buffer, const char *what) {
    size_t bytes = buffer->bytes, rounded;
    if (sida_add_overflow(bytes ? bytes : 1, device_alignment - 1, &rounded))
        return sida_fail(SIDA_ERROR_MEMORY, "%s: %zu bytes is more than memory can be", what,
                         bytes);
    rounded &= ~(size_t)(device_alignment - 1);
    buffer->data = aligned_alloc(device_alignment, rounded);
    if (!buffer->data)
        return sida_fail(SIDA_ERROR_MEMORY, "%s: out of memory asking for %zu bytes", what, bytes);
    if (buffer->kind == SIDA_MEMORY_DEVICE && of(buffer->backend)->options.poison)
        memset(buffer->data, poison_byte, rounded);
    return SIDA_OK;
}

static void cpu_release(sida_buffer *buffer) {
    /* A late reader gets NaN even where the allocator hands the block out again. */
    if (buffer->kind == SIDA_MEMORY_DEVICE && of(buffer->backend)->options.poison)
        memset(buffer->data, poison_byte, buffer->bytes);
    free(buffer->data);
}

/* --- copy threads */

static sida_status perform_copy(cpu_backend *backend, const command *c, int64_t number) {
    if (backend->options.before_copy)
        backend->options.before_copy(backend->options.before_copy_context, c->bytes);
    if (number == backend->options.fail_copy) return SIDA_ERROR_DEVICE;
    memcpy(c->to, c->from, c->bytes);
    return SIDA_OK;
}

static void *copy_thread(void *argument) {
    cpu_stream *stream = argument;
    cpu_backend *backend = of(stream->base.backend);
    pthread_mutex_lock(&backend->mutex);
    for (;;) {
        while (stream->count == 0 && !stream->stop)
            pthread_cond_wait(&backend->changed, &backend->mutex);
        if (stream->count == 0) break;
        command c = stream->ring[stream->first];
        stream->first = (stream->first + 1) % stream->capacity;
        stream->count--;
        stream->busy = true;
        switch (c.kind) {
        case COMMAND_COPY:
            if (stream->result != SIDA_OK) break;
            int64_t number = ++backend->copies;
            pthread_mutex_unlock(&backend->mutex);
            sida_status status = perform_copy(backend, &c, number);
            pthread_mutex_lock(&backend->mutex);
            stream->result = status;
            break;
        case COMMAND_RECORD:
            if (c.event->done < c.ticket) {
                c.event->done = c.ticket;
                c.event->result = stream->result;
            }
            c.event->pending--;
            break;
        case COMMAND_WAIT:
            while (c.event->done < c.ticket) pthread_cond_wait(&backend->changed, &backend->mutex);
            if (stream->result == SIDA_OK) stream->result = c.event->result;
            c.event->pending--;
            break;
        }
        stream->busy = false;
        pthread_cond_broadcast(&backend->changed);
    }
    pthread_mutex_unlock(&backend->mutex);
    return NULL;
}

/* Mutex held. */
static sida_status push_command(cpu_stream *stream, const command *c) {
    if (stream->count == stream->capacity) {
        size_t capacity = stream->capacity ? stream->capacity * 2 : 64;
        command *ring;
        sida_status status = SIDA_ALLOC(&ring, capacity, "a copy stream's commands");
        if (status != SIDA_OK) return status;
        for (size_t i = 0; i < stream->count; i++)
            ring[i] = stream->ring[(stream->first + i) % stream->capacity];
        free(stream->ring);
        stream->ring = ring;
        stream->first = 0;
        stream->capacity = capacity;
    }
    stream->ring[(stream->first + stream->count++) % stream->capacity] = *c;
    if (c->event) c->event->pending++;
    pthread_cond_broadcast(&of(stream->base.backend)->changed);
    return SIDA_OK;
}

static sida_status device_error(sida_status result) {
    if (result == SIDA_OK) return SIDA_OK;
    return sida_fail(result, "cpu: a copy to the device arena failed");
}

static sida_status cpu_stream_create(sida_backend *base, sida_stream **out, sida_stream_kind kind) {
    cpu_stream *stream;
    sida_status status = SIDA_ALLOC(&stream, 1, "a stream");
    if (status != SIDA_OK) return status;
    stream->base = (sida_stream){base, kind};
    if (kind == SIDA_STREAM_COPY && pthread_create(&stream->thread, NULL, copy_thread, stream)) {
        free(stream);
        return sida_fail(SIDA_ERROR_DEVICE, "cpu: cannot start a copy thread");
    }
    *out = &stream->base;
    return SIDA_OK;
}

static void cpu_stream_destroy(sida_stream *base) {
    cpu_stream *stream = (cpu_stream *)base;
    cpu_backend *backend = of(base->backend);
    pthread_mutex_lock(&backend->mutex);
    stream->stop = true;
    pthread_cond_broadcast(&backend->changed);
    pthread_mutex_unlock(&backend->mutex);
    if (base->kind == SIDA_STREAM_COPY) pthread_join(stream->thread, NULL);
    free(stream->ring);
    free(stream);
}

static sida_status cpu_stream_synchronize(sida_stream *base) {
    cpu_stream *stream = (cpu_stream *)base;
    cpu_backend *backend = of(base->backend);
    pthread_mutex_lock(&backend->mutex);
    while (stream->count > 0 || stream->busy) pthread_cond_wait(&backend->changed, &backend->mutex);
    sida_status result = stream->result;
    pthread_mutex_unlock(&backend->mutex);
    return device_error(result);
}

static sida_status cpu_copy(sida_stream *base, void *to, const void *from, size_t bytes) {
    if (base->kind != SIDA_STREAM_COPY) {
        memmove(to, from, bytes);
        return SIDA_OK;
    }
    cpu_backend *backend = of(base->backend);
    command c = {.kind = COMMAND_COPY, .to = to, .from = from, .bytes = bytes};
    pthread_mutex_lock(&backend->mutex);
    sida_status status = push_command((cpu_stream *)base, &c);
    pthread_mutex_unlock(&backend->mutex);
    return status;
}

/* --- events */

static sida_status cpu_event_create(sida_backend *base, sida_event **out) {
    cpu_event *event;
    sida_status status = SIDA_ALLOC(&event, 1, "an event");
    if (status != SIDA_OK) return status;
    event->base.backend = base;
    *out = &event->base;
    return SIDA_OK;
}

static void cpu_event_destroy(sida_event *base) {
    cpu_event *event = (cpu_event *)base;
    cpu_backend *backend = of(base->backend);
    pthread_mutex_lock(&backend->mutex);
    while (event->pending > 0) pthread_cond_wait(&backend->changed, &backend->mutex);
    pthread_mutex_unlock(&backend->mutex);
    free(event);
}

static sida_status cpu_event_record(sida_event *base, sida_stream *stream) {
    cpu_event *event = (cpu_event *)base;
    cpu_backend *backend = of(base->backend);
    sida_status status = SIDA_OK;
    pthread_mutex_lock(&backend->mutex);
    command c = {.kind = COMMAND_RECORD, .event = event, .ticket = event->issued + 1};
    if (stream->kind == SIDA_STREAM_COPY) {
        status = push_command((cpu_stream *)stream, &c);
    } else {
        event->done = c.ticket;
        event->result = SIDA_OK;
        pthread_cond_broadcast(&backend->changed);
    }
    if (status == SIDA_OK) event->issued = c.ticket;
    pthread_mutex_unlock(&backend->mutex);
    return status;
}

/* Mutex held; an event that was never recorded has happened. */
static sida_status wait_event(cpu_backend *backend, cpu_event *event) {
    uint64_t ticket = event->issued;
    while (event->done < ticket) pthread_cond_wait(&backend->changed, &backend->mutex);
    return event->result;
}

static sida_status cpu_stream_wait(sida_stream *stream, sida_event *base) {
    cpu_event *event = (cpu_event *)base;
    cpu_backend *backend = of(stream->backend);
    sida_status status = SIDA_OK, result = SIDA_OK;
    pthread_mutex_lock(&backend->mutex);
    command c = {.kind = COMMAND_WAIT, .event = event, .ticket = event->issued};
    if (stream->kind == SIDA_STREAM_COPY)
        status = push_command((cpu_stream *)stream, &c);
    else
        result = wait_event(backend, event);
    pthread_mutex_unlock(&backend->mutex);
    return status != SIDA_OK ? status : device_error(result);
}

static sida_status cpu_event_synchronize(sida_event *base) {
    cpu_backend *backend = of(base->backend);
    pthread_mutex_lock(&backend->mutex);
    sida_status result = wait_event(backend, (cpu_event *)base);
    pthread_mutex_unlock(&backend->mutex);
    return device_error(result);
}

static sida_status cpu_event_query(sida_event *base, bool *done) {
    cpu_event *event = (cpu_event *)base;
    cpu_backend *backend = of(base->backend);
    pthread_mutex_lock(&backend->mutex);
    *done = event->done >= event->issued;
    sida_status result = *done ? event->result : SIDA_OK;
    pthread_mutex_unlock(&backend->mutex);
    return device_error(result);
}

/* --- what it is */

/* The value of the first line of a /proc file that starts with `key`; false where there is none. */
static bool find_line(char *out, size_t size, const char *path, const char *key) {
    char line[256];
    bool found = false;
    FILE *file = fopen(path, "r");
    if (!file) return false;
    while (!found && fgets(line, sizeof line, file)) {
        const char *value = strchr(line, ':');
        if (!value || strncmp(line, key, strlen(key)) != 0) continue;
        value += 1 + strspn(value + 1, " \t");
        snprintf(out, size, "%.*s", (int)strcspn(value, "\n"), value);
        found = true;
    }
    fclose(file);
    return found;
}

static sida_status cpu_describe(sida_backend *base, sida_device_info *out) {
    char text[64];
    (void)base;
    if (!find_line(out->name, sizeof out->name, "/proc/cpuinfo", "model name"))
        snprintf(out->name, sizeof out->name, "CPU");
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    out->total_bytes = (size_t)sysconf(_SC_PHYS_PAGES) * page;
    out->free_bytes = (size_t)sysconf(_SC_AVPHYS_PAGES) * page;
    /* What programs can still get is more than what lies idle. */
    if (find_line(text, sizeof text, "/proc/meminfo", "MemAvailable"))
        out->free_bytes = (size_t)strtoull(text, NULL, 10) << 10;
    out->processors = (int32_t)sysconf(_SC_NPROCESSORS_ONLN);
    return SIDA_OK;
}

static void cpu_destroy(sida_backend *base) {
    cpu_backend *backend = of(base);
    sida_backend_end(base);
    pthread_cond_destroy(&backend->changed);
    pthread_mutex_destroy(&backend->mutex);
    free(backend);
}

static const sida_backend_table cpu_table = {
    .name = "cpu",
    .destroy = cpu_destroy,
    .allocate = cpu_allocate,
    .release = cpu_release,
    .stream_create = cpu_stream_create,
    .stream_destroy = cpu_stream_destroy,
    .stream_synchronize = cpu_stream_synchronize,
    .copy = cpu_copy,
    .event_create = cpu_event_create,
    .event_destroy = cpu_event_destroy,
    .event_record = cpu_event_record,
    .stream_wait = cpu_stream_wait,
    .event_synchronize = cpu_event_synchronize,
    .event_query = cpu_event_query,
    .describe = cpu_describe,
};

sida_status sida_backend_create_cpu(sida_backend **out, const sida_cpu_options *options) {
    *out = NULL;
    cpu_backend *backend;
    sida_status status = SIDA_ALLOC(&backend, 1, "the CPU back-end");
    if (status != SIDA_OK) return status;
    sida_backend_begin(&backend->base, &cpu_table);
    if (options) backend->options = *options;
    pthread_mutex_init(&backend->mutex, NULL);
    pthread_cond_init(&backend->changed, NULL);
    *out = &backend->base;
    return SIDA_OK;
}
