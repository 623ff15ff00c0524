#include "runtime/model/model_private.h"

#include "formats/base/log.h"
#include "formats/base/memory.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* A dense tensor on its way to the device. */
typedef struct placement {
    sida_weight *target;
    sida_tensor_view view;
    size_t offset;
} placement;

typedef struct loader {
    sida_model *model;
    const sida_tensor_source *source;
    placement *placements;
    size_t count, capacity;
    size_t bytes;
} loader;

/* A checkpoint as a source of tensors. */
typedef struct checkpoint_source {
    const sida_model *model;
    size_t used; /* tensors that belong to the model */
} checkpoint_source;

enum { TENSOR_ALIGNMENT = 256 };

/* The tensor of a role, under whichever of its names is there. */
static sida_status find_stored(void *context, sida_tensor_view *out, sida_tensor_role role,
                               int side, int32_t block, int32_t expert, int rank,
                               const int64_t *shape) {
    sida_status status = SIDA_OK;
    checkpoint_source *source = context;
    const sida_model *model = source->model;
    const sida_tensor_view *view;
    char name[SIDA_TENSOR_NAME_MAX];
    int32_t i = 0;
    while (model->family->name(name, &model->config, role, side, block, expert, i) &&
           !sida_checkpoint_find(model->checkpoint, name))
        i++;
    /* Under none of them: the message names the first. */
    if (!sida_checkpoint_find(model->checkpoint, name))
        model->family->name(name, &model->config, role, side, block, expert, 0);
    SIDA_TRY(sida_checkpoint_tensor(&view, model->checkpoint, name, rank, shape));
    source->used++;
    *out = *view;
out:
    return status;
}

/* rows 0: a vector of cols. */
static sida_status place(loader *load, sida_weight *target, sida_tensor_role role, int side,
                         int32_t block, int64_t rows, int64_t cols) {
    sida_status status = SIDA_OK;
    sida_tensor_view view;
    int64_t shape[2] = {rows, cols};
    SIDA_TRY(load->source->find(load->source->context, &view, role, side, block, -1, rows ? 2 : 1,
                                rows ? shape : shape + 1));
    SIDA_TRY(SIDA_GROW(&load->placements, &load->capacity, load->count + 1, "the tensors"));
    load->placements[load->count++] = (placement){target, view, load->bytes};
    *target = (sida_weight){NULL, view.dtype, rows ? rows : 1, cols};
    load->bytes += (view.bytes + TENSOR_ALIGNMENT - 1) / TENSOR_ALIGNMENT * TENSOR_ALIGNMENT;
out:
    return status;
}

/* Some files repeat the embedding under other names; a different one would change the answers. */
static sida_status check_copies_of_embedding(checkpoint_source *source) {
    const sida_model *model = source->model;
    const sida_tensor_view *first = NULL;
    char name[SIDA_TENSOR_NAME_MAX];
    for (int32_t i = 0;
         model->family->name(name, &model->config, SIDA_TENSOR_EMBEDDING, 0, 0, -1, i); i++) {
        const sida_tensor_view *view = sida_checkpoint_find(model->checkpoint, name);
        if (!view) continue;
        if (!first) {
            first = view;
            continue;
        }
        source->used++;
        if (view->dtype != first->dtype || view->bytes != first->bytes ||
            memcmp(view->data, first->data, first->bytes) != 0)
            return sida_fail(
                SIDA_ERROR_UNSUPPORTED,
                "%s: %s and %s differ; only one embedding for both stacks is supported",
                sida_checkpoint_folder(model->checkpoint), first->name, view->name);
    }
    return SIDA_OK;
}

