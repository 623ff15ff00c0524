/* Recorded forward passes on CUDA: replayed, in waves and with all experts resident, whoever
 * chooses, they give the bytes of the pass that was issued kernel by kernel. */
#include "formats/base/memory.h"
#include "formats/base/rng.h"
#include "runtime/backend/graphs.h"
#include "runtime/model/model.h"
#include "tests/gpu/gpu.h"

#include <unistd.h>

enum { SEQUENCES = 5, TOKENS = 125, STEPS = 3, MOST_TOKENS = SIDA_GRAPHS_KINDS + 6 };

static struct {
    const sida_backend_table *real;
    sida_backend_table table;
    int recorded, launched;
} graphs;

static sida_status count_end(sida_stream *stream, sida_graph **out) {
    graphs.recorded++;
    return graphs.real->graph_end(stream, out);
}

static sida_status count_launch(sida_graph *graph, sida_stream *stream) {
    graphs.launched++;
    return graphs.real->graph_launch(graph, stream);
}

static void watch_graphs(sida_backend *backend) {
    graphs.real = backend->table;
    graphs.table = *backend->table;
    graphs.table.graph_end = count_end;
    graphs.table.graph_launch = count_launch;
    graphs.recorded = graphs.launched = 0;
    backend->table = &graphs.table;
}

/* Drivers of every kind over the same resident experts. In waves: two at a time, the last first. */
typedef struct supplier {
    const sida_model_info *info;
    const void **weights; /* [sites * E] device pointers, on the host */
    const int32_t *needed;
    int32_t site, left;
    uint8_t *allowed; /* [layers, sequences, E] */
} supplier;

static sida_status supply_begin(void *context, const sida_moe_call *call, const int32_t *needed,
                                int32_t count) {
    supplier *s = context;
    s->needed = needed;
    s->site = call->site;
    s->left = count;
    return SIDA_OK;
}

static sida_status supply_take(void *context, int32_t *experts, const void **weights,
                               int32_t *count) {
    supplier *s = context;
    for (*count = 0; *count < 2 && s->left > 0; (*count)++) {
        experts[*count] = s->needed[--s->left];
        weights[*count] = s->weights[s->site * s->info->experts + experts[*count]];
    }
    return SIDA_OK;
}

static sida_status supply_release(void *context, const int32_t *experts, int32_t count,
                                  sida_stream *stream) {
    (void)context, (void)experts, (void)count, (void)stream;
    return SIDA_OK;
}

static const uint8_t *supply_allowed(void *context, int32_t side) {
    (void)side;
    return ((supplier *)context)->allowed;
}

static sida_status supply_choice(void *context, sida_moe_call *call) {
    (void)context;
    for (int64_t t = 0; t < call->tokens; t++) {
        call->experts[t] = (int32_t)((t + call->layer + call->position[0]) % call->experts_total);
        call->alpha[t] = 0.25f;
    }
    return SIDA_OK;
}

/* waves: through begin, take and release. chooser: the router, the router in a set, ahead. */
static sida_moe_driver supply(supplier *s, const sida_resident *resident, bool waves, int chooser) {
    return (sida_moe_driver){.context = s,
                             .allow = chooser == 1 ? supply_allowed : NULL,
                             .choose = chooser == 2 ? supply_choice : NULL,
                             .chooses_ahead = true,
                             .resident = waves ? NULL : sida_resident_table(resident),
                             .begin = supply_begin,
                             .take = supply_take,
                             .release = supply_release};
}

typedef struct bench {
    sida_backend *cuda;
    sida_model *model;
    sida_resident *resident;
    sida_run *run;
    const sida_model_info *info;
    supplier supplier;
} bench;

