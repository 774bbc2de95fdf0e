"""Flat AdamW on a GPU: values, repeatability, graphs, and launches side by side."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

from tli_engine import backends
from tli_engine.ops.flat_adamw import flat_adamw_
from tli_engine.reference.flat_adamw import flat_adamw as reference
from tli_engine.testing import assert_within_error_budget
from tli_engine.train.flat_adamw import FlatAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NUMBERS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0}
# two layers' q and v, all of them, and sizes about the tiles and programs of a launch
SIZES = [1, 63, 2048, 2049, 132 * 2048, 132 * 2048 + 64, 425_984, 6_815_744, 20_000_001]
Buffers = dict[str, Tensor]


def make_buffers(P: int, total: int = 20) -> Buffers:
    return {
        "parameters": torch.randn(P, device="cuda"),
        "grad": torch.randn(P, device="cuda"),
        "exp_avg": 0.1 * torch.randn(P, device="cuda"),
        "exp_avg_sq": 0.1 * torch.rand(P, device="cuda"),
        "state": torch.tensor([3, 0], device="cuda"),
        "schedule": torch.linspace(1e-3, 0, total, device="cuda"),
    }


def copies(buffers: Buffers, dtype: torch.dtype | None = None) -> Buffers:
    kept = ("state", "schedule")
    return {
        n: t.to(dtype, copy=True) if dtype and n not in kept else t.clone()
        for n, t in buffers.items()
    }


@pytest.mark.parametrize("shadow", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("P", SIZES)
def test_one_step(P: int, shadow: torch.dtype | None) -> None:
    assert backends.explain("flat_adamw") == ("triton", ())
    buffers = make_buffers(P)
    copy = None if shadow is None else torch.empty(P, dtype=shadow, device="cuda")
    plain, exact = copies(buffers), copies(buffers, torch.float64)
    metrics = flat_adamw_(**buffers, **NUMBERS, shadow=copy)
    assert_within_error_budget(metrics, *(reference(**b, **NUMBERS) for b in (plain, exact)))
    assert buffers["state"].tolist() == [4, 0]
    for name in ("parameters", "exp_avg", "exp_avg_sq"):
        assert_within_error_budget(buffers[name], plain[name], exact[name])
    if copy is not None:
        assert torch.equal(copy, buffers["parameters"].to(copy.dtype))


@pytest.mark.parametrize("max_grad_norm", [1.0, math.inf])
def test_fifty_steps_equal_torch(max_grad_norm: float) -> None:
    shapes = [(16, 4096), (4096, 16), (16, 4096), (1024, 16), (7,)]
    values = [torch.randn(shape, device="cuda") for shape in shapes]
    ours = {str(i): nn.Parameter(v.clone()) for i, v in enumerate(values)}
    theirs = [nn.Parameter(v.clone()) for v in values]
    rates = torch.linspace(0, 1e-2, 50)
    flat = FlatAdamW(ours, rates, weight_decay=0.1, max_grad_norm=max_grad_norm)
    plain = torch.optim.AdamW(theirs, weight_decay=0.1, fused=True)
    for step in range(50):
        for mine, its in zip(ours.values(), theirs, strict=True):
            its.grad = torch.randn_like(its) * 10.0 ** (step % 5 - 4)
            assert mine.grad is not None
            mine.grad.copy_(its.grad)
        if step == 20:
            kept = flat.grad.clone()
            flat.grad[100] = math.nan
            assert flat.step()[2] == 1
            flat.grad.copy_(kept)
        norm, rate, skipped = flat.step().tolist()
        expected = nn.utils.clip_grad_norm_(theirs, max_grad_norm, foreach=True)
        assert norm == pytest.approx(expected.item(), rel=1e-5)
        assert (rate, skipped) == (rates[step].item(), 0)
        plain.param_groups[0]["lr"] = rate
        plain.step()
    assert flat.counts.tolist() == [50, 1]
    for mine, its in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("P", [425_984, 6_815_744])
def test_same_bits_again(P: int) -> None:
    buffers = make_buffers(P)
    results = []
    for _ in range(20):
        again = copies(buffers)
        results.append([flat_adamw_(**again, **NUMBERS), *again.values()])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("P", [64, 425_984, 6_815_744])
def test_a_graph_goes_through_the_schedule(P: int) -> None:
    eager, gradient = make_buffers(P), torch.randn(P, device="cuda")
    shadows = [torch.empty(P, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    replayed = copies(eager)
    # first outside, so that nothing is compiled within the capture
    flat_adamw_(**copies(eager), **NUMBERS, shadow=shadows[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # two steps, the second right after what writes its gradient
        flat_adamw_(**replayed, **NUMBERS, shadow=shadows[1])
        replayed["grad"].add_(gradient)
        captured = flat_adamw_(**replayed, **NUMBERS, shadow=shadows[1])
    for turn, skipped in ((0, 0), (1, 0), (2, 1), (3, 0)):
        for buffers in (eager, replayed):
            buffers["grad"].copy_(gradient * (turn + 1))
            if skipped:
                buffers["grad"][P // 2] = math.inf
        flat_adamw_(**eager, **NUMBERS, shadow=shadows[0])
        eager["grad"].add_(gradient)
        metrics = flat_adamw_(**eager, **NUMBERS, shadow=shadows[0])
        graph.replay()
        torch.cuda.synchronize()
        assert metrics[2] == skipped
        assert torch.equal(metrics, captured)
        assert all(torch.equal(eager[name], replayed[name]) for name in eager)
        assert torch.equal(*shadows)
    assert replayed["state"].tolist() == [3 + 6, 2]


def test_launches_on_two_streams_and_beside_products() -> None:
    """Neither waits for the other at its barrier for ever; counters are not shared."""
    P, steps = 6_815_744, 30
    starts = [make_buffers(P, steps + 3) for _ in range(2)]
    expected = [copies(b) for b in starts]
    for buffers in expected:
        for _ in range(steps):
            flat_adamw_(**buffers, **NUMBERS)
    streams = [torch.cuda.Stream() for _ in range(3)]
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    for _ in range(steps):
        for stream, buffers in zip(streams, starts, strict=False):
            with torch.cuda.stream(stream):
                flat_adamw_(**buffers, **NUMBERS)
        with torch.cuda.stream(streams[2]):
            a @ a
    torch.cuda.synchronize()
    for buffers, same in zip(starts, expected, strict=True):
        assert all(torch.equal(buffers[name], same[name]) for name in buffers)


def kernels_of(call: Callable[[], object]) -> list[str]:
    """Names of the kernels that a call launches."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = (e for e in profile.events() if e.device_type == DeviceType.CUDA)
    return [e.name for e in on_gpu]


def test_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    # or fresh memory is filled, by one launch more for each tensor
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    buffers = make_buffers(425_984)
    assert kernels_of(lambda: flat_adamw_(**buffers, **NUMBERS)) == ["_flat_adamw_kernel"]


def test_fp64_is_refused() -> None:
    with pytest.raises(ValueError, match="parameters must be fp32"):
        flat_adamw_(**copies(make_buffers(64), torch.float64), **NUMBERS)


def test_operator_contract() -> None:
    arguments = (*make_buffers(130).values(), *NUMBERS.values(), None)
    torch.library.opcheck(torch.ops.tli_engine.flat_adamw_.default, arguments)