static sida_status place_block(loader *load, int side, int32_t i, int32_t *site) {
    sida_status status = SIDA_OK;
    const sida_family_config *config = &load->model->config;
    const sida_model_info *info = &config->info;
    sida_block *block = &load->model->blocks[side][i];
    int64_t d = info->d_model, inner = (int64_t)info->heads * info->d_kv, ff = info->d_ff;
    SIDA_TRY(place(load, &block->self_norm, SIDA_TENSOR_SELF_NORM, side, i, 0, d));
    SIDA_TRY(place(load, &block->q, SIDA_TENSOR_SELF_Q, side, i, inner, d));
    SIDA_TRY(place(load, &block->k, SIDA_TENSOR_SELF_K, side, i, inner, d));
    SIDA_TRY(place(load, &block->v, SIDA_TENSOR_SELF_V, side, i, inner, d));
    SIDA_TRY(place(load, &block->o, SIDA_TENSOR_SELF_O, side, i, d, inner));
    if (side == SIDA_DECODER) {
        SIDA_TRY(place(load, &block->cross_norm, SIDA_TENSOR_CROSS_NORM, side, i, 0, d));
        SIDA_TRY(place(load, &block->cross_q, SIDA_TENSOR_CROSS_Q, side, i, inner, d));
        SIDA_TRY(place(load, &block->cross_o, SIDA_TENSOR_CROSS_O, side, i, d, inner));
    }
    SIDA_TRY(place(load, &block->ff_norm, SIDA_TENSOR_FF_NORM, side, i, 0, d));
    if (config->sparse[side][i]) {
        block->site = (*site)++;
        SIDA_TRY(place(load, &block->router, SIDA_TENSOR_ROUTER, side, i, info->experts, d));
        return SIDA_OK;
    }
    block->site = -1;
    SIDA_TRY(place(load, &block->wi, SIDA_TENSOR_WI, side, i, ff, d));
    if (config->gated) SIDA_TRY(place(load, &block->wi_1, SIDA_TENSOR_WI_1, side, i, ff, d));
    SIDA_TRY(place(load, &block->wo, SIDA_TENSOR_WO, side, i, d, ff));
out:
    return status;
}

/* Side by side through all blocks: every one of them is multiplied with the encoder's output. */
static sida_status place_cross(loader *load) {
    sida_status status = SIDA_OK;
    const sida_model_info *info = &load->model->config.info;
    int64_t d = info->d_model, inner = (int64_t)info->heads * info->d_kv;
    for (int32_t i = 0; i < info->layers[SIDA_DECODER]; i++) {
        sida_block *block = &load->model->blocks[SIDA_DECODER][i];
        SIDA_TRY(place(load, &block->cross_k, SIDA_TENSOR_CROSS_K, SIDA_DECODER, i, inner, d));
        SIDA_TRY(place(load, &block->cross_v, SIDA_TENSOR_CROSS_V, SIDA_DECODER, i, inner, d));
    }
out:
    return status;
}

static sida_status place_dense(loader *load) {
    sida_status status = SIDA_OK;
    sida_model *model = load->model;
    const sida_model_info *info = &model->config.info;
    int32_t site = 0;
    SIDA_TRY(place(load, &model->embedding, SIDA_TENSOR_EMBEDDING, 0, 0, info->vocabulary,
                   info->d_model));
    model->embedding_host = load->placements[load->count - 1].view.data;
    if (!model->config.tied)
        SIDA_TRY(
            place(load, &model->head, SIDA_TENSOR_HEAD, 0, 0, info->vocabulary, info->d_model));
    for (int side = 0; side < 2; side++) {
        SIDA_TRY(place(load, &model->final_norm[side], SIDA_TENSOR_FINAL_NORM, side, 0, 0,
                       info->d_model));
        SIDA_TRY(place(load, &model->bias[side], SIDA_TENSOR_BIAS, side, 0, model->config.buckets,
                       info->heads));
        SIDA_TRY(SIDA_ALLOC(&model->blocks[side], info->layers[side], "the blocks"));
        for (int32_t i = 0; i < info->layers[side]; i++)
            SIDA_TRY(place_block(load, side, i, &site));
    }
    SIDA_TRY(place_cross(load));
    model->config.info.dense_bytes = load->bytes;
out:
    return status;
}

