#include "trainer/dataset.h"

#include "formats/base/memory.h"
#include "formats/base/rng.h"

#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char *const label_names[] = {"even", "weight", "best"};

const char *sida_labels_name(sida_labels labels) {
    return label_names[labels];
}

bool sida_labels_from_name(sida_labels *out, const char *name) {
    for (int i = 0; i < 3; i++)
        if (strcmp(name, label_names[i]) == 0) {
            *out = (sida_labels)i;
            return true;
        }
    return false;
}

/* Tokens that are read at a time: bounds the memory for the columns that are not kept. */
enum { read_tokens = 16384 };

/* How far from 1 factors may sum that are called renormalised: bf16's rounding of a few. */
static const double renormalised_sum = 0.02;

void sida_dataset_free(sida_dataset *data) {
    for (int side = 0; side < 2; side++) {
        sida_dataset_side *s = &data->sides[side];
        free(s->offsets);
        free(s->ids);
        free(s->experts);
        free(s->alpha);
        free(s->dropped);
        free(s->top_ids);
        free(s->top_logp);
        free(s->content);
    }
    free(data->embedding);
    free(data->path);
    *data = (sida_dataset){0};
}

sida_weight sida_dataset_embedding(const sida_dataset *data) {
    return (sida_weight){data->embedding, SIDA_F32, data->vocabulary, data->d_model};
}

bool sida_dataset_is_content(const sida_dataset_side *side, int64_t token) {
    return !side->content || side->content[token];
}

int32_t sida_dataset_batch_end(const sida_dataset *data, int32_t first, int64_t tokens) {
    int64_t sum = 0;
    int32_t last = first;
    while (last < data->sequences) {
        for (int side = 0; side < 2; side++)
            sum += data->sides[side].offsets[last + 1] - data->sides[side].offsets[last];
        if (last > first && sum > tokens) break;
        last++;
    }
    return last;
}

sida_ragged sida_dataset_slice(const sida_dataset *data, int side, int32_t first, int32_t last,
                               int64_t *offsets) {
    const sida_dataset_side *s = &data->sides[side];
    for (int32_t q = first; q <= last; q++) offsets[q - first] = s->offsets[q] - s->offsets[first];
    return (sida_ragged){last - first, offsets, s->ids + s->offsets[first]};
}

static sida_status allocate(void *out, size_t item, const char *path, int64_t tokens, int64_t a,
                            int64_t b) {
    size_t row = (size_t)a * (size_t)b, items;
    if (sida_mul_overflow(row, (size_t)tokens, &items))
        return sida_fail(SIDA_ERROR_MEMORY, "%s: too large for memory", path);
    return sida_alloc((void **)out, items, item, path);
}

/* The top lists of `count` tokens: ids (NULL: not read) distinct, log-probabilities of something
 * like a distribution. The reader has checked ranges and NaN. */
static sida_status check_top(const sida_dataset *data, const uint16_t *ids, const uint16_t *logp,
                             int64_t rows, int32_t width, uint32_t *stamps, uint32_t *stamp) {
    for (int64_t i = 0; i < rows; i++) {
        if (++*stamp == 0) {
            memset(stamps, 0, (size_t)data->experts * sizeof *stamps);
            *stamp = 1;
        }
        for (int32_t j = 0; j < width; j++) {
            uint16_t id = ids ? ids[i * width + j] : 0;
            if (ids && stamps[id] == *stamp)
                return sida_fail(SIDA_ERROR_FORMAT, "%s: expert %d twice in one top list",
                                 data->path, id);
            stamps[id] = *stamp;
            float value = sida_f16_to_f32(logp[i * width + j]);
            /* The best has at least probability 1/E, so a sound list never starts at -inf. */
            if (!(value < 0.01f) || (j == 0 && !(value > -65504.0f)))
                return sida_fail(SIDA_ERROR_FORMAT, "%s: a log-probability of %g", data->path,
                                 (double)value);
        }
    }
    return SIDA_OK;
}

