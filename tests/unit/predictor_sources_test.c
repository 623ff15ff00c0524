/* The hash sources without a network: counts by hand, files and bad
 * files.
 */
#include "tests/sources_rig.h"
#include "tests/train_data.h"

#include "runtime/predictor/sources.h"
#include "trainer/fit.h"

#include <unistd.h>

enum { EXPERTS = 4, VOCABULARY = 12, WIDTH = 3 };

static char folder[] = "/tmp/sida-sources-XXXXXX";
static char trace_path[64], other_path[64], file_path[64], again_path[64];

static const sida_fingerprint model = {1, 2}, tokenizer = {3, 4};
static float embedding_rows[VOCABULARY * WIDTH];
static const sida_weight embedding = {embedding_rows, SIDA_F32, VOCABULARY, WIDTH};

static int setup(void **state) {
    (void)state;
    if (!mkdtemp(folder)) return -1;
    snprintf(trace_path, sizeof trace_path, "%s/T.h5", folder);
    snprintf(other_path, sizeof other_path, "%s/U.h5", folder);
    snprintf(file_path, sizeof file_path, "%s/P.h5", folder);
    snprintf(again_path, sizeof again_path, "%s/Q.h5", folder);
    sida_rng rng = sida_rng_seed(6);
    for (int i = 0; i < VOCABULARY * WIDTH; i++) embedding_rows[i] = sida_rng_normal(&rng);
    return 0;
}

static int teardown(void **state) {
    (void)state;
    unlink(trace_path);
    unlink(other_path);
    unlink(file_path);
    unlink(again_path);
    return rmdir(folder);
}

/* --- counts */

/* Two sequences on the encoder's side, one layer, one choice; the decoder's side is the same. */
static const int64_t seen_offsets[3] = {0, 4, 6};
static const int32_t seen_ids[6] = {4, 7, 4, 4, 7, 7};
static const uint16_t seen_experts[6] = {2, 3, 2, 1, 0, 0};
static const float seen_alpha[6] = {0.5f, 0.25f, 0.75f, 0.5f, 0.5f, 0.5f};

static sida_routed seen(void) {
    const sida_ragged tokens = {2, seen_offsets, seen_ids};
    return (sida_routed){.shape = {EXPERTS, VOCABULARY, WIDTH, {1, 1}},
                         .model = model,
                         .tokenizer = tokenizer,
                         .top_k = 1,
                         .tokens = {tokens, tokens},
                         .experts = {seen_experts, seen_experts},
                         .alpha = {seen_alpha, seen_alpha}};
}

static void expect_shares(const sida_hash_table *table, int64_t row, const double shares[EXPERTS]) {
    for (int r = 0; r < EXPERTS; r++) {
        uint16_t e = table->experts[row * EXPERTS + r];
        if (fabs((double)table->alpha[row * EXPERTS + r] - shares[e]) > 1e-6)
            fail_msg("row %d: share %g of expert %d, expected %g", (int)row,
                     (double)table->alpha[row * EXPERTS + r], e, shares[e]);
        if (r == 0) continue;
        uint16_t before = table->experts[row * EXPERTS + r - 1];
        assert_true(shares[before] > shares[e] || (shares[before] == shares[e] && before < e));
    }
}

