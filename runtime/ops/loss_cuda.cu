/* The loss of training and its gradient in one pass: a warp takes a pair, a lane every 32nd expert
 * and every 32nd of the teacher's best. The formulas are those at
 * sida_tkd, and trainer/loss.c's. */
#include "runtime/ops/kernels_cuda.cuh"

#include <assert.h>

extern "C" {
#include "runtime/ops/train_ops.h"
}

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int MOST_WARPS = 8;

/* What a pair's lanes share. Experts of the teacher's top are marked in a row of bits. */
struct pair_view {
    const float *z, *bias;
    float *d; /* may be z: a lane writes an item only after the last read of it */
    const uint16_t *ids, *logp;
    const uint16_t *labels; /* NULL: the first of ids */
    const float *weights;
    uint32_t *inside;
};

static __device__ float teacher_log(const pair_view &p, int32_t i) {
    return __half2float(__ushort_as_half(p.logp[i]));
}
static __device__ float logit(const pair_view &p, int32_t e) {
    return p.z[e] + (p.bias ? p.bias[e] : 0.0f);
}
static __device__ bool inside(const pair_view &p, int32_t e) {
    return p.inside[e / WARP] >> (e % WARP) & 1;
}

/* A lane's logits: in registers if KEPT * 32 experts are enough, else read again every time. */
template <int KEPT> struct lane_logits {
    float kept[KEPT > 0 ? KEPT : 1];
    __device__ void load(const pair_view &p, int lane, int32_t experts) {
        if (KEPT > 0)
#pragma unroll
            for (int k = 0; k < KEPT; k++)
                kept[k] = lane + k * WARP < experts ? logit(p, lane + k * WARP) : -INFINITY;
    }
    /* visit(e, z) for the lane's experts. */
    template <typename Visit>
    __device__ void each(const pair_view &p, int lane, int32_t experts, Visit visit) const {
        if (KEPT > 0) {
#pragma unroll
            for (int k = 0; k < KEPT; k++)
                if (lane + k * WARP < experts) visit(lane + k * WARP, kept[k]);
        } else {
            for (int32_t e = lane; e < experts; e += WARP) visit(e, logit(p, e));
        }
    }
};

/* The distance of two shares, and its derivative as a part of a mean over `classes`. */
static __device__ double distance(bool square, float difference) {
    return square ? (double)difference * (double)difference : (double)fabsf(difference);
}
static __device__ float slope(bool square, float difference, int32_t classes) {
    if (square) return 2.0f * difference / (float)classes;
    return (float)((difference > 0.0f) - (difference < 0.0f)) / (float)classes;
}

