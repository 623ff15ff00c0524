/* CUDA as a device: cudaMalloc under a cap of our own counting, pinned host memory, streams that do
 * not wait for the default one.
 *
 * The calling thread's current device is set in every call: threads of the store and the engine
 * come and go, and each starts on device 0. */
#include "runtime/backend/backend_cuda.h"

#include "formats/base/log.h"
#include "formats/base/memory.h"

#include <assert.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { host_alignment = 4096, poison_byte = 0xff };

typedef struct cuda_backend {
    sida_backend base;
    int device;
    bool poison, early_launch;
    pthread_mutex_t mutex;
    /* Below: under the mutex. */
    sida_memory_usage usage;
    int64_t objects; /* buffers, streams, events alive */
    bool warned;     /* pinned memory was refused once */
} cuda_backend;

typedef struct cuda_event {
    sida_event base;
    cudaEvent_t event;
} cuda_event;

typedef struct cuda_graph {
    sida_graph base;
    cudaGraphExec_t run;
} cuda_graph;

static cuda_backend *of(const sida_backend *backend) {
    return (cuda_backend *)(uintptr_t)backend;
}

static cudaEvent_t event_of(sida_event *event) {
    return ((cuda_event *)event)->event;
}

/* --- errors */

static const char *advice(cudaError_t code) {
    switch (code) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
        return ": this build has no code for this GPU; build with "
               "-DCMAKE_CUDA_ARCHITECTURES=native, or use --device cpu";
    case cudaErrorMemoryAllocation:
        return ": end other programs that use the device, or take a smaller budget";
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorHardwareStackError:
    case cudaErrorECCUncorrectable:
    case cudaErrorDevicesUnavailable:
    case cudaErrorUnknown:
        return ": the device's work is lost; start again, and if this comes back look at "
               "nvidia-smi and the system's log";
    default:
        return "";
    }
}

sida_status sida_cuda_check(cudaError_t code, const char *call) {
    if (code == cudaSuccess) return SIDA_OK;
    (void)cudaGetLastError();
    return sida_fail(SIDA_ERROR_DEVICE, "cuda: %.*s: %s%s", (int)strcspn(call, "("), call,
                     cudaGetErrorString(code), advice(code));
}

bool sida_cuda_early_launch(const sida_backend *backend) {
    return of(backend)->early_launch;
}

sida_status sida_cuda_use(const sida_backend *backend) {
    return SIDA_CUDA(cudaSetDevice(of(backend)->device));
}

/* --- memory */

static sida_status out_of_memory(const char *what, size_t bytes) {
    size_t left = 0, total = 0;
    (void)cudaGetLastError();
    if (cudaMemGetInfo(&left, &total) != cudaSuccess) (void)cudaGetLastError();
    return sida_fail(SIDA_ERROR_DEVICE,
                     "%s: no %zu bytes of device memory: %zu of %zu are free; take a smaller "
                     "budget, or end other programs that use the device",
                     what, bytes, left, total);
}

static sida_status allocate_device(cuda_backend *backend, sida_buffer *buffer, size_t bytes,
                                   const char *what) {
    sida_status status = SIDA_OK;
    cudaError_t code = cudaMalloc(&buffer->data, bytes);
    if (code == cudaErrorMemoryAllocation) return out_of_memory(what, bytes);
    SIDA_TRY(sida_cuda_check(code, "cudaMalloc"));
    if (!backend->poison) return SIDA_OK;
    /* Our streams do not wait for the default one, where this happens. */
    SIDA_TRY(SIDA_CUDA(cudaMemset(buffer->data, poison_byte, bytes)));
    SIDA_TRY(SIDA_CUDA(cudaDeviceSynchronize()));
out:
    if (status != SIDA_OK && buffer->data) (void)cudaFree(buffer->data);
    return status;
}

