"""The rows' cross-entropy on a GPU: losses and gradient against PyTorch's in fp64."""

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.functional import cross_entropy

from tli_engine import backends
from tli_engine.ops.cross_entropy_rows import cross_entropy_rows_
from tli_engine.testing import assert_within_error_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = [  # L, V
    pytest.param(1, 1, id="one-logit"),
    pytest.param(7, 259, id="bytes"),
    pytest.param(33, 49152, id="smollm2"),
    pytest.param(300, 128256, id="8B"),
    pytest.param(20, 152064, id="72B"),
    pytest.param(20, 262144, id="gemma-3"),
    pytest.param(20, 32768, id="one-turn-of-halves"),
    pytest.param(20, 32769, id="one-past-a-turn"),
    pytest.param(20, 50257, id="odd"),
]


def make_inputs(L: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of which a few stand out, the target's among them in every other row."""
    logits = torch.randn(L, V, device="cuda") * 3
    targets = torch.randint(0, V, (L,), device="cuda")
    rows = torch.arange(0, L, 2, device="cuda")
    logits[rows, targets[::2]] += 8
    return logits.to(dtype), targets


def plain(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    wide = leaf.to(torch.promote_types(logits.dtype, torch.float32))
    losses = cross_entropy(wide, targets, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("L", "V"), SHAPES)
def test_losses_and_gradient(L: int, V: int, dtype: torch.dtype) -> None:
    assert backends.explain("cross_entropy_rows") == ("triton", ())
    logits, targets = make_inputs(L, V, dtype)
    same, exact = plain(logits, targets), plain(logits.double(), targets)
    losses = cross_entropy_rows_(logits, targets)
    assert losses.dtype == torch.float32
    # the GPU's fast exponential and logarithm err by some last bits of numbers up to 20
    assert_within_error_budget(losses, same[0], exact[0], floor=5e-6)
    assert_within_error_budget(logits, same[1], exact[1], floor=2e-6)
    # rows of a gradient add up to zero
    sums = logits.double().sum(1).abs().max()
    assert sums < {torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float32: 1e-4}[dtype]


@pytest.mark.parametrize("V", [1000, 128256])
@pytest.mark.parametrize("pad", [1, 16])
def test_rows_that_lie_apart(V: int, pad: int) -> None:
    logits, targets = make_inputs(5, V, torch.bfloat16)
    room = torch.full((7, V + 2 * pad), torch.nan, device="cuda").bfloat16()
    view = room[1:6, pad : V + pad]
    view.copy_(logits)
    losses = cross_entropy_rows_(view, targets.int())
    assert torch.equal(losses, cross_entropy_rows_(logits, targets))
    assert torch.equal(view, logits)
    assert room.isfinite().sum() == 5 * V


def test_rows_that_are_lost_are_lost_alone() -> None:
    logits, targets = make_inputs(6, 50257, torch.float32)
    expected = logits.clone()
    losses = cross_entropy_rows_(expected, targets)
    targets[0], targets[1] = -100, 2**40
    logits[2, 40_000] = torch.nan
    logits[3, 40_000] = torch.inf
    logits[4] = -torch.inf
    actual = cross_entropy_rows_(logits, targets)
    assert actual.isnan().tolist() == [True] * 5 + [False]
    assert logits[[0, 1, 2, 4]].isnan().all()
    assert actual[5] == losses[5]
    assert torch.equal(logits[5], expected[5])


def test_columns_that_are_ruled_out() -> None:
    logits, targets = make_inputs(6, 50257, torch.bfloat16)
    logits[:, 1000:40_000] = -torch.inf
    targets %= 1000
    expected = plain(logits, targets)
    losses = cross_entropy_rows_(logits, targets)
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, expected[1], rtol=1e-2, atol=1e-6)
    assert (logits[:, 1000:40_000] == 0).all()


def test_is_deterministic_and_replays_from_a_graph() -> None:
    start, targets = make_inputs(500, 128256, torch.bfloat16)
    results = []
    for _ in range(5):
        logits = start.clone()
        results.append((cross_entropy_rows_(logits, targets), logits))
    logits = start.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # right after what writes them
        logits.copy_(start)
        losses = cross_entropy_rows_(logits, targets)
    graph.replay()
    torch.cuda.synchronize()
    for again in (*results, (losses, logits)):
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_offsets_past_2_to_the_31() -> None:
    L, V = 17_000, 128256
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB")
    logits = torch.randn(L, V, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, V, (L,), device="cuda")
    last = logits[-64:].clone()
    losses = cross_entropy_rows_(logits, targets)
    assert torch.equal(losses[-64:], cross_entropy_rows_(last, targets[-64:]))
    assert torch.equal(logits[-64:], last)


def test_is_one_launch_and_holds_no_more_than_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    # or fresh memory is filled, by one launch more for each tensor
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    logits, targets = make_inputs(1000, 49152, torch.bfloat16)
    cross_entropy_rows_(logits, targets)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        losses = cross_entropy_rows_(logits, targets)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == DeviceType.CUDA]
    assert names == ["_cross_entropy_rows_kernel"]
    assert losses.shape == (1000,)
    assert torch.cuda.max_memory_allocated() - before <= 1000 * 4 + 512


def test_what_no_kernel_takes_is_named_in_the_error() -> None:
    logits, targets = make_inputs(3, 8, torch.float64)
    with pytest.raises(ValueError, match="logits must be bf16, fp16 or fp32 on a GPU"):
        cross_entropy_rows_(logits, targets)
    with pytest.raises(ValueError, match="targets must be on cuda:0 as logits, got cpu"):
        cross_entropy_rows_(logits.float(), targets.cpu())


def test_operator_contract() -> None:
    arguments = make_inputs(5, 64, torch.bfloat16)
    torch.library.opcheck(torch.ops.tli_engine.cross_entropy_rows_.default, arguments)
