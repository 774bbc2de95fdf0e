"""The fused loss against the chain of ops that it stands for, and its kernels against it."""

import importlib
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tli_engine.align.losses import alignment_loss
from tli_engine.config import AlignConfig
from tli_engine.ops import cosine_similarity, pooled_alignment_loss, segment_mean
from tli_engine.testing import assert_within_error_budget

pytest.importorskip("triton")
from tli_engine.kernels import pooled_alignment_loss as forward
from tli_engine.kernels import pooled_alignment_loss_backward as backward

OPS = torch.ops.tli_engine
# the module, not the function that hides it
ops = importlib.import_module("tli_engine.ops.pooled_alignment_loss")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LOSSES = ["infonce", "triplet-hardest", "triplet-semihard"]
BATCHES = [  # pairs, hidden size
    pytest.param(1, 24, id="one-pair"),
    pytest.param(2, 8, id="two-pairs"),
    pytest.param(7, 130, id="ragged"),
    pytest.param(16, 64, id="a-tile"),
    pytest.param(17, 520, id="one-past-a-tile"),
    pytest.param(33, 200, id="many-tiles"),
]
# one way is a part of both: it need not meet every batch
WAYS = [
    pytest.param(*batch.values, two_way, id=f"{batch.id}-{'two' if two_way else 'one'}-way")
    for two_way, batches in ((True, BATCHES), (False, BATCHES[1:5]))
    for batch in batches
]