static void bench_open(bench *b, const char *folder) {
    sida_stream *stream;
    b->cuda = gpu_open();
    assert_non_null(b->cuda);
    watch_graphs(b->cuda);
    OK(sida_model_open(&b->model, b->cuda, folder));
    OK(sida_resident_create(&b->resident, b->model));
    b->info = sida_model_get_info(b->model);
    const sida_run_limits limits = {SEQUENCES, TOKENS, SEQUENCES, STEPS, 0};
    OK(sida_run_create(&b->run, b->model, &limits));
    size_t all = (size_t)b->info->sites * (size_t)b->info->experts;
    b->supplier = (supplier){.info = b->info};
    OK(SIDA_ALLOC(&b->supplier.weights, all, "pointers"));
    OK(SIDA_ALLOC(&b->supplier.allowed, all * SEQUENCES, "sets"));
    for (size_t i = 0; i < all * SEQUENCES; i++) b->supplier.allowed[i] = i % 3 != 1;
    OK(sida_stream_create(b->cuda, &stream, SIDA_STREAM_COMPUTE));
    OK(sida_copy(stream, b->supplier.weights, sida_resident_table(b->resident),
                 all * sizeof *b->supplier.weights));
    OK(sida_stream_synchronize(stream));
    sida_stream_destroy(stream);
}

static void bench_close(bench *b) {
    free(b->supplier.weights);
    free(b->supplier.allowed);
    sida_run_destroy(b->run);
    sida_resident_destroy(b->resident);
    sida_model_destroy(b->model);
    sida_backend_destroy(b->cuda);
}

static void random_ids(int32_t ids[TOKENS], int32_t vocabulary, uint64_t seed) {
    sida_rng rng = sida_rng_seed(seed);
    for (int i = 0; i < TOKENS; i++) ids[i] = (int32_t)sida_rng_below(&rng, (uint32_t)vocabulary);
}

/* One encode and STEPS decoder calls of a token a sequence; sequence 0 sits the second one out.
 * logits: room for STEPS * SEQUENCES rows; returns how many. */
static int64_t bench_pass(bench *b, const sida_moe_driver *driver, const sida_ragged *input,
                          float *logits) {
    int64_t rows = 0;
    OK(sida_run_encode(b->run, input, driver));
    for (int t = 0; t < STEPS; t++) {
        int64_t offsets[SEQUENCES + 1] = {0};
        int32_t ids[SEQUENCES];
        for (int s = 0; s < input->sequences; s++) {
            bool in = t != 1 || s > 0 || input->sequences == 1;
            if (in) ids[offsets[s]] = (7 * t + 3 * s) % b->info->vocabulary;
            offsets[s + 1] = offsets[s] + in;
        }
        int64_t count = offsets[input->sequences];
        OK(sida_run_decode(b->run, &(sida_ragged){input->sequences, offsets, ids}, driver));
        OK(sida_run_read_logits(b->run, 0, count, logits + rows * b->info->vocabulary));
        rows += count;
    }
    return rows;
}

