/* Our side of `tools/bench/gpu --parts predictor`: what the hash-building thread does for a batch,
 * timed: the encoder's tables and those of the decoder's first token, from ids to tables in the
 * host's memory. On one thread of the host, as that thread has it beside a model on the CPU; or,
 * with a DEVICE (cuda; cpu only tries it), with the predictor placed there.
 *
 *   bench_predictor [--kind lstm|transformer] [--weights f32|bf16] \
 *     D_MODEL EXPERTS SEQUENCES LENGTH K RUNS [DEVICE]
 *
 * The network has the default width, random parameters and six MoE layers a side; a Transformer's
 * weights on the device may be bf16. The embedding is bf16 of 32128 random rows, ids are random:
 * time depends on sizes alone. Prints JSON with every sample; three batches before them warm up, so
 * a device that records a Transformer's calls replays them. */
#include "formats/base/clock.h"
#include "formats/base/memory.h"
#include "formats/base/rng.h"
#include "runtime/predictor/sources.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum {
    VOCABULARY = 32128,
    MOE_LAYERS = 6,
    LSTM_LAYERS = 2,
    BLOCKS = 3,
    WARMUP = 3,
    FIRST_ID = 3,
    SEED = 7
};

typedef struct bench {
    int32_t d_model, experts, sequences, length, k, runs;
    sida_net_kind kind;
    sida_dtype weights;
    const char *device;               /* NULL: the host */
    sida_backend *backend;            /* of the device */
    sida_buffer *embedding_on_device; /* as `embedding` */
    sida_net *net;
    sida_hash_source *source;
    sida_hash_state *state;
    sida_hash_table tables[2];
    uint16_t *embedding;             /* [VOCABULARY, d_model] */
    int64_t *offsets, *step_offsets; /* [sequences + 1] */
    int32_t *ids, *step_ids;         /* [sequences * length], [sequences] */
    double *samples_ms;              /* [runs] */
} bench;

/* bf16 in [1/128, 1/64): the sign and the mantissa are random, what else does not matter. */
static void fill_embedding(bench *b, sida_rng *rng) {
    int64_t count = (int64_t)VOCABULARY * b->d_model;
    uint64_t bits = 0;
    for (int64_t i = 0; i < count; i++, bits >>= 16) {
        if (i % 4 == 0) bits = sida_rng_u64(rng);
        b->embedding[i] = (uint16_t)((bits & 0x807f) | 0x3c00);
    }
}

/* With the embedding, as a model would have it there. */
static sida_status place(bench *b) {
    sida_status status = SIDA_OK;
    sida_stream *stream = NULL;
    size_t bytes = (size_t)VOCABULARY * (size_t)b->d_model * sizeof *b->embedding;
    const sida_hash_limits limits = {.states = 1,
                                     .sequences = b->sequences,
                                     .input_tokens = (int64_t)b->sequences * b->length,
                                     .step_tokens = b->sequences,
                                     .decoder_positions = 1,
                                     .k = b->k,
                                     .weights = b->weights};
    SIDA_TRY(sida_backend_create_named(&b->backend, b->device));
    SIDA_TRY(sida_buffer_create(b->backend, &b->embedding_on_device, SIDA_MEMORY_DEVICE, bytes,
                                "an embedding"));
    SIDA_TRY(sida_stream_create(b->backend, &stream, SIDA_STREAM_COMPUTE));
    SIDA_TRY(sida_copy(stream, b->embedding_on_device->data, b->embedding, bytes));
    SIDA_TRY(sida_stream_synchronize(stream));
    SIDA_TRY(sida_hash_source_place(
        b->source, b->backend,
        (sida_weight){b->embedding_on_device->data, SIDA_BF16, VOCABULARY, b->d_model}, &limits));
    if (b->source->info.device_bytes == 0)
        SIDA_FAIL(SIDA_ERROR_UNSUPPORTED, "device %s has no ops for the predictor", b->device);
out:
    sida_stream_destroy(stream);
    return status;
}

static sida_status open_source(bench *b, sida_rng *rng) {
    sida_status status = SIDA_OK;
    bool lstm = b->kind == SIDA_NET_LSTM;
    const sida_net_config config = {.kind = b->kind,
                                    .d_model = b->d_model,
                                    .hidden = sida_net_default_hidden(b->d_model),
                                    .lstm_layers = lstm ? LSTM_LAYERS : 0,
                                    .blocks = lstm ? 0 : BLOCKS,
                                    .experts = b->experts,
                                    .vocabulary = VOCABULARY,
                                    .layers = {MOE_LAYERS, MOE_LAYERS}};
    SIDA_TRY(sida_net_create(&b->net, &config));
    sida_net_initialise(b->net, SEED);
    SIDA_TRY(SIDA_ALLOC(&b->embedding, (int64_t)VOCABULARY * b->d_model, "an embedding"));
    fill_embedding(b, rng);
    const sida_weight embedding = {b->embedding, SIDA_BF16, VOCABULARY, b->d_model};
    SIDA_TRY(sida_lstm_source_create(&b->source, b->net, embedding, (sida_fingerprint){0},
                                     (sida_fingerprint){0}));
    if (b->device) SIDA_TRY(place(b));
    SIDA_TRY(sida_hash_state_create(b->source, &b->state));
out:
    return status;
}

