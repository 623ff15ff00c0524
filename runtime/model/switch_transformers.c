/* Switch Transformers (Fedus, Zoph and Shazeer 2022) as Hugging Face stores and computes it. */
#include "runtime/model/family.h"

#include "formats/base/memory.h"

#include <stdio.h>
#include <string.h>

/* Beyond these a config is a mistake or an attack; the largest published model is far below. */
enum {
    MAX_VOCABULARY = 1 << 22,
    MAX_WIDTH = 1 << 16,
    MAX_LAYERS = 1024,
    MAX_HEADS = 1024,
    MAX_D_KV = 256,
    MAX_EXPERTS = 1 << 16,
    MAX_CAPACITY = 1 << 30,
    MAX_BUCKETS = 256,
    MAX_DISTANCE = 4096
};

/* Block i is sparse if i % step == 1 or step == 1; a step of 0: none. A step stored in the config
 * wins over layers / sparse layers, and no sparse layers mean a step of `layers`: both as
 * Transformers does it. */
static sida_status read_sparse(sida_family_config *out, const json_t *config, const char *path,
                               int side) {
    static const char *const counts[] = {"num_sparse_encoder_layers", "num_sparse_decoder_layers"};
    static const char *const steps[] = {"encoder_sparse_step", "decoder_sparse_step"};
    sida_status status = SIDA_OK;
    int32_t layers = out->info.layers[side], count, step;
    SIDA_TRY(sida_config_i32(&count, config, path, counts[side], 0, MAX_LAYERS, 3));
    SIDA_TRY(sida_config_i32(&step, config, path, steps[side], 0, MAX_LAYERS,
                             count > 0 ? layers / count : layers));
    SIDA_TRY(SIDA_ALLOC(&out->sparse[side], layers, "the layers"));
    for (int32_t i = 0; i < layers; i++) {
        out->sparse[side][i] = step > 0 && (step == 1 || i % step == 1);
        out->info.moe_layers[side] += out->sparse[side][i];
    }
out:
    return status;
}

/* feed_forward_proj, is_gated_act and dense_act_fn say the same thing three times; Transformers
 * writes all of them or some. */
static sida_status read_activation(sida_family_config *out, const json_t *config,
                                   const char *path) {
    sida_status status = SIDA_OK;
    const char *projection, *function;
    bool gated;
    SIDA_TRY(sida_config_text(&projection, config, path, "feed_forward_proj", NULL));
    SIDA_TRY(sida_config_text(&function, config, path, "dense_act_fn", NULL));
    out->gated = projection && strncmp(projection, "gated-", 6) == 0;
    SIDA_TRY(sida_config_bool(&gated, config, path, "is_gated_act", out->gated));
    if (projection && gated != out->gated)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: feed_forward_proj is %.60s, but is_gated_act is %s", path,
                  projection, gated ? "true" : "false");
    out->gated = gated;
    const char *name = projection ? projection + (gated ? 6 : 0) : function ? function : "relu";
    /* T5 means the tanh form by "gated-gelu". */
    if (gated && (strcmp(name, "gelu") == 0 || strcmp(name, "gelu_new") == 0))
        out->activation = SIDA_ACT_GELU_NEW;
    else if (gated && strcmp(name, "silu") == 0)
        out->activation = SIDA_ACT_SILU;
    else if (strcmp(name, "relu") == 0)
        out->activation = SIDA_ACT_RELU;
    else
        SIDA_FAIL(SIDA_ERROR_UNSUPPORTED,
                  "%s: %s %.60s is not one of relu, gated-relu, gated-gelu, gated-silu", path,
                  projection ? "feed_forward_proj" : "dense_act_fn",
                  projection ? projection : name);
    static const char *const functions[] = {"relu", "gelu_new", "silu"};
    if (function && strcmp(function, functions[out->activation]) != 0)
        SIDA_FAIL(SIDA_ERROR_UNSUPPORTED, "%s: dense_act_fn %.60s, where %s was expected", path,
                  function, functions[out->activation]);
out:
    return status;
}

