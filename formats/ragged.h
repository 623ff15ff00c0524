/* Token sequences end to end, without padding: the layout of traces, batches and hash tables. */
#ifndef SIDA_FORMATS_RAGGED_H
#define SIDA_FORMATS_RAGGED_H

#include <stdint.h>

/* Sequence s holds ids[offsets[s]] … ids[offsets[s + 1] - 1]. Borrowed pointers. */
typedef struct sida_ragged {
    int32_t sequences;      /* S */
    const int64_t *offsets; /* [S + 1], offsets[0] = 0 */
    const int32_t *ids;     /* [offsets[S]] */
} sida_ragged;

static inline int64_t sida_ragged_tokens(const sida_ragged *batch) {
    return batch->offsets[batch->sequences];
}

#endif
