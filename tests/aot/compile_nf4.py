"""Compile the NF4 kernels for several architectures with no GPU; print what came out, as JSON.

Run in a process of its own: ``TRITON_INTERPRET`` must be unset before a kernel is imported.
"""

import re
from typing import Any

from assembler import compile_kernel, print_reports, usage

from tli_engine.kernels import (
    counter_dropout,
    lora_down,
    lora_dx,
    lora_up,
    lora_up_backward,
    nf4_dequantize,
    nf4_linear,
    nf4_linear_dx,
    nf4_quantize,
    widen,
)
from tli_engine.kernels.nf4_dispatch import default_tile

POINTERS = {
    "word_ptr": "*i32",
    "table_ptr": "*i32",
    "absmax_ptr": "*fp32",
    "nested_absmax_ptr": "*fp32",
    "nested_code_ptr": "*fp32",
    "nested_offset_ptr": "*fp32",
    "threshold_ptr": "*fp32",
    "part_ptr": "*fp32",
    "sums_ptr": "*fp32",
    "packed_ptr": "*u8",
    "lora_a_ptr": "*fp32",
    "lora_b_ptr": "*fp32",
    "db_ptr": "*fp32",
    "da_ptr": "*fp32",
    "lock_ptr": "*i32",
    "seed_ptr": "*i64",
}
SCALARS = {"scale": "fp32", "keep_scale": "fp32", "scaling": "fp32", "one": "fp32"}
# multiples of 16 in every model, which the launcher tells Triton too
DIVISIBLE = {"N", "K", "numel", "stride_n"}
FLAGS = {"STAGES": 3, "SPLIT": 1, "TILED": True, "FAST": False, "PORTABLE": False}
FORWARD = FLAGS | {"HAS_BIAS": True, "R": 16, "RANKS": 16}
DX = FLAGS | {"RANKS": 16, "WIDTH": 16}


def products(capability: int) -> dict[str, tuple[Any, str, dict[str, Any], int]]:
    """The fused kernels with the tiles that an untuned GPU of this architecture gets."""
    forward, dx = nf4_linear._nf4_linear_fwd_kernel, nf4_linear_dx._nf4_linear_dx_kernel
    plain = FORWARD | {"TILED": False, "RANKS": 0}
    found = {}
    for name, kernel, dtype, flags, M in (
        *((f"fwd-{M}", forward, "bf16", FORWARD, M) for M in (16, 32, 64, 128)),
        ("fwd-fp16-plain", forward, "fp16", plain, 64),
        ("fwd-fast", forward, "bf16", FORWARD | {"FAST": True}, 64),
        *((f"dx-{M}", dx, "bf16", DX, M) for M in (16, 64, 128)),
        ("dx-fp16-plain", dx, "fp16", DX | {"TILED": False, "RANKS": 0}, 64),
    ):
        direction = name.partition("-")[0]
        tile = default_tile(direction, divmod(capability, 10), 132, M, 8192, 8192)
        if tile is not None:
            sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SPLIT": tile.split}
            sizes["STAGES"] = tile.num_stages
            found[name] = (kernel, dtype, flags | sizes, tile.num_warps)
    return found


def adapters() -> dict[str, tuple[Any, str, dict[str, Any], int]]:
    """The kernels of LoRA's narrow products: one adapter of rank 16, or three."""
    down, up = lora_down._lora_down_kernel, lora_up_backward._lora_up_backward_kernel
    plain = {"RANKS": 16, "WIDTH": 16, "BLOCK_M": 32, "BLOCK_K": 256, "SPLIT": 64, "DROPOUT": False}
    three = {"R": 16, "RANKS": 48, "WIDTH": 64, "BLOCK_K": 64}
    parts = {"R": 16, "RANKS": 16, "WIDTH": 16, "BLOCK_N": 64, "SPLIT": 128, "NEEDS_DB": True}
    up_tile = {"BLOCK_M": 32, "BLOCK_N": 128, "HAS_BIAS": True}
    down_da = {"RANKS": 16, "WIDTH": 16, "BLOCK_M": 64, "BLOCK_K": 64, "DROPOUT": True}
    found = {
        "lora-down": (down, plain),
        "lora-down-dropout": (down, plain | three | {"DROPOUT": True}),
        "lora-down-backward": (lora_down._lora_down_backward_kernel, down_da),
        **{f"lora-up-backward-{M}": (up, parts | {"BLOCK_M": M}) for M in (16, 64, 128, 256)},
        "lora-up-backward-three": (up, parts | three | {"BLOCK_M": 64}),
        "lora-up": (lora_up._lora_up_kernel, three | up_tile),
        "lora-up-no-bias": (lora_up._lora_up_kernel, three | up_tile | {"HAS_BIAS": False}),
        "lora-dx": (lora_dx._lora_dx_kernel, down_da | three | {"BLOCK_M": 32, "ADD": True}),
    }
    return {
        name: (
            kernel,
            "bf16",
            c | {"PORTABLE": False},
            8 if c.get("BLOCK_K", 0) > 128 or (kernel is up and c["BLOCK_M"] > 32) else 4,
        )
        for name, (kernel, c) in found.items()
    }


