/* Where the library's notes go. The library itself never prints: without a sink they are dropped.
 */
#ifndef SIDA_FORMATS_BASE_LOG_H
#define SIDA_FORMATS_BASE_LOG_H

typedef enum sida_log_level { SIDA_LOG_DEBUG, SIDA_LOG_INFO, SIDA_LOG_WARNING } sida_log_level;

typedef void (*sida_log_sink)(void *context, sida_log_level level, const char *line);

/* Sets the process's sink; NULL drops everything. Call before threads start. */
void sida_log_set_sink(sida_log_sink sink, void *context);

void sida_log(sida_log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
