/* The end of a training step: the norm of the gradient, the sums of the losses, AdamW. */
#include "runtime/ops/kernels_cuda.cuh"

extern "C" {
#include "runtime/ops/train_ops.h"
}

constexpr int THREADS = 256;

/* The block's sum in every thread, the same way every time. */
static __device__ double block_sum(double value) {
    __shared__ double sums[THREADS];
    sums[threadIdx.x] = value;
    __syncthreads();
    for (int step = THREADS / 2; step > 0; step /= 2) {
        if ((int)threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
        __syncthreads();
    }
    const double sum = sums[0];
    __syncthreads(); /* the next sum's */
    return sum;
}

/* Of `count` partial sums, which other blocks may have written; NULL: 0. */
static __device__ double partials_sum(const double *partials, int count) {
    double sum = 0;
    for (int i = threadIdx.x; partials && i < count; i += THREADS) sum += __ldcg(&partials[i]);
    return block_sum(sum);
}

/* A block squares its share; the last one to end sums up. */
__global__ void __launch_bounds__(THREADS)
    finish_kernel(sida_train_result *result, const double *first, const double *second,
                  const float *gradient, int64_t count, double *squares, unsigned *ended) {
    __shared__ bool last;
    allow_next();
    await_inputs();
    double sum = 0;
    const int64_t step = (int64_t)gridDim.x * THREADS;
#pragma unroll 4
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += step)
        sum += (double)gradient[i] * (double)gradient[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        squares[blockIdx.x] = sum;
        __threadfence();
        last = atomicInc(ended, gridDim.x - 1) == gridDim.x - 1; /* and 0 again */
        __threadfence();
    }
    __syncthreads();
    if (!last) return;
    sida_train_result r;
    r.losses[0] = partials_sum(first, SIDA_TRAIN_PARTIALS);
    r.losses[1] = partials_sum(second, SIDA_TRAIN_PARTIALS);
    r.norm = sqrt(partials_sum(squares, (int)gridDim.x));
    r.finite = isfinite(r.losses[0]) && isfinite(r.losses[1]) && isfinite(r.norm) ? 1 : 0;
    if (threadIdx.x == 0) *result = r;
}

extern "C" sida_status sida_train_finish_cuda(sida_stream *stream, sida_train_result *result,
                                              const double *const loss_partials[2],
                                              const float *gradient, int64_t count,
                                              void *workspace) {
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    const int64_t blocks = (count + THREADS - 1) / THREADS, most = SIDA_TRAIN_PARTIALS;
    double *squares = (double *)((char *)workspace + SIDA_TRAIN_FINISH_COUNT);
    return launch_kernel("gradient norm kernel", stream, finish_kernel,
                         dim3((unsigned)(blocks < 1      ? 1
                                         : blocks > most ? most
                                                         : blocks)),
                         THREADS, 0, result, loss_partials[0], loss_partials[1], gradient, count,
                         squares, (unsigned *)workspace);
}

/* --- AdamW: what trainer/adamw.c computes, in its order */

extern "C" sida_adamw_scalars sida_adamw_scalars_of(double beta1, double beta2, double epsilon,
                                                    double lr, double weight_decay, int64_t step,
                                                    double clip) {
    sida_adamw_scalars s;
    s.beta1 = (float)beta1;
    s.beta2 = (float)beta2;
    s.rest1 = (float)(1 - beta1);
    s.rest2 = (float)(1 - beta2);
    s.decay = (float)(1 - lr * weight_decay);
    s.rate = (float)(lr / (1 - pow(beta1, (double)step)));
    s.root = (float)sqrt(1 - pow(beta2, (double)step));
    s.epsilon = (float)epsilon;
    s.clip = clip;
    return s;
}

struct adamw_arrays {
    float *parameters, *first, *second, *gradient;
};

static __device__ void update(float &parameter, float &first, float &second, float g,
                              const sida_adamw_scalars &s) {
    first = s.beta1 * first + s.rest1 * g;
    second = s.beta2 * second + s.rest2 * g * g;
    parameter = parameter * s.decay - s.rate * first / (sqrtf(second) / s.root + s.epsilon);
}

static __device__ float &part(float4 &v, int k) {
    return k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w;
}

/* Four items a thread where `wide`. */
__global__ void __launch_bounds__(THREADS)
    adamw_kernel(adamw_arrays a, int64_t count, sida_adamw_scalars s,
                 const sida_train_result *result, bool wide, bool zero_gradient) {
    await_inputs();
    const double norm = result->norm;
    const bool finite = result->finite != 0;
    const float factor = s.clip > 0 && norm > s.clip ? (float)(s.clip / norm) : 1.0f;
    const int64_t step = (int64_t)gridDim.x * THREADS;
    const int64_t packs = wide ? count / 4 : 0;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < packs; i += step) {
        float4 g = ((float4 *)a.gradient)[i];
        if (zero_gradient) ((float4 *)a.gradient)[i] = make_float4(0, 0, 0, 0);
        if (!finite) continue;
        float4 p = ((float4 *)a.parameters)[i];
        float4 m = ((float4 *)a.first)[i], v = ((float4 *)a.second)[i];
#pragma unroll
        for (int k = 0; k < 4; k++)
            update(part(p, k), part(m, k), part(v, k), part(g, k) * factor, s);
        ((float4 *)a.parameters)[i] = p;
        ((float4 *)a.first)[i] = m;
        ((float4 *)a.second)[i] = v;
    }
    for (int64_t i = 4 * packs + (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count;
         i += step) {
        const float g = a.gradient[i];
        if (zero_gradient) a.gradient[i] = 0.0f;
        if (finite) update(a.parameters[i], a.first[i], a.second[i], g * factor, s);
    }
    /* Late: what follows may read weights before it awaits its inputs (norms do). */
    __threadfence();
    allow_next();
}

extern "C" sida_status sida_adamw_cuda(sida_stream *stream, float *parameters, float *first,
                                       float *second, float *gradient, int64_t count,
                                       const sida_adamw_scalars *scalars,
                                       const sida_train_result *result, bool zero_gradient) {
    if (count == 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    adamw_arrays arrays;
    arrays.parameters = parameters;
    arrays.first = first;
    arrays.second = second;
    arrays.gradient = gradient;
    const uintptr_t all =
        (uintptr_t)parameters | (uintptr_t)first | (uintptr_t)second | (uintptr_t)gradient;
    const bool wide = all % 16 == 0;
    const int64_t blocks = (count + THREADS - 1) / THREADS / (wide ? 4 : 1) + 1;
    return launch_kernel("AdamW kernel", stream, adamw_kernel,
                         dim3((unsigned)(blocks < 4096 ? blocks : 4096)), THREADS, 0, arrays, count,
                         *scalars, result, wide, zero_gradient);
}
