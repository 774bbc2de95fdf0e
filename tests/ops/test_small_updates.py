"""An update far below a unit in the last place of the product is not lost in the sum."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tli_engine.nf4 import quantize
from tli_engine.nn import NF4Linear
from tli_engine.ops import dense_lora_linear, nf4_lora_linear
from tli_engine.ops.nf4_linear import tile
from tli_engine.testing import assert_update_is_kept

pytest.importorskip("triton")
from tli_engine.kernels.dense_lora_linear import dense_lora_linear as launched_dense
from tli_engine.kernels.nf4_lora_linear import nf4_lora_linear as launched_nf4

K = 128
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(M: int, sizes: list[int], rank: int, device: torch.device) -> Inputs:
    x = torch.randn(M, K, device=device).half()
    W = torch.randn(sum(sizes), K, device=device).half() * 0.05
    A = torch.randn(len(sizes) * rank, K, device=device) * 0.05
    return x, W, A, torch.randn(sum(sizes), rank, device=device)


PATHS = [  # kind, M, groups, rank
    pytest.param("nf4", 60, [128, 64, 64], 16, id="nf4-fused"),
    pytest.param("nf4", 199, [64], 16, id="nf4-sums-in-fp32"),
    pytest.param("nf4", 200, [64, 32, 32], 16, id="nf4-appended-to-x"),
    pytest.param("nf4", 160, [128], 96, id="nf4-more-ranks-than-a-launch-takes"),
    pytest.param("dense", 160, [96, 64], 16, id="dense"),
    pytest.param("dense", 160, [128], 96, id="dense-more-ranks-than-a-launch-takes"),
]


@pytest.mark.parametrize(("kind", "M", "sizes", "rank"), PATHS)
def test_launched(
    kind: str, M: int, sizes: list[int], rank: int, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("tli_engine.kernels.widen._APPEND_FROM", 200)
    x, W, A, B = make_inputs(M, sizes, rank, device)
    weight, options = quantize(W), (None, sizes, 1.0, 0.0)

    def run(B: Tensor) -> Tensor:
        if kind == "dense":
            return launched_dense(x, W, None, A, B, *options)[0]
        stored = tile(weight.packed, weight.absmax, len(W), K)
        return launched_nf4(x, *stored, None, A, B, *options, 64, True, False)[0]

    assert_update_is_kept(run, x, A, B, sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_reference(kind: str, dtype: torch.dtype) -> None:
    sizes = [128, 64]
    x, W, A, B = make_inputs(100, sizes, 16, torch.device("cpu"))
    x, W, weight = x.to(dtype), W.to(dtype), quantize(W)
    run: Callable[[Tensor], Tensor] = {
        "dense": lambda B: dense_lora_linear(x, W, A, B, 1.0, sizes=sizes),
        "nf4": lambda B: nf4_lora_linear(x, weight, A, B, 1.0, sizes=sizes),
    }[kind]
    assert_update_is_kept(run, x, A, B, sizes)


def test_rows_of_a_joined_weight(device: torch.device) -> None:
    x, W, A, B = make_inputs(100, [128, 64, 64], 16, device)
    joined = NF4Linear(quantize(W))
    part = NF4Linear(quantize(W[128:192]))
    part.share_rows(joined, 128)

    def run(B: Tensor) -> Tensor:
        return part.lora_forward(x, A[:16], B, 1.0)

    assert_update_is_kept(run, x, A[:16], B[:64], [64])


def test_the_assertion_sees_what_is_lost() -> None:
    x, W, A, B = make_inputs(100, [128], 16, torch.device("cpu"))

    def rounded_twice(B: Tensor) -> Tensor:
        return x @ W.T + (x @ A.half().T) @ B.half().T

    with pytest.raises(AssertionError, match="of the update is left"):
        assert_update_is_kept(rounded_twice, x, A, B, [128])
