/* What sida bench knows of a length: as JSON, and as lines. */
#include "formats/base/clock.h"
#include "formats/base/memory.h"
#include "runtime/ops/cpu_kernels.h"
#include "tools/cli/bench.h"
#include "tools/cli/cli.h"
#include "tools/cli/measure.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void set_real(json_t *object, const char *key, double value) {
    json_object_set_new(object, key, json_real(value));
}

static void set_integer(json_t *object, const char *key, int64_t value) {
    json_object_set_new(object, key, json_integer((json_int_t)value));
}

static double number(const json_t *object, const char *key) {
    return json_number_value(json_object_get(object, key));
}

/* The times of batches of a pass add up to the time from the last warm-up's end to the last one's
 * that counts: their mean is the steady time of a batch. */
static double mean(const double *values, int32_t count) {
    double sum = 0;
    for (int32_t i = 0; i < count; i++) sum += values[i];
    return sum / count;
}

/* Counters of the whole pass, and rates of the batches that count. */
static void report_moves(const sida_bench *s, json_t *row) {
    const sida_store_stats *all = &s->stats.store;
    const double runs = s->options->runs;
    double moved = (double)(s->after.bytes_moved - s->before.bytes_moved);
    double busy = s->after.busy_seconds - s->before.busy_seconds;
    double loading = busy > 0 ? moved / busy : 0,
           rate = moved / (number(row, "mean_ms") * runs) * 1e3;
    set_integer(row, "slots", s->slots);
    set_integer(row, "cap_bytes", (int64_t)s->cap_bytes);
    set_real(row, "pass_seconds", s->stats.seconds);
    set_integer(row, "hits", all->hits);
    set_integer(row, "late_prefetches", all->late_prefetches);
    set_integer(row, "demand_loads", all->demand_loads);
    set_integer(row, "prefetch_loads", all->prefetch_loads);
    set_integer(row, "dropped_prefetches", all->dropped_prefetches);
    set_integer(row, "bytes_moved", all->bytes_moved);
    set_integer(row, "bytes_wasted", all->bytes_wasted);
    set_real(row, "bytes_a_batch", moved / runs);
    set_real(row, "moved_gb_per_s", rate / 1e9);
    set_real(row, "share_of_link", rate / s->link_rate);
    set_real(row, "busy_seconds", busy);
    set_real(row, "loading_bytes_per_s", loading);
    set_real(row, "loading_share_of_link", loading / s->link_rate);
    set_integer(row, "belady_bytes", s->belady_bytes);
    set_real(row, "belady_ms", (double)s->belady_bytes / runs / s->link_rate * 1e3);
    if (s->recall.places == 0) return;
    set_integer(row, "places", s->measured.places);
    set_real(row, "hit_first", s->measured.first);
    set_real(row, "hit_any", s->measured.all);
}

sida_status sida_bench_report(sida_bench *s, json_t *rows) {
    sida_status status = SIDA_OK;
    const sida_bench_options *o = s->options;
    sida_memory_usage usage;
    double *sorted = NULL;
    json_t *row = json_object(), *samples = json_array();
    json_array_append_new(rows, row);
    for (int32_t i = 0; i < o->runs; i++)
        json_array_append_new(samples, json_real(s->samples_ms[i]));
    SIDA_TRY(SIDA_ALLOC(&sorted, o->runs, "samples"));
    memcpy(sorted, s->samples_ms, (size_t)o->runs * sizeof *sorted);
    double median_ms = sida_median(sorted, (size_t)o->runs);
    double touched = sida_bench_record_touched(s->record, o->warmup, o->warmup + o->runs);
    double bytes = touched * (double)s->info->expert_bytes + (double)s->info->dense_bytes;
    double floor_ms = bytes / s->memory_rate * 1e3;
    sida_backend_memory(s->backend, &usage);
    set_integer(row, "length", s->record->length);
    set_integer(row, "batch", o->batch);
    set_real(row, "latency_ms", median_ms);
    set_real(row, "latency_ms_min", sorted[0]);
    set_real(row, "mean_ms", mean(s->samples_ms, o->runs));
    set_real(row, "tokens_per_s", o->batch * s->record->length / median_ms * 1e3);
    set_real(row, "experts_touched", touched);
    set_real(row, "top_expert_share", sida_bench_record_top_share(s->record));
    set_real(row, "weight_bytes", bytes);
    set_real(row, "floor_ms", floor_ms);
    set_real(row, "share_of_floor", floor_ms / median_ms);
    set_integer(row, "device_bytes_peak", (int64_t)usage.peak_bytes);
    set_integer(row, "driver_bytes", (int64_t)usage.driver_bytes);
    set_integer(row, "driver_bytes_peak", (int64_t)usage.driver_peak_bytes);
    json_object_set_new(row, "driver_alone", json_boolean(usage.driver_alone));
    if (s->slots > 0) report_moves(s, row);
    if (o->digest) {
        char text[SIDA_FINGERPRINT_TEXT];
        sida_fingerprint_format(text, s->digest);
        json_object_set_new(row, "digest", json_string(text));
    }
    json_object_set(row, "samples_ms", samples);
out:
    json_decref(samples);
    free(sorted);
    return status;
}

