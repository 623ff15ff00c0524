/* sida doctor: what this machine has, how fast its link is, and what will be used. */
#include "formats/h5.h"
#include "runtime/backend/backend.h"
#include "runtime/backend/symbol.h"
#include "runtime/ops/cpu_kernels.h"
#include "runtime/ops/ops.h"
#ifdef SIDA_HAVE_CUDA
#include "runtime/ops/cublas_cuda.h"
#endif
#include "tools/cli/cli.h"
#include "tools/cli/measure.h"

#include <cblas.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>

enum { KEY_DEVICE = 0x100, PIN_BYTES = 256 << 20 };

typedef struct options {
    const char *device;
    bool json;
} options;

static const struct argp_option argp_options[] = {
    {"device", KEY_DEVICE, "NAME", 0,
     "whose link is measured: cpu, cuda, or auto (default): cuda where a GPU is present", 0},
    {"json", 'j', 0, 0, "print as JSON", 0},
    {0}};

static error_t parse(int key, char *text, struct argp_state *state) {
    options *o = state->input;
    switch (key) {
    case KEY_DEVICE:
        o->device = text;
        return 0;
    case 'j':
        o->json = true;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* 12040 as "12.4"; nothing for 0. */
static json_t *cuda_version(int version) {
    char text[32];
    if (version <= 0) return json_null();
    snprintf(text, sizeof text, "%d.%d", version / 1000, version % 1000 / 10);
    return json_string(text);
}

/* 90 as "9.0". */
static json_t *capability_of(int32_t code) {
    char text[32];
    if (code <= 0) return json_null();
    snprintf(text, sizeof text, "%d.%d", code / 10, code % 10);
    return json_string(text);
}

static json_t *describe_gpu(const sida_device_info *info) {
    char capability[32];
    snprintf(capability, sizeof capability, "%d.%d", info->capability[0], info->capability[1]);
    return json_pack("{s:s, s:I, s:I, s:s, s:o, s:o, s:i, s:o, s:o, s:s*}", "name", info->name,
                     "memory_bytes", (json_int_t)info->total_bytes, "free_bytes",
                     (json_int_t)info->free_bytes, "compute_capability", capability, "code",
                     capability_of(info->code), "ptx", capability_of(info->ptx), "multiprocessors",
                     info->processors, "driver_cuda", cuda_version(info->driver), "runtime_cuda",
                     cuda_version(info->runtime), "driver_release",
                     info->driver_release[0] ? info->driver_release : NULL);
}

#ifdef SIDA_HAVE_CUDA
/* "13.1.0.3", once it has been loaded as the ops do. */
static json_t *cublas_version(void) {
    const sida_cublas *functions;
    int (*property)(int which, int *value);
    int v[3] = {0};
    char name[32], text[64];
    if (sida_cublas_load(&functions) != SIDA_OK) return json_string(sida_last_message());
    snprintf(name, sizeof name, "libcublas.so.%d", CUBLAS_VER_MAJOR);
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (!library || !sida_symbol(library, &property, "cublasGetProperty"))
        return json_string("loads");
    for (int i = 0; i < 3; i++) property(i, &v[i]); /* libraryPropertyType: major, minor, patch */
    snprintf(text, sizeof text, "%d.%d.%d", v[0], v[1], v[2]);
    dlclose(library);
    return json_string(text);
}
#endif

/* Training uses version 9, which numbers itself 10000 * major + 100 * minor + patch; 8 counts by
 * thousands. */
static json_t *cudnn_version(void) {
    static const char *const names[] = {"libcudnn.so.9", "libcudnn.so.8"};
    json_t *answer = json_null();
    for (int i = 0; i < 2 && json_is_null(answer); i++) {
        void *library = dlopen(names[i], RTLD_LAZY | RTLD_LOCAL);
        size_t (*version)(void) = NULL;
        if (library) (void)sida_symbol(library, &version, "cudnnGetVersion");
        size_t v = version ? version() : 0, major = i == 0 ? 10000 : 1000;
        if (v > 0) answer = json_sprintf("%zu.%zu.%zu", v / major, v % major / 100, v % 100);
        if (library) dlclose(library);
    }
    return answer;
}

/* Every GPU that opens, and in words why there is none, or no more. */
static json_t *describe_cuda(void) {
    json_t *all = json_object(), *devices = json_array(), *problem = json_null();
    for (int32_t i = 0;; i++) {
        sida_backend *backend = NULL;
        sida_device_info info;
        sida_status status = sida_backend_create_cuda(&backend, &(sida_cuda_options){.device = i});
        if (status == SIDA_OK) status = sida_backend_describe(backend, &info);
        if (status == SIDA_OK) json_array_append_new(devices, describe_gpu(&info));
        /* ARGUMENT behind the last one is how counting ends. */
        if (status != SIDA_OK && !(status == SIDA_ERROR_ARGUMENT && i > 0))
            problem = json_string(sida_last_message());
        sida_backend_destroy(backend);
        if (status != SIDA_OK) break;
    }
#ifdef SIDA_HAVE_CUDA
    json_object_set_new(all, "built", json_true());
    json_object_set_new(all, "cublas", cublas_version());
#else
    json_object_set_new(all, "built", json_false());
    json_object_set_new(all, "cublas", json_null());
#endif
    json_object_set_new(all, "cudnn", cudnn_version());
    json_object_set_new(all, "problem", problem);
    json_object_set_new(all, "devices", devices);
    return all;
}

static json_t *limit_of(rlim_t value) {
    return value == RLIM_INFINITY ? json_string("unlimited") : json_integer((json_int_t)value);
}

static sida_status describe_host(json_t *to) {
    sida_status status = SIDA_OK;
    sida_backend *backend = NULL;
    sida_device_info info;
    struct rlimit lock = {0, 0};
    char hdf5[32];
    SIDA_TRY(sida_backend_create_cpu(&backend, NULL));
    SIDA_TRY(sida_backend_describe(backend, &info));
    getrlimit(RLIMIT_MEMLOCK, &lock);
    sida_h5_library_version(hdf5, sizeof hdf5);
    json_object_set_new(to, "cpu",
                        json_pack("{s:s, s:i, s:i, s:s, s:I, s:I}", "name", info.name, "processors",
                                  info.processors, "threads", sida_ops_threads(), "kernels",
                                  sida_cpu_kernels_get()->name, "memory_bytes",
                                  (json_int_t)info.total_bytes, "free_bytes",
                                  (json_int_t)info.free_bytes));
    json_object_set_new(to, "memlock_bytes", limit_of(lock.rlim_cur));
    json_object_set_new(to, "libraries",
                        json_pack("{s:s, s:s}", "openblas", openblas_get_config(), "hdf5", hdf5));
out:
    sida_backend_destroy(backend);
    return status;
}

/* Whether the system lets this process pin as much as an ordinary model needs at once; nothing to
 * ask on the CPU. */
static sida_status try_pinning(json_t *to, sida_backend *backend, bool cuda) {
    sida_buffer *buffer = NULL;
    sida_status status = SIDA_OK;
    if (!cuda) return json_object_set_new(to, "pinning", json_null()), SIDA_OK;
    status = sida_buffer_create(backend, &buffer, SIDA_MEMORY_HOST, PIN_BYTES, "pinned memory");
    if (status != SIDA_OK) return status;
    json_object_set_new(to, "pinning", json_boolean(buffer->pinned));
    sida_buffer_destroy(buffer);
    return SIDA_OK;
}

/* What `sida run` on this device would compute with. */
static void describe_use(json_t *to, sida_backend *backend, bool cuda) {
    char forward[160], predictor[80];
    const char *kernels = sida_cpu_kernels_get()->name;
    sida_device_info info;
    if (sida_backend_describe(backend, &info) != SIDA_OK) info = (sida_device_info){0};
    const sida_ops *ops = sida_ops_of(backend);
    if (cuda && ops->lstm && ops->sparsemax_attention)
        snprintf(predictor, sizeof predictor,
                 "on the device, on streams of its own (own kernels, and cuBLAS)");
    else
        snprintf(predictor, sizeof predictor, "on the host, %s kernels", kernels);
    if (!cuda)
        snprintf(forward, sizeof forward, "%s kernels and OpenBLAS on %d threads", kernels,
                 sida_ops_threads());
    else if (info.code == info.capability[0] * 10 + info.capability[1])
        snprintf(forward, sizeof forward, "own kernels for compute capability %d.%d, and cuBLAS",
                 info.code / 10, info.code % 10);
    else
        snprintf(forward, sizeof forward,
                 "own kernels of compute capability %d.%d (the device has %d.%d), and cuBLAS",
                 info.code / 10, info.code % 10, info.capability[0], info.capability[1]);
    json_object_set_new(to, "use",
                        json_pack("{s:s, s:s, s:s}", "device", info.name, "forward", forward,
                                  "predictor", predictor));
}

static sida_status measure(json_t *to, const char *device) {
    static const int sizes_mib[] = {1, 4, 18, 64};
    sida_status status = SIDA_OK;
    sida_backend *backend = NULL;
    json_t *link = json_array();
    double rate, memory;
    SIDA_TRY(sida_backend_create_named(&backend, device));
    bool cuda = strcmp(backend->table->name, "cuda") == 0;
    json_object_set_new(to, "device", json_string(backend->table->name));
    describe_use(to, backend, cuda);
    SIDA_TRY(try_pinning(to, backend, cuda));
    for (size_t i = 0; i < sizeof sizes_mib / sizeof *sizes_mib; i++) {
        size_t bytes = (size_t)sizes_mib[i] << 20;
        SIDA_TRY(sida_measure_copy(&rate, backend, SIDA_COPY_PINNED, bytes));
        json_t *row = json_pack("{s:i, s:f}", "mib", sizes_mib[i], "pinned_gb_per_s", rate / 1e9);
        if (cuda) {
            status = sida_measure_copy(&rate, backend, SIDA_COPY_PAGEABLE, bytes);
            json_object_set_new(row, "pageable_gb_per_s", json_real(rate / 1e9));
        }
        json_array_append_new(link, row);
        SIDA_TRY(status);
    }
    SIDA_TRY(sida_measure_memory(&memory, backend));
    sida_memory_usage usage;
    sida_backend_memory(backend, &usage);
    json_object_set_new(to, "nvml", cuda ? json_boolean(usage.driver_alone) : json_null());
    json_object_set(to, "link", link);
    json_object_set_new(to, "memory_gb_per_s", json_real(memory / 1e9));
out:
    json_decref(link);
    sida_backend_destroy(backend);
    return status;
}

static double number(const json_t *object, const char *key) {
    return json_number_value(json_object_get(object, key));
}

static const char *text_of(const json_t *object, const char *key) {
    const char *text = json_string_value(json_object_get(object, key));
    return text ? text : "-";
}

static void print_gpus(const json_t *cuda, double gib) {
    size_t i;
    json_t *gpu;
    json_array_foreach(json_object_get(cuda, "devices"), i, gpu) {
        printf("%-18s %s, %.2f GiB, %.2f free, compute capability %s, %.0f multiprocessors\n",
               "gpu", text_of(gpu, "name"), number(gpu, "memory_bytes") * gib,
               number(gpu, "free_bytes") * gib, text_of(gpu, "compute_capability"),
               number(gpu, "multiprocessors"));
        printf("%-18s compiled for %s, PTX for %s\n", "its kernels", text_of(gpu, "code"),
               text_of(gpu, "ptx"));
        if (i == 0)
            printf("%-18s release %s knows %s, this program uses %s\n", "cuda driver",
                   text_of(gpu, "driver_release"), text_of(gpu, "driver_cuda"),
                   text_of(gpu, "runtime_cuda"));
    }
    const json_t *problem = json_object_get(cuda, "problem");
    if (json_is_string(problem)) printf("%-18s %s\n", "gpu", json_string_value(problem));
    if (json_is_true(json_object_get(cuda, "built")))
        printf("%-18s %s\n", "cublas", text_of(cuda, "cublas"));
    else
        printf("%-18s not built in\n", "cuda");
    printf("%-18s %s\n", "cudnn",
           json_is_string(json_object_get(cuda, "cudnn"))
               ? text_of(cuda, "cudnn")
               : "not there (some LSTMs train on the CPU then)");
}

static void print_plain(const json_t *all) {
    const json_t *cpu = json_object_get(all, "cpu");
    const json_t *libraries = json_object_get(all, "libraries");
    const json_t *lock = json_object_get(all, "memlock_bytes");
    double gib = 1.0 / (1 << 30);
    size_t i;
    json_t *row;
    printf("%-18s %s\n", "sida", text_of(all, "version"));
    print_gpus(json_object_get(all, "cuda"), gib);
    printf("%-18s %s, %.0f processors, %.0f threads, %s kernels\n", "cpu", text_of(cpu, "name"),
           number(cpu, "processors"), number(cpu, "threads"), text_of(cpu, "kernels"));
    printf("%-18s %.2f GiB, %.2f free\n", "memory", number(cpu, "memory_bytes") * gib,
           number(cpu, "free_bytes") * gib);
    if (json_is_string(lock))
        printf("%-18s %s\n", "locked memory", json_string_value(lock));
    else
        printf("%-18s at most %.2f GiB (ulimit -l)\n", "locked memory",
               json_number_value(lock) * gib);
    printf("%-18s %s\n", "openblas", text_of(libraries, "openblas"));
    printf("%-18s %s\n", "hdf5", text_of(libraries, "hdf5"));
    const json_t *use = json_object_get(all, "use"), *pinning = json_object_get(all, "pinning");
    const json_t *nvml = json_object_get(all, "nvml");
    if (json_is_boolean(nvml))
        printf("%-18s %s\n", "nvml",
               json_is_true(nvml) ? "tells what other programs have on the device"
                                  : "not there: other programs' device memory counts as ours");
    if (json_is_boolean(pinning))
        printf(
            "%-18s %s\n", "pinned memory",
            json_is_true(pinning)
                ? "works (256 MiB tried)"
                : "refused (256 MiB tried): copies are slower and do not run beside computation");
    printf("%-18s --device %s is %s: %s\n", "used", text_of(all, "asked"), text_of(all, "device"),
           text_of(use, "device"));
    printf("%-18s %s\n", "model", text_of(use, "forward"));
    printf("%-18s %s\n", "predictor", text_of(use, "predictor"));
    json_array_foreach(json_object_get(all, "link"), i, row) {
        printf("%-18s %2.0f MiB: %.1f GB/s", i == 0 ? "host to device" : "", number(row, "mib"),
               number(row, "pinned_gb_per_s"));
        if (json_object_get(row, "pageable_gb_per_s"))
            printf(" pinned, %.1f pageable", number(row, "pageable_gb_per_s"));
        putchar('\n');
    }
    printf("%-18s %.1f GB/s, read and written\n", "device memory", number(all, "memory_gb_per_s"));
}

static sida_status examine(const options *o) {
    sida_status status = SIDA_OK;
    json_t *all = json_object();
    json_object_set_new(all, "version", json_string(SIDA_VERSION));
    json_object_set_new(all, "cuda", describe_cuda());
    SIDA_TRY(describe_host(all));
    json_object_set_new(all, "asked", json_string(o->device));
    SIDA_TRY(measure(all, o->device));
    if (o->json) return sida_cli_print_json(all);
    print_plain(all);
    status = sida_cli_flush();
out:
    json_decref(all);
    return status;
}

int sida_cmd_doctor(int argc, char **argv) {
    options o = {.device = "auto"};
    const struct argp argp = {
        argp_options,
        parse,
        NULL,
        "Says what this machine has: devices, driver, libraries, memory; measures the link from "
        "host to device, and says what will be used.",
        NULL,
        NULL,
        NULL};
    sida_cli_parse(&argp, argc, argv, &o);
    sida_status status = examine(&o);
    sida_cli_report(status);
    if (status == SIDA_OK) return SIDA_EXIT_OK;
    return status == SIDA_ERROR_ARGUMENT ? SIDA_EXIT_USAGE : SIDA_EXIT_FAILURE;
}
