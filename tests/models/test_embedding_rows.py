"""Only the embedding rows of the words in use are read, and nothing else changes."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tli_engine.align.encode import encode
from tli_engine.config import LoraConfig
from tli_engine.data.words import Word, pack
from tli_engine.errors import UserError
from tli_engine.models.adapters import adapter_tensors, add_lora
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import FAMILIES, ModelFiles, open_model
from tli_engine.models.sources import SafetensorsSource
from tli_engine.testing import random_words, save_tiny_model

Tiny = Callable[..., ModelFiles]
EMBEDDING = "embed_tokens.weight"
SINGLE = "model.safetensors"


def load(files: ModelFiles, depth: int = 2, **options: Any) -> EarlyModel:
    options = {"dtype": torch.float32, "device": torch.device("cpu")} | options
    return load_early(files, depth, **options)


def tokens_of(words: Sequence[Word]) -> set[int]:
    return {token for word in words for token in word.input_ids}


def states(model: EarlyModel, words: Sequence[Word]) -> list[Tensor]:
    with torch.no_grad():
        return [hidden for _, hidden in model.hidden_states(pack(words))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_exactly_those_of_the_whole_embedding(
    family: str, dtype: torch.dtype, tiny: Tiny
) -> None:
    files, words = tiny(family), random_words(7, 9)
    whole = load(files, 4, dtype=dtype)
    some = load(files, 4, dtype=dtype, token_ids=tokens_of(words))
    held = some.decoder.embed_tokens.weight
    assert held.shape == (len(tokens_of(words)), 32)
    assert held.shape[0] < whole.decoder.embed_tokens.weight.shape[0] == 259
    for k, (a, e) in enumerate(zip(states(some, words), states(whole, words), strict=True)):
        assert torch.equal(a, e), k


def test_gemmas_scaling_is_kept(tiny: Tiny) -> None:
    files, words = tiny("gemma3_text"), random_words(3, 6)
    ids = [token for word in words for token in word.input_ids]
    (embeddings,) = states(load(files, 0, token_ids=tokens_of(words)), words)
    stored = files.source.read(EMBEDDING)[ids]
    scale = torch.tensor(files.config.hidden_size**0.5)
    torch.testing.assert_close(embeddings, stored * scale, rtol=1e-6, atol=0)
    # the other families have none
    (plain,) = states(load(tiny("llama"), 0, token_ids=tokens_of(words)), words)
    assert torch.equal(plain, tiny("llama").source.read(EMBEDDING)[ids])


def test_only_the_rows_asked_for_are_read(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tiny("llama")
    read: list[str] = []
    rows: list[Sequence[int]] = []
    original, original_rows = SafetensorsSource.read, SafetensorsSource.read_rows

    def spy(source: SafetensorsSource, name: str) -> Tensor:
        read.append(name)
        return original(source, name)

    def spy_rows(source: SafetensorsSource, name: str, wanted: Sequence[int]) -> Tensor:
        assert name == EMBEDDING
        rows.append(wanted)
        return original_rows(source, name, wanted)

    monkeypatch.setattr(SafetensorsSource, "read", spy)
    monkeypatch.setattr(SafetensorsSource, "read_rows", spy_rows)
    # in any order, and more than once
    model = load(files, token_ids=iter([7, 3, 256, 3, 3]))
    assert rows == [[3, 7, 256]]
    assert EMBEDDING not in read
    stored = original(files.source, EMBEDDING)
    assert torch.equal(model.decoder.embed_tokens.weight, stored[[3, 7, 256]])


def test_bytes_of_other_rows_are_not_looked_at(tiny: Tiny, tmp_path: Path) -> None:
    """NaN in any other row would be found if the whole matrix were read."""
    folder = shutil.copytree(tiny("llama").folder, tmp_path / "model")
    tensors = load_file(folder / SINGLE)
    words = random_words(2, 4)
    used = sorted(tokens_of(words))
    kept = tensors[f"model.{EMBEDDING}"][used].clone()
    tensors[f"model.{EMBEDDING}"].fill_(torch.nan)
    tensors[f"model.{EMBEDDING}"][used] = kept
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    files = open_model(str(folder))
    expected = states(load(tiny("llama")), words)
    actual = states(load(files, token_ids=used), words)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    other = min(set(range(256)) - set(used))
    for token_ids in (None, [*used, other]):
        with pytest.raises(UserError, match=r"embed_tokens\.weight holds NaN or inf"):
            load(files, token_ids=token_ids)


def test_a_token_whose_row_was_not_read_is_no_other_tokens(tiny: Tiny) -> None:
    """It must not be taken for the last row, as an index of -1 would be."""
    words = random_words(3, 5)
    model = load(tiny("llama"), token_ids=tokens_of(words))
    (other, *_) = set(range(256)) - tokens_of(words)
    with pytest.raises((IndexError, RuntimeError, UserError)):
        states(model, [Word((256, other), (False, True))])


def test_padding_tokens_have_a_row_like_any_other(tiny: Tiny) -> None:
    """The embedding's padding index is a row of the whole matrix, not of a part of it."""
    files = tiny("llama")
    assert files.config.pad_token_id == 258
    words = [Word((258, 0, 258), (True, True, True))]
    expected = states(load(files), words)
    actual = states(load(files, token_ids=[0, 258]), words)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_and_gradients_do_not_change(family: str, quantize: str, tiny: Tiny) -> None:
    files, words = tiny(family), random_words(8, 7)
    models = [
        load(files, quantize=quantize),
        load(files, quantize=quantize, token_ids=tokens_of(words)),
    ]
    gradients = []
    for model in models:
        add_lora(model, LoraConfig(r=4, alpha=8), 2, seed=1)
        generator = torch.Generator().manual_seed(2)
        for tensor in adapter_tensors(model).values():
            tensor.data += 0.05 * torch.randn(tensor.shape, generator=generator)
        model(pack(words), 2).square().sum().backward()
        gradients.append([tensor.grad for tensor in adapter_tensors(model).values()])
    assert all(torch.equal(a, e) for a, e in zip(*gradients, strict=True) if e is not None)
    assert not any(g is None for g in gradients[1])
    vectors = [encode(model, words, [0, 1, 2], "content") for model in models]
    assert torch.equal(*vectors)


