"""The fused blocks give the hidden states and the gradients of transformers' modules."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.config import LoraConfig
from tli_engine.data.words import pack
from tli_engine.models.adapters import adapter_tensors, adapters, add_lora
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import FAMILIES
from tli_engine.models.fused import FusedBlocks, check_fused
from tli_engine.models.projection import NotFusedError
from tli_engine.nn import NF4Linear
from tli_engine.testing import assert_within_error_budget, random_words

DEPTH = 3
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# widths of which every row of a weight is whole blocks of 64
WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
MODELS = [
    *(pytest.param(family, {}, id=family) for family in FAMILIES),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-biases"),
    pytest.param("llama", {"num_key_value_heads": 1}, id="llama-one-key-head"),
]
Pair = tuple[EarlyModel, EarlyModel]


@pytest.fixture
def two(tiny: Callable[..., Any]) -> Callable[..., Pair]:
    """A model twice, with equal adapters whose B is not zero; the second is for the fused blocks."""

    def make(
        family: str = "llama",
        quantize: str = "none",
        dtype: torch.dtype = torch.float32,
        modules: list[str] = ALL,
        double_quant: bool = False,
        **overrides: Any,
    ) -> Pair:
        models = []
        for _ in range(2):
            files = tiny(family, **WIDE, **overrides)
            model = load_early(
                files, DEPTH, dtype=dtype, device=torch.device("cpu"), quantize=quantize,  # type: ignore[arg-type]
                double_quant=double_quant,
            )  # fmt: skip
            add_lora(model, LoraConfig(layers="0-2", modules=modules, r=4), DEPTH, seed=0)
            generator = torch.Generator().manual_seed(1)
            for name, tensor in adapter_tensors(model).items():
                if ".lora_B." in name:
                    tensor.data.normal_(0, 0.05, generator=generator)
            models.append(model)
        return models[0], models[1]

    return make


def embed(model: EarlyModel, words: Any) -> Tensor:
    return next(model.hidden_states(words))[1].detach()


def resident(layers: Iterable[Any]) -> list[Tensor]:
    return [layer._dense for layer in layers if layer._dense is not None]


def assert_alike(actual: Tensor, expected: Tensor) -> None:
    """Equal to fp32 rounding of the largest activation."""
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def fused_gradients(blocks: FusedBlocks, joined: list[Tensor]) -> dict[str, Tensor]:
    """The joined gradients by the adapters' own names."""
    names = [name for p in blocks.projections() for name in p.joined()]
    by_name = dict(zip(names, joined, strict=True))
    return {
        name: by_name[whole][rows]
        for p in blocks.projections()
        for name, _, whole, rows in p.parts()
    }


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_hidden_states_and_gradients_are_the_modules_own(
    family: str, overrides: dict[str, Any], quantize: str, two: Callable[..., Pair]
) -> None:
    plain, model = two(family, quantize, **overrides)
    words = pack(random_words(12, 7))
    own = adapter_tensors(plain)
    for tensor in own.values():
        tensor.requires_grad_()
    expected = plain(words, DEPTH)
    weight = torch.randn_like(expected)
    exact = dict(zip(own, torch.autograd.grad(expected, list(own.values()), weight), strict=True))

    blocks = FusedBlocks(model.decoder, model.config)
    x = embed(model, words)
    rows = blocks.rows_of(words, x)
    hidden = blocks.run(x, rows, 0, DEPTH)
    leaves = [t for p in blocks.projections() for t in p.joined().values()]
    grads = fused_gradients(blocks, list(torch.autograd.grad(hidden, leaves, weight)))

    assert_alike(hidden, expected)
    assert grads.keys() == exact.keys()
    for name, grad in grads.items():
        assert (grad - exact[name]).norm() < 1e-4 * exact[name].norm(), name


