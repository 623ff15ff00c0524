/* A hash source that refines: its tables, bytes that depend on nothing but a sequence's own, the
 * order of calls, files. */
#include "tests/refine_cases.h"

#include <unistd.h>

enum { VOCABULARY = 50, WIDTH = 24, EXPERTS = 10, R = 13, TOP_K = 2, K = 3 };

static float embedding_rows[VOCABULARY * WIDTH];
static const sida_weight embedding = {embedding_rows, SIDA_F32, VOCABULARY, WIDTH};
static const sida_fingerprint model = {1, 2}, tokenizer = {3, 4};

static const sida_net_config config = {.d_model = WIDTH,
                                       .hidden = 19, /* no multiple of a vector */
                                       .lstm_layers = 1,
                                       .experts = EXPERTS,
                                       .vocabulary = VOCABULARY,
                                       .layers = {4, 3}};
static const sida_net_config transformer = {.kind = SIDA_NET_TRANSFORMER,
                                            .d_model = WIDTH,
                                            .hidden = 32,
                                            .blocks = 2,
                                            .experts = EXPERTS,
                                            .vocabulary = VOCABULARY,
                                            .layers = {3, 4}};
static const sida_net_config *const kinds[2] = {&config, &transformer};

static int setup(void **state) {
    (void)state;
    sida_rng rng = sida_rng_seed(9);
    for (int i = 0; i < VOCABULARY * WIDTH; i++) embedding_rows[i] = sida_rng_normal(&rng);
    return 0;
}

enum { SEQUENCES = 9, LONGEST = 14, TOKENS = SEQUENCES * LONGEST, LAYERS = 4, STEPS = 4 };

/* A batch: call 0 is the encoder's, the others the decoder's; the experts that its layers choose.
 */
typedef struct batch {
    int64_t offsets[STEPS + 1][SEQUENCES + 1];
    int32_t ids[STEPS + 1][TOKENS];
    int32_t chosen[STEPS + 1][LAYERS][TOKENS * TOP_K];
} batch;

static void make_batch(batch *of) {
    sida_rng rng = sida_rng_seed(31);
    memset(of, 0, sizeof *of);
    for (int call = 0; call <= STEPS; call++) {
        int64_t *offsets = of->offsets[call];
        for (int s = 0; s < SEQUENCES; s++) {
            int64_t n = (int64_t)sida_rng_below(&rng, call == 0 ? LONGEST : 3);
            offsets[s + 1] = offsets[s] + n;
        }
        for (int64_t i = 0; i < offsets[SEQUENCES]; i++)
            of->ids[call][i] = (int32_t)sida_rng_below(&rng, VOCABULARY);
        for (int l = 0; l < LAYERS; l++)
            case_choose(of->chosen[call][l], offsets[SEQUENCES], TOP_K, EXPERTS, &rng);
    }
}

/* What a source says up front, [0], and after each layer, [1 + layer]. */
typedef struct said {
    sida_hash_table tables[LAYERS];
} said;

static void free_said(said *of) {
    for (int i = 0; i < LAYERS; i++) sida_hash_table_free(&of->tables[i]);
}

static void call_source(const sida_hash_source *source, sida_hash_state *state, const batch *of,
                        int call, said *out) {
    const sida_ragged input = {SEQUENCES, of->offsets[call], of->ids[call]};
    case_ok(call == 0 ? sida_hash_encode(source, state, &input, K, &out->tables[0])
                      : sida_hash_decode(source, state, &input, K, &out->tables[0]));
}

static void refine_call(const sida_hash_source *source, sida_hash_state *state, const batch *of,
                        int call, said *out) {
    const int side = call > 0;
    for (int32_t l = 0; l < source->info.layers[side] - 1; l++)
        case_ok(sida_hash_refine(source, state, side, l, of->chosen[call][l], TOP_K, K,
                                 &out->tables[1 + l]));
}

/* The rows of layers behind `layer` (-1: all) are the same. */
static void same_rows(const sida_hash_table *a, int64_t at_a, const sida_hash_table *b,
                      int64_t at_b, int64_t rows, int32_t layer) {
    assert_int_equal(a->layers, b->layers);
    assert_int_equal(a->k, b->k);
    assert_int_equal(a->side, b->side);
    const int64_t first = (layer + 1) * a->k, row = (int64_t)a->layers * a->k;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t x = (at_a + i) * row + first, y = (at_b + i) * row + first;
        assert_memory_equal(a->experts + x, b->experts + y,
                            (size_t)(row - first) * sizeof *a->experts);
        assert_memory_equal(a->alpha + x, b->alpha + y, (size_t)(row - first) * sizeof *a->alpha);
    }
}

