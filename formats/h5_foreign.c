/* Files that other software wrote: opened and read in a child process before we open them. */
#include "formats/h5_inside.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CHILD_SECONDS = 600, BLOCK_BYTES = 1 << 20, MAX_DATASETS = 1000 };
/* How much larger than its file a dataset may be: what deflate gives on plausible values. */
enum { MAX_RATIO = 100 };
#define CHILD_BYTES ((rlim_t)4 << 30)

static bool is_too_large(hid_t dataset, uint64_t file_bytes) {
    hsize_t shape[H5S_MAX_RANK], bytes;
    hid_t space = H5Dget_space(dataset), type = H5Dget_type(dataset);
    int rank = H5Sget_simple_extent_dims(space, shape, NULL);
    bool large = rank < 0, empty = false;
    bytes = H5Tget_size(type);
    for (int i = 0; i < rank; i++) {
        if (shape[i] == 0) empty = true;
        if (shape[i] > INT64_MAX) large = true;
        if (shape[i] > 0 && __builtin_mul_overflow(bytes, shape[i], &bytes)) bytes = UINT64_MAX;
    }
    H5Tclose(type);
    H5Sclose(space);
    return large || (!empty && bytes / MAX_RATIO > file_bytes);
}

const char *sida_h5_refuse_dataset(hid_t dataset, uint64_t file_bytes) {
    const char *reason = NULL;
    hid_t list = H5Dget_create_plist(dataset);
    if (list < 0) return "has no creation properties";
    int filters = H5Pget_nfilters(list);
    if (H5Pget_layout(list) == H5D_VIRTUAL || H5Pget_external_count(list) != 0)
        reason = "keeps its values in other files";
    for (int i = 0; !reason && i < filters; i++) {
        unsigned flags, config;
        size_t values = 0;
        H5Z_filter_t filter =
            H5Pget_filter2(list, (unsigned)i, &flags, &values, NULL, 0, NULL, &config);
        if (filter != H5Z_FILTER_DEFLATE && filter != H5Z_FILTER_SHUFFLE &&
            filter != H5Z_FILTER_FLETCHER32)
            reason = "uses a filter other than deflate, shuffle and fletcher32";
    }
    H5Pclose(list);
    if (!reason && is_too_large(dataset, file_bytes))
        reason = "claims far more values than the file can hold";
    return reason;
}

/* Reads a dataset in blocks of rows, as itself. */
static bool read_all(hid_t dataset) {
    hsize_t shape[H5S_MAX_RANK], start[H5S_MAX_RANK] = {0}, count[H5S_MAX_RANK];
    bool sound = false;
    void *data = NULL;
    hid_t space = H5Dget_space(dataset), type = H5Dget_type(dataset), memory = H5I_INVALID_HID;
    H5T_class_t class = H5Tget_class(type);
    int rank = H5Sget_simple_extent_ndims(space);
    size_t size = H5Tget_size(type), row = size;
    /* Other classes are never read by us. */
    if (class != H5T_INTEGER && class != H5T_FLOAT) sound = rank >= 0;
    if ((class != H5T_INTEGER && class != H5T_FLOAT) || rank < 1 || size == 0 || size > 16)
        goto out;
    if (H5Sget_simple_extent_dims(space, shape, NULL) < 0) goto out;
    for (int i = 1; i < rank; i++) {
        if (shape[i] == 0) sound = true;
        if (shape[i] == 0 || __builtin_mul_overflow(row, shape[i], &row)) goto out;
        count[i] = shape[i];
    }
    hsize_t block = row >= BLOCK_BYTES ? 1 : BLOCK_BYTES / row;
    if (row > ((size_t)1 << 30) || !(data = malloc((size_t)block * row))) goto out;
    for (hsize_t at = 0; at < shape[0]; at += block) {
        start[0] = at;
        count[0] = shape[0] - at < block ? shape[0] - at : block;
        if (memory >= 0) H5Sclose(memory);
        memory = H5Screate_simple(rank, count, NULL);
        if (memory < 0 ||
            H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, count, NULL) < 0 ||
            H5Dread(dataset, type, memory, space, H5P_DEFAULT, data) < 0)
            goto out;
    }
    sound = true;
out:
    free(data);
    if (memory >= 0) H5Sclose(memory);
    H5Tclose(type);
    H5Sclose(space);
    return sound;
}

typedef struct child_walk {
    uint64_t file_bytes;
    int datasets;
    int words; /* a pipe for the reason, where there is one to tell */
} child_walk;

/* Follows hard links only; H5Ovisit would follow the same. */
static herr_t visit_object(hid_t root, const char *name, const H5O_info_t *info, void *context) {
    child_walk *walk = context;
    if (info->type != H5O_TYPE_DATASET) return 0;
    if (++walk->datasets > MAX_DATASETS) return -1;
    hid_t dataset = H5Dopen2(root, name, H5P_DEFAULT);
    if (dataset < 0) return -1;
    const char *reason = sida_h5_refuse_dataset(dataset, walk->file_bytes);
    if (!reason && !read_all(dataset)) reason = "cannot be read";
    if (reason) dprintf(walk->words, "dataset %.80s %s", name, reason);
    H5Dclose(dataset);
    return reason ? -1 : 0;
}

