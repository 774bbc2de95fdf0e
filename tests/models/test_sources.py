"""Only what is needed is read from a model's files, and what is damaged is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tli_engine.errors import UserError
from tli_engine.models import files as files_module
from tli_engine.models import tokenizer as tokenizer_module
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.models.sources import GgufSource
from tli_engine.testing import save_tiny_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "layers.2.mlp.up_proj.weight"


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {
        "single": save_tiny_model(folder / "single", "llama"),
        "sharded": save_tiny_model(folder / "sharded", "llama", max_shard_size=40_000),
    }


@pytest.fixture
def single(originals: dict[str, Path], tmp_path: Path) -> Path:
    """A model in one file, to be spoilt."""
    return shutil.copytree(originals["single"], tmp_path / "model")


@pytest.fixture
def sharded(originals: dict[str, Path], tmp_path: Path) -> Path:
    """The same model in several files."""
    return shutil.copytree(originals["sharded"], tmp_path / "model")


def load(folder: Path, depth: int) -> EarlyModel:
    files = open_model(str(folder))
    return load_early(files, depth, dtype=torch.float32, device=torch.device("cpu"))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def shard_of(folder: Path, name: str) -> Path:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return folder / weight_map[f"model.{name}"]


def refuses(folder: Path, depth: int, *parts: str) -> None:
    """Loading raises one line for the user that holds all of ``parts``."""
    with pytest.raises(UserError) as caught:
        load(folder, depth)
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def test_upper_blocks_need_not_be_there(single: Path) -> None:
    whole = load(single, 2).state_dict()

    def keep_lower(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if re.search(r"layers\.[23]\.|model\.norm|lm_head", name):
                del tensors[name]

    change(single, keep_lower)
    lower = load(single, 2).state_dict()
    assert lower.keys() == whole.keys()
    assert all(torch.equal(lower[name], tensor) for name, tensor in whole.items())
    refuses(single, 3, str(single), "layers.2.")


def test_the_missing_tensor_is_named(single: Path) -> None:
    change(single, lambda t: t.pop(f"model.{UP}"))
    load(single, 2)
    refuses(single, 3, str(single), UP)


def test_only_the_tensors_of_lower_blocks_are_read(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = open_model(str(single))
    read: list[str] = []
    original = type(files.source).read

    def spy(source: Any, name: str) -> Tensor:
        read.append(name)
        return original(source, name)

    monkeypatch.setattr(type(files.source), "read", spy)
    model = load_early(files, 1, dtype=torch.float32, device=torch.device("cpu"))
    assert sorted(read) == sorted(name for name, _ in model.decoder.named_parameters())
    assert {name.split(".")[0] for name in read} == {"embed_tokens", "layers"}


def test_shards_are_one_model(originals: dict[str, Path]) -> None:
    assert len(list(originals["sharded"].glob("*.safetensors"))) > 2
    one, many = (load(originals[kind], 4).state_dict() for kind in ("single", "sharded"))
    assert one.keys() == many.keys()
    assert all(torch.equal(many[name], tensor) for name, tensor in one.items())


def test_upper_shards_need_not_be_there(sharded: Path) -> None:
    lower = {shard_of(sharded, "embed_tokens.weight")}
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    lower |= {sharded / file for name, file in weight_map.items() if "layers.0." in name}
    for shard in set(sharded.glob("*.safetensors")) - lower:
        shard.unlink()
    load(sharded, 1)
    refuses(sharded, 4, ".safetensors", "missing")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = shard_of(sharded, UP)
    shard.unlink()
    refuses(sharded, 3, shard.name, "missing", "download")


@pytest.mark.parametrize("left", [0, 4, 200, -100], ids=["empty", "4-bytes", "200-bytes", "cut"])
def test_a_truncated_shard_is_named(left: int, sharded: Path) -> None:
    shard = shard_of(sharded, UP)
    data = shard.read_bytes()
    shard.write_bytes(data[:left])
    refuses(sharded, 3, shard.name, "download it again")


@pytest.mark.parametrize("left", [0, -100], ids=["empty", "cut"])
def test_a_truncated_model_is_named(left: int, single: Path) -> None:
    (single / SINGLE).write_bytes((single / SINGLE).read_bytes()[:left])
    refuses(single, 1, SINGLE, "download it again")


def test_an_index_that_names_a_missing_file(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][f"model.{UP}"] = "model-00099-of-00099.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    load(sharded, 2)
    refuses(sharded, 3, "model-00099-of-00099.safetensors", "missing")


def test_an_index_that_names_the_wrong_file(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    wrong = shard_of(sharded, "embed_tokens.weight").name
    assert wrong != index["weight_map"][f"model.{UP}"]
    index["weight_map"][f"model.{UP}"] = wrong
    (sharded / INDEX).write_text(json.dumps(index))
    refuses(sharded, 3, wrong, UP)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [1]}', "null", b"\xff\xfe"]
)
def test_a_broken_index_is_named(text: str | bytes, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    refuses(sharded, 1, str(sharded / INDEX), "not a safetensors index")


def test_pickled_weights_are_never_read(single: Path) -> None:
    (single / SINGLE).rename(single / "pytorch_model.bin")
    refuses(single, 1, str(single), "pickled", "*.bin", "never read", "save_pretrained")


def test_no_weights_at_all(single: Path) -> None:
    (single / SINGLE).unlink()
    refuses(single, 1, str(single), SINGLE, INDEX)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.0.input_layernorm.weight", UP])
def test_weights_that_are_not_finite_are_named(name: str, value: float, single: Path) -> None:
    change(single, lambda t: t[f"model.{name}"].view(-1)[-1:].fill_(value))
    refuses(single, 3, str(single), name, "NaN or inf")
    if name == UP:
        load(single, 2)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embed_tokens.weight", (258, 32)),
        (UP, (48, 31)),
        # as many numbers, and as a broadcast would have it
        (UP, (32, 48)),
        (UP, (1, 32)),
        ("layers.0.input_layernorm.weight", (1,)),
    ],
    ids=str,
)
def test_shapes_that_the_config_denies_are_named(
    name: str, shape: tuple[int, ...], single: Path
) -> None:
    change(single, lambda t: t.update({f"model.{name}": torch.zeros(shape)}))
    refuses(single, 3, str(single), name, str(list(shape)))


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model."])
def test_the_decoder_may_lie_elsewhere(
    prefix: str, single: Path, originals: dict[str, Path]
) -> None:
    def respell(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)

    change(single, respell)
    expected = load(originals["single"], 2).state_dict()
    actual = load(single, 2).state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_file_without_embeddings_is_no_model(single: Path) -> None:
    change(single, lambda t: t.pop("model.embed_tokens.weight"))
    refuses(single, 1, str(single), "embed_tokens")


def test_weights_are_held_in_the_dtype_asked_for(originals: dict[str, Path]) -> None:
    files = open_model(str(originals["single"]))
    model = load_early(files, 1, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    stored = files.source.read("embed_tokens.weight")
    assert torch.equal(model.decoder.embed_tokens.weight, stored.bfloat16())


def test_an_unknown_family_is_refused_with_those_there_are(single: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    refuses(single, 1, "family 'gpt2' is not supported", "llama, mistral, qwen2")


@pytest.mark.parametrize("text", ["", "{", "nonsense"])
def test_a_broken_config_is_named(text: str, single: Path) -> None:
    (single / "config.json").write_text(text)
    refuses(single, 1, str(single / "config.json"), "not JSON")


def test_a_folder_without_config_is_no_model(single: Path) -> None:
    (single / "config.json").unlink()
    refuses(single, 1, str(single), "no config.json")


ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}


def write_gguf(path: Path, architecture: str, files: ModelFiles, names: list[str]) -> None:
    """As llama.cpp's conversion does: q and k interleaved for llama, gemma's norms plus one."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    stored_names = gguf.get_tensor_name_map(kinds[architecture], files.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    for name in names:
        tensor = files.source.read(name)
        heads = {
            "q_proj": files.config.num_attention_heads,
            "k_proj": files.config.num_key_value_heads,
        }.get(name.split(".")[-2])
        if architecture == "llama" and heads:
            pairs = tensor.shape[0] // heads // 2
            halves = tensor.reshape(heads, 2, pairs, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        stored = stored_names.get_name(f"model.{name}", (".weight", ".bias"))
        writer.add_tensor(stored, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_gguf_gives_back_the_tensors(
    family: str, tiny: Callable[..., ModelFiles], tmp_path: Path
) -> None:
    files = tiny(family, attention_bias=True) if family == "llama" else tiny(family)
    model = load_early(files, 4, dtype=torch.float32, device=torch.device("cpu"))
    tensors = dict(model.decoder.named_parameters())
    path = tmp_path / "model.gguf"
    write_gguf(path, ARCHITECTURES[family], files, list(tensors))

    source = GgufSource(path, files.config)
    assert sorted(source.decoder_names()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert name in source
        # one is added to gemma's norms and taken off again
        torch.testing.assert_close(source.read(name), tensor, rtol=0, atol=3e-7)
    assert "layers.4.mlp.up_proj.weight" not in source
    assert "nothing" not in source


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"GGU"], ids=str)
def test_what_is_no_gguf_file_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: not a GGUF file"):
        open_model(str(path))


def test_a_truncated_gguf_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 8)
    with pytest.raises(UserError, match=re.escape(str(path))):
        open_model(str(path))


def test_a_gguf_file_is_read_once_until_it_changes(
    tiny: Callable[..., ModelFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, written = tmp_path / "model.gguf", tiny("llama")
    write_gguf(path, "llama", written, ["norm.weight"])
    reads: list[str] = []

    def read_config(name: str, path: Path) -> Any:
        reads.append("config")
        return written.config

    def read_tokenizer(name: str, folder: Path, **options: str) -> object:
        reads.append("tokenizer")
        return object()

    monkeypatch.setattr(files_module, "open_gguf_config", read_config)
    monkeypatch.setattr(tokenizer_module, "_tokenizer", read_tokenizer)
    first, second = (open_model(str(path)) for _ in range(2))
    assert first.source is second.source
    assert first.tokenizer is second.tokenizer
    assert reads == ["config", "tokenizer"]
    # what is noted in one is not in the other
    first.config.num_hidden_layers = 1
    assert second.config.num_hidden_layers == open_model(str(path)).config.num_hidden_layers > 1

    write_gguf(path, "llama", written, ["norm.weight", "layers.0.mlp.up_proj.weight"])
    third = open_model(str(path))
    assert "layers.0.mlp.up_proj.weight" in third.source
    assert third.tokenizer is not first.tokenizer
