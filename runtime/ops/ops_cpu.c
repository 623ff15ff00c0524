#include "runtime/ops/ops.h"

#include <string.h>

const sida_ops sida_ops_cpu = {.embedding = sida_embedding_cpu,
                               .rms_norm = sida_rms_norm_cpu,
                               .linear = sida_linear_cpu,
                               .gated = sida_gated_cpu,
                               .attention = sida_attention_cpu,
                               .append = sida_append_cpu,
                               .router = sida_router_cpu,
                               .top = sida_top_cpu,
                               .dispatch = sida_dispatch_cpu,
                               .expert = sida_expert_cpu,
                               .combine = sida_combine_cpu,
                               .lstm = sida_lstm_cpu,
                               .sparsemax_attention = sida_sparsemax_attention_cpu,
                               .know = sida_know_cpu};

const sida_ops *sida_ops_of(const sida_backend *backend) {
    if (backend->ops) return backend->ops;
#ifdef SIDA_HAVE_CUDA
    if (strcmp(backend->table->name, "cuda") == 0) return &sida_ops_cuda;
#endif
    return &sida_ops_cpu;
}
