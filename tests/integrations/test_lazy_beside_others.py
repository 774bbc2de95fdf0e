"""Lazy hidden states of models that other libraries have changed: wrapped, compiled, offloaded modules."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.conftest import adapt, gradients
from tli_engine import accelerate
from tli_engine.cli import main
from tli_engine.errors import UserError
from tli_engine.integrations.lazy_model import settings_of

Load = Callable[..., Any]


def read(out: Any) -> list[Tensor]:
    return [*out.hidden_states, out.logits]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)


def reasons(model: Any) -> list[str]:
    """Why calls were computed at once."""
    settings = settings_of(model)
    assert settings is not None
    return [n.removeprefix("at once: ") for n in settings.counts if n.startswith("at once: ")]


@pytest.mark.parametrize(
    "whole",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "norm"]},
        {"trainable_token_indices": [3, 7]},
    ],
    ids=["head", "embeddings and norm", "tokens"],
)
def test_what_peft_trains_whole(
    load: Load, tokens: dict[str, Tensor], whole: dict[str, Any]
) -> None:
    def make() -> Any:
        model = adapt(load(nf4=False), target_modules=["o_proj"], **whole)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_" not in name:
                    parameter.mul_(1.5)
        return model

    def step(model: Any) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        with model.disable_adapter(), torch.no_grad():
            bare = model(**tokens, output_hidden_states=True)
        out = model(**tokens, output_hidden_states=True, labels=tokens["input_ids"])
        out.loss.backward()
        # without adapters, as at the call
        return read(out), read(bare), gradients(model)

    expected, bare, grads = step(make())
    model = make()
    accelerate(model)
    actual = step(model)
    for mine, theirs in zip(actual[0] + actual[1], expected + bare, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[-1], bare[-1])
    assert actual[2].keys() == grads.keys()
    for name, gradient in actual[2].items():
        torch.testing.assert_close(gradient, grads[name], rtol=1e-4, atol=1e-6)


def test_weights_that_peft_parametrises(load: Load, tokens: dict[str, Tensor]) -> None:
    """They are other ones while a block runs, and after."""
    found, model = [], None
    for accelerated in (False, True):
        parameters = {"target_parameters": ["mlp.up_proj.weight"]}
        model = adapt(load(nf4=False), target_modules=["q_proj"], **parameters)
        if accelerated:
            accelerate(model)
        for _ in range(2):
            out = model(**tokens, output_hidden_states=True, labels=tokens["input_ids"])
            (out.loss + out.hidden_states[2].square().mean()).backward()
        found.append((read(out), gradients(model)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert len(found[0][1]) == 16
    assert reasons(model.get_base_model()) == [
        "PEFT parametrises weights while it runs (target_parameters)"
    ]


def test_mixed_precision_of_accelerate(load: Load, tokens: dict[str, Tensor]) -> None:
    """Its wrapper looks at all that a call returns."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    wrapped = Accelerator(mixed_precision="bf16", cpu=True).prepare
    try:
        expected = wrapped(load(nf4=False))(**tokens, output_hidden_states=True)
        model = load(nf4=False)
        accelerate(model)
        actual = wrapped(model)(**tokens, output_hidden_states=True)
        assert_equal(read(actual), read(expected))
        assert actual.past_key_values.get_seq_length() == 7
        assert reasons(model) == ["its forward was replaced by another library"]
        limited = load(nf4=False)
        accelerate(limited, stop_at=2)
        with pytest.raises(UserError, match="its forward was replaced"):
            wrapped(limited)(**tokens, output_hidden_states=True)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("inner", [False, True], ids=["causal LM", "decoder"])
