/* A network, the paper's or ours, as a hash source. */
#include "formats/base/memory.h"
#include "runtime/ops/cpu_kernels.h"
#include "runtime/predictor/net_device.h"
#include "runtime/predictor/select.h"
#include "runtime/predictor/sources.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* Tokens that are refined at a time. */
enum { REFINE_ROWS = 48 };

static int this_thread(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

typedef struct lstm_source {
    sida_hash_source base;
    const sida_net *net;
    sida_net *owned;           /* NULL when borrowed */
    const sida_refine *refine; /* NULL: none */
    sida_refine *owned_refine; /* NULL when borrowed */
    sida_weight embedding;
    sida_net_device *device; /* NULL: computes on the host */
} lstm_source;

/* What the refinement was told of the tokens of a side's last call. */
typedef struct lstm_told {
    bool called;      /* there is such a call */
    int32_t layers;   /* that have told it their choice */
    float *sum;       /* [tokens, R], once one has */
    size_t sum_items; /* allocated */
} lstm_told;

/* Either a pass or a place on the device. */
typedef struct lstm_state {
    sida_net_pass *pass;
    bool encoded; /* by the pass */
    lstm_told told[2];
    float *scratch; /* of the refinement, either side's: [threads][REFINE_ROWS, …] */
    uint64_t *keys; /* of the selection: [threads][E] */
    size_t scratch_items, keys_items;
    sida_net_device_state *placed;
} lstm_state;

static void lstm_destroy(sida_hash_source *source) {
    lstm_source *self = (lstm_source *)source;
    sida_net_device_destroy(self->device);
    sida_net_destroy(self->owned);
    sida_refine_destroy(self->owned_refine);
    free(self);
}

static void lstm_state_destroy(sida_hash_state *state) {
    lstm_state *self = (lstm_state *)state;
    sida_net_pass_destroy(self->pass);
    for (int side = 0; side < 2; side++) free(self->told[side].sum);
    free(self->scratch);
    free(self->keys);
    sida_net_device_give(self->placed);
    free(self);
}

static sida_status lstm_state_create(const sida_hash_source *source, sida_hash_state **out) {
    *out = NULL;
    sida_status status = SIDA_OK;
    const lstm_source *of = (const lstm_source *)source;
    lstm_state *self = NULL;
    SIDA_TRY(SIDA_ALLOC(&self, 1, "a predictor's state"));
    if (of->device)
        SIDA_TRY(sida_net_device_take(of->device, &self->placed));
    else
        SIDA_TRY(sida_net_pass_create(&self->pass, of->net, false));
    *out = (sida_hash_state *)self;
    self = NULL;
out:
    if (self) lstm_state_destroy((sida_hash_state *)self);
    return status;
}

/* The table of the pass's last call on a side. */
static sida_status read_table(const lstm_source *self, lstm_state *own, int side, int32_t k,
                              sida_hash_table *out) {
    const sida_net_activations *a = &own->pass->sides[side];
    const int32_t layers = self->net->config.layers[side], experts = self->net->config.experts;
    const int64_t n = a->tokens;
    const int threads = n * layers * experts > 1 << 16 ? sida_ops_threads() : 1;
    sida_status status = SIDA_OK;
    bool good = true;
    SIDA_TRY(sida_hash_table_reserve(out, side, layers, k, n));
    SIDA_TRY(SIDA_GROW(&own->keys, &own->keys_items, threads * experts, "a predictor's scores"));
#pragma omp parallel for schedule(static) reduction(&& : good) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < n; i++)
        for (int32_t l = 0; l < layers; l++)
            good = sida_select_logits(out, i, l, a->logits + (i * layers + l) * experts, experts,
                                      own->keys + (int64_t)this_thread() * experts) &&
                   good;
    if (!good) status = sida_select_not_finite();
out:
    return status;
}

static void forget(lstm_told *told, bool called) {
    told->called = called;
    told->layers = 0;
}

static sida_status lstm_encode(const sida_hash_source *source, sida_hash_state *state,
                               const sida_ragged *input, int32_t k, sida_hash_table *out) {
    const lstm_source *self = (const lstm_source *)source;
    lstm_state *own = (lstm_state *)state;
    if (own->placed) return sida_net_device_encode(own->placed, input, k, out);
    own->encoded = false;
    for (int side = 0; side < 2; side++) forget(&own->told[side], false);
    sida_status status = sida_net_encode(own->pass, self->embedding, input);
    if (status == SIDA_OK) status = read_table(self, own, 0, k, out);
    own->encoded = own->told[0].called = status == SIDA_OK;
    return status;
}

static sida_status lstm_decode(const sida_hash_source *source, sida_hash_state *state,
                               const sida_ragged *step, int32_t k, sida_hash_table *out) {
    const lstm_source *self = (const lstm_source *)source;
    lstm_state *own = (lstm_state *)state;
    if (own->placed) return sida_net_device_decode(own->placed, step, k, out);
    if (!own->encoded || step->sequences != own->pass->sequences)
        return sida_fail(SIDA_ERROR_ARGUMENT, "a decoder step of another batch");
    if (!self->net->trunks[1].present)
        return sida_hash_table_reserve(out, 1, 0, k, sida_ragged_tokens(step));
    forget(&own->told[1], false);
    sida_status status = sida_net_decode(own->pass, self->embedding, step);
    if (status == SIDA_OK) status = read_table(self, own, 1, k, out);
    own->told[1].called = status == SIDA_OK;
    return status;
}

static sida_status check_told(const lstm_source *self, const lstm_state *own, int side,
                              int32_t layer, const int32_t *experts, int32_t top_k) {
    if (!own->told[side].called)
        return sida_fail(SIDA_ERROR_ARGUMENT, "nothing has been predicted that a layer refines");
    if (layer != own->told[side].layers)
        return sida_fail(SIDA_ERROR_ARGUMENT,
                         "a refinement by MoE layer %d where that by layer %d is next", layer,
                         own->told[side].layers);
    for (int64_t i = 0; i < own->pass->sides[side].tokens * top_k; i++)
        if (experts[i] < 0 || experts[i] >= self->net->config.experts)
            return sida_fail(SIDA_ERROR_ARGUMENT, "MoE layer %d chose expert %d of %d", layer,
                             experts[i], self->net->config.experts);
    return SIDA_OK;
}

/* A refinement of tokens [i, i + n), n <= REFINE_ROWS; scratch [REFINE_ROWS, R + scores']. */
static bool refine_rows(const lstm_source *self, const lstm_state *own, int side, int32_t layer,
                        const int32_t *experts, int32_t top_k, int64_t i, int64_t n, float *scratch,
                        uint64_t *keys, sida_hash_table *out) {
    const sida_net_config *c = &self->net->config;
    const sida_net_activations *a = &own->pass->sides[side];
    const int32_t rest = c->layers[side] - 1 - layer;
    const int64_t width = self->refine->width, all = (int64_t)c->layers[side] * c->experts;
    float *sum = own->told[side].sum + i * width, *scores = scratch + REFINE_ROWS * width;
    bool good = true;
    /* Products on the host do not fail. */
    if (layer == 0)
        good = sida_refine_begin(self->refine, side, sum, a->mixed + i * c->hidden, n) == SIDA_OK;
    sida_refine_know(self->refine, side, layer, sum, experts + i * top_k, top_k, n);
    good &= sida_refine_scores(self->refine, side, layer, scores, scratch, sum, a->logits + i * all,
                               n) == SIDA_OK;
    for (int64_t r = 0; r < n; r++)
        for (int32_t l = 0; l < rest; l++)
            good &= sida_select_logits(out, i + r, layer + 1 + l,
                                       scores + (r * rest + l) * c->experts, c->experts, keys);
    return good;
}

/* Some tokens at a time through all of it: between its steps nothing leaves a core's caches, and
 * threads meet once. */
static sida_status lstm_refine(const sida_hash_source *source, sida_hash_state *state, int side,
                               int32_t layer, const int32_t *experts, int32_t top_k, int32_t k,
                               sida_hash_table *out) {
    sida_status status = SIDA_OK;
    const lstm_source *self = (const lstm_source *)source;
    lstm_state *own = (lstm_state *)state;
    lstm_told *told = &own->told[side];
    const sida_net_config *c = &self->net->config;
    bool good = true;
    if (own->placed)
        return sida_net_device_refine_table(own->placed, side, layer, experts, top_k, k, out);
    const int64_t n = own->pass->sides[side].tokens, width = self->refine->width;
    const int64_t scores = (int64_t)(c->layers[side] - 1 - layer) * c->experts;
    const int64_t work = n * width * (scores + top_k + (layer == 0 ? c->hidden : 0));
    const int threads = work < SIDA_PARALLEL_WORK ? 1 : sida_ops_threads();
    const int64_t room = REFINE_ROWS * (width + scores);
    SIDA_TRY(check_told(self, own, side, layer, experts, top_k));
    SIDA_TRY(SIDA_GROW(&told->sum, &told->sum_items, n * width, "a refinement"));
    SIDA_TRY(SIDA_GROW(&own->scratch, &own->scratch_items, threads * room, "a refinement"));
    SIDA_TRY(SIDA_GROW(&own->keys, &own->keys_items, threads * c->experts, "a refinement"));
    SIDA_TRY(sida_hash_table_reserve(out, side, c->layers[side], k, n));
    told->layers = layer + 1;
#pragma omp parallel for schedule(dynamic) reduction(&& : good) num_threads(threads)               \
    if (threads > 1)
    for (int64_t i = 0; i < n; i += REFINE_ROWS) {
        const int64_t count = n - i < REFINE_ROWS ? n - i : REFINE_ROWS;
        good = refine_rows(self, own, side, layer, experts, top_k, i, count,
                           own->scratch + this_thread() * room,
                           own->keys + (int64_t)this_thread() * c->experts, out) &&
               good;
    }
    if (!good) status = sida_select_not_finite();
out:
    return status;
}

static sida_status lstm_place(sida_hash_source *source, sida_backend *backend,
                              sida_weight embedding, const sida_hash_limits *limits) {
    lstm_source *self = (lstm_source *)source;
    assert(!self->device);
    if (!sida_net_device_possible(backend, &self->net->config)) return SIDA_OK;
    const bool refines = self->base.info.refines && limits->refines;
    sida_status status = sida_net_device_create(
        &self->device, self->net, refines ? self->refine : NULL, backend, embedding, limits);
    if (status != SIDA_OK) return status;
    self->base.info.device_bytes = sida_net_device_bytes(self->device);
    self->base.info.refines = refines;
    return status;
}

static const sida_hash_source_table lstm_table = {.destroy = lstm_destroy,
                                                  .state_create = lstm_state_create,
                                                  .state_destroy = lstm_state_destroy,
                                                  .encode = lstm_encode,
                                                  .decode = lstm_decode,
                                                  .refine = lstm_refine,
                                                  .place = lstm_place};

sida_status sida_lstm_source_create(sida_hash_source **out, const sida_net *net,
                                    sida_weight embedding, sida_fingerprint model,
                                    sida_fingerprint tokenizer) {
    *out = NULL;
    const sida_net_config *c = &net->config;
    if (embedding.cols != c->d_model)
        return sida_fail(SIDA_ERROR_MISMATCH,
                         "a predictor of embeddings of width %d, not of %" PRId64, c->d_model,
                         embedding.cols);
    lstm_source *self;
    sida_status status = SIDA_ALLOC(&self, 1, "a hash source");
    if (status != SIDA_OK) return status;
    self->base.table = &lstm_table;
    self->base.info = (sida_hash_source_info){.name = sida_net_kind_name(c->kind),
                                              .model = model,
                                              .tokenizer = tokenizer,
                                              .d_model = c->d_model,
                                              .experts = c->experts,
                                              .layers = {c->layers[0], c->layers[1]},
                                              .bytes = (size_t)net->parameter_count * 4};
    self->net = net;
    self->embedding = embedding;
    *out = &self->base;
    return SIDA_OK;
}

void sida_lstm_source_refine(sida_hash_source *source, const sida_refine *refine) {
    lstm_source *self = (lstm_source *)source;
    const sida_net_config *c = &self->net->config;
    assert(source->table == &lstm_table && !self->refine && !self->device);
    assert(refine->net.hidden == c->hidden && refine->net.experts == c->experts &&
           refine->net.layers[0] == c->layers[0] && refine->net.layers[1] == c->layers[1]);
    (void)c; /* unused where asserts are off */
    self->refine = refine;
    source->info.refines = true;
    source->info.bytes += (size_t)refine->parameter_count * sizeof(float);
}

sida_status sida_lstm_source_read(sida_hash_source **out, sida_h5_file *file,
                                  const sida_predictor_meta *meta, sida_weight embedding) {
    *out = NULL;
    sida_status status = SIDA_OK;
    sida_net *net = NULL;
    sida_refine *refine = NULL;
    sida_net_config config;
    const char *path = sida_h5_path(file);
    SIDA_TRY(sida_net_config_from_json(&config, json_object_get(meta->config, "net"), path));
    if (strcmp(meta->source, sida_net_kind_name(config.kind)) != 0)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "its source is '%.40s', its config's network '%s'",
                  meta->source, sida_net_kind_name(config.kind));
    SIDA_TRY(sida_net_read(&net, file, &config));
    SIDA_TRY(sida_refine_read(&refine, file, meta->config, &config));
    SIDA_TRY(sida_lstm_source_create(out, net, embedding, meta->model, meta->tokenizer));
    ((lstm_source *)*out)->owned = net;
    net = NULL;
    if (refine) {
        sida_lstm_source_refine(*out, refine);
        ((lstm_source *)*out)->owned_refine = refine;
        refine = NULL;
    }
out:
    sida_refine_destroy(refine);
    sida_net_destroy(net);
    return status == SIDA_OK ? SIDA_OK : sida_fail_context(status, "%s", path);
}