static void same_said(const said *a, const said *b, int32_t layers) {
    assert_int_equal(a->tables[0].tokens, b->tables[0].tokens);
    same_rows(&a->tables[0], 0, &b->tables[0], 0, a->tables[0].tokens, -1);
    for (int32_t l = 0; l < layers - 1; l++)
        same_rows(&a->tables[1 + l], 0, &b->tables[1 + l], 0, a->tables[0].tokens, l);
}

typedef struct rig {
    sida_net *net;
    sida_refine *refine;
    sida_hash_source *source;
    sida_hash_state *state;
} rig;

static rig make_rig(const sida_net_config *of) {
    rig r = {.net = case_net(of), .refine = case_refine(of, R)};
    case_ok(sida_lstm_source_create(&r.source, r.net, embedding, model, tokenizer));
    assert_false(r.source->info.refines);
    const size_t bytes = r.source->info.bytes;
    sida_lstm_source_refine(r.source, r.refine);
    assert_true(r.source->info.refines);
    assert_int_equal(r.source->info.bytes, bytes + (size_t)r.refine->parameter_count * 4);
    case_ok(sida_hash_state_create(r.source, &r.state));
    return r;
}

static void free_rig(rig *r) {
    sida_hash_state_destroy(r->source, r->state);
    sida_hash_source_destroy(r->source);
    sida_refine_destroy(r->refine);
    sida_net_destroy(r->net);
}

/* Tables of the encoder and of each step of the decoder are those of the definition over what the
 * heads read and say. */
static void check_tables(const sida_net_config *of) {
    static batch b;
    make_batch(&b);
    rig r = make_rig(of);
    sida_net_pass *pass;
    said got = {0};
    case_ok(sida_net_pass_create(&pass, r.net, false));
    int64_t changed = 0, rows = 0;
    for (int call = 0; call <= STEPS; call++) {
        const sida_ragged input = {SEQUENCES, b.offsets[call], b.ids[call]};
        const int side = call > 0;
        const int64_t n = input.offsets[SEQUENCES];
        case_ok(side ? sida_net_decode(pass, embedding, &input)
                     : sida_net_encode(pass, embedding, &input));
        call_source(r.source, r.state, &b, call, &got);
        refine_call(r.source, r.state, &b, call, &got);
        int32_t chosen[LAYERS * TOKENS * TOP_K];
        for (int l = 0; l < LAYERS; l++)
            memcpy(chosen + l * n * TOP_K, b.chosen[call][l], (size_t)(n * TOP_K) * sizeof *chosen);
        for (int32_t l = 0; l < of->layers[side] - 1; l++)
            for (int64_t i = 0; i < n; i++)
                for (int32_t m = l + 1; m < of->layers[side]; m++) {
                    const sida_hash_table *t = &got.tables[1 + l];
                    const int64_t at = (i * t->layers + m) * K;
                    double s[EXPERTS], total = 0;
                    assert_int_equal(t->tokens, n);
                    case_evaluate(s, r.refine, side, l, m, pass->sides[side].mixed,
                                  pass->sides[side].logits, chosen, n, i, TOP_K);
                    for (int e = 0; e < EXPERTS; e++) total += exp(s[e]);
                    for (int rank = 0; rank < K; rank++) {
                        const uint16_t expert = t->experts[at + rank];
                        int better = 0;
                        for (int e = 0; e < EXPERTS; e++) better += s[e] > s[expert] + 1e-4;
                        assert_true(better <= rank);
                        assert_true(fabs((double)t->alpha[at + rank] - exp(s[expert]) / total) <
                                    1e-5);
                    }
                    changed += t->experts[at] != got.tables[0].experts[at];
                    rows++;
                }
    }
    /* It says something else than up front, so that the comparison means something. */
    assert_true(rows > 300 && changed > rows / 4);
    free_said(&got);
    sida_net_pass_destroy(pass);
    free_rig(&r);
}

static void tables(void **state) {
    (void)state;
    for (int kind = 0; kind < 2; kind++) check_tables(kinds[kind]);
}

