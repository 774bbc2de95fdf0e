"""Compile AdamW of 16-bit tensors for several architectures with no GPU; print what came out, as JSON.

Run in a process of its own: ``TRITON_INTERPRET`` must be unset before a kernel is imported.
"""

import re
from typing import Any

from assembler import compile_kernel, print_reports, usage

from tli_engine.kernels import mixed_adamw

SCALARS = {"P": "i32", "decay": "fp32", "size": "fp32", "correction": "fp32", "eps": "fp32"}
CONSTANTS = {"BETA1": 0.9, "BETA2": 0.999, "BLOCK": mixed_adamw.BLOCK, "PORTABLE": False}
# the tensor's dtype, and whether it has a master copy
CASES = {
    "master-bf16": ("bf16", True), "master-fp16": ("fp16", True),
    "random-bf16": ("bf16", False),
}  # fmt: skip


def compile_case(dtype: str, master: bool, capability: int, many: bool) -> Any:
    """Compile as the launcher would on that architecture; ``many``: over 2^31 elements."""
    held = "*fp32" if master else f"*{dtype}"
    pointers = {"parameter_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}"}
    pointers |= {"master_ptr": held, "seed_ptr": f"*{dtype}" if master else "*i64"}
    scalars = SCALARS | ({"P": "i64"} if many else {})

    def type_of(name: str) -> str:
        return pointers.get(name, held) if name.endswith("_ptr") else scalars[name]

    def divisible(name: str) -> bool:
        return (name.endswith("_ptr") and name != "seed_ptr") or name == "P"

    kernel, constants = mixed_adamw._mixed_adamw_kernel, CONSTANTS | {"HAS_MASTER": master}
    options = {"num_warps": mixed_adamw.WARPS}
    return compile_kernel(kernel, constants, type_of, divisible, capability, options)


def report_of(capability: int) -> dict[str, Any]:
    """What came out, by kernel."""
    report = {}
    for name, case in CASES.items():
        for many in (False, True):
            compiled = compile_case(*case, capability, many)
            ptx = compiled.asm["ptx"]
            report[name + "-many" * many] = usage(compiled, capability) | {
                # 8 elements a thread: 16 bytes of 16-bit numbers, twice as many of fp32
                "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
                "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
            }
    return report


if __name__ == "__main__":
    print_reports(report_of)
