/* Products with bf16 weights on the tensor cores: y = x Wᵀ where the weights are read once,
 * straight from memory into the fragments of mma.sync, for up to 32 rows of x at a time.
 *
 * Weights are the mma's 16 x 16 operand A, rows of x its operand B (8 of them), so few tokens waste
 * tensor-core work and no memory traffic. A lane takes 16 bytes of a weight row and of a row of x:
 * columns 8t … 8t + 7 of each 32 (t = lane % 4). Both operands are permuted alike, so the sum is
 * the same. The columns are shared by SLICES warps of a block, whose sums meet in shared memory in
 * a fixed order: what comes out depends on the row of x, the weights and SLICES alone. */
#ifndef SIDA_RUNTIME_OPS_MMA_CUDA_CUH
#define SIDA_RUNTIME_OPS_MMA_CUDA_CUH

#include "runtime/ops/kernels_cuda.cuh"

constexpr int TILE_ROWS = 16, TILE_X = 8,
              CHUNK = 32; /* rows of W, rows of x, columns of an mma pair */

/* Rows of x are x[x_index[i] / x_divide] (NULL: i), of n; they go to y[y_index[i]] (NULL: i). */
struct mma_product {
    const __nv_bfloat16 *w, *up; /* [rows, cols]; up: the gate's other matrix, or NULL */
    const void *x;               /* bf16 or fp32 */
    const float *bias;
    void *y; /* bf16 or fp32 */
    const int32_t *x_index, *y_index;
    int64_t ldx, ldy, rows, cols, n;
    int32_t x_divide;
    float scale;
    sida_epilogue epilogue;
    sida_activation activation; /* with up */
    bool y_bf16;
    const float *alpha;        /* [rows of y]: y += alpha * …; NULL: no */
    const __nv_bfloat16 *norm; /* [cols], with the template's NORM */
    float epsilon;
};

__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, sizeof bits);
    return bits;
}

/* 16 bytes, loaded where this stands: the compiler would rather save registers, and wait for each
 * load just before its use. */
__device__ inline void load_now(uint32_t (&v)[4], const void *from) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "l"(from));
}

/* 8 columns of a row of x as they are stored, and as bf16; with a norm its weights are multiplied
 * in, and squares grows by those of x in fp32. */
template <typename X> struct x_columns;
template <> struct x_columns<__nv_bfloat16> {
    uint4 v;
    __device__ void load(const __nv_bfloat16 *x) { v = *(const uint4 *)x; }
    template <bool NORM> __device__ uint4 narrow(const uint4 &, bool, float &) const {
        static_assert(!NORM, "a norm needs x in fp32");
        return v;
    }
};
template <> struct x_columns<float> {
    float4 low, high;
    __device__ void load(const float *x) {
        load_now((uint32_t(&)[4])low, x);
        load_now((uint32_t(&)[4])high, x + 4);
    }
    template <bool NORM>
    __device__ uint4 narrow(const uint4 &norm, bool counts, float &squares) const {
        float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        if (NORM) {
            __nv_bfloat162 weights[4];
            float sum = 0.0f;
            memcpy(weights, &norm, sizeof weights);
#pragma unroll
            for (int i = 0; i < 8; i++) sum = fmaf(v[i], v[i], sum);
            squares += counts ? sum : 0.0f;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float2 w = __bfloat1622float2(weights[i]);
                v[2 * i] *= w.x;
                v[2 * i + 1] *= w.y;
            }
        }
        return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                          pack_bf16(v[6], v[7]));
    }
};

/* How a block is laid out: SLICES warps share the columns of one group of R row tiles, GROUPS
 * groups beside each other. R is 2 for a gate (the same rows of w and up) or for a pair of row
 * tiles. */
template <int R_, int SLICES_, int GROUPS_, int AHEAD_ = 3, int TILES_X_ = 4> struct mma_shape {
    static constexpr int R = R_, SLICES = SLICES_, GROUPS = GROUPS_;
    static constexpr int AHEAD = AHEAD_;     /* chunks of columns that a warp loads at once */
    static constexpr int TILES_X = TILES_X_; /* at most */
    static constexpr int MOST_X = TILES_X * TILE_X;
    static constexpr int WARPS = SLICES * GROUPS, THREADS = WARPS * WARP;
    /* Floats of a row of x in shared memory: the banks of a quad's neighbours differ. */
    static constexpr int STRIDE = R * TILE_ROWS + 4;
};

template <typename Shape> struct mma_shared {
    float part[Shape::WARPS][Shape::MOST_X * Shape::STRIDE];
    float squares[Shape::SLICES][Shape::MOST_X];
};

