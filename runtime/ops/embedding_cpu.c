#include "runtime/ops/embedding.h"

#include "runtime/ops/cpu_kernels.h"

#include <assert.h>
#include <string.h>

static void embed_row(float *out, const void *table, sida_dtype dtype, int64_t first, int64_t d) {
    if (dtype == SIDA_F32) {
        memcpy(out, (const float *)table + first, (size_t)d * sizeof *out);
        return;
    }
    const uint16_t *bits = (const uint16_t *)table + first;
    for (int64_t i = 0; i < d; i++)
        out[i] = dtype == SIDA_BF16 ? sida_bf16_to_f32(bits[i]) : sida_f16_to_f32(bits[i]);
}

sida_status sida_embedding_cpu(sida_stream *stream, float *out, sida_weight table,
                               const int32_t *ids, int64_t n) {
    (void)stream;
    for (int64_t i = 0; i < n; i++) {
        assert(ids[i] >= 0 && ids[i] < table.rows);
        embed_row(out + i * table.cols, table.data, table.dtype, ids[i] * table.cols, table.cols);
    }
    return SIDA_OK;
}
