/* Inside the CUDA ops. All of them return once their kernels have been issued; a fault shows in a
 * later call on the stream.
 *
 * Where the CPU's ops give a row the same bytes in any company, these promise less: the same build,
 * device and batch give the same bytes whatever the budget, policy and timing. There are no
 * atomics, sums have a fixed order, an expert's products depend on its own tokens alone; but which
 * kernel a dense product takes depends on its number of rows. */
#ifndef SIDA_RUNTIME_OPS_OPS_CUDA_H
#define SIDA_RUNTIME_OPS_OPS_CUDA_H

#include "runtime/ops/ops.h"

sida_embedding_fn sida_embedding_cuda;
sida_rms_norm_fn sida_rms_norm_cuda;
sida_linear_fn sida_linear_cuda;
sida_gated_fn sida_gated_cuda;
sida_attention_fn sida_attention_cuda;
sida_append_fn sida_append_cuda;
sida_router_fn sida_router_cuda;
sida_top_fn sida_top_cuda;
sida_dispatch_fn sida_dispatch_cuda;
sida_status sida_route_cuda(sida_stream *stream, const sida_router_call *router,
                            const sida_dispatch_call *dispatch);
sida_expert_fn sida_expert_cuda;
sida_combine_fn sida_combine_cuda;
sida_know_fn sida_know_cuda;
/* These two keep the CPU's promise: a sequence gives the same bytes alone, in a batch and step by
 * step. Forward only. */
sida_lstm_fn sida_lstm_cuda;
sida_sparsemax_attention_fn sida_sparsemax_attention_cuda;

/* Device bytes of a compute stream: cuBLAS's workspace, whose fixed size keeps its choice of kernel
 * from depending on anything but the shape, and room for activations in the weights' type. */
enum {
    SIDA_CUDA_WORKSPACE_BYTES = 16 << 20,
    SIDA_CUDA_SCRATCH_BYTES = 8 << 20,
    SIDA_CUDA_STREAM_BYTES = SIDA_CUDA_WORKSPACE_BYTES + SIDA_CUDA_SCRATCH_BYTES
};
/* Makes both, once a stream; training, which needs only the first, has it made by its products. */
sida_status sida_prepare_cuda(sida_stream *stream);

#endif
