"""An update of full fine-tuning's 16-bit weights by AdamW: milliseconds of GPU time.

``torch-fused`` is PyTorch's way to fp32 master copies, the baseline: gradients copied to fp32, its fused
AdamW, the weights copied back. ``torch-fused:bf16`` is its fused AdamW on bf16 weights alone, which loses
what is less than a rounding step. The engine's ``tli-engine`` reads bf16 gradients and writes master
copies and weights in one pass; ``:stochastic`` has no copies and rounds at random. Launched call by call,
the host waiting for none; the floor is the time of the bytes that a provider cannot do without.

python -m bench mixed_adamw [--models NAME ...]
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bench.harness import Row, copy_bandwidth, print_gpu_rows, time_launches, write_results
from bench.models import config_of
from bench.nf4_shapes import rows_of
from tli_engine.train.mixed_adamw import MasterAdamW, StochasticAdamW

BASELINE = "torch-fused"
RATE, DECAY = 1e-4, 0.01
# bytes a weight: what is read and what is written
_BYTES = {
    BASELINE: 2 + 12 + 12 + 2,
    "torch-fused:bf16": 8 + 6,
    "tli-engine": 2 + 12 + 12 + 2,
    "tli-engine:stochastic": 8 + 6,
}
Step = Callable[[], object]


def shapes_of(model: str, blocks: int) -> list[tuple[int, int]]:
    """The matrices of some blocks, joined as the engine joins them, and of the embeddings."""
    config = config_of(model)
    hidden, ffn = config.hidden_size, config.intermediate_size
    head = hidden // config.num_attention_heads
    qkv = hidden + 2 * config.num_key_value_heads * head
    of_block = [(qkv, hidden), (hidden, hidden), (2 * ffn, hidden), (hidden, ffn)]
    return [*of_block * blocks, (config.vocab_size, hidden)]


def weights(shapes: Sequence[tuple[int, int]]) -> list[nn.Parameter]:
    """Random weights in bf16, each with a gradient."""
    generator = torch.Generator("cuda").manual_seed(0)
    found = []
    for shape in shapes:
        drawn = torch.randn(2, *shape, device="cuda", generator=generator, dtype=torch.bfloat16)
        found.append(nn.Parameter(drawn[0].clone()))
        found[-1].grad = drawn[1].clone()
    return found


def torch_with_masters(trained: list[nn.Parameter]) -> Step:
    """A step of torch's on fp32 copies."""
    masters = [nn.Parameter(t.detach().float()) for t in trained]
    optimizer = torch.optim.AdamW(masters, lr=RATE, weight_decay=DECAY, fused=True)

    @torch.no_grad()
    def step() -> None:
        for master, tensor in zip(masters, trained, strict=True):
            assert tensor.grad is not None
            master.grad = tensor.grad.float()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_copy_([*trained], [*masters])

    return step


def torch_alone(trained: list[nn.Parameter]) -> Step:
    """A step of torch's on bf16 weights."""
    return torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY, fused=True).step


def engine_with_masters(trained: list[nn.Parameter]) -> Step:
    """A step of the engine's on fp32 copies."""
    pairs: dict[Tensor, Tensor] = {nn.Parameter(t.detach().float()): t for t in trained}
    optimizer = MasterAdamW([{"params": [*pairs], "weight_decay": DECAY}], trained=pairs)
    optimizer.param_groups[0]["lr"] = RATE
    return optimizer.step


def engine_alone(trained: list[nn.Parameter]) -> Step:
    """A step of the engine's on bf16 weights, rounded at random."""
    optimizer = StochasticAdamW([{"params": trained, "weight_decay": DECAY}])
    optimizer.param_groups[0]["lr"] = RATE
    return optimizer.step


PROVIDERS: dict[str, Callable[[list[nn.Parameter]], Step]] = {
    BASELINE: torch_with_masters,
    "torch-fused:bf16": torch_alone,
    "tli-engine": engine_with_masters,
    "tli-engine:stochastic": engine_alone,
}


def check() -> None:
    """Stop unless the engine's master copies learn what torch's do."""
    ends = []
    for name in (BASELINE, "tli-engine"):
        trained = weights([(512, 300)])
        step = PROVIDERS[name](trained)
        for _ in range(5):
            step()
        ends.append(trained[0].detach().float())
    off = ((ends[0] - ends[1]).abs() > 2**-7 * ends[0].abs() + 1e-6).float().mean().item()
    if off:
        raise SystemExit(f"tli-engine: {off:.1%} of the weights are others than torch's; not timed")


def bench_model(model: str, blocks: int, bandwidth: float) -> list[Row]:
    shapes = shapes_of(model, blocks)
    numel = sum(n * k for n, k in shapes)
    rows: list[Row] = []
    times: dict[str, list[float]] = {}
    for name, make in PROVIDERS.items():
        step = make(weights(shapes))
        step()
        times |= time_launches({name: [step]}, 3)
        del step
        torch.cuda.empty_cache()
    shape = {"P": numel, "tensors": len(shapes)}
    for name in times:
        of_one = {name: times[name], BASELINE: times[BASELINE]}
        nbytes = _BYTES[name] * numel
        make_rows = partial(rows_of, "update", shape, model, of_one, BASELINE)
        rows += [r for r in make_rows(nbytes / bandwidth, bytes=nbytes) if r.provider == name]
    print_gpu_rows(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    blocks = {"qwen2-1.5b": 28, "llama-3-8b": 8}
    parser.add_argument("--models", nargs="+", choices=blocks, default=list(blocks))
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    check()
    rows: list[Row] = []
    for name in args.models:
        rows += bench_model(name, blocks[name], bandwidth)
    print(f"written: {write_results('mixed_adamw', rows, [], copy_bytes_per_s=bandwidth)}")


if __name__ == "__main__":
    main()
