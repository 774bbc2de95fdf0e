"""Loss of pooled word pairs and its gradient for the hidden states: microseconds of GPU time.

``chain`` is plain PyTorch: segment mean, cosines, mask, loss, and autograd through them; the
baseline. ``compiled`` is that under ``torch.compile``; ``ops`` the same from the engine's ops one by
one. Words have 4 tokens. Hidden states lie in the L2 cache where they fit, as they do after the block
that made them. Times are those of replayed graphs: ``fwd`` is the loss alone, ``fwd_bwd`` ends with
the gradient of every row. The floor is that of memory: hidden states once and, with a gradient, as
many bytes of it, at the bandwidth of a copy; what lies in the L2 cache may be faster.

python -m bench pooled [--pairs N ...] [--hidden H] [--losses NAME ...] [--sweep]
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import (
    Row,
    copy_bandwidth,
    print_gpu_rows,
    print_tiles,
    quantiles_ms,
    time_graphs,
    write_results,
)
from tli_engine.align.losses import alignment_loss
from tli_engine.config import AlignConfig
from tli_engine.kernels import pooled_alignment_loss as forward
from tli_engine.kernels import pooled_alignment_loss_backward as backward
from tli_engine.kernels.pooled_alignment_loss import Tile, forward_tile
from tli_engine.kernels.pooled_alignment_loss_backward import backward_tile
from tli_engine.kernels.pooled_loss import Choice
from tli_engine.ops import cosine_similarity, pooled_alignment_loss, segment_mean
from tli_engine.reference.cosine_similarity import cosine_similarity as plain_cosine
from tli_engine.reference.segment_mean import segment_mean as plain_mean

PAIRS = (8, 16, 32, 64, 256, 1024, 8192)
LOSSES = ("infonce", "triplet-hardest", "triplet-semihard")
TOKENS = 4
BASELINE = "chain"
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Hidden states of a pack of pairs, with what providers need of it."""

    hidden: Tensor
    weight: Tensor
    offsets: Tensor
    negative: Tensor
    groups: Tensor
    config: AlignConfig


def make_case(N: int, H: int, loss: Any) -> Case:
    """Random bf16 hidden states; pairs that look alike, some of which share a word."""
    rows = torch.randn(N, 1, H, device="cuda").expand(N, TOKENS, H).repeat(2, 1, 1).flatten(0, 1)
    i = torch.arange(N, device="cuda")
    groups = torch.stack([i.where(i % 8 > 0, 0), i])
    negative = (groups[0][:, None] != groups[0]) & (groups[1][:, None] != groups[1])
    return Case(
        hidden=(rows + 4 * torch.randn_like(rows)).bfloat16(),
        weight=torch.ones(2 * N * TOKENS, device="cuda"),
        offsets=torch.arange(0, 2 * N * TOKENS + 1, TOKENS, device="cuda"),
        negative=negative,
        groups=groups,
        config=AlignConfig(loss=loss),
    )


def chain(case: Case, hidden: Tensor) -> Tensor:
    """Plain PyTorch from hidden states to the loss."""
    cos = plain_cosine(*plain_mean(hidden, case.weight, case.offsets).chunk(2))[0]
    return alignment_loss(cos, case.negative, case.config)


def by_ops(case: Case, hidden: Tensor) -> Tensor:
    """The engine's ops, one by one."""
    cos = cosine_similarity(*segment_mean(hidden, case.weight, case.offsets).chunk(2))
    return alignment_loss(cos, case.negative, case.config)


def fused(case: Case, hidden: Tensor) -> Tensor:
    """The engine's one op."""
    config = case.config
    return pooled_alignment_loss(
        hidden,
        case.weight,
        case.offsets,
        case.groups,
        loss=config.loss,
        margin=config.margin,
        temperature=config.temperature,
        two_way=config.two_way,
    )[0]


