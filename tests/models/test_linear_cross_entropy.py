"""The output layer's cross-entropy in chunks: the definition, gradients, and what is not computed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.models import linear_cross_entropy as module
from tli_engine.models.linear_cross_entropy import chunk_rows, linear_cross_entropy
from tli_engine.testing import assert_within_error_budget

M, D, V = 37, 24, 101
ROWS = [1, 8, 37, 64]


def make(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(M, D).to(dtype), torch.randn(V, D).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (M,))


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    acc = torch.promote_types(logits.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits.to(acc), targets, reduction="sum")


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("rows", ROWS)
def test_value_and_gradients_are_the_definition(rows: int, softcap: float | None) -> None:
    *inputs, targets = make(torch.float64)
    loss = linear_cross_entropy(*inputs, targets, softcap=softcap, rows=rows)
    expected = naive(*inputs, targets, softcap)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    ours, exact = (torch.autograd.grad(0.3 * x, inputs) for x in (loss, expected))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("rows", ROWS)
def test_rows_have_their_weights(rows: int, softcap: float | None) -> None:
    *inputs, targets = make(torch.float64)
    weights = torch.rand(M)
    weights[::3] = 0
    options: dict[str, Any] = {"softcap": softcap, "rows": rows, "weights": weights}
    loss = linear_cross_entropy(*inputs, targets, **options)
    hidden, weight = inputs
    expected = torch.stack(
        [
            w * naive(hidden[i : i + 1], weight, targets[i : i + 1], softcap)
            for i, w in enumerate(weights.double())
        ]
    ).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    ours, exact = (torch.autograd.grad(0.3 * x, inputs) for x in (loss, expected))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert linear_cross_entropy(*inputs, targets, **options) == loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_no_weight_has_no_part(dtype: torch.dtype) -> None:
    """To the bit, where the others are summed in the same order."""
    hidden, weight, targets = make(dtype)
    weights = torch.ones(M)
    weights[30:] = 0
    found = []
    for rows, options in ((M, {"weights": weights}), (30, {})):
        part = hidden.detach()[:rows].requires_grad_()
        loss = linear_cross_entropy(part, weight, targets[:rows], rows=1, **options)
        found.append((loss, *torch.autograd.grad(loss, (part, weight))))
    (loss, dhidden, dweight), (expected, dpart, dwhole) = found
    assert torch.equal(loss, expected)
    assert torch.equal(dhidden[:30], dpart)
    assert not dhidden[30:].any()
    assert torch.equal(dweight, dwhole)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errs_no_more_than_plain_pytorch(dtype: torch.dtype, rows: int) -> None:
    *inputs, targets = make(dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]

    def with_gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        return [loss, *torch.autograd.grad(loss, inputs)]

    ours = with_gradients(linear_cross_entropy(*inputs, targets, rows=rows), inputs)
    plain = with_gradients(naive(*inputs, targets), inputs)
    exact = with_gradients(naive(*exact_inputs, targets), exact_inputs)
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert_within_error_budget(a, b, truth, floor=1e-5)
    assert ours[0].dtype == torch.float32
    assert [g.dtype for g in ours[1:]] == [dtype, dtype]


def test_the_heads_gradient_in_parts_of_the_vocabulary(monkeypatch: Any) -> None:
    *inputs, targets = make(torch.bfloat16)
    whole = torch.autograd.grad(linear_cross_entropy(*inputs, targets), inputs)
    monkeypatch.setattr(module, "_VOCABULARY_ROWS", 16)
    parts = torch.autograd.grad(linear_cross_entropy(*inputs, targets), inputs)
    torch.testing.assert_close(parts[1], whole[1])


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["hidden", "head"])
def test_what_needs_no_gradient_gets_none(needs: tuple[bool, bool]) -> None:
    hidden, weight, targets = make(torch.float32)
    hidden.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    linear_cross_entropy(hidden, weight, targets).backward()
    assert (hidden.grad is not None, weight.grad is not None) == needs


def test_without_gradients_nothing_is_kept() -> None:
    *inputs, targets = make(torch.float32)
    with torch.no_grad():
        loss = linear_cross_entropy(*inputs, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, naive(*inputs, targets).detach())


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = make(torch.float32)
    loss = linear_cross_entropy(hidden * 1e4, weight, targets)
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, naive(hidden * 1e4, weight, targets))


def test_no_rows_are_no_loss() -> None:
    *inputs, targets = make(torch.float32)
    loss = linear_cross_entropy(inputs[0][:0], inputs[1], targets[:0])
    grads = torch.autograd.grad(loss, inputs)
    assert loss == 0
    assert not any(g.any() for g in grads)


def test_chunks_hold_as_many_rows_as_fit() -> None:
    assert chunk_rows(128_256) == 512
    assert chunk_rows(262_144) == 256
    assert chunk_rows(10**9) == 64
    assert chunk_rows(128_256, trained=True) == 2048
    assert chunk_rows(10**9, trained=True) == 64


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(M, D + 1)}, r"hidden and weight must be \[M, D\] and \[V, D\]"),
        ({"targets": torch.zeros(M)}, r"targets must be int64 \[37\]"),
        ({"targets": torch.zeros(M + 1, dtype=torch.int64)}, r"targets must be int64 \[37\]"),
        ({"weight": torch.zeros(V, D, dtype=torch.float64)}, r"weight must be torch\.float32"),
        ({"rows": 0}, "rows must be positive, got 0"),
        (
            {"weights": torch.ones(M + 1)},
            r"weights must be float32 \[37\], got torch.float32 \[38\]",
        ),
        ({"weights": torch.ones(M).double()}, r"weights must be float32 \[37\], got torch.float64"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    hidden, weight, targets = make(torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets} | changed
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
