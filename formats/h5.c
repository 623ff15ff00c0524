#include "formats/h5.h"

#include "formats/base/file.h"
#include "formats/base/fingerprint.h"
#include "formats/base/memory.h"
#include "formats/h5_inside.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BLOCK_BYTES = 512, BLOCK_VERSION = 1, READ_BYTES = 1 << 20 };

static const uint8_t hdf5_magic[8] = {0x89, 'H', 'D', 'F', '\r', '\n', 0x1a, '\n'};
static const uint8_t block_magic[8] = {'S', 'I', 'D', 'A', '\r', '\n', 0x1a, '\n'};

/* Little-endian on disk, as on every machine that HDF5's native types are used on here. */
typedef struct user_block {
    uint8_t magic[8];
    uint32_t version, kind;
    uint64_t bytes; /* behind the block */
    uint64_t hash_high, hash_low;
    uint8_t zeros[BLOCK_BYTES - 40];
} user_block;
_Static_assert(sizeof(user_block) == BLOCK_BYTES, "the user block has 512 bytes");

static pthread_mutex_t h5_mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

/* After a close that failed (a full disk) HDF5's own clean-up at exit would crash the process; we
 * close all of our files ourselves. Must come before any other call. */
static void keep_exit_plain(void) {
    H5dont_atexit();
}

void sida_h5_lock(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, keep_exit_plain);
    pthread_mutex_lock(&h5_mutex);
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL); /* the setting is a thread's own */
    H5PLset_loading_state(0);              /* a file must not make us load a filter's library */
}

void sida_h5_unlock(void) {
    pthread_mutex_unlock(&h5_mutex);
}

/* Keeps the innermost entry. */
static herr_t keep_reason(unsigned depth, const H5E_error2_t *error, void *context) {
    if (depth == 0 && error->desc) snprintf(context, 400, "%s", error->desc);
    return 0;
}

sida_status sida_h5_fail(sida_status code, const sida_h5_file *file, const char *what,
                         const char *name) {
    char reason[400] = "HDF5 gives no reason";
    H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, keep_reason, reason);
    H5Eclear2(H5E_DEFAULT);
    /* A failed write comes with the time, addresses and counts; the system's words are the reason.
     */
    static const char words[] = "error message = '";
    char *system = strstr(reason, words);
    if (system) {
        system += sizeof words - 1;
        system[strcspn(system, "'")] = 0;
    }
    return sida_fail(code, "%s: %s %s: %s", file->path, what, name, system ? system : reason);
}

static void file_free(sida_h5_file *file) {
    if (!file) return;
    sida_h5_free_datasets(file);
    free(file->path);
    free(file->temporary);
    free(file);
}

static sida_status file_alloc(sida_h5_file **out, const char *path) {
    sida_h5_file *file;
    sida_status status = SIDA_ALLOC(&file, 1, path);
    if (status != SIDA_OK) return status;
    file->id = H5I_INVALID_HID;
    status = sida_strdup(&file->path, path);
    if (status != SIDA_OK) {
        free(file);
        return status;
    }
    *out = file;
    return SIDA_OK;
}

/* Hashes what is behind the block and then the fields of the block, so that a flipped kind is found
 * too. block->bytes: out when `measure`, else it must agree. */
static sida_status hash_file(int fd, const char *path, sida_fingerprint *out, user_block *block,
                             bool measure) {
    sida_status status = SIDA_OK;
    sida_hasher *hasher = NULL;
    uint8_t *data = NULL;
    off_t at = BLOCK_BYTES;
    SIDA_TRY(sida_hasher_create(&hasher));
    SIDA_TRY(SIDA_ALLOC(&data, READ_BYTES, path));
    for (;;) {
        ssize_t got = pread(fd, data, READ_BYTES, at);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) SIDA_FAIL(SIDA_ERROR_IO, "%s: %s", path, strerror(errno));
        if (got == 0) break;
        sida_hasher_update(hasher, data, (size_t)got);
        at += got;
    }
    if (measure) block->bytes = (uint64_t)(at - BLOCK_BYTES);
    if (block->bytes != (uint64_t)(at - BLOCK_BYTES))
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: changed while it was read", path);
    sida_hasher_update(hasher, block, offsetof(user_block, hash_high));
    *out = sida_hasher_finish(hasher);
out:
    free(data);
    sida_hasher_destroy(hasher);
    return status;
}

