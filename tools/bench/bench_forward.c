/* The C side of tools/bench/cpu: one encoder pass and a fixed number of greedy steps over batches
 * of token ids, without stopping at </s>.
 *
 *   bench_forward MODEL IDS BATCH STEPS THREADS
 *
 * IDS holds a line of ids for each sequence. After loading it prints "ready"; for each line on
 * stdin it runs everything once and prints the seconds that took, loading not included. */
#include "formats/base/clock.h"
#include "formats/base/memory.h"
#include "runtime/backend/backend.h"
#include "runtime/model/model.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

typedef struct bench {
    sida_backend *backend;
    sida_model *model;
    sida_resident *resident;
    sida_run *run;
    int64_t sequences, *offsets; /* [sequences + 1] */
    int32_t *ids;
    size_t ids_capacity, offsets_capacity;
    int32_t batch, steps;
    int32_t *chosen; /* [batch] */
    float *logits;   /* [batch, vocabulary] */
} bench;

static sida_status read_ids(bench *b, const char *path) {
    sida_status status = SIDA_OK;
    char *line = NULL;
    size_t room = 0;
    int64_t tokens = 0;
    FILE *file = fopen(path, "r");
    if (!file) SIDA_FAIL(SIDA_ERROR_IO, "%s: %s", path, strerror(errno));
    SIDA_TRY(SIDA_GROW(&b->offsets, &b->offsets_capacity, 1, path));
    while (getline(&line, &room, file) > 0) {
        char *at = line, *end;
        for (;; at = end) {
            long id = strtol(at, &end, 10);
            if (end == at) break;
            SIDA_TRY(SIDA_GROW(&b->ids, &b->ids_capacity, tokens + 1, path));
            b->ids[tokens++] = (int32_t)id;
        }
        b->sequences++;
        SIDA_TRY(SIDA_GROW(&b->offsets, &b->offsets_capacity, b->sequences + 1, path));
        b->offsets[b->sequences] = tokens;
    }
    if (b->sequences == 0) SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: no ids", path);
out:
    free(line);
    if (file) fclose(file);
    return status;
}

static sida_status open_run(bench *b) {
    sida_run_limits limits = {.sequences = b->batch,
                              .input_tokens = 1,
                              .step_tokens = b->batch,
                              .decoder_positions = b->steps};
    for (int64_t s = 0; s < b->sequences; s += b->batch) {
        int64_t end = s + b->batch < b->sequences ? s + b->batch : b->sequences;
        int64_t tokens = b->offsets[end] - b->offsets[s];
        if (tokens > limits.input_tokens) limits.input_tokens = tokens;
    }
    return sida_run_create(&b->run, b->model, &limits);
}

static int32_t best_of(const float *logits, int32_t count) {
    int32_t best = 0;
    for (int32_t i = 1; i < count; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

static sida_status run_batch(bench *b, int64_t first, int32_t count) {
    sida_status status = SIDA_OK;
    const sida_model_info *info = sida_model_get_info(b->model);
    const sida_moe_driver *driver = sida_resident_driver(b->resident, NULL, NULL, NULL);
    int64_t *offsets = NULL, *step_offsets = NULL;
    SIDA_TRY(SIDA_ALLOC(&offsets, count + 1, "offsets"));
    SIDA_TRY(SIDA_ALLOC(&step_offsets, count + 1, "offsets"));
    for (int32_t s = 0; s <= count; s++) {
        offsets[s] = b->offsets[first + s] - b->offsets[first];
        step_offsets[s] = s;
    }
    sida_ragged input = {count, offsets, b->ids + b->offsets[first]};
    SIDA_TRY(sida_run_encode(b->run, &input, driver));
    for (int32_t s = 0; s < count; s++) b->chosen[s] = info->decoder_start;
    for (int32_t t = 0; t < b->steps; t++) {
        sida_ragged step = {count, step_offsets, b->chosen};
        SIDA_TRY(sida_run_decode(b->run, &step, driver));
        SIDA_TRY(sida_run_read_logits(b->run, 0, count, b->logits));
        for (int32_t s = 0; s < count; s++)
            b->chosen[s] = best_of(b->logits + (int64_t)s * info->vocabulary, info->vocabulary);
    }
out:
    free(offsets);
    free(step_offsets);
    return status;
}

static sida_status serve(bench *b, const char *model, const char *ids) {
    sida_status status = SIDA_OK;
    char line[64];
    SIDA_TRY(read_ids(b, ids));
    SIDA_TRY(sida_backend_create_cpu(&b->backend, NULL));
    SIDA_TRY(sida_model_open(&b->model, b->backend, model));
    SIDA_TRY(sida_resident_create(&b->resident, b->model));
    SIDA_TRY(open_run(b));
    SIDA_TRY(SIDA_ALLOC(&b->chosen, b->batch, "tokens"));
    SIDA_TRY(SIDA_ALLOC(&b->logits, (int64_t)b->batch * sida_model_get_info(b->model)->vocabulary,
                        "logits"));
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        double begin = sida_clock_seconds();
        for (int64_t s = 0; s < b->sequences; s += b->batch) {
            int64_t left = b->sequences - s;
            SIDA_TRY(run_batch(b, s, left < b->batch ? (int32_t)left : b->batch));
        }
        printf("%.9f\n", sida_clock_seconds() - begin);
        fflush(stdout);
    }
out:
    return status;
}

int main(int argc, char **argv) {
    bench b = {0};
    if (argc != 6) {
        fprintf(stderr, "usage: bench_forward MODEL IDS BATCH STEPS THREADS\n");
        return 2;
    }
    b.batch = atoi(argv[3]);
    b.steps = atoi(argv[4]);
    if (b.batch < 1 || b.steps < 1 || atoi(argv[5]) < 1) {
        fprintf(stderr, "bench_forward: BATCH, STEPS and THREADS are at least 1\n");
        return 2;
    }
#ifdef _OPENMP
    omp_set_num_threads(atoi(argv[5]));
#endif
    sida_status status = serve(&b, argv[1], argv[2]);
    if (status != SIDA_OK) fprintf(stderr, "bench_forward: %s\n", sida_last_message());
    free(b.offsets);
    free(b.ids);
    free(b.chosen);
    free(b.logits);
    sida_run_destroy(b.run);
    sida_resident_destroy(b.resident);
    sida_model_destroy(b.model);
    sida_backend_destroy(b.backend);
    return status == SIDA_OK ? 0 : 1;
}