/* Pinned; where the system refuses, ordinary memory. opaque: not NULL when pinned. */
static sida_status allocate_host(cuda_backend *backend, sida_buffer *buffer, size_t bytes,
                                 const char *what) {
    cudaError_t code = cudaHostAlloc(&buffer->data, bytes, cudaHostAllocPortable);
    if (code == cudaSuccess) {
        buffer->opaque = backend;
        return SIDA_OK;
    }
    (void)cudaGetLastError();
    size_t rounded = (bytes + host_alignment - 1) & ~(size_t)(host_alignment - 1);
    buffer->data = rounded < bytes ? NULL : aligned_alloc(host_alignment, rounded);
    if (!buffer->data)
        return sida_fail(SIDA_ERROR_MEMORY, "%s: out of memory asking for %zu bytes", what, bytes);
    pthread_mutex_lock(&backend->mutex);
    bool warned = backend->warned;
    backend->warned = true;
    pthread_mutex_unlock(&backend->mutex);
    if (!warned)
        sida_log(SIDA_LOG_WARNING,
                 "%s: the system refused %zu bytes of pinned memory (%s; see ulimit -l): ordinary "
                 "memory is used; copies to the device take two to four times as long and do not "
                 "run beside computation",
                 what, bytes, cudaGetErrorString(code));
    return SIDA_OK;
}

static sida_status cuda_buffer_create(sida_backend *base, sida_buffer **out, sida_memory_kind kind,
                                      size_t bytes, const char *what) {
    cuda_backend *backend = of(base);
    sida_buffer *buffer = NULL;
    bool counted = false;
    sida_status status = SIDA_OK;
    size_t asked = bytes ? bytes : 1;
    SIDA_TRY(sida_cuda_use(base));
    SIDA_TRY(SIDA_ALLOC(&buffer, 1, "a buffer"));
    if (kind == SIDA_MEMORY_DEVICE) {
        pthread_mutex_lock(&backend->mutex);
        sida_memory_usage *usage = &backend->usage;
        counted = bytes <= usage->cap_bytes - usage->used_bytes;
        if (counted) usage->used_bytes += bytes;
        size_t used = usage->used_bytes, cap = usage->cap_bytes;
        pthread_mutex_unlock(&backend->mutex);
        if (!counted)
            SIDA_FAIL(SIDA_ERROR_BUDGET,
                      "%s: %zu bytes do not fit: %zu of the device budget's %zu bytes are in use",
                      what, bytes, used, cap);
        SIDA_TRY(allocate_device(backend, buffer, asked, what));
    } else {
        SIDA_TRY(allocate_host(backend, buffer, asked, what));
    }
    buffer->bytes = bytes;
    buffer->kind = kind;
    buffer->backend = base;
    *out = buffer;
    buffer = NULL;
out:
    pthread_mutex_lock(&backend->mutex);
    if (status != SIDA_OK && counted) backend->usage.used_bytes -= bytes;
    if (status == SIDA_OK) backend->objects++;
    if (backend->usage.used_bytes > backend->usage.peak_bytes)
        backend->usage.peak_bytes = backend->usage.used_bytes;
    pthread_mutex_unlock(&backend->mutex);
    free(buffer);
    return status;
}

/* The ways out cannot report; what went wrong before shows again in the next call that can. */
static void cuda_buffer_destroy(sida_buffer *buffer) {
    cuda_backend *backend = of(buffer->backend);
    (void)cudaSetDevice(backend->device);
    if (buffer->kind == SIDA_MEMORY_DEVICE)
        (void)cudaFree(buffer->data);
    else if (buffer->opaque)
        (void)cudaFreeHost(buffer->data);
    else
        free(buffer->data);
    (void)cudaGetLastError();
    pthread_mutex_lock(&backend->mutex);
    if (buffer->kind == SIDA_MEMORY_DEVICE) backend->usage.used_bytes -= buffer->bytes;
    backend->objects--;
    pthread_mutex_unlock(&backend->mutex);
    free(buffer);
}

static void cuda_memory_usage(sida_backend *base, sida_memory_usage *out) {
    cuda_backend *backend = of(base);
    pthread_mutex_lock(&backend->mutex);
    *out = backend->usage;
    pthread_mutex_unlock(&backend->mutex);
}