/* Reads and verifies the block. *ours = false when the file has none. */
static sida_status verify(sida_h5_file *file, bool *ours) {
    sida_status status = SIDA_OK;
    user_block block;
    struct stat info;
    const char *path = file->path;
    *ours = false;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return sida_fail(SIDA_ERROR_IO, "%s: %s", path, strerror(errno));
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode))
        SIDA_FAIL(SIDA_ERROR_IO, "%s: not a regular file", path);
    file->bytes = (uint64_t)info.st_size;
    ssize_t got = pread(fd, &block, sizeof block, 0);
    if (got < 0) SIDA_FAIL(SIDA_ERROR_IO, "%s: %s", path, strerror(errno));
    if (got < (ssize_t)sizeof block.magic ||
        memcmp(block.magic, block_magic, sizeof block_magic) != 0) {
        /* HDF5 would also find itself behind a damaged block of ours: that is not foreign. */
        if (got < (ssize_t)sizeof block.magic ||
            memcmp(block.magic, hdf5_magic, sizeof hdf5_magic) != 0)
            SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: not a file written by sida, nor HDF5", path);
        goto out;
    }
    *ours = true;
    if (got < (ssize_t)sizeof block || block.bytes != file->bytes - BLOCK_BYTES)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: %llu bytes, truncated or grown since it was written",
                  path, (unsigned long long)file->bytes);
    if (block.version != BLOCK_VERSION)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: version %u of the file's first block, expected %d", path,
                  block.version, BLOCK_VERSION);
    for (size_t i = 0; i < sizeof block.zeros; i++)
        if (block.zeros[i])
            SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: damaged: its first block is not as written", path);
    sida_fingerprint hash;
    SIDA_TRY(hash_file(fd, path, &hash, &block, false));
    if (hash.high != block.hash_high || hash.low != block.hash_low)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: damaged: its checksum does not match", path);
    file->kind = (sida_h5_kind)block.kind;
out:
    close(fd);
    return status;
}

static const char *kind_name(sida_h5_kind kind) {
    switch (kind) {
    case SIDA_H5_TRACE:
        return "a trace";
    case SIDA_H5_PART:
        return "a part of a trace";
    case SIDA_H5_PREDICTOR:
        return "a predictor";
    case SIDA_H5_CHECKPOINT:
        return "a training checkpoint";
    }
    return "of an unknown kind";
}

sida_status sida_h5_open(sida_h5_file **out, const char *path, unsigned kind_mask, bool foreign) {
    sida_status status = SIDA_OK;
    sida_h5_file *file = NULL;
    bool ours;
    *out = NULL;
    sida_h5_lock();
    SIDA_TRY(file_alloc(&file, path));
    SIDA_TRY(verify(file, &ours));
    if (ours && ((unsigned)file->kind >= 32 || !(kind_mask >> file->kind & 1)))
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: is %s, not what is needed here", path,
                  kind_name(file->kind));
    if (!ours && !foreign) SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: not a file written by sida", path);
    if (!ours) SIDA_TRY(sida_h5_try_foreign(path, file->bytes));
    file->id = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    if (file->id < 0) {
        status = sida_h5_fail(SIDA_ERROR_FORMAT, file, "cannot open", "it as HDF5");
        goto out;
    }
    *out = file;
    file = NULL;
out:
    file_free(file);
    sida_h5_unlock();
    return status;
}

void sida_h5_close(sida_h5_file *file) {
    if (!file) return;
    if (file->writing) {
        sida_h5_abandon(file);
        return;
    }
    sida_h5_lock();
    sida_h5_free_datasets(file);
    H5Fclose(file->id);
    sida_h5_unlock();
    file_free(file);
}

sida_h5_kind sida_h5_file_kind(const sida_h5_file *file) {
    return file->kind;
}

const char *sida_h5_path(const sida_h5_file *file) {
    return file->path;
}

/* Creates the HDF5 file behind an empty user block. Versions are fixed, so that another HDF5 writes
 * the same bytes. */
