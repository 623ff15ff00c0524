/* y = x Wᵀ. bf16 weights: tensor cores, up to MOST_X rows by our own kernel, which reads the
 * weights once, more by cuBLAS. fp32 and fp16: few rows by a kernel in fp32, more by cuBLAS. */
#include "runtime/ops/cublaslt_cuda.h"
#include "runtime/ops/mma_cuda.cuh"

#include <assert.h>
#include <stdlib.h>

extern "C" {
#include "formats/base/memory.h"
}

/* Up to FEW_ROWS a product in fp32 is bound by reading its weights; one in bf16 takes MOST_X rows
 * of x at once. */
constexpr int FEW_ROWS = 16, MOST_TILES_X = 4, MOST_X = MOST_TILES_X * TILE_X, MAX_GRID_Y = 65535;
constexpr int THREADS = 256;

/* --- what a stream keeps */

typedef struct stream_state {
    const sida_cublas *cublas;
    struct stream_state *owner;         /* whose handle and workspace it uses; most are their own */
    cublasHandle_t blas;                /* an owner's */
    const struct stream_state *current; /* an owner's: for whom the handle is set */
    sida_buffer *workspace;             /* an owner's: cuBLAS's */
    char *space;                        /* of it, this one's */
    size_t space_bytes;
    cudaStream_t stream;
    sida_lt_plans *plans; /* an owner's, of training's products; NULL: none yet */
    sida_buffer *scratch; /* NULL: not wanted yet */
} stream_state;

static sida_status check_blas(const stream_state *state, cublasStatus_t code, const char *call) {
    return sida_cublas_check(state->cublas, code, call);
}

/* Sets the handle for this stream, where it is not. */
static sida_status set_handle(const stream_state *state) {
    stream_state *owner = state->owner;
    if (owner->current == state) return SIDA_OK;
    owner->current = NULL;
    sida_status status =
        check_blas(owner, owner->cublas->set_stream(owner->blas, state->stream), "cublasSetStream");
    /* After the stream: setting a stream takes the workspace back. */
    if (status == SIDA_OK)
        status = check_blas(
            owner, owner->cublas->set_workspace(owner->blas, state->space, state->space_bytes),
            "cublasSetWorkspace");
    if (status == SIDA_OK) owner->current = state;
    return status;
}

static void state_destroy(void *state) {
    stream_state *s = (stream_state *)state;
    if (s->owner && s->owner != s) { /* gives its share back */
        s->owner->space_bytes += s->space_bytes;
        s->owner->current = NULL;
        (void)set_handle(s->owner); /* its stream goes next */
    }
    if (s->blas) (void)s->cublas->destroy(s->blas);
    sida_buffer_destroy(s->workspace);
    sida_buffer_destroy(s->scratch);
    sida_lt_plans_destroy(s->plans);
    free(s);
}

static sida_status state_fill(stream_state *state, sida_stream *stream) {
    sida_status status = sida_cublas_load(&state->cublas);
    if (status == SIDA_OK)
        status = sida_buffer_create(stream->backend, &state->workspace, SIDA_MEMORY_DEVICE,
                                    SIDA_CUDA_WORKSPACE_BYTES, "cuBLAS's workspace");
    if (status == SIDA_OK)
        status = check_blas(state, state->cublas->create(&state->blas), "cublasCreate");
    if (status != SIDA_OK) return status;
    state->owner = state;
    state->space = (char *)state->workspace->data;
    state->space_bytes = SIDA_CUDA_WORKSPACE_BYTES;
    state->stream = stream_of(stream);
    return set_handle(state);
}

static sida_status make_state(sida_stream *base) {
    sida_cuda_stream *stream = sida_cuda_stream_of(base);
    stream_state *state = NULL;
    if (stream->ops_state) return SIDA_OK;
    sida_status status = sida_cuda_use(base->backend);
    if (status == SIDA_OK) status = SIDA_ALLOC(&state, 1, "a stream's workspace");
    if (status == SIDA_OK) status = state_fill(state, base);
    if (status == SIDA_OK) {
        stream->ops_state = state;
        stream->ops_state_destroy = state_destroy;
    } else if (state) {
        state_destroy(state);
    }
    return status;
}

