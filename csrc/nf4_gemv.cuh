// The Hopper product with an NF4 weight for at most eight rows of x, at the speed of reading the weight.
// A record's codes lie in the order of wgmma's left operand, which is mma.sync's too: each warp streams
// records, or slices of their rows, through a ring of its own, decodes them, and multiplies them by its
// columns of x, which it keeps in registers. Warps share the contraction and meet once for each block.

#pragma once

#include "nf4_decode.cuh"
#include "nf4_gemv.h"

namespace tli_engine::nf4 {

template <class T_, bool TRANSPOSED_, bool EXACT_, int BLOCK_ROWS_>
struct GemvConfig {
    using T = T_;
    static constexpr bool TRANSPOSED = TRANSPOSED_, EXACT = EXACT_;
    // a block is a slice of a record's rows, or all 64
    static constexpr int BLOCK_ROWS = BLOCK_ROWS_, QUARTERS = BLOCK_ROWS / 16, SLICES = 64 / BLOCK_ROWS;
    static constexpr int WARPS = 16, THREADS = 32 * WARPS;
    // of x, that a warp holds
    static constexpr int COLUMNS = GEMV_COLUMNS / WARPS;
    // slices of a warp on their way or in use: 144 KB a multiprocessor
    static constexpr int STAGES = 4 * SLICES;
    static constexpr int SLICE_CODES = CODE_BYTES / SLICES;
    static constexpr int SLICE_SCALES = (RECORD_BYTES - CODE_BYTES) / (TRANSPOSED ? 1 : SLICES);
    static constexpr int SLICE_BYTES = SLICE_CODES + SLICE_SCALES;

    // shared memory: table, with sums in the free halves of its rows, barriers, rings
    static constexpr int BARRIERS = TABLE + TABLE_BYTES, RINGS = BARRIERS + 1024;
    static constexpr int SHARED_BYTES = RINGS + WARPS * STAGES * SLICE_BYTES - TABLE;
    static_assert(WARPS * STAGES * 8 <= 1024 && SHARED_BYTES <= 232448);
    // a thread adds up one sum of a block
    static_assert(THREADS >= BLOCK_ROWS * GEMV_M);
};

// What the kernel is told.
struct GemvProblem {
    const uint8_t* records;
    const void* x;
    const void* bias;
    const void* lora_x;
    void* out;
    float* workspace;
    unsigned* flags;
    int m, rows, contraction;
    LowRank low_rank;
    GemvPlan plan;
};

// What is one warp's: blocks [first_block, last_block), the CTA's, and columns of records.
template <class C>
struct GemvShare {
    int part, group, first_block, last_block, first_column, columns;

    __device__ __forceinline__ explicit GemvShare(const GemvProblem& p) {
        part = blockIdx.x % p.plan.split;
        group = blockIdx.x / p.plan.split;
        const int blocks = p.rows / C::BLOCK_ROWS, all = p.contraction / 64, warp = threadIdx.x >> 5;
        first_block = blocks * group / p.plan.groups;
        last_block = blocks * (group + 1) / p.plan.groups;
        // products fit in 31 bits (checked by the launcher)
        const int first = all * part / p.plan.split, count = all * (part + 1) / p.plan.split - first;
        first_column = first + count * warp / C::WARPS;
        columns = first + count * (warp + 1) / C::WARPS - first_column;
    }
};

// A warp's slices on their way: fetched by lane 0 in the order in which they are used.
template <class C>
class Ring {
public:
    __device__ __forceinline__ Ring(const GemvProblem& p, const GemvShare<C>& share)
        : records(p.records), warp(threadIdx.x >> 5), lane(threadIdx.x & 31), columns(share.columns) {
        // a row block's records are filled up to a multiple of two
        const int stride = (p.contraction + 127) / 128 * 2;
        // offsets in 32 bits, to save registers: a weight's records are under 4 GB
        const uint32_t row = share.first_block / C::SLICES;
        next = (row * stride + share.first_column) * RECORD_BYTES;
        slice = share.first_block % C::SLICES;
        skip = (stride - columns) * RECORD_BYTES;
        left = (share.last_block - share.first_block) * columns;
        if (lane == 0) {
            for (int i = 0; i < C::STAGES; i++) hopper::barrier_init(full(i), 1);
            hopper::barrier_init_fence();
        }
        __syncwarp();
        for (int i = 0; i < C::STAGES; i++) fetch(i);
    }

    // address of the next slice, once it is there
    __device__ __forceinline__ uint32_t wait() const {
        hopper::barrier_wait(full(stage), parity);
        return slot(stage);
    }

