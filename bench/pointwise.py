"""Timing of functions bound by memory: forward and backward of every provider on the same numbers.

Few rows lie in the L2 cache, as they do after the projection before; for many rows a rotation of copies
exceeds it.
"""

import argparse
import importlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Row, copy_bandwidth, print_gpu_rows, time_graphs, write_results
from bench.nf4_shapes import rows_of

PEERS = ["transformers", "liger-kernel"]
TOKENS = (64, 256, 4096, 8192)
FEW_ROWS = 1024
_ROTATION_BYTES = 512 << 20
Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]


@dataclass(frozen=True)
class Case:
    """Inputs that need gradients, and gradients of the outputs, of one call."""

    leaves: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]

    def copy(self) -> "Case":
        """The same numbers elsewhere in memory."""
        leaves = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in self.leaves)
        return Case(leaves, tuple(g.clone() for g in self.grads))

    def wide(self) -> "Case":
        """The same numbers in fp64."""
        leaves = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in self.leaves)
        return Case(leaves, tuple(g.double() for g in self.grads))


def rotation(case: Case, T: int) -> list[Case]:
    """Copies of a case, as many as it takes to find none of it in the L2 cache."""
    nbytes = sum(x.nbytes for x in (*case.leaves, *case.grads))
    count = 1 if T <= FEW_ROWS else -(-_ROTATION_BYTES // nbytes)
    return [case.copy() for _ in range(count)]


def backward_calls(function: Function, cases: Sequence[Case]) -> list[Callable[[], object]]:
    """The backward alone; all forwards run in the first call, which is not timed."""
    outs: list[Outputs] = []

    def call(i: int) -> Outputs:
        if not outs:
            outs.extend(function(*case.leaves) for case in cases)
        return gradients(outs[i], cases[i], retain_graph=True)

    return [partial(call, i) for i in range(len(cases))]


def gradients(outputs: Outputs, case: Case, *, retain_graph: bool = False) -> Outputs:
    """Gradients of the leaves that need one."""
    needed = [x for x in case.leaves if x.requires_grad]
    return torch.autograd.grad(outputs, needed, case.grads, retain_graph=retain_graph)


def check(found: Mapping[str, Function], exact: Function, case: Case) -> None:
    """Stop unless outputs and gradients are those of fp64 up to rounding."""
    wide = case.wide()
    outputs = exact(*wide.leaves)
    truth = [*outputs, *gradients(outputs, wide)]
    for name, function in found.items():
        # a peer may overwrite what it was given
        mine = case.copy()
        outputs = function(*mine.leaves)
        actual = [*(y.detach().clone() for y in outputs), *gradients(outputs, mine)]
        for x, y in zip(actual, truth, strict=True):
            error = (x.double() - y).norm() / y.norm()
            if not error < 2e-2:
                raise SystemExit(f"{name}: relative error {error:.1e}; not timed")


def time_case(
    direction: str,
    found: Mapping[str, tuple[Function, Case]],
    shape: dict[str, int],
    model: str,
    baseline: str,
    nbytes: int,
    bandwidth: float,
) -> list[Row]:
    """Rows of one direction, ``fwd`` or ``bwd`` at the start of its name; ``nbytes`` are the floor's."""
    calls: dict[str, list[Callable[[], object]]] = {}
    for name, (function, case) in found.items():
        cases = rotation(case, shape["T"])
        forward = [partial(function, *c.leaves) for c in cases]
        calls[name] = forward if direction == "fwd" else backward_calls(function, cases)
    count = 50 if shape["T"] <= FEW_ROWS else 12
    times = time_graphs(calls, count, rounds=15)
    floor = nbytes / bandwidth
    rows = rows_of(direction, shape, model, times, baseline, floor, bytes=nbytes)
    print_gpu_rows(rows)
    return rows


def compiled(function: Function) -> Function:
    """``torch.compile`` of a peer, for this shape alone; its backward may run more than once."""
    torch.compiler.reset()
    functorch: Any = importlib.import_module("torch._functorch.config")
    functorch.donated_buffer = False
    return torch.compile(function, dynamic=False)


def load_liger(module: str, name: str) -> Any | None:
    """A function of Liger's, or ``None`` after a line that says why there is none."""
    try:
        return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
    except (ImportError, AttributeError) as error:
        print(f"liger's {name} is not measured: {error}")
        return None


def run(
    op: str,
    description: str,
    shapes: Collection[str],
    bench_case: Callable[[str, int, float], list[Row]],
    sweep: Callable[[str, int], None],
    tokens: Sequence[int] = TOKENS,
) -> None:
    """The command line of an op's bench.

    Args:
        op: Names the file of results.
        description: The bench's docstring.
        shapes: Names of what ``--shapes`` chooses among.
        bench_case: Rows of a shape and a number of tokens, given a copy's bytes a second.
        sweep: Prints the times of tiles, for ``--sweep``.
        tokens: What ``--tokens`` is where it is not given.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=list(shapes))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(tokens))
    parser.add_argument("--sweep", action="store_true", help="time every tile, and write nothing")
    args = parser.parse_args()
    torch.manual_seed(0)
    cases = list(itertools.product(args.shapes, args.tokens))
    if args.sweep:
        for case in cases:
            sweep(*case)
        return
    bandwidth = copy_bandwidth()
    rows = [row for case in cases for row in bench_case(*case, bandwidth)]
    print(f"written: {write_results(op, rows, PEERS, copy_bytes_per_s=bandwidth)}")
