/* Datasets: written whole, appended to, and read by rows.
 *
 * An appended dataset is gathered in memory. If it ends below PENDING_BYTES it is written without
 * chunks, with exactly its size; beyond that it becomes chunked (chunks of 1 MiB, which HDF5 allots
 * whole), so that the waste of the last chunk stays below a thirtieth and a long run streams. */
#include "formats/base/memory.h"
#include "formats/h5_inside.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK_BYTES ((size_t)1 << 20)
#define PENDING_BYTES ((size_t)32 << 20)
enum { MAX_PATH = 512 };

size_t sida_h5_type_bytes(sida_h5_type type) {
    static const uint8_t bytes[] = {1, 2, 4, 8, 4, 2};
    return bytes[type];
}

/* A new id for the stored type: little-endian; half precision is IEEE's, as h5py's float16. */
static hid_t stored_type(sida_h5_type type) {
    static const uint8_t half[] = {15, 10, 5, 0, 10}; /* sign, exponent and fraction: place, size */
    switch (type) {
    case SIDA_H5_U8:
        return H5Tcopy(H5T_STD_U8LE);
    case SIDA_H5_U16:
        return H5Tcopy(H5T_STD_U16LE);
    case SIDA_H5_I32:
        return H5Tcopy(H5T_STD_I32LE);
    case SIDA_H5_I64:
        return H5Tcopy(H5T_STD_I64LE);
    case SIDA_H5_F32:
        return H5Tcopy(H5T_IEEE_F32LE);
    case SIDA_H5_F16:
        break;
    }
    hid_t id = H5Tcopy(H5T_IEEE_F32LE);
    H5Tset_fields(id, half[0], half[1], half[2], half[3], half[4]);
    H5Tset_size(id, 2);
    H5Tset_ebias(id, 15);
    return id;
}

/* Whether every value of the file's type is one of `type`. */
static bool is_lossless(hid_t stored, sida_h5_type type) {
    H5T_class_t class = H5Tget_class(stored);
    size_t have = H5Tget_size(stored), want = sida_h5_type_bytes(type);
    if (type == SIDA_H5_F32 || type == SIDA_H5_F16) {
        if (class != H5T_FLOAT) return false;
        bool same = type == SIDA_H5_F32 &&
                    (H5Tequal(stored, H5T_IEEE_F32LE) > 0 || H5Tequal(stored, H5T_IEEE_F32BE) > 0);
        hid_t half = stored_type(SIDA_H5_F16);
        same = same || H5Tequal(stored, half) > 0;
        H5Tset_order(half, H5T_ORDER_BE);
        same = same || H5Tequal(stored, half) > 0;
        H5Tclose(half);
        return same;
    }
    if (class != H5T_INTEGER || H5Tget_precision(stored) != 8 * have || H5Tget_offset(stored) != 0)
        return false;
    bool from_signed = H5Tget_sign(stored) != H5T_SGN_NONE;
    bool to_signed = type == SIDA_H5_I32 || type == SIDA_H5_I64;
    return from_signed == to_signed ? have <= want : to_signed && have < want;
}

static sida_h5_dataset *find_dataset(const sida_h5_file *file, const char *path) {
    for (size_t i = 0; i < file->count; i++)
        if (strcmp(file->datasets[i]->path, path) == 0) return file->datasets[i];
    return NULL;
}

static void dataset_free(sida_h5_dataset *dataset) {
    if (!dataset) return;
    if (dataset->id >= 0 && H5Dclose(dataset->id) < 0) H5Eclear2(H5E_DEFAULT);
    free(dataset->pending);
    free(dataset->path);
    free(dataset);
}

void sida_h5_free_datasets(sida_h5_file *file) {
    for (size_t i = 0; i < file->count; i++) dataset_free(file->datasets[i]);
    free(file->datasets);
    file->datasets = NULL;
    file->count = file->capacity = 0;
}

static sida_status add_dataset(sida_h5_dataset **out, sida_h5_file *file, const char *path) {
    sida_status status = SIDA_OK;
    sida_h5_dataset *dataset = NULL;
    SIDA_TRY(SIDA_GROW(&file->datasets, &file->capacity, file->count + 1, file->path));
    SIDA_TRY(SIDA_ALLOC(&dataset, 1, file->path));
    dataset->id = H5I_INVALID_HID;
    SIDA_TRY(sida_strdup(&dataset->path, path));
    *out = file->datasets[file->count++] = dataset;
    dataset = NULL;
out:
    dataset_free(dataset);
    return status;
}

