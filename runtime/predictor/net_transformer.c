/* The forward pass of a Transformer on the CPU. */
#include "runtime/predictor/net_transformer.h"

#include "formats/base/memory.h"
#include "runtime/ops/cpu_kernels.h"
#include "runtime/ops/embedding.h"
#include "runtime/ops/norm.h"
#include "runtime/predictor/net_private.h"

#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>

/* Cuts blocks of floats out of `base`; NULL: only counts. */
typedef struct cutter {
    float *base;
    int64_t used;
} cutter;

static float *cut(cutter *from, int64_t count) {
    float *block = from->base ? from->base + from->used : NULL;
    from->used += count;
    return block;
}

static int64_t most(int64_t a, int64_t b) {
    return a > b ? a : b;
}

/* Inference: what `rows` tokens have at a time, of all blocks; and what all n leave. One piece
 * serves what is never needed at once: the embeddings and their norm; queries, keys and values;
 * what is between up and down. */
static void cut_inference(cutter *from, const sida_net *net, sida_net_activations *a, int side,
                          int64_t n, int64_t rows) {
    const sida_net_config *c = &net->config;
    struct sida_net_transformer_side *t = a->transformer;
    const int64_t h = c->hidden;
    float *wide = cut(from, rows * most(2 * c->d_model, most(3, SIDA_NET_UP) * h));
    float *mixed = cut(from, rows * h), *x = cut(from, rows * h), *normed = cut(from, rows * h);
    a->mixed = cut(from, n * h);
    a->logits = cut(from, n * net->trunks[side].heads.rows);
    if (!wide) return;
    const sida_net_attend_pass attend = {
        .x = x, .normed = normed, .query = wide, .key_value = wide + rows * h, .mixed = mixed};
    a->embedded = wide;
    t->normed_in = wide + rows * c->d_model;
    t->memory = normed;
    t->last = x;
    for (int b = 0; b < c->blocks; b++)
        t->blocks[b] = (sida_net_block_pass){attend, attend, .x = x, .normed = normed, .up = wide};
}

static void cut_attend(cutter *from, sida_net_attend_pass *a, int64_t n, int64_t h, bool self) {
    a->normed = cut(from, n * h);
    a->query = cut(from, n * h);
    if (self) a->key_value = cut(from, n * 2 * h);
    a->mixed = cut(from, n * h);
}

/* Training: all of a side's activations of n tokens. */
static void cut_training(cutter *from, const sida_net *net, sida_net_activations *a, int side,
                         int64_t n) {
    const sida_net_config *c = &net->config;
    struct sida_net_transformer_side *t = a->transformer;
    const int64_t h = c->hidden;
    const bool cross = net->trunks[side].blocks[0].cross.query.weight != NULL;
    a->embedded = cut(from, n * c->d_model);
    t->normed_in = cut(from, n * c->d_model);
    for (int b = 0; b < c->blocks; b++) {
        sida_net_block_pass *block = &t->blocks[b];
        cut_attend(from, &block->self, n, h, true);
        if (cross) cut_attend(from, &block->cross, n, h, false);
        block->normed = cut(from, n * h);
        block->up = cut(from, n * SIDA_NET_UP * h);
        /* The residual stream before each layer. */
        block->self.x = cut(from, n * h);
        if (cross) block->cross.x = cut(from, n * h);
        block->x = cut(from, n * h);
    }
    t->last = cut(from, n * h);
    a->mixed = cut(from, n * h);
    a->logits = cut(from, n * net->trunks[side].heads.rows);
}

static void cut_side(cutter *from, sida_net_pass *pass, int side, int64_t n, int64_t rows) {
    if (pass->training)
        cut_training(from, pass->net, &pass->sides[side], side, n);
    else
        cut_inference(from, pass->net, &pass->sides[side], side, n, rows);
}

/* rows: of the sequences that are run at a time, at most. */
static sida_status lay_out(sida_net_pass *pass, int side, int64_t n, int64_t rows) {
    sida_net_activations *a = &pass->sides[side];
    cutter from = {0};
    cut_side(&from, pass, side, 1, 1);
    size_t items;
    if (sida_mul_overflow((size_t)n, (size_t)from.used, &items))
        return sida_fail(SIDA_ERROR_MEMORY, "%" PRId64 " tokens are too many for one batch", n);
    from.used = 0;
    cut_side(&from, pass, side, n, rows);
    sida_status status =
        sida_net_pass_reserve(a, SIDA_NET_STORE_FLOATS, (size_t)from.used, sizeof(float));
    if (status != SIDA_OK) return status;
    from = (cutter){a->storage[SIDA_NET_STORE_FLOATS], 0};
    cut_side(&from, pass, side, n, rows);
    a->tokens = n;
    return SIDA_OK;
}

