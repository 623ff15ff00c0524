/* Span corruption (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4): spans are cut out of a
 * text, and the target says what was in them. */
#ifndef SIDA_DATA_SPANS_H
#define SIDA_DATA_SPANS_H

#include "formats/base/rng.h"
#include "formats/base/status.h"

#include <stddef.h>
#include <stdint.h>

enum { SIDA_SPANS_SENTINELS = 100 };

/* 15 % of `count` >= 2 tokens (one at least) in spans of 3 on average, at least a token apart;
 * where they lie and how long they are is drawn from `rng` alone, every division as likely. In
 * `input` [count] span i is the one id first_sentinel - i; `target` [count + 1] has each sentinel
 * with the tokens cut out, and one more sentinel at the end. Neither gets </s>. MEMORY. */
sida_status sida_spans_corrupt(int32_t *input, size_t *input_count, int32_t *target,
                               size_t *target_count, const int32_t *ids, size_t count,
                               int32_t first_sentinel, sida_rng *rng);

#endif
