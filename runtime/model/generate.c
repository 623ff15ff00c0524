/* Greedy decoding or given targets, one token a step, with the caches of the last encode. */
#include "runtime/model/run_private.h"

#include <string.h>

/* The lowest id of the highest logit. */
static int32_t best_of(const float *logits, int32_t count) {
    enum { LANES = 16 }; /* independent maxima, which the compiler keeps in vectors */
    float high[LANES], best;
    int32_t i = 0;
    for (int l = 0; l < LANES; l++) high[l] = logits[0];
    for (; i + LANES <= count; i += LANES)
        for (int l = 0; l < LANES; l++) high[l] = logits[i + l] > high[l] ? logits[i + l] : high[l];
    best = high[0];
    for (int l = 1; l < LANES; l++) best = high[l] > best ? high[l] : best;
    for (; i < count; i++) best = logits[i] > best ? logits[i] : best;
    for (i = 0; i < count; i++)
        if (logits[i] == best) return i;
    return 0; /* NaN everywhere */
}

/* Logits of the step's rows, and each live sequence's next token into ids[s * stride]. */
static sida_status choose_tokens(sida_run *run, const sida_generate_options *options, int32_t t,
                                 int64_t rows, int32_t *ids) {
    sida_status status = SIDA_OK;
    sida_run_host *host = &run->host;
    int32_t vocabulary = run->model->config.info.vocabulary, row = 0;
    SIDA_TRY(sida_run_read_logits(run, 0, rows, host->logits));
    for (int32_t s = 0; s < run->sequences; s++) {
        if (!host->live[s]) continue;
        const float *logits = host->logits + (int64_t)row++ * vocabulary;
        if (options->on_logits) SIDA_TRY(options->on_logits(options->context, t, s, logits));
        ids[(int64_t)s * options->max_new_tokens + t] =
            options->forced ? options->forced->ids[options->forced->offsets[s] + t]
                            : best_of(logits, vocabulary);
    }
out:
    return status;
}

static int64_t forced_tokens(const sida_ragged *forced, int32_t s) {
    return forced->offsets[s + 1] - forced->offsets[s];
}

/* Who takes the first step. */
static sida_status begin_sequences(sida_run *run, const sida_generate_options *options) {
    const sida_ragged *forced = options->forced;
    memset(run->host.live, 1, (size_t)run->sequences);
    if (!forced) return SIDA_OK;
    if (forced->sequences != run->sequences)
        return sida_fail(SIDA_ERROR_ARGUMENT, "targets of %d sequences after encoding %d",
                         forced->sequences, run->sequences);
    for (int32_t s = 0; s < run->sequences; s++) {
        run->host.live[s] = forced_tokens(forced, s) > 0;
        if (forced_tokens(forced, s) > options->max_new_tokens)
            return sida_fail(SIDA_ERROR_ARGUMENT,
                             "a target of %lld tokens, more than max-new-tokens %d",
                             (long long)forced_tokens(forced, s), options->max_new_tokens);
    }
    return SIDA_OK;
}

sida_status sida_run_generate(sida_run *run, const sida_generate_options *options,
                              const sida_moe_driver *driver, int32_t *ids, int32_t *counts) {
    sida_status status = SIDA_OK;
    sida_run_host *host = &run->host;
    const sida_model_info *info = &run->model->config.info;
    int32_t most = options->max_new_tokens;
    if (run->sequences == 0) SIDA_FAIL(SIDA_ERROR_ARGUMENT, "nothing has been encoded");
    if (most < 1 || most > run->limits.decoder_positions)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "%d new tokens in a run of %d decoder positions", most,
                  run->limits.decoder_positions);
    if (run->sequences > run->limits.step_tokens)
        SIDA_FAIL(SIDA_ERROR_ARGUMENT, "%d sequences a step in a run of %lld step tokens",
                  run->sequences, (long long)run->limits.step_tokens);
    SIDA_TRY(begin_sequences(run, options));
    memset(counts, 0, (size_t)run->sequences * sizeof *counts);
    for (int32_t t = 0; t < most; t++) {
        sida_ragged step = {run->sequences, host->step_offsets, host->step_ids};
        int32_t rows = 0;
        host->step_offsets[0] = 0;
        for (int32_t s = 0; s < run->sequences; s++) {
            if (host->live[s])
                host->step_ids[rows++] =
                    t == 0 ? info->decoder_start : ids[(int64_t)s * most + t - 1];
            host->step_offsets[s + 1] = rows;
        }
        if (rows == 0) break;
        if (options->before_step) SIDA_TRY(options->before_step(options->context, t, &step));
        SIDA_TRY(sida_run_decode(run, &step, driver));
        SIDA_TRY(choose_tokens(run, options, t, rows, ids));
        for (int32_t s = 0; s < run->sequences; s++) {
            if (!host->live[s]) continue;
            counts[s] = t + 1;
            host->live[s] = options->forced ? t + 1 < forced_tokens(options->forced, s)
                                            : ids[(int64_t)s * most + t] != info->eos;
        }
    }
out:
    return status;
}