static void counts(void **state) {
    (void)state;
    /* popularity 2/6, 1/6, 2/6, 1/6; of id 4: 0 1 2 0; of id 7: 2 0 0 1 */
    static const double popular[EXPERTS] = {2.0 / 6, 1.0 / 6, 2.0 / 6, 1.0 / 6};
    static const double even[EXPERTS] = {0.25, 0.25, 0.25, 0.25};
    static const double count4[EXPERTS] = {0, 1, 2, 0}, count7[EXPERTS] = {2, 0, 0, 1};
    double id4[EXPERTS], id7[EXPERTS], after7[EXPERTS], first7[EXPERTS];
    for (int e = 0; e < EXPERTS; e++) {
        id4[e] = (count4[e] + 0.01 * popular[e]) / 3.01;
        id7[e] = (count7[e] + 0.01 * popular[e]) / 3.01;
        after7[e] = ((e == 2) + 10 * id4[e]) / 11; /* 4 behind 7: expert 2, once */
        first7[e] = ((e == 0) + 10 * id7[e]) / 11; /* 7 first: expert 0, once */
    }
    const double *expected[3][4] = {{popular, popular, popular, popular},
                                    {id7, id4, popular, id4},
                                    {first7, after7, popular, id4}};
    /* 9 was never seen, nor 4 behind it. */
    const int64_t offsets[2] = {0, 4}, none[2] = {0, 0}, step[2] = {0, 1};
    const int32_t ids[4] = {7, 4, 9, 4};
    for (int order = 0; order < 3; order++) {
        sida_hash_source *source;
        const sida_routed from = seen();
        ok(sida_table_source_create(&source, (sida_table_order)order, &from));
        assert_string_equal(source->info.name, sida_table_name((sida_table_order)order));
        asked a = ask(source, &(sida_ragged){1, offsets, ids}, EXPERTS);
        for (int i = 0; i < 4; i++) expect_shares(&a.table, i, expected[order][i]);
        /* The decoder remembers the token before, and forgets it with a new batch. */
        for (int round = 0; round < 2; round++) {
            ok(sida_hash_encode(source, a.state, &(sida_ragged){1, none, ids}, EXPERTS, &a.table));
            for (int i = 0; i < 4; i++) {
                ok(sida_hash_decode(source, a.state, &(sida_ragged){1, step, ids + i}, EXPERTS,
                                    &a.table));
                expect_shares(&a.table, 0, expected[order][i]);
            }
        }
        refused(
            sida_hash_decode(source, a.state, &(sida_ragged){2, seen_offsets, ids}, 1, &a.table),
            SIDA_ERROR_ARGUMENT, "another batch");
        forget(source, &a);
        sida_hash_source_destroy(source);
    }
    /* Without anything counted all are equally likely. */
    sida_hash_source *source;
    sida_routed nothing = seen();
    for (int side = 0; side < 2; side++) nothing.tokens[side] = (sida_ragged){1, none, ids};
    ok(sida_table_source_create(&source, SIDA_TABLE_BIGRAM, &nothing));
    asked a = ask(source, &(sida_ragged){1, offsets, ids}, EXPERTS);
    for (int i = 0; i < 4; i++) expect_shares(&a.table, i, even);
    forget(source, &a);
    sida_hash_source_destroy(source);
}

/* Two layers, two choices a token: all choices count, each in its layer. */
static void counts_of_several(void **state) {
    (void)state;
    const int64_t offsets[2] = {0, 2};
    const int32_t ids[2] = {5, 5};
    const uint16_t chosen[8] = {0, 1, 3, 2, 0, 2, 3, 1}; /* [token, layer, rank] */
    const sida_ragged tokens = {1, offsets, ids};
    const sida_routed from = {.shape = {EXPERTS, VOCABULARY, WIDTH, {2, 0}},
                              .top_k = 2,
                              .tokens = {tokens, {1, (const int64_t[]){0, 0}, NULL}},
                              .experts = {chosen, NULL}};
    static const double shares[2][EXPERTS] = {{0.5, 0.25, 0.25, 0}, {0, 0.25, 0.25, 0.5}};
    sida_hash_source *source;
    ok(sida_table_source_create(&source, SIDA_TABLE_TOKEN, &from));
    asked a = ask(source, &tokens, EXPERTS);
    for (int l = 0; l < 2; l++) expect_shares(&a.table, l, shares[l]);
    ok(sida_hash_decode(source, a.state, &tokens, 2, &a.table));
    assert_int_equal(a.table.layers, 0);
    forget(source, &a);
    sida_hash_source_destroy(source);
}

/* --- the layer hash */

