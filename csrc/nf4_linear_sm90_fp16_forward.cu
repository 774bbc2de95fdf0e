#include "nf4_linear_launch.cuh"

namespace tli_engine::nf4 {

void launch_fp16_forward(const Call& call) { launch_tile<__half, false>(call); }

}  // namespace tli_engine::nf4