    // gives the slice back
    __device__ __forceinline__ void advance() {
        __syncwarp();
        fetch(stage);
        if (++stage == C::STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }

private:
    const uint8_t* records;
    uint32_t next, skip, parity = 0;
    int warp, lane, columns, left, slice, column = 0, stage = 0;

    __device__ __forceinline__ uint32_t full(int i) const { return C::BARRIERS + (warp * C::STAGES + i) * 8; }
    __device__ __forceinline__ uint32_t slot(int i) const {
        return C::RINGS + (warp * C::STAGES + i) * C::SLICE_BYTES;
    }
    __device__ __forceinline__ void fetch(int i) {
        if (left == 0) return;
        left--;
        if (lane == 0) {
            hopper::barrier_arrive_expect(full(i), C::SLICE_BYTES);
            const uint8_t* record = records + next;
            if constexpr (C::SLICES == 1) {
                hopper::copy_bytes(slot(i), record, RECORD_BYTES, full(i));
            } else {
                const int scales = CODE_BYTES + (C::TRANSPOSED ? 0 : slice * C::SLICE_SCALES);
                hopper::copy_bytes(slot(i), record + slice * C::SLICE_CODES, C::SLICE_CODES, full(i));
                hopper::copy_bytes(slot(i) + C::SLICE_CODES, record + scales, C::SLICE_SCALES, full(i));
            }
        }
        next += RECORD_BYTES;
        if (++column < columns) return;
        column = 0;
        if (++slice == C::SLICES) {
            slice = 0;
            next += skip;
        } else {
            next -= columns * RECORD_BYTES;
        }
    }
};

// acc[16 rows, 8 m] += a[16 rows, 16 columns] x^T
template <class T>
__device__ __forceinline__ void multiply_step(
    float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&x)[2]);

#define TLI_MULTIPLY(T, NAME)                                                                       \
    template <>                                                                                     \
    __device__ __forceinline__ void multiply_step<T>(                                               \
        float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&x)[2]) {                          \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 "                          \
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                 \
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x[0]), "r"(x[1]));                    \
    }
TLI_MULTIPLY(__nv_bfloat16, "bf16")
TLI_MULTIPLY(__half, "f16")
#undef TLI_MULTIPLY

// The right operand of 16 columns from `column` on: row lane / 4 of x, zeros past its end.
__device__ __forceinline__ void load_x(
    uint32_t (&x)[2], const void* data, int m, int width, int column, int lane) {
    const int row = lane >> 2;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int at = column + i * 8 + (lane & 3) * 2;
        const auto* pairs = static_cast<const uint32_t*>(data);
        x[i] = row < m && at < width ? pairs[(static_cast<int64_t>(row) * width + at) / 2] : 0;
    }
}

// acc += (a block's rows of W) x^T over 64 columns
template <class C>
__device__ __forceinline__ void multiply_slice(
    float (&acc)[C::QUARTERS][4], const uint32_t (&x)[4][2], uint32_t slice, int lane) {
    using DecodeScales = Scales<typename C::T, C::TRANSPOSED, C::EXACT>;
    DecodeScales scales;
#pragma unroll
    for (int quarter = 0; quarter < C::QUARTERS; quarter++) {
        const int thread = quarter * 32 + lane;
        const uint4 codes = hopper::load_uint4(slice + thread * 16);
        const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
        // transposed, all rows have the same
        if (!C::TRANSPOSED || quarter == 0) {
            scales.load(slice + C::SLICE_CODES + DecodeScales::offset(thread));
        }
#pragma unroll
        for (int step = 0; step < 4; step++) {
            uint32_t a[4];
            // with EXACT a table's row holds a pair for each two lanes
            decode_step<typename C::T>(a, words[step], scales, step, C::EXACT ? lane & 15 : lane);
            multiply_step<typename C::T>(acc[quarter], a, x[step]);
        }
    }
}

// The low-rank update: a warp multiplies 16 rows of B by 16 columns of lora_x. B is loaded ahead of the
// records and used after them.
template <class C>
struct GemvLowRank {
    uint32_t x[2];
    uint32_t bits[4][2];  // of B's numbers, fp32 or T
    int column, quarter;
    bool active;

    __device__ __forceinline__ GemvLowRank(const GemvProblem& p, int part) {
        const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        quarter = warp % C::QUARTERS;
        column = warp / C::QUARTERS * 16;
        active = part == 0 && column < p.low_rank.width;
        if (active) load_x(x, p.lora_x, p.m, p.low_rank.width, column, lane);
    }

    __device__ __forceinline__ void load(const LowRank& b, int block) {
        if (!active) return;
        if (b.fp32) {
            load_as<uint32_t>(b, block);
        } else {
            load_as<uint16_t>(b, block);
        }
    }