static sida_status read_side(sida_dataset *data, sida_trace *trace, int side, int32_t top,
                             bool with_ids) {
    sida_status status = SIDA_OK;
    const sida_trace_info *info = sida_trace_get_info(trace);
    sida_dataset_side *s = &data->sides[side];
    int64_t layers = info->layers[side], k = info->top_k, n = info->tokens[side];
    uint16_t *ids = NULL, *logp = NULL;
    uint32_t *stamps = NULL, stamp = 0;
    s->tokens = n;
    SIDA_TRY(SIDA_ALLOC(&s->offsets, (size_t)data->sequences + 1, data->path));
    memcpy(s->offsets, sida_trace_offsets(trace, side),
           ((size_t)data->sequences + 1) * sizeof *s->offsets);
    SIDA_TRY(allocate(&s->ids, sizeof *s->ids, data->path, n, 1, 1));
    SIDA_TRY(allocate(&s->content, sizeof *s->content, data->path, n, 1, 1));
    SIDA_TRY(allocate(&s->experts, sizeof *s->experts, data->path, n, layers, k));
    SIDA_TRY(allocate(&s->alpha, sizeof *s->alpha, data->path, n, layers, k));
    SIDA_TRY(allocate(&s->dropped, sizeof *s->dropped, data->path, n, layers, 1));
    if (top > 0) {
        if (with_ids) {
            SIDA_TRY(allocate(&s->top_ids, sizeof *s->top_ids, data->path, n, layers, top));
            SIDA_TRY(allocate(&ids, sizeof *ids, data->path, read_tokens, layers, info->top));
        }
        SIDA_TRY(allocate(&s->top_logp, sizeof *s->top_logp, data->path, n, layers, top));
        SIDA_TRY(allocate(&logp, sizeof *logp, data->path, read_tokens, layers, info->top));
        SIDA_TRY(SIDA_ALLOC(&stamps, data->experts, data->path));
    }
    for (int64_t first = 0; first < n; first += read_tokens) {
        int64_t count = n - first < read_tokens ? n - first : read_tokens;
        SIDA_TRY(sida_trace_read(trace, side, first, count,
                                 &(sida_trace_rows){.tokens = s->ids + first,
                                                    .content = s->content + first,
                                                    .experts = s->experts + first * layers * k,
                                                    .alpha = s->alpha + first * layers * k,
                                                    .dropped = s->dropped + first * layers,
                                                    .top_ids = ids,
                                                    .top_logp = logp}));
        if (top <= 0) continue;
        SIDA_TRY(check_top(data, ids, logp, count * layers, info->top, stamps, &stamp));
        for (int64_t i = 0; i < count * layers; i++) {
            int64_t to = (first * layers + i) * top;
            if (ids) memcpy(s->top_ids + to, ids + i * info->top, (size_t)top * sizeof *ids);
            memcpy(s->top_logp + to, logp + i * info->top, (size_t)top * sizeof *logp);
        }
    }
out:
    free(ids);
    free(logp);
    free(stamps);
    return status;
}

/* Spreads the rows over the vocabulary and sees that every token has one. */
static sida_status read_embedding(sida_dataset *data, sida_trace *trace) {
    sida_status status = SIDA_OK;
    int32_t count = 0, *ids = NULL;
    float *rows = NULL;
    uint8_t *present = NULL;
    size_t width = (size_t)data->d_model;
    SIDA_TRY(sida_trace_read_embedding(trace, &count, &ids, &rows));
    SIDA_TRY(SIDA_ALLOC(&present, data->vocabulary, data->path));
    SIDA_TRY(allocate(&data->embedding, sizeof *data->embedding, data->path, data->vocabulary,
                      data->d_model, 1));
    for (int32_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= data->vocabulary)
            SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: embedding of id %d, outside the vocabulary",
                      data->path, ids[i]);
        present[ids[i]] = 1;
        memcpy(data->embedding + (size_t)ids[i] * width, rows + (size_t)i * width,
               width * sizeof *rows);
    }
    for (int side = 0; side < 2; side++)
        for (int64_t i = 0; i < data->sides[side].tokens; i++)
            if (!present[data->sides[side].ids[i]])
                SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: token id %d has no embedding row", data->path,
                          data->sides[side].ids[i]);
out:
    free(ids);
    free(rows);
    free(present);
    return status;
}

static bool is_end(const json_t *eos, int32_t id) {
    if (json_is_integer(eos)) return json_integer_value(eos) == id;
    for (size_t i = 0; i < json_array_size(eos); i++)
        if (json_integer_value(json_array_get(eos, i)) == id) return true;
    return false;
}

/* A trace that does not say what is content: all but the config's end of a sequence (a number, or
 * an array of some). */
static void guess_content(sida_dataset *data, const char *config) {
    json_t *root = json_loads(config, 0, NULL), *eos = json_object_get(root, "eos_token_id");
    for (int side = 0; side < 2; side++)
        for (int64_t i = 0; i < data->sides[side].tokens; i++)
            data->sides[side].content[i] = !is_end(eos, data->sides[side].ids[i]);
    json_decref(root);
}