static void layer_hash(void **state) {
    (void)state;
    enum { IDS = 400, HASH_EXPERTS = 8, N = 6000, HASH_LAYERS = 3 };
    static int32_t ids[N];
    static int64_t count[IDS];
    static uint16_t chosen[N * HASH_LAYERS * 2];
    static float alpha[N * HASH_LAYERS * 2];
    sida_rng rng = sida_rng_seed(8);
    for (int i = 0; i < N; i++) { /* a few frequent ids, many rare, 100 never */
        uint32_t most = 1 + sida_rng_below(&rng, 300);
        ids[i] = (int32_t)sida_rng_below(&rng, most);
        count[ids[i]]++;
        for (int j = 0; j < HASH_LAYERS * 2; j++)
            alpha[i * HASH_LAYERS * 2 + j] = j % 2 ? 0.125f : 0.25f * (float)(1 + i % 2);
    }
    const int64_t offsets[2] = {0, N}, all_offsets[2] = {0, IDS}, none[2] = {0, 0};
    const sida_routed from = {.shape = {HASH_EXPERTS, IDS, WIDTH, {HASH_LAYERS, 0}},
                              .top_k = 2,
                              .tokens = {{1, offsets, ids}, {1, none, NULL}},
                              .experts = {chosen, NULL},
                              .alpha = {alpha, NULL}};
    int32_t all[IDS];
    for (int i = 0; i < IDS; i++) all[i] = i;
    static uint16_t first[2][2][IDS * HASH_LAYERS]; /* kind, seed */
    for (int kind = 0; kind < 2; kind++)
        for (int seed = 0; seed < 3; seed++) { /* the last repeats the one before */
            sida_hash_source *source;
            ok(sida_layer_hash_source_create(&source, (sida_layer_hash)kind, seed > 0, &from));
            asked a = ask(source, &(sida_ragged){1, all_offsets, all}, HASH_EXPERTS);
            int64_t load[HASH_LAYERS][HASH_EXPERTS] = {{0}}, ids_of[HASH_EXPERTS] = {0};
            for (int i = 0; i < IDS * HASH_LAYERS; i++) {
                const uint16_t *e = a.table.experts + i * HASH_EXPERTS;
                const float *p = a.table.alpha + i * HASH_EXPERTS;
                float sum = 0;
                for (int r = 0; r < HASH_EXPERTS; r++) {
                    assert_int_equal(e[r], (e[0] + r) % HASH_EXPERTS);
                    sum += p[r];
                }
                assert_true(fabsf(sum - 1) < 1e-6f);
                assert_true(fabsf(p[0] - 0.375f) < 1e-6f && p[1] == 0.125f);
                load[i % HASH_LAYERS][e[0]] += count[i / HASH_LAYERS];
                ids_of[e[0]]++;
                if (seed < 2) first[kind][seed][i] = e[0];
                if (seed == 2) assert_int_equal(first[kind][1][i], e[0]);
            }
            for (int l = 0; l < HASH_LAYERS && kind == SIDA_LAYER_HASH_BALANCED; l++)
                for (int e = 0; e < HASH_EXPERTS; e++)
                    /* Dealing greedily ends within the last ids dealt, which are seen once or few
                     * times: at most 5 apart here, of 750. */
                    if (llabs((long long)load[l][e] - N / HASH_EXPERTS) > 5)
                        fail_msg("layer %d: expert %d has %d tokens", l, e, (int)load[l][e]);
            /* 1,200 draws over 8: 150 each, deviation 11.5. */
            for (int e = 0; e < HASH_EXPERTS && kind == SIDA_LAYER_HASH_RANDOM; e++)
                assert_in_range(ids_of[e], 150 - 60, 150 + 60);
            const int32_t outside[1] = {IDS};
            refused(sida_hash_encode(source, a.state,
                                     &(sida_ragged){1, (const int64_t[]){0, 1}, outside}, 1,
                                     &a.table),
                    SIDA_ERROR_FORMAT, "token id 400");
            forget(source, &a);
            sida_hash_source_destroy(source);
        }
    int same_seed = 0, same_layer = 0;
    for (int kind = 0; kind < 2; kind++)
        for (int i = 0; i < IDS; i++) {
            same_seed += first[kind][0][i * HASH_LAYERS] == first[kind][1][i * HASH_LAYERS];
            same_layer += first[kind][0][i * HASH_LAYERS] == first[kind][0][i * HASH_LAYERS + 1];
        }
    /* By chance 100 of 800, deviation 9.4. */
    assert_in_range(same_seed, 40, 160);
    assert_in_range(same_layer, 40, 160);
}

/* --- the router */

