// The Hopper product with an NF4 weight: out^T = W x^T, so that W, decoded in registers, is wgmma's left
// operand, and x's rows, as they lie in memory, are its right one. One warp fetches records and x by
// bulk copies; the other warpgroups decode and multiply. The same code serves the forward and dx: only
// what the scales belong to differs.

#pragma once

#include "nf4_decode.cuh"
#include "nf4_linear_sm90.h"
#include "wgmma.cuh"

namespace tli_engine::nf4 {

template <class T_, int BLOCK_M_, int BLOCKS_, int WARPGROUPS_, int CTAS_, bool TRANSPOSED_, bool EXACT_>
struct Config {
    using T = T_;
    static constexpr int BLOCK_M = BLOCK_M_, BLOCKS = BLOCKS_, WARPGROUPS = WARPGROUPS_, CTAS = CTAS_;
    static constexpr bool TRANSPOSED = TRANSPOSED_, EXACT = EXACT_;

    static constexpr int ROW_BLOCKS = BLOCKS * WARPGROUPS, BLOCK_ROWS = 64 * ROW_BLOCKS;
    static constexpr int CONSUMERS = 128 * WARPGROUPS, THREADS = CONSUMERS + 128;
    static constexpr int ACCUMULATORS = BLOCK_M / 2;
    // small tiles: fewer, larger stages, for the one thread that fetches them limits (15-25 %, H100)
    static constexpr int STAGE_BLOCKS = BLOCK_M <= 64 && (CTAS == 1 || BLOCK_M <= 16) ? 2 : 1;
    static_assert(STAGE_BLOCKS == 1 || BLOCKS == 1, "a stage has either two columns or two rows a warpgroup");
    // small tiles: each step's product starts as soon as it is decoded
    static constexpr bool INTERLEAVED = BLOCK_M <= 64 && !EXACT;

    // shared memory: table, barriers, staging of the epilogue, stages of x's boxes and records
    static constexpr int X_BYTES = BLOCK_M * 128;
    static constexpr int STAGE_BYTES = STAGE_BLOCKS * (X_BYTES + ROW_BLOCKS * RECORD_BYTES);
    static constexpr int STAGE_STRIDE = (STAGE_BYTES + 1023) / 1024 * 1024;
    static constexpr int BARRIERS = TABLE + TABLE_BYTES, STAGING = BARRIERS + 1024;
    // without EXACT the epilogue uses the free halves of the table's rows
    static constexpr int STAGES_AT = STAGING + (EXACT ? WARPGROUPS * 4096 : 0);
    // 227 KB a CTA; two share 228 KB, of which the system takes 1 KB each
    static constexpr int SHARED_LIMIT = CTAS == 1 ? 232448 : 115712;
    static constexpr int STAGES_THAT_FIT = (SHARED_LIMIT - STAGES_AT) / STAGE_STRIDE;
    static constexpr int STAGES = STAGES_THAT_FIT > 12 ? 12 : STAGES_THAT_FIT;
    static_assert(STAGES >= 3, "too few stages to hide a copy");
    static constexpr int SHARED_BYTES = STAGES_AT - TABLE + STAGES * STAGE_STRIDE;

    // setmaxnreg moves registers within what the launch allocated, and waits for ever for more than that
    static constexpr int LAUNCH_REGISTERS = 65536 / CTAS / THREADS / 8 * 8;
    static constexpr int PRODUCER_REGISTERS = WARPGROUPS == 4 || CTAS == 2 ? 32 : 40;
    static constexpr int CONSUMER_REGISTERS =
        (THREADS * LAUNCH_REGISTERS - 128 * PRODUCER_REGISTERS) / CONSUMERS / 8 * 8;
    static_assert(CONSUMERS * CONSUMER_REGISTERS + 128 * PRODUCER_REGISTERS <= THREADS * LAUNCH_REGISTERS);
    static_assert(CONSUMER_REGISTERS > LAUNCH_REGISTERS && CONSUMER_REGISTERS <= 240);
    static_assert(PRODUCER_REGISTERS < LAUNCH_REGISTERS && PRODUCER_REGISTERS >= 24);
};

// What the kernel is told.
struct Problem {
    const uint8_t* records;
    void* out;
    const void* bias;
    float* workspace;
    unsigned* flags;
    int m, rows;
    int steps;  // of 128 along the contraction
    int tiles_m, tiles, whole_tiles;
    int split;  // > 1: each tile is cut in that many parts, which reduce a slice each
    LowRank low_rank;
};

// Steps [first, last) of a tile.
struct Part {
    int tile, first, last;
};

// What one CTA does: its even share of the steps of the tiles that are shared, then whole tiles.
class Worklist {
public:
    __device__ __forceinline__ explicit Worklist(const Problem& problem)
        : p(problem), next_step(share(cta())), last_step(share(cta() + 1)), next_whole(cta()) {}