static bool is_renormalised(const sida_dataset *data) {
    int32_t k = data->top_k;
    for (int side = 0; side < 2; side++)
        for (int64_t i = 0; i < data->sides[side].tokens * data->layers[side]; i++) {
            double sum = 0;
            for (int32_t j = 0; j < k; j++) sum += (double)data->sides[side].alpha[i * k + j];
            if (fabs(sum - 1) > renormalised_sum) return false;
        }
    return k > 1;
}

sida_status sida_dataset_load(sida_dataset *out, const char *path, int32_t top) {
    *out = (sida_dataset){0};
    sida_status status = SIDA_OK;
    sida_trace *trace = NULL;
    SIDA_TRY(sida_strdup(&out->path, path));
    SIDA_TRY(sida_trace_open(&trace, path));
    const sida_trace_info *info = sida_trace_get_info(trace);
    if (sida_trace_kind(trace) == SIDA_H5_PART)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: a part of an unfinished trace; finish it with --resume",
                  path);
    if (info->sequences == 0 || info->tokens[0] + info->tokens[1] == 0)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: an empty trace", path);
    if (info->sequences > INT32_MAX / 2)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: %" PRId64 " sequences are too many", path,
                  info->sequences);
    if (info->layers[0] + info->layers[1] == 0)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: a trace without MoE layers", path);
    if (top > info->top)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "%s: holds the top %d of each token, fewer than %d", path,
                  info->top, top);
    SIDA_TRY(sida_fingerprint_of_file(&out->file, path));
    out->model = info->model;
    out->tokenizer = info->tokenizer;
    out->experts = info->experts;
    out->top_k = info->top_k;
    const bool with_ids = top != SIDA_DATASET_MARGINS;
    if (!with_ids) top = info->top < 2 ? info->top : 2;
    out->top = top == 0 ? info->top : top < 0 ? 0 : top;
    out->d_model = info->d_model;
    out->vocabulary = info->vocabulary;
    out->sequences = (int32_t)info->sequences;
    for (int side = 0; side < 2; side++) {
        out->layers[side] = info->layers[side];
        SIDA_TRY(read_side(out, trace, side, out->top, with_ids));
    }
    if (!info->has_content) guess_content(out, info->config);
    out->renormalised = is_renormalised(out);
    SIDA_TRY(read_embedding(out, trace));
out:
    sida_trace_close(trace);
    if (status != SIDA_OK) sida_dataset_free(out);
    return status;
}

sida_status sida_dataset_check_pair(const sida_dataset *a, const sida_dataset *b) {
    if (!sida_fingerprint_equal(a->model, b->model)) {
        char first[SIDA_FINGERPRINT_TEXT], second[SIDA_FINGERPRINT_TEXT];
        sida_fingerprint_format(first, a->model);
        sida_fingerprint_format(second, b->model);
        return sida_fail(SIDA_ERROR_MISMATCH, "%s is a trace of model %s, %s of another model, %s",
                         a->path, first, b->path, second);
    }
    const struct {
        const char *what;
        int32_t a, b;
    } same[] = {{"experts a layer", a->experts, b->experts},
                {"MoE layers in the encoder", a->layers[0], b->layers[0]},
                {"MoE layers in the decoder", a->layers[1], b->layers[1]},
                {"chosen experts a token", a->top_k, b->top_k},
                {"embedding columns", a->d_model, b->d_model},
                {"ids in the vocabulary", a->vocabulary, b->vocabulary}};
    for (size_t i = 0; i < sizeof same / sizeof *same; i++)
        if (same[i].a != same[i].b)
            return sida_fail(SIDA_ERROR_MISMATCH, "%s has %d %s, %s has %d", a->path, same[i].a,
                             same[i].what, b->path, same[i].b);
    return SIDA_OK;
}

/* One pair's; factors that are all 0 say nothing: even shares then. */
static void weigh(float *weights, const float *alpha, int32_t k, sida_labels labels) {
    float sum = 0;
    for (int32_t j = 0; j < k; j++) sum += alpha[j];
    for (int32_t j = 0; j < k; j++)
        if (labels == SIDA_LABELS_BEST)
            weights[j] = j == 0 ? 1 : 0;
        else
            weights[j] = labels == SIDA_LABELS_WEIGHT && sum > 0 ? alpha[j] / sum : 1 / (float)k;
}