/* What would change the answers and is not there. */
static sida_status refuse_unsupported(const json_t *config, const char *path) {
    static const char *const flags[] = {"router_bias", "scale_decoder_outputs"};
    sida_status status = SIDA_OK;
    bool on;
    const char *text;
    int32_t number;
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
        SIDA_TRY(sida_config_bool(&on, config, path, flags[i], false));
        if (on) SIDA_FAIL(SIDA_ERROR_UNSUPPORTED, "%s: %s true", path, flags[i]);
    }
    SIDA_TRY(sida_config_bool(&on, config, path, "is_encoder_decoder", true));
    if (!on) SIDA_FAIL(SIDA_ERROR_UNSUPPORTED, "%s: is_encoder_decoder false", path);
    SIDA_TRY(sida_config_text(&text, config, path, "router_dtype", "float32"));
    if (strcmp(text, "float32") != 0)
        SIDA_FAIL(SIDA_ERROR_UNSUPPORTED, "%s: router_dtype %.60s; only float32", path, text);
    SIDA_TRY(sida_config_text(&text, config, path, "router_type", "tokens_masked"));
    if (strcmp(text, "tokens_masked") != 0)
        SIDA_FAIL(SIDA_ERROR_UNSUPPORTED, "%s: router_type %.60s; only tokens_masked", path, text);
    SIDA_TRY(sida_config_i32(&number, config, path, "num_selected_experts", 1, MAX_EXPERTS, 1));
    if (number != 1)
        SIDA_FAIL(SIDA_ERROR_UNSUPPORTED, "%s: num_selected_experts %d; only 1", path, number);
out:
    return status;
}

static sida_status configure(sida_family_config *out, const json_t *config, const char *path) {
    sida_status status = SIDA_OK;
    sida_model_info *info = &out->info;
    double epsilon;
    struct {
        int32_t *value;
        const char *field;
        int32_t low, high, fallback; /* a fallback below low: the field is needed */
    } fields[] = {
        {&info->vocabulary, "vocab_size", 2, MAX_VOCABULARY, -1},
        {&info->d_model, "d_model", 1, MAX_WIDTH, -1},
        {&info->d_kv, "d_kv", 1, MAX_D_KV, -1},
        {&info->heads, "num_heads", 1, MAX_HEADS, -1},
        {&info->d_ff, "d_ff", 1, MAX_WIDTH, -1},
        {&info->layers[SIDA_ENCODER], "num_layers", 1, MAX_LAYERS, -1},
        {&info->experts, "num_experts", 1, MAX_EXPERTS, -1},
        {&info->capacity, "expert_capacity", 1, MAX_CAPACITY, 64},
        {&out->buckets, "relative_attention_num_buckets", 4, MAX_BUCKETS, 32},
        {&out->max_distance, "relative_attention_max_distance", 2, MAX_DISTANCE, 128},
        {&info->pad, "pad_token_id", 0, MAX_VOCABULARY, 0},
        {&info->eos, "eos_token_id", 0, MAX_VOCABULARY, 1},
        {&info->decoder_start, "decoder_start_token_id", 0, MAX_VOCABULARY, 0},
    };
    info->family = sida_family_switch_transformers.model_type;
    info->top_k = 1;
    SIDA_TRY(refuse_unsupported(config, path));
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        SIDA_TRY(sida_config_i32(fields[i].value, config, path, fields[i].field, fields[i].low,
                                 fields[i].high, fields[i].fallback));
    if (json_is_null(json_object_get(config, "num_decoder_layers")))
        info->layers[SIDA_DECODER] = info->layers[SIDA_ENCODER];
    else
        SIDA_TRY(sida_config_i32(&info->layers[SIDA_DECODER], config, path, "num_decoder_layers", 1,
                                 MAX_LAYERS, info->layers[SIDA_ENCODER]));
    if (info->pad >= info->vocabulary || info->eos >= info->vocabulary ||
        info->decoder_start >= info->vocabulary)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: a special token id is not below vocab_size %d", path,
                  info->vocabulary);
    /* Below, the logarithmic buckets would have no room. */
    if (out->buckets % 4 != 0 || out->max_distance <= out->buckets / 2)
        SIDA_FAIL(SIDA_ERROR_UNSUPPORTED, "%s: %d relative attention buckets up to distance %d",
                  path, out->buckets, out->max_distance);
    SIDA_TRY(sida_config_f64(&epsilon, config, path, "layer_norm_epsilon", 0.0, 1.0, 1e-6));
    out->epsilon = (float)epsilon;
    SIDA_TRY(sida_config_bool(&out->tied, config, path, "tie_word_embeddings", true));
    SIDA_TRY(read_activation(out, config, path));
    for (int side = 0; side < 2; side++) SIDA_TRY(read_sparse(out, config, path, side));
    info->sites = info->moe_layers[SIDA_ENCODER] + info->moe_layers[SIDA_DECODER];
    if (info->sites == 0)
        SIDA_FAIL(SIDA_ERROR_UNSUPPORTED, "%s: no MoE layer in either stack", path);
    if (info->experts > INT32_MAX / info->sites)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: %d MoE layers of %d experts", path, info->sites,
                  info->experts);
    info->expert = (sida_expert_shape){
        .d_model = info->d_model,
        .d_ff = info->d_ff,
        .gated = out->gated,
        .activation = out->activation,
    };
