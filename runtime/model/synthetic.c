#include "runtime/model/synthetic.h"

#include "formats/base/memory.h"
#include "formats/base/rng.h"
#include "runtime/model/model_private.h"
#include "runtime/model/routing_histogram.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    BLOCK_MATRICES = 14, /* largest matrices in the block of random numbers: 64 MiB of bf16 */
    WINDOW_STEP = 32,    /* windows start at multiples of so many elements */
    DRAWS = 1 << 22,     /* of the calibration */
    MOST_SAMPLES = 1 << 14,
    ROUNDS = 80
};

/* What the tensors are windows of; lives as long as the model. */
typedef struct storage {
    const sida_synthetic_options *options; /* while loading */
    sida_dtype dtype;
    char *block; /* [block_elements], deviation d_model^-½ */
    char *query; /* [heads * d_kv, d_model], small: there is no 1/√d_kv in T5's attention */
    char *embedding, *ones, *routers; /* [vocabulary, d_model], [d_model], [sites, E, d_model] */
    size_t block_elements, query_elements, router_elements /* of a site */;
    double *gains; /* [E] by rank */
} storage;

static void storage_destroy(void *context) {
    storage *s = context;
    if (!s) return;
    free(s->block);
    free(s->query);
    free(s->embedding);
    free(s->ones);
    free(s->routers);
    free(s->gains);
    free(s);
}

/* --- numbers */

static void put(char *to, size_t i, float value, sida_dtype dtype) {
    uint32_t bits;
    if (dtype == SIDA_F32) {
        memcpy(to + i * sizeof value, &value, sizeof value);
        return;
    }
    memcpy(&bits, &value, sizeof bits);
    uint16_t high = (uint16_t)((bits + 0x8000) >> 16);
    memcpy(to + i * sizeof high, &high, sizeof high);
}

/* Uniform numbers of that deviation around 0, four from each draw. */
static void fill(char *to, size_t count, double deviation, sida_dtype dtype, sida_rng *rng) {
    float scale = (float)(deviation * sqrt(3.0) / 32768.0);
    uint64_t bits = 0;
    for (size_t i = 0; i < count; i++, bits >>= 16) {
        if (i % 4 == 0) bits = sida_rng_u64(rng);
        put(to, i, ((float)(int32_t)(bits & 0xffff) - 32767.5f) * scale, dtype);
    }
}

void sida_synthetic_shares(double *shares, int32_t experts) {
    double sum = 0;
    for (int32_t r = 0; r < experts; r++) {
        double at = (r + 0.5) / experts * SIDA_ROUTING_RANKS - 0.5;
        at = fmin(fmax(at, 0), SIDA_ROUTING_RANKS - 1);
        int low = (int)at, high = low + 1 < SIDA_ROUTING_RANKS ? low + 1 : low;
        shares[r] = sida_routing_shares[low] +
                    (at - low) * (sida_routing_shares[high] - sida_routing_shares[low]);
        sum += shares[r];
    }
    for (int32_t r = 0; r < experts; r++) shares[r] /= sum;
}

/* How often each rank has the highest of its normal numbers times its gain. Returns the mean of
 * the highest. */
static double count_highest(int32_t *wins, const float *normals, const float *gains,
                            int32_t experts, int32_t samples) {
    double sum = 0;
    memset(wins, 0, (size_t)experts * sizeof *wins);
    for (int32_t s = 0; s < samples; s++) {
        const float *row = normals + (size_t)s * (size_t)experts;
        int32_t best = 0;
        float high = row[0] * gains[0];
        for (int32_t e = 1; e < experts; e++) {
            float value = row[e] * gains[e];
            if (value > high) {
                high = value;
                best = e;
            }
        }
        wins[best]++;
        sum += high;
    }
    return sum / samples;
}

/* A layer norm's output times a random vector is close to normal, so gains are fitted to normal
 * numbers once, for all layers: a gain grows while its rank wins too rarely. An expert wins at most
 * every second token this way; shares beyond that (E < 8) are approached only. */
static sida_status calibrate(storage *s, sida_rng *rng) {
    sida_status status = SIDA_OK;
    const double highest_logit = 6; /* on average; the scale is free */
    int32_t experts = s->options->experts, samples = DRAWS / experts, *wins = NULL;
    float *normals = NULL, *gains = NULL;
    double *target = NULL, mean = 1;
    if (samples > MOST_SAMPLES) samples = MOST_SAMPLES;
    if (samples < 256) samples = 256;
    size_t draws = (size_t)samples * (size_t)experts;
    SIDA_TRY(SIDA_ALLOC(&s->gains, experts, "router gains"));
    SIDA_TRY(SIDA_ALLOC(&target, experts, "router gains"));
    SIDA_TRY(SIDA_ALLOC(&gains, experts, "router gains"));
    SIDA_TRY(SIDA_ALLOC(&wins, experts, "router gains"));
    SIDA_TRY(SIDA_ALLOC(&normals, draws, "router samples"));
    sida_synthetic_shares(target, experts);
    for (size_t i = 0; i < draws; i++) normals[i] = sida_rng_normal(rng);
    for (int32_t e = 0; e < experts; e++) gains[e] = 1;
    for (int round = 0; round < ROUNDS; round++) {
        double step = round < ROUNDS / 2 ? 0.2 : 0.05;
        mean = count_highest(wins, normals, gains, experts, samples);
        for (int32_t e = 0; e < experts; e++) {
            double share = (wins[e] + 0.5) / samples, wanted = target[e] + 0.5 / samples;
            double power = step * log(wanted / share);
            gains[e] = (float)(fmin(gains[e] / mean * exp(power), 1e3));
        }
    }
    mean = count_highest(wins, normals, gains, experts, samples);
    for (int32_t e = 0; e < experts; e++) s->gains[e] = gains[e] * highest_logit / mean;
out:
    free(normals);
    free(gains);
    free(wins);
    free(target);
    return status;
}

