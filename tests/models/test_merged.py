"""Whole models written here load in transformers and here again, with the adapter in their weights."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tli_engine.errors import UserError
from tli_engine.models import model_folder
from tli_engine.models.files import FAMILIES, ModelFiles, open_model
from tli_engine.models.merged import MergedSource, write_dense, write_model
from tli_engine.models.model_folder import layout_of
from tli_engine.models.peft_format import StoredAdapter
from tli_engine.testing import save_tiny_model

Tiny = Callable[..., ModelFiles]
IDS = torch.arange(40, 60)[None]
MODELS = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("gemma3_text", {"tie_word_embeddings": False}),
]


def adapter_for(files: ModelFiles, rslora: bool = False, r: int = 4) -> StoredAdapter:
    """Random, on two kinds of projection of two blocks."""
    names = [f"layers.{b}.{p}" for b in (0, 2) for p in ("self_attn.q_proj", "mlp.down_proj")]
    tensors = {}
    for name in names:
        rows, columns = files.source.read(f"{name}.weight").shape
        tensors[name] = (0.2 * torch.randn(r, columns), 0.2 * torch.randn(rows, r))
    return StoredAdapter(r, 6.0, rslora, tensors)


def save(adapter: StoredAdapter, folder: Path) -> Path:
    """As PEFT does."""
    from safetensors.torch import save_file

    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": adapter.r,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.rslora,
        "target_modules": sorted(adapter.tensors),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.model.{name}.lora_{letter}.weight": tensor
        for name, halves in adapter.tensors.items()
        for letter, tensor in zip("AB", halves, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(IDS).logits[0]
    return result


def load(folder: Path, **options: Any) -> Any:
    """transformers' model, which must find every tensor in its place."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_a_merged_model_predicts_what_base_and_adapter_do(
    family: str, overrides: dict[str, Any], rslora: bool, tiny: Tiny, tmp_path: Path
) -> None:
    from peft import PeftModel

    files = tiny(family, **overrides)
    adapter = adapter_for(files, rslora)
    out = tmp_path / "out"
    written = write_model(files, MergedSource(files, adapter).read, out)

    before = logits(load(files.folder))
    saved = str(save(adapter, tmp_path / "adapter"))
    expected = logits(PeftModel.from_pretrained(load(files.folder), saved))
    actual = logits(load(out))
    scale = expected.abs().max()
    assert (actual - expected).abs().max() <= 5e-6 * scale
    assert (before - expected).abs().max() > 1e-2 * scale
    # transformers' own names and shapes, and no others
    theirs, ours = (stored_tensors(f) for f in (files.folder, out))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert written.tensors == len(ours)
    assert written.nbytes == sum(t.nbytes for t in ours.values())


def test_half_the_strength_adds_half(tiny: Tiny) -> None:
    files = tiny("llama")
    name = "layers.0.self_attn.q_proj.weight"
    base = files.source.read(name)
    adapter = adapter_for(files)
    whole, half = (MergedSource(files, adapter, s).read(name) - base for s in (1.0, 0.5))
    torch.testing.assert_close(half, whole / 2, rtol=0, atol=1e-6)
    assert whole.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_merged_in_fp32_and_rounded_once(
    dtype: torch.dtype, tiny: Tiny, tmp_path: Path
) -> None:
    wide = tiny("qwen3")
    write_model(wide, wide.source.read, tmp_path / "base", dtype)
    files = open_model(str(tmp_path / "base"))
    adapter = adapter_for(files)
    write_model(files, MergedSource(files, adapter).read, tmp_path / "out")
    merged = open_model(str(tmp_path / "out"))
    for name in layout_of(files.config).shapes:
        expected, actual = files.source.read(name), merged.source.read(name)
        assert actual.dtype == dtype
        if (halves := adapter.tensors.get(name.removesuffix(".weight"))) is not None:
            a, b = (half.double() for half in halves)
            exact = expected.double() + adapter.scaling * (b @ a)
            # half a unit in the last place, and a little for fp32's sums
            bound = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5
            assert ((actual.double() - exact).abs() <= bound).all(), name
        else:
            assert torch.equal(actual, expected), name
    assert load(tmp_path / "out").dtype == dtype


def test_configuration_and_tokenizer_come_along(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    files = tiny("gemma3_text")
    write_model(files, files.source.read, tmp_path / "out")
    stored, written = (
        json.loads((f / "config.json").read_text()) for f in (files.folder, tmp_path / "out")
    )
    assert written == stored
    text = "Maji ni uhai."
    ids = [
        AutoTokenizer.from_pretrained(f)(text).input_ids for f in (files.folder, tmp_path / "out")
    ]
    assert ids[0] == ids[1]
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (files.folder / name).read_bytes()


def test_shards_stay_under_their_size_and_are_all_that_is_held(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tiny("llama")
    save_file, saved, read = model_folder.save_file, 0, 0

    def count(name: str) -> Tensor:
        nonlocal read
        read += 1
        return files.source.read(name)

    def save_counted(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        nonlocal saved
        saved += len(tensors)
        # what was read and is not written yet is one weight, of the next shard
        assert read - saved <= 1
        save_file(tensors, path, **options)

    monkeypatch.setattr(model_folder, "save_file", save_counted)
    limit = 40_000
    written = write_model(files, count, tmp_path / "out", shard_bytes=limit)
    assert saved == read == written.tensors
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == written.files > 3
    assert [s.name for s in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    sizes = [sum(t.nbytes for t in load_file(shard).values()) for shard in shards]
    assert max(sizes) <= limit
    assert sum(sizes) == written.nbytes
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written.nbytes
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(files.folder)))


def test_a_weight_larger_than_a_shard_has_one_of_its_own(tiny: Tiny, tmp_path: Path) -> None:
    files = tiny("llama")
    written = write_model(files, files.source.read, tmp_path / "out", shard_bytes=1)
    assert written.files == written.tensors == len(layout_of(files.config).shapes)
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(files.folder)))


