#include "trainer/checkpoint.h"

#include "formats/base/memory.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const sida_curve_names[SIDA_CURVE_COLUMNS] = {
    "loss", "hit@1", "hit@3", "hit@5", "set_recall", "set_precision", "alpha_error"};

sida_status sida_train_state_create(sida_train_state *out, const sida_net_config *config,
                                    double weight_decay, int32_t epochs) {
    *out = (sida_train_state){0};
    sida_status status = SIDA_OK;
    SIDA_TRY(sida_net_create(&out->net, config));
    SIDA_TRY(sida_adamw_create(&out->optimiser, out->net->parameter_count, weight_decay));
    SIDA_TRY(SIDA_ALLOC(&out->best, out->net->parameter_count, "the best parameters"));
    SIDA_TRY(SIDA_ALLOC(&out->curve, (size_t)epochs * SIDA_CURVE_COLUMNS, "the training curve"));
out:
    if (status != SIDA_OK) sida_train_state_free(out);
    return status;
}

void sida_train_state_free(sida_train_state *state) {
    sida_net_destroy(state->net);
    sida_adamw_free(&state->optimiser);
    free(state->best);
    free(state->curve);
    *state = (sida_train_state){0};
}

static sida_status write_curve(sida_h5_file *file, const sida_train_state *state) {
    sida_status status = SIDA_OK;
    float *column = NULL;
    int64_t rows = state->epoch;
    if (rows == 0) return SIDA_OK;
    SIDA_TRY(SIDA_ALLOC(&column, rows, "the training curve"));
    for (int c = 0; c < SIDA_CURVE_COLUMNS; c++) {
        char path[40];
        snprintf(path, sizeof path, "curve/%s", sida_curve_names[c]);
        for (int64_t i = 0; i < rows; i++) column[i] = state->curve[i * SIDA_CURVE_COLUMNS + c];
        SIDA_TRY(sida_h5_write(file, path, SIDA_H5_F32, 1, &rows, column));
    }
out:
    free(column);
    return status;
}

static sida_status read_curve(sida_h5_file *file, sida_train_state *state) {
    sida_status status = SIDA_OK;
    float *column = NULL;
    int64_t rows = state->epoch;
    if (rows == 0) return SIDA_OK;
    SIDA_TRY(SIDA_ALLOC(&column, rows, "the training curve"));
    for (int c = 0; c < SIDA_CURVE_COLUMNS; c++) {
        char path[40];
        int64_t shape[3] = {0};
        snprintf(path, sizeof path, "curve/%s", sida_curve_names[c]);
        SIDA_TRY(sida_h5_shape(file, path, SIDA_H5_F32, 1, shape));
        if (shape[0] != rows)
            SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: %s does not have a row an epoch", sida_h5_path(file),
                      path);
        SIDA_TRY(sida_h5_read_rows(file, path, SIDA_H5_F32, 0, rows, column));
        for (int64_t i = 0; i < rows; i++) state->curve[i * SIDA_CURVE_COLUMNS + c] = column[i];
    }
out:
    free(column);
    return status;
}

static sida_status set_f64(sida_h5_file *file, const char *name, double value) {
    char text[40];
    snprintf(text, sizeof text, "%a", value); /* every bit */
    return sida_h5_set_text(file, name, text);
}

static sida_status get_f64(sida_h5_file *file, const char *name, double *value) {
    char *text = NULL, *end = NULL;
    sida_status status = sida_h5_get_text(file, name, &text);
    if (status != SIDA_OK) return status;
    *value = strtod(text, &end);
    if (end == text || *end || !isfinite(*value))
        status = sida_fail(SIDA_ERROR_FORMAT, "%s: attribute %s is not a number",
                           sida_h5_path(file), name);
    free(text);
    return status;
}

