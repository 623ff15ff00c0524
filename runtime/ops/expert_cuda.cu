/* Experts of a wave in one launch a phase: which rows are whose is read on the device, and every
 * expert's weights are streamed once for each PRODUCT_X of its tokens. */
#include "runtime/ops/kernels_cuda.cuh"

constexpr int MAX_GRID_Y = 65535, COMBINE_THREADS = 128;
/* Blocks that share the tokens of an expert with many; the others have nothing to do. */
constexpr int ROW_BLOCKS = 4;

/* rows[row_start] … rows[row_start + n - 1] are the expert's; hidden: its part of the workspace. */
static __device__ product expert_product(const sida_expert_call &call, int32_t index, bool out,
                                         int64_t *n) {
    const sida_expert_shape &shape = call.shape;
    const int32_t expert = call.ids ? call.ids[index] : index;
    int64_t first = call.row_start[expert];
    *n = call.row_start[expert + 1] - first;
    float *hidden = call.workspace + first * shape.d_ff;
    size_t matrix = (size_t)shape.d_model * (size_t)shape.d_ff * (shape.dtype == SIDA_F32 ? 4 : 2);
    const char *weights = (const char *)call.weights[call.weights_by_expert ? expert : index];
    product p = {};
    p.scale = 1.0f;
    p.x_divide = 1;
    if (out) {
        p.w = weights + matrix * (shape.gated ? 2 : 1);
        p.x = hidden;
        p.y = call.scratch;
        p.y_index = call.rows + first;
        p.ldx = p.cols = shape.d_ff;
        p.ldy = p.rows = shape.d_model;
        return p;
    }
    p.w = weights;
    p.up = shape.gated ? weights + matrix : NULL;
    p.activation = shape.activation;
    p.epilogue = SIDA_EPILOGUE_RELU; /* not gated */
    p.x = (const float *)call.x;
    p.x_index = call.rows + first;
    p.x_divide = call.k;
    p.y = hidden;
    p.ldx = p.cols = shape.d_model;
    p.ldy = p.rows = shape.d_ff;
    return p;
}

template <typename W>
__global__ void __launch_bounds__(PRODUCT_WARPS *WARP)
    expert_kernel(sida_expert_call call, bool out) {
    const int32_t count = call.count_of ? *call.count_of : call.count;
    for (int32_t i = (int32_t)blockIdx.y; i < count; i += (int32_t)gridDim.y) {
        int64_t n;
        product p = expert_product(call, i, out, &n);
        if (n == 0) continue;
        product_block<W>(p, n, (int64_t)blockIdx.z * PRODUCT_X, (int64_t)gridDim.z * PRODUCT_X,
                         (int64_t)blockIdx.x * product_columns(p.up != NULL));
    }
}

static void launch(cudaStream_t on, const sida_expert_call *call, bool out) {
    const sida_expert_shape *shape = &call->shape;
    int64_t columns = product_columns(!out && shape->gated);
    int64_t across = ((out ? shape->d_model : shape->d_ff) + columns - 1) / columns;
    int64_t places = call->rows_total < call->count ? call->rows_total : call->count;
    int64_t deep = (call->rows_total + PRODUCT_X - 1) / PRODUCT_X;
    dim3 grid((unsigned)across, (unsigned)(places < MAX_GRID_Y ? places : MAX_GRID_Y),
              (unsigned)(deep < ROW_BLOCKS ? deep : ROW_BLOCKS));
    if (shape->dtype == SIDA_F32)
        expert_kernel<float><<<grid, PRODUCT_WARPS * WARP, 0, on>>>(*call, out);
    else if (shape->dtype == SIDA_F16)
        expert_kernel<__half><<<grid, PRODUCT_WARPS * WARP, 0, on>>>(*call, out);
    else
        expert_kernel<__nv_bfloat16><<<grid, PRODUCT_WARPS * WARP, 0, on>>>(*call, out);
}

extern "C" sida_status sida_expert_cuda(sida_stream *stream, const sida_expert_call *call) {
    if (call->count <= 0 || call->rows_total <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    launch(stream_of(stream), call, false);
    status = launched("expert kernel, wi");
    if (status != SIDA_OK) return status;
    launch(stream_of(stream), call, true);
    return launched("expert kernel, wo");
}

__global__ void combine_kernel(float *h, const float *scratch, const float *alpha,
                               const uint8_t *dropped, int32_t k, int64_t d) {
    int64_t t = blockIdx.x;
    if (dropped && dropped[t]) return;
    for (int64_t c = threadIdx.x; c < d; c += blockDim.x) {
        float sum = h[t * d + c];
        for (int32_t r = 0; r < k; r++)
            sum = fmaf(alpha[t * k + r], scratch[(t * k + r) * d + c], sum);
        h[t * d + c] = sum;
    }
}

extern "C" sida_status sida_combine_cuda(sida_stream *stream, float *h, const float *scratch,
                                         const float *alpha, const uint8_t *dropped, int64_t n,
                                         int32_t k, int64_t d) {
    if (n <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    combine_kernel<<<(unsigned)n, COMBINE_THREADS, 0, stream_of(stream)>>>(h, scratch, alpha,
                                                                           dropped, k, d);
    return launched("combine kernel");
}