/* The lane's part of the pair's loss; its part of the gradient into p.d. */
template <int KEPT>
static __device__ double pair_loss(const sida_loss_cuda_call &call, const pair_view &p, int lane) {
    const int32_t experts = call.experts, top = call.top;
    const float lambda = call.lambda, scale = call.scale;
    const sida_tkd tkd = call.tkd;
    const bool over_top =
        tkd == SIDA_TKD_KL_TOP || tkd == SIDA_TKD_L1_RENORM || tkd == SIDA_TKD_MSE_TOP;
    const bool kl = tkd == SIDA_TKD_REST || tkd == SIDA_TKD_KL_TOP;
    const bool square = tkd == SIDA_TKD_MSE_TOP || tkd == SIDA_TKD_MSE_ALL;
    const bool has_rest = !over_top && top < experts;
    lane_logits<KEPT> z;
    z.load(p, lane, experts);
    float largest = -INFINITY, sum = 0.0f;
    z.each(p, lane, experts, [&](int32_t, float v) { largest = fmaxf(largest, v); });
    largest = warp_max(largest);
    z.each(p, lane, experts, [&](int32_t, float v) { sum += expf(v - largest); });
    sum = warp_sum(sum);
    const float log_sum = logf(sum);
    double loss = 0;
    if (!p.labels && lane == 0)
        loss = -(double)lambda * (double)(logit(p, p.ids[0]) - largest - log_sum);
    for (int32_t j = lane; p.labels && j < call.label_count; j += WARP)
        loss -=
            (double)(lambda * p.weights[j]) * (double)(logit(p, p.labels[j]) - largest - log_sum);

    /* Shares of the top: the student's exp(z - most) / share_sum, the teacher's. */
    float most = largest, share_sum = sum, share_log = log_sum;
    float first = 0.0f, teacher_sum = 0.0f, rest = 0.0f;
    if (over_top) {
        first = teacher_log(p, 0);
        most = -INFINITY;
        share_sum = 0.0f;
        for (int32_t i = lane; i < top; i += WARP) most = fmaxf(most, logit(p, p.ids[i]));
        most = warp_max(most);
        for (int32_t i = lane; i < top; i += WARP) share_sum += expf(logit(p, p.ids[i]) - most);
        share_sum = warp_sum(share_sum);
        share_log = logf(share_sum);
    }
    for (int32_t i = lane; i < top; i += WARP) teacher_sum += expf(teacher_log(p, i) - first);
    teacher_sum = warp_sum(teacher_sum);
    /* Over all: its mass is at most 1 (fp16 rounds), and all of it is here when T is E. */
    if (has_rest && !(teacher_sum > 1.0f)) {
        rest = 1.0f - teacher_sum;
        teacher_sum = 1.0f;
    }
    const auto share_of = [&](float v) { return expf(v - most) / share_sum; };
    const auto teacher_of = [&](int32_t i) {
        return expf(teacher_log(p, i) - first) / teacher_sum;
    };
    /* The student's mass outside the top, about its own largest: it may be tiny. */
    float outside = -INFINITY, outside_sum = 0.0f, log_rest = 0.0f;
    if (has_rest) {
        z.each(p, lane, experts, [&](int32_t e, float v) {
            if (!inside(p, e)) outside = fmaxf(outside, v);
        });
        outside = warp_max(outside);
        z.each(p, lane, experts, [&](int32_t e, float v) {
            if (!inside(p, e)) outside_sum += expf(v - outside);
        });
        outside_sum = warp_sum(outside_sum);
        log_rest = outside - largest + logf(outside_sum) - log_sum;
    }

    const int32_t classes = has_rest ? top + 1 : top;
    float mean = 0.0f, rest_slope = 0.0f;
    if (kl) {
        for (int32_t i = lane; i < top; i += WARP)
            loss -= (double)teacher_of(i) * (double)(logit(p, p.ids[i]) - most - share_log);
        if (has_rest && lane == 0) loss -= (double)rest * (double)log_rest;
    } else {
        for (int32_t i = lane; i < top; i += WARP) {
            const float share = share_of(logit(p, p.ids[i])), difference = share - teacher_of(i);
            loss += distance(square, difference) / (double)classes;
            mean += share * slope(square, difference, classes);
        }
        mean = warp_sum(mean);
        if (has_rest) {
            const float share = expf(log_rest), difference = share - rest;
            if (lane == 0) loss += distance(square, difference) / (double)classes;
            rest_slope = slope(square, difference, classes);
            mean += share * rest_slope;
        }
    }

    __syncwarp(); /* nobody reads another lane's logits from here on */
    if (!p.d) return loss;
    z.each(p, lane, experts, [&](int32_t e, float v) {
        if (inside(p, e)) return;
        const float student = expf(v - largest) / sum;
        float d = 0.0f;
        if (kl && has_rest) d = student - rest * (expf(v - outside) / outside_sum);
        if (!kl && has_rest) d = student * (rest_slope - mean);
        p.d[e] = (d + lambda * student) * scale;
    });
    for (int32_t i = lane; i < top; i += WARP) {
        const int32_t e = p.ids[i];
        const float v = logit(p, e), share = share_of(v), difference = share - teacher_of(i);
        const float student = over_top ? expf(v - largest) / sum : share;
        float d = kl ? difference : share * (slope(square, difference, classes) - mean);
        d += lambda * student;
        p.d[e] = (!p.labels && i == 0 ? d - lambda : d) * scale;
    }
    if (!p.labels) return loss;
    __syncwarp(); /* another lane has written what is added to; labels are distinct */
    for (int32_t j = lane; j < call.label_count; j += WARP)
        p.d[p.labels[j]] -= lambda * p.weights[j] * scale;
    return loss;
}

