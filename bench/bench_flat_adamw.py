"""A training step's optimizer, clipping included: microseconds of GPU time.

Peers are ``torch.nn.utils.clip_grad_norm_`` (foreach) and ``torch.optim.AdamW``, fused (the baseline)
or foreach, both capturable. Tensors are LoRA's of an 8B Llama model at rank 16. Case ``graph`` times
replayed graphs, as training replays its step; ``eager`` launches call by call, the host included.
Buffers rotate out of the L2 cache where copies of them fit. The engine's ``:bf16`` also writes a copy of
the parameters in bf16.

python -m bench flat_adamw [--adapters NAME ...]
"""

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bench.harness import (
    Row,
    copy_bandwidth,
    print_gpu_rows,
    time_graphs,
    time_launches,
    write_results,
)
from bench.nf4_shapes import rows_of
from tli_engine.reference.flat_adamw import flat_adamw as reference
from tli_engine.train.flat_adamw import FlatAdamW

_RANK = 16
_ATTENTION = [(4096, 4096), (1024, 4096)]
_ALL = [*_ATTENTION, (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
# layers, N and K of each layer's projections: 0.43, 6.8 and 42 million parameters
ADAPTERS = {
    "q,v-of-2": (2, _ATTENTION),
    "q,v-of-32": (32, _ATTENTION),
    "all-of-32": (32, _ALL),
}
BASELINE = "torch-fused"
RATE, DECAY, MAX_NORM = 1e-3, 0.01, 1.0
# between two uses of one copy: several times an L2 cache of 60 MB
_ROTATION_BYTES = 250_000_000
Step = Callable[[], object]


def random_tensors(name: str, seed: int) -> list[Tensor]:
    """An adapter's A and B of each projection, and as many gradients."""
    layers, projections = ADAPTERS[name]
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [s for N, K in projections for s in ((_RANK, K), (N, _RANK))] * layers
    return [torch.randn(s, device="cuda", generator=generator) for s in shapes * 2]


def torch_step(tensors: Sequence[Tensor], **options: bool) -> tuple[list[nn.Parameter], Step]:
    """Parameters, and a step of torch's."""
    half = len(tensors) // 2
    parameters = [nn.Parameter(t.clone()) for t in tensors[:half]]
    for parameter, grad in zip(parameters, tensors[half:], strict=True):
        parameter.grad = grad.clone()
    optimizer = torch.optim.AdamW(
        parameters, lr=torch.tensor(RATE, device="cuda"), weight_decay=DECAY, capturable=True,
        **options,
    )  # fmt: skip

    def step() -> None:
        nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)
        optimizer.step()

    return parameters, step


def flat_step(
    tensors: Sequence[Tensor], shadow: torch.dtype | None = None
) -> tuple[list[nn.Parameter], Step]:
    """Parameters, and a step of the engine's."""
    half = len(tensors) // 2
    parameters = [nn.Parameter(t.clone()) for t in tensors[:half]]
    optimizer = FlatAdamW(
        {str(i): p for i, p in enumerate(parameters)},
        torch.full((1,), RATE),
        weight_decay=DECAY,
        max_grad_norm=MAX_NORM,
        shadow_dtype=shadow,
    )
    for view, grad in zip(optimizer.gradients.values(), tensors[half:], strict=True):
        view.copy_(grad)
    return parameters, optimizer.step


PROVIDERS: dict[str, Callable[[Sequence[Tensor]], tuple[list[nn.Parameter], Step]]] = {
    BASELINE: lambda tensors: torch_step(tensors, fused=True),
    "torch-foreach": lambda tensors: torch_step(tensors, foreach=True),
    "tli-engine": flat_step,
    "tli-engine:bf16": lambda tensors: flat_step(tensors, torch.bfloat16),
}


def check(name: str) -> None:
    """Stop unless a first step of every provider is that of fp64 up to rounding."""
    tensors = random_tensors(name, 0)
    half = len(tensors) // 2
    exact, grad = (
        torch.cat([t.flatten() for t in ts]).double() for ts in (tensors[:half], tensors[half:])
    )
    means = torch.zeros_like(exact), torch.zeros_like(exact)
    counts = torch.zeros(2, dtype=torch.int64, device="cuda")
    rates = torch.full((1,), RATE, device="cuda")
    start = exact.clone()
    reference(exact, grad, *means, counts, rates, 0.9, 0.999, 1e-8, DECAY, MAX_NORM)
    for provider, make in PROVIDERS.items():
        parameters, step = make(tensors)
        step()
        actual = torch.cat([p.detach().flatten() for p in parameters])
        # of the change, which is 1e-3 of the parameters: fp32's rounding of them is 6e-5 of it
        error = ((actual - exact).norm() / (exact - start).norm()).item()
        if not error < 3e-4:
            raise SystemExit(f"{provider}: relative error {error:.1e}; not timed")


def bench_adapter(name: str, bandwidth: float) -> list[Row]:
    check(name)
    numel = sum(t.numel() for t in random_tensors(name, 0)) // 2
    copies = max(1, min(24, math.ceil(_ROTATION_BYTES / (16 * numel))))
    steps: dict[str, list[Step]] = {
        provider: [make(random_tensors(name, seed))[1] for seed in range(copies)]
        for provider, make in PROVIDERS.items()
    }
    for rotation in steps.values():
        for step in rotation:
            # torch makes its statistics in the first step, which must not be in a graph
            step()
    calls = max(8, copies)
    # parameter, gradient and two means read, all but the gradient written
    nbytes = 28 * numel
    rows = []
    for case, time in (("graph", time_graphs), ("eager", time_launches)):
        times = time(steps, calls)
        shape = {"P": numel}
        rows += rows_of(case, shape, name, times, BASELINE, nbytes / bandwidth, bytes=nbytes)
    print_gpu_rows(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    rows: list[Row] = []
    for name in args.adapters:
        rows += bench_adapter(name, bandwidth)
        torch.cuda.empty_cache()
    print(f"written: {write_results('flat_adamw', rows, [], copy_bytes_per_s=bandwidth)}")


if __name__ == "__main__":
    main()
