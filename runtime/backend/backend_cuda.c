/* CUDA as a device: cudaMalloc under a cap of our own counting, pinned host memory, streams that do
 * not wait for the default one.
 *
 * The calling thread's current device is set in every call: threads of the store and the engine
 * come and go, and each starts on device 0. */
#include "runtime/backend/backend_cuda.h"

#include "formats/base/log.h"
#include "formats/base/memory.h"
#include "runtime/backend/nvml_cuda.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
    host_alignment = 4096,
    huge_page = 2 << 20,
    large_bytes = 64 << 20,
    poison_byte = 0xff,
    stack_bytes = 256,
    most_devices = 64
};

typedef struct cuda_backend {
    sida_backend base;
    sida_cuda_options options;
    bool early_launch;
    atomic_bool warned; /* pinned memory was refused once */
    atomic_bool lost;   /* tests: as a device that is gone */
    atomic_int_fast64_t copies;
} cuda_backend;

/* What a device had in use before this process came, asked once a process: the context and what
 * other back-ends of ours hold must not count as others'. */
typedef struct beginning {
    bool known;
    void *nvml; /* NULL: cannot be asked */
    size_t others_bytes;
} beginning;
static pthread_mutex_t beginnings_mutex = PTHREAD_MUTEX_INITIALIZER;
static beginning beginnings[most_devices];

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

#define SIDA_CUDA_LOST                                                                             \
    ": the device's work is lost; start again, and if this comes back look at nvidia-smi and the " \
    "system's log, or use --device cpu"

