/* The contracts of runtime/ops/transformer_train.h, by the formula in double precision, on host
 * pointers: one query after the other. */
#ifndef SIDA_TESTS_ATTENTION_REFERENCE_H
#define SIDA_TESTS_ATTENTION_REFERENCE_H

#include "runtime/ops/attention.h"
#include "runtime/ops/transformer_train.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static inline void reference_norm_backward(const sida_norm_train_call *c) {
    double *d_weight = calloc((size_t)c->width, sizeof *d_weight);
    for (int64_t i = 0; i < c->n; i++) {
        const float *x = c->x + i * c->width, *d_y = c->d_y + i * c->width;
        double squares = 0, mean = 0;
        for (int64_t k = 0; k < c->width; k++) squares += (double)x[k] * (double)x[k];
        double r = 1 / sqrt(squares / (double)c->width + (double)c->epsilon);
        for (int64_t k = 0; k < c->width; k++) {
            mean += (double)c->weight[k] * (double)d_y[k] * (double)x[k] / (double)c->width;
            d_weight[k] += (double)d_y[k] * (double)x[k] * r;
        }
        for (int64_t k = 0; c->d_x && k < c->width; k++)
            c->d_x[i * c->width + k] +=
                (float)(r * ((double)c->weight[k] * (double)d_y[k] - r * r * (double)x[k] * mean));
    }
    for (int64_t k = 0; k < c->width; k++) c->d_weight[k] += (float)d_weight[k];
    free(d_weight);
}

/* Forward, or backward where d_out is not NULL. */
static inline void reference_attention(float *d_queries, float *d_key_value, float *d_positions,
                                       const float *d_out, const sida_attention_train_call *c) {
    enum { WIDTH = SIDA_ATTENTION_TRAIN_WIDTH, BUCKETS = SIDA_ATTENTION_TRAIN_BUCKETS };
    const double scale = 1 / sqrt((double)WIDTH);
    const int64_t width = (int64_t)c->heads * WIDTH;
    double *p = calloc((size_t)c->k.longest + 1, sizeof *p),
           *d_p = calloc((size_t)c->k.longest + 1, sizeof *d_p);
    double *d_kv = calloc((size_t)(c->k.longest * 2 * WIDTH) + 1, sizeof *d_kv);
    double *d_table = calloc((size_t)(BUCKETS * c->heads), sizeof *d_table);
    for (int32_t s = 0; s < c->sequences; s++)
        for (int32_t h = 0; h < c->heads; h++) {
            memset(d_kv, 0, (size_t)(c->k.longest * 2 * WIDTH) * sizeof *d_kv);
            for (int32_t i = 0; i < c->q.count[s]; i++) {
                const int64_t at = (int64_t)(c->q.start[s] + c->q.step[i]) * width + h * WIDTH;
                const float *query = c->queries + at;
                int32_t keys = c->k.count[s];
                double top = -INFINITY, sum = 0, mean = 0, out[WIDTH] = {0}, d_q[WIDTH] = {0};
                if (c->causal && keys > i + 1) keys = i + 1;
                for (int32_t j = 0; j < keys; j++) {
                    const float *key = c->key_value + h * WIDTH +
                                       (int64_t)(c->k.start[s] + c->k.step[j]) * 2 * width;
                    p[j] = 0;
                    for (int x = 0; x < WIDTH; x++) p[j] += (double)query[x] * (double)key[x];
                    p[j] *= scale;
                    if (c->positions)
                        p[j] +=
                            (double)
                                c->positions[sida_relative_bucket(j - i, !c->causal, BUCKETS,
                                                                  SIDA_ATTENTION_TRAIN_DISTANCE) *
                                                 c->heads +
                                             h];
                    if (p[j] > top) top = p[j];
                }
                for (int32_t j = 0; j < keys; j++) sum += p[j] = exp(p[j] - top);
                for (int32_t j = 0; j < keys; j++) {
                    const float *value = c->key_value + width + h * WIDTH +
                                         (int64_t)(c->k.start[s] + c->k.step[j]) * 2 * width;
                    p[j] /= sum;
                    d_p[j] = 0;
                    for (int x = 0; x < WIDTH; x++) {
                        out[x] += p[j] * (double)value[x];
                        if (d_out) d_p[j] += (double)d_out[at + x] * (double)value[x];
                    }
                    mean += p[j] * d_p[j];
                }
                for (int32_t j = 0; d_out && j < keys; j++) {
                    const float *key = c->key_value + h * WIDTH +
                                       (int64_t)(c->k.start[s] + c->k.step[j]) * 2 * width;
                    const double d = p[j] * (d_p[j] - mean);
                    if (c->positions)
                        d_table[sida_relative_bucket(j - i, !c->causal, BUCKETS,
                                                     SIDA_ATTENTION_TRAIN_DISTANCE) *
                                    c->heads +
                                h] += d;
                    for (int x = 0; x < WIDTH; x++) {
                        d_q[x] += d * scale * (double)key[x];
                        d_kv[(2 * j) * WIDTH + x] += d * scale * (double)query[x];
                        d_kv[(2 * j + 1) * WIDTH + x] += p[j] * (double)d_out[at + x];
                    }
                }
                for (int x = 0; x < WIDTH; x++) {
                    if (d_out)
                        d_queries[at + x] = (float)d_q[x]; /* may be d_out, which has been read */
                    else
                        c->out[at + x] = (float)out[x];
                }
            }
            for (int32_t j = 0; d_out && j < c->k.count[s]; j++)
                for (int x = 0; x < 2 * WIDTH; x++)
                    d_key_value[(int64_t)(c->k.start[s] + c->k.step[j]) * 2 * width +
                                (x / WIDTH) * width + h * WIDTH + x % WIDTH] =
                        (float)d_kv[2 * j * WIDTH + x];
        }
    for (int32_t i = 0; d_out && c->positions && i < BUCKETS * c->heads; i++)
        d_positions[i] += (float)d_table[i];
    free(p);
    free(d_p);
    free(d_kv);
    free(d_table);
}

#endif
