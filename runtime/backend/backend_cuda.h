/* Inside the CUDA back-end: what its ops need to know of it. */
#ifndef SIDA_RUNTIME_BACKEND_BACKEND_CUDA_H
#define SIDA_RUNTIME_BACKEND_BACKEND_CUDA_H

#include "runtime/backend/backend.h"

#include <cuda_runtime_api.h>

typedef struct sida_cuda_stream {
    sida_stream base;
    cudaStream_t stream;
    /* What runtime/ops keeps for a compute stream (library handle, workspace), and how it goes. */
    void *ops_state;
    void (*ops_state_destroy)(void *state);
} sida_cuda_stream;

static inline sida_cuda_stream *sida_cuda_stream_of(sida_stream *stream) {
    return (sida_cuda_stream *)stream;
}

/* SIDA_OK, or DEVICE with the call's name, the runtime's words and what to do; clears the
 * runtime's last error. */
sida_status sida_cuda_check(cudaError_t code, const char *call);
#define SIDA_CUDA(call) sida_cuda_check((call), #call)

/* Whether the device can start a kernel before the one in front of it has ended (9.0 and later). */
bool sida_cuda_early_launch(const sida_backend *backend);

/* Makes the stream's device the calling thread's. DEVICE once the device is lost. */
sida_status sida_cuda_use(const sida_backend *backend);

/* Why there is no device to run on, in words: cudaGetDeviceCount's answer (cudaSuccess: none was
 * counted), and the newest CUDA that the driver knows, 0 when there is no driver. Fails always. */
sida_status sida_cuda_absent(cudaError_t code, int driver);

/* What our kernels on the current device were compiled for, and the PTX beside them, as 10 * major
 * + minor. */
cudaError_t sida_cuda_probe(int *code, int *ptx);
/* Copies 4-byte words by a kernel; from may be pinned host memory. */
cudaError_t sida_cuda_copy_words(cudaStream_t stream, void *to, const void *from, size_t words);

#endif