def test_a_forward_that_is_replaced_later(
    load: Load, tokens: dict[str, Tensor], inner: bool
) -> None:
    def replace(model: Any) -> None:
        target = model.model if inner else model
        forward = target.forward

        def twice(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            out[0] if inner else out.logits
            out["hidden_states"] = tuple(2 * state for state in out.hidden_states)
            return out

        target.forward = twice

    expected, actual = load(nf4=False), load(nf4=False)
    accelerate(actual)
    replace(expected)
    replace(actual)
    outs = [m(**tokens, output_hidden_states=True) for m in (actual, expected)]
    assert_equal(read(outs[0]), read(outs[1]))
    assert type(outs[0].hidden_states) is tuple
    assert reasons(actual) == ["its forward was replaced by another library"]


@pytest.mark.parametrize("part", ["all", "two blocks"])
@pytest.mark.parametrize("adapted", [False, True])
def test_offloading_that_comes_later(
    load: Load, tokens: dict[str, Tensor], part: str, adapted: bool
) -> None:
    from accelerate import cpu_offload

    model = adapt(load(nf4=False)) if adapted else load(nf4=False)
    expected = model(**tokens, output_hidden_states=True)
    accelerate(model)
    base = model.get_base_model() if adapted else model
    for module in [model] if part == "all" else base.model.layers[1:3]:
        cpu_offload(module, execution_device=torch.device("cpu"))
    actual = model(**tokens, output_hidden_states=True)
    assert_equal(read(actual), read(expected))
    whole = part == "all" and not adapted
    assert reasons(base) == [
        "its forward was replaced by another library"
        if whole
        else "it is offloaded by accelerate's hooks"
    ]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("before", [False, True], ids=["later", "before"])
def test_compiled_modules(
    load: Load, tokens: dict[str, Tensor], before: bool, training: bool
) -> None:
    def compile_some(model: Any) -> None:
        for i in (0, 2):
            model.model.layers[i] = torch.compile(model.model.layers[i], backend="eager")
        model.lm_head = torch.compile(model.lm_head, backend="eager")

    model = load(nf4=False, attention_dropout=0.5).train(training)
    if before:
        compile_some(model)
        accelerate(model)
    else:
        accelerate(model)
        compile_some(model)
    torch.manual_seed(0)
    expected = model(**tokens, output_hidden_states=True, use_cache=True)
    torch.manual_seed(0)
    out = model(**tokens, output_hidden_states=True)
    assert type(out.hidden_states) is not tuple
    # in the mode of the call
    model.train(not training)
    assert_equal(read(out), read(expected))
    assert model.model.layers[0].training is not training
    assert reasons(model) == []


@pytest.mark.parametrize("wraps", [False, True], ids=["in place", "wrapped"])
def test_a_decoder_that_is_compiled_is_run_whole(
    load: Load, tokens: dict[str, Tensor], wraps: bool
) -> None:
    model = load(nf4=False)
    expected = model(**tokens, output_hidden_states=True)
    accelerate(model)
    if wraps:
        model.model = torch.compile(model.model, backend="eager")
    else:
        model.model.compile(backend="eager")
    actual = model(**tokens, output_hidden_states=True)
    assert_equal(read(actual), read(expected))
    assert len(reasons(model)) == 1


def test_a_scripted_module_is_run_as_ever(load: Load, tokens: dict[str, Tensor]) -> None:
    model = load(nf4=False)
    expected = model(**tokens, output_hidden_states=True)
    accelerate(model)
    model(**tokens, output_hidden_states=True)
    model.model.layers[0].mlp.act_fn = torch.jit.script(torch.nn.SiLU())
    actual = model(**tokens, output_hidden_states=True)
    assert type(actual.hidden_states) is tuple
    assert_equal(read(actual), read(expected))
    assert reasons(model) == ["it holds a module of torch.jit"]


@pytest.mark.parametrize("first", ["hook", "call"])
def test_hooks_run_in_the_order_of_an_eager_model(
    load: Load, tokens: dict[str, Tensor], first: str
) -> None:
    """Those that capture hidden states come with the first call for them."""
    found = []
    for ours in (False, True):
        model = load(nf4=False)
        if ours:
            accelerate(model)
        if first == "call":
            model(**tokens, output_hidden_states=True)
        model.model.layers[0].register_forward_hook(lambda module, args, out: 2 * out)
        found.append(read(model(**tokens, output_hidden_states=True)))
    assert_equal(*found)


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.forward = model.forward
for _ in range(3):
    model(input_ids=torch.tensor([[1, 2]]), output_hidden_states=True)
"""


def test_a_profile_says_why_calls_were_not_lazy(
    folder: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    assert main(["run", "--profile", str(tmp_path / "script.py"), str(folder())]) == 0
    expected = "calls computed at once: 3 x: its forward was replaced by another library"
    assert expected in capfd.readouterr().err
