/* Files: mapped for reading, and written so that a final name only ever holds a complete file. */
#ifndef SIDA_FORMATS_BASE_FILE_H
#define SIDA_FORMATS_BASE_FILE_H

#include "formats/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A whole regular file, mapped read-only. `data` is never NULL (an empty file maps to ""). */
typedef struct sida_mapped_file {
    const uint8_t *data;
    size_t size;
} sida_mapped_file;

/* Errors: IO (missing, unreadable, a directory). */
sida_status sida_file_map(sida_mapped_file *out, const char *path);
void sida_file_unmap(sida_mapped_file *file);
/* The process's pages of it go; what is read again comes back from the system's cache, or the disk.
 */
void sida_file_forget(const sida_mapped_file *file);

/* The bytes of a small file with a NUL behind them; IO when larger than limit_bytes. free(). */
sida_status sida_file_read(char **out, size_t *size, const char *path, size_t limit_bytes);

bool sida_file_exists(const char *path);

/* "PATH.tmp": where a file is written until it is complete. Free with free(). */
sida_status sida_file_temporary_name(char **out, const char *path);

/* fsync(temporary), rename to path, fsync of the folder. On failure the temporary is removed. */
sida_status sida_file_commit(const char *temporary, const char *path);

/* Fails early, before hours of work, when `path` could not be written: its folder is missing or not
 * writable, or the name is taken by a folder. Creates nothing. */
sida_status sida_file_check_writable(const char *path);

/* path with "/" and name behind it. free(). */
sida_status sida_path_join(char **out, const char *folder, const char *name);

#endif