def test_joined_layers_give_up_resident_copies_of_their_own(two: Callable[..., Pair]) -> None:
    """Those of a pass before the blocks were joined, which fitted the loss space, say."""
    _, model = two("llama", "nf4")
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    for layer in layers:
        layer.weight_residency = "bf16"
    embed(model, words := pack(random_words(12, 7)))
    model(words, DEPTH)
    stored = sum(layer.weight.dequantize().nbytes for layer in layers)
    assert sum(t.nbytes for t in resident(layers)) == stored
    blocks = FusedBlocks(model.decoder, model.config)
    x = embed(model, words)
    blocks.run(x, blocks.rows_of(words, x), 0, DEPTH)
    joined = [p.layer for p in blocks.projections()]
    assert sum(t.nbytes for t in resident({*layers, *joined})) == stored


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_bf16_errs_no_more_than_the_modules(family: str, two: Callable[..., Pair]) -> None:
    truth, _ = two(family)
    plain, model = two(family, dtype=torch.bfloat16)
    # the weights that bf16 holds
    for exact, rounded in zip(truth.parameters(), plain.parameters(), strict=True):
        exact.data = rounded.detach().double()
    truth.double()
    words = pack(random_words(40, 7))
    with torch.no_grad():
        blocks = FusedBlocks(model.decoder, model.config)
        x = embed(model, words)
        hidden = blocks.run(x, blocks.rows_of(words, x), 0, DEPTH)
        assert_within_error_budget(hidden, plain(words, DEPTH), truth(words, DEPTH))


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_projection_without_an_adapter_keeps_its_zeros(
    quantize: str, two: Callable[..., Pair]
) -> None:
    """k has no adapter: its part of the joined one has no gradient, whatever q and v learn."""
    _, model = two(quantize=quantize, modules=["q_proj", "v_proj"])
    blocks = FusedBlocks(model.decoder, model.config)
    words = pack(random_words(12, 7))
    x = embed(model, words)
    hidden = blocks.run(x, blocks.rows_of(words, x), 0, DEPTH)
    qkv = blocks.blocks[1].qkv
    assert qkv.lora_A is not None
    assert qkv.lora_B is not None
    dA, dB = torch.autograd.grad(hidden.square().sum(), [qkv.lora_A, qkv.lora_B])
    q, k, v = dA.split(4)
    assert [bool(part.any()) for part in (q, k, v)] == [True, False, True]
    q, k, v = dB.split(qkv.sizes)
    assert [bool(part.any()) for part in (q, k, v)] == [True, False, True]


@pytest.mark.parametrize("double_quant", [False, True])
def test_joined_layers_keep_their_weights_bit_for_bit(
    double_quant: bool, two: Callable[..., Pair]
) -> None:
    plain, model = two(quantize="nf4", double_quant=double_quant)
    digest, tensors = plain.base_digest(), {n: t.clone() for n, t in adapter_tensors(plain).items()}
    blocks = FusedBlocks(model.decoder, model.config)
    assert model.base_digest() == digest
    assert all(torch.equal(t, tensors[n]) for n, t in adapter_tensors(model).items())
    qkv = blocks.blocks[0].qkv
    assert qkv.lora_A is not None
    qkv.lora_A.data.fill_(3.0)
    assert (adapter_tensors(model)["layers.0.self_attn.v_proj.lora_A.weight"] == 3).all()


def test_modules_run_on_after_their_weights_were_joined(two: Callable[..., Pair]) -> None:
    plain, model = two("qwen2", "nf4")
    FusedBlocks(model.decoder, model.config)
    words = pack(random_words(12, 7))
    with torch.no_grad():
        assert_alike(model(words, DEPTH), plain(words, DEPTH))


def test_adapters_switched_off_or_scaled_are_so_in_the_fused_blocks(
    two: Callable[..., Pair],
) -> None:
    plain, model = two()
    blocks = FusedBlocks(model.decoder, model.config)
    words = pack(random_words(12, 7))
    with torch.no_grad():
        x = embed(model, words)
        rows = blocks.rows_of(words, x)
        for change in (
            lambda a: setattr(a, "scaling", 0.25),
            lambda a: setattr(a, "active", False),
        ):
            for one in (plain, model):
                for adapter in adapters(one).values():
                    change(adapter)
            assert_alike(blocks.run(x, rows, 0, DEPTH), plain(words, DEPTH))


def test_dropout_masks_follow_their_seeds(two: Callable[..., Pair]) -> None:
    _, model = two(quantize="nf4")
    for adapter in adapters(model).values():
        adapter.dropout.p = 0.5
    blocks = FusedBlocks(model.decoder, model.config)
    words = pack(random_words(12, 7))
    x = embed(model, words)
    rows = blocks.rows_of(words, x)
    without = blocks.run(x, rows, 0, DEPTH)
    model.train()
    assert sum(p.drops for p in blocks.projections()) == 4 * DEPTH
    seeds = torch.arange(4 * DEPTH)
    first, again = (blocks.run(x, rows, 0, DEPTH, iter(seeds.unbind())) for _ in range(2))
    other = blocks.run(x, rows, 0, DEPTH, iter((seeds + 1).unbind()))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, without)


def test_adapters_that_differ_are_refused(two: Callable[..., Pair]) -> None:
    _, model = two()
    adapters(model)["layers.0.self_attn.v_proj"].scaling *= 2
    with pytest.raises(
        NotFusedError, match=r"layers\.0\.self_attn\.q_proj\+k_proj\+v_proj: adapters"
    ):
        FusedBlocks(model.decoder, model.config)


def test_an_unknown_family_is_refused(two: Callable[..., Pair]) -> None:
    config = two()[0].config
    config.model_type = "gpt2"
    with pytest.raises(NotFusedError, match="no fused blocks for model type 'gpt2'"):
        check_fused(config)
