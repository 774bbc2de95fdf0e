import pytest
import torch
from torch import Tensor

from tli_engine import nf4_linear, nf4_lora_linear
from tli_engine.layouts import RecordedWeight
from tli_engine.nf4 import quantize
from tli_engine.nn import NF4Linear

N, K, R = 64, 128, 4


def make_layer(recorded: bool) -> NF4Linear:
    layer = NF4Linear(quantize(torch.randn(N, K) * 0.05), torch.randn(N))
    if recorded:
        layer._stored = RecordedWeight(layer.weight)
    return layer


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    x, A, B = torch.randn(3, K), torch.randn(R, K) * 0.1, torch.randn(N, R) * 0.1
    return x.requires_grad_(), A.requires_grad_(), B.requires_grad_()


@pytest.mark.parametrize("recorded", [False, True], ids=["portable", "records"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layer_casts_its_input_as_a_dense_layer_does(dtype: torch.dtype, recorded: bool) -> None:
    layer, (x, A, B) = make_layer(recorded), make_inputs()
    inside = x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, adapted = layer(inside), layer.lora_forward(inside, A, B, 2.0)
        dense = torch.nn.functional.linear(inside, torch.randn(N, K))
    assert y.dtype == adapted.dtype == dense.dtype == torch.bfloat16
    # the same bits as without autocast, and gradients in the leaves' dtypes
    cast = inside.detach().to(torch.bfloat16)
    assert torch.equal(y, layer(cast))
    grads = torch.autograd.grad(adapted.sum(), (inside, A, B))
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("recorded", [False, True], ids=["portable", "records"])
def test_backward_under_autocast_keeps_its_dtypes(recorded: bool) -> None:
    layer, (x, A, B) = make_layer(recorded), make_inputs()
    y = layer.lora_forward(x, A, B, 2.0)
    plain = torch.autograd.grad(y.sum(), (x, A, B), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y.sum(), (x, A, B))
    for ours, theirs in zip(inside, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_public_ops_cast_too_and_compile_agrees() -> None:
    weight, (x, A, B) = quantize(torch.randn(N, K) * 0.05), make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert nf4_linear(x, weight, torch.zeros(N)).dtype == torch.bfloat16
        assert nf4_lora_linear(x, weight, A, B, 2.0).dtype == torch.bfloat16
        layer = make_layer(False)
        compiled = torch.compile(lambda t: layer(t) * 2, backend="aot_eager")
        assert compiled(x).dtype == (layer(x) * 2).dtype == torch.bfloat16
