#include "trainer/feed.h"

#include "formats/base/memory.h"
#include "formats/base/queue.h"

#include <assert.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { buffers = 2, alignment = 256 };

/* A sequence of a part: where it is in the part, and its rank. */
typedef struct place {
    int32_t position, length;
} place;

struct sida_feed {
    sida_backend *backend;
    const sida_dataset *data;
    int32_t batch, part;
    const int32_t *order;
    int32_t count;
    sida_feed_limits limits;
    sida_feed_part parts[buffers];
    sida_stream *copies;
    sida_queue *empty, *full; /* of parts */
    pthread_t reader;
    bool reading;
    /* The reader's scratch. */
    place *places[2];    /* [part] in order of rank */
    int32_t *ranks[2];   /* [part] of each position */
    int32_t *lengths[2]; /* [part] of each position */
};

/* --- what a part looks like in memory: the same on host and device */

typedef struct layout {
    char *base; /* NULL: only counts */
    size_t used;
} layout;

static void *area(layout *at, int64_t count, size_t size) {
    size_t bytes = (size_t)count * size;
    void *start = at->base ? at->base + at->used : NULL;
    at->used += (bytes + alignment - 1) / alignment * alignment;
    return start;
}

/* The arrays of one side, to be written. */
typedef struct arrays {
    int32_t *start, *count, *step, *other_start, *other_count, *ids, *source;
    uint16_t *top_ids, *top_logp;
} arrays;

static arrays lay_side(layout *at, int64_t sequences, int64_t longest, int64_t tokens,
                       int64_t width) {
    return (arrays){.start = area(at, sequences, sizeof(int32_t)),
                    .count = area(at, sequences, sizeof(int32_t)),
                    .step = area(at, longest + 1, sizeof(int32_t)),
                    .other_start = area(at, sequences, sizeof(int32_t)),
                    .other_count = area(at, sequences, sizeof(int32_t)),
                    .ids = area(at, tokens, sizeof(int32_t)),
                    .source = area(at, tokens, sizeof(int32_t)),
                    .top_ids = area(at, tokens * width, sizeof(uint16_t)),
                    .top_logp = area(at, tokens * width, sizeof(uint16_t))};
}

static int64_t width_of(const sida_feed *feed, int side) {
    return (int64_t)feed->data->layers[side] * feed->data->top;
}

/* --- making one */

sida_status sida_feed_create(sida_feed **out, sida_backend *backend, const sida_dataset *data,
                             int32_t batch, int32_t part) {
    *out = NULL;
    sida_status status = SIDA_OK;
    sida_feed *feed = NULL;
    assert(batch > 0 && part >= 0 && data->top > 0);
    SIDA_TRY(SIDA_ALLOC(&feed, 1, "the training's input"));
    feed->backend = backend;
    feed->data = data;
    feed->batch = batch < data->sequences ? batch : data->sequences;
    feed->part = part == 0 || part > feed->batch ? feed->batch : part;
    for (int side = 0; side < 2; side++) {
        SIDA_TRY(SIDA_ALLOC(&feed->places[side], feed->part, "the training's input"));
        SIDA_TRY(SIDA_ALLOC(&feed->ranks[side], feed->part, "the training's input"));
        SIDA_TRY(SIDA_ALLOC(&feed->lengths[side], feed->part, "the training's input"));
    }
    SIDA_TRY(sida_stream_create(backend, &feed->copies, SIDA_STREAM_COPY));
    for (int i = 0; i < buffers; i++) {
        SIDA_TRY(sida_event_create(backend, &feed->parts[i].ready));
        SIDA_TRY(sida_event_create(backend, &feed->parts[i].used));
    }
    *out = feed;
    feed = NULL;
out:
    sida_feed_destroy(feed);
    return status;
}

/* Ends the reader, and waits until nothing uses the buffers any more. */
static void stop(sida_feed *feed) {
    if (feed->reading) {
        sida_queue_close(feed->empty, SIDA_OK);
        sida_queue_close(feed->full, SIDA_OK);
        pthread_join(feed->reader, NULL);
        feed->reading = false;
    }
    sida_queue_destroy(feed->empty);
    sida_queue_destroy(feed->full);
    feed->empty = feed->full = NULL;
    /* An error here shows again wherever the stream is used next. */
    if (feed->copies) (void)sida_stream_synchronize(feed->copies);
    for (int i = 0; i < buffers; i++)
        if (feed->parts[i].given) (void)sida_event_synchronize(feed->parts[i].used);
}

void sida_feed_destroy(sida_feed *feed) {
    if (!feed) return;
    stop(feed);
    for (int i = 0; i < buffers; i++) {
        sida_event_destroy(feed->parts[i].ready);
        sida_event_destroy(feed->parts[i].used);
        sida_buffer_destroy(feed->parts[i].host);
        sida_buffer_destroy(feed->parts[i].device);
        for (int side = 0; side < 2; side++)
            free((void *)(uintptr_t)feed->parts[i].sides[side].lengths);
    }
    sida_stream_destroy(feed->copies);
    for (int side = 0; side < 2; side++) {
        free(feed->places[side]);
        free(feed->ranks[side]);
        free(feed->lengths[side]);
    }
    free(feed);
}

