/* The predictor at run time: bytes that do not depend on the batch or on how the decoder is fed,
 * initial values, files. */
#include "tests/test.h"

#include "formats/base/rng.h"
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

static const sida_net_config transformer = {.kind = SIDA_NET_TRANSFORMER,
                                            .d_model = WIDTH,
                                            .hidden = 64,
                                            .blocks = 2,
                                            .experts = EXPERTS,
                                            .vocabulary = VOCABULARY,
                                            .layers = {3, 2}};

static sida_net *make_net(const sida_net_config *of) {
    sida_net *net;
    assert_int_equal(sida_net_create(&net, of), SIDA_OK);
    sida_net_initialise(net, 5);
    /* Larger than initial values, so that SparseMax drops keys; none of a Transformer's is zero. */
    sida_rng rng = sida_rng_seed(6);
    for (int64_t i = 0; i < net->parameter_count; i++)
        if (of->kind == SIDA_NET_TRANSFORMER)
            net->parameters[i] += 0.1f * sida_rng_normal(&rng);
        else
            net->parameters[i] *= 3;
    return net;
}

static int setup(void **state) {
    (void)state;
    sida_rng rng = sida_rng_seed(9);
    for (int i = 0; i < VOCABULARY * WIDTH; i++) embedding_rows[i] = sida_rng_normal(&rng);
    return 0;
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
static void bytes_options(void **state) {
    (void)state;
    sida_net_config of = config;
    of.hidden = 22; /* 11 units a direction */
    of.bidirectional = true;
    same_bytes(&of);
    of.attention = SIDA_NET_SOFTMAX;
    same_bytes(&of);
    of.attention = SIDA_NET_NO_ATTENTION;
    same_bytes(&of);
}

static void bytes_transformer(void **state) {
    (void)state;
    same_bytes(&transformer);
    sida_net_config of = transformer;
    of.layers[0] = 0;
    of.hidden = 96;
    same_bytes(&of);
}

/* With two directions the first token's scores know of the last, without they do not. */
static void directions(void **state) {
    (void)state;
    const int64_t offsets[2] = {0, 4};
    const int32_t ids[2][4] = {{1, 2, 3, 4}, {1, 2, 3, 5}};
    sida_net_config of = config;
    of.attention = SIDA_NET_NO_ATTENTION;
    of.hidden = 20;
    for (int both = 0; both < 2; both++) {
        of.bidirectional = both;
        sida_net *net = make_net(&of);
        sida_net_pass *pass;
        float first[2][3 * EXPERTS];
        assert_int_equal(sida_net_pass_create(&pass, net, false), SIDA_OK);
        for (int i = 0; i < 2; i++) {
            assert_int_equal(sida_net_encode(pass, embedding, &(sida_ragged){1, offsets, ids[i]}),
                             SIDA_OK);
            memcpy(first[i], pass->sides[0].logits, sizeof first[i]);
        }
        assert_int_equal(memcmp(first[0], first[1], sizeof first[0]) != 0, both);
        sida_net_pass_destroy(pass);
        sida_net_destroy(net);
    }
}

/* The training pass computes the same numbers, with other products. 1e-4 of logits of order 10: two
 * orders of summing fp32 through two LSTM layers. */
static void passes_agree(const sida_net_config *of) {
    static int64_t offsets[2][SEQUENCES + 1];
    static int32_t ids[2][SEQUENCES * LONGEST];
    make_batch(offsets[0], ids[0], SEQUENCES, LONGEST, 1);
    make_batch(offsets[1], ids[1], SEQUENCES, 9, 2);
    sida_net *net = make_net(of);
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
static void training_pass_agrees(void **state) {
    (void)state;
    sida_net_config of = config;
    passes_agree(&of);
    of.hidden = 22;
    of.bidirectional = true;
    of.attention = SIDA_NET_SOFTMAX;
    passes_agree(&of);
    of.attention = SIDA_NET_NO_ATTENTION;
    passes_agree(&of);
    passes_agree(&transformer);
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

/* With what no writer of ours says. */
static void write_options(const sida_net *net, const char *key, json_t *value) {
    sida_h5_file *file;
    json_t *object = sida_net_config_to_json(&config), *root = json_object();
    char source[] = "lstm";
    json_object_set_new(object, key, value);
    json_object_set_new(root, "net", object);
    const sida_predictor_meta meta = {model, tokenizer, source, root};
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
    wrong.bidirectional = true; /* of an odd width; of an even one the tensors are missing */
    write_predictor(net, &wrong, "lstm");
    expect_refusal(model, SIDA_ERROR_FORMAT, "hidden of 19");
    wrong.hidden = 20;
    write_predictor(net, &wrong, "lstm");
    expect_refusal(model, SIDA_ERROR_FORMAT, "compress.weight");
    write_options(net, "bidirectional", json_integer(1));
    expect_refusal(model, SIDA_ERROR_FORMAT, "net.bidirectional");
    write_options(net, "attention", json_string("hardmax"));
    expect_refusal(model, SIDA_ERROR_FORMAT, "net.attention is 'hardmax'");
    write_options(net, "attention", json_integer(1));
    expect_refusal(model, SIDA_ERROR_FORMAT, "net.attention");
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
    wrong = transformer;
    write_predictor(net, &wrong, "lstm");
    expect_refusal(model, SIDA_ERROR_FORMAT, "its source is 'lstm', its config's network 'tr");
    write_predictor(net, &wrong, "transformer");
    expect_refusal(model, SIDA_ERROR_FORMAT, "compress.weight");
    wrong.hidden = 80;
    write_predictor(net, &wrong, "transformer");
    expect_refusal(model, SIDA_ERROR_FORMAT, "hidden of 80");
    wrong.hidden = 64;
    wrong.blocks = SIDA_NET_BLOCKS_MAX + 1;
    write_predictor(net, &wrong, "transformer");
    expect_refusal(model, SIDA_ERROR_FORMAT, "blocks of 9");
    write_options(net, "kind", json_string("gru"));
    expect_refusal(model, SIDA_ERROR_FORMAT, "net.kind is 'gru'");
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

static int64_t net_size(const sida_net_config *of) {
    sida_net *net;
    assert_int_equal(sida_net_create(&net, of), SIDA_OK);
    int64_t count = net->parameter_count;
    sida_net_destroy(net);
    return count;
}

static void sizes(void **state) {
    (void)state;
    assert_int_equal(sida_net_default_hidden(768), 256);
    assert_int_equal(sida_net_default_hidden(96), 64);
    assert_int_equal(sida_net_default_hidden(1), 64);
    assert_int_equal(sida_net_default_hidden(193), 128);
    assert_int_equal(sida_net_default_hidden(192), 64);
    /* The paper's counts: 1.33 M parameters at E = 8 and 1.51 M at 128, six layers, encoder only.
     */
    sida_net *net;
    sida_net_config paper = {.d_model = 768,
                             .hidden = 256,
                             .lstm_layers = 2,
                             .experts = 8,
                             .vocabulary = 32128,
                             .layers = {6, 0}};
    assert_int_equal(sida_net_create(&net, &paper), SIDA_OK);
    assert_int_equal(net->parameter_count / 1000, 1327);
    sida_net_destroy(net);
    paper.experts = 128;
    assert_int_equal(sida_net_create(&net, &paper), SIDA_OK);
    assert_int_equal(net->parameter_count / 10000, 151);
    sida_net_destroy(net);
    /* Two directions of half the width: the same input weights, half of the recurrent ones. */
    int64_t one = net_size(&paper);
    paper.bidirectional = true;
    assert_int_equal(net_size(&paper), one - 2 * 2 * 256 * 256);
    paper.hidden = 255;
    assert_int_equal(sida_net_create(&net, &paper), SIDA_ERROR_ARGUMENT);
    assert_non_null(strstr(sida_last_message(), "hidden of 255"));
    paper.hidden = 256;
    paper.layers[0] = 0;
    assert_int_equal(sida_net_create(&net, &paper), SIDA_ERROR_ARGUMENT);
    paper.layers[1] = 6;
    assert_int_equal(sida_net_create(&net, &paper), SIDA_ERROR_ARGUMENT);
    assert_non_null(strstr(sida_last_message(), "bidirectional"));
    /* A Transformer's block: four matrices of attention, two of twice the width, two norms and 32
     * positions a head; a decoder's has four matrices and a norm more, and another norm once. */
    sida_net_config of = transformer;
    const int64_t two = net_size(&of), block = 8 * 64 * 64 + 2 * 64 + 32 * 2;
    of.blocks = 1;
    assert_int_equal(two - net_size(&of), 2 * block + 4 * 64 * 64 + 64);
    of.layers[0] = 0;
    assert_int_equal(net_size(&of), 64 * WIDTH + 64 + WIDTH + block + 64 + 2 * EXPERTS * (64 + 1));
    of.attention = SIDA_NET_SOFTMAX;
    assert_int_equal(sida_net_create(&net, &of), SIDA_ERROR_ARGUMENT);
    of.attention = SIDA_NET_SPARSEMAX;
    of.lstm_layers = 2;
    assert_int_equal(sida_net_create(&net, &of), SIDA_ERROR_ARGUMENT);
}

/* A Transformer begins as norms and products alone: no layer of a block says anything, and weights
 * have standard deviation 1/sqrt(fan_in). */
static void initial_values(void **state) {
    (void)state;
    sida_net *net;
    assert_int_equal(sida_net_create(&net, &transformer), SIDA_OK);
    sida_net_initialise(net, 1);
    for (int32_t i = 0; i < net->tensor_count; i++) {
        const sida_net_tensor *t = &net->tensors[i];
        double squares = 0, most = 0;
        for (int64_t k = 0; k < t->count; k++) {
            squares += (double)t->data[k] * (double)t->data[k];
            most = fmax(most, fabs((double)t->data[k]));
        }
        const bool zero = strstr(t->name, "output") || strstr(t->name, "down") ||
                          strstr(t->name, "positions") || strstr(t->name, "bias");
        const bool one = strstr(t->name, "norm") != NULL;
        double wanted = zero ? 0 : one ? 1 : 1 / (double)t->shape[1];
        if (!(fabs(squares / (double)t->count - wanted) <= (zero || one ? 0 : 0.1 * wanted)) ||
            (!zero && !one && most > sqrt(3 * wanted) + 1e-6))
            fail_msg("%s: mean square %g, largest %g", t->name, squares / (double)t->count, most);
    }
    sida_net_destroy(net);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(bytes_encoder_decoder),
                                       cmocka_unit_test(bytes_decoder_only),
                                       cmocka_unit_test(bytes_options),
                                       cmocka_unit_test(bytes_transformer),
                                       cmocka_unit_test(initial_values),
                                       cmocka_unit_test(directions),
                                       cmocka_unit_test(training_pass_agrees),
                                       cmocka_unit_test(files),
                                       cmocka_unit_test(not_finite),
                                       cmocka_unit_test(sizes)};
    return cmocka_run_group_tests(tests, setup, NULL);
}
