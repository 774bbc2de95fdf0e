"""The Hopper kernel for at most eight rows: every cut, direction and precision, against fp64."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from tli_engine import extension
from tli_engine.kernels.nf4_sm90_dispatch import Gemv, default_gemv, launch
from tli_engine.nf4 import NF4Weight
from tli_engine.ops.nf4_quantize import nf4_quantize
from tli_engine.reference.nf4_records import to_records
from tli_engine.testing import assert_within_error_budget

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0"),
    pytest.mark.skipif(not extension.load(), reason=f"extension {extension.status()}"),
]

# neither is a multiple of 128; 65 row blocks and five columns are shared unevenly
N, K = 65 * 64, 5 * 64
Cut = tuple[int, int, int | None]
# rows a block, split, groups; None: as many groups as blocks
CUTS: list[Cut] = [
    *((64, 1, 1), (64, 1, 7), (64, 1, None), (64, 2, 3), (64, 3, 44), (64, 5, 26), (64, 5, None)),
    *((32, 1, 1), (32, 1, 7), (32, 1, None), (32, 2, 3), (32, 3, 44), (32, 5, None)),
]
HALF = [torch.bfloat16, torch.float16]
directions = pytest.mark.parametrize("transposed", [False, True], ids=["forward", "dx"])
numerics = pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
cuts = pytest.mark.parametrize("cut", CUTS, ids=str)
dtypes = pytest.mark.parametrize("dtype", HALF, ids=str)


@dataclass(frozen=True)
class Product:
    """``x @ W.T`` of a direction; ``W`` is what enters it, ``[rows, contraction]``."""

    W: Tensor
    records: Tensor
    transposed: bool
    exact: bool

    def __call__(
        self,
        x: Tensor,
        plan: list[int],
        *,
        bias: Tensor | None = None,
        lora: tuple[Tensor | None, Tensor | None, list[int]] = (None, None, []),
        scratch: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        scratch = scratch or make_scratch(self, x.shape[0], plan)
        y: Tensor = torch.ops.tli_engine.nf4_gemv_sm90(
            x, self.records, bias, *lora, *self.W.shape, self.transposed, self.exact, plan, *scratch
        )
        return y


def make_scratch(product: Product, m: int, plan: list[int]) -> tuple[Tensor, Tensor]:
    """Workspace full of NaN, and flags of zero; nothing where no sum is shared."""
    _, split, groups = plan if plan[1] > 1 else (0, 0, 0)
    return (
        torch.full((split * product.W.shape[0] * m,), torch.nan, device="cuda"),
        torch.zeros(groups, dtype=torch.int32, device="cuda"),
    )


@cache
def make_product(
    transposed: bool, exact: bool, dtype: torch.dtype, n: int = N, k: int = K
) -> Product:
    weight = nf4_quantize((torch.randn(n, k, device="cuda") * 0.05).to(dtype))
    if exact:
        W = weight.dequantize(dtype)
    else:
        ones = NF4Weight(weight.packed, torch.ones_like(weight.absmax), (n, k), dtype)
        W = ones.dequantize(dtype) * weight.absmax.to(dtype).repeat_interleave(64).view(n, k)
    records = to_records(weight.packed, weight.absmax, n, k, transposed)
    # the kernel reads records ahead of the launch before it
    torch.cuda.synchronize()
    return Product(W.t().contiguous() if transposed else W, records, transposed, exact)


def to_plan(product: Product, cut: Cut) -> list[int]:
    """The cut, within the product's blocks; a CTA takes at most 64 columns of 64."""
    rows, contraction = product.W.shape
    block_rows, split, groups = cut
    return [
        block_rows, max(split, -(-contraction // 4096)), min(groups or rows, rows // block_rows),
    ]  # fmt: skip


def inputs(m: int, product: Product) -> Tensor:
    return torch.randn(m, product.W.shape[1], device="cuda").to(product.W.dtype)


def poison() -> None:
    """Fill memory that is about to be handed out again, as the output, with NaN."""
    junk = [torch.full((n,), torch.nan, device="cuda") for n in (1 << 12, 1 << 16, 1 << 20)]
    del junk


@cuts
@numerics
@dtypes
@directions
def test_product(transposed: bool, dtype: torch.dtype, exact: bool, cut: Cut) -> None:
    product = make_product(transposed, exact, dtype)
    plan = to_plan(product, cut)
    for m in range(1, 9):
        x = inputs(m, product)
        plain, truth = x @ product.W.T, x.double() @ product.W.double().T
        scratch = make_scratch(product, m, plan)
        poison()
        y = product(x, plan, scratch=scratch)
        assert y.is_contiguous()
        assert_within_error_budget(y, plain, truth, floor=1e-4)
        assert not scratch[1].any(), f"flags are not reset: {m} rows"
        # the same flags again, and what the first launch left in the workspace
        assert all(torch.equal(product(x, plan, scratch=scratch), y) for _ in range(2)), m


@cuts
@dtypes
@directions
def test_exact_multiplies_by_bitsandbytes_values(
    transposed: bool, dtype: torch.dtype, cut: Cut
) -> None:
    product = make_product(transposed, True, dtype)
    plan = to_plan(product, cut)
    eye = torch.eye(product.W.shape[1], device="cuda", dtype=dtype)
    decoded = torch.cat([product(rows, plan) for rows in eye.split(7)])
    assert torch.equal(decoded, product.W.T)


@pytest.mark.parametrize(
    "plan",
    [[64, 1, 64], [64, 2, 64], [64, 3, 5], [64, 16, 1], [64, 64, 64], [32, 1, 128], [32, 3, 5]],
    ids=str,
)
@numerics
@directions
def test_long_contraction_goes_round_the_ring(
    transposed: bool, exact: bool, plan: list[int]
) -> None:
    product = make_product(transposed, exact, torch.bfloat16, 4096, 4096)
    for m in (1, 8):
        x = inputs(m, product)
        plain, truth = x @ product.W.T, x.double() @ product.W.double().T
        first = product(x, plan)
        assert_within_error_budget(first, plain, truth, floor=1e-4)
        assert all(torch.equal(product(x, plan), first) for _ in range(10))


@cuts
@dtypes
@directions
def test_bias(transposed: bool, dtype: torch.dtype, cut: Cut) -> None:
    product = make_product(transposed, True, dtype)
    x = inputs(5, product)
    bias = torch.randn(product.W.shape[0], device="cuda").to(dtype)
    truth = x.double() @ product.W.double().T + bias.double()
    plain = torch.nn.functional.linear(x, product.W, bias)
    y = product(x, to_plan(product, cut), bias=bias)
    assert_within_error_budget(y, plain, truth, floor=1e-4)


def groups_of(sizes: list[int], rank: int, b: Tensor) -> Tensor:
    """The block-diagonal matrix that a stack of groups means."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    parts = [b[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return torch.block_diag(*parts)


@cuts
@dtypes
@pytest.mark.parametrize("b_is_fp32", [True, False], ids=["fp32", "half"])
@pytest.mark.parametrize(
    ("sizes", "rank"),
    [
        ([N], 8),
        ([N], 64),
        ([64, N - 64], 16),
        ([1024, 64, N - 1088], 8),
        ([N - 128, 64, 64], 16),
        ([K], 24),
        ([K], 64),
    ],
    ids=str,
)
def test_low_rank_update(
    sizes: list[int],
    rank: int,
    b_is_fp32: bool,
    dtype: torch.dtype,
    cut: Cut,
) -> None:
    transposed = sizes == [K]
    product = make_product(transposed, True, dtype)
    rows, width = product.W.shape[0], rank * len(sizes)
    shape = (width, rows) if transposed else (rows, rank)
    b = torch.randn(shape, device="cuda").to(torch.float32 if b_is_fp32 else dtype)
    bias = torch.randn(rows, device="cuda").to(dtype)
    dense = b.T if transposed else groups_of(sizes, rank, b)
    plan = to_plan(product, cut)
    for m in (1, 7, 8):
        x = inputs(m, product)
        s = torch.randn(m, width, device="cuda").to(dtype)
        # the kernel rounds B to x's dtype
        operands = (x, product.W, s, dense.to(dtype), bias)

        def result(dtype: torch.dtype, operands: tuple[Tensor, ...] = operands) -> Tensor:
            x, W, s, b, bias = (t.to(dtype) for t in operands)
            return x @ W.T + s @ b.T + bias

        plain, truth = result(torch.float32).to(dtype), result(torch.float64)
        y = product(x, plan, bias=bias, lora=(s, b, sizes))
        assert_within_error_budget(y, plain, truth, floor=1e-4)
        assert torch.equal(product(x, plan, bias=bias, lora=(s, b, sizes)), y)


@cuts
def test_replays_from_a_graph_bit_for_bit(cut: Cut) -> None:
    forward, dx = (make_product(t, True, torch.bfloat16, 512, 640) for t in (False, True))
    x = inputs(8, forward)
    plans = [to_plan(p, cut) for p in (forward, dx)]
    scratch = [make_scratch(p, 8, plan) for p, plan in zip((forward, dx), plans, strict=True)]

    def step() -> Tensor:
        # each product reads what the launch before it wrote
        y = x
        for _ in range(4):
            y = forward(y, plans[0], scratch=scratch[0])
            y = dx(y, plans[1], scratch=scratch[1])
        return y

    eager = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        captured.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, eager)
    x.copy_(inputs(8, forward))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, step())
    assert not torch.equal(captured, eager)


@cuts
def test_launches_that_overlap_wait_for_what_they_read(cut: Cut) -> None:
    """The next launch fetches its weights before the one before it is done; x, s and B it may not."""
    forward, dx = (make_product(t, True, torch.bfloat16, 1024, 1024) for t in (False, True))
    x, plan = inputs(8, forward), to_plan(forward, cut)
    A, b = (torch.randn(8, 1024, device="cuda") * 0.02 for _ in range(2))
    # one workspace for all: a launch must not write what the one before still adds up
    scratch = make_scratch(forward, 8, plan)

    def chain(synchronise: bool) -> Tensor:
        y = x
        for i in range(12):
            product = (forward, dx)[i % 2]
            s = y @ A.T.to(y.dtype)
            operand = (b * (i + 1)).T.contiguous() if i % 2 == 0 else A * (i + 1)
            if synchronise:
                torch.cuda.synchronize()
            y = product(y, plan, lora=(s, operand, [1024]), scratch=scratch)
            y = product(y, plan, scratch=scratch)
        return y

    assert torch.equal(chain(False), chain(True))


@pytest.mark.parametrize("plan", [[64, 1, 64], [64, 2, 64], [32, 4, 32]], ids=str)
def test_two_streams_with_their_own_workspaces(plan: list[int]) -> None:
    product = make_product(False, True, torch.bfloat16, 4096, 1024)
    xs = [inputs(8, product) for _ in range(2)]
    expected = [product(x, plan) for x in xs]
    scratch = [make_scratch(product, 8, plan) for _ in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    results: list[list[Tensor]] = [[], []]
    for _ in range(40):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(product(xs[i], plan, scratch=scratch[i]))
    torch.cuda.synchronize()
    for got, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(y, wanted) for y in got)


def published() -> Iterator[tuple[int, int]]:
    """Rows and contraction of large models' projections, with contractions of uneven parts."""
    yield from ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 29568))


