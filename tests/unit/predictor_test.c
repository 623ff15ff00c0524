/* The predictor at run time: SparseMax, bytes that do not depend on the batch or on how the decoder
 * is fed, the choice of experts, files. */
#include "tests/test.h"

#include "formats/base/rng.h"
#include "runtime/ops/sparsemax.h"
#include "runtime/predictor/select.h"
#include "runtime/predictor/sources.h"

#include <math.h>
#include <string.h>
#include <unistd.h>

enum { VOCABULARY = 50, WIDTH = 24, EXPERTS = 10 };

static float embedding_rows[VOCABULARY * WIDTH];
static const sida_weight embedding = {embedding_rows, SIDA_F32, VOCABULARY, WIDTH};
static const sida_fingerprint model = {1, 2}, tokenizer = {3, 4};

static const sida_net_config config = {.d_model = WIDTH,
                                       .hidden = 19, /* no multiple of a vector */
                                       .lstm_layers = 2,
                                       .experts = EXPERTS,
                                       .vocabulary = VOCABULARY,
                                       .layers = {3, 2}};

static sida_net *make_net(const sida_net_config *of) {
    sida_net *net;
    assert_int_equal(sida_net_create(&net, of), SIDA_OK);
    sida_net_initialise(net, 5);
    /* Larger than initial values, so that SparseMax drops keys. */
    for (int64_t i = 0; i < net->parameter_count; i++) net->parameters[i] *= 3;
    return net;
}

static int setup(void **state) {
    (void)state;
    sida_rng rng = sida_rng_seed(9);
    for (int i = 0; i < VOCABULARY * WIDTH; i++) embedding_rows[i] = sida_rng_normal(&rng);
    return 0;
}

static void sparsemax_known(void **state) {
    (void)state;
    static const struct {
        int n;
        float z[4], p[4];
    } cases[] = {{1, {-7}, {1}},
                 {2, {0, 0}, {0.5f, 0.5f}},
                 {2, {3, 1}, {1, 0}},
                 {3, {0.5f, 0, 0.5f}, {0.5f, 0, 0.5f}},
                 {3, {1, 0.5f, -2}, {0.75f, 0.25f, 0}},
                 {4, {1e6f, 1e6f, 1e6f, 1e6f}, {0.25f, 0.25f, 0.25f, 0.25f}},
                 {4, {-1e30f, 1e30f, 0, 1}, {0, 1, 0, 0}}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float p[4], scratch[4];
        sida_sparsemax(p, cases[i].z, cases[i].n, scratch);
        for (int k = 0; k < cases[i].n; k++) assert_true(p[k] == cases[i].p[k]);
    }
    float p[2], scratch[2], z[2] = {1, NAN};
    sida_sparsemax(p, z, 2, scratch);
    assert_true(isnan(p[0]) || isnan(p[1]));
}

/* What defines the projection: on the simplex, and z - p is the same on the support and no larger
 * off it. */
static void sparsemax_random(void **state) {
    (void)state;
    sida_rng rng = sida_rng_seed(4);
    for (int round = 0; round < 500; round++) {
        float z[40], p[40], scratch[40];
        int n = 1 + (int)sida_rng_below(&rng, 40);
        float scale = 0.01f * (float)(1 + round);
        for (int i = 0; i < n; i++) z[i] = scale * sida_rng_normal(&rng);
        if (n > 3) z[2] = z[0]; /* a tie */
        sida_sparsemax(p, z, n, scratch);
        double sum = 0, threshold = -INFINITY, low = INFINITY;
        for (int i = 0; i < n; i++) {
            assert_true(p[i] >= 0);
            sum += (double)p[i];
            if (p[i] > 0) {
                threshold = fmax(threshold, (double)z[i] - (double)p[i]);
                low = fmin(low, (double)z[i] - (double)p[i]);
            }
        }
        /* One rounding of z - top each, of values up to `scale` times a few. */
        double bound = 1e-6 * (1 + 4 * (double)scale);
        assert_true(fabs(sum - 1) < 40 * bound && threshold - low < bound);
        for (int i = 0; i < n; i++)
            if (p[i] == 0) assert_true((double)z[i] <= threshold + bound);
        memcpy(scratch, z, sizeof scratch);
        sida_sparsemax(z, z, n, scratch); /* in place */
        assert_memory_equal(z, p, (size_t)n * sizeof *p);
    }
}