static sida_status cuda_sample(sida_backend *base) {
    cuda_backend *backend = of(base);
    sida_status status = SIDA_OK;
    size_t left, total;
    SIDA_TRY(sida_cuda_use(base));
    SIDA_TRY(SIDA_CUDA(cudaMemGetInfo(&left, &total)));
    pthread_mutex_lock(&backend->mutex);
    sida_memory_usage *usage = &backend->usage;
    usage->driver_bytes = total - left;
    if (usage->driver_bytes > usage->driver_peak_bytes)
        usage->driver_peak_bytes = usage->driver_bytes;
    pthread_mutex_unlock(&backend->mutex);
out:
    return status;
}

static sida_status cuda_set_cap(sida_backend *base, size_t cap_bytes) {
    cuda_backend *backend = of(base);
    pthread_mutex_lock(&backend->mutex);
    size_t used = backend->usage.used_bytes;
    if (used <= cap_bytes) {
        backend->usage.cap_bytes = cap_bytes;
        backend->usage.peak_bytes = used;
    }
    pthread_mutex_unlock(&backend->mutex);
    if (used <= cap_bytes) return SIDA_OK;
    return sida_fail(SIDA_ERROR_BUDGET, "a device budget of %zu bytes: %zu bytes are in use",
                     cap_bytes, used);
}

static sida_status cuda_describe(sida_backend *base, sida_device_info *out) {
    sida_status status = SIDA_OK;
    struct cudaDeviceProp properties;
    SIDA_TRY(sida_cuda_use(base));
    SIDA_TRY(SIDA_CUDA(cudaGetDeviceProperties(&properties, of(base)->device)));
    SIDA_TRY(SIDA_CUDA(cudaMemGetInfo(&out->free_bytes, &out->total_bytes)));
    SIDA_TRY(SIDA_CUDA(cudaDriverGetVersion(&out->driver)));
    SIDA_TRY(SIDA_CUDA(cudaRuntimeGetVersion(&out->runtime)));
    snprintf(out->name, sizeof out->name, "%.*s", (int)sizeof out->name - 1, properties.name);
    out->processors = properties.multiProcessorCount;
    out->capability[0] = properties.major;
    out->capability[1] = properties.minor;
out:
    return status;
}

static void count_object(const sida_backend *base, int64_t change) {
    cuda_backend *backend = of(base);
    pthread_mutex_lock(&backend->mutex);
    backend->objects += change;
    pthread_mutex_unlock(&backend->mutex);
}

/* --- streams */

static sida_status cuda_stream_create(sida_backend *base, sida_stream **out,
                                      sida_stream_kind kind) {
    sida_status status = SIDA_OK;
    sida_cuda_stream *stream = NULL;
    SIDA_TRY(sida_cuda_use(base));
    SIDA_TRY(SIDA_ALLOC(&stream, 1, "a stream"));
    stream->base = (sida_stream){base, kind};
    SIDA_TRY(SIDA_CUDA(cudaStreamCreateWithFlags(&stream->stream, cudaStreamNonBlocking)));
    count_object(base, 1);
    *out = &stream->base;
    stream = NULL;
out:
    free(stream);
    return status;
}

static void cuda_stream_destroy(sida_stream *base) {
    sida_cuda_stream *stream = sida_cuda_stream_of(base);
    (void)cudaSetDevice(of(base->backend)->device);
    (void)cudaStreamSynchronize(stream->stream);
    if (stream->ops_state) stream->ops_state_destroy(stream->ops_state);
    (void)cudaStreamDestroy(stream->stream);
    (void)cudaGetLastError();
    count_object(base->backend, -1);
    free(stream);
}

static sida_status cuda_stream_synchronize(sida_stream *stream) {
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_cuda_use(stream->backend));
    SIDA_TRY(SIDA_CUDA(cudaStreamSynchronize(sida_cuda_stream_of(stream)->stream)));
out:
    return status;
}

