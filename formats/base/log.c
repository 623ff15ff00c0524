#include "formats/base/log.h"

#include <stdarg.h>
#include <stdio.h>

static sida_log_sink current_sink;
static void *current_context;

void sida_log_set_sink(sida_log_sink sink, void *context) {
    current_sink = sink;
    current_context = context;
}

void sida_log(sida_log_level level, const char *format, ...) {
    if (!current_sink) return;
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    current_sink(current_context, level, line);
}