/* Issued, recorded and replayed, batches of different shapes in turn: the same bytes. */
static void check_replay(const char *folder, int first_chooser, int choosers) {
    const int rounds = gpu_cases(5, 3), batches = gpu_cases(2, 1);
    bench b;
    bench_open(&b, folder);
    int32_t ids[TOKENS];
    random_ids(ids, b.info->vocabulary, 3);
    const sida_ragged inputs[] = {{SEQUENCES, (int64_t[]){0, 17, 18, 58, 61, TOKENS}, ids},
                                  {1, (int64_t[]){0, 25}, ids + 40}};
    size_t words = (size_t)STEPS * SEQUENCES * (size_t)b.info->vocabulary;
    for (int chooser = first_chooser; chooser < first_chooser + choosers; chooser++) {
        float *first[2], *whole[2], *again;
        OK(SIDA_ALLOC(&again, words, "logits"));
        for (int i = 0; i < 2; i++) {
            OK(SIDA_ALLOC(&first[i], words, "logits"));
            OK(SIDA_ALLOC(&whole[i], words, "logits"));
        }
        for (int waves = 0; waves < 2; waves++) {
            const sida_moe_driver driver = supply(&b.supplier, b.resident, waves, chooser);
            int recorded = 0;
            graphs.launched = 0;
            for (int round = 0; round < rounds; round++)
                for (int i = 0; i < batches; i++) {
                    float *to = round == 0 ? first[i] : again;
                    int64_t rows = bench_pass(&b, &driver, &inputs[i], to);
                    size_t bytes = (size_t)(rows * b.info->vocabulary) * sizeof *to;
                    for (int64_t at = 0; at < rows * b.info->vocabulary; at++)
                        assert_true(isfinite(to[at]));
                    if (memcmp(to, first[i], bytes) != 0)
                        fail_msg("%s: chooser %d, waves %d, round %d, batch %d differs", folder,
                                 chooser, waves, round, i);
                    if (round == 1 && i == batches - 1) recorded = graphs.recorded;
                    /* And waves give what all experts at once do. */
                    if (!waves)
                        memcpy(whole[i], to, bytes);
                    else if (memcmp(to, whole[i], bytes) != 0)
                        fail_msg("%s: chooser %d differs in waves", folder, chooser);
                }
            /* All is recorded by the end of the second round, and replayed from then on: at least
             * an encode and STEPS decodes of each batch in each further round. */
            assert_int_equal(graphs.recorded, recorded);
            assert_true(graphs.launched >= (rounds - 2) * batches * (1 + STEPS));
        }
        for (int i = 0; i < 2; i++) {
            free(first[i]);
            free(whole[i]);
        }
        free(again);
    }
    bench_close(&b);
}

static void test_replay(void **state) {
    (void)state;
    static const char *const folders[] = {"tests/parity/base", "tests/parity/bf16-sharded",
                                          "tests/parity/mixed-types", "tests/parity/gated-untied",
                                          "tests/parity/overflow"};
    for (int i = 0; i < gpu_cases(5, 3); i++)
        check_replay(folders[i], gpu_cases(0, i), gpu_cases(3, 1));
    if (!gpu_small() && access("data/sample/model/config.json", R_OK) == 0)
        check_replay("data/sample/model", 0, 3);
}

/* More kinds of calls than are kept, each recorded and replayed, then the first ones again. */
static void test_many_kinds(void **state) {
    (void)state;
    bench b;
    if (gpu_small()) skip(); /* of the host's business; the kernels are test_replay's */
    bench_open(&b, "tests/parity/base");
    int32_t ids[TOKENS];
    random_ids(ids, b.info->vocabulary, 5);
    const sida_moe_driver driver = supply(&b.supplier, b.resident, false, 0);
    size_t words = (size_t)STEPS * (size_t)b.info->vocabulary;
    float *first, *again;
    OK(SIDA_ALLOC(&first, words * (MOST_TOKENS + 1), "logits"));
    OK(SIDA_ALLOC(&again, words, "logits"));
    for (int turn = 0; turn < 2; turn++)
        for (int32_t tokens = 1; tokens <= MOST_TOKENS; tokens++)
            for (int i = 0; i < 3; i++) {
                const sida_ragged input = {1, (int64_t[]){0, tokens}, ids};
                float *to = turn + i == 0 ? first + tokens * words : again;
                bench_pass(&b, &driver, &input, to);
                if (memcmp(to, first + tokens * words, words * sizeof *to) != 0)
                    fail_msg("%d tokens, turn %d, pass %d: another result", tokens, turn, i);
            }
    /* Every length once a turn, since the first are gone when they come back; and the decoder's
     * call, which is always the same. */
    assert_int_equal(graphs.recorded, 2 * MOST_TOKENS + 1);
    free(first);
    free(again);
    bench_close(&b);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_replay),
                                       cmocka_unit_test(test_many_kinds)};
    sida_backend *backend = gpu_open();
    if (!backend) return test_skip(sida_last_message());
    sida_backend_destroy(backend);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
