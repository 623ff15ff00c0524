#include "tools/bench/timeline.h"

#ifndef SIDA_HAVE_CUPTI

sida_status bench_timeline_open(void) {
    return sida_fail(SIDA_ERROR_UNSUPPORTED, "a timeline: built without CUPTI");
}
sida_status bench_timeline_begin(void) {
    return bench_timeline_open();
}
sida_status bench_timeline_end(void) {
    return bench_timeline_open();
}
sida_status bench_timeline_print(int32_t steps) {
    (void)steps;
    return bench_timeline_open();
}

#else

#include "formats/base/memory.h"

#include <cupti.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if CUPTI_API_VERSION >= 130000
typedef CUpti_ActivityKernel10 kernel_record;
typedef CUpti_ActivityMemcpy6 copy_record;
#else
typedef CUpti_ActivityKernel9 kernel_record;
typedef CUpti_ActivityMemcpy5 copy_record;
#endif
typedef CUpti_ActivityMemset4 set_record;

enum { BUFFER_BYTES = 4 << 20, ALIGNMENT = 8 };

typedef struct span {
    uint64_t start, end; /* ns */
    const char *name;
} span;

/* CUPTI has no context for its callbacks. */
static struct timeline {
    pthread_mutex_t mutex;
    span *spans;
    size_t count, capacity;
    bool failed; /* no memory, or records that were dropped */
    uint64_t begin, end;
    CUptiResult (*enable)(CUpti_ActivityKind kind);
    CUptiResult (*register_callbacks)(CUpti_BuffersCallbackRequestFunc request,
                                      CUpti_BuffersCallbackCompleteFunc complete);
    CUptiResult (*next)(uint8_t *buffer, size_t bytes, CUpti_Activity **record);
    CUptiResult (*dropped)(CUcontext context, uint32_t stream, size_t *count);
    CUptiResult (*flush)(uint32_t flag);
    CUptiResult (*timestamp)(uint64_t *ns);
} timeline = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static void CUPTIAPI request_buffer(uint8_t **buffer, size_t *bytes, size_t *most) {
    *buffer = aligned_alloc(ALIGNMENT, BUFFER_BYTES);
    *bytes = *buffer ? BUFFER_BYTES : 0;
    *most = 0;
}

static void add_span(uint64_t start, uint64_t end, const char *name) {
    size_t room = timeline.capacity;
    if (timeline.count == room) {
        span *more = realloc(timeline.spans, (room ? 2 * room : 4096) * sizeof *more);
        if (!more) {
            timeline.failed = true;
            return;
        }
        timeline.spans = more;
        timeline.capacity = room ? 2 * room : 4096;
    }
    timeline.spans[timeline.count++] = (span){start, end, name ? name : "?"};
}

static const char *copy_name(uint8_t kind) {
    switch (kind) {
    case CUPTI_ACTIVITY_MEMCPY_KIND_HTOD:
        return "copy to the device";
    case CUPTI_ACTIVITY_MEMCPY_KIND_DTOH:
        return "copy to the host";
    default:
        return "copy";
    }
}

static void CUPTIAPI take_buffer(CUcontext context, uint32_t stream, uint8_t *buffer, size_t bytes,
                                 size_t valid) {
    CUpti_Activity *record = NULL;
    size_t dropped = 0;
    (void)bytes;
    pthread_mutex_lock(&timeline.mutex);
    while (valid > 0 && timeline.next(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            const kernel_record *kernel = (const kernel_record *)(const void *)record;
            add_span(kernel->start, kernel->end, kernel->name);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            const copy_record *copy = (const copy_record *)(const void *)record;
            add_span(copy->start, copy->end, copy_name(copy->copyKind));
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
            const set_record *set = (const set_record *)(const void *)record;
            add_span(set->start, set->end, "memset");
        }
    }
    if (timeline.dropped(context, stream, &dropped) == CUPTI_SUCCESS && dropped > 0)
        timeline.failed = true;
    pthread_mutex_unlock(&timeline.mutex);
    free(buffer);
}

static sida_status check(CUptiResult result, const char *what) {
    if (result == CUPTI_SUCCESS) return SIDA_OK;
    return sida_fail(SIDA_ERROR_DEVICE, "CUPTI: %s: error %d", what, (int)result);
}

