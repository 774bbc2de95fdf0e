"""Compile decoding's attention for several architectures with no GPU; print JSON.

Run in a process of its own: ``TRITON_INTERPRET`` must be unset before a kernel is imported.
"""

from typing import Any

from compile_add_rms_norm import DTYPES, TYPES, Case, print_report

from tli_engine.kernels import cached_attention as module

SHAPES = [  # rows, query heads, key heads, columns of a head, slots, dtype
    (16, 32, 8, 128, 768, "bf16"),  # Llama-3.1-8B
    (1, 32, 8, 128, 768, "bf16"),
    (256, 32, 8, 128, 768, "bf16"),
    (16, 64, 8, 128, 2048, "bf16"),  # Qwen2-72B
    (16, 4, 1, 256, 768, "bf16"),  # Gemma-3-270M
    (16, 9, 3, 64, 768, "fp16"),  # SmolLM2-135M
    (16, 32, 8, 128, 768, "fp32"),
]


def cases() -> dict[str, Case]:
    """Kernel, dtype, constants and warps, with the tiles that the launcher chooses."""
    found: dict[str, Case] = {}
    for rows, query_heads, heads, D, slots, name in SHAPES:
        tile = module.tile_for(rows, heads, slots, D, DTYPES[name])
        sizes: dict[str, Any] = {"D": D, "COLUMNS": module.columns_of(D), "PORTABLE": False}
        sizes["SPLITS"] = tile.splits
        constants = sizes | {"GROUP": query_heads // heads, "QUERIES": 16, "BLOCK": tile.block}
        label = f"{rows}-{query_heads}-{heads}-{D}-{name}"
        kernel = module._cached_attention_kernel
        found[f"attend-{label}"] = (kernel, name, constants, tile.num_warps)
        if tile.splits > 1:
            found[f"add-{label}"] = (module._add_parts_kernel, name, sizes, 1)
    return found


if __name__ == "__main__":
    floats = dict.fromkeys(("part_ptr", "top_ptr", "sum_ptr"), "*fp32")
    places = dict.fromkeys(("begin_ptr", "slot_ptr"), "*i64")
    TYPES.update(floats | places | {"scale": "fp32"})
    print_report(cases())
