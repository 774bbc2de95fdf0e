#include "nf4_gemv.cuh"

#include "launch.cuh"

namespace tli_engine::nf4 {

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1)
    nf4_gemv_kernel(const __grid_constant__ GemvProblem p) {
    using T = typename C::T;
    extern __shared__ __align__(1024) uint8_t shared[];
    if (hopper::shared_address(shared) != TABLE) __trap();
    const GemvShare<C> share(p);
    // the weights do not depend on the kernel before
    Ring<C> ring(p, share);
    hopper::allow_next_kernel();
    fill_table<T, C::EXACT, C::THREADS, 8>(threadIdx.x);
    hopper::wait_for_previous_kernel();
    const int lane = threadIdx.x & 31;
    uint32_t x[C::COLUMNS][4][2];
#pragma unroll
    for (int i = 0; i < C::COLUMNS; i++) {
#pragma unroll
        for (int step = 0; step < 4; step++) {
            const int column = (share.first_column + i) * 64 + step * 16;
            load_x(x[i][step], p.x, p.m, i < share.columns ? p.contraction : 0, column, lane);
        }
    }
    GemvLowRank<C> low_rank(p, share.part);
    __syncthreads();
    const int m = threadIdx.x / C::BLOCK_ROWS;
    for (int block = share.first_block; block < share.last_block; block++) {
        const int row = block * C::BLOCK_ROWS + threadIdx.x % C::BLOCK_ROWS;
        float acc[C::QUARTERS][4] = {};
        // asked for ahead of the records, needed after them
        const T bias = load_bias<T>(p, row);
        low_rank.load(p.low_rank, block);
#pragma unroll
        for (int i = 0; i < C::COLUMNS; i++) {
            // no break, which would keep the loop rolled, and x in local memory
            if (i < share.columns) {
                multiply_slice<C>(acc, x[i], ring.wait(), lane);
                ring.advance();
            }
        }
        low_rank.add(acc, p.low_rank);
        const float sum = add_warps<C>(acc, p.m);
        if (m >= p.m) continue;
        if (p.plan.split == 1) {
            store_sum<T>(p, m, row, sum, bias);
        } else {
            const int64_t place = static_cast<int64_t>(share.part) * (p.rows / C::BLOCK_ROWS) + block;
            __stcg(p.workspace + (place * p.m + m) * C::BLOCK_ROWS + row % C::BLOCK_ROWS, sum);
        }
    }
    if (p.plan.split > 1) add_parts<C>(p, share);
}

namespace {

template <class C>
void launch_instance(const GemvCall& call) {
    const GemvProblem problem{
        call.records,
        call.x,
        call.bias,
        call.lora_x,
        call.out,
        call.workspace,
        call.flags,
        call.m,
        call.rows,
        call.contraction,
        call.low_rank,
        call.plan,
    };
    const int grid = call.plan.split * call.plan.groups;
    const Launch to{grid, C::THREADS, C::SHARED_BYTES, call.stream, "nf4_gemv_sm90"};
    launch_overlapping<C>(to, nf4_gemv_kernel<C>, problem);
}

template <class T, bool TRANSPOSED, bool EXACT>
void launch_numerics(const GemvCall& call) {
    if (call.plan.block_rows == 32) {
        launch_instance<GemvConfig<T, TRANSPOSED, EXACT, 32>>(call);
    } else {
        launch_instance<GemvConfig<T, TRANSPOSED, EXACT, 64>>(call);
    }
}

template <class T>
void launch_dtype(const GemvCall& call) {
    if (call.transposed) {
        (call.exact ? launch_numerics<T, true, true> : launch_numerics<T, true, false>)(call);
    } else {
        (call.exact ? launch_numerics<T, false, true> : launch_numerics<T, false, false>)(call);
    }
}

}  // namespace

void launch_gemv(const GemvCall& call) {
    (call.bf16 ? launch_dtype<__nv_bfloat16> : launch_dtype<__half>)(call);
}

}  // namespace tli_engine::nf4
