/* Traced batches become parts on disk, in two threads beside the one that runs the model: one waits
 * for a batch's routing to reach the host and gathers it into the part at hand, in memory; one
 * writes finished parts and syncs them. Queues between them are bounded, so a slow disk slows the
 * model and nothing grows. */
#ifndef SIDA_TRACER_WRITER_H
#define SIDA_TRACER_WRITER_H

#include "data/batch.h"
#include "runtime/model/model.h"
#include "tracer/parts.h"

/* Batches between the model and the part at hand: one that the device runs, one behind it, one that
 * is gathered, and one for when gathering halts. */
enum { SIDA_TRACE_JOBS = 4 };

/* A batch on its way. */
typedef struct sida_trace_job {
    sida_batch *batch;         /* owned */
    sida_recording *recording; /* of its encoder and decoder calls; NULL: none */
    int64_t *lengths;          /* [batch] decoder tokens of each sequence */
    int32_t *decoder_ids;      /* the decoder's inputs, end to end */
    size_t decoder_capacity;
} sida_trace_job;

typedef struct sida_part_writer sida_part_writer;

/* Starts the threads. Everything is borrowed; parts->count grows as parts are finished and is read
 * after the end only, as header->has_targets is set before the first submit. sequences: of a batch
 * at most. part_tokens: after which a part ends. */
sida_status sida_part_writer_create(sida_part_writer **out, sida_parts *parts,
                                    const sida_trace_info *header, sida_trace_job *jobs,
                                    int32_t job_count, int32_t sequences, int64_t part_tokens);
/* A job that is free, its batch destroyed and its recording empty; waits until there is one. What
 * stopped a thread comes out here, with its own code and message. */
sida_status sida_part_writer_take(sida_part_writer *writer, sida_trace_job **job);
sida_status sida_part_writer_submit(sida_part_writer *writer, sida_trace_job *job);
/* Ends the threads. SIDA_OK as `reason`: everything submitted is on disk then, or the error of the
 * thread that failed comes out. Else finished parts are still written, the one at hand is not, and
 * `reason` comes back with the caller's message. Frees the writer; takes NULL. */
sida_status sida_part_writer_finish(sida_part_writer *writer, sida_status reason);

#endif
