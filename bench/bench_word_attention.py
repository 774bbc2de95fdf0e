"""Attention within packed words of 2 to 8 tokens, rotation included: microseconds of GPU time.

Peers get transformers' rotation, then PyTorch's attention: under a block mask on the pack, on words
laid side by side and filled up (``padded``: what the engine did before; the baseline), or its
variable-length kernel. ``:rotated`` leaves the peer's rotation out: attention alone. Inputs are views
of one projection and lie in the L2 cache, as they do after that projection. Times are those of
replayed graphs; ``bwd`` is the backward alone, into separate dq, dk and dv.

python -m bench word_attention [--shapes NAME ...] [--tokens T ...] [--sweep]
"""

import argparse
import inspect
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bench.harness import (
    Row,
    print_gpu_rows,
    print_tiles,
    quantiles_ms,
    time_graphs,
    write_results,
)
from tli_engine.kernels.word_attention import Tile, forward_tile, launch_forward
from tli_engine.kernels.word_attention_backward import backward_tile, launch_backward
from tli_engine.ops import word_attention, word_bounds

SHAPES = {"8b": (32, 8, 128), "smollm2-135m": (9, 3, 64)}
TOKENS = (64, 128, 256, 512)
CALLS = 50
BASELINE = "padded"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A pack of words and the tensors that providers share; ``qkv`` are views of one tensor."""

    qkv: list[Tensor]
    dout: Tensor
    cos: Tensor
    sin: Tensor
    offsets: Tensor
    bounds: Tensor
    rows: Tensor
    slots: Tensor


def make_case(T: int, heads: int, kv_heads: int, D: int) -> Case:
    """Random words that fill ``T`` tokens, and bf16 tensors as a model has them."""
    rng = random.Random(T)
    lengths: list[int] = []
    while sum(lengths) < T:
        lengths.append(min(rng.randint(2, 8), T - sum(lengths)))
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    size = torch.tensor(lengths, device="cuda")
    start = offsets[:-1]
    word = torch.repeat_interleave(torch.arange(len(lengths), device="cuda"), size)
    position = torch.arange(T, device="cuda") - start[word]
    longest = max(lengths)
    columns = torch.arange(longest, device="cuda")
    frequency = 5e5 ** (-torch.arange(0, D, 2, device="cuda") / D)
    angles = (position[:, None] * frequency).repeat(1, 2)
    packed = torch.randn(T, heads + 2 * kv_heads, D, device="cuda", dtype=torch.bfloat16)
    return Case(
        qkv=list(packed.split([heads, kv_heads, kv_heads], dim=1)),
        dout=torch.randn(T, heads, D, device="cuda", dtype=torch.bfloat16),
        cos=angles.cos().bfloat16(),
        sin=angles.sin().bfloat16(),
        offsets=offsets.int(),
        bounds=word_bounds(offsets, T),
        rows=start[:, None] + columns.minimum(size[:, None] - 1),
        slots=word * longest + position,
    )


def peers(case: Case) -> dict[str, Attention]:
    """Peers' attention on rotated ``[T, H, D]``, each to ``[T, Hq, D]``."""
    heads, kv_heads = case.qkv[0].shape[1], case.qkv[1].shape[1]
    group = heads // kv_heads
    rows = torch.arange(len(case.cos), device="cuda")
    start = case.bounds[0]
    mask = (rows[None, :] >= start[:, None]) & (rows[None, :] <= rows[:, None])
    longest = case.rows.shape[1]

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # as transformers does under a mask
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return scaled_dot_product_attention(*heads_first, attn_mask=mask)[0].transpose(0, 1)

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = (x[case.rows].transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=group > 1)
        return out.transpose(1, 2).flatten(0, 1)[case.slots]

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        # older ones take as many heads of k and v as of q, and a flag for causal
        options = inspect.signature(varlen_attn).parameters
        if "enable_gqa" not in options:
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        gqa = {"enable_gqa": group > 1} if "enable_gqa" in options else {}
        causal = {"window_size": (-1, 0)} if "window_size" in options else {"is_causal": True}
        lengths = (case.offsets, case.offsets, longest, longest)
        return varlen_attn(q, k, v, *lengths, **gqa, **causal)

    return {"padded": padded, "masked": masked, "varlen": varlen}