extern "C" sida_status sida_prepare_cuda(sida_stream *stream) {
    sida_status status = make_state(stream);
    if (status != SIDA_OK) return status;
    stream_state *state = (stream_state *)sida_cuda_stream_of(stream)->ops_state;
    if (state->scratch) return SIDA_OK;
    return sida_buffer_create(stream->backend, &state->scratch, SIDA_MEMORY_DEVICE,
                              SIDA_CUDA_SCRATCH_BYTES, "a stream's scratch");
}

extern "C" sida_status sida_cublas_of(sida_stream *stream, const sida_cublas **cublas,
                                      cublasHandle_t *handle) {
    sida_status status = make_state(stream);
    if (status != SIDA_OK) return status;
    const stream_state *state = (const stream_state *)sida_cuda_stream_of(stream)->ops_state;
    *cublas = state->cublas;
    *handle = state->owner->blas;
    return set_handle(state);
}

extern "C" sida_status sida_lt_place_of(sida_stream *stream, sida_lt_place *place) {
    sida_status status = make_state(stream);
    if (status != SIDA_OK) return status;
    stream_state *state = (stream_state *)sida_cuda_stream_of(stream)->ops_state;
    place->cublas = state->cublas;
    place->handle = (cublasLtHandle_t)state->owner->blas;
    place->workspace = state->space;
    place->workspace_bytes = state->space_bytes;
    place->stream = state->stream;
    place->plans = &state->owner->plans;
    return SIDA_OK;
}

extern "C" sida_status sida_cublas_share(sida_stream *beside, sida_stream *stream) {
    stream_state *state = NULL;
    sida_status status = make_state(stream);
    if (status == SIDA_OK) status = SIDA_ALLOC(&state, 1, "a stream's workspace");
    if (status != SIDA_OK) return status;
    stream_state *owner = (stream_state *)sida_cuda_stream_of(stream)->ops_state;
    assert(owner->owner == owner && !sida_cuda_stream_of(beside)->ops_state);
    state->cublas = owner->cublas;
    state->owner = owner;
    state->space_bytes = SIDA_CUDA_WORKSPACE_BYTES / 4;
    owner->space_bytes -= state->space_bytes;
    owner->current = NULL;
    state->space = owner->space + owner->space_bytes;
    state->stream = stream_of(beside);
    sida_cuda_stream_of(beside)->ops_state = state;
    sida_cuda_stream_of(beside)->ops_state_destroy = state_destroy;
    return SIDA_OK;
}

/* --- few rows in fp32 */

template <typename W>
__global__ void __launch_bounds__(PRODUCT_WARPS *WARP) linear_kernel(product p, int64_t n) {
    allow_next();
    await_inputs();
    product_block<W>(p, n, (int64_t)blockIdx.y * PRODUCT_X, (int64_t)gridDim.y * PRODUCT_X,
                     (int64_t)blockIdx.x * product_columns(false));
}

static sida_status linear_few(sida_stream *stream, const sida_linear_call *call) {
    product p = {};
    p.w = call->weight.data;
    p.x = (const float *)call->x;
    p.bias = call->bias;
    p.y = (float *)call->y;
    p.ldx = call->ldx;
    p.ldy = call->ldy;
    p.rows = call->weight.rows;
    p.cols = call->weight.cols;
    p.x_divide = 1;
    p.scale = call->scale;
    p.epilogue = call->epilogue;
    int64_t across = (p.rows + product_columns(false) - 1) / product_columns(false);
    int64_t down = (call->n + PRODUCT_X - 1) / PRODUCT_X;
    dim3 grid((unsigned)across, (unsigned)(down < MAX_GRID_Y ? down : MAX_GRID_Y));
    const char *what = "linear kernel";
    const unsigned threads = PRODUCT_WARPS * WARP;
    if (call->weight.dtype == SIDA_F32)
        return launch_kernel(what, stream, linear_kernel<float>, grid, threads, 0, p, call->n);
    if (call->weight.dtype == SIDA_F16)
        return launch_kernel(what, stream, linear_kernel<__half>, grid, threads, 0, p, call->n);
    return launch_kernel(what, stream, linear_kernel<__nv_bfloat16>, grid, threads, 0, p, call->n);
}

/* --- tensor cores */

/* Blocks along x take a group of rows of W. keep: where the normed rows go, or NULL; the blocks
 * share them. */
