/* The trace: what the full model's routers did over a corpus. Schema version 1, documented for
 * other software in formats/README.md.
 *
 * S sequences; side 0 is the encoder, side 1 the decoder; N[side] tokens end to end, L[side] MoE
 * layers, E experts a layer, k chosen a token, T top entries kept (k <= T <= E). A decoder-only
 * model has no encoder: L[0] = 0, N[0] = 0 and offsets of 0. Fingerprints are compared for
 * equality. */
#ifndef SIDA_FORMATS_TRACE_H
#define SIDA_FORMATS_TRACE_H

#include "formats/base/fingerprint.h"
#include "formats/base/status.h"
#include "formats/h5.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct sida_trace_info {
    sida_fingerprint model, tokenizer, input;
    char *config, *options, *family; /* owned */
    int32_t experts, top_k, top, d_model, vocabulary;
    int32_t layers[2];
    int64_t sequences, tokens[2];
    bool has_targets;
} sida_trace_info;
void sida_trace_info_free(sida_trace_info *info);

/* One side's rows, in memory. Any pointer may be NULL when reading: then it is not read. */
typedef struct sida_trace_rows {
    int32_t *tokens;    /* [n] */
    uint16_t *experts;  /* [n, L, k] */
    float *alpha;       /* [n, L, k] */
    uint8_t *dropped;   /* [n, L] */
    uint16_t *top_ids;  /* [n, L, T] */
    uint16_t *top_logp; /* [n, L, T], fp16 bits */
} sida_trace_rows;

/* Room for `tokens` rows of L = layers, k = top_k, T = top. */
sida_status sida_trace_rows_alloc(sida_trace_rows *rows, int32_t layers, int32_t top_k, int32_t top,
                                  int64_t tokens);
void sida_trace_rows_free(sida_trace_rows *rows);

/* --- writing: a part holds whole batches; a merge of parts is a trace. */
typedef struct sida_trace_writer sida_trace_writer;

/* Creates PATH.tmp of the given kind (TRACE or PART). info: everything but sequences and tokens. */
sida_status sida_trace_create(sida_trace_writer **out, const char *path, sida_h5_kind kind,
                              const sida_trace_info *info);
/* Appends one side of a batch: lengths[s] tokens for each of `sequences`. Both sides are appended
 * for every batch, in the order encoder, decoder, then the sequences' own fields. */
sida_status sida_trace_append_side(sida_trace_writer *writer, int side, int32_t sequences,
                                   const int64_t *lengths, const sida_trace_rows *rows);
/* lines, labels, generated: [sequences]; target ids end to end with their lengths. The targets are
 * needed when info.has_targets was set, and ignored when it was not. */
sida_status sida_trace_append_sequences(sida_trace_writer *writer, int32_t sequences,
                                        const int64_t *lines, const int32_t *labels,
                                        const uint8_t *generated, const int64_t *target_lengths,
                                        const int32_t *target_ids);
/* Embedding rows of the `count` ids (ascending): [count, d_model]. TRACE only, once. */
sida_status sida_trace_write_embedding(sida_trace_writer *writer, int32_t count, const int32_t *ids,
                                       const float *rows);
sida_status sida_trace_commit(sida_trace_writer *writer); /* frees, also on error */
void sida_trace_abandon(sida_trace_writer *writer);

/* --- reading */
typedef struct sida_trace sida_trace;

/* Opens a trace or a part and checks the schema: ranks, extents, ascending offsets, that ids fit.
 * Contents (ids < E, logp finite and sorted …) are checked by sida_trace_check(), and by the
 * readers for what they hand out. A foreign trace is accepted. */
sida_status sida_trace_open(sida_trace **out, const char *path);
void sida_trace_close(sida_trace *trace);
const sida_trace_info *sida_trace_get_info(const sida_trace *trace);
const char *sida_trace_path(const sida_trace *trace);
sida_h5_kind sida_trace_kind(const sida_trace *trace);
/* [S + 1], borrowed. */
const int64_t *sida_trace_offsets(const sida_trace *trace, int side);
/* Tokens [first, first + count) of a side. Range-checks tokens (< vocabulary), experts and top_ids
 * (< E), and refuses NaN: FORMAT with the dataset's name. */
sida_status sida_trace_read(sida_trace *trace, int side, int64_t first, int64_t count,
                            const sida_trace_rows *out);
/* Fields of sequences [first, first + count); any pointer may be NULL. */
sida_status sida_trace_read_sequences(sida_trace *trace, int64_t first, int64_t count,
                                      int64_t *lines, int32_t *labels, uint8_t *generated);
/* Target ids of sequences [first, first+count): offsets[count + 1] starting at 0, ids; free both.
 */
sida_status sida_trace_read_targets(sida_trace *trace, int64_t first, int64_t count,
                                    int64_t **offsets, int32_t **ids);
/* The embedding: ids [count] ascending and rows [count, d_model]; free() both. */
sida_status sida_trace_read_embedding(sida_trace *trace, int32_t *count, int32_t **ids,
                                      float **rows);
/* Reads everything once: FORMAT with the first thing that is wrong. */
sida_status sida_trace_check(sida_trace *trace);

/* Takes one line without its end: "PATH: dataset encoder/alpha is missing". */
typedef void (*sida_trace_report)(void *context, const char *line);
/* Tells everything that is wrong with a trace or a part, also where it cannot be opened as one. A
 * kind of problem in a dataset is one line, with its first place and how often it is there. OK
 * once all was read, whatever was told; IO, FORMAT where there is no HDF5 file to read. */
sida_status sida_trace_diagnose(const char *path, sida_trace_report report, void *context);

#endif
