#include "runtime/ops/cudnn_cuda.h"

#include "runtime/backend/symbol.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#define TEXT_OF(number) #number
#define NAME_OF(major) "libcudnn.so." TEXT_OF(major)
static const char library[] = NAME_OF(CUDNN_MAJOR);

static pthread_once_t once = PTHREAD_ONCE_INIT;
static sida_cudnn functions;
static bool loaded;
static char reason[256];

static void load(void) {
    /* By default the cuBLAS inside cuDNN has workspaces of several sizes and takes what is free, by
     * which its sums may differ from run to run; of one size they do not (cuDNN's documentation,
     * reproducibility). Read when a handle is made; who set it knows better. */
    (void)setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2", 0);
    /* Stays loaded: handles of other threads may outlive any owner. */
    void *from = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    loaded = from != NULL;
#define FIND(member, name) loaded = loaded && sida_symbol(from, &functions.member, #name);
    SIDA_CUDNN_FUNCTIONS(FIND)
#undef FIND
    if (loaded) return;
    const char *why = dlerror();
    snprintf(reason, sizeof reason, "%s", why ? why : "unknown reason");
}

sida_status sida_cudnn_load(const sida_cudnn **out) {
    *out = NULL;
    pthread_once(&once, load);
    if (!loaded)
        return sida_fail(SIDA_ERROR_DEVICE,
                         "cuda: %s: %s; install cuDNN %d, or train with --device cpu", library,
                         reason, CUDNN_MAJOR);
    *out = &functions;
    return SIDA_OK;
}
