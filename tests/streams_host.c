#include "tests/streams_host.h"

#include "runtime/ops/ops.h"
#include "tests/test.h"

#include <pthread.h>
#include <string.h>

/* An event as it is recorded on a compute stream; on a copy stream it is the back-end's. */
typedef struct event {
    sida_event *base;
    bool ours;             /* its last record is on a compute stream */
    uint64_t issued, done; /* records */
    struct event *next;
} event;

typedef struct item {
    streams_host_run *run; /* NULL: a record, or a wait where `wait` */
    void *arguments;
    event *event;
    uint64_t record;
    bool wait;
    struct item *next;
} item;

typedef struct lane {
    sida_stream *stream;
    item *first, **last;
    sida_status status; /* of what failed on it, and then of all that waited for that */
    struct lane *next;
} lane;

/* The feed's thread and the learner's issue and wait. */
static struct device {
    pthread_mutex_t mutex;
    const sida_backend_table *cpu;
    sida_backend_table table;
    sida_ops ops;
    sida_stream_kind eager;
    lane *lanes;
    event *events; /* all that ever were: items may name one that is gone */
} device = {.mutex = PTHREAD_MUTEX_INITIALIZER};

/* --- all of these with the mutex held */

static lane *lane_of(const sida_stream *stream) {
    for (lane *l = device.lanes; l; l = l->next)
        if (l->stream == stream) return l;
    return NULL;
}

/* The latest of that address. */
static event *event_of(const sida_event *base) {
    event *e = device.events;
    while (e->base != base) e = e->next;
    return e;
}

static bool may_run(const lane *l) {
    const item *i = l->first;
    return i && !(i->wait && i->event->ours && i->event->done < i->record);
}

static void run_first(lane *l) {
    item *i = l->first;
    l->first = i->next;
    if (!l->first) l->last = &l->first;
    if (i->run) {
        if (l->status == SIDA_OK) l->status = i->run(i->arguments);
    } else if (i->wait && !i->event->ours) {
        sida_status status = device.cpu->event_synchronize(i->event->base);
        if (l->status == SIDA_OK) l->status = status;
    } else if (!i->wait && i->event->done < i->record) {
        i->event->done = i->record;
    }
    free(i->arguments);
    free(i);
}

/* Runs until the record is reached (event NULL: until the lane has no more). */
static void drive(const lane *until, const event *e, uint64_t record) {
    while (e ? e->done < record : until->first != NULL) {
        lane *turn = NULL;
        for (lane *l = device.lanes; l; l = l->next)
            if (may_run(l) && (!turn || l->stream->kind == device.eager)) turn = l;
        assert_non_null(turn); /* streams that wait for each other */
        run_first(turn);
    }
}

static sida_status status_of_all(void) {
    for (lane *l = device.lanes; l; l = l->next)
        if (l->status != SIDA_OK) return sida_fail(l->status, "a copy or an op failed before");
    return SIDA_OK;
}

static void push(lane *l, item content) {
    item *i = malloc(sizeof *i);
    *i = content;
    i->next = NULL;
    *l->last = i;
    l->last = &i->next;
}

/* --- the table */

static sida_status stream_create(sida_backend *backend, sida_stream **out, sida_stream_kind kind) {
    sida_status status = device.cpu->stream_create(backend, out, kind);
    if (status != SIDA_OK || kind == SIDA_STREAM_COPY) return status;
    lane *l = calloc(1, sizeof *l);
    l->stream = *out;
    l->last = &l->first;
    pthread_mutex_lock(&device.mutex);
    l->next = device.lanes;
    device.lanes = l;
    pthread_mutex_unlock(&device.mutex);
    return SIDA_OK;
}

static void stream_destroy(sida_stream *stream) {
    pthread_mutex_lock(&device.mutex);
    for (lane **at = &device.lanes; *at; at = &(*at)->next) {
        lane *l = *at;
        if (l->stream != stream) continue;
        drive(l, NULL, 0);
        *at = l->next;
        free(l);
        break;
    }
    pthread_mutex_unlock(&device.mutex);
    device.cpu->stream_destroy(stream);
}

static sida_status stream_synchronize(sida_stream *stream) {
    sida_status status = SIDA_OK;
    pthread_mutex_lock(&device.mutex);
    lane *l = lane_of(stream);
    if (l) {
        drive(l, NULL, 0);
        status = status_of_all();
    }
    pthread_mutex_unlock(&device.mutex);
    return l ? status : device.cpu->stream_synchronize(stream);
}

typedef struct copy_arguments {
    void *to;
    const void *from;
    size_t bytes;
} copy_arguments;

static sida_status run_copy(const void *arguments) {
    const copy_arguments *a = arguments;
    memmove(a->to, a->from, a->bytes);
    return SIDA_OK;
}