/* Some sequences' tokens on their way through the network: sequences [first, end), tokens
 * [token, token + n). */
typedef struct span {
    int32_t first, end;
    int64_t token, n;
} span;

/* Tokens of the sequences that one thread runs at a time: their activations stay in its caches, and
 * are worth turning the weights about for. */
enum { SPAN_TOKENS = 256 };

/* The sequences from `first` on that are run next: all, or as many as have SPAN_TOKENS, at least
 * one. */
static span span_from(const sida_net_pass *pass, const int64_t *offsets, int32_t first) {
    const bool all = pass->training || sida_ops_threads() > 1;
    int32_t end = first + 1;
    while (end < pass->sequences && (all || offsets[end + 1] - offsets[first] <= SPAN_TOKENS))
        end++;
    return (span){first, end, offsets[first], offsets[end] - offsets[first]};
}

static sida_status norm(float *out, const float *x, const sida_net_linear *layer, int64_t n) {
    return sida_rms_norm_cpu(NULL, out, SIDA_F32, x, sida_net_weight(layer), n, SIDA_NET_EPSILON);
}

/* The residual stream goes on in `to`, which may be `from`. */
static void carry_on(float *to, const float *from, int64_t count) {
    if (to != from) memcpy(to, from, (size_t)count * sizeof *to);
}

/* query(normed) / √HEAD_WIDTH. */
static sida_status run_query(const sida_net_pass *pass, float *query, const float *normed,
                             const sida_net_linear *layer, int64_t n) {
    const float scale = 1.0f / sqrtf((float)SIDA_NET_HEAD_WIDTH);
    if (pass->training) {
        sida_status status = sida_net_pass_apply(pass, query, normed, n, layer, SIDA_EPILOGUE_NONE);
        for (int64_t i = 0; i < n * layer->rows; i++) query[i] *= scale;
        return status;
    }
    return sida_linear_cpu(NULL, &(sida_linear_call){.y = query,
                                                     .ldy = layer->rows,
                                                     .x = normed,
                                                     .ldx = layer->cols,
                                                     .n = n,
                                                     .weight = sida_net_weight(layer),
                                                     .scale = scale});
}

/* Room for the keys and values of cross-attention, for all that the decoder will read of this
 * batch. */
static sida_status lay_out_memory(sida_net_pass *pass, int64_t n) {
    sida_net_activations *a = &pass->sides[0];
    const int64_t h = pass->net->config.hidden, kept = pass->training ? h : 0;
    size_t items;
    if (sida_mul_overflow((size_t)n, (size_t)(kept + 2 * pass->net->config.blocks * h), &items))
        return sida_fail(SIDA_ERROR_MEMORY, "%" PRId64 " tokens are too many for one batch", n);
    sida_status status = sida_net_pass_reserve(a, SIDA_NET_STORE_KEPT, items, sizeof(float));
    if (status != SIDA_OK) return status;
    float *pairs = a->storage[SIDA_NET_STORE_KEPT];
    if (pass->training) a->transformer->memory = pairs;
    a->transformer->memory_pairs = pairs + kept * n;
    return SIDA_OK;
}

static sida_status prepare_memory(sida_net_pass *pass, const span *of) {
    sida_status status = SIDA_OK;
    struct sida_net_transformer_side *t = pass->sides[0].transformer;
    const sida_net_trunk *decoder = &pass->net->trunks[1];
    const int64_t n = pass->sides[0].tokens, h = pass->net->config.hidden;
    SIDA_TRY(norm(t->memory, t->last, &decoder->norm_memory, of->n));
    for (int b = 0; b < pass->net->config.blocks; b++)
        SIDA_TRY(sida_net_pass_apply(pass, t->memory_pairs + (b * n + of->token) * 2 * h, t->memory,
                                     of->n, &decoder->blocks[b].cross.key_value,
                                     SIDA_EPILOGUE_NONE));
out:
    return status;
}

/* What the attentions of a side's blocks have in common: which rows see which. Queries, and keys
 * that are the call's own, lie where their span's do. */