static sida_status measure(bench *b, sida_rng *rng) {
    sida_status status = SIDA_OK;
    int64_t tokens = (int64_t)b->sequences * b->length;
    SIDA_TRY(SIDA_ALLOC(&b->offsets, b->sequences + 1, "offsets"));
    SIDA_TRY(SIDA_ALLOC(&b->step_offsets, b->sequences + 1, "offsets"));
    SIDA_TRY(SIDA_ALLOC(&b->ids, tokens, "ids"));
    SIDA_TRY(SIDA_ALLOC(&b->step_ids, b->sequences, "ids")); /* all 0: the start token */
    SIDA_TRY(SIDA_ALLOC(&b->samples_ms, b->runs, "samples"));
    for (int32_t s = 0; s <= b->sequences; s++) {
        b->offsets[s] = (int64_t)s * b->length;
        b->step_offsets[s] = s;
    }
    for (int32_t i = -WARMUP; i < b->runs; i++) {
        const sida_ragged input = {b->sequences, b->offsets, b->ids};
        const sida_ragged step = {b->sequences, b->step_offsets, b->step_ids};
        for (int64_t t = 0; t < tokens; t++)
            b->ids[t] = FIRST_ID + (int32_t)sida_rng_below(rng, VOCABULARY - FIRST_ID);
        double begin = sida_clock_seconds();
        SIDA_TRY(sida_hash_encode(b->source, b->state, &input, b->k, &b->tables[0]));
        SIDA_TRY(sida_hash_decode(b->source, b->state, &step, b->k, &b->tables[1]));
        if (i >= 0) b->samples_ms[i] = (sida_clock_seconds() - begin) * 1e3;
    }
out:
    return status;
}

static void print(const bench *b) {
    sida_device_info info;
    printf("{\"kind\": \"%s\", \"weights\": \"%s\", \"d_model\": %d, \"hidden\": %d, \"experts\": "
           "%d, \"batch\": %d, \"length\": %d, "
           "\"top_k\": %d, \"parameters\": %lld, \"threads\": 1, ",
           sida_net_kind_name(b->kind), sida_dtype_name(b->weights), b->d_model,
           b->net->config.hidden, b->experts, b->sequences, b->length, b->k,
           (long long)b->net->parameter_count);
    if (b->device) {
        bool cpu = strcmp(b->backend->table->name, "cpu") == 0;
        if (sida_backend_describe(b->backend, &info) != SIDA_OK) info = (sida_device_info){0};
        printf("\"device\": \"%s\", \"device_bytes\": %zu, ", cpu ? "cpu" : info.name,
               b->source->info.device_bytes);
    }
    printf("\"samples_ms\": [");
    for (int32_t i = 0; i < b->runs; i++) printf("%s%.6f", i > 0 ? ", " : "", b->samples_ms[i]);
    puts("]}");
}

/* The options before the sizes; returns how many arguments they are, or -1. */
static int read_options(bench *b, int argc, char **argv) {
    int at = 0;
    for (; at + 1 < argc && strncmp(argv[at], "--", 2) == 0; at += 2) {
        const char *option = argv[at] + 2, *value = argv[at + 1];
        if (strcmp(option, "kind") == 0 && strcmp(value, "lstm") == 0)
            b->kind = SIDA_NET_LSTM;
        else if (strcmp(option, "kind") == 0 && strcmp(value, "transformer") == 0)
            b->kind = SIDA_NET_TRANSFORMER;
        else if (strcmp(option, "weights") == 0 && strcmp(value, "f32") == 0)
            b->weights = SIDA_F32;
        else if (strcmp(option, "weights") == 0 && strcmp(value, "bf16") == 0)
            b->weights = SIDA_BF16;
        else
            return -1;
    }
    return at;
}

int main(int argc, char **argv) {
    bench b = {0};
    int options = read_options(&b, argc - 1, argv + 1);
    if (options > 0) {
        argc -= options;
        argv += options;
    }
    int32_t *const numbers[] = {&b.d_model, &b.experts, &b.sequences, &b.length, &b.k, &b.runs};
    int32_t count = sizeof numbers / sizeof *numbers;
    bool good = options >= 0 && (argc == count + 1 || argc == count + 2);
    b.device = good && argc == count + 2 ? argv[count + 1] : NULL;
    good &= b.kind == SIDA_NET_TRANSFORMER || b.weights == SIDA_F32;
    for (int32_t i = 0; good && i < count; i++) {
        *numbers[i] = atoi(argv[i + 1]);
        good = *numbers[i] >= 1 && *numbers[i] <= 1 << 16;
    }
    if (!good) {
        fprintf(stderr,
                "usage: bench_predictor [--kind lstm|transformer] [--weights f32|bf16] D_MODEL "
                "EXPERTS SEQUENCES LENGTH K RUNS [DEVICE]\n");
        return 2;
    }
#ifdef _OPENMP
    omp_set_num_threads(1);
#endif
    sida_rng rng = sida_rng_seed(SEED);
    sida_status status = open_source(&b, &rng);
    if (status == SIDA_OK) status = measure(&b, &rng);
    if (status == SIDA_OK)
        print(&b);
    else
        fprintf(stderr, "bench_predictor: %s\n", sida_last_message());
    sida_hash_table_free(&b.tables[0]);
    sida_hash_table_free(&b.tables[1]);
    sida_hash_state_destroy(b.source, b.state);
    sida_hash_source_destroy(b.source);
    sida_buffer_destroy(b.embedding_on_device);
    sida_backend_destroy(b.backend);
    sida_net_destroy(b.net);
    free(b.embedding);
    free(b.offsets);
    free(b.step_offsets);
    free(b.ids);
    free(b.step_ids);
    free(b.samples_ms);
    return status == SIDA_OK ? 0 : 1;
}
