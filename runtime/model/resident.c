/* Every expert on the device at once. */
#include "runtime/model/model.h"

#include "formats/base/memory.h"

#include <stdlib.h>

enum { EXPERT_ALIGNMENT = 256 };

struct sida_resident {
    sida_buffer *buffer; /* the experts, then the table: [sites, E] pointers to them */
    const void *const *table;
    sida_moe_driver driver;
    void *context; /* the caller's */
    sida_status (*choose)(void *context, sida_moe_call *call);
    sida_status (*observe)(void *context, const sida_moe_call *call);
};

sida_status sida_resident_create(sida_resident **out, const sida_model *model) {
    sida_status status = SIDA_OK;
    const sida_model_info *info = sida_model_get_info(model);
    sida_backend *backend = sida_model_backend(model);
    sida_resident *resident = NULL;
    sida_stream *stream = NULL;
    const void **pointers = NULL;
    const size_t all = (size_t)info->sites * (size_t)info->experts;
    const size_t stride =
        (info->expert_bytes + EXPERT_ALIGNMENT - 1) / EXPERT_ALIGNMENT * EXPERT_ALIGNMENT;
    size_t each, bytes;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&resident, 1, "the resident experts"));
    if (sida_add_overflow(stride, sizeof *pointers, &each) || sida_mul_overflow(each, all, &bytes))
        SIDA_FAIL(SIDA_ERROR_MEMORY, "the resident experts are larger than memory can be");
    SIDA_TRY(sida_buffer_create(backend, &resident->buffer, SIDA_MEMORY_DEVICE, bytes,
                                "all experts on the device"));
    SIDA_TRY(sida_stream_create(backend, &stream, SIDA_STREAM_COMPUTE));
    char *experts = resident->buffer->data;
    resident->table = (const void *const *)(experts + all * stride);
    SIDA_TRY(SIDA_ALLOC(&pointers, all, "the resident experts"));
    for (size_t i = 0; i < all; i++) {
        pointers[i] = experts + i * stride;
        SIDA_TRY(sida_copy(stream, experts + i * stride, sida_model_expert(model, (int32_t)i),
                           info->expert_bytes));
    }
    SIDA_TRY(sida_copy(stream, experts + all * stride, pointers, all * sizeof *pointers));
    SIDA_TRY(sida_stream_synchronize(stream));
    *out = resident;
    resident = NULL;
out:
    sida_stream_destroy(stream); /* after its work: the copies read `pointers` */
    free(pointers);
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

const void *const *sida_resident_table(const sida_resident *resident) {
    return resident->table;
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
                                         .resident = resident->table};
    return &resident->driver;
}
