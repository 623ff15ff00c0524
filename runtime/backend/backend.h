/* The device under the runtime: buffers, copies, streams, events. One table of functions, filled by
 * the CPU here and by CUDA.
 *
 * Work on one stream happens in order; streams run beside each other; an event orders them. The
 * CPU's compute stream is the calling thread itself (an op has finished when it returns), its copy
 * streams are threads of their own, so ordering mistakes show without a GPU. Every byte that is
 * "on the device" comes from sida_buffer_create(SIDA_MEMORY_DEVICE) and counts against the cap;
 * the CPU's device arena is real memory of its own. */
#ifndef SIDA_RUNTIME_BACKEND_BACKEND_H
#define SIDA_RUNTIME_BACKEND_BACKEND_H

#include "formats/base/status.h"

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct sida_backend sida_backend;
typedef struct sida_stream sida_stream;
typedef struct sida_event sida_event;
typedef struct sida_graph sida_graph;

typedef enum sida_memory_kind {
    SIDA_MEMORY_DEVICE, /* counts against the cap; 256-byte aligned */
    SIDA_MEMORY_HOST    /* what copies to the device read: pinned where the device wants that */
} sida_memory_kind;

typedef struct sida_buffer {
    void *data;
    size_t bytes;
    sida_memory_kind kind;
    sida_backend *backend;
    bool pinned; /* host memory that the device reads by itself */
} sida_buffer;

typedef enum sida_stream_kind {
    SIDA_STREAM_COMPUTE, /* ops are issued here */
    SIDA_STREAM_COPY,    /* copies only */
    SIDA_STREAM_BESIDE   /* ops too, which give way to those of a compute stream */
} sida_stream_kind;

typedef struct sida_memory_usage {
    size_t used_bytes, peak_bytes; /* our buffers, now and at most since the cap was set */
    size_t cap_bytes;              /* SIZE_MAX: none */
    size_t overhead_bytes;         /* counts against the cap beside them */
    /* What the driver says that this process takes of the device, context and libraries included:
     * at the last sample, and the most of all samples since the cap was set. The CPU: used and
     * peak. */
    size_t driver_bytes, driver_peak_bytes;
    /* False: what other programs use is in the two as well, since NVML, which could tell what was
     * in use before we came, is not there. With it, what others take later counts as ours. */
    bool driver_alone;
} sida_memory_usage;

/* What a back-end runs on. */
typedef struct sida_device_info {
    char name[128];
    size_t total_bytes, free_bytes; /* device memory; of the whole device, whoever uses it */
    int32_t processors;             /* streaming multiprocessors; the CPU's threads */
    int32_t capability[2];          /* compute capability; 0, 0 on the CPU */
    int32_t driver, runtime;        /* CUDA versions, 1000 * major + 10 * minor; 0 on the CPU */
    /* The compute capability, 10 * major + minor, that our kernels run there were compiled for, and
     * that of the PTX beside them; 0 on the CPU. A driver compiles PTX where the first differs from
     * the device's. */
    int32_t code, ptx;
    char driver_release[40]; /* "580.65.06"; "" without NVML */
} sida_device_info;

/* The functions of a back-end; call them through the wrappers below. */
typedef struct sida_backend_table {
    const char *name; /* "cpu", "cuda" */
    void (*destroy)(sida_backend *backend);
    /* Sets data (never NULL, also for no bytes) and pinned; the rest is set and counted. DEVICE or
     * MEMORY. */
    sida_status (*allocate)(sida_buffer *buffer, const char *what);
    void (*release)(sida_buffer *buffer);
    sida_status (*stream_create)(sida_backend *backend, sida_stream **out, sida_stream_kind kind);
    void (*stream_destroy)(sida_stream *stream);
    sida_status (*stream_synchronize)(sida_stream *stream);
    sida_status (*copy)(sida_stream *stream, void *to, const void *from, size_t bytes);
    /* NULL: copy does. from lies in pinned host memory. */
    sida_status (*upload)(sida_stream *stream, void *to, const void *from, size_t bytes);
    sida_status (*event_create)(sida_backend *backend, sida_event **out);
    void (*event_destroy)(sida_event *event);
    sida_status (*event_record)(sida_event *event, sida_stream *stream);
    sida_status (*stream_wait)(sida_stream *stream, sida_event *event);
    sida_status (*event_synchronize)(sida_event *event);
    sida_status (*event_query)(sida_event *event, bool *done);
    /* Recorded work; NULL where there is none to save (the CPU). */
    sida_status (*graph_begin)(sida_stream *stream);
    sida_status (*graph_end)(sida_stream *stream, sida_graph **out);
    sida_status (*graph_launch)(sida_graph *graph, sida_stream *stream);
    void (*graph_destroy)(sida_graph *graph);
    /* Device bytes that the driver says are ours; NULL: buffers are all there is. */
    sida_status (*driver_used)(sida_backend *backend, size_t *bytes, bool *alone);
    sida_status (*describe)(sida_backend *backend, sida_device_info *out);
} sida_backend_table;

/* Every back-end's object, stream and event starts with these. */
struct sida_backend {
    const sida_backend_table *table;
    const struct sida_ops *ops; /* set by runtime/ops: the ops of this device */
    /* The accounts, kept by backend.c for every back-end. */
    pthread_mutex_t account_mutex;
    sida_memory_usage usage;
    int64_t objects; /* buffers, streams, events, graphs alive */
};
struct sida_stream {
    sida_backend *backend;
    sida_stream_kind kind;
};
struct sida_event {
    sida_backend *backend;
};
struct sida_graph {
    sida_backend *backend;
};

