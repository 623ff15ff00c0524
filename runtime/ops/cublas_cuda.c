#include "runtime/ops/cublas_cuda.h"

#include "runtime/backend/symbol.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>

#define TEXT_OF(number) #number
#define NAME_OF(major) "libcublas.so." TEXT_OF(major)
static const char library[] = NAME_OF(CUBLAS_VER_MAJOR);

static pthread_once_t once = PTHREAD_ONCE_INIT;
static sida_cublas functions;
static sida_cublas_lt lt_functions;
static bool loaded;
static char reason[256];

/* Found in what libcublas itself was linked to, so that the two are of one version and cuBLAS's
 * handles are cublasLt's. */
static bool load_lt(void *from) {
    sida_cublas_lt *f = &lt_functions;
    return sida_symbol(from, &f->product_init, "cublasLtMatmulDescInit_internal") &&
           sida_symbol(from, &f->product_set, "cublasLtMatmulDescSetAttribute") &&
           sida_symbol(from, &f->layout_init, "cublasLtMatrixLayoutInit_internal") &&
           sida_symbol(from, &f->layout_set, "cublasLtMatrixLayoutSetAttribute") &&
           sida_symbol(from, &f->preference_init, "cublasLtMatmulPreferenceInit_internal") &&
           sida_symbol(from, &f->preference_set, "cublasLtMatmulPreferenceSetAttribute") &&
           sida_symbol(from, &f->heuristic, "cublasLtMatmulAlgoGetHeuristic") &&
           sida_symbol(from, &f->multiply, "cublasLtMatmul");
}

static void load(void) {
    /* Stays loaded: handles of other threads may outlive any owner. */
    void *from = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    loaded = from && sida_symbol(from, &functions.create, "cublasCreate_v2") &&
             sida_symbol(from, &functions.destroy, "cublasDestroy_v2") &&
             sida_symbol(from, &functions.set_stream, "cublasSetStream_v2") &&
             sida_symbol(from, &functions.set_workspace, "cublasSetWorkspace_v2") &&
             sida_symbol(from, &functions.gemm, "cublasGemmEx") &&
             sida_symbol(from, &functions.gemm_batched, "cublasGemmStridedBatchedEx") &&
             sida_symbol(from, &functions.status_string, "cublasGetStatusString");
    if (loaded && load_lt(from)) functions.lt = &lt_functions;
    if (loaded) return;
    const char *why = dlerror();
    snprintf(reason, sizeof reason, "%s", why ? why : "unknown reason");
}

sida_status sida_cublas_load(const sida_cublas **out) {
    *out = NULL;
    pthread_once(&once, load);
    if (!loaded)
        return sida_fail(SIDA_ERROR_DEVICE,
                         "cuda: %s: %s; install CUDA's cuBLAS, or use --device cpu", library,
                         reason);
    *out = &functions;
    return SIDA_OK;
}

sida_status sida_cublas_check(const sida_cublas *cublas, cublasStatus_t code, const char *call) {
    if (code == CUBLAS_STATUS_SUCCESS) return SIDA_OK;
    (void)cudaGetLastError();
    return sida_fail(SIDA_ERROR_DEVICE, "cuda: %s: %s%s", call, cublas->status_string(code),
                     code == CUBLAS_STATUS_ALLOC_FAILED || code == CUBLAS_STATUS_NOT_INITIALIZED
                         ? ": is there device memory left beside the budget?"
                         : "");
}
