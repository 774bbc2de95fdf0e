"""Lazy outputs that are written to: what is set is what is read, and what nobody reads does not run."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.conftest import adapt
from tests.integrations.test_lazy import blocks_run
from tli_engine import accelerate

Load = Callable[..., Any]
MINE = torch.tensor(7.0)


@pytest.fixture
def model(load: Load) -> Any:
    return load(nf4=False).eval()


@torch.no_grad()
def call(model: Any, tokens: dict[str, Tensor], **options: Any) -> Any:
    return model(**tokens, output_hidden_states=True, labels=tokens["input_ids"], **options)


def delete(out: Any) -> None:
    del out.logits


def read_and_set(out: Any) -> None:
    assert out.logits is not None
    out.logits = MINE


WRITES: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda out: setattr(out, "loss", MINE),
    "item": lambda out: out.__setitem__("loss", MINE),
    "attribute to none": lambda out: setattr(out, "logits", None),
    "item to none": lambda out: out.__setitem__("logits", None),
    "attribute deleted": delete,
    "cache": lambda out: setattr(out, "past_key_values", None),
    "states": lambda out: setattr(out, "hidden_states", (MINE, MINE)),
    "another item": lambda out: out.__setitem__("more", MINE),
    "another attribute": lambda out: setattr(out, "more", MINE),
    "absent field": lambda out: setattr(out, "attentions", (MINE,)),
    "read and set": read_and_set,
    "last taken": lambda out: out.popitem(),
    "emptied": lambda out: out.clear(),
}


def seen(out: Any) -> dict[str, Any]:
    """All that an output shows, by name, key, index and iteration."""
    names = ("loss", "logits", "past_key_values", "hidden_states", "attentions", "more")
    return {
        "names": [getattr(out, name, "none") for name in names],
        "keys": list(out.keys()),
        "iterated": list(out),
        "by key": [out[key] for key in out],
        "by index": [out[i] for i in range(len(out))],
        "slice": out[:2],
        "tuple": out.to_tuple(),
        "items": list(out.items()),
        "values": list(out.values()),
        "get": [out.get(name, "none") for name in names],
        "in": [name in out for name in names],
    }


def flat(value: Any) -> Any:
    """Tensors as lists, caches as their lengths, for comparing."""
    if isinstance(value, Tensor):
        return value.tolist()
    if hasattr(value, "get_seq_length"):
        return value.get_seq_length()
    if isinstance(value, dict):
        return {name: flat(v) for name, v in value.items()}
    return [flat(v) for v in value] if isinstance(value, (tuple, list)) else value


@pytest.mark.parametrize("write", WRITES)
def test_what_is_set_is_what_is_read(model: Any, tokens: dict[str, Tensor], write: str) -> None:
    eager = call(model, tokens)
    accelerate(model)
    WRITES[write](eager)
    expected = flat(seen(eager))
    for way, theirs in expected.items():
        lazy = call(model, tokens)
        WRITES[write](lazy)
        assert flat(seen(lazy)[way]) == theirs, way
    copies: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy]
    copies.append(lambda out: pickle.loads(pickle.dumps(out)))
    for other in copies:
        lazy = call(model, tokens)
        WRITES[write](lazy)
        assert flat(seen(other(lazy))) == flat(seen(other(eager)))


def test_what_is_set_does_not_run(model: Any, tokens: dict[str, Tensor]) -> None:
    accelerate(model)
    with blocks_run(model) as ran:
        out = call(model, tokens)
        out.loss = MINE
        out.logits = MINE
        assert out[0] is out.loss is out["loss"] is MINE
        assert out[:2] == (MINE, MINE)
        out["past_key_values"] = None
        assert len(out.to_tuple()) == 4
        assert ran == []
        out = call(model, tokens)
        out.logits = None
        assert out.logits is None
        assert ran == []
        # the item is still the model's, as in transformers' own
        assert out["logits"].shape == (3, 7, 259)
        assert out.logits is None
    for change in ("pop", "update", "setdefault"):
        with pytest.raises(Exception, match="You cannot use"):
            getattr(out, change)("logits")
    with pytest.raises(Exception, match="You cannot use"):
        del out["logits"]


def test_a_hook_may_set_the_loss(model: Any, tokens: dict[str, Tensor]) -> None:
    accelerate(model)

    def hook(module: Any, args: Any, out: Any) -> Any:
        out.loss = out.hidden_states[1].mean()
        return out

    model.register_forward_hook(hook)
    with blocks_run(model) as ran:
        out = call(model, tokens)
        assert torch.equal(out.loss, out.hidden_states[1].mean())
        assert ran == [0]


def test_a_trainer_trains_on_the_loss_that_is_set(
    load: Load, tokens: dict[str, Tensor], tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    class Early(Trainer):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any
        ) -> Any:
            out = model(**inputs, output_hidden_states=True)
            out.loss = out.hidden_states[2].square().mean()
            return (out.loss, out) if return_outputs else out.loss

    texts = [{n: t[i] for n, t in tokens.items()} for i in range(3)]
    texts = [text | {"labels": text["input_ids"]} for text in texts]
    options: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 3}
    options |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    found = []
    for ours in (False, True):
        model = adapt(load(nf4=False))
        if ours:
            accelerate(model)
        trainer = Early(model, TrainingArguments(str(tmp_path), **options), train_dataset=texts)
        found.append(trainer.train().training_loss)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