static herr_t visit_link(hid_t group, const char *name, const H5L_info_t *info, void *context) {
    (void)group, (void)name, (void)context;
    return info->type == H5L_TYPE_HARD || info->type == H5L_TYPE_SOFT ? 0 : -1;
}

static herr_t visit_attribute(hid_t root, const char *name, const H5A_info_t *info, void *context) {
    (void)context;
    char data[4096];
    hid_t attribute = H5Aopen(root, name, H5P_DEFAULT);
    if (attribute < 0) return -1;
    hid_t type = H5Aget_type(attribute);
    herr_t result = type < 0 ? -1 : 0;
    if (result == 0 && H5Tget_class(type) == H5T_STRING && H5Tis_variable_str(type) > 0) {
        char *text = NULL;
        hid_t space = H5Aget_space(attribute);
        if (H5Sget_simple_extent_npoints(space) == 1) {
            result = H5Aread(attribute, type, &text);
            H5free_memory(text);
        }
        H5Sclose(space);
    } else if (result == 0 && info->data_size <= sizeof data && H5Tget_class(type) != H5T_VLEN &&
               H5Tget_class(type) != H5T_COMPOUND) {
        result = H5Aread(attribute, type, data);
    }
    H5Tclose(type);
    H5Aclose(attribute);
    return result;
}

static bool walk_file(const char *path, uint64_t file_bytes, int words) {
    child_walk walk = {file_bytes, 0, words};
    hsize_t at = 0;
    hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    return file >= 0 && H5Lvisit(file, H5_INDEX_NAME, H5_ITER_INC, visit_link, NULL) >= 0 &&
           H5Ovisit(file, H5_INDEX_NAME, H5_ITER_INC, visit_object, &walk) >= 0 &&
           H5Aiterate2(file, H5_INDEX_NAME, H5_ITER_INC, &at, visit_attribute, NULL) >= 0 &&
           H5Fclose(file) >= 0;
}

/* The child: quiet, bounded, and gone by signal or exit code. */
__attribute__((noreturn)) static void child_main(const char *path, uint64_t file_bytes, int words) {
    const int quiet[] = {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL, SIGALRM, SIGTERM, SIGINT};
    for (size_t i = 0; i < sizeof quiet / sizeof *quiet; i++) signal(quiet[i], SIG_DFL);
    int null = open("/dev/null", O_RDWR);
    if (null >= 0) {
        dup2(null, STDOUT_FILENO);
        dup2(null, STDERR_FILENO);
    }
    struct rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);
    /* What is mapped now (much, under a sanitizer) and some more. */
    unsigned long long pages = 0;
    FILE *statm = fopen("/proc/self/statm", "re");
    if (statm && fscanf(statm, "%llu", &pages) == 1) {
        rlim_t bytes = (rlim_t)pages * (rlim_t)sysconf(_SC_PAGESIZE) + CHILD_BYTES;
        setrlimit(RLIMIT_AS, &(struct rlimit){bytes, bytes});
    }
    if (statm) fclose(statm);
    alarm(CHILD_SECONDS);
    _exit(walk_file(path, file_bytes, words) ? 0 : 1);
}

/* What a child had to say before it ended: plain text, whatever it wrote. */
static void read_reason(char *text, size_t size, int from) {
    size_t used = 0;
    ssize_t got;
    while (used + 1 < size &&
           ((got = read(from, text + used, size - 1 - used)) > 0 || (got < 0 && errno == EINTR)))
        if (got > 0) used += (size_t)got;
    text[used] = '\0';
    for (size_t i = 0; i < used; i++)
        if (text[i] < ' ' || text[i] > '~') text[i] = '?';
}

sida_status sida_h5_try_foreign(const char *path, uint64_t file_bytes) {
    int code = 0, words[2];
    char reason[192] = "";
    if (pipe2(words, O_CLOEXEC) != 0)
        return sida_fail(SIDA_ERROR_IO, "%s: no pipe to try it with: %s", path, strerror(errno));
    pid_t child = fork();
    int error = errno;
    if (child == 0) {
        close(words[0]);
        child_main(path, file_bytes, words[1]);
    }
    close(words[1]);
    if (child > 0) read_reason(reason, sizeof reason, words[0]);
    close(words[0]);
    if (child < 0)
        return sida_fail(SIDA_ERROR_IO, "%s: no process to try it in: %s", path, strerror(error));
    pid_t got;
    do got = waitpid(child, &code, 0);
    while (got < 0 && errno == EINTR);
    if (got == child && WIFEXITED(code) && WEXITSTATUS(code) == 0) return SIDA_OK;
    if (got == child && WIFSIGNALED(code))
        return sida_fail(SIDA_ERROR_FORMAT,
                         "%s: not written by sida, and HDF5 died reading it (signal %d)", path,
                         WTERMSIG(code));
    return sida_fail(SIDA_ERROR_FORMAT, "%s: not written by sida, and %s", path,
                     reason[0] ? reason : "no sound HDF5 file without outside links");
}
