#include "tools/cli/measure.h"

#include "formats/base/clock.h"
#include "formats/base/memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WARM_COPIES = 2, COPIES = 15 };

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double sida_median(double *values, size_t count) {
    qsort(values, count, sizeof *values, by_value);
    return (values[count / 2] + values[(count - 1) / 2]) / 2;
}

sida_status sida_measure_copy(double *bytes_per_s, sida_backend *backend, sida_copy_kind kind,
                              size_t bytes) {
    sida_status status = SIDA_OK;
    sida_buffer *to = NULL, *from = NULL;
    sida_stream *stream = NULL;
    sida_event *event = NULL;
    char *ordinary = NULL;
    double seconds[COPIES];
    SIDA_TRY(sida_buffer_create(backend, &to, SIDA_MEMORY_DEVICE, bytes, "a copy to measure"));
    if (kind == SIDA_COPY_PAGEABLE)
        SIDA_TRY(SIDA_ALLOC(&ordinary, bytes, "a copy to measure"));
    else
        SIDA_TRY(sida_buffer_create(
            backend, &from, kind == SIDA_COPY_DEVICE ? SIDA_MEMORY_DEVICE : SIDA_MEMORY_HOST, bytes,
            "a copy to measure"));
    /* Pages that nobody has written are all one page of zeros. */
    if (kind == SIDA_COPY_PINNED) memset(from->data, 1, bytes);
    if (ordinary) memset(ordinary, 1, bytes);
    SIDA_TRY(sida_stream_create(backend, &stream, SIDA_STREAM_COPY));
    SIDA_TRY(sida_event_create(backend, &event));
    if (kind == SIDA_COPY_DEVICE && strcmp(backend->table->name, "cpu") == 0)
        memset(from->data, 1, bytes);
    for (int i = 0; i < WARM_COPIES + COPIES; i++) {
        double begin = sida_clock_seconds();
        SIDA_TRY(sida_copy(stream, to->data, ordinary ? ordinary : from->data, bytes));
        SIDA_TRY(sida_event_record(event, stream));
        SIDA_TRY(sida_event_synchronize(event));
        if (i >= WARM_COPIES) seconds[i - WARM_COPIES] = sida_clock_seconds() - begin;
    }
    *bytes_per_s =
        (kind == SIDA_COPY_DEVICE ? 2.0 : 1.0) * (double)bytes / sida_median(seconds, COPIES);
out:
    sida_event_destroy(event);
    sida_stream_destroy(stream);
    sida_buffer_destroy(from);
    sida_buffer_destroy(to);
    free(ordinary);
    return status;
}

sida_status sida_measure_memory(double *bytes_per_s, sida_backend *backend) {
    sida_device_info info;
    sida_status status = SIDA_OK;
    size_t bytes = (size_t)64 << 20, most = (size_t)1 << 30;
    SIDA_TRY(sida_backend_describe(backend, &info));
    if (strcmp(backend->table->name, "cpu") != 0) {
        bytes = info.free_bytes / 16;
        if (bytes > most) bytes = most;
        bytes &= ~(size_t)4095;
    }
    SIDA_TRY(sida_measure_copy(bytes_per_s, backend, SIDA_COPY_DEVICE, bytes));
out:
    return status;
}

const char *sida_format_peak(char out[160], uint64_t driver_bytes, uint64_t buffer_bytes,
                             bool alone) {
    double mib = 1.0 / (1 << 20);
    if (alone && driver_bytes == buffer_bytes)
        snprintf(out, 160, "%.2f MiB at peak", (double)buffer_bytes * mib);
    else
        snprintf(out, 160, "%.2f MiB at peak by the driver, %.2f in our buffers%s",
                 (double)driver_bytes * mib, (double)buffer_bytes * mib,
                 alone ? "" : " (without NVML other programs count too)");
    return out;
}
