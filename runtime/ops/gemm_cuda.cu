/* Products of training and their gradients: cublasLt, or cuBLAS and a kernel for the bias where it
 * does not take one; sums of columns by a kernel. */
#include "runtime/ops/gemm_cuda.cuh"

#include <assert.h>

constexpr int THREADS = 256;

extern "C" sida_status sida_zero_cuda(sida_stream *stream, void *data, size_t bytes) {
    if (bytes == 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    return SIDA_CUDA(cudaMemsetAsync(data, 0, bytes, stream_of(stream)));
}

/* --- products */

extern "C" sida_status sida_beside_cuda(sida_stream *beside, sida_stream *stream) {
    return sida_cublas_share(beside, stream);
}

static bool fits(const sida_gemm_call *call) {
    return call->m <= INT32_MAX && call->n <= INT32_MAX && call->k <= INT32_MAX &&
           call->lda <= INT32_MAX && call->ldb <= INT32_MAX && call->ldc <= INT32_MAX;
}

static sida_status make_zero(sida_stream *stream, const gemm_batch *batch) {
    const sida_gemm_call *q = &batch->first;
    sida_status status = SIDA_OK;
    for (int32_t i = 0; status == SIDA_OK && i < batch->count; i++)
        status = SIDA_CUDA(
            cudaMemset2DAsync(q->c + i * batch->c_stride, (size_t)q->ldc * sizeof(float), 0,
                              (size_t)q->n * sizeof(float), (size_t)q->m, stream_of(stream)));
    return status;
}

/* What cublasLt does not take. Row-major c = op(a) op(b) is column-major cᵀ = op(b)ᵀ op(a)ᵀ. */
static sida_status multiply_blas(sida_stream *stream, const gemm_batch *batch, bool tf32) {
    const sida_gemm_call *q = &batch->first;
    const sida_cublas *cublas;
    cublasHandle_t handle;
    sida_status status = sida_cublas_of(stream, &cublas, &handle);
    if (status != SIDA_OK) return status;
    const float one = 1.0f, beta = q->add ? 1.0f : 0.0f;
    const cublasOperation_t op_a = q->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t op_b = q->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasComputeType_t compute = tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    if (batch->count == 1)
        return sida_cublas_check(cublas,
                                 cublas->gemm(handle, op_b, op_a, (int)q->n, (int)q->m, (int)q->k,
                                              &one, q->b, CUDA_R_32F, (int)q->ldb, q->a, CUDA_R_32F,
                                              (int)q->lda, &beta, q->c, CUDA_R_32F, (int)q->ldc,
                                              compute, CUBLAS_GEMM_DEFAULT),
                                 "cublasGemmEx");
    return sida_cublas_check(
        cublas,
        cublas->gemm_batched(handle, op_b, op_a, (int)q->n, (int)q->m, (int)q->k, &one, q->b,
                             CUDA_R_32F, (int)q->ldb, batch->b_stride, q->a, CUDA_R_32F,
                             (int)q->lda, batch->a_stride, &beta, q->c, CUDA_R_32F, (int)q->ldc,
                             batch->c_stride, batch->count, compute, CUBLAS_GEMM_DEFAULT),
        "cublasGemmStridedBatchedEx");
}

template <int PACK>
__global__ void __launch_bounds__(THREADS)
    epilogue_kernel(float *y, const float *bias, int64_t count, int64_t cols, bool relu) {
    allow_next();
    await_inputs();
    const int64_t step = (int64_t)gridDim.x * THREADS * PACK;
    for (int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * PACK; i < count; i += step) {
        float value[PACK];
        if (PACK == 4) {
            const float4 wide = *(const float4 *)(y + i);
            memcpy(value, &wide, sizeof wide);
        } else {
            value[0] = y[i];
        }
#pragma unroll
        for (int k = 0; k < PACK; k++) {
            if (bias) value[k] += bias[i % cols + k]; /* cols is a multiple of PACK */
            if (relu && value[k] < 0.0f) value[k] = 0.0f;
        }
        if (PACK == 4) {
            float4 wide;
            memcpy(&wide, value, sizeof wide);
            *(float4 *)(y + i) = wide;
        } else {
            y[i] = value[0];
        }
    }
}

static sida_status add_bias(sida_stream *stream, const gemm_batch *batch) {
    if (!batch->bias && !batch->relu) return SIDA_OK;
    float *c = batch->first.c;
    const int64_t cols = batch->first.n, count = batch->first.m * cols;
    assert(batch->count == 1 && batch->first.ldc == cols);
    const bool wide = cols % 4 == 0 && (uintptr_t)c % 16 == 0;
    const int64_t blocks = (count + THREADS - 1) / THREADS / (wide ? 4 : 1) + 1;
    const dim3 grid((unsigned)(blocks < 4096 ? blocks : 4096));
    return launch_kernel("bias kernel", stream, wide ? epilogue_kernel<4> : epilogue_kernel<1>,
                         grid, THREADS, 0, c, batch->bias, count, cols, batch->relu);
}

sida_status gemm_batched(sida_stream *stream, const gemm_batch *batch, bool tf32) {
    const sida_gemm_call *q = &batch->first;
    bool done = false;
    if (!fits(q)) return sida_fail(SIDA_ERROR_UNSUPPORTED, "cuda: a product of over 2^31 rows");
    if (q->m == 0 || q->n == 0 || batch->count == 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status == SIDA_OK && q->k > 0) status = sida_lt_multiply(stream, batch, tf32, &done);
    if (status != SIDA_OK || done) return status;
    if (q->k > 0)
        status = multiply_blas(stream, batch, tf32);
    else if (!q->add)
        status = make_zero(stream, batch);
    return status == SIDA_OK ? add_bias(stream, batch) : status;
}

extern "C" sida_status sida_gemm_cuda(sida_stream *stream, const sida_gemm_call *call, bool tf32) {
    gemm_batch batch = {};
    batch.first = *call;
    batch.count = 1;
    return gemm_batched(stream, &batch, tf32);
}

/* y = x Wᵀ + bias */
extern "C" sida_status sida_linear_train_cuda(sida_stream *stream, float *y, const float *x,
                                              sida_weight w, const float *bias,
                                              sida_epilogue epilogue, int64_t n, bool tf32) {
    assert(w.dtype == SIDA_F32);
    gemm_batch batch = {};
    batch.count = 1;
    batch.first.c = y;
    batch.first.ldc = w.rows;
    batch.first.a = x;
    batch.first.lda = w.cols;
    batch.first.b = (const float *)w.data;
    batch.first.ldb = w.cols;
    batch.first.m = n;
    batch.first.n = w.rows;
    batch.first.k = w.cols;
    batch.first.transpose_b = true;
    batch.first.add = epilogue == SIDA_EPILOGUE_ADD;
    batch.bias = bias;
    batch.relu = epilogue == SIDA_EPILOGUE_RELU;
    return gemm_batched(stream, &batch, tf32);
}

/* --- sums of columns */

/* A block sums SUM_COLS columns of one part of the rows, SUM_ROWS rows at a time; the last block of
 * these columns to end sums up the parts. */
constexpr int SUM_COLS = 32, SUM_ROWS = 8;
constexpr int SUM_GROUPS = SIDA_COLUMN_SUM_COUNTS / (int)sizeof(unsigned);

/* The sum of a column's SUM_ROWS threads, in the first of them. */
static __device__ float over_rows(float (*sums)[SUM_COLS], float sum, int row, int column) {
    sums[row][column] = sum;
    __syncthreads();
    if (row == 0)
#pragma unroll
        for (int i = 1; i < SUM_ROWS; i++) sum += sums[i][column];
    return sum;
}

/* out, x and activated begin at the first of these columns; rows are `ld` apart. */
__global__ void __launch_bounds__(SUM_COLS *SUM_ROWS)
    column_sums_kernel(float *out, float *parts, unsigned *ended, float *x, const float *activated,
                       int64_t rows, int64_t cols, int64_t ld, int64_t part_rows) {
    __shared__ float sums[2][SUM_ROWS][SUM_COLS];
    __shared__ bool last;
    const int column = threadIdx.x % SUM_COLS, row = threadIdx.x / SUM_COLS;
    const int64_t c = (int64_t)blockIdx.x * SUM_COLS + column;
    const int64_t begin = (int64_t)blockIdx.y * part_rows;
    const int64_t end = begin + part_rows < rows ? begin + part_rows : rows;
    allow_next();
    await_inputs();
    float sum = 0.0f;
    if (c < cols)
#pragma unroll 4
        for (int64_t r = begin + row; r < end; r += SUM_ROWS) {
            float value = x[r * ld + c];
            if (activated && activated[r * ld + c] == 0.0f) x[r * ld + c] = value = 0.0f;
            sum += value;
        }
    if (!out) return;
    sum = over_rows(sums[0], sum, row, column);
    if (row == 0 && c < cols) parts[blockIdx.y * cols + c] = sum;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        last = atomicInc(&ended[blockIdx.x], gridDim.y - 1) == gridDim.y - 1; /* and 0 again */
    __syncthreads();
    if (!last) return;
    __threadfence();
    sum = 0.0f;
    if (c < cols)
#pragma unroll
        for (int i = row; i < SIDA_COLUMN_SUM_PARTS; i += SUM_ROWS)
            sum += __ldcg(&parts[i * cols + c]);
    sum = over_rows(sums[1], sum, row, column);
    if (row == 0 && c < cols) out[c] += sum;
}

extern "C" sida_status sida_column_sum_cuda(sida_stream *stream, float *out, float *x,
                                            const float *activated, int64_t rows, int64_t cols,
                                            float *workspace) {
    if (rows == 0 || cols == 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    const int64_t part_rows = (rows + SIDA_COLUMN_SUM_PARTS - 1) / SIDA_COLUMN_SUM_PARTS;
    const int64_t most = (int64_t)SUM_GROUPS * SUM_COLS; /* columns that there are counters for */
    float *parts = workspace + SUM_GROUPS;
    for (int64_t first = 0; status == SIDA_OK && first < cols; first += most) {
        const int64_t count = cols - first < most ? cols - first : most;
        const dim3 grid((unsigned)((count + SUM_COLS - 1) / SUM_COLS), SIDA_COLUMN_SUM_PARTS);
        status = launch_kernel("column sums kernel", stream, column_sums_kernel, grid,
                               SUM_COLS * SUM_ROWS, 0, out ? out + first : NULL, parts,
                               (unsigned *)workspace, x + first,
                               activated ? activated + first : NULL, rows, count, cols, part_rows);
    }
    return status;
}

extern "C" sida_status sida_linear_backward_cuda(sida_stream *stream,
                                                 const sida_linear_backward_call *call, bool tf32,
                                                 float *workspace) {
    const sida_weight *w = &call->weight;
    assert(w->dtype == SIDA_F32);
    sida_status status = SIDA_OK;
    if (call->d_x) {
        sida_gemm_call product = {};
        product.c = call->d_x;
        product.ldc = w->cols;
        product.a = call->d_y;
        product.lda = w->rows;
        product.b = (const float *)w->data;
        product.ldb = w->cols;
        product.m = call->n;
        product.n = w->cols;
        product.k = w->rows;
        product.add = true;
        status = sida_gemm_cuda(stream, &product, tf32);
    }
    if (status == SIDA_OK && call->d_weight) {
        sida_gemm_call product = {};
        product.c = call->d_weight;
        product.ldc = w->cols;
        product.a = call->d_y;
        product.lda = w->rows;
        product.b = call->x;
        product.ldb = w->cols;
        product.m = w->rows;
        product.n = w->cols;
        product.k = call->n;
        product.transpose_a = true;
        product.add = true;
        status = sida_gemm_cuda(stream, &product, tf32);
    }
    if (status == SIDA_OK && call->d_bias)
        status = sida_column_sum_cuda(stream, call->d_bias, (float *)call->d_y, NULL, call->n,
                                      w->rows, workspace);
    return status;
}