def step_of(loss: Loss, leaf: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """The loss and its gradient."""

    def call() -> tuple[Tensor, Tensor]:
        value = loss(leaf)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    return call


def providers(case: Case) -> dict[str, Loss]:
    """Each from hidden states to the loss."""
    torch.compiler.reset()
    found: dict[str, Loss] = {
        BASELINE: partial(chain, case),
        "compiled": torch.compile(partial(chain, case)),
        "ops": partial(by_ops, case),
        "tli-engine": partial(fused, case),
    }
    try:
        step_of(found["compiled"], case.hidden.clone().requires_grad_())()
    except Exception as error:
        # a peer's failure is reported, and is no reason to time nothing
        print(f"compiled: not timed: {type(error).__name__}: {str(error)[:80]}")
        del found["compiled"]
    return found


def check(found: dict[str, Loss], case: Case) -> None:
    """Stop unless losses and gradients are those of fp32 up to rounding."""
    exact = step_of(partial(chain, case), case.hidden.float().requires_grad_())()
    for name, loss in found.items():
        actual = step_of(loss, case.hidden.clone().requires_grad_())()
        for x, y in zip(actual, exact, strict=True):
            error = (x.float() - y).norm() / y.norm().clamp(min=1e-6)
            if not error < 1e-2:
                raise SystemExit(f"{name}: relative error {error:.1e}; not timed")


def bench_case(N: int, H: int, loss: str, bandwidth: float) -> list[Row]:
    """Forward, and forward with backward, of one batch."""
    case = make_case(N, H, loss)
    found = providers(case)
    check(found, case)
    calls = 50 if N <= 256 else 5 if N <= 1024 else 1
    shape = {"pairs": N, "tokens": len(case.hidden), "H": H}
    # hidden states and their gradient; cosines, and both sides' gradients of them
    nbytes, flops = case.hidden.nbytes, 2 * N * N * H
    rows = []
    for name, times in (("fwd", 1), ("fwd_bwd", 2)):
        leaves = {p: case.hidden.clone().requires_grad_() for p in found}
        timed = {
            p: [partial(f, leaves[p]) if name == "fwd" else step_of(f, leaves[p])]
            for p, f in found.items()
        }
        seconds = time_graphs(timed, calls, rounds=15)
        base = statistics.median(seconds[BASELINE])
        floor = times * nbytes / bandwidth
        rows += [
            Row(
                name, shape, loss, p, *quantiles_ms(s), base / statistics.median(s),
                roofline=floor / statistics.median(s), bytes=times * nbytes,
                flops=(2 * times - 1) * flops, notes={"tokens a word": TOKENS},
            )
            for p, s in seconds.items()
        ]  # fmt: skip
    print_gpu_rows(rows)
    return rows


def sweep(N: int, H: int, loss: str) -> None:
    """Print the time of tiles of both launches for few pairs, the launchers' choice first."""
    case = make_case(N, H, loss)
    config = case.config
    ways = 2 if config.two_way else 1
    choice = Choice(case.groups, loss, ways, config.margin, 1 / config.temperature)
    inputs = (case.hidden, case.weight, case.offsets)
    chosen = forward_tile(N, case.hidden.dtype, loss)
    value, _, _, *kept = forward.launch_few(*inputs, choice, chosen)
    rest = (torch.ones_like(value), *kept, *inputs[1:], choice, case.hidden.dtype)
    launches: dict[str, tuple[Tile, Callable[[Tile], object]]] = {
        "fwd": (chosen, lambda tile: forward.launch_few(*inputs, choice, tile)),
        "bwd": (backward_tile(N), lambda tile: backward.launch_few(*rest, tile)),
    }
    tiles = [Tile(*t) for t in itertools.product((16, 32), (64, 128, 256), (4, 8, 16))]
    for name, (first, launch) in launches.items():
        print_tiles(f"{name} N={N}", launch, (first, *tiles), 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", nargs="+", type=int, default=list(PAIRS))
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=["infonce"])
    parser.add_argument("--sweep", action="store_true", help="time tiles, and write nothing")
    args = parser.parse_args()
    torch.manual_seed(0)
    cases = list(itertools.product(args.losses, args.pairs))
    if args.sweep:
        for loss, N in cases:
            if N <= forward.MOST_PAIRS:
                sweep(N, args.hidden, loss)
        return
    bandwidth = copy_bandwidth()
    rows = []
    for loss, N in cases:
        rows += bench_case(N, args.hidden, loss, bandwidth)
    path = write_results("pooled_cosine", rows, [], copy_bytes_per_s=bandwidth)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
