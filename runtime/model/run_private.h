/* Inside runtime/model: one run's memory, laid out once, and a forward call on its way. */
#ifndef SIDA_RUNTIME_MODEL_RUN_PRIVATE_H
#define SIDA_RUNTIME_MODEL_RUN_PRIVATE_H

#include "runtime/backend/graphs.h"
#include "runtime/model/model_private.h"

/* T tokens of a call at most, S sequences, L MoE layers of a side at most, d = d_model,
 * I = heads * d_kv, k = top_k. `void *`: of the model's activation type. */

/* Small arrays that go to the device at the start of a call; host and device have the same layout
 * and ids come last, so that one copy of the used part carries everything. */
typedef struct sida_run_index {
    int64_t *q_start;                  /* [S + 1] rows: the call's offsets */
    int64_t *self_start, *cross_start; /* [S] rows */
    int32_t *q_count, *q_position;     /* [S] */
    int32_t *self_count, *cross_count; /* [S] keys */
    int32_t *ids; /* [T], then for guided routing [T] sequences of the tokens */
} sida_run_index;

/* A MoE layer's choices on either side, laid out end to end for the tokens of the call at hand. */
typedef struct sida_run_choice {
    int64_t *row_start; /* [E + 1] */
    int32_t *busy;      /* [E] experts with rows */
    int32_t *busy_count;
    float *alpha;     /* [tokens, k] */
    int32_t *experts; /* [tokens, k] */
    uint8_t *dropped; /* [tokens] */
    int32_t *rows;    /* [tokens * k] token * k + rank, by expert */
} sida_run_choice;

/* Of a wave of c experts: c weights, c ids. */
enum { SIDA_WAVE_BYTES = sizeof(const void *) + sizeof(int64_t) };

typedef struct sida_run_device {
    float *h;      /* [T, d] */
    void *x;       /* [T, d] normed */
    float *qkv;    /* [T, 3 * I] q, k, v side by side; of cross-attention q alone, [T, I] */
    void *context; /* [T, I] */
    float *hidden; /* [T, d_ff] twice when gated, else of the activation type; shares memory with
                      qkv … */
    float *logits_router, *scratch; /* [T, E], [T * k, d]; share it too */
    float *expert_workspace;
    float *cross;           /* [input tokens, decoder layers * 2 * I] k and v of each layer */
    float *self_k, *self_v; /* [decoder layers][S * positions, I] */
    float *logits;          /* [logits_rows, vocabulary] */
    sida_run_index index;
    char *choices;    /* [L] of sida_run_choice; recording, the tops of the call's layers behind the
                         choices that it has: ids [L, tokens, T], log-probabilities likewise */
    char *waves;      /* [E] of SIDA_WAVE_BYTES */
    uint8_t *allowed; /* [L, sequences, E] */
    float *recorded_logits; /* [L] of [T, E], where the run records: kept to the call's end */
} sida_run_device;

typedef struct sida_run_host {
    sida_run_index index;
    char *choices;         /* as the device's */
    char *waves;           /* [L, E] of SIDA_WAVE_BYTES: nobody waits between the layers */
    uint8_t *allowed;      /* as the device's */
    float *logits_router;  /* [T, E] */
    int32_t *zeros;        /* [S] positions of the encoder */
    int32_t *position;     /* [S] tokens that the decoder has seen */
    int32_t *needed;       /* [E] */
    bool *pending;         /* [E] needed and not computed yet */
    int32_t *wave;         /* [E] experts of a wave, */
    const void **weights;  /* [E] and their weights */
    float *logits;         /* [logits_rows, vocabulary] */
    int64_t *step_offsets; /* [S + 1] generation */
    int32_t *step_ids;     /* [S] */
    uint8_t *live;         /* [S] */
} sida_run_host;

struct sida_run {
    sida_model *model;
    const sida_ops *ops;
    sida_run_limits limits;
    sida_stream *stream;
    sida_event *staged; /* what the device reads of the host's arrays has been read */
    sida_graphs *graphs;
    sida_buffer *device_buffer, *host_buffer;
    sida_buffer *hidden; /* [T, d] h on the host, made once a driver looks at it */
    sida_run_device device;
    sida_run_host host;
    int64_t logits_rows;
    size_t index_ids_bytes; /* of an index before its ids */
    int32_t sequences;      /* of the last encode; 0: none */
    int64_t decoded_tokens; /* of the last decode */
};

/* Who chooses a call's experts. */
typedef enum sida_run_chooser {
    SIDA_CHOOSER_ROUTER,  /* the router, on the device */
    SIDA_CHOOSER_ALLOWED, /* the router on the device, among a set of each sequence */
    SIDA_CHOOSER_AHEAD,   /* the driver, before the call runs */
    SIDA_CHOOSER_HOST     /* the driver, from each layer's logits */
} sida_run_chooser;

/* A forward call. `stops`: the host has to do with every MoE layer. */
typedef struct sida_run_call {
    const sida_moe_driver *driver;
    int side;
    int64_t tokens;
    sida_run_chooser chooser;
    bool stops;
} sida_run_call;

/* The choice of MoE layer `layer` within host.choices or device.choices. */
sida_run_choice sida_run_choice_at(const sida_run *run, char *choices, int32_t layer,
                                   int64_t tokens);
size_t sida_run_choice_bytes(const sida_run *run, int64_t tokens); /* of one layer */
/* Where the router's logits of MoE layer `layer` go, [tokens, E]. */
float *sida_run_router_logits(const sida_run *run, const sida_run_call *call, int32_t layer);

/* y = rms_norm(h) Wᵀ in rows of ldy; device.x holds the normed rows afterwards if `keep`. */
sida_status sida_run_normed_product(sida_run *run, float *y, int64_t ldy, sida_weight weight,
                                    sida_weight norm, int64_t n, bool keep);

/* --- MoE blocks: h += Σ alpha · expert(x), x = norm(h); in the order given */
/* Before the call runs, behind its index: what the driver knows already goes to the device. */
sida_status sida_run_moe_prepare(sida_run *run, sida_run_call *call);
/* From h to rows by expert, as far as the device does it. May be recorded. */
sida_status sida_run_moe_route(sida_run *run, const sida_run_call *call, const sida_block *block);
/* The experts: of a call that stops the host's part with them; else without the host, and may be
 * recorded. */
sida_status sida_run_moe_stop(sida_run *run, const sida_run_call *call, const sida_block *block);
sida_status sida_run_moe_resident(sida_run *run, const sida_run_call *call,
                                  const sida_block *block);
/* What the driver looks at behind the layer, of a call that stops: combines, then shows h. */
sida_status sida_run_moe_show(sida_run *run, const sida_run_call *call, const sida_block *block);
/* Tells a driver that asks what the layer has chosen. */
sida_status sida_run_moe_tell(const sida_run *run, const sida_run_call *call,
                              const sida_block *block);
/* Nothing where the experts have added already. May be recorded. */
sida_status sida_run_moe_combine(sida_run *run, const sida_run_call *call, const sida_block *block);
bool sida_run_experts_add(const sida_run *run);

/* --- recording; each does nothing for a driver that does not record */
sida_status sida_run_record_check(const sida_run *run, const sida_moe_driver *driver);
/* Behind the call: takes the best of all its router logits and starts the copy to the host. */
sida_status sida_run_record(sida_run *run, const sida_run_call *call);

#endif