static void router(void **state) {
    (void)state;
    enum { SITES = 2 };
    float weights[SITES][EXPERTS * WIDTH], norms[SITES][WIDTH];
    char unaligned[1 + EXPERTS * WIDTH * 2]; /* the first layer as BF16, at an odd address */
    sida_rng rng = sida_rng_seed(2);
    for (int s = 0; s < SITES; s++)
        for (int i = 0; i < EXPERTS * WIDTH; i++) {
            float value = sida_rng_normal(&rng);
            uint32_t bits;
            memcpy(&bits, &value, sizeof bits);
            if (s == 0) bits &= 0xffff0000u;
            uint16_t high = (uint16_t)(bits >> 16);
            memcpy(&weights[s][i], &bits, sizeof bits);
            if (s == 0) memcpy(unaligned + 1 + 2 * i, &high, sizeof high);
            if (i < WIDTH) norms[s][i] = 1 + 0.5f * sida_rng_normal(&rng);
        }
    const sida_router_weights given[SITES] = {
        {{unaligned + 1, SIDA_BF16, EXPERTS, WIDTH}, {norms[0], SIDA_F32, 1, WIDTH}},
        {{weights[1], SIDA_F32, EXPERTS, WIDTH}, {norms[1], SIDA_F32, 1, WIDTH}}};
    const sida_source_shape shape = {EXPERTS, VOCABULARY, WIDTH, {1, 1}};
    sida_hash_source *source;
    const float epsilon = 0.125f;
    ok(sida_router_source_create(&source, &shape, given, epsilon, embedding, model, tokenizer));
    int32_t ids[VOCABULARY];
    for (int i = 0; i < VOCABULARY; i++) ids[i] = i;
    const sida_ragged all = {1, (const int64_t[]){0, VOCABULARY}, ids};
    asked a = ask(source, &all, EXPERTS);
    for (int side = 0; side < 2; side++) {
        if (side == 1) ok(sida_hash_decode(source, a.state, &all, EXPERTS, &a.table));
        for (int i = 0; i < VOCABULARY; i++) {
            const float *x = embedding_rows + i * WIDTH;
            double square = 0, scores[EXPERTS] = {0}, sum = 0;
            for (int c = 0; c < WIDTH; c++) square += (double)x[c] * (double)x[c] / WIDTH;
            for (int e = 0; e < EXPERTS; e++) {
                for (int c = 0; c < WIDTH; c++)
                    scores[e] += (double)weights[side][e * WIDTH + c] * (double)norms[side][c] *
                                 (double)x[c] / sqrt(square + (double)epsilon);
                sum += scores[e] = exp(scores[e]);
            }
            for (int e = 0; e < EXPERTS; e++) scores[e] /= sum;
            expect_shares(&a.table, i, scores);
        }
    }
    const int32_t outside[1] = {VOCABULARY};
    refused(sida_hash_encode(source, a.state, &(sida_ragged){1, (const int64_t[]){0, 1}, outside},
                             1, &a.table),
            SIDA_ERROR_FORMAT, "12");
    forget(source, &a);
    sida_hash_source_destroy(source);
    const sida_weight narrow = {embedding_rows, SIDA_F32, VOCABULARY, WIDTH - 1};
    refused(sida_router_source_create(&source, &shape, given, epsilon, narrow, model, tokenizer),
            SIDA_ERROR_MISMATCH, "3 columns");
}

/* --- files */

static void expect_same(const sida_hash_source *x, const sida_hash_source *y,
                        const sida_dataset *data) {
    asked a = {0}, b = {0};
    ok(sida_hash_state_create(x, &a.state));
    ok(sida_hash_state_create(y, &b.state));
    for (int side = 0; side < 2; side++) {
        const sida_dataset_side *s = &data->sides[side];
        const sida_ragged all = {data->sequences, s->offsets, s->ids};
        ok(side ? sida_hash_decode(x, a.state, &all, data->experts, &a.table)
                : sida_hash_encode(x, a.state, &all, data->experts, &a.table));
        ok(side ? sida_hash_decode(y, b.state, &all, data->experts, &b.table)
                : sida_hash_encode(y, b.state, &all, data->experts, &b.table));
        size_t items = (size_t)(s->tokens * data->layers[side] * data->experts);
        assert_memory_equal(a.table.experts, b.table.experts, items * sizeof(uint16_t));
        assert_memory_equal(a.table.alpha, b.table.alpha, items * sizeof(float));
        /* A sequence alone gives the same rows. */
        for (int32_t q = 0; side == 0 && q < data->sequences; q++) {
            int64_t offsets[2];
            sida_ragged one = sequence(data, 0, q, offsets);
            size_t row = (size_t)(data->layers[0] * data->experts);
            ok(sida_hash_encode(y, b.state, &one, data->experts, &b.table));
            assert_memory_equal(a.table.alpha + (size_t)s->offsets[q] * row, b.table.alpha,
                                (size_t)offsets[1] * row * sizeof(float));
        }
        if (side == 0) ok(sida_hash_encode(y, b.state, &all, data->experts, &b.table));
    }
    forget(x, &a);
    forget(y, &b);
}

