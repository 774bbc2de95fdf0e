"""Compile the norm's kernels for several architectures with no GPU; print what came out, as JSON.

Run in a process of its own: ``TRITON_INTERPRET`` must be unset before a kernel is imported.
"""

import re
from typing import Any

import torch
from assembler import compile_kernel, print_reports, usage

from tli_engine.kernels import add_rms_norm, add_rms_norm_backward

# by argument name; other pointers are of the case's dtype, other scalars are int32
TYPES = {"rstd_ptr": "*fp32", "part_ptr": "*fp32", "eps": "fp32"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = [  # rows, columns, dtype
    (64, 4096, "bf16"),  # Llama-3.1-8B
    (64, 8192, "bf16"),  # Qwen2-72B
    (8192, 4096, "bf16"),
    (8192, 8192, "bf16"),
    (64, 576, "bf16"),  # SmolLM2-135M
    (8192, 640, "bf16"),  # Gemma-3-270M
    (64, 3584, "fp16"),
    (8192, 4096, "fp32"),
    (8192, 16384, "bf16"),  # Llama-3.1-405B, the widest
    (64, 16384, "fp32"),
]
Case = tuple[Any, str, dict[str, Any], int]


def cases() -> dict[str, Case]:
    """Kernel, dtype, constants and warps, with the tiles that the launchers choose."""
    found: dict[str, Case] = {}
    forward = add_rms_norm._add_rms_norm_fwd_kernel
    backward = add_rms_norm_backward._add_rms_norm_bwd_kernel
    for T, D, name in SHAPES:
        size = {"D": D, "BLOCK_D": add_rms_norm.block_d_for(D), "PORTABLE": False}
        tile = add_rms_norm.forward_tile(T, D)
        for residual in (True, False):
            flags = {"ROWS": tile.rows, "HAS_RESIDUAL": residual, "PLUS_ONE": not residual}
            label = f"fwd{'' if residual else '-alone'}-{T}-{D}-{name}"
            found[label] = (forward, name, size | flags, tile.num_warps)
        for needs_dweight in (False, True):
            tile = add_rms_norm_backward.backward_tile(T, D)
            flags = {"ROWS": tile.rows, "HAS_DH": True, "PLUS_ONE": needs_dweight}
            flags["STAGES"] = add_rms_norm_backward.stages_for(T, D, DTYPES[name])
            label = f"bwd{'-dweight' if needs_dweight else ''}-{T}-{D}-{name}"
            constants = size | flags | {"NEEDS_DWEIGHT": needs_dweight}
            found[label] = (backward, name, constants, tile.num_warps)
    sums = {"D": 4096, "BLOCK_P": 32, "BLOCK_D": 32, "PORTABLE": False}
    found["sum-rows"] = (add_rms_norm_backward._sum_rows_kernel, "bf16", sums, 4)
    return found


def compile_case(case: Case, capability: int) -> Any:
    """Compile as the launcher would on that architecture."""
    kernel, dtype, constants, warps = case

    def type_of(name: str) -> str:
        return TYPES.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")

    def divisible(name: str) -> bool:
        # widths and strides are multiples of 16 in every model, which the launcher tells Triton too
        return name.endswith("_ptr") or name.startswith("stride_") or name in ("I", "V")

    constants = constants | {"OVERLAP": capability >= 90}
    options = {"num_warps": warps, "launch_pdl": capability >= 90}
    return compile_kernel(kernel, constants, type_of, divisible, capability, options)


def report_of(found: dict[str, Case], capability: int) -> dict[str, Any]:
    """Compile each kernel: what the assembler says of it, and how it gets at memory."""
    report = {}
    for name, case in found.items():
        compiled = compile_case(case, capability)
        ptx = compiled.asm["ptx"]
        report[name] = usage(compiled, capability) | {
            "wide": len(re.findall(r"(?:ld|st)\.global\S*\.v4\.b32", ptx)),
            "narrow": len(re.findall(r"(?:ld|st)\.global\.(?:v[24]\.)?b16", ptx)),
            "waits": ptx.count("griddepcontrol.wait"),
        }
    return report


def print_report(found: dict[str, Case]) -> None:
    """Print the reports of all architectures that the command names."""
    print_reports(lambda capability: report_of(found, capability))


if __name__ == "__main__":
    print_report(cases())
