#include "formats/safetensors.h"

#include "formats/base/memory.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

/* The largest published header (Switch-C, 2,048 experts a layer) has about 10 MB. */
#define MAX_HEADER_BYTES ((size_t)64 << 20)

struct sida_safetensors {
    json_t *header; /* holds the names */
    sida_tensor_view *tensors;
    size_t count;
};

/* What one entry is parsed against. */
typedef struct payload {
    const char *file;
    const uint8_t *data; /* behind the header */
    size_t size;
} payload;

static sida_status read_dtype(sida_dtype *out, const json_t *value, const char *file,
                              const char *tensor) {
    const char *text = json_string_value(value);
    if (text && strcmp(text, "F32") == 0)
        *out = SIDA_F32;
    else if (text && strcmp(text, "F16") == 0)
        *out = SIDA_F16;
    else if (text && strcmp(text, "BF16") == 0)
        *out = SIDA_BF16;
    else
        return sida_fail(SIDA_ERROR_FORMAT,
                         "%s: tensor %.200s: dtype %.40s is not F32, F16 or BF16", file, tensor,
                         text ? text : "(no text)");
    return SIDA_OK;
}

/* Rank, extents and the bytes that they take. */
static sida_status read_shape(sida_tensor_view *view, const json_t *shape, const char *file) {
    size_t rank = json_array_size(shape), bytes = sida_dtype_bytes(view->dtype);
    if (!json_is_array(shape) || rank > SIDA_TENSOR_MAX_RANK)
        return sida_fail(SIDA_ERROR_FORMAT, "%s: tensor %.200s: shape is no array of at most %d",
                         file, view->name, SIDA_TENSOR_MAX_RANK);
    view->rank = (int)rank;
    for (size_t i = 0; i < rank; i++) {
        const json_t *extent = json_array_get(shape, i);
        json_int_t value = json_integer_value(extent);
        if (!json_is_integer(extent) || value < 0)
            return sida_fail(SIDA_ERROR_FORMAT, "%s: tensor %.200s: a bad extent in its shape",
                             file, view->name);
        view->shape[i] = value;
        if (sida_mul_overflow(bytes, (size_t)value, &bytes) || bytes > PTRDIFF_MAX)
            return sida_fail(SIDA_ERROR_FORMAT, "%s: tensor %.200s: its shape overflows", file,
                             view->name);
    }
    view->bytes = bytes;
    return SIDA_OK;
}

static sida_status read_tensor(sida_tensor_view *view, const char *name, const json_t *entry,
                               const payload *bytes) {
    const char *file = bytes->file;
    view->name = name;
    if (!json_is_object(entry))
        return sida_fail(SIDA_ERROR_FORMAT, "%s: tensor %.200s: not an object", file, name);
    sida_status status = read_dtype(&view->dtype, json_object_get(entry, "dtype"), file, name);
    if (status != SIDA_OK) return status;
    status = read_shape(view, json_object_get(entry, "shape"), file);
    if (status != SIDA_OK) return status;

    const json_t *offsets = json_object_get(entry, "data_offsets");
    const json_t *first = json_array_get(offsets, 0), *last = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(first) || !json_is_integer(last))
        return sida_fail(SIDA_ERROR_FORMAT, "%s: tensor %.200s: no pair of data_offsets", file,
                         name);
    json_int_t begin = json_integer_value(first), end = json_integer_value(last);
    if (begin < 0 || end < begin || (size_t)end > bytes->size)
        return sida_fail(SIDA_ERROR_FORMAT,
                         "%s: tensor %.200s: bytes %lld to %lld are not within the %zu of the file",
                         file, name, (long long)begin, (long long)end, bytes->size);
    if ((size_t)(end - begin) != view->bytes)
        return sida_fail(SIDA_ERROR_FORMAT,
                         "%s: tensor %.200s: %lld bytes, but its shape takes %zu", file, name,
                         (long long)(end - begin), view->bytes);
    view->data = bytes->data + begin;
    return SIDA_OK;
}

