#include "formats/base/queue.h"

#include "formats/base/clock.h"
#include "formats/base/memory.h"

#include <assert.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

struct sida_queue {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    void **items; /* ring of `capacity` */
    size_t capacity, first, count;
    bool closed;
    sida_status reason;
    char message[1024];
};

sida_status sida_queue_create(sida_queue **out, size_t capacity) {
    assert(capacity > 0);
    *out = NULL;
    sida_queue *queue;
    sida_status status = SIDA_ALLOC(&queue, 1, "a queue");
    if (status != SIDA_OK) return status;
    status = SIDA_ALLOC(&queue->items, capacity, "a queue's items");
    if (status != SIDA_OK) {
        free(queue);
        return status;
    }
    queue->capacity = capacity;
    pthread_mutex_init(&queue->mutex, NULL);
    pthread_cond_init(&queue->changed, NULL);
    *out = queue;
    return SIDA_OK;
}

void sida_queue_destroy(sida_queue *queue) {
    if (!queue) return;
    pthread_cond_destroy(&queue->changed);
    pthread_mutex_destroy(&queue->mutex);
    free(queue->items);
    free(queue);
}

/* Waits for a change, mutex held; adds the time to *waited_seconds. */
static void wait_changed(sida_queue *queue, double *waited_seconds) {
    double begin = sida_clock_seconds();
    pthread_cond_wait(&queue->changed, &queue->mutex);
    if (waited_seconds) *waited_seconds += sida_clock_seconds() - begin;
}

sida_status sida_queue_push(sida_queue *queue, void *item, double *waited_seconds) {
    sida_status status = SIDA_OK;
    pthread_mutex_lock(&queue->mutex);
    while (!queue->closed && queue->count == queue->capacity) wait_changed(queue, waited_seconds);
    if (queue->closed) {
        status = sida_fail(SIDA_ERROR_CANCELLED, "%s",
                           queue->message[0] ? queue->message : "the queue is closed");
    } else {
        queue->items[(queue->first + queue->count++) % queue->capacity] = item;
        pthread_cond_broadcast(&queue->changed);
    }
    pthread_mutex_unlock(&queue->mutex);
    return status;
}

static void *take_first(sida_queue *queue) {
    void *item = queue->items[queue->first];
    queue->first = (queue->first + 1) % queue->capacity;
    queue->count--;
    pthread_cond_broadcast(&queue->changed);
    return item;
}

sida_status sida_queue_pop(sida_queue *queue, void **item, double *waited_seconds) {
    sida_status status = SIDA_OK;
    *item = NULL;
    pthread_mutex_lock(&queue->mutex);
    while (!queue->closed && queue->count == 0) wait_changed(queue, waited_seconds);
    if (queue->closed && queue->reason != SIDA_OK)
        status = sida_fail(queue->reason, "%s", queue->message);
    else if (queue->count > 0)
        *item = take_first(queue);
    pthread_mutex_unlock(&queue->mutex);
    return status;
}

void sida_queue_close(sida_queue *queue, sida_status reason) {
    pthread_mutex_lock(&queue->mutex);
    if (!queue->closed) {
        queue->closed = true;
        queue->reason = reason;
        if (reason != SIDA_OK)
            snprintf(queue->message, sizeof queue->message, "%s", sida_last_message());
        pthread_cond_broadcast(&queue->changed);
    }
    pthread_mutex_unlock(&queue->mutex);
}

void *sida_queue_drain(sida_queue *queue) {
    pthread_mutex_lock(&queue->mutex);
    void *item = queue->count > 0 ? take_first(queue) : NULL;
    pthread_mutex_unlock(&queue->mutex);
    return item;
}
