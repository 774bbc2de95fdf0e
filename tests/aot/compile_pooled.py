"""Compile the pooling, cosine and loss kernels for several architectures with no GPU; print JSON.

Run in a process of its own: ``TRITON_INTERPRET`` must be unset before a kernel is imported.
"""

import itertools
from typing import Any

import torch
from assembler import compile_kernel, print_reports, usage
from triton import language as tl

from tli_engine.kernels import (
    cosine_similarity,
    pooled_alignment_loss,
    pooled_alignment_loss_backward,
    pooled_alignment_loss_backward_many,
    pooled_alignment_loss_many,
    segment_mean,
    segment_mean_backward,
)

# by argument name; other pointers are of the case's dtype, other scalars are int32
POINTERS = {"offsets_ptr": "*i64", "groups_ptr": "*i64", "lock_ptr": "*i32"}
SCALARS = {"margin": "fp32", "inv_temperature": "fp32", "scale": "fp32"}
# hidden sizes and row strides are multiples of 16 in every model, which the launcher tells Triton too
DIVISIBLE = {"D", "H", "stride_xt", "stride_ht", "stride_xn", "stride_ym"}
LOSSES = {
    "infonce": {"INFONCE": True, "SEMIHARD": False},
    "hardest": {"INFONCE": False, "SEMIHARD": False},
    "semihard": {"INFONCE": False, "SEMIHARD": True},
}
LOSS_NAMES = {name: name if name == "infonce" else f"triplet-{name}" for name in LOSSES}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Case = tuple[Any, str, set[str], dict[str, Any], int]


def cases(capability: int) -> dict[str, Case]:
    """Kernel, dtype of the hidden states, pointers of that dtype, constants and warps."""
    found: dict[str, Case] = {}
    for name, acc in (("bf16", tl.float32), ("fp32", tl.float32), ("fp64", tl.float64)):
        forward = {"BLOCK_D": 1024, "UNROLL": segment_mean.UNROLL, "ACC": acc}
        backward = {
            "BLOCK_D": 1024, "BLOCK_T": 32, "ACC": acc, "PORTABLE": False,
        }  # fmt: skip
        found[f"mean-{name}"] = (
            segment_mean._segment_mean_fwd_kernel, name, {"x_ptr"}, forward, 4,
        )  # fmt: skip
        found[f"mean-backward-{name}"] = (
            segment_mean_backward._segment_mean_bwd_kernel, name, {"dx_ptr"}, backward, 4,
        )  # fmt: skip
        found[f"unit-{name}"] = (
            cosine_similarity._unit_rows_kernel, name, {"x_ptr"}, {"BLOCK_D": 4096, "ACC": acc}, 8,
        )  # fmt: skip
    for block, split in ((16, 32), (32, 32), (32, 8)):
        tile = {"BLOCK": block, "BLOCK_K": cosine_similarity.BLOCK_K, "SPLIT": split}
        rows = {"x_ptr", "y_ptr"}
        found[f"cosine-{block}-{split}"] = (
            cosine_similarity._cosine_few_kernel, "fp32", rows, tile,
            cosine_similarity.warps_for(block),
        )  # fmt: skip
    return found | few(capability) | many()


def few(capability: int) -> dict[str, Case]:
    """The two kernels of up to 64 pairs.

    Of 8.9 and 10.0 only the fullest tile in bf16, since each takes seconds.
    """
    every = capability in (80, 90)
    sizes, dtypes = ((16, 32, 64), ("bf16", "fp32")) if every else ((64,), ("bf16",))
    found: dict[str, Case] = {}
    for N, loss, dtype in itertools.product(sizes, LOSSES, dtypes):
        shared = {"EVEN": True, "UNROLL": pooled_alignment_loss.UNROLL, "GROUPED": True, "WAYS": 2}
        words, columns, warps = pooled_alignment_loss.forward_tile(
            N, DTYPES[dtype], LOSS_NAMES[loss]
        )
        constants = {
            "W": words, "BLOCK_K": columns, "SPLIT": 32, "TILES": N // words, "APART": 32,
            **shared, **LOSSES[loss],
        }  # fmt: skip
        found[f"few-{N}-{loss}-{dtype}"] = (
            pooled_alignment_loss._pooled_loss_kernel, dtype, {"hidden_ptr"}, constants, warps,
        )  # fmt: skip
        words, columns, warps = pooled_alignment_loss_backward.backward_tile(N)
        constants = {
            "W": words, "BLOCK_K": columns, "B": N, "PORTABLE": False, **shared,
            "INFONCE": loss == "infonce",
        }  # fmt: skip
        kernel = pooled_alignment_loss_backward._hidden_gradient_kernel
        found[f"few-backward-{N}-{loss}-{dtype}"] = (
            kernel, dtype, {"dhidden_ptr"}, constants, warps,
        )  # fmt: skip
    return found


def many() -> dict[str, Case]:
    """The kernels of more pairs."""
    forward, backward = pooled_alignment_loss_many, pooled_alignment_loss_backward_many
    block = forward.MOST_BLOCK
    pool = {"BLOCK_H": block, "UNROLL": 4}
    rows = {"BLOCK_H": block, "BLOCK_T": 32, "PORTABLE": False}
    found: dict[str, Case] = {
        "pairs": (forward._pool_pairs_kernel, "bf16", {"hidden_ptr"}, pool, 4),
        "word-rows": (backward._word_rows_kernel, "bf16", {"dhidden_ptr"}, rows, 4),
    }
    columns = {"ROWS": forward.ROWS, "COLUMNS": forward.COLUMNS, "GROUPED": True}
    for name, loss in LOSSES.items():
        infonce = {"INFONCE": loss["INFONCE"]}
        across = {"BLOCK_N": block, "GROUPED": True}
        for key, kernel, constants in (
            ("rows", forward._row_tops_kernel, {**across, **loss}),
            ("columns", forward._column_tops_kernel, {**columns, **loss}),
            ("end", forward._end_kernel, {"BLOCK_N": block, "WAYS": 2, **infonce}),
            (
                "gradient",
                backward._cosine_gradient_kernel,
                {**across, "MADE": False, "WAYS": 2, **infonce},
            ),
        ):
            found[f"{key}-{name}"] = (kernel, "fp32", set(), constants, 4)
    return found


def compile_case(case: Case, capability: int) -> Any:
    """Compile as the launcher would on that architecture."""
    kernel, dtype, rows, constants, warps = case
    names = kernel.arg_names
    if "OVERLAP" in names:
        constants = constants | {"OVERLAP": capability >= 90}
    acc = "*fp64" if dtype == "fp64" else "*fp32"

    def type_of(name: str) -> str:
        if name in rows:
            return f"*{dtype}"
        return POINTERS.get(name, acc) if name.endswith("_ptr") else SCALARS.get(name, "i32")

    def divisible(name: str) -> bool:
        return name.endswith("_ptr") or name in DIVISIBLE

    options = {"num_warps": warps, "launch_pdl": constants.get("OVERLAP", False)}
    if "INFONCE" in names:
        options["enable_fp_fusion"] = False
    if "OVERLAP" in names:
        options["num_stages"] = 1
    return compile_kernel(kernel, constants, type_of, divisible, capability, options)


def report_of(capability: int) -> dict[str, Any]:
    """What came out, by kernel."""
    return {
        name: usage(compile_case(case, capability), capability)
        for name, case in cases(capability).items()
    }


if __name__ == "__main__":
    print_reports(report_of)