static void files(void **state) {
    (void)state;
    static const char *const names[] = {"popular", "table", "bigram", "layer-hash"};
    for (int layers = 0; layers < 3; layers++) { /* both sides, encoder only, decoder only */
        train_data d = train_data_default();
        if (layers > 0) d.layers[2 - layers] = 0;
        d.top_k = 1 + layers;
        train_data_write(&d, trace_path);
        sida_dataset data;
        ok(sida_dataset_load(&data, trace_path, -1));
        const sida_weight table = sida_dataset_embedding(&data);
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
            sida_hash_source *made, *read;
            json_t *summary;
            sida_train_options o = sida_train_defaults();
            o.trace = trace_path;
            o.output = file_path;
            o.source = names[i];
            o.seed = 9;
            ok(sida_train(&o, NULL));
            o.output = again_path;
            o.valid = trace_path;
            ok(sida_train(&o, &summary));
            assert_string_equal(json_string_value(json_object_get(summary, "source")), names[i]);
            assert_true(json_is_object(json_object_get(summary, "valid")));
            json_decref(summary);
            test_bytes a = test_read(file_path), b = test_read(again_path);
            assert_int_equal(a.size, b.size);
            assert_memory_equal(a.data, b.data, a.size);
            free(a.data);
            free(b.data);
            ok(sida_fit_source(&made, names[i], SIDA_LAYER_HASH_BALANCED, 9, &data));
            ok(sida_hash_source_open(&read, file_path, table, data.model));
            assert_string_equal(read->info.name, names[i]);
            assert_int_equal(read->info.bytes, made->info.bytes);
            expect_same(made, read, &data);
            sida_hash_source_destroy(made);
            sida_hash_source_destroy(read);
            refused(sida_hash_source_open(&read, file_path, table, model), SIDA_ERROR_MISMATCH,
                    "not of this model");
            sida_weight wrong = table;
            wrong.cols++;
            refused(sida_hash_source_open(&read, file_path, wrong, data.model), SIDA_ERROR_MISMATCH,
                    "16 columns");
        }
        sida_dataset_free(&data);
    }
}

static void fit_refuses(void **state) {
    (void)state;
    train_data d = train_data_default();
    train_data_write(&d, trace_path);
    d.experts--;
    train_data_write(&d, other_path);
    sida_train_options o = sida_train_defaults();
    o.trace = trace_path;
    o.valid = other_path;
    o.output = file_path;
    o.source = "table";
    unlink(file_path);
    refused(sida_train(&o, NULL), SIDA_ERROR_MISMATCH, "experts a layer");
    o.valid = NULL;
    o.source = "guess";
    refused(sida_train(&o, NULL), SIDA_ERROR_ARGUMENT, "source 'guess'");
    o.source = "layer-hash";
    o.seed = -1;
    refused(sida_train(&o, NULL), SIDA_ERROR_ARGUMENT, "range");
    assert_int_equal(access(file_path, F_OK), -1);
}

/* A token table of one layer: ids 4 and 7, two and one experts. */
typedef struct small_table {
    int64_t shape[3]; /* rows, starts, entries */
    int64_t keys[2], starts[3];
    uint16_t experts[3];
    int32_t counts[3];
    const char *source, *missing;
    int order, experts_said, layers_said;
} small_table;

static const small_table sound = {{2, 3, 3}, {4, 7}, {0, 2, 3}, {1, 3, 2}, {5, 1, 2},
                                  "table",   NULL,   1,         EXPERTS,   1};

