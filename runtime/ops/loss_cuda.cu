/* The loss of training and its gradient in one pass: a warp takes a pair, a lane every 32nd expert
 * and every 32nd of the teacher's best. The formulas are trainer/loss.c's. */
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

/* The lane's part of the pair's loss; its part of the gradient into p.d. */
template <int KEPT>
static __device__ double pair_loss(const sida_loss_cuda_call &call, const pair_view &p, int lane) {
    const int32_t experts = call.experts, top = call.top;
    const float lambda = call.lambda, scale = call.scale;
    lane_logits<KEPT> z;
    z.load(p, lane, experts);
    float largest = -INFINITY, sum = 0.0f;
    z.each(p, lane, experts, [&](int32_t, float v) { largest = fmaxf(largest, v); });
    largest = warp_max(largest);
    z.each(p, lane, experts, [&](int32_t, float v) { sum += expf(v - largest); });
    sum = warp_sum(sum);
    const float log_sum = logf(sum);
    double loss = 0;
    if (lane == 0) loss = -(double)lambda * (double)(logit(p, p.ids[0]) - largest - log_sum);

    if (call.tkd == SIDA_TKD_REST) {
        float teacher = 0.0f;
        for (int32_t i = lane; i < top; i += WARP) teacher += expf(teacher_log(p, i));
        teacher = warp_sum(teacher);
        /* The teacher's mass is at most 1 (fp16 rounds), and all of it is here when T is E. */
        const bool whole = teacher > 1.0f || top == experts;
        const float norm = whole ? teacher : 1.0f, rest = whole ? 0.0f : 1.0f - teacher;
        for (int32_t i = lane; i < top; i += WARP)
            loss -= (double)(expf(teacher_log(p, i)) / norm) *
                    (double)(logit(p, p.ids[i]) - largest - log_sum);
        /* The student's mass outside the top, about its own largest: it may be tiny. */
        float outside = -INFINITY, outside_sum = 0.0f;
        if (top < experts) {
            z.each(p, lane, experts, [&](int32_t e, float v) {
                if (!inside(p, e)) outside = fmaxf(outside, v);
            });
            outside = warp_max(outside);
            z.each(p, lane, experts, [&](int32_t e, float v) {
                if (!inside(p, e)) outside_sum += expf(v - outside);
            });
            outside_sum = warp_sum(outside_sum);
            if (lane == 0)
                loss -= (double)rest * (double)(outside - largest + logf(outside_sum) - log_sum);
        }
        __syncwarp(); /* nobody reads another lane's logits from here on */
        if (!p.d) return loss;
        z.each(p, lane, experts, [&](int32_t e, float v) {
            if (inside(p, e)) return;
            const float student = expf(v - largest) / sum;
            const float d = student - rest * (expf(v - outside) / outside_sum);
            p.d[e] = (d + lambda * student) * scale;
        });
        for (int32_t i = lane; i < top; i += WARP) {
            const int32_t e = p.ids[i];
            const float student = expf(logit(p, e) - largest) / sum;
            float d = student - expf(teacher_log(p, i)) / norm;
            d += lambda * student;
            p.d[e] = (i == 0 ? d - lambda : d) * scale;
        }
        return loss;
    }

    const float first = teacher_log(p, 0);
    float most = -INFINITY, teacher = 0.0f, student_sum = 0.0f, mean = 0.0f;
    for (int32_t i = lane; i < top; i += WARP) most = fmaxf(most, logit(p, p.ids[i]));
    most = warp_max(most);
    for (int32_t i = lane; i < top; i += WARP) {
        student_sum += expf(logit(p, p.ids[i]) - most);
        teacher += expf(teacher_log(p, i) - first);
    }
    student_sum = warp_sum(student_sum);
    teacher = warp_sum(teacher);
    const auto sign_of = [&](float difference) {
        return (float)((difference > 0.0f) - (difference < 0.0f)) / (float)top;
    };
    for (int32_t i = lane; i < top; i += WARP) {
        const float share = expf(logit(p, p.ids[i]) - most) / student_sum;
        const float difference = share - expf(teacher_log(p, i) - first) / teacher;
        loss += (double)fabsf(difference) / (double)top;
        mean += share * sign_of(difference);
    }
    mean = warp_sum(mean);
    __syncwarp();
    if (!p.d) return loss;
    z.each(p, lane, experts, [&](int32_t e, float v) {
        if (!inside(p, e)) p.d[e] = lambda * (expf(v - largest) / sum) * scale;
    });
    for (int32_t i = lane; i < top; i += WARP) {
        const int32_t e = p.ids[i];
        const float v = logit(p, e), share = expf(v - most) / student_sum;
        const float difference = share - expf(teacher_log(p, i) - first) / teacher;
        const float d = share * (sign_of(difference) - mean) + lambda * (expf(v - largest) / sum);
        p.d[e] = (i == 0 ? d - lambda : d) * scale;
    }
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
        pair_view p;
        p.z = call.logits + pair * call.experts;
        p.bias = call.bias ? call.bias + layer * call.experts : NULL;
        p.d = call.d_logits ? call.d_logits + pair * call.experts : NULL;
        p.ids = call.top_ids + (token * call.layers + layer) * call.top;
        p.logp = call.top_logp + (token * call.layers + layer) * call.top;
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