/* A new refinement says what was said up front, to the byte. */
static void identity_at_first(void **state) {
    (void)state;
    static batch b;
    make_batch(&b);
    for (int kind = 0; kind < 2; kind++) {
        rig r = make_rig(kinds[kind]);
        said got = {0};
        sida_refine_initialise(r.refine, 3);
        for (int call = 0; call <= STEPS; call++) {
            call_source(r.source, r.state, &b, call, &got);
            refine_call(r.source, r.state, &b, call, &got);
            for (int32_t l = 0; l < kinds[kind]->layers[call > 0] - 1; l++)
                same_rows(&got.tables[0], 0, &got.tables[1 + l], 0, got.tables[0].tokens, l);
        }
        free_said(&got);
        free_rig(&r);
    }
}

/* The same bytes for a sequence alone, for any number of threads, in a state that served another
 * batch, and where a step was decoded before the encoder's layers were known. */
static void same_bytes(void **state) {
    (void)state;
    static batch b;
    make_batch(&b);
    for (int kind = 0; kind < 2; kind++) {
        const sida_net_config *of = kinds[kind];
        rig r = make_rig(of);
        said whole[STEPS + 1] = {0}, got = {0}, ahead = {0};
        case_threads(1);
        for (int call = 0; call <= STEPS; call++) {
            call_source(r.source, r.state, &b, call, &whole[call]);
            refine_call(r.source, r.state, &b, call, &whole[call]);
        }
        for (int threads = 1; threads <= 4; threads++) {
            case_threads(threads);
            call_source(r.source, r.state, &b, 0, &got);
            call_source(r.source, r.state, &b, 1, &ahead);
            refine_call(r.source, r.state, &b, 0, &got);
            refine_call(r.source, r.state, &b, 1, &ahead);
            same_said(&whole[0], &got, of->layers[0]);
            same_said(&whole[1], &ahead, of->layers[1]);
            for (int call = 2; call <= STEPS; call++) {
                call_source(r.source, r.state, &b, call, &got);
                /* A call whose layers nobody tells of does not matter to the next. */
                if (threads == 2 && call == 3) continue;
                refine_call(r.source, r.state, &b, call, &got);
                same_said(&whole[call], &got, of->layers[1]);
            }
        }
        for (int s = 0; s < SEQUENCES; s++)
            for (int call = 0; call <= STEPS; call++) {
                const int side = call > 0;
                const int64_t at = b.offsets[call][s], n = b.offsets[call][s + 1] - at;
                const int64_t offsets[2] = {0, n};
                const sida_ragged one = {1, offsets, b.ids[call] + at};
                sida_hash_table table = {0};
                case_ok(side ? sida_hash_decode(r.source, r.state, &one, K, &table)
                             : sida_hash_encode(r.source, r.state, &one, K, &table));
                for (int32_t l = 0; l < of->layers[side] - 1; l++) {
                    case_ok(sida_hash_refine(r.source, r.state, side, l,
                                             b.chosen[call][l] + at * TOP_K, TOP_K, K, &table));
                    same_rows(&whole[call].tables[1 + l], at, &table, 0, n, l);
                }
                sida_hash_table_free(&table);
            }
        for (int call = 0; call <= STEPS; call++) free_said(&whole[call]);
        free_said(&got);
        free_said(&ahead);
        free_rig(&r);
    }
    case_threads(1);
}

