#include "runtime/ops/attention.h"

#include "runtime/ops/cpu_kernels.h"

#include <assert.h>
#include <math.h>
#include <string.h>

enum { MAX_DISTANCE = 4096, MAX_D_KV = 256 };

int32_t sida_relative_bucket(int32_t relative, bool bidirectional, int32_t buckets,
                             int32_t max_distance) {
    int32_t bucket = 0, r = relative;
    if (bidirectional) {
        buckets /= 2;
        if (r > 0) bucket = buckets;
        r = r < 0 ? -r : r;
    } else {
        r = r < 0 ? -r : 0;
    }
    int32_t exact = buckets / 2;
    if (r < exact) return bucket + r;
    /* The far ones first: their logarithm may be past what an int32_t holds. */
    if (r >= max_distance) return bucket + buckets - 1;
    float steps = logf((float)r / (float)exact) / (float)log((double)max_distance / (double)exact) *
                  (float)(buckets - exact);
    int32_t large = exact + (int32_t)steps;
    return bucket + (large < buckets - 1 ? large : buckets - 1);
}

/* Buckets of -max … max, remembered between the calls of one thread: every block asks for the same
 * ones. */
typedef struct bucket_table {
    bool bidirectional;
    int32_t buckets, max_distance;
    uint8_t of[2 * MAX_DISTANCE + 1];
} bucket_table;

static const uint8_t *bucket_table_get(bool bidirectional, int32_t buckets, int32_t max_distance) {
    static _Thread_local bucket_table tables[2];
    bucket_table *table = &tables[bidirectional];
    if (table->buckets == buckets && table->max_distance == max_distance) return table->of;
    for (int32_t r = -max_distance; r <= max_distance; r++)
        table->of[r + max_distance] =
            (uint8_t)sida_relative_bucket(r, bidirectional, buckets, max_distance);
    table->buckets = buckets;
    table->max_distance = max_distance;
    return table->of;
}

sida_status sida_append_cpu(sida_stream *stream, const sida_append_call *call) {
    (void)stream;
    for (int32_t s = 0; s < call->sequences; s++) {
        int64_t to = (call->start[s] + call->position[s]) * call->width;
        size_t row = (size_t)call->width * sizeof(float);
        for (int64_t i = 0; i < call->q_count[s]; i++, to += call->width) {
            int64_t from = (call->q_start[s] + i) * call->ld;
            memcpy(call->k_cache + to, call->k + from, row);
            memcpy(call->v_cache + to, call->v + from, row);
        }
    }
    return SIDA_OK;
}

sida_status sida_attention_cpu(sida_stream *stream, const sida_attention_call *call) {
    (void)stream;
    assert(call->out_type == SIDA_F32);
    const sida_cpu_kernels *kernels = sida_cpu_kernels_get();
    const uint8_t *buckets = NULL;
    if (call->d_kv < 1 || call->d_kv > MAX_D_KV)
        return sida_fail(SIDA_ERROR_UNSUPPORTED, "attention: d_kv %d is not in 1 … %d", call->d_kv,
                         MAX_D_KV);
    if (call->bias.data) {
        if (call->bias_max_distance < 1 || call->bias_max_distance > MAX_DISTANCE ||
            call->bias.rows < 4 || call->bias.rows > 256)
            return sida_fail(SIDA_ERROR_UNSUPPORTED, "attention: %d buckets up to distance %d",
                             (int)call->bias.rows, call->bias_max_distance);
        buckets = bucket_table_get(call->bias_bidirectional, (int32_t)call->bias.rows,
                                   call->bias_max_distance);
    }
    int32_t longest = 0;
    int64_t work = 0;
    for (int32_t s = 0; s < call->sequences; s++) {
        if (call->q_count[s] > longest) longest = call->q_count[s];
        work += (int64_t)call->q_count[s] * call->k_count[s];
    }
    int64_t blocks = (longest + SIDA_ATTENTION_QUERIES - 1) / SIDA_ATTENTION_QUERIES;
    int64_t tasks = blocks * call->heads * call->sequences;
    work *= 2 * (int64_t)call->d_kv * call->heads;
    int threads = work < SIDA_PARALLEL_WORK / 2 ? 1 : sida_ops_threads();
    (void)threads; /* without OpenMP */
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int32_t first = (int32_t)(task % blocks) * SIDA_ATTENTION_QUERIES;
        int32_t head = (int32_t)(task / blocks % call->heads);
        int32_t s = (int32_t)(task / blocks / call->heads);
        int32_t left = call->q_count[s] - first;
        if (left > 0)
            kernels->attention(call, buckets, s, head, first,
                               left < SIDA_ATTENTION_QUERIES ? left : SIDA_ATTENTION_QUERIES);
    }
    return SIDA_OK;
}
