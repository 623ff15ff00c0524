/* One attention task: up to SIDA_ATTENTION_QUERIES queries of one sequence and head over its keys,
 * in blocks of keys with a running maximum (Milakov and Gimelshein 2018), so that the memory needed
 * does not grow with the sequence. Blocks start at key 0, so a row's order of sums is its own. */
#ifndef SIDA_RUNTIME_OPS_ATTENTION_KERNEL_H
#define SIDA_RUNTIME_OPS_ATTENTION_KERNEL_H

#include "runtime/ops/product_kernel.h"

#include <math.h>

enum { KEY_BLOCK = 256, MAX_D_KV = 256, VALUE_ROWS = 4 };

typedef struct attention_task {
    const float *v; /* the head's values of the current key block */
    int64_t ldv;
    int32_t keys; /* in the block */
    int32_t d_kv;
    float scores[SIDA_ATTENTION_QUERIES][KEY_BLOCK] __attribute__((aligned(64)));
    float sums[SIDA_ATTENTION_QUERIES][MAX_D_KV] __attribute__((aligned(64)));
    float high[SIDA_ATTENTION_QUERIES], total[SIDA_ATTENTION_QUERIES];
    int32_t visible[SIDA_ATTENTION_QUERIES]; /* keys of the block that a query sees */
} attention_task;

/* Scores of one query become exp(score - maximum); what it has summed so far is rescaled. */
SIDA_INLINE void attention_softmax(attention_task *task, int row, const float *bias) {
    float *s = task->scores[row];
    int32_t visible = task->visible[row], j = 0;
    int32_t padded = (visible + LANES - 1) / LANES * LANES;
    for (j = visible; j < padded; j++) s[j] = -INFINITY;
    vec highs = vec_set(task->high[row]);
    for (j = 0; j < padded; j += LANES) {
        vec score = vec_load(s + j);
        if (bias) {
            score = score + vec_load(bias + j);
            vec_store(s + j, score);
        }
        highs = vec_max(highs, score);
    }
    const float high = vec_largest(highs);
    vec sum = vec_set(0.0f);
    for (j = 0; j < padded; j += LANES) {
        vec p = vec_exp(vec_load(s + j) - vec_set(high));
        vec_store(s + j, p);
        sum = sum + p;
    }
    for (j = padded; j < task->keys; j++) s[j] = 0.0f;
    float shrink = vec_exp(vec_set(task->high[row] - high))[0];
    task->total[row] = task->total[row] * shrink + vec_sum(sum);
    if (task->high[row] != high && task->total[row] != 0.0f)
        for (int32_t d = 0; d < task->d_kv; d++) task->sums[row][d] *= shrink;
    task->high[row] = high;
}

