/* Inside runtime/model: one run's memory, laid out once. */
#ifndef SIDA_RUNTIME_MODEL_RUN_PRIVATE_H
#define SIDA_RUNTIME_MODEL_RUN_PRIVATE_H

#include "runtime/model/model_private.h"

/* T tokens of a call at most, S sequences, d = d_model, I = heads * d_kv, k = top_k. */

/* Small arrays that go to the device at the start of a call; host and device have the same layout
 * and ids come last, so that one copy of the used part carries everything. */
typedef struct sida_run_index {
    int64_t *q_start;                  /* [S + 1] rows: the call's offsets */
    int64_t *self_start, *cross_start; /* [S] rows */
    int32_t *q_count, *q_position;     /* [S] */
    int32_t *self_count, *cross_count; /* [S] keys */
    int32_t *ids;                      /* [T] */
} sida_run_index;

/* What a MoE layer's choices look like on either side. */
typedef struct sida_run_choice {
    int32_t *experts;   /* [T, k] */
    float *alpha;       /* [T, k] */
    uint8_t *dropped;   /* [T] */
    int32_t *rows;      /* [T * k] token * k + rank, by expert */
    int64_t *row_start; /* [E + 1] */
    int32_t *busy;      /* [E] experts with rows */
    int32_t *busy_count;
    /* Waves, one behind another: of a wave of c experts c weights, c ids. */
    char *waves; /* [E] of SIDA_WAVE_BYTES */
} sida_run_choice;

enum { SIDA_WAVE_BYTES = sizeof(const void *) + sizeof(int64_t) };

typedef struct sida_run_device {
    float *h, *x;                   /* [T, d] */
    float *q, *k, *v, *context;     /* [T, I] one after another */
    float *hidden;                  /* [T, d_ff] twice when gated; shares memory with q … */
    float *logits_router, *scratch; /* [T, E], [T * k, d]; share it too */
    float *expert_workspace;
    float *encoder;           /* [input tokens, d] after the final norm */
    float *decoder;           /* [step tokens, d] after the final norm */
    float *cross_k, *cross_v; /* [decoder layers][input tokens, I] */
    float *self_k, *self_v;   /* [decoder layers][S * positions, I] */
    float *logits;            /* [logits_rows, vocabulary] */
    sida_run_index index;
    sida_run_choice choice;
} sida_run_device;

typedef struct sida_run_host {
    sida_run_index index;
    sida_run_choice choice;
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
    sida_event *staged; /* host.index has been copied: it may be written again */
    sida_buffer *device_buffer, *host_buffer;
    sida_run_device device;
    sida_run_host host;
    int64_t logits_rows;
    size_t index_ids_bytes;               /* of an index before its ids */
    int32_t sequences;                    /* of the last encode; 0: none */
    int64_t input_tokens, decoded_tokens; /* of the last encode and decode */
};

/* One MoE block: h += Σ alpha · expert(x), x = norm(h). */
sida_status sida_run_moe(sida_run *run, const sida_moe_driver *driver, int side, int32_t block,
                         const int32_t *position, int64_t tokens);

#endif
