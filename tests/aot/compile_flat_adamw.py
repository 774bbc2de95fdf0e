"""Compile flat AdamW for several architectures with no GPU; print what came out, as JSON.

Run in a process of its own: ``TRITON_INTERPRET`` must be unset before a kernel is imported.
"""

import re
from typing import Any

from assembler import compile_kernel, print_reports, usage

from tli_engine.kernels import flat_adamw

# by argument name; other pointers are fp32, other scalars those of int32
POINTERS = {"state_ptr": "*i64", "counter_ptr": "*i32"}
SCALARS = {"eps": "fp32", "weight_decay": "fp32", "max_grad_norm": "fp32"}
CONSTANTS = {
    "BETA1": 0.9, "BETA2": 0.999, "LOG_BETA1": -0.10536, "LOG_BETA2": -0.0010005,
    "BLOCK": flat_adamw.BLOCK, "UNROLL": flat_adamw.UNROLL, "PARTS": 256,
    "NORM": True, "UPDATE": True, "PORTABLE": False,
}  # fmt: skip
# shadow's dtype, and steps' and skips'
CASES = {"plain": (None, "i64"), "bf16": ("bf16", "i64"), "fp16-int32": ("fp16", "i32")}


def compile_case(shadow: str | None, count: str, capability: int) -> Any:
    """Compile as the launcher would on that architecture."""
    constants = CONSTANTS | {"HAS_SHADOW": shadow is not None, "OVERLAP": capability >= 90}
    pointers = POINTERS | {"shadow_ptr": f"*{shadow or 'fp32'}", "state_ptr": f"*{count}"}

    def type_of(name: str) -> str:
        return pointers.get(name, "*fp32") if name.endswith("_ptr") else SCALARS.get(name, "i32")

    def divisible(name: str) -> bool:
        # buffers are laid out in multiples of 64
        return name.endswith("_ptr") or name == "P"

    options = {"num_warps": flat_adamw.WARPS, "launch_pdl": capability >= 90}
    kernel = flat_adamw._flat_adamw_kernel
    return compile_kernel(kernel, constants, type_of, divisible, capability, options)


def report_of(capability: int) -> dict[str, Any]:
    """What came out, by kernel."""
    report = {}
    for name, case in CASES.items():
        compiled = compile_case(*case, capability)
        ptx = compiled.asm["ptx"]
        report[name] = usage(compiled, capability) | {
            "acquires": len(re.findall(r"ld\.global\.gpu\.acquire", ptx)),
            "releases": len(re.findall(r"(?:atom|red)\.global\.gpu\.release", ptx)),
            # 16 bytes a thread, of the gradient alone and of all four buffers
            "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
            "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        }
    return report


if __name__ == "__main__":
    print_reports(report_of)
