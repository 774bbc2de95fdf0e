// How a product is divided among the CTAs, and the tensor maps by which it reads x.

#include "nf4_linear_sm90.h"

#include <cuda.h>
#include <cudaTypedefs.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace tli_engine::nf4 {

namespace {

void require(bool fits, const std::string& message) {
    if (!fits) throw std::runtime_error("nf4_linear_sm90: " + message);
}

// the driver's function by way of the runtime: linked against libcuda, the extension would not load
// where there is no driver
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
    static const auto function = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t status = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        require(
            status == cudaSuccess && result == cudaDriverEntryPointSuccess,
            "the driver has no cuTensorMapEncodeTiled; it must be of CUDA 12.0 or newer");
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
    }();
    return function;
}

}  // namespace

Plan make_plan(int rows, int m, const Tile& tile, int sm_count) {
    const int block_rows = 64 * tile.blocks_per_warpgroup * tile.warpgroups;
    require(rows > 0 && m > 0 && sm_count > 0, "rows, m and sm_count must be positive");
    require(block_rows > 0 && tile.block_m > 0 && tile.ctas_per_sm > 0, "tile must be positive");
    require(tile.cluster == 1 || tile.cluster == 2, "cluster must be 1 or 2");
    const int64_t cluster = tile.cluster, tile_rows = block_rows * cluster;
    const int64_t tiles_m = (static_cast<int64_t>(m) + tile.block_m - 1) / tile.block_m;
    const int64_t tiles = tiles_m * ((rows + tile_rows - 1) / tile_rows);
    require(tiles < 1 << 30, "too many tiles");
    // the parts of a tile wait for one another: all CTAs must fit on the device at once
    const int64_t most = static_cast<int64_t>(sm_count) * tile.ctas_per_sm;
    Plan plan{static_cast<int>(tiles_m), static_cast<int>(tiles), 0, 0, 0, 0};
    // CTAs, or clusters of them
    int64_t workers = 0;
    if (tile.mode == 1) {
        require(tile.split >= 2 && tile.split <= 0x7fff, "split must be 2 or more in mode 1");
        workers = tiles * tile.split;
    } else {
        require(tile.mode == 0 && tile.split == 1, "mode must be 0, with split 1, or 1");
        require(tile.grid % cluster == 0, "grid must be a multiple of cluster");
        workers = tile.grid > 0 ? tile.grid / cluster : std::min(tiles, sm_count / cluster);
        require(workers > 0, "a cluster does not fit on the SMs");
        // whole waves, and a last one that is nearly full, tile by tile; the rest is shared evenly, with
        // one more wave if it would be little (measured on an H100)
        const int64_t left = tiles % workers;
        if (tiles >= workers) {
            const bool full = left == 0 || left * 100 >= workers * 80;
            plan.whole_tiles = static_cast<int>(
                full ? tiles : std::max<int64_t>(0, tiles - left - (left * 4 < workers ? workers : 0)));
        }
    }
    const int64_t grid = workers * cluster;
    require(
        grid <= most,
        std::to_string(grid) + " CTAs do not fit on " + std::to_string(sm_count) + " SMs at once");
    plan.grid = static_cast<int>(grid);
    if (plan.whole_tiles < tiles) {
        plan.workspace_floats = grid * tile.block_m * block_rows;
        plan.flags = plan.grid;
    }
    return plan;
}

CUtensorMap make_map(const void* data, bool bf16, int rows, int columns, int box_rows) {
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns) * 2};
    const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
    CUtensorMap map;
    const CUresult result = encoder()(
        &map,
        bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        2,
        const_cast<void*>(data),
        sizes,
        strides,
        box,
        steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    require(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with " + std::to_string(result));
    return map;
}

}  // namespace tli_engine::nf4
