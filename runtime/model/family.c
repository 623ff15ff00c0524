#include "runtime/model/family.h"

#include <stdlib.h>
#include <string.h>

static const sida_family *const families[] = {&sida_family_switch_transformers};

const sida_family *sida_family_find(const char *model_type) {
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        if (strcmp(families[i]->model_type, model_type) == 0) return families[i];
    return NULL;
}

const char *sida_family_names(void) {
    return "switch_transformers";
}

void sida_family_config_free(sida_family_config *config) {
    free(config->sparse[0]);
    free(config->sparse[1]);
    config->sparse[0] = config->sparse[1] = NULL;
}

sida_status sida_config_i32(int32_t *out, const json_t *config, const char *path, const char *field,
                            int32_t low, int32_t high, int32_t fallback) {
    const json_t *value = json_object_get(config, field);
    *out = fallback;
    if (!value) {
        if (fallback >= low) return SIDA_OK;
        return sida_fail(SIDA_ERROR_FORMAT, "%s: %s is missing", path, field);
    }
    if (!json_is_integer(value))
        return sida_fail(SIDA_ERROR_FORMAT, "%s: %s is not a whole number", path, field);
    json_int_t number = json_integer_value(value);
    if (number < low || number > high)
        return sida_fail(SIDA_ERROR_FORMAT, "%s: %s is %lld, outside %d … %d", path, field,
                         (long long)number, low, high);
    *out = (int32_t)number;
    return SIDA_OK;
}

sida_status sida_config_f64(double *out, const json_t *config, const char *path, const char *field,
                            double low, double high, double fallback) {
    const json_t *value = json_object_get(config, field);
    *out = fallback;
    if (!value) return SIDA_OK;
    if (!json_is_number(value))
        return sida_fail(SIDA_ERROR_FORMAT, "%s: %s is not a number", path, field);
    double number = json_number_value(value);
    if (!(number >= low && number <= high))
        return sida_fail(SIDA_ERROR_FORMAT, "%s: %s is %g, outside %g … %g", path, field, number,
                         low, high);
    *out = number;
    return SIDA_OK;
}

sida_status sida_config_bool(bool *out, const json_t *config, const char *path, const char *field,
                             bool fallback) {
    const json_t *value = json_object_get(config, field);
    *out = fallback;
    if (!value) return SIDA_OK;
    if (!json_is_boolean(value))
        return sida_fail(SIDA_ERROR_FORMAT, "%s: %s is neither true nor false", path, field);
    *out = json_is_true(value);
    return SIDA_OK;
}

sida_status sida_config_text(const char **out, const json_t *config, const char *path,
                             const char *field, const char *fallback) {
    const json_t *value = json_object_get(config, field);
    *out = fallback;
    if (!value || json_is_null(value)) return SIDA_OK;
    if (!json_is_string(value))
        return sida_fail(SIDA_ERROR_FORMAT, "%s: %s is not a text", path, field);
    *out = json_string_value(value);
    return SIDA_OK;
}