static void select_ties(void **state) {
    (void)state;
    enum { many = 40 };
    sida_hash_table table = {0};
    uint64_t scratch[many];
    const float scores[6] = {1, 3, 3, -0.0f, 0, 3};
    static const uint16_t expected[6] = {1, 2, 5, 0, 3, 4};
    for (int k = 1; k <= 6; k++) {
        assert_int_equal(sida_hash_table_reserve(&table, 0, 1, k, 1), SIDA_OK);
        assert_true(sida_select_logits(&table, 0, 0, scores, 6, scratch));
        assert_memory_equal(table.experts, expected, (size_t)k * sizeof *expected);
        double sum = 3 + 2 * exp(-3.0) + exp(-2.0);
        assert_true(fabs((double)table.alpha[0] - 1 / sum) < 1e-6);
    }
    float sum = 0;
    for (int i = 0; i < 6; i++) sum += table.alpha[i];
    assert_true(fabsf(sum - 1) < 1e-6f);

    /* Few and many chosen agree with each other. */
    sida_rng rng = sida_rng_seed(3);
    float values[many];
    for (int i = 0; i < many; i++) values[i] = (float)sida_rng_below(&rng, 12);
    uint16_t all[many];
    assert_int_equal(sida_hash_table_reserve(&table, 0, 1, many, 1), SIDA_OK);
    assert_true(sida_select_logits(&table, 0, 0, values, many, scratch));
    memcpy(all, table.experts, sizeof all);
    for (int i = 1; i < many; i++)
        assert_true(values[all[i - 1]] > values[all[i]] ||
                    (values[all[i - 1]] == values[all[i]] && all[i - 1] < all[i]));
    for (int k = 1; k < many; k++) {
        assert_int_equal(sida_hash_table_reserve(&table, 0, 1, k, 1), SIDA_OK);
        assert_true(sida_select_logits(&table, 0, 0, values, many, scratch));
        assert_memory_equal(table.experts, all, (size_t)k * sizeof *all);
    }
    values[7] = NAN;
    assert_false(sida_select_logits(&table, 0, 0, values, many, scratch));
    sida_hash_table_free(&table);
}

/* Sequences of 0 … longest tokens. */
static void make_batch(int64_t *offsets, int32_t *ids, int sequences, int longest, uint64_t seed) {
    sida_rng rng = sida_rng_seed(seed);
    offsets[0] = 0;
    for (int s = 0; s < sequences; s++) {
        int n = s == 2 ? 0 : 1 + (int)sida_rng_below(&rng, (uint32_t)longest);
        offsets[s + 1] = offsets[s] + n;
        for (int64_t i = offsets[s]; i < offsets[s + 1]; i++)
            ids[i] = (int32_t)sida_rng_below(&rng, VOCABULARY);
    }
}

enum { SEQUENCES = 19, LONGEST = 23, FLOATS = SEQUENCES * LONGEST * 3 * EXPERTS };

/* A sequence gives the same bytes alone and in a batch; the decoder gives the same bytes in one
 * call, token by token, and in uneven steps. */
