/* When the device worked and on what, from CUPTI's activity records: kernels, copies and memsets,
 * those of graphs too, with the times they began and ended, without making them wait for each
 * other. For the benchmarks' programs; one a process. */
#ifndef SIDA_TOOLS_BENCH_TIMELINE_H
#define SIDA_TOOLS_BENCH_TIMELINE_H

#include "formats/base/status.h"

#include <stdint.h>

/* Before the device is used. UNSUPPORTED: built without CUPTI; DEVICE: none at run time. */
sida_status bench_timeline_open(void);
/* What is looked at: all that begins or ends between the two, cut to it. */
sida_status bench_timeline_begin(void);
sida_status bench_timeline_end(void);
/* Prints a JSON object, of the `steps` that ran in the window: its length, for how long the device
 * did anything, and by name how often and how long. Before what made the kernels is destroyed. */
sida_status bench_timeline_print(int32_t steps);

#endif
