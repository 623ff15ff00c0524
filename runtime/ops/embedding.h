/* out[i] = table[ids[i]], as fp32. */
#ifndef SIDA_RUNTIME_OPS_EMBEDDING_H
#define SIDA_RUNTIME_OPS_EMBEDDING_H

#include "runtime/ops/linear.h"

/* out [n, table.cols]; ids [n], each in [0, table.rows) (checked by whoever made them). */
typedef sida_status sida_embedding_fn(sida_stream *stream, float *out, sida_weight table,
                                      const int32_t *ids, int64_t n);
sida_embedding_fn sida_embedding_cpu;

#endif
