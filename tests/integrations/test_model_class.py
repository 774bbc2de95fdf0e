"""What is made by the class of an accelerated model: a model as before, until it is accelerated itself."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine import accelerate, restore
from tli_engine.cli import main
from tli_engine.errors import UserError

Load = Callable[..., Any]


@pytest.fixture
def model(load: Load) -> Any:
    model = load(nf4=False).eval()
    accelerate(model)
    return model


def by_configuration(model: Any, folder: Path) -> Any:
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


def from_a_folder(model: Any, folder: Path) -> Any:
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("make", [by_configuration, from_a_folder])
@pytest.mark.parametrize("inner", [False, True], ids=["causal LM", "decoder"])
def test_it_is_as_before(
    model: Any, folder: Callable[..., Path], tokens: dict[str, Tensor], make: Any, inner: bool
) -> None:
    first = model.model if inner else model
    expected = first(**tokens, output_hidden_states=True)[0]
    other = make(first, folder())
    assert isinstance(other, type(first))
    copies = (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other)))
    for each in copies:
        out = each(**tokens, output_hidden_states=True)
        assert type(out.hidden_states) is tuple
        assert torch.equal(out[0], expected)
    with pytest.raises(UserError, match="not accelerated"):
        restore(other)
    assert accelerate(other).lazy == [""]
    out = other(**tokens, output_hidden_states=True)
    assert type(out.hidden_states) is not tuple
    assert torch.equal(out[0], expected)
    restore(other)
    restore(model)
    # neither library's code knows of it any more
    for each in (other, copies[2]):
        assert type(each) is type(first)
        assert not any("_tli_engine" in name for name in vars(type(each)))


def test_a_class_of_ones_own_from_it(model: Any, tokens: dict[str, Tensor]) -> None:
    class Mine(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    mine = Mine(model.config).eval()
    mine.load_state_dict(model.state_dict())
    summary = accelerate(mine)
    assert summary.eager == {"": "Mine is not transformers' own class"}
    expected = model(**tokens).logits
    for each in (mine, copy.deepcopy(mine)):
        assert type(each) is Mine
        assert torch.equal(each(**tokens, output_hidden_states=True).logits, expected)


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
other = type(model)(model.config)
other.load_state_dict(model.state_dict())
third = type(model).from_pretrained(sys.argv[1])
outs = [m.eval()(torch.tensor([[1, 2]]), output_hidden_states=True) for m in (model, other, third)]
assert all(torch.equal(out.logits, outs[0].logits) for out in outs)
print([type(out.hidden_states).__name__ for out in outs])
"""


def test_a_script_may_make_models_by_it(
    folder: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    assert main(["run", str(tmp_path / "script.py"), str(folder())]) == 0
    assert "['LazyHiddenStates', 'tuple', 'LazyHiddenStates']" in capfd.readouterr().out