@numerics
@directions
@pytest.mark.parametrize(("rows", "contraction"), list(published()), ids=str)
def test_default_cut_of_large_weights(
    rows: int, contraction: int, transposed: bool, exact: bool
) -> None:
    n, k = (contraction, rows) if transposed else (rows, contraction)
    product = make_product.__wrapped__(transposed, exact, torch.bfloat16, n, k)
    count = torch.cuda.get_device_properties(0).multi_processor_count
    cut = default_gemv(rows, contraction, count)
    assert isinstance(cut, Gemv)
    for m in (1, 8):
        x = inputs(m, product)
        plain, truth = x @ product.W.T, x.double() @ product.W.double().T
        y = launch(x, product.records, rows, transposed, not exact, tile=cut)
        assert_within_error_budget(y, plain, truth, floor=1e-4)
        again = launch(x, product.records, rows, transposed, not exact, tile=cut)
        assert torch.equal(again, y)


def test_no_rows() -> None:
    product = make_product(False, True, torch.bfloat16)
    assert product(inputs(0, product), [64, 1, 65]).shape == (0, N)


@directions
def test_operator_contract(transposed: bool) -> None:
    product = make_product(transposed, True, torch.bfloat16)
    x, plan = inputs(8, product), [32, 2, 3]
    args = (x, product.records, None, None, None, [], *product.W.shape, transposed, True, plan)
    torch.library.opcheck(
        torch.ops.tli_engine.nf4_gemv_sm90.default,
        (*args, *make_scratch(product, 8, plan)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_unsafe_arguments_are_refused() -> None:
    product = make_product(False, True, torch.bfloat16)
    x, plan = inputs(8, product), [64, 2, 65]
    workspace, flags = make_scratch(product, 8, plan)
    s, b = x[:, :16].contiguous(), torch.zeros(N, 16, device="cuda")
    refused = [
        ("x must be bf16 or fp16", lambda: product(x.float(), plan)),
        (r"x must be \[m, 320\]", lambda: product(x[:, :64].contiguous(), plan)),
        ("at most 8 rows, got 9", lambda: product(inputs(9, product), plan)),
        ("x must be contiguous", lambda: product(inputs(16, product)[::2], plan)),
        ("bias has a wrong dtype", lambda: product(x, plan, bias=torch.zeros(N, device="cuda"))),
        ("must hold", lambda: product(x, plan, scratch=(workspace[4:].clone(), flags))),
        ("must hold", lambda: product(x, plan, scratch=(workspace, flags[1:].clone()))),
        ("plan must have 3 numbers", lambda: product(x, [2, 65], scratch=(workspace, flags))),
        ("64 or 32 rows, got 16", lambda: product(x, [16, 2, 65])),
        ("split must be 1 to 5, got 6", lambda: product(x, [64, 6, 65])),
        ("groups must be 1 to 65, got 66", lambda: product(x, [64, 2, 66])),
        ("go together", lambda: product(x, plan, lora=(s, None, [N]))),
        (r"lora_b must be \[4160, 8\]", lambda: product(x, plan, lora=(s, b, [64, N - 64]))),
    ]
    for message, call in refused:
        with pytest.raises(RuntimeError, match=message):
            call()
    tall = make_product(False, True, torch.bfloat16, 64, 65 * 64)
    with pytest.raises(RuntimeError, match="split must be 2 to 65, got 1"):
        tall(inputs(1, tall), [64, 1, 1])