    __device__ __forceinline__ void add(float (&acc)[C::QUARTERS][4], const LowRank& b) const {
        if (!active) return;
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float first = __uint_as_float(bits[i][0]), second = __uint_as_float(bits[i][1]);
            a[i] = b.fp32 ? round_pair<typename C::T>(first, second) : bits[i][0] | bits[i][1] << 16;
        }
        float update[4] = {};
        multiply_step<typename C::T>(update, a, x);
        // to multiply into the accumulators of a quarter would put all into local memory
#pragma unroll
        for (int i = 0; i < 4 * C::QUARTERS; i++) {
            acc[i >> 2][i & 3] += quarter == i >> 2 ? update[i & 3] : 0.f;
        }
    }

private:
    template <class Bits>
    __device__ __forceinline__ void load_as(const LowRank& b, int block) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = block * C::BLOCK_ROWS + quarter * 16 + (lane >> 2) + (i & 1) * 8;
            const int group = (row >= b.ends[0]) + (row >= b.ends[1]);
            const Bits* start = static_cast<const Bits*>(b.b) + static_cast<int64_t>(row) * b.row_stride;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int own = column + (i >> 1) * 8 + (lane & 3) * 2 + e - group * b.rank;
                const bool keep = own >= 0 && own < b.rank;
                bits[i][e] = keep ? start[static_cast<int64_t>(own) * b.column_stride] : 0;
            }
        }
    }
};

// From accumulators to the output.

// A sum's place in the second halves of the table's rows: 64 rows by eight m for each warp, swizzled
// against bank conflicts.
__device__ __forceinline__ uint32_t sum_place(int warp, int m, int row) {
    return TABLE + 128 + (warp * 16 + m * 2 + (row >> 5)) * 256 + ((row & 31) ^ (m >> 1 << 3)) * 4;
}

// This thread's sum over the warps: row threadIdx.x % BLOCK_ROWS, m threadIdx.x / BLOCK_ROWS.
template <class C>
__device__ __forceinline__ float add_warps(const float (&acc)[C::QUARTERS][4], int m_end) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    // the sums of the block before are read
    __syncthreads();
#pragma unroll
    for (int quarter = 0; quarter < C::QUARTERS; quarter++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int m = (lane & 3) * 2 + (i & 1), row = quarter * 16 + (i >> 1) * 8 + (lane >> 2);
            if (m < m_end) hopper::store_float(sum_place(warp, m, row), acc[quarter][i]);
        }
    }
    __syncthreads();
    float sum = 0.f;
    const int row = threadIdx.x % C::BLOCK_ROWS, m = threadIdx.x / C::BLOCK_ROWS;
    if (m < m_end) {
#pragma unroll
        for (int i = 0; i < C::WARPS; i++) sum += hopper::load_float(sum_place(i, m, row));
    }
    return sum;
}

template <class T>
__device__ __forceinline__ T load_bias(const GemvProblem& p, int row) {
    return p.bias != nullptr ? static_cast<const T*>(p.bias)[row] : static_cast<T>(0.f);
}

template <class T>
__device__ __forceinline__ void store_sum(const GemvProblem& p, int m, int row, float sum, T bias) {
    const float biased = sum + static_cast<float>(bias);
    static_cast<T*>(p.out)[static_cast<int64_t>(m) * p.rows + row] = static_cast<T>(biased);
}

// Of the CTAs that share blocks, the last one to come adds the parts, in order, and resets the flag:
// none waits for another.
template <class C>
__device__ __forceinline__ void add_parts(const GemvProblem& p, const GemvShare<C>& share) {
    using T = typename C::T;
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(p.flags + share.group, 1u) == p.plan.split - 1u;
        if (last) p.flags[share.group] = 0;
    }
    if (!__syncthreads_or(last)) return;
    __threadfence();
    const int width = C::BLOCK_ROWS * p.m;  // sums of a block
    const int64_t part_stride = static_cast<int64_t>(p.rows) * p.m;
    const int end = (share.last_block - share.first_block) * width;
    for (int i = threadIdx.x; i < end; i += C::THREADS) {
        const int m = i % width / C::BLOCK_ROWS;
        const int row = (share.first_block + i / width) * C::BLOCK_ROWS + i % C::BLOCK_ROWS;
        const float* sums = p.workspace + static_cast<int64_t>(share.first_block) * width + i;
        const T bias = load_bias<T>(p, row);
        float sum = 0.f;
#pragma unroll 8
        for (int part = 0; part < p.plan.split; part++) sum += __ldcg(sums + part * part_stride);
        store_sum<T>(p, m, row, sum, bias);
    }
}

}  // namespace tli_engine::nf4