static sida_status cuda_copy(sida_stream *stream, void *to, const void *from, size_t bytes) {
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_cuda_use(stream->backend));
    SIDA_TRY(SIDA_CUDA(
        cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, sida_cuda_stream_of(stream)->stream)));
out:
    return status;
}

/* --- events */

static sida_status cuda_event_create(sida_backend *base, sida_event **out) {
    sida_status status = SIDA_OK;
    cuda_event *event = NULL;
    SIDA_TRY(sida_cuda_use(base));
    SIDA_TRY(SIDA_ALLOC(&event, 1, "an event"));
    event->base.backend = base;
    SIDA_TRY(SIDA_CUDA(cudaEventCreateWithFlags(&event->event, cudaEventDisableTiming)));
    count_object(base, 1);
    *out = &event->base;
    event = NULL;
out:
    free(event);
    return status;
}

static void cuda_event_destroy(sida_event *base) {
    (void)cudaSetDevice(of(base->backend)->device);
    (void)cudaEventDestroy(event_of(base));
    (void)cudaGetLastError();
    count_object(base->backend, -1);
    free(base);
}

static sida_status cuda_event_record(sida_event *event, sida_stream *stream) {
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_cuda_use(stream->backend));
    SIDA_TRY(SIDA_CUDA(cudaEventRecord(event_of(event), sida_cuda_stream_of(stream)->stream)));
out:
    return status;
}

static sida_status cuda_stream_wait(sida_stream *stream, sida_event *event) {
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_cuda_use(stream->backend));
    SIDA_TRY(
        SIDA_CUDA(cudaStreamWaitEvent(sida_cuda_stream_of(stream)->stream, event_of(event), 0)));
out:
    return status;
}

static sida_status cuda_event_synchronize(sida_event *event) {
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_cuda_use(event->backend));
    SIDA_TRY(SIDA_CUDA(cudaEventSynchronize(event_of(event))));
out:
    return status;
}

static sida_status cuda_event_query(sida_event *event, bool *done) {
    sida_status status = SIDA_OK;
    *done = false;
    SIDA_TRY(sida_cuda_use(event->backend));
    cudaError_t code = cudaEventQuery(event_of(event));
    if (code == cudaErrorNotReady) {
        (void)cudaGetLastError();
        return SIDA_OK;
    }
    SIDA_TRY(sida_cuda_check(code, "cudaEventQuery"));
    *done = true;
out:
    return status;
}

/* --- graphs */

/* What other threads do meanwhile (the loader's copies) is none of this recording's business. */
static sida_status cuda_graph_begin(sida_stream *stream) {
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_cuda_use(stream->backend));
    SIDA_TRY(SIDA_CUDA(cudaStreamBeginCapture(sida_cuda_stream_of(stream)->stream,
                                              cudaStreamCaptureModeThreadLocal)));
out:
    return status;
}

static sida_status cuda_graph_end(sida_stream *stream, sida_graph **out) {
    sida_status status = SIDA_OK;
    cuda_graph *graph = NULL;
    cudaGraph_t recorded = NULL;
    SIDA_TRY(sida_cuda_use(stream->backend));
    SIDA_TRY(SIDA_CUDA(cudaStreamEndCapture(sida_cuda_stream_of(stream)->stream, &recorded)));
    SIDA_TRY(SIDA_ALLOC(&graph, 1, "a graph"));
    graph->base.backend = stream->backend;
    SIDA_TRY(SIDA_CUDA(cudaGraphInstantiate(&graph->run, recorded, 0)));
    count_object(stream->backend, 1);
    *out = &graph->base;
    graph = NULL;
out:
    if (recorded) (void)cudaGraphDestroy(recorded);
    free(graph);
    return status;
}

static sida_status cuda_graph_launch(sida_graph *graph, sida_stream *stream) {
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_cuda_use(stream->backend));
    SIDA_TRY(SIDA_CUDA(
        cudaGraphLaunch(((cuda_graph *)graph)->run, sida_cuda_stream_of(stream)->stream)));
out:
    return status;
}

