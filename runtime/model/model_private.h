/* Inside runtime/model: what loading makes and the forward pass reads. */
#ifndef SIDA_RUNTIME_MODEL_MODEL_PRIVATE_H
#define SIDA_RUNTIME_MODEL_MODEL_PRIVATE_H

#include "runtime/model/family.h"

typedef struct sida_block {
    sida_weight self_norm, q, k, v, o;
    sida_weight cross_norm, cross_q, cross_k, cross_v, cross_o; /* decoder */
    sida_weight ff_norm;
    sida_weight router;       /* sparse blocks */
    sida_weight wi, wi_1, wo; /* dense blocks; wi_1 when gated */
    int32_t site;             /* -1: dense */
} sida_block;

struct sida_model {
    sida_backend *backend;
    const sida_ops *ops;
    sida_checkpoint *checkpoint;
    const sida_family *family;
    sida_family_config config;
    sida_buffer *dense; /* every weight but the experts' */
    sida_buffer *slab;  /* the experts, on the host */
    sida_weight embedding, head, final_norm[2], bias[2];
    const void *embedding_host; /* in the checkpoint */
    sida_block *blocks[2];
};

#endif
