#include "runtime/predictor/select.h"

#include "runtime/ops/cpu_kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Sorts before another key when the score is higher, or equal and the id lower. */
static uint64_t make_key(float score, int32_t expert) {
    uint32_t bits;
    score += 0.0f; /* -0 is 0 */
    memcpy(&bits, &score, sizeof bits);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u; /* ordered as the floats are */
    return (uint64_t)(~bits) << 32 | (uint32_t)expert;
}

static int compare_keys(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static bool select_top(uint16_t *chosen, const float *scores, int32_t experts, int32_t k,
                       uint64_t *keys) {
    enum { few = 32 };
    if (k <= few && experts <= SIDA_TOP_COUNT)
        return sida_cpu_kernels_get()->top(chosen, scores, experts, k);
    for (int32_t e = 0; e < experts; e++) {
        if (!isfinite(scores[e])) return false;
        keys[e] = make_key(scores[e], e);
    }
    qsort(keys, (size_t)experts, sizeof *keys, compare_keys);
    for (int32_t i = 0; i < k; i++) chosen[i] = (uint16_t)keys[i];
    return true;
}

bool sida_select_logits(sida_hash_table *out, int64_t row, int32_t layer, const float *scores,
                        int32_t experts, uint64_t *scratch) {
    int64_t at = (row * out->layers + layer) * out->k;
    uint16_t *chosen = out->experts + at;
    if (!select_top(chosen, scores, experts, out->k, scratch)) return false;
    sida_cpu_kernels_get()->shares(out->alpha + at, chosen, out->k, scores, experts);
    return true;
}

bool sida_select_weights(sida_hash_table *out, int64_t row, int32_t layer, const float *scores,
                         int32_t experts, uint64_t *scratch) {
    int64_t at = (row * out->layers + layer) * out->k;
    uint16_t *chosen = out->experts + at;
    if (!select_top(chosen, scores, experts, out->k, scratch)) return false;
    float sum = 0;
    for (int32_t e = 0; e < experts; e++) sum += scores[e];
    for (int32_t i = 0; i < out->k; i++) out->alpha[at + i] = scores[chosen[i]] / sum;
    return true;
}

sida_status sida_select_not_finite(void) {
    return sida_fail(SIDA_ERROR_FORMAT,
                     "the predictor's scores are not finite: its parameters or the embedding are "
                     "too large");
}
