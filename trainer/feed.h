/* Minibatches for a device, prepared ahead: a thread copies them out of the data into pinned
 * buffers, in the order of rows that the LSTM takes (runtime/ops/rnn.h), and a copy stream uploads
 * the next one while the last is computed. Two buffers on each side; nothing is allocated once
 * begin() has returned.
 *
 * A batch is what the CPU's trainer has as a batch. It is cut into parts, whose sequences are
 * computed at a time. */
#ifndef SIDA_TRAINER_FEED_H
#define SIDA_TRAINER_FEED_H

#include "runtime/backend/backend.h"
#include "trainer/dataset.h"

#include <stdint.h>

/* One side of a part. Ranks are by falling length, sequences without tokens left out. */
typedef struct sida_feed_side {
    int32_t sequences, longest;
    int64_t tokens;                     /* n, rows: token t of rank r is in row step[t] + r */
    const int32_t *lengths;             /* [sequences] on the host; all others on the device */
    const int32_t *ids;                 /* [n] */
    const int32_t *source;              /* [n] where the row's token is in the two lists */
    const uint16_t *top_ids, *top_logp; /* [n, layers, top] */
    const int32_t *start, *count;       /* [sequences] rank and length */
    const int32_t *step;                /* [longest + 1] */
    /* [sequences] rank and length of the same sequences on the other side; where it has no tokens
     * there, 0 and 0. */
    const int32_t *other_start, *other_count;
} sida_feed_side;

typedef struct sida_feed_part {
    sida_feed_side sides[2];
    /* The rest is the feed's own. */
    sida_buffer *host, *device;
    sida_event *ready, *used;
    bool uploaded, given; /* the events have been recorded */
} sida_feed_part;

/* The most of any part between a begin() and the next, and of any batch. */
typedef struct sida_feed_limits {
    int32_t sequences, longest[2];
    int64_t tokens[2];
    int32_t parts; /* of a batch */
} sida_feed_limits;

typedef struct sida_feed sida_feed;

/* Borrows backend and data. batch: sequences; part: of a batch, at a time; 0: all. */
sida_status sida_feed_create(sida_feed **out, sida_backend *backend, const sida_dataset *data,
                             int32_t batch, int32_t part);
void sida_feed_destroy(sida_feed *feed); /* waits for what reads its buffers; takes NULL */

/* Starts on order[0 … count), borrowed until the last part has been taken; what is left of the last
 * begin() is dropped. BUDGET where the device has no memory for the buffers. */
sida_status sida_feed_begin(sida_feed *feed, const int32_t *order, int32_t count);
const sida_feed_limits *sida_feed_get_limits(const sida_feed *feed);

/* The next part; `stream` waits until it has been uploaded. */
sida_status sida_feed_take(sida_feed *feed, sida_stream *stream, sida_feed_part **out);
/* All work that reads the part has been issued to `stream`. */
sida_status sida_feed_give(sida_feed *feed, sida_stream *stream, sida_feed_part *part);

#endif