template <typename Shape, typename X, bool NORM, int T>
__global__ void __launch_bounds__(Shape::THREADS, 512 / Shape::THREADS)
    mma_kernel(mma_product p, __nv_bfloat16 *keep) {
    __shared__ mma_shared<Shape> shared;
    mma_weights<Shape> weights;
    const int group = threadIdx.x / (Shape::SLICES * WARP);
    const int64_t row = ((int64_t)blockIdx.x * Shape::GROUPS + group) * Shape::R * TILE_ROWS;
    weights.start(p, row);
    weights.load(weights.begin); /* what no kernel writes need not wait for one */
    allow_next();
    await_inputs();
    mma_tiles<Shape, X, NORM, T>(p, weights, shared, row, 0, (int)p.n);
    for (int64_t i = blockIdx.x; NORM && keep && i < p.n; i += gridDim.x) {
        float squares = 0.0f;
        for (int s = 0; s < Shape::SLICES; s++) squares += shared.squares[s][i];
        const float factor = 1.0f / sqrtf(squares / (float)p.cols + p.epsilon);
        const float *x = (const float *)p.x + i * p.ldx;
        for (int64_t c = threadIdx.x; c < p.cols; c += Shape::THREADS)
            keep[i * p.cols + c] = __float2bfloat16(x[c] * factor * __bfloat162float(p.norm[c]));
    }
}

template <typename Shape, typename X, bool NORM, int T>
static sida_status launch_mma(sida_stream *stream, const mma_product &p, __nv_bfloat16 *keep) {
    constexpr int64_t ROWS = Shape::GROUPS * Shape::R * TILE_ROWS;
    return launch_kernel("tensor-core product", stream, mma_kernel<Shape, X, NORM, T>,
                         dim3((unsigned)((p.rows + ROWS - 1) / ROWS)), Shape::THREADS, 0, p, keep);
}

/* Many slices where there are few rows of W, so that they keep the device busy. Where there are few
 * rows of x, registers are left for a warp's whole share of the columns at once. */
template <typename X, bool NORM, int T>
static sida_status launch_rows(sida_stream *stream, const mma_product &p, __nv_bfloat16 *keep) {
    if (p.cols >= 2048)
        return launch_mma<mma_shape<1, 16, 1, T == 1 ? 6 : 3>, X, NORM, T>(stream, p, keep);
    if (p.rows >= 8192) return launch_mma<mma_shape<1, 4, 2>, X, NORM, T>(stream, p, keep);
    return launch_mma<mma_shape<1, 8, 1>, X, NORM, T>(stream, p, keep);
}

/* n <= MOST_X, of x in fp32 n <= TILE_X: rounding is part of every block's work there. With the
 * norm if the call has one: its weight is bf16 then. */
static sida_status linear_mma(sida_stream *stream, const sida_linear_call *call) {
    mma_product p = {};
    p.w = (const __nv_bfloat16 *)call->weight.data;
    p.x = call->x;
    p.bias = call->bias;
    p.y = call->y;
    p.ldx = call->ldx;
    p.ldy = call->ldy;
    p.rows = call->weight.rows;
    p.cols = call->weight.cols;
    p.n = call->n;
    p.x_divide = 1;
    p.scale = call->scale;
    p.epilogue = call->epilogue;
    p.y_bf16 = call->y_type == SIDA_BF16;
    if (call->norm.data) {
        p.norm = (const __nv_bfloat16 *)call->norm.data;
        p.epsilon = call->epsilon;
        return launch_rows<float, true, 1>(
            stream, p, call->keep_normed ? (__nv_bfloat16 *)call->normed : NULL);
    }
    if (call->x_type == SIDA_F32) return launch_rows<float, false, 1>(stream, p, NULL);
    if (p.n <= TILE_X) return launch_rows<__nv_bfloat16, false, 1>(stream, p, NULL);
    if (p.n <= 2 * TILE_X) return launch_rows<__nv_bfloat16, false, 2>(stream, p, NULL);
    return launch_rows<__nv_bfloat16, false, MOST_TILES_X>(stream, p, NULL);
}

static bool fits(const sida_linear_call *call) {
    return mma_fits(call->weight.data, call->x, call->weight.cols, call->ldx, call->x_type);
}

/* --- rows of x in bf16 whose lengths or places suit no tensor core: slow, and right */

