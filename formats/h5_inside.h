/* Inside formats/: what the parts of h5 share. Everything that calls libhdf5 runs under
 * sida_h5_lock(). */
#ifndef SIDA_FORMATS_H5_INSIDE_H
#define SIDA_FORMATS_H5_INSIDE_H

#include "formats/h5.h"

#define SIDA_H5_MAX_RANK 3

/* A dataset that is appended to, or one that is being read. */
typedef struct sida_h5_dataset {
    char *path;
    sida_h5_type type;
    int rank;
    hsize_t shape[SIDA_H5_MAX_RANK]; /* writing: [0] = rows on disk */
    hid_t id;                        /* negative: not created yet */
    size_t row_bytes, chunk_rows;
    uint8_t *pending; /* rows that are not on disk */
    size_t pending_rows, capacity;
} sida_h5_dataset;

struct sida_h5_file {
    char *path, *temporary;
    hid_t id;
    sida_h5_kind kind;
    bool writing;
    sida_status failed; /* a write failed: commit refuses */
    uint64_t bytes;     /* reading: of the whole file */
    sida_h5_dataset **datasets;
    size_t count, capacity;
};

/* Fails with `what` and the innermost reason of HDF5's error stack. */
sida_status sida_h5_fail(sida_status code, const sida_h5_file *file, const char *what,
                         const char *name);

/* Writes the rows that are still pending: called once, before a commit. */
sida_status sida_h5_finish_datasets(sida_h5_file *file);
void sida_h5_free_datasets(sida_h5_file *file);

/* Opens and reads all of a foreign file in a child process; FORMAT when that fails or dies. */
sida_status sida_h5_try_foreign(const char *path, uint64_t file_bytes);

/* Why a dataset is not read: its values lie in other files, it needs filters beyond HDF5's own, or
 * it claims more values than its file can plausibly hold. NULL: fine. */
const char *sida_h5_refuse_dataset(hid_t dataset, uint64_t file_bytes);

#endif
