"""LoRA on NF4 layers runs in one op: what it keeps of the dense path, and how near it is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tli_engine import nf4
from tli_engine.config import LoraConfig
from tli_engine.data.words import pack
from tli_engine.layouts import RecordedWeight
from tli_engine.models.adapters import (
    LoRALinear,
    adapter_strength,
    adapter_tensors,
    adapters_off,
    add_lora,
    add_transposed_copies,
)
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.nn import NF4Linear
from tli_engine.ops.counter_dropout import counter_dropout
from tli_engine.testing import random_words

N, K, R, ALPHA = 40, 128, 4, 8
RESIDENCIES = ["nf4", "bf16"]


def adapted(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    dropout: float = 0.0,
    residency: Any = "nf4",
    double_quant: bool = False,
) -> LoRALinear:
    dense = (torch.randn(N, K, device=device) * 0.05).to(dtype)
    weight = nf4.quantize(dense, double_quant=double_quant)
    bias = torch.randn(N, device=device).to(dtype)
    base = NF4Linear(weight, bias, weight_residency=residency)
    layer = LoRALinear(base, R, ALPHA, False, dropout)
    for half in (layer.lora_A, layer.lora_B):
        nn.init.normal_(half.weight, std=0.1)
    return layer


def by_peft(layer: LoRALinear, x: Tensor, seed: Tensor | None = None) -> Tensor:
    """As on a dense layer: the frozen product in ``x``'s dtype, the update in the adapter's."""
    wide = x.to(layer.lora_A.weight.dtype)
    if seed is not None:
        wide = counter_dropout(wide.view(-1, K), seed, layer.dropout.p).view(x.shape)
    update = layer.lora_B(layer.lora_A(wide)) * layer.scaling
    result: Tensor = (layer.base_layer(x) + update).to(x.dtype)
    return result


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double-quant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
def test_is_as_near_to_peft_as_the_dtype_allows(
    dtype: torch.dtype, dropout: float, double_quant: bool, residency: Any, device: torch.device
) -> None:
    layer = adapted(device, dtype, dropout=dropout, residency=residency, double_quant=double_quant)
    x = torch.randn(3, 7, K, device=device).to(dtype).requires_grad_()
    dy = torch.randn(3, 7, N, device=device).to(dtype)
    wanted = (x, layer.lora_A.weight, layer.lora_B.weight)
    torch.manual_seed(5)
    y = layer(x)
    assert y.dtype == dtype
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (), device=device) if dropout else None
    expected = by_peft(layer, x, seed)
    pairs = zip(
        (y, *torch.autograd.grad(y, wanted, dy)),
        (expected, *torch.autograd.grad(expected, wanted, dy)),
        strict=True,
    )
    for actual, peft in pairs:
        assert actual.dtype == peft.dtype
        error = (actual.double() - peft.double()).norm() / peft.double().norm()
        assert error < max(torch.finfo(dtype).eps, 1e-6)


def test_adapter_beside_bf16_is_fp32(device: torch.device) -> None:
    layer = adapted(device, torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert {p.device for p in layer.parameters()} == {layer.base_layer.bias.device}


def test_building_one_does_not_undo_the_layout(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = NF4Linear(nf4.quantize(torch.randn(N, K, device=device)))

    def undone(self: NF4Linear) -> None:
        raise AssertionError

    monkeypatch.setattr(NF4Linear, "weight", property(undone))
    LoRALinear(base, R, ALPHA, False, 0.0)


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_new_adapter_changes_nothing(residency: Any, device: torch.device) -> None:
    layer = adapted(device, residency=residency)
    nn.init.zeros_(layer.lora_B.weight)
    x = torch.randn(5, K, device=device)
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=1e-6)
    if device.type == "cpu":
        assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_switched_off_it_is_the_base_layer_and_draws_nothing(
    residency: Any, device: torch.device
) -> None:
    layer, x = adapted(device, dropout=0.5, residency=residency), torch.randn(5, K, device=device)
    layer.active = False
    before = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.active = True
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    after = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(before, after)


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_dropout_is_a_function_of_torchs_generator(residency: Any, device: torch.device) -> None:
    layer = adapted(device, dropout=0.5, residency=residency)
    x = torch.randn(5, K, device=device)

    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [layer(x) for _ in range(2)]

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_recomputed_activations_meet_the_same_mask(device: torch.device) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = adapted(device, dropout=0.5)
    x = torch.randn(5, K, device=device, requires_grad=True)
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(1)
        wanted = (x, layer.lora_A.weight, layer.lora_B.weight)
        grads.append(torch.autograd.grad(run(x).square().sum(), wanted))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_rank_stabilised_scaling(device: torch.device) -> None:
    base = NF4Linear(nf4.quantize(torch.randn(N, K, device=device)))
    layer = LoRALinear(base, R, ALPHA, True, 0.0)
    for half in (layer.lora_A, layer.lora_B):
        nn.init.normal_(half.weight, std=0.1)
    x = torch.randn(5, K, device=device)
    update = x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    torch.testing.assert_close(layer(x), base(x) + ALPHA / R**0.5 * update, rtol=1e-4, atol=1e-4)


@pytest.fixture
def model(tiny: Any) -> EarlyModel:
    """Two blocks in NF4 with adapters that do something."""
    loaded = load_early(
        tiny("llama"), 2, dtype=torch.float32, device=torch.device("cpu"), quantize="nf4"
    )
    add_lora(loaded, LoraConfig(dropout=0.2), 2, seed=0)
    with torch.no_grad():
        for tensor in adapter_tensors(loaded).values():
            tensor.copy_(torch.randn(tensor.shape))
    return loaded


def test_strength_is_linear_in_what_one_adapter_adds(model: EarlyModel) -> None:
    adapter = next(m for m in model.decoder.modules() if isinstance(m, LoRALinear))
    x = torch.randn(5, adapter.base_layer.in_features)
    base, whole = adapter.base_layer(x), adapter(x)
    for strength in (0.0, 0.5, 1.0):
        with adapter_strength(model, strength):
            torch.testing.assert_close(adapter(x), base + strength * (whole - base))
    assert torch.equal(adapter(x), whole)


def test_switched_off_the_model_is_the_base_model(model: EarlyModel) -> None:
    words = pack(random_words(3, 5))
    plain = load_early_again(model)
    with torch.no_grad():
        assert not torch.allclose(model(words, 2), plain(words, 2))
        with adapters_off(model):
            assert torch.equal(model(words, 2), plain(words, 2))
        with adapter_strength(model, 0.0):
            torch.testing.assert_close(model(words, 2), plain(words, 2))


def load_early_again(model: EarlyModel) -> EarlyModel:
    """The same blocks with the adapters taken off."""
    import copy

    plain = copy.deepcopy(model)
    for name, module in list(plain.decoder.named_modules()):
        if isinstance(module, LoRALinear):
            owner, _, leaf = name.rpartition(".")
            setattr(plain.decoder.get_submodule(owner), leaf, module.base_layer)
    return plain


@pytest.mark.gpu
@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_does_not_wait_for_the_gpu(dtype: torch.dtype, residency: Any) -> None:
    layer = adapted(torch.device("cuda"), dtype, dropout=0.2, residency=residency)
    x = torch.randn(5, K, device="cuda", dtype=dtype, requires_grad=True)
    wanted = (x, layer.lora_A.weight, layer.lora_B.weight)
    dy = torch.randn(5, N, device="cuda", dtype=dtype)
    # tables, compiled kernels and a resident copy are made by the first call
    torch.autograd.grad(layer(x), wanted, dy)
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        torch.autograd.grad(layer(x), wanted, dy)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_each_replay_of_a_graph_draws_a_new_mask(residency: Any) -> None:
    layer = adapted(torch.device("cuda"), torch.bfloat16, dropout=0.5, residency=residency)
    x = torch.randn(5, K, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = layer(x)
        replayed = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            graph.replay()
            first = y.clone()
            graph.replay()
            replayed.append((first, y.clone()))
    torch.cuda.synchronize()
    (a, b), (c, d), (e, _) = replayed
    assert torch.equal(a, c)
    assert torch.equal(b, d)
    assert not torch.equal(a, b)
    assert not torch.equal(a, e)


def test_transposed_copies_are_held_where_gradients_may_pass(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tli_engine.layouts.backends.has_extension", lambda device: True)
    files = tiny("llama", hidden_size=128, intermediate_size=128, head_dim=32)
    device = torch.device("cpu")
    model = load_early(files, 3, dtype=torch.float32, device=device, quantize="nf4")
    add_lora(model, LoraConfig(layers="1", modules=["q_proj", "down_proj"]), 3, seed=0)
    layers = {n: m for n, m in model.decoder.named_modules() if isinstance(m, NF4Linear)}
    recorded = {n for n, m in layers.items() if isinstance(m._stored, RecordedWeight)}
    before = sum(m.nbytes for m in layers.values())
    nbytes, copies = add_transposed_copies(model)
    held = {n for n, m in layers.items() if m.transposed_nbytes}
    # block 0 is frozen, and nothing trained feeds q, k and v of block 1
    reached = {
        n for n in recorded
        if n.startswith(("layers.1.", "layers.2."))
        and not n.startswith(tuple(f"layers.1.self_attn.{p}_proj" for p in "qkv"))
    }  # fmt: skip
    assert "layers.1.mlp.down_proj.base_layer" in held
    assert held == reached
    assert nbytes == before + copies
    assert copies == sum(layers[n].transposed_nbytes for n in held)
    ids = pack(random_words(3, 5))
    dense = load_early(files, 3, dtype=torch.float32, device=device, quantize="nf4")
    with adapters_off(model):
        torch.testing.assert_close(model(ids, 3), dense(ids, 3))