static sida_status copy_dense(loader *load) {
    sida_status status = SIDA_OK;
    sida_model *model = load->model;
    sida_stream *stream = NULL;
    SIDA_TRY(sida_buffer_create(model->backend, &model->dense, SIDA_MEMORY_DEVICE, load->bytes,
                                "the model's dense weights"));
    SIDA_TRY(sida_stream_create(model->backend, &stream, SIDA_STREAM_COMPUTE));
    for (size_t i = 0; i < load->count; i++) {
        const placement *at = &load->placements[i];
        char *to = (char *)model->dense->data + at->offset;
        SIDA_TRY(sida_copy(stream, to, at->view.data, at->view.bytes));
        at->target->data = to;
    }
    SIDA_TRY(sida_stream_synchronize(stream));
    if (model->checkpoint) sida_checkpoint_pass(model->checkpoint, load->bytes);
    if (model->config.tied) model->head = model->embedding;
out:
    sida_stream_destroy(stream);
    return status;
}

/* Makes *whole the matrix of all rows of both, when `next` lies behind it with the same type. */
static bool join(sida_weight *whole, const sida_weight *next) {
    const char *end = (const char *)whole->data +
                      (size_t)whole->rows * (size_t)whole->cols * sida_dtype_bytes(whole->dtype);
    bool joins = end == next->data && whole->dtype == next->dtype && whole->cols == next->cols;
    if (joins) whole->rows += next->rows;
    return joins;
}

static void join_weights(sida_model *model) {
    const int32_t *layers = model->config.info.layers;
    for (int side = 0; side < 2; side++)
        for (int32_t i = 0; i < layers[side]; i++) {
            sida_block *block = &model->blocks[side][i];
            block->qkv = block->q;
            if (!join(&block->qkv, &block->k) || !join(&block->qkv, &block->v))
                block->qkv.data = NULL;
        }
    sida_block *const decoder = model->blocks[SIDA_DECODER];
    sida_weight *cross = &model->cross_kv;
    *cross = decoder[0].cross_k;
    bool joins = join(cross, &decoder[0].cross_v);
    for (int32_t i = 1; joins && i < layers[SIDA_DECODER]; i++)
        joins = join(cross, &decoder[i].cross_k) && join(cross, &decoder[i].cross_v);
    if (!joins) cross->data = NULL;
}

/* BF16 only where every product of a pass may read it; experts do so by 8 elements. */
static sida_dtype activation_of(const sida_model *model) {
    const sida_model_info *info = &model->config.info;
    bool narrow = model->ops->bf16_activations && info->expert.dtype == SIDA_BF16 &&
                  model->head.dtype == SIDA_BF16 && info->d_model % 8 == 0 && info->d_ff % 8 == 0;
    for (int side = 0; side < 2; side++)
        for (int32_t i = 0; narrow && i < info->layers[side]; i++) {
            const sida_block *b = &model->blocks[side][i];
            const sida_weight *const products[] = {
                &b->q,       &b->k,       &b->v,      &b->o,  &b->cross_q, &b->cross_k,
                &b->cross_v, &b->cross_o, &b->router, &b->wi, &b->wi_1,    &b->wo};
            for (size_t p = 0; p < sizeof products / sizeof *products; p++)
                narrow = narrow && (!products[p]->data || products[p]->dtype == SIDA_BF16);
        }
    return narrow ? SIDA_BF16 : SIDA_F32;
}

/* Elements of a stored tensor as fp32. */
static void widen(float *out, const sida_tensor_view *view, size_t count) {
    const char *from = view->data;
    for (size_t i = 0; i < count; i++) {
        uint16_t bits;
        if (view->dtype == SIDA_F32) {
            memcpy(out, from, count * sizeof *out);
            return;
        }
        memcpy(&bits, from + i * sizeof bits, sizeof bits);
        out[i] = view->dtype == SIDA_BF16 ? sida_bf16_to_f32(bits) : sida_f16_to_f32(bits);
    }
}