static sida_status copy(sida_stream *stream, void *to, const void *from, size_t bytes) {
    const copy_arguments a = {to, from, bytes};
    if (stream->kind == SIDA_STREAM_COPY) return device.cpu->copy(stream, to, from, bytes);
    return streams_host_issue(stream, run_copy, &a, sizeof a);
}

static sida_status event_create(sida_backend *backend, sida_event **out) {
    sida_status status = device.cpu->event_create(backend, out);
    if (status != SIDA_OK) return status;
    event *e = calloc(1, sizeof *e);
    e->base = *out;
    pthread_mutex_lock(&device.mutex);
    e->next = device.events;
    device.events = e;
    pthread_mutex_unlock(&device.mutex);
    return SIDA_OK;
}

static sida_status event_record(sida_event *base, sida_stream *stream) {
    pthread_mutex_lock(&device.mutex);
    event *e = event_of(base);
    lane *l = lane_of(stream);
    e->ours = l != NULL;
    if (l) push(l, (item){.event = e, .record = ++e->issued});
    pthread_mutex_unlock(&device.mutex);
    return l ? SIDA_OK : device.cpu->event_record(base, stream);
}

static sida_status stream_wait(sida_stream *stream, sida_event *base) {
    sida_status status = SIDA_OK;
    pthread_mutex_lock(&device.mutex);
    event *e = event_of(base);
    lane *l = lane_of(stream);
    bool ours = e->ours;
    if (l) {
        push(l, (item){.event = e, .record = e->issued, .wait = true});
    } else if (ours) { /* a copy stream comes behind it at once */
        drive(NULL, e, e->issued);
        status = status_of_all();
    }
    pthread_mutex_unlock(&device.mutex);
    return l || ours ? status : device.cpu->stream_wait(stream, base);
}

static sida_status event_synchronize(sida_event *base) {
    sida_status status = SIDA_OK;
    pthread_mutex_lock(&device.mutex);
    event *e = event_of(base);
    bool ours = e->ours;
    if (ours) {
        drive(NULL, e, e->issued);
        status = status_of_all();
    }
    pthread_mutex_unlock(&device.mutex);
    return ours ? status : device.cpu->event_synchronize(base);
}

/* --- ops that the learner takes from the back-end */

typedef struct embedding_arguments {
    float *out;
    sida_weight table;
    const int32_t *ids;
    int64_t n;
} embedding_arguments;

static sida_status run_embedding(const void *arguments) {
    const embedding_arguments *a = arguments;
    return sida_embedding_cpu(NULL, a->out, a->table, a->ids, a->n);
}
static sida_status embedding(sida_stream *stream, float *out, sida_weight table, const int32_t *ids,
                             int64_t n) {
    const embedding_arguments a = {out, table, ids, n};
    return streams_host_issue(stream, run_embedding, &a, sizeof a);
}

typedef struct norm_arguments {
    void *out;
    sida_dtype out_type;
    const float *x;
    sida_weight weight;
    int64_t n;
    float epsilon;
} norm_arguments;

static sida_status run_norm(const void *arguments) {
    const norm_arguments *a = arguments;
    return sida_rms_norm_cpu(NULL, a->out, a->out_type, a->x, a->weight, a->n, a->epsilon);
}
static sida_status norm(sida_stream *stream, void *out, sida_dtype out_type, const float *x,
                        sida_weight weight, int64_t n, float epsilon) {
    const norm_arguments a = {out, out_type, x, weight, n, epsilon};
    return streams_host_issue(stream, run_norm, &a, sizeof a);
}

/* --- for tests */

sida_status streams_host_issue(sida_stream *stream, streams_host_run *run, const void *arguments,
                               size_t bytes) {
    pthread_mutex_lock(&device.mutex);
    lane *l = lane_of(stream);
    if (l) {
        void *kept = malloc(bytes);
        memcpy(kept, arguments, bytes);
        push(l, (item){.run = run, .arguments = kept});
    }
    pthread_mutex_unlock(&device.mutex);
    return l ? SIDA_OK : run(arguments);
}

void streams_host_begin(sida_backend *backend, sida_stream_kind eager) {
    while (device.events) {
        event *e = device.events;
        device.events = e->next;
        free(e);
    }
    assert_null(device.lanes);
    device.cpu = backend->table;
    device.table = *backend->table;
    device.table.stream_create = stream_create;
    device.table.stream_destroy = stream_destroy;
    device.table.stream_synchronize = stream_synchronize;
    device.table.copy = copy;
    device.table.event_create = event_create;
    device.table.event_record = event_record;
    device.table.stream_wait = stream_wait;
    device.table.event_synchronize = event_synchronize;
    device.table.event_query = NULL; /* nobody asks */
    device.ops = sida_ops_cpu;
    device.ops.embedding = embedding;
    device.ops.rms_norm = norm;
    device.eager = eager;
    backend->table = &device.table;
    backend->ops = &device.ops;
}
