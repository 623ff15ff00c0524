/* What the identity tests run on: a tiny random Switch model written to a folder of its own, a
 * hash source whose predictions are as good as dice, batches, and the all-resident reference. */
#ifndef SIDA_TESTS_IDENTITY_RIG_H
#define SIDA_TESTS_IDENTITY_RIG_H

#include "runtime/engine/pass.h"

#include <stdatomic.h>

typedef struct rig {
    char folder[64]; /* "": the model is not ours to remove */
    sida_backend *backend;
    sida_model *model;
    sida_run *run;
    const sida_model_info *info;
    sida_hash_source source;
    size_t fixed_bytes;     /* on the device beside the slots */
    atomic_uint delay_seed; /* 0: no delays */
    /* The corpus: `sequences` random ones. */
    int32_t sequences;
    int64_t *offsets;
    int32_t *ids;
    /* Of the feed that is running. */
    int32_t batch, fed;
    int32_t fail_at;        /* the batch whose reading fails, -1: none */
    int32_t fail_tables_at; /* the batch whose hash table fails, -1: none */
    int32_t table_delay_ms; /* of each encoder table */
    atomic_int tables;      /* encoder tables built since the feed began */
} rig;

enum { rig_max_new_tokens = 4, rig_max_batch = 16 };

/* folder NULL: writes a model of 10 experts in 2 + 2 MoE layers. fail_copy: of the back-end. */
void rig_open(rig *r, const char *folder, int32_t sequences, int64_t fail_copy);
/* The same on a back-end that the rig then owns; copies have no delays and do not fail. */
void rig_open_on(rig *r, sida_backend *backend, const char *folder, int32_t sequences);
/* The same with a model, which is the rig's then. */
void rig_open_model(rig *r, sida_backend *backend, sida_model *model, int32_t sequences);
/* Puts the corpus behind itself once more. */
void rig_repeat(rig *r);
void rig_close(rig *r);

/* Runs the engine over the corpus: `options` without what the rig fills in (model, run, feed,
 * poison, pauses unless there are some). `seed`: of the delays, 0: none. The cap leaves room for
 * the slots only. */
sida_status rig_pass(rig *r, sida_pass_stats *stats, sida_pass_options options, int32_t batch,
                     unsigned seed);

typedef struct reference {
    sida_fingerprint digest;
    int64_t needs;    /* experts that MoE layers needed, summed over layers and calls */
    int32_t distinct; /* of the whole model */
    uint8_t *used;    /* [sites * experts] */
    int64_t logits;   /* rows seen */
    bool finite;
} reference;

/* The same batches with all experts on the device, by another way: generation step by step,
 * logits kept and hashed at the end, and routing from first principles (guided: sets from the
 * source's rows, token by token). `top_k` as in the options. */
void rig_reference(rig *r, reference *out, sida_routing routing, int32_t top_k, int32_t batch);
void reference_free(reference *ref);

void rig_assert_ok(sida_status status);

#endif