void sida_dataset_labels(uint16_t *labels, float *weights, const sida_dataset *data, int side,
                         int64_t first, int64_t count) {
    const sida_dataset_side *from = &data->sides[side];
    int64_t k = data->top_k, row = k * data->layers[side];
    if (count * row == 0) return;
    memcpy(labels, from->experts + first * row, (size_t)(count * row) * sizeof *labels);
    for (int64_t i = 0; i < count * row; i += k)
        weigh(weights + i, from->alpha + first * row + i, data->top_k, data->labels);
}

static sida_status fill_labels(sida_minibatch_side *to, const sida_dataset *data, int side,
                               const int32_t *order) {
    sida_status status = SIDA_OK;
    int64_t row = (int64_t)data->top_k * data->layers[side];
    size_t items = (size_t)(sida_ragged_tokens(&to->tokens) * row) + 1;
    SIDA_TRY(SIDA_GROW(&to->labels, &to->label_items, items, "a batch"));
    SIDA_TRY(SIDA_GROW(&to->label_weights, &to->weight_items, items, "a batch"));
    for (int32_t i = 0; i < to->tokens.sequences; i++)
        sida_dataset_labels(
            to->labels + to->offsets[i] * row, to->label_weights + to->offsets[i] * row, data, side,
            data->sides[side].offsets[order[i]], to->offsets[i + 1] - to->offsets[i]);
out:
    return status;
}

sida_status sida_minibatch_fill(sida_minibatch *out, const sida_dataset *data, const int32_t *order,
                                int32_t count) {
    sida_status status = SIDA_OK;
    for (int side = 0; side < 2; side++) {
        sida_minibatch_side *to = &out->sides[side];
        const sida_dataset_side *from = &data->sides[side];
        size_t row = (size_t)data->layers[side] * (size_t)data->top;
        SIDA_TRY(SIDA_GROW(&to->offsets, &to->offset_items, (size_t)count + 1, "a batch"));
        to->offsets[0] = 0;
        for (int32_t i = 0; i < count; i++)
            to->offsets[i + 1] =
                to->offsets[i] + from->offsets[order[i] + 1] - from->offsets[order[i]];
        size_t n = (size_t)to->offsets[count];
        SIDA_TRY(SIDA_GROW(&to->ids, &to->id_items, n + 1, "a batch"));
        SIDA_TRY(SIDA_GROW(&to->top_ids, &to->top_items, n * row + 1, "a batch"));
        SIDA_TRY(SIDA_GROW(&to->top_logp, &to->logp_items, n * row + 1, "a batch"));
        for (int32_t i = 0; i < count; i++) {
            size_t at = (size_t)to->offsets[i], source = (size_t)from->offsets[order[i]];
            size_t length = (size_t)to->offsets[i + 1] - at;
            memcpy(to->ids + at, from->ids + source, length * sizeof *to->ids);
            if (row == 0) continue;
            memcpy(to->top_ids + at * row, from->top_ids + source * row,
                   length * row * sizeof *to->top_ids);
            memcpy(to->top_logp + at * row, from->top_logp + source * row,
                   length * row * sizeof *to->top_logp);
        }
        to->tokens = (sida_ragged){count, to->offsets, to->ids};
        if (from->experts) SIDA_TRY(fill_labels(to, data, side, order));
    }
out:
    return status;
}

void sida_minibatch_free(sida_minibatch *batch) {
    for (int side = 0; side < 2; side++) {
        free(batch->sides[side].offsets);
        free(batch->sides[side].ids);
        free(batch->sides[side].top_ids);
        free(batch->sides[side].top_logp);
        free(batch->sides[side].labels);
        free(batch->sides[side].label_weights);
    }
    *batch = (sida_minibatch){0};
}

void sida_dataset_shuffle(int32_t *order, int32_t count, uint64_t seed, int32_t epoch) {
    /* Two draws keep neighbouring seeds and epochs apart. */
    sida_rng rng = sida_rng_seed(seed);
    rng = sida_rng_seed(sida_rng_u64(&rng) + (uint64_t)epoch);
    rng = sida_rng_seed(sida_rng_u64(&rng));
    for (int32_t i = 0; i < count; i++) order[i] = i;
    for (int32_t i = count - 1; i > 0; i--) {
        int32_t j = (int32_t)sida_rng_below(&rng, (uint32_t)i + 1), held = order[i];
        order[i] = order[j];
        order[j] = held;
    }
}