static int by_address(const void *a, const void *b) {
    const sida_tensor_view *x = *(sida_tensor_view *const *)a, *y = *(sida_tensor_view *const *)b;
    if (x->data != y->data) return (uintptr_t)x->data < (uintptr_t)y->data ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

static sida_status check_overlaps(const sida_safetensors *file, const char *name) {
    sida_tensor_view **order;
    sida_status status = SIDA_ALLOC(&order, file->count, name);
    if (status != SIDA_OK) return status;
    size_t count = 0;
    for (size_t i = 0; i < file->count; i++)
        if (file->tensors[i].bytes > 0) order[count++] = &file->tensors[i];
    qsort(order, count, sizeof *order, by_address);
    for (size_t i = 1; i < count && status == SIDA_OK; i++) {
        const sida_tensor_view *before = order[i - 1], *after = order[i];
        if ((const uint8_t *)before->data + before->bytes > (const uint8_t *)after->data)
            status = sida_fail(SIDA_ERROR_FORMAT, "%s: tensors %.200s and %.200s overlap", name,
                               before->name, after->name);
    }
    free(order);
    return status;
}

static sida_status load_header(json_t **out, size_t *header_bytes, const uint8_t *data, size_t size,
                               const char *name) {
    uint64_t length = 0;
    if (size < 8)
        return sida_fail(SIDA_ERROR_FORMAT, "%s: %zu bytes, too short for safetensors", name, size);
    for (int i = 7; i >= 0; i--) length = length << 8 | data[i];
    if (length > size - 8 || length > MAX_HEADER_BYTES)
        return sida_fail(SIDA_ERROR_FORMAT,
                         "%s: a header of %llu bytes: more than the file or the limit of %zu", name,
                         (unsigned long long)length, MAX_HEADER_BYTES);
    json_error_t error;
    json_t *header = json_loadb((const char *)data + 8, length, JSON_REJECT_DUPLICATES, &error);
    if (!header) return sida_fail(SIDA_ERROR_FORMAT, "%s: header: %s", name, error.text);
    if (!json_is_object(header)) {
        json_decref(header);
        return sida_fail(SIDA_ERROR_FORMAT, "%s: header: not a JSON object", name);
    }
    *out = header;
    *header_bytes = length + 8;
    return SIDA_OK;
}

sida_status sida_safetensors_parse(sida_safetensors **out, const void *data, size_t size,
                                   const char *name) {
    sida_status status = SIDA_OK;
    sida_safetensors *file = NULL;
    size_t header_bytes = 0;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&file, 1, name));
    SIDA_TRY(load_header(&file->header, &header_bytes, data, size, name));
    SIDA_TRY(SIDA_ALLOC(&file->tensors, json_object_size(file->header), name));
    payload bytes = {name, (const uint8_t *)data + header_bytes, size - header_bytes};
    const char *key;
    json_t *entry;
    json_object_foreach(file->header, key, entry) {
        if (strcmp(key, "__metadata__") == 0) continue;
        SIDA_TRY(read_tensor(&file->tensors[file->count], key, entry, &bytes));
        file->count++;
    }
    SIDA_TRY(check_overlaps(file, name));
    *out = file;
    file = NULL;
out:
    sida_safetensors_destroy(file);
    return status;
}

void sida_safetensors_destroy(sida_safetensors *file) {
    if (!file) return;
    json_decref(file->header);
    free(file->tensors);
    free(file);
}

size_t sida_safetensors_count(const sida_safetensors *file) {
    return file->count;
}

const sida_tensor_view *sida_safetensors_at(const sida_safetensors *file, size_t index) {
    return &file->tensors[index];
}

const json_t *sida_safetensors_metadata(const sida_safetensors *file) {
    const json_t *metadata = json_object_get(file->header, "__metadata__");
    return json_is_object(metadata) ? metadata : NULL;
}
