/* HDF5 files of ours: complete or absent, with a checksum that is verified before HDF5 sees them.
 *
 * The file starts with a user block of 512 bytes: "SIDA\r\n\x1a\n", u32 version 1, u32 kind,
 * u64 bytes after the block, the XXH3-128 of those bytes and then of the 24 bytes before it, zeros.
 * HDF5 tools skip it. libhdf5 1.10 can crash on damaged input, so a file without our block
 * (foreign) is first opened and walked in a child process. All calls into libhdf5 happen under one
 * process-wide lock (sida_h5_lock()); a file is one thread's at a time. Rows that are gathered in
 * memory, checksums and fsync need no lock: one thread fills a file while another commits one. */
#ifndef SIDA_FORMATS_H5_H
#define SIDA_FORMATS_H5_H

#include "formats/base/status.h"
#include "formats/dtype.h"

#include <hdf5.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum sida_h5_kind {
    SIDA_H5_TRACE = 1,
    SIDA_H5_PART = 2,
    SIDA_H5_PREDICTOR = 3,
    SIDA_H5_CHECKPOINT = 4 /* a trainer's state */
} sida_h5_kind;

void sida_h5_lock(void);
void sida_h5_unlock(void);

/* --- reading. Verifies the checksum, then opens. kind_mask: bits 1 << kind that are accepted;
 * foreign: accept a file that begins as HDF5 does after a walk in a child process (kind unknown =
 * 0). */
typedef struct sida_h5_file sida_h5_file;
sida_status sida_h5_open(sida_h5_file **out, const char *path, unsigned kind_mask, bool foreign);
void sida_h5_close(sida_h5_file *file);
sida_h5_kind sida_h5_file_kind(const sida_h5_file *file);
const char *sida_h5_path(const sida_h5_file *file);

/* --- writing. Creates "PATH.tmp"; commit() closes it, writes the user block with the checksum,
 * fsyncs and renames. abandon() removes the temporary. Object times are off: same calls, same
 * bytes. */
sida_status sida_h5_create(sida_h5_file **out, const char *path, sida_h5_kind kind);
sida_status sida_h5_commit(sida_h5_file *file); /* frees `file`, also on error */
void sida_h5_abandon(sida_h5_file *file);       /* frees `file`; takes NULL */

/* --- contents, for both. Element types: */
typedef enum sida_h5_type {
    SIDA_H5_U8,
    SIDA_H5_U16,
    SIDA_H5_I32,
    SIDA_H5_I64,
    SIDA_H5_F32,
    SIDA_H5_F16 /* memory: uint16_t bits */
} sida_h5_type;
size_t sida_h5_type_bytes(sida_h5_type type);

/* Paths may contain groups ("encoder/tokens"), made on demand. rank 1..3. A dataset is written by
 * one call of write() or by any number of append(). */
sida_status sida_h5_write(sida_h5_file *file, const char *path, sida_h5_type type, int rank,
                          const int64_t *shape, const void *data);
/* An extendible dataset along its first axis: row_shape has the other rank - 1 extents (NULL for
 * rank 1). Rows are gathered in memory; a dataset that ends below 32 MiB is written whole and
 * without chunks, a longer one streams in chunks of 1 MiB, so at most 64 MiB a dataset are held. A
 * failed write makes commit() fail. */
sida_status sida_h5_append(sida_h5_file *file, const char *path, sida_h5_type type, int rank,
                           const int64_t *row_shape, int64_t rows, const void *data);
/* Attributes on the root group. */
sida_status sida_h5_set_text(sida_h5_file *file, const char *name, const char *value);
sida_status sida_h5_set_i64(sida_h5_file *file, const char *name, int64_t value);

bool sida_h5_exists(sida_h5_file *file, const char *path);
/* rank and shape of a dataset; FORMAT when it is missing, of a type that does not convert
 * losslessly to `type`, or of another rank. */
sida_status sida_h5_shape(sida_h5_file *file, const char *path, sida_h5_type type, int rank,
                          int64_t *shape);
/* Rows [first, first + rows) of the first axis into data. */
sida_status sida_h5_read_rows(sida_h5_file *file, const char *path, sida_h5_type type,
                              int64_t first, int64_t rows, void *data);
sida_status sida_h5_get_text(sida_h5_file *file, const char *name, char **value); /* free() */
sida_status sida_h5_get_i64(sida_h5_file *file, const char *name, int64_t *value);
/* Paths of all datasets, sorted; free each and the array. */
sida_status sida_h5_list(sida_h5_file *file, char ***paths, size_t *count);

/* "1.10.8": of the HDF5 library that is loaded. text: [size]. */
void sida_h5_library_version(char *text, size_t size);

#endif