template <int KEPT> __global__ void loss_kernel(sida_loss_cuda_call call) {
    extern __shared__ uint32_t marks[];
    __shared__ double losses[MOST_WARPS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    const int words = (call.experts + WARP - 1) / WARP;
    const int64_t pairs = call.rows * call.layers;
    uint32_t *marked = marks + warp * words;
    allow_next();
    await_inputs();
    double loss = 0;
    for (int64_t pair = (int64_t)blockIdx.x * warps + warp; pair < pairs;
         pair += (int64_t)gridDim.x * warps) {
        const int64_t row = pair / call.layers, layer = pair % call.layers;
        const int64_t token = call.source ? call.source[row] : row;
        const int64_t list = token * call.layers + layer;
        pair_view p;
        p.z = call.logits + pair * call.experts;
        p.bias = call.bias ? call.bias + layer * call.experts : NULL;
        p.d = call.d_logits ? call.d_logits + pair * call.experts : NULL;
        p.ids = call.top_ids + list * call.top;
        p.logp = call.top_logp + list * call.top;
        p.labels = call.labels ? call.labels + list * call.label_count : NULL;
        p.weights = call.labels ? call.label_weights + list * call.label_count : NULL;
        p.inside = marked;
        __syncwarp(); /* the last pair's readers */
        for (int w = lane; w < words; w += WARP) marked[w] = 0;
        __syncwarp();
        /* Bits that are set in any order give the same words. */
        for (int32_t i = lane; i < call.top; i += WARP)
            atomicOr(&marked[p.ids[i] / WARP], 1u << (p.ids[i] % WARP));
        __syncwarp();
        loss += pair_loss<KEPT>(call, p, lane);
    }
    for (int step = WARP / 2; step > 0; step /= 2) loss += __shfl_xor_sync(ALL_LANES, loss, step);
    if (lane == 0) losses[warp] = loss;
    __syncthreads();
    if (threadIdx.x != 0) return;
    loss = 0;
    for (int w = 0; w < warps; w++) loss += losses[w];
    call.partials[blockIdx.x] = loss;
    for (int i = (int)(blockIdx.x + gridDim.x); i < SIDA_TRAIN_PARTIALS; i += (int)gridDim.x)
        call.partials[i] = 0;
}

extern "C" sida_status sida_loss_cuda(sida_stream *stream, const sida_loss_cuda_call *call) {
    assert(call->top >= 1 && call->top <= call->experts && call->experts <= 65535);
    assert(!call->labels || (call->label_count >= 1 && call->label_count <= call->experts));
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    const int warps = call->experts <= 32768 ? MOST_WARPS : MOST_WARPS / 2;
    const int words = (call->experts + WARP - 1) / WARP;
    const int64_t blocks = (call->rows * call->layers + warps - 1) / warps;
    const int64_t most = SIDA_TRAIN_PARTIALS;
    const dim3 grid((unsigned)(blocks < 1 ? 1 : blocks > most ? most : blocks));
    const unsigned threads = (unsigned)(warps * WARP);
    const size_t shared = (size_t)(warps * words) * sizeof(uint32_t);
    const auto kernel = words <= 1    ? loss_kernel<1>
                        : words <= 2  ? loss_kernel<2>
                        : words <= 4  ? loss_kernel<4>
                        : words <= 8  ? loss_kernel<8>
                        : words <= 16 ? loss_kernel<16>
                                      : loss_kernel<0>;
    return launch_kernel("loss kernel", stream, kernel, grid, threads, shared, *call);
}
