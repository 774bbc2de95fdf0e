// From accumulators to the output. A tile that several CTAs share passes through the workspace; partial
// sums are added in a fixed order, so that equal inputs give equal bits.

#pragma once

#include "nf4_linear_sm90.cuh"

namespace tli_engine::nf4 {

// accumulators of a thread in groups of four, as the workspace holds them: [group][thread]
template <class C>
constexpr int GROUPS = C::BLOCKS * C::ACCUMULATORS / 4;

template <class C>
__device__ __forceinline__ float4* partial_sums(const Problem& p, int cta) {
    return reinterpret_cast<float4*>(p.workspace) + static_cast<int64_t>(cta) * GROUPS<C> * C::CONSUMERS;
}

template <class C>
__device__ __forceinline__ void sync_consumers() {
    hopper::sync_threads<C::CONSUMERS>(1);
}

template <class T>
__device__ __forceinline__ float load_bias(const void* bias, int row, int rows) {
    return bias != nullptr && row < rows ? static_cast<float>(static_cast<const T*>(bias)[row]) : 0.f;
}

// Stores the sums, and adds one to a flag once all threads have. Whoever waits for the flag does so in one
// thread, and lets the others go by a barrier: no thread but that one needs a fence.
template <class C>
__device__ __forceinline__ void store_partial(
    const float (&acc)[C::BLOCKS][C::ACCUMULATORS], const Problem& p, int cta, unsigned* flag) {
    float4* sums = partial_sums<C>(p, cta) + threadIdx.x;
#pragma unroll
    for (int g = 0; g < GROUPS<C>; g++) {
        const float* v = &acc[g / (C::ACCUMULATORS / 4)][g % (C::ACCUMULATORS / 4) * 4];
        __stcg(sums + g * C::CONSUMERS, make_float4(v[0], v[1], v[2], v[3]));
    }
    sync_consumers<C>();
    if (threadIdx.x == 0) hopper::add_release(flag, 1u);
}

// The owner of a tile's first part adds the others, in order, and resets their flags.
template <class C>
__device__ __forceinline__ void add_partials(
    float (&acc)[C::BLOCKS][C::ACCUMULATORS], const Problem& p, const Worklist<C>& work, const Part& part) {
    const int end = (part.tile - p.whole_tiles + 1) * p.steps;
    int done = part.last - part.first;
    for (int worker = work.worker() + 1; done < p.steps; worker++) {
        const int first = work.share(worker), last = min(work.share(worker + 1), end);
        // with fewer steps than workers, some have none, and raise no flag
        if (first >= last) continue;
        const int cta = work.cta(worker);
        if (threadIdx.x == 0) {
            while (hopper::load_acquire(p.flags + cta) == 0) {
            }
            p.flags[cta] = 0;
        }
        sync_consumers<C>();
        const float4* sums = partial_sums<C>(p, cta) + threadIdx.x;
#pragma unroll
        for (int g = 0; g < GROUPS<C>; g++) {
            const float4 v = __ldcg(sums + g * C::CONSUMERS);
            float* sum = &acc[g / (C::ACCUMULATORS / 4)][g % (C::ACCUMULATORS / 4) * 4];
            sum[0] += v.x;
            sum[1] += v.y;
            sum[2] += v.z;
            sum[3] += v.w;
        }
        done += last - first;
    }
}

// Writes a warp's 8 rows of x by 16 of W: pairs of W's rows, transposed among the lanes.
template <class C>
__device__ __forceinline__ void store_group(
    const float4& sum, const Problem& p, const Part& part, int group) {
    using T = typename C::T;
    const int warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    const int block = (threadIdx.x >> 7) * C::BLOCKS + group / (C::ACCUMULATORS / 4);
    const int first_row = row_tile<C>(p, part.tile) * C::BLOCK_ROWS + block * 64 + warp * 16;
    // rows come in 64s: a warp's are all there or none
    if (first_row >= p.rows) return;
    const int row = first_row + lane / 4;
    const float bias[2] = {load_bias<T>(p.bias, row, p.rows), load_bias<T>(p.bias, row + 8, p.rows)};
    const uint32_t low = hopper::transpose(round_pair<T>(sum.x + bias[0], sum.y + bias[0]));
    const uint32_t high = hopper::transpose(round_pair<T>(sum.z + bias[1], sum.w + bias[1]));
    const int m = part.tile % p.tiles_m * C::BLOCK_M + group % (C::ACCUMULATORS / 4) * 8 + lane / 4;
    if (m >= p.m) return;
    T* out = static_cast<T*>(p.out) + static_cast<int64_t>(m) * p.rows + first_row + lane % 4 * 2;
    *reinterpret_cast<uint32_t*>(out) = low;
    *reinterpret_cast<uint32_t*>(out + 8) = high;
}

// Each of the CTAs with parts of the same rows adds up and stores an equal slice of their groups. The low
// half of the flag counts the CTAs that came, the high half those that have seen all come; the last of
// these resets it, when its own slice is on its way.
template <class C>
__device__ __forceinline__ void reduce_slice(const Problem& p, const Part& part, unsigned* flag) {
    using Work = Worklist<C>;
    constexpr unsigned HAS_SEEN = 1u << 16;
    const unsigned parts = p.split;
    unsigned before = 0;
    if (threadIdx.x == 0) {
        while (hopper::load_acquire(flag) % HAS_SEEN < parts) {
        }
        before = atomicAdd(flag, HAS_SEEN);
    }
    sync_consumers<C>();
    const int first_worker = part.tile * p.split, own = Work::worker() - first_worker;
    const int last = GROUPS<C> * (own + 1) / p.split;
    // so many groups and parts are loaded at once, for each round costs the latency of L2; a slice is
    // at most half of the groups
    constexpr int AT_ONCE = GROUPS<C> / 2 < 4 ? GROUPS<C> / 2 : 4;
    constexpr int PARTS_AT_ONCE = AT_ONCE < 4 ? 8 : 4;
    for (int first = GROUPS<C> * own / p.split; first < last; first += AT_ONCE) {
        float4 sums[AT_ONCE] = {};
        for (int part_index = 0; part_index < p.split; part_index += PARTS_AT_ONCE) {
            float4 v[PARTS_AT_ONCE][AT_ONCE] = {};
#pragma unroll
            for (int i = 0; i < PARTS_AT_ONCE; i++) {
                const int cta = Work::cta(first_worker + part_index + i);
                const float4* source = partial_sums<C>(p, cta) + first * C::CONSUMERS + threadIdx.x;
#pragma unroll
                for (int k = 0; k < AT_ONCE; k++) {
                    const bool is_there = part_index + i < p.split && first + k < last;
                    if (is_there) v[i][k] = __ldcg(source + k * C::CONSUMERS);
                }
            }
#pragma unroll
            for (int i = 0; i < PARTS_AT_ONCE; i++) {
#pragma unroll
                for (int k = 0; k < AT_ONCE; k++) {
                    sums[k].x += v[i][k].x;
                    sums[k].y += v[i][k].y;
                    sums[k].z += v[i][k].z;
                    sums[k].w += v[i][k].w;
                }
            }
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (first + k < last) store_group<C>(sums[k], p, part, first + k);
        }
    }
    if (threadIdx.x == 0 && before / HAS_SEEN == parts - 1) atomicExch(flag, 0u);
}

// Writes a tile, transposed on the way, each warpgroup through 128-byte rows of its own.
template <class C>
__device__ __forceinline__ void store_tile(
    const float (&acc)[C::BLOCKS][C::ACCUMULATORS], const Problem& p, const Part& part) {
    using namespace hopper;
    using T = typename C::T;
    // with EXACT the staging is apart; without it, in the second halves of the table's rows
    constexpr int STRIDE = C::EXACT ? 128 : 256;
    constexpr int STAGING_ROWS = C::EXACT ? 32 : 256 / C::WARPGROUPS;
    constexpr int CHUNK = STAGING_ROWS < C::BLOCK_M ? STAGING_ROWS : C::BLOCK_M;
    const int warpgroup = threadIdx.x >> 7, thread = threadIdx.x & 127, lane = thread & 31;
    const uint32_t staging =
        window<C>() + (C::EXACT ? C::STAGING : TABLE + 128) + warpgroup * STAGING_ROWS * STRIDE;
    // 16-byte column `chunk` of a row, swizzled against bank conflicts
    auto place = [&](int row, int chunk) { return staging + row * STRIDE + ((chunk ^ (row & 7)) << 4); };
#pragma unroll
    for (int b = 0; b < C::BLOCKS; b++) {
        const int first_row =
            row_tile<C>(p, part.tile) * C::BLOCK_ROWS + (warpgroup * C::BLOCKS + b) * 64;
        const int row = first_row + thread / 32 * 16 + lane / 4;
        const float bias[2] = {load_bias<T>(p.bias, row, p.rows), load_bias<T>(p.bias, row + 8, p.rows)};
#pragma unroll
        for (int start = 0; start < C::BLOCK_M; start += CHUNK) {
            sync_threads<128>(2 + warpgroup);
#pragma unroll
            for (int t = 0; t < CHUNK; t += 16) {
                // 16 m by 16 rows, this warp's; matrix 2 (half of the m) + (half of the rows)
                uint32_t v[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float* pair = &acc[b][((start + t) / 8 + (i >> 1)) * 4 + (i & 1) * 2];
                    v[i] = round_pair<T>(pair[0] + bias[i & 1], pair[1] + bias[i & 1]);
                }
                const int matrix = lane >> 3;
                const int m = t + (matrix >> 1) * 8 + (lane & 7);
                store_matrices_transposed(place(m, thread / 32 * 2 + (matrix & 1)), v);
            }
            sync_threads<128>(2 + warpgroup);
#pragma unroll
            for (int t = 0; t < CHUNK; t += 16) {
                const int staged = t + thread / 8, chunk = thread & 7;
                const int m = part.tile % p.tiles_m * C::BLOCK_M + start + staged;
                const uint4 v = load_uint4(place(staged, chunk));
                if (m < p.m && first_row < p.rows) {
                    T* out = static_cast<T*>(p.out) + static_cast<int64_t>(m) * p.rows + first_row;
                    *reinterpret_cast<uint4*>(out + chunk * 8) = v;
                }
            }
        }
    }
}

// Hands a part's sums on to whoever stores them, or stores the tile.
template <class C>
__device__ __forceinline__ void finish_part(
    float (&acc)[C::BLOCKS][C::ACCUMULATORS], const Problem& p, const Worklist<C>& work, const Part& part) {
    // before the first write: the kernel before may still read what is overwritten
    hopper::wait_for_previous_kernel();
    const int cta = work.cta(work.worker());
    if (p.split > 1) {
        unsigned* flag = p.flags + work.cta(part.tile);
        store_partial<C>(acc, p, cta, flag);
        reduce_slice<C>(p, part, flag);
        return;
    }
    if (part.first != 0) {
        store_partial<C>(acc, p, cta, p.flags + cta);
        return;
    }
    if (part.last != p.steps) add_partials<C>(acc, p, work, part);
    store_tile<C>(acc, p, part);
}

}  // namespace tli_engine::nf4