out:
    return status;
}

static bool name(char out[SIDA_TENSOR_NAME_MAX], const sida_family_config *config,
                 sida_tensor_role role, int32_t side, int32_t block, int32_t expert, int32_t i) {
    static const char *const stacks[] = {"encoder", "decoder"};
    static const char *const parts[] = {
        [SIDA_TENSOR_SELF_NORM] = "layer_norm",
        [SIDA_TENSOR_SELF_Q] = "SelfAttention.q",
        [SIDA_TENSOR_SELF_K] = "SelfAttention.k",
        [SIDA_TENSOR_SELF_V] = "SelfAttention.v",
        [SIDA_TENSOR_SELF_O] = "SelfAttention.o",
        [SIDA_TENSOR_CROSS_NORM] = "layer_norm",
        [SIDA_TENSOR_CROSS_Q] = "EncDecAttention.q",
        [SIDA_TENSOR_CROSS_K] = "EncDecAttention.k",
        [SIDA_TENSOR_CROSS_V] = "EncDecAttention.v",
        [SIDA_TENSOR_CROSS_O] = "EncDecAttention.o",
        [SIDA_TENSOR_FF_NORM] = "layer_norm",
        [SIDA_TENSOR_ROUTER] = "mlp.router.classifier",
        [SIDA_TENSOR_WI] = "wi",
        [SIDA_TENSOR_WI_1] = "wi_1",
        [SIDA_TENSOR_WO] = "wo",
    };
    static const char *const embeddings[] = {"shared.weight", "encoder.embed_tokens.weight",
                                             "decoder.embed_tokens.weight"};
    const char *stack = stacks[side];
    const char *own = config->gated && role == SIDA_TENSOR_WI ? "wi_0" : parts[role];
    if (role == SIDA_TENSOR_EMBEDDING) {
        if (i >= 3) return false;
        snprintf(out, SIDA_TENSOR_NAME_MAX, "%s", embeddings[i]);
        return true;
    }
    if (i > 0) return false;
    int layer = role <= SIDA_TENSOR_SELF_O ? 0 : role <= SIDA_TENSOR_CROSS_O ? 1 : 1 + side;
    if (role == SIDA_TENSOR_HEAD)
        snprintf(out, SIDA_TENSOR_NAME_MAX, "lm_head.weight");
    else if (role == SIDA_TENSOR_FINAL_NORM)
        snprintf(out, SIDA_TENSOR_NAME_MAX, "%s.final_layer_norm.weight", stack);
    else if (role == SIDA_TENSOR_BIAS)
        snprintf(out, SIDA_TENSOR_NAME_MAX,
                 "%s.block.0.layer.0.SelfAttention.relative_attention_bias.weight", stack);
    else if (role < SIDA_TENSOR_WI)
        snprintf(out, SIDA_TENSOR_NAME_MAX, "%s.block.%d.layer.%d.%s.weight", stack, block, layer,
                 own);
    else if (expert < 0)
        snprintf(out, SIDA_TENSOR_NAME_MAX, "%s.block.%d.layer.%d.mlp.%s.weight", stack, block,
                 layer, own);
    else
        snprintf(out, SIDA_TENSOR_NAME_MAX, "%s.block.%d.layer.%d.mlp.experts.expert_%d.%s.weight",
                 stack, block, layer, expert, own);
    return true;
}

const sida_family sida_family_switch_transformers = {"switch_transformers", configure, name};
