/* Status codes and the one-line message that goes with them.
 *
 * Every function that can fail returns a sida_status. The place that finds the fault calls
 * sida_fail() once with the file and the reason; callers hand the code on untouched, or put words
 * in front with sida_fail_context(). Asserts are for programmers' errors; status codes are for
 * files, networks and users. */
#ifndef SIDA_FORMATS_BASE_STATUS_H
#define SIDA_FORMATS_BASE_STATUS_H

/* runtime/sida.h declares the same codes for programs outside; whoever comes first does. */
#ifndef SIDA_STATUS_DECLARED
#define SIDA_STATUS_DECLARED
typedef enum sida_status {
    SIDA_OK = 0,
    SIDA_ERROR_ARGUMENT = -1,  /* an option or argument is outside its range */
    SIDA_ERROR_MEMORY = -2,    /* host memory ran out */
    SIDA_ERROR_IO = -3,        /* the operating system refused a read or a write */
    SIDA_ERROR_FORMAT = -4,    /* a file's contents are damaged, hostile or not of the kind */
    SIDA_ERROR_MISMATCH = -5,  /* two files are sound, but do not belong together */
    SIDA_ERROR_BUDGET = -6,    /* the device budget is too small */
    SIDA_ERROR_DEVICE = -7,    /* the device or its driver failed */
    SIDA_ERROR_CANCELLED = -8, /* stopped from outside, or by another thread's error */
    SIDA_ERROR_UNSUPPORTED = -9
} sida_status;
#endif

/* Records the message of the calling thread (one line, newlines folded to spaces, at most 1,023
 * bytes) and returns `code`. `code` must not be SIDA_OK. */
sida_status sida_fail(sida_status code, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Puts "words: " in front of the calling thread's message and returns `code`. */
sida_status sida_fail_context(sida_status code, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* The calling thread's last message; "" when there is none. Borrowed, valid until the next
 * sida_fail() of the same thread. */
const char *sida_last_message(void);

/* The name of a code: "format", "mismatch", ... */
const char *sida_status_name(sida_status code);

/* Runs `call`; when it fails, leaves the function through its `out:` label. Needs a local
 * `sida_status status`. */
#define SIDA_TRY(call)                                                                             \
    do {                                                                                           \
        status = (call);                                                                           \
        if (status != SIDA_OK) goto out;                                                           \
    } while (0)

/* Fails with a message and leaves through `out:`. */
#define SIDA_FAIL(code, ...)                                                                       \
    do {                                                                                           \
        status = sida_fail((code), __VA_ARGS__);                                                   \
        goto out;                                                                                  \
    } while (0)

#endif
