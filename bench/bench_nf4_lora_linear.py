"""NF4 linear layer with LoRA, forward and backward (dX, dA, dB): what the update costs on top.

On a GPU of the Hopper extension also the forward by itself: whole (``tli-engine``), and its product alone
with the update in it (``tli-engine:epilogue``), x A^T being at hand.

``frozen`` is the same layer without an adapter, forward and dX. PEFT is measured as its users run
it on bitsandbytes' layer, with the adapter in bf16 and, its default, in fp32; so is Unsloth's
autograd function of one adapted layer. All hold the same bytes, the absmax in fp32.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Row, print_gpu_rows, quantiles_ms, time_graphs, write_results
from bench.nf4_shapes import SHAPES, Weights, bnb_linear, check, make_weights
from bench.peers import load_unsloth
from tli_engine.layouts import RecordedWeight
from tli_engine.nn import NF4Linear

PEERS = ["bitsandbytes", "peft", "unsloth"]
M_VALUES = (16, 64, 256, 1024, 4096)
RANK, SCALING = 16, 2.0

# a layer and what it is differentiated by: its input, then its adapter's A and B if it has one
Layer = tuple[Callable[[Tensor], Tensor], list[Tensor]]


def peft_layer(linear: nn.Module, dtype: torch.dtype) -> nn.Module:
    """PEFT's adapter, of ``dtype``, around a layer: bitsandbytes', or a dense one."""
    from peft import LoraConfig, get_peft_model

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"model_type": "custom"}
            self.up_proj = linear

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.up_proj(x)
            return y

    model = Model()
    model.is_loaded_in_4bit = type(linear) is not nn.Linear  # type: ignore[assignment]
    config = LoraConfig(
        r=RANK, lora_alpha=SCALING * RANK, target_modules=["up_proj"], init_lora_weights=False
    )
    adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(linear.weight.device, dtype)  # type: ignore[arg-type]
    return adapted


def step(forward: Callable[[Tensor], Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """One forward, and the gradients of ``inputs``; the first is the layer's input."""
    y = forward(inputs[0])
    return [y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def check_step(layer: Layer, dy: Tensor, weight: Tensor, what: str) -> None:
    """Stop unless output and gradients are those of the dense weight in fp32, up to rounding."""
    x, *adapter = (t.detach().float().requires_grad_() for t in layer[1])
    y = x @ weight.float().T
    if adapter:
        y = y + SCALING * (x @ adapter[0].T @ adapter[1].T)
    exact = [y.detach(), *torch.autograd.grad(y, [x, *adapter], dy.float())]
    for name, got, want in zip(("y", "dX", "dA", "dB"), step(*layer, dy), exact, strict=False):
        check(got, want, f"{what} {name}")


def unsloth_layers(weights: Weights, x: Tensor, A: Tensor, B: Tensor) -> dict[str, list[Layer]]:
    """Unsloth's adapted layer, with the adapter in bf16 and, its default, in fp32."""
    unsloth = load_unsloth()
    if unsloth is None:
        return {}

    def adapted(packed: Tensor, state: Any, a: Tensor, b: Tensor) -> Layer:
        return lambda t: unsloth.lora_forward(t, packed, state, a, b, SCALING), [x, a, b]

    found = {}
    for name, dtype in (("unsloth", torch.bfloat16), ("unsloth:fp32", torch.float32)):
        a, b = (t.detach().to(dtype).requires_grad_() for t in (A, B))
        found[name] = [adapted(*weight, a, b) for weight in weights.bnb]
    return found


def providers(weights: Weights, M: int, N: int, K: int) -> dict[str, list[Layer]]:
    """Each provider's layers, a rotation of weights."""
    import bitsandbytes

    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    lora_A = (torch.randn(RANK, K, device="cuda") * 0.02).requires_grad_()
    lora_B = (torch.randn(N, RANK, device="cuda") * 0.02).requires_grad_()

    def peft(dtype: torch.dtype) -> list[Layer]:
        held = weights.bnb[: max(2, len(weights.dense))]
        layers = [peft_layer(bnb_linear(*w), dtype) for w in held]
        return [(m, [x, *(p for p in m.parameters() if p.requires_grad)]) for m in layers]

    def adapted(layer: NF4Linear) -> Callable[[Tensor], Tensor]:
        return lambda t: layer.lora_forward(t, lora_A, lora_B, SCALING)

    def bnb(packed: Tensor, state: object) -> Callable[[Tensor], Tensor]:
        return lambda t: bitsandbytes.matmul_4bit(t, packed.t(), quant_state=state)

    return {
        "peft+bitsandbytes": peft(torch.bfloat16),
        "peft+bitsandbytes:fp32": peft(torch.float32),
        **unsloth_layers(weights, x, lora_A, lora_B),
        "bitsandbytes:frozen": [(bnb(*w), [x]) for w in weights.bnb],
        "cublas-bf16:frozen": [
            (lambda t, w=w: nn.functional.linear(t, w), [x]) for w in weights.dense
        ],
        "tli-engine:frozen": [(m, [x]) for m in weights.nf4],
        "tli-engine": [(adapted(m), [x, lora_A, lora_B]) for m in weights.nf4],
    }


def forwards(weights: Weights, M: int, N: int, K: int) -> dict[str, list[Callable[[], object]]]:
    """The forward's parts, without gradients; nothing without the Hopper extension."""
    stored = [layer._stored for layer in weights.nf4]
    recorded = [s.records for s in stored if isinstance(s, RecordedWeight)]
    if not recorded:
        return {}
    from tli_engine.kernels.nf4_linear_records_sm90 import down, product

    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    A, B = torch.randn(RANK, K, device="cuda") * 0.02, torch.randn(N, RANK, device="cuda") * 0.02
    s = down(x, A, 1, SCALING, None, 0.0)
    lora = (s, B, [N])
    return {
        "tli-engine:frozen": [partial(layer, x) for layer in weights.nf4],
        "tli-engine:epilogue": [partial(product, x, r, N, False, None, lora) for r in recorded],
        "tli-engine": [partial(layer.lora_forward, x, A, B, SCALING) for layer in weights.nf4],
    }


def rows_of(
    case: str, model: str, shape: dict[str, int], times: dict[str, list[float]], baseline: str
) -> list[Row]:
    """Rows of one case; the engine's own say what they take over its frozen layer."""
    base, frozen = (statistics.median(times[name]) for name in (baseline, "tli-engine:frozen"))
    rows = [
        Row(
            case,
            shape,
            model,
            provider,
            *quantiles_ms(seconds),
            ratio_to_baseline=base / statistics.median(seconds),
            notes={"over_frozen": statistics.median(seconds) / frozen - 1}
            if provider in ("tli-engine", "tli-engine:epilogue")
            else {},
        )
        for provider, seconds in times.items()
    ]
    print_gpu_rows(rows)
    return rows


def bench_shape(name: str, N: int, K: int, m_values: list[int]) -> list[Row]:
    weights = make_weights(N, K)
    rows = []
    for M in m_values:
        dy = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
        # on leaves of its own: a graph captures only leaves that no other stream has met
        for provider, rotation in providers(weights, M, N, K).items():
            check_step(rotation[0], dy, weights.dense[0], f"{provider} {name} M={M}")
        calls = {
            provider: [partial(step, *layer, dy) for layer in rotation]
            for provider, rotation in providers(weights, M, N, K).items()
        }
        times = time_graphs(calls, 6, rounds=7)
        shape = {"M": M, "N": N, "K": K, "r": RANK}
        rows += rows_of("fwd_bwd", name, shape, times, "peft+bitsandbytes")
        added = rows[-1].notes["over_frozen"]
        print(f"  the update adds {100 * added:.1f} % to the frozen layer")
        if alone := forwards(weights, M, N, K):
            times = time_graphs(alone, 12, rounds=7)
            rows += rows_of("fwd", name, shape, times, "tli-engine:frozen")
        del calls, rotation
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["8b-gate-up", "8b-down"])
    parser.add_argument(
        "--m", nargs="+", type=int, default=list(M_VALUES), help="rows of the input"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    for name in args.shapes:
        rows += bench_shape(name, *SHAPES[name], args.m)
        path = write_results("nf4_lora_linear", rows, PEERS)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
