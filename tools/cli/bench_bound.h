/* The least that any schedule of loads can move: what the store's traffic is held against. */
#ifndef SIDA_TOOLS_CLI_BENCH_BOUND_H
#define SIDA_TOOLS_CLI_BENCH_BOUND_H

#include "formats/base/status.h"

#include <stdint.h>

/* Step i computes with the distinct experts[start[i]] … experts[start[i + 1] - 1], in any order;
 * each must be in one of `slots` slots when its turn comes, and only then. So a step may need more
 * experts than there are slots (waves).
 *
 * loads: [steps], from empty slots: what is resident is computed with first, what is missing is
 * loaded, and of both those stay whose next use is nearest (Belady, IBM Systems Journal 5, 1966).
 * Loading earlier saves nothing. No schedule has a smaller sum: what is missing may pass through
 * without a slot here. The least sum of real schedules lies between this one and that for one slot
 * less, which the passing experts then have. MEMORY. */
sida_status sida_bench_least_loads(int64_t *loads, const int64_t *start, const int32_t *experts,
                                   int32_t steps, int32_t experts_total, int32_t slots);

#endif
