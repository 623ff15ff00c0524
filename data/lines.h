/* Lines of a plain or gzip file, with their numbers. */
#ifndef SIDA_DATA_LINES_H
#define SIDA_DATA_LINES_H

#include "formats/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SIDA_LINE_MAX_BYTES ((size_t)16 << 20)

typedef struct sida_lines sida_lines;

sida_status sida_lines_open(sida_lines **out, const char *path);
void sida_lines_close(sida_lines *lines);

/* The next line without its "\n" or "\r\n", and without a byte order mark in front of the first;
 * *line = NULL at the end. Borrowed until the next call; the caller may write to it. Errors:
 * FORMAT (empty, not UTF-8, too long; FILE:LINE), IO (unreadable, a truncated or damaged gzip). */
sida_status sida_lines_next(sida_lines *lines, char **line, size_t *bytes);

const char *sida_lines_path(const sida_lines *lines);
/* 1-based number of the line last returned. */
int64_t sida_lines_number(const sida_lines *lines);
/* Bytes of the packed file that were read, and all. */
void sida_lines_progress(const sida_lines *lines, int64_t *done_bytes, int64_t *total_bytes);

#endif