/* The matrices of one expert, in the order of runtime/ops/expert.h. */
static sida_status expert_matrices(loader *load, sida_tensor_view out[3], int *count, int side,
                                   int32_t block, int32_t expert) {
    static const sida_tensor_role gated[] = {SIDA_TENSOR_WI, SIDA_TENSOR_WI_1, SIDA_TENSOR_WO};
    static const sida_tensor_role plain[] = {SIDA_TENSOR_WI, SIDA_TENSOR_WO};
    sida_status status = SIDA_OK;
    const sida_family_config *config = &load->model->config;
    int64_t in[2] = {config->info.d_ff, config->info.d_model}, back[2] = {in[1], in[0]};
    *count = config->gated ? 3 : 2;
    for (int i = 0; i < *count; i++)
        SIDA_TRY(load->source->find(load->source->context, &out[i],
                                    config->gated ? gated[i] : plain[i], side, block, expert, 2,
                                    i == *count - 1 ? back : in));
out:
    return status;
}

/* All experts' matrices, in the order of global ids, and their type: the stored one, or fp32 where
 * they differ. */
static sida_status find_experts(loader *load, sida_tensor_view (*out)[3], int *count) {
    sida_status status = SIDA_OK;
    sida_model_info *info = &load->model->config.info;
    int64_t global = 0;
    for (int side = 0; side < 2; side++)
        for (int32_t i = 0; i < info->layers[side]; i++) {
            if (load->model->blocks[side][i].site < 0) continue;
            for (int32_t e = 0; e < info->experts; e++, global++) {
                SIDA_TRY(expert_matrices(load, out[global], count, side, i, e));
                if (global == 0) info->expert.dtype = out[0][0].dtype;
                for (int m = 0; m < *count; m++)
                    if (out[global][m].dtype != info->expert.dtype) info->expert.dtype = SIDA_F32;
            }
        }
out:
    return status;
}

static void copy_expert(char *to, const sida_model_info *info, const sida_tensor_view *matrices,
                        int count) {
    size_t elements = (size_t)info->d_model * (size_t)info->d_ff;
    for (int i = 0; i < count; i++) {
        if (matrices[i].dtype == info->expert.dtype)
            memcpy(to, matrices[i].data, matrices[i].bytes);
        else
            widen((float *)(void *)to, &matrices[i], elements);
        to += elements * sida_dtype_bytes(info->expert.dtype);
    }
}

static sida_status load_experts(loader *load) {
    sida_status status = SIDA_OK;
    sida_model *model = load->model;
    sida_model_info *info = &model->config.info;
    sida_tensor_view(*matrices)[3] = NULL;
    int64_t all = (int64_t)info->sites * info->experts;
    int count = 0;
    size_t bytes;
    SIDA_TRY(SIDA_ALLOC(&matrices, all, "the experts' tensors"));
    SIDA_TRY(find_experts(load, matrices, &count));
    info->expert_bytes = sida_expert_bytes(&info->expert);
    if (sida_mul_overflow(info->expert_bytes, (size_t)all, &bytes))
        SIDA_FAIL(SIDA_ERROR_MEMORY, "%s: the experts are larger than memory can be",
                  load->source->name);
    SIDA_TRY(sida_buffer_create(model->backend, &model->slab, SIDA_MEMORY_HOST, bytes,
                                "the experts on the host"));
    /* One thread does not fill memory at its speed. */
    for (int64_t first = 0; first < all; first += info->experts) {
#pragma omp parallel for schedule(dynamic)
        for (int64_t i = first; i < first + info->experts; i++)
            copy_expert((char *)model->slab->data + (size_t)i * info->expert_bytes, info,
                        matrices[i], count);
        if (model->checkpoint)
            sida_checkpoint_pass(model->checkpoint, (size_t)info->experts * info->expert_bytes);
    }
out:
    free(matrices);
    return status;
}