/* True when each part of the path is there. */
static bool link_exists(hid_t file, const char *path) {
    char part[MAX_PATH];
    size_t length = strlen(path);
    if (length == 0 || length >= sizeof part) return false;
    for (size_t i = 1; i <= length; i++) {
        if (path[i] != '/' && path[i] != 0) continue;
        memcpy(part, path, i);
        part[i] = 0;
        if (H5Lexists(file, part, H5P_DEFAULT) <= 0) {
            H5Eclear2(H5E_DEFAULT);
            return false;
        }
    }
    return true;
}

/* Makes the groups of a path, without times. */
static sida_status make_groups(sida_h5_file *file, const char *path) {
    char part[MAX_PATH];
    assert(strlen(path) < sizeof part);
    for (const char *slash = strchr(path, '/'); slash; slash = strchr(slash + 1, '/')) {
        memcpy(part, path, (size_t)(slash - path));
        part[slash - path] = 0;
        if (link_exists(file->id, part)) continue;
        hid_t list = H5Pcreate(H5P_GROUP_CREATE);
        H5Pset_obj_track_times(list, 0);
        hid_t group = H5Gcreate2(file->id, part, H5P_DEFAULT, list, H5P_DEFAULT);
        H5Pclose(list);
        if (group < 0) return sida_h5_fail(SIDA_ERROR_IO, file, "cannot make group", part);
        H5Gclose(group);
    }
    return SIDA_OK;
}

/* Creates a dataset of `shape`; chunk_rows > 0: extendible along its first axis. */
static sida_status create_dataset(hid_t *out, sida_h5_file *file, const char *path,
                                  sida_h5_type type, int rank, const hsize_t *shape,
                                  size_t chunk_rows) {
    hsize_t limit[SIDA_H5_MAX_RANK], chunk[SIDA_H5_MAX_RANK];
    sida_status status = make_groups(file, path);
    if (status != SIDA_OK) return status;
    hid_t list = H5Pcreate(H5P_DATASET_CREATE), stored = stored_type(type);
    H5Pset_obj_track_times(list, 0);
    memcpy(limit, shape, (size_t)rank * sizeof *shape);
    if (chunk_rows > 0) {
        uint64_t zero = 0;
        memcpy(chunk, shape, (size_t)rank * sizeof *shape);
        chunk[0] = chunk_rows;
        limit[0] = H5S_UNLIMITED;
        H5Pset_chunk(list, rank, chunk);
        /* No byte of a chunk may be left to chance. */
        H5Pset_fill_value(list, stored, &zero);
        H5Pset_fill_time(list, H5D_FILL_TIME_ALLOC);
    }
    hid_t space = H5Screate_simple(rank, shape, limit);
    *out = H5Dcreate2(file->id, path, stored, space, H5P_DEFAULT, list, H5P_DEFAULT);
    H5Sclose(space);
    H5Tclose(stored);
    H5Pclose(list);
    return *out < 0 ? sida_h5_fail(SIDA_ERROR_IO, file, "cannot create", path) : SIDA_OK;
}

/* Rows [first, first + rows) between `data` and the dataset. */
static herr_t transfer(hid_t dataset, sida_h5_type type, int rank, const hsize_t *shape,
                       hsize_t first, hsize_t rows, void *into, const void *from) {
    hsize_t start[SIDA_H5_MAX_RANK] = {first}, count[SIDA_H5_MAX_RANK];
    memcpy(count, shape, (size_t)rank * sizeof *shape);
    count[0] = rows;
    for (int i = 0; i < rank; i++)
        if (count[i] == 0) return 0;
    hid_t space = H5Dget_space(dataset), memory = H5Screate_simple(rank, count, NULL),
          kind = stored_type(type);
    herr_t result = H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, count, NULL);
    if (result >= 0)
        result = into ? H5Dread(dataset, kind, memory, space, H5P_DEFAULT, into)
                      : H5Dwrite(dataset, kind, memory, space, H5P_DEFAULT, from);
    /* Every call forgets the errors of the one before: keep the reason past the closing. */
    hid_t reason = result < 0 ? H5Eget_current_stack() : H5I_INVALID_HID;
    H5Tclose(kind);
    H5Sclose(memory);
    H5Sclose(space);
    if (reason >= 0) H5Eset_current_stack(reason);
    return result;
}