sida_status sida_checkpoint_write(const char *path, const sida_predictor_meta *meta,
                                  const sida_train_state *state) {
    sida_status status = SIDA_OK;
    sida_h5_file *file = NULL;
    int64_t count = state->net->parameter_count;
    SIDA_TRY(sida_predictor_file_create(&file, path, SIDA_H5_CHECKPOINT, meta));
    SIDA_TRY(sida_net_write(file, state->net));
    SIDA_TRY(sida_h5_write(file, "adamw/first", SIDA_H5_F32, 1, &count, state->optimiser.first));
    SIDA_TRY(sida_h5_write(file, "adamw/second", SIDA_H5_F32, 1, &count, state->optimiser.second));
    SIDA_TRY(sida_h5_write(file, "best", SIDA_H5_F32, 1, &count, state->best));
    SIDA_TRY(write_curve(file, state));
    SIDA_TRY(sida_h5_set_i64(file, "step", state->optimiser.step));
    SIDA_TRY(sida_h5_set_i64(file, "epoch", state->epoch));
    SIDA_TRY(sida_h5_set_i64(file, "batch", state->batch));
    SIDA_TRY(sida_h5_set_i64(file, "loss_pairs", state->loss_pairs));
    SIDA_TRY(sida_h5_set_i64(file, "best_epoch", state->best_epoch));
    SIDA_TRY(set_f64(file, "loss_sum", state->loss_sum));
    SIDA_TRY(set_f64(file, "best_hit", state->best_hit));
    status = sida_h5_commit(file);
    file = NULL;
out:
    sida_h5_abandon(file);
    return status;
}

/* A JSON value in a few words. */
static void describe(char *text, size_t size, const json_t *value) {
    char *dump =
        value ? json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(6)) : NULL;
    snprintf(text, size, "%s", dump ? dump : "the default"); /* what is left out */
    free(dump);
}

static sida_status differs(const char *path, const char *name, const json_t *old,
                           const json_t *now) {
    char was[80], is[80];
    describe(was, sizeof was, old);
    describe(is, sizeof is, now);
    return sida_fail(SIDA_ERROR_MISMATCH,
                     "%s: of a training with %s %s, not %s; remove it or give the same options",
                     path, name, was, is);
}

static void join(char name[96], const char *prefix, const char *key) {
    snprintf(name, 96, "%s%s%s", prefix, *prefix ? "." : "", key);
}

/* The first leaf that differs, "training.lr"; at last those that only the old one has. */
static sida_status compare(const char *path, const char *prefix, const json_t *old,
                           const json_t *now) {
    const char *key;
    json_t *value;
    char name[96];
    json_object_foreach((json_t *)now, key, value) {
        const json_t *other = json_object_get(old, key);
        if (other && json_equal(other, value)) continue;
        join(name, prefix, key);
        if (json_is_object(value) && json_is_object(other)) {
            sida_status status = compare(path, name, other, value);
            if (status != SIDA_OK) return status;
        }
        return differs(path, name, other, value);
    }
    json_object_foreach((json_t *)old, key, value) {
        if (json_object_get(now, key)) continue;
        join(name, prefix, key);
        return differs(path, name, value, NULL);
    }
    return SIDA_OK;
}

/* Sums come out a little differently on another device, so that a training continues on its own. */
static sida_status check_device(const char *path, const json_t *old, const json_t *now) {
    const json_t *was = json_object_get(json_object_get(old, "training"), "device");
    const json_t *is = json_object_get(json_object_get(now, "training"), "device");
    const char *theirs = json_is_string(was) ? json_string_value(was) : "cpu";
    const char *ours = json_is_string(is) ? json_string_value(is) : "cpu";
    if (strcmp(theirs, ours) == 0) return SIDA_OK;
    return sida_fail(SIDA_ERROR_MISMATCH,
                     "%s: of a training on %.20s, which would not go on the same on %s; remove it "
                     "or give --device %.20s",
                     path, theirs, ours, theirs);
}

static sida_status read_vector(sida_h5_file *file, const char *name, int64_t count, float *out) {
    int64_t shape[3] = {0};
    sida_status status = sida_h5_shape(file, name, SIDA_H5_F32, 1, shape);
    if (status != SIDA_OK) return status;
    if (shape[0] != count)
        return sida_fail(SIDA_ERROR_FORMAT, "%s: %s has %" PRId64 " values, not %" PRId64,
                         sida_h5_path(file), name, shape[0], count);
    return sida_h5_read_rows(file, name, SIDA_H5_F32, 0, count, out);
}

