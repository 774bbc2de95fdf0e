// Host side of the Hopper product with an NF4 weight for at most eight rows of x; see nf4_linear_sm90.h.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "nf4_linear_sm90.h"

namespace tli_engine::nf4 {

// rows of x; 64 columns of the contraction that a CTA takes, for its warps hold x in registers
constexpr int GEMV_M = 8, GEMV_COLUMNS = 64;

// `split` parts of the contraction by `groups` of blocks of 64 or 32 rows of W, a CTA each.
struct GemvPlan {
    int block_rows, split, groups;
};

struct GemvCall {
    const void* x;
    const uint8_t* records;
    const void* bias;    // null: none
    const void* lora_x;  // null: none
    void* out;
    float* workspace;  // [split, rows / block_rows, m, block_rows] partial sums; unused where split is 1
    unsigned* flags;   // [groups], zero before and after each launch; unused where split is 1
    int m, rows, contraction;
    bool bf16, transposed, exact;
    LowRank low_rank;
    GemvPlan plan;
    cudaStream_t stream;
};

// Launches; throws std::runtime_error if it cannot.
void launch_gemv(const GemvCall& call);

}  // namespace tli_engine::nf4
