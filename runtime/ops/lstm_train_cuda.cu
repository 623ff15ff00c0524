#include "runtime/ops/cluster_cuda.cuh"
#include "runtime/ops/lstm_train.h"

#include <assert.h>

/* A block has 32 units, the 128 rows of W_hh that are theirs, and all of its cluster's eight
 * sequences; in the cell a thread has one unit of one sequence: warp w the units 4 w … 4 w + 3. */
constexpr int BLOCK_UNITS = 32, GATES = 4;
constexpr int WARPS = 8, THREADS = WARPS * WARP;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define IN_CLUSTERS(units) __cluster_dims__((units) / BLOCK_UNITS, 1, 1)

constexpr int ROWS = GATES * BLOCK_UNITS, SEQUENCES = 8;
constexpr unsigned ALL_LANES = 0xffffffffu;

/* --- the tensor cores. In both products the factors' columns are taken in an order that lets a
 * thread load its share of several steps at once: the sum does not mind, as long as both agree. */

static __device__ void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           bool half) {
    if (half)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

static __device__ uint32_t halves(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, sizeof bits);
    return bits;
}

static __device__ uint32_t tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

/* A quotient that overflows is 0. */
static __device__ float sigmoid(float x) {
    return __fdividef(1.0f, 1.0f + __expf(-x));
}
static __device__ float squash(float x) {
    return 1.0f - 2.0f * __fdividef(1.0f, 1.0f + __expf(2.0f * x));
}

/* --- who does what */

struct place {
    int warp, lane, rank, cluster;
    int unit_here, unit; /* of the block, of the layer */
    int sequence;        /* of the cluster */
    int32_t start, count, longest;
};

static __device__ place place_of(const sida_lstm_train_call &q, int blocks) {
    place p;
    p.lane = threadIdx.x % WARP;
    p.warp = threadIdx.x / WARP;
    p.rank = (int)blockIdx.x % blocks;
    p.cluster = (int)blockIdx.x / blocks;
    p.unit_here = GATES * p.warp + (p.lane / 4) % 4;
    p.unit = p.rank * BLOCK_UNITS + p.unit_here;
    p.sequence = 2 * (p.lane % 4) + p.lane / 16;
    const int s = p.cluster * SEQUENCES + p.sequence;
    p.start = s < q.sequences ? q.rows.start[s] : 0;
    p.count = s < q.sequences ? q.rows.count[s] : 0;
    p.longest = (int32_t)__reduce_max_sync(ALL_LANES, (unsigned)p.count);
    return p;
}

/* The row of the t-th token taken; 0, which is not used, outside. */
static __device__ int64_t row_at(const sida_lstm_train_call &q, const place &p, int32_t t) {
    if (t < 0 || t >= p.count) return 0;
    return (int64_t)p.start + q.rows.step[q.reverse ? p.count - 1 - t : t];
}

/* Sends have running numbers: send n lies in buffer n & 1 and completes phase n / 2 of full[n & 1],
 * which asks for the next but one's bytes as soon as it is complete and before its block sends
 * again. A block sends n + 1 only when all of its warps (forward: the sending warp) have read send
 * n, so whoever has all of send n + 1 may overwrite send n. */
static __device__ void barriers_create(uint32_t full, uint32_t bytes) {
    if (threadIdx.x > 0) return;
    for (uint32_t i = 0; i < 2; i++) {
        barrier_create(full + i * (uint32_t)sizeof(uint64_t));
        barrier_ask(full + i * (uint32_t)sizeof(uint64_t), bytes);
    }
}
static __device__ void await_send(uint32_t full, uint32_t n, uint32_t bytes) {
    const uint32_t barrier = full + (n & 1) * (uint32_t)sizeof(uint64_t);
    barrier_await(barrier, n / 2);
    if (threadIdx.x == 0) barrier_ask(barrier, bytes);
}
#else
#define IN_CLUSTERS(units)
#endif

/* --- forward: gates [128, 8] = W_hh [128, units] h [units, 8] in every block */

