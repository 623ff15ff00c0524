/* Experts of a wave in one launch a matrix: which rows are whose is read on the device, and every
 * expert's weights are streamed once for each 32 of its tokens (bf16, tensor cores) or each
 * PRODUCT_X of them (fp32 and fp16). */
#include "runtime/ops/mma_cuda.cuh"

constexpr int COMBINE_THREADS = 128;
/* Places along the grid for experts; more of them take turns. */
constexpr int64_t ALL_PLACES = 64, MAX_GRID_Z = 65535;
/* Blocks that share the tokens of an expert with many. */
constexpr int64_t ROW_BLOCKS = 4;

/* Expert number `index` of the call. */
struct expert_rows {
    const char *weights;
    int64_t first, count; /* its rows: call.rows[first] … */
};

/* False: none, or without rows. ids is read before it is known how many count, which saves a trip
 * to memory. */
static __device__ bool find_expert(expert_rows *out, const sida_expert_call &call, int32_t index) {
    const int32_t id = call.ids ? __ldcg(call.ids + index) : index;
    if (call.count_of && index >= __ldcg(call.count_of)) return false;
    out->first = __ldcg((const long long *)call.row_start + id);
    out->count = __ldcg((const long long *)call.row_start + id + 1) - out->first;
    out->weights = (const char *)__ldcg((const unsigned long long *)call.weights +
                                        (call.weights_by_expert ? id : index));
    return out->count > 0;
}

static __device__ size_t matrix_bytes(const sida_expert_shape &shape) {
    return (size_t)shape.d_model * (size_t)shape.d_ff * (shape.dtype == SIDA_F32 ? 4 : 2);
}

/* --- fp32 and fp16 */

/* The expert's part of the product; hidden: its part of the workspace. */
static __device__ product expert_product(const sida_expert_call &call, const expert_rows &expert,
                                         bool out) {
    const sida_expert_shape &shape = call.shape;
    float *hidden = call.workspace + expert.first * shape.d_ff;
    const size_t matrix = matrix_bytes(shape);
    product p = {};
    p.scale = 1.0f;
    p.x_divide = 1;
    if (out) {
        p.w = expert.weights + matrix * (shape.gated ? 2 : 1);
        p.x = hidden;
        p.y = call.h ? call.h : call.scratch;
        p.alpha = call.h ? call.alpha : NULL;
        p.y_index = call.rows + expert.first;
        p.ldx = p.cols = shape.d_ff;
        p.ldy = p.rows = shape.d_model;
        return p;
    }
    p.w = expert.weights;
    p.up = shape.gated ? expert.weights + matrix : NULL;
    p.activation = shape.activation;
    p.epilogue = SIDA_EPILOGUE_RELU; /* not gated */
    p.x = (const float *)call.x;
    p.x_index = call.rows + expert.first;
    p.x_divide = call.k;
    p.y = hidden;
    p.ldx = p.cols = shape.d_model;
    p.ldy = p.rows = shape.d_ff;
    return p;
}

template <typename W>
__global__ void __launch_bounds__(PRODUCT_WARPS *WARP)
    expert_kernel(sida_expert_call call, bool out) {
    await_inputs();
    allow_next();
    for (int32_t i = (int32_t)blockIdx.z; i < call.count; i += (int32_t)gridDim.z) {
        expert_rows expert;
        if (!find_expert(&expert, call, i)) continue;
        product p = expert_product(call, expert, out);
        product_block<W>(p, expert.count, (int64_t)blockIdx.x * PRODUCT_X,
                         (int64_t)gridDim.x * PRODUCT_X,
                         (int64_t)blockIdx.y * product_columns(p.up != NULL));
    }
}

/* Blocks along x share an expert's tokens, along y its columns (`across`), along z are experts:
 * those that read the same weights run at the same time, and the L2 cache serves all but one. */
static dim3 expert_grid(const sida_expert_call *call, int64_t across, int64_t tokens) {
    const int64_t rows = call->rows_total;
    int64_t places = rows <= ALL_PLACES ? rows : rows / 2 > ALL_PLACES ? rows / 2 : ALL_PLACES;
    if (places > call->count) places = call->count;
    if (places > MAX_GRID_Z) places = MAX_GRID_Z;
    int64_t deep = (rows + tokens * call->count - 1) / (tokens * call->count);
    return dim3((unsigned)(deep < ROW_BLOCKS ? deep : ROW_BLOCKS), (unsigned)across,
                (unsigned)places);
}