static const char *advice(cudaError_t code) {
    switch (code) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
        return ": this build has no code for this GPU; build with "
               "-DCMAKE_CUDA_ARCHITECTURES=native, or use --device cpu";
    case cudaErrorMemoryAllocation:
        return ": end other programs that use the device, or take a smaller budget";
    case cudaErrorSystemDriverMismatch:
        return ": the driver was updated and not restarted; restart the machine, or use --device "
               "cpu";
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorDevicesUnavailable:
    case cudaErrorUnknown:
        return SIDA_CUDA_LOST;
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

/* In front of every call, so that after a loss each of them fails. */
sida_status sida_cuda_use(const sida_backend *base) {
    const cuda_backend *backend = of(base);
    if (atomic_load_explicit(&backend->lost, memory_order_relaxed))
        return sida_fail(SIDA_ERROR_DEVICE, "cuda: a copy failed as asked for%s", SIDA_CUDA_LOST);
    return SIDA_CUDA(cudaSetDevice(backend->options.device));
}

sida_status sida_cuda_absent(cudaError_t code, int driver) {
    if (code == cudaErrorInsufficientDriver && driver > 0)
        return sida_fail(SIDA_ERROR_DEVICE,
                         "device cuda: the NVIDIA driver knows CUDA %d.%d, this program needs "
                         "%d.%d: update the driver, or use --device cpu",
                         driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                         CUDART_VERSION % 1000 / 10);
    if (code == cudaErrorInsufficientDriver)
        return sida_fail(SIDA_ERROR_DEVICE,
                         "device cuda: no NVIDIA driver is installed: use --device cpu");
    if (code == cudaSuccess || code == cudaErrorNoDevice)
        return sida_fail(SIDA_ERROR_DEVICE,
                         "device cuda: no GPU is present or visible (see nvidia-smi and "
                         "CUDA_VISIBLE_DEVICES): use --device cpu");
    return sida_fail(SIDA_ERROR_DEVICE,
                     "device cuda: the driver does not start: %s (see nvidia-smi and the system's "
                     "log): use --device cpu",
                     cudaGetErrorString(code));
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

static sida_status allocate_device(sida_buffer *buffer, size_t bytes, const char *what) {
    sida_status status = SIDA_OK;
    cudaError_t code = cudaMalloc(&buffer->data, bytes);
    if (code == cudaErrorMemoryAllocation) return out_of_memory(what, bytes);
    SIDA_TRY(sida_cuda_check(code, "cudaMalloc"));
    if (!of(buffer->backend)->options.poison) return SIDA_OK;
    /* Our streams do not wait for the default one, where this happens. */
    SIDA_TRY(SIDA_CUDA(cudaMemset(buffer->data, poison_byte, bytes)));
    SIDA_TRY(SIDA_CUDA(cudaDeviceSynchronize()));
out:
    if (status != SIDA_OK && buffer->data) (void)cudaFree(buffer->data);
    return status;
}

/* Pinned; where the system refuses, ordinary memory. */
/* Pinned memory in huge pages, touched by all processors: the driver's own takes half a second a
 * GiB. */
static cudaError_t pin_large(void **data, size_t bytes) {
    const size_t rounded = (bytes + huge_page - 1) / huge_page * huge_page;
    char *memory = rounded < bytes ? NULL : aligned_alloc(huge_page, rounded);
    if (!memory) return cudaErrorMemoryAllocation;
    (void)madvise(memory, rounded, MADV_HUGEPAGE);
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < rounded; i += huge_page)
        for (size_t page = i; page < i + huge_page; page += host_alignment) memory[page] = 0;
    cudaError_t code = cudaHostRegister(memory, rounded, cudaHostRegisterPortable);
    if (code == cudaSuccess)
        *data = memory;
    else
        free(memory);
    return code;
}

static sida_status allocate_host(sida_buffer *buffer, size_t bytes, const char *what) {
    cuda_backend *backend = of(buffer->backend);
    cudaError_t code = cudaErrorMemoryAllocation;
    if (!backend->options.no_pinned)
        code = bytes >= large_bytes ? pin_large(&buffer->data, bytes)
                                    : cudaHostAlloc(&buffer->data, bytes, cudaHostAllocPortable);
    if (code == cudaSuccess) {
        buffer->pinned = true;
        return SIDA_OK;
    }
    (void)cudaGetLastError();
    size_t rounded = (bytes + host_alignment - 1) & ~(size_t)(host_alignment - 1);
    buffer->data = rounded < bytes ? NULL : aligned_alloc(host_alignment, rounded);
    if (!buffer->data)
        return sida_fail(SIDA_ERROR_MEMORY, "%s: out of memory asking for %zu bytes", what, bytes);
    if (!atomic_exchange(&backend->warned, true))
        sida_log(SIDA_LOG_WARNING,
                 "%s: the system refused %zu bytes of pinned memory (%s; see ulimit -l): ordinary "
                 "memory is used; copies to the device take two to four times as long and do not "
                 "run beside computation",
                 what, bytes, cudaGetErrorString(code));
    return SIDA_OK;
}

static sida_status cuda_allocate(sida_buffer *buffer, const char *what) {
    sida_status status = SIDA_OK;
    size_t bytes = buffer->bytes ? buffer->bytes : 1;
    SIDA_TRY(sida_cuda_use(buffer->backend));
    SIDA_TRY(buffer->kind == SIDA_MEMORY_DEVICE ? allocate_device(buffer, bytes, what)
                                                : allocate_host(buffer, bytes, what));
out:
    return status;
}

/* The ways out cannot report; what went wrong before shows again in the next call that can. */
static void cuda_release(sida_buffer *buffer) {
    (void)cudaSetDevice(of(buffer->backend)->options.device);
    if (buffer->kind == SIDA_MEMORY_DEVICE)
        (void)cudaFree(buffer->data);
    else if (buffer->pinned && buffer->bytes < large_bytes)
        (void)cudaFreeHost(buffer->data);
    else {
        if (buffer->pinned) (void)cudaHostUnregister(buffer->data);
        free(buffer->data);
    }
    (void)cudaGetLastError();
}

static sida_status cuda_driver_used(sida_backend *base, size_t *bytes, bool *alone) {
    sida_status status = SIDA_OK;
    size_t left, total;
    *bytes = 0;
    *alone = false;
    SIDA_TRY(sida_cuda_use(base));
    const beginning *at = &beginnings[of(base)->options.device];
    if (at->nvml && sida_nvml_used(at->nvml, bytes)) {
        *bytes = *bytes > at->others_bytes ? *bytes - at->others_bytes : 0;
        *alone = true;
        goto out;
    }
    SIDA_TRY(SIDA_CUDA(cudaMemGetInfo(&left, &total)));
    *bytes = total - left;
out:
    return status;
}

static sida_status cuda_describe(sida_backend *base, sida_device_info *out) {
    sida_status status = SIDA_OK;
    struct cudaDeviceProp properties;
    SIDA_TRY(sida_cuda_use(base));
    SIDA_TRY(SIDA_CUDA(cudaGetDeviceProperties(&properties, of(base)->options.device)));
    SIDA_TRY(SIDA_CUDA(cudaMemGetInfo(&out->free_bytes, &out->total_bytes)));
    SIDA_TRY(SIDA_CUDA(cudaDriverGetVersion(&out->driver)));
    SIDA_TRY(SIDA_CUDA(cudaRuntimeGetVersion(&out->runtime)));
    SIDA_TRY(SIDA_CUDA(sida_cuda_probe(&out->code, &out->ptx)));
    snprintf(out->name, sizeof out->name, "%.*s", (int)sizeof out->name - 1, properties.name);
    out->processors = properties.multiProcessorCount;
    out->capability[0] = properties.major;
    out->capability[1] = properties.minor;
    if (!sida_nvml_release(out->driver_release, sizeof out->driver_release))
        out->driver_release[0] = 0;
out:
    return status;
}

/* --- streams */

static sida_status cuda_stream_create(sida_backend *base, sida_stream **out,
                                      sida_stream_kind kind) {
    sida_status status = SIDA_OK;
    sida_cuda_stream *stream = NULL;
    int low, high; /* priorities */
    SIDA_TRY(sida_cuda_use(base));
    SIDA_TRY(SIDA_ALLOC(&stream, 1, "a stream"));
    stream->base = (sida_stream){base, kind};
    SIDA_TRY(SIDA_CUDA(cudaDeviceGetStreamPriorityRange(&low, &high)));
    SIDA_TRY(SIDA_CUDA(cudaStreamCreateWithPriority(&stream->stream, cudaStreamNonBlocking,
                                                    kind == SIDA_STREAM_COMPUTE ? high : low)));
    *out = &stream->base;
    stream = NULL;
out:
    free(stream);
    return status;
}

static void cuda_stream_destroy(sida_stream *base) {
    sida_cuda_stream *stream = sida_cuda_stream_of(base);
    (void)cudaSetDevice(of(base->backend)->options.device);
    (void)cudaStreamSynchronize(stream->stream);
    if (stream->ops_state) stream->ops_state_destroy(stream->ops_state);
    (void)cudaStreamDestroy(stream->stream);
    (void)cudaGetLastError();
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
    cuda_backend *backend = of(stream->backend);
    if (backend->options.fail_copy > 0 && stream->kind == SIDA_STREAM_COPY &&
        ++backend->copies >= backend->options.fail_copy)
        backend->lost = true;
    SIDA_TRY(sida_cuda_use(stream->backend));
    SIDA_TRY(SIDA_CUDA(
        cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, sida_cuda_stream_of(stream)->stream)));
out:
    return status;
}

