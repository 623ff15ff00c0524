/* Attributes of the root group, and the list of datasets. */
#include "formats/base/memory.h"
#include "formats/base/text.h"
#include "formats/h5_inside.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TEXT_BYTES = 16 << 20 };

/* Writes one scalar attribute, in place of an earlier one of the same name. */
static sida_status set_attribute(sida_h5_file *file, const char *name, hid_t type,
                                 const void *value) {
    sida_status status = SIDA_OK;
    assert(file->writing);
    hid_t space = H5Screate(H5S_SCALAR), attribute = H5I_INVALID_HID;
    if (H5Aexists(file->id, name) > 0) H5Adelete(file->id, name);
    attribute = H5Acreate2(file->id, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    if (attribute < 0 || H5Awrite(attribute, type, value) < 0)
        status = file->failed = sida_h5_fail(SIDA_ERROR_IO, file, "cannot write attribute", name);
    if (attribute >= 0) H5Aclose(attribute);
    H5Sclose(space);
    return status;
}

sida_status sida_h5_set_text(sida_h5_file *file, const char *name, const char *value) {
    sida_h5_lock();
    hid_t type = H5Tcopy(H5T_C_S1);
    H5Tset_size(type, strlen(value) + 1);
    H5Tset_cset(type, H5T_CSET_UTF8);
    sida_status status = set_attribute(file, name, type, value);
    H5Tclose(type);
    sida_h5_unlock();
    return status;
}

sida_status sida_h5_set_i64(sida_h5_file *file, const char *name, int64_t value) {
    sida_h5_lock();
    sida_status status = set_attribute(file, name, H5T_STD_I64LE, &value);
    sida_h5_unlock();
    return status;
}

/* Opens an attribute that must be one value of the class. */
static sida_status open_attribute(hid_t *out, hid_t *type, sida_h5_file *file, const char *name,
                                  H5T_class_t class) {
    *type = H5I_INVALID_HID;
    *out = H5Aexists(file->id, name) > 0 ? H5Aopen(file->id, name, H5P_DEFAULT) : H5I_INVALID_HID;
    if (*out < 0)
        return sida_fail(SIDA_ERROR_FORMAT, "%s: attribute %s is missing", file->path, name);
    *type = H5Aget_type(*out);
    hid_t space = H5Aget_space(*out);
    bool fits = *type >= 0 && H5Tget_class(*type) == class &&
                H5Sget_simple_extent_npoints(space) == 1 && H5Tget_size(*type) <= MAX_TEXT_BYTES;
    H5Sclose(space);
    return fits ? SIDA_OK
                : sida_fail(SIDA_ERROR_FORMAT, "%s: attribute %s is not a single %s", file->path,
                            name, class == H5T_STRING ? "text" : "whole number");
}

sida_status sida_h5_get_text(sida_h5_file *file, const char *name, char **value) {
    sida_status status = SIDA_OK;
    hid_t attribute = H5I_INVALID_HID, type = H5I_INVALID_HID;
    char *text = NULL, *shared = NULL;
    *value = NULL;
    sida_h5_lock();
    SIDA_TRY(open_attribute(&attribute, &type, file, name, H5T_STRING));
    herr_t result;
    if (H5Tis_variable_str(type) > 0) {
        result = H5Aread(attribute, type, &shared);
        if (result >= 0) SIDA_TRY(sida_strdup(&text, shared ? shared : ""));
    } else {
        SIDA_TRY(SIDA_ALLOC(&text, H5Tget_size(type) + 1, file->path));
        result = H5Aread(attribute, type, text);
    }
    if (result < 0) {
        status = sida_h5_fail(SIDA_ERROR_FORMAT, file, "cannot read attribute", name);
        goto out;
    }
    if (!sida_text_is_utf8(text, strlen(text)))
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: attribute %s is not UTF-8", file->path, name);
    *value = text;
    text = NULL;
out:
    free(text);
    H5free_memory(shared);
    if (type >= 0) H5Tclose(type);
    if (attribute >= 0) H5Aclose(attribute);
    sida_h5_unlock();
    return status;
}

sida_status sida_h5_get_i64(sida_h5_file *file, const char *name, int64_t *value) {
    sida_status status = SIDA_OK;
    hid_t attribute = H5I_INVALID_HID, type = H5I_INVALID_HID;
    sida_h5_lock();
    SIDA_TRY(open_attribute(&attribute, &type, file, name, H5T_INTEGER));
    if (H5Aread(attribute, H5T_STD_I64LE, value) < 0)
        status = sida_h5_fail(SIDA_ERROR_FORMAT, file, "cannot read attribute", name);
out:
    if (type >= 0) H5Tclose(type);
    if (attribute >= 0) H5Aclose(attribute);
    sida_h5_unlock();
    return status;
}

typedef struct path_list {
    char **paths;
    size_t count, capacity;
    sida_status status;
} path_list;

static herr_t collect(hid_t root, const char *name, const H5O_info_t *info, void *context) {
    path_list *list = context;
    (void)root;
    if (info->type != H5O_TYPE_DATASET) return 0;
    list->status = SIDA_GROW(&list->paths, &list->capacity, list->count + 1, "a list of datasets");
    if (list->status == SIDA_OK) list->status = sida_strdup(&list->paths[list->count], name);
    if (list->status != SIDA_OK) return -1;
    list->count++;
    return 0;
}

static int by_text(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

sida_status sida_h5_list(sida_h5_file *file, char ***paths, size_t *count) {
    path_list list = {0};
    *paths = NULL;
    *count = 0;
    sida_h5_lock();
    if (H5Ovisit(file->id, H5_INDEX_NAME, H5_ITER_INC, collect, &list) < 0 &&
        list.status == SIDA_OK)
        list.status = sida_h5_fail(SIDA_ERROR_FORMAT, file, "cannot list", "its datasets");
    sida_h5_unlock();
    if (list.status != SIDA_OK) {
        for (size_t i = 0; i < list.count; i++) free(list.paths[i]);
        free(list.paths);
        return list.status;
    }
    if (list.count > 0) qsort(list.paths, list.count, sizeof *list.paths, by_text);
    *paths = list.paths;
    *count = list.count;
    return SIDA_OK;
}