typedef struct sida_cpu_options {
    bool poison; /* tests: device memory starts as NaN bytes (0xff), and is so again when freed */
    /* Tests: called on a copy thread before each copy, to delay it. */
    void (*before_copy)(void *context, size_t bytes);
    void *before_copy_context;
    int64_t fail_copy; /* tests: the copy threads' N-th copy fails with DEVICE; 0: none does */
} sida_cpu_options;

/* options may be NULL. */
sida_status sida_backend_create_cpu(sida_backend **out, const sida_cpu_options *options);

typedef struct sida_cuda_options {
    int32_t device; /* as CUDA counts them, from 0 */
    bool poison;    /* tests: device memory starts as NaN bytes (0xff) */
    bool no_pinned; /* tests: the system refuses to pin memory */
    /* Tests: the copy streams' N-th copy and everything behind it fails with DEVICE, as on a device
     * that is lost; 0: none does. */
    int64_t fail_copy;
} sida_cuda_options;

/* True when CUDA is built in, a driver runs and there is a GPU. */
bool sida_cuda_present(void);
/* options may be NULL: the first device. Errors: UNSUPPORTED (built without CUDA), DEVICE (no GPU,
 * no driver or one too old, no code for the device), ARGUMENT (no such device). */
sida_status sida_backend_create_cuda(sida_backend **out, const sida_cuda_options *options);

/* "cpu", "cuda", or "auto" (NULL too): cuda where one is present, else cpu. ARGUMENT for others. */
sida_status sida_backend_create_named(sida_backend **out, const char *device);

/* All buffers, streams and events must be gone. Takes NULL. */
void sida_backend_destroy(sida_backend *backend);

/* `what` names the buffer in a refusal ("expert slots"). Device memory is uninitialised. BUDGET,
 * with the arithmetic, when the cap would be passed; DEVICE or MEMORY when the allocation itself
 * fails. */
sida_status sida_buffer_create(sida_backend *backend, sida_buffer **out, sida_memory_kind kind,
                               size_t bytes, const char *what);
void sida_buffer_destroy(sida_buffer *buffer); /* takes NULL */

sida_status sida_stream_create(sida_backend *backend, sida_stream **out, sida_stream_kind kind);
void sida_stream_destroy(sida_stream *stream); /* waits for its work; takes NULL */
sida_status sida_stream_synchronize(sida_stream *stream);
/* Between any two of host and device. The source must stay until the copy has happened. */
sida_status sida_copy(sida_stream *stream, void *to, const void *from, size_t bytes);

/* A few KiB from `buffer`, host memory of the back-end, to the device on a compute stream: as
 * sida_copy(), but it does not queue behind the large copies of other streams. */
sida_status sida_upload(sida_stream *stream, void *to, const sida_buffer *buffer, const void *from,
                        size_t bytes);

sida_status sida_event_create(sida_backend *backend, sida_event **out);
void sida_event_destroy(sida_event *event); /* takes NULL */
/* The event happens when all work issued to the stream so far has. May be recorded again. */
sida_status sida_event_record(sida_event *event, sida_stream *stream);
/* What is issued to the stream from now on waits for the event's last record. */
sida_status sida_stream_wait(sida_stream *stream, sida_event *event);
sida_status sida_event_synchronize(sida_event *event);
sida_status sida_event_query(sida_event *event, bool *done);

/* A graph: work on one stream, recorded once and issued again in one call, with the same pointers
 * and sizes. Between begin and end the stream's ops and copies are recorded and do not run; nothing
 * may be created, waited for or asked of the stream meanwhile. */
bool sida_graph_supported(const sida_backend *backend);
sida_status sida_graph_begin(sida_stream *stream);
/* Always ends the recording that begin started; an error leaves *out NULL. */
sida_status sida_graph_end(sida_stream *stream, sida_graph **out);
sida_status sida_graph_launch(sida_graph *graph, sida_stream *stream);
void sida_graph_destroy(sida_graph *graph); /* no launch of it may be running; takes NULL */

void sida_backend_memory(sida_backend *backend, sida_memory_usage *out);
/* Asks the driver what is in use: a tenth of a millisecond, so not within a batch. Happens by
 * itself when a large device buffer is made. */
sida_status sida_backend_sample(sida_backend *backend);
/* BUDGET when more than the cap is in use already. */
sida_status sida_backend_set_cap(sida_backend *backend, size_t cap_bytes);
/* What the driver and the libraries take beside our buffers: counts against the cap from now on,
 * or more once a sample has found more. 0, as at first: the cap is on buffers alone. BUDGET when
 * the cap is passed by it. */
sida_status sida_backend_set_overhead(sida_backend *backend, size_t overhead_bytes);
/* The same as the driver's figure and ours differ at this moment; 0 on the CPU. */
sida_status sida_backend_measure_overhead(sida_backend *backend, size_t *bytes);
/* Asks the driver, on the CPU the system. */
sida_status sida_backend_describe(sida_backend *backend, sida_device_info *out);

/* For back-ends: the common part of a new one and, when it goes, its end. */
void sida_backend_begin(sida_backend *backend, const sida_backend_table *table);
void sida_backend_end(sida_backend *backend);

#endif