static hid_t create_hdf5(const char *path) {
    hid_t fcpl = H5Pcreate(H5P_FILE_CREATE), fapl = H5Pcreate(H5P_FILE_ACCESS);
    hid_t id = H5I_INVALID_HID;
    if (H5Pset_userblock(fcpl, BLOCK_BYTES) >= 0 && H5Pset_obj_track_times(fcpl, 0) >= 0 &&
        H5Pset_libver_bounds(fapl, H5F_LIBVER_V18, H5F_LIBVER_V18) >= 0)
        id = H5Fcreate(path, H5F_ACC_TRUNC, fcpl, fapl);
    H5Pclose(fcpl);
    H5Pclose(fapl);
    return id;
}

sida_status sida_h5_create(sida_h5_file **out, const char *path, sida_h5_kind kind) {
    sida_status status = SIDA_OK;
    sida_h5_file *file = NULL;
    *out = NULL;
    sida_h5_lock();
    SIDA_TRY(sida_file_check_writable(path));
    SIDA_TRY(file_alloc(&file, path));
    file->kind = kind;
    file->writing = true;
    SIDA_TRY(sida_file_temporary_name(&file->temporary, path));
    unlink(file->temporary); /* what a killed run left */
    file->id = create_hdf5(file->temporary);
    if (file->id < 0) {
        status = sida_h5_fail(SIDA_ERROR_IO, file, "cannot create", file->temporary);
        unlink(file->temporary);
        goto out;
    }
    *out = file;
    file = NULL;
out:
    file_free(file);
    sida_h5_unlock();
    return status;
}

/* The checksum into the block of the closed file. */
static sida_status write_block(const sida_h5_file *file) {
    sida_status status = SIDA_OK;
    user_block block = {.version = BLOCK_VERSION, .kind = (uint32_t)file->kind};
    sida_fingerprint hash;
    int fd = open(file->temporary, O_RDWR | O_CLOEXEC);
    if (fd < 0) return sida_fail(SIDA_ERROR_IO, "%s: %s", file->temporary, strerror(errno));
    memcpy(block.magic, block_magic, sizeof block.magic);
    SIDA_TRY(hash_file(fd, file->temporary, &hash, &block, true));
    block.hash_high = hash.high;
    block.hash_low = hash.low;
    errno = 0;
    if (pwrite(fd, &block, sizeof block, 0) != (ssize_t)sizeof block)
        SIDA_FAIL(SIDA_ERROR_IO, "%s: cannot be written: %s", file->temporary, strerror(errno));
out:
    if (close(fd) != 0 && status == SIDA_OK)
        status = sida_fail(SIDA_ERROR_IO, "%s: %s", file->temporary, strerror(errno));
    return status;
}

/* The rows that are pending, and the end of what HDF5 writes. */
static sida_status close_written(sida_h5_file *file) {
    sida_status status = SIDA_OK;
    sida_h5_lock();
    SIDA_TRY(sida_h5_finish_datasets(file));
    sida_h5_free_datasets(file);
    if (H5Fflush(file->id, H5F_SCOPE_GLOBAL) < 0) {
        status = sida_h5_fail(SIDA_ERROR_IO, file, "cannot write", file->temporary);
        goto out;
    }
    hid_t id = file->id;
    file->id = H5I_INVALID_HID;
    if (H5Fclose(id) < 0) {
        status = sida_h5_fail(SIDA_ERROR_IO, file, "cannot close", file->temporary);
        goto out;
    }
out:
    sida_h5_unlock();
    return status;
}

sida_status sida_h5_commit(sida_h5_file *file) {
    sida_status status = file->failed;
    if (status != SIDA_OK)
        SIDA_FAIL(status, "%s: not written, an earlier write to it failed", file->path);
    SIDA_TRY(close_written(file));
    SIDA_TRY(write_block(file));
    status = sida_file_commit(file->temporary, file->path);
    free(file->temporary); /* gone, under this name */
    file->temporary = NULL;
out:
    sida_h5_abandon(file);
    return status;
}

void sida_h5_abandon(sida_h5_file *file) {
    if (!file) return;
    sida_h5_lock();
    sida_h5_free_datasets(file);
    if (file->id >= 0 && H5Fclose(file->id) < 0) H5Eclear2(H5E_DEFAULT);
    if (file->temporary) unlink(file->temporary);
    sida_h5_unlock();
    file_free(file);
}

void sida_h5_library_version(char *text, size_t size) {
    unsigned major = 0, minor = 0, release = 0;
    sida_h5_lock();
    H5get_libversion(&major, &minor, &release);
    sida_h5_unlock();
    snprintf(text, size, "%u.%u.%u", major, minor, release);
}
