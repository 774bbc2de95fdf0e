"""Compile the gated activation's kernels for several architectures with no GPU; print JSON.

Run in a process of its own: ``TRITON_INTERPRET`` must be unset before a kernel is imported.
"""

from compile_add_rms_norm import Case, print_report

from tli_engine.kernels import swiglu, swiglu_backward

SHAPES = [  # rows, columns, activation, dtype
    (64, 14336, "silu", "bf16"),  # Llama-3.1-8B
    (8192, 14336, "silu", "bf16"),
    (8192, 29568, "silu", "bf16"),  # Qwen2-72B
    (64, 2048, "gelu_tanh", "bf16"),  # Gemma-3-270M
    (8192, 6912, "gelu_tanh", "bf16"),  # Gemma-3-1B
    (64, 1536, "silu", "fp16"),  # SmolLM2-135M
    (8192, 14336, "silu", "fp32"),
]


def cases() -> dict[str, Case]:
    """Kernel, dtype, constants and warps, with the tiles that the launchers choose."""
    found: dict[str, Case] = {}
    for T, I, act, name in SHAPES:
        tile = swiglu.tile_for(T, I)
        constants = {
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "GELU": act == "gelu_tanh",
            "PORTABLE": False,
        }
        for direction, kernel in (
            ("fwd", swiglu._swiglu_fwd_kernel),
            ("bwd", swiglu_backward._swiglu_bwd_kernel),
        ):
            found[f"{direction}-{T}-{I}-{act}-{name}"] = (kernel, name, constants, tile.num_warps)
    return found


if __name__ == "__main__":
    print_report(cases())
