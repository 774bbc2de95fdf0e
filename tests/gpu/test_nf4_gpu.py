"""The NF4 ops on a GPU: every kernel that dispatch can choose, against plain PyTorch in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine import (
    backends,
    extension,
    nf4,
    nf4_dequantize,
    nf4_linear,
    nf4_lora_linear,
    nf4_quantize,
)
from tli_engine.layouts import PortableWeight
from tli_engine.nf4 import NestedAbsmax, NF4Weight
from tli_engine.nn import NF4Linear
from tli_engine.reference.nf4_linear import nf4_linear as reference
from tli_engine.reference.nf4_lora_linear import nf4_lora_linear as lora_reference
from tli_engine.testing import assert_graph_gives_the_bits, assert_within_error_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
EXTENSION = torch.cuda.is_available() and backends.has_extension(torch.device("cuda"))
# tiles for Triton; records for csrc/, alone and with those of the transpose
LAYOUTS = ["tiled", "records", "transposed"]
HALF = [torch.bfloat16, torch.float16]
SHAPES = [  # M, N, K
    pytest.param(1, 64, 128, id="one-token"),
    pytest.param(16, 512, 1024, id="even"),
    pytest.param(17, 1000, 384, id="ragged"),
    pytest.param(64, 4096, 4096, id="split"),
    pytest.param(65, 328, 256, id="one-past-a-tile"),
    pytest.param(130, 777, 640, id="odd-rows"),
    pytest.param(300, 512, 512, id="dequantised-first"),
    pytest.param(5, 96, 192, id="K-no-multiple-of-128"),
    pytest.param(5, 96, 100, id="blocks-across-rows"),
    pytest.param(3, 5, 33, id="odd-everything"),
]


def make_weight(N: int, K: int, dtype: torch.dtype, **options: Any) -> NF4Weight:
    return nf4_quantize((torch.randn(N, K, device="cuda") * 0.05).to(dtype), **options)


def inputs(M: int, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(M, K, device="cuda").to(dtype).requires_grad_()
    bias = torch.randn(N, device="cuda").to(dtype).requires_grad_()
    return x, bias, torch.randn(M, N, device="cuda").to(dtype)


def make_layer(weight: NF4Weight, bias: Tensor | None, layout: str, **options: Any) -> NF4Linear:
    """A layer whose weight lies for the Triton kernels or for the CUDA C++ one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLI_ENGINE_BACKEND", "triton" if layout == "tiled" else "cuda")
        if layout != "tiled" and not EXTENSION:
            pytest.skip(f"needs a Hopper GPU, and the extension, which is {extension.status()}")
        layer = NF4Linear(weight, bias, **options)
    if layout == "transposed":
        layer.add_transposed_copy()
        assert (layer.transposed_nbytes > 0) == (weight.shape[0] % 64 == weight.shape[1] % 64 == 0)
    return layer


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("layout", ["op", *LAYOUTS])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_linear_and_its_gradients(
    M: int, N: int, K: int, dtype: torch.dtype, layout: str, numerics: Any
) -> None:
    weight = make_weight(N, K, dtype)
    x, bias, dy = inputs(M, N, K, dtype)
    if layout == "op":
        y = nf4_linear(x, weight, bias, numerics=numerics)
    else:
        module = make_layer(weight, bias, layout, numerics=numerics)
        assert torch.equal(module.weight.packed, weight.packed)
        assert torch.equal(module.weight.absmax, weight.absmax)
        y = module(x)
    W = weight.dequantize(dtype)
    plain = torch.nn.functional.linear(x, W, bias)
    exact = x.double() @ W.double().T + bias.double()
    # two more roundings of each weight: as much again as the rounding of the result
    factor = 6.0 if numerics == "fast" else 2.0
    assert_within_error_budget(y, plain, exact, factor=factor, floor=1e-5)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_within_error_budget(dx, dy @ W, dy.double() @ W.double(), factor=factor, floor=1e-5)


@pytest.mark.parametrize("layout", ["tiled", "records"])
@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("M", [16, 64, 128])
def test_no_step_overwrites_the_operands_of_the_last(M: int, numerics: Any, layout: str) -> None:
    """A long contraction keeps the tensor cores behind the decoder: what is in flight must be safe."""
    weight = make_weight(28672, 4096, torch.bfloat16)
    layer = make_layer(weight, None, layout, numerics=numerics)
    x = torch.randn(M, 4096, device="cuda", dtype=torch.bfloat16)
    exact = x.float() @ weight.dequantize(torch.float32).T
    first = layer(x)
    assert (first.float() - exact).norm() / exact.norm() < 4e-3
    assert all(torch.equal(layer(x), first) for _ in range(20))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("M", [1, 48, 128, 600])
