#include "tracer/parts.h"

#include "formats/base/file.h"
#include "formats/base/memory.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

sida_status sida_parts_name(char **out, const sida_parts *parts, int32_t index) {
    return sida_strprintf(out, "%s/part-%06d.h5", parts->folder, index);
}

void sida_parts_free(sida_parts *parts) {
    free(parts->folder);
    parts->folder = NULL;
}

static sida_status compare_fingerprint(const char *path, const char *what, sida_fingerprint found,
                                       sida_fingerprint expected) {
    char a[SIDA_FINGERPRINT_TEXT], b[SIDA_FINGERPRINT_TEXT];
    if (sida_fingerprint_equal(found, expected)) return SIDA_OK;
    sida_fingerprint_format(a, found);
    sida_fingerprint_format(b, expected);
    return sida_fail(SIDA_ERROR_MISMATCH,
                     "%s: made with another %s (%s, now %s); cannot resume: run without --resume "
                     "after removing it",
                     path, what, a, b);
}

sida_status sida_parts_compare(const sida_trace_info *found, const char *path,
                               const sida_trace_info *expected) {
    sida_status status = SIDA_OK;
    SIDA_TRY(compare_fingerprint(path, "model", found->model, expected->model));
    SIDA_TRY(compare_fingerprint(path, "tokenizer", found->tokenizer, expected->tokenizer));
    SIDA_TRY(compare_fingerprint(path, "input", found->input, expected->input));
    if (strcmp(found->options, expected->options) != 0)
        SIDA_FAIL(SIDA_ERROR_MISMATCH,
                  "%s: made with other options (%s, now %s); cannot resume: run without --resume "
                  "after removing it",
                  path, found->options, expected->options);
out:
    return status;
}

sida_status sida_parts_find(sida_parts *out, const char *output, const sida_trace_info *expected) {
    sida_status status = SIDA_OK;
    char *name = NULL;
    sida_trace *part = NULL;
    *out = (sida_parts){0};
    SIDA_TRY(sida_strprintf(&out->folder, "%s.parts", output));
    for (;; out->count++) {
        SIDA_TRY(sida_parts_name(&name, out, out->count));
        if (!sida_file_exists(name)) break;
        SIDA_TRY(sida_trace_open(&part, name));
        const sida_trace_info *info = sida_trace_get_info(part);
        SIDA_TRY(sida_parts_compare(info, name, expected));
        out->sequences += info->sequences;
        out->tokens[0] += info->tokens[0];
        out->tokens[1] += info->tokens[1];
        out->has_targets = info->has_targets;
        sida_trace_close(part);
        part = NULL;
        free(name);
        name = NULL;
    }
out:
    sida_trace_close(part);
    free(name);
    return status;
}

sida_status sida_parts_create_folder(const sida_parts *parts) {
    if (mkdir(parts->folder, 0777) == 0 || errno == EEXIST) return SIDA_OK;
    return sida_fail(SIDA_ERROR_IO, "%s: cannot create the folder: %s", parts->folder,
                     strerror(errno));
}

sida_status sida_parts_remove(const sida_parts *parts) {
    DIR *folder = opendir(parts->folder);
    if (!folder) return SIDA_OK;
    /* From the last to the first would not matter: the trace is complete when this runs. Only
     * files of ours go. */
    struct dirent *entry;
    while ((entry = readdir(folder)))
        if (strncmp(entry->d_name, "part-", 5) == 0) unlinkat(dirfd(folder), entry->d_name, 0);
    closedir(folder);
    if (rmdir(parts->folder) != 0 && errno != ENOENT)
        return sida_fail(SIDA_ERROR_IO,
                         "%s: the trace is complete, but its parts cannot be "
                         "removed: %s",
                         parts->folder, strerror(errno));
    return SIDA_OK;
}