/* sums[row + i] += Σ_j p[row + i][j] v[j], for `rows` queries and `wide` vectors of v. */
SIDA_INLINE void attention_values(attention_task *task, int row, int rows, int wide, int32_t d) {
    vec sum[VALUE_ROWS][4];
    const float *v = task->v + d;
    int32_t keys = 0;
    for (int i = 0; i < rows; i++)
        keys = task->visible[row + i] > keys ? task->visible[row + i] : keys;
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int w = 0; w < wide; w++) sum[i][w] = vec_load(&task->sums[row + i][d + w * LANES]);
    for (int32_t j = 0; j < keys; j++, v += task->ldv) {
        vec values[4];
#pragma GCC unroll 4
        for (int w = 0; w < wide; w++) values[w] = vec_load(v + w * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            vec p = vec_set(task->scores[row + i][j]);
#pragma GCC unroll 4
            for (int w = 0; w < wide; w++) sum[i][w] = vec_fma(p, values[w], sum[i][w]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int w = 0; w < wide; w++) vec_store(&task->sums[row + i][d + w * LANES], sum[i][w]);
}

static void attention_values_4x4(attention_task *task, int row, int32_t d) {
    attention_values(task, row, 4, LANES == 16 ? 4 : 2, d);
}
static void attention_values_1x4(attention_task *task, int row, int32_t d) {
    attention_values(task, row, 1, LANES == 16 ? 4 : 2, d);
}
static void attention_values_4x2(attention_task *task, int row, int32_t d) {
    attention_values(task, row, 4, 2, d);
}
static void attention_values_4x1(attention_task *task, int row, int32_t d) {
    attention_values(task, row, 4, 1, d);
}
static void attention_values_1x1(attention_task *task, int row, int32_t d) {
    attention_values(task, row, 1, 1, d);
}

/* The last d_kv % LANES elements of one query. */
static void attention_values_rest(attention_task *task, int row, int32_t d) {
    vec sum = vec_load_part(&task->sums[row][d], task->d_kv - d);
    for (int32_t j = 0; j < task->visible[row]; j++)
        sum = vec_fma(vec_set(task->scores[row][j]),
                      vec_load_part(task->v + j * task->ldv + d, task->d_kv - d), sum);
    memcpy(&task->sums[row][d], &sum, (size_t)(task->d_kv - d) * sizeof(float));
}

static void attention_all_values(attention_task *task, int count) {
    const int32_t wide = (LANES == 16 ? 4 : 2) * LANES;
    for (int row = 0; row < count;) {
        int rows = count - row >= VALUE_ROWS ? VALUE_ROWS : 1;
        int32_t d = 0;
        for (; d + wide <= task->d_kv; d += wide)
            (rows == 4 ? attention_values_4x4 : attention_values_1x4)(task, row, d);
        for (; rows == 4 && d + 2 * LANES <= task->d_kv; d += 2 * LANES)
            attention_values_4x2(task, row, d);
        for (; d + LANES <= task->d_kv; d += LANES)
            (rows == 4 ? attention_values_4x1 : attention_values_1x1)(task, row, d);
        if (d < task->d_kv)
            for (int i = 0; i < rows; i++) attention_values_rest(task, row + i, d);
        row += rows;
    }
}

/* bias[i] for relative positions low, low + 1, … */
static void attention_bias(float *bias, const sida_attention_call *call, const uint8_t *buckets,
                           int32_t head, int32_t low, int32_t count) {
    int32_t max = call->bias_max_distance;
    for (int32_t i = 0; i < count; i++) {
        int32_t r = low + i;
        r = r < -max ? -max : r > max ? max : r;
        bias[i] =
            weight_at(call->bias.data, buckets[r + max] * call->bias.cols + head, call->bias.dtype);
    }
}

static void kernel_attention(const sida_attention_call *call, const uint8_t *buckets,
                             int32_t sequence, int32_t head, int32_t first, int32_t count) {
    attention_task task;
    /* Room behind the last bias: the softmax reads whole vectors. */
    float bias[KEY_BLOCK + SIDA_ATTENTION_QUERIES + LANES];
    int64_t column = (int64_t)head * call->d_kv;
    int32_t position = first + (call->q_position ? call->q_position[sequence] : 0);
    int32_t keys = call->k_count[sequence];
    int64_t q_row = call->q_start[sequence] + first, k_row = call->k_start[sequence];
    if (call->causal && keys > position + count) keys = position + count;
    task.d_kv = call->d_kv;
    task.ldv = call->ldv;
    for (int i = 0; i < count; i++) {
        task.high[i] = -INFINITY;
        task.total[i] = 0.0f;
        memset(task.sums[i], 0, (size_t)call->d_kv * sizeof(float));
    }
    for (int32_t k = 0; k < keys; k += KEY_BLOCK) {
        task.keys = keys - k < KEY_BLOCK ? keys - k : KEY_BLOCK;
        task.v = call->v + (k_row + k) * call->ldv + column;
        sida_product scores = {.y = task.scores[0],
                               .ldy = KEY_BLOCK,
                               .x = call->q + q_row * call->ldq + column,
                               .ldx = call->ldq,
                               .w = call->k + (k_row + k) * call->ldk + column,
                               .ldw = call->ldk,
                               .n = count,
                               .rows = task.keys,
                               .cols = call->d_kv,
                               .scale = 1.0f};
        kernel_product(&scores, 0, count, 0, task.keys);
        if (buckets) {
            int32_t low = k - (position + count - 1), length = task.keys + count - 1;
            attention_bias(bias, call, buckets, head, low, length);
            memset(bias + length, 0, LANES * sizeof(float));
        }
        for (int i = 0; i < count; i++) {
            int32_t visible = task.keys;
            if (call->causal && visible > position + i + 1 - k) visible = position + i + 1 - k;
            task.visible[i] = visible > 0 ? visible : 0;
            if (visible > 0)
                attention_softmax(&task, i, buckets ? bias + (count - 1 - i) : NULL);
            else
                memset(task.scores[i], 0, (size_t)task.keys * sizeof(float));
        }
        attention_all_values(&task, count);
    }
    for (int i = 0; i < count; i++) {
        float *out = (float *)call->out + (q_row + i) * call->ldo + column;
        float total = task.total[i];
        for (int32_t d = 0; d < call->d_kv; d++) out[d] = keys > 0 ? task.sums[i][d] / total : 0.0f;
    }
}

#endif