static sida_status launch_plain(sida_stream *stream, const sida_expert_call *call, bool out) {
    const sida_expert_shape *shape = &call->shape;
    const int64_t columns = product_columns(!out && shape->gated);
    const dim3 grid = expert_grid(
        call, ((out ? shape->d_model : shape->d_ff) + columns - 1) / columns, PRODUCT_X);
    const char *what = "expert kernel";
    const unsigned threads = PRODUCT_WARPS * WARP;
    if (shape->dtype == SIDA_F32)
        return launch_kernel(what, stream, expert_kernel<float>, grid, threads, 0, *call, out);
    if (shape->dtype == SIDA_F16)
        return launch_kernel(what, stream, expert_kernel<__half>, grid, threads, 0, *call, out);
    return launch_kernel(what, stream, expert_kernel<__nv_bfloat16>, grid, threads, 0, *call, out);
}

/* --- bf16 */

/* Hidden rows are bf16 in the workspace. */
static __device__ mma_product expert_mma(const sida_expert_call &call, const expert_rows &expert,
                                         bool out) {
    const sida_expert_shape &shape = call.shape;
    __nv_bfloat16 *hidden = (__nv_bfloat16 *)call.workspace + expert.first * shape.d_ff;
    const size_t matrix = matrix_bytes(shape);
    mma_product p = {};
    p.n = expert.count;
    p.scale = 1.0f;
    p.x_divide = 1;
    if (out) {
        p.w = (const __nv_bfloat16 *)(expert.weights + matrix * (shape.gated ? 2 : 1));
        p.x = hidden;
        p.y = call.h ? call.h : call.scratch;
        p.alpha = call.h ? call.alpha : NULL;
        p.y_index = call.rows + expert.first;
        p.ldx = p.cols = shape.d_ff;
        p.ldy = p.rows = shape.d_model;
        return p;
    }
    p.w = (const __nv_bfloat16 *)expert.weights;
    p.up = shape.gated ? (const __nv_bfloat16 *)(expert.weights + matrix) : NULL;
    p.activation = shape.activation;
    p.epilogue = shape.gated ? SIDA_EPILOGUE_NONE : SIDA_EPILOGUE_RELU;
    p.x = call.x;
    p.x_index = call.rows + expert.first;
    p.x_divide = call.k;
    p.y = hidden;
    p.y_bf16 = true;
    p.ldx = p.cols = shape.d_model;
    p.ldy = p.rows = shape.d_ff;
    return p;
}

/* Which experts a launch is for. Where there are many rows in all, those with many are computed in
 * larger tiles by a launch of their own. */
enum expert_kind { EXPERTS_ALL, EXPERTS_FEW, EXPERTS_MANY };
constexpr int64_t MANY_IN_ALL = 1024, MANY_OF_ONE = 32;

/* A block's tokens go Shape::MOST_X at a time, the rest of them in a smaller number of tiles.
 *
 * The kernel of the first matrix lets the second's start once it has its own inputs: then dispatch
 * has ended, and the second may read what dispatch wrote (past the L1 cache, which may be older)
 * and load weights before it waits for the first. */
