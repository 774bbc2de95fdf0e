import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tli_engine.config import LoraConfig
from tli_engine.data.words import pack
from tli_engine.errors import UserError
from tli_engine.models.adapters import (
    adapter_tensors,
    adapters,
    adapters_off,
    add_lora,
    parse_layers,
    select_modules,
    wrap,
)
from tli_engine.models.early import EarlyModel
from tli_engine.models.files import FAMILIES
from tli_engine.testing import random_words

Early = Callable[..., EarlyModel]


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("0", [0]),
        ("0-1", [0, 1]),
        ("0,2,5-7", [0, 2, 5, 6, 7]),
        (" 5-7 , 0 ", [0, 5, 6, 7]),
        ("3-3", [3]),
        ("2,1,2,0-2", [0, 1, 2]),
        ("all", list(range(12))),
        (" all ", list(range(12))),
        ("11", [11]),
    ],
)
def test_blocks_are_parsed(text: str, blocks: list[int]) -> None:
    assert parse_layers(text, 12) == blocks


@settings(deadline=None)
@given(st.sets(st.integers(0, 40), min_size=1))
def test_any_set_of_blocks_can_be_written(blocks: set[int]) -> None:
    assert parse_layers(",".join(map(str, blocks)), 41) == sorted(blocks)


@pytest.mark.parametrize(
    "text", ["", " ", "a", "1-", "-1", "0-1-2", "0,", "0;1", "1.5", "0 - 1", "ALL", "²", "0x1"]
)
def test_other_forms_are_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(UserError, match=r'is not of the form "0-1", "0,2,5-7" or "all"'):
        parse_layers(text, 4)


@settings(deadline=None)
@given(st.text(alphabet="0123456789-, al²٣", max_size=12))
def test_any_text_is_blocks_or_a_users_error(text: str) -> None:
    try:
        blocks = parse_layers(text, 30)
    except UserError:
        return
    assert blocks == sorted(set(blocks))
    assert 0 <= blocks[0] <= blocks[-1] < 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-4", "the model has blocks 0-3, none 4"),
        ("9,1", "the model has blocks 0-3, none 9"),
        # must not be built to be refused
        ("0-99999999999999", "the model has blocks 0-3, none 99999999999999"),
        ("2-1", "'2-1' names no block"),
        ("0,3-1", "'3-1' names no block"),
    ],
)
def test_blocks_that_are_not_there_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"lora.layers: {message}"):
        parse_layers(text, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_are_selected_by_the_end_of_their_name(family: str, early: Early) -> None:
    lora = LoraConfig(layers="0,2", modules=("v_proj", "mlp.up_proj"))
    assert select_modules(early(family, 3), lora, 3) == [
        "layers.0.self_attn.v_proj",
        "layers.0.mlp.up_proj",
        "layers.2.self_attn.v_proj",
        "layers.2.mlp.up_proj",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(
            {"modules": ("q_proj", "query")},
            "lora.modules: 'query' matches no linear layer; there are q_proj, k_proj, v_proj, "
            "o_proj, gate_proj, up_proj, down_proj$",
            id="no-such-module",
        ),
        pytest.param({"modules": ("proj",)}, "'proj' matches no linear layer", id="part-of-a-name"),
        pytest.param({"modules": ("self_attn",)}, "'self_attn' matches no", id="not-linear"),
        pytest.param(
            {"modules": ()}, "lora.modules: is empty; choose among q_proj, .*down_proj$", id="none"
        ),
        pytest.param({"layers": "0-4"}, "the model has blocks 0-3, none 4", id="beyond-the-model"),
        pytest.param(
            {"layers": "1,2"},
            r"lora.layers: no gradient reaches block 2: the loss reads hidden_states\[2\], the "
            r"output of block 1; choose blocks within 0-1, or a higher align.layer",
            id="above-the-loss",
        ),
        pytest.param({"layers": "all"}, "no gradient reaches block 2", id="all"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(
    values: dict[str, Any], message: str, early: Early
) -> None:
    model = early("llama", 3)
    with pytest.raises(UserError, match=message):
        add_lora(model, LoraConfig(**values), 2, seed=0)
    assert not adapters(model)


def test_adapters_are_put_where_they_were_asked_for(early: Early) -> None:
    model = early("llama", 2)
    names = add_lora(model, LoraConfig(layers="1", r=3), 2, seed=0)
    assert names == ["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]
    assert list(adapters(model)) == names
    shapes = {name: tuple(t.shape) for name, t in adapter_tensors(model).items()}
    assert shapes == {
        "layers.1.self_attn.q_proj.lora_A.weight": (3, 32),
        "layers.1.self_attn.q_proj.lora_B.weight": (32, 3),
        "layers.1.self_attn.v_proj.lora_A.weight": (3, 32),
        "layers.1.self_attn.v_proj.lora_B.weight": (16, 3),
    }


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 12 / 9), (True, 12 / 3)])
def test_update_is_scaled(rslora: bool, scaling: float, early: Early) -> None:
    model = early("qwen2", 1)
    name = "layers.0.self_attn.k_proj"
    base = model.decoder.get_submodule(name)
    adapter = wrap(model, name, r=9, alpha=12, rslora=rslora)
    with torch.no_grad():
        for half in (adapter.lora_A, adapter.lora_B):
            half.weight.normal_()
        x = torch.randn(2, 5, 32)
        expected = base(x) + scaling * (x @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T)
        torch.testing.assert_close(adapter(x), expected)
        torch.testing.assert_close(adapter(x) - base(x), adapter(x) - adapter.base_layer(x))


def test_a_new_adapter_changes_nothing(early: Early) -> None:
    """B is zero, so the model is the base model, bit for bit."""
    words = pack(random_words(3, 5))
    model = early("llama", 2)
    before = model(words, 2)
    add_lora(model, LoraConfig(), 2, seed=0)
    assert torch.equal(model(words, 2), before)
    bound = math.sqrt(1 / 32)
    for name, tensor in adapter_tensors(model).items():
        if name.endswith("lora_B.weight"):
            assert (tensor == 0).all()
        else:
            # Kaiming-uniform with a = sqrt(5), as in PEFT
            assert 0.9 * bound < tensor.abs().max() <= bound


def test_adapters_beside_bf16_weights_are_fp32(early: Early) -> None:
    model = early("llama", 1).to(torch.bfloat16)
    add_lora(model, LoraConfig(layers="0"), 1, seed=0)
    assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float32}
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.normal_()
    assert model(pack(random_words(2, 4)), 1).dtype == torch.bfloat16


