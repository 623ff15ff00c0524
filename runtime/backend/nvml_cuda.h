/* NVML, the driver's management library, loaded where it is there: it alone can say what is in use
 * on a device before this process has a context on it. Nothing here fails: what cannot be known is
 * false. Any thread. */
#ifndef SIDA_RUNTIME_BACKEND_NVML_CUDA_H
#define SIDA_RUNTIME_BACKEND_NVML_CUDA_H

#include <stdbool.h>
#include <stddef.h>

/* The device of that UUID (cudaDeviceProp.uuid), a GPU or a MIG part of one. */
bool sida_nvml_find(void **device, const char uuid[16]);
/* Bytes in use on all of it, by whomever. */
bool sida_nvml_used(void *device, size_t *bytes);
/* The driver's release, as "580.65.06". */
bool sida_nvml_release(char *out, size_t size);

#endif
