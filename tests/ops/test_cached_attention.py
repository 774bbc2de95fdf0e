"""Attention of one new token a row over what is kept, against sdpa on each row alone in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tli_engine.ops.cached_attention import cached_attention_
from tli_engine.testing import assert_within_error_budget

pytest.importorskip("triton")
from tli_engine.kernels.cached_attention import Tile, columns_of, launch, tile_for
from tli_engine.kernels.cached_attention import cached_attention as triton_attention

OP = torch.ops.tli_engine.cached_attention_.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # rows, heads, key heads, D, slots, slot
    pytest.param(1, 1, 1, 8, 1, 0, id="one-token"),
    pytest.param(3, 8, 2, 32, 80, 64, id="a-whole-tile"),
    pytest.param(2, 6, 2, 64, 150, 129, id="one-past-a-tile"),
    pytest.param(2, 9, 3, 24, 90, 89, id="no-power-of-two"),
    pytest.param(2, 4, 4, 128, 70, 40, id="a-key-a-query"),
    pytest.param(1, 16, 1, 16, 300, 290, id="many-queries"),
    pytest.param(1, 20, 1, 16, 40, 5, id="more-queries-than-a-tile"),
]
Inputs = dict[str, Tensor]


def make_inputs(
    rows: int, heads: int, key_heads: int, D: int, slots: int, slot: int,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> Inputs:  # fmt: skip
    """What a step has; 1e4 lies in every slot that no row sees."""
    # the first row begins with the new token, the last one with the first slot
    begin = torch.linspace(slot, 0, rows).long() if rows > 1 else torch.zeros(1, dtype=torch.int64)
    filled = torch.arange(slots)
    hidden = (filled < begin[:, None]) | (filled >= slot)
    qkv = torch.randn(rows, heads + 2 * key_heads, D).to(dtype)
    found = dict(zip("qkv", qkv.split([heads, key_heads, key_heads], 1), strict=True))
    for name in ("keys", "values"):
        held = torch.randn(rows, slots, key_heads, D)
        found[name] = held.masked_fill(hidden[:, :, None, None], 1e4).to(dtype)
    found |= {"begin": begin, "slot": torch.tensor([slot])}
    return {name: tensor.to(device) for name, tensor in found.items()}


def copy_of(inputs: Inputs) -> Inputs:
    # q, k and v stay views of one projection
    return {n: t if n in "qkv" else t.clone() for n, t in inputs.items()}


def row_by_row(inputs: Inputs, scale: float, window: int | None, dtype: torch.dtype) -> Tensor:
    """Each row alone, from its first visible slot on."""
    q, k, v, keys, values = (inputs[n].to(dtype) for n in ("q", "k", "v", "keys", "values"))
    slot, group, rows = int(inputs["slot"]), q.shape[1] // k.shape[1], []
    for i, begin in enumerate(inputs["begin"].tolist()):
        first = begin if window is None else max(begin, slot - window + 1)
        seen = [
            torch.cat([held[i, first:slot], new[i][None]]).repeat_interleave(group, 1)
            for held, new in ((keys, k), (values, v))
        ]
        heads = (x.transpose(0, 1) for x in (q[i][None], *seen))
        rows.append(scaled_dot_product_attention(*heads, scale=scale)[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 1, 20], ids=lambda w: f"window-{w}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "heads", "key_heads", "D", "slots", "slot"), SHAPES)
def test_errs_no_more_than_sdpa_and_gives_no_weight_to_what_is_hidden(
    rows: int, heads: int, key_heads: int, D: int, slots: int, slot: int, dtype: torch.dtype,
    window: int | None, device: torch.device,
) -> None:  # fmt: skip
    inputs = make_inputs(rows, heads, key_heads, D, slots, slot, dtype, device)
    exact = row_by_row(inputs, 0.3, window, torch.float64)
    same = row_by_row(inputs, 0.3, window, dtype)
    for function in (OP, triton_attention):
        given = copy_of(inputs)
        out = function(*given.values(), 0.3, window)
        assert out.is_contiguous()
        assert out.dtype == dtype
        assert_within_error_budget(out, same, exact)
        check_kept(inputs, given)


def test_the_kernel_does_not_read_what_is_hidden(device: torch.device) -> None:
    for window in (None, 20):
        inputs = make_inputs(3, 8, 2, 32, 80, 64, device=device)
        expected = triton_attention(*copy_of(inputs).values(), 0.3, window)
        for name in ("keys", "values"):
            inputs[name] = inputs[name].masked_fill(inputs[name] == 1e4, torch.nan)
        assert torch.equal(triton_attention(*inputs.values(), 0.3, window), expected)


def check_kept(before: Inputs, after: Inputs) -> None:
    """The new key and value are where they belong, and nothing else has changed."""
    slot = int(before["slot"])
    for held, new in (("keys", "k"), ("values", "v")):
        expected = before[held].clone()
        expected[:, slot] = before[new]
        torch.testing.assert_close(after[held], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("splits", [1, 2, 16])
@pytest.mark.parametrize("block", [16, 64])
def test_tiles_change_no_more_than_rounding(splits: int, block: int, device: torch.device) -> None:
    """Parts that no slot goes into are among them."""
    for shape in ((2, 6, 2, 64, 150, 129), (3, 4, 2, 32, 40, 3)):
        inputs = make_inputs(*shape, dtype=torch.bfloat16, device=device)
        expected = row_by_row(inputs, 0.2, None, torch.float64)
        same = row_by_row(inputs, 0.2, None, torch.bfloat16)
        out = launch(*copy_of(inputs).values(), 0.2, None, Tile(splits, block, 4, 2))
        assert_within_error_budget(out, same, expected)


def test_steps_one_after_the_other(device: torch.device) -> None:
    """Each step reads what those before it have kept."""
    rows, heads, key_heads, D, slots = 2, 4, 2, 16, 40
    for function in (OP, triton_attention):
        torch.manual_seed(0)
        keys, values = torch.zeros(2, rows, slots, key_heads, D, device=device)
        begin = torch.tensor([3, 3], device=device)
        slot = torch.zeros_like(begin[:1])
        for step in range(30):
            q, k, v = torch.randn(rows, heads + 2 * key_heads, D, device=device).split([4, 2, 2], 1)
            slot.fill_(3 + step)
            now = {
                "q": q,
                "k": k,
                "v": v,
                "keys": keys,
                "values": values,
                "begin": begin,
                "slot": slot,
            }
            expected = row_by_row(now, 0.25, 9, torch.float64)
            out = function(*now.values(), 0.25, 9)
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_equals_sdpa_in_fp64() -> None:
    inputs = make_inputs(3, 8, 2, 32, 80, 64, dtype=torch.float64)
    expected = row_by_row(inputs, 0.3, 30, torch.float64)
    found = cached_attention_(**copy_of(inputs), scale=0.3, window=30)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_part_of_a_larger_cache(device: torch.device) -> None:
    inputs = make_inputs(2, 4, 2, 16, 50, 30, device=device)
    for function in (OP, triton_attention):
        room = {n: torch.full((3, 2, 64, 2, 16), 1e4, device=device) for n in ("keys", "values")}
        parts = {name: whole[1, :, :50] for name, whole in room.items()}
        for name, part in parts.items():
            part.copy_(inputs[name])
        found = function(*(inputs | parts).values(), 0.3, None)
        torch.testing.assert_close(found, function(*copy_of(inputs).values(), 0.3, None))
        for whole in room.values():
            assert (whole[[0, 2]] == 1e4).all()
            assert (whole[1, :, 50:] == 1e4).all()


def test_no_rows(device: torch.device) -> None:
    for function in (OP, triton_attention):
        inputs = make_inputs(2, 4, 2, 16, 5, 3, device=device)
        none = {n: t if n == "slot" else t[:0] for n, t in inputs.items()}
        assert function(*none.values(), 0.3, None).shape == (0, 4, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [16, 64, 80, 128, 256])
def test_tiles_fit_and_fill_the_gpu(D: int, dtype: torch.dtype) -> None:
    for rows, heads, slots in ((1, 8, 768), (16, 8, 768), (16, 8, 16384), (64, 8, 256), (1, 1, 1)):
        tile = tile_for(rows, heads, slots, D, dtype)
        assert all(n & (n - 1) == 0 for n in tile[:3])
        # keys and values, three stages of them
        assert 2 * 3 * tile.block * columns_of(D) * dtype.itemsize <= 96 * 1024
        assert tile.splits * rows * heads <= max(528, rows * heads)
        assert tile.splits == 1 or tile.splits * tile.block <= slots
    assert tile_for(16, 8, 768, 128, torch.bfloat16) == Tile(4, 64, 4, 3)
    assert tile_for(1, 8, 768, 128, torch.bfloat16).splits == 8


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_contract(dtype: torch.dtype, window: int | None, device: torch.device) -> None:
    inputs = make_inputs(2, 4, 2, 8, 6, 4, dtype=dtype, device=device)
    # views of one projection may not be told from what is written
    given = [t.clone().nan_to_num() for t in inputs.values()]
    torch.library.opcheck(OP, (*given, 0.3, window))


GIVEN = make_inputs(2, 4, 2, 8, 6, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"q": GIVEN["q"][0]}, r"q must be floating point \[rows, Hq, D\]", id="q"),
        pytest.param({"k": GIVEN["k"][..., :4]}, r"k must be \[2, Hkv, 8\], got", id="k"),
        pytest.param({"q": GIVEN["q"][:, :3]}, "number of heads that divides 3, got 2", id="heads"),
        pytest.param({"v": GIVEN["v"][:1]}, r"v must be \[2, 2, 8\], got \[1, 2, 8\]", id="v"),
        pytest.param({"keys": GIVEN["keys"][0]}, r"keys must be \[2, 'slots', 2, 8\]", id="keys"),
        pytest.param(
            {"values": GIVEN["values"][:, :5]}, r"values must be \[2, 6, 2, 8\]", id="values"
        ),
        pytest.param(
            {"keys": GIVEN["keys"].half()}, "keys must be torch.float32 on cpu", id="dtype"
        ),
        pytest.param(
            {"begin": GIVEN["begin"].int()}, r"begin must be int64 \[2\] on cpu", id="begin"
        ),
        pytest.param({"slot": torch.tensor(4)}, r"slot must be int64 \[1\] on cpu", id="slot"),
        pytest.param({"window": 0}, "window must be at least 1 or None, got 0", id="window"),
    ],
)
def test_wrong_argument_is_named_in_the_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cached_attention_(**{**GIVEN, "scale": 0.3, **changes})
