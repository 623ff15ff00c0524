/* libsida: serve a Mixture-of-Experts model with only a part of its experts on the device.
 *
 *     sida_engine_options options = SIDA_ENGINE_OPTIONS_INIT;
 *     options.model = "switch-base-64";
 *     options.predictor = "predictor.h5";
 *     options.budget = "20%";
 *     sida_engine *engine;
 *     if (sida_engine_open(&engine, &options)) fprintf(stderr, "%s\n", sida_error_message());
 *
 *     sida_job job = SIDA_JOB_INIT;
 *     job.format = "sst2";
 *     job.input = "dev.tsv";
 *     job.on_answer = print_answer;
 *     sida_report report;
 *     if (sida_engine_run(engine, &job, &report)) …
 *     sida_engine_close(engine);
 *
 * Functions that can fail return a sida_status; sida_error_message() then has one line that names
 * the file and the reason. The library does not exit and does not print. An engine may be used by
 * one thread at a time, different engines by different threads. */
#ifndef SIDA_RUNTIME_SIDA_H
#define SIDA_RUNTIME_SIDA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define SIDA_API __attribute__((visibility("default")))
#else
#define SIDA_API
#endif

#ifndef SIDA_STATUS_DECLARED
#define SIDA_STATUS_DECLARED
typedef enum sida_status {
    SIDA_OK = 0,
    SIDA_ERROR_ARGUMENT = -1,  /* an option or argument is outside its range */
    SIDA_ERROR_MEMORY = -2,    /* host memory ran out */
    SIDA_ERROR_IO = -3,        /* the operating system refused a read or a write */
    SIDA_ERROR_FORMAT = -4,    /* a file's contents are damaged, hostile or not of the kind */
    SIDA_ERROR_MISMATCH = -5,  /* two files are sound, but do not belong together */
    SIDA_ERROR_BUDGET = -6,    /* the device budget is too small */
    SIDA_ERROR_DEVICE = -7,    /* the device or its driver failed */
    SIDA_ERROR_CANCELLED = -8, /* stopped from outside, or by another thread's error */
    SIDA_ERROR_UNSUPPORTED = -9
} sida_status;
#endif

/* "0.1.0" */
SIDA_API const char *sida_version(void);
/* The calling thread's last message; "" when there is none. Valid until its next failure. */
SIDA_API const char *sida_error_message(void);
/* For callbacks that fail: records the message (one line) and returns `status`, not SIDA_OK. */
SIDA_API sida_status sida_error_raise(sida_status status, const char *message);
/* "format", "mismatch" … */
SIDA_API const char *sida_error_name(sida_status status);

/* --- an engine: a model, a budget, and what decides about experts */

enum { SIDA_ENGINE_OPTIONS_VERSION = 1 };
typedef struct sida_engine_options {
    uint32_t version;
    const char *model;     /* Hugging Face directory, with spiece.model */
    const char *predictor; /* P.h5 of `sida train`; NULL: experts are loaded on demand only */
    const char *device;    /* "cpu", "cuda", or "auto" (NULL too): cuda where a GPU is present */
    /* Device memory for experts: "20%" of all experts, "12-experts", or a size such as "2GiB" that
     * caps everything that this process takes of the device: with cuda the driver's context and the
     * libraries' own memory too, measured, with a reserve for what they load later. NULL: all
     * experts. */
    const char *budget;
    const char *policy;  /* "lookahead", "lru", "fifo": which expert gives way */
    const char *routing; /* "exact": the router decides, output never changes; "guided": the best of
                          * the predicted experts; "predicted": the predictor decides */
    int32_t top_k;       /* experts predicted a token and layer */
    /* guided: the most experts of a layer that a sequence may use, as a share of them: those of its
     * predicted ones that would be missed most. 0: no limit. */
    double active_share;
    /* guided, predicted: a baseline. As many experts, but other ones, drawn at random. */
    bool random_experts;
    uint64_t random_seed;
    int32_t queue;          /* batches predicted ahead */
    int32_t batch;          /* sequences a batch */
    bool no_prefetch;       /* predictions load nothing early */
    bool no_refine;         /* exact: predictions stay as they are while layers choose */
    int32_t threads;        /* of the CPU's ops; 0: as OpenMP chooses */
    int32_t max_tokens;     /* of an input, </s> included */
    bool truncate;          /* cut longer inputs instead of refusing them */
    int32_t max_new_tokens; /* of an answer, </s> included */
} sida_engine_options;

#define SIDA_ENGINE_OPTIONS_INIT                                                                   \
    {                                                                                              \
        .version = SIDA_ENGINE_OPTIONS_VERSION, .device = "auto", .policy = "lookahead",           \
        .routing = "exact", .top_k = 3, .queue = 8, .batch = 1, .max_tokens = 512,                 \
        .max_new_tokens = 16                                                                       \
    }

typedef struct sida_engine sida_engine;

/* Errors: ARGUMENT, IO, FORMAT, MISMATCH (a predictor of another model), BUDGET (with the
 * arithmetic), UNSUPPORTED. Strings are not kept. */
SIDA_API sida_status sida_engine_open(sida_engine **out, const sida_engine_options *options);
SIDA_API void sida_engine_close(sida_engine *engine); /* takes NULL */

