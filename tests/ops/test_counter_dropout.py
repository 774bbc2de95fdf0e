from typing import Any

import pytest
import torch

from tli_engine.ops.counter_dropout import counter_dropout
from tli_engine.reference.counter_dropout import counter_dropout as reference
from tli_engine.reference.philox import philox

pytest.importorskip("triton")
from tli_engine.kernels.counter_dropout import counter_dropout as triton_counter_dropout


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, -5])
@pytest.mark.parametrize(("M", "width"), [(1, 1), (5, 700)])
def test_triton_regenerates_the_reference_mask(
    M: int, width: int, seed: int, device: torch.device
) -> None:
    x = torch.randn(M, width, device=device)
    state = torch.tensor(seed, device=device)
    assert torch.equal(triton_counter_dropout(x, state, 0.3), reference(x, state, 0.3))


def test_keeps_its_share_and_the_mean(device: torch.device) -> None:
    x = torch.ones(200, 500, device=device)
    dropped = counter_dropout(x, torch.tensor(1, device=device), 0.25)
    # 5 standard deviations of 100000 draws
    assert abs((dropped == 0).float().mean().item() - 0.25) < 5 * (0.25 * 0.75 / 1e5) ** 0.5
    assert abs(dropped.mean().item() - 1) < 0.01
    other = counter_dropout(x, torch.tensor(2, device=device), 0.25)
    agree = ((dropped == 0) == (other == 0)).float().mean().item()
    assert abs(agree - (0.25**2 + 0.75**2)) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradient_passes_through_the_same_mask(dtype: torch.dtype, device: torch.device) -> None:
    seed = torch.tensor(3, device=device)
    x, dy = (torch.randn(4, 70, device=device).to(dtype) for _ in range(2))
    y = counter_dropout(x.requires_grad_(), seed, 0.4)
    assert 0 < int((y == 0).sum()) < y.numel()
    # of other strides than the output, as autograd may pass it
    (dx,) = torch.autograd.grad(y, x, dy.T.contiguous().T)
    assert torch.equal(dx, counter_dropout(dy, seed, 0.4))
    assert torch.equal(dx == 0, y == 0)


def test_gradcheck() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor(3)
    assert torch.autograd.gradcheck(lambda x: counter_dropout(x, seed, 0.4), (x,))
    assert torch.autograd.gradgradcheck(lambda x: counter_dropout(x, seed, 0.4), (x,))


def test_strides_do_not_change_the_mask(device: torch.device) -> None:
    x, seed = torch.randn(6, 40, device=device), torch.tensor(3, device=device)
    strided = x.T.contiguous().T
    assert not strided.is_contiguous()
    y = counter_dropout(strided, seed, 0.4)
    assert y.is_contiguous()
    assert torch.equal(y, counter_dropout(x, seed, 0.4))


@pytest.mark.parametrize("M", [0, 1, 5])
def test_operator_contract(M: int, device: torch.device) -> None:
    x = torch.randn(40, M, device=device).T.requires_grad_()
    args = (x, torch.tensor(3, device=device), 0.4)
    torch.library.opcheck(torch.ops.tli_engine.counter_dropout.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"x": torch.ones(3)}, r"x must be \[M, K\], got \[3\]", id="shape"),
        pytest.param({"x": torch.ones(2, 3).int()}, "x must be floating point", id="int"),
        pytest.param(
            {"seed": torch.ones(1)}, "seed must be one int64, got torch.float", id="float"
        ),
        pytest.param({"seed": torch.ones(2).long()}, "seed must be one int64", id="two-seeds"),
        pytest.param(
            {"seed": torch.tensor(1, device="meta")},
            "seed must be on cpu as x, got meta",
            id="meta",
        ),
        pytest.param({"p": 1.0}, r"p must be in \[0, 1\), got 1.0", id="all"),
        pytest.param({"p": -0.1}, r"p must be in \[0, 1\), got -0.1", id="negative"),
    ],
)
def test_wrong_argument_is_named_in_the_error(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.ones(2, 3), "seed": torch.tensor(1), "p": 0.5} | change
    with pytest.raises(ValueError, match=message):
        counter_dropout(**arguments)


@pytest.mark.gpu
def test_elements_past_32_bits() -> None:
    M, K = 2**17 + 16, 2**14
    x = torch.ones(1, 1, device="cuda", dtype=torch.bfloat16).expand(M, K)
    seed = torch.tensor(3, device="cuda")
    y = counter_dropout(x, seed, 0.25)
    assert y.numel() > 2**31
    rows = torch.arange(M - 16, M, device="cuda")[:, None].expand(16, K)
    columns = torch.arange(K, device="cuda")[None, :].expand(16, K)
    kept = (philox(seed, columns, rows)[0] >> 1) >= 2**29
    assert torch.equal(y[-16:] != 0, kept)
