/* Inside runtime/predictor: a table of counts, and its file. */
#ifndef SIDA_RUNTIME_PREDICTOR_TABLE_PRIVATE_H
#define SIDA_RUNTIME_PREDICTOR_TABLE_PRIVATE_H

#include "runtime/predictor/sources.h"

enum { SIDA_TABLE_ORDERS = SIDA_TABLE_BIGRAM + 1 };

/* The contexts of one order on one side. Row r has for layer l the entries
 * starts[r * layers + l] … starts[r * layers + l + 1] - 1. */
typedef struct sida_table_level {
    int64_t count, entries;
    int64_t *keys;     /* [count] ascending: sida_table_key */
    int64_t *starts;   /* [count * layers + 1] */
    uint16_t *experts; /* [entries] ascending within a run */
    int32_t *counts;   /* [entries] > 0 */
} sida_table_level;

typedef struct sida_table_source {
    sida_hash_source base;
    sida_table_order order;
    int32_t vocabulary;
    sida_table_level levels[2][SIDA_TABLE_ORDERS]; /* [side][0 … order] */
} sida_table_source;

/* 0; the id; or the id before it plus 1, times 2^32, plus the id. before: -1 for none. */
int64_t sida_table_key(int order, int32_t before, int32_t id);
/* A source without contexts. */
sida_status sida_table_source_alloc(sida_table_source **out, sida_table_order order,
                                    const sida_source_shape *shape, sida_fingerprint model,
                                    sida_fingerprint tokenizer);
/* Sets info.bytes. */
void sida_table_source_measure(sida_table_source *source);

#endif
