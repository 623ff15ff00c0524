/* Model families: how a config.json is read, which blocks are sparse, and how tensors are named.
 * Nothing outside runtime/model knows a family. */
#ifndef SIDA_RUNTIME_MODEL_FAMILY_H
#define SIDA_RUNTIME_MODEL_FAMILY_H

#include "runtime/model/model.h"

/* What a family's config says; the part that users see is in `info` (without fingerprint, stored
 * types and sizes, which the weights decide). */
typedef struct sida_family_config {
    sida_model_info info;
    int32_t buckets, max_distance; /* relative position bias */
    float epsilon;                 /* of the norms */
    bool gated, tied;
    sida_activation activation;
    bool *sparse[2]; /* [layers of the side], owned */
} sida_family_config;

void sida_family_config_free(sida_family_config *config);

/* The tensors that a model consists of. */
typedef enum sida_tensor_role {
    SIDA_TENSOR_EMBEDDING,
    SIDA_TENSOR_HEAD,       /* untied models */
    SIDA_TENSOR_FINAL_NORM, /* of a side */
    SIDA_TENSOR_BIAS,       /* relative position bias of a side */
    SIDA_TENSOR_SELF_NORM,  /* of a block, as all below */
    SIDA_TENSOR_SELF_Q,
    SIDA_TENSOR_SELF_K,
    SIDA_TENSOR_SELF_V,
    SIDA_TENSOR_SELF_O,
    SIDA_TENSOR_CROSS_NORM,
    SIDA_TENSOR_CROSS_Q,
    SIDA_TENSOR_CROSS_K,
    SIDA_TENSOR_CROSS_V,
    SIDA_TENSOR_CROSS_O,
    SIDA_TENSOR_FF_NORM,
    SIDA_TENSOR_ROUTER,
    SIDA_TENSOR_WI, /* dense feed-forward, or an expert's */
    SIDA_TENSOR_WI_1,
    SIDA_TENSOR_WO
} sida_tensor_role;

enum { SIDA_TENSOR_NAME_MAX = 160 };

typedef struct sida_family {
    const char *model_type; /* of config.json */
    /* FORMAT for a field of the wrong type or range, UNSUPPORTED for what we cannot compute; each
     * names the field. `path` is for messages. */
    sida_status (*configure)(sida_family_config *out, const json_t *config, const char *path);
    /* The i-th name under which a tensor may be stored (they are tried in turn); false past the
     * last. expert -1: the dense one. */
    bool (*name)(char out[SIDA_TENSOR_NAME_MAX], const sida_family_config *config,
                 sida_tensor_role role, int32_t side, int32_t block, int32_t expert, int32_t i);
} sida_family;

extern const sida_family sida_family_switch_transformers;

/* NULL: no such family. */
const sida_family *sida_family_find(const char *model_type);
/* "switch_transformers, …": for messages. */
const char *sida_family_names(void);

/* --- config.json fields; each error names path and field */
/* A whole number in [low, high]. A missing field gives `fallback`, or an error when that is below
 * low. */
sida_status sida_config_i32(int32_t *out, const json_t *config, const char *path, const char *field,
                            int32_t low, int32_t high, int32_t fallback);
sida_status sida_config_f64(double *out, const json_t *config, const char *path, const char *field,
                            double low, double high, double fallback);
sida_status sida_config_bool(bool *out, const json_t *config, const char *path, const char *field,
                             bool fallback);
/* Borrowed from config; `fallback` when missing or null. */
sida_status sida_config_text(const char **out, const json_t *config, const char *path,
                             const char *field, const char *fallback);

#endif
