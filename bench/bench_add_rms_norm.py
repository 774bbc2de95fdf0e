"""A residual added and the norm of the sum: microseconds of GPU time against transformers and Liger.

Peers add by PyTorch, then call transformers' norm, eager (the baseline) or compiled, or Liger's;
``liger:fused`` adds in its kernel too. ``bwd`` is the backward with a frozen weight, ``bwd-dweight`` with
the weight's gradient. Times are those of replayed graphs. The floor is what has to be read and written,
at the speed of a copy on this GPU: above 1 while it lies in the L2 cache.

python -m bench add_rms_norm [--shapes NAME ...] [--tokens T ...] [--sweep]
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bench.harness import Row, print_tiles
from bench.pointwise import Case, Function, Outputs, check, compiled, load_liger, run, time_case
from tli_engine.kernels.add_rms_norm import Tile, forward_tile, launch_forward
from tli_engine.kernels.add_rms_norm_backward import backward_tile, launch_backward
from tli_engine.ops import add_rms_norm

SHAPES = {"8b": 4096, "qwen2-72b": 8192}
EPS = 1e-5
BASELINE = "transformers"


def make_case(T: int, D: int, needs_dweight: bool) -> Case:
    """bf16 tensors as a model has them."""
    x, residual, dy, dh = (torch.randn(T, D, device="cuda").bfloat16() for _ in range(4))
    weight = (1 + torch.randn(D, device="cuda") / 8).bfloat16().requires_grad_(needs_dweight)
    return Case((x.requires_grad_(), residual.requires_grad_(), weight), (dy, dh))


def exact(x: Tensor, residual: Tensor, weight: Tensor) -> Outputs:
    """The formula, in the inputs' dtype."""
    h = x + residual
    return weight * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS), h


def providers(D: int) -> dict[str, Function]:
    """The engine and its peers, each from x, the residual and the weight to the norm and the sum."""
    module = LlamaRMSNorm(D, eps=EPS).cuda().bfloat16()

    def eager(x: Tensor, residual: Tensor, weight: Tensor) -> Outputs:
        h = x + residual
        return torch.func.functional_call(module, {"weight": weight}, (h,)), h

    found: dict[str, Function] = {BASELINE: eager, "compiled": compiled(eager)}
    norm = load_liger("rms_norm", "LigerRMSNormFunction")
    if norm is not None:

        def liger(x: Tensor, residual: Tensor, weight: Tensor) -> Outputs:
            h = x + residual
            # not in place: the timed backward runs more than once
            return norm.apply(h, weight, EPS, 0.0, "llama", False), h

        found["liger"] = liger
    fused = load_liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    if fused is not None:
        found["liger:fused"] = lambda x, r, w: fused.apply(x, r, w, EPS, 0.0, "llama", False)
    found["tli-engine"] = lambda x, r, w: add_rms_norm(x, r, w, EPS)
    return found


def bench_case(model: str, T: int, bandwidth: float) -> list[Row]:
    """Forward and both backwards of so many rows."""
    D = SHAPES[model]
    rows: list[Row] = []
    for directions in (("fwd", "bwd"), ("bwd-dweight",)):
        case = make_case(T, D, directions[0] == "bwd-dweight")
        found = providers(D)
        check(found, exact, case)
        timed = {name: (function, case) for name, function in found.items()}
        for direction in directions:
            # x and residual in, norm and sum out; dy, dh and the sum in, dx out
            nbytes = 4 * case.leaves[0].nbytes
            shape = {"T": T, "D": D}
            rows += time_case(direction, timed, shape, model, BASELINE, nbytes, bandwidth)
    return rows


def sweep(model: str, T: int) -> None:
    """Print the time of every tile, the launchers' choice first."""
    D = SHAPES[model]
    case = make_case(T, D, False)
    x, residual, weight = (leaf.detach() for leaf in case.leaves)
    _, h, rstd = launch_forward(x, residual, weight, EPS, False, forward_tile(T, D))
    backward = (*case.grads, h, rstd, weight, False)
    directions: dict[str, tuple[Tile, Callable[[Tile], object]]] = {
        "fwd": (
            forward_tile(T, D),
            lambda tile: launch_forward(x, residual, weight, EPS, False, tile),
        ),
        "bwd": (backward_tile(T, D), lambda tile: launch_backward(*backward, False, tile)),
        "bwd-dweight": (backward_tile(T, D), lambda tile: launch_backward(*backward, True, tile)),
    }
    tiles = [Tile(*sizes) for sizes in itertools.product((1, 2, 4), (2, 4, 8, 16))]
    for name, (chosen, launch) in directions.items():
        print_tiles(f"{name} {model} T={T}", launch, (chosen, *tiles))


def main() -> None:
    run("add_rms_norm", __doc__, SHAPES, bench_case, sweep)


if __name__ == "__main__":
    main()
