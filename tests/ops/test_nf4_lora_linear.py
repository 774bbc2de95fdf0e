from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine import nf4_lora_linear
from tli_engine.nf4 import NF4Weight, quantize
from tli_engine.nn import NF4Linear
from tli_engine.ops.nf4_linear import tile
from tli_engine.reference.counter_dropout import counter_dropout
from tli_engine.testing import assert_within_error_budget

pytest.importorskip("triton")
from tli_engine.kernels.nf4_lora_linear import nf4_lora_linear as triton_nf4_lora_linear
from tli_engine.kernels.nf4_lora_linear_backward import (
    nf4_lora_linear_backward as triton_nf4_lora_linear_backward,
)
from tli_engine.reference.nf4_lora_linear import nf4_lora_linear as reference
from tli_engine.reference.nf4_lora_linear_backward import (
    nf4_lora_linear_backward as reference_backward,
)

SIZES = [
    pytest.param([20], id="one-group"),
    pytest.param([16, 4], id="two-groups"),
    pytest.param([9, 5, 6], id="q-k-v"),
    pytest.param([5, 5, 5, 5], id="more-groups-than-a-launch-takes"),
]
R, K = 3, 128


def make_inputs(
    M: int, sizes: list[int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, NF4Weight, Tensor, Tensor, Tensor]:
    N = sum(sizes)
    weight = quantize(torch.randn(N, K, device=device) * 0.05)
    x = torch.randn(M, K, device=device).to(dtype)
    lora_dtype = torch.promote_types(dtype, torch.float32)
    lora_A = (torch.randn(len(sizes) * R, K, device=device) * 0.1).to(lora_dtype)
    lora_B = (torch.randn(N, R, device=device) * 0.1).to(lora_dtype)
    return x, weight, lora_A, lora_B, torch.randn(N, device=device).to(dtype)


def definition(
    x: Tensor, weight: NF4Weight, A: Tensor, B: Tensor, bias: Tensor, sizes: list[int], s: float
) -> Tensor:
    """The formula, group by group, in fp64."""
    x, bias = x.double(), bias.double()
    dense = weight.dequantize(torch.float32).double()
    parts = []
    for w, b, a, c in zip(
        dense.split(sizes), B.double().split(sizes), A.double().split(R), bias.split(sizes),
        strict=True,
    ):  # fmt: skip
        parts.append(x @ w.T + c + s * (x @ a.T) @ b.T)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_definition(sizes: list[int]) -> None:
    # fp64 is for the reference, which a CPU runs
    x, weight, A, B, bias = make_inputs(4, sizes, torch.float64, torch.device("cpu"))
    y = nf4_lora_linear(x, weight, A, B, 0.7, bias, sizes=sizes)
    torch.testing.assert_close(
        y, definition(x, weight, A, B, bias, sizes, 0.7), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("M", [5, 200])
@pytest.mark.parametrize("sizes", SIZES)
def test_launched_forward_and_gradients(sizes: list[int], M: int, device: torch.device) -> None:
    dtype = torch.float16
    x, weight, A, B, bias = make_inputs(M, sizes, dtype, device)
    dy = torch.randn(M, sum(sizes), device=device).to(dtype)
    options = (None, sizes, 2.0, 0.0, 64, False, False)
    stored = (weight.packed, weight.absmax)
    y, s = triton_nf4_lora_linear(x, *stored, bias, A, B, *options)
    plain, plain_s = reference(x, *stored, bias, A, B, *options)
    exact = definition(x, weight, A, B, bias, sizes, 2.0)
    assert_within_error_budget(y, plain, exact, factor=3)
    torch.testing.assert_close(s, plain_s, rtol=1e-2, atol=1e-2)
    needs = (True, True)
    actual = triton_nf4_lora_linear_backward(dy, x, s, *stored, A, B, *options, *needs)
    expected = reference_backward(dy, x, plain_s, *stored, A, B, *options, *needs)
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype == wanted.dtype
        error = (got.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < 4e-3


def test_unneeded_gradients_are_empty(device: torch.device) -> None:
    x, weight, A, B, _ = make_inputs(5, [20], torch.float16, device)
    dy, s = torch.zeros_like(x[:, :20]), torch.zeros(5, R, dtype=x.dtype, device=device)
    options = (weight.packed, weight.absmax, A, B, None, [20], 2.0, 0.0, 64, False, False)
    for backward in (triton_nf4_lora_linear_backward, reference_backward):
        dx, dA, dB = backward(dy, x, s, *options, True, False)
        assert (dx.shape, dA.shape, dB.shape) == ((5, K), (0,), (0,))
        dx, dA, dB = backward(dy, x, s, *options, False, True)
        assert (dx.shape, dA.shape, dB.shape) == ((0,), A.shape, B.shape)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("sizes", SIZES[:3])
def test_gradient(sizes: list[int], dropout: float, device: torch.device) -> None:
    x, weight, A, B, bias = make_inputs(2, sizes, torch.float64, device)
    seed = torch.tensor(5, device=device)
    inputs = [t.requires_grad_() for t in (x, A, B, bias)]
    if device.type == "cpu":
        assert torch.autograd.gradcheck(
            lambda x, A, B, bias: nf4_lora_linear(
                x, weight, A, B, 0.7, bias, sizes=sizes, dropout=dropout, seed=seed
            ),
            inputs,
            fast_mode=True,
        )


def test_dropout_without_a_seed_drops_nothing(device: torch.device) -> None:
    x, weight, A, B, bias = make_inputs(2, [20], torch.float32, device)
    plain = nf4_lora_linear(x, weight, A, B, 0.7, bias)
    assert torch.equal(nf4_lora_linear(x, weight, A, B, 0.7, bias, dropout=0.5), plain)


def test_module_gives_the_ops_result(device: torch.device) -> None:
    x, weight, A, B, bias = make_inputs(4, [20], torch.float32, device)
    layer = NF4Linear(weight, bias)
    y = layer.lora_forward(x.view(2, 2, K), A, B, 0.7)
    torch.testing.assert_close(y.view(4, 20), nf4_lora_linear(x, weight, A, B, 0.7, bias))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("sizes", SIZES[:3])
def test_second_derivative(sizes: list[int], dropout: float) -> None:
    device = torch.device("cpu")
    x, weight, A, B, bias = make_inputs(2, sizes, torch.float64, device)
    seed = torch.tensor(5)
    assert torch.autograd.gradgradcheck(
        lambda x, A, B, bias: nf4_lora_linear(
            x, weight, A, B, 0.7, bias, sizes=sizes, dropout=dropout, seed=seed
        ),
        [t.requires_grad_() for t in (x, A, B, bias)],
        fast_mode=True,
    )


def test_second_derivative_is_that_of_the_decoded_weight(device: torch.device) -> None:
    x, weight, A, B, _ = make_inputs(3, [20], torch.float32, device)
    wanted = [t.requires_grad_() for t in (x, A, B)]
    found = []
    for y in (
        nf4_lora_linear(x, weight, A, B, 0.5),
        x @ weight.dequantize(x.dtype).T + 0.5 * (x @ A.T) @ B.T,
    ):
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        loss = sum((g.square().sum() for g in first), torch.zeros((), device=device))
        found.append((*first, *torch.autograd.grad(loss, wanted)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("M", [0, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_operator_contract(M: int, dropout: float, device: torch.device) -> None:
    sizes = [16, 4]
    x, weight, A, B, bias = make_inputs(M, sizes, torch.float32, device)
    stored = (weight.packed, weight.absmax)
    seed = torch.tensor(5, device=device) if dropout else None
    options = (seed, sizes, 0.7, dropout, 64, False, False)
    grads = [t.requires_grad_() for t in (x, bias, A, B)]
    args = (grads[0], *stored, *grads[1:], *options)
    torch.library.opcheck(torch.ops.tli_engine.nf4_lora_linear.default, args)
    dy, s = torch.randn(M, 20, device=device), torch.randn(M, 2 * R, device=device)
    args = (dy, x.detach(), s, *stored, A.detach(), B.detach(), *options, True, True)
    torch.library.opcheck(torch.ops.tli_engine.nf4_lora_linear_backward.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"sizes": [16, 5]}, r"sizes must be positive and add up to 20, got", id="sum"),
        pytest.param({"sizes": [20, 0]}, "sizes must be positive", id="empty-group"),
        pytest.param(
            {"lora_A": torch.zeros(4, K)}, r"lora_A must be \[6, 128\], got \[4, 128\]", id="A"
        ),
        pytest.param(
            {"lora_B": torch.zeros(19, R)},
            r"lora_B must be \[20, r\] with r > 0, got \[19, 3\]",
            id="B",
        ),
        pytest.param(
            {"lora_B": torch.zeros(20, R, dtype=torch.float16)},
            "must share dtype and device",
            id="dtypes",
        ),
        pytest.param({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0", id="dropout"),
        pytest.param({"seed": torch.zeros(1)}, "seed must be one int64", id="seed"),
    ],
)
def test_wrong_argument_is_named_in_the_error(change: dict[str, Any], message: str) -> None:
    x, weight, A, B, _ = make_inputs(2, [16, 4], torch.float32, torch.device("cpu"))
    arguments = {"lora_A": A, "lora_B": B, "scaling": 1.0, "sizes": [16, 4]} | change
    with pytest.raises(ValueError, match=message):
        nf4_lora_linear(x, weight, **arguments)


PATHS = [  # M, N, K, groups
    pytest.param(5, [64], 1280, id="split-contraction-down"),
    pytest.param(20, [1024, 512, 512], 128, id="split-contraction-up"),
    pytest.param(70, [64, 32, 32], 128, id="one-pass-over-dy"),
    pytest.param(130, [64], 128, id="cublas-adds"),
    pytest.param(140, [192, 64], 128, id="appended-to-x"),
    pytest.param(140, [32], 128, id="appended-to-dy"),
]
# what is appended to x has had its dropout
CASES = [
    pytest.param(*path.values, dropout, id=f"{path.id}-{dropout}")
    for path in PATHS
    for dropout in (0.0, 0.3)
    if (path.id, dropout) != ("appended-to-x", 0.0)
]


@pytest.mark.parametrize(("M", "sizes", "width", "dropout"), CASES)
def test_every_path_through_tiled_bytes(
    M: int,
    sizes: list[int],
    width: int,
    dropout: float,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tli_engine.kernels.widen._APPEND_FROM", 140)
    N, rank, dtype = sum(sizes), 16, torch.float16
    weight = quantize(torch.randn(N, width, device=device) * 0.05)
    x = torch.randn(M, width, device=device).to(dtype)
    dy = torch.randn(M, N, device=device).to(dtype)
    bias = torch.randn(N, device=device).to(dtype)
    A = torch.randn(len(sizes) * rank, width, device=device) * 0.1
    B = torch.randn(N, rank, device=device) * 0.1
    seed = torch.tensor(3, device=device) if dropout else None
    options = (seed, sizes, 2.0, dropout, 64, True, False)
    stored = tile(weight.packed, weight.absmax, N, width)
    y, s = triton_nf4_lora_linear(x, *stored, bias, A, B, *options)
    again, _ = triton_nf4_lora_linear(x, *stored, bias, A, B, *options)
    assert torch.equal(y, again)
    # truth: fp64 of the weight's values in x's dtype
    dense = weight.dequantize(dtype)
    stored64 = (dense.double(), x.double(), dy.double(), A.double(), B.double())
    exact = _dense_lora(*stored64, bias.double(), seed, sizes, dropout)
    plain = _dense_lora(dense, x, dy, A, B, bias, seed, sizes, dropout)
    needs = (True, True)
    got = triton_nf4_lora_linear_backward(dy, x, s, *stored, A, B, *options, *needs)
    for actual, same, truth in zip((y, *got), plain, exact, strict=True):
        error = (actual.double() - truth).norm() / truth.norm()
        bound = 3 * (same.double() - truth).norm() / truth.norm() + 1e-3
        assert error <= bound, f"{error:.1e} over {bound:.1e}"


def _dense_lora(
    W: Tensor,
    x: Tensor,
    dy: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    sizes: list[int],
    dropout: float,
) -> tuple[Tensor, ...]:
    """Output and the gradients of x, A and B by autograd, group by group."""
    x, A, B = (t.detach().requires_grad_() for t in (x, A, B))
    dropped = x if seed is None else counter_dropout(x, seed, dropout)
    s = dropped @ A.to(x.dtype).T * 2.0
    parts = [
        p @ b.to(x.dtype).T for p, b in zip(s.split(B.shape[1], 1), B.split(sizes), strict=True)
    ]
    y = torch.nn.functional.linear(x, W, bias) + torch.cat(parts, 1)
    return y.detach(), *torch.autograd.grad(y, (x, A, B), dy)