template <int UNITS>
__global__ void IN_CLUSTERS(UNITS) __launch_bounds__(THREADS, 1)
    lstm_train_forward_kernel(sida_lstm_train_call q) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    constexpr int BLOCKS = UNITS / BLOCK_UNITS, CHUNKS = UNITS / 32, CHAINS = 4;
    constexpr int STRIDE = UNITS % 64 == 0 ? UNITS + 32 : UNITS; /* no two rows in the same banks */
    constexpr uint32_t BYTES = UNITS * SEQUENCES * sizeof(__half);
    __shared__ __align__(16) __half h[2][SEQUENCES][STRIDE];
    __shared__ __align__(8) uint64_t full_of[2];
    const uint32_t full = shared_address(full_of), buffer = sizeof h[0];
    for (int i = threadIdx.x; i < 2 * SEQUENCES * STRIDE; i += THREADS)
        (&h[0][0][0])[i] = __float2half_rn(0.0f);
    barriers_create(full, BYTES);
    cluster_arrive();
    await_inputs();
    const place p = place_of(q, BLOCKS);
    const int group = p.lane / 4, quad = p.lane % 4;
    /* The tile's rows: gates i of the warp's four units, then f, g and o. So a thread's sums are of
     * i and g, or of f and o, of one unit and two sequences. */
    uint32_t w[2 * CHUNKS][4];
    const float *upper =
        q.recurrent +
        (int64_t)(GATES * (p.rank * BLOCK_UNITS + GATES * p.warp + group % 4) + group / 4) * UNITS;
    const float *lower = upper + 2 * UNITS;
#pragma unroll
    for (int i = 0; i < 2 * CHUNKS; i++) {
        const int column = i / 2 * 32 + 8 * quad + i % 2 * 4;
        const float4 a = *(const float4 *)(upper + column), b = *(const float4 *)(lower + column);
        w[i][0] = halves(a.x, a.y);
        w[i][1] = halves(b.x, b.y);
        w[i][2] = halves(a.z, a.w);
        w[i][3] = halves(b.z, b.w);
    }
    float4 bias = ((const float4 *)q.biases[0])[p.unit];
    const float4 more = ((const float4 *)q.biases[1])[p.unit];
    bias = make_float4(bias.x + more.x, bias.y + more.y, bias.z + more.z, bias.w + more.w);
    /* The four lanes of a sequence share the sending of its four units to all blocks. */
    const uint32_t mine = shared_address(&h[0][p.sequence][p.rank * BLOCK_UNITS + GATES * p.warp]);
    uint32_t to[(BLOCKS + 3) / 4], at[(BLOCKS + 3) / 4];
