#include "trainer/loss.h"

#include "formats/dtype.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

const char *sida_tkd_name(sida_tkd tkd) {
    return tkd == SIDA_TKD_REST ? "rest" : "l1-renorm";
}

/* A thread's scratch: teacher probabilities [top], student's [experts], who is in the top. */
typedef struct scratch {
    float *teacher, *student;
    uint8_t *inside;
} scratch;

/* Softmax over all experts into s->student; returns the log of the sum and the largest logit. */
static float softmax_all(float *student, const float *z, int32_t experts, float *largest) {
    float top = z[0], sum = 0;
    for (int32_t e = 1; e < experts; e++) top = z[e] > top ? z[e] : top;
    for (int32_t e = 0; e < experts; e++) sum += student[e] = expf(z[e] - top);
    for (int32_t e = 0; e < experts; e++) student[e] /= sum;
    *largest = top;
    return logf(sum);
}

/* The teacher's mass over its top T, at most 1 in all (fp16 rounds), and all of it when T is E. */
static float teacher_rest(float *teacher, const uint16_t *logp, int32_t top, int32_t experts) {
    float sum = 0;
    for (int32_t i = 0; i < top; i++) sum += teacher[i] = expf(sida_f16_to_f32(logp[i]));
    if (sum > 1 || top == experts) {
        for (int32_t i = 0; i < top; i++) teacher[i] /= sum;
        return 0;
    }
    return 1 - sum;
}

static double loss_rest(float *d, const float *z, const uint16_t *ids, const uint16_t *logp,
                        const sida_loss_call *q, const scratch *s, float log_sum, float largest) {
    int32_t experts = q->experts, top = q->top;
    float rest = teacher_rest(s->teacher, logp, top, experts);
    double loss = 0;
    for (int32_t i = 0; i < top; i++)
        loss -= (double)s->teacher[i] * (double)(z[ids[i]] - largest - log_sum);
    if (top < experts) {
        /* The student's mass outside the top, about its own largest: it may be tiny. */
        float outside = -INFINITY, sum = 0;
        for (int32_t i = 0; i < top; i++) s->inside[ids[i]] = 1;
        for (int32_t e = 0; e < experts; e++)
            if (!s->inside[e] && z[e] > outside) outside = z[e];
        for (int32_t e = 0; e < experts; e++)
            if (!s->inside[e]) sum += expf(z[e] - outside);
        loss -= (double)rest * (double)(outside - largest + logf(sum) - log_sum);
        for (int32_t e = 0; e < experts; e++)
            if (!s->inside[e]) d[e] = s->student[e] - rest * (expf(z[e] - outside) / sum);
        for (int32_t i = 0; i < top; i++) s->inside[ids[i]] = 0;
    }
    for (int32_t i = 0; i < top; i++) d[ids[i]] = s->student[ids[i]] - s->teacher[i];
    return loss;
}

static double loss_l1(float *d, const float *z, const uint16_t *ids, const uint16_t *logp,
                      const sida_loss_call *q, const scratch *s) {
    int32_t top = q->top;
    float largest = z[ids[0]], first = sida_f16_to_f32(logp[0]), sum = 0, teacher_sum = 0, mean = 0;
    for (int32_t e = 0; e < q->experts; e++) d[e] = 0;
    for (int32_t i = 1; i < top; i++) largest = z[ids[i]] > largest ? z[ids[i]] : largest;
    for (int32_t i = 0; i < top; i++) {
        sum += d[ids[i]] = expf(z[ids[i]] - largest);
        teacher_sum += s->teacher[i] = expf(sida_f16_to_f32(logp[i]) - first);
    }
    double loss = 0;
    for (int32_t i = 0; i < top; i++) {
        float p = d[ids[i]] /= sum, difference = p - s->teacher[i] / teacher_sum;
        loss += fabs((double)difference);
        s->teacher[i] = (float)((difference > 0) - (difference < 0)) / (float)top;
        mean += p * s->teacher[i];
    }
    for (int32_t i = 0; i < top; i++) d[ids[i]] *= s->teacher[i] - mean;
    return loss / top;
}

static double loss_pair(int64_t i, const sida_loss_call *q, const scratch *s) {
    static const float one = 1;
    float *d = q->d_logits + i * q->experts;
    const float *z = q->logits + i * q->experts;
    const uint16_t *ids = q->top_ids + i * q->top, *logp = q->top_logp + i * q->top;
    int32_t count = q->labels ? q->label_count : 1;
    const uint16_t *labels = q->labels ? q->labels + i * count : ids;
    const float *weights = q->labels ? q->label_weights + i * count : &one;
    float largest, log_sum = softmax_all(s->student, z, q->experts, &largest);
    double loss = q->tkd == SIDA_TKD_REST ? loss_rest(d, z, ids, logp, q, s, log_sum, largest)
                                          : loss_l1(d, z, ids, logp, q, s);
    for (int32_t e = 0; e < q->experts; e++) d[e] += q->lambda * s->student[e];
    for (int32_t j = 0; j < count; j++) {
        float lambda = q->lambda * weights[j];
        loss -= (double)lambda * (double)(z[labels[j]] - largest - log_sum);
        d[labels[j]] -= lambda;
    }
    for (int32_t e = 0; e < q->experts; e++) d[e] *= q->scale;
    return loss;
}

sida_status sida_loss(double *sum, const sida_loss_call *call) {
    size_t experts = (size_t)call->experts, top = (size_t)call->top;
    bool failed = false;
#pragma omp parallel if (call->pairs * call->experts > 1 << 14)
    {
        scratch s = {malloc(top * sizeof(float)), malloc(experts * sizeof(float)),
                     calloc(experts, 1)};
        bool good = s.teacher && s.student && s.inside;
        if (!good) {
#pragma omp atomic write
            failed = true;
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < call->pairs; i++)
            if (good) call->losses[i] = loss_pair(i, call, &s);
        free(s.teacher);
        free(s.student);
        free(s.inside);
    }
    if (failed)
        return sida_fail(SIDA_ERROR_MEMORY, "no memory for the loss of %d experts", call->experts);
    *sum = 0;
    for (int64_t i = 0; i < call->pairs; i++) *sum += call->losses[i];
    return SIDA_OK;
}