/* Which expert has which rank: shuffled for each site. */
static void fill_router(storage *s, int32_t site, int32_t *ranks, sida_rng *rng) {
    const sida_synthetic_options *o = s->options;
    size_t d = (size_t)o->d_model, size = sida_dtype_bytes(s->dtype);
    char *to = s->routers + (size_t)site * s->router_elements * size;
    for (int32_t e = 0; e < o->experts; e++) {
        int32_t other = (int32_t)sida_rng_below(rng, (uint32_t)e + 1);
        ranks[e] = ranks[other];
        ranks[other] = e;
    }
    for (int32_t e = 0; e < o->experts; e++)
        fill(to + (size_t)e * d * size, d, s->gains[ranks[e]] / sqrt((double)d), s->dtype, rng);
}

static sida_status fill_storage(storage *s, int32_t sites) {
    sida_status status = SIDA_OK;
    const sida_synthetic_options *o = s->options;
    sida_rng rng = sida_rng_seed(o->seed);
    size_t size = sida_dtype_bytes(s->dtype), d = (size_t)o->d_model;
    size_t inner = (size_t)o->heads * (size_t)o->d_kv, wide = (size_t)o->d_ff;
    size_t rows = (size_t)o->vocabulary;
    int32_t *ranks = NULL;
    s->block_elements = (wide > inner ? wide : inner) * d * BLOCK_MATRICES;
    s->query_elements = inner * d;
    s->router_elements = (size_t)o->experts * d;
    SIDA_TRY(sida_alloc((void **)&s->block, s->block_elements, size, "random weights"));
    SIDA_TRY(sida_alloc((void **)&s->query, s->query_elements, size, "random weights"));
    SIDA_TRY(sida_alloc((void **)&s->embedding, rows * d, size, "a random embedding"));
    SIDA_TRY(sida_alloc((void **)&s->ones, d, size, "norms"));
    SIDA_TRY(sida_alloc((void **)&s->routers, s->router_elements * (size_t)sites, size, "routers"));
    SIDA_TRY(SIDA_ALLOC(&ranks, o->experts, "ranks"));
    double unit = 1 / sqrt((double)d);
    fill(s->block, s->block_elements, unit, s->dtype, &rng);
    fill(s->query, s->query_elements, unit / sqrt(o->d_kv), s->dtype, &rng);
    /* Above all that the blocks add: a layer norm's output is then mostly the token's own, as in
     * trained models, where routing is mostly a matter of the token. What ReLUs add has a mean that
     * all tokens share, and would pull them to the same experts. */
    fill(s->embedding, rows * d, 12, s->dtype, &rng);
    for (size_t i = 0; i < d; i++) put(s->ones, i, 1, s->dtype);
    SIDA_TRY(calibrate(s, &rng));
    for (int32_t site = 0; site < sites; site++) fill_router(s, site, ranks, &rng);
out:
    free(ranks);
    return status;
}

/* --- tensors */

static int32_t site_of(const sida_synthetic_options *o, int side, int32_t block) {
    return (side == SIDA_DECODER ? o->layers[SIDA_ENCODER] / 2 : 0) + block / 2;
}

/* A window of the block, chosen by what the tensor is. */
static const char *window(const storage *s, size_t elements, sida_tensor_role role, int side,
                          int32_t block, int32_t expert) {
    uint64_t key = ((uint64_t)role << 1 | (uint64_t)side) << 48 | (uint64_t)(uint32_t)block << 32 |
                   (uint32_t)expert;
    sida_rng rng = sida_rng_seed(key ^ s->options->seed);
    size_t places = (s->block_elements - elements) / WINDOW_STEP + 1;
    size_t at = (size_t)(sida_rng_u64(&rng) % places) * WINDOW_STEP;
    return s->block + at * sida_dtype_bytes(s->dtype);
}

