// The Hopper product with an NF4 weight: out^T = W x^T, so that W, decoded in registers, is wgmma's left
// operand, and x's rows, as they lie in memory, are its right one. One warp fetches records and x by
// bulk copies; the other warpgroups decode and multiply. The same code serves the forward and dx: only
// what the scales belong to differs.

#pragma once

#include "nf4_decode.cuh"
#include "nf4_linear_sm90.h"
#include "wgmma.cuh"

namespace tli_engine::nf4 {

template <
    class T_,
    int BLOCK_M_,
    int BLOCKS_,
    int WARPGROUPS_,
    int CTAS_,
    int CLUSTER_,
    bool TRANSPOSED_,
    bool EXACT_>
struct Config {
    using T = T_;
    static constexpr int BLOCK_M = BLOCK_M_, BLOCKS = BLOCKS_, WARPGROUPS = WARPGROUPS_, CTAS = CTAS_;
    // CTAs that take neighbouring row blocks of W; each fetches its part of x's rows for all
    static constexpr int CLUSTER = CLUSTER_, FETCHED_ROWS = BLOCK_M / CLUSTER;
    static constexpr bool TRANSPOSED = TRANSPOSED_, EXACT = EXACT_;

    static constexpr int ROW_BLOCKS = BLOCKS * WARPGROUPS, BLOCK_ROWS = 64 * ROW_BLOCKS;
    static constexpr int CONSUMERS = 128 * WARPGROUPS, THREADS = CONSUMERS + 128;
    static constexpr int ACCUMULATORS = BLOCK_M / 2;
    // small tiles: fewer, larger stages, for the one thread that fetches them limits (15-25 %, H100)
    static constexpr int STAGE_BLOCKS = BLOCK_M <= 64 && (CTAS == 1 || BLOCK_M <= 16) ? 2 : 1;
    static_assert(STAGE_BLOCKS == 1 || BLOCKS == 1, "a stage has either two columns or two rows a warpgroup");
    static_assert(CLUSTER == 1 || FETCHED_ROWS % 8 == 0, "a part of x must start where the swizzle does");
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

// Which of the CTAs that work on a tile's parts this is.
template <class C>
__device__ __forceinline__ int rank() {
    return C::CLUSTER == 1 ? 0 : hopper::cluster_rank();
}

// What shared addresses have in their top byte.
template <class C>
__device__ __forceinline__ uint32_t window() {
    if constexpr (C::CLUSTER == 1) return 0;
    extern __shared__ __align__(1024) uint8_t shared[];
    return hopper::shared_address(shared) & 0xff000000;
}

// Which BLOCK_ROWS rows of W are this CTA's; a tile is as wide as the cluster.
template <class C>
__device__ __forceinline__ int row_tile(const Problem& p, int tile) {
    return tile / p.tiles_m * C::CLUSTER + rank<C>();
}

// What one worker, a CTA or a cluster of them, does: its even share of the steps of the tiles that are
// shared, then whole tiles. The CTAs of a cluster do the same steps, for they fetch x for one another.
template <class C>
class Worklist {
public:
    __device__ __forceinline__ explicit Worklist(const Problem& problem)
        : p(problem), next_step(share(worker())), last_step(share(worker() + 1)), next_whole(worker()) {}

    // A tile's first part, which waits for the others, belongs to a worker that the hardware started
    // after theirs: they never wait behind it.
    static __device__ __forceinline__ int worker() {
        return (gridDim.x - 1 - blockIdx.x) / C::CLUSTER;
    }
    static __device__ __forceinline__ int workers() { return gridDim.x / C::CLUSTER; }
    // numbers the CTAs: where a worker's partial sums and flag are
    static __device__ __forceinline__ int cta(int worker) { return worker * C::CLUSTER + rank<C>(); }

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
            next_whole += workers();
            return true;
        }
        return false;
    }

    // the shared step at which a worker starts; fits in 31 bits (checked by the launcher)
    __device__ __forceinline__ int share(int worker) const {
        return (p.tiles - p.whole_tiles) * p.steps * worker / workers();
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
    __device__ __forceinline__ uint32_t full() const { return window<C>() + C::BARRIERS + 16 * stage; }
    __device__ __forceinline__ uint32_t empty() const { return full() + 8; }
    __device__ __forceinline__ uint32_t x() const {
        return window<C>() + C::STAGES_AT + stage * C::STAGE_STRIDE;
    }
    __device__ __forceinline__ uint32_t records() const { return x() + C::STAGE_BLOCKS * C::X_BYTES; }
};

// The producer: one thread.

// 64 columns of a tile's rows of x, or of lora_x, of which each CTA of a cluster sends a part to all.
// It may come before its receiver expects it: the phase there waits for that producer too.
template <class C>
__device__ __forceinline__ void fetch_box(
    uint32_t destination, const CUtensorMap& map, int column, int row, uint32_t full) {
    if constexpr (C::CLUSTER == 1) {
        hopper::copy_box(destination, map, column, row, full);
    } else {
        constexpr uint16_t ALL = (1 << C::CLUSTER) - 1;
        const int first = rank<C>() * C::FETCHED_ROWS;
        hopper::copy_box_to(ALL, destination + first * 128, map, column, row + first, full);
    }
}

template <class C>
__device__ __forceinline__ void produce(
    const CUtensorMap& x_map, const CUtensorMap& low_rank_map, const Problem& p) {
    using namespace hopper;
    constexpr int STAGE_RECORDS = C::STAGE_BLOCKS * RECORD_BYTES;
    const int blocks = p.rows / 64;
    Worklist<C> work(p);
    Part part;
    Slot<C> slot;
    bool started = false;
    while (work.next(part)) {
        const int row = part.tile % p.tiles_m * C::BLOCK_M;
        const int block = row_tile<C>(p, part.tile) * C::ROW_BLOCKS;
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
                fetch_box<C>(to.x() + b * C::X_BYTES, x_map, at, row, to.full());
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
            fetch_box<C>(slot.x(), low_rank_map, 0, row, slot.full());
            slot.advance();
        }
    }
    if constexpr (C::CLUSTER > 1) {
        // this CTA's shared memory must last until the others' readers have arrived at its barriers
        for (int i = 0; i < C::STAGES; i++, slot.advance()) barrier_wait(slot.empty(), slot.parity ^ 1);
    }
}

// The consumers.

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
        decode_step<typename C::T>(a[step], words[step], scales, step, lane, window<C>());
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
// for wgmma, no barrier for memory, does not promise (racecheck). In a cluster a lane for each CTA says
// so to its producer.
template <class C>
__device__ __forceinline__ void give_back(uint32_t empty) {
    __syncwarp();
    const uint32_t lane = threadIdx.x % 32;
    if constexpr (C::CLUSTER == 1) {
        if (lane == 0) hopper::barrier_arrive(empty);
    } else {
        if (lane < C::CLUSTER) hopper::barrier_arrive_at(empty, lane);
    }
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
                if (b == 0 && is_stage && before != 0) give_back<C>(before);
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
    give_back<C>(before);
}

}  // namespace tli_engine::nf4
