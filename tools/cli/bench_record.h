/* Which experts a model's routers chose for a benchmark's batches, recorded in a first pass. */
#ifndef SIDA_TOOLS_CLI_BENCH_RECORD_H
#define SIDA_TOOLS_CLI_BENCH_RECORD_H

#include "runtime/model/model.h"

/* A batch is one encoder pass over `input` and one decoder step of one token a sequence. */
typedef struct sida_bench_batch {
    sida_ragged input;
    int64_t *offsets;
    int32_t *ids;
    uint16_t *experts[2]; /* [tokens of the side, MoE layers of the side, k] */
} sida_bench_batch;

typedef struct sida_bench_record {
    const sida_model_info *info;
    sida_bench_batch *batches; /* [count] */
    int32_t count, sequences, length;
    int32_t current; /* the batch whose routing is being recorded */
    int64_t *chosen; /* [sites, E] tokens that chose an expert */
    /* Distinct experts computed with, by their global ids: of batch b and site s they are
     * needs[start[i]] … needs[start[i + 1] - 1], i = b * sites + s. */
    int64_t *start; /* [count * sites + 1] */
    int32_t *needs;
    size_t needs_capacity;
    uint8_t *seen; /* [E] */
} sida_bench_record;

/* `count` batches of `sequences` sequences of `length` ids, uniform in [3, 32000) and below the
 * vocabulary, from a fixed seed. */
sida_status sida_bench_record_create(sida_bench_record **out, const sida_model_info *info,
                                     int32_t count, int32_t sequences, int32_t length);
void sida_bench_record_destroy(sida_bench_record *record);

/* A driver's observe; the context is the record. */
sida_status sida_bench_record_observe(void *context, const sida_moe_call *call);

/* The share of tokens that the most popular expert of an encoder layer takes, mean over the
 * layers. */
double sida_bench_record_top_share(const sida_bench_record *record);
/* Distinct experts computed with, over all sites, mean over batches [first, end). */
double sida_bench_record_touched(const sida_bench_record *record, int32_t first, int32_t end);

/* Tokens of all sequences of a batch on a side. */
int64_t sida_bench_record_tokens(const sida_bench_record *record, int side);

#endif