def test_weights_that_share_memory_are_written_each(tiny: Tiny, tmp_path: Path) -> None:
    """Fused training holds q, k and v in one tensor, and the modules' weights are its rows."""
    files = tiny("llama")
    tensors = {name: files.source.read(name) for name in layout_of(files.config).shapes}
    joined = torch.cat([tensors[f"layers.0.self_attn.{p}_proj.weight"] for p in "qkv"])
    rows = joined.requires_grad_().split([32, 16, 16])  # type: ignore[no-untyped-call]
    tensors |= {f"layers.0.self_attn.{p}_proj.weight": r for p, r in zip("qkv", rows, strict=True)}
    write_model(files, tensors, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(files.folder)))


def test_an_earlier_model_is_replaced_whole(tiny: Tiny, tmp_path: Path) -> None:
    files, out = tiny("llama"), tmp_path / "out"
    write_model(files, files.source.read, out, shard_bytes=1)
    write_model(files, files.source.read, out, torch.bfloat16)
    assert [p.name for p in out.glob("*.safetensors")] == ["model.safetensors"]
    assert load(out).dtype == torch.bfloat16
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("full")])
def test_what_fails_leaves_the_earlier_model(
    error: Exception, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, out = tiny("llama"), tmp_path / "out"
    write_model(files, files.source.read, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    save_file = model_folder.save_file
    calls = 0

    def full(*args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        save_file(*args, **options)

    monkeypatch.setattr(model_folder, "save_file", full)
    with pytest.raises(UserError, match=r"out: cannot be written: .*; nothing was kept"):
        write_model(files, files.source.read, out, torch.bfloat16, shard_bytes=40_000)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_weights_that_are_of_no_use_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    files, name = tiny("llama"), "layers.1.mlp.up_proj.weight"
    tensors = {n: files.source.read(n) for n in layout_of(files.config).shapes}
    broken = tensors[name].clone()
    broken[3, 4] = float("nan")
    with pytest.raises(UserError, match=f"{name} holds NaN or inf"):
        write_model(files, tensors | {name: broken}, tmp_path / "out")
    with pytest.raises(UserError, match=rf"{name} is \[48, 31\], its config says \[48, 32\]"):
        write_model(files, tensors | {name: broken[:, 1:]}, tmp_path / "out")
    tensors.pop(name)
    with pytest.raises(KeyError, match=name):
        write_model(files, tensors, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_does_not_fit_is_named(tiny: Tiny) -> None:
    files = tiny("llama")
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    with pytest.raises(UserError, match=r"adapts layers\.9\.self_attn\.q_proj, which .* not have"):
        MergedSource(files, StoredAdapter(4, 8.0, False, {"layers.9.self_attn.q_proj": (a, b)}))
    name = "layers.0.mlp.up_proj"
    source = MergedSource(files, StoredAdapter(4, 8.0, False, {name: (a, b)}))
    with pytest.raises(UserError, match=r"\[48, 32\], and .* \[\[4, 32\], \[32, 4\]\]; is it the"):
        source.read(f"{name}.weight")
    with pytest.raises(UserError, match="has no tensor nothing; is the download complete"):
        source.read("nothing")


def test_an_overflow_in_fp16_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    wide = tiny("llama")
    write_model(wide, wide.source.read, tmp_path / "base", torch.float16)
    files = open_model(str(tmp_path / "base"))
    source = MergedSource(files, adapter_for(files), 1e7)
    with pytest.raises(UserError, match="holds NaN or inf"):
        write_model(files, source.read, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_a_multimodal_model_the_decoder_is_written(tiny: Tiny, tmp_path: Path) -> None:
    files = tiny("gemma3_text")
    folder = tmp_path / "both"
    write_model(files, files.source.read, folder)
    text = json.loads((folder / "config.json").read_text())
    both = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(both | {"text_config": text}))
    multimodal = open_model(str(folder))
    write_model(multimodal, multimodal.source.read, tmp_path / "out")
    assert load(tmp_path / "out").config.architectures == ["Gemma3ForCausalLM"]
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(files.folder)))


def test_a_bare_decoder_with_a_tied_head_becomes_a_causal_model(tmp_path: Path) -> None:
    from transformers import AutoModel

    whole = save_tiny_model(tmp_path / "whole", "llama", tie_word_embeddings=True)
    AutoModel.from_pretrained(whole).save_pretrained(tmp_path / "bare")
    files = replace(open_model(str(tmp_path / "bare")), folder=tmp_path / "bare")
    write_model(files, MergedSource(files).read, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(whole)))


def test_progress_is_told_of_every_weight(tiny: Tiny, tmp_path: Path) -> None:
    files, done = tiny("llama"), []
    write_dense(files, files.source.read, tmp_path, advance=done.append)
    assert sum(done) == len(layout_of(files.config).shapes)
