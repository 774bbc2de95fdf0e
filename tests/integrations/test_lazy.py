"""Hidden states computed as they are read: values, gradients, how much runs, and how they behave."""

import copy
import itertools
import operator
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from tests.integrations.conftest import adapt, assert_close, gradients
from tli_engine import accelerate, restore
from tli_engine.errors import UserError
from tli_engine.integrations import held_code

Load = Callable[..., Any]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]


@contextmanager
def blocks_run(model: Any) -> Iterator[list[int]]:
    """The numbers of the blocks that run inside, in order."""
    ran: list[int] = []
    kept = []
    # code of others is computed at once, as it may have a state of its own; this has none
    libraries = mock.patch.object(held_code, "_LIBRARIES", held_code._LIBRARIES | {"tests"})
    for i, block in enumerate(model.get_decoder().layers):
        kept.append((block, block.__dict__.get("forward")))

        def forward(*args: Any, i: int = i, was: Any = block.forward, **kwargs: Any) -> Any:
            ran.append(i)
            return was(*args, **kwargs)

        block.forward = forward
    with libraries:
        yield ran
    for block, was in kept:
        del block.forward
        # transformers 4 leaves one there
        if was is not None:
            block.forward = was


@pytest.fixture
def model(load: Load) -> Any:
    return load(nf4=False).eval()