/* --- lines */

static void print_moves(const json_t *row) {
    const double mib = 1.0 / (1 << 20);
    double runs = (double)json_array_size(json_object_get(row, "samples_ms"));
    printf(
        "       %.0f slots: %.0f hits, %.0f late, %.0f on demand; %.0f prefetched, %.0f dropped; "
        "%.1f MiB moved, %.1f of it wasted\n",
        number(row, "slots"), number(row, "hits"), number(row, "late_prefetches"),
        number(row, "demand_loads"), number(row, "prefetch_loads"),
        number(row, "dropped_prefetches"), number(row, "bytes_moved") * mib,
        number(row, "bytes_wasted") * mib);
    printf(
        "       a batch: mean %.3f ms, %.1f MiB moved, %.1f GB/s, %.1f%% of the link; Belady %.1f "
        "MiB, %.3f ms\n",
        number(row, "mean_ms"), number(row, "bytes_a_batch") * mib, number(row, "moved_gb_per_s"),
        number(row, "share_of_link") * 100, number(row, "belady_bytes") / runs * mib,
        number(row, "belady_ms"));
    printf("       while loading: %.1f GB/s, %.1f%% of the link\n",
           number(row, "loading_bytes_per_s") / 1e9, number(row, "loading_share_of_link") * 100);
    if (json_object_get(row, "places"))
        printf("       tables of %.0f experts a token: %.1f%% in the first place, %.1f%% in any\n",
               number(row, "places"), number(row, "hit_first") * 100, number(row, "hit_any") * 100);
}

void sida_bench_print(const sida_bench *s, const json_t *rows) {
    const sida_bench_options *o = s->options;
    const double mib = 1.0 / (1 << 20);
    static const char *const ahead[] = {[SIDA_BENCH_NONE] = "experts on demand",
                                        [SIDA_BENCH_ORACLE] = "experts ahead by an oracle",
                                        [SIDA_BENCH_RECALL] = "experts ahead by faulty tables"};
    size_t i;
    json_t *row;
    printf("%s, %s, %s, budget %s, batches of %d, %s\n", o->model ? o->model : o->synthetic,
           sida_dtype_name(s->info->expert.dtype), s->device.name, o->budget, o->batch,
           s->resident ? "all experts resident" : ahead[s->prefetch]);
    printf("device memory %.1f GB/s (read and written), link %.1f GB/s; loaded in %.1f s\n",
           s->memory_rate / 1e9, s->link_rate / 1e9, s->load_seconds);
    printf("%6s %10s %10s %10s %8s %9s %9s %7s\n", "length", "ms", "min", "tokens/s", "experts",
           "MiB read", "floor ms", "share");
    json_array_foreach((json_t *)(uintptr_t)rows, i, row) {
        char peak[160];
        printf("%6.0f %10.3f %10.3f %10.1f %8.1f %9.1f %9.3f %6.1f%%\n", number(row, "length"),
               number(row, "latency_ms"), number(row, "latency_ms_min"),
               number(row, "tokens_per_s"), number(row, "experts_touched"),
               number(row, "weight_bytes") * mib, number(row, "floor_ms"),
               number(row, "share_of_floor") * 100);
        printf("       device memory: %s\n",
               sida_format_peak(peak, (uint64_t)number(row, "driver_bytes_peak"),
                                (uint64_t)number(row, "device_bytes_peak"),
                                json_is_true(json_object_get(row, "driver_alone"))));
        if (json_object_get(row, "slots")) print_moves(row);
        if (json_object_get(row, "digest"))
            printf("       digest %s\n", json_string_value(json_object_get(row, "digest")));
    }
}

json_t *sida_bench_whole(const sida_bench *s, json_t *rows) {
    const sida_bench_options *o = s->options;
    return json_pack(
        "{s:s, s:s, s:s, s:s, s:i, s:s, s:s, s:s, s:s, s:i, s:i, s:i, s:i, s:i, s:f, s:f, s:f, "
        "s:I, s:I, s:O}",
        "version", SIDA_VERSION, "model", o->model ? o->model : o->synthetic, "dtype",
        sida_dtype_name(s->info->expert.dtype), "device", s->backend->table->name, "threads",
        sida_ops_threads(), "device_name", s->device.name, "budget", o->budget, "policy",
        s->policy->name, "prefetch", s->resident ? "resident" : o->prefetch, "queue", o->queue,
        "runs", o->runs, "warmup", o->warmup, "tail", SIDA_BENCH_TAIL, "experts",
        s->info->sites * s->info->experts, "memory_bytes_per_s", s->memory_rate, "link_bytes_per_s",
        s->link_rate, "load_seconds", s->load_seconds, "dense_bytes",
        (json_int_t)s->info->dense_bytes, "expert_bytes", (json_int_t)s->info->expert_bytes, "rows",
        rows);
}
