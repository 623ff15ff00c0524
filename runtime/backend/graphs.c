#include "runtime/backend/graphs.h"

#include "formats/base/log.h"
#include "formats/base/memory.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

typedef struct kind {
    sida_graphs_key key;
    int64_t used; /* the begin that used it last; 0: free */
    bool refused; /* a recording failed */
    sida_graph **segments;
} kind;

struct sida_graphs {
    sida_stream *stream;
    int32_t segments;
    int64_t begins;
    bool warned;
    kind *current; /* NULL: issue only */
    sida_graph **all;
    kind kinds[SIDA_GRAPHS_KINDS];
};

sida_status sida_graphs_create(sida_graphs **out, sida_stream *stream, int32_t segments) {
    sida_status status = SIDA_OK;
    sida_graphs *graphs = NULL;
    *out = NULL;
    SIDA_TRY(SIDA_ALLOC(&graphs, 1, "graphs"));
    graphs->stream = stream;
    graphs->segments = segments;
    SIDA_TRY(SIDA_ALLOC(&graphs->all, (size_t)segments * SIDA_GRAPHS_KINDS, "graphs"));
    for (int i = 0; i < SIDA_GRAPHS_KINDS; i++)
        graphs->kinds[i].segments = graphs->all + (size_t)i * (size_t)segments;
    *out = graphs;
    graphs = NULL;
out:
    free(graphs);
    return status;
}

void sida_graphs_destroy(sida_graphs *graphs) {
    if (!graphs) return;
    for (size_t i = 0; i < (size_t)graphs->segments * SIDA_GRAPHS_KINDS; i++)
        sida_graph_destroy(graphs->all[i]);
    free(graphs->all);
    free(graphs);
}

/* The least recently used kind's place, emptied. */
static sida_status make_room(sida_graphs *graphs, kind **out) {
    sida_status status = SIDA_OK;
    kind *oldest = &graphs->kinds[0];
    bool recorded = false;
    for (int i = 1; i < SIDA_GRAPHS_KINDS; i++)
        if (graphs->kinds[i].used < oldest->used) oldest = &graphs->kinds[i];
    for (int32_t s = 0; s < graphs->segments; s++) recorded |= oldest->segments[s] != NULL;
    /* A launch of them may still be running. */
    if (recorded) SIDA_TRY(sida_stream_synchronize(graphs->stream));
    for (int32_t s = 0; s < graphs->segments; s++) {
        sida_graph_destroy(oldest->segments[s]);
        oldest->segments[s] = NULL;
    }
    oldest->refused = false;
    *out = oldest;
out:
    return status;
}

sida_status sida_graphs_begin(sida_graphs *graphs, const sida_graphs_key *key) {
    sida_status status = SIDA_OK;
    graphs->current = NULL;
    if (!sida_graph_supported(graphs->stream->backend)) goto out;
    graphs->begins++;
    for (int i = 0; i < SIDA_GRAPHS_KINDS; i++) {
        kind *k = &graphs->kinds[i];
        if (k->used == 0 || memcmp(&k->key, key, sizeof *key) != 0) continue;
        k->used = graphs->begins;
        if (!k->refused) graphs->current = k;
        goto out;
    }
    /* Seen for the first time: it is issued only. That also loads the kernels that it takes, which
     * a recording could not, and what comes once is not worth recording. */
    kind *fresh;
    SIDA_TRY(make_room(graphs, &fresh));
    fresh->key = *key;
    fresh->used = graphs->begins;
out:
    return status;
}

/* NULL in *out when it cannot be recorded. */
static void record(sida_graphs *graphs, sida_graph **out, sida_status (*issue)(void *context),
                   void *context) {
    sida_graph *graph = NULL;
    *out = NULL;
    sida_status status = sida_graph_begin(graphs->stream);
    if (status == SIDA_OK) {
        status = issue(context);
        sida_status ended = sida_graph_end(graphs->stream, &graph);
        if (status == SIDA_OK) status = ended;
    }
    if (status == SIDA_OK) {
        *out = graph;
        return;
    }
    sida_graph_destroy(graph);
    graphs->current->refused = true;
    if (!graphs->warned)
        sida_log(SIDA_LOG_WARNING, "a forward pass cannot be recorded and is slower for it: %s",
                 sida_last_message());
    graphs->warned = true;
}

sida_status sida_graphs_issue(sida_graphs *graphs, int32_t segment,
                              sida_status (*issue)(void *context), void *context) {
    assert(segment >= 0 && segment < graphs->segments);
    if (!graphs->current || graphs->current->refused) return issue(context);
    sida_graph **graph = &graphs->current->segments[segment];
    if (!*graph) record(graphs, graph, issue, context);
    return *graph ? sida_graph_launch(*graph, graphs->stream) : issue(context);
}