    // A tile's first part, which waits for the others, belongs to a CTA that the hardware started after
    // theirs: they never wait behind it.
    static __device__ __forceinline__ int cta() { return gridDim.x - 1 - blockIdx.x; }

    __device__ __forceinline__ bool next(Part& part) {
        if (next_step < last_step) {
            part.tile = p.whole_tiles + next_step / p.steps;
            part.first = next_step % p.steps;
            part.last = min(p.steps, part.first + last_step - next_step);
            next_step += part.last - part.first;
            return true;
        }
        if (next_whole < p.whole_tiles) {
            part = {next_whole, 0, p.steps};
            next_whole += gridDim.x;
            return true;
        }
        return false;
    }

    // the shared step at which a CTA starts; fits in 31 bits (checked by the launcher)
    __device__ __forceinline__ int share(int cta) const {
        return (p.tiles - p.whole_tiles) * p.steps * cta / static_cast<int>(gridDim.x);
    }

private:
    const Problem& p;
    int next_step, last_step, next_whole;
};

// A place in the ring of stages; a barrier's parity flips with each turn.
template <class C>
struct Slot {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == C::STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
    // the copies of the stage have arrived; its readers are done
    __device__ __forceinline__ uint32_t full() const { return C::BARRIERS + 16 * stage; }
    __device__ __forceinline__ uint32_t empty() const { return full() + 8; }
    __device__ __forceinline__ uint32_t x() const { return C::STAGES_AT + stage * C::STAGE_STRIDE; }
    __device__ __forceinline__ uint32_t records() const { return x() + C::STAGE_BLOCKS * C::X_BYTES; }
};

// ---- the producer, one thread

template <class C>
__device__ __forceinline__ void produce(
    const CUtensorMap& x_map, const CUtensorMap& low_rank_map, const Problem& p) {
    using namespace hopper;
    constexpr int STAGE_RECORDS = C::STAGE_BLOCKS * RECORD_BYTES;
    const int blocks = p.rows / 64;
    Worklist work(p);
    Part part;
    Slot<C> slot;
    bool started = false;
    while (work.next(part)) {
        const int row = part.tile % p.tiles_m * C::BLOCK_M;
        const int block = part.tile / p.tiles_m * C::ROW_BLOCKS;
        const int column = part.first * 128;
        const int count = 2 * (part.last - part.first) / C::STAGE_BLOCKS;
        // offsets, for an array of pointers would spill; a weight's records are under 4 GB. A row block
        // past the last one repeats it: it is read, and not stored.
        uint32_t source[C::ROW_BLOCKS];
#pragma unroll
        for (int b = 0; b < C::ROW_BLOCKS; b++) {
            source[b] = (min(block + b, blocks - 1) * 2u * p.steps + 2 * part.first) * RECORD_BYTES;
        }
        auto fetch_records = [&](const Slot<C>& to) {
            barrier_arrive_expect(to.full(), C::STAGE_BYTES);
#pragma unroll
            for (int b = 0; b < C::ROW_BLOCKS; b++) {
                copy_bytes(to.records() + b * STAGE_RECORDS, p.records + source[b], STAGE_RECORDS, to.full());
                source[b] += STAGE_RECORDS;
            }
        };
        auto fetch_x = [&](const Slot<C>& to, int i) {
#pragma unroll
            for (int b = 0; b < C::STAGE_BLOCKS; b++) {
                const int at = column + (i * C::STAGE_BLOCKS + b) * 64;
                copy_box(to.x() + b * C::X_BYTES, x_map, at, row, to.full());
            }
        };
        int i = 0;
        if (!started) {
            // the weights do not depend on the kernel before: 1-2 us a launch at small m (H100)
            const int ahead = min(count, C::STAGES);
            Slot<C> to;
            for (; i < ahead; i++, to.advance()) fetch_records(to);
            wait_for_previous_kernel();
            for (i = 0; i < ahead; i++, slot.advance()) fetch_x(slot, i);
            started = true;
        }
        for (; i < count; i++, slot.advance()) {
            barrier_wait(slot.empty(), slot.parity ^ 1);
            fetch_records(slot);
            fetch_x(slot, i);
        }
        if (p.low_rank.width > 0 && part.first == 0) {
            barrier_wait(slot.empty(), slot.parity ^ 1);
            barrier_arrive_expect(slot.full(), C::X_BYTES);
            copy_box(slot.x(), low_rank_map, 0, row, slot.full());
            slot.advance();
        }
    }
}

// ---- the consumers

// acc += (64 rows of W) x^T over 64 columns, left in flight
template <class C>
__device__ __forceinline__ void multiply_block(
    float (&acc)[C::ACCUMULATORS],
    uint32_t (&a)[4][4],
    const uint4& codes,
    uint32_t scales_at,
    uint32_t x,
    int lane) {
    using namespace hopper;
    using Product = Wgmma<typename C::T, C::BLOCK_M>;
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    Scales<typename C::T, C::TRANSPOSED, C::EXACT> scales;
    scales.load(scales_at);
    const uint64_t right = operand_descriptor(x);
#pragma unroll
    for (int step = 0; step < 4; step++) {
        decode_step<typename C::T>(a[step], words[step], scales, step, lane);
        if constexpr (C::INTERLEAVED) {
            wgmma_fence();
            Product::run(acc, a[step], right + step * DESCRIPTOR_STEP);
        }
    }
    if constexpr (!C::INTERLEAVED) {
        keep_order(acc);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; step++) {
            Product::run(acc, a[step], right + step * DESCRIPTOR_STEP);
        }
    }
    wgmma_commit();
}