@pytest.mark.parametrize("sizes", [[512], [256, 128, 128], [384, 128]], ids=str)
@pytest.mark.parametrize("layout", ["op", *LAYOUTS])
def test_lora_and_its_gradients(
    layout: str, sizes: list[int], M: int, dtype: torch.dtype, dropout: float
) -> None:
    N, K, r = sum(sizes), 640, 8
    weight = make_weight(N, K, dtype)
    x, bias, dy = inputs(M, N, K, dtype)
    lora_A = (torch.randn(len(sizes) * r, K, device="cuda") * 0.05).requires_grad_()
    lora_B = (torch.randn(N, r, device="cuda") * 0.05).requires_grad_()
    seed = torch.tensor(11, device="cuda") if dropout else None
    arguments = (weight.packed, weight.absmax)
    adapter = {"sizes": sizes, "dropout": dropout, "seed": seed}
    if layout == "op":
        y = nf4_lora_linear(x, weight, lora_A, lora_B, 2.0, bias, **adapter)
    else:
        layer = make_layer(weight, bias, layout)
        y = layer.lora_forward(x, lora_A, lora_B, 2.0, **adapter)
    wanted = (x, lora_A, lora_B, bias)
    actual = torch.autograd.grad(y, wanted, dy)
    options = (seed, sizes, 2.0, dropout, 64, False, False)

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inside = [t.detach().to(dtype).requires_grad_() for t in (x, lora_A, lora_B, bias)]
        # bitsandbytes' weight in the working dtype, in either precision
        W = weight.dequantize(dy.dtype).to(dtype)
        plain, _ = lora_reference(
            inside[0], *arguments, inside[3] * 0, inside[1], inside[2], *options
        )
        base, _ = lora_reference(
            inside[0], *arguments, inside[3] * 0, inside[1] * 0, inside[2], *options
        )
        out = plain - base + torch.nn.functional.linear(inside[0], W, inside[3])
        if dtype != torch.float64:
            return out, *torch.autograd.grad(out, inside, dy)
        return out, *torch.autograd.grad(out, inside, dy.double())

    same, exact = run(dtype), run(torch.float64)
    for got, plain, truth in zip((y, *actual), same, exact, strict=True):
        error = (got.double() - truth).norm() / truth.norm()
        bound = 3 * (plain.double() - truth).norm() / truth.norm() + 1e-3
        assert error <= bound, f"{error:.1e} over {bound:.1e}"


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(300, 128), (33, 130), (7, 129), (3, 4, 96), (1, 1)], ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_quantise_and_dequantise_bits(
    shape: tuple[int, ...], dtype: torch.dtype, double_quant: bool, block_size: int
) -> None:
    dense = (torch.randn(shape, device="cuda") * 0.02).to(dtype)
    actual = nf4_quantize(dense, block_size=block_size, double_quant=double_quant)
    expected = nf4.quantize(dense.cpu(), block_size=block_size, double_quant=double_quant)
    assert torch.equal(actual.packed.cpu(), expected.packed)
    assert torch.equal(actual.absmax.cpu(), expected.absmax)
    for out in (*HALF, torch.float32):
        assert torch.equal(nf4_dequantize(actual, out).cpu(), expected.dequantize(out))


