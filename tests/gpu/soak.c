/* soak SECONDS SEED [cpu|cuda]: rounds of a small synthetic model under random budgets, policies,
 * queues, batch sizes and predictions. Every round must give the all-resident digest of the same
 * batches, and leave memory as it was: the device's as the driver tells it, and the process's. One
 * line a minute; exit 1 on any difference. Not a CTest test: it takes as long as it is told to, and
 * the driver counts what other programs take of the device: run it alone. */
#include "formats/base/clock.h"
#include "formats/base/log.h"
#include "formats/base/rng.h"
#include "formats/base/text.h"
#include "runtime/model/synthetic.h"
#include "tests/integration/identity_rig.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Memory settles in the first rounds: kernels are loaded, threads' heaps and libraries' pools grow.
 * Then it may move by as much as allocators keep back, and not with the number of rounds. */
enum {
    SEQUENCES = 24,
    SETTLING_ROUNDS = 48,
    DEVICE_SLACK_BYTES = 8 << 20,
    HOST_SLACK_BYTES = 32 << 20
};

typedef struct soak {
    rig rig;
    sida_rng rng;
    sida_fingerprint digests[rig_max_batch + 1]; /* all resident, by batch size */
    int64_t rounds, loads, bytes_moved;
    size_t device_bytes, device_settled_bytes; /* now; at most while settling */
    size_t host_bytes, host_settled_bytes;
} soak;

static const sida_synthetic_options geometry = {.name = "soak",
                                                .experts = 16,
                                                .dtype = SIDA_BF16,
                                                .layers = {4, 4},
                                                .d_model = 256,
                                                .d_kv = 64,
                                                .heads = 4,
                                                .d_ff = 512,
                                                .vocabulary = 2048,
                                                .capacity = 64,
                                                .seed = 5};

static void on_note(void *context, sida_log_level level, const char *line) {
    (void)context;
    if (level == SIDA_LOG_WARNING) fprintf(stderr, "soak: %s\n", line);
}

static size_t resident_bytes(void) {
    long pages = 0, ignored;
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file) return 0;
    if (fscanf(file, "%ld %ld", &ignored, &pages) != 2) pages = 0;
    fclose(file);
    return (size_t)pages * (size_t)sysconf(_SC_PAGESIZE);
}

static sida_status soak_open(soak *s, const char *device) {
    sida_status status = SIDA_OK;
    sida_backend *backend = NULL;
    sida_model *model = NULL;
    SIDA_TRY(sida_backend_create_named(&backend, device));
    SIDA_TRY(sida_model_open_synthetic(&model, backend, &geometry));
    rig_open_model(&s->rig, backend, model, SEQUENCES);
    for (int32_t batch = 1; batch <= rig_max_batch; batch++) {
        reference ref;
        rig_reference(&s->rig, &ref, SIDA_ROUTING_EXACT, 1, batch);
        s->digests[batch] = ref.digest;
        reference_free(&ref);
    }
    return SIDA_OK;
out:
    sida_backend_destroy(backend);
    return status;
}

static sida_status compare(const soak *s, const sida_pass_stats *stats,
                           const sida_pass_options *options, int32_t batch) {
    char got[SIDA_FINGERPRINT_TEXT], want[SIDA_FINGERPRINT_TEXT];
    if (sida_fingerprint_equal(stats->digest, s->digests[batch])) return SIDA_OK;
    sida_fingerprint_format(got, stats->digest);
    sida_fingerprint_format(want, s->digests[batch]);
    return sida_fail(SIDA_ERROR_MISMATCH,
                     "round %lld: %s, not %s: %d slots, %s, batches of %d, queue %d, prefetch %d "
                     "of %d",
                     (long long)s->rounds, got, want, options->slots, options->policy->name, batch,
                     options->queue, options->prefetch, options->top_k);
}

static sida_status check_memory(soak *s) {
    sida_status status = SIDA_OK;
    sida_memory_usage usage;
    SIDA_TRY(sida_backend_sample(s->rig.backend));
    sida_backend_memory(s->rig.backend, &usage);
    s->device_bytes = usage.driver_bytes;
    s->host_bytes = resident_bytes();
    if (s->rounds < SETTLING_ROUNDS) {
        if (s->device_bytes > s->device_settled_bytes) s->device_settled_bytes = s->device_bytes;
        if (s->host_bytes > s->host_settled_bytes) s->host_settled_bytes = s->host_bytes;
    }
    if (s->device_bytes > s->device_settled_bytes + DEVICE_SLACK_BYTES)
        SIDA_FAIL(SIDA_ERROR_DEVICE, "round %lld: %zu device bytes, %zu after %d rounds",
                  (long long)s->rounds, s->device_bytes, s->device_settled_bytes, SETTLING_ROUNDS);
    if (s->host_bytes > s->host_settled_bytes + HOST_SLACK_BYTES)
        SIDA_FAIL(SIDA_ERROR_MEMORY, "round %lld: %zu bytes of this process, %zu after %d rounds",
                  (long long)s->rounds, s->host_bytes, s->host_settled_bytes, SETTLING_ROUNDS);
out:
    return status;
}

