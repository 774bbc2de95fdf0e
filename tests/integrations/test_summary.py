"""What ``accelerate`` says that it did, and did not."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.integrations.conftest import adapt
from tli_engine import accelerate
from tli_engine.errors import UserError
from tli_engine.integrations.accelerate import Summary
from tli_engine.integrations.script import ScriptRun, accelerated_loading

Load = Callable[..., Any]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "lora_bias=True")],
    ids=["dora", "bias"],
)
def test_adapters_that_peft_computes_are_not_counted(
    load: Load, nf4: bool, options: dict[str, Any], reason: str
) -> None:
    summary = accelerate(adapt(load(nf4=nf4), lora_dropout=0.1, **options))
    lines = str(summary).splitlines()
    assert lines[0] == f"accelerated: {'28 x bitsandbytes Linear4bit' if nf4 else 'no layer'}"
    left = f"left as they are: 8 x: {reason}: PEFT computes the adapter ({FIRST} …)"
    assert lines[-1] == left
    assert sum("left" in line for line in lines) == 1
    assert len(summary.by_peft) == 8


@pytest.mark.parametrize("training", [False, True])
def test_dropout_leaves_training_to_peft(load: Load, training: bool) -> None:
    summary = str(accelerate(adapt(load(nf4=False), lora_dropout=0.1).train(training)))
    left = f"8 x: lora_dropout=0.1: PEFT computes the adapter ({FIRST} …)"
    assert "accelerated: 8 x LoRA over Linear\n" in summary
    assert f"left as they are in training: {left}" in summary
    assert "left" not in str(accelerate(adapt(load(nf4=False))))


def test_the_adapter_that_is_on_counts(load: Load) -> None:
    model = adapt(adapt(load(nf4=False)), "second", use_dora=True)
    assert accelerate(model).by_peft == {}
    model.set_adapter("second")
    assert len(accelerate(model).by_peft) == 8
    model.base_model.set_adapter(["default", "second"])
    assert accelerate(model).by_peft == {}


def test_hooked_adapters_are_left(load: Load) -> None:
    model = adapt(load(nf4=False))
    factor = model.get_submodule(FIRST).lora_A["default"]
    factor.register_forward_hook(lambda *_: None)
    by_peft = accelerate(model).by_peft
    assert by_peft.keys() == {FIRST}
    assert "hooks" in by_peft[FIRST]


def test_8bit_layers_are_named(load: Load) -> None:
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    model = load(nf4=False)
    mlp = model.model.layers[0].mlp
    mlp.up_proj = bnb.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=False)
    summary = accelerate(model)
    said = "left as they are: 1 x: holds 8-bit data; the kernels read nf4"
    assert f"{said} (model.layers.0.mlp.up_proj …)" in str(summary)
    model.is_loaded_in_8bit = True
    model = get_peft_model(model, LoraConfig(target_modules=["up_proj"]))
    adapted = "base_model.model.model.layers.0.mlp.up_proj"
    kept = accelerate(model).kept
    assert "LoRA over Linear8bitLt; " in kept[adapted]
    assert "8-bit" in kept[f"{adapted}.base_layer"]


def test_adapters_over_4bit_layers_that_stay(load: Load) -> None:
    model = load()
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    summary = accelerate(adapt(model))
    assert summary.by_peft == {FIRST: "LoRA over a 4-bit layer that is left as it is"}
    assert "27 x bitsandbytes Linear4bit, 7 x LoRA over Linear4bit" in str(summary)


def test_another_architecture_is_named_once() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 50}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=1, eos_token_id=1))
    summary = accelerate(model)
    assert list(summary.eager) == [""]
    assert str(summary).count("model type 'gpt2'") == 1
    with pytest.raises(UserError) as error:
        accelerate(model, stop_at=1)
    assert str(error.value).count("model type 'gpt2'") == 1


def test_what_is_not_repacked_is_not_said() -> None:
    assert "repacked" not in str(Summary(repacked_nbytes=30_000))
    assert "repacked for the kernels: 3 MiB" in str(Summary(repacked_nbytes=3 * 2**20))


def test_loading_an_adapter_is_said_once(load: Load, tmp_path: Any) -> None:
    """PEFT makes the model and loads its weights in two steps, both of which count as loading."""
    from peft import PeftModel

    adapt(load(nf4=False)).save_pretrained(tmp_path)
    said: list[str] = []
    with accelerated_loading(ScriptRun(said.append)):
        base = load(nf4=False)
        said.clear()
        model = PeftModel.from_pretrained(base, tmp_path)
        assert len(said) == 2
        assert said[0].startswith("PeftModel: accelerated: 8 x LoRA over Linear")
        # what changes is said again
        adapt(model, "second", use_dora=True)
        model.set_adapter("second")
        model.load_adapter(tmp_path, "third")
    assert "8 x: DoRA" in said[-1]
