/* Forward calls as graphs. A call is issued in segments, the stretches between what the host has to
 * do; the second call of a kind records each of its segments, later ones replay them. Without
 * graphs (the CPU), on a kind's first call, and where recording fails, a segment is just issued. */
#ifndef SIDA_RUNTIME_MODEL_GRAPHS_H
#define SIDA_RUNTIME_MODEL_GRAPHS_H

#include "runtime/backend/backend.h"

/* All that the work of a call depends on beside the run itself. No padding: compared as bytes. */
typedef struct sida_graphs_key {
    const void *resident; /* experts' table */
    int64_t tokens;
    int32_t sequences, side, chooser;
    int16_t stops, records;
} sida_graphs_key;

enum { SIDA_GRAPHS_KINDS = 64 }; /* kept; the least recently used gives way */

typedef struct sida_graphs sida_graphs;

/* segments: of a call at most. */
sida_status sida_graphs_create(sida_graphs **out, sida_stream *stream, int32_t segments);
/* After the stream's work; takes NULL. */
void sida_graphs_destroy(sida_graphs *graphs);

/* The segments issued from now on are those of this kind of call. */
sida_status sida_graphs_begin(sida_graphs *graphs, const sida_graphs_key *key);

/* Issues segment `segment` by `issue`, which gives the stream the same work for the same key, and
 * creates, waits for and asks nothing. */
sida_status sida_graphs_issue(sida_graphs *graphs, int32_t segment,
                              sida_status (*issue)(void *context), void *context);

#endif