static sida_status fill_indices(sida_net_pass *pass, int side) {
    sida_net_activations *a = &pass->sides[side];
    const sida_net_activations *encoder = &pass->sides[0];
    const bool cross = side == 1 && pass->net->trunks[0].present;
    const int32_t n = pass->sequences;
    int64_t *start = a->offsets + n + 1, *queries = start + n, *cross_start = queries + n;
    int32_t *counts = a->storage[SIDA_NET_STORE_INTS], *positions = counts + n;
    int32_t *keys = counts + 2 * (int64_t)n, *cross_keys = counts + 3 * (int64_t)n;
    span of = {0};
    for (int32_t s = 0; s < n; s++) {
        if (s == of.end) of = span_from(pass, a->offsets, s);
        const int64_t length = a->offsets[s + 1] - a->offsets[s];
        if (length > INT32_MAX / 2) return sida_fail(SIDA_ERROR_MEMORY, "a sequence is too long");
        counts[s] = keys[s] = (int32_t)length;
        queries[s] = start[s] = a->offsets[s] - of.token;
        if (side == 0) continue;
        assert(!pass->training || pass->counts[s] == 0);
        positions[s] = pass->counts[s];
        keys[s] += positions[s];
        pass->counts[s] = keys[s];
        if (!pass->training) start[s] = (int64_t)s * pass->capacity;
        if (!cross) continue;
        cross_start[s] = encoder->offsets[s];
        cross_keys[s] = (int32_t)(encoder->offsets[s + 1] - encoder->offsets[s]);
    }
    return SIDA_OK;
}

/* which: 0 self-attention, 1 cross-attention. */
static void fill_call(const sida_net_pass *pass, int side, int which, const span *of,
                      sida_net_attend_pass *to, const float *positions) {
    const sida_net_activations *a = &pass->sides[side];
    const int32_t s = pass->sequences, h = pass->net->config.hidden;
    const int32_t heads = h / SIDA_NET_HEAD_WIDTH;
    const int32_t *ints = (const int32_t *)a->storage[SIDA_NET_STORE_INTS] + of->first;
    const int64_t *longs = a->offsets + s + 1 + of->first;
    to->call = (sida_attention_call){
        .out = to->mixed,
        .out_type = SIDA_F32,
        .q = to->query,
        .k = to->key_value,
        .v = to->key_value + h,
        .ldo = h,
        .ldq = h,
        .ldk = 2 * (int64_t)h,
        .ldv = 2 * (int64_t)h,
        .sequences = of->end - of->first,
        .heads = heads,
        .d_kv = SIDA_NET_HEAD_WIDTH,
        .rows = of->n,
        .q_start = longs + s,
        .k_start = longs + (int64_t)which * 2 * s,
        .q_count = ints,
        .q_position = ints + s,
        .k_count = ints + (2 + which) * (int64_t)s,
        .causal = side == 1 && which == 0,
        .bias = {positions, SIDA_F32, positions ? SIDA_NET_BUCKETS : 0, positions ? heads : 0},
        .bias_bidirectional = side == 0,
        .bias_max_distance = SIDA_NET_DISTANCE,
    };
}

/* Inference: this step's keys and values join those of the steps before, and all are attended to.
 */
static sida_status use_state(const sida_net_pass *pass, int block, sida_net_attend_pass *to) {
    const int64_t h = pass->net->config.hidden;
    const int64_t plane = (int64_t)pass->sequences * pass->capacity * h;
    sida_attention_call *call = &to->call;
    float *keys = pass->memory + 2 * block * plane, *values = keys + plane;
    const sida_append_call append = {.k_cache = keys,
                                     .v_cache = values,
                                     .k = call->k,
                                     .v = call->v,
                                     .width = h,
                                     .ld = 2 * h,
                                     .sequences = call->sequences,
                                     .rows = call->rows,
                                     .q_start = call->q_start,
                                     .start = call->k_start,
                                     .q_count = call->q_count,
                                     .position = call->q_position};
    call->k = keys;
    call->v = values;
    call->ldk = call->ldv = h;
    return sida_append_cpu(NULL, &append);
}

