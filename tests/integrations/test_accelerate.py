"""Layers replaced in place: values, gradients, and everything that users do with a model besides."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.integrations.conftest import adapt, assert_close, gradients
from tli_engine import accelerate, restore
from tli_engine.integrations import lora_bnb_layers
from tli_engine.testing import assert_within_error_budget

Load = Callable[..., Any]


def run(model: Any, tokens: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Loss and logits, and every gradient."""
    out = model(**tokens, labels=tokens["input_ids"])
    out.loss.backward()
    return (out.loss.detach(), out.logits.detach()), gradients(model)


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 8},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("double_quant", [False, True], ids=["nf4", "double"])
@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_nf4_equals_bitsandbytes_and_peft(
    load: Load, tokens: dict[str, Tensor], double_quant: bool, adapter: str | None
) -> None:
    model = load(double_quant=double_quant)
    if adapter is None:
        # something has to be trained
        model.model.norm.weight.requires_grad_(True)
    else:
        model = adapt(model, **ADAPTERS[adapter])
    expected, expected_gradients = run(model, tokens)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    was = classes(model)

    summary = accelerate(model)
    assert sum(kind == "bitsandbytes Linear4bit" for kind in summary.replaced.values()) == 28
    assert summary.kept == {}
    actual, actual_gradients = run(model, tokens)
    assert_close(actual, expected)
    assert actual_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert_close(actual_gradients[name], gradient, 1e-4)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places

    restore(model)
    assert classes(model) == was
    again, _ = run(model, tokens)
    assert all(map(torch.equal, again, expected))
    assert not any("_tli_engine" in name for m in model.modules() for name in m.__dict__)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_dense_layers_with_adapters_equal_pefts(
    load: Load, tokens: dict[str, Tensor], adapter: str
) -> None:
    model = adapt(load(nf4=False), **ADAPTERS[adapter])
    expected, expected_gradients = run(model, tokens)
    summary = accelerate(model)
    assert set(summary.replaced.values()) == {"LoRA over Linear"}
    actual, actual_gradients = run(model, tokens)
    assert_close(actual, expected)
    for name, gradient in expected_gradients.items():
        assert_close(actual_gradients[name], gradient, 1e-4)


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_bf16_errs_no_more_than_peft(load: Load, tokens: dict[str, Tensor], nf4: bool) -> None:
    # the same weights and adapters in three arithmetics: fp32, PEFT's bf16, the engine's bf16
    exact = adapt(load(nf4=nf4))
    model = adapt(load(nf4=nf4, dtype=torch.bfloat16))
    if not nf4:
        rounded = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in exact.named_parameters():
                parameter.copy_(rounded[name])
    _, truth = run(exact, tokens)
    theirs, their_gradients = run(model, tokens)
    accelerate(model)
    ours, our_gradients = run(model, tokens)
    for name, gradient in truth.items():
        mine, others = our_gradients[name], their_gradients[name]
        assert_within_error_budget(mine, others, gradient.double(), factor=3)
    assert abs(ours[0] - theirs[0]) < 0.02 * theirs[0]


def test_the_fused_update_is_taken(load: Load, tokens: dict[str, Tensor]) -> None:
    """What is compared above is not PEFT with itself."""
    model = adapt(load())
    accelerate(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer) is lora_bnb_layers.Linear4bit
    called = []
    base = type(layer.base_layer)
    original = base.product

    def product(self: Any, x: Tensor, adapter: Any = None) -> Tensor:
        called.append(adapter)
        return original(self, x, adapter)

    base.product = product
    try:
        model(**tokens)
    finally:
        base.product = original
    assert sum(adapter is not None for adapter in called) == 8
    assert len(called) == 28


@pytest.mark.parametrize("nf4", [True, False])
def test_hooks_of_the_layer_below_an_adapter_run(
    load: Load, tokens: dict[str, Tensor], nf4: bool
) -> None:
    model = adapt(load(nf4=nf4))
    accelerate(model)
    base = model.base_model.model.model.layers[1].self_attn.q_proj.base_layer
    called: list[str] = []
    base.register_forward_pre_hook(lambda *_: called.append("before"))
    base.register_forward_hook(lambda *_: called.append("after"))
    base.register_full_backward_hook(lambda *_: called.append("backward"))
    run(model, tokens)
    assert called == ["before", "after", "backward"]