template <typename Shape>
__global__ void __launch_bounds__(Shape::THREADS, Shape::TILES_X > 4 ? 1 : 2)
    expert_mma_kernel(sida_expert_call call, bool out, expert_kind kind) {
    __shared__ mma_shared<Shape> shared;
    const int group = threadIdx.x / (Shape::SLICES * WARP);
    bool waited = !out;
    if (!out) await_inputs();
    allow_next();
    for (int32_t i = (int32_t)blockIdx.z; i < call.count; i += (int32_t)gridDim.z) {
        expert_rows expert;
        if (!find_expert(&expert, call, i)) continue;
        if (kind != EXPERTS_ALL && (expert.count > MANY_OF_ONE) != (kind == EXPERTS_MANY)) continue;
        const mma_product p = expert_mma(call, expert, out);
        const int64_t step = p.up ? TILE_ROWS : Shape::R * TILE_ROWS;
        const int64_t row = ((int64_t)blockIdx.y * Shape::GROUPS + group) * step;
        for (int64_t first = (int64_t)blockIdx.x * Shape::MOST_X; first < p.n;
             first += (int64_t)gridDim.x * Shape::MOST_X) {
            const int left = p.n - first < Shape::MOST_X ? (int)(p.n - first) : Shape::MOST_X;
            mma_weights<Shape> weights;
            weights.start(p, row);
            weights.load(weights.begin);
            if (!waited) await_inputs();
            waited = true;
            if (Shape::TILES_X == 4 && left <= TILE_X)
                mma_tiles<Shape, __nv_bfloat16, false, 1>(p, weights, shared, row, first, left);
            else if (Shape::TILES_X == 4 && left <= 2 * TILE_X)
                mma_tiles<Shape, __nv_bfloat16, false, 2>(p, weights, shared, row, first, left);
            else if (left <= 4 * TILE_X)
                mma_tiles<Shape, __nv_bfloat16, false, 4>(p, weights, shared, row, first, left);
            else if (Shape::TILES_X > 4)
                mma_tiles<Shape, __nv_bfloat16, false, Shape::TILES_X>(p, weights, shared, row,
                                                                       first, left);
        }
    }
    if (!waited) await_inputs(); /* a kernel has not ended before the one in front of it */
}

template <typename Shape>
static sida_status launch_shape(sida_stream *stream, const sida_expert_call *call, bool out,
                                expert_kind kind) {
    const sida_expert_shape *shape = &call->shape;
    const int64_t rows = out ? shape->d_model : shape->d_ff;
    const int64_t step = Shape::GROUPS * (!out && shape->gated ? 1 : Shape::R) * TILE_ROWS;
    dim3 grid = expert_grid(call, (rows + step - 1) / step, Shape::MOST_X);
    if (kind == EXPERTS_FEW) grid.x = 1;
    return launch_kernel("expert kernel", stream, expert_mma_kernel<Shape>, grid, Shape::THREADS, 0,
                         *call, out, kind);
}

static sida_status launch_mma(sida_stream *stream, const sida_expert_call *call, bool out) {
    const bool wide = (out ? call->shape.d_ff : call->shape.d_model) >= 2048;
    if (!out && call->shape.gated)
        return wide ? launch_shape<mma_shape<2, 8, 1>>(stream, call, out, EXPERTS_ALL)
                    : launch_shape<mma_shape<2, 4, 2>>(stream, call, out, EXPERTS_ALL);
    const bool many = call->rows_total >= MANY_IN_ALL;
    const expert_kind kind = many ? EXPERTS_FEW : EXPERTS_ALL;
    sida_status status = wide ? launch_shape<mma_shape<1, 8, 1>>(stream, call, out, kind)
                              : launch_shape<mma_shape<1, 4, 2>>(stream, call, out, kind);
    if (status != SIDA_OK || !many) return status;
    return launch_shape<mma_shape<2, 1, 4, 1, 8>>(stream, call, out, EXPERTS_MANY);
}

extern "C" sida_status sida_expert_cuda(sida_stream *stream, const sida_expert_call *call) {
    if (call->count <= 0 || call->rows_total <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    if (call->x_type == SIDA_F32) {
        status = launch_plain(stream, call, false);
        return status == SIDA_OK ? launch_plain(stream, call, true) : status;
    }
    const sida_expert_shape *shape = &call->shape;
    if (shape->dtype != SIDA_BF16 || shape->d_model % 8 || shape->d_ff % 8 ||
        (uintptr_t)call->x % 16 || (uintptr_t)call->workspace % 16)
        return sida_fail(SIDA_ERROR_UNSUPPORTED,
                         "experts of %d x %d %s weights take no bf16 activations", shape->d_model,
                         shape->d_ff, sida_dtype_name(shape->dtype));
    status = launch_mma(stream, call, false);
    return status == SIDA_OK ? launch_mma(stream, call, true) : status;
}

/* --- combination */

__global__ void combine_kernel(float *h, const float *scratch, const float *alpha,
                               const uint8_t *dropped, int32_t k, int64_t d) {
    allow_next();
    await_inputs();
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
    return launch_kernel("combine kernel", stream, combine_kernel, dim3((unsigned)n),
                         COMBINE_THREADS, 0, h, scratch, alpha, dropped, k, d);
}