#pragma unroll
    for (int i = 0; i < (BLOCKS + 3) / 4; i++) {
        const int block = i * 4 + group % 4;
        to[i] = address_in(mine, block < BLOCKS ? block : 0);
        at[i] = address_in(full, block < BLOCKS ? block : 0);
    }
    float4 *gates = (float4 *)q.gates;
    int64_t row = row_at(q, p, 0), row1 = row_at(q, p, 1);
    float4 x = {}, x1;
    if (p.count > 0) x = gates[row * UNITS + p.unit];
    float c = 0.0f;
    cluster_wait();
    for (int32_t t = 0; t < p.longest; t++) {
        const bool active = t < p.count;
        const int64_t row2 = row_at(q, p, t + 2);
        x1 = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (t + 1 < p.count) x1 = gates[row1 * UNITS + p.unit];
        if (t > 0) await_send(full, (uint32_t)t - 1, BYTES);
        float sums[CHAINS][4] = {};
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const uint4 b = *(const uint4 *)&h[(t + 1) & 1][group][i * 32 + 8 * quad];
            mma(sums[(2 * i) % CHAINS], w[2 * i], b.x, b.y, true);
            mma(sums[(2 * i + 1) % CHAINS], w[2 * i + 1], b.z, b.w, true);
        }
        float sum[4];
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
        /* Lanes 0 … 15 have i and g, lanes 16 … 31 f and o: they swap a sequence. */
        const bool high = p.lane >= 16;
        const float one = __shfl_xor_sync(ALL_LANES, high ? sum[0] : sum[1], 16);
        const float two = __shfl_xor_sync(ALL_LANES, high ? sum[2] : sum[3], 16);
        const float in = sigmoid((high ? one : sum[0]) + (x.x + bias.x));
        const float forget = sigmoid((high ? sum[1] : one) + (x.y + bias.y));
        const float squashed = squash((high ? two : sum[2]) + (x.z + bias.z));
        const float open = sigmoid((high ? sum[3] : two) + (x.w + bias.w));
        c = fmaf(forget, c, in * squashed);
        const float out = active ? open * squash(c) : 0.0f;
        if (t + 1 < p.longest) {
            const uint32_t bits = __half_as_ushort(__float2half_rn(out));
            const int first = p.lane & 19;
            uint2 four;
            four.x = __shfl_sync(ALL_LANES, bits, first) | __shfl_sync(ALL_LANES, bits, first + 4)
                                                               << 16;
            four.y = __shfl_sync(ALL_LANES, bits, first + 8) |
                     __shfl_sync(ALL_LANES, bits, first + 12) << 16;
            const uint32_t which = (uint32_t)t & 1;
#pragma unroll
            for (int i = 0; i < (BLOCKS + 3) / 4; i++)
                if (i * 4 + group % 4 < BLOCKS)
                    send(to[i] + which * buffer, at[i] + which * (uint32_t)sizeof(uint64_t), four);
        }
        if (active) {
            gates[row * UNITS + p.unit] = make_float4(in, forget, squashed, open);
            q.cells[row * UNITS + p.unit] = c;
            q.out[row * q.ld + p.unit] = out;
        }
        row = row1;
        row1 = row2;
        x = x1;
    }
    allow_next();     /* late: what follows would hold its place on the device for all this time */
    cluster_arrive(); /* no block goes while another may still write to it */
    cluster_wait();
#else
    __trap(); /* not launched there */
#endif
}

/* --- backward: every block multiplies the columns of W_hhᵀ that are its rows' with their gradient,
 * and the sums of all blocks meet where the unit is */

template <int UNITS>
__global__ void IN_CLUSTERS(UNITS) __launch_bounds__(THREADS, 1)
    lstm_train_backward_kernel(sida_lstm_train_call q) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    constexpr int BLOCKS = UNITS / BLOCK_UNITS, TILES = UNITS / 16;
    constexpr int PER_WARP = (TILES + WARPS - 1) / WARPS, STEPS = ROWS / 8, STRIDE = ROWS + 16;
    constexpr uint32_t BYTES = BLOCKS * BLOCK_UNITS * SEQUENCES * sizeof(float);
    __shared__ __align__(16) float received[2][BLOCKS][BLOCK_UNITS][SEQUENCES];
    __shared__ __align__(16) uint32_t factors[2][SEQUENCES][STRIDE];
    __shared__ __align__(8) uint64_t full_of[2];
    const uint32_t full = shared_address(full_of), buffer = sizeof received[0];
    barriers_create(full, BYTES);
    cluster_arrive();
    await_inputs();
    const place p = place_of(q, BLOCKS);
    const int group = p.lane / 4, quad = p.lane % 4;
    uint32_t w[PER_WARP][STEPS][4];
#pragma unroll
    for (int i = 0; i < PER_WARP; i++) {
        const int tile = p.warp * PER_WARP + i;
        const float *column = q.recurrent + (int64_t)p.rank * ROWS * UNITS + tile * 16 + group;
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            const float *a = column + (int64_t)(k / 2 * 16 + 4 * quad + k % 2 * 2) * UNITS;
            w[i][k][0] = tile < TILES ? tf32(a[0]) : 0;
            w[i][k][1] = tile < TILES ? tf32(a[8]) : 0;
            w[i][k][2] = tile < TILES ? tf32(a[UNITS]) : 0;
            w[i][k][3] = tile < TILES ? tf32(a[UNITS + 8]) : 0;
        }
    }
    /* Of a tile, a thread sends four sequences of one unit: its own two and its neighbour's. */
    const bool odd = p.lane & 1;
    uint32_t to[PER_WARP], at[PER_WARP];
