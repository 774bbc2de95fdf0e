"""A weight decoded in a block's second run serves its way back, once, and is then given up."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine import nf4
from tli_engine.kernels import keep_decoded as module
from tli_engine.kernels import nf4_linear, nf4_linear_dx
from tli_engine.kernels.keep_decoded import keep_decoded

M, N, K = 200, 64, 128


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    yield
    keep_decoded(keeping=False, forget=True)


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which direction has decoded a weight, in order."""
    seen: list[str] = []
    for kernel, name in ((nf4_linear, "forward"), (nf4_linear_dx, "backward")):
        plain = kernel.dequantize_tiles

        def counted(*args: Any, name: str = name, plain: Any = plain) -> Tensor:
            seen.append(name)
            return plain(*args)

        monkeypatch.setattr(kernel, "dequantize_tiles", counted)
    return seen


def run(weight: nf4.NF4Weight, x: Tensor, dy: Tensor, directions: str) -> list[Tensor]:
    stored = (weight.packed, weight.absmax_fp32())
    forward, backward = nf4_linear.nf4_linear, nf4_linear_dx.nf4_linear_dx
    return [
        forward(x, *stored, None, N, 64, False, False)
        if direction == "f"
        else backward(dy, *stored, K, 64, False, False)
        for direction in directions
    ]


@pytest.fixture
def case(device: torch.device) -> tuple[nf4.NF4Weight, Tensor, Tensor]:
    weight = nf4.quantize(torch.randn(N, K, device=device))
    return weight, torch.randn(M, K, device=device), torch.randn(M, N, device=device)


def test_one_decoding_serves_both(case: Any, decodings: list[str]) -> None:
    apart = run(*case, "fb")
    assert decodings == ["forward", "backward"]
    decodings.clear()
    keep_decoded(keeping=True, forget=True)
    forward = run(*case, "f")
    keep_decoded(keeping=False, forget=False)
    backward = run(*case, "b")
    assert decodings == ["forward"]
    for a, b in zip(apart, forward + backward, strict=True):
        assert torch.equal(a, b)
    assert not module._kept


def test_what_is_kept_is_used_once(case: Any, decodings: list[str]) -> None:
    keep_decoded(keeping=True, forget=True)
    run(*case, "fbb")
    assert decodings == ["forward", "backward"]


def test_outside_a_second_run_nothing_is_kept(case: Any, decodings: list[str]) -> None:
    run(*case, "f")
    assert not module._kept


def test_the_next_block_forgets_what_is_left(case: Any, decodings: list[str]) -> None:
    keep_decoded(keeping=True, forget=True)
    run(*case, "f")
    assert len(module._kept) == 1
    keep_decoded(keeping=True, forget=True)
    assert not module._kept


def test_another_weight_or_dtype_is_decoded_anew(case: Any, decodings: list[str]) -> None:
    weight, x, dy = case
    other = nf4.quantize(torch.randn(N, K, device=x.device))
    keep_decoded(keeping=True, forget=True)
    run(weight, x, dy, "f")
    run(other, x, dy, "b")
    run(weight, x.bfloat16(), dy.bfloat16(), "b")
    assert decodings == ["forward", "backward", "backward"]