def make_inputs(
    N: int, H: int, dtype: torch.dtype, device: torch.device | str = "cpu", noise: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Words of 1 to 5 tokens, some of no weight; the two words of a pair have something in common."""
    lengths = torch.randint(1, 6, (2 * N,))
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    common = torch.randn(N, H).repeat(2, 1)[torch.repeat_interleave(torch.arange(2 * N), lengths)]
    hidden = (common + noise * torch.randn(len(common), H)).to(dtype)
    weight = torch.rand(len(hidden)) + 0.1
    weight[torch.rand(len(hidden)) < 0.2] = 0
    weight[offsets[:-1]] = 1
    return hidden.to(device), weight.to(device), offsets.to(device)


def make_groups(N: int, device: torch.device | str = "cpu") -> Tensor:
    """Every third source is one word, and every fourth target."""
    i = torch.arange(N)
    source, target = i.where(i % 3 > 0, 0), i.where(i % 4 > 0, 0)
    return torch.stack([source, target]).to(device)


def chain(
    hidden: Tensor, weight: Tensor, offsets: Tensor, groups: Tensor | None, **choice: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the ops one by one, with a mask of negatives."""
    source, target = segment_mean(hidden, weight, offsets).chunk(2)
    cos = cosine_similarity(source, target)
    negative = ~torch.eye(len(cos), dtype=torch.bool, device=cos.device)
    for group in () if groups is None else groups:
        negative &= group[:, None] != group
    loss = alignment_loss(cos, negative, AlignConfig(**choice))
    return loss, cos.diagonal().mean(), cos[negative].mean()


def with_gradient(function: Any, hidden: Tensor, *args: Any, **choice: Any) -> tuple[Tensor, ...]:
    leaf = hidden.detach().requires_grad_()
    loss, true, wrong = function(leaf, *args, **choice)
    return loss.detach(), true.detach(), wrong.detach(), torch.autograd.grad(loss, leaf)[0]


def launch(how: str, inputs: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    """Both directions of the kernels for few pairs or for many, of these with cosines kept or, of
    more than 4 pairs, in chunks that are not; as :func:`with_gradient`."""
    groups, loss, _, temperature, _ = rest
    hidden, weight, offsets = inputs
    most_cosines = 4 * (len(offsets) // 2) if how == "chunks" else 1 << 24
    with pytest.MonkeyPatch.context() as patch:
        if how != "few":
            patch.setattr(forward, "MOST_PAIRS", 0)
        value, true, wrong, *kept = forward.pooled_alignment_loss(*inputs, *rest, most_cosines)
        choice = (groups, loss, temperature, hidden.dtype, most_cosines)
        one = torch.ones_like(value)
        dhidden = backward.pooled_alignment_loss_backward(one, *kept, weight, offsets, *choice)
    return value, true, wrong, dhidden


KERNELS = pytest.mark.parametrize("how", ["few", "many", "chunks"])


@pytest.mark.parametrize("two_way", [True, False], ids=["two-way", "one-way"])
@pytest.mark.parametrize("grouped", [False, True], ids=["all", "groups"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("N", [1, 2, 9])
def test_reference_is_the_chain_of_ops(N: int, loss: Any, grouped: bool, two_way: bool) -> None:
    inputs = (*make_inputs(N, 12, torch.float64), make_groups(N) if grouped else None)
    choice = {"loss": loss, "two_way": two_way, "margin": 0.3, "temperature": 0.1}
    actual = with_gradient(pooled_alignment_loss, *inputs, **choice)
    expected = with_gradient(chain, *inputs, **choice)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@settings(max_examples=40)
@given(
    N=st.integers(1, 12),
    groups=st.integers(1, 12),
    loss=st.sampled_from(LOSSES),
    most_cosines=st.integers(1, 60),
    seed=st.integers(0, 2**31),
)
def test_chunks_of_any_size_change_nothing(
    N: int, groups: int, loss: Any, most_cosines: int, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = (*make_inputs(N, 6, torch.float64), torch.randint(groups, (2, N)))
    expected = with_gradient(chain, *inputs, loss=loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_MOST_COSINES", most_cosines)
        actual = with_gradient(pooled_alignment_loss, *inputs, loss=loss)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, equal_nan=True)


@KERNELS
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("N", "H", "two_way"), WAYS)
def test_kernels_err_no_more_than_plain_torch(
    N: int, H: int, two_way: bool, loss: str, how: str, device: torch.device
) -> None:
    inputs = make_inputs(N, H, torch.float32, device)
    groups = make_groups(N, device)
    actual = launch(how, inputs, groups, loss, 0.4, 0.05, two_way)
    choice = {"loss": loss, "two_way": two_way}
    plain = with_gradient(chain, *inputs, groups, **choice)
    exact = with_gradient(chain, inputs[0].double(), *inputs[1:], groups, **choice)
    for got, same, truth in zip(actual, plain, exact, strict=True):
        if truth.isnan().all():
            assert got.isnan().all()
        else:
            assert_within_error_budget(got, same, truth, floor=2e-6)


# the loss is of fp32 cosines, whatever the words' dtype was
@KERNELS
@pytest.mark.parametrize(
    ("dtype", "loss"), [*product(DTYPES, LOSSES[:1]), *zip(DTYPES[1:], LOSSES[1:], strict=True)]
)
def test_every_dtype(dtype: torch.dtype, loss: str, how: str, device: torch.device) -> None:
    inputs = make_inputs(12, 96, dtype, device)
    actual = launch(how, inputs, None, loss, 0.4, 0.05, True)
    plain = with_gradient(chain, *inputs, None, loss=loss)
    exact = with_gradient(chain, inputs[0].double(), *inputs[1:], None, loss=loss)
    assert [x.dtype for x in actual] == [torch.float32] * 3 + [dtype]
    for got, same, truth in zip(actual, plain, exact, strict=True):
        assert_within_error_budget(got, same, truth, floor=2e-6)


def test_more_pairs_than_few(device: torch.device) -> None:
    inputs = make_inputs(65, 40, torch.float32, device)
    rest = (make_groups(65, device), "infonce", 0.4, 0.05, True)
    whole, chunks = (launch(how, inputs, *rest) for how in ("few", "chunks"))
    for got, expected in zip(chunks, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    exact = with_gradient(chain, inputs[0].double(), *inputs[1:], rest[0])
    for got, truth in zip(whole, exact, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_of_no_word_get_no_gradient(
    dtype: torch.dtype, how: str, device: torch.device
) -> None:
    """A pack may be filled up: what lies beyond its last word is not read, and its gradient is 0."""
    hidden, weight, offsets = make_inputs(6, 24, dtype, device)
    rest = (make_groups(6, device), "infonce", 0.4, 0.05, True)
    expected = launch(how, (hidden, weight, offsets), *rest)
    filled = torch.cat([hidden, torch.full_like(hidden, torch.nan)])
    inputs = (filled, torch.cat([weight, torch.ones_like(weight)]), offsets)
    *results, dhidden = launch(how, inputs, *rest)
    T = len(hidden)
    assert (dhidden[T:] == 0).all()
    for got, same in zip((*results, dhidden[:T]), expected, strict=True):
        assert torch.equal(got, same)
    plain = with_gradient(pooled_alignment_loss, *inputs, rest[0])
    assert (plain[3][T:] == 0).all()
    torch.testing.assert_close(plain[3][:T], expected[3], rtol=1e-2, atol=1e-5)


@KERNELS
@pytest.mark.parametrize("loss", LOSSES[1:])
def test_equally_hard_negatives_share_the_gradient(
    loss: Any, how: str, device: torch.device
) -> None:
    """Targets 1 and 2 are the same word twice: both are the hardest of source 0."""
    hidden = torch.tensor([[3.0, 4], [0, 1], [1, 0], [3, 4.2], [1, 1], [1, 1]], device=device)
    inputs = (hidden, torch.ones(6, device=device), torch.arange(7, device=device))
    actual = launch(how, inputs, None, loss, 0.4, 0.05, True)
    exact = with_gradient(chain, hidden.double(), *inputs[1:], None, loss=loss)
    assert exact[0] > 0
    for got, truth in zip(actual, exact, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        with_gradient(pooled_alignment_loss, *inputs, loss=loss), actual, rtol=1e-5, atol=1e-6
    )


@KERNELS
@pytest.mark.parametrize("loss", LOSSES)
def test_no_negatives(loss: str, how: str, device: torch.device) -> None:
    inputs = make_inputs(5, 16, torch.float32, device)
    same = torch.zeros(2, 5, dtype=torch.int64, device=device)
    value, true, wrong, dhidden = launch(how, inputs, same, loss, 0.4, 0.05, True)
    assert value == 0
    assert true.isfinite()
    assert wrong.isnan()
    assert (dhidden == 0).all()


@KERNELS
@pytest.mark.parametrize("loss", LOSSES)
def test_a_row_of_no_weight_may_be_infinite(loss: str, how: str, device: torch.device) -> None:
    hidden, weight, offsets = make_inputs(6, 16, torch.float32, device)
    expected = launch(how, (hidden, weight, offsets), None, loss, 0.4, 0.05, True)
    hidden[weight == 0] = torch.inf
    assert (weight == 0).any()
    actual = launch(how, (hidden, weight, offsets), None, loss, 0.4, 0.05, True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@KERNELS
@pytest.mark.parametrize("loss", LOSSES)
def test_nan_is_not_swallowed(loss: str, how: str, device: torch.device) -> None:
    inputs = make_inputs(6, 16, torch.float32, device)
    inputs[0][0] = torch.nan
    assert launch(how, inputs, None, loss, 0.4, 0.05, True)[0].isnan()


@KERNELS
def test_extreme_temperatures_stay_finite(how: str, device: torch.device) -> None:
    inputs = make_inputs(6, 16, torch.float32, device)
    for temperature in (1e-4, 1e4):
        results = launch(how, inputs, None, "infonce", 0.4, temperature, True)
        assert all(x.isfinite().all() for x in results)


@KERNELS
def test_strided_inputs(how: str, device: torch.device) -> None:
    hidden, weight, offsets = make_inputs(5, 16, torch.float32, device)
    groups = make_groups(5, device)
    strided = (
        hidden.T.contiguous().T,
        torch.stack([weight, torch.full_like(weight, torch.nan)], 1)[:, 0],
        torch.stack([offsets, offsets + 99], 1)[:, 0],
    )
    arguments = ("infonce", 0.4, 0.05, True)
    dense = launch(how, (hidden, weight, offsets), groups, *arguments)
    other = launch(how, strided, groups.T.contiguous().T, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(dense, other, strict=True))


def test_is_deterministic_bit_for_bit(device: torch.device) -> None:
    inputs = make_inputs(17, 136, torch.bfloat16, device)
    for how in ("few", "many", "chunks"):
        first, again = (launch(how, inputs, None, "infonce", 0.4, 0.05, True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("two_way", [True, False], ids=["two-way", "one-way"])
def test_gradient(loss: Any, two_way: bool) -> None:
    hidden, weight, offsets = make_inputs(4, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: pooled_alignment_loss(
            x, weight, offsets, make_groups(4), loss=loss, two_way=two_way, temperature=0.2
        )[0],
        hidden.requires_grad_(),
    )


def test_backward_multiplies_by_the_incoming_scalar(device: torch.device) -> None:
    """Before rounding: a scaled fp16 loss keeps gradients that would underflow."""
    hidden, weight, offsets = make_inputs(4, 16, torch.float16, device)
    leaf = (1e3 * hidden).requires_grad_()
    loss, true, _ = pooled_alignment_loss(leaf, weight, offsets)
    (plain,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 65536, leaf)
    wide = leaf.detach().float().requires_grad_()
    (exact,) = torch.autograd.grad(pooled_alignment_loss(wide, weight, offsets)[0], wide)
    relative = (scaled.float() / 65536 - exact).norm() / exact.norm()
    assert relative < 1e-3
    assert (plain.float() - exact).norm() / exact.norm() > relative
    assert not true.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grouped", [False, True], ids=["all", "groups"])
def test_operator_contract(dtype: torch.dtype, grouped: bool, device: torch.device) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch agree with the op."""
    hidden, weight, offsets = make_inputs(3, 8, dtype, device)
    groups = make_groups(3, device) if grouped else None
    for most_cosines in (9, 8):
        args = (weight, offsets, groups, "infonce", 0.4, 0.05, True, most_cosines)
        torch.library.opcheck(OPS.pooled_alignment_loss.default, (hidden.requires_grad_(), *args))
        kept = OPS.pooled_alignment_loss.default(hidden.detach(), *args)[3:]
        assert len(kept[2]) == (3 if most_cosines == 9 else 0)
        dloss = torch.tensor(0.5, device=device)
        args = (dloss, *kept, weight, offsets, groups, "infonce", 0.05, dtype, most_cosines)
        torch.library.opcheck(OPS.pooled_alignment_loss_backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool, device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        pooled_alignment_loss, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for N in (3, 5):
        inputs = make_inputs(N, 8, torch.float32, device)
        eager = with_gradient(pooled_alignment_loss, *inputs)
        torch.testing.assert_close(with_gradient(compiled, *inputs), eager, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"hidden": torch.zeros(4)}, r"hidden must be \[T, H\]", id="vector"),
        pytest.param({"weight": torch.ones(3)}, r"got \[4, 2\] and \[3\]", id="short-weight"),
        pytest.param(
            {"weight": torch.ones(4, dtype=torch.bool)}, "floating point, got", id="bool-weight"
        ),
        pytest.param({"offsets": torch.arange(5).int()}, "int64 .* got torch.int32", id="int32"),
        pytest.param({"offsets": torch.tensor([0, 1, 2, 4])}, "got 3 words", id="odd"),
        pytest.param({"offsets": torch.tensor([0])}, "got 0 words", id="no-words"),
        pytest.param({"groups": torch.zeros(2, 3).long()}, r"\[2, 2\], got .* \[2, 3\]", id="N"),
        pytest.param({"groups": torch.zeros(2, 2)}, "got torch.float32", id="float-groups"),
        pytest.param({"loss": "mse"}, "loss must be one of infonce, .* got 'mse'", id="loss"),
        pytest.param({"margin": 0.0}, "must be positive, got 0.0 and 0.05", id="margin"),
        pytest.param({"temperature": -1.0}, "must be positive, got 0.4 and -1.0", id="temperature"),
    ],
)
def test_wrong_argument_is_named_in_the_error(
    change: dict[str, Any], message: str, device: torch.device
) -> None:
    arguments = {
        "hidden": torch.zeros(4, 2),
        "weight": torch.ones(4),
        "offsets": torch.arange(5),
        **change,
    }
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        pooled_alignment_loss(**moved)
