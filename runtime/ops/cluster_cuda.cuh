/* Blocks of a cluster that tell each other numbers through distributed shared memory (compute
 * capability 9.0 and up): st.async stores into another block's memory and, when it is there, counts
 * its bytes on a barrier beside it. */
#ifndef SIDA_RUNTIME_OPS_CLUSTER_CUDA_CUH
#define SIDA_RUNTIME_OPS_CLUSTER_CUDA_CUH

#include "runtime/ops/kernels_cuda.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

static __device__ uint32_t shared_address(const void *of) {
    return (uint32_t)__cvta_generic_to_shared(of);
}

/* The same place in another block of the cluster. */
static __device__ uint32_t address_in(uint32_t address, int block) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}

static __device__ void cluster_arrive(void) {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
static __device__ void cluster_wait(void) {
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* A barrier of one arrival, ask's, and some bytes. */
static __device__ void barrier_create(uint32_t barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
static __device__ void barrier_ask(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
static __device__ void barrier_await(uint32_t barrier, uint32_t phase) {
    uint32_t done;
    do {
        asm volatile("{\n\t"
                     ".reg .pred p;\n\t"
                     "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
                     "selp.b32 %0, 1, 0, p;\n\t"
                     "}"
                     : "=r"(done)
                     : "r"(barrier), "r"(phase & 1)
                     : "memory");
    } while (!done);
}

/* 16 or 8 bytes to another block's shared memory, counted by its barrier. */
static __device__ void send(uint32_t to, uint32_t barrier, float4 v) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, "
                 "%4}, [%5];" ::"r"(to),
                 "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
                 : "memory");
}
static __device__ void send(uint32_t to, uint32_t barrier, uint2 v) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, "
                 "[%3];" ::"r"(to),
                 "r"(v.x), "r"(v.y), "r"(barrier)
                 : "memory");
}

#endif

#endif
