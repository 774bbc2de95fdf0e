from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tli_engine.ops.cross_entropy_rows import cross_entropy_rows_
from tli_engine.testing import assert_within_error_budget

pytest.importorskip("triton")
from tli_engine.kernels.cross_entropy_rows import Tile, launch, tile_for, vector_of
from tli_engine.kernels.cross_entropy_rows import cross_entropy_rows as triton_rows

OP = torch.ops.tli_engine.cross_entropy_rows_.default
BOTH: list[Callable[[Tensor, Tensor], Tensor]] = [OP, triton_rows]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # L, V
    pytest.param(1, 1, id="one-logit"),
    pytest.param(3, 2, id="two"),
    pytest.param(5, 259, id="ragged"),
    pytest.param(4, 1024, id="even-tiles"),
    pytest.param(2, 4096 * 8, id="one-turn-of-halves"),
    pytest.param(2, 4096 * 8 + 1, id="one-past-a-turn"),
    pytest.param(2, 128256, id="8B"),
]


def make_inputs(
    L: int, V: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Logits of which a few stand out, the target's among them in every other row."""
    logits = torch.randn(L, V, device=device) * 3
    targets = torch.randint(0, V, (L,), device=device)
    logits[::2].scatter_add_(1, targets[::2, None], torch.full((L, 1), 8.0, device=device))
    return logits.to(dtype), targets


def plain(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's losses in fp32 at least, and the gradient of their sum."""
    leaf = logits.detach().requires_grad_()
    wide = leaf.to(torch.promote_types(logits.dtype, torch.float32))
    losses = cross_entropy(wide, targets, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("L", "V"), SHAPES)
def test_errs_no_more_than_torch(L: int, V: int, dtype: torch.dtype, device: torch.device) -> None:
    logits, targets = make_inputs(L, V, dtype, device)
    same, exact = plain(logits, targets), plain(logits.double(), targets)
    for function in BOTH:
        grad = logits.clone()
        losses = function(grad, targets)
        assert losses.dtype == torch.float32
        assert_within_error_budget(losses, same[0], exact[0])
        # a gradient is at most 1, and most of it far below
        assert_within_error_budget(grad, same[1], exact[1], floor=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradient_is_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    logits, targets = make_inputs(8, 2000, dtype, device)
    exact = plain(logits.double(), targets)[1].to(dtype)
    for function in BOTH:
        grad = logits.clone()
        function(grad, targets)
        # a last bit of an exponential moves few numbers over a tie
        assert (grad != exact).double().mean() < 0.01


def test_equals_torch_in_fp64() -> None:
    logits, targets = make_inputs(5, 40, torch.float64)
    expected = plain(logits, targets)
    losses = cross_entropy_rows_(logits, targets)
    assert losses.dtype == torch.float64
    torch.testing.assert_close((losses, logits), expected, rtol=1e-13, atol=1e-14)


def test_gradient_is_that_of_finite_differences() -> None:
    logits, targets = make_inputs(3, 7, torch.float64)
    step = 1e-6

    def total(z: Tensor) -> Tensor:
        return cross_entropy_rows_(z.clone(), targets).sum()

    moves = torch.eye(21, dtype=torch.float64).view(21, 3, 7) * step
    slopes = [(total(logits + m) - total(logits - m)) / (2 * step) for m in moves]
    cross_entropy_rows_(logits, targets)
    torch.testing.assert_close(logits.flatten(), torch.stack(slopes), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype: torch.dtype, device: torch.device) -> None:
    """Where exponentials leave fp32's range, and the target is certain, or impossible."""
    logits = torch.tensor(
        [[3e4, 2e4, -3e4, 0.0], [-3e4, -3e4, -3e4, -3e4], [200.0, 199.0, -200.0, 0.0]],
        device=device,
    ).to(dtype)
    for targets in ([0, 1, 0], [2, 3, 2]):
        columns = torch.tensor(targets, device=device)
        expected = plain(logits, columns)
        for function in BOTH:
            grad = logits.clone()
            losses = function(grad, columns)
            torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(grad, expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_infinite_logits(device: torch.device) -> None:
    """Columns that are ruled out have no gradient; more than a thread's share of them too."""
    logits, _ = make_inputs(4, 300, torch.float32, device)
    logits[0, 8:64] = -torch.inf
    logits[1, 70] = torch.inf
    logits[2] = -torch.inf
    targets = torch.tensor([5, 5, 5, 5], device=device)
    expected = plain(logits, targets)
    for function in BOTH:
        grad = logits.clone()
        losses = function(grad, targets)
        torch.testing.assert_close(losses[[0, 3]], expected[0][[0, 3]])
        torch.testing.assert_close(grad[[0, 3]], expected[1][[0, 3]])
        assert (grad[0, 8:64] == 0).all()
        assert losses[1:3].isnan().all()
        assert grad[1].isnan().any()
        assert grad[2].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("column", [0, 5, 299])
def test_a_nan_is_lost_in_its_row_alone(column: int, device: torch.device) -> None:
    logits, targets = make_inputs(3, 300, torch.float32, device)
    targets[1] = 5
    whole = logits.clone()
    logits[1, column] = torch.nan
    for function in BOTH:
        expected, grad = whole.clone(), logits.clone()
        losses, same = function(grad, targets), function(expected, targets)
        assert losses.isnan().tolist() == [False, True, False]
        assert grad[1].isnan().all()
        assert torch.equal(losses[::2], same[::2])
        assert torch.equal(grad[::2], expected[::2])


@pytest.mark.parametrize("target", [-100, -1, 20, 2**31, 2**40])
def test_a_target_out_of_range_makes_its_row_nan(target: int, device: torch.device) -> None:
    logits, targets = make_inputs(3, 20, torch.float16, device)
    targets[1] = target
    for function in BOTH:
        grad = logits.clone()
        losses = function(grad, targets)
        assert losses.isnan().tolist() == [False, True, False]
        assert grad.isnan().all(1).tolist() == [False, True, False]
        assert grad[::2].isfinite().all()


@pytest.mark.parametrize(
    "tile", [Tile(1, 1), Tile(8, 1), Tile(64, 4), Tile(512, 8), Tile(4096, 32)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tile_changes_no_more_than_the_order_of_sums(
    tile: Tile, dtype: torch.dtype, device: torch.device
) -> None:
    logits, targets = make_inputs(3, 300, dtype, device)
    expected = logits.clone()
    losses = triton_rows(expected, targets)
    torch.testing.assert_close(launch(logits, targets, tile), losses, rtol=1e-6, atol=1e-6)
    # a sum's last bit may move a number over a tie
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logits, expected, rtol=2 * eps, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 7, 259, 49152, 128256, 262144])
def test_tiles_fit_a_program(V: int, dtype: torch.dtype) -> None:
    tile = tile_for(V, dtype)
    assert all(n > 0 and n & (n - 1) == 0 for n in tile)
    assert tile.num_warps <= 32
    # no more than four loads of 16 bytes a thread
    assert tile.shares <= 4 * 32 * tile.num_warps
    assert (tile.shares // 2) * vector_of(dtype) < V


@pytest.mark.parametrize("pad", [1, 16])
def test_rows_that_lie_apart(pad: int, device: torch.device) -> None:
    """What lies between is neither read nor written."""
    logits, targets = make_inputs(4, 100, torch.bfloat16, device)
    room = torch.full((6, 100 + 2 * pad), torch.nan, device=device).bfloat16()
    strided_targets = torch.stack([targets, -targets], 1)[:, 0]
    for function in BOTH:
        view = room.clone()[1:5, pad : 100 + pad]
        view.copy_(logits)
        dense = logits.clone()
        losses = function(view, strided_targets)
        assert torch.equal(losses, function(dense, targets))
        assert torch.equal(view, dense)
        around = view._base
        assert around is not None
        assert around.isfinite().sum() == 4 * 100


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_targets_of_either_width(dtype: torch.dtype, device: torch.device) -> None:
    logits, targets = make_inputs(4, 100, torch.float32, device)
    expected = plain(logits, targets)
    for function in BOTH:
        grad = logits.clone()
        losses = function(grad, targets.to(dtype))
        torch.testing.assert_close(losses, expected[0])
        torch.testing.assert_close(grad, expected[1])


def test_same_bits_again(device: torch.device) -> None:
    logits, targets = make_inputs(6, 5000, torch.bfloat16, device)
    results = []
    for _ in range(2):
        grad = logits.clone()
        results.append((triton_rows(grad, targets), grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_rows(device: torch.device) -> None:
    logits, targets = make_inputs(0, 50, torch.bfloat16, device)
    for function in BOTH:
        losses = function(logits, targets)
        assert losses.shape == (0,)
        assert losses.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("L", [1, 5])
def test_operator_contract(L: int, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("fp64 is for a CPU")
    torch.library.opcheck(OP, make_inputs(L, 16, dtype, device))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool, device: torch.device) -> None:
    torch.compiler.reset()

    def chunk(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden @ weight.T
        losses = cross_entropy_rows_(logits, targets)
        return losses, logits @ weight

    compiled = torch.compile(chunk, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    weight = torch.randn(30, 8, device=device)
    for L in (5, 3):
        hidden, targets = torch.randn(L, 8, device=device), torch.arange(L, device=device)
        actual, expected = (f(hidden, weight, targets) for f in (compiled, chunk))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_leaf_may_be_overwritten_where_no_graph_is_made(device: torch.device) -> None:
    logits, targets = make_inputs(3, 8, torch.float32, device)
    expected = plain(logits, targets)
    with torch.no_grad():
        losses = cross_entropy_rows_(logits.requires_grad_(), targets)
    torch.testing.assert_close((losses, logits.detach()), expected)


Z, TARGETS = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((Z[0], TARGETS), r"logits must be \[L, V\], got \[8\]", id="vector"),
        pytest.param((Z[:, :0], TARGETS), r"logits must be \[L, V\], got \[3, 0\]", id="narrow"),
        pytest.param((Z.int(), TARGETS), "logits must be floating point", id="int"),
        pytest.param(
            (torch.zeros(8, 3).T, TARGETS),
            r"logits must have contiguous rows .* got strides \[1, 3\]",
            id="columns",
        ),
        pytest.param((Z[:1].expand(3, 8), TARGETS), r"do not overlap, got .*\[0, 1\]", id="expand"),
        pytest.param((Z, TARGETS[:2]), r"targets must be int32 or int64 \[3\], .*\[2\]", id="few"),
        pytest.param((Z, TARGETS.float()), r"targets must be .* got torch.float32", id="float"),
        pytest.param(
            (Z, TARGETS.to("meta")), "targets must be on cpu as logits, got meta", id="device"
        ),
        pytest.param(
            (Z.clone().requires_grad_(), TARGETS), "logits must not require a gradient", id="leaf"
        ),
    ],
)
def test_wrong_argument_is_named_in_the_error(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy_rows_(*arguments)
