#include "runtime/ops/ops_cuda.h"

const sida_ops sida_ops_cuda = {.embedding = sida_embedding_cuda,
                                .rms_norm = sida_rms_norm_cuda,
                                .linear = sida_linear_cuda,
                                .gated = sida_gated_cuda,
                                .attention = sida_attention_cuda,
                                .append = sida_append_cuda,
                                .router = sida_router_cuda,
                                .dispatch = sida_dispatch_cuda,
                                .route = sida_route_cuda,
                                .expert = sida_expert_cuda,
                                .combine = sida_combine_cuda,
                                .lstm = sida_lstm_cuda,
                                .sparsemax_attention = sida_sparsemax_attention_cuda,
                                .stream_bytes = SIDA_CUDA_STREAM_BYTES,
                                .prepare = sida_prepare_cuda,
                                .bf16_activations = true,
                                .expert_adds = true};