/* A refused call leaves what is known as it was. */
static void order_of_calls(void **state) {
    (void)state;
    static batch b;
    make_batch(&b);
    rig r = make_rig(&config);
    said first = {0}, got = {0};
    sida_hash_table none = {0};
    const int32_t *chosen = b.chosen[0][0];
#define REFUSED(side, layer, experts, top_k, k, words)                                             \
    case_refused(sida_hash_refine(r.source, r.state, side, layer, experts, top_k, k, &none),       \
                 SIDA_ERROR_ARGUMENT, words)
    REFUSED(0, 0, chosen, TOP_K, K, "nothing has been predicted");
    call_source(r.source, r.state, &b, 0, &first);
    refine_call(r.source, r.state, &b, 0, &first);
    REFUSED(0, 2, chosen, TOP_K, K, "layer 2 where that by layer 3 is next");
    REFUSED(0, 3, chosen, TOP_K, K, "layer 3 of side 0 has none behind");

    call_source(r.source, r.state, &b, 0, &got);
    REFUSED(1, 0, chosen, TOP_K, K, "nothing has been predicted");
    REFUSED(0, 1, chosen, TOP_K, K, "layer 1 where that by layer 0 is next");
    REFUSED(0, -1, chosen, TOP_K, K, "layer -1");
    REFUSED(2, 0, chosen, TOP_K, K, "side 2");
    REFUSED(-1, 0, chosen, TOP_K, K, "side -1");
    REFUSED(0, 0, chosen, 0, K, "0 experts");
    REFUSED(0, 0, chosen, EXPERTS + 1, K, "11 experts");
    REFUSED(0, 0, chosen, TOP_K, 0, "0 experts");
    REFUSED(0, 0, chosen, TOP_K, EXPERTS + 1, "11 experts");
    const int64_t last = b.offsets[0][SEQUENCES] * TOP_K - 1;
    const int32_t good = b.chosen[0][0][last];
    for (int i = 0; i < 2; i++) {
        b.chosen[0][0][last] = i ? EXPERTS : -1;
        REFUSED(0, 0, chosen, TOP_K, K, i ? "chose expert 10 of 10" : "chose expert -1 of 10");
    }
    b.chosen[0][0][last] = good;
    refine_call(r.source, r.state, &b, 0, &got);
    same_said(&first, &got, config.layers[0]);
    REFUSED(0, 0, chosen, TOP_K, K, "layer 0 where that by layer 3 is next");

    /* A new batch forgets the decoder's step, a call that failed has nothing to refine. */
    call_source(r.source, r.state, &b, 1, &got);
    call_source(r.source, r.state, &b, 0, &got);
    REFUSED(1, 0, chosen, TOP_K, K, "nothing has been predicted");
    const int64_t offsets[2] = {0, 1};
    const int32_t outside = VOCABULARY;
    case_refused(
        sida_hash_encode(r.source, r.state, &(sida_ragged){1, offsets, &outside}, K, &none),
        SIDA_ERROR_FORMAT, "outside the embedding");
    REFUSED(0, 0, chosen, TOP_K, K, "nothing has been predicted");

    /* Scores that are not finite. */
    call_source(r.source, r.state, &b, 0, &got);
    for (int64_t i = 0; i < r.refine->sides[0].heads.rows; i++)
        r.refine->sides[0].heads.bias[i] = 3e38f;
    for (int64_t i = 0; i < r.refine->sides[0].heads.rows * R; i++)
        r.refine->sides[0].heads.weight[i] = 3e38f;
    case_refused(sida_hash_refine(r.source, r.state, 0, 0, chosen, TOP_K, K, &none),
                 SIDA_ERROR_FORMAT, "not finite");
#undef REFUSED
    sida_hash_table_free(&none);
    free_said(&first);
    free_said(&got);
    free_rig(&r);
}

/* Sources that have none: a network alone, and one whose experts another source renames. */
static void without(void **state) {
    (void)state;
    static batch b;
    make_batch(&b);
    for (int renamed = 0; renamed < 2; renamed++) {
        rig r = make_rig(&config);
        said got = {0};
        sida_hash_state_destroy(r.source, r.state);
        if (renamed) {
            case_ok(sida_random_source_create(&r.source, r.source, 1));
        } else {
            sida_hash_source_destroy(r.source);
            case_ok(sida_lstm_source_create(&r.source, r.net, embedding, model, tokenizer));
        }
        assert_false(r.source->info.refines);
        case_ok(sida_hash_state_create(r.source, &r.state));
        call_source(r.source, r.state, &b, 0, &got);
        case_refused(
            sida_hash_refine(r.source, r.state, 0, 0, b.chosen[0][0], TOP_K, K, &got.tables[1]),
            SIDA_ERROR_ARGUMENT, "without a refinement");
        free_said(&got);
        free_rig(&r);
    }
}

/* One side alone may have layers behind others. */
static void one_side(void **state) {
    (void)state;
    static batch b;
    make_batch(&b);
    for (int side = 0; side < 2; side++)
        for (int32_t other = 0; other < 2; other++) {
            sida_net_config of = config;
            of.layers[1 - side] = other;
            rig r = make_rig(&of);
            said got = {0};
            assert_true(r.refine->sides[side].present && !r.refine->sides[1 - side].present);
            assert_int_equal(r.refine->tensor_count, 5);
            if (side == 1 && other == 0) memset(b.offsets[0], 0, sizeof b.offsets[0]);
            call_source(r.source, r.state, &b, 0, &got);
            if (side == 0) refine_call(r.source, r.state, &b, 0, &got);
            call_source(r.source, r.state, &b, 1, &got);
            if (side == 1) refine_call(r.source, r.state, &b, 1, &got);
            case_refused(sida_hash_refine(r.source, r.state, 1 - side, 0, b.chosen[0][0], TOP_K, K,
                                          &got.tables[1]),
                         SIDA_ERROR_ARGUMENT, "has none behind");
            free_said(&got);
            free_rig(&r);
        }
}

static char path[] = "/tmp/sida-refine-XXXXXX";