sida_status sida_h5_write(sida_h5_file *file, const char *path, sida_h5_type type, int rank,
                          const int64_t *shape, const void *data) {
    hsize_t extents[SIDA_H5_MAX_RANK];
    hid_t dataset = H5I_INVALID_HID;
    sida_status status = SIDA_OK;
    assert(file->writing && rank >= 1 && rank <= SIDA_H5_MAX_RANK && !find_dataset(file, path));
    for (int i = 0; i < rank; i++) extents[i] = (hsize_t)shape[i];
    sida_h5_lock();
    SIDA_TRY(create_dataset(&dataset, file, path, type, rank, extents, 0));
    if (transfer(dataset, type, rank, extents, 0, extents[0], NULL, data) < 0)
        status = sida_h5_fail(SIDA_ERROR_IO, file, "cannot write", path);
    if (H5Dclose(dataset) < 0 && status == SIDA_OK)
        status = sida_h5_fail(SIDA_ERROR_IO, file, "cannot write", path);
out:
    if (status != SIDA_OK) file->failed = status;
    sida_h5_unlock();
    return status;
}

/* Writes the first `rows` pending rows behind those on disk. */
static sida_status flush_rows(sida_h5_file *file, sida_h5_dataset *dataset, size_t rows) {
    hsize_t before = dataset->shape[0];
    sida_status status;
    if (rows == 0) return SIDA_OK;
    if (dataset->id < 0) {
        status = create_dataset(&dataset->id, file, dataset->path, dataset->type, dataset->rank,
                                dataset->shape, dataset->chunk_rows);
        if (status != SIDA_OK) return status;
    }
    dataset->shape[0] += rows;
    if (H5Dset_extent(dataset->id, dataset->shape) < 0 ||
        transfer(dataset->id, dataset->type, dataset->rank, dataset->shape, before, rows, NULL,
                 dataset->pending) < 0)
        return sida_h5_fail(SIDA_ERROR_IO, file, "cannot write", dataset->path);
    dataset->pending_rows -= rows;
    memmove(dataset->pending, dataset->pending + rows * dataset->row_bytes,
            dataset->pending_rows * dataset->row_bytes);
    return SIDA_OK;
}

static sida_status gather(sida_h5_file *file, sida_h5_dataset *dataset, size_t rows,
                          const uint8_t *data) {
    size_t row = dataset->row_bytes, limit = row ? PENDING_BYTES / row : rows;
    if (limit < 1) limit = 1;
    if (row == 0) { /* no values, but a number of rows */
        dataset->pending_rows += rows;
        return SIDA_OK;
    }
    while (rows > 0) {
        if (dataset->pending_rows >= limit) {
            size_t whole = dataset->pending_rows / dataset->chunk_rows * dataset->chunk_rows;
            sida_h5_lock();
            sida_status status = flush_rows(file, dataset, whole ? whole : dataset->pending_rows);
            sida_h5_unlock();
            if (status != SIDA_OK) return status;
        }
        size_t take = limit - dataset->pending_rows;
        if (take > rows) take = rows;
        sida_status status = SIDA_GROW(&dataset->pending, &dataset->capacity,
                                       (dataset->pending_rows + take) * row, dataset->path);
        if (status != SIDA_OK) return status;
        memcpy(dataset->pending + dataset->pending_rows * row, data, take * row);
        dataset->pending_rows += take;
        data += take * row;
        rows -= take;
    }
    return SIDA_OK;
}

sida_status sida_h5_append(sida_h5_file *file, const char *path, sida_h5_type type, int rank,
                           const int64_t *row_shape, int64_t rows, const void *data) {
    sida_status status = SIDA_OK;
    assert(file->writing && rank >= 1 && rank <= SIDA_H5_MAX_RANK && rows >= 0);
    sida_h5_dataset *dataset = find_dataset(file, path);
    if (!dataset) {
        SIDA_TRY(add_dataset(&dataset, file, path));
        dataset->type = type;
        dataset->rank = rank;
        dataset->row_bytes = sida_h5_type_bytes(type);
        for (int i = 1; i < rank; i++) {
            dataset->shape[i] = (hsize_t)row_shape[i - 1];
            dataset->row_bytes *= (size_t)row_shape[i - 1];
        }
        dataset->chunk_rows = dataset->row_bytes ? CHUNK_BYTES / dataset->row_bytes : 1;
        if (dataset->chunk_rows < 1) dataset->chunk_rows = 1;
    }
    assert(dataset->type == type && dataset->rank == rank);
    for (int i = 1; i < rank; i++) assert(dataset->shape[i] == (hsize_t)row_shape[i - 1]);
    SIDA_TRY(gather(file, dataset, (size_t)rows, data));
out:
    if (status != SIDA_OK) file->failed = status;
    return status;
}

