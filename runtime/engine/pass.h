/* One pass over a sequence of batches under a budget: a thread that builds hash tables ahead, a
 * bounded queue, the calling thread that runs the model, and the expert store between them. */
#ifndef SIDA_RUNTIME_ENGINE_PASS_H
#define SIDA_RUNTIME_ENGINE_PASS_H

#include "data/batch.h"
#include "runtime/engine/routing.h"
#include "runtime/store/store.h"

typedef struct sida_pass_batch {
    const sida_batch *batch;
    const int32_t *ids; /* [sequences, stride] generated, </s> included */
    int32_t stride;
    const int32_t *counts;  /* [sequences] */
    const double *nll;      /* [sequences] -log p of the whole target, nats; NULL unless scoring */
    double latency_ms;      /* from taking the batch off the queue to its last token */
    sida_store_stats store; /* of the pass so far */
} sida_pass_batch;

typedef struct sida_pass_options {
    sida_model *model;
    sida_run *run; /* its limits must fit the batches */
    /* All experts on the device; NULL: the store, under what slots to policy say, which mean
     * nothing otherwise. Exact routing then takes no predictions. */
    const sida_resident *resident;
    /* NULL: no predictions (exact only). On a device: placed for as many states as there are
     * batches, below, and for the run's limits. */
    const sida_hash_source *source;
    sida_routing routing;
    int32_t top_k; /* experts predicted a token and layer, model's k … E */
    int32_t slots; /* >= 2 */
    int32_t queue; /* hash tables built ahead, >= 1 batches */
    bool prefetch; /* false: predictions tell the policy what comes, nothing is loaded early */
    /* Behind each MoE layer the source is asked again for those behind it, and the plan revised: in
     * exact routing with prefetch, where the source can. */
    bool refine;
    bool digest; /* hash all raw logits */
    /* Instead of answering the targets are forced, a token a step as in answering, and it is told
     * how probable they were. */
    bool score;
    int32_t most_allowed; /* guided: experts of a set, model's k … E; 0: no limit (routing.h) */
    const sida_policy *policy;
    int32_t max_new_tokens; /* of an answer or a target */
    /* The next batch (owned by the pass from then on), NULL at the end. Called on the hash thread.
     */
    sida_status (*next)(void *context, sida_batch **out);
    void *next_context;
    /* Sees every batch's answers in order, on the calling thread; an error ends the pass. NULL:
     * nobody looks. */
    sida_status (*on_batch)(void *context, const sida_pass_batch *batch);
    void *on_batch_context;
    /* Tests: NaN in slots that hold no expert, and a function that every thread calls at its
     * turning points, to delay it. */
    bool poison;
    void (*pause)(void *context);
    void *pause_context;
} sida_pass_options;

/* Batches alive at once, and so states of a source: one being filled, one being run, the rest in
 * the queue. */
static inline int32_t sida_pass_batches(int32_t queue) {
    return queue + 2;
}

typedef struct sida_pass_stats {
    /* With all experts resident only `resident` and `peak_resident`: nothing is loaded, and needs
     * are not counted, since which experts had rows stays on the device. */
    sida_store_stats store;
    int64_t batches, sequences, input_tokens, generated_tokens;
    double seconds;
    double inference_wait_seconds; /* for hash tables and for experts */
    double hash_wait_seconds;      /* for room in the queue */
    double hash_seconds;           /* building hash tables: in the source, on both threads */
    int64_t refinements;           /* layers that have revised the plan of those behind them */
    double refine_seconds;         /* beside it: the inference thread's, for them and their plans */
    double batch_seconds;          /* of all batches, each from the queue to its last token */
    /* The inference thread's, from the first batch on: for hash tables, and all. */
    double table_wait_seconds, after_first_seconds;
    double *latencies_ms; /* [batches], owned */
    size_t latencies_capacity;
    double allowed_share[2]; /* guided: mean |A| / E of a side's (layer, sequence) at the end */
    double *layer_share[2];  /* [layers] guided: the same of each, owned; NULL otherwise */
    int32_t layers[2];
    /* Of every sequence's logits of all its steps, in the order of the input: one digest a
     * sequence, and this one over them. So it depends on no batching either. */
    sida_fingerprint digest;
} sida_pass_stats;

/* Runs until the end of the batches. On an error both threads have ended; stats hold what was
 * counted. */
sida_status sida_pass_run(sida_pass_stats *out, const sida_pass_options *options);
void sida_pass_stats_free(sida_pass_stats *stats);

#endif
