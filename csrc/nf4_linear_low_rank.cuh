// A second product of few columns, added while a tile is in registers: one more stage, and its left
// operand from global memory.

#pragma once

#include "nf4_linear_sm90.cuh"

namespace tli_engine::nf4 {

// The left operand of the low-rank product: for 64 rows of W, of which `row` is the thread's first, B's
// columns; zeros outside of a row's group. All loads are under way before the first is needed.
template <class T, class B>
__device__ __forceinline__ void load_low_rank(
    uint32_t (&a)[4][4], const LowRank& b, int row, int rows, int first_column) {
    B values[4][4][2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int own_row = row + (i & 1) * 8;
        const int group = (own_row >= b.ends[0]) + (own_row >= b.ends[1]);
        const B* start = static_cast<const B*>(b.b) + static_cast<int64_t>(own_row) * b.row_stride;
#pragma unroll
        for (int step = 0; step < 4; step++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int column = step * 16 + (i >> 1) * 8 + first_column + e - group * b.rank;
                const bool keep = own_row < rows && column >= 0 && column < b.rank;
                values[step][i][e] =
                    keep ? start[static_cast<int64_t>(column) * b.column_stride] : static_cast<B>(0.f);
            }
        }
    }
#pragma unroll
    for (int step = 0; step < 4; step++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const B* pair = values[step][i];
            a[step][i] = round_pair<T>(static_cast<float>(pair[0]), static_cast<float>(pair[1]));
        }
    }
}

// acc += B lora_x^T, one more stage, which holds lora_x as the others hold x
template <class C>
__device__ __forceinline__ void add_low_rank(
    float (&acc)[C::BLOCKS][C::ACCUMULATORS], Slot<C>& slot, const Problem& p, int first_row) {
    using namespace hopper;
    using T = typename C::T;
    const int lane = threadIdx.x & 31, column = (lane & 3) * 2;
    // B may be the work of the kernel before
    wait_for_previous_kernel();
#pragma unroll
    for (int b = 0; b < C::BLOCKS; b++) {
        const int row = first_row + b * 64 + (threadIdx.x >> 5 & 3) * 16 + (lane >> 2);
        uint32_t a[4][4];
        if (p.low_rank.fp32) {
            load_low_rank<T, float>(a, p.low_rank, row, p.rows, column);
        } else {
            load_low_rank<T, T>(a, p.low_rank, row, p.rows, column);
        }
        barrier_wait(slot.full(), slot.parity);
        keep_order(acc[b]);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; step++) {
            const uint64_t right = operand_descriptor(slot.x()) + step * DESCRIPTOR_STEP;
            Wgmma<T, C::BLOCK_M>::run(acc[b], a[step], right);
        }
        wgmma_commit();
        wgmma_wait<0>();
        keep_order(acc[b]);
    }
    give_back<C>(slot.empty());
    slot.advance();
}

}  // namespace tli_engine::nf4
