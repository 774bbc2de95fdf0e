"""A gated activation: microseconds of GPU time against transformers and Liger, forward and backward.

The engine gets the rows of one projection; peers get gate and up apart, as projections of their own give
them: the lines of transformers' MLP, eager (the baseline) or compiled, or Liger's function, which writes
its gradients over its inputs. Times are those of replayed graphs. The floor is what has to be read and
written, at the speed of a copy on this GPU: above 1 while it lies in the L2 cache.

python -m bench swiglu [--shapes NAME ...] [--tokens T ...] [--sweep]
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from bench.harness import Row, print_tiles
from bench.pointwise import Case, Function, Outputs, check, compiled, load_liger, run, time_case
from tli_engine.kernels.swiglu import Tile, launch_forward, tile_for
from tli_engine.kernels.swiglu_backward import launch_backward
from tli_engine.ops import swiglu

SHAPES = {  # columns of the output, activation
    "8b": (14336, "silu"),
    "qwen2-72b": (29568, "silu"),
    "gemma-3-1b": (6912, "gelu_tanh"),
}
# by transformers' name, and by Liger's module and class
PEERS = {
    "silu": ("silu", "swiglu", "LigerSiLUMulFunction"),
    "gelu_tanh": ("gelu_pytorch_tanh", "geglu", "LigerGELUMulFunction"),
}
BASELINE = "transformers"


def make_case(T: int, I: int) -> Case:
    """A projection's rows and a gradient, bf16."""
    gate_up = torch.randn(T, 2 * I, device="cuda").bfloat16().requires_grad_()
    return Case((gate_up,), (torch.randn(T, I, device="cuda").bfloat16(),))


def apart(case: Case) -> Case:
    """Gate and up as tensors of their own."""
    halves = case.leaves[0].detach().chunk(2, dim=1)
    leaves = tuple(x.contiguous().requires_grad_() for x in halves)
    return Case(leaves, case.grads)


def peers(act: str) -> dict[str, Function]:
    """From gate and up to their product."""
    name, module, function = PEERS[act]
    activation = ACT2FN[name]

    def eager(gate: Tensor, up: Tensor) -> Outputs:
        return (activation(gate) * up,)

    found: dict[str, Function] = {BASELINE: eager, "compiled": compiled(eager)}
    liger = load_liger(module, function)
    if liger is not None:
        found["liger"] = lambda gate, up: (liger.apply(gate, up),)
    return found


def on_halves(function: Function) -> Function:
    """A peer's function of a projection's rows."""
    return lambda gate_up: function(*(x.contiguous() for x in gate_up.chunk(2, dim=1)))


def bench_case(model: str, T: int, bandwidth: float) -> list[Row]:
    """Forward and backward of so many rows."""
    I, act = SHAPES[model]
    case = make_case(T, I)
    theirs = peers(act)

    def ours(gate_up: Tensor) -> Outputs:
        return (swiglu(gate_up, act),)

    found = {name: on_halves(function) for name, function in theirs.items()}
    check(found | {"tli-engine": ours}, on_halves(theirs[BASELINE]), case)
    rows: list[Row] = []
    for direction in ("fwd", "bwd"):
        # gate and up in, their product out; those and its gradient in, two gradients out
        nbytes = (3 if direction == "fwd" else 5) * case.grads[0].nbytes
        timed = {name: (function, apart(case)) for name, function in theirs.items()}
        timed["tli-engine"] = (ours, case)
        shape = {"T": T, "I": I}
        rows += time_case(direction, timed, shape, model, BASELINE, nbytes, bandwidth)
    return rows


def sweep(model: str, T: int) -> None:
    """Print the time of every tile, the launchers' choice first."""
    I, act = SHAPES[model]
    case = make_case(T, I)
    gate_up, dout = case.leaves[0].detach(), case.grads[0]
    directions: dict[str, Callable[[Tile], object]] = {
        "fwd": lambda tile: launch_forward(gate_up, act, tile),
        "bwd": lambda tile: launch_backward(dout, gate_up, act, tile),
    }
    sizes = itertools.product((1, 2), (512, 1024, 2048, 4096), (2, 4, 8))
    tiles = [Tile(*size) for size in sizes]
    for name, launch in directions.items():
        print_tiles(f"{name} {model} T={T}", launch, (tile_for(T, I), *tiles))


def main() -> None:
    run("swiglu", __doc__, SHAPES, bench_case, sweep)


if __name__ == "__main__":
    main()
