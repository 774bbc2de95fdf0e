"""A weight decoded in a block's second run serves its way back, once, and is then given up."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine import nf4
from tli_engine.kernels import keep_decoded as module
from tli_engine.kernels import (
    nf4_linear,
    nf4_linear_dx,
    nf4_linear_records_sm90,
    nf4_lora_linear,
    nf4_lora_linear_backward,
)
from tli_engine.kernels.keep_decoded import keep_decoded
from tli_engine.kernels.nf4_linear_records_backward_sm90 import nf4_linear_records_backward
from tli_engine.ops.nf4_linear import tile
from tli_engine.reference.nf4_records import to_records

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


SIZES, RANK = [96, 32], 8
DECODERS = [
    (nf4_lora_linear, "dequantize_tiles"),
    (nf4_lora_linear, "dequantize_tiles_into"),
    (nf4_lora_linear_backward, "dequantize_tiles"),
    (nf4_lora_linear_backward, "dequantize_tiles_into"),
    (nf4_linear_records_sm90, "dequantize_records"),
    (nf4_linear_records_sm90, "dequantize_records_into"),
]


@pytest.fixture
def by_cublas(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Decoders that have run; all products are cuBLAS'."""
    seen: list[str] = []
    for kernel, name in DECODERS:
        plain = getattr(kernel, name)

        def counted(*args: Any, name: str = name, plain: Any = plain) -> Any:
            seen.append(name)
            return plain(*args)

        monkeypatch.setattr(kernel, name, counted)
    for kernel in (nf4_lora_linear, nf4_lora_linear_backward, nf4_linear_records_sm90):
        monkeypatch.setattr(kernel, "choose_tile", lambda *args: None)
    return seen


class Layer:
    """An adapted layer, ``[N, K]``, in tiles or in records without a transposed copy."""

    def __init__(self, sizes: list[int], device: torch.device, dropped: bool, K: int = K) -> None:
        N = sum(sizes)
        self.weight = nf4.quantize(torch.randn(N, K, device=device))
        A = torch.randn(len(sizes) * RANK, K, device=device)
        seed = torch.tensor(5, device=device) if dropped else None
        self.adapter = (A, torch.randn(N, RANK, device=device), seed, sizes, 2.0, 0.25)
        self.x, self.dy = (torch.randn(M, n, device=device).half() for n in (K, N))

    def tiled(self) -> tuple[Any, Any]:
        """Forward, and the gradients of what it gave."""
        packed, absmax = self.weight.packed, self.weight.absmax_fp32()
        given = tile(packed, absmax, *self.weight.shape)
        options = (*self.adapter, 64, True, False)
        forward, backward = (
            nf4_lora_linear.nf4_lora_linear,
            nf4_lora_linear_backward.nf4_lora_linear_backward,
        )
        return (
            lambda: forward(self.x, *given, None, *options),
            lambda s: backward(self.dy, self.x, s, *given, *options, True, True),
        )

    def recorded(self) -> tuple[Any, Any]:
        """The same."""
        packed, absmax, N = self.weight.packed, self.weight.absmax_fp32(), len(self.dy[0])
        K = self.x.shape[1]
        records = to_records(packed, absmax, N, K, False)
        stored, adapter = (records, None), self.adapter
        forward = nf4_linear_records_sm90.nf4_linear_records
        return (
            lambda: forward(self.x, *stored, None, *adapter, N, False),
            lambda s: nf4_linear_records_backward(
                self.dy, self.x, s, *stored, *adapter, K, False, True, True
            ),
        )


@pytest.mark.parametrize(
    ("make", "dropped"),
    [
        pytest.param(Layer.tiled, False, id="tiles"),
        pytest.param(Layer.recorded, False, id="records"),
        pytest.param(Layer.recorded, True, id="records-dropout"),
    ],
)
@pytest.mark.parametrize("appends", [False, True], ids=["sums-in-fp32", "appended"])
def test_an_adapted_layer_is_decoded_once_for_both(
    make: Any,
    appends: bool,
    dropped: bool,
    device: torch.device,
    by_cublas: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the adapter is appended, what is kept is a view of the wide weight's rows."""
    monkeypatch.setattr("tli_engine.kernels.widen._APPEND_FROM", M if appends else M + 1)
    layer = Layer(SIZES, device, dropped)
    forward, backward = make(layer)
    y, s = forward()
    apart = [y, s, *backward(s)]
    assert len(by_cublas) == 2
    keep_decoded(keeping=True, forget=True)
    y, s = forward()
    keep_decoded(keeping=False, forget=False)
    (kept,) = module._kept.values()
    assert kept.stride(0) == K + 64 * appends
    assert torch.equal(kept, layer.weight.dequantize(torch.float16))
    together = [y, s, *backward(s)]
    assert len(by_cublas) == 3
    assert not module._kept
    for ours, expected in zip(together, apart, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(
    ("make", "decoder"),
    [
        pytest.param(Layer.tiled, "dequantize_tiles", id="tiles"),
        pytest.param(Layer.recorded, "dequantize_records", id="records"),
    ],
)
def test_nothing_is_kept_for_a_gradient_that_is_appended(
    make: Any,
    decoder: str,
    dropped: bool,
    device: torch.device,
    by_cublas: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its weight is decoded into a wider one; with dropout the update goes its own way."""
    monkeypatch.setattr("tli_engine.kernels.widen._APPEND_FROM", M)
    # the input is over twice as wide as the output
    layer = Layer([40, 24], device, dropped, K=256)
    forward, backward = make(layer)
    keep_decoded(keeping=True, forget=True)
    _, s = forward()
    assert len(module._kept) == int(dropped)
    dx = backward(s)[0]
    assert by_cublas == [decoder] + [f"{decoder}_into"] * (not dropped)
    assert not module._kept
    if not dropped:
        A, B, _, sizes, scaling, _ = layer.adapter
        parts = zip(B.double().split(sizes), A.double().split(RANK), strict=True)
        update = scaling * torch.cat([b @ a for b, a in parts])
        expected = layer.dy.double() @ (layer.weight.dequantize().double() + update)
        assert (dx.double() - expected).norm() < 2e-3 * expected.norm()
