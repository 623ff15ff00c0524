/* What the files of sida bench share: cmd_bench.c has the options and the order of things,
 * bench_run.c the batches, bench_report.c what is printed. */
#ifndef SIDA_TOOLS_CLI_BENCH_H
#define SIDA_TOOLS_CLI_BENCH_H

#include "runtime/engine/budget.h"
#include "runtime/engine/pass.h"
#include "runtime/model/synthetic.h"
#include "tools/cli/bench_record.h"
#include "tools/cli/bench_source.h"

#include <jansson.h>

/* Batches behind those that count, which run and do not: what is loaded ahead for them stands for
 * what was loaded ahead of the first that counts. */
enum { SIDA_BENCH_LENGTHS = 16, SIDA_BENCH_TAIL = 4 };

typedef struct sida_bench_options {
    const char *model, *synthetic, *dtype, *lengths, *budget, *policy, *prefetch, *recall, *device;
    int32_t batch, runs, warmup, queue;
    bool digest, json;
} sida_bench_options;

typedef enum sida_bench_prefetch {
    SIDA_BENCH_NONE,
    SIDA_BENCH_ORACLE,
    SIDA_BENCH_RECALL
} sida_bench_prefetch;

typedef struct sida_bench {
    const sida_bench_options *options;
    sida_synthetic_options synthetic;
    sida_budget budget;
    const sida_policy *policy;
    bool resident_wanted;
    sida_bench_prefetch prefetch;
    sida_bench_recall recall; /* of the tables; places 0 for an oracle */
    int32_t lengths[SIDA_BENCH_LENGTHS], length_count;
    sida_backend *backend;
    sida_device_info device;
    sida_model *model;
    const sida_model_info *info;
    sida_resident *resident;
    double memory_rate, link_rate, load_seconds; /* bytes a second */
    /* Of the length in hand. */
    sida_run_limits limits;
    sida_run *run;
    sida_bench_record *record;
    sida_bench_recall measured;
    double *samples_ms; /* [runs] */
    int32_t slots;      /* 0: all resident */
    size_t cap_bytes;
    sida_pass_stats stats;
    sida_store_stats before, after; /* of the batches that count */
    int64_t belady_bytes;           /* of the same batches; see sida_bench_belady() */
    sida_fingerprint digest;
    int32_t handed_out, finished; /* batches of a pass */
    double last;                  /* when its last batch was finished */
} sida_bench;

/* Records the routing of all batches, then times those that count; stats and digest are of all. */
sida_status sida_bench_run_resident(sida_bench *bench);
sida_status sida_bench_run_budget(sida_bench *bench);

/* What is known of a length, into `rows`. */
sida_status sida_bench_report(sida_bench *bench, json_t *rows);
/* Prints the rows; whole: they and what was given and measured once, as one JSON object. */
void sida_bench_print(const sida_bench *bench, const json_t *rows);
json_t *sida_bench_whole(const sida_bench *bench, json_t *rows);

#endif