static void same_bytes(const sida_net_config *of) {
    static int64_t offsets[2][SEQUENCES + 1];
    static int32_t ids[2][SEQUENCES * LONGEST];
    static float whole[2][FLOATS];
    make_batch(offsets[0], ids[0], SEQUENCES, LONGEST, 1);
    make_batch(offsets[1], ids[1], SEQUENCES, 9, 2);
    if (of->layers[0] == 0) memset(offsets[0], 0, sizeof offsets[0]);
    sida_net *net = make_net(of);
    sida_net_pass *pass, *other;
    assert_int_equal(sida_net_pass_create(&pass, net, false), SIDA_OK);
    assert_int_equal(sida_net_pass_create(&other, net, false), SIDA_OK);
    const sida_ragged source = {SEQUENCES, offsets[0], ids[0]};
    const sida_ragged target = {SEQUENCES, offsets[1], ids[1]};
    size_t rows[2] = {(size_t)of->layers[0] * EXPERTS, (size_t)of->layers[1] * EXPERTS};
    assert_int_equal(sida_net_encode(pass, embedding, &source), SIDA_OK);
    if (of->layers[0] > 0)
        memcpy(whole[0], pass->sides[0].logits,
               (size_t)offsets[0][SEQUENCES] * rows[0] * sizeof(float));
    assert_int_equal(sida_net_decode(pass, embedding, &target), SIDA_OK);
    memcpy(whole[1], pass->sides[1].logits,
           (size_t)offsets[1][SEQUENCES] * rows[1] * sizeof(float));

    for (int s = 0; s < SEQUENCES; s++) { /* alone */
        int64_t one[2][2] = {{0, offsets[0][s + 1] - offsets[0][s]},
                             {0, offsets[1][s + 1] - offsets[1][s]}};
        assert_int_equal(
            sida_net_encode(other, embedding, &(sida_ragged){1, one[0], ids[0] + offsets[0][s]}),
            SIDA_OK);
        if (of->layers[0] > 0)
            assert_memory_equal(other->sides[0].logits, whole[0] + (size_t)offsets[0][s] * rows[0],
                                (size_t)one[0][1] * rows[0] * sizeof(float));
        assert_int_equal(
            sida_net_decode(other, embedding, &(sida_ragged){1, one[1], ids[1] + offsets[1][s]}),
            SIDA_OK);
        assert_memory_equal(other->sides[1].logits, whole[1] + (size_t)offsets[1][s] * rows[1],
                            (size_t)one[1][1] * rows[1] * sizeof(float));
    }
    for (int most = 1; most < 5; most++) { /* in steps of 0 … most tokens */
        int64_t done[SEQUENCES] = {0}, step[SEQUENCES + 1] = {0};
        int32_t next[SEQUENCES * LONGEST];
        sida_rng rng = sida_rng_seed((uint64_t)most);
        assert_int_equal(sida_net_encode(other, embedding, &source), SIDA_OK);
        for (;;) {
            bool left = false;
            for (int s = 0; s < SEQUENCES; s++) {
                int64_t rest = offsets[1][s + 1] - offsets[1][s] - done[s];
                int64_t n = most == 1 ? 1 : sida_rng_below(&rng, (uint32_t)most + 1);
                n = n < rest ? n : rest;
                left |= rest > 0;
                for (int64_t i = 0; i < n; i++)
                    next[step[s] + i] = ids[1][offsets[1][s] + done[s] + i];
                step[s + 1] = step[s] + n;
            }
            if (!left) break;
            assert_int_equal(
                sida_net_decode(other, embedding, &(sida_ragged){SEQUENCES, step, next}), SIDA_OK);
            for (int s = 0; s < SEQUENCES; s++) {
                int64_t n = step[s + 1] - step[s];
                assert_memory_equal(other->sides[1].logits + (size_t)step[s] * rows[1],
                                    whole[1] + (size_t)(offsets[1][s] + done[s]) * rows[1],
                                    (size_t)n * rows[1] * sizeof(float));
                done[s] += n;
            }
        }
    }
    sida_net_pass_destroy(pass);
    sida_net_pass_destroy(other);
    sida_net_destroy(net);
}

static void bytes_encoder_decoder(void **state) {
    (void)state;
    same_bytes(&config);
}
static void bytes_decoder_only(void **state) {
    (void)state;
    sida_net_config only = config;
    only.layers[0] = 0;
    same_bytes(&only);
}

/* The training pass computes the same numbers, with other products. 1e-4 of logits of order 10: two
 * orders of summing fp32 through two LSTM layers. */
static void training_pass_agrees(void **state) {
    (void)state;
    static int64_t offsets[2][SEQUENCES + 1];
    static int32_t ids[2][SEQUENCES * LONGEST];
    make_batch(offsets[0], ids[0], SEQUENCES, LONGEST, 1);
    make_batch(offsets[1], ids[1], SEQUENCES, 9, 2);
    sida_net *net = make_net(&config);
    sida_net_pass *pass[2];
    for (int i = 0; i < 2; i++) {
        assert_int_equal(sida_net_pass_create(&pass[i], net, i == 1), SIDA_OK);
        assert_int_equal(
            sida_net_encode(pass[i], embedding, &(sida_ragged){SEQUENCES, offsets[0], ids[0]}),
            SIDA_OK);
        assert_int_equal(
            sida_net_decode(pass[i], embedding, &(sida_ragged){SEQUENCES, offsets[1], ids[1]}),
            SIDA_OK);
    }
    for (int side = 0; side < 2; side++)
        for (int64_t k = 0; k < offsets[side][SEQUENCES] * config.layers[side] * EXPERTS; k++)
            assert_true(fabsf(pass[0]->sides[side].logits[k] - pass[1]->sides[side].logits[k]) <
                        1e-4f);
    for (int i = 0; i < 2; i++) sida_net_pass_destroy(pass[i]);
    sida_net_destroy(net);
}