/* --- filling a part */

static int64_t length_of(const sida_feed *feed, int side, int32_t sequence) {
    const int64_t *offsets = feed->data->sides[side].offsets + sequence;
    return feed->data->layers[side] > 0 ? offsets[1] - offsets[0] : 0;
}

static int by_falling_length(const void *a, const void *b) {
    const place *x = a, *y = b;
    if (x->length != y->length) return x->length < y->length ? 1 : -1;
    return x->position < y->position ? -1 : 1;
}

/* Sizes and ranks of the sequences order[0 … count). */
static void rank(sida_feed *feed, sida_feed_part *part, int side, const int32_t *order,
                 int32_t count) {
    sida_feed_side *s = &part->sides[side];
    place *places = feed->places[side];
    s->sequences = s->longest = 0;
    s->tokens = 0;
    for (int32_t i = 0; i < count; i++) {
        int32_t length = (int32_t)length_of(feed, side, order[i]);
        places[i] = (place){i, length};
        feed->lengths[side][i] = length;
        s->tokens += length;
        s->sequences += length > 0;
    }
    qsort(places, (size_t)count, sizeof *places, by_falling_length);
    for (int32_t r = 0; r < count; r++) {
        feed->ranks[side][places[r].position] = r;
        if (r < s->sequences) ((int32_t *)(uintptr_t)s->lengths)[r] = places[r].length;
    }
    if (count > 0) s->longest = places[0].length;
}

static void fill_side(const sida_feed *feed, const sida_feed_part *part, int side, const arrays *to,
                      const int32_t *order, int32_t count) {
    const sida_feed_side *s = &part->sides[side];
    const sida_dataset_side *from = &feed->data->sides[side];
    const place *places = feed->places[side];
    size_t width = (size_t)width_of(feed, side);
    int32_t running = s->sequences;
    to->step[0] = 0;
    for (int32_t t = 0; t < s->longest; t++) {
        while (places[running - 1].length <= t) running--;
        to->step[t + 1] = to->step[t] + running;
    }
    for (int32_t r = 0; r < s->sequences; r++) {
        int32_t there = feed->lengths[!side][places[r].position];
        to->start[r] = r;
        to->count[r] = places[r].length;
        to->other_start[r] = there > 0 ? feed->ranks[!side][places[r].position] : 0;
        to->other_count[r] = there;
    }
    int32_t token = 0;
    for (int32_t i = 0; i < count; i++) {
        int32_t length = feed->lengths[side][i], r = feed->ranks[side][i];
        if (length == 0) continue;
        int64_t first = from->offsets[order[i]];
        for (int32_t t = 0; t < length; t++) {
            to->ids[to->step[t] + r] = from->ids[first + t];
            to->source[to->step[t] + r] = token + t;
        }
        size_t items = (size_t)length * width, at = (size_t)first * width;
        memcpy(to->top_ids + (size_t)token * width, from->top_ids + at, items * sizeof(uint16_t));
        memcpy(to->top_logp + (size_t)token * width, from->top_logp + at, items * sizeof(uint16_t));
        token += length;
    }
}

static void point(sida_feed_side *side, const arrays *at) {
    side->start = at->start;
    side->count = at->count;
    side->step = at->step;
    side->other_start = at->other_start;
    side->other_count = at->other_count;
    side->ids = at->ids;
    side->source = at->source;
    side->top_ids = at->top_ids;
    side->top_logp = at->top_logp;
}

/* Into the part's host buffer, and on its way to the device. */
static sida_status prepare(sida_feed *feed, sida_feed_part *part, const int32_t *order,
                           int32_t count) {
    sida_status status = SIDA_OK;
    layout host = {.base = part->host->data}, device = {.base = part->device->data};
    if (part->uploaded) SIDA_TRY(sida_event_synchronize(part->ready));
    for (int side = 0; side < 2; side++) rank(feed, part, side, order, count);
    for (int side = 0; side < 2; side++) {
        sida_feed_side *s = &part->sides[side];
        int64_t width = width_of(feed, side);
        arrays to = lay_side(&host, s->sequences, s->longest, s->tokens, width);
        arrays there = lay_side(&device, s->sequences, s->longest, s->tokens, width);
        fill_side(feed, part, side, &to, order, count);
        point(s, &there);
    }
    if (part->given) SIDA_TRY(sida_stream_wait(feed->copies, part->used));
    SIDA_TRY(sida_copy(feed->copies, part->device->data, part->host->data, host.used));
    SIDA_TRY(sida_event_record(part->ready, feed->copies));
    part->uploaded = true;
out:
    return status;
}

static int32_t smaller(int32_t a, int32_t b) {
    return a < b ? a : b;
}

