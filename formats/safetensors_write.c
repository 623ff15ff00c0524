#include "formats/base/file.h"
#include "formats/base/memory.h"
#include "formats/safetensors.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The header as text, padded with spaces as the format's own writer does. */
static sida_status make_header(char **out, size_t *length, const char *path,
                               const sida_tensor_view *tensors, size_t count,
                               const json_t *metadata) {
    sida_status status = SIDA_OK;
    json_t *header = json_object();
    char *text = NULL;
    const char *key;
    json_t *value;
    size_t offset = 0;
    *out = NULL;
    json_object_foreach((json_t *)(uintptr_t)metadata, key, value) {
        if (!json_is_string(value))
            SIDA_FAIL(SIDA_ERROR_ARGUMENT, "%s: metadata %.80s is no text", path, key);
    }
    if (metadata) json_object_set(header, "__metadata__", (json_t *)(uintptr_t)metadata);
    for (size_t i = 0; i < count; i++) {
        const sida_tensor_view *t = &tensors[i];
        json_t *shape = json_array();
        for (int d = 0; d < t->rank; d++) json_array_append_new(shape, json_integer(t->shape[d]));
        json_t *entry =
            json_pack("{s:s, s:o, s:[I, I]}", "dtype", sida_dtype_name(t->dtype), "shape", shape,
                      "data_offsets", (json_int_t)offset, (json_int_t)(offset + t->bytes));
        if (json_object_get(header, t->name)) {
            json_decref(entry);
            SIDA_FAIL(SIDA_ERROR_ARGUMENT, "%s: tensor %.200s twice", path, t->name);
        }
        if (json_object_set_new(header, t->name, entry) != 0)
            SIDA_FAIL(SIDA_ERROR_MEMORY, "%s: no memory for its header", path);
        offset += t->bytes;
    }
    text = json_dumps(header, JSON_COMPACT);
    if (!text) SIDA_FAIL(SIDA_ERROR_MEMORY, "%s: its header cannot be written as JSON", path);
    size_t used = strlen(text);
    *length = (used + 7) / 8 * 8;
    SIDA_TRY(SIDA_ALLOC(out, *length, path));
    memset(*out, ' ', *length);
    memcpy(*out, text, used);
out:
    free(text);
    json_decref(header);
    return status;
}

sida_status sida_safetensors_write(const char *path, const sida_tensor_view *tensors, size_t count,
                                   const json_t *metadata) {
    sida_status status = SIDA_OK;
    char *header = NULL, *temporary = NULL;
    FILE *file = NULL;
    size_t length = 0;
    uint8_t prefix[8];
    SIDA_TRY(sida_file_check_writable(path));
    SIDA_TRY(make_header(&header, &length, path, tensors, count, metadata));
    for (int i = 0; i < 8; i++) prefix[i] = (uint8_t)((uint64_t)length >> 8 * i);
    SIDA_TRY(sida_file_temporary_name(&temporary, path));
    file = fopen(temporary, "wb");
    if (!file) SIDA_FAIL(SIDA_ERROR_IO, "%s: %s", temporary, strerror(errno));
    errno = 0;
    fwrite(prefix, 1, sizeof prefix, file);
    fwrite(header, 1, length, file);
    for (size_t i = 0; i < count; i++)
        if (tensors[i].bytes > 0) fwrite(tensors[i].data, 1, tensors[i].bytes, file);
    bool failed = fflush(file) != 0 || ferror(file);
    failed |= fclose(file) != 0;
    if (failed) {
        status = sida_fail(SIDA_ERROR_IO, "%s: cannot be written: %s", temporary,
                           errno ? strerror(errno) : "an earlier write failed");
        unlink(temporary);
        goto out;
    }
    status = sida_file_commit(temporary, path);
out:
    free(header);
    free(temporary);
    return status;
}