def test_adapters_switch_as_in_peft(load: Load, tokens: dict[str, Tensor]) -> None:
    def outputs(model: Any) -> list[Tensor]:
        found = []
        model.set_adapter("first")
        found.append(model(**tokens).logits)
        model.set_adapter("second")
        found.append(model(**tokens).logits)
        model.base_model.set_adapter(["first", "second"])
        found.append(model(**tokens).logits)
        with model.disable_adapter():
            found.append(model(**tokens).logits)
        names = ["first", "__base__", "second"]
        model.eval()
        with torch.no_grad():
            found.append(model(**tokens, adapter_names=names, output_hidden_states=True).logits)
        model.train()
        return found

    model = adapt(adapt(load(nf4=False), "first", 1), "second", 2, r=6)
    expected = outputs(model)
    accelerate(model)
    actual = outputs(model)
    for mine, theirs in zip(actual, expected, strict=True):
        assert_close(mine, theirs, 1e-4)
    assert not any(torch.allclose(a, expected[0]) for a in expected[1:])


def test_adapters_that_come_later_are_taken_in(load: Load, tokens: dict[str, Tensor]) -> None:
    base = load()
    first = accelerate(base)
    assert len(first.replaced) == 28
    model = adapt(base)
    late = model.base_model.model.model.layers[1].self_attn.v_proj
    assert type(late) is not lora_bnb_layers.Linear4bit
    slow = model(**tokens).logits
    second = accelerate(model)
    assert len(second.replaced) == 36
    assert type(late) is lora_bnb_layers.Linear4bit
    assert_close(model(**tokens).logits, slow)
    # again changes nothing
    was = classes(model)
    assert accelerate(model).replaced == second.replaced
    assert classes(model) == was


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_merging_is_pefts(load: Load, tokens: dict[str, Tensor], nf4: bool) -> None:
    plain, model = adapt(load(nf4=nf4)), adapt(load(nf4=nf4))
    accelerate(model)
    model(**tokens)
    expected = plain.merge_and_unload().train()
    merged = model.merge_and_unload().train()
    state = expected.state_dict()
    assert merged.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in merged.state_dict().items())
    # the layer has read its new weight
    assert_close(merged(**tokens).logits, expected(**tokens).logits)


def test_merged_adapters_and_unmerging(load: Load, tokens: dict[str, Tensor]) -> None:
    plain, model = adapt(load(nf4=False)), adapt(load(nf4=False))
    accelerate(model)
    for m in (plain, model):
        m.merge_adapter()
    assert_close(model(**tokens).logits, plain(**tokens).logits)
    for m in (plain, model):
        m.unmerge_adapter()
    assert_close(model(**tokens).logits, plain(**tokens).logits)