#pragma unroll
    for (int i = 0; i < PER_WARP; i++) {
        const int tile = p.warp * PER_WARP + i, there = tile < TILES ? tile / 2 : 0;
        const int unit = tile % 2 * 16 + group + (odd ? 8 : 0);
        to[i] = address_in(shared_address(&received[0][p.rank][unit][quad / 2 * 4]), there);
        at[i] = address_in(full, there);
    }
    float4 *gates = (float4 *)q.gates;
    const int32_t last = p.longest - 1;
    /* Of tokens i, i - 1 and i - 2. */
    int64_t row = row_at(q, p, last), row1 = row_at(q, p, last - 1), row2 = row_at(q, p, last - 2);
    float4 gate = {}, total = {};
    float d_out = 0.0f, c = 0.0f, c_before = 0.0f, h_before = 0.0f, d_c = 0.0f;
    if (p.count > 0) c = q.cells[row_at(q, p, p.count - 1) * UNITS + p.unit];
    if (last >= 0 && last < p.count) {
        gate = gates[row * UNITS + p.unit];
        d_out = q.d_out[row * q.ld + p.unit];
        if (last > 0) {
            c_before = q.cells[row1 * UNITS + p.unit];
            h_before = q.out[row1 * q.ld + p.unit];
        }
    }
    cluster_wait();
    for (int32_t k = 0; k < p.longest; k++) {
        const int32_t i = last - k;
        const bool active = i < p.count;
        const int64_t row3 = row_at(q, p, i - 3);
        float4 gate1 = {};
        float d_out1 = 0.0f, c_before1 = 0.0f, h_before1 = 0.0f;
        if (i > 0 && i - 1 < p.count) {
            gate1 = gates[row1 * UNITS + p.unit];
            d_out1 = q.d_out[row1 * q.ld + p.unit];
            if (i > 1) {
                c_before1 = q.cells[row2 * UNITS + p.unit];
                h_before1 = q.out[row2 * q.ld + p.unit];
            }
        }
        float d_h = d_out;
        if (k > 0) {
            await_send(full, (uint32_t)k - 1, BYTES);
            float back = 0.0f;
#pragma unroll
            for (int b = 0; b < BLOCKS; b++)
                back += received[(k - 1) & 1][b][p.unit_here][p.sequence];
            d_h += back;
        }
        float4 d = {};
        if (active) {
            const float out = squash(c), d_cell = fmaf(d_h * gate.w, 1.0f - out * out, d_c);
            d.x = d_cell * gate.z * gate.x * (1.0f - gate.x);
            d.y = d_cell * c_before * gate.y * (1.0f - gate.y);
            d.z = d_cell * gate.x * (1.0f - gate.z * gate.z);
            d.w = d_h * out * gate.w * (1.0f - gate.w);
            d_c = d_cell * gate.y;
            c = c_before;
            gates[row * UNITS + p.unit] = d;
            q.cells[row * UNITS + p.unit] = h_before;
            total.x += d.x;
            total.y += d.y;
            total.z += d.z;
            total.w += d.w;
        }
        if (k + 1 < p.longest) {
            *(uint4 *)&factors[k & 1][p.sequence][GATES * p.unit_here] =
                make_uint4(tf32(d.x), tf32(d.y), tf32(d.z), tf32(d.w));
            __syncthreads();
            float sums[PER_WARP][2][4] = {};
#pragma unroll
            for (int m = 0; m < STEPS / 2; m++) {
                const uint4 b = *(const uint4 *)&factors[k & 1][group][m * 16 + 4 * quad];
#pragma unroll
                for (int j = 0; j < PER_WARP; j++) {
                    mma(sums[j][0], w[j][2 * m], b.x, b.y, false);
                    mma(sums[j][1], w[j][2 * m + 1], b.z, b.w, false);
                }
            }
            const uint32_t which = (uint32_t)k & 1;
#pragma unroll
            for (int j = 0; j < PER_WARP; j++) {
                float sum[4];
#pragma unroll
                for (int n = 0; n < 4; n++) sum[n] = sums[j][0][n] + sums[j][1][n];
                const float one = __shfl_xor_sync(ALL_LANES, odd ? sum[0] : sum[2], 1);
                const float two = __shfl_xor_sync(ALL_LANES, odd ? sum[1] : sum[3], 1);
                const float4 four = odd ? make_float4(one, two, sum[2], sum[3])
                                        : make_float4(sum[0], sum[1], one, two);
                if (p.warp * PER_WARP + j < TILES)
                    send(to[j] + which * buffer, at[j] + which * (uint32_t)sizeof(uint64_t), four);
            }
        }
        row = row1;
        row1 = row2;
        row2 = row3;
        gate = gate1;
        d_out = d_out1;
        c_before = c_before1;
        h_before = h_before1;
    }
    /* Over the cluster's sequences. */
    float *const totals[GATES] = {&total.x, &total.y, &total.z, &total.w};