// A warp is done with a stage. One lane says so for all: their reads must come before it, which waiting
// for wgmma, no barrier for memory, does not promise (racecheck).
__device__ __forceinline__ void give_back(uint32_t empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) hopper::barrier_arrive(empty);
}

// acc = the part's product; every stage is given back
template <class C>
__device__ __forceinline__ void multiply_part(
    float (&acc)[C::BLOCKS][C::ACCUMULATORS], Slot<C>& slot, const Part& part) {
    using namespace hopper;
    const int warpgroup = threadIdx.x >> 7, thread = threadIdx.x & 127;
#pragma unroll
    for (int b = 0; b < C::BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < C::ACCUMULATORS; i++) acc[b][i] = 0.f;
    }
    const int own = warpgroup * C::BLOCKS * C::STAGE_BLOCKS * RECORD_BYTES;
    const int codes_at = own + thread * 16;
    const int scales_at = own + CODE_BYTES + Scales<typename C::T, C::TRANSPOSED, C::EXACT>::offset(thread);
    uint32_t before = 0;  // empty barrier of the stage before this one
    uint32_t a[2][4][4];  // one is decoded while the other is multiplied
    uint4 codes[2];
    for (int step = part.first; step < part.last; step++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const bool is_stage = C::STAGE_BLOCKS == 1 || half == 0;
            if (is_stage) barrier_wait(slot.full(), slot.parity);
            const uint32_t x = slot.x() + (C::STAGE_BLOCKS == 2 ? half * C::X_BYTES : 0);
#pragma unroll
            for (int b = 0; b < C::BLOCKS; b++) {
                const uint32_t first = slot.records() + b * C::STAGE_BLOCKS * RECORD_BYTES;
                if (is_stage) {
                    codes[0] = load_uint4(first + codes_at);
                    if (C::STAGE_BLOCKS == 2) codes[1] = load_uint4(first + RECORD_BYTES + codes_at);
                }
                const uint32_t record = first + (C::STAGE_BLOCKS == 2 ? half * RECORD_BYTES : 0);
                multiply_block<C>(
                    acc[b],
                    a[(half * C::BLOCKS + b) & 1],
                    codes[C::STAGE_BLOCKS == 2 ? half : 0],
                    record + scales_at,
                    x,
                    thread & 31);
                wgmma_wait<1>();
                // all of the stage before has been multiplied
                if (b == 0 && is_stage && before != 0) give_back(before);
            }
            if (C::STAGE_BLOCKS == 1 || half == 1) {
                before = slot.empty();
                slot.advance();
            }
        }
    }
    wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < C::BLOCKS; b++) keep_order(acc[b]);
    give_back(before);
}

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
    give_back(slot.empty());
    slot.advance();
}

}  // namespace tli_engine::nf4
