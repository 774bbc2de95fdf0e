"""Layer after layer gives what word after word gives, in memory that the layers do not add to."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tli_engine.align import bootstrap, pairing
from tli_engine.align import encode as encode_module
from tli_engine.align.encode import encode, stage
from tli_engine.align.layers import vectors_by_layer
from tli_engine.align.scan import Scan, scan
from tli_engine.data.pairs import PairList
from tli_engine.data.words import Word
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import open_model
from tli_engine.testing import random_words, save_tiny_model

WORDS = [*random_words(30, 9), *random_words(4, 3, prefix=0)]
FAMILIES = ["llama", "qwen3", "gemma3_text"]
ModelOf = Callable[..., EarlyModel]


@pytest.fixture
def model_of(tmp_path: Path) -> ModelOf:
    def model_of(family: str = "llama", depth: int = 4, **overrides: Any) -> EarlyModel:
        folder = save_tiny_model(tmp_path / f"{family}-{depth}", family, **overrides)
        files = open_model(str(folder))
        return load_early(files, depth, dtype=torch.float32, device=torch.device("cpu"))

    return model_of


def by_layer(model: EarlyModel, words: list[Word], **options: Any) -> list[Tensor]:
    """Vectors of words, in their order, by content and by paper pooling, ``[2, words, D]``."""
    staged = stage(model, words, ["content", "paper"])
    rows = [staged.row_of[word] for word in words]
    layers: list[Tensor] = []
    for k, vectors in vectors_by_layer(model, staged, **options):
        assert k == len(layers)
        layers.append(vectors[:, rows])
    return layers


@pytest.mark.parametrize("room", [None, 0], ids=["on-device", "on-host"])
@pytest.mark.parametrize("depth", [0, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_one_pass_a_pack(
    family: str, depth: int, room: int | None, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "_PACK_TOKENS", 40)
    model = model_of(family, depth)
    layers = by_layer(model, [*WORDS, WORDS[3]], room=room)
    assert len(layers) == depth + 1
    for n, pooling in enumerate(("content", "paper")):
        expected = encode(model, [*WORDS, WORDS[3]], list(range(depth + 1)), pooling)
        assert torch.equal(torch.stack([vectors[n] for vectors in layers]), expected)


def test_a_layer_that_does_not_fit_stays_on_the_host_and_says_so(model: EarlyModel) -> None:
    tokens = sum(map(len, set(WORDS)))
    lines: list[str] = []
    by_layer(model, WORDS, room=tokens * 32 * 4, say=lines.append)
    assert lines == []
    by_layer(model, WORDS, room=tokens * 32 * 4 - 1, say=lines.append)
    (line,) = lines
    assert line == (
        "a layer's hidden states take 0.0 GB, more than cpu has free: they stay in the host's "
        "memory, a pack at a time on cpu"
    )


def test_progress_counts_words_times_layers(
    model: EarlyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "_PACK_TOKENS", 40)
    done: list[int] = []
    by_layer(model, [*WORDS, *WORDS], advance=done.append)
    assert len(done) > 12
    assert sum(done) == 34 * (model.depth + 1)


def test_a_block_runs_on_all_packs_before_the_next(
    model: EarlyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "_PACK_TOKENS", 40)
    ran: list[int] = []
    for k, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    by_layer(model, WORDS)
    assert ran == sorted(ran)
    assert ran.count(0) > 3


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors alive, and keeps the highest count and the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tree_iter(args) if isinstance(t, Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in inputs and storage.data_ptr() not in self._seen:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage.data_ptr(), storage.nbytes()

        def gone(_: object) -> None:
            self.live -= nbytes
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, nbytes)


def scan_of(model: EarlyModel, pairs: int) -> Scan:
    words = [[*dict.fromkeys(random_words(2 * pairs, 6, seed=s))][:pairs] for s in (1, 2)]
    texts = [tuple(str(w.input_ids) for w in side) for side in words]
    return scan(model, "tiny", PairList(("a", "b"), texts[0], texts[1]), *words, "paper")


def test_the_peak_does_not_grow_with_the_layers(
    model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in {"_ROWS": 128, "_COLUMNS": 128, "_KEPT": 0, "_VALUES": 1 << 14}.items():
        monkeypatch.setattr(pairing, name, size)
    monkeypatch.setattr(bootstrap, "_BLOCK", 1 << 14)
    pairs = 1000
    peaks = {}
    for depth in (2, 12):
        model = model_of("llama", depth, num_hidden_layers=depth)
        with Peak() as peak:
            result = scan_of(model, pairs)
        assert len(result.layers) == depth + 1
        peaks[depth] = peak.peak
        one_layer = 2 * pairs * 32 * 4
        # the vectors of one layer, by two poolings, or all layers' figures as they are read
        figures = 5 * 8 * pairs * (depth + 1)
        assert peak.largest <= max(2 * one_layer, figures) < peak.peak
    # what a layer leaves behind: five figures a pair and a pooling, and their copies
    figures = 2 * pairs * (5 * 8 + 3 * 8 + 2)
    assert peaks[12] - peaks[2] <= 10 * figures
    assert 10 * figures < 10 * one_layer