static void write_small(const small_table *t) {
    sida_h5_file *file;
    json_t *config =
        json_pack("{s:{s:i}, s:{s:i, s:i, s:i, s:i, s:i}}", t->source, "order", t->order, "shape",
                  "d_model", WIDTH, "experts", t->experts_said, "vocabulary", VOCABULARY,
                  "layers_encoder", t->layers_said, "layers_decoder", 0);
    if (t->missing) json_object_del(config, t->missing);
    const sida_predictor_meta meta = {model, tokenizer, (char *)(uintptr_t)t->source, config};
    ok(sida_predictor_file_create(&file, file_path, SIDA_H5_PREDICTOR, &meta));
    const int64_t one = 1, two = 2, key = 0, starts[2] = {0, 1};
    const uint16_t expert = 2;
    const int32_t count = 8;
    ok(sida_h5_write(file, "table/encoder/0/keys", SIDA_H5_I64, 1, &one, &key));
    ok(sida_h5_write(file, "table/encoder/0/starts", SIDA_H5_I64, 1, &two, starts));
    ok(sida_h5_write(file, "table/encoder/0/experts", SIDA_H5_U16, 1, &one, &expert));
    ok(sida_h5_write(file, "table/encoder/0/counts", SIDA_H5_I32, 1, &one, &count));
    ok(sida_h5_write(file, "table/encoder/1/keys", SIDA_H5_I64, 1, &t->shape[0], t->keys));
    ok(sida_h5_write(file, "table/encoder/1/starts", SIDA_H5_I64, 1, &t->shape[1], t->starts));
    ok(sida_h5_write(file, "table/encoder/1/experts", SIDA_H5_U16, 1, &t->shape[2], t->experts));
    ok(sida_h5_write(file, "table/encoder/1/counts", SIDA_H5_I32, 1, &t->shape[2], t->counts));
    ok(sida_h5_commit(file));
    json_decref(config);
}

