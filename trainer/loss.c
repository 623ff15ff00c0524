#include "trainer/loss.h"

#include "formats/dtype.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* The first name of a kind is the one that files hold. */
static const struct {
    const char *name;
    sida_tkd tkd;
} names[] = {{"rest", SIDA_TKD_REST},       {"l1-renorm", SIDA_TKD_L1_RENORM},
             {"kl-top", SIDA_TKD_KL_TOP},   {"l1-all", SIDA_TKD_L1_ALL},
             {"mse-top", SIDA_TKD_MSE_TOP}, {"mse-all", SIDA_TKD_MSE_ALL},
             {"kl-all", SIDA_TKD_REST},     {"l1-top", SIDA_TKD_L1_RENORM}};
enum { name_count = sizeof names / sizeof *names };

const char sida_tkd_names[] = "rest (or kl-all), kl-top, l1-renorm (or l1-top), l1-all, mse-top "
                              "or mse-all";

const char *sida_tkd_name(sida_tkd tkd) {
    int i = 0;
    while (names[i].tkd != tkd) i++;
    return names[i].name;
}

bool sida_tkd_from_name(sida_tkd *out, const char *name) {
    for (int i = 0; i < name_count; i++)
        if (strcmp(names[i].name, name) == 0) {
            *out = names[i].tkd;
            return true;
        }
    return false;
}

/* A thread's scratch: of the top, teacher's and student's shares [top]; the student's softmax over
 * all [experts], and who is in the top. */
typedef struct scratch {
    float *teacher, *share, *student;
    uint8_t *inside;
} scratch;

/* One pair. */
typedef struct pair {
    const sida_loss_call *call;
    const float *z;
    const uint16_t *ids, *logp;
    float *d;
} pair;

/* softmax = exp(z - largest) / sum */
typedef struct norm {
    float largest, sum, log_sum;
} norm;

/* The softmax of z[ids[0 … n)], of z[0 … n) with NULL. */
static norm softmax(float *out, const float *z, const uint16_t *ids, int32_t n) {
    norm q = {.largest = -INFINITY};
    for (int32_t i = 0; i < n; i++) {
        float value = z[ids ? ids[i] : i];
        q.largest = value > q.largest ? value : q.largest;
    }
    for (int32_t i = 0; i < n; i++) q.sum += out[i] = expf(z[ids ? ids[i] : i] - q.largest);
    for (int32_t i = 0; i < n; i++) out[i] /= q.sum;
    q.log_sum = logf(q.sum);
    return q;
}

/* Of the student's experts outside the top, about their own largest: their mass may be tiny. */
static norm norm_outside(const pair *p, const uint8_t *inside) {
    norm q = {.largest = -INFINITY};
    for (int32_t e = 0; e < p->call->experts; e++)
        if (!inside[e] && p->z[e] > q.largest) q.largest = p->z[e];
    for (int32_t e = 0; e < p->call->experts; e++)
        if (!inside[e]) q.sum += expf(p->z[e] - q.largest);
    q.log_sum = logf(q.sum);
    return q;
}

/* The teacher's mass over its top T, at most 1 in all (fp16 rounds), and all of it when T is E.
 * What is left is returned. */
static float teach_all(float *teacher, const pair *p) {
    int32_t top = p->call->top;
    float sum = 0;
    for (int32_t i = 0; i < top; i++) sum += teacher[i] = expf(sida_f16_to_f32(p->logp[i]));
    if (sum > 1 || top == p->call->experts) {
        for (int32_t i = 0; i < top; i++) teacher[i] /= sum;
        return 0;
    }
    return 1 - sum;
}

static void teach_top(float *teacher, const pair *p) {
    int32_t top = p->call->top;
    float first = sida_f16_to_f32(p->logp[0]), sum = 0;
    for (int32_t i = 0; i < top; i++) sum += teacher[i] = expf(sida_f16_to_f32(p->logp[i]) - first);
    for (int32_t i = 0; i < top; i++) teacher[i] /= sum;
}

/* The distance of two shares and its derivative, a class's part of the mean over `classes`. */
static float slope(double *distance, bool square, float difference, int32_t classes) {
    *distance += square ? (double)difference * (double)difference : fabs((double)difference);
    if (square) return 2 * difference / (float)classes;
    return (float)((difference > 0) - (difference < 0)) / (float)classes;
}