static sida_status run_block(sida_net_pass *pass, int side, int b, const span *of, float *next) {
    sida_status status = SIDA_OK;
    sida_net_activations *a = &pass->sides[side];
    const sida_net_block *layers = &pass->net->trunks[side].blocks[b];
    sida_net_block_pass *to = &a->transformer->blocks[b];
    const int64_t n = of->n, h = pass->net->config.hidden;
    const bool cross = layers->cross.query.weight != NULL;

    SIDA_TRY(norm(to->self.normed, to->self.x, &layers->self.norm, n));
    SIDA_TRY(run_query(pass, to->self.query, to->self.normed, &layers->self.query, n));
    SIDA_TRY(sida_net_pass_apply(pass, to->self.key_value, to->self.normed, n,
                                 &layers->self.key_value, SIDA_EPILOGUE_NONE));
    fill_call(pass, side, 0, of, &to->self, layers->self.positions);
    if (side == 1 && !pass->training) SIDA_TRY(use_state(pass, b, &to->self));
    SIDA_TRY(sida_attention_cpu(NULL, &to->self.call));
    float *x = cross ? to->cross.x : to->x;
    carry_on(x, to->self.x, n * h);
    SIDA_TRY(
        sida_net_pass_apply(pass, x, to->self.mixed, n, &layers->self.output, SIDA_EPILOGUE_ADD));
    if (cross) {
        const sida_net_activations *encoder = &pass->sides[0];
        to->cross.key_value = encoder->transformer->memory_pairs + 2 * b * encoder->tokens * h;
        SIDA_TRY(norm(to->cross.normed, x, &layers->cross.norm, n));
        SIDA_TRY(run_query(pass, to->cross.query, to->cross.normed, &layers->cross.query, n));
        fill_call(pass, side, 1, of, &to->cross, NULL);
        SIDA_TRY(sida_attention_cpu(NULL, &to->cross.call));
        carry_on(to->x, x, n * h);
        SIDA_TRY(sida_net_pass_apply(pass, to->x, to->cross.mixed, n, &layers->cross.output,
                                     SIDA_EPILOGUE_ADD));
    }
    SIDA_TRY(norm(to->normed, to->x, &layers->norm, n));
    SIDA_TRY(sida_net_pass_apply(pass, to->up, to->normed, n, &layers->up, SIDA_EPILOGUE_RELU));
    carry_on(next, to->x, n * h);
    SIDA_TRY(sida_net_pass_apply(pass, next, to->up, n, &layers->down, SIDA_EPILOGUE_ADD));
out:
    return status;
}

/* The whole network over some sequences; ids: of all of the call. */
static sida_status run_span(sida_net_pass *pass, int side, sida_weight embedding,
                            const int32_t *ids, const span *of) {
    sida_status status = SIDA_OK;
    const sida_net_config *c = &pass->net->config;
    const sida_net_trunk *trunk = &pass->net->trunks[side];
    sida_net_activations *a = &pass->sides[side];
    struct sida_net_transformer_side *t = a->transformer;
    float *mixed = a->mixed + of->token * c->hidden;
    SIDA_TRY(sida_embedding_cpu(NULL, a->embedded, embedding, ids + of->token, of->n));
    SIDA_TRY(norm(t->normed_in, a->embedded, &trunk->norm_in, of->n));
    SIDA_TRY(sida_net_pass_apply(pass, t->blocks[0].self.x, t->normed_in, of->n, &trunk->compress,
                                 SIDA_EPILOGUE_NONE));
    for (int b = 0; b < c->blocks; b++)
        SIDA_TRY(
            run_block(pass, side, b, of, b + 1 < c->blocks ? t->blocks[b + 1].self.x : t->last));
    SIDA_TRY(norm(mixed, t->last, &trunk->norm_out, of->n));
    SIDA_TRY(sida_net_pass_apply(pass, a->logits + of->token * trunk->heads.rows, mixed, of->n,
                                 &trunk->heads, SIDA_EPILOGUE_NONE));
    if (side == 0 && pass->net->trunks[1].present) SIDA_TRY(prepare_memory(pass, of));
out:
    return status;
}

sida_status sida_net_transformer_run(sida_net_pass *pass, int side, sida_weight embedding,
                                     const sida_ragged *input) {
    sida_status status = SIDA_OK;
    sida_net_activations *a = &pass->sides[side];
    const int64_t n = sida_ragged_tokens(input);
    int64_t rows = 0;
    assert(embedding.cols == pass->net->config.d_model);
    SIDA_TRY(sida_net_check_ids(embedding, input));
    SIDA_TRY(sida_net_pass_lay_out_integers(pass, side));
    memcpy(a->offsets, input->offsets, ((size_t)pass->sequences + 1) * sizeof *a->offsets);
    for (span of = {0}; of.end < pass->sequences;) {
        of = span_from(pass, a->offsets, of.end);
        rows = most(rows, of.n);
    }
    SIDA_TRY(lay_out(pass, side, n, rows));
    if (side == 0 && pass->net->trunks[1].present) SIDA_TRY(lay_out_memory(pass, n));
    SIDA_TRY(fill_indices(pass, side));
    for (span of = {0}; of.end < pass->sequences;) {
        of = span_from(pass, a->offsets, of.end);
        SIDA_TRY(run_span(pass, side, embedding, input->ids, &of));
    }
out:
    return status;
}
