"""Compile the rotary embedding's kernel for several architectures with no GPU; print JSON.

Run in a process of its own: ``TRITON_INTERPRET`` must be unset before a kernel is imported.
"""

import sys

from compile_add_rms_norm import DTYPES, TYPES, Case, print_report

from tli_engine.kernels import rotary

SHAPES = [  # tokens, heads, columns of a head, dtype
    (64, 48, 128, "bf16"),  # Llama-3.1-8B
    (8192, 48, 128, "bf16"),
    (8192, 80, 128, "bf16"),  # Qwen2-72B
    (8192, 6, 256, "bf16"),  # Gemma-3-1B
    (64, 15, 64, "fp16"),  # SmolLM2-135M
    (8192, 48, 128, "fp32"),
]


def cases() -> dict[str, Case]:
    """Kernel, dtype, constants and warps, with the tiles that the launcher chooses."""
    found: dict[str, Case] = {}
    for T, H, D, name in SHAPES:
        tile = rotary.tile_for(T * H, D, DTYPES[name])
        constants = {"D": D, "HALF": rotary.half_of(D), "ROWS": tile.rows, "PORTABLE": False}
        for inverse in (False, True):
            label = f"{'bwd' if inverse else 'fwd'}-{T}-{H}-{D}-{name}"
            flags = {"INVERSE": inverse}
            found[label] = (rotary._rotary_kernel, name, constants | flags, tile.num_warps)
    return found


if __name__ == "__main__":
    # angles are of the case's dtype unless fp32 is asked for
    if sys.argv[2:] == ["fp32"]:
        TYPES.update({"cos_ptr": "*fp32", "sin_ptr": "*fp32"})
    print_report(cases())
