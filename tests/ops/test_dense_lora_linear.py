from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.ops import dense_lora_linear
from tli_engine.reference.counter_dropout import counter_dropout
from tli_engine.reference.dense_lora_linear import dense_lora_linear as reference
from tli_engine.testing import assert_within_error_budget

pytest.importorskip("triton")
from tli_engine.kernels.dense_lora_linear import dense_lora_linear as launched
from tli_engine.kernels.dense_lora_linear_backward import (
    dense_lora_linear_backward as launched_backward,
)

R = 3
META = partial(torch.zeros, device="meta")


def make_inputs(
    M: int, sizes: list[int], K: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, master = sum(sizes), torch.promote_types(dtype, torch.float32)
    x, W = torch.randn(M, K, device=device), torch.randn(N, K, device=device) * 0.05
    A = torch.randn(len(sizes) * R, K, device=device) * 0.1
    B = torch.randn(N, R, device=device) * 0.1
    bias = torch.randn(N, device=device)
    return x.to(dtype), W.to(dtype), A.to(master), B.to(master), bias.to(dtype)


def definition(inputs: tuple[Tensor, ...], sizes: list[int], seed: Tensor | None) -> Tensor:
    """The formula, group by group, in the inputs' dtype; half of the update's input is dropped."""
    x, W, A, B, bias = inputs
    dropped = x if seed is None else counter_dropout(x, seed, 0.5)
    parts = [2.0 * (dropped @ a.T) @ b.T for a, b in zip(A.split(R), B.split(sizes), strict=True)]
    return torch.nn.functional.linear(x, W, bias) + torch.cat(parts, 1)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("sizes", [[20], [9, 5, 6]], ids=str)
def test_equals_the_definition(sizes: list[int], dropped: bool) -> None:
    inputs = make_inputs(4, sizes, 16, torch.float64, torch.device("cpu"))
    x, W, A, B, bias = (t.requires_grad_() for t in inputs)
    seed = torch.tensor(5) if dropped else None
    y = dense_lora_linear(x, W, A, B, 2.0, bias, sizes=sizes, dropout=0.5, seed=seed)
    expected, dy = definition(inputs, sizes, seed), torch.randn(4, sum(sizes)).double()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(
    ("M", "sizes", "K"),
    [
        pytest.param(5, [20], 128, id="few-rows"),
        pytest.param(300, [16, 4], 128, id="sums-in-fp32"),
        pytest.param(5, [5, 5, 5, 5], 128, id="more-groups-than-a-launch-takes"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_launched_forward_and_gradients(
    dtype: torch.dtype, M: int, sizes: list[int], K: int, dropped: bool, device: torch.device
) -> None:
    inputs = make_inputs(M, sizes, K, dtype, device)
    x, W, A, B, bias = inputs
    dy = torch.randn(M, sum(sizes), device=device).to(dtype)
    seed = torch.tensor(5, device=device) if dropped else None
    options = (seed, sizes, 2.0, 0.5)
    y, s = launched(x, W, bias, A, B, *options)
    plain, plain_s = reference(x, W, bias, A, B, *options)
    wide = [t.double().requires_grad_() for t in inputs]
    exact = definition(tuple(wide), sizes, seed)
    assert_within_error_budget(y, plain, exact.detach(), factor=3)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(s, plain_s, rtol=10 * eps, atol=10 * eps)
    got = launched_backward(dy, x, s, W, A, B, *options, True, True)
    wanted = torch.autograd.grad(exact, [wide[0], *wide[2:4]], dy.double())
    for actual, truth, like in zip(got, wanted, (x, A, B), strict=True):
        assert actual.dtype == like.dtype
        # what lies between is rounded to the dtype
        assert (actual.double() - truth).norm() <= 4 * eps * truth.norm()


@pytest.mark.parametrize("M", [5, 300])
def test_inputs_of_any_strides(M: int, device: torch.device) -> None:
    x, W, A, B, bias = make_inputs(M, [16, 4], 128, torch.float16, device)
    options = (None, [16, 4], 2.0, 0.0)
    expected, _ = launched(x, W, bias, A, B, *options)
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, W, bias, A, B)]
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(launched(*strided, *options)[0], expected)


def test_no_rows(device: torch.device) -> None:
    x, W, A, B, bias = make_inputs(0, [16, 4], 128, torch.float16, device)
    options = (None, [16, 4], 2.0, 0.0)
    y, s = launched(x, W, bias, A, B, *options)
    assert y.shape == (0, 20)
    assert s.shape == (0, 2 * R)
    dx, dA, dB = launched_backward(y, x, s, W, A, B, *options, True, True)
    assert dx.shape == x.shape
    assert torch.equal(dA, torch.zeros_like(A))
    assert torch.equal(dB, torch.zeros_like(B))


@pytest.mark.parametrize("M", [0, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_operator_contract(M: int, dropout: float, device: torch.device) -> None:
    sizes = [16, 4]
    x, W, A, B, bias = make_inputs(M, sizes, 8, torch.float32, device)
    seed = torch.tensor(5, device=device) if dropout else None
    options = (seed, sizes, 0.7, dropout)
    x, W, bias, A, B = (t.requires_grad_() for t in (x, W, bias, A, B))
    torch.library.opcheck(
        torch.ops.tli_engine.dense_lora_linear.default, (x, W, bias, A, B, *options)
    )
    dy, s = torch.randn(M, 20, device=device), torch.randn(M, 2 * R, device=device)
    fixed = (dy, x.detach(), s, W.detach(), A.detach(), B.detach(), *options, True, True)
    torch.library.opcheck(torch.ops.tli_engine.dense_lora_linear_backward.default, fixed)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool, device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        dense_lora_linear, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    seed = torch.tensor(5, device=device)
    options = {"sizes": [16, 4], "dropout": 0.3, "seed": seed}
    for M in (3, 5):
        inputs = make_inputs(M, [16, 4], 8, torch.float32, device)
        x, W, A, B, bias = (t.requires_grad_() for t in inputs)
        results, grads = [], []
        for function in (compiled, dense_lora_linear):
            results.append(function(x, W, A, B, 2.0, bias, **options))
            grads.append(torch.autograd.grad(results[-1].square().sum(), inputs))
        torch.testing.assert_close(*results, rtol=0, atol=0)
        torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("dropped", [False, True])
def test_gradients_of_gradients(dropped: bool) -> None:
    inputs = make_inputs(2, [9, 5, 6], 4, torch.float64, torch.device("cpu"))
    seed = torch.tensor(5) if dropped else None

    def run(*inputs: Tensor) -> Tensor:
        x, W, A, B, bias = inputs
        adapter = {"sizes": [9, 5, 6], "dropout": 0.5, "seed": seed}
        return dense_lora_linear(x, W, A, B, 2.0, bias, **adapter)

    wanted = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(run, wanted)
    assert torch.autograd.gradgradcheck(run, wanted)


def test_a_frozen_adapter_needs_no_gradient(device: torch.device) -> None:
    x, W, A, B, _ = make_inputs(3, [20], 8, torch.float32, device)
    y = dense_lora_linear(x.requires_grad_(), W, A, B, 0.5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, (W + 0.5 * B @ A).sum(0).expand(3, -1))


def test_autocast_casts_what_enters() -> None:
    x, W, A, B, bias = make_inputs(3, [20], 8, torch.float32, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        y = dense_lora_linear(x.view(3, 1, 8), W, A, B, 0.5, bias)
    cast = (t.bfloat16() for t in (x, W))
    expected = dense_lora_linear(*cast, A, B, 0.5, bias.bfloat16())
    assert torch.equal(y, expected.view(3, 1, 20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 9)}, r"x must be \[\.\.\., 8\]"),
        ({"weight": torch.zeros(20)}, r"weight must be torch.float32 \[N, K\]"),
        ({"weight": torch.zeros(20, 8).half()}, r"got torch.float16 \[20, 8\]"),
        ({"bias": torch.zeros(19)}, r"bias must be torch.float32 \[20\]"),
        ({"lora_A": torch.zeros(4, 8)}, r"lora_A must be \[3, 8\]"),
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, "x must be floating point"),
        ({"weight": META(20, 8)}, "x must be on meta as the weight, got cpu"),
        ({"bias": META(20)}, "bias must be on cpu as x, got meta"),
        ({"lora_A": META(3, 8)}, "must share dtype and device, got .* on meta and .* on cpu"),
        ({"lora_A": META(3, 8), "lora_B": META(20, 3)}, "lora_A must be on cpu as x, got meta"),
        (
            {"dropout": 0.5, "seed": META((), dtype=torch.int64)},
            "seed must be on cpu as x, got meta",
        ),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    x, W, A, B, bias = make_inputs(3, [20], 8, torch.float32, torch.device("cpu"))
    arguments = {"x": x, "weight": W, "lora_A": A, "lora_B": B, "scaling": 1.0, "bias": bias}
    with pytest.raises(ValueError, match=message):
        dense_lora_linear(**(arguments | change))