def randomise(model: EarlyModel) -> None:
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.copy_(torch.randn(tensor.shape))


def test_adapters_can_be_switched_off(early: Early) -> None:
    words = pack(random_words(3, 5))
    model = early("llama", 2)
    base = model(words, 2)
    add_lora(model, LoraConfig(), 2, seed=0)
    randomise(model)
    adapted = model(words, 2)
    assert not torch.allclose(adapted, base)
    with adapters_off(model):
        assert torch.equal(model(words, 2), base)
        with adapters_off(model):
            assert torch.equal(model(words, 2), base)
        # an inner use does not end the outer one
        assert torch.equal(model(words, 2), base)
    assert torch.equal(model(words, 2), adapted)


def test_adapters_are_switched_on_again_after_an_error(early: Early) -> None:
    model = early("llama", 1)
    add_lora(model, LoraConfig(layers="0"), 1, seed=0)
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        raise RuntimeError("inside")
    assert all(adapter.active for adapter in adapters(model).values())


def test_dropout_acts_while_training_only(early: Early) -> None:
    words = pack(random_words(3, 5))
    model = early("llama", 2)
    add_lora(model, LoraConfig(dropout=0.5), 2, seed=0)
    randomise(model)
    # not even before the first call of train() or eval()
    assert torch.equal(model(words, 2), model(words, 2))
    model.train()
    assert not torch.equal(model(words, 2), model(words, 2))
    with adapters_off(model):
        assert torch.equal(model(words, 2), model(words, 2))
    model.eval()
    assert torch.equal(model(words, 2), model(words, 2))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_base_digest_is_blind_to_adapters_and_training(family: str, early: Early) -> None:
    model = early(family, 2)
    digest = model.base_digest()
    add_lora(model, LoraConfig(modules=("q_proj", "down_proj"), r=2), 2, seed=0)
    assert model.base_digest() == digest
    # weight decay would move a base weight that slipped in among the trainable ones
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1, weight_decay=0.5)
    words = pack(random_words(3, 5))
    for _ in range(3):
        model(words, 2).square().mean().backward()
        optimizer.step()
    assert all((t != 0).any() for t in adapter_tensors(model).values())
    assert model.base_digest() == digest


def drawn(early: Early, seed: int) -> dict[str, Tensor]:
    model = early("llama", 2)
    add_lora(model, LoraConfig(), 2, seed=seed)
    return {n: t.detach().clone() for n, t in adapter_tensors(model).items() if "lora_A" in n}


def test_one_seed_gives_one_adapter(early: Early) -> None:
    first = drawn(early, 7)
    torch.manual_seed(99)
    again, other = drawn(early, 7), drawn(early, 8)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])
    # nor are two layers of a model alike
    a, b = list(first.values())[:2]
    assert not torch.equal(a, b)


def test_adding_adapters_leaves_the_callers_random_state_alone(early: Early) -> None:
    model = early("llama", 2)
    before = torch.get_rng_state()
    add_lora(model, LoraConfig(), 2, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