@pytest.fixture
def eager(model: Any, tokens: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return model(**tokens, output_hidden_states=True, labels=tokens["input_ids"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_values_are_the_eager_ones_bit_for_bit(
    load: Load, tokens: dict[str, Tensor], family: str, nf4: bool, training: bool
) -> None:
    model = load(family, nf4=nf4).train(training)
    accelerate(model)
    # an explicit cache is eager, on the same layers
    expected = model(
        **tokens, output_hidden_states=True, use_cache=True, labels=tokens["input_ids"]
    )
    actual = model(**tokens, output_hidden_states=True, labels=tokens["input_ids"])
    assert type(expected.hidden_states) is tuple
    assert type(actual.hidden_states) is not tuple
    assert list(actual.keys()) == list(expected.keys())
    for mine, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.loss, expected.loss)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(
    load: Load, tokens: dict[str, Tensor], implementation: str
) -> None:
    model = load("gemma3_text", nf4=False)
    model.set_attn_implementation(implementation)
    expected = model(**tokens, output_hidden_states=True).hidden_states
    accelerate(model)
    actual = model(**tokens, output_hidden_states=True).hidden_states
    assert all(itertools.starmap(torch.equal, zip(actual, expected, strict=True)))


def test_only_what_is_read_runs_and_once(model: Any, eager: Any, tokens: dict[str, Tensor]) -> None:
    accelerate(model)
    with blocks_run(model) as ran, torch.no_grad():
        out = model(**tokens, output_hidden_states=True, labels=tokens["input_ids"])
        assert ran == []
        assert len(out.hidden_states) == 5
        assert ran == []
        assert torch.equal(out.hidden_states[2], eager.hidden_states[2])
        assert ran == [0, 1]
        assert torch.equal(out.hidden_states[-4], eager.hidden_states[1])
        assert ran == [0, 1]
        assert torch.equal(out.loss, eager.loss)
        assert ran == [0, 1, 2, 3]
        assert torch.equal(out.logits, eager.logits)
        assert torch.equal(out.hidden_states[-1], eager.hidden_states[-1])
        assert ran == [0, 1, 2, 3]


def test_a_tuple_in_every_way_that_is_read(
    model: Any, eager: Any, tokens: dict[str, Tensor]
) -> None:
    accelerate(model)

    def states() -> Any:
        with torch.no_grad():
            return model(**tokens, output_hidden_states=True).hidden_states

    theirs = eager.hidden_states
    equal = torch.testing.assert_close
    assert isinstance(states(), tuple)
    exact = {"rtol": 0, "atol": 0}
    for mine, expected in [
        (tuple(states()), theirs),
        (list(states()), list(theirs)),
        ([*states()], list(theirs)),
        (states()[1:3], theirs[1:3]),
        (states()[::-2], theirs[::-2]),
        (list(reversed(states())), list(reversed(theirs))),
        (operator.add(states(), (1,)), (*theirs, 1)),
        (operator.add((1,), states()), (1, *theirs)),
        (states() * 2, theirs * 2),
        (torch.stack(states()), torch.stack(theirs)),
        (torch.cat(states(), dim=-1), torch.cat(theirs, dim=-1)),
        (torch.stack(tensors=states(), dim=1), torch.stack(theirs, dim=1)),
        (_pytree.tree_map(torch.neg, states()), tuple(map(torch.neg, theirs))),
        (copy.deepcopy(states()), theirs),
        (pickle.loads(pickle.dumps(states())), theirs),
        (type(states())(iter(theirs)), theirs),
    ]:
        assert type(mine) is type(expected)
        equal(mine, expected, **exact)
    first, *_, last = states()
    equal((first, last), (theirs[0], theirs[-1]), **exact)
    with pytest.raises(IndexError):
        states()[5]


def test_an_output_in_every_way_that_is_read(
    model: Any, eager: Any, tokens: dict[str, Tensor]
) -> None:
    accelerate(model)

    def out() -> Any:
        with torch.no_grad():
            return model(**tokens, output_hidden_states=True, labels=tokens["input_ids"])

    assert isinstance(out(), type(eager))
    assert type(out()).__name__ == type(eager).__name__
    assert "logits" in out()
    assert torch.equal(out()["logits"], eager.logits)
    assert torch.equal(out()[0], eager.loss)
    assert torch.equal(out()[1], eager.logits)
    assert torch.equal(out().get("loss"), eager.loss)
    assert out().get("nothing", 3) == 3
    assert out().attentions is None
    for mine in (
        dict(out()),
        dict(out().items()),
        {**out()},
        dict(zip(out().keys(), out().values(), strict=True)),
        dict(zip(out().keys(), out().to_tuple(), strict=True)),
        dict(copy.copy(out())),
        dict(pickle.loads(pickle.dumps(out()))),
    ):
        assert list(mine) == list(eager.keys())
        assert torch.equal(mine["logits"], eager.logits)
        assert torch.equal(mine["hidden_states"][-1], eager.hidden_states[-1])
        assert mine["past_key_values"].get_seq_length() == 7
    mapped = _pytree.tree_map_only(Tensor, torch.neg, out())
    assert torch.equal(mapped.logits, -eager.logits)


def test_tuples_are_computed_at_once(model: Any, eager: Any, tokens: dict[str, Tensor]) -> None:
    accelerate(model)
    with torch.no_grad():
        out = model(**tokens, output_hidden_states=True, return_dict=False)
    assert type(out) is tuple
    assert torch.equal(out[0], eager.logits)


def test_a_cache_goes_on(model: Any, eager: Any, tokens: dict[str, Tensor]) -> None:
    accelerate(model)
    last = {"input_ids": tokens["input_ids"][:1, :1]}
    with torch.no_grad():
        first = model(input_ids=tokens["input_ids"][:1], output_hidden_states=True)
        assert torch.equal(first.hidden_states[2], eager.hidden_states[2][:1])
        then = model(**last, past_key_values=first.past_key_values, output_hidden_states=True)
        again = model(**last, past_key_values=eager.past_key_values.__class__())
    assert not torch.equal(then.logits, again.logits)
    ids = torch.cat([tokens["input_ids"][:1], last["input_ids"]], 1)
    with torch.no_grad():
        assert_close(then.logits[:, -1], model(input_ids=ids).logits[:, -1], 1e-4)


@pytest.mark.parametrize("read", ["state", "loss", "both"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_gradients(load: Load, tokens: dict[str, Tensor], read: str, checkpointing: bool) -> None:
    model = adapt(load(nf4=False))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def backward() -> dict[str, Tensor]:
        out = model(**tokens, output_hidden_states=True, labels=tokens["input_ids"])
        parts = []
        if read != "loss":
            parts.append(out.hidden_states[2].square().mean())
        if read != "state":
            parts.append(out.loss)
        sum(parts).backward()
        return gradients(model)

    expected = backward()
    accelerate(model)
    actual = backward()
    assert actual.keys() == expected.keys()
    assert len(actual) == (8 if read == "state" else 16)
    for name in expected:
        assert_close(actual[name], expected[name])


def test_modes_are_those_of_the_call(load: Load, tokens: dict[str, Tensor]) -> None:
    model = adapt(load(nf4=False), lora_dropout=0.9).eval()
    accelerate(model)
    with torch.no_grad():
        expected = model(**tokens, output_hidden_states=True).hidden_states[3]
        without = model(**tokens, output_hidden_states=True)
        with model.disable_adapter():
            bare = model(**tokens, output_hidden_states=True)
    assert not without.hidden_states[3].requires_grad
    model.train()
    assert torch.equal(without.hidden_states[3], expected)
    assert model.training
    assert all(module.training for module in model.modules())
    with model.disable_adapter(), torch.no_grad():
        plain = model(**tokens, output_hidden_states=True).hidden_states[3]
    assert torch.equal(bare.hidden_states[3], plain)
    assert not torch.equal(plain, expected)
    # the adapters are on again
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(**tokens, output_hidden_states=True).hidden_states[3], expected)
    out = model(**tokens, output_hidden_states=True)
    with torch.no_grad():
        assert out.hidden_states[2].requires_grad
    with torch.inference_mode():
        inferred = model(**tokens, output_hidden_states=True)
    assert inferred.hidden_states[2].is_inference()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**tokens, output_hidden_states=True)
        at_once = model(**tokens, output_hidden_states=True).hidden_states[2]
    assert torch.equal(mixed.hidden_states[2], at_once)
    assert not torch.equal(at_once, expected[:1])


def test_changed_weights_are_an_error(model: Any, tokens: dict[str, Tensor]) -> None:
    accelerate(model)
    out = model(**tokens, output_hidden_states=True)
    read = out.hidden_states[1]
    expected = model(**tokens, output_hidden_states=True).hidden_states[3]
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.mul_(2)
    assert out.hidden_states[1] is read
    # of a block that has no part in it
    assert torch.equal(out.hidden_states[3], expected)
    with pytest.raises(UserError, match=r"hidden_states\[4\] was not read before .* weights"):
        out.hidden_states[4]
    with pytest.raises(UserError, match="weights changed"):
        out.logits  # noqa: B018
    out = model(**tokens, output_hidden_states=True)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(UserError, match=r"hidden_states\[2\] was not read before .* weights"):
        out.hidden_states[2]
    out = model(**tokens, output_hidden_states=True, labels=tokens["input_ids"])
    tokens["input_ids"].zero_()
    with pytest.raises(UserError, match="inputs were written to"):
        out.loss  # noqa: B018


def test_hooks_run_as_before(model: Any, tokens: dict[str, Tensor]) -> None:
    accelerate(model)
    seen = []
    handle = model.model.layers[3].mlp.register_forward_hook(lambda *_: seen.append(1))
    assert type(model(**tokens, output_hidden_states=True).hidden_states) is tuple
    assert seen == [1]
    handle.remove()
    # those of the embeddings run at the call as it is: PEFT's training in 4 bits puts one there
    model.enable_input_require_grads()
    out = model(**tokens, output_hidden_states=True)
    assert type(out.hidden_states) is not tuple
    assert out.hidden_states[0].requires_grad


def test_stop_at(model: Any, eager: Any, tokens: dict[str, Tensor]) -> None:
    summary = accelerate(model, stop_at=2)
    assert summary.lazy == [""]
    with torch.no_grad():
        out = model(**tokens, output_hidden_states=True)
    assert torch.equal(out.hidden_states[2], eager.hidden_states[2])
    with pytest.raises(UserError, match=r"hidden_states\[3\] lies above stop_at=2"):
        out.hidden_states[3]
    with pytest.raises(UserError, match="stop_at=2"):
        out.logits  # noqa: B018
    with pytest.raises(UserError, match="stop_at"):
        model(**tokens)
    restore(model)
    with torch.no_grad():
        assert torch.equal(model(**tokens).logits, eager.logits)
    with pytest.raises(UserError, match=r"stop_at must be 0 … 4"):
        accelerate(model, stop_at=5)


def test_a_decoder_alone(load: Load, tokens: dict[str, Tensor]) -> None:
    from transformers import AutoModel

    model = load(nf4=False, auto=AutoModel)
    expected = model(**tokens, output_hidden_states=True)
    accelerate(model)
    with blocks_run(model) as ran:
        actual = model(**tokens, output_hidden_states=True)
        assert torch.equal(actual.hidden_states[1], expected.hidden_states[1])
        assert ran == [0]
        assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(actual[0], expected[0])
        assert ran == [0, 1, 2, 3]


def test_an_unknown_architecture_keeps_its_hidden_states(
    tokens: dict[str, Tensor], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 259}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes))
    summary = accelerate(model)
    assert "model type 'gpt2'" in str(summary)
    assert summary.lazy == []
    assert type(model(**tokens, output_hidden_states=True).hidden_states) is tuple
    with pytest.raises(UserError, match="stop_at=1 needs lazy hidden states"):
        accelerate(model, stop_at=1)
