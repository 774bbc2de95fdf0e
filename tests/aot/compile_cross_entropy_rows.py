"""Compile the rows' cross-entropy for several architectures with no GPU; print JSON.

Run in a process of its own: ``TRITON_INTERPRET`` must be unset before a kernel is imported.
"""

from compile_add_rms_norm import DTYPES, TYPES, Case, print_report

from tli_engine.kernels import cross_entropy_rows

SHAPES = [  # columns, dtype
    (128256, "bf16"),  # Llama-3.1
    (152064, "bf16"),  # Qwen2-72B
    (262144, "bf16"),  # Gemma 3
    (128256, "fp32"),
    (49152, "fp16"),  # SmolLM2
    (272, "bf16"),
]


def cases() -> dict[str, Case]:
    """Kernel, dtype, constants and warps, with the tiles that the launcher chooses."""
    found: dict[str, Case] = {}
    for V, name in SHAPES:
        tile = cross_entropy_rows.tile_for(V, DTYPES[name])
        vector = cross_entropy_rows.vector_of(DTYPES[name])
        constants = {"SHARES": tile.shares, "VECTOR": vector, "PORTABLE": False}
        kernel = cross_entropy_rows._cross_entropy_rows_kernel
        found[f"{V}-{name}"] = (kernel, name, constants, tile.num_warps)
    return found


if __name__ == "__main__":
    TYPES.update({"target_ptr": "*i64", "loss_ptr": "*fp32"})
    print_report(cases())