@pytest.mark.parametrize("compressed", [False, True])
def test_dequantises_as_bitsandbytes_does(compressed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    dense = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(
        dense, blocksize=64, quant_type="nf4", compress_statistics=compressed
    )
    nested = None
    if compressed:
        inner = state.state2
        nested = NestedAbsmax(inner.absmax, inner.code, state.offset, inner.blocksize)
    weight = NF4Weight(packed, state.absmax, (512, 1024), torch.bfloat16, nested=nested)
    assert torch.equal(nf4_dequantize(weight), functional.dequantize_4bit(packed, state))
    layer = NF4Linear(weight)
    eye = torch.eye(64, 1024, device="cuda", dtype=torch.bfloat16)
    # every product has one term: the values that enter it are seen as they are
    assert torch.equal(layer(eye), functional.dequantize_4bit(packed, state).T[:64])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M", [16, 600])
def test_step_replays_from_a_graph_bit_for_bit(M: int, layout: str) -> None:
    layer = make_layer(make_weight(512, 640, torch.bfloat16), None, layout)
    x, _, dy = inputs(M, 512, 640, torch.bfloat16)
    lora_A = (torch.randn(8, 640, device="cuda") * 0.05).requires_grad_()
    lora_B = (torch.randn(512, 8, device="cuda") * 0.05).requires_grad_()
    seed = torch.tensor(3, device="cuda")

    def step() -> tuple[Tensor, ...]:
        y = layer.lora_forward(x, lora_A, lora_B, 2.0, dropout=0.1, seed=seed)
        return y, *torch.autograd.grad(y, (x, lora_A, lora_B), dy)

    captured, graph = assert_graph_gives_the_bits(step, repeats=1)
    first = captured[0].clone()
    # the seed is read in the graph: another one is another mask
    seed.fill_(4)
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(captured[0], first)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_absmax_that_is_not_finite_reaches_its_rows_only(bad: float) -> None:
    weight = make_weight(256, 256, torch.bfloat16)
    weight.absmax[5] = bad
    x = torch.randn(16, 256, device="cuda", dtype=torch.bfloat16)
    y = nf4_linear(x, weight)
    row = 5 * 64 // 256
    assert not y[:, row].isfinite().any()
    kept = [n for n in range(256) if n != row]
    assert y[:, kept].isfinite().all()


def test_sizes_past_32_bits() -> None:
    N, K = 139264, 16384
    weight = NF4Weight(
        torch.randint(0, 256, (N * K // 2, 1), dtype=torch.uint8, device="cuda"),
        torch.rand(N * K // 64, device="cuda") * 0.01,
        (N, K),
        torch.bfloat16,
    )
    assert N * K > 2**31
    x = torch.randn(16, K, device="cuda", dtype=torch.bfloat16)
    dense = nf4_dequantize(weight)
    last = dense[-64:]
    expected = nf4.NF4Weight(
        weight.packed[-64 * K // 2 :], weight.absmax[-64 * K // 64 :], (64, K), torch.bfloat16
    ).dequantize()
    assert torch.equal(last, expected)
    for y in (nf4_linear(x, weight), NF4Linear(weight)(x)):
        torch.testing.assert_close(
            y[:, -64:].float(), x.float() @ last.float().T, rtol=2e-2, atol=1e-2
        )
    y = torch.randn(16, N, device="cuda", dtype=torch.bfloat16)
    tiled = PortableWeight(weight)
    dx = torch.ops.tli_engine.nf4_linear_dx.default(
        y, tiled.packed, tiled.absmax, K, 64, True, False
    )
    exact = y @ dense
    assert (dx - exact).float().norm() / exact.float().norm() < 1e-2


def test_operator_contract() -> None:
    weight = make_weight(96, 256, torch.bfloat16)
    x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    args = (x, weight.packed, weight.absmax, None, 96, 64, False, False)
    torch.library.opcheck(torch.ops.tli_engine.nf4_linear.default, args)


def test_resident_copy_gives_the_same_function() -> None:
    weight = make_weight(256, 512, torch.bfloat16)
    x = torch.randn(600, 512, device="cuda", dtype=torch.bfloat16)
    # at so many rows these tiles are decoded for cuBLAS too
    assert weight_residencies_agree(weight, x, "tiled")
    if EXTENSION:
        kept = make_layer(weight, None, "records", weight_residency="bf16")
        error = (make_layer(weight, None, "records")(x) - kept(x)).norm() / kept(x).norm()
        assert error < 4e-3


def weight_residencies_agree(weight: NF4Weight, x: Tensor, layout: str) -> bool:
    plain = make_layer(weight, None, layout)
    kept = make_layer(weight, None, layout, weight_residency="bf16")
    assert torch.equal(kept(x), plain(x))
    assert kept.nbytes == plain.nbytes + weight.shape[0] * weight.shape[1] * 2
    return torch.equal(make_layer(weight, None, layout, weight_residency="auto")(x), kept(x))


def test_mixed_devices_are_named_in_the_error() -> None:
    weight = make_weight(64, 128, torch.bfloat16)
    with pytest.raises(ValueError, match="x must be on cuda:0 as the weight, got cpu"):
        nf4_linear(torch.zeros(1, 128, dtype=torch.bfloat16), weight)
    with pytest.raises(ValueError, match=r"weight\.absmax must be on cuda:0"):
        nf4_linear(
            torch.zeros(1, 128, device="cuda", dtype=torch.bfloat16),
            NF4Weight(weight.packed, weight.absmax.cpu(), (64, 128), torch.bfloat16),
        )


def test_no_rows() -> None:
    weight = make_weight(64, 128, torch.bfloat16)
    x = torch.empty(0, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = nf4_linear(x, weight)
    assert y.shape == (0, 64)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == (0, 128)
    plain, _ = torch.ops.tli_engine.nf4_lora_linear.default(
        x.detach(), weight.packed, weight.absmax, None, torch.zeros(4, 128, device="cuda"),
        torch.zeros(64, 4, device="cuda"), None, [64], 1.0, 0.0, 64, False, False,
    )  # fmt: skip
    assert plain.shape == (0, 64)
    assert reference(x.detach(), weight.packed, weight.absmax, None, 64, 64, False, False).shape == (
        0, 64,
    )  # fmt: skip