static sida_status load(void) {
    static const char *const names[] = {SIDA_CUPTI_PATH, "libcupti.so.13", "libcupti.so.12",
                                        "libcupti.so"};
    const struct {
        const char *name;
        void *to;
    } functions[] = {{"cuptiActivityEnable", &timeline.enable},
                     {"cuptiActivityRegisterCallbacks", &timeline.register_callbacks},
                     {"cuptiActivityGetNextRecord", &timeline.next},
                     {"cuptiActivityGetNumDroppedRecords", &timeline.dropped},
                     {"cuptiActivityFlushAll", &timeline.flush},
                     {"cuptiGetTimestamp", &timeline.timestamp}};
    void *library = NULL;
    for (size_t i = 0; !library && i < sizeof names / sizeof *names; i++)
        library = dlopen(names[i], RTLD_NOW);
    if (!library) return sida_fail(SIDA_ERROR_DEVICE, "a timeline: %s", dlerror());
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        void *function = dlsym(library, functions[i].name);
        if (!function) return sida_fail(SIDA_ERROR_DEVICE, "a timeline: %s", dlerror());
        memcpy(functions[i].to, &function, sizeof function);
    }
    return SIDA_OK;
}

sida_status bench_timeline_open(void) {
    sida_status status = SIDA_OK;
    SIDA_TRY(load());
    SIDA_TRY(check(timeline.register_callbacks(request_buffer, take_buffer), "callbacks"));
    SIDA_TRY(check(timeline.enable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL), "kernels"));
    SIDA_TRY(check(timeline.enable(CUPTI_ACTIVITY_KIND_MEMCPY), "copies"));
    SIDA_TRY(check(timeline.enable(CUPTI_ACTIVITY_KIND_MEMSET), "memsets"));
out:
    return status;
}

sida_status bench_timeline_begin(void) {
    return check(timeline.timestamp(&timeline.begin), "the time");
}

sida_status bench_timeline_end(void) {
    return check(timeline.timestamp(&timeline.end), "the time");
}

static int by_start(const void *a, const void *b) {
    const span *x = a, *y = b;
    return (x->start > y->start) - (x->start < y->start);
}

static int by_name(const void *a, const void *b) {
    const span *x = a, *y = b;
    return strcmp(x->name, y->name);
}

/* Keeps what is in the window, cut to it; returns the ns in which anything ran. */
static uint64_t cut(void) {
    uint64_t busy = 0, covered = timeline.begin;
    size_t kept = 0;
    for (size_t i = 0; i < timeline.count; i++) {
        span s = timeline.spans[i];
        if (s.start < timeline.begin) s.start = timeline.begin;
        if (s.end > timeline.end) s.end = timeline.end;
        if (s.start < s.end) timeline.spans[kept++] = s;
    }
    timeline.count = kept;
    if (kept > 0) qsort(timeline.spans, kept, sizeof *timeline.spans, by_start);
    for (size_t i = 0; i < kept; i++) {
        span s = timeline.spans[i];
        if (s.end <= covered) continue;
        busy += s.end - (s.start > covered ? s.start : covered);
        covered = s.end;
    }
    return busy;
}

/* Names come from the compiler and hold nothing that JSON would escape. */
sida_status bench_timeline_print(int32_t steps) {
    sida_status status = SIDA_OK;
    SIDA_TRY(check(timeline.flush(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED), "flushing"));
    pthread_mutex_lock(&timeline.mutex);
    uint64_t busy = cut();
    size_t count = timeline.count;
    if (count > 0) qsort(timeline.spans, count, sizeof *timeline.spans, by_name);
    printf("{\"steps\": %d, \"window_ms\": %.6f, \"busy_ms\": %.6f, \"kernels\": [", steps,
           (double)(timeline.end - timeline.begin) * 1e-6, (double)busy * 1e-6);
    for (size_t i = 0, next; i < count; i = next) {
        uint64_t total = 0;
        const char *name = timeline.spans[i].name;
        for (next = i; next < count && strcmp(timeline.spans[next].name, name) == 0; next++)
            total += timeline.spans[next].end - timeline.spans[next].start;
        printf("%s{\"name\": \"%s\", \"count\": %zu, \"ms\": %.6f}", i > 0 ? ", " : "", name,
               next - i, (double)total * 1e-6);
    }
    printf("]}");
    if (timeline.failed || count == 0)
        status = sida_fail(SIDA_ERROR_DEVICE, "a timeline: %s",
                           count == 0 ? "no records in it" : "records were lost");
    pthread_mutex_unlock(&timeline.mutex);
out:
    return status;
}

#endif
