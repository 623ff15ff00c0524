/* Runs the full model over a corpus and records what its routers did.
 *
 * The output appears complete or not at all. While it runs, whole batches go into parts
 * (OUTPUT.parts/part-000000.h5, …, about part_tokens tokens each), each written under a temporary
 * name and renamed; at the end they are merged into OUTPUT and removed. A killed run loses at most
 * the part it was writing, and resumes to the same bytes. */
#ifndef SIDA_TRACER_TRACER_H
#define SIDA_TRACER_TRACER_H

#include "data/corpus.h"
#include "formats/base/status.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct sida_tracer_options {
    const char *model, *input, *output; /* a Hugging Face directory, the corpus, the trace */
    const char *device; /* "cpu", "cuda", or "auto" (NULL too): cuda where a GPU is present */
    sida_corpus_format format;
    int32_t top;         /* T: log-probabilities kept a token and layer; E when larger */
    int32_t batch;       /* sequences a batch */
    int32_t max_tokens;  /* longest input or target */
    bool truncate;       /* cut longer ones instead of refusing them */
    int32_t generate;    /* greedy tokens recorded where the corpus has no targets */
    int64_t limit;       /* records; 0: all */
    int64_t part_tokens; /* tokens after which a part ends */
    bool resume;         /* go on from the finished parts */
    bool dry_run;        /* run the corpus through the model; record and write nothing */
    /* Called after each batch, and while merging; returning false stops the run (parts stay). NULL:
     * nothing. fraction in [0, 1]. */
    bool (*progress)(void *context, const char *stage, double fraction, int64_t tokens);
    void *context;
} sida_tracer_options;

#define SIDA_TRACER_OPTIONS_INIT                                                                   \
    {                                                                                              \
        .device = "auto", .top = 30, .batch = 16, .max_tokens = 512, .generate = 16,               \
        .part_tokens = 65536                                                                       \
    }

typedef struct sida_tracer_report {
    int64_t sequences, tokens[2]; /* in the trace; encoder, decoder */
    int64_t new_tokens;           /* run through the model by this call, both sides */
    int32_t parts, parts_reused;
    double seconds; /* forward and writing of parts, without loading and merging */
    double merge_seconds;
    const char *device; /* "cpu", "cuda" */
    int64_t bytes;      /* of the trace */
} sida_tracer_report;

/* Errors: as the readers and the model give them; MISMATCH when parts of another input, model or
 * set of options are there, ARGUMENT when there are parts but resume was not asked for. */
sida_status sida_tracer_run(const sida_tracer_options *options, sida_tracer_report *report);

#endif
