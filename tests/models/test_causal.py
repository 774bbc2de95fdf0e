"""The loss of packed documents, and its gradients, are transformers' own of each document alone."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tli_engine.config import LoraConfig
from tli_engine.errors import UserError
from tli_engine.models.adapters import adapter_tensors, adapters
from tli_engine.models.causal import CausalModel, load_causal
from tli_engine.models.files import FAMILIES

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# past the window of 24 tokens, below it, at it, and of one predicted token
LENGTHS = (40, 7, 24, 2)
MODELS = [
    *(pytest.param(family, {}, id=family) for family in FAMILIES),
    pytest.param("llama", {"tie_word_embeddings": True}, id="llama-tied"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-biases"),
    pytest.param("gemma3_text", {"tie_word_embeddings": False}, id="gemma3-untied"),
    pytest.param(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
        id="qwen2-windows",
    ),
]
Load = Callable[..., CausalModel]
Gradients = dict[str, Tensor]


def reference_loss(theirs: Any, weights: dict[str, Tensor], documents: Any) -> Tensor:
    """The summed loss by transformers, one document at a time."""
    total = torch.zeros(())
    for ids, prompt in documents:
        call = {"input_ids": torch.tensor([ids]), "use_cache": False}
        logits = functional_call(theirs, weights, (), call).logits[0, prompt - 1 : -1]
        targets = torch.tensor(ids[prompt:])
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return total


def lora_reference(theirs: Any, model: CausalModel, documents: Any) -> tuple[Tensor, Gradients]:
    """Loss and gradients with the adapters added into transformers' weights."""
    leaves = {
        n: t.detach().clone().requires_grad_() for n, t in adapter_tensors(model.early).items()
    }
    weights = dict(theirs.named_parameters())
    for name, adapter in adapters(model.early).items():
        a, b = (leaves[f"{name}.lora_{letter}.weight"] for letter in "AB")
        key = f"model.{name}.weight"
        weights[key] = weights[key].detach() + adapter.scaling * b @ a
    loss = reference_loss(theirs, weights, documents)
    return loss, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def gradients(model: CausalModel, loss: Tensor) -> Gradients:
    """Gradients by the modules' own names, also where tensors are joined."""
    trained = model.trainable()
    grads = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    for projection in [] if model.early.fused is None else model.early.fused.projections():
        for name, _, whole, rows in projection.parts():
            grads[name] = grads[whole][rows]
        owner, _, leaves = projection.name.rpartition(".")
        for whole in projection.joined_weights().keys() & grads.keys():
            kind = whole.rpartition(".")[2]
            parts = grads.pop(whole).split(projection.sizes)
            for leaf, grad in zip(leaves.split("+"), parts, strict=True):
                grads[f"{owner}.{leaf}.{kind}"] = grad
        for name in projection.joined():
            del grads[name]
    return grads


def assert_alike(actual: Gradients, expected: Gradients) -> None:
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        assert (grad - expected[name]).norm() < 1e-4 * expected[name].norm(), name


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_lora_gradients_are_those_of_transformers(
    family: str, overrides: Any, fused: bool, causal: Load, full: Any, texts: Any
) -> None:
    model = causal(family, LoraConfig(layers="0-2", modules=ALL, r=4), **overrides)
    if fused:
        model.fuse()
    packed = texts(*LENGTHS)
    loss = model.loss(packed)
    expected, exact = lora_reference(full(family, **overrides), model, packed.documents)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_alike(gradients(model, loss), exact)


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_gradients_of_all_weights_are_those_of_transformers(
    family: str, overrides: Any, fused: bool, causal: Load, full: Any, texts: Any
) -> None:
    model, theirs = causal(family, **overrides), full(family, **overrides)
    model.train_all()
    if fused:
        model.fuse()
    packed = texts(*LENGTHS)
    loss = model.loss(packed)
    expected = reference_loss(theirs, dict(theirs.named_parameters()), packed.documents)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    exact = {n.removeprefix("model."): p.grad for n, p in theirs.named_parameters()}
    assert_alike(gradients(model, loss), exact)


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
def test_packed_gradients_are_the_sum_of_the_unpacked_ones(
    fused: bool, causal: Load, texts: Any
) -> None:
    model = causal("mistral", LoraConfig(layers="1-2", modules=ALL, r=4))
    if fused:
        model.fuse()
    alone = [texts(length, seed=i) for i, length in enumerate(LENGTHS)]
    from_parts: Gradients = {}
    for one in alone:
        for name, grad in gradients(model, model.loss(one)).items():
            from_parts[name] = from_parts.get(name, torch.zeros_like(grad)) + grad
    together = type(alone[0]).of([d for one in alone for d in one.documents])
    assert_alike(gradients(model, model.loss(together)), from_parts)


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
def test_another_document_changes_nothing(fused: bool, causal: Load, texts: Any) -> None:
    model = causal("gemma3_text")
    if fused:
        model.fuse()
    one, other = texts(30, 9), texts(30, 9, seed=1)
    mixed = type(one).of([one.documents[0], other.documents[1]])
    rows = torch.arange(30)
    a, b = (model.hidden_states(t.words, rows) for t in (one, mixed))
    torch.testing.assert_close(a, b)