static void cuda_graph_destroy(sida_graph *base) {
    (void)cudaSetDevice(of(base->backend)->device);
    (void)cudaGraphExecDestroy(((cuda_graph *)base)->run);
    (void)cudaGetLastError();
    count_object(base->backend, -1);
    free(base);
}

/* --- the back-end */

static void cuda_destroy(sida_backend *base) {
    cuda_backend *backend = of(base);
    assert(backend->objects == 0 && "buffers, streams and events go before their back-end");
    pthread_mutex_destroy(&backend->mutex);
    free(backend);
}

static const sida_backend_table cuda_table = {
    .name = "cuda",
    .destroy = cuda_destroy,
    .buffer_create = cuda_buffer_create,
    .buffer_destroy = cuda_buffer_destroy,
    .stream_create = cuda_stream_create,
    .stream_destroy = cuda_stream_destroy,
    .stream_synchronize = cuda_stream_synchronize,
    .copy = cuda_copy,
    .event_create = cuda_event_create,
    .event_destroy = cuda_event_destroy,
    .event_record = cuda_event_record,
    .stream_wait = cuda_stream_wait,
    .event_synchronize = cuda_event_synchronize,
    .event_query = cuda_event_query,
    .graph_begin = cuda_graph_begin,
    .graph_end = cuda_graph_end,
    .graph_launch = cuda_graph_launch,
    .graph_destroy = cuda_graph_destroy,
    .memory_usage = cuda_memory_usage,
    .sample = cuda_sample,
    .set_cap = cuda_set_cap,
    .describe = cuda_describe,
};

/* Why there is nothing to run on. */
static sida_status count_devices(int *count) {
    int driver = 0;
    *count = 0;
    cudaError_t code = cudaGetDeviceCount(count);
    if (code != cudaSuccess) (void)cudaGetLastError();
    if (code == cudaSuccess && *count > 0) return SIDA_OK;
    if (code == cudaErrorInsufficientDriver) {
        (void)cudaDriverGetVersion(&driver);
        if (driver > 0)
            return sida_fail(SIDA_ERROR_DEVICE,
                             "device cuda: the NVIDIA driver knows CUDA %d.%d, this program needs "
                             "%d.%d: update the driver, or use --device cpu",
                             driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                             CUDART_VERSION % 1000 / 10);
        return sida_fail(SIDA_ERROR_DEVICE,
                         "device cuda: no NVIDIA driver is installed: use --device cpu");
    }
    if (code == cudaSuccess || code == cudaErrorNoDevice)
        return sida_fail(SIDA_ERROR_DEVICE,
                         "device cuda: no GPU is present or visible (see nvidia-smi and "
                         "CUDA_VISIBLE_DEVICES): use --device cpu");
    return sida_cuda_check(code, "cudaGetDeviceCount");
}

bool sida_cuda_present(void) {
    int count;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count > 0 : (cudaGetLastError(), false);
}

sida_status sida_backend_create_cuda(sida_backend **out, const sida_cuda_options *options) {
    sida_status status = SIDA_OK;
    cuda_backend *backend = NULL;
    int count, device = options ? options->device : 0;
    *out = NULL;
    SIDA_TRY(count_devices(&count));
    if (device < 0 || device >= count)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "device cuda: number %d: expected 0 to %d", device,
                  count - 1);
    SIDA_TRY(SIDA_ALLOC(&backend, 1, "the CUDA back-end"));
    backend->base.table = &cuda_table;
    backend->device = device;
    backend->poison = options && options->poison;
    backend->usage.cap_bytes = SIZE_MAX;
    SIDA_TRY(sida_cuda_use(&backend->base));
    int major = 0;
    SIDA_TRY(SIDA_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)));
    backend->early_launch = major >= 9;
    SIDA_TRY(SIDA_CUDA(cudaFree(NULL))); /* the driver starts here, and not in the first buffer */
    pthread_mutex_init(&backend->mutex, NULL);
    *out = &backend->base;
    backend = NULL;
out:
    free(backend);
    return status;
}
