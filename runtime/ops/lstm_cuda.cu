/* The LSTM's recurrence. A warp makes four units at a time, their sixteen rows of W_hh, and then
 * their new cells and outputs; of its lanes, 8 u + 2 g and the next hold gate g of unit u.
 *
 * Up to 256 units on compute capability 9.0: a cluster of eight blocks keeps W_hh in registers for
 * a whole sequence and tells each other h_t through distributed shared memory. Otherwise one block
 * a sequence reads W_hh again at every step. Both do the same sums in the same order, from the
 * sequence's own data alone. The two directions of a layer run at the same time: blockIdx.y. */
#include "runtime/ops/cluster_cuda.cuh"
#include "runtime/ops/dots_cuda.cuh"

#include <assert.h>

constexpr int GATES = 4, UNITS = DOTS / GATES;

struct lstm_pair {
    sida_lstm_call of[2]; /* one or two */
};

/* --- one step of a warp's four units */

/* The products' sums to gates, cells and outputs. x is the lane's gate without W_hh h, bias its
 * bias; c the cell of the lane's unit, before and after. Returns h of the lane's unit, and in
 * `gate` the activated gate. The CPU's formulas (lstm_cpu.c): a quotient that overflows is 0. */
static __device__ float cell(float (&sum)[DOTS], float x, float bias, float &c, float &gate) {
    const int lane = threadIdx.x % WARP, unit = lane & ~7;
    const bool candidate = (lane & 6) == 4;
    const float z = x + (sum_of_lane(sum) + bias);
    const float q = __fdividef(1.0f, 1.0f + expf(candidate ? 2.0f * z : -z));
    gate = candidate ? 1.0f - 2.0f * q : q;
    const float in = __shfl_sync(ALL_LANES, gate, unit);
    const float forget = __shfl_sync(ALL_LANES, gate, unit + 2);
    const float squashed = __shfl_sync(ALL_LANES, gate, unit + 4);
    const float open = __shfl_sync(ALL_LANES, gate, unit + 6);
    c = fmaf(forget, c, in * squashed);
    return open * (1.0f - 2.0f * __fdividef(1.0f, 1.0f + expf(2.0f * c)));
}

/* Row `row` of a warp's sixteen: W_hh has gate g of unit u at g * hidden + u. For the last group's
 * units beyond `hidden` it is one that exists; what comes of it is not kept. */
static __device__ const float *row_of(const sida_lstm_call &call, int32_t group, int row) {
    int32_t unit = group * UNITS + row / GATES;
    if (unit >= call.hidden) unit = call.hidden - 1;
    return (const float *)call.recurrent.data +
           ((int64_t)(row % GATES) * call.hidden + unit) * call.hidden;
}

/* What the token of row i leaves behind. */
static __device__ void keep(const sida_lstm_call &call, int64_t i, int32_t unit, float gate,
                            float c, float h) {
    const int lane = threadIdx.x % WARP, which = lane / 2 % GATES;
    if (lane % 2 == 0) call.gates[(i * GATES + which) * call.hidden + unit] = gate;
    if (lane % 8 == 0) call.out[i * call.ldo + unit] = h;
    if (lane % 8 == 1) call.cells[i * call.hidden + unit] = c;
}

static __device__ void keep_state(const sida_lstm_call &call, int32_t s, int32_t unit, float c,
                                  float h) {
    const int lane = threadIdx.x % WARP;
    if (!call.state_h) return;
    if (lane % 8 == 0) call.state_h[(int64_t)s * call.hidden + unit] = h;
    if (lane % 8 == 1) call.state_c[(int64_t)s * call.hidden + unit] = c;
}

/* --- a block a sequence */

constexpr int STREAM_WARPS = 16;

static __host__ __device__ int32_t padded(int32_t hidden) {
    return (hidden + UNITS - 1) / UNITS * UNITS;
}