static sida_status find_synthetic(void *context, sida_tensor_view *out, sida_tensor_role role,
                                  int side, int32_t block, int32_t expert, int rank,
                                  const int64_t *shape) {
    const storage *s = context;
    size_t size = sida_dtype_bytes(s->dtype), elements = 1;
    *out = (sida_tensor_view){.name = "", .dtype = s->dtype, .rank = rank};
    for (int i = 0; i < rank; i++) {
        out->shape[i] = shape[i];
        elements *= (size_t)shape[i];
    }
    out->bytes = elements * size;
    if (role == SIDA_TENSOR_EMBEDDING)
        out->data = s->embedding;
    else if (rank == 1)
        out->data = s->ones;
    else if (role == SIDA_TENSOR_SELF_Q || role == SIDA_TENSOR_CROSS_Q)
        out->data = s->query;
    else if (role == SIDA_TENSOR_ROUTER)
        out->data =
            s->routers + (size_t)site_of(s->options, side, block) * s->router_elements * size;
    else
        out->data = window(s, elements, role, side, block, expert);
    return SIDA_OK;
}

static json_t *config_of(const sida_synthetic_options *o) {
    return json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i}", "model_type",
                     "switch_transformers", "vocab_size", o->vocabulary, "d_model", o->d_model,
                     "d_kv", o->d_kv, "num_heads", o->heads, "d_ff", o->d_ff, "num_layers",
                     o->layers[SIDA_ENCODER], "num_decoder_layers", o->layers[SIDA_DECODER],
                     "num_sparse_encoder_layers", o->layers[SIDA_ENCODER] / 2,
                     "num_sparse_decoder_layers", o->layers[SIDA_DECODER] / 2, "num_experts",
                     o->experts, "expert_capacity", o->capacity);
}

static sida_status check(const sida_synthetic_options *o) {
    if (o->dtype != SIDA_F32 && o->dtype != SIDA_BF16)
        return sida_fail(SIDA_ERROR_ARGUMENT, "%s: type %s: expected F32 or BF16", o->name,
                         sida_dtype_name(o->dtype));
    if (o->experts < 1 || o->experts > 1 << 16)
        return sida_fail(SIDA_ERROR_ARGUMENT, "%s: %d experts: expected 1 to 65536", o->name,
                         o->experts);
    for (int side = 0; side < 2; side++)
        if (o->layers[side] < 2 || o->layers[side] % 2 != 0)
            return sida_fail(SIDA_ERROR_ARGUMENT, "%s: %d blocks: expected an even number from 2",
                             o->name, o->layers[side]);
    if (o->heads < 1 || o->d_kv < 1 || o->d_model < 1 || o->d_ff < 1 || o->vocabulary < 4)
        return sida_fail(SIDA_ERROR_ARGUMENT, "%s: a width below 1, or fewer than 4 ids", o->name);
    return SIDA_OK;
}

/* Two models of the same options are the same. */
static sida_status fingerprint(sida_fingerprint *out, const json_t *config,
                               const sida_synthetic_options *o) {
    sida_status status = SIDA_OK;
    sida_hasher *hasher = NULL;
    char *text = json_dumps(config, JSON_COMPACT);
    const char *dtype = sida_dtype_name(o->dtype);
    if (!text) SIDA_FAIL(SIDA_ERROR_MEMORY, "%s: out of memory for its config", o->name);
    SIDA_TRY(sida_hasher_create(&hasher));
    sida_hasher_update(hasher, text, strlen(text));
    sida_hasher_update(hasher, dtype, strlen(dtype));
    sida_hasher_update(hasher, &o->seed, sizeof o->seed);
    *out = sida_hasher_finish(hasher);
out:
    sida_hasher_destroy(hasher);
    free(text);
    return status;
}

sida_status sida_model_open_synthetic(sida_model **out, sida_backend *backend,
                                      const sida_synthetic_options *options) {
    sida_status status = SIDA_OK;
    sida_model *model = NULL;
    storage *s = NULL;
    json_t *config = NULL;
    *out = NULL;
    SIDA_TRY(check(options));
    SIDA_TRY(sida_model_create(&model, backend));
    model->family = &sida_family_switch_transformers;
    config = config_of(options);
    if (!config) SIDA_FAIL(SIDA_ERROR_MEMORY, "%s: out of memory for its config", options->name);
    SIDA_TRY(model->family->configure(&model->config, config, options->name));
    SIDA_TRY(SIDA_ALLOC(&s, 1, "a synthetic model"));
    model->storage = s;
    model->storage_destroy = storage_destroy;
    s->options = options;
    s->dtype = options->dtype;
    SIDA_TRY(fill_storage(s, model->config.info.sites));
    SIDA_TRY(sida_model_load(
        model, &(sida_tensor_source){.name = options->name, .context = s, .find = find_synthetic}));
    SIDA_TRY(fingerprint(&model->config.info.fingerprint, config, options));
    s->options = NULL;
    /* The experts are in the slab, the rest is on the device; the embedding may be asked for. */
    free(s->block);
    s->block = NULL;
    *out = model;
    model = NULL;
out:
    json_decref(config);
    sida_model_destroy(model);
    return status;
}
