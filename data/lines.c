#include "data/lines.h"

#include "formats/base/memory.h"
#include "formats/base/text.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

enum { BLOCK_BYTES = 1 << 16 };

struct sida_lines {
    char *path;
    gzFile gz;
    int64_t total_bytes, number;
    size_t used, filled; /* within block */
    bool ended;
    char *line;
    size_t capacity;
    char block[BLOCK_BYTES];
};

sida_status sida_lines_open(sida_lines **out, const char *path) {
    sida_status status = SIDA_OK;
    sida_lines *lines = NULL;
    struct stat info;
    *out = NULL;
    /* O_NONBLOCK: a FIFO must be refused below, not waited for. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) SIDA_FAIL(SIDA_ERROR_IO, "%s: %s", path, strerror(errno));
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode))
        SIDA_FAIL(SIDA_ERROR_IO, "%s: not a regular file", path);
    SIDA_TRY(SIDA_ALLOC(&lines, 1, path));
    lines->total_bytes = info.st_size;
    SIDA_TRY(sida_strdup(&lines->path, path));
    lines->gz = gzdopen(fd, "rb");
    if (!lines->gz) SIDA_FAIL(SIDA_ERROR_MEMORY, "%s: out of memory opening it", path);
    fd = -1;
    *out = lines;
    lines = NULL;
out:
    if (fd >= 0) close(fd);
    sida_lines_close(lines);
    return status;
}

void sida_lines_close(sida_lines *lines) {
    if (!lines) return;
    if (lines->gz) gzclose_r(lines->gz);
    free(lines->line);
    free(lines->path);
    free(lines);
}

/* Reads the next block; at the end of the file sets `ended`. */
static sida_status fill(sida_lines *lines) {
    lines->used = lines->filled = 0;
    errno = 0;
    int got = gzread(lines->gz, lines->block, BLOCK_BYTES);
    int code = Z_OK;
    const char *reason = gzerror(lines->gz, &code);
    /* A stream that ends early is only told after its last bytes were handed out. */
    if (got > 0 && code == Z_BUF_ERROR) code = Z_OK;
    if (got < 0 || (code != Z_OK && code != Z_STREAM_END)) {
        if (code == Z_ERRNO) reason = strerror(errno);
        if (code == Z_BUF_ERROR) reason = "the gzip stream ends early";
        return sida_fail(SIDA_ERROR_IO, "%s:%lld: cannot be read: %s", lines->path,
                         (long long)lines->number + 1, reason);
    }
    lines->filled = (size_t)got;
    lines->ended = got == 0;
    return SIDA_OK;
}

sida_status sida_lines_next(sida_lines *lines, char **line, size_t *bytes) {
    sida_status status = SIDA_OK;
    size_t length = 0;
    bool complete = false;
    *line = NULL;
    *bytes = 0;
    while (!complete) {
        if (lines->used == lines->filled) {
            if (!lines->ended) SIDA_TRY(fill(lines));
            if (lines->ended) break;
        }
        const char *begin = lines->block + lines->used;
        size_t left = lines->filled - lines->used;
        const char *newline = memchr(begin, '\n', left);
        size_t take = newline ? (size_t)(newline - begin) : left;
        if (length + take > SIDA_LINE_MAX_BYTES)
            SIDA_FAIL(SIDA_ERROR_FORMAT, "%s:%lld: a line of more than %zu bytes", lines->path,
                      (long long)lines->number + 1, SIDA_LINE_MAX_BYTES);
        SIDA_TRY(SIDA_GROW(&lines->line, &lines->capacity, length + take + 1, lines->path));
        memcpy(lines->line + length, begin, take);
        length += take;
        lines->used += take + (newline != NULL);
        complete = newline != NULL;
    }
    if (!complete && length == 0) return SIDA_OK; /* the end */
    lines->number++;
    if (length > 0 && lines->line[length - 1] == '\r') length--;
    lines->line[length] = 0;
    char *text = lines->line;
    if (lines->number == 1 && length >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0) {
        text += 3;
        length -= 3;
    }
    if (length == 0)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s:%lld: an empty line", lines->path,
                  (long long)lines->number);
    if (!sida_text_is_utf8(text, length))
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s:%lld: not UTF-8, or a NUL byte", lines->path,
                  (long long)lines->number);
    *line = text;
    *bytes = length;
out:
    return status;
}

const char *sida_lines_path(const sida_lines *lines) {
    return lines->path;
}

int64_t sida_lines_number(const sida_lines *lines) {
    return lines->number;
}

void sida_lines_progress(const sida_lines *lines, int64_t *done_bytes, int64_t *total_bytes) {
    z_off_t offset = lines->ended ? lines->total_bytes : gzoffset(lines->gz);
    *total_bytes = lines->total_bytes;
    *done_bytes = offset < 0 ? 0 : offset;
}
