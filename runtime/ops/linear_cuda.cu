/* y = x Wᵀ: few rows by our own kernel, which reads the weights once; more by cuBLAS. */
#include "runtime/ops/cublas_cuda.h"
#include "runtime/ops/kernels_cuda.cuh"

#include <stdlib.h>

extern "C" {
#include "formats/base/memory.h"
}

/* Up to here a product is bound by reading its weights. */
constexpr int FEW_ROWS = 16, MAX_GRID_Y = 65535, THREADS = 256;

/* --- what a stream keeps */

typedef struct stream_state {
    const sida_cublas *cublas;
    cublasHandle_t blas;
    sida_buffer *memory; /* cuBLAS's workspace, then the scratch */
} stream_state;

static sida_status check_blas(const stream_state *state, cublasStatus_t code, const char *call) {
    if (code == CUBLAS_STATUS_SUCCESS) return SIDA_OK;
    (void)cudaGetLastError();
    return sida_fail(SIDA_ERROR_DEVICE, "cuda: %s: %s%s", call, state->cublas->status_string(code),
                     code == CUBLAS_STATUS_ALLOC_FAILED || code == CUBLAS_STATUS_NOT_INITIALIZED
                         ? ": is there device memory left beside the budget?"
                         : "");
}

static void state_destroy(void *state) {
    stream_state *s = (stream_state *)state;
    if (s->blas) (void)s->cublas->destroy(s->blas);
    sida_buffer_destroy(s->memory);
    free(s);
}

static sida_status state_fill(stream_state *state, sida_stream *stream) {
    sida_status status = sida_cublas_load(&state->cublas);
    if (status == SIDA_OK)
        status = sida_buffer_create(stream->backend, &state->memory, SIDA_MEMORY_DEVICE,
                                    SIDA_CUDA_STREAM_BYTES, "cuBLAS's workspace");
    if (status == SIDA_OK)
        status = check_blas(state, state->cublas->create(&state->blas), "cublasCreate");
    if (status == SIDA_OK)
        status = check_blas(state, state->cublas->set_stream(state->blas, stream_of(stream)),
                            "cublasSetStream");
    /* After the stream: setting a stream takes the workspace back. */
    if (status == SIDA_OK)
        status = check_blas(state,
                            state->cublas->set_workspace(state->blas, state->memory->data,
                                                         SIDA_CUDA_WORKSPACE_BYTES),
                            "cublasSetWorkspace");
    return status;
}

extern "C" sida_status sida_prepare_cuda(sida_stream *base) {
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

/* --- few rows */

template <typename W>
__global__ void __launch_bounds__(PRODUCT_WARPS *WARP) linear_kernel(product p, int64_t n) {
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
    cudaStream_t on = stream_of(stream);
    if (call->weight.dtype == SIDA_F32)
        linear_kernel<float><<<grid, PRODUCT_WARPS * WARP, 0, on>>>(p, call->n);
    else if (call->weight.dtype == SIDA_F16)
        linear_kernel<__half><<<grid, PRODUCT_WARPS * WARP, 0, on>>>(p, call->n);
    else
        linear_kernel<__nv_bfloat16><<<grid, PRODUCT_WARPS * WARP, 0, on>>>(p, call->n);
    return launched("linear kernel");
}

/* --- many rows */

__global__ void narrow_kernel(__nv_bfloat16 *out, const float *x, int64_t ldx, int64_t cols,
                              int64_t count) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * blockDim.x)
        out[i] = __float2bfloat16(x[i / cols * ldx + i % cols]);
}

__global__ void epilogue_kernel(float *y, int64_t ldy, const float *bias, int64_t cols,
                                int64_t count, bool relu) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * blockDim.x) {
        float *at = y + i / cols * ldy + i % cols;
        float value = *at + (bias ? bias[i % cols] : 0.0f);
        *at = relu && value < 0.0f ? 0.0f : value;
    }
}

static unsigned blocks_for(int64_t count) {
    int64_t blocks = (count + THREADS - 1) / THREADS;
    return (unsigned)(blocks < 65536 ? blocks : 65536);
}

/* Rows first … first + n - 1. Row-major y = x Wᵀ is column-major yᵀ = W xᵀ. */
static sida_status gemm(stream_state *state, const sida_linear_call *call, int64_t first, int64_t n,
                        const void *x, int64_t ldx, cudaDataType type) {
    const float beta = call->epilogue == SIDA_EPILOGUE_ADD ? 1.0f : 0.0f;
    const sida_weight *w = &call->weight;
    cublasStatus_t code = state->cublas->gemm(
        state->blas, CUBLAS_OP_T, CUBLAS_OP_N, (int)w->rows, (int)n, (int)w->cols, &call->scale,
        w->data, type, (int)w->cols, x, type, (int)ldx, &beta, (float *)call->y + first * call->ldy,
        CUDA_R_32F, (int)call->ldy, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    return check_blas(state, code, "cublasGemmEx");
}

static sida_status linear_many(sida_stream *stream, const sida_linear_call *call) {
    sida_status status = sida_prepare_cuda(stream);
    if (status != SIDA_OK) return status;
    stream_state *state = (stream_state *)sida_cuda_stream_of(stream)->ops_state;
    cudaStream_t on = stream_of(stream);
    int64_t cols = call->weight.cols;
    if (call->weight.dtype == SIDA_F32) {
        status = gemm(state, call, 0, call->n, call->x, call->ldx, CUDA_R_32F);
    } else {
        /* x in bf16, as many rows at a time as the scratch holds: a number that depends on the
         * shape alone. */
        __nv_bfloat16 *narrow =
            (__nv_bfloat16 *)((char *)state->memory->data + SIDA_CUDA_WORKSPACE_BYTES);
        int64_t most = SIDA_CUDA_SCRATCH_BYTES / (cols * (int64_t)sizeof *narrow);
        for (int64_t first = 0; status == SIDA_OK && first < call->n; first += most) {
            int64_t n = call->n - first < most ? call->n - first : most;
            narrow_kernel<<<blocks_for(n * cols), THREADS, 0, on>>>(
                narrow, (const float *)call->x + first * call->ldx, call->ldx, cols, n * cols);
            status = launched("narrowing kernel");
            if (status == SIDA_OK) status = gemm(state, call, first, n, narrow, cols, CUDA_R_16BF);
        }
    }
    bool relu = call->epilogue == SIDA_EPILOGUE_RELU;
    if (status != SIDA_OK || (!relu && !call->bias)) return status;
    int64_t count = call->n * call->weight.rows;
    epilogue_kernel<<<blocks_for(count), THREADS, 0, on>>>((float *)call->y, call->ldy, call->bias,
                                                           call->weight.rows, count, relu);
    return launched("epilogue kernel");
}

extern "C" sida_status sida_linear_cuda(sida_stream *stream, const sida_linear_call *call) {
    const sida_weight *w = &call->weight;
    if (call->n <= 0 || w->rows <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    /* T5's activations leave fp16's range, so fp16 weights are multiplied in fp32. */
    bool fits = w->dtype == SIDA_F32 ||
                (w->dtype == SIDA_BF16 && w->cols <= SIDA_CUDA_SCRATCH_BYTES / (2 * FEW_ROWS));
    bool numbers = call->n <= INT32_MAX && w->rows <= INT32_MAX && w->cols <= INT32_MAX &&
                   call->ldx <= INT32_MAX && call->ldy <= INT32_MAX;
    return call->n > FEW_ROWS && fits && numbers ? linear_many(stream, call)
                                                 : linear_few(stream, call);
}