def test_saving_and_loading(load: Load, tokens: dict[str, Tensor], tmp_path: Path) -> None:
    from peft import PeftModel

    plain, model = adapt(load()), adapt(load())
    accelerate(model)
    for m, name in ((plain, "plain"), (model, "ours")):
        m.save_pretrained(tmp_path / name)
        m.get_base_model().save_pretrained(tmp_path / name / "base")
    for file in ("adapter_model.safetensors", "base/model.safetensors"):
        mine, theirs = (load_file(tmp_path / name / file) for name in ("ours", "plain"))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    for file in ("adapter_config.json", "base/config.json"):
        assert (tmp_path / "ours" / file).read_text() == (tmp_path / "plain" / file).read_text()
    again = PeftModel.from_pretrained(load(), tmp_path / "ours").train()
    accelerate(again)
    assert_close(again(**tokens).logits, plain(**tokens).logits)


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_state_dicts_load_into_it(load: Load, tokens: dict[str, Tensor], nf4: bool) -> None:
    model, other = adapt(load(nf4=nf4)), adapt(load(nf4=nf4), seed=5)
    accelerate(model)
    accelerate(other)
    logits = model(**tokens).logits
    projection = other.get_base_model().model.layers[1].mlp.up_proj
    with torch.no_grad():
        projection.weight.zero_()
        other(**tokens)
    state = model.state_dict()
    # bitsandbytes' loading of statistics goes by transformers; the bytes beside them are loaded
    loaded = other.load_state_dict(state, strict=not nf4)
    assert loaded.missing_keys == []
    assert all(".weight." in key for key in loaded.unexpected_keys)
    assert_close(other(**tokens).logits, logits)
    with torch.no_grad():
        projection.weight.zero_()
    assert not torch.allclose(other(**tokens).logits, logits)
    # a copy on another device or of another dtype is put in the place of what is there
    other.load_state_dict(state, strict=not nf4, assign=True)
    assert_close(other(**tokens).logits, logits)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stand_alone(load: Load, tokens: dict[str, Tensor], how: Any) -> None:
    model = adapt(load())
    accelerate(model)
    logits = model(**tokens).logits
    other = how(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert_close(model(**tokens).logits, logits)
    changed = other(**tokens, output_hidden_states=True)
    assert not torch.allclose(changed.logits, logits)
    assert type(changed.hidden_states) is not tuple
    restore(other)
    assert_close(other(**tokens).logits, changed.logits)
    assert type(model(**tokens, output_hidden_states=True).hidden_states) is not tuple


def test_generation_goes_on(load: Load, tokens: dict[str, Tensor]) -> None:
    model = adapt(load(nf4=False)).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 258}
    with_states = {"return_dict_in_generate": True, "output_hidden_states": True}
    expected = model.generate(**tokens, **options, **with_states)
    accelerate(model)
    actual = model.generate(**tokens, **options, **with_states)
    assert torch.equal(actual.sequences, expected.sequences)
    for mine, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_close(tuple(mine), tuple(theirs), 1e-4)


@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
def test_gradient_checkpointing(load: Load, tokens: dict[str, Tensor], reentrant: bool) -> None:
    from peft import prepare_model_for_kbit_training

    def make() -> Any:
        options = {"use_reentrant": reentrant}
        base = prepare_model_for_kbit_training(load(), gradient_checkpointing_kwargs=options)
        return adapt(base)

    plain, model = make(), make()
    accelerate(model)
    expected, expected_gradients = run(plain, tokens)
    actual, actual_gradients = run(model, tokens)
    assert_close(actual, expected)
    assert actual_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert_close(actual_gradients[name], gradient, 1e-4)


def test_compiles_whole(load: Load, tokens: dict[str, Tensor]) -> None:
    model = adapt(load(num_hidden_layers=2))
    accelerate(model)
    expected, expected_gradients = run(model, tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual, actual_gradients = run(compiled, tokens)
    assert_close(actual, expected)
    for name, gradient in expected_gradients.items():
        assert_close(actual_gradients[f"_orig_mod.{name}"], gradient, 1e-4)
    # a replaced weight is seen by what was compiled
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    other = model.base_model.model.model.layers[1].mlp.up_proj
    layer.weight = other.weight
    assert_close(compiled(**tokens).logits, model(**tokens).logits)
    assert not torch.allclose(model(**tokens).logits, expected[1])


def test_a_replaced_or_rewritten_weight_is_read_anew(load: Load) -> None:
    model = load()
    accelerate(model)
    layer, other = (model.model.layers[i].mlp.up_proj for i in (0, 1))
    x = torch.randn(3, 64)
    first, second = layer(x), other(x)
    assert not torch.allclose(first, second)
    kept = layer.weight
    layer.weight = other.weight
    assert torch.equal(layer(x), second)
    layer.weight = kept
    assert torch.equal(layer(x), first)
    with torch.no_grad():
        layer.weight.quant_state.absmax.mul_(2)
    assert_close(layer(x), 2 * first)