/* The weights of a warp: its rows g and g + 8 of each tile, from its first column on. */
template <typename Shape> struct mma_weights {
    const __nv_bfloat16 *row[Shape::R][2];
    int32_t begin, end; /* columns; begin counts the lane's own offset */
    uint4 ahead[Shape::AHEAD][Shape::R][2];

    /* first: the group's first row; with `up` both tiles are the same rows. */
    __device__ void start(const mma_product &p, int64_t first) {
        const int lane = threadIdx.x % WARP, slice = threadIdx.x / WARP % Shape::SLICES;
        const int32_t cols = (int32_t)p.cols, chunks = (cols + CHUNK - 1) / CHUNK;
        const int32_t own = (chunks + Shape::SLICES - 1) / Shape::SLICES * CHUNK;
        begin = slice * own + lane % 4 * 8;
        end = (slice + 1) * own < cols ? (slice + 1) * own : cols;
#pragma unroll
        for (int r = 0; r < Shape::R; r++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int64_t at = first + (p.up ? 0 : r * TILE_ROWS) + half * 8 + lane / 4;
                if (at >= p.rows) at = p.rows - 1; /* read again, not written */
                row[r][half] = (p.up && r ? p.up : p.w) + at * p.cols;
            }
    }
    __device__ void load(int32_t k) {
#pragma unroll
        for (int i = 0; i < Shape::AHEAD; i++)
#pragma unroll
            for (int r = 0; r < Shape::R; r++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    ahead[i][r][half] = k + i * CHUNK < end
                                            ? __ldg((const uint4 *)(row[r][half] + k + i * CHUNK))
                                            : make_uint4(0, 0, 0, 0);
    }
};

/* c[r][j] += the chunk's weights times its 8 rows of x. */
template <int R, int T>
__device__ inline void multiply(float (&c)[R][T][4], const uint4 (&weights)[R][2], int j, uint4 b) {
#pragma unroll
    for (int r = 0; r < R; r++) {
        const uint4 low = weights[r][0], high = weights[r][1];
        const uint32_t first[4] = {low.x, high.x, low.y, high.y};
        const uint32_t second[4] = {low.z, high.z, low.w, high.w};
        mma_bf16(c[r][j], first, b.x, b.y);
        mma_bf16(c[r][j], second, b.z, b.w);
    }
}

/* A warp's columns, AHEAD chunks at a time: for few rows of x, where a warp has few turns.
 *
 * Beyond its columns a lane has zeros for weights, and any columns of x will do: no branch keeps
 * the loads apart. */
template <typename Shape, typename X, bool NORM, int T>
__device__ inline void sum_chunks(float (&c)[Shape::R][T][4], float (&squares)[T],
                                  mma_weights<Shape> &weights, const X *const (&x)[T],
                                  const __nv_bfloat16 *norms) {
    const int32_t offset = threadIdx.x % 4 * 8;
    for (int32_t k = weights.begin; k - offset < weights.end; k += Shape::AHEAD * CHUNK) {
        if (k != weights.begin) weights.load(k);
        x_columns<X> columns[Shape::AHEAD][T];
        uint4 norm[Shape::AHEAD];
#pragma unroll
        for (int i = 0; i < Shape::AHEAD; i++) {
            const int32_t at = k + i * CHUNK < weights.end ? k + i * CHUNK : 0;
#pragma unroll
            for (int j = 0; j < T; j++) columns[i][j].load(x[j] + at);
            if (NORM) norm[i] = __ldg((const uint4 *)(norms + at));
        }
#pragma unroll
        for (int i = 0; i < Shape::AHEAD; i++)
#pragma unroll
            for (int j = 0; j < T; j++)
                multiply(c, weights.ahead[i], j,
                         columns[i][j].template narrow<NORM>(norm[i], k + i * CHUNK < weights.end,
                                                             squares[j]));
    }
}

/* The same a chunk at a time, the next one's loads under way: for many rows of x. AHEAD is 1. */
template <typename Shape, typename X, int T>
__device__ inline void sum_chunks_in_turn(float (&c)[Shape::R][T][4], mma_weights<Shape> &weights,
                                          const X *const (&x)[T]) {
    const int32_t offset = threadIdx.x % 4 * 8;
    x_columns<X> next[T];
    float none = 0.0f;
    if (weights.begin - offset >= weights.end) return;
#pragma unroll
    for (int j = 0; j < T; j++)
        next[j].load(x[j] + (weights.begin < weights.end ? weights.begin : 0));
    for (int32_t k = weights.begin; k - offset < weights.end; k += CHUNK) {
        const int32_t then = k + CHUNK < weights.end ? k + CHUNK : 0;
        uint4 now[Shape::R][2];
        x_columns<X> columns[T];
#pragma unroll
        for (int r = 0; r < Shape::R; r++)
#pragma unroll
            for (int half = 0; half < 2; half++) now[r][half] = weights.ahead[0][r][half];
#pragma unroll
        for (int j = 0; j < T; j++) columns[j] = next[j];
        weights.load(k + CHUNK);
#pragma unroll
        for (int j = 0; j < T; j++) next[j].load(x[j] + then);
#pragma unroll
        for (int j = 0; j < T; j++)
            multiply(c, now, j,
                     columns[j].template narrow<false>(make_uint4(0, 0, 0, 0), true, none));
    }
}

/* An element of y, and what is there already: read early, so that nobody waits for it at the end.
 */
struct mma_target {
    int64_t at;
    float before, alpha, bias;

    /* Row i of x, column of y; a column beyond the last is not written. */
    __device__ void find(const mma_product &p, int64_t i, int64_t column) {
        before = bias = 0.0f;
        alpha = 1.0f;
        if (column >= p.rows) return;
        const int64_t to = p.y_index ? p.y_index[i] : i;
        at = to * p.ldy + column;
        if (p.alpha) alpha = p.alpha[to];
        if (p.bias) bias = p.bias[column];
        if (p.alpha || p.epilogue == SIDA_EPILOGUE_ADD) before = ((const float *)p.y)[at];
    }
    __device__ void write(const mma_product &p, float value) const {
        value += bias;
        if (p.epilogue == SIDA_EPILOGUE_RELU) value = value < 0.0f ? 0.0f : value;
        if (p.y_bf16)
            ((__nv_bfloat16 *)p.y)[at] = __float2bfloat16(value);
        else
            ((float *)p.y)[at] = fmaf(alpha, value, before);
    }
};

/* The sums of the block's rows of W with rows first_x … first_x + count - 1 of x (count <= 8 T),
 * and what becomes of them. All threads of the block come here; weights.load(weights.begin) has
 * been called. row: the group's first. */
template <typename Shape, typename X, bool NORM, int T>
__device__ void mma_tiles(const mma_product &p, mma_weights<Shape> &weights,
                          mma_shared<Shape> &shared, int64_t row, int64_t first_x, int count) {
    constexpr int R = Shape::R, STRIDE = Shape::STRIDE;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    float c[R][T][4], squares[T];
    const X *x[T];
    int32_t rows[T];
#pragma unroll
    for (int j = 0; j < T; j++)
        rows[j] = (int32_t)first_x + (j * TILE_X + g < count ? j * TILE_X + g : count - 1);
    if (p.x_index) {
#pragma unroll
        for (int j = 0; j < T; j++) rows[j] = p.x_index[rows[j]];
        if (p.x_divide > 1)
#pragma unroll
            for (int j = 0; j < T; j++) rows[j] /= p.x_divide;
    }
#pragma unroll
    for (int j = 0; j < T; j++) {
        x[j] = (const X *)p.x + rows[j] * p.ldx;
        squares[j] = 0.0f;
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) c[r][j][i] = 0.0f;
    }
    /* Neighbouring threads write neighbouring columns of y. */
    const int wide = p.up ? TILE_ROWS : R * TILE_ROWS;
    const int group = warp / Shape::SLICES, all = wide * count, step = Shape::SLICES * WARP;
    const int own = threadIdx.x % step;
    mma_target target;
    if (own < all) target.find(p, first_x + own / wide, row + own % wide);
    if (Shape::AHEAD == 1)
        sum_chunks_in_turn<Shape, X, T>(c, weights, x);
    else
        sum_chunks<Shape, X, NORM, T>(c, squares, weights, x, p.norm);
    __syncthreads(); /* who read the sums before these */
    float *part = shared.part[warp];
#pragma unroll
    for (int j = 0; j < T; j++) {
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                part[(j * TILE_X + 2 * t + i % 2) * STRIDE + r * TILE_ROWS + g + i / 2 * 8] =
                    c[r][j][i];
        if (NORM) {
            float sum = squares[j];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            if (warp < Shape::SLICES && t == 0) shared.squares[warp][j * TILE_X + g] = sum;
        }
    }
    __syncthreads();
    for (int e = own; e < all; e += step) {
        const int i = e / wide, column = e % wide;
        if (e != own) target.find(p, first_x + i, row + column);
        if (row + column >= p.rows) continue;
        float sum = 0.0f, up = 0.0f, factor = p.scale;
#pragma unroll
        for (int s = 0; s < Shape::SLICES; s++) {
            const float *from = shared.part[group * Shape::SLICES + s] + i * STRIDE + column;
            sum += from[0];
            if (R == 2 && p.up) up += from[TILE_ROWS];
        }
        if (NORM) {
            float squared = 0.0f;
#pragma unroll
            for (int s = 0; s < Shape::SLICES; s++) squared += shared.squares[s][i];
            factor /= sqrtf(squared / (float)p.cols + p.epsilon);
        }
        float value = sum * factor;
        if (p.up) value = activate(value, p.activation) * up;
        target.write(p, value);
    }
}

/* Whether the weights' rows and x's begin at multiples of 16 bytes. */
static inline bool mma_fits(const void *w, const void *x, int64_t cols, int64_t ldx,
                            sida_dtype x_type) {
    const int64_t step = x_type == SIDA_F32 ? 4 : 8;
    return cols % 8 == 0 && cols < INT32_MAX / 2 && ldx % step == 0 &&
           ((uintptr_t)w | (uintptr_t)x) % 16 == 0;
}

#endif