static void bad_tables(void **state) {
    (void)state;
    sida_hash_source *source;
    write_small(&sound);
    ok(sida_hash_source_open(&source, file_path, embedding, model));
    const int32_t ids[2] = {4, 5};
    asked a = ask(source, &(sida_ragged){1, (const int64_t[]){0, 2}, ids}, EXPERTS);
    static const double shares[2][EXPERTS] = {{0, 5 / 6.01, 0.01 / 6.01, 1 / 6.01}, {0, 0, 1, 0}};
    for (int i = 0; i < 2; i++) expect_shares(&a.table, i, shares[i]);
    forget(source, &a);
    sida_hash_source_destroy(source);
#define WITH(...)                                                                                  \
    ({                                                                                             \
        small_table with = sound;                                                                  \
        __VA_ARGS__;                                                                               \
        with;                                                                                      \
    })
    const struct {
        small_table table;
        const char *words;
    } cases[] = {
        {WITH(with.keys[0] = 7), "out of order"},
        {WITH(with.keys[1] = VOCABULARY), "out of order or of the vocabulary"},
        {WITH(with.keys[0] = -1), "vocabulary"},
        {WITH(with.keys[1] = INT64_C(1) << 32), "vocabulary"}, /* a pair's key */
        {WITH(with.starts[0] = 1), "do not span"},
        {WITH(with.starts[2] = 2), "do not span"},
        {WITH(with.starts[1] = 4), "not ascending"},
        {WITH(with.starts[1] = -1), "not ascending"},
        {WITH(with.starts[1] = INT64_MAX), "not ascending"},
        {WITH(with.experts[1] = EXPERTS), "not sound"},
        {WITH(with.experts[1] = 1), "not sound"},
        {WITH(with.counts[2] = 0), "not sound"},
        {WITH(with.counts[2] = -7), "not sound"},
        {WITH(with.shape[0] = 1), "do not fit"},
        {WITH(with.shape[2] = 2), "do not span"},
        {WITH(with.order = 2), "order"},
        {WITH(with.source = "bigram"), "order"},
        {WITH(with.source = "bigram", with.order = 2), "table/encoder/2/keys is missing"},
        {WITH(with.layers_said = 2), "do not fit"},
        {WITH(with.layers_said = 0), "no MoE layers"},
        {WITH(with.layers_said = 5000), "layers_encoder"},
        {WITH(with.experts_said = 2), "not sound"},
        {WITH(with.experts_said = 0), "experts"},
        {WITH(with.missing = "shape"), "no whole number d_model"},
        {WITH(with.missing = "table"), "no settings of a table"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_small(&cases[i].table);
        refused(sida_hash_source_open(&source, file_path, embedding, model), SIDA_ERROR_FORMAT,
                cases[i].words);
        assert_null(source);
    }
}

/* Whatever the arrays hold is refused or looked up in, within its memory. */
static void hostile_tables(void **state) {
    (void)state;
    sida_rng rng = sida_rng_seed(12);
    int opened = 0;
    const int32_t ids[3] = {4, 7, 11};
    for (int round = 0; round < 300; round++) {
        small_table t = sound;
        for (uint32_t changes = 1 + sida_rng_below(&rng, 2); changes > 0; changes--) {
            uint32_t at = sida_rng_below(&rng, 3);
            int64_t value = sida_rng_below(&rng, 3) ? (int64_t)sida_rng_below(&rng, 9)
                                                    : (int64_t)sida_rng_u64(&rng);
            uint32_t which = sida_rng_below(&rng, 4);
            if (which == 0) t.keys[at % 2] = value;
            if (which == 1) t.starts[at] = value;
            if (which == 2) t.experts[at] = (uint16_t)value;
            if (which == 3) t.counts[at] = (int32_t)value;
        }
        write_small(&t);
        sida_hash_source *source;
        sida_status status = sida_hash_source_open(&source, file_path, embedding, model);
        if (status != SIDA_OK) {
            assert_int_equal(status, SIDA_ERROR_FORMAT);
            continue;
        }
        opened++;
        asked a = ask(source, &(sida_ragged){1, (const int64_t[]){0, 3}, ids}, EXPERTS);
        for (int i = 0; i < 3 * EXPERTS; i++) {
            assert_true(a.table.experts[i] < EXPERTS);
            assert_true(a.table.alpha[i] >= 0 && a.table.alpha[i] <= 1);
        }
        forget(source, &a);
        sida_hash_source_destroy(source);
    }
    assert_in_range(opened, 20, 280);
}

static void write_hash(const uint16_t *experts, const float *alpha, int vocabulary, int top_k) {
    sida_h5_file *file;
    json_t *config = json_pack("{s:{s:i}, s:{s:i, s:i, s:i, s:i, s:i}}", "layer-hash", "top_k",
                               top_k, "shape", "d_model", WIDTH, "experts", EXPERTS, "vocabulary",
                               VOCABULARY, "layers_encoder", 1, "layers_decoder", 0);
    const sida_predictor_meta meta = {model, tokenizer, (char *)(uintptr_t) "layer-hash", config};
    ok(sida_predictor_file_create(&file, file_path, SIDA_H5_PREDICTOR, &meta));
    ok(sida_h5_write(file, "hash/encoder/experts", SIDA_H5_U16, 2, (const int64_t[]){vocabulary, 1},
                     experts));
    ok(sida_h5_write(file, "hash/encoder/alpha", SIDA_H5_F32, 2, (const int64_t[]){1, 1}, alpha));
    ok(sida_h5_commit(file));
    json_decref(config);
}

static void bad_hashes(void **state) {
    (void)state;
    uint16_t experts[VOCABULARY] = {3, 1, 2};
    float alpha = 0.5f;
    sida_hash_source *source;
    write_hash(experts, &alpha, VOCABULARY, 1);
    ok(sida_hash_source_open(&source, file_path, embedding, model));
    sida_hash_source_destroy(source);
    write_hash(experts, &alpha, VOCABULARY - 1, 1);
    refused(sida_hash_source_open(&source, file_path, embedding, model), SIDA_ERROR_FORMAT,
            "hash/encoder/experts is [11, 1]");
    write_hash(experts, &alpha, VOCABULARY, 2);
    refused(sida_hash_source_open(&source, file_path, embedding, model), SIDA_ERROR_FORMAT,
            "hash/encoder/alpha is [1, 1]");
    write_hash(experts, &alpha, VOCABULARY, EXPERTS + 1);
    refused(sida_hash_source_open(&source, file_path, embedding, model), SIDA_ERROR_FORMAT,
            "top_k is 5");
    alpha = NAN;
    write_hash(experts, &alpha, VOCABULARY, 1);
    refused(sida_hash_source_open(&source, file_path, embedding, model), SIDA_ERROR_FORMAT,
            "factor");
    alpha = 0.5f;
    experts[11] = EXPERTS;
    write_hash(experts, &alpha, VOCABULARY, 1);
    refused(sida_hash_source_open(&source, file_path, embedding, model), SIDA_ERROR_FORMAT,
            "expert 4 of 4");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(counts),     cmocka_unit_test(counts_of_several),
        cmocka_unit_test(layer_hash), cmocka_unit_test(router),
        cmocka_unit_test(files),      cmocka_unit_test(fit_refuses),
        cmocka_unit_test(bad_tables), cmocka_unit_test(hostile_tables),
        cmocka_unit_test(bad_hashes)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
