// PTX that CUDA C++ has no name for: barriers in shared memory, bulk copies, wgmma's fences.
// Shared memory is addressed by 32-bit offsets of its own window; in a cluster the top byte of them
// says whose it is.

#pragma once

#include <cuda.h>

#include <cstdint>

namespace tli_engine::hopper {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Barriers.

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// makes initialised barriers visible to the copy engine
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// arrives, and has the phase wait for that many bytes of copies too
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Arrives at the barrier in the same place of a CTA of the cluster: after reads, for there is no fence
// for writes. With .release.cluster it would be one of the whole device (MEMBAR.ALL.GPU).
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile(
        "{ .reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// returns when the phase of that parity is complete; at once for parity 1 of a new barrier
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra leave;\n"
        "bra again;\n"
        "leave: }" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// __syncthreads() of some of the threads; barrier 0 is the block's own
template <int THREADS>
__device__ __forceinline__ void sync_threads(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

// Clusters.

// this CTA's place in its cluster
__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Waits for all threads of the cluster. Of what they wrote it orders only barriers, initialised before
// barrier_init_fence().
__device__ __forceinline__ void sync_cluster() {
    __syncwarp();
    asm volatile(
        "barrier.cluster.arrive.relaxed.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Copies into shared memory: each adds its bytes to a barrier's phase.

__device__ __forceinline__ void copy_bytes(
    uint32_t destination, const uint8_t* source, int bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            destination),
        "l"(source), "r"(bytes), "r"(barrier)
        : "memory");
}

// a box of a matrix, zeros where it sticks out
__device__ __forceinline__ void copy_box(
    uint32_t destination, const CUtensorMap& map, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(destination),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// the same into the same place of each CTA of the cluster in `ranks`, a bit each, and to its barrier
__device__ __forceinline__ void copy_box_to(
    uint16_t ranks, uint32_t destination, const CUtensorMap& map, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(destination),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(ranks)
        : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map));
}

// Programmatic dependent launch.

// lets the next kernel start its prologue as soon as there is room
__device__ __forceinline__ void allow_next_kernel() {
    asm volatile("griddepcontrol.launch_dependents;");
}

// returns when the kernels before are done and what they wrote is visible
__device__ __forceinline__ void wait_for_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Registers of a warpgroup.

template <int REGISTERS>
__device__ __forceinline__ void give_registers_back() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// wgmma.

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// returns when at most IN_FLIGHT of this warp's committed groups are not done
template <int IN_FLIGHT>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(IN_FLIGHT) : "memory");
}

// keeps the compiler from moving reads and writes of accumulators past this point
template <int COUNT>
__device__ __forceinline__ void keep_order(float (&accumulator)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(accumulator[i])::"memory");
}

// 16 columns further on in the right operand, in a descriptor's units of 16 bytes
constexpr uint64_t DESCRIPTOR_STEP = 2;

// Right operand in shared memory: rows of 64 16-bit numbers, swizzled by 128 bytes as the tensor map
// writes them, eight rows 1024 bytes apart (PTX ISA, "Matrix descriptor").
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t address) {
    constexpr uint64_t SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = 64ull << 32, UNUSED = 1ull << 16;
    return SWIZZLE_128 | EIGHT_ROWS | UNUSED | (address & 0x3ffff) >> 4;
}

// Loads and stores of shared memory.

__device__ __forceinline__ float load_float(uint32_t address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
    return v;
}

__device__ __forceinline__ float2 load_float2(uint32_t address) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
    return v;
}

__device__ __forceinline__ float4 load_float4(uint32_t address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address));
    return v;
}

__device__ __forceinline__ uint4 load_uint4(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address));
    return v;
}

__device__ __forceinline__ void store_float(uint32_t address, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v));
}

__device__ __forceinline__ void store_twice(uint32_t address, uint32_t a, uint32_t b) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%1,%2};" ::"r"(address), "r"(a), "r"(b));
}

// four 8x8 matrices of 16-bit numbers, transposed; lane l gives the address of row l % 8 of matrix l / 8
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]));
}

// an 8x8 matrix of 16-bit numbers, of which lane l has two of row l / 4, transposed
__device__ __forceinline__ uint32_t transpose(uint32_t v) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(v));
    return transposed;
}

// Flags in global memory.

__device__ __forceinline__ unsigned load_acquire(const unsigned* pointer) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
    return value;
}

// adds after what this thread has written, and what others had before a barrier with it
__device__ __forceinline__ void add_release(unsigned* pointer, unsigned value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}

}  // namespace tli_engine::hopper
