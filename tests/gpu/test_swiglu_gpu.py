"""The gated activation on a GPU: the op and its gradient against plain PyTorch in fp64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from tli_engine import backends
from tli_engine.ops import swiglu
from tli_engine.testing import assert_graph_gives_the_bits, assert_within_error_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ACTS = ["silu", "gelu_tanh"]
SHAPES = [  # T, I
    pytest.param(1, 14336, id="one-row"),
    pytest.param(64, 14336, id="8B"),
    pytest.param(37, 29568, id="72B"),
    pytest.param(1000, 14336, id="many-rows"),
    pytest.param(130, 1536, id="I-1536"),
    pytest.param(5000, 2048, id="I-2048"),
    pytest.param(3, 6912, id="I-6912"),
    pytest.param(50, 100, id="I-100"),
    pytest.param(9, 333, id="I-333"),
    pytest.param(3, 1, id="I-1"),
]


def make_inputs(T: int, I: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(T, 2 * I, device="cuda") * 3
    return gate_up.to(dtype), torch.randn(T, I, device="cuda").to(dtype)


def plain(gate_up: Tensor, act: str) -> Tensor:
    """The lines of transformers' MLP between its projections."""
    gate, up = gate_up.chunk(2, dim=1)
    return (silu(gate) if act == "silu" else gelu(gate, approximate="tanh")) * up


def with_gradient(gated: object, gate_up: Tensor, dout: Tensor, act: str) -> tuple[Tensor, Tensor]:
    leaf = gate_up.detach().requires_grad_()
    out = gated(leaf, act)  # type: ignore[operator]
    (grad,) = torch.autograd.grad(out, leaf, dout.to(out.dtype))
    return out.detach(), grad


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("T", "I"), SHAPES)
def test_activation_and_its_gradient(T: int, I: int, dtype: torch.dtype, act: str) -> None:
    assert backends.explain("swiglu") == ("triton", ())
    assert backends.explain("swiglu_backward") == ("triton", ())
    gate_up, dout = make_inputs(T, I, dtype)
    actual = with_gradient(swiglu, gate_up, dout, act)
    same = with_gradient(plain, gate_up, dout, act)
    exact = with_gradient(plain, gate_up.double(), dout, act)
    for got, baseline, truth in zip(actual, same, exact, strict=True):
        # fp32 products of numbers up to a hundred
        assert_within_error_budget(got, baseline, truth, floor=2e-5)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("T", [64, 1000])
def test_is_deterministic_and_replays_from_a_graph(T: int, act: str) -> None:
    gate_up, dout = make_inputs(T, 14336, torch.bfloat16)
    leaf = gate_up.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        out = swiglu(leaf, act)
        return out, *torch.autograd.grad(out, leaf, dout)

    assert_graph_gives_the_bits(step)


def test_a_chain_of_launches_sees_what_was_written_before() -> None:
    """Each launch may be set up before the one it depends on has ended."""
    gate_up, _ = make_inputs(256, 1 << 14, torch.bfloat16)
    results = []
    for wait in (False, True):
        for _ in range(20):
            x = gate_up
            for _ in range(3):
                x = swiglu(x)
                if wait:
                    torch.cuda.synchronize()
            results.append(x)
    assert results[0].isfinite().all()
    assert all(torch.equal(x, results[0]) for x in results)


def test_rows_of_views() -> None:
    gate_up, dout = make_inputs(40, 1536, torch.bfloat16)
    room = torch.full((40, 2 * 1536 + 48), torch.nan, device="cuda").bfloat16()
    view = room[:, 16 : 16 + 2 * 1536]
    view.copy_(gate_up)
    dense = with_gradient(swiglu, gate_up, dout, "silu")
    strided = with_gradient(swiglu, view, dout, "silu")
    assert all(torch.equal(a, b) for a, b in zip(dense, strided, strict=True))
    # the gradient of a sum has no strides at all
    leaf = gate_up.detach().requires_grad_()
    (grad,) = torch.autograd.grad(swiglu(leaf).sum(), leaf)
    assert torch.equal(grad, with_gradient(swiglu, gate_up, torch.ones_like(dout), "silu")[1])


def test_offsets_past_2_to_the_31() -> None:
    T, I = 40_000, 29568
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB")
    gate_up = torch.randn(T, 2 * I, device="cuda", dtype=torch.bfloat16)
    out = torch.ops.tli_engine.swiglu.default(gate_up, "silu")
    dgate_up = torch.ops.tli_engine.swiglu_backward.default(out, gate_up, "silu")
    expected, d_expected = with_gradient(swiglu, gate_up[-64:], out[-64:], "silu")
    assert torch.equal(out[-64:], expected)
    assert torch.equal(dgate_up[-64:], d_expected)


def test_what_no_kernel_takes_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="gate_up must be bf16, fp16 or fp32 on a GPU"):
        swiglu(make_inputs(3, 8, torch.float64)[0])


def test_no_rows() -> None:
    gate_up, dout = make_inputs(0, 14336, torch.bfloat16)
    out, grad = with_gradient(swiglu, gate_up, dout, "silu")
    assert out.shape == (0, 14336)
    assert grad.shape == (0, 28672)


def test_operator_contract() -> None:
    gate_up, _ = make_inputs(5, 64, torch.bfloat16)
    torch.library.opcheck(torch.ops.tli_engine.swiglu.default, (gate_up.requires_grad_(), "silu"))