#pragma unroll
    for (int g = 0; g < GATES; g++)
        for (int distance : {1, 2, 16})
            *totals[g] += __shfl_xor_sync(ALL_LANES, *totals[g], distance);
    if (p.sequence == 0) ((float4 *)q.d_biases)[(int64_t)p.cluster * UNITS + p.unit] = total;
    allow_next(); /* late, as above */
    cluster_arrive();
    cluster_wait();
#else
    __trap(); /* not launched there */
#endif
}

__global__ void __launch_bounds__(THREADS)
    bias_sums_kernel(float *first, float *second, const float *parts, int32_t count, int32_t cols) {
    allow_next();
    await_inputs();
    const int32_t column = (int32_t)blockIdx.x * THREADS + (int32_t)threadIdx.x;
    if (column >= cols) return;
    float sum = 0.0f;
    for (int32_t i = 0; i < count; i++) sum += parts[(int64_t)i * cols + column];
    first[column] += sum;
    second[column] += sum;
}

/* --- launches */

template <int UNITS>
static sida_status launch(sida_stream *stream, const sida_lstm_train_call *call, bool forward) {
    assert((uintptr_t)call->recurrent % 16 == 0 && (uintptr_t)call->gates % 16 == 0);
    const int32_t clusters = sida_lstm_train_clusters(call->sequences);
    const dim3 grid((unsigned)(clusters * (UNITS / BLOCK_UNITS)));
    if (forward)
        return launch_kernel("LSTM forward kernel", stream, lstm_train_forward_kernel<UNITS>, grid,
                             THREADS, 0, *call);
    return launch_kernel("LSTM backward kernel", stream, lstm_train_backward_kernel<UNITS>, grid,
                         THREADS, 0, *call);
}

static sida_status run(sida_stream *stream, const sida_lstm_train_call *call, bool forward) {
    if (call->sequences == 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    switch (call->units) {
    case 64:
        return launch<64>(stream, call, forward);
    case 96:
        return launch<96>(stream, call, forward);
    case 128:
        return launch<128>(stream, call, forward);
    case 192:
        return launch<192>(stream, call, forward);
    case 256:
        return launch<256>(stream, call, forward);
    default:
        return sida_fail(SIDA_ERROR_UNSUPPORTED, "cuda: no LSTM kernel of %d units", call->units);
    }
}

/* From two blocks on; a cluster of one has no other to send to. */
extern "C" bool sida_lstm_train_possible(const sida_backend *backend, int32_t units) {
    return sida_cuda_early_launch(backend) &&
           (units == 64 || units == 96 || units == 128 || units == 192 || units == 256);
}

extern "C" sida_status sida_lstm_train_forward_cuda(sida_stream *stream,
                                                    const sida_lstm_train_call *call) {
    return run(stream, call, true);
}

extern "C" sida_status sida_lstm_train_backward_cuda(sida_stream *stream,
                                                     const sida_lstm_train_call *call) {
    return run(stream, call, false);
}

extern "C" sida_status sida_lstm_train_biases_cuda(sida_stream *stream, float *const d_biases[2],
                                                   const sida_lstm_train_call *call) {
    const int32_t cols = GATES * call->units;
    if (call->sequences == 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    return launch_kernel("bias sums kernel", stream, bias_sums_kernel,
                         dim3((unsigned)((cols + THREADS - 1) / THREADS)), THREADS, 0, d_biases[0],
                         d_biases[1], call->d_biases, sida_lstm_train_clusters(call->sequences),
                         cols);
}