typedef struct sida_engine_facts {
    int32_t experts;          /* of the whole model, all layers */
    int32_t slots;            /* experts that fit on the device */
    bool resident;            /* all of them do: they are there before the first job */
    uint64_t slot_bytes;      /* one of them */
    uint64_t dense_bytes;     /* weights that are always there */
    uint64_t workspace_bytes; /* activations and caches */
    uint64_t predictor_bytes; /* parameters, and with cuda all that predicting takes */
    uint64_t driver_bytes;    /* context and libraries, as measured, and the reserve; cpu: 0 */
    uint64_t cap_bytes;       /* enforced; driver_bytes are in it where the budget is a size */
    const char *device;       /* "cpu", "cuda" */
} sida_engine_facts;
SIDA_API void sida_engine_get_facts(const sida_engine *engine, sida_engine_facts *out);

/* --- a job: answers for every record of a file */

typedef struct sida_answer {
    int64_t index, line; /* 0-based record; 1-based line of the file */
    const char *text;    /* UTF-8; when scoring, the more likely label, "" where there are none */
    const char *target;  /* NULL: none */
    double nll;          /* when scoring: -log p of the whole target in nats, NAN: none */
    int64_t tokens;      /* when scoring: of the target */
    double latency_ms;   /* of its batch */
} sida_answer;

enum { SIDA_JOB_VERSION = 1 };
typedef struct sida_job {
    uint32_t version;
    const char *format; /* "text", "jsonl", "tsv", "sst2", "mrpc", "multirc", "span-corruption" */
    const char *input;  /* the file, plain or gzip */
    int64_t limit;      /* records; 0: all */
    bool digest;        /* hash all raw logits */
    bool no_compare;    /* guided and predicted: do not run the full model beside it */
    /* Do not answer, but say how probable each target is (at most max_new_tokens long), forced
     * token by token. Of a labelled format each label is tried, as a sequence of its own, and the
     * more likely one as a whole is the answer. FORMAT for a record without target. */
    bool score;
    uint64_t seed; /* span-corruption: of the spans */
    /* Every answer in the order of the file; anything but SIDA_OK ends the run with that. NULL:
     * nobody looks. */
    sida_status (*on_answer)(void *context, const sida_answer *answer);
    /* After every batch: the share of the file that is done (both runs count when there are two),
     * tokens so far. Anything but SIDA_OK ends the run. NULL: nobody looks. */
    sida_status (*on_progress)(void *context, double fraction, int64_t tokens);
    void *context;
} sida_job;

#define SIDA_JOB_INIT                                                                              \
    { .version = SIDA_JOB_VERSION }

enum { SIDA_REPORT_LAYERS = 64 };

/* Of the run itself; full_score, fidelity and label_flips compare it with the full model. What is
 * not known is NAN. */
typedef struct sida_report {
    int64_t batches, sequences, input_tokens, generated_tokens;
    double score;          /* share of right answers, or F1 (mrpc, multirc): 0 … 1 */
    double full_score;     /* of the full model on the same batches */
    double constant_score; /* of always giving the same label; NAN without labels */
    double fidelity;       /* score / full_score; without targets the share of equal answers */
    int64_t label_flips;   /* answers that differ from the full model's; -1: not compared */
    /* Of answers with a target: right in the full model and wrong in the run, and the other way
     * about; McNemar's exact two-sided test of their being as likely. -1, NAN: not compared. */
    int64_t answers_lost, answers_gained;
    double mcnemar_p;
    /* When scoring: mean -log p of the targets' tokens, </s> included, in nats. */
    double loss, full_loss;
    int64_t target_tokens;
    double allowed_share[2]; /* guided: mean share of experts allowed; encoder, decoder */
    /* guided: the same of each MoE layer, the first 64 of a side; layers: how many are told */
    int32_t allowed_layers[2];
    double allowed_layer_share[2][SIDA_REPORT_LAYERS];
    double seconds, tokens_per_s;                          /* input and generated tokens */
    double latency_ms_p50, latency_ms_p90, latency_ms_p99; /* a batch */
    uint64_t device_bytes_peak;                            /* in our buffers */
    uint64_t driver_bytes_peak; /* what the driver says that this process took, sampled */
    bool driver_alone;          /* false: other programs' use is in it, since NVML is not there */
    int32_t experts_resident, experts_resident_peak;
    /* Of the experts that layers needed; all of these are 0 where all experts are resident: the
     * device does not tell the host what it needed. */
    int64_t hits, late_prefetches, demand_loads;
    double hit_rate; /* hits / all three; NAN when nothing was needed */
    int64_t prefetch_loads, dropped_prefetches;
    /* MoE layers whose choice made the predictor revise the layers behind it, and, of the planned
     * uses: new ones, and those forgotten whose load had not begun. */
    int64_t refinements, revised_in, revised_out;
    int64_t bytes_moved, bytes_wasted; /* host to device; prefetched for nothing */
    double wait_ms_inference, wait_ms_hash;
    /* A batch's mean, wall-clock: building hash tables, on both threads; beside that, refining
     * them, on the inference thread alone; from the queue to the last token. 0 where nothing ran;
     * no predictor: 0 but for the last. */
    double hash_ms_per_batch, refine_ms_per_batch, inference_ms_per_batch;
    double hash_share,
        refine_share;        /* of the first and the second in the third; NAN: nothing ran */
    double table_wait_share; /* of the inference thread's time since its first batch that it waited
                              * for hash tables; NAN: nothing ran */
    char digest[33];         /* 32 hexadecimal digits, "" unless asked for */
} sida_report;

SIDA_API sida_status sida_engine_run(sida_engine *engine, const sida_job *job, sida_report *out);

#ifdef __cplusplus
}
#endif

#endif