/* TKD; d becomes its gradient. `all`: of s->student. */
static double distil(const pair *p, const scratch *s, norm all) {
    const int32_t experts = p->call->experts, top = p->call->top;
    const sida_tkd tkd = p->call->tkd;
    const bool over_top =
        tkd == SIDA_TKD_KL_TOP || tkd == SIDA_TKD_L1_RENORM || tkd == SIDA_TKD_MSE_TOP;
    const bool kl = tkd == SIDA_TKD_REST || tkd == SIDA_TKD_KL_TOP;
    const bool square = tkd == SIDA_TKD_MSE_TOP || tkd == SIDA_TKD_MSE_ALL;
    const bool has_rest = !over_top && top < experts;
    norm over = all, outside = {0};
    float rest = 0, log_rest = 0, mean = 0, rest_slope = 0; /* rest: the teacher's */
    double loss = 0;

    for (int32_t i = 0; i < top; i++) s->inside[p->ids[i]] = 1;
    if (over_top) {
        teach_top(s->teacher, p);
        over = softmax(s->share, p->z, p->ids, top);
    } else {
        rest = teach_all(s->teacher, p);
        for (int32_t i = 0; i < top; i++) s->share[i] = s->student[p->ids[i]];
    }
    if (has_rest) {
        outside = norm_outside(p, s->inside);
        log_rest = outside.largest - all.largest + outside.log_sum - all.log_sum;
    }

    if (kl) {
        for (int32_t i = 0; i < top; i++)
            loss -= (double)s->teacher[i] * (double)(p->z[p->ids[i]] - over.largest - over.log_sum);
        if (has_rest) loss -= (double)rest * (double)log_rest;
        for (int32_t i = 0; i < top; i++) p->d[p->ids[i]] = s->share[i] - s->teacher[i];
    } else {
        const int32_t classes = top + has_rest;
        for (int32_t i = 0; i < top; i++) {
            s->teacher[i] = slope(&loss, square, s->share[i] - s->teacher[i], classes);
            mean += s->share[i] * s->teacher[i];
        }
        if (has_rest) {
            rest_slope = slope(&loss, square, expf(log_rest) - rest, classes);
            mean += expf(log_rest) * rest_slope;
        }
        loss /= classes;
        for (int32_t i = 0; i < top; i++) p->d[p->ids[i]] = s->share[i] * (s->teacher[i] - mean);
    }
    for (int32_t e = 0; e < experts; e++) {
        if (s->inside[e]) continue;
        if (over_top)
            p->d[e] = 0;
        else if (kl)
            p->d[e] = s->student[e] - rest * (expf(p->z[e] - outside.largest) / outside.sum);
        else
            p->d[e] = s->student[e] * (rest_slope - mean);
    }
    for (int32_t i = 0; i < top; i++) s->inside[p->ids[i]] = 0;
    return loss;
}

static double loss_pair(int64_t i, const sida_loss_call *q, const scratch *s) {
    static const float one = 1;
    const pair p = {q, q->logits + i * q->experts, q->top_ids + i * q->top,
                    q->top_logp + i * q->top, q->d_logits + i * q->experts};
    int32_t count = q->labels ? q->label_count : 1;
    const uint16_t *labels = q->labels ? q->labels + i * count : p.ids;
    const float *weights = q->labels ? q->label_weights + i * count : &one;
    norm all = softmax(s->student, p.z, NULL, q->experts);
    double loss = distil(&p, s, all);
    for (int32_t e = 0; e < q->experts; e++) p.d[e] += q->lambda * s->student[e];
    for (int32_t j = 0; j < count; j++) {
        float lambda = q->lambda * weights[j];
        loss -= (double)lambda * (double)(p.z[labels[j]] - all.largest - all.log_sum);
        p.d[labels[j]] -= lambda;
    }
    for (int32_t e = 0; e < q->experts; e++) p.d[e] *= q->scale;
    return loss;
}

sida_status sida_loss(double *sum, const sida_loss_call *call) {
    size_t experts = (size_t)call->experts, top = (size_t)call->top;
    bool failed = false;
#pragma omp parallel if (call->pairs * call->experts > 1 << 14)
    {
        scratch s = {malloc(top * sizeof(float)), malloc(top * sizeof(float)),
                     malloc(experts * sizeof(float)), calloc(experts, 1)};
        bool good = s.teacher && s.share && s.student && s.inside;
        if (!good) {
#pragma omp atomic write
            failed = true;
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < call->pairs; i++)
            if (good) call->losses[i] = loss_pair(i, call, &s);
        free(s.teacher);
        free(s.share);
        free(s.student);
        free(s.inside);
    }
    if (failed)
        return sida_fail(SIDA_ERROR_MEMORY, "no memory for the loss of %d experts", call->experts);
    *sum = 0;
    for (int64_t i = 0; i < call->pairs; i++) *sum += call->losses[i];
    return SIDA_OK;
}