__global__ void plain_kernel(sida_linear_call call) {
    allow_next();
    await_inputs();
    const int64_t cols = call.weight.cols;
    const __nv_bfloat16 *w = (const __nv_bfloat16 *)call.weight.data + (int64_t)blockIdx.x * cols;
    const __nv_bfloat16 *x = (const __nv_bfloat16 *)call.x;
    for (int64_t i = threadIdx.x / WARP; i < call.n; i += blockDim.x / WARP) {
        float sum = 0.0f;
        for (int64_t k = threadIdx.x % WARP; k < cols; k += WARP)
            sum = fmaf(to_float(x[i * call.ldx + k]), to_float(w[k]), sum);
        sum = warp_sum(sum);
        if (threadIdx.x % WARP) continue;
        int64_t at = i * call.ldy + blockIdx.x;
        float value = sum * call.scale + (call.bias ? call.bias[blockIdx.x] : 0.0f);
        if (call.epilogue == SIDA_EPILOGUE_RELU) value = value < 0.0f ? 0.0f : value;
        if (call.y_type == SIDA_BF16)
            ((__nv_bfloat16 *)call.y)[at] = __float2bfloat16(value);
        else if (call.epilogue == SIDA_EPILOGUE_ADD)
            ((float *)call.y)[at] += value;
        else
            ((float *)call.y)[at] = value;
    }
}

/* --- many rows: cuBLAS */

__global__ void narrow_kernel(__nv_bfloat16 *out, const float *x, int64_t ldx, int64_t cols,
                              int64_t count) {
    allow_next();
    await_inputs();
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * blockDim.x)
        out[i] = __float2bfloat16(x[i / cols * ldx + i % cols]);
}

template <typename Y>
__global__ void epilogue_kernel(Y *y, int64_t ldy, const float *bias, int64_t cols, int64_t count,
                                bool relu) {
    allow_next();
    await_inputs();
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * blockDim.x) {
        Y *at = y + i / cols * ldy + i % cols;
        float value = to_float(*at) + (bias ? bias[i % cols] : 0.0f);
        *at = (Y)(relu && value < 0.0f ? 0.0f : value);
    }
}

static unsigned blocks_for(int64_t count) {
    int64_t blocks = (count + THREADS - 1) / THREADS;
    return (unsigned)(blocks < 65536 ? blocks : 65536);
}

