/* A bounded queue of pointers between threads. Closing it wakes everybody: an error on one side
 * never leaves the other asleep. */
#ifndef SIDA_FORMATS_BASE_QUEUE_H
#define SIDA_FORMATS_BASE_QUEUE_H

#include "formats/base/status.h"

#include <stddef.h>

typedef struct sida_queue sida_queue;

/* capacity >= 1 items. */
sida_status sida_queue_create(sida_queue **out, size_t capacity);
/* Items still inside are not freed: close and drain first. Takes NULL. */
void sida_queue_destroy(sida_queue *queue);

/* Blocks while full. SIDA_ERROR_CANCELLED (item not taken) once the queue is closed.
 * *waited_seconds, if not NULL, grows by the time spent blocked. */
sida_status sida_queue_push(sida_queue *queue, void *item, double *waited_seconds);

/* Blocks while empty. Once closed and empty: *item = NULL and the status given to close(), SIDA_OK
 * for a plain end. After an error close, what is still queued is not handed out any more (drain
 * takes it). */
sida_status sida_queue_pop(sida_queue *queue, void **item, double *waited_seconds);

/* No more items. `reason` SIDA_OK: the end; anything else: an error that pop returns, with the
 * closing thread's message. The first close counts. */
void sida_queue_close(sida_queue *queue, sida_status reason);

/* Takes one item without blocking, closed or not; NULL when empty. */
void *sida_queue_drain(sida_queue *queue);

#endif
