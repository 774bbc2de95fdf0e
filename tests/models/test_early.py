"""Hidden states of the early blocks are transformers' own, for every supported family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.config import LoraConfig
from tli_engine.data.words import Word, pack
from tli_engine.errors import UserError
from tli_engine.models.adapters import adapter_tensors, add_lora
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import FAMILIES
from tli_engine.testing import random_words

DEPTH = 4
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SLIDING = ["sliding_attention"] * 2 + ["full_attention"] * 2
MODELS = [
    *(pytest.param(family, {}, id=family) for family in FAMILIES),
    *(
        pytest.param(family, {"tie_word_embeddings": True}, id=f"{family}-tied")
        for family in FAMILIES
        if family != "gemma3_text"
    ),
    pytest.param("gemma3_text", {"tie_word_embeddings": False}, id="gemma3_text-untied"),
    pytest.param("llama", {"rope_parameters": ROPE}, id="llama3-rope"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-biases"),
    pytest.param("llama", {"num_key_value_heads": 4}, id="llama-no-grouping"),
    pytest.param("llama", {"num_key_value_heads": 1}, id="llama-one-key-head"),
    pytest.param("mistral", {"sliding_window": None}, id="mistral-no-window"),
    pytest.param(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "layer_types": SLIDING},
        id="qwen2-window",
    ),
]

Early = Callable[..., EarlyModel]
Full = Callable[..., Any]


def theirs(model: Any, word: Word) -> tuple[Tensor, ...]:
    with torch.no_grad():
        output = model(torch.tensor([word.input_ids]), output_hidden_states=True)
    return tuple(h[0] for h in output.hidden_states)


def ours(model: EarlyModel, words: list[Word]) -> list[Tensor]:
    with torch.no_grad():
        return [hidden for _, hidden in model.hidden_states(pack(words))]


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_a_word_alone_has_exactly_transformers_hidden_states(
    family: str, overrides: dict[str, Any], early: Early, full: Full
) -> None:
    reference = full(family, **overrides)
    # one token, a few, and as many as the attention window holds
    words = [random_words(1, n, seed=n, prefix=1)[0] for n in (1, 6, 23)]
    expected = [theirs(reference, word) for word in words]
    assert len(expected[0]) == DEPTH + 1
    for depth in range(DEPTH + 1):
        model = early(family, depth, **overrides)
        assert len(model.blocks) == depth
        for word, states in zip(words, expected, strict=True):
            actual = ours(model, [word])
            assert len(actual) == depth + 1
            for k, (a, e) in enumerate(zip(actual, states[: depth + 1], strict=True)):
                assert (a - e).abs().max().item() == 0.0, (depth, k)
                with torch.no_grad():
                    assert torch.equal(model(pack([word]), k), e), (depth, k)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_exact_too(family: str, tiny: Callable[..., Any], full: Full) -> None:
    word = random_words(1, 9)[0]
    expected = theirs(full(family, torch.bfloat16), word)
    model = load_early(tiny(family), 3, dtype=torch.bfloat16, device=torch.device("cpu"))
    for a, e in zip(ours(model, [word]), expected[:4], strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, e)


@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_words_of_a_pack_do_not_see_each_other(
    family: str, overrides: dict[str, Any], early: Early, full: Full
) -> None:
    reference, model = full(family, **overrides), early(family, DEPTH, **overrides)
    words = [*random_words(9, 20, seed=1), *random_words(3, 4, seed=2, prefix=0)]
    offsets = pack(words).offsets.tolist()
    actual = ours(model, words)
    for i, word in enumerate(words):
        for k, expected in enumerate(theirs(reference, word)):
            own = actual[k][offsets[i] : offsets[i + 1]]
            assert relative(own, expected) <= 1e-5, (i, k)


@pytest.mark.parametrize(("family", "overrides"), MODELS[: len(FAMILIES)])
def test_lora_gradients_are_those_of_peft_on_the_whole_model(
    family: str, overrides: dict[str, Any], early: Early, full: Full
) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    layer, modules = 3, ("q_proj", "v_proj", "o_proj", "down_proj")
    lora = LoraConfig(layers="0-1", modules=modules, r=4, alpha=8)
    model = early(family, layer, **overrides)
    add_lora(model, lora, layer, seed=1)
    peft_config = PeftConfig(
        r=4, lora_alpha=8, target_modules=list(modules), layers_to_transform=[0, 1]
    )
    reference = get_peft_model(full(family, **overrides), peft_config)
    parameters = dict(reference.named_parameters())
    ours_by_theirs = {
        f"base_model.model.model.{name.removesuffix('.weight')}.default.weight": tensor
        for name, tensor in adapter_tensors(model).items()
    }
    assert set(ours_by_theirs) == {n for n, p in parameters.items() if p.requires_grad}
    with torch.no_grad():
        for name, tensor in ours_by_theirs.items():
            # B is zero at first, and then A has no gradient
            tensor.add_(0.05 * torch.randn_like(tensor))
            parameters[name].copy_(tensor)

    words = random_words(5, 12, seed=3)
    targets = [torch.randn(len(word), model.config.hidden_size) for word in words]
    (model(pack(words), layer) * torch.cat(targets)).sum().backward()
    for word, target in zip(words, targets, strict=True):
        states = reference(torch.tensor([word.input_ids]), output_hidden_states=True).hidden_states
        (states[layer][0] * target).sum().backward()

    for name, tensor in ours_by_theirs.items():
        expected = parameters[name].grad
        assert tensor.grad is not None
        assert expected.abs().max() > 0, name
        assert relative(tensor.grad, expected) <= 1e-4, name
    assert all(p.grad is None for n, p in model.named_parameters() if ".lora_" not in n)


def test_a_word_longer_than_the_window_is_refused(early: Early, full: Full) -> None:
    model, fits = early("mistral", 2), random_words(1, 23)[0]
    assert len(fits) == model.config.sliding_window
    ours(model, [fits])
    message = "a word of 25 tokens is longer than this model's attention window of 24; remove it"
    with pytest.raises(UserError, match=message):
        ours(model, [fits, random_words(1, 24)[0]])
    # without a window there is no limit
    ours(early("llama", 2), random_words(1, 40))


def test_blocks_above_the_layer_do_not_run(early: Early) -> None:
    model = early("llama", 3)
    ran: list[int] = []
    for k, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    model(pack(random_words(2, 3)), 2)
    assert ran == [0, 1]


def test_the_final_norm_belongs_to_the_whole_model(early: Early) -> None:
    assert not hasattr(early("llama", 3).decoder, "norm")
    assert hasattr(early("llama", 4).decoder, "norm")


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_loaded_is_frozen_and_in_evaluation_mode(family: str, early: Early) -> None:
    model = early(family, 2)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("depth", [-1, 5])
def test_a_layer_that_the_model_does_not_have_is_named(depth: int, early: Early) -> None:
    with pytest.raises(UserError, match=rf"hidden_states\[{depth}\] does not exist; it has 0 … 4"):
        early("llama", depth)


def test_loading_leaves_the_callers_random_state_alone(early: Early) -> None:
    before = torch.get_rng_state()
    early("llama", 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_building_a_model_leaves_modules_as_they_were(early: Early) -> None:
    """Parameters are on the meta device while building, and only then."""
    early("llama", 1)
    assert not torch.nn.Linear(2, 2).weight.is_meta
    assert torch.nn.Linear(2, 2).weight.requires_grad


def test_digest_is_of_the_weights(early: Early) -> None:
    digest = early("qwen2", 2).base_digest()
    assert digest == early("qwen2", 2).base_digest()
    assert digest != early("qwen2", 1).base_digest()
    changed = early("qwen2", 2)
    projection = changed.decoder.get_submodule("layers.1.self_attn.q_proj")
    # not in place: the weights of models of one folder share memory
    projection.bias = torch.nn.Parameter(projection.bias * 1.001)
    assert changed.base_digest() != digest