static sida_status get_i64(sida_h5_file *file, const char *name, int64_t low, int64_t high,
                           int64_t *value) {
    sida_status status = sida_h5_get_i64(file, name, value);
    if (status == SIDA_OK && (*value < low || *value > high))
        status = sida_fail(SIDA_ERROR_FORMAT, "%s: attribute %s of %" PRId64, sida_h5_path(file),
                           name, *value);
    return status;
}

sida_status sida_checkpoint_read(sida_train_state *state, const char *path,
                                 const sida_predictor_meta *meta, int32_t epochs) {
    sida_status status = SIDA_OK;
    sida_h5_file *file = NULL;
    sida_predictor_meta theirs = {0};
    sida_net *net = NULL;
    int64_t step, epoch, batch, pairs, best, count = state->net->parameter_count;
    SIDA_TRY(sida_predictor_file_open(&file, &theirs, path));
    if (sida_h5_file_kind(file) != SIDA_H5_CHECKPOINT)
        SIDA_FAIL(SIDA_ERROR_FORMAT, "%s: not a checkpoint", path);
    SIDA_TRY(check_device(path, theirs.config, meta->config));
    SIDA_TRY(compare(path, "", theirs.config, meta->config));
    SIDA_TRY(get_i64(file, "step", 0, INT64_MAX / 2, &step));
    SIDA_TRY(get_i64(file, "epoch", 0, epochs, &epoch));
    SIDA_TRY(get_i64(file, "batch", 0, INT32_MAX, &batch));
    SIDA_TRY(get_i64(file, "loss_pairs", 0, INT64_MAX / 2, &pairs));
    SIDA_TRY(get_i64(file, "best_epoch", 0, epoch, &best));
    SIDA_TRY(get_f64(file, "loss_sum", &state->loss_sum));
    SIDA_TRY(get_f64(file, "best_hit", &state->best_hit));
    SIDA_TRY(sida_net_read(&net, file, &state->net->config));
    SIDA_TRY(read_vector(file, "adamw/first", count, state->optimiser.first));
    SIDA_TRY(read_vector(file, "adamw/second", count, state->optimiser.second));
    SIDA_TRY(read_vector(file, "best", count, state->best));
    memcpy(state->net->parameters, net->parameters, (size_t)count * sizeof *net->parameters);
    state->optimiser.step = step;
    state->epoch = (int32_t)epoch;
    state->batch = (int32_t)batch;
    state->loss_pairs = pairs;
    state->best_epoch = (int32_t)best;
    SIDA_TRY(read_curve(file, state));
out:
    sida_net_destroy(net);
    sida_predictor_meta_free(&theirs);
    sida_h5_close(file);
    return status;
}

sida_status sida_predictor_write(const char *path, const sida_predictor_meta *meta,
                                 const sida_train_state *state, const sida_refine *refine) {
    sida_status status = SIDA_OK;
    sida_h5_file *file = NULL;
    sida_net *best = NULL;
    SIDA_TRY(sida_net_create(&best, &state->net->config));
    memcpy(best->parameters, state->best, (size_t)best->parameter_count * sizeof *state->best);
    SIDA_TRY(sida_predictor_file_create(&file, path, SIDA_H5_PREDICTOR, meta));
    SIDA_TRY(sida_net_write(file, best));
    if (refine) SIDA_TRY(sida_refine_write(file, refine));
    SIDA_TRY(write_curve(file, state));
    SIDA_TRY(sida_h5_set_i64(file, "epochs", state->epoch));
    SIDA_TRY(sida_h5_set_i64(file, "kept_epoch", state->best_epoch));
    SIDA_TRY(sida_h5_set_i64(file, "steps", state->optimiser.step));
    status = sida_h5_commit(file);
    file = NULL;
out:
    sida_h5_abandon(file);
    sida_net_destroy(best);
    return status;
}
