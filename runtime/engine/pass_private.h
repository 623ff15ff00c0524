/* Inside the engine: a pass's state. pass_tables.c tells the store what is coming, ahead on a
 * thread of its own and behind it on the calling one; pass.c runs the batches. */
#ifndef SIDA_RUNTIME_ENGINE_PASS_PRIVATE_H
#define SIDA_RUNTIME_ENGINE_PASS_PRIVATE_H

#include "formats/base/queue.h"
#include "runtime/engine/pass.h"

/* A batch on its way, with its tables. Recycled: nothing is allocated once all have been used. */
typedef struct sida_pass_item {
    sida_batch *batch;
    int64_t number; /* within the pass */
    sida_hash_state *state;
    sida_hash_table tables[2]; /* the decoder's: of its next step */
    sida_router_sets sets;     /* guided: of all that has been predicted so far */
} sida_pass_item;

/* Distinct experts of a table's layer; each thread that announces has one. */
typedef struct sida_pass_collector {
    int32_t *list; /* [experts] */
    uint8_t *left; /* [experts] that may be collected yet */
} sida_pass_collector;

typedef struct sida_pass {
    const sida_pass_options *options;
    const sida_model_info *info;
    sida_pass_stats *stats;
    sida_store *store;              /* NULL: all experts are resident */
    const sida_hash_source *source; /* NULL: nothing to predict */
    sida_queue *ready, *spare;      /* of sida_pass_item */
    sida_pass_item *items;          /* [item_count] */
    int32_t item_count;
    int32_t k; /* of the tables */
    /* The hash thread's. */
    int threads; /* for the source's work on the host */
    sida_pass_collector ahead;
    int64_t *first_offsets; /* the decoder's first step: one token a sequence */
    int32_t *first_ids;
    size_t first_offsets_capacity, first_ids_capacity;
    double hash_wait_seconds, hash_seconds;
    /* The inference thread's. */
    sida_pass_collector here;
    sida_pass_item *current;
    int64_t call;          /* 0: the encoder, 1 + t: decoder step t */
    sida_hasher **hashers; /* [hashers_count] one a sequence of the batch */
    size_t hashers_capacity, hashers_count;
    sida_hasher *digest;
    int32_t *ids, *counts, *global;
    size_t ids_capacity, counts_capacity;
    double *nll; /* [sequences] */
    size_t nll_capacity;
    bool refines;               /* the layers behind one that has chosen are predicted again */
    sida_hash_table refined[2]; /* what that said last, by side */
    double queue_wait_seconds, first_wait_seconds, first_taken, step_hash_seconds, refine_seconds;
} sida_pass;

static inline void sida_pass_pause(const sida_pass *p) {
    if (p->options->pause) p->options->pause(p->options->pause_context);
}

/* Positions grow in the order of use: batch, forward call, site. */
static inline int64_t sida_pass_position(int64_t batch, int64_t call, int32_t site) {
    return batch << 40 | call << 16 | site;
}

/* The hash thread: tables of all batches, to the end or to an error. */
void *sida_pass_build_ahead(void *pass);
/* How many threads its source may have on the host. */
int sida_pass_hash_threads(const sida_pass *pass);
/* Ends both sides with one reason. */
void sida_pass_stop(sida_pass *pass, sida_status reason);

/* The inference thread's: the table of the decoder's step that begins, */
sida_status sida_pass_build_step(sida_pass *pass, const sida_ragged *step);
/* and what is predicted again of the layers behind one that has chosen. */
sida_status sida_pass_refine(sida_pass *pass, const sida_moe_call *layer);

#endif
