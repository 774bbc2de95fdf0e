"""Attention of one new token a row over a static cache: microseconds of GPU time against sdpa.

``sdpa`` (the baseline) writes the new key and value, then attends under a mask, each key head once for all
its query heads; ``sdpa:cudnn`` is the same by cuDNN, where it takes that. All read a cache of as many slots, of which three
quarters are filled. Graph replays on caches that together exceed the L2 cache. The floor is what has to
be read of the filled slots, at the speed of a copy.

python -m bench cached_attention [--shapes NAME ...] [--rows N ...] [--slots N ...] [--sweep]
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.harness import (
    Row,
    copy_bandwidth,
    print_gpu_rows,
    print_tiles,
    time_graphs,
    write_results,
)
from bench.nf4_shapes import rows_of
from tli_engine.kernels.cached_attention import Tile, launch, tile_for
from tli_engine.ops.cached_attention import cached_attention_

# heads, key heads, columns of a head
SHAPES = {
    "8b": (32, 8, 128),
    "qwen2-72b": (64, 8, 128),
    "smollm2-135m": (9, 3, 64),
    "gemma3-270m": (4, 1, 256),
}
SCALE = 0.1
BASELINE = "sdpa"
# caches that are read in turns: more than the L2 cache holds
_COPIES_BYTES, _MOST_COPIES = 200 * 2**20, 64
Inputs = Sequence[Tensor]


def make_inputs(name: str, rows: int, slots: int) -> list[Inputs]:
    """Copies of what a step has, bf16."""
    heads, key_heads, D = SHAPES[name]
    count = min(_MOST_COPIES, 1 + _COPIES_BYTES // (4 * rows * slots * key_heads * D))
    copies = []
    for _ in range(count):
        qkv = torch.randn(rows, heads + 2 * key_heads, D, device="cuda").bfloat16()
        kept = torch.randn(2, rows, slots, key_heads, D, device="cuda").bfloat16()
        begin = torch.zeros(rows, dtype=torch.int64, device="cuda")
        slot = torch.tensor([filled(slots) - 1], device="cuda")
        copies.append((*qkv.split([heads, key_heads, key_heads], 1), *kept, begin, slot))
    return copies


def filled(slots: int) -> int:
    """Slots that a row sees, its new token's included."""
    return max(1, slots * 3 // 4)


def by_sdpa(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, begin: Tensor, slot: Tensor,
    backend: SDPBackend,
) -> Tensor:  # fmt: skip
    """The same by PyTorch's operators."""
    keys.index_copy_(1, slot, k[:, None])
    values.index_copy_(1, slot, v[:, None])
    slots = torch.arange(keys.shape[1], device=q.device)
    hidden = (slots < begin[:, None]) | (slots > slot)
    mask = q.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[2])
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(
            grouped, keys.transpose(1, 2), values.transpose(1, 2),
            attn_mask=mask.expand(-1, 1, grouped.shape[2], -1), scale=SCALE,
        )  # fmt: skip
    return out.flatten(1, 2)


def providers() -> dict[str, Callable[..., Tensor]]:
    """The engine and its peers."""
    return {
        BASELINE: partial(by_sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
        "sdpa:cudnn": partial(by_sdpa, backend=SDPBackend.CUDNN_ATTENTION),
        "tli-engine": partial(cached_attention_, scale=SCALE),
    }


def runs(function: Callable[..., Tensor], inputs: Inputs, exact: Tensor, name: str) -> bool:
    """Whether a provider runs here; stop if it is wrong."""
    try:
        out = function(*inputs)
    except RuntimeError as error:
        print(f"{name}: does not run: {str(error).splitlines()[0]}")
        return False
    off = ((out.float() - exact).norm() / exact.norm()).item()
    if not off < 6e-3:
        raise SystemExit(f"{name}: relative error {off:.1e}; not timed")
    return True


def bench_case(name: str, rows: int, slots: int, bandwidth: float) -> list[Row]:
    """One shape, so many rows and slots."""
    copies = make_inputs(name, rows, slots)
    wide = [t.float() if t.is_floating_point() else t for t in copies[0]]
    exact = by_sdpa(*wide, backend=SDPBackend.MATH)
    found = {n: f for n, f in providers().items() if runs(f, copies[0], exact, n)}
    rotated: dict[str, list[Callable[[], Any]]] = {
        n: [partial(f, *inputs) for inputs in copies] for n, f in found.items()
    }
    times = time_graphs(rotated, max(20, len(copies)))
    _, key_heads, D = SHAPES[name]
    nbytes = 4 * rows * filled(slots) * key_heads * D
    shape = {"rows": rows, "slots": slots}
    return rows_of("decode", shape, name, times, BASELINE, nbytes / bandwidth, bytes=nbytes)


def sweep(name: str, rows: int, slots: int) -> None:
    """Print the time of every tile, the launcher's choice first."""
    inputs = make_inputs(name, rows, slots)[0]
    chosen = tile_for(rows, inputs[1].shape[1], slots, inputs[0].shape[2], torch.bfloat16)
    choices = itertools.product((1, 2, 4, 8, 16), (16, 32, 64, 128), (2, 4, 8), (2, 3, 4))
    tiles = [chosen, *(Tile(*sizes) for sizes in choices)]
    print_tiles(f"{name} rows={rows}", lambda t: launch(*inputs, SCALE, None, t), tiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--slots", nargs="+", type=int, default=[768, 2048])
    parser.add_argument("--sweep", action="store_true", help="time every tile")
    args = parser.parse_args()
    cases = list(itertools.product(args.shapes, args.rows, args.slots))
    if args.sweep:
        for case in cases:
            sweep(*case)
        return
    bandwidth, found = copy_bandwidth(), []
    for case in cases:
        rows = bench_case(*case, bandwidth)
        print_gpu_rows(rows)
        found += rows
    print(f"written: {write_results('cached_attention', found, [], bytes_per_s=bandwidth)}")


if __name__ == "__main__":
    main()
