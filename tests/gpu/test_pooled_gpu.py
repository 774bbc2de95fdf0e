"""Pooling, cosines and their loss on a GPU: ops and gradients against plain PyTorch in fp64."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

from tli_engine import backends
from tli_engine.align.losses import alignment_loss
from tli_engine.align.objective import BatchLoss, negatives, pack_loss
from tli_engine.align.space import PairSpace, fit_space
from tli_engine.config import AlignConfig, Space
from tli_engine.ops import (
    cosine_similarity,
    pooled_alignment_loss,
    segment_mean,
    word_attention,
    word_bounds,
)
from tli_engine.reference.cosine_similarity import cosine_similarity as plain_cosine
from tli_engine.reference.segment_mean import segment_mean as plain_mean
from tli_engine.testing import assert_graph_gives_the_bits, assert_within_error_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TRIPLETS = ["triplet-hardest", "triplet-semihard"]
BATCHES = [  # pairs, hidden size, loss
    *(pytest.param(N, H, "infonce", id=f"infonce-{N}-{H}") for N, H in (
        (1, 64), (8, 4096), (16, 2048), (17, 640), (32, 5120), (33, 4096), (64, 4096), (64, 8192),
        (65, 4096), (200, 4096), (1000, 512),
    )),
    *(pytest.param(N, 4096, loss, id=f"{loss}-{N}") for N in (16, 64, 130) for loss in TRIPLETS),
]  # fmt: skip


def make_inputs(N: int, H: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Words of 1 to 8 tokens, some of no weight; the words of a pair have something in common."""
    lengths = torch.randint(1, 9, (2 * N,))
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    word = torch.repeat_interleave(torch.arange(2 * N), lengths)
    hidden = torch.randn(N, H).repeat(2, 1)[word] + 4 * torch.randn(len(word), H)
    weight = (torch.rand(len(word)) > 0.2).float() * torch.randint(1, 4, (len(word),))
    weight[offsets[:-1]] = 1
    return hidden.to(dtype).cuda(), weight.cuda(), offsets.cuda()


def make_groups(N: int) -> Tensor:
    """Every third source is one word, and every fourth target."""
    i = torch.arange(N, device="cuda")
    return torch.stack([i.where(i % 3 > 0, 0), i.where(i % 4 > 0, 0)])