/* Row-major y = x Wᵀ is column-major yᵀ = W xᵀ. */
static sida_status linear_blas(sida_stream *stream, const sida_linear_call *call) {
    sida_status status = sida_prepare_cuda(stream);
    if (status != SIDA_OK) return status;
    const sida_cublas *cublas;
    cublasHandle_t blas;
    status = sida_cublas_of(stream, &cublas, &blas);
    if (status != SIDA_OK) return status;
    const float beta = call->epilogue == SIDA_EPILOGUE_ADD ? 1.0f : 0.0f;
    const sida_weight *w = &call->weight;
    const cudaDataType type = w->dtype == SIDA_F32 ? CUDA_R_32F : CUDA_R_16BF;
    status = sida_cublas_check(
        cublas,
        cublas->gemm(blas, CUBLAS_OP_T, CUBLAS_OP_N, (int)w->rows, (int)call->n, (int)w->cols,
                     &call->scale, w->data, type, (int)w->cols, call->x, type, (int)call->ldx,
                     &beta, call->y, call->y_type == SIDA_F32 ? CUDA_R_32F : CUDA_R_16BF,
                     (int)call->ldy, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
        "cublasGemmEx");
    const bool relu = call->epilogue == SIDA_EPILOGUE_RELU;
    if (status != SIDA_OK || (!relu && !call->bias)) return status;
    const int64_t count = call->n * w->rows;
    const dim3 grid(blocks_for(count));
    if (call->y_type == SIDA_F32)
        return launch_kernel("epilogue kernel", stream, epilogue_kernel<float>, grid, THREADS, 0,
                             (float *)call->y, call->ldy, call->bias, w->rows, count, relu);
    return launch_kernel("epilogue kernel", stream, epilogue_kernel<__nv_bfloat16>, grid, THREADS,
                         0, (__nv_bfloat16 *)call->y, call->ldy, call->bias, w->rows, count, relu);
}

/* --- the choice */

static bool cublas_takes(const sida_linear_call *call) {
    return call->n <= INT32_MAX && call->weight.rows <= INT32_MAX &&
           call->weight.cols <= INT32_MAX && call->ldx <= INT32_MAX && call->ldy <= INT32_MAX;
}

/* x and the weights in bf16. */
static sida_status linear_bf16(sida_stream *stream, const sida_linear_call *call) {
    if (call->n <= MOST_X && fits(call)) return linear_mma(stream, call);
    if (call->n > MOST_X && cublas_takes(call)) return linear_blas(stream, call);
    return launch_kernel("plain product", stream, plain_kernel, dim3((unsigned)call->weight.rows),
                         THREADS, 0, *call);
}

/* x in fp32 that is worth rounding first: as many rows at a time as the scratch holds. */
static sida_status linear_narrowed(sida_stream *stream, const sida_linear_call *call) {
    sida_status status = sida_prepare_cuda(stream);
    if (status != SIDA_OK) return status;
    const stream_state *state = (const stream_state *)sida_cuda_stream_of(stream)->ops_state;
    __nv_bfloat16 *narrow = (__nv_bfloat16 *)state->scratch->data;
    const int64_t cols = call->weight.cols;
    const int64_t most = SIDA_CUDA_SCRATCH_BYTES / (cols * (int64_t)sizeof *narrow);
    for (int64_t first = 0; status == SIDA_OK && first < call->n; first += most) {
        sida_linear_call part = *call;
        part.n = call->n - first < most ? call->n - first : most;
        const int64_t count = part.n * cols;
        status = launch_kernel("narrowing kernel", stream, narrow_kernel, dim3(blocks_for(count)),
                               THREADS, 0, narrow, (const float *)call->x + first * call->ldx,
                               call->ldx, cols, count);
        part.x = narrow;
        part.x_type = SIDA_BF16;
        part.ldx = cols;
        part.y = (char *)call->y + first * call->ldy * (call->y_type == SIDA_F32 ? 4 : 2);
        if (status == SIDA_OK) status = linear_bf16(stream, &part);
    }
    return status;
}

static sida_status linear(sida_stream *stream, const sida_linear_call *call) {
    const sida_weight *w = &call->weight;
    if (w->dtype == SIDA_BF16 && call->x_type == SIDA_BF16) return linear_bf16(stream, call);
    if (w->dtype == SIDA_BF16 && call->n <= TILE_X && fits(call)) return linear_mma(stream, call);
    /* T5's activations leave fp16's range, so fp16 weights are multiplied in fp32. */
    const bool few = w->dtype == SIDA_F16 || (w->dtype == SIDA_F32 && call->n <= FEW_ROWS) ||
                     call->n <= TILE_X || !cublas_takes(call);
    if (few && call->y_type == SIDA_F32) return linear_few(stream, call);
    if (w->dtype == SIDA_F32) return linear_blas(stream, call);
    if (w->cols > SIDA_CUDA_SCRATCH_BYTES / 2)
        return sida_fail(SIDA_ERROR_UNSUPPORTED, "a product of %lld columns", (long long)w->cols);
    return linear_narrowed(stream, call);
}

extern "C" sida_status sida_linear_cuda(sida_stream *stream, const sida_linear_call *call) {
    const sida_weight *w = &call->weight, *norm = &call->norm;
    if (call->n <= 0 || w->rows <= 0) return SIDA_OK;
    assert(w->dtype == SIDA_BF16 || (call->x_type == SIDA_F32 && call->y_type == SIDA_F32));
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK || !norm->data) return status == SIDA_OK ? linear(stream, call) : status;
    /* Few rows are normalised on the way into the product; the factor is applied to its sums. */
    const bool on_the_way = w->dtype == SIDA_BF16 && norm->dtype == SIDA_BF16 &&
                            call->n <= TILE_X && fits(call) && (uintptr_t)norm->data % 16 == 0 &&
                            (!call->keep_normed || call->normed_type == SIDA_BF16);
    if (on_the_way) return linear_mma(stream, call);
    status = sida_rms_norm_cuda(stream, call->normed, call->normed_type, (const float *)call->x,
                                *norm, call->n, call->epsilon);
    if (status != SIDA_OK) return status;
    sida_linear_call rest = *call;
    rest.norm = sida_weight{};
    rest.x = call->normed;
    rest.x_type = call->normed_type;
    return linear(stream, &rest);
}