static char path[] = "/tmp/sida-predictor-XXXXXX";

static void write_predictor(const sida_net *net, const sida_net_config *says, const char *source) {
    sida_h5_file *file;
    json_t *root = json_object();
    if (says) json_object_set_new(root, "net", sida_net_config_to_json(says));
    const sida_predictor_meta meta = {model, tokenizer, (char *)(uintptr_t)source, root};
    assert_int_equal(sida_predictor_file_create(&file, path, SIDA_H5_PREDICTOR, &meta), SIDA_OK);
    assert_int_equal(sida_net_write(file, net), SIDA_OK);
    assert_int_equal(sida_h5_commit(file), SIDA_OK);
    json_decref(root);
}

static void expect_refusal(sida_fingerprint of, sida_status code, const char *words) {
    sida_hash_source *source = NULL;
    assert_int_equal(sida_hash_source_open(&source, path, embedding, of), code);
    assert_null(source);
    if (!strstr(sida_last_message(), words))
        fail_msg("'%s' does not say '%s'", sida_last_message(), words);
}

static void files(void **state) {
    (void)state;
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    sida_net *net = make_net(&config);
    sida_hash_source *source, *direct;
    sida_hash_state *states[2];
    sida_hash_table tables[2] = {{0}, {0}};
    write_predictor(net, &config, "lstm");
    assert_int_equal(sida_hash_source_open(&source, path, embedding, model), SIDA_OK);
    assert_int_equal(sida_lstm_source_create(&direct, net, embedding, model, tokenizer), SIDA_OK);
    assert_int_equal(source->info.experts, EXPERTS);
    assert_int_equal(source->info.layers[1], 2);
    const int64_t offsets[3] = {0, 4, 7};
    const int32_t ids[7] = {1, 2, 3, 49, 0, 0, 5};
    const sida_ragged batch = {2, offsets, ids};
    sida_hash_source *both[2] = {source, direct};
    for (int i = 0; i < 2; i++) {
        assert_int_equal(sida_hash_state_create(both[i], &states[i]), SIDA_OK);
        /* A step before a batch is refused. */
        assert_int_equal(sida_hash_decode(both[i], states[i], &batch, 1, &tables[i]),
                         SIDA_ERROR_ARGUMENT);
        assert_int_equal(sida_hash_encode(both[i], states[i], &batch, 0, &tables[i]),
                         SIDA_ERROR_ARGUMENT);
        assert_int_equal(sida_hash_encode(both[i], states[i], &batch, EXPERTS + 1, &tables[i]),
                         SIDA_ERROR_ARGUMENT);
        assert_int_equal(sida_hash_encode(both[i], states[i], &batch, 3, &tables[i]), SIDA_OK);
        assert_int_equal(tables[i].tokens, 7);
        assert_int_equal(sida_hash_decode(both[i], states[i], &batch, 2, &tables[i]), SIDA_OK);
        assert_int_equal(tables[i].k, 2);
    }
    assert_memory_equal(tables[0].experts, tables[1].experts, 7 * 2 * 2 * sizeof(uint16_t));
    assert_memory_equal(tables[0].alpha, tables[1].alpha, 7 * 2 * 2 * sizeof(float));
    const int32_t outside[7] = {1, 2, 3, VOCABULARY, 0, 0, 5};
    assert_int_equal(
        sida_hash_encode(source, states[0], &(sida_ragged){2, offsets, outside}, 1, &tables[0]),
        SIDA_ERROR_FORMAT);
    for (int i = 0; i < 2; i++) {
        sida_hash_state_destroy(both[i], states[i]);
        sida_hash_table_free(&tables[i]);
        sida_hash_source_destroy(both[i]);
    }

    /* Another model: both fingerprints are named. */
    expect_refusal((sida_fingerprint){7, 8}, SIDA_ERROR_MISMATCH,
                   "00000000000000010000000000000002");
    expect_refusal((sida_fingerprint){7, 8}, SIDA_ERROR_MISMATCH,
                   "00000000000000070000000000000008");
    write_predictor(net, &config, "dice");
    expect_refusal(model, SIDA_ERROR_UNSUPPORTED, "dice");
    write_predictor(net, NULL, "lstm");
    expect_refusal(model, SIDA_ERROR_FORMAT, "net.d_model");
    sida_net_config wrong = config;
    wrong.hidden++;
    write_predictor(net, &wrong, "lstm");
    expect_refusal(model, SIDA_ERROR_FORMAT, "compress.weight");
    wrong = config;
    wrong.layers[1]++;
    write_predictor(net, &wrong, "lstm");
    expect_refusal(model, SIDA_ERROR_FORMAT, "decoder.heads.weight");
    wrong = config;
    wrong.lstm_layers = 3;
    write_predictor(net, &wrong, "lstm");
    expect_refusal(model, SIDA_ERROR_FORMAT, "weight_ih_l2");
    wrong.lstm_layers = 1 << 30;
    write_predictor(net, &wrong, "lstm");
    expect_refusal(model, SIDA_ERROR_FORMAT, "lstm_layers");
    wrong = config;
    wrong.experts = 65535;
    wrong.layers[0] = 4096;
    wrong.hidden = 16384;
    write_predictor(net, &wrong, "lstm");
    expect_refusal(model, SIDA_ERROR_FORMAT, "compress.weight");
    net->parameters[net->parameter_count - 1] = INFINITY;
    write_predictor(net, &config, "lstm");
    expect_refusal(model, SIDA_ERROR_FORMAT, "decoder.heads.bias");
    net->parameters[net->parameter_count - 1] = 3e38f;
    net->parameters[net->parameter_count - 2] = -3e38f;
    write_predictor(net, &config, "lstm"); /* finite, yet other widths are not */
    const sida_weight narrow = {embedding_rows, SIDA_F32, VOCABULARY, WIDTH - 1};
    sida_hash_source *none = NULL;
    assert_int_equal(sida_hash_source_open(&none, path, narrow, model), SIDA_ERROR_MISMATCH);
    unlink(path);
    sida_net_destroy(net);
}

