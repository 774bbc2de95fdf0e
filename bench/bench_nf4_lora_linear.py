"""NF4 linear layer with LoRA, forward and backward (dX, dA, dB): what the update costs on top.

``frozen`` is the same layer without an adapter, forward and dX. PEFT is measured as its users run
it on bitsandbytes' layer, with the adapter in bf16 and, its default, in fp32.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bench.harness import Row, print_gpu_rows, quantiles_ms, time_graphs, write_results
from bench.nf4_shapes import SHAPES, Weights, make_weights
from tli_engine.nn import NF4Linear

PEERS = ["bitsandbytes", "peft"]
M_VALUES = (16, 64, 256, 1024, 4096)
RANK, SCALING = 16, 2.0


def peft_layer(packed: Tensor, state: object, N: int, K: int, dtype: torch.dtype) -> nn.Module:
    """PEFT's adapter around bitsandbytes' layer."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    linear = bnb.nn.Linear4bit(
        K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    linear.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, bnb_quantized=True, quant_type="nf4",
        compress_statistics=False, blocksize=64, module=linear,
    )  # fmt: skip
    linear.quant_state = state

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"model_type": "custom"}
            self.up_proj = linear

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.up_proj(x)
            return y

    model = Model()
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    config = LoraConfig(
        r=RANK, lora_alpha=SCALING * RANK, target_modules=["up_proj"], init_lora_weights=False
    )
    adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to("cuda", dtype)
    return adapted


def step(forward: Callable[[Tensor], Tensor], inputs: list[Tensor], dy: Tensor) -> None:
    """One forward and the gradients of ``inputs``; the first is the layer's input."""
    y = forward(inputs[0])
    torch.autograd.grad(y, inputs, dy.to(y.dtype))


def providers(weights: Weights, M: int, N: int, K: int) -> dict[str, list[Callable[[], object]]]:
    """Each provider's calls on a rotation of weights."""
    import bitsandbytes

    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
    lora_A = (torch.randn(RANK, K, device="cuda") * 0.02).requires_grad_()
    lora_B = (torch.randn(N, RANK, device="cuda") * 0.02).requires_grad_()

    def peft(dtype: torch.dtype) -> list[Callable[[], object]]:
        layers = [peft_layer(*w, N, K, dtype) for w in weights.bnb[: max(2, len(weights.dense))]]
        inputs = [[x, *(p for p in m.parameters() if p.requires_grad)] for m in layers]
        return [partial(step, m, i, dy) for m, i in zip(layers, inputs, strict=True)]

    def adapted(layer: NF4Linear) -> Callable[[Tensor], Tensor]:
        return lambda t: layer.lora_forward(t, lora_A, lora_B, SCALING)

    def bnb(packed: Tensor, state: object) -> Callable[[Tensor], Tensor]:
        return lambda t: bitsandbytes.matmul_4bit(t, packed.t(), quant_state=state)

    return {
        "peft+bitsandbytes": peft(torch.bfloat16),
        "peft+bitsandbytes:fp32": peft(torch.float32),
        "bitsandbytes:frozen": [lambda w=w: step(bnb(*w), [x], dy) for w in weights.bnb],
        "cublas-bf16:frozen": [
            lambda w=w: step(lambda t: nn.functional.linear(t, w), [x], dy) for w in weights.dense
        ],
        "tli-engine:frozen": [lambda m=m: step(m, [x], dy) for m in weights.nf4],
        "tli-engine": [lambda m=m: step(adapted(m), [x, lora_A, lora_B], dy) for m in weights.nf4],
    }


def bench_shape(name: str, N: int, K: int, m_values: list[int]) -> list[Row]:
    weights = make_weights(N, K)
    rows = []
    for M in m_values:
        calls = providers(weights, M, N, K)
        times = time_graphs(calls, 6, rounds=7)
        base = statistics.median(times["peft+bitsandbytes"])
        frozen = statistics.median(times["tli-engine:frozen"])
        new = [
            Row(
                "fwd_bwd",
                {"M": M, "N": N, "K": K, "r": RANK},
                name,
                provider,
                *quantiles_ms(seconds),
                ratio_to_baseline=base / statistics.median(seconds),
                notes={"over_frozen": statistics.median(seconds) / frozen - 1}
                if provider == "tli-engine"
                else {},
            )
            for provider, seconds in times.items()
        ]
        print_gpu_rows(new)
        print(f"  the update adds {100 * new[-1].notes['over_frozen']:.1f} % to the frozen layer")
        rows += new
        del calls
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
