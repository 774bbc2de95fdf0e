"""LoRA beside frozen products on a GPU: small updates, and the dense product's whole contract."""

import pytest
import torch
from torch import Tensor

from bench.bench_dense_lora_linear import bench_shape
from tli_engine import backends, extension
from tli_engine.nn import NF4Linear
from tli_engine.ops import dense_lora_linear, nf4_quantize
from tli_engine.reference.counter_dropout import counter_dropout
from tli_engine.testing import assert_graph_gives_the_bits, assert_update_is_kept

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HALF = [torch.bfloat16, torch.float16]
SIZES = [
    pytest.param([512, 256, 256], 16, id="q-k-v"),
    pytest.param([768], 16, id="narrow-output"),
    pytest.param([512, 256, 256], 32, id="more-ranks-than-a-launch-takes"),
]


def make_inputs(
    M: int, sizes: list[int], K: int, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(M, K, device="cuda").to(dtype)
    W = (torch.randn(sum(sizes), K, device="cuda") * 0.05).to(dtype)
    A = torch.randn(len(sizes) * rank, K, device="cuda") * 0.05
    return x, W, A, torch.randn(sum(sizes), rank, device="cuda") * 0.1


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("M", [64, 700, 8192])
@pytest.mark.parametrize(("sizes", "rank"), SIZES)
@pytest.mark.parametrize("kind", ["dense", "triton", "cuda"])
def test_small_updates_are_kept(
    kind: str, sizes: list[int], rank: int, M: int, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    x, W, A, B = make_inputs(M, sizes, 2048, rank, dtype)
    if kind == "dense":
        assert_update_is_kept(
            lambda B: dense_lora_linear(x, W, A, B, 1.0, sizes=sizes), x, A, B, sizes
        )
        return
    if kind == "cuda" and not backends.has_extension(x.device):
        pytest.skip(f"needs a Hopper GPU, and the extension, which is {extension.status()}")
    if kind == "cuda" and rank * len(sizes) > 64 and M <= 512:
        pytest.skip("few rows, and more ranks than ride along: added to what is rounded")
    monkeypatch.setenv("TLI_ENGINE_BACKEND", kind)
    layer = NF4Linear(nf4_quantize(W), None)
    assert_update_is_kept(lambda B: layer.lora_forward(x, A, B, 1.0, sizes=sizes), x, A, B, sizes)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("M", [5, 700, 4096])
@pytest.mark.parametrize(("sizes", "rank"), SIZES)
def test_dense_product_and_gradients(
    sizes: list[int], rank: int, M: int, dtype: torch.dtype, dropped: bool
) -> None:
    x, W, A, B = make_inputs(M, sizes, 640, rank, dtype)
    bias, dy = (torch.randn(s, device="cuda").to(dtype) for s in ((len(W),), (M, len(W))))
    seed = torch.tensor(7, device="cuda") if dropped else None

    def run(to: torch.dtype) -> tuple[Tensor, ...]:
        wanted = [t.to(to).requires_grad_() for t in (x, A, B, bias)]
        x_, A_, B_, bias_ = wanted
        s = (x_ if seed is None else counter_dropout(x_, seed, 0.5)) @ A_.T * 2.0
        parts = zip(s.split(rank, 1), B_.split(sizes), strict=True)
        y = torch.nn.functional.linear(x_, W.to(to), bias_)
        y = y + torch.cat([p @ b.T for p, b in parts], 1)
        return y, *torch.autograd.grad(y, wanted, dy.to(to))

    wanted = [t.requires_grad_() for t in (x, A, B, bias)]
    y = dense_lora_linear(x, W, A, B, 2.0, bias, sizes=sizes, dropout=0.5, seed=seed)
    actual = (y, *torch.autograd.grad(y, wanted, dy))
    for got, plain, truth in zip(actual, run(dtype), run(torch.float64), strict=True):
        error = (got.double() - truth).norm() / truth.norm()
        bound = 3 * (plain.double() - truth).norm() / truth.norm() + 1e-3
        assert error <= bound, f"{error:.1e} over {bound:.1e}"


@pytest.mark.parametrize("M", [64, 4096])
def test_dense_product_in_a_graph(M: int) -> None:
    sizes = [512, 256, 256]
    x, W, A, B = make_inputs(M, sizes, 640, 16, torch.bfloat16)
    wanted = [t.requires_grad_() for t in (x, A, B)]
    dy = torch.randn(M, len(W), device="cuda", dtype=torch.bfloat16)
    seed = torch.tensor(3, device="cuda")

    def step() -> tuple[Tensor, ...]:
        y = dense_lora_linear(x, W, A, B, 2.0, sizes=sizes, dropout=0.1, seed=seed)
        return y, *torch.autograd.grad(y, wanted, dy)

    assert_graph_gives_the_bits(step, repeats=1)


@pytest.mark.parametrize("sizes", [[2048, 1024, 1024], [4096]], ids=str)
def test_what_sums_take(sizes: list[int]) -> None:
    """A sum in fp32 of each output, and its rounding; of many ranks one layer's update in fp32 too."""
    M = 4096
    peaks = []
    for rank in (16, 96):
        x, W, A, B = make_inputs(M, sizes, 1024, rank, torch.bfloat16)
        # cuBLAS takes a workspace once
        dense_lora_linear(x, W, A, B, 1.0, sizes=sizes)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = dense_lora_linear(x, W, A, B, 1.0, sizes=sizes)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del y
    N = sum(sizes)
    expected = [6 * M * N, M * (4 * N + max(2 * N, 4 * max(sizes)))]
    assert peaks == pytest.approx(expected, rel=0.1)


def test_every_provider_of_the_bench() -> None:
    pytest.importorskip("peft")
    # stops by itself where outputs or gradients differ
    rows = bench_shape("small", 512, 256, [64, 512], rounds=2)
    assert len(rows) == 2 * 2 * 4
    assert all(row.ms > 0 for row in rows)
