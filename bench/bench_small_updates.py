"""How much of a LoRA update is left in the output of an adapted layer, by the update's size.

``y(B) - y(0)``, projected on ``s A^T B^T x`` in fp64, over layers in bf16: 1 where updates count as
they are, on average, 0 where they are rounded off. PEFT adds them to an output that is rounded
already, with adapters in the layer's dtype or in fp32; the engine to the product's sums. On a CPU the
engine's plain PyTorch runs, on a GPU its kernels. Results are drawn, too.

python -m bench small_updates [--width N] [--rows M]
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import write_results
from tli_engine.models.device import choose_device
from tli_engine.nf4 import quantize
from tli_engine.ops import dense_lora_linear, nf4_lora_linear

PEERS = ["peft"]
RANK = 16
# standard deviation of the update over that of the output: powers of two
SIZES = range(-14, -3)
_COLOURS = {
    "peft": "#0072B2",
    "peft:fp32-adapters": "#009E73",
    "tli-engine": "#D55E00",
    "tli-engine:nf4": "#CC79A7",
}
Layer = Callable[[Tensor], Tensor]


def peft_layer(weight: Tensor, x: Tensor, A: Tensor, dtype: torch.dtype) -> Layer:
    """PEFT's own layer, its adapters in ``dtype``; takes ``B``."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraConfig

    N, K = weight.shape
    base = nn.Linear(K, N, bias=False, device=x.device, dtype=weight.dtype)
    base.weight.data = weight
    config = LoraConfig(r=RANK, lora_alpha=RANK)
    layer = LoraLinear(base, "default", config, r=RANK, lora_alpha=RANK).to(x.device)
    layer.lora_A["default"].weight.data = A.to(dtype)

    def run(B: Tensor) -> Tensor:
        layer.lora_B["default"].weight.data = B.to(dtype)
        y: Tensor = layer(x)
        return y

    return run


def layers(weight: Tensor, x: Tensor, A: Tensor) -> dict[str, Layer]:
    """Each provider's layer over the same weight; in NF4, over that quantised."""
    nf4 = quantize(weight)
    return {
        "peft": peft_layer(weight, x, A, weight.dtype),
        "peft:fp32-adapters": peft_layer(weight, x, A, torch.float32),
        "tli-engine": lambda B: dense_lora_linear(x, weight, A, B, 1.0),
        "tli-engine:nf4": lambda B: nf4_lora_linear(x, nf4, A, B, 1.0),
    }


@torch.no_grad()
def kept(layer: Layer, x: Tensor, A: Tensor, B: Tensor, sizes: Sequence[int]) -> list[float]:
    """The share of the update that is left, for each size of it as a power of two."""
    base = layer(torch.zeros_like(B)).double()
    update = (x.double() @ A.double().T) @ B.double().T
    found = []
    for size in sizes:
        scale = (2.0**size * base.std() / update.std()).item()
        change = layer(B * scale).double() - base
        share = (change * update).sum() / (scale * update.square().sum())
        found.append(share.item())
    return found


def measure(width: int, rows: int, device: torch.device) -> dict[str, list[float]]:
    """The shares by provider, of a square layer."""
    torch.manual_seed(0)
    x = torch.randn(rows, width, device=device).bfloat16()
    weight = (torch.randn(width, width, device=device) * 0.02).bfloat16()
    # of numbers that bf16 has, so that adapters in either dtype are the same
    A = (torch.randn(RANK, width, device=device) * 0.02).bfloat16().float()
    B = torch.randn(width, RANK, device=device).bfloat16().float()
    return {name: kept(run, x, A, B, SIZES) for name, run in layers(weight, x, A).items()}


def plot(found: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw the shares over the updates' sizes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    styles: dict[str, Any] = {name: {"ls": "-", "marker": "o"} for name in found}
    styles["peft:fp32-adapters"] = {"ls": "--", "marker": "s"}
    for name, shares in found.items():
        axes.plot(
            [2.0**size for size in SIZES], shares, color=_COLOURS[name], ms=4, lw=1.4,
            label=name, **styles[name],
        )  # fmt: skip
    # of an output from 1 to 2: from 1/256 of it to 1/512
    axes.axvspan(2.0**-9, 2.0**-8, color="#999999", alpha=0.2, lw=0)
    axes.text(2.0**-7.9, 0.02, "half a unit in an output's last place", color="#666666", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set(
        xlabel="standard deviation of the update over that of the output",
        ylabel="share of the update left",
        ylim=(-0.05, 1.15),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=1024, help="of a square layer")
    parser.add_argument("--rows", type=int, default=1024, help="of the input")
    args = parser.parse_args()
    found = measure(args.width, args.rows, choose_device("auto"))
    for name, shares in found.items():
        print(f"{name:20} " + " ".join(f"{share:5.2f}" for share in shares))
    print(f"{'update / output':20} " + " ".join(f"2^{size:<3}" for size in SIZES))
    facts = {"width": args.width, "input_rows": args.rows, "sizes": list(SIZES), "kept": found}
    path = write_results("small_updates", [], PEERS, **facts)
    plot(found, path.with_suffix(".png"))
    print(f"written: {path} and its picture")


if __name__ == "__main__":
    main()
