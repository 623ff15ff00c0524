/* A synthetic trace for the trainer's tests: the router's scores depend on the token and on the one
 * before, so that there is something to learn that a token-id table cannot know. */
#ifndef SIDA_TESTS_TRAIN_DATA_H
#define SIDA_TESTS_TRAIN_DATA_H

#include "tests/test.h"

#include "formats/base/rng.h"
#include "formats/trace.h"

#include <math.h>
#include <string.h>

typedef struct train_data {
    int32_t sequences, longest, experts, top_k, top, vocabulary, d_model;
    int32_t layers[2];
    uint64_t seed;      /* of the sequences; the "model" is the same for all */
    uint64_t model;     /* fingerprint */
    sida_h5_kind kind;  /* 0: a trace */
    int32_t drop_every; /* every n-th pair is dropped; 0: none */
    void (*change)(struct train_data *data, int side, int64_t tokens, sida_trace_rows *rows);
} train_data;

static inline train_data train_data_default(void) {
    return (train_data){.sequences = 60,
                        .longest = 9,
                        .experts = 8,
                        .top_k = 1,
                        .top = 5,
                        .vocabulary = 30,
                        .d_model = 16,
                        .layers = {2, 1},
                        .seed = 1,
                        .model = 77};
}

/* The same number for the same arguments, about standard normal. */
static inline float train_data_score(int a, int b, int c, int d) {
    sida_rng rng =
        sida_rng_seed((((uint64_t)a * 131 + (uint64_t)b) * 131 + (uint64_t)c) * 131 + (uint64_t)d);
    sida_rng_u64(&rng);
    return sida_rng_normal(&rng);
}

static inline void train_data_token(const train_data *d, int side, int layer, int token, int before,
                                    int64_t row, sida_trace_rows *rows) {
    double score[256], sum = 0;
    bool taken[256] = {false};
    int64_t pair = row * d->layers[side] + layer;
    for (int e = 0; e < d->experts; e++) {
        score[e] = 2 * (double)train_data_score(side * 8 + layer, token, e, 1) +
                   2 * (double)train_data_score(side * 8 + layer, before, e, 2);
        sum += exp(score[e]);
    }
    for (int j = 0; j < d->top; j++) {
        int best = -1;
        for (int e = 0; e < d->experts; e++)
            if (!taken[e] && (best < 0 || score[e] > score[best])) best = e;
        taken[best] = true;
        double logp = score[best] - log(sum);
        rows->top_ids[pair * d->top + j] = (uint16_t)best;
        rows->top_logp[pair * d->top + j] = sida_f16_from_f32((float)logp);
        if (j < d->top_k) {
            rows->experts[pair * d->top_k + j] = (uint16_t)best;
            rows->alpha[pair * d->top_k + j] = (float)exp(logp);
        }
    }
    rows->dropped[pair] = d->drop_every > 0 && pair % d->drop_every == 0;
}

static inline void train_data_write(train_data *d, const char *path) {
    sida_trace_writer *writer;
    const sida_trace_info info = {.model = {d->model, 1},
                                  .tokenizer = {2, 2},
                                  .input = {d->seed, 3},
                                  .config = (char *)(uintptr_t) "{}",
                                  .options = (char *)(uintptr_t) "{}",
                                  .family = (char *)(uintptr_t) "switch_transformers",
                                  .experts = d->experts,
                                  .top_k = d->top_k,
                                  .top = d->top,
                                  .d_model = d->d_model,
                                  .vocabulary = d->vocabulary,
                                  .layers = {d->layers[0], d->layers[1]}};
    sida_rng rng = sida_rng_seed(d->seed);
    bool *used = calloc((size_t)d->vocabulary, sizeof *used);
    if (sida_trace_create(&writer, path, d->kind ? d->kind : SIDA_H5_TRACE, &info) != SIDA_OK)
        fail_msg("%s", sida_last_message());
    size_t sequences = (size_t)d->sequences;
    int64_t *lengths = calloc(sequences + 1, sizeof *lengths);
    for (int side = 0; side < 2; side++) {
        int64_t n = 0, row = 0;
        for (int s = 0; s < d->sequences && d->layers[side] > 0; s++)
            n += lengths[s] = 1 + sida_rng_below(&rng, (uint32_t)(side ? 3 : d->longest));
        if (d->layers[side] == 0) memset(lengths, 0, sequences * sizeof *lengths);
        size_t pairs = (size_t)(n * d->layers[side]), k = (size_t)d->top_k, top = (size_t)d->top;
        sida_trace_rows rows = {.tokens = calloc((size_t)n + 1, 4),
                                .experts = calloc(pairs * k + 1, 2),
                                .alpha = calloc(pairs * k + 1, 4),
                                .dropped = calloc(pairs + 1, 1),
                                .top_ids = calloc(pairs * top + 1, 2),
                                .top_logp = calloc(pairs * top + 1, 2)};
        for (int s = 0; s < d->sequences; s++)
            for (int64_t t = 0, before = 0; t < lengths[s]; t++, row++) {
                int32_t token = (int32_t)sida_rng_below(&rng, (uint32_t)d->vocabulary);
                rows.tokens[row] = token;
                used[token] = true;
                for (int l = 0; l < d->layers[side]; l++)
                    train_data_token(d, side, l, token, (int)before, row, &rows);
                before = token;
            }
        if (d->change) d->change(d, side, n, &rows);
        if (sida_trace_append_side(writer, side, d->sequences, lengths, &rows) != SIDA_OK)
            fail_msg("%s", sida_last_message());
        free(rows.tokens);
        free(rows.experts);
        free(rows.alpha);
        free(rows.dropped);
        free(rows.top_ids);
        free(rows.top_logp);
    }
    int64_t *lines = calloc(sequences + 1, sizeof *lines);
    int32_t *labels = calloc(sequences + 1, sizeof *labels), count = 0;
    uint8_t *generated = calloc(sequences + 1, 1);
    for (int s = 0; s < d->sequences; s++) lines[s] = s + 1;
    if (sida_trace_append_sequences(writer, d->sequences, lines, labels, generated, NULL, NULL) !=
        SIDA_OK)
        fail_msg("%s", sida_last_message());
    int32_t *ids = calloc((size_t)d->vocabulary + 1, sizeof *ids);
    float *table = calloc((size_t)(d->vocabulary * d->d_model) + 1, sizeof *table);
    for (int32_t id = 0; id < d->vocabulary; id++) {
        if (!used[id]) continue;
        for (int c = 0; c < d->d_model; c++)
            table[count * d->d_model + c] = train_data_score(id, c, 0, 9);
        ids[count++] = id;
    }
    if ((d->kind != SIDA_H5_PART &&
         sida_trace_write_embedding(writer, count, ids, table) != SIDA_OK) ||
        sida_trace_commit(writer) != SIDA_OK)
        fail_msg("%s", sida_last_message());
    free(ids);
    free(table);
    free(lines);
    free(labels);
    free(generated);
    free(lengths);
    free(used);
}

#endif