template <bool ALIGNED>
__global__ void __launch_bounds__(STREAM_WARPS *WARP, 1) lstm_stream_kernel(lstm_pair pair) {
    extern __shared__ float4 shared4[];
    const sida_lstm_call &call = pair.of[blockIdx.y];
    const int32_t hidden = call.hidden, thread = threadIdx.x, lane = thread % WARP;
    const int32_t pad = padded(hidden), which = lane / 2 % GATES;
    float *before = (float *)shared4, *after = before + pad;
    await_inputs();
    const int32_t s = (int32_t)blockIdx.x;
    const int64_t begin = call.offsets[s], end = call.offsets[s + 1];
    const int64_t state = (int64_t)s * hidden;
    if (begin < end)
        for (int32_t k = thread; k < pad; k += STREAM_WARPS * WARP) {
            before[k] = call.state_h && k < hidden ? call.state_h[state + k] : 0.0f;
            after[k] = 0.0f;
        }
    __syncthreads();
    const int64_t way = call.reverse ? -1 : 1, first = call.reverse ? end - 1 : begin;
    const int64_t last = call.reverse ? begin : end - 1;
    for (int64_t t = 0; t < end - begin; t++) {
        const int64_t i = first + way * t; /* the row of the token taken */
        for (int32_t group = thread / WARP; group * UNITS < hidden; group += STREAM_WARPS) {
            const int32_t unit = group * UNITS + lane / 8;
            const bool inside = unit < hidden;
            float x = 0.0f, bias = 0.0f, c = 0.0f, gate;
            if (inside) {
                x = call.gates[(i * GATES + which) * hidden + unit];
                bias = call.bias[which * hidden + unit];
                if (i != first)
                    c = call.cells[(i - way) * hidden + unit];
                else if (call.state_c)
                    c = call.state_c[state + unit];
            }
            float sum[DOTS] = {};
            for (int32_t column = 4 * lane; column < hidden; column += DOT_COLUMNS) {
                const float4 h = *(const float4 *)(before + column);
                float4 w[DOTS];
#pragma unroll
                for (int r = 0; r < DOTS; r++)
                    w[r] = columns4<ALIGNED>(row_of(call, group, r), column, hidden);
#pragma unroll
                for (int r = 0; r < DOTS; r++) sum[r] = add_dot4(sum[r], w[r], h);
            }
            const float h = cell(sum, x, bias, c, gate);
            if (inside) {
                keep(call, i, unit, gate, c, h);
                if (lane % 8 == 0) after[unit] = h;
                if (i == last) keep_state(call, s, unit, c, h);
            }
        }
        __syncthreads();
        float *other = before;
        before = after;
        after = other;
    }
    allow_next(); /* late: what follows would hold its place on the device for all this time */
}

/* --- a cluster a sequence, and the next
 *
 * h_t goes round by st.async: a store into another block's shared memory which, when it is there,
 * counts its bytes on a barrier beside it. Sends have running numbers, the same in every block.
 * Send n lies in h[n & 1] and completes phase n / 2 of full[n & 1]; a phase is complete when the
 * bytes of all warps are there. Nothing else keeps the blocks in step, because:
 * - a warp sends n + 1 only after it has read send n. So a warp that has seen all of send n + 1
 *   knows that every warp is done with send n, and may overwrite it with send n + 2;
 * - the first thread of a block asks for the bytes of phase n / 2 + 1 as soon as phase n / 2 is
 *   complete, before its own warp sends n + 1, thus before anybody sends n + 2;
 * - a sequence begins in the buffer that the next send will not use, and by then every send into it
 *   has been waited for. */

constexpr int CLUSTER = 8, CLUSTER_WARPS = 8, CLUSTER_HIDDEN = CLUSTER * CLUSTER_WARPS * UNITS;
/* Clusters at a time; a batch's other sequences follow. A cluster takes eight multiprocessors, and
 * the predictor is to leave some to the model. */
constexpr int CLUSTERS = 8;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif

