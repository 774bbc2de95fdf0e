import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.layouts import Adapter, PortableWeight, RecordedWeight
from tli_engine.nf4 import quantize

pytest.importorskip("triton")
from tli_engine.kernels.nf4_records import dequantize_records

N, K, R = 192, 320, 8
CPU = torch.device("cpu")


def make_layouts(**options: Any) -> tuple[PortableWeight, RecordedWeight]:
    weight = quantize(torch.randn(N, K) * 0.05, **options)
    return PortableWeight(weight), RecordedWeight(weight)


def make_adapter(groups: list[int], dropout: float = 0.0, rank: int = R) -> Adapter:
    A, B = torch.randn(len(groups) * rank, K) * 0.1, torch.randn(N, rank) * 0.1
    seed = torch.tensor(3) if dropout else None
    return Adapter(A.requires_grad_(), B.requires_grad_(), seed, groups, 2.0, dropout)


@pytest.mark.parametrize("double_quant", [False, True])
def test_records_give_the_weight_back_and_count_their_bytes(double_quant: bool) -> None:
    weight = quantize(torch.randn(N, K) * 0.05, double_quant=double_quant)
    stored = RecordedWeight(weight)
    alone = stored.nbytes
    stored.add_transposed_copy()
    back = stored.weight()
    assert torch.equal(back.packed, weight.packed)
    assert torch.equal(back.absmax, weight.absmax)
    assert torch.equal(back.dequantize(), weight.dequantize())
    # K is filled up to 384, N to 256: 2304 bytes for 64 x 64
    assert stored.transposed_nbytes == 5 * 4 * 2304
    # double quantised statistics are kept beside the decoded ones
    kept = weight.nbytes - weight.packed.nbytes if double_quant else 0
    assert alone == 3 * 6 * 2304 + kept
    assert stored.nbytes == alone + stored.transposed_nbytes
    again = copy.deepcopy(stored)
    assert torch.equal(again.records, stored.records)
    assert again.records.data_ptr() != stored.records.data_ptr()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("groups", [[N], [64, 128]], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_same_function_and_gradients_as_the_portable_layout(
    transposed: bool, groups: list[int], dropout: float
) -> None:
    portable, recorded = make_layouts()
    if transposed:
        recorded.add_transposed_copy()
    adapter, bias = make_adapter(groups, dropout), torch.randn(N).requires_grad_()
    x, dy = torch.randn(5, K).requires_grad_(), torch.randn(5, N)
    wanted: tuple[Tensor, ...] = (x, adapter.lora_A, adapter.lora_B, bias)
    results = []
    for stored in (portable, recorded):
        y = stored.adapted(x, bias, adapter, False)
        results.append((y.detach(), *torch.autograd.grad(y, wanted, dy)))
        plain = stored.product(x, bias, False)
        results[-1] += (plain.detach(), *torch.autograd.grad(plain, (x, bias), dy))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("M", [0, 3])
def test_operator_contract(M: int, adapted: bool) -> None:
    _, recorded = make_layouts()
    recorded.add_transposed_copy()
    A, B, _, sizes, *_ = make_adapter([64, 128])
    x, bias = torch.randn(M, K).requires_grad_(), torch.randn(N).requires_grad_()
    adapter = (
        (A, B, torch.tensor(5), sizes, 0.7, 0.3) if adapted else (None, None, None, [], 1.0, 0.0)
    )
    args = (x, recorded.records, recorded.transposed, bias, *adapter, N, False)
    torch.library.opcheck(torch.ops.tli_engine.nf4_linear_records.default, args)
    s = torch.randn(M, 2 * R if adapted else 0)
    detached = tuple(t.detach() if isinstance(t, Tensor) else t for t in adapter)
    kept = x.detach() if adapted else None
    args = (torch.randn(M, N), kept, s, recorded.records, None, *detached, K, False, True, adapted)
    torch.library.opcheck(torch.ops.tli_engine.nf4_linear_records_backward.default, args)


def test_gradients_of_the_definition() -> None:
    _, recorded = make_layouts()
    adapter = make_adapter([64, 128], 0.3)
    A, B = (t.detach().double().requires_grad_() for t in adapter[:2])
    x = torch.randn(2, K, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, A, B: recorded.adapted(x, None, Adapter(A, B, *adapter[2:]), False),
        (x, A, B),
        fast_mode=True,
    )
    assert torch.autograd.gradgradcheck(
        lambda x, A, B: recorded.adapted(x, None, Adapter(A, B, *adapter[2:]), False),
        (x, A, B),
        fast_mode=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_records_decode_to_the_weight_bit_for_bit(dtype: torch.dtype, device: torch.device) -> None:
    weight = quantize(torch.randn(128, K, device=device) * 0.05)
    recorded = RecordedWeight(weight)
    dense = dequantize_records(recorded.records, 128, K, dtype)
    assert torch.equal(dense, weight.dequantize(dtype))


@pytest.mark.parametrize("kind", [PortableWeight, RecordedWeight])
def test_second_derivative_of_the_frozen_product(kind: Any) -> None:
    stored = kind(quantize(torch.randn(N, K) * 0.05))
    x, dy = torch.randn(3, K).requires_grad_(), torch.randn(3, N).requires_grad_()
    (dx,) = torch.autograd.grad(stored.product(x, None, False), x, dy, create_graph=True)
    (ddy,) = torch.autograd.grad(dx.sum(), dy)
    expected = torch.ones(3, K) @ stored.weight().dequantize().T
    torch.testing.assert_close(ddy, expected)


def test_the_way_back_through_an_adapter_has_no_derivative_by_itself() -> None:
    _, recorded = make_layouts()
    A, B, *options = make_adapter([N])
    x, dy, s = torch.randn(3, K), torch.randn(3, N).requires_grad_(), torch.randn(3, R)
    args = (dy, x, s, recorded.records, None, A, B, *options, K, False, True, True)
    with pytest.raises(NotImplementedError, match="with an adapter has no derivative"):
        torch.ops.tli_engine.nf4_linear_records_backward.default(*args)


# fused: the adapter rides along in the extension's product; beside: it does not; decoded: cuBLAS, whose
# sums in fp32 it is added to; appended: cuBLAS, with the adapter in its contraction
WAYS = [  # way, M, groups, rank
    *(
        pytest.param(way, 5, groups, R, id=f"{way}-{len(groups)}")
        for way in ("fused", "decoded", "appended")
        for groups in ([N], [64, 128])
    ),
    pytest.param("beside", 128, [100, 92], R, id="groups-that-end-in-a-block"),
    pytest.param("beside", 5, [N], 12, id="ranks-no-multiple-of-8"),
    pytest.param("beside", 5, [64, 64, 64], 24, id="more-ranks-than-a-launch-takes"),
    pytest.param("decoded", 129, [100, 92], R, id="groups-that-end-in-a-block-of-many-rows"),
    pytest.param("decoded", 129, [64, 64, 64], 24, id="more-ranks-of-many-rows"),
]


def make_launch(recorded: RecordedWeight, seen: list[str]) -> Any:
    """The product that needs a Hopper GPU, by its definition; ``seen``: what was launched."""
    dense = recorded.weight().dequantize(torch.float16)

    def launch(
        x: Tensor, records: Tensor, rows: int, transposed: bool, fast: bool, tile: str,
        bias: Tensor | None = None, lora: Any = None,
    ) -> Tensor:  # fmt: skip
        assert tile == "tile"
        assert records is (recorded.transposed if transposed else recorded.records)
        seen.append("fused" if lora is not None else "beside")
        y = torch.nn.functional.linear(x, dense.T if transposed else dense, bias)
        if lora is not None:
            s, b, sizes = lora
            b = b.to(x.dtype)
            parts = [b] if transposed else [p.T for p in b.split(sizes)]
            s = s.split(s.shape[1] // len(parts), 1)
            y = y + torch.cat([t @ p for t, p in zip(s, parts, strict=True)], 1)
        return y

    return launch


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("way", "M", "groups", "rank"), WAYS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels run in the interpreter")
def test_launcher_composes_the_definition(
    way: str, M: int, groups: list[int], rank: int, dropout: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The product itself, which needs a Hopper GPU, is the reference's."""
    from tli_engine.kernels import nf4_linear_records_sm90 as launcher
    from tli_engine.kernels.nf4_linear_records_backward_sm90 import nf4_linear_records_backward

    _, recorded = make_layouts()
    recorded.add_transposed_copy()
    seen: list[str] = []
    for name, by_cublas in (("adapted", "decoded"), ("appended", "appended")):
        run = getattr(launcher, name)

        def noted(*args: Any, way: str = by_cublas, run: Any = run) -> Tensor:
            seen.append(way)
            result: Tensor = run(*args)
            return result

        monkeypatch.setattr(launcher, name, noted)
    monkeypatch.setattr(launcher, "launch", make_launch(recorded, seen))
    # an adapter that does not ride along: the extension has a tile for its many rows too
    has_tile = way in ("fused", "beside") or M > launcher._FUSED_ROWS
    monkeypatch.setattr(launcher, "choose_tile", lambda *args: "tile" if has_tile else None)
    if way == "appended":
        monkeypatch.setattr("tli_engine.kernels.widen._APPEND_FROM", M)
    adapter, bias = make_adapter(groups, dropout, rank), torch.randn(N).half()
    x, dy = torch.randn(M, K).half(), torch.randn(M, N).half()
    A, B = adapter.lora_A.detach(), adapter.lora_B.detach()
    stored, plain = (recorded.records, recorded.transposed), (A, B, *adapter[2:])
    y, s = launcher.nf4_linear_records(x, *stored, bias, *plain, N, False)
    assert seen == [way]
    grads = nf4_linear_records_backward(dy, x, s, *stored, *plain, K, False, True, True)
    ops = torch.ops.tli_engine
    expected, expected_s = ops.nf4_linear_records(x, *stored, bias, *plain, N, False)
    wanted = ops.nf4_linear_records_backward(
        dy, x, expected_s, *stored, *plain, K, False, True, True
    )
    for ours, theirs in zip((y, s, *grads), (expected, expected_s, *wanted), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.double() - theirs.double()).norm() < 4e-3 * theirs.double().norm()
