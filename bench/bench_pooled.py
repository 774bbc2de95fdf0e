"""Loss of pooled word pairs and its gradient for the hidden states: microseconds of GPU time.

``chain`` is plain PyTorch: segment mean, cosines, mask, loss, and autograd through them; the
baseline. ``compiled`` is that under ``torch.compile``; ``ops`` the same from the engine's ops one by
one. Words have 4 tokens. Hidden states lie in the L2 cache where they fit, as they do after the block
that made them. Times are those of replayed graphs: ``fwd`` is the loss alone, gradient included
where the forward makes it, ``step`` ends with the gradient of every row.

python -m bench pooled [--pairs N ...] [--hidden H] [--losses NAME ...]
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

from bench.harness import Row, print_gpu_rows, quantiles_ms, time_graphs, write_results
from tli_engine.align.losses import alignment_loss
from tli_engine.config import AlignConfig
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


def bench_case(N: int, H: int, loss: str) -> list[Row]:
    """Forward, and forward with backward, of one batch."""
    case = make_case(N, H, loss)
    found = providers(case)
    check(found, case)
    calls = 50 if N <= 256 else 5 if N <= 1024 else 1
    shape = {"pairs": N, "H": H}
    # hidden states read once, their gradient written once; cosines, and both sides' gradients
    nbytes, flops = 2 * case.hidden.nbytes, 3 * 2 * N * N * H
    rows = []
    for name in ("fwd", "step"):
        leaves = {p: case.hidden.clone().requires_grad_() for p in found}
        timed = {
            p: [partial(f, leaves[p]) if name == "fwd" else step_of(f, leaves[p])]
            for p, f in found.items()
        }
        times = time_graphs(timed, calls, rounds=15)
        base = statistics.median(times[BASELINE])
        rows += [
            Row(
                name, shape, loss, p, *quantiles_ms(s), base / statistics.median(s),
                bytes=nbytes, flops=flops,
            )
            for p, s in times.items()
        ]  # fmt: skip
    print_gpu_rows(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", nargs="+", type=int, default=list(PAIRS))
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=["infonce"])
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for loss, N in itertools.product(args.losses, args.pairs):
        rows += bench_case(N, args.hidden, loss)
    print(f"written: {write_results('pooled', rows, [])}")


if __name__ == "__main__":
    main()
