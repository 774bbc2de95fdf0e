"""Packs filled up to few shapes: what is added has no part in the loss and in no gradient."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tli_engine.config import LoraConfig
from tli_engine.data.examples import Example
from tli_engine.data.packing import TextPack, text_pack
from tli_engine.models.adapters import adapter_tensors, adapters, add_lora
from tli_engine.models.causal import CausalModel, load_causal
from tli_engine.models.files import FAMILIES, ModelFiles, open_model
from tli_engine.models.recompute import Activations
from tli_engine.testing import save_tiny_model
from tli_engine.train.filled import FilledBuffer, FilledTexts, Shape, fill, shape_of

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CPU = torch.device("cpu")
Open = Callable[[str], ModelFiles]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    made: dict[str, ModelFiles] = {}

    def find(family: str) -> ModelFiles:
        if family not in made:
            window = {"sliding_window": 12} if family in ("mistral", "gemma3_text") else {}
            folder = save_tiny_model(tmp_path_factory.mktemp("models") / family, family, **window)
            made[family] = open_model(str(folder))
        return made[family]

    return find


def pack_of(*lengths: int) -> TextPack:
    """Random texts, the second half of each to be predicted."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
    return text_pack([Example(tuple(i), max(1, len(i) // 2)) for i in ids])


def filled(pack: TextPack, longest: int, labels: int, seeds: int = 0) -> FilledTexts:
    buffer = FilledBuffer(shape_of(pack, longest, seeds), CPU)
    fill(buffer.fill(), pack, labels)
    buffer.send()
    return buffer.batch


def model_of(files: ModelFiles, method: str, quantize: Any = "none") -> CausalModel:
    """In fp64, on the engine's ops."""
    model = load_causal(files, dtype=torch.float32, device=CPU, quantize=quantize)
    if method == "full":
        model.train_all()
    else:
        add_lora(model.early, LoraConfig(layers="1-2", modules=ALL, r=4), model.early.depth, 0)
        generator = torch.Generator().manual_seed(1)
        for name, tensor in adapter_tensors(model.early).items():
            if ".lora_B." in name:
                tensor.data.normal_(0, 0.05, generator=generator)
    model = model.double()
    model.fuse()
    return model


def gradients(model: CausalModel, loss: Tensor) -> dict[str, Tensor]:
    trained = model.trainable()
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_filling_changes_neither_loss_nor_gradient(family: str, method: str, opened: Open) -> None:
    model, pack = model_of(opened(family), method), pack_of(30, 5, 11, 17)
    plain = model.loss(pack)
    expected = gradients(model, plain)
    texts = filled(pack, 32, pack.labels)
    assert texts.input_ids.shape == (64,)
    assert len(texts.weights) == 64 > pack.labels
    loss = model.loss(texts, weights=texts.weights)
    found = gradients(model, loss)
    torch.testing.assert_close(loss, plain, rtol=1e-13, atol=0)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-13 * scale, msg=name)
        assert scale > 0


@pytest.mark.parametrize("policy", ["save", "recompute"])
def test_masks_of_the_texts_stay(policy: Any, opened: Open) -> None:
    """Dropout is by seed, row and column: rows after the last text change none before it."""
    model, pack = model_of(opened("llama"), "lora"), pack_of(30, 5, 11, 17)
    for adapter in adapters(model.early).values():
        adapter.dropout.p = 0.5
    model.train()
    model.activations = Activations(policy)
    assert model.drops == 8
    torch.manual_seed(4)
    plain = model.loss(pack)
    expected = gradients(model, plain)
    texts = filled(pack, 32, pack.labels, model.drops)
    torch.manual_seed(4)
    model.draw_seeds(texts.seeds)
    loss = model.loss(texts, weights=texts.weights, seeds=texts.seeds)
    found = gradients(model, loss)
    torch.testing.assert_close(loss, plain, rtol=1e-13, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    # other seeds, other masks
    model.draw_seeds(texts.seeds)
    other = model.loss(texts, weights=texts.weights, seeds=texts.seeds)
    assert abs(other.item() - loss.item()) > 1e-4


def test_what_is_written() -> None:
    pack = pack_of(30, 5, 11)
    texts = filled(pack, 16 + 16, 100)
    tokens, labels = pack.tokens, pack.labels
    assert (tokens, len(texts.input_ids)) == (46, 48)
    assert torch.equal(texts.input_ids[:tokens], pack.words.input_ids)
    assert torch.equal(texts.position_ids[:tokens], pack.words.position_ids)
    assert texts.position_ids[tokens:].tolist() == [0, 1]
    assert texts.offsets.tolist() == [0, 30, 35, 46, 48, 48, 48, 48, 48]
    assert torch.equal(texts.predicting[:labels], pack.predicting)
    assert torch.equal(texts.targets[:labels], pack.targets)
    assert texts.weights.tolist() == [1.0] * labels + [0.0] * (64 - labels)
    assert texts.scale.item() == np.float32(0.01)


def test_a_buffer_keeps_nothing_of_the_pack_before() -> None:
    first, second = pack_of(20, 20, 6, 1), pack_of(30, 17)
    buffer = FilledBuffer(shape_of(first, 32, 0), CPU)
    assert shape_of(second, 32, 0) == shape_of(first, 32, 0)
    for pack in (first, second):
        fill(buffer.fill(), pack, 7)
        buffer.send()
    alone = filled(second, 32, 7)
    for name, tensor in vars(alone).items():
        if isinstance(tensor, Tensor):
            assert torch.equal(getattr(buffer.batch, name), tensor), name


def test_the_rest_is_cut_into_documents_that_may_be_so_long() -> None:
    pack = pack_of(*[8] * 65)
    texts = filled(pack, 8, 1)
    assert len(texts.input_ids) - pack.tokens == 24
    lengths = texts.offsets.diff()
    assert lengths.max() == 8
    assert int(lengths.sum()) == len(texts.input_ids)
    assert texts.position_ids.max() == 7


@pytest.mark.parametrize(
    ("lengths", "longest", "expected"),
    [
        pytest.param((64, 64, 64), 64, Shape(192, 3, 128, 64, 2), id="full-rows-stay-alike"),
        pytest.param((64, 64), 128, Shape(128, 8, 64, 128, 2), id="shorter-ones-do-not"),
        pytest.param((64, 64, 63), 64, Shape(192, 8, 128, 64, 2), id="nearly-full"),
        pytest.param((16,) * 9, 64, Shape(144, 16, 128, 64, 2), id="more-documents"),
        pytest.param((100,), 64, Shape(112, 8, 64, 100, 2), id="longer-than-said"),
    ],
)
def test_shapes(lengths: tuple[int, ...], longest: int, expected: Shape) -> None:
    assert shape_of(pack_of(*lengths), longest, 2) == expected


def test_few_shapes_occur() -> None:
    """Rows as packing makes them: nearly full, of texts of many lengths."""
    generator = np.random.default_rng(0)
    shapes, waste = set(), []
    for _ in range(150):
        lengths, room = [], 2048
        while room > 40:
            lengths.append(int(min(room, generator.integers(40, 900))))
            room -= lengths[-1]
        pack = pack_of(*lengths)
        shape = shape_of(pack, 2048, 0)
        shapes.add(shape)
        waste.append(shape.tokens / pack.tokens - 1)
        assert pack.labels <= shape.labels <= 1.25 * pack.labels + 64
    assert len(shapes) <= 8
    assert max(waste) < 1 / 16