/* One direction of the link has one queue of copies, and an expert takes a fifth of a millisecond
 * of it: small arrays are read by a kernel instead. */
static sida_status cuda_upload(sida_stream *stream, void *to, const void *from, size_t bytes) {
    enum { WORD = sizeof(uint32_t), MOST = 256 << 10 };
    if (bytes > MOST || bytes % WORD || (uintptr_t)to % WORD || (uintptr_t)from % WORD)
        return cuda_copy(stream, to, from, bytes);
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_cuda_use(stream->backend));
    SIDA_TRY(sida_cuda_check(
        sida_cuda_copy_words(sida_cuda_stream_of(stream)->stream, to, from, bytes / WORD),
        "the upload kernel"));
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
    *out = &event->base;
    event = NULL;
out:
    free(event);
    return status;
}

static void cuda_event_destroy(sida_event *base) {
    (void)cudaSetDevice(of(base->backend)->options.device);
    (void)cudaEventDestroy(event_of(base));
    (void)cudaGetLastError();
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
    (void)cudaSetDevice(of(base->backend)->options.device);
    (void)cudaGraphExecDestroy(((cuda_graph *)base)->run);
    (void)cudaGetLastError();
    free(base);
}

/* --- the back-end */

static void cuda_destroy(sida_backend *base) {
    sida_backend_end(base);
    free(of(base));
}

