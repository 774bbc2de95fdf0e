"""Rotary embedding: microseconds of GPU time against transformers and Liger, forward and backward.

Peers get q and k apart, as projections of their own give them: transformers' function, eager (the
baseline) or compiled, or Liger's, which writes its results over its inputs. The engine gets the rows of
one projection and also copies the values; ``:qk`` gets q and k joined without them. Times are those of
replayed graphs. The floor is q, k and angles read and q and k written, at the speed of a
copy on this GPU: above 1 while they lie in the L2 cache.

python -m bench rotary [--shapes NAME ...] [--tokens T ...] [--sweep]
"""

import itertools
import statistics
from functools import partial

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bench.harness import Row, time_graphs
from bench.pointwise import Case, Function, Outputs, check, compiled, load_liger, run, time_case
from tli_engine.kernels.rotary import Tile, launch, tile_for
from tli_engine.ops import rotary

SHAPES = {  # query heads, key heads, columns of a head
    "8b": (32, 8, 128),
    "qwen2-72b": (64, 8, 128),
}
TOKENS = (64, 2048, 8192)
BASELINE = "transformers"


def make_case(T: int, heads: int, D: int) -> Case:
    """Heads of a projection, angles as transformers makes them, and a gradient; bf16."""
    x = torch.randn(T, heads, D, device="cuda").bfloat16().requires_grad_()
    angles = torch.rand(T, D // 2, device="cuda").mul(100).repeat(1, 2)
    leaves = (x, angles.cos().bfloat16(), angles.sin().bfloat16())
    return Case(leaves, (torch.randn(T, heads, D, device="cuda").bfloat16(),))


def first_heads(case: Case, heads: int) -> Case:
    """The same with no heads but those that are rotated."""
    x, grad = (t.detach()[:, :heads].contiguous() for t in (case.leaves[0], case.grads[0]))
    return Case((x.requires_grad_(), *case.leaves[1:]), (grad,))


def apart(case: Case, q_heads: int, heads: int) -> Case:
    """Queries and keys as tensors of their own, ``[1, H, T, D]`` as transformers has them."""

    def split(x: Tensor) -> tuple[Tensor, ...]:
        parts = x.detach()[:, :heads].split([q_heads, heads - q_heads], dim=1)
        return tuple(part.contiguous()[None].transpose(1, 2) for part in parts)

    x, cos, sin = case.leaves
    leaves = tuple(part.requires_grad_() for part in split(x))
    return Case((*leaves, cos[None], sin[None]), split(case.grads[0]))


def peers() -> dict[str, Function]:
    """From q, k and angles to both, rotated."""

    def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
        outputs: Outputs = apply_rotary_pos_emb(q, k, cos, sin)
        return outputs

    found: dict[str, Function] = {BASELINE: eager, "compiled": compiled(eager)}
    liger = load_liger("rope", "LigerRopeFunction")
    if liger is not None:
        # some versions return the angles too
        found["liger"] = lambda q, k, cos, sin: liger.apply(q, k, cos, sin)[:2]
    return found


def on_joined(function: Function, q_heads: int, heads: int) -> Function:
    """A peer's function of a projection's rows."""

    def call(x: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
        q, k, v = x.split([q_heads, heads - q_heads, x.shape[1] - heads], dim=1)
        # copies: a peer may write over its inputs, which the projection needs no more
        q, k = (part.clone()[None].transpose(1, 2) for part in (q, k))
        q, k = (part.transpose(1, 2)[0] for part in function(q, k, cos[None], sin[None]))
        return (torch.cat([q, k, v], dim=1),)

    return call


def bench_case(model: str, T: int, bandwidth: float) -> list[Row]:
    """Forward and backward of so many tokens."""
    q_heads, kv_heads, D = SHAPES[model]
    heads = q_heads + kv_heads
    case, theirs = make_case(T, heads + kv_heads, D), peers()

    def ours(x: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
        return (rotary(x, cos, sin, heads),)

    found = {name: on_joined(function, q_heads, heads) for name, function in theirs.items()}
    check(found | {"tli-engine": ours}, found[BASELINE], case)
    # q and k in, q and k out, and half of the angles, which repeat
    nbytes = 2 * T * heads * D * 2 + case.leaves[1].nbytes
    rows: list[Row] = []
    for direction in ("fwd", "bwd"):
        timed = {name: (function, apart(case, q_heads, heads)) for name, function in theirs.items()}
        timed["tli-engine"] = (ours, case)
        timed["tli-engine:qk"] = (ours, first_heads(case, heads))
        shape = {"T": T, "H": heads, "D": D}
        rows += time_case(direction, timed, shape, model, BASELINE, nbytes, bandwidth)
    return rows


def sweep(model: str, T: int) -> None:
    """Print the time of every tile, the launcher's choice first."""
    q_heads, kv_heads, D = SHAPES[model]
    heads = q_heads + kv_heads
    # so many copies that none is found in the L2 cache
    count = -(-(512 << 20) // (T * (heads + kv_heads) * D * 2))
    cases = [make_case(T, heads + kv_heads, D) for _ in range(count)]
    chosen = tile_for(T * (heads + kv_heads), D, torch.bfloat16)
    tiles = [Tile(*size) for size in itertools.product((4, 8, 16, 32, 64), (1, 2, 4, 8))]
    for tile in dict.fromkeys((chosen, *tiles)):
        calls = [
            partial(launch, case.leaves[0].detach(), *case.leaves[1:], heads, False, tile)
            for case in cases
        ]
        seconds = time_graphs({"": calls}, max(12, count), rounds=5)[""]
        us = statistics.median(seconds) * 1e6
        print(f"{model} T={T} {tuple(tile)}: {us:.2f} us", flush=True)


def main() -> None:
    run("rotary", __doc__, SHAPES, bench_case, sweep, TOKENS)


if __name__ == "__main__":
    main()
