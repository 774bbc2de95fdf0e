// From 4-bit codes to wgmma's registers, two weights at a time, through a table in shared memory.
//
// The table's row b holds the two codes of byte b, 32 times over, so that each lane reads its own banks.
// Rows are 256 bytes apart: a row's address is one byte permutation, and a pair of weights costs that,
// a load and a multiplication. Decoding by permutations alone takes twice as many instructions, and
// all of them on one pipe (H100, the study that this kernel follows).

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "hopper.cuh"

namespace tli_engine::nf4 {

// the first address of dynamic shared memory on sm_90; lookups have it as an immediate
constexpr int TABLE = 1024;
constexpr int TABLE_BYTES = 256 * 256;

// a record (tli_engine/reference/nf4_records.py): codes of 64 x 64 weights, then 64 fp32 scales
constexpr int CODE_BYTES = 2048;
constexpr int RECORD_BYTES = CODE_BYTES + 256;

// two numbers rounded to T, the first in the low half
template <class T>
__device__ __forceinline__ uint32_t round_pair(float low, float high);

template <>
__device__ __forceinline__ uint32_t round_pair<__nv_bfloat16>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

template <>
__device__ __forceinline__ uint32_t round_pair<__half>(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

template <class T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b);

template <>
__device__ __forceinline__ uint32_t multiply_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("mul.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

template <>
__device__ __forceinline__ uint32_t multiply_pairs<__half>(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// the code of a nibble; comparisons by order, for those of equality become an array in local memory
__device__ __forceinline__ float code(int nibble) {
    constexpr float CODE[16] = {
        -1.0f,
        -0.6961928009986877f,
        -0.5250730514526367f,
        -0.39491748809814453f,
        -0.28444138169288635f,
        -0.18477343022823334f,
        -0.09105003625154495f,
        0.0f,
        0.07958029955625534f,
        0.16093020141124725f,
        0.24611230194568634f,
        0.33791524171829224f,
        0.44070982933044434f,
        0.5626170039176941f,
        0.7229568362236023f,
        1.0f,
    };
    float value = CODE[0];
#pragma unroll
    for (int i = 1; i < 16; i++) value = nibble >= i ? CODE[i] : value;
    return value;
}

// EXACT: a row is 32 pairs of fp32, or 16, one for two lanes: halves of a warp load 8 bytes a lane one
// after the other. Else it is 32 pairs of T. The second half of a shorter row is free for other use.
template <class T, bool EXACT, int THREADS, int CHUNKS = EXACT ? 16 : 8>
__device__ __forceinline__ void fill_table(int thread, uint32_t table = TABLE) {
    for (int byte = thread; byte < 256; byte += THREADS) {
        const float high = code(byte >> 4), low = code(byte & 15);
        const uint32_t pair = round_pair<T>(high, low);
        const uint32_t a = EXACT ? __float_as_uint(high) : pair;
        const uint32_t b = EXACT ? __float_as_uint(low) : pair;
        // neighbouring rows start at other banks
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            hopper::store_twice(table + byte * 256 + ((i + byte) & (CHUNKS - 1)) * 16, a, b);
        }
    }
}

// The scales that a thread needs for a record, which lie from `offset` on. Of the forward, those of its
// two rows; transposed, those of its 16 columns, or their pairs. What four neighbouring threads load at
// once lies side by side, in banks of its own.
template <class T, bool TRANSPOSED, bool EXACT>
struct Scales;

template <class T>
struct Scales<T, false, true> {
    float2 rows;

    static __device__ __forceinline__ int offset(int thread) { return (thread >> 2) * 8; }
    __device__ __forceinline__ void load(uint32_t address) { rows = hopper::load_float2(address); }
    __device__ __forceinline__ uint32_t apply(float2 codes, int, int i) const {
        const float scale = i & 1 ? rows.y : rows.x;
        return round_pair<T>(codes.x * scale, codes.y * scale);
    }
};

template <class T>
struct Scales<T, true, true> {
    float4 columns[4];

    static __device__ __forceinline__ int offset(int thread) { return (thread & 3) * 16; }
    __device__ __forceinline__ void load(uint32_t address) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            columns[i] = hopper::load_float4(address + i * 64);
        }
    }
    __device__ __forceinline__ uint32_t apply(float2 codes, int step, int i) const {
        const float4 v = columns[step];
        return i & 2 ? round_pair<T>(codes.x * v.z, codes.y * v.w)
                     : round_pair<T>(codes.x * v.x, codes.y * v.y);
    }
};

template <class T>
struct Scales<T, false, false> {
    uint32_t rows[2];

    static __device__ __forceinline__ int offset(int thread) { return (thread >> 2) * 8; }
    __device__ __forceinline__ void load(uint32_t address) {
        const float2 v = hopper::load_float2(address);
        rows[0] = round_pair<T>(v.x, v.x);
        rows[1] = round_pair<T>(v.y, v.y);
    }
    __device__ __forceinline__ uint32_t apply(uint32_t codes, int, int i) const {
        return multiply_pairs<T>(codes, rows[i & 1]);
    }
};

template <class T>
struct Scales<T, true, false> {
    uint32_t columns[4][2];

    static __device__ __forceinline__ int offset(int thread) { return (thread & 3) * 16; }
    __device__ __forceinline__ void load(uint32_t address) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 v = hopper::load_float4(address + i * 64);
            columns[i][0] = round_pair<T>(v.x, v.y);
            columns[i][1] = round_pair<T>(v.z, v.w);
        }
    }
    __device__ __forceinline__ uint32_t apply(uint32_t codes, int step, int i) const {
        return multiply_pairs<T>(codes, columns[step][i >> 1]);
    }
};

// byte i of a word times 256, plus the lane's place in a row
__device__ __forceinline__ uint32_t table_offset(uint32_t word, int i, uint32_t lane_offset) {
    return __byte_perm(word, lane_offset, 0x7604 | i << 4);
}

__device__ __forceinline__ uint32_t look_up_pair(uint32_t offset) {
    uint32_t v;
    asm volatile("ld.shared.b32 %0, [%1+%2];" : "=r"(v) : "r"(offset), "n"(TABLE));
    return v;
}

__device__ __forceinline__ float2 look_up_floats(uint32_t offset) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2+%3];" : "=f"(v.x), "=f"(v.y) : "r"(offset), "n"(TABLE));
    return v;
}

// the four registers of one of a record's 16-column steps; `window` is what the table's address has in
// its top byte
template <class T, bool TRANSPOSED, bool EXACT>
__device__ __forceinline__ void decode_step(
    uint32_t (&registers)[4],
    uint32_t word,
    const Scales<T, TRANSPOSED, EXACT>& scales,
    int step,
    int lane,
    uint32_t window = 0) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t offset = table_offset(word, i, window | lane * (EXACT ? 8 : 4));
        if constexpr (EXACT) {
            registers[i] = scales.apply(look_up_floats(offset), step, i);
        } else {
            registers[i] = scales.apply(look_up_pair(offset), step, i);
        }
    }
}

}  // namespace tli_engine::nf4