template <bool ALIGNED>
__global__ void IN_CLUSTERS __launch_bounds__(CLUSTER_WARPS *WARP, 1)
    lstm_cluster_kernel(lstm_pair pair) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const sida_lstm_call &call = pair.of[blockIdx.y];
    __shared__ __align__(16) float h[2][CLUSTER_HIDDEN];
    __shared__ __align__(8) uint64_t full[2];
    constexpr int THREADS = CLUSTER_WARPS * WARP, CHUNKS = CLUSTER_HIDDEN / DOT_COLUMNS;
    constexpr uint32_t BARRIER = sizeof(uint64_t), BUFFER = CLUSTER_HIDDEN * sizeof(float);
    const int32_t hidden = call.hidden, groups = (hidden + UNITS - 1) / UNITS;
    const int thread = threadIdx.x, lane = thread % WARP, which = lane / 2 % GATES;
    const int32_t group = thread / WARP * CLUSTER + (int)blockIdx.x % CLUSTER;
    const int32_t unit = group * UNITS + lane / 8;
    const bool active = group < groups, inside = active && unit < hidden;
    const int blocks = groups < CLUSTER ? groups : CLUSTER; /* that have units */
    const uint32_t barrier = shared_address(full), bytes = (uint32_t)groups * sizeof(float4);
    const uint32_t to_h = address_in(shared_address(&h[0][group * UNITS]), lane % CLUSTER);
    const uint32_t to_barrier = address_in(barrier, lane % CLUSTER);
    for (int k = hidden + thread; k < CLUSTER_HIDDEN; k += THREADS) h[0][k] = h[1][k] = 0.0f;
    /* A loop stays a branch: of predicated instructions racecheck takes the two for two threads'.
     */
    if (thread == 0)
#pragma unroll 1
        for (int i = 0; i < 2; i++) {
            barrier_create(barrier + i * BARRIER);
            barrier_ask(barrier + i * BARRIER, bytes);
        }
    cluster_arrive();
    float4 w[CHUNKS][DOTS];
    float bias = 0.0f;
    if (active) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
#pragma unroll
            for (int r = 0; r < DOTS; r++)
                w[i][r] =
                    columns4<ALIGNED>(row_of(call, group, r), i * DOT_COLUMNS + 4 * lane, hidden);
        if (inside) bias = call.bias[which * hidden + unit];
    }
    cluster_wait();
    await_inputs();
    uint32_t sent = 0;
    for (int32_t s = (int32_t)blockIdx.x / CLUSTER; s < call.sequences;
         s += (int32_t)gridDim.x / CLUSTER) {
        const int64_t begin = call.offsets[s], length = call.offsets[s + 1] - begin;
        const int64_t way = call.reverse ? -1 : 1,
                      first = call.reverse ? begin + length - 1 : begin;
        if (length <= 0) continue;
        __syncthreads(); /* the last sequence's readers */
        float c = inside && call.state_c ? call.state_c[(int64_t)s * hidden + unit] : 0.0f;
        float last = 0.0f;
        for (int32_t k = thread; k < hidden; k += THREADS)
            h[(sent + 1) & 1][k] = call.state_h ? call.state_h[(int64_t)s * hidden + k] : 0.0f;
        __syncthreads();
        if (call.state_h) cluster_arrive(); /* all of it has been read here */
        const float *gates = call.gates + (first * GATES + which) * hidden + unit;
        float x = inside ? *gates : 0.0f;
        for (int64_t t = 0; active && t < length; t++) {
            const uint32_t next = sent + (uint32_t)t; /* the number of this step's send */
            const uint32_t from = (next + 1) & 1;
            float x_next = 0.0f, gate;
            if (inside && t + 1 < length) x_next = gates[way * (t + 1) * GATES * hidden];
            if (t > 0) {
                barrier_await(barrier + from * BARRIER, (next - 1) / 2);
                if (thread == 0) barrier_ask(barrier + from * BARRIER, bytes);
            }
            float sum[DOTS] = {};
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                const float4 v = *(const float4 *)&h[from][i * DOT_COLUMNS + 4 * lane];
#pragma unroll
                for (int r = 0; r < DOTS; r++) sum[r] = add_dot4(sum[r], w[i][r], v);
            }
            last = cell(sum, x, bias, c, gate);
            if (!inside) last = 0.0f;
            const float4 all =
                make_float4(__shfl_sync(ALL_LANES, last, 0), __shfl_sync(ALL_LANES, last, 8),
                            __shfl_sync(ALL_LANES, last, 16), __shfl_sync(ALL_LANES, last, 24));
            if (lane < blocks && t + 1 < length)
                send(to_h + (next & 1) * BUFFER, to_barrier + (next & 1) * BARRIER, all);
            if (inside) keep(call, first + way * t, unit, gate, c, last);
            x = x_next;
        }
        sent += (uint32_t)length - 1;
        if (call.state_h) cluster_wait(); /* and everywhere */
        if (inside) keep_state(call, s, unit, c, last);
    }
    allow_next();     /* late, as above */
    cluster_arrive(); /* no block goes while another may still write to it */
    cluster_wait();
