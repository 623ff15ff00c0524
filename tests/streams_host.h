/* A device's compute streams on the host, for a learner over train_ops_host.c. The CPU's back-end
 * runs work as it is issued; here it is put off until the host waits for it, and then run in an
 * order in which one kind of stream goes on for as long as no event holds it back. So what is not
 * ordered by an event comes too late, or too early. */
#ifndef SIDA_TESTS_STREAMS_HOST_H
#define SIDA_TESTS_STREAMS_HOST_H

#include "runtime/backend/backend.h"

/* The CPU's back-end becomes such a device, the only one at a time; its streams of kind `eager`
 * are those that go on. Before anything is made on it, and until it is destroyed. */
void streams_host_begin(sida_backend *backend, sida_stream_kind eager);

/* Runs run(arguments), of which a copy is kept, on a stream of such a device when its turn comes;
 * on others at once. run's status is that of the stream from then on. */
typedef sida_status streams_host_run(const void *arguments);
sida_status streams_host_issue(sida_stream *stream, streams_host_run *run, const void *arguments,
                               size_t bytes);

#endif
