"""The Hopper kernel: every tile, direction, precision and way to share work, against fp64."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from tli_engine import extension
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

SMS = torch.cuda.get_device_properties(0).multi_processor_count if HOPPER else 0
TILES = [  # block_m, blocks_per_warpgroup, warpgroups, ctas_per_sm, cluster
    (16, 1, 4, 1, 1), (16, 1, 2, 1, 1), (16, 1, 2, 2, 1), (32, 1, 4, 1, 1), (64, 1, 2, 1, 1),
    (64, 1, 4, 1, 1), (128, 1, 2, 1, 1), (128, 2, 2, 1, 1), (256, 1, 2, 1, 1),
    (128, 1, 2, 1, 2), (256, 1, 2, 1, 2),
]  # fmt: skip
CUTS = [  # mode, split, CTAs or clusters: whole tiles; evenly among 7, or all; in 2 and 3 parts
    (0, 1, 0), (0, 1, 7), (0, 1, SMS), (1, 2, 0), (1, 3, 0),
]  # fmt: skip
# neither is a multiple of a tile, nor of 128; of both, a cluster's last CTA has no rows
N, K = 65 * 64, 5 * 64
HALF = [torch.bfloat16, torch.float16]
directions = pytest.mark.parametrize("transposed", [False, True], ids=["forward", "dx"])
tiles = pytest.mark.parametrize("tile", TILES, ids=str)
clustered = pytest.mark.parametrize("tile", [t for t in TILES if t[4] > 1], ids=str)
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
        spec: list[int],
        *,
        bias: Tensor | None = None,
        lora: tuple[Tensor | None, Tensor | None, list[int]] = (None, None, []),
        scratch: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        scratch = scratch or make_scratch(self, x, spec)
        y: Tensor = torch.ops.tli_engine.nf4_linear_sm90(
            x, self.records, bias, *lora, *self.W.shape, self.transposed, self.exact, spec, *scratch
        )
        return y


def make_scratch(product: Product, x: Tensor, spec: list[int]) -> tuple[Tensor, Tensor]:
    """Workspace full of NaN, and flags of zero."""
    rows, m = product.W.shape[0], x.shape[0]
    floats, flags = torch.ops.tli_engine.nf4_linear_sm90_workspace(rows, m, spec, SMS)
    return (
        torch.full((floats,), torch.nan, device="cuda"),
        torch.zeros(flags, dtype=torch.int32, device="cuda"),
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


def spec_of(tile: tuple[int, ...], cut: tuple[int, ...]) -> list[int]:
    """What the op takes."""
    cluster = tile[4]
    grid = min(cut[2] * cluster, SMS // cluster * cluster)
    return [*tile[:4], *cut[:2], grid, cluster]


def specs(product: Product, m: int, tile: tuple[int, ...]) -> Iterator[list[int]]:
    """Every way to share the work that fits on the device and the sizes."""
    rows, contraction = product.W.shape
    count = -(-m // tile[0]) * -(-rows // (64 * tile[1] * tile[2] * tile[4])) * tile[4]
    for cut in CUTS:
        if cut[0] == 1 and (count * cut[1] > SMS * tile[3] or cut[1] > -(-contraction // 128)):
            continue
        yield spec_of(tile, cut)


def inputs(m: int, product: Product) -> Tensor:
    return torch.randn(m, product.W.shape[1], device="cuda").to(product.W.dtype)


@tiles
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@dtypes
@directions
def test_product(transposed: bool, dtype: torch.dtype, exact: bool, tile: tuple[int, ...]) -> None:
    product = make_product(transposed, exact, dtype)
    modes = set()
    for m in (1, 16, 77, 130, 300):
        x = inputs(m, product)
        plain, truth = x @ product.W.T, x.double() @ product.W.double().T
        for spec in specs(product, m, tile):
            modes.add(spec[4])
            scratch = make_scratch(product, x, spec)
            y = product(x, spec, scratch=scratch)
            assert y.is_contiguous()
            assert_within_error_budget(y, plain, truth, floor=1e-4)
            assert not scratch[1].any(), f"flags are not reset: {spec}"
            # the same flags again, and what the first launch left in the workspace
            assert all(torch.equal(product(x, spec, scratch=scratch), y) for _ in range(2)), spec
    assert modes == {0, 1}


@tiles
@dtypes
@directions
def test_exact_multiplies_by_bitsandbytes_values(
    transposed: bool, dtype: torch.dtype, tile: tuple[int, ...]
) -> None:
    product = make_product(transposed, True, dtype)
    eye = torch.eye(product.W.shape[1], device="cuda", dtype=dtype)
    assert torch.equal(product(eye, spec_of(tile, (0, 1, 0))), product.W.T)


@tiles
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@directions
def test_long_contraction_goes_round_the_stages(
    transposed: bool, exact: bool, tile: tuple[int, ...]
) -> None:
    product = make_product(transposed, exact, torch.bfloat16, 4096, 4096)
    x = inputs(tile[0] + 8, product)
    plain, truth = x @ product.W.T, x.double() @ product.W.double().T
    for spec in specs(product, x.shape[0], tile):
        first = product(x, spec)
        assert_within_error_budget(first, plain, truth, floor=1e-4)
        assert all(torch.equal(product(x, spec), first) for _ in range(10)), spec


@clustered
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@directions
def test_clusters_change_no_bit(transposed: bool, exact: bool, tile: tuple[int, ...]) -> None:
    """Of many rows, whose tiles are cut as they are for single CTAs: the sums are the same."""
    product = make_product(transposed, exact, torch.bfloat16, 29 * 64, 37 * 64)
    rows = product.W.shape[0]
    bias = torch.randn(rows, device="cuda").to(torch.bfloat16)
    b = torch.randn((16, rows) if transposed else (rows, 16), device="cuda")
    for m in (1, 200, 256, 321, 512):
        x = inputs(m, product)
        lora = (x[:, :16].contiguous(), b, [rows])
        blocks = -(-m // tile[0]) * -(-rows // 256) * 2
        for cut in ((0, 1, 0), (1, 2, 0), (1, 5, 0)):
            if blocks * cut[1] > SMS:
                continue
            single = product(x, spec_of((*tile[:4], 1), cut), bias=bias, lora=lora)
            for _ in range(20):
                assert torch.equal(product(x, spec_of(tile, cut), bias=bias, lora=lora), single)


@clustered
def test_clusters_go_through_many_tiles(tile: tuple[int, ...]) -> None:
    """More than there are clusters, cut evenly at the end, and after one another in a stream."""
    product = make_product(False, False, torch.bfloat16, 4096, 4096)
    x = inputs(2100, product)
    plain, truth = x @ product.W.T, x.double() @ product.W.double().T
    for cut in ((0, 1, 0), (0, 1, 7), (0, 1, 50), (0, 1, SMS)):
        first = product(x, spec_of(tile, cut))
        assert_within_error_budget(first, plain, truth, floor=1e-4)
        assert all(torch.equal(product(x, spec_of(tile, cut)), first) for _ in range(20)), cut


@dtypes
@directions
@tiles
def test_bias(tile: tuple[int, ...], transposed: bool, dtype: torch.dtype) -> None:
    product = make_product(transposed, True, dtype)
    x = inputs(77, product)
    bias = torch.randn(product.W.shape[0], device="cuda").to(dtype)
    truth = x.double() @ product.W.double().T + bias.double()
    plain = torch.nn.functional.linear(x, product.W, bias)
    for spec in specs(product, 77, tile):
        assert_within_error_budget(product(x, spec, bias=bias), plain, truth, floor=1e-4)


@tiles
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
    ],
    ids=str,
)
def test_low_rank_update(
    sizes: list[int], rank: int, b_is_fp32: bool, dtype: torch.dtype, tile: tuple[int, ...]
) -> None:
    transposed = sizes == [K]
    product = make_product(transposed, True, dtype)
    rows, width = product.W.shape[0], rank * len(sizes)
    shape = (width, rows) if transposed else (rows, rank)
    b = torch.randn(shape, device="cuda").to(torch.float32 if b_is_fp32 else dtype)
    x, bias = inputs(77, product), torch.randn(rows, device="cuda").to(dtype)
    s = torch.randn(77, width, device="cuda").to(dtype)
    if transposed:
        dense = b.T
    else:
        ends = torch.tensor(sizes).cumsum(0).tolist()
        parts = [b[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        dense = torch.block_diag(*parts)
    # the kernel rounds B to x's dtype
    operands = (x, product.W, s, dense.to(dtype), bias)

    def result(dtype: torch.dtype) -> Tensor:
        x, W, s, b, bias = (t.to(dtype) for t in operands)
        return x @ W.T + s @ b.T + bias

    plain, truth = result(torch.float32).to(dtype), result(torch.float64)
    for spec in specs(product, 77, tile):
        y = product(x, spec, bias=bias, lora=(s, b, sizes))
        assert_within_error_budget(y, plain, truth, floor=1e-4)
        assert torch.equal(product(x, spec, bias=bias, lora=(s, b, sizes)), y)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("tile", [TILES[0], *TILES[-2:]], ids=str)
def test_replays_from_a_graph_bit_for_bit(tile: tuple[int, ...], cut: tuple[int, ...]) -> None:
    forward, dx = (make_product(t, True, torch.bfloat16, 512, 640) for t in (False, True))
    spec = spec_of(tile, cut)
    x = inputs(16, forward)
    scratch = [make_scratch(p, x, spec) for p in (forward, dx)]

    def step() -> Tensor:
        # each product reads what the launch before it wrote
        y = x
        for _ in range(4):
            y = dx(forward(y, spec, scratch=scratch[0]), spec, scratch=scratch[1])
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
    x.copy_(inputs(16, forward))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, step())
    assert not torch.equal(captured, eager)


@tiles
def test_launches_that_overlap_wait_for_what_they_read(tile: tuple[int, ...]) -> None:
    """The next launch fetches its weights before the one before it is done; x, s and B it may not."""
    forward, dx = (make_product(t, True, torch.bfloat16, 1024, 1024) for t in (False, True))
    x = inputs(64, forward)
    A, b = (torch.randn(8, 1024, device="cuda") * 0.02 for _ in range(2))

    def chain(synchronise: bool) -> Tensor:
        y = x
        for i in range(12):
            product = (forward, dx)[i % 2]
            s = y @ A.T.to(y.dtype)
            operand = (b * (i + 1)).T.contiguous() if i % 2 == 0 else A * (i + 1)
            if synchronise:
                torch.cuda.synchronize()
            y = product(y, spec_of(tile, (0, 1, 7)), lora=(s, operand, [1024]))
            y = product(y, spec_of(tile, (0, 1, 0)))
        return y

    assert torch.equal(chain(False), chain(True))


@pytest.mark.parametrize("cut", [(0, 1, 0), (0, 1, SMS), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("tile", [(64, 1, 2, 1, 1), *TILES[-2:]], ids=str)
def test_two_streams_with_their_own_workspaces(tile: tuple[int, ...], cut: tuple[int, ...]) -> None:
    product = make_product(False, True, torch.bfloat16, 4096, 1024)
    spec = spec_of(tile, cut)
    xs = [inputs(64, product) for _ in range(2)]
    expected = [product(x, spec) for x in xs]
    scratch = [make_scratch(product, x, spec) for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    results: list[list[Tensor]] = [[], []]
    for _ in range(40):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(product(xs[i], spec, scratch=scratch[i]))
    torch.cuda.synchronize()
    for got, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(y, wanted) for y in got)


def test_no_rows() -> None:
    product = make_product(False, True, torch.bfloat16)
    empty = inputs(0, product)
    none = torch.empty(0, device="cuda"), torch.empty(0, dtype=torch.int32, device="cuda")
    assert product(empty, [16, 1, 4, 1, 0, 1, 0], scratch=none).shape == (0, N)


@directions
def test_operator_contract(transposed: bool) -> None:
    product = make_product(transposed, True, torch.bfloat16)
    x = inputs(16, product)
    spec = [16, 1, 4, 1, 0, 1, 0]
    args = (x, product.records, None, None, None, [], *product.W.shape, transposed, True, spec)
    torch.library.opcheck(
        torch.ops.tli_engine.nf4_linear_sm90.default,
        (*args, *make_scratch(product, x, spec)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_unsafe_arguments_are_refused() -> None:
    product = make_product(False, True, torch.bfloat16)
    x = inputs(16, product)
    spec = [16, 1, 4, 1, 1, 2, 0]
    workspace, flags = make_scratch(product, x, spec)
    s, b = x[:, :16].contiguous(), torch.zeros(N, 16, device="cuda")
    refused = [
        ("x must be bf16 or fp16", lambda: product(x.float(), spec)),
        (r"x must be \[m, 320\]", lambda: product(x[:, :64].contiguous(), spec)),
        ("x must be contiguous", lambda: product(inputs(32, product)[::2], spec)),
        ("x must be aligned", lambda: product(x.view(-1)[1 : 1 + 15 * K].view(15, K), spec)),
        ("bias has a wrong dtype", lambda: product(x, spec, bias=torch.zeros(N, device="cuda"))),
        (r"bias must be \[4160\]", lambda: product(x, spec, bias=x[0])),
        ("must hold", lambda: product(x, spec, scratch=(workspace[1:].clone(), flags))),
        ("must hold", lambda: product(x, spec, scratch=(workspace, flags[1:].clone()))),
        ("no kernel was compiled", lambda: product(x, [48, 1, 4, 1, 0, 1, 0])),
        ("no kernel was compiled", lambda: product(x, [16, 1, 4, 1, 0, 1, 0, 2])),
        ("tile must have 8 numbers", lambda: product(x, spec[:6], scratch=(workspace, flags))),
        ("split must be at most 3", lambda: product(x, [16, 1, 4, 1, 1, 4, 0])),
        ("do not fit", lambda: product(x, [16, 1, 4, 1, 0, 1, 1000])),
        ("go together", lambda: product(x, spec, lora=(s, None, [N]))),
        ("add up to rows", lambda: product(x, spec, lora=(s, b, [N - 64]))),
        ("width must be 8", lambda: product(x, spec, lora=(x[:, :12].contiguous(), b, [N]))),
        (r"lora_b must be \[4160, 8\]", lambda: product(x, spec, lora=(s, b, [64, N - 64]))),
    ]
    for message, call in refused:
        with pytest.raises(RuntimeError, match=message):
            call()
    wrong = Product(product.W, product.records[:, :4], False, True)
    with pytest.raises(RuntimeError, match="records must be contiguous"):
        wrong(x, spec)