/* about: what the config's refine is, NULL for none; takes it over. */
static void write_predictor(const sida_net *net, const sida_refine *refine, json_t *about) {
    sida_h5_file *file;
    json_t *root = json_object();
    char source[] = "lstm";
    json_object_set_new(root, "net", sida_net_config_to_json(&net->config));
    if (about) json_object_set_new(root, "refine", about);
    const sida_predictor_meta meta = {model, tokenizer, source, root};
    case_ok(sida_predictor_file_create(&file, path, SIDA_H5_PREDICTOR, &meta));
    case_ok(sida_net_write(file, net));
    if (refine) case_ok(sida_refine_write(file, refine));
    case_ok(sida_h5_commit(file));
    json_decref(root);
}

static void refuse_file(const char *words) {
    sida_hash_source *source = NULL;
    case_refused(sida_hash_source_open(&source, path, embedding, model), SIDA_ERROR_FORMAT, words);
    assert_null(source);
}

static void files(void **state) {
    (void)state;
    static batch b;
    make_batch(&b);
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    rig r = make_rig(&config), read = {0};
    said got[2] = {0};
    write_predictor(r.net, r.refine, json_pack("{s:i}", "width", R));
    case_ok(sida_hash_source_open(&read.source, path, embedding, model));
    assert_true(read.source->info.refines);
    assert_int_equal(read.source->info.bytes, r.source->info.bytes);
    case_ok(sida_hash_state_create(read.source, &read.state));
    for (int call = 0; call <= STEPS; call++) {
        const rig *both[2] = {&r, &read};
        for (int i = 0; i < 2; i++) {
            call_source(both[i]->source, both[i]->state, &b, call, &got[i]);
            refine_call(both[i]->source, both[i]->state, &b, call, &got[i]);
        }
        same_said(&got[0], &got[1], config.layers[call > 0]);
    }
    free_rig(&read);

    /* Its config decides whether there is one. */
    write_predictor(r.net, r.refine, NULL);
    case_ok(sida_hash_source_open(&read.source, path, embedding, model));
    assert_false(read.source->info.refines);
    sida_hash_source_destroy(read.source);

    write_predictor(r.net, NULL, json_pack("{s:i}", "width", R));
    refuse_file("encoder.refine.features.weight");
    write_predictor(r.net, r.refine, json_pack("{s:i}", "width", R + 1));
    refuse_file("encoder.refine.features.weight is [13, 19], its config says [14, 19]");
    write_predictor(r.net, r.refine, json_pack("{s:i}", "width", 0));
    refuse_file("refine.width");
    write_predictor(r.net, r.refine, json_pack("{s:i}", "width", SIDA_REFINE_WIDTH_MAX + 1));
    refuse_file("refine.width");
    write_predictor(r.net, r.refine, json_pack("{s:s}", "width", "13"));
    refuse_file("refine.width");
    write_predictor(r.net, r.refine, json_pack("{s:f}", "width", 13.0));
    refuse_file("refine.width");
    write_predictor(r.net, r.refine, json_object());
    refuse_file("refine.width");
    write_predictor(r.net, r.refine, json_true());
    refuse_file("refine.width");
    for (int32_t i = 0; i < r.refine->tensor_count; i++) {
        const sida_net_tensor *t = &r.refine->tensors[i];
        const float kept = t->data[t->count - 1];
        t->data[t->count - 1] = i % 2 ? NAN : -INFINITY;
        write_predictor(r.net, r.refine, json_pack("{s:i}", "width", R));
        refuse_file(t->name);
        t->data[t->count - 1] = kept;
    }
    sida_net_config flat = config, longer = config;
    flat.layers[0] = flat.layers[1] = 1;
    longer.layers[1]++;
    sida_net *net = case_net(&flat);
    write_predictor(net, NULL, json_pack("{s:i}", "width", R));
    refuse_file("two MoE layers");
    sida_net_destroy(net);
    net = case_net(&longer); /* a refinement of fewer layers */
    write_predictor(net, r.refine, json_pack("{s:i}", "width", R));
    refuse_file("decoder.refine.bias");
    sida_net_destroy(net);
    for (int i = 0; i < 2; i++) free_said(&got[i]);
    free_rig(&r);
    unlink(path);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tables),     cmocka_unit_test(identity_at_first),
        cmocka_unit_test(same_bytes), cmocka_unit_test(order_of_calls),
        cmocka_unit_test(without),    cmocka_unit_test(one_side),
        cmocka_unit_test(files)};
    return cmocka_run_group_tests(tests, setup, NULL);
}
