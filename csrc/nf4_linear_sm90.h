// Host side of the Hopper product with an NF4 weight: out[m, rows] = x[m, contraction] W^T, where W
// [rows, contraction] is the weight (forward) or its transpose (dx), stored as records.

#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace tli_engine::nf4 {

// How a product is cut up; see csrc/README.md.
struct Tile {
    int block_m;               // rows of x a tile
    int blocks_per_warpgroup;  // of 64 rows of W
    int warpgroups;            // that multiply
    int ctas_per_sm;
    int mode;                  // 0: whole tiles, the rest cut evenly among the CTAs; 1: each tile in `split`
    int split;                 // CTAs a tile in mode 1; 1 in mode 0
    int grid;                  // CTAs in mode 0; 0: those of a tile for each, at most one an SM
    int cluster;               // CTAs a tile, side by side along W's rows, which share x: 1 or 2
};

// What follows from a tile and the sizes.
struct Plan {
    int tiles_m, tiles;
    int whole_tiles;           // the first ones, each done by one CTA
    int grid;
    int64_t workspace_floats;  // partial sums of each CTA; 0 where no tile is shared
    int flags;                 // zero before and after each launch
};

// The plan; throws std::runtime_error, a line that names what does not fit.
Plan make_plan(int rows, int m, const Tile& tile, int sm_count);

// A second product, added to the first: lora_x[m, width] B^T, B[row, column] at
// `b + row * row_stride + column * column_stride`. B is block-diagonal: a group of rows, which ends at
// `ends`, meets its own `rank` columns of lora_x.
struct LowRank {
    const void* b = nullptr;
    int width = 0;  // 0: none
    int rank = 0;
    int row_stride = 0, column_stride = 0;
    int ends[2] = {0, 0};
    bool fp32 = false;  // B's dtype; else x's
};

// Of x or lora_x, [rows, columns] of 16-bit numbers; boxes of 64 columns, zeros outside.
CUtensorMap make_map(const void* data, bool bf16, int rows, int columns, int box_rows);

struct Call {
    const void* x;
    const uint8_t* records;
    const void* bias;    // null: none
    const void* lora_x;  // null: none
    void* out;
    float* workspace;
    unsigned* flags;
    int m, rows, contraction;
    bool exact;
    LowRank low_rank;
    Tile tile;
    Plan plan;
    cudaStream_t stream;
};

// Each is compiled in a file of its own, at the same time as the others. They launch, and throw
// std::runtime_error if they cannot.
void launch_bf16_forward(const Call& call);
void launch_bf16_dx(const Call& call);
void launch_fp16_forward(const Call& call);
void launch_fp16_dx(const Call& call);

}  // namespace tli_engine::nf4
