"""The rotary embedding on a GPU: the op and its gradient against transformers' lines in fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

from tli_engine import backends
from tli_engine.ops import rotary
from tli_engine.testing import assert_graph_gives_the_bits, assert_within_error_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = [  # T, H, D, heads
    pytest.param(1, 48, 128, 40, id="one-token"),
    pytest.param(64, 48, 128, 40, id="8B"),
    pytest.param(2048, 48, 128, 40, id="8B-many-tokens"),
    pytest.param(37, 80, 128, 72, id="72B"),
    pytest.param(130, 6, 256, 5, id="gemma-3-1b"),
    pytest.param(1000, 15, 64, 12, id="smollm2"),
    pytest.param(50, 3, 96, 3, id="D-96"),
    pytest.param(9, 5, 10, 0, id="none-rotated"),
    pytest.param(3, 1, 2, 1, id="one-pair"),
]
Inputs = tuple[Tensor, Tensor, Tensor]


def make_inputs(T: int, H: int, D: int, dtype: torch.dtype) -> Inputs:
    angles = torch.rand(T, D // 2, device="cuda") * 100
    x = torch.randn(T, H, D, device="cuda")
    return x.to(dtype), angles.cos().to(dtype), angles.sin().to(dtype)


def plain(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """The lines of transformers' Llama, without their names."""
    cos, sin = (torch.cat([angles, angles], 1)[:, None] for angles in (cos, sin))
    rotated = x[:, :heads]
    a, b = rotated.chunk(2, dim=-1)
    return torch.cat([rotated * cos + torch.cat([-b, a], -1) * sin, x[:, heads:]], dim=1)


def with_gradient(
    function: Callable[..., Tensor], inputs: Inputs, heads: int, dout: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = inputs[0].detach().requires_grad_()
    out = function(leaf, *inputs[1:], heads)
    (grad,) = torch.autograd.grad(out, leaf, dout.to(out.dtype))
    return out.detach(), grad


@pytest.mark.parametrize("wide", [False, True], ids=["angles-as-x", "angles-fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("T", "H", "D", "heads"), SHAPES)
def test_rotation_and_its_gradient(
    T: int, H: int, D: int, heads: int, dtype: torch.dtype, wide: bool
) -> None:
    assert backends.explain("rotary") == ("triton", ())
    x, cos, sin = make_inputs(T, H, D, dtype)
    dout = torch.randn(T, H, D, device="cuda").to(dtype)
    angles = (cos.float(), sin.float()) if wide else (cos, sin)
    actual = with_gradient(rotary, (x, *angles), heads, dout)
    same = with_gradient(plain, (x, cos, sin), heads, dout)
    exact = with_gradient(plain, (x.double(), cos.double(), sin.double()), heads, dout)
    for got, baseline, truth in zip(actual, same, exact, strict=True):
        assert_within_error_budget(got, baseline, truth)
    for got, source in zip(actual, (x, dout), strict=True):
        assert torch.equal(got[:, heads:], source[:, heads:])


@pytest.mark.parametrize("T", [64, 4096])
def test_is_deterministic_and_replays_from_a_graph(T: int) -> None:
    x, cos, sin = make_inputs(T, 48, 128, torch.bfloat16)
    leaf, dout = x.requires_grad_(), torch.randn_like(x)

    def step() -> tuple[Tensor, Tensor]:
        out = rotary(leaf, cos, sin, 40)
        return out, *torch.autograd.grad(out, leaf, dout)

    assert_graph_gives_the_bits(step)


def test_a_chain_of_launches_sees_what_was_written_before() -> None:
    """Each launch may be set up before the one it depends on has ended."""
    start, cos, sin = make_inputs(2048, 48, 128, torch.float32)
    results = []
    for wait in (False, True):
        for _ in range(20):
            x = start
            for _ in range(4):
                x = rotary(x, cos, sin, 40)
                if wait:
                    torch.cuda.synchronize()
            results.append(x)
    assert results[0].isfinite().all()
    assert all(torch.equal(x, results[0]) for x in results)


def test_heads_of_views() -> None:
    x, cos, sin = make_inputs(40, 8, 128, torch.bfloat16)
    room = torch.full((40, 12, 128), torch.nan, device="cuda").bfloat16()
    view = room[:, 2:10]
    view.copy_(x)
    assert torch.equal(rotary(view, cos, sin, 5), rotary(x, cos, sin, 5))
    # rows that no 16-byte load may start at
    room = torch.full((40, 12, 131), torch.nan, device="cuda").bfloat16()
    view = room[:, 2:10, 3:]
    view.copy_(x)
    assert torch.equal(rotary(view, cos, sin, 5), rotary(x, cos, sin, 5))
    # the gradient of a sum has no strides at all
    leaf = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(rotary(leaf, cos, sin, 5).sum(), leaf)
    assert torch.equal(grad, with_gradient(rotary, (x, cos, sin), 5, torch.ones_like(x))[1])


def test_offsets_past_2_to_the_31() -> None:
    T, H, D = 350_000, 48, 128
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB")
    x = torch.randn(T, H, D, device="cuda", dtype=torch.bfloat16)
    angles = torch.rand(T, D // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    out = rotary(x, cos, sin, 40)
    assert torch.equal(out[-64:], rotary(x[-64:], cos[-64:], sin[-64:], 40))


def test_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    # or fresh memory is filled, by one launch more for each tensor
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    x, cos, sin = make_inputs(64, 48, 128, torch.bfloat16)
    leaf, dout = x.requires_grad_(), torch.randn_like(x)

    def step() -> None:
        torch.autograd.grad(rotary(leaf, cos, sin, 40), leaf, dout)

    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == DeviceType.CUDA]
    assert names == ["_rotary_kernel"] * 2


def test_what_no_kernel_takes_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="x must be bf16, fp16 or fp32 on a GPU"):
        rotary(*make_inputs(3, 2, 8, torch.float64))


def test_no_rows() -> None:
    x, cos, sin = make_inputs(0, 48, 128, torch.bfloat16)
    out, grad = with_gradient(rotary, (x, cos, sin), 40, x)
    assert out.shape == grad.shape == (0, 48, 128)


def test_operator_contract() -> None:
    x, cos, sin = make_inputs(5, 3, 64, torch.bfloat16)
    torch.library.opcheck(torch.ops.tli_engine.rotary.default, (x.requires_grad_(), cos, sin, 2))
