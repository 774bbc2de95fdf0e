"""Odd input works, wrong input is one clear line, through every public way to an NF4 weight."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tli_engine import nf4_dequantize, nf4_linear, nf4_lora_linear
from tli_engine.errors import UserError
from tli_engine.models.sources import SafetensorsSource
from tli_engine.nf4 import NF4Weight, quantize
from tli_engine.nf4_checkpoint import from_state_dict, nf4_state_dict
from tli_engine.nn import NF4Linear

N, R = 6, 3
WIDTHS = [  # K, block_size
    pytest.param(128, 64, id="whole-blocks"),
    pytest.param(96, 64, id="blocks-across-rows"),
    pytest.param(33, 64, id="odd"),
    pytest.param(40, 4096, id="one-block"),
]
INPUTS: dict[str, Callable[[int], Tensor]] = {
    "rows": lambda K: torch.randn(5, K),
    "stacked": lambda K: torch.randn(2, 3, K),
    "one-vector": lambda K: torch.randn(K),
    "every-other-element": lambda K: torch.randn(5, 2 * K)[:, ::2],
    "transposed": lambda K: torch.randn(K, 5).T,
    "one-row-repeated": lambda K: torch.randn(1, K).expand(5, K),
    "no-rows": lambda K: torch.randn(0, K),
    "no-rows-of-three": lambda K: torch.randn(2, 0, K),
}
Linear = Callable[[Tensor, NF4Weight], Tensor]
LINEARS: dict[str, Linear] = {
    "op": nf4_linear,
    "module": lambda x, weight: NF4Linear(weight)(x),
    "resident": lambda x, weight: NF4Linear(weight, weight_residency="bf16")(x),
}
Lora = Callable[[Tensor, NF4Weight, Tensor, Tensor], Tensor]
LORAS: dict[str, Lora] = {
    "op": lambda x, weight, A, B: nf4_lora_linear(x, weight, A, B, 0.7),
    "module": lambda x, weight, A, B: NF4Linear(weight).lora_forward(x, A, B, 0.7),
    "resident": lambda x, weight, A, B: NF4Linear(weight, weight_residency="bf16").lora_forward(
        x, A, B, 0.7
    ),
}


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", LINEARS)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(("K", "block_size"), WIDTHS)
def test_any_width_and_strides(
    K: int, block_size: int, kind: str, way: str, device: torch.device
) -> None:
    weight = quantize(torch.randn(N, K, device=device), block_size=block_size)
    x = INPUTS[kind](K).to(device).requires_grad_()
    y, expected = LINEARS[way](x, weight), x @ weight.dequantize().T
    assert y.shape == (*x.shape[:-1], N)
    assert y.is_contiguous()
    # of no strides, as sum() hands it back
    dy = torch.randn(N, device=device).expand(y.shape)
    gradients = (torch.autograd.grad(out, x, dy)[0] for out in (y, expected))
    assert_same((y, next(gradients)), (expected, next(gradients)))


@pytest.mark.parametrize("way", LORAS)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(("K", "block_size"), WIDTHS)
def test_any_width_and_strides_with_an_update(
    K: int, block_size: int, kind: str, way: str, device: torch.device
) -> None:
    weight = quantize(torch.randn(N, K, device=device), block_size=block_size)
    # of any strides too
    A = torch.randn(K, R, device=device).T.requires_grad_()
    B = torch.randn(R, N, device=device).T.requires_grad_()
    x = INPUTS[kind](K).to(device).requires_grad_()
    y = LORAS[way](x, weight, A, B)
    expected = x @ weight.dequantize().T + 0.7 * (x @ A.T) @ B.T
    assert y.shape == (*x.shape[:-1], N)
    dy = torch.randn(N, device=device).expand(y.shape)
    actual, wanted = (torch.autograd.grad(out, (x, A, B), dy) for out in (y, expected))
    assert_same((y, *actual), (expected, *wanted))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("K", [128, 96])
def test_absmax_that_is_not_finite_shows_where_it_is_used(
    K: int, bad: float, device: torch.device
) -> None:
    weight = quantize(torch.randn(N, K, device=device))
    weight.absmax[3] = bad
    elements = torch.zeros(N * K, dtype=torch.bool, device=device)
    elements[3 * 64 : 4 * 64] = True
    rows, columns = (elements.view(N, K).any(dim) for dim in (1, 0))
    assert 0 < int(rows.sum()) < N
    assert 0 < int(columns.sum()) < K
    for linear in LINEARS.values():
        x = torch.randn(5, K, device=device, requires_grad=True)
        y = linear(x, weight)
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
        assert torch.equal(y.isfinite(), ~rows.expand_as(y))
        assert torch.equal(dx.isfinite(), ~columns.expand_as(dx))


WEIGHT = quantize(torch.ones(N, 128))
NESTED = quantize(torch.ones(N, 128), double_quant=True)
assert NESTED.nested is not None
STORED = [  # a weight whose parts do not fit, the message
    (replace(WEIGHT, packed=WEIGHT.packed[:-1]), r"packed must be 384 contiguous torch\.uint8"),
    (replace(WEIGHT, packed=WEIGHT.packed.char()), r"packed must be 384 .* got torch\.int8"),
    (replace(WEIGHT, packed=WEIGHT.packed.repeat(1, 2)[:, :1]), r"packed .* strides \[2, 1\]"),
    (replace(WEIGHT, shape=(N, 192)), r"packed must be 576 contiguous torch\.uint8, got"),
    (replace(WEIGHT, absmax=WEIGHT.absmax[1:]), r"absmax must be 12 contiguous .* \[11\]"),
    (replace(WEIGHT, absmax=WEIGHT.absmax.half()), r"absmax must be 12 contiguous torch\.float32"),
    (replace(WEIGHT, absmax=WEIGHT.absmax.to("meta")), "absmax must be on cpu as weight.packed"),
    (replace(WEIGHT, block_size=48), r"block_size must be one of \(32, .*\), got 48"),
    (replace(WEIGHT, block_size=128), r"absmax must be 6 contiguous torch\.float32, got .* \[12\]"),
    (replace(WEIGHT, nested=NESTED.nested), r"absmax must be 12 contiguous torch\.uint8, got"),
    (
        replace(NESTED, nested=None),
        r"absmax must be 12 contiguous torch\.float32, got torch\.uint8",
    ),
    (
        replace(NESTED, nested=replace(NESTED.nested, absmax=torch.ones(2))),
        r"nested\.absmax must be 1 contiguous torch\.float32, got torch\.float32 \[2\]",
    ),
    (
        replace(NESTED, nested=replace(NESTED.nested, code=torch.ones(16))),
        r"nested\.code must be 256 contiguous torch\.float32, got torch\.float32 \[16\]",
    ),
    (
        replace(NESTED, nested=replace(NESTED.nested, offset=torch.ones((), device="meta"))),
        r"nested\.offset must be on cpu as weight\.packed, got meta",
    ),
    (
        replace(WEIGHT, absmax=torch.ones(12, requires_grad=True)),
        "absmax must not require a gradient, NF4 weights are frozen; detach it",
    ),
]
X = torch.zeros(2, 128)
A, B = torch.zeros(R, 128), torch.zeros(N, R)


@pytest.mark.parametrize(("weight", "message"), STORED)
def test_a_weight_whose_parts_do_not_fit_is_refused(weight: NF4Weight, message: str) -> None:
    ways: list[Callable[[], Any]] = [
        lambda: nf4_dequantize(weight),
        lambda: nf4_linear(X, weight),
        lambda: nf4_lora_linear(X, weight, A, B, 1.0),
        lambda: NF4Linear(weight),
    ]
    for way in ways:
        with pytest.raises(ValueError, match=rf"^weight\.{message}") as caught:
            way()
        assert "\n" not in str(caught.value)


UPDATES = [  # arguments, the message
    ({"lora_A": A.to("meta"), "lora_B": B.to("meta")}, "lora_A must be on cpu as x, got meta"),
    ({"lora_A": A.to("meta")}, "lora_A and lora_B must share dtype and device, got .* on meta and"),
    ({"lora_B": B.bfloat16()}, r"must share dtype and device, got torch\.float32 on cpu and torch"),
    ({"lora_A": A.int(), "lora_B": B.int()}, r"must be floating point, got torch\.int32"),
    ({"lora_A": A[:2]}, r"lora_A must be \[3, 128\], got \[2, 128\]"),
    ({"lora_A": A[:0], "lora_B": B[:, :0]}, r"lora_B must be \[6, r\] with r > 0, got \[6, 0\]"),
    ({"lora_B": B.T}, r"lora_B must be \[6, r\] with r > 0, got \[3, 6\]"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    (
        {"dropout": 0.1, "seed": torch.tensor(1, device="meta")},
        "seed must be on cpu as x, got meta",
    ),
    ({"dropout": 0.1, "seed": torch.tensor(1.0)}, r"seed must be one int64, got torch\.float32"),
    ({"x": X.to("meta")}, "x must be on cpu as the weight, got meta"),
    ({"x": X[:, 1:]}, r"x must be \[\.\.\., 128\] for a weight \[6, 128\], got \[2, 127\]"),
    ({"x": torch.zeros(())}, r"x must be \[\.\.\., 128\] for a weight \[6, 128\], got \[\]"),
    ({"x": X.to(torch.float8_e4m3fn)}, "x must be bf16, fp16, fp32 or fp64, got torch.float8_e4m3"),
    ({"x": X.long()}, r"x must be floating point, got torch\.int64"),
]


@pytest.mark.parametrize("residency", [None, "nf4", "bf16"])
@pytest.mark.parametrize(("change", "message"), UPDATES)
def test_an_update_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, residency: Any
) -> None:
    arguments = {"x": X, "lora_A": A, "lora_B": B, "scaling": 1.0} | change
    call: Callable[..., Any] = partial(nf4_lora_linear, weight=WEIGHT)
    if residency is not None:
        call = NF4Linear(WEIGHT, weight_residency=residency).lora_forward
    with pytest.raises(ValueError, match=message) as caught:
        call(**arguments)
    assert "\n" not in str(caught.value)


def test_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sizes must be positive and add up to 6, got \[\]"):
        nf4_lora_linear(X, WEIGHT, A, B, 1.0, sizes=[])


def test_a_bias_of_another_dtype_is_for_the_module_to_cast() -> None:
    x, bias = torch.randn(2, 128).half(), torch.randn(N)
    for call in (nf4_linear, lambda *args: nf4_lora_linear(*args[:2], A, B, 1.0, args[2])):
        with pytest.raises(ValueError, match=r"bias must be torch\.float16 \[6\], got torch\.bfl"):
            call(x, WEIGHT, bias.bfloat16())
        with pytest.raises(ValueError, match="bias must be on cpu as x, got meta"):
            call(x, WEIGHT, bias.half().to("meta"))
    assert torch.equal(NF4Linear(WEIGHT, bias)(x), nf4_linear(x, WEIGHT, bias.half()))


def on_cuda(dtype: torch.dtype) -> tuple[Tensor, NF4Weight, Tensor, Tensor]:
    x, A, B = (torch.empty(s, device="cuda", dtype=dtype) for s in ((2, 128), (R, 128), (N, R)))
    packed = torch.empty(N * 64, 1, device="cuda", dtype=torch.uint8)
    return x, NF4Weight(packed, torch.empty(N * 2, device="cuda"), (N, 128), dtype), A, B


def assert_fp64_is_refused() -> None:
    x, weight, A, B = on_cuda(torch.float64)
    ways: list[Callable[[], Any]] = [
        *(lambda linear=linear: linear(x, weight) for linear in LINEARS.values()),
        *(lambda lora=lora: lora(x, weight, A, B) for lora in LORAS.values()),
    ]
    message = r"^x must be bf16, fp16 or fp32 on a GPU, got torch\.float64; fp64 is for a CPU$"
    for way in ways:
        with pytest.raises(ValueError, match=message):
            way()


def test_fp64_is_refused_for_a_gpu() -> None:
    with FakeTensorMode():
        assert_fp64_is_refused()


@pytest.mark.gpu
def test_fp64_is_refused_on_a_gpu() -> None:
    assert_fp64_is_refused()


@pytest.mark.gpu
def test_parts_on_another_device_are_named() -> None:
    x, weight, A, B = on_cuda(torch.float16)
    seed = torch.tensor(1)
    with pytest.raises(ValueError, match="x must be on cuda:0 as the weight, got cpu"):
        NF4Linear(weight)(x.cpu())
    with pytest.raises(ValueError, match="seed must be on cuda:0 as x, got cpu"):
        NF4Linear(weight).lora_forward(x, A, B, 1.0, dropout=0.1, seed=seed)
    with pytest.raises(ValueError, match="lora_A must be on cuda:0 as x, got cpu"):
        nf4_lora_linear(x, weight, A.cpu(), B.cpu(), 1.0)


@pytest.mark.gpu
def test_activations_past_32_bits() -> None:
    M, K, tail = 2**17 + 16, 2**14, 16
    weight = quantize(torch.randn(64, K, device="cuda", dtype=torch.bfloat16) * 0.05)
    A, B = torch.randn(8, K, device="cuda") * 0.05, torch.randn(64, 8, device="cuda") * 0.05
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16).requires_grad_()
    assert x.numel() > 2**31
    last = x.detach()[-tail:].clone().requires_grad_()
    for module in (NF4Linear(weight), NF4Linear(weight, weight_residency="bf16")):
        y = module.lora_forward(x, A, B, 2.0)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        expected = module.lora_forward(last, A, B, 2.0)
        (wanted,) = torch.autograd.grad(expected, last, torch.ones_like(expected))
        for actual, alone in ((y[-tail:], expected), (dx[-tail:], wanted)):
            assert (actual - alone).float().norm() / alone.float().norm() < 1e-2


NAME = "model.layers.0.mlp.up_proj.weight"
# bitsandbytes' FP4 map, by index
FP4 = [0, 0.0052, 0.6667, 1, 0.3333, 0.5, 0.1667, 0.25]


def fp4_key(tensors: dict[str, Tensor]) -> None:
    state = f"{NAME}.quant_state.bitsandbytes__nf4"
    tensors[state.replace("nf4", "fp4")] = tensors.pop(state)


def fp4_type(tensors: dict[str, Tensor]) -> None:
    key = f"{NAME}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist())) | {"quant_type": "fp4"}
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def fp4_map(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.quant_map"] = torch.tensor([*FP4, *(-value for value in FP4)])


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fp4_key, f"{NAME}: is FP4; only NF4 is read, so quantise the original weight again"),
        (
            fp4_type,
            f"{NAME}.quant_state.bitsandbytes__nf4: quant_type: input should be 'nf4' (got 'fp4')",
        ),
        (fp4_map, f"{NAME}.quant_map: not the 16 values of NF4; only NF4 is read"),
    ],
)
def test_fp4_is_refused_by_all_that_read_bytes(
    change: Callable[[dict[str, Tensor]], None], message: str, double_quant: bool, tmp_path: Path
) -> None:
    tensors = nf4_state_dict(quantize(torch.randn(8, 128), double_quant=double_quant), NAME)
    change(tensors)
    file = tmp_path / "model.safetensors"
    save_file(tensors | {"model.embed_tokens.weight": torch.ones(4, 8)}, file)
    source = SafetensorsSource("m", lambda name: file if name == file.name else None)
    name = NAME.removeprefix("model.")
    ways: list[Callable[[], Any]] = [
        lambda: from_state_dict(tensors, NAME),
        lambda: source.read_nf4(name),
        lambda: source.read(name),
    ]
    for way in ways:
        with pytest.raises(UserError) as caught:
            way()
        assert str(caught.value) == message
    with pytest.raises(UserError, match=r"up_proj\.weight is stored as torch\.uint8; only full"):
        source.read_rows(name, [0])