static const sida_backend_table cuda_table = {
    .name = "cuda",
    .destroy = cuda_destroy,
    .allocate = cuda_allocate,
    .release = cuda_release,
    .stream_create = cuda_stream_create,
    .stream_destroy = cuda_stream_destroy,
    .stream_synchronize = cuda_stream_synchronize,
    .copy = cuda_copy,
    .upload = cuda_upload,
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
    .driver_used = cuda_driver_used,
    .describe = cuda_describe,
};

static sida_status count_devices(int *count) {
    int driver = 0;
    *count = 0;
    cudaError_t code = cudaGetDeviceCount(count);
    if (code == cudaSuccess && *count > 0) return SIDA_OK;
    (void)cudaGetLastError();
    if (cudaDriverGetVersion(&driver) != cudaSuccess) (void)cudaGetLastError();
    return sida_cuda_absent(code, driver);
}

/* Before the first context. */
static sida_status note_beginning(int device) {
    sida_status status = SIDA_OK;
    struct cudaDeviceProp properties;
    beginning *at = &beginnings[device];
    pthread_mutex_lock(&beginnings_mutex);
    if (at->known) goto out;
    SIDA_TRY(SIDA_CUDA(cudaGetDeviceProperties(&properties, device)));
    at->known = true;
    if (!sida_nvml_find(&at->nvml, properties.uuid.bytes) ||
        !sida_nvml_used(at->nvml, &at->others_bytes))
        at->nvml = NULL;
out:
    pthread_mutex_unlock(&beginnings_mutex);
    return status;
}

/* Better said now than by the first kernel. */
/* *early: the kernels know how to wait for one another. Those made from PTX of an older kind do
 * not, whatever the device is. */
static sida_status check_code(int device, bool *early) {
    sida_status status = SIDA_OK;
    struct cudaDeviceProp properties;
    int code, ptx;
    if (sida_cuda_probe(&code, &ptx) == cudaSuccess) {
        *early = code >= 90 && ptx >= 90;
        return SIDA_OK;
    }
    (void)cudaGetLastError();
    SIDA_TRY(SIDA_CUDA(cudaGetDeviceProperties(&properties, device)));
    SIDA_FAIL(SIDA_ERROR_DEVICE,
              "device cuda: this build has no code for %s, compute capability %d.%d; build with "
              "-DCMAKE_CUDA_ARCHITECTURES=native, or use --device cpu",
              properties.name, properties.major, properties.minor);
out:
    return status;
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
    if (count > most_devices) count = most_devices;
    if (device < 0 || device >= count)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "device cuda: number %d: expected 0 to %d", device,
                  count - 1);
    SIDA_TRY(note_beginning(device));
    SIDA_TRY(SIDA_ALLOC(&backend, 1, "the CUDA back-end"));
    if (options) backend->options = *options;
    SIDA_TRY(sida_cuda_use(&backend->base));
    SIDA_TRY(SIDA_CUDA(cudaFree(NULL))); /* the driver starts here, and not in the first buffer */
    /* The driver sets a stack aside for every thread that the device can run, 1 KiB each: a quarter
     * of a GiB on a large GPU. Our kernels take less than this; one that took more would get it. */
    SIDA_TRY(SIDA_CUDA(cudaDeviceSetLimit(cudaLimitStackSize, stack_bytes)));
    SIDA_TRY(check_code(device, &backend->early_launch));
    sida_backend_begin(&backend->base, &cuda_table);
    *out = &backend->base;
    backend = NULL;
out:
    free(backend);
    return status;
}