def streams() -> dict[str, tuple[Any, str, dict[str, Any], int]]:
    """Kernel, dtype, constants and warps of the rest, by a readable name."""
    rows = {"ROWS": 32, "BLOCK_SIZE": 64, "NESTED_BLOCK_SIZE": 256, "PORTABLE": False}
    return {
        "dequantize": (
            nf4_dequantize._dequantize_rows_kernel, "bf16", rows | {"NESTED": False}, 2,
        ),
        "dequantize-double": (
            nf4_dequantize._dequantize_rows_kernel, "bf16", rows | {"NESTED": True}, 2,
        ),
        "dequantize-tiled": (
            nf4_dequantize._dequantize_tiled_kernel,
            "bf16",
            {"ROWS": 4, "TILES": 32, "PORTABLE": False},
            8,
        ),
        "dequantize-bytes": (
            nf4_dequantize._dequantize_bytes_kernel,
            "fp32",
            rows | {"ROWS": 32, "COLUMNS": 64, "NESTED": True},
            2,
        ),
        "quantize": (
            nf4_quantize._nf4_quantize_kernel,
            "bf16",
            {"ROWS": 16, "BLOCK_SIZE": 64, "SHORT": False, "PORTABLE": False},
            1,
        ),
        "sum-parts": (
            nf4_linear._sum_parts_kernel,
            "bf16",
            {"SPLIT": 4, "BLOCK": 1024, "HAS_BIAS": True, "PORTABLE": False},
            4,
        ),
        "widen": (
            widen._widen_kernel,
            "bf16",
            {"RANKS": 16, "PAD": 64, "BLOCK_M": 4, "BLOCK_K": 1024},
            4,
        ),
        "dropout": (
            counter_dropout._counter_dropout_kernel, "bf16", {"BLOCK_M": 4, "BLOCK_K": 512}, 4,
        ),
    }  # fmt: skip


def compile_case(
    kernel: Any, dtype: str, constants: dict[str, Any], warps: int, capability: int
) -> Any:
    """Compile as the launcher would on that architecture."""
    constants = constants | {"OVERLAP": capability >= 90}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    nested = constants.get("NESTED", False)

    def type_of(name: str) -> str:
        if nested and name == "absmax_ptr":
            return "*u8"
        is_pointer = name.endswith("_ptr")
        return POINTERS.get(name, f"*{dtype}") if is_pointer else SCALARS.get(name, "i32")

    def divisible(name: str) -> bool:
        return name not in constants and (name.endswith("_ptr") or name in DIVISIBLE)

    options = {"num_warps": warps, "launch_pdl": constants.get("OVERLAP", False)}
    return compile_kernel(kernel, constants, type_of, divisible, capability, options)


def report_of(capability: int) -> dict[str, Any]:
    """What came out, by kernel."""
    report = {}
    cases = products(capability) | adapters() | streams()
    for name, (kernel, dtype, constants, warps) in cases.items():
        compiled = compile_case(kernel, dtype, constants, warps, capability)
        report[name] = usage(compiled, capability) | {
            "wgmma_from_registers": bool(
                re.search(r"wgmma\.mma_async[^;]*?\}\s*,\s*\{", compiled.asm["ptx"])
            ),
        }
    return report


if __name__ == "__main__":
    print_reports(report_of)
