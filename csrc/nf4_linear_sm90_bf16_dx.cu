#include "nf4_linear_launch.cuh"

namespace tli_engine::nf4 {

void launch_bf16_dx(const Call& call) { launch_tile<__nv_bfloat16, true>(call); }

}  // namespace tli_engine::nf4