def test_no_target_is_no_loss(causal: Load, texts: Any) -> None:
    model = causal("llama", LoraConfig(layers="0", modules=ALL, r=4))
    ids = texts(9).documents[0][0]
    loss = model.loss(type(texts(9)).of([(ids, len(ids))]))
    assert loss == 0
    assert not any(grad.any() for grad in gradients(model, loss).values())


def test_full_fine_tuning_of_nf4_weights_is_refused(tiny: Any) -> None:
    files = tiny("llama", hidden_size=64, intermediate_size=64)
    options: Any = {"dtype": torch.float32, "device": torch.device("cpu")}
    model = load_causal(files, quantize="nf4", **options)
    with pytest.raises(UserError, match="method: full trains every weight"):
        model.train_all()


def test_trained_weights_may_be_joined_before_or_after(causal: Load, texts: Any) -> None:
    packed = texts(*LENGTHS)
    found = []
    for early in (True, False):
        model = causal("qwen2")
        if early:
            model.train_all()
        model.fuse()
        if not early:
            model.train_all()
        assert "layers.0.self_attn.q_proj+k_proj+v_proj.bias" in model.trainable()
        assert "layers.0.self_attn.q_proj.weight" not in model.trainable()
        found.append(gradients(model, model.loss(packed)))
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_joined_weights_are_those_that_go_by_the_modules_names(causal: Load, texts: Any) -> None:
    """An update in place of what is trained reaches the weights that are saved."""
    model, other = causal("qwen2"), causal("qwen2")
    model.train_all(), model.fuse(), other.train_all()
    packed = texts(*LENGTHS)
    with torch.no_grad():
        for tensor in model.trainable().values():
            tensor += 0.01 * torch.randn_like(tensor)
        for name, tensor in other.weights().items():
            tensor.copy_(model.weights()[name])
        torch.testing.assert_close(model.loss(packed), other.loss(packed))


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
def test_training_leaves_the_files_memory_alone(fused: bool, causal: Load) -> None:
    model = causal("qwen2")
    if fused:
        model.fuse()
    model.train_all()
    with torch.no_grad():
        for tensor in model.trainable().values():
            tensor += 1
    for name, tensor in causal("qwen2").weights().items():
        assert torch.equal(model.weights()[name], tensor + 1), name


def test_weights_go_by_their_names(causal: Load, full: Any) -> None:
    model, theirs = causal("llama"), full("llama")
    expected = {n.removeprefix("model."): p for n, p in theirs.named_parameters()}
    weights = model.weights()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in weights.items())
    assert not model.trainable()


def test_a_missing_head_is_named(tiny: Any) -> None:
    files = tiny("llama", tie_word_embeddings=True)
    untied = copy.deepcopy(files.config)
    untied.tie_word_embeddings = False
    options: Any = {"dtype": torch.float32, "device": torch.device("cpu")}
    with pytest.raises(UserError, match=r"has no tensor lm_head\.weight"):
        load_causal(dataclasses.replace(files, config=untied), **options)