def rotated(attention: Attention, case: Case) -> Attention:
    """``attention`` after transformers' rotation."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k))
        q, k = apply_rotary_pos_emb(*heads_first, case.cos[None], case.sin[None])
        return attention(q[0].transpose(0, 1), k[0].transpose(0, 1), v)

    return call


def providers(case: Case) -> dict[str, Attention]:
    """The engine and its peers, each from q, k and v to the output."""
    found: dict[str, Attention] = {}
    for name, attention in peers(case).items():
        try:
            attention(*case.qkv)
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            print(f"{name}: not timed: {type(error).__name__}: {str(error)[:80]}")
            continue
        found[name] = rotated(attention, case)
        found[f"{name}:rotated"] = attention
    found["tli-engine"] = lambda q, k, v: word_attention(q, k, v, case.cos, case.sin, case.bounds)
    return found


def backward_of(attention: Attention, case: Case) -> Callable[[], Sequence[Tensor]]:
    """The backward alone; the forward runs in the first call, which is not timed."""
    leaves = [x.detach().requires_grad_() for x in case.qkv]
    outs: list[Tensor] = []

    def call() -> Sequence[Tensor]:
        if not outs:
            outs.append(attention(*leaves))
        return torch.autograd.grad(outs[0], leaves, case.dout, retain_graph=True)

    return call


def check(found: dict[str, Attention], case: Case) -> None:
    """Stop unless outputs and gradients are those of fp32 up to rounding."""
    wide = replace(case, qkv=[x.float() for x in case.qkv], dout=case.dout.float())
    exact = rotated(peers(wide)["masked"], wide)
    truth = [exact(*wide.qkv), *backward_of(exact, wide)()]
    for name, attention in found.items():
        if name.endswith(":rotated"):
            continue
        actual = [attention(*case.qkv), *backward_of(attention, case)()]
        for x, y in zip(actual, truth, strict=True):
            error = (x.float() - y).norm() / y.norm()
            if not error < 2e-2:
                raise SystemExit(f"{name}: relative error {error:.1e}; not timed")


def bench_case(model: str, T: int) -> list[Row]:
    """Forward and backward of one pack."""
    case = make_case(T, *SHAPES[model])
    found = providers(case)
    check(found, case)
    heads, kv_heads, D = SHAPES[model]
    shape = {"T": T, "Hq": heads, "Hkv": kv_heads, "D": D}
    rows = []
    for name in ("fwd", "bwd"):
        calls = {
            p: [partial(a, *case.qkv) if name == "fwd" else backward_of(a, case)]
            for p, a in found.items()
        }
        times = time_graphs(calls, CALLS, rounds=15)
        base = statistics.median(times[BASELINE])
        rows += [
            Row(name, shape, model, p, *quantiles_ms(s), base / statistics.median(s))
            for p, s in times.items()
        ]
    print_gpu_rows(rows)
    return rows


def sweep(model: str, T: int) -> None:
    """Print the time of every tile, the launchers' choice first."""
    case = make_case(T, *SHAPES[model])
    heads, kv_heads, D = SHAPES[model]
    angles = (case.cos[:, : D // 2], case.sin[:, : D // 2])
    inputs = (*case.qkv, *angles, case.bounds)
    shape = (D, heads // kv_heads, torch.bfloat16)
    out, lse = launch_forward(*inputs, D**-0.5, forward_tile(*shape))
    directions: dict[str, tuple[Tile, Callable[[Tile], object]]] = {
        "fwd": (forward_tile(*shape), lambda t: launch_forward(*inputs, D**-0.5, t)),
        "bwd": (
            backward_tile(*shape, torch.cuda.get_device_capability()),
            lambda t: launch_backward(case.dout, *inputs, out, lse, D**-0.5, t),
        ),
    }
    sizes = itertools.product(((16, 16), (16, 32), (32, 32), (32, 64)), (1, 2, 4), (2, 4, 8))
    tiles = [Tile(*rows, h, w) for rows, h, w in sizes]
    for name, (chosen, launch) in directions.items():
        print_tiles(f"{name} {model} T={T}", launch, (chosen, *tiles), CALLS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--sweep", action="store_true", help="time every tile instead")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    for model, T in itertools.product(args.shapes, args.tokens):
        if args.sweep:
            sweep(model, T)
        else:
            rows += bench_case(model, T)
    if rows:
        print(f"written: {write_results('word_attention', rows, ['transformers'], calls=CALLS)}")


if __name__ == "__main__":
    main()
