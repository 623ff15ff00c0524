/* A loaded MoE model and its forward pass. Knows families, not stores: experts are asked for
 * through a driver, so that the same forward serves the tracer (all resident) and the engine.
 *
 * Sites: MoE layers counted through the model, the encoder's first. An expert's global id is
 * site * experts + expert. */
#ifndef SIDA_RUNTIME_MODEL_MODEL_H
#define SIDA_RUNTIME_MODEL_MODEL_H

#include "formats/base/fingerprint.h"
#include "formats/checkpoint.h"
#include "formats/ragged.h"
#include "runtime/ops/ops.h"

#include <stdbool.h>
#include <stdint.h>

enum { SIDA_ENCODER = 0, SIDA_DECODER = 1 };

typedef struct sida_model_info {
    const char *family; /* "switch_transformers" */
    sida_fingerprint fingerprint;
    int32_t vocabulary, d_model, d_kv, heads, d_ff;
    int32_t layers[2], moe_layers[2];
    int32_t sites;          /* moe_layers[0] + moe_layers[1] */
    int32_t experts, top_k; /* a MoE layer, a token */
    int32_t capacity;       /* tokens an expert takes of a sequence; 0: no limit */
    bool renormalise;
    int32_t pad, eos, decoder_start;
    sida_expert_shape expert; /* shape and stored type; of experts_bytes each */
    size_t expert_bytes;
    size_t dense_bytes; /* everything but experts, as on the device */
} sida_model_info;

typedef struct sida_model sida_model;

/* Reads the directory, checks every tensor, puts the dense part on the device (as stored) and all
 * experts into one host slab. Errors: IO, FORMAT, UNSUPPORTED (model_type), BUDGET. */
sida_status sida_model_open(sida_model **out, sida_backend *backend, const char *folder);
void sida_model_destroy(sida_model *model);
const sida_model_info *sida_model_get_info(const sida_model *model);
sida_backend *sida_model_backend(const sida_model *model);
/* NULL for a synthetic model. */
const sida_checkpoint *sida_model_checkpoint(const sida_model *model);
/* The host copy of an expert: info.expert_bytes contiguous bytes. */
const void *sida_model_expert(const sida_model *model, int32_t global_expert);
/* The input embedding on the device, [vocabulary, d_model]. */
sida_weight sida_model_embedding(const sida_model *model);
/* The same in memory that the host reads: on the CPU the device's, else the checkpoint's file as it
 * is mapped, while the model lives. */
sida_weight sida_model_embedding_host(const sida_model *model);

/* What one MoE layer is about to do. Arrays are host arrays owned by the run. Those of the routing
 * (logits to dropped) are for choose and observe, experts for chosen; for others they mean nothing.
 */
typedef struct sida_moe_call {
    int32_t site, side, layer; /* layer: of that side's MoE layers */
    int32_t sequences;
    const int64_t *offsets;  /* [sequences + 1] tokens of this forward call */
    const int32_t *position; /* [sequences] position of each sequence's first token */
    int64_t tokens;
    int32_t experts_total, k;
    const float *logits; /* [tokens, E], the true router's; NULL where the choice is made ahead */
    int32_t *experts;    /* [tokens, k] */
    float *alpha;        /* [tokens, k] */
    uint8_t *dropped;    /* [tokens] */
} sida_moe_call;

/* Who chooses and supplies the experts. Every function may be called from the thread that runs the
 * model only.
 *
 * When the host waits for the device: at every MoE layer for an observe, for a hidden, for a choose
 * that is not ahead, and for which experts have rows where nothing says before the call which ones
 * are needed (a store and exact routing). Otherwise never. */
typedef struct sida_moe_driver {
    void *context;
    /* Guided routing: among which experts the router chooses in the forward call that begins. A
     * host array [MoE layers of the side, sequences, E] of bytes, not 0: allowed; at least k in
     * each set of a sequence that has tokens in the call. It is read at once. NULL, or an answer of
     * NULL: among all. */
    const uint8_t *(*allow)(void *context, int32_t side);
    /* Fills experts and alpha; NULL: the router decides. Capacity is applied after it. */
    sida_status (*choose)(void *context, sida_moe_call *call);
    /* choose looks at no logits: it is called for all MoE layers before the forward call runs, and
     * the router does not. */
    bool chooses_ahead;
    /* Sees the finished routing; NULL: nobody looks. */
    sida_status (*observe)(void *context, const sida_moe_call *call);
    /* Sees the residual stream behind the layer, its experts' results added: h [tokens, d_model], a
     * host array that lasts until the return. Of the call's routing it has what observe saw, else
     * nothing. NULL: nobody looks. */
    sida_status (*hidden)(void *context, const sida_moe_call *call, const float *h);
    /* Gets the routing of every forward call, without a stop; NULL: none. For a run with record_top
     * and without choose: ARGUMENT otherwise, and where it is full. */
    struct sida_recording *record;
    /* Where all experts are on the device: the device array [sites * E] of their device pointers.
     * Then begin, take and release are not called. */
    const void *const *resident;
    /* The distinct experts (0 … E-1, ascending) that this layer will compute with; with allow, all
     * that are allowed to a sequence that has tokens: some may get none. */
    sida_status (*begin)(void *context, const sida_moe_call *call, const int32_t *needed,
                         int32_t count);
    /* A wave: between 1 and count of the needed experts not handed out yet, pinned on the device:
     * their ids and device pointers. Waits until there is one. */
    sida_status (*take)(void *context, int32_t *experts, const void **weights, int32_t *count);
    /* The wave's work has been issued to `stream`: its slots may be reused behind it. */
    sida_status (*release)(void *context, const int32_t *experts, int32_t count,
                           sida_stream *stream);
    /* Where the router decides and take supplies: the experts of each MoE layer of a call but the
     * last, behind it and before the next one's begin, while the device has work. NULL: nobody
     * asks. */
    sida_status (*chosen)(void *context, const sida_moe_call *call);
} sida_moe_driver;