/* Scores that overflow are an error, not a table of nonsense. */
static void not_finite(void **state) {
    (void)state;
    sida_net *net = make_net(&config);
    for (int64_t i = 0; i < net->trunks[0].heads.rows * net->trunks[0].heads.cols; i++)
        net->trunks[0].heads.weight[i] = 3e38f;
    sida_hash_source *source;
    sida_hash_state *own;
    sida_hash_table table = {0};
    assert_int_equal(sida_lstm_source_create(&source, net, embedding, model, tokenizer), SIDA_OK);
    assert_int_equal(sida_hash_state_create(source, &own), SIDA_OK);
    const int64_t offsets[2] = {0, 3};
    const int32_t ids[3] = {1, 2, 3};
    assert_int_equal(sida_hash_encode(source, own, &(sida_ragged){1, offsets, ids}, 1, &table),
                     SIDA_ERROR_FORMAT);
    sida_hash_table_free(&table);
    sida_hash_state_destroy(source, own);
    sida_hash_source_destroy(source);
    sida_net_destroy(net);
}

static void sizes(void **state) {
    (void)state;
    assert_int_equal(sida_net_default_hidden(768), 256);
    assert_int_equal(sida_net_default_hidden(96), 64);
    assert_int_equal(sida_net_default_hidden(1), 64);
    assert_int_equal(sida_net_default_hidden(193), 128);
    /* The paper's counts: 1.33 M parameters at E = 8 and 1.51 M at 128, six layers, encoder only.
     */
    sida_net *net;
    sida_net_config paper = {768, 256, 2, 8, 32128, {6, 0}};
    assert_int_equal(sida_net_create(&net, &paper), SIDA_OK);
    assert_int_equal(net->parameter_count / 1000, 1327);
    sida_net_destroy(net);
    paper.experts = 128;
    assert_int_equal(sida_net_create(&net, &paper), SIDA_OK);
    assert_int_equal(net->parameter_count / 10000, 151);
    sida_net_destroy(net);
    paper.layers[0] = 0;
    assert_int_equal(sida_net_create(&net, &paper), SIDA_ERROR_ARGUMENT);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(sparsemax_known),
                                       cmocka_unit_test(sparsemax_random),
                                       cmocka_unit_test(select_ties),
                                       cmocka_unit_test(bytes_encoder_decoder),
                                       cmocka_unit_test(bytes_decoder_only),
                                       cmocka_unit_test(training_pass_agrees),
                                       cmocka_unit_test(files),
                                       cmocka_unit_test(not_finite),
                                       cmocka_unit_test(sizes)};
    return cmocka_run_group_tests(tests, setup, NULL);
}