sida_status sida_h5_finish_datasets(sida_h5_file *file) {
    sida_status status = SIDA_OK;
    for (size_t i = 0; i < file->count && status == SIDA_OK; i++) {
        sida_h5_dataset *dataset = file->datasets[i];
        if (dataset->id >= 0) {
            status = flush_rows(file, dataset, dataset->pending_rows);
            continue;
        }
        dataset->shape[0] = dataset->pending_rows;
        status = create_dataset(&dataset->id, file, dataset->path, dataset->type, dataset->rank,
                                dataset->shape, 0);
        if (status == SIDA_OK && transfer(dataset->id, dataset->type, dataset->rank, dataset->shape,
                                          0, dataset->shape[0], NULL, dataset->pending) < 0)
            status = sida_h5_fail(SIDA_ERROR_IO, file, "cannot write", dataset->path);
    }
    return status;
}

bool sida_h5_exists(sida_h5_file *file, const char *path) {
    sida_h5_lock();
    bool exists = find_dataset(file, path) || link_exists(file->id, path);
    sida_h5_unlock();
    return exists;
}

/* Opens a dataset for reading, once, and keeps it with its shape. */
static sida_status open_dataset(sida_h5_dataset **out, sida_h5_file *file, const char *path) {
    sida_h5_dataset *dataset = find_dataset(file, path);
    hid_t id = H5I_INVALID_HID, space = H5I_INVALID_HID;
    hsize_t shape[H5S_MAX_RANK];
    const char *refused;
    sida_status status = SIDA_OK;
    *out = dataset;
    if (dataset) return SIDA_OK;
    if (!link_exists(file->id, path))
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: dataset %s is missing", file->path, path);
    id = H5Dopen2(file->id, path, H5P_DEFAULT);
    if (id < 0) {
        status = sida_h5_fail(SIDA_ERROR_FORMAT, file, "cannot open dataset", path);
        goto out;
    }
    if ((refused = sida_h5_refuse_dataset(id, file->bytes)))
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: dataset %s %s", file->path, path, refused);
    space = H5Dget_space(id);
    int rank = H5Sget_simple_extent_ndims(space);
    if (rank < 1 || rank > SIDA_H5_MAX_RANK)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: dataset %s has %d axes", file->path, path, rank);
    H5Sget_simple_extent_dims(space, shape, NULL);
    SIDA_TRY(add_dataset(&dataset, file, path));
    dataset->id = id;
    id = H5I_INVALID_HID;
    dataset->rank = rank;
    memcpy(dataset->shape, shape, (size_t)rank * sizeof *shape);
    *out = dataset;
out:
    if (space >= 0) H5Sclose(space);
    if (id >= 0) H5Dclose(id);
    return status;
}

static sida_status open_as(sida_h5_dataset **out, sida_h5_file *file, const char *path,
                           sida_h5_type type) {
    static const char *const names[] = {"u8", "u16", "i32", "i64", "f32", "f16"};
    sida_status status = open_dataset(out, file, path);
    if (status != SIDA_OK) return status;
    hid_t stored = H5Dget_type((*out)->id);
    bool fits = is_lossless(stored, type);
    H5Tclose(stored);
    return fits ? SIDA_OK
                : sida_fail(SIDA_ERROR_FORMAT, "%s: dataset %s: its type does not fit %s",
                            file->path, path, names[type]);
}

sida_status sida_h5_shape(sida_h5_file *file, const char *path, sida_h5_type type, int rank,
                          int64_t *shape) {
    sida_status status = SIDA_OK;
    sida_h5_dataset *dataset;
    assert(!file->writing);
    sida_h5_lock();
    SIDA_TRY(open_as(&dataset, file, path, type));
    if (dataset->rank != rank)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: dataset %s has %d axes, expected %d", file->path, path,
                  dataset->rank, rank);
    for (int i = 0; i < rank; i++) shape[i] = (int64_t)dataset->shape[i];
out:
    sida_h5_unlock();
    return status;
}

sida_status sida_h5_read_rows(sida_h5_file *file, const char *path, sida_h5_type type,
                              int64_t first, int64_t rows, void *data) {
    sida_status status = SIDA_OK;
    sida_h5_dataset *dataset;
    assert(!file->writing);
    sida_h5_lock();
    SIDA_TRY(open_as(&dataset, file, path, type));
    if (first < 0 || rows < 0 || (uint64_t)first > dataset->shape[0] ||
        (uint64_t)rows > dataset->shape[0] - (uint64_t)first)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "%s: dataset %s has no rows %lld to %lld", file->path, path,
                  (long long)first, (long long)first + rows);
    if (transfer(dataset->id, type, dataset->rank, dataset->shape, (hsize_t)first, (hsize_t)rows,
                 data, NULL) < 0)
        status = sida_h5_fail(SIDA_ERROR_FORMAT, file, "cannot read dataset", path);
out:
    sida_h5_unlock();
    return status;
}
