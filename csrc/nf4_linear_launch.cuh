// The kernel, and the choice among its tiles.

#pragma once

#include <stdexcept>
#include <type_traits>

#include "launch.cuh"
#include "nf4_linear_epilogue.cuh"
#include "nf4_linear_low_rank.cuh"

namespace tli_engine::nf4 {

// __syncthreads() of all that share work
template <class C>
__device__ __forceinline__ void sync_workers() {
    if constexpr (C::CLUSTER == 1) {
        __syncthreads();
    } else {
        hopper::sync_cluster();
    }
}

template <class C>
__global__ void __launch_bounds__(C::THREADS, C::CTAS) nf4_linear_kernel(
    const __grid_constant__ CUtensorMap x_map,
    const __grid_constant__ CUtensorMap low_rank_map,
    const __grid_constant__ Problem p) {
    using namespace hopper;
    extern __shared__ __align__(1024) uint8_t shared[];
    if (shared_address(shared) != window<C>() + TABLE) __trap();
    if (threadIdx.x == 0) {
        Slot<C> slot;
        for (int i = 0; i < C::STAGES; i++, slot.advance()) {
            barrier_init(slot.full(), 1);
            // a lane of each warp that reads what this CTA fetches
            barrier_init(slot.empty(), 4 * C::WARPGROUPS * C::CLUSTER);
        }
        barrier_init_fence();
        prefetch_map(x_map);
    }
    // no CTA of a cluster sends, or arrives, before all have barriers
    sync_workers<C>();
    allow_next_kernel();
    if (threadIdx.x >= C::CONSUMERS) {
        give_registers_back<C::PRODUCER_REGISTERS>();
        if (threadIdx.x == C::CONSUMERS) produce<C>(x_map, low_rank_map, p);
        return;
    }
    take_registers<C::CONSUMER_REGISTERS>();
    fill_table<typename C::T, C::EXACT, C::CONSUMERS>(threadIdx.x, window<C>() + TABLE);
    sync_consumers<C>();
    float acc[C::BLOCKS][C::ACCUMULATORS];
    Worklist<C> work(p);
    Part part;
    Slot<C> slot;
    while (work.next(part)) {
        multiply_part<C>(acc, slot, part);
        if (p.low_rank.width > 0 && part.first == 0) {
            const int block = row_tile<C>(p, part.tile) * C::ROW_BLOCKS + (threadIdx.x >> 7) * C::BLOCKS;
            add_low_rank<C>(acc, slot, p, block * 64);
        }
        finish_part<C>(acc, p, work, part);
    }
}

template <class C>
void launch(const Call& call) {
    constexpr bool BF16 = std::is_same_v<typename C::T, __nv_bfloat16>;
    const CUtensorMap x_map = make_map(call.x, BF16, call.m, call.contraction, C::FETCHED_ROWS);
    const CUtensorMap low_rank_map =
        call.low_rank.width > 0
            ? make_map(call.lora_x, BF16, call.m, call.low_rank.width, C::FETCHED_ROWS)
            : x_map;
    const Problem problem{
        call.records,
        call.out,
        call.bias,
        call.workspace,
        call.flags,
        call.m,
        call.rows,
        (call.contraction + 127) / 128,
        call.plan.tiles_m,
        call.plan.tiles,
        call.plan.whole_tiles,
        call.tile.split,
        call.low_rank,
    };
    const Launch to{call.plan.grid, C::THREADS, C::SHARED_BYTES, call.stream, "nf4_linear_sm90", C::CLUSTER};
    launch_overlapping<C>(to, nf4_linear_kernel<C>, x_map, low_rank_map, problem);
}

// block_m, blocks_per_warpgroup, warpgroups, ctas_per_sm, cluster: the best of a sweep for some shape
// (H100); clusters where reading x from L2 is near its limit
#define TLI_TILES(F)   \
    F(16, 1, 4, 1, 1)  \
    F(16, 1, 2, 1, 1)  \
    F(16, 1, 2, 2, 1)  \
    F(32, 1, 4, 1, 1)  \
    F(64, 1, 2, 1, 1)  \
    F(64, 1, 4, 1, 1)  \
    F(128, 1, 2, 1, 1) \
    F(128, 1, 2, 1, 2) \
    F(128, 2, 2, 1, 1) \
    F(256, 1, 2, 1, 1) \
    F(256, 1, 2, 1, 2)

template <class T, bool TRANSPOSED>
void launch_tile(const Call& call) {
    const Tile& t = call.tile;
#define TLI_LAUNCH(M, BLOCKS, WARPGROUPS, CTAS, CLUSTER)                                 \
    if (t.block_m == M && t.blocks_per_warpgroup == BLOCKS && t.warpgroups == WARPGROUPS \
        && t.ctas_per_sm == CTAS && t.cluster == CLUSTER) {                              \
        return call.exact                                                                \
                   ? launch<Config<T, M, BLOCKS, WARPGROUPS, CTAS, CLUSTER, TRANSPOSED, true>>(call)  \
                   : launch<Config<T, M, BLOCKS, WARPGROUPS, CTAS, CLUSTER, TRANSPOSED, false>>(call); \
    }
    TLI_TILES(TLI_LAUNCH)
#undef TLI_LAUNCH
    throw std::runtime_error("nf4_linear_sm90: no kernel was compiled for this tile");
}

}  // namespace tli_engine::nf4