static sida_status configure(sida_model *model) {
    sida_status status = SIDA_OK;
    const json_t *config = sida_checkpoint_config(model->checkpoint);
    const char *folder = sida_checkpoint_folder(model->checkpoint), *type;
    char *path = NULL;
    SIDA_TRY(sida_strprintf(&path, "%s/config.json", folder));
    SIDA_TRY(sida_config_text(&type, config, path, "model_type", NULL));
    if (!type) SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: model_type is missing", path);
    model->family = sida_family_find(type);
    if (!model->family)
        SIDA_FAIL(SIDA_ERROR_UNSUPPORTED, "%s: model_type %.60s; supported: %s", path, type,
                  sida_family_names());
    SIDA_TRY(model->family->configure(&model->config, config, path));
out:
    free(path);
    return status;
}

sida_status sida_model_load(sida_model *model, const sida_tensor_source *source) {
    sida_status status = SIDA_OK;
    loader load = {.model = model, .source = source};
    SIDA_TRY(place_dense(&load));
    SIDA_TRY(load_experts(&load));
    SIDA_TRY(copy_dense(&load));
    join_weights(model);
    model->activation = activation_of(model);
out:
    free(load.placements);
    return status;
}

sida_status sida_model_create(sida_model **out, sida_backend *backend) {
    sida_status status = SIDA_ALLOC(out, 1, "a model");
    if (status != SIDA_OK) return status;
    (*out)->backend = backend;
    (*out)->ops = sida_ops_of(backend);
    return SIDA_OK;
}

sida_status sida_model_open(sida_model **out, sida_backend *backend, const char *folder) {
    sida_status status = SIDA_OK;
    sida_model *model = NULL;
    checkpoint_source stored = {0};
    *out = NULL;
    SIDA_TRY(sida_model_create(&model, backend));
    SIDA_TRY(sida_checkpoint_open(&model->checkpoint, folder));
    SIDA_TRY(configure(model));
    stored.model = model;
    SIDA_TRY(check_copies_of_embedding(&stored));
    SIDA_TRY(sida_model_load(
        model, &(sida_tensor_source){.name = folder, .context = &stored, .find = find_stored}));
    SIDA_TRY(sida_checkpoint_fingerprint(&model->config.info.fingerprint, model->checkpoint));
    if (stored.used < sida_checkpoint_count(model->checkpoint))
        sida_log(SIDA_LOG_INFO, "%s: %zu tensors are not used by %s", folder,
                 sida_checkpoint_count(model->checkpoint) - stored.used, model->family->model_type);
    *out = model;
    model = NULL;
out:
    sida_model_destroy(model);
    return status;
}

void sida_model_destroy(sida_model *model) {
    if (!model) return;
    sida_buffer_destroy(model->dense);
    sida_buffer_destroy(model->slab);
    free(model->blocks[0]);
    free(model->blocks[1]);
    sida_family_config_free(&model->config);
    sida_checkpoint_destroy(model->checkpoint);
    if (model->storage_destroy) model->storage_destroy(model->storage);
    free(model);
}

const sida_model_info *sida_model_get_info(const sida_model *model) {
    return &model->config.info;
}

sida_backend *sida_model_backend(const sida_model *model) {
    return model->backend;
}

const sida_checkpoint *sida_model_checkpoint(const sida_model *model) {
    return model->checkpoint;
}

const void *sida_model_expert(const sida_model *model, int32_t global_expert) {
    const sida_model_info *info = &model->config.info;
    assert(global_expert >= 0 && global_expert < info->sites * info->experts);
    return (const char *)model->slab->data + (size_t)global_expert * info->expert_bytes;
}

sida_weight sida_model_embedding(const sida_model *model) {
    return model->embedding;
}

sida_weight sida_model_embedding_host(const sida_model *model) {
    sida_weight embedding = model->embedding;
    if (strcmp(model->backend->table->name, "cpu") != 0) embedding.data = model->embedding_host;
    return embedding;
}
