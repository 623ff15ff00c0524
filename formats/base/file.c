#include "formats/base/file.h"

#include "formats/base/memory.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static sida_status open_regular(int *fd, size_t *size, const char *path) {
    struct stat info;
    /* O_NONBLOCK: a FIFO must be refused below, not waited for. */
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (*fd < 0) return sida_fail(SIDA_ERROR_IO, "%s: %s", path, strerror(errno));
    if (fstat(*fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        close(*fd);
        return sida_fail(SIDA_ERROR_IO, "%s: not a regular file", path);
    }
    *size = (size_t)info.st_size;
    return SIDA_OK;
}

sida_status sida_file_map(sida_mapped_file *out, const char *path) {
    *out = (sida_mapped_file){(const uint8_t *)"", 0};
    int fd;
    size_t size;
    sida_status status = open_regular(&fd, &size, path);
    if (status != SIDA_OK) return status;
    if (size > 0) {
        void *data = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (data == MAP_FAILED)
            status = sida_fail(SIDA_ERROR_IO, "%s: cannot map: %s", path, strerror(errno));
        else
            *out = (sida_mapped_file){data, size};
    }
    close(fd);
    return status;
}

void sida_file_unmap(sida_mapped_file *file) {
    if (file->size > 0) munmap((void *)(uintptr_t)file->data, file->size);
    *file = (sida_mapped_file){(const uint8_t *)"", 0};
}

void sida_file_forget(const sida_mapped_file *file) {
    if (file->size > 0) (void)madvise((void *)(uintptr_t)file->data, file->size, MADV_DONTNEED);
}

sida_status sida_file_read(char **out, size_t *size, const char *path, size_t limit_bytes) {
    *out = NULL;
    *size = 0;
    int fd;
    size_t bytes, done = 0;
    sida_status status = open_regular(&fd, &bytes, path);
    if (status != SIDA_OK) return status;
    char *buffer = NULL;
    if (bytes > limit_bytes)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: %zu bytes, more than the limit of %zu", path, bytes,
                  limit_bytes);
    SIDA_TRY(SIDA_ALLOC(&buffer, bytes + 1, path));
    while (done < bytes) {
        ssize_t got = read(fd, buffer + done, bytes - done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) SIDA_FAIL(SIDA_ERROR_IO, "%s: %s", path, strerror(errno));
        if (got == 0) SIDA_FAIL(SIDA_ERROR_IO, "%s: shrank while it was read", path);
        done += (size_t)got;
    }
    buffer[bytes] = 0;
    *out = buffer;
    *size = bytes;
    buffer = NULL;
out:
    free(buffer);
    close(fd);
    return status;
}

bool sida_file_exists(const char *path) {
    return access(path, F_OK) == 0;
}

sida_status sida_file_temporary_name(char **out, const char *path) {
    return sida_strprintf(out, "%s.tmp", path);
}

/* The folder of a path: "" becomes ".". */
static sida_status folder_of(char **out, const char *path) {
    const char *slash = strrchr(path, '/');
    if (!slash) return sida_strdup(out, ".");
    if (slash == path) return sida_strdup(out, "/");
    return sida_strprintf(out, "%.*s", (int)(slash - path), path);
}

static sida_status sync_path(const char *path, int flags) {
    int fd = open(path, flags | O_CLOEXEC);
    if (fd < 0) return sida_fail(SIDA_ERROR_IO, "%s: %s", path, strerror(errno));
    int failed = fsync(fd) != 0 ? errno : 0;
    close(fd);
    /* Some file systems cannot sync a folder; that is not a reason to lose the file. */
    if (failed && !(failed == EINVAL && (flags & O_DIRECTORY)))
        return sida_fail(SIDA_ERROR_IO, "%s: %s", path, strerror(failed));
    return SIDA_OK;
}

sida_status sida_file_commit(const char *temporary, const char *path) {
    char *folder = NULL;
    sida_status status = SIDA_OK;
    SIDA_TRY(folder_of(&folder, path));
    SIDA_TRY(sync_path(temporary, O_RDONLY));
    if (rename(temporary, path) != 0)
        SIDA_FAIL(SIDA_ERROR_IO, "%s: cannot rename to its final name: %s", path, strerror(errno));
    SIDA_TRY(sync_path(folder, O_RDONLY | O_DIRECTORY));
out:
    if (status != SIDA_OK) unlink(temporary);
    free(folder);
    return status;
}

sida_status sida_file_check_writable(const char *path) {
    char *folder = NULL;
    struct stat info;
    sida_status status = SIDA_OK;
    if (!path[0]) SIDA_FAIL(SIDA_ERROR_ARGUMENT, "an output path is empty");
    SIDA_TRY(folder_of(&folder, path));
    if (stat(folder, &info) != 0)
        SIDA_FAIL(SIDA_ERROR_IO, "%s: its folder: %s", path, strerror(errno));
    if (!S_ISDIR(info.st_mode)) SIDA_FAIL(SIDA_ERROR_IO, "%s: %s is not a folder", path, folder);
    if (access(folder, W_OK | X_OK) != 0)
        SIDA_FAIL(SIDA_ERROR_IO, "%s: its folder: %s", path, strerror(errno));
    if (stat(path, &info) == 0 && !S_ISREG(info.st_mode))
        SIDA_FAIL(SIDA_ERROR_IO, "%s: exists and is not a regular file", path);
out:
    free(folder);
    return status;
}

sida_status sida_path_join(char **out, const char *folder, const char *name) {
    size_t length = strlen(folder);
    const char *slash = length > 0 && folder[length - 1] == '/' ? "" : "/";
    return sida_strprintf(out, "%s%s%s", folder, slash, name);
}
