/* Rates of copies, measured through the back-end's own streams. */
#ifndef SIDA_TOOLS_CLI_MEASURE_H
#define SIDA_TOOLS_CLI_MEASURE_H

#include "runtime/backend/backend.h"

typedef enum sida_copy_kind {
    SIDA_COPY_PINNED,   /* what experts take: a host buffer of the back-end to the device */
    SIDA_COPY_PAGEABLE, /* ordinary memory to the device */
    SIDA_COPY_DEVICE    /* inside device memory; read and written bytes both count */
} sida_copy_kind;

/* Median rate of single copies of `bytes`, each waited for, after two that do not count. Takes
 * device memory of that size, twice for SIDA_COPY_DEVICE. */
sida_status sida_measure_copy(double *bytes_per_s, sida_backend *backend, sida_copy_kind kind,
                              size_t bytes);

/* The rate of many bytes of device memory, a sixteenth of what is free and at most 1 GiB (on the
 * CPU 64 MiB): caches do not help. */
sida_status sida_measure_memory(double *bytes_per_s, sida_backend *backend);

/* "12.34 MiB at peak by the driver, 5.67 in our buffers" and, where NVML is not there to tell them
 * apart, a word on other programs; on the CPU, where both are one, "12.34 MiB at peak". Returns
 * out. */
const char *sida_format_peak(char out[160], uint64_t driver_bytes, uint64_t buffer_bytes,
                             bool alone);

/* Sorts; the middle one, or the mean of the middle two. count >= 1. */
double sida_median(double *values, size_t count);

#endif