#else
    __trap(); /* not launched there */
#endif
}

template <bool ALIGNED>
static sida_status launch(sida_stream *stream, const lstm_pair &pair, int directions) {
    const sida_lstm_call *call = &pair.of[0];
    const int32_t most = CLUSTERS / directions;
    const int32_t clusters = call->sequences < most ? call->sequences : most;
    if (call->hidden <= CLUSTER_HIDDEN && sida_cuda_early_launch(stream->backend))
        return launch_kernel("lstm kernel", stream, lstm_cluster_kernel<ALIGNED>,
                             dim3((unsigned)(clusters * CLUSTER), (unsigned)directions),
                             CLUSTER_WARPS * WARP, 0, pair);
    const size_t bytes = 2 * (size_t)padded(call->hidden) * sizeof(float), usual = 48 << 10;
    if (bytes > usual && cudaFuncSetAttribute(lstm_stream_kernel<ALIGNED>,
                                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              (int)bytes) != cudaSuccess) {
        (void)cudaGetLastError();
        return sida_fail(SIDA_ERROR_UNSUPPORTED,
                         "lstm: %d hidden units need %zu bytes of shared memory, more than this "
                         "GPU has; run the predictor on the CPU",
                         call->hidden, bytes);
    }
    return launch_kernel("lstm kernel", stream, lstm_stream_kernel<ALIGNED>,
                         dim3((unsigned)call->sequences, (unsigned)directions), STREAM_WARPS * WARP,
                         bytes, pair);
}

extern "C" sida_status sida_lstm_cuda(sida_stream *stream, const sida_lstm_call *call) {
    const sida_lstm_call *both[2] = {call, call->beside ? call->beside : call};
    const int directions = call->beside ? 2 : 1;
    assert(both[1]->sequences == call->sequences && both[1]->hidden == call->hidden);
    lstm_pair pair;
    bool aligned = call->hidden % 4 == 0;
    for (int i = 0; i < 2; i++) {
        if (both[i]->recurrent.dtype != SIDA_F32)
            return sida_fail(SIDA_ERROR_UNSUPPORTED, "lstm: the recurrent weights are not fp32");
        pair.of[i] = *both[i];
        if (pair.of[i].ldo == 0) pair.of[i].ldo = call->hidden;
        aligned = aligned && (uintptr_t)both[i]->recurrent.data % 16 == 0;
    }
    if (call->sequences <= 0) return SIDA_OK;
    sida_status status = sida_cuda_use(stream->backend);
    if (status != SIDA_OK) return status;
    return aligned ? launch<true>(stream, pair, directions)
                   : launch<false>(stream, pair, directions);
}