static sida_status soak_round(soak *s) {
    static const char *const policies[] = {"fifo", "lru", "lookahead"};
    sida_status status = SIDA_OK;
    const sida_model_info *info = s->rig.info;
    uint32_t experts = (uint32_t)(info->sites * info->experts);
    sida_pass_stats stats = {0};
    /* Half of the rounds have few slots: there waves and waits are. */
    uint32_t most = sida_rng_below(&s->rng, 2) ? experts : 8;
    int32_t batch = 1 + (int32_t)sida_rng_below(&s->rng, rig_max_batch);
    const sida_pass_options options = {
        .source = sida_rng_below(&s->rng, 4) ? &s->rig.source : NULL,
        .routing = SIDA_ROUTING_EXACT,
        .top_k = 1 + (int32_t)sida_rng_below(&s->rng, 4),
        .slots = 2 + (int32_t)sida_rng_below(&s->rng, most - 1),
        .queue = 1 + (int32_t)sida_rng_below(&s->rng, 4),
        .prefetch = sida_rng_below(&s->rng, 4) != 0,
        .policy = sida_policy_find(policies[sida_rng_below(&s->rng, 3)]),
    };
    /* Delays on every thread in a third of them. */
    unsigned delays = sida_rng_below(&s->rng, 3) ? 0 : (unsigned)sida_rng_u64(&s->rng) | 1;
    SIDA_TRY(rig_pass(&s->rig, &stats, options, batch, delays));
    SIDA_TRY(compare(s, &stats, &options, batch));
    s->loads += stats.store.demand_loads + stats.store.prefetch_loads;
    s->bytes_moved += stats.store.bytes_moved;
    s->rounds++;
    SIDA_TRY(check_memory(s));
out:
    sida_pass_stats_free(&stats);
    return status;
}

static void tell(const soak *s, const char *what, double seconds) {
    const double mib = 1.0 / (1 << 20);
    printf("%s %.1f min: %lld rounds, %lld loads, %.1f GiB moved, digests equal; device %.2f MiB "
           "(settled %.2f), process %.1f MiB (settled %.1f)\n",
           what, seconds / 60, (long long)s->rounds, (long long)s->loads,
           (double)s->bytes_moved * mib / 1024, (double)s->device_bytes * mib,
           (double)s->device_settled_bytes * mib, (double)s->host_bytes * mib,
           (double)s->host_settled_bytes * mib);
    fflush(stdout);
}

int main(int argc, char **argv) {
    int64_t seconds, seed;
    if (argc < 3 || argc > 4 || !sida_text_to_i64(&seconds, argv[1], 1, 1000000) ||
        !sida_text_to_i64(&seed, argv[2], 0, INT64_MAX)) {
        fprintf(stderr, "usage: soak SECONDS SEED [cpu|cuda]\n");
        return 2;
    }
    soak s = {.rng = sida_rng_seed((uint64_t)seed)};
    sida_log_set_sink(on_note, NULL);
    sida_status status = soak_open(&s, argc > 3 ? argv[3] : "cuda");
    bool opened = status == SIDA_OK;
    double begin = sida_clock_seconds(), told = begin, now = begin;
    while (status == SIDA_OK && now - begin < (double)seconds) {
        status = soak_round(&s);
        now = sida_clock_seconds();
        if (now - told < 60) continue;
        tell(&s, "soak", now - begin);
        told = now;
    }
    if (status == SIDA_OK && s.rounds < 2 * SETTLING_ROUNDS)
        status = sida_fail(SIDA_ERROR_ARGUMENT,
                           "%lld rounds in %lld seconds say nothing about memory: at least %d are "
                           "needed",
                           (long long)s.rounds, (long long)seconds, 2 * SETTLING_ROUNDS);
    if (status == SIDA_OK)
        tell(&s, "passed", now - begin);
    else
        fprintf(stderr, "soak: failed after %.1f s: %s\n", now - begin, sida_last_message());
    if (opened) rig_close(&s.rig);
    return status != SIDA_OK;
}