def test_rows_of_a_checkpoint_in_shards(tmp_path: Path) -> None:
    one = open_model(str(save_tiny_model(tmp_path / "one", "llama")))
    folder = save_tiny_model(tmp_path / "many", "llama", max_shard_size=40_000)
    words = random_words(4, 6)
    expected = states(load(one, token_ids=tokens_of(words)), words)
    actual = states(load(open_model(str(folder)), token_ids=tokens_of(words)), words)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_an_index_that_misplaces_the_embedding(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama", max_shard_size=40_000)
    index = json.loads((folder / f"{SINGLE}.index.json").read_text())
    wrong = index["weight_map"]["model.layers.3.mlp.up_proj.weight"]
    assert wrong != index["weight_map"][f"model.{EMBEDDING}"]
    index["weight_map"][f"model.{EMBEDDING}"] = wrong
    (folder / f"{SINGLE}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        load(open_model(str(folder)), token_ids=[1, 2])
    message = str(caught.value)
    assert message.startswith(f"{folder}: {wrong} has no readable model.{EMBEDDING}")
    assert "\n" not in message


def test_fewer_rows_than_the_tokenizer_has_tokens(tiny: Tiny, tmp_path: Path) -> None:
    """As where tokens were added and the matrix was not resized."""
    folder = shutil.copytree(tiny("llama").folder, tmp_path / "model")
    tensors = load_file(folder / SINGLE)
    tensors[f"model.{EMBEDDING}"] = tensors[f"model.{EMBEDDING}"][:200].clone()
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    files = open_model(str(folder))
    for token_ids in ([3, 256], None):
        with pytest.raises(UserError, match=r"embed_tokens\.weight is \["):
            load(files, token_ids=token_ids)


def test_the_digest_is_of_what_was_read(tiny: Tiny) -> None:
    """The same tokens, the same digest: a run is resumed with the embeddings it began with."""
    files = tiny("llama")
    digest = load(files, token_ids=[3, 7]).base_digest()
    assert digest == load(files, token_ids=[7, 3, 7]).base_digest()
    assert digest != load(files, token_ids=[3, 8]).base_digest()
    assert digest != load(files).base_digest()


def test_gguf_rows(tmp_path: Path, tiny: Tiny) -> None:
    """Rows of a quantised matrix are decoded alone, as they would be in the whole of it."""
    gguf = pytest.importorskip("gguf")
    from tli_engine.models.sources import GgufSource

    files = tiny("llama")
    stored = files.source.read(EMBEDDING)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    packed = gguf.quants.quantize(stored.numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufSource(path, files.config)
    whole = source.read(EMBEDDING)
    assert 0 < (whole - stored).abs().max() < 0.01
    assert torch.equal(source.read_rows(EMBEDDING, [2, 200, 5]), whole[[2, 200, 5]])
