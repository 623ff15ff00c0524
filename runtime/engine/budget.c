#include "runtime/engine/budget.h"

#include "formats/base/text.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { least_slots = 2 };

/* The text in front of `suffix`, copied; false when it does not end so or is too long. */
static bool strip_suffix(char *out, size_t size, const char *text, const char *suffix) {
    size_t length = strlen(text), tail = strlen(suffix);
    if (length <= tail || length - tail >= size || strcmp(text + length - tail, suffix) != 0)
        return false;
    memcpy(out, text, length - tail);
    out[length - tail] = 0;
    return out[0] >= '0' && out[0] <= '9';
}

sida_status sida_budget_parse(sida_budget *out, const char *text) {
    char number[32];
    *out = (sida_budget){0};
    if (strip_suffix(number, sizeof number, text, "%") &&
        sida_text_to_f64(&out->share, number, 0, 100)) {
        out->kind = SIDA_BUDGET_SHARE;
        out->share /= 100;
        return SIDA_OK;
    }
    if ((strip_suffix(number, sizeof number, text, "-experts") ||
         strip_suffix(number, sizeof number, text, "-expert")) &&
        sida_text_to_i64(&out->experts, number, 1, INT32_MAX)) {
        out->kind = SIDA_BUDGET_EXPERTS;
        return SIDA_OK;
    }
    if (sida_text_to_bytes(&out->bytes, text)) {
        out->kind = SIDA_BUDGET_BYTES;
        return SIDA_OK;
    }
    return sida_fail(SIDA_ERROR_ARGUMENT,
                     "budget '%.40s': expected a share of the experts (20%%), a number of them "
                     "(12-experts) or a size (2GiB)",
                     text);
}

sida_status sida_budget_slots(int32_t *slots, size_t *cap_bytes, const sida_budget *budget,
                              const sida_budget_needs *needs) {
    size_t fixed = needs->dense_bytes + needs->workspace_bytes + needs->predictor_bytes;
    size_t taken = fixed + needs->driver_bytes;
    size_t least_bytes = taken + least_slots * needs->slot_bytes;
    int64_t count = 0;
    switch (budget->kind) {
    case SIDA_BUDGET_SHARE:
        /* 29 % of 100 is 29 although 0.29 * 100 is 28.999999999999996. */
        count = (int64_t)(budget->share * (double)needs->experts + 1e-9);
        if (count < least_slots)
            return sida_fail(SIDA_ERROR_BUDGET,
                             "budget %g%%: %g%% of %lld experts is %lld slots, at least %d are "
                             "needed (%d-experts)",
                             budget->share * 100, budget->share * 100, (long long)needs->experts,
                             (long long)count, least_slots, least_slots);
        break;
    case SIDA_BUDGET_EXPERTS:
        count = budget->experts;
        if (count < least_slots)
            return sida_fail(SIDA_ERROR_BUDGET, "budget %lld-experts: at least %d are needed",
                             (long long)count, least_slots);
        break;
    case SIDA_BUDGET_BYTES:
        if (budget->bytes < least_bytes)
            return sida_fail(SIDA_ERROR_BUDGET,
                             "budget of %llu bytes: at least %zu are needed = %zu dense weights + "
                             "%zu workspace + %zu predictor + %zu driver and libraries + %d slots "
                             "of %zu",
                             (unsigned long long)budget->bytes, least_bytes, needs->dense_bytes,
                             needs->workspace_bytes, needs->predictor_bytes, needs->driver_bytes,
                             least_slots, needs->slot_bytes);
        count = (int64_t)((budget->bytes - taken) / needs->slot_bytes);
        break;
    }
    if (count > needs->experts) count = needs->experts;
    /* A model of one expert has room for it twice. */
    if (count < least_slots) count = least_slots;
    *slots = (int32_t)count;
    *cap_bytes = budget->kind == SIDA_BUDGET_BYTES ? (size_t)budget->bytes
                                                   : fixed + (size_t)count * needs->slot_bytes;
    return SIDA_OK;
}