static void *read_all(void *argument) {
    sida_status status = SIDA_OK;
    sida_feed *feed = argument;
    for (int32_t first = 0; first < feed->count; first += feed->batch) {
        int32_t last = smaller(first + feed->batch, feed->count);
        for (int32_t at = first; at < last; at += feed->part) {
            void *part;
            SIDA_TRY(sida_queue_pop(feed->empty, &part, NULL));
            if (!part) return NULL; /* stopped */
            SIDA_TRY(prepare(feed, part, feed->order + at, smaller(feed->part, last - at)));
            SIDA_TRY(sida_queue_push(feed->full, part, NULL));
        }
    }
out:
    sida_queue_close(feed->full, status);
    return NULL;
}

/* --- an epoch */

static void raise32(int32_t *most, int64_t value) {
    if (value > *most) *most = (int32_t)value;
}

/* The largest part's bytes into *bytes. */
static sida_status measure(sida_feed *feed, size_t *bytes) {
    sida_feed_limits *most = &feed->limits;
    *most = (sida_feed_limits){.parts = (feed->batch - 1) / feed->part + 1};
    *bytes = 0;
    for (int32_t first = 0; first < feed->count; first += feed->batch) {
        int32_t last = smaller(first + feed->batch, feed->count);
        for (int32_t at = first; at < last; at += feed->part) {
            int32_t end = smaller(at + feed->part, last);
            layout counted = {0};
            raise32(&most->sequences, end - at);
            for (int side = 0; side < 2; side++) {
                int64_t tokens = 0, longest = 0;
                for (int32_t i = at; i < end; i++) {
                    int64_t length = length_of(feed, side, feed->order[i]);
                    tokens += length;
                    if (length > longest) longest = length;
                }
                if (tokens >= INT32_MAX)
                    return sida_fail(SIDA_ERROR_MEMORY,
                                     "%" PRId64 " tokens are too many for one batch: lower "
                                     "--device-batch or --batch",
                                     tokens);
                raise32(&most->longest[side], longest);
                if (tokens > most->tokens[side]) most->tokens[side] = tokens;
                (void)lay_side(&counted, end - at, longest, tokens, width_of(feed, side));
            }
            if (counted.used > *bytes) *bytes = counted.used;
        }
    }
    return SIDA_OK;
}

/* Room for `bytes` in both buffers of a part, and for its lengths; nothing uses them now. */
static sida_status reserve(sida_feed *feed, sida_feed_part *part, size_t bytes) {
    sida_status status = SIDA_OK;
    for (int side = 0; side < 2; side++)
        if (!part->sides[side].lengths)
            SIDA_TRY(SIDA_ALLOC(&part->sides[side].lengths, feed->part, "the training's input"));
    part->given = part->uploaded = false;
    if (part->device && part->device->bytes >= bytes) return SIDA_OK;
    sida_buffer_destroy(part->device);
    sida_buffer_destroy(part->host);
    part->device = part->host = NULL;
    SIDA_TRY(sida_buffer_create(feed->backend, &part->host, SIDA_MEMORY_HOST, bytes,
                                "the training's input on the host"));
    SIDA_TRY(sida_buffer_create(feed->backend, &part->device, SIDA_MEMORY_DEVICE, bytes,
                                "the training's input"));
out:
    return status;
}

sida_status sida_feed_begin(sida_feed *feed, const int32_t *order, int32_t count) {
    sida_status status = SIDA_OK;
    size_t bytes;
    stop(feed);
    feed->order = order;
    feed->count = count;
    SIDA_TRY(measure(feed, &bytes));
    if (count == 0) return SIDA_OK;
    SIDA_TRY(sida_queue_create(&feed->empty, buffers));
    SIDA_TRY(sida_queue_create(&feed->full, buffers));
    for (int i = 0; i < buffers; i++) {
        SIDA_TRY(reserve(feed, &feed->parts[i], bytes));
        SIDA_TRY(sida_queue_push(feed->empty, &feed->parts[i], NULL));
    }
    if (pthread_create(&feed->reader, NULL, read_all, feed) != 0)
        SIDA_FAIL(SIDA_ERROR_MEMORY, "the training's input: no thread could be started");
    feed->reading = true;
out:
    return status;
}

const sida_feed_limits *sida_feed_get_limits(const sida_feed *feed) {
    return &feed->limits;
}

sida_status sida_feed_take(sida_feed *feed, sida_stream *stream, sida_feed_part **out) {
    sida_status status = SIDA_OK;
    void *part = NULL;
    *out = NULL;
    SIDA_TRY(sida_queue_pop(feed->full, &part, NULL));
    assert(part && "no more parts than begin() was told of");
    *out = part;
    SIDA_TRY(sida_stream_wait(stream, (*out)->ready));
out:
    return status;
}

sida_status sida_feed_give(sida_feed *feed, sida_stream *stream, sida_feed_part *part) {
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_event_record(part->used, stream));
    part->given = true;
    SIDA_TRY(sida_queue_push(feed->empty, part, NULL));
out:
    return status;
}
