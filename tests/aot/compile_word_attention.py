"""Compile the attention kernels for several architectures with no GPU; print what came out, as JSON.

Run in a process of its own: ``TRITON_INTERPRET`` must be unset before a kernel is imported.
"""

from functools import partial
from typing import Any

import torch
from assembler import compile_kernel, print_reports, usage

from tli_engine.kernels import word_attention, word_attention_backward

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = [  # head dimension, query heads that share a key head, dtype
    (128, 4, "bf16"),  # Llama-3.1-8B
    (128, 8, "bf16"),  # Qwen2-72B
    (64, 3, "bf16"),  # SmolLM2-135M
    (64, 1, "fp16"),
    (96, 1, "bf16"),
    (256, 4, "bf16"),  # Gemma-3-1B
    (64, 3, "fp32"),
    (128, 4, "fp32"),
    (256, 1, "fp32"),
]


def cases(capability: int) -> dict[str, tuple[Any, str, dict[str, Any], int]]:
    """Kernel, dtype, constants and warps, with the tiles that the launchers choose."""
    found = {}
    for D, group, name in SHAPES:
        for direction, kernel, choose in (
            ("fwd", word_attention._word_attention_fwd_kernel, word_attention.forward_tile),
            (
                "bwd",
                word_attention_backward._word_attention_bwd_kernel,
                partial(word_attention_backward.backward_tile, capability=divmod(capability, 10)),
            ),
        ):
            tile = choose(D, group, DTYPES[name])
            constants = {
                "D": D,
                "HALF": word_attention.half_of(D),
                "GROUP": group,
                "HEADS": tile.heads,
                "STEP": tile.step,
                "WINDOW": tile.window,
                "PORTABLE": False,
            }
            found[f"{direction}-{D}-{group}-{name}"] = (kernel, name, constants, tile.num_warps)
    return found


def compile_case(
    kernel: Any, dtype: str, constants: dict[str, Any], warps: int, capability: int
) -> Any:
    """Compile as the launcher would on that architecture."""
    types = {"bound_ptr": "*i32", "lse_ptr": "*fp32", "scale": "fp32", "score_scale": "fp32"}

    def type_of(name: str) -> str:
        return types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")

    def divisible(name: str) -> bool:
        # strides are multiples of 16 in every model, which the launcher tells Triton too
        return name.endswith("_ptr") or name.startswith("stride_")

    options = {"num_warps": warps}
    return compile_kernel(kernel, constants, type_of, divisible, capability, options)


def report_of(capability: int) -> dict[str, Any]:
    """What came out, by kernel."""
    report = {}
    for name, (kernel, dtype, constants, warps) in cases(capability).items():
        compiled = compile_case(kernel, dtype, constants, warps, capability)
        report[name] = usage(compiled, capability)
    return report


if __name__ == "__main__":
    print_reports(report_of)
