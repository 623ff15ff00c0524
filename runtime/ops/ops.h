/* The table of ops of a device. Each op's contract (shapes, units, errors, source) is in its own
 * header; pointers are device pointers of the stream's back-end, index arrays included. An op may
 * return before it has finished; on the CPU it never does.
 *
 * Every op of the CPU computes a token's row from that token's data alone, in an order that does
 * not depend on which other rows are in the call, nor on the number of threads: a sequence gives
 * the same bytes alone and in a batch. CUDA's ops give the same bytes for the same batch
 * (ops_cuda.h). */
#ifndef SIDA_RUNTIME_OPS_OPS_H
#define SIDA_RUNTIME_OPS_OPS_H

#include "runtime/backend/backend.h"
#include "runtime/ops/attention.h"
#include "runtime/ops/dispatch.h"
#include "runtime/ops/elementwise.h"
#include "runtime/ops/embedding.h"
#include "runtime/ops/expert.h"
#include "runtime/ops/know.h"
#include "runtime/ops/linear.h"
#include "runtime/ops/lstm.h"
#include "runtime/ops/norm.h"
#include "runtime/ops/router.h"
#include "runtime/ops/sparsemax.h"
#include "runtime/ops/top.h"

typedef struct sida_ops {
    sida_embedding_fn *embedding;
    sida_rms_norm_fn *rms_norm;
    sida_linear_fn *linear;
    sida_gated_fn *gated;
    sida_attention_fn *attention;
    sida_append_fn *append;
    sida_router_fn *router;
    sida_top_fn *top;
    sida_dispatch_fn *dispatch;
    /* router and then dispatch of its choice, as one; NULL: call the two. */
    sida_status (*route)(sida_stream *stream, const sida_router_call *router,
                         const sida_dispatch_call *dispatch);
    sida_expert_fn *expert;
    sida_combine_fn *combine;
    sida_lstm_fn *lstm;
    sida_sparsemax_attention_fn *sparsemax_attention;
    sida_know_fn *know;
    /* Device bytes that the ops take for a compute stream, and what takes them; a caller who does
     * not prepare a stream finds the time and the bytes spent in its first product. NULL: nothing
     * to prepare. */
    size_t stream_bytes;
    sida_status (*prepare)(sida_stream *stream);
    /* What products read may be BF16 where their weights are. */
    bool bf16_activations;
    bool expert_adds; /* expert adds into h itself where k is 1 */
} sida_ops;

/* The ops of a back-end; never NULL. */
const sida_ops *sida_ops_of(const sida_backend *backend);
extern const sida_ops sida_ops_cpu;
/* Where CUDA is built in. */
extern const sida_ops sida_ops_cuda;

#endif
