"""An update far below a unit in the last place of the product is not lost in the sum."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tli_engine.nf4 import quantize
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


PATHS = [  # M, groups, rank
    pytest.param(60, [128, 64, 64], 16, id="fused"),
    pytest.param(160, [96, 64], 16, id="sums-in-fp32"),
    pytest.param(160, [128], 96, id="more-ranks-than-a-launch-takes"),
    pytest.param(200, [128, 64, 64], 16, id="appended-to-x"),
]


@pytest.mark.parametrize(("M", "sizes", "rank"), PATHS)
@pytest.mark.parametrize("kind", ["nf4", "dense"])
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


def test_the_assertion_sees_what_is_lost() -> None:
    x, W, A, B = make_inputs(100, [128], 16, torch.device("cpu"))

    def rounded_twice(B: Tensor) -> Tensor:
        return x @ W.T + (x @ A.half().T) @ B.half().T

    with pytest.raises(AssertionError, match="of the update is left"):
        assert_update_is_kept(rounded_twice, x, A, B, [128])
