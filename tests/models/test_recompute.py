"""A block that is run again gives the bits of one that saved, and which blocks those are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.config import LoraConfig
from tli_engine.models.adapters import adapters
from tli_engine.models.arrangement import (
    EVERYTHING,
    NOTHING,
    Arrangement,
    Part,
    Room,
    arrange,
    held,
    peak,
)
from tli_engine.models.causal import CausalModel
from tli_engine.models.files import FAMILIES
from tli_engine.models.projection import Projection
from tli_engine.models.recompute import Activations, Block, Reserve

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
    for arrangement in (Arrangement(2, 2), Arrangement(3, 1, 0), Arrangement(3, 1, 1)):
        model.activations.arrangement = arrangement
        for name, a, b, c in zip(
            ("loss", *model.trainable()), saved, again, step(model, packed), strict=True
        ):
            assert torch.equal(a, b), name
            assert torch.equal(a, c), name


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
        model.activations.arrangement = Arrangement(saved, saved)
    counts = [0] * 4

    def counted(pack: Any, seeds: Tensor) -> list[Any]:
        def count(number: int, block: Block) -> Block:
            def run(x: Tensor, residual: Tensor | None) -> Any:
                counts[number] += 1
                return block.parts[0](x, residual)

            return Block((run, *block.parts[1:]), block.last, block.work)

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


SIZE = 10
# attention, then what follows it: bytes and operations
HALVES = [Part(30, 3.0), Part(60, 9.0)]


def fits(room: int, *, block: int = 0, loss: int = 0, blocks: Any = (HALVES,) * 4) -> Arrangement:
    return arrange(list(blocks), 2, SIZE, Room(room, block, loss))


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        pytest.param(4 * 110, Arrangement(2, 2), id="all-keep-all"),
        pytest.param(4 * 110 - 1, Arrangement(3, 2, 1), id="one-keeps-what-follows-attention"),
        # 42 operations spared; three whole blocks and attention of one would be 39
        pytest.param(3 * 110 + 50, Arrangement(4, 2, 1), id="two-keep-what-follows-attention"),
        pytest.param(3 * 110 + 49, Arrangement(5, 2, 1), id="three-do"),
        # the lowest one's second run, when nothing else is held
        pytest.param(110, Arrangement(6, 6), id="nothing"),
        pytest.param(-1, Arrangement(6, 6), id="no-room-at-all"),
    ],
)
def test_the_top_blocks_keep_as_much_as_fits(room: int, expected: Arrangement) -> None:
    assert fits(room) == expected


def test_attention_of_long_documents_is_kept_first() -> None:
    """By operations a byte, as everything."""
    halves = [Part(30, 12.0), HALVES[1]]
    # 57 operations spared; two whole blocks would be 42
    assert fits(110 + 3 * 50, blocks=[halves] * 4) == Arrangement(5, 2, 0)
    assert fits(110 + 3 * 50 - 1, blocks=[halves] * 4) == Arrangement(5, 3, 0)


def test_what_else_is_taken_is_left_free() -> None:
    whole = 4 * 110
    assert fits(whole + 7, loss=7) == Arrangement(2, 2) != fits(whole + 6, loss=7)
    assert fits(whole + 7, block=7) == Arrangement(2, 2) != fits(whole + 6, block=7)
    # never at the same time
    assert fits(whole + 7, loss=7, block=7) == Arrangement(2, 2)


def test_nothing_beats_what_is_chosen() -> None:
    """All ways to keep parts of four unlike blocks, of those whose lower ones keep no more."""
    generator = torch.Generator().manual_seed(0)
    for room in range(60, 520, 23):
        sizes = torch.randint(5, 90, (4, 2), generator=generator).tolist()
        blocks = [[Part(a, 2.0 * a + 1), Part(m, 3.0 * m)] for a, m in sizes]
        limit = Room(room, 11, 17)
        found = arrange(blocks, 0, SIZE, limit)
        spared = []
        for whole in range(5):
            for part in (0, 1):
                for partly in range(whole + 1):
                    keeps = [Arrangement(whole, partly, part).keeps(i, 2) for i in range(4)]
                    work = sum(
                        p.work for b, k in zip(blocks, keeps, strict=True)
                        for p, kept in zip(b, k, strict=True) if kept
                    )  # fmt: skip
                    fit = peak(blocks, keeps, SIZE, limit) <= room
                    spared.append(work if fit else 0.0)
                    if Arrangement(whole, partly, part) == found:
                        chosen = work
        assert chosen == max(spared)


def test_the_peak_is_that_of_a_simulated_way_back() -> None:
    """Blocks made of numbers: every allocation and release in the order in which they happen."""
    blocks, room = [HALVES] * 4, Room(10**6, 13, 21)
    for whole in range(5):
        for partly in range(whole + 1):
            for part in (0, 1):
                keeps = [Arrangement(whole, partly, part).keeps(i, 2) for i in range(4)]
                assert peak(blocks, keeps, SIZE, room) == simulated(keeps, room)


def simulated(keeps: Any, room: Room) -> int:
    now = most = 0
    for k in keeps:
        # its input; that of the second half; what the halves keep
        now += SIZE + SIZE * any(k) + 30 * k[0] + 60 * k[1]
    most = now + room.loss
    for k in reversed(keeps):
        if not any(k):
            now += SIZE + 30 + 60
            most = max(most, now + room.block)
            now -= SIZE + 30 + 60
        else:
            now += 60 * (not k[1])
            most = max(most, now + room.block)
            now += 30 * (not k[0]) - 60
            most = max(most, now + room.block)
            now -= SIZE + 30
        now -= SIZE
    assert now == 0
    return most


def kept_bytes(model: CausalModel, packed: Any) -> int:
    """Bytes of the storages that a forward leaves for the way back, weights and tables left out."""
    tokens = len(packed.words.input_ids)
    own = {
        p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.trainable().values())
    }
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tokens in tensor.shape:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.hidden_states(packed.words)
    # until here all that was noted is alive
    assert hidden.requires_grad
    return sum(sizes.values())


def test_a_block_holds_what_is_counted(causal: Load, texts: Any) -> None:
    """Of two blocks' difference in what they keep: autograd's bytes, to the byte."""
    model = causal("llama", LORA)
    model.fuse()
    # a prime: only rows of tokens have it in their shape
    packed, size = texts(37, 30, 22), 89 * model.head.shape[1] * 4
    found = {}
    for whole, partly, part in ((3, 3, 0), (2, 2, 0), (3, 2, 0), (3, 2, 1)):
        model.activations.arrangement = Arrangement(whole, partly, part)
        found[whole, partly, part] = kept_bytes(model, packed)
    # block 2 keeps nothing, all, attention, the rest
    nothing = found[3, 3, 0]
    both, attention, rest = (found[k] - nothing for k in ((2, 2, 0), (3, 2, 0), (3, 2, 1)))
    halves = [Part(attention - size, 0), Part(rest - size, 0)]
    assert held(halves, (True, True), size) == both
    assert min(halves)[0] > 0


def test_decided_on_a_cpu_all_save() -> None:
    activations = Activations("auto")
    assert activations.undecided
    activations.plan([], 1, torch.zeros(2, 3), None, Reserve(10**12, 0, 0, 0, 0))
    assert activations.arrangement == EVERYTHING
    assert not activations.undecided
    assert not Activations("save").undecided
    assert Activations("recompute").arrangement == NOTHING
