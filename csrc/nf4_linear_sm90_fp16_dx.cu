#include "nf4_linear_launch.cuh"

namespace tli_engine::nf4 {

void launch_fp16_dx(const Call& call) { launch_tile<__half, true>(call); }

}  // namespace tli_engine::nf4