/* All experts on the device at once. */
typedef struct sida_resident sida_resident;
sida_status sida_resident_create(sida_resident **out, const sida_model *model);
void sida_resident_destroy(sida_resident *resident);
/* For sida_moe_driver.resident; valid while `resident` lives. */
const void *const *sida_resident_table(const sida_resident *resident);
/* A driver that serves from `resident`, with the caller's choose and observe (either may be NULL),
 * which get `context`. Valid while `resident` lives; one at a time. */
const sida_moe_driver *
sida_resident_driver(sida_resident *resident, void *context,
                     sida_status (*choose)(void *context, sida_moe_call *call),
                     sida_status (*observe)(void *context, const sida_moe_call *call));

/* --- a forward pass's memory: activations, key/value caches, workspaces */
typedef struct sida_run_limits {
    int32_t sequences;         /* a batch */
    int64_t input_tokens;      /* a batch, all sequences together */
    int64_t step_tokens;       /* of one decoder call, all sequences together */
    int32_t decoder_positions; /* of one sequence */
    int32_t record_top;        /* T of what is recorded, at most E; 0: nothing is */
} sida_run_limits;

/* Device bytes that a run of these limits takes. */
size_t sida_run_bytes(const sida_model *model, const sida_run_limits *limits);

typedef struct sida_run sida_run;
sida_status sida_run_create(sida_run **out, sida_model *model, const sida_run_limits *limits);
void sida_run_destroy(sida_run *run);
sida_stream *sida_run_stream(sida_run *run);

/* Runs the encoder and empties the decoder's caches. ARGUMENT beyond the limits, FORMAT for an id
 * outside the vocabulary. */
sida_status sida_run_encode(sida_run *run, const sida_ragged *input, const sida_moe_driver *driver);

/* Appends tokens to each sequence of the last encode (0 … n each; one call with the whole target is
 * teacher forcing, one token a call is cached decoding) and runs the decoder over them. Capacity
 * counts within the call. */
sida_status sida_run_decode(sida_run *run, const sida_ragged *step, const sida_moe_driver *driver);
/* Logits of rows [first, first + rows) of the last decode, [rows, vocabulary], to the host. */
sida_status sida_run_read_logits(sida_run *run, int64_t first, int64_t rows, float *out);

/* --- what the routers did in whole forward calls, brought to the host behind each of them.
 * Double-buffered, the host packs one recording while the device fills another. */
typedef struct sida_recording sida_recording;

typedef struct sida_recorded_call {
    int32_t side, layers, sequences, k, top; /* layers: MoE layers of the side */
    int64_t tokens;
    const int64_t *offsets;  /* [sequences + 1] */
    const int32_t *position; /* [sequences] of each sequence's first token */
} sida_recorded_call;

typedef struct sida_recorded_layer {
    const int32_t *experts;   /* [tokens, k] */
    const float *alpha;       /* [tokens, k] */
    const uint8_t *dropped;   /* [tokens] */
    const uint16_t *top_ids;  /* [tokens, T] best first, ties to the lower id */
    const uint16_t *top_logp; /* [tokens, T] fp16 bits, as in ops/top.h */
} sida_recorded_layer;

/* Of at most `calls` forward calls of `run`, which it must not outlive. Its host memory, pinned
 * where the device wants that, grows with the calls: at most twice what they hold. */
sida_status sida_recording_create(sida_recording **out, const sida_run *run, int32_t calls);
void sida_recording_destroy(sida_recording *recording); /* takes NULL */
/* Forgets all calls; what they gave out is no longer theirs. After a wait. */
void sida_recording_reset(sida_recording *recording);
/* Until every recorded call is on the host; from any thread that nobody records beside. */
sida_status sida_recording_wait(const sida_recording *recording);
int32_t sida_recording_calls(const sida_recording *recording);
/* In the order of the calls; arrays last until the reset. */
sida_recorded_call sida_recording_call(const sida_recording *recording, int32_t index);
sida_recorded_layer sida_recording_layer(const sida_recording *recording, int32_t index,
                                         int32_t layer);

/* --- greedy generation over the last encode */
typedef struct sida_generate_options {
    int32_t max_new_tokens; /* </s> counts; >= 1 */
    /* What each sequence answers, whatever the logits say: a sequence ends with its target, and one
     * without any takes no step. NULL: the most likely token. */
    const sida_ragged *forced;
    void *context;
    /* Before step t runs: the ids that go in (step.ids, one a live sequence). NULL: nothing. */
    sida_status (*before_step)(void *context, int32_t t, const sida_ragged *step);
    /* Every live sequence's raw logits [vocabulary], in the order step, sequence. NULL: nothing. */
    sida_status (*on_logits)(void *context, int32_t t, int32_t sequence, const float *logits);
} sida_generate_options;

/* ids [sequences, max_new_tokens]: what each sequence answered, </s> included; counts [sequences].
 * Ties go to the lower id. ARGUMENT for a target of more than max_new_tokens. */
sida_status sida_run_generate(sida_run *run, const sida_generate_options *options,
                              const sida_moe_driver *driver, int32_t *ids, int32_t *counts);

#endif
