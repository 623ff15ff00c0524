#include "data/spans.h"

#include "formats/base/memory.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum { NOISE_PERCENT = 15, MEAN_SPAN = 3 };

/* Writes 1 to cuts[0 … places) at `count` places, each choice as likely (Knuth's selection
 * sampling, algorithm S). */
static void choose_places(uint8_t *cuts, size_t places, size_t count, sida_rng *rng) {
    for (size_t i = 0; i < places; i++) {
        cuts[i] = sida_rng_below(rng, (uint32_t)(places - i)) < count;
        count -= cuts[i];
    }
}

/* Divides `total` into `parts` >= 1 numbers of one or more. */
static void divide(size_t *out, size_t total, size_t parts, uint8_t *cuts, sida_rng *rng) {
    size_t part = 0;
    assert(parts >= 1 && total >= parts);
    choose_places(cuts, total - 1, parts - 1, rng);
    out[0] = 1;
    for (size_t i = 0; i + 1 < total; i++)
        if (cuts[i])
            out[++part] = 1;
        else
            out[part]++;
}

sida_status sida_spans_corrupt(int32_t *input, size_t *input_count, int32_t *target,
                               size_t *target_count, const int32_t *ids, size_t count,
                               int32_t first_sentinel, sida_rng *rng) {
    sida_status status = SIDA_OK;
    size_t noise = (count * NOISE_PERCENT + 50) / 100, kept, spans, at = 0, in = 0, out = 0;
    size_t *lengths = NULL, *gaps = NULL;
    uint8_t *cuts = NULL;
    assert(count >= 2);
    if (noise < 1) noise = 1;
    spans = (noise + MEAN_SPAN / 2) / MEAN_SPAN;
    if (spans < 1) spans = 1;
    if (spans > SIDA_SPANS_SENTINELS - 1) spans = SIDA_SPANS_SENTINELS - 1;
    kept = count - noise;
    SIDA_TRY(SIDA_ALLOC(&lengths, spans, "spans"));
    SIDA_TRY(SIDA_ALLOC(&gaps, spans + 1, "spans"));
    SIDA_TRY(SIDA_ALLOC(&cuts, count + 2, "spans"));
    divide(lengths, noise, spans, cuts, rng);
    /* Only the inner gaps must have a token. */
    divide(gaps, kept + 2, spans + 1, cuts, rng);
    gaps[0]--;
    gaps[spans]--;
    for (size_t i = 0; i <= spans; i++) {
        memcpy(input + in, ids + at, gaps[i] * sizeof *ids);
        in += gaps[i];
        at += gaps[i];
        target[out++] = first_sentinel - (int32_t)i;
        if (i == spans) break;
        input[in++] = first_sentinel - (int32_t)i;
        memcpy(target + out, ids + at, lengths[i] * sizeof *ids);
        out += lengths[i];
        at += lengths[i];
    }
    assert(at == count && in <= count && out <= count + 1);
    *input_count = in;
    *target_count = out;
out:
    free(lengths);
    free(gaps);
    free(cuts);
    return status;
}
