#include "runtime/ops/dispatch.h"

#include <assert.h>
#include <string.h>

/* used [E]: scratch */
static void drop(const sida_dispatch_call *call, int64_t *used) {
    memset(call->dropped, 0, (size_t)call->n);
    if (call->capacity == 0) return;
    assert(call->k == 1);
    for (int32_t s = 0; s < call->sequences; s++) {
        memset(used, 0, (size_t)call->experts_total * sizeof *used);
        for (int64_t t = call->offsets[s]; t < call->offsets[s + 1]; t++)
            call->dropped[t] = used[call->experts[t]]++ >= call->capacity;
    }
}

sida_status sida_dispatch_cpu(sida_stream *stream, const sida_dispatch_call *call) {
    (void)stream;
    int32_t total = call->experts_total;
    int64_t *start = call->row_start;
    drop(call, start);
    memset(start, 0, ((size_t)total + 1) * sizeof *start);
    for (int64_t t = 0; t < call->n; t++)
        for (int32_t r = 0; r < call->k && !call->dropped[t]; r++)
            start[call->experts[t * call->k + r] + 1]++;
    for (int32_t e = 0; e < total; e++) start[e + 1] += start[e];
    /* start[e] runs from e's begin to its end, which is e + 1's begin: then everything moves up. */
    for (int64_t t = 0; t < call->n; t++)
        for (int32_t r = 0; r < call->k && !call->dropped[t]; r++) {
            int64_t row = t * call->k + r;
            call->rows[start[call->experts[row]]++] = (int32_t)row;
        }
    memmove(start + 1, start, (size_t)total * sizeof *start);
    start[0] = 0;
    int32_t busy = 0;
    for (int32_t e = 0; e < total; e++)
        if (start[e + 1] > start[e]) call->busy[busy++] = e;
    *call->busy_count = busy;
    return SIDA_OK;
}
