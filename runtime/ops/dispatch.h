/* From chosen experts to the rows that each expert computes. */
#ifndef SIDA_RUNTIME_OPS_DISPATCH_H
#define SIDA_RUNTIME_OPS_DISPATCH_H

#include "runtime/backend/backend.h"

#include <stdint.h>

/* Capacity (Fedus et al. 2022, as Hugging Face enforces it): in each sequence, in token order, a
 * choice of an expert that has taken `capacity` tokens already is dropped. k must be 1 when a
 * capacity is set. A row is token * k + rank; rows that are not dropped are grouped by expert, and
 * rise within an expert: expert e's are rows[row_start[e]] … rows[row_start[e + 1] - 1]. */
typedef struct sida_dispatch_call {
    uint8_t *dropped;       /* [n] out: 1 where the token's choice is dropped, else 0 */
    int32_t *rows;          /* [n * k] out; what lies behind row_start[E] is not written */
    int64_t *row_start;     /* [E + 1] out */
    int32_t *busy;          /* [E] out: the experts that have rows, ascending */
    int32_t *busy_count;    /* [1] out */
    const int32_t *experts; /* [n, k] of 0 … E - 1, distinct within a token */
    const int64_t *offsets; /* [sequences + 1] tokens: from 0 to n */
    int64_t n;
    int32_t k, sequences, experts_total;
    int32_t capacity; /* 0: no limit */
} sida_dispatch_call;

typedef sida_status sida_dispatch_fn(sida_stream *stream, const sida_dispatch_call *call);
sida_dispatch_fn sida_dispatch_cpu;

#endif
