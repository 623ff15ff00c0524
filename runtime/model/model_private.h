/* Inside runtime/model: what loading makes and the forward pass reads. */
#ifndef SIDA_RUNTIME_MODEL_MODEL_PRIVATE_H
#define SIDA_RUNTIME_MODEL_MODEL_PRIVATE_H

#include "runtime/model/family.h"

typedef struct sida_block {
    sida_weight self_norm, q, k, v, o;
    sida_weight qkv; /* q, k and v as one matrix, where they lie so; else data is NULL */
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
    /* cross_k and cross_v of block 0, of block 1, … as one matrix, where they lie so; else data is
     * NULL. */
    sida_weight cross_kv;
    sida_dtype activation;      /* of what products read: F32, or BF16 with all weights */
    const void *embedding_host; /* in the checkpoint or the storage */
    sida_block *blocks[2];
    void *storage; /* of a model without a checkpoint: where its tensors were */
    void (*storage_destroy)(void *storage);
};

/* Where a model's tensors come from: a checkpoint, or a generator. */
typedef struct sida_tensor_source {
    const char *name; /* for messages */
    void *context;
    /* The tensor of a role (expert -1: the dense one) in *out; its bytes stay while the model
     * lives. A missing one or another shape is FORMAT. */
    sida_status (*find)(void *context, sida_tensor_view *out, sida_tensor_role role, int side,
                        int32_t block, int32_t expert, int rank, const int64_t *shape);
} sida_tensor_source;

/* An empty model; then its family and config are set; then sida_model_load() places every tensor.
 * sida_model_destroy() takes it at any point. */
sida_status sida_model_create(sida_model **out, sida_backend *backend);
sida_status sida_model_load(sida_model *model, const sida_tensor_source *source);

#endif
