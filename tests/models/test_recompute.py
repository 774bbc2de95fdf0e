"""A block that is run again gives the bits of one that saved, and which blocks those are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.config import LoraConfig
from tli_engine.models.adapters import adapters
from tli_engine.models.causal import CausalModel
from tli_engine.models.files import FAMILIES
from tli_engine.models.projection import Projection
from tli_engine.models.recompute import Activations, Block, first_saved

Load = Callable[..., CausalModel]
LORA = LoraConfig(layers="1-2", modules=("q_proj", "down_proj"), r=4)


def step(model: CausalModel, packed: Any) -> list[Tensor]:
    torch.manual_seed(3)
    loss = model.loss(packed)
    return [loss, *torch.autograd.grad(loss, list(model.trainable().values()))]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_run_again_is_saved_bit_for_bit(
    family: str, method: str, fused: bool, dropout: float, causal: Load, texts: Any
) -> None:
    model = causal(family, LORA if method == "lora" else None)
    if method == "full":
        model.train_all()
    for adapter in adapters(model.early).values():
        adapter.dropout.p = dropout
    if fused:
        model.fuse()
    model.train()
    packed = texts(30, 5, 11)
    saved = step(model, packed)
    model.activations = Activations("recompute")
    again = step(model, packed)
    model.activations.first_saved = 2
    some = step(model, packed)
    for a, b, c in zip(saved, again, some, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
@pytest.mark.parametrize(
    ("policy", "saved", "runs"),
    [
        ("save", None, [1, 1, 1, 1]),
        ("auto", None, [1, 1, 1, 1]),
        # a gradient reaches block 1 and what lies above
        ("recompute", None, [1, 2, 2, 2]),
        ("auto", 3, [1, 2, 2, 1]),
    ],
)
def test_blocks_run_as_often_as_is_needed(
    policy: Any, saved: int | None, runs: list[int], fused: bool, causal: Load, texts: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = causal("llama", LORA)
    if fused:
        model.fuse()
    model.activations = Activations(policy)
    if saved is not None:
        model.activations.first_saved = saved
    counts = [0] * 4

    def counted(pack: Any, seeds: Tensor) -> list[Any]:
        def count(number: int, block: Block) -> Block:
            def run(x: Tensor, residual: Tensor | None) -> Any:
                counts[number] += 1
                return block.trunk(x, residual)

            return Block(run, block.last)

        return [count(i, b) for i, b in enumerate(CausalModel._blocks(model, pack, seeds))]

    monkeypatch.setattr(model, "_blocks", counted)
    step(model, texts(9, 7))
    assert counts == runs
    with torch.no_grad():
        counts[:] = [0] * 4
        model.loss(texts(9, 7))
    assert counts == [1] * 4


@pytest.mark.parametrize(
    ("family", "modules", "runs"),
    [
        # frozen ones keep nothing of what they read
        ("llama", ("q_proj",), [1, 1, 1, 1]),
        ("llama", ("down_proj",), [1, 2, 2, 1]),
        # a norm reads what it returns
        ("gemma3_text", ("q_proj",), [1, 2, 2, 2]),
    ],
)
def test_a_last_layer_that_keeps_nothing_is_run_once(
    family: str, modules: tuple[str, ...], runs: list[int], causal: Load, texts: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = causal(family, LORA.model_copy(update={"modules": modules}))
    model.fuse()
    assert model.early.fused is not None
    downs = {id(block.down): i for i, block in enumerate(model.early.fused.blocks)}
    counts, call = [0] * 4, Projection.__call__

    def counted(self: Projection, *args: Any) -> Tensor:
        if id(self) in downs:
            counts[downs[id(self)]] += 1
        return call(self, *args)

    monkeypatch.setattr(Projection, "__call__", counted)
    model.activations = Activations("recompute")
    step(model, texts(9, 7))
    assert counts == runs


def test_saving_keeps_more_than_running_again(causal: Load, texts: Any) -> None:
    model = causal("llama", LORA)
    model.fuse()
    packed = texts(30, 5)

    def kept(policy: Any) -> int:
        model.activations = Activations(policy)
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = model.loss(packed)
        loss.backward()
        return sum(sizes.values())

    assert kept("recompute") < kept("save") / 2


@pytest.mark.parametrize(
    ("kept", "room", "lowest"),
    [
        pytest.param([5, 5, 5], 15, 0, id="all-fit"),
        pytest.param([5, 5, 5], 14, 2, id="room-for-one-and-a-second-run"),
        pytest.param([5, 5, 5], 9, 3, id="none"),
        pytest.param([9, 1, 1], 11, 0, id="unequal-all"),
        pytest.param([9, 1, 1], 10, 2, id="unequal"),
        pytest.param([1, 1, 9], 10, 3, id="the-top-one-is-too-large"),
        pytest.param([5], 0, 1, id="one"),
        pytest.param([], 0, 0, id="no-block"),
        pytest.param([0, 0], -1, 2, id="no-room-at-all"),
    ],
)
def test_the_top_blocks_save_as_many_as_fit(kept: list[int], room: int, lowest: int) -> None:
    assert first_saved(kept, room) == lowest


def test_decided_on_a_cpu_all_save() -> None:
    activations = Activations("auto")
    assert activations.undecided
    activations.plan([], 1, torch.zeros(2, 3), None, 10**12)
    assert activations.first_saved == 0
    assert not activations.undecided
    assert not Activations("save").undecided
    assert not Activations("recompute").undecided
