#include "runtime/backend/nvml_cuda.h"

#include "runtime/backend/symbol.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

/* The part of nvml.h that is used here; its ABI is fixed by the _v2 names. 0 is success. */
typedef struct nvml_memory {
    unsigned long long total, available, used;
} nvml_memory;

static pthread_once_t once = PTHREAD_ONCE_INIT;
static bool loaded;
static struct {
    int (*init)(void);
    int (*by_uuid)(const char *uuid, void **device);
    int (*memory)(void *device, nvml_memory *out);
    int (*release)(char *out, unsigned size);
} nvml;

static void load(void) {
    void *from = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    loaded = from && sida_symbol(from, &nvml.init, "nvmlInit_v2") &&
             sida_symbol(from, &nvml.by_uuid, "nvmlDeviceGetHandleByUUID") &&
             sida_symbol(from, &nvml.memory, "nvmlDeviceGetMemoryInfo") &&
             sida_symbol(from, &nvml.release, "nvmlSystemGetDriverVersion") && nvml.init() == 0;
}

static bool ready(void) {
    pthread_once(&once, load);
    return loaded;
}

bool sida_nvml_find(void **device, const char uuid[16]) {
    static const char *const kinds[] = {"GPU", "MIG"};
    const unsigned char *u = (const unsigned char *)uuid;
    char name[64];
    for (int i = 0; ready() && i < 2; i++) {
        snprintf(name, sizeof name,
                 "%s-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x",
                 kinds[i], u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11],
                 u[12], u[13], u[14], u[15]);
        if (nvml.by_uuid(name, device) == 0) return true;
    }
    return false;
}

bool sida_nvml_used(void *device, size_t *bytes) {
    nvml_memory memory;
    if (!ready() || nvml.memory(device, &memory) != 0) return false;
    *bytes = (size_t)memory.used;
    return true;
}

bool sida_nvml_release(char *out, size_t size) {
    return ready() && nvml.release(out, (unsigned)size) == 0;
}
