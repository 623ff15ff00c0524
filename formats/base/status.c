#include "formats/base/status.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char last_message[1024];

/* Messages are one line: control characters of a hostile file must not reach a terminal. */
static void fold_controls(char *text) {
    for (; *text; text++)
        if ((unsigned char)*text < 0x20 || *text == 0x7f) *text = ' ';
}

sida_status sida_fail(sida_status code, const char *format, ...) {
    assert(code != SIDA_OK);
    char message[sizeof last_message]; /* the arguments may point into last_message */
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    fold_controls(message);
    memcpy(last_message, message, sizeof message);
    return code;
}

sida_status sida_fail_context(sida_status code, const char *format, ...) {
    assert(code != SIDA_OK);
    char context[sizeof last_message];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(context, sizeof context, format, arguments);
    va_end(arguments);
    return sida_fail(code, "%s: %s", context, last_message);
}

const char *sida_last_message(void) {
    return last_message;
}

const char *sida_status_name(sida_status code) {
    switch (code) {
    case SIDA_OK:
        return "ok";
    case SIDA_ERROR_ARGUMENT:
        return "argument";
    case SIDA_ERROR_MEMORY:
        return "memory";
    case SIDA_ERROR_IO:
        return "io";
    case SIDA_ERROR_FORMAT:
        return "format";
    case SIDA_ERROR_MISMATCH:
        return "mismatch";
    case SIDA_ERROR_BUDGET:
        return "budget";
    case SIDA_ERROR_DEVICE:
        return "device";
    case SIDA_ERROR_CANCELLED:
        return "cancelled";
    case SIDA_ERROR_UNSUPPORTED:
        return "unsupported";
    }
    return "unknown";
}
