/* Every expert on the device at once. */
#include "runtime/model/model.h"

#include "formats/base/memory.h"

#include <stdlib.h>

enum { EXPERT_ALIGNMENT = 256 };

struct sida_resident {
    const sida_model *model;
    sida_buffer *buffer;
    size_t stride;
    sida_moe_driver driver;
    void *context; /* the caller's */
    sida_status (*choose)(void *context, sida_moe_call *call);
    sida_status (*observe)(void *context, const sida_moe_call *call);
    int32_t site, count; /* of the layer that has begun */
    const int32_t *needed;
};

sida_status sida_resident_create(sida_resident **out, const sida_model *model) {
    sida_status status = SIDA_OK;
    const sida_model_info *info = sida_model_get_info(model);
    sida_backend *backend = sida_model_backend(model);
    sida_resident *resident = NULL;
    sida_stream *stream = NULL;
    size_t all = (size_t)info->sites * (size_t)info->experts, bytes;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&resident, 1, "the resident experts"));
    resident->model = model;
    resident->stride =
        (info->expert_bytes + EXPERT_ALIGNMENT - 1) / EXPERT_ALIGNMENT * EXPERT_ALIGNMENT;
    if (sida_mul_overflow(resident->stride, all, &bytes))
        SIDA_FAIL(SIDA_ERROR_MEMORY, "the resident experts are larger than memory can be");
    SIDA_TRY(sida_buffer_create(backend, &resident->buffer, SIDA_MEMORY_DEVICE, bytes,
                                "all experts on the device"));
    SIDA_TRY(sida_stream_create(backend, &stream, SIDA_STREAM_COMPUTE));
    for (size_t i = 0; i < all; i++)
        SIDA_TRY(sida_copy(stream, (char *)resident->buffer->data + i * resident->stride,
                           sida_model_expert(model, (int32_t)i), info->expert_bytes));
    SIDA_TRY(sida_stream_synchronize(stream));
    *out = resident;
    resident = NULL;
out:
    sida_stream_destroy(stream);
    sida_resident_destroy(resident);
    return status;
}

void sida_resident_destroy(sida_resident *resident) {
    if (!resident) return;
    sida_buffer_destroy(resident->buffer);
    free(resident);
}

static sida_status resident_choose(void *context, sida_moe_call *call) {
    sida_resident *resident = context;
    return resident->choose(resident->context, call);
}

static sida_status resident_observe(void *context, const sida_moe_call *call) {
    sida_resident *resident = context;
    return resident->observe(resident->context, call);
}

static sida_status resident_begin(void *context, const sida_moe_call *call, const int32_t *needed,
                                  int32_t count) {
    sida_resident *resident = context;
    resident->site = call->site;
    resident->needed = needed;
    resident->count = count;
    return SIDA_OK;
}

static sida_status resident_take(void *context, int32_t *experts, const void **weights,
                                 int32_t *count) {
    sida_resident *resident = context;
    const sida_model_info *info = sida_model_get_info(resident->model);
    size_t first = (size_t)resident->site * (size_t)info->experts;
    for (int32_t i = 0; i < resident->count; i++) {
        experts[i] = resident->needed[i];
        weights[i] =
            (const char *)resident->buffer->data + (first + (size_t)experts[i]) * resident->stride;
    }
    *count = resident->count;
    return SIDA_OK;
}

static sida_status resident_release(void *context, const int32_t *experts, int32_t count,
                                    sida_stream *stream) {
    (void)context, (void)experts, (void)count, (void)stream;
    return SIDA_OK;
}

const sida_moe_driver *
sida_resident_driver(sida_resident *resident, void *context,
                     sida_status (*choose)(void *context, sida_moe_call *call),
                     sida_status (*observe)(void *context, const sida_moe_call *call)) {
    resident->context = context;
    resident->choose = choose;
    resident->observe = observe;
    resident->driver = (sida_moe_driver){.context = resident,
                                         .choose = choose ? resident_choose : NULL,
                                         .observe = observe ? resident_observe : NULL,
                                         .begin = resident_begin,
                                         .take = resident_take,
                                         .release = resident_release};
    return &resident->driver;
}