def chain(
    hidden: Tensor, weight: Tensor, offsets: Tensor, groups: Tensor, loss: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch, with a mask of negatives."""
    cos = plain_cosine(*plain_mean(hidden, weight, offsets).chunk(2))[0]
    negative = ~torch.eye(len(cos), dtype=torch.bool, device="cuda")
    for group in groups:
        negative &= group[:, None] != group
    value = alignment_loss(cos, negative, AlignConfig(loss=loss))
    return value, cos.diagonal().mean(), cos[negative].mean()


def with_gradient(
    function: Callable[..., tuple[Tensor, ...]], hidden: Tensor, *args: Any, **choice: Any
) -> tuple[Tensor, ...]:
    leaf = hidden.detach().requires_grad_()
    loss, true, wrong = function(leaf, *args, **choice)
    return loss.detach(), true.detach(), wrong.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "H", "loss"), BATCHES)
def test_loss_and_its_gradient(N: int, H: int, loss: str, dtype: torch.dtype) -> None:
    for op in ("pooled_alignment_loss", "pooled_alignment_loss_backward"):
        assert backends.explain(op) == ("triton", ())
    inputs = make_inputs(N, H, dtype)
    groups = make_groups(N)
    actual = with_gradient(pooled_alignment_loss, *inputs, groups, loss=loss)
    plain = with_gradient(chain, *inputs, groups, loss=loss)
    exact = with_gradient(chain, inputs[0].double(), *inputs[1:], groups, loss=loss)
    # cosines are off by some 1e-7, which InfoNCE divides by 0.05; of a gradient it is that share
    floors = (4e-6, 1e-6, 1e-6, 4e-6 * exact[3].abs().max().item())
    for got, same, truth, floor in zip(actual, plain, exact, floors, strict=True):
        if truth.isnan().all():
            assert got.isnan().all()
        else:
            assert_within_error_budget(got, same, truth, floor=floor)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("D", [64, 4096, 5000])
def test_segment_mean_and_its_gradient(D: int, dtype: torch.dtype) -> None:
    for op in ("segment_mean", "segment_mean_backward"):
        assert backends.explain(op) == ("triton", ())
    x, weight, offsets = make_inputs(100, D, dtype)
    leaves = [x.clone().requires_grad_(), x.clone().requires_grad_(), x.double().requires_grad_()]
    means = [f(leaf, weight, offsets) for f, leaf in zip(
        (segment_mean, plain_mean, plain_mean), leaves, strict=True
    )]  # fmt: skip
    dmean = torch.randn_like(means[0])
    grads = [
        torch.autograd.grad(mean, leaf, dmean.to(mean.dtype))[0]
        for mean, leaf in zip(means, leaves, strict=True)
    ]
    floor = 1e-14 if dtype == torch.float64 else 1e-6
    assert_within_error_budget(*(m.detach() for m in means), floor=floor)
    assert_within_error_budget(*grads, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "M", "D"), [(8, 8, 4096), (64, 64, 4096), (100, 120, 8192), (500, 33, 4096)]
)
def test_cosine_similarity(N: int, M: int, D: int, dtype: torch.dtype) -> None:
    assert backends.explain("cosine_similarity") == ("triton", ())
    x, y = (torch.randn(n, D, device="cuda").to(dtype) for n in (N, M))
    y[0] = x[0]
    exact = plain_cosine(x.double(), y.double())[0]
    # what D terms of unit vectors, rounded and added up in fp32 in any order, may be off by
    floor = D**0.5 * 2**-24
    assert_within_error_budget(cosine_similarity(x, y), plain_cosine(x, y)[0], exact, floor=floor)


@pytest.mark.parametrize("N", [64, 150])
def test_is_deterministic_and_replays_from_a_graph(N: int) -> None:
    hidden, weight, offsets = make_inputs(N, 4096, torch.bfloat16)
    leaf = hidden.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss, true, wrong = pooled_alignment_loss(leaf, weight, offsets)
        return loss, true, wrong, torch.autograd.grad(loss, leaf)[0]

    captured, graph = assert_graph_gives_the_bits(step, repeats=20)
    first = captured[0].clone()
    # the hidden states are read in the graph: other ones give another result
    with torch.no_grad():
        leaf.copy_(make_inputs(N, 4096, torch.bfloat16)[0][:1].expand_as(leaf))
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(captured[0], first)
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def kernels_of(call: Callable[[], object]) -> list[str]:
    """Names of the kernels that a call launches."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = (e for e in profile.events() if e.device_type == DeviceType.CUDA)
    return [e.name for e in on_gpu]


@pytest.mark.parametrize("N", [8, 32, 64])
def test_few_pairs_are_one_launch_each_way(N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # or fresh memory is filled, by one launch more for each tensor
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    hidden, weight, offsets = make_inputs(N, 4096, torch.bfloat16)
    leaf = hidden.requires_grad_()
    forward = kernels_of(lambda: pooled_alignment_loss(leaf, weight, offsets))
    assert forward == ["_pooled_loss_kernel"]
    loss, *_ = pooled_alignment_loss(leaf, weight, offsets)
    one = torch.ones_like(loss)
    backward = kernels_of(lambda: torch.autograd.grad(loss, leaf, one, retain_graph=True))
    assert backward == ["_hidden_gradient_kernel"]


def test_other_outputs_cost_no_launch_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros for their gradients would be a launch each."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    q, k, v = (torch.randn(8, 2, 64, device="cuda").bfloat16().requires_grad_() for _ in range(3))
    angles = torch.randn(8, 32, device="cuda")
    bounds = word_bounds(torch.tensor([0, 3, 8], device="cuda"), 8)
    out = word_attention(q, k, v, angles.cos(), angles.sin(), bounds)
    dout = torch.randn_like(out)
    launched = kernels_of(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
    assert not [name for name in launched if "fill" in name.lower()]
    x, y = (torch.randn(8, 64, device="cuda", requires_grad=True) for _ in range(2))
    cos = cosine_similarity(x, y)
    dcos = torch.randn_like(cos)
    launched = kernels_of(lambda: torch.autograd.grad(cos, (x, y), dcos, retain_graph=True))
    assert not [name for name in launched if "fill" in name.lower()]


@pytest.mark.parametrize("N", [64, 150])
def test_tokens_of_no_word_get_no_gradient(N: int) -> None:
    hidden, weight, offsets = make_inputs(N, 4096, torch.bfloat16)
    T = len(hidden)
    expected = with_gradient(pooled_alignment_loss, hidden, weight, offsets)
    filled = torch.cat([hidden, torch.full_like(hidden[:100], torch.nan)])
    weight = torch.cat([weight, torch.ones_like(weight[:100])])
    *results, dhidden = with_gradient(pooled_alignment_loss, filled, weight, offsets)
    assert (dhidden[T:] == 0).all()
    for got, same in zip((*results, dhidden[:T]), expected, strict=True):
        assert torch.equal(got, same)
    dx = torch.autograd.grad(
        segment_mean(leaf := filled.requires_grad_(), weight, offsets).sum(), leaf
    )[0]
    assert (dx[T:] == 0).all()
    assert (dx[:T] != 0).any()


@pytest.mark.parametrize("loss", ["infonce", *TRIPLETS])
@pytest.mark.parametrize("N", [5, 40, 100])
def test_no_negatives(N: int, loss: Any) -> None:
    inputs = make_inputs(N, 4096, torch.bfloat16)
    same = torch.zeros(2, N, dtype=torch.int64, device="cuda")
    value, true, wrong, dhidden = with_gradient(pooled_alignment_loss, *inputs, same, loss=loss)
    assert value == 0
    assert true.isfinite()
    assert wrong.isnan()
    assert (dhidden == 0).all()


@pytest.mark.parametrize("loss", ["infonce", *TRIPLETS])
def test_cosines_made_twice_are_the_same(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosines that are too many to keep are made again, bit for bit: the hardest are found again."""
    module = importlib.import_module("tli_engine.ops.pooled_alignment_loss")
    inputs = (*make_inputs(300, 4096, torch.bfloat16), make_groups(300))
    kept = with_gradient(pooled_alignment_loss, *inputs, loss=loss)
    monkeypatch.setattr(module, "_MOST_COSINES", 128 * 300)
    again = with_gradient(pooled_alignment_loss, *inputs, loss=loss)
    for got, expected in zip(again, kept, strict=True):
        error = (got.float() - expected.float()).norm() / expected.float().norm()
        assert error < 1e-3


def test_a_large_batch_never_holds_its_cosines() -> None:
    N, H = 8192, 256
    words = torch.arange(2 * N + 1, device="cuda")
    hidden = torch.randn(2 * N, H, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.ones(2 * N, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, *_ = pooled_alignment_loss(hidden, weight, words, make_groups(N))
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * N * N
    exact = with_gradient(chain, hidden.float(), weight, words, make_groups(N), loss="infonce")
    torch.testing.assert_close(loss.detach(), exact[0], rtol=1e-5, atol=0)


SPACES: list[Space] = ["centred", "whitened"]


def make_space(space: Space, H: int) -> PairSpace:
    return fit_space(space, *(torch.randn(2, 90, H, device="cuda") + 0.5)).to(torch.float32)


def in_space(
    hidden: Tensor, weight: Tensor, offsets: Tensor, groups: Tensor, space: PairSpace,
    config: AlignConfig,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Plain PyTorch, with matrices of cosines and a mask of negatives."""
    source, target = plain_mean(hidden, weight, offsets).chunk(2)
    cos = plain_cosine(space.source(source), space.target(target))[0]
    negative = negatives(groups, config.mask_duplicates)
    raw = plain_cosine(source.detach(), target.detach())[0]
    loss = alignment_loss(cos, negative, config)
    return loss, raw.diagonal().mean(), raw[negative].mean()


def by_the_op(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    found: BatchLoss = pack_loss(*args)
    return found.loss, found.cosine_true, found.cosine_random


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("N", [8, 64, 150])
@pytest.mark.parametrize("loss", ["infonce", *TRIPLETS])
@pytest.mark.parametrize("space", SPACES)
def test_loss_in_a_space_and_its_gradient(
    space: Space, loss: Any, N: int, dtype: torch.dtype
) -> None:
    H = 1024
    inputs, maps = (*make_inputs(N, H, dtype), make_groups(N)), make_space(space, H)
    config = AlignConfig(space=space, loss=loss)
    actual = with_gradient(by_the_op, *inputs, maps, config)
    plain = with_gradient(in_space, *inputs, maps, config)
    exact = with_gradient(in_space, inputs[0].double(), *inputs[1:], maps, config)
    floors = (4e-6, 1e-6, 1e-6, 4e-6 * exact[3].abs().max().item())
    for got, same, truth, floor in zip(actual, plain, exact, floors, strict=True):
        assert_within_error_budget(got, same, truth, floor=floor)


@pytest.mark.parametrize("N", [64, 150])
@pytest.mark.parametrize("space", SPACES)
def test_loss_in_a_space_replays_from_a_graph(space: Space, N: int) -> None:
    hidden, *words = make_inputs(N, 1024, torch.bfloat16)
    args = (*words, make_groups(N), make_space(space, 1024), AlignConfig(space=space))
    leaf = hidden.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        results = by_the_op(leaf, *args)
        return *results, torch.autograd.grad(results[0], leaf)[0]

    assert_graph_gives_the_bits(step)


@pytest.mark.parametrize("space", SPACES)
def test_a_large_batch_in_a_space_never_holds_its_cosines(space: Space) -> None:
    N, H = 8192, 128
    words = torch.arange(2 * N + 1, device="cuda")
    hidden = torch.randn(2 * N, H, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight, groups = torch.ones(2 * N, device="cuda"), make_groups(N)
    maps, config = make_space(space, H), AlignConfig(space=space)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, *cosines = by_the_op(hidden, weight, words, groups, maps, config)
    loss.backward()
    # a tile of 64 MiB, and some copies of the vectors, 8 MiB each in fp32
    assert torch.cuda.max_memory_allocated() - before < 4 * N * N
    exact = in_space(hidden.detach().float(), weight, words, groups, maps, config)
    torch.testing.assert_close(loss.detach(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(cosines, list(exact[1:]), rtol=1e-4, atol=1e-6)


def test_fp64_is_refused() -> None:
    inputs = make_inputs(2, 16, torch.float64)
    with pytest.raises(ValueError, match="on a GPU hidden must be bf16, fp16 or fp32, got fp64"):
        pooled_alignment_loss(*inputs)


def test_operator_contract() -> None:
    hidden, weight, offsets = make_inputs(3, 64, torch.bfloat16)
    arguments = (hidden.requires_grad_(), weight, offsets, make_groups(3), "infonce", 0.4, 0.05)
    op = torch.ops.tli_engine.pooled_alignment_loss.default
    torch.library.opcheck(op, (*arguments, True, 1 << 24))
