from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.nf4 import DTYPES, NF4Weight, quantize
from tli_engine.nn import NF4Linear
from tli_engine.ops.counter_dropout import counter_dropout
from tli_engine.testing import assert_within_error_budget

N, K, R = 20, 128, 3


def make_weight(
    device: torch.device, dtype: torch.dtype = torch.float32, **options: Any
) -> NF4Weight:
    return quantize((torch.randn(N, K, device=device) * 0.05).to(dtype), **options)


def make_update(device: torch.device) -> tuple[Tensor, Tensor]:
    A = (torch.randn(R, K, device=device) * 0.1).requires_grad_()
    return A, (torch.randn(N, R, device=device) * 0.1).requires_grad_()


@pytest.mark.parametrize("double_quant", [False, True])
def test_holds_the_weight_it_was_given(double_quant: bool, device: torch.device) -> None:
    for dtype in DTYPES:
        weight = make_weight(device, dtype, double_quant=double_quant)
        layer = NF4Linear(weight)
        assert (layer.in_features, layer.out_features) == (K, N)
        assert (layer.dtype, layer.device) == (dtype, weight.device)
        assert torch.equal(layer.weight.packed, weight.packed)
        assert torch.equal(layer.weight.absmax, weight.absmax)
        assert torch.equal(layer.weight.dequantize(), weight.dequantize())
        assert not list(layer.parameters())


@pytest.mark.parametrize("residency", ["nf4", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_and_its_gradients_err_no_more_than_plain_torch(
    dtype: torch.dtype, double_quant: bool, dropout: float, residency: Any, device: torch.device
) -> None:
    weight, bias = make_weight(device, dtype, double_quant=double_quant), torch.randn(N).to(device)
    layer = NF4Linear(weight, bias, weight_residency=residency)
    x = torch.randn(2, 5, K, device=device).to(dtype).requires_grad_()
    dy = torch.randn(2, 5, N, device=device).to(dtype)
    A, B = make_update(device)
    seed = torch.tensor(7, device=device)
    y = layer.lora_forward(x, A, B, 2.0, dropout=dropout, seed=seed)
    assert y.dtype == dtype
    actual = torch.autograd.grad(y, (x, A, B), dy)
    assert [g.dtype for g in actual] == [dtype, torch.float32, torch.float32]

    def plain(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inside = [t.detach().to(dtype).requires_grad_() for t in (x, A, B)]
        rows = inside[0].view(-1, K)
        # drawn in fp32, so that the mask and its factor are the same in every dtype
        mask = counter_dropout(torch.ones_like(rows, dtype=torch.float32), seed, dropout)
        dense = weight.dequantize(x.dtype).to(dtype)
        base = torch.nn.functional.linear(rows, dense, bias.to(x.dtype).to(dtype))
        out = base + 2.0 * ((rows * mask).to(dtype) @ inside[1].T) @ inside[2].T
        return out, *torch.autograd.grad(out, inside, dy.view(-1, N).to(dtype))

    same, exact = plain(dtype), plain(torch.float64)
    for got, wanted, truth in zip((y, *actual), same, exact, strict=True):
        assert_within_error_budget(
            got.view(truth.shape), wanted, truth, factor=3.0, floor=1e-6 * truth.abs().max().item()
        )


def test_resident_weight_changes_neither_mask_nor_function(device: torch.device) -> None:
    weight, x = make_weight(device), torch.randn(4, K, device=device)
    A, B = make_update(device)
    outputs = []
    for residency in ("nf4", "bf16"):
        layer = NF4Linear(weight, weight_residency=residency)  # type: ignore[arg-type]
        seed = torch.tensor(7, device=device)
        outputs.append(layer.lora_forward(x, A, B, 2.0, dropout=0.5, seed=seed))
        expected = N * K * 4 if residency == "bf16" else 0
        assert layer.nbytes == weight.nbytes + expected
    torch.testing.assert_close(*outputs)
    # the update is no part of what is kept
    torch.testing.assert_close(layer(x), NF4Linear(weight)(x))


@pytest.mark.parametrize("room", [True, False])
def test_auto_keeps_a_dense_weight_for_many_rows_where_there_is_room(
    room: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(NF4Linear, "_fits", lambda layer, x: room)
    weight, plain = make_weight(device), make_weight(device).nbytes
    layer = NF4Linear(weight, weight_residency="auto")
    few, many = torch.randn(255, K, device=device), torch.randn(2, 128, K, device=device)
    layer(few)
    assert layer.nbytes == plain
    torch.testing.assert_close(layer(many), NF4Linear(weight)(many))
    held = N * K * 4 if room else 0
    assert layer.nbytes == plain + held
    # few rows go by NF4 still
    monkeypatch.setattr(layer, "_dense", None)
    layer(few)
    assert layer.nbytes == plain
    # decided once
    assert layer.weight_residency == ("auto" if room else "nf4")


def test_resident_weight_takes_fp64_on_a_cpu() -> None:
    weight = make_weight(torch.device("cpu"))
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    layer = NF4Linear(weight, weight_residency="bf16")
    expected = x @ weight.dequantize().double().T
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    A, B = (t.double() for t in make_update(torch.device("cpu")))
    assert torch.autograd.gradcheck(
        lambda x, A, B: layer.lora_forward(x, A, B, 0.7), (x, A, B), fast_mode=True
    )


def test_weight_kept_by_a_call_of_inference_serves_training(device: torch.device) -> None:
    layer = NF4Linear(make_weight(device), weight_residency="bf16")
    with torch.inference_mode():
        layer(torch.randn(2, K, device=device))
    x = torch.randn(2, K, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).sum(), x)
    assert dx.isfinite().all()


@pytest.mark.parametrize("residency", ["nf4", "bf16"])
def test_compiles_without_graph_breaks(residency: Any, device: torch.device) -> None:
    torch.compiler.reset()
    layer = NF4Linear(make_weight(device), torch.randn(N).to(device), weight_residency=residency)
    A, B = make_update(device)
    seed = torch.tensor(7, device=device)

    def step(x: Tensor) -> Tensor:
        return layer.lora_forward(x, A, B, 2.0, dropout=0.5, seed=seed)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, K, device=device, requires_grad=True)
    results, grads = [], []
    for function in (compiled, step):
        results.append(function(x))
        grads.append(torch.autograd.grad(results[-1].square().sum(), (x, A, B)))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_wrong_bias_is_named_in_the_error() -> None:
    weight = make_weight(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"bias must be floating point \[20\], got .*32 \[19\]"):
        NF4Linear(weight, torch.zeros(19))
    with pytest.raises(ValueError, match=r"bias must be floating point \[20\], got torch\.int64"):
        NF4Linear(weight, torch.zeros(20, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weight must be \[N, K\], got \[2, 4, 128\]"):
        NF4Linear(quantize(torch.ones(2, 4, 128)))


def test_a_layer_moved_by_half_says_so() -> None:
    layer = NF4Linear(make_weight(torch.device("cpu")), torch.zeros(N)).to("meta")
    with pytest.raises(ValueError, match="bias must be on cpu as the weight, got meta; to move"):
        layer(torch.zeros(2, K))
