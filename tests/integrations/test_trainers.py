"""Trainers of other libraries on accelerated models: the examples of docs/examples, plain and accelerated."""

import ast
import importlib.util
import re
import sys
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
# of the norm of an adapter's tensor; TRL holds adapters over 4-bit weights in bf16, in which PEFT then
# computes and the engine does not, and Adam's first steps go by a gradient's sign
TOLERANCE = {"trainer": 1e-3, "trl_sft": 0.1, "sentence_transformers_loss": 1e-3}
NEEDS = {
    "trainer": (),
    "trl_sft": ("trl", "datasets"),
    "sentence_transformers_loss": ("sentence_transformers", "datasets"),
}


def example(name: str) -> Any:
    """The module of an example."""
    for library in NEEDS[name]:
        if find_spec(library) is None:
            pytest.skip(f"needs {library}; pip install -e '.[trainers]'")
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NEEDS)
def test_training_is_the_unaccelerated_one(
    name: str, folder: Callable[..., Path], tmp_path: Path
) -> None:
    train = example(name).train
    model = folder("llama", num_hidden_layers=6)
    plain = train(str(model), tmp_path / "plain", steps=6, accelerated=False)
    ours = train(str(model), tmp_path / "ours", steps=6, accelerated=True)
    assert len(plain.losses) == 6
    assert plain.losses[0] != plain.losses[-1]
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-4, atol=1e-3)
    assert ours.weights.keys() == plain.weights.keys()
    assert len(ours.weights) > 0
    for weight, theirs in plain.weights.items():
        difference = (ours.weights[weight].float() - theirs.float()).norm()
        assert difference <= TOLERANCE[name] * theirs.float().norm(), weight
    assert "accelerated" in ours.summary
    assert plain.summary == ""


def test_the_extra_brings_what_the_examples_need() -> None:
    project = tomllib.loads((EXAMPLES.parents[1] / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["trainers"]
    brought = {re.split("[<>=;]", requirement)[0].replace("-", "_") for requirement in asked}
    # loaded by transformers, not imported
    needed = {"bitsandbytes"}
    for name in NEEDS:
        for node in ast.walk(ast.parse((EXAMPLES / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                needed |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                needed.add(str(node.module).partition(".")[0])
    assert needed - sys.stdlib_module_names - {"tli_engine"} <= brought


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_has_a_model_of_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--steps", "1"])
    module.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    said = [line for line in lines if line[:1] == ["accelerated:"]]
    assert [line[1] for line in said] == ["False:", "True:"]
