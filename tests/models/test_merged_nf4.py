"""Models written in NF4, and bases in NF4 or GGUF: bitsandbytes' bytes, and what transformers loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tli_engine import nf4
from tli_engine.models.early import load_early
from tli_engine.models.files import FAMILIES, ModelFiles, open_model
from tli_engine.models.merged import MergedSource, write_model, write_nf4
from tli_engine.models.model_folder import is_stored_in_nf4, layout_of
from tli_engine.models.peft_format import StoredAdapter
from tli_engine.nf4_checkpoint import nf4_state_dict
from tli_engine.nn import NF4Linear

Tiny = Callable[..., ModelFiles]
CPU = torch.device("cpu")
# with AVX-512, bitsandbytes 0.50 misreads rows that are not whole blocks
WHOLE_BLOCKS = {"hidden_size": 64, "intermediate_size": 128}
ADAPTED = "layers.1.mlp.up_proj"


def adapter_for(files: ModelFiles) -> StoredAdapter:
    rows, columns = files.source.read(f"{ADAPTED}.weight").shape
    halves = (0.2 * torch.randn(4, columns), 0.2 * torch.randn(rows, 4))
    return StoredAdapter(4, 8.0, False, {ADAPTED: halves})


def write(
    files: ModelFiles, out: Path, adapter: StoredAdapter | None = None, **options: Any
) -> ModelFiles:
    """The model in NF4, opened again."""
    out.mkdir()
    write_nf4(files, MergedSource(files, adapter), out, **options)
    return open_model(str(out))


def assert_same_bytes(actual: nf4.NF4Weight | None, expected: nf4.NF4Weight | None) -> None:
    assert actual is not None
    assert expected is not None
    a, e = (nf4_state_dict(weight, "weight") for weight in (actual, expected))
    assert a.keys() == e.keys()
    assert all(torch.equal(a[name], tensor) for name, tensor in e.items())


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double-quant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_linear_layers_are_quantised_after_merging(
    family: str, double_quant: bool, tiny: Tiny, tmp_path: Path
) -> None:
    files = tiny(family)
    adapter = adapter_for(files)
    merged = MergedSource(files, adapter)
    written = write(files, tmp_path / "out", adapter, double_quant=double_quant)
    layout = layout_of(files.config)
    assert len(layout.linears) == 4 * 7
    for name in layout.shapes:
        if name in layout.linears:
            expected = nf4.quantize(merged.read(name), double_quant=double_quant)
            assert_same_bytes(written.source.read_nf4(name), expected)
        else:
            assert torch.equal(written.source.read(name), files.source.read(name)), name
    model = load_early(written, 4, dtype=torch.float32, device=CPU)
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == 4 * 7
    assert is_stored_in_nf4(written)
    assert not is_stored_in_nf4(files)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double-quant"])
def test_transformers_loads_it_as_its_own(
    double_quant: bool,
    dtype: torch.dtype,
    tiny: Tiny,
    tmp_path: Path,
) -> None:
    """The files are those of transformers and bitsandbytes' own quantisation and saving."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    pytest.importorskip("accelerate", reason="transformers needs accelerate to quantise")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    wide = tiny("qwen2", **WHOLE_BLOCKS)
    write_model(wide, wide.source.read, tmp_path / "base", dtype)
    files = open_model(str(tmp_path / "base"))
    ours = write(files, tmp_path / "ours", double_quant=double_quant)

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    theirs = AutoModelForCausalLM.from_pretrained(files.folder, quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    saved, written = (
        json.loads((tmp_path / f / "config.json").read_text()) for f in ("theirs", "ours")
    )
    public = {k: v for k, v in saved["quantization_config"].items() if not k.startswith("_")}
    assert written["quantization_config"] == public
    stored = open_model(str(tmp_path / "theirs"))
    assert set(ours.source._shard_of) == set(stored.source._shard_of)  # type: ignore[attr-defined]

    model, info = AutoModelForCausalLM.from_pretrained(ours.folder, output_loading_info=True)
    assert not any(info.values()), info
    for name in layout_of(files.config).linears:
        module = model.get_submodule(f"model.{name.removesuffix('.weight')}")
        assert isinstance(module, bnb.nn.Linear4bit)
        state = module.weight.quant_state
        dequantised = bnb.functional.dequantize_4bit(module.weight.data, state)
        weight = ours.source.read_nf4(name)
        assert weight is not None
        assert dequantised.dtype == dtype
        assert torch.equal(dequantised, weight.dequantize()), name
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        a, e = (m.eval()(ids).logits.float() for m in (model, theirs))
    # bitsandbytes rounds a double quantised absmax to another code in places
    assert (a - e).abs().max() <= (0.05 if double_quant else 0.0) * e.abs().max()


def test_the_parts_of_a_weight_lie_in_one_file(tiny: Tiny, tmp_path: Path) -> None:
    files = tiny("llama")
    write(files, tmp_path / "out", double_quant=True, shard_bytes=1)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    places: dict[str, set[str]] = {}
    for name, file in index["weight_map"].items():
        places.setdefault(name.partition(".weight")[0], set()).add(file)
    assert all(len(found) == 1 for found in places.values())
    assert len(index["weight_map"]) > len(places) == len(set(index["weight_map"].values()))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double-quant"])
def test_an_nf4_base_keeps_the_bytes_that_no_adapter_changes(
    double_quant: bool, tiny: Tiny, tmp_path: Path
) -> None:
    dense = tiny("llama")
    base = write(dense, tmp_path / "base", double_quant=double_quant)
    adapter = adapter_for(base)
    # as the base was quantised, whatever is asked of weights that are not
    again = write(base, tmp_path / "again", adapter, double_quant=not double_quant)
    for name in layout_of(base.config).linears:
        expected = base.source.read_nf4(name)
        assert expected is not None
        if name == f"{ADAPTED}.weight":
            a, b = adapter.tensors[ADAPTED]
            merged = torch.addmm(expected.dequantize(torch.float32), b, a, alpha=2.0)
            expected = nf4.quantize(merged, double_quant=double_quant)
        assert_same_bytes(again.source.read_nf4(name), expected)
    configs = [json.loads((m.folder / "config.json").read_text()) for m in (base, again)]
    assert configs[0] == configs[1]


def test_an_nf4_base_is_merged_from_its_dequantised_values(tiny: Tiny, tmp_path: Path) -> None:
    dense = tiny("llama")
    write_model(dense, dense.source.read, tmp_path / "bf16", torch.bfloat16)
    base = write(open_model(str(tmp_path / "bf16")), tmp_path / "base")
    adapter = adapter_for(base)
    write_model(base, MergedSource(base, adapter).read, tmp_path / "out")
    out = open_model(str(tmp_path / "out"))
    assert not is_stored_in_nf4(out)
    for name in layout_of(base.config).linears:
        stored = base.source.read_nf4(name)
        assert stored is not None
        exact = stored.dequantize(torch.float32)
        if name == f"{ADAPTED}.weight":
            a, b = adapter.tensors[ADAPTED]
            exact = torch.addmm(exact, b, a, alpha=2.0)
        assert torch.equal(out.source.read(name), exact.bfloat16()), name


def test_layers_that_an_nf4_base_leaves_dense_stay_so(tiny: Tiny, tmp_path: Path) -> None:
    """Some checkpoints keep the layers that suffer most; transformers is told which."""
    files = tiny("llama", **WHOLE_BLOCKS)
    base = write(files, tmp_path / "base")
    skipped = "layers.2.mlp.down_proj.weight"

    class Mixed(MergedSource):
        def read_nf4(self, name: str) -> nf4.NF4Weight | None:
            return None if name == skipped else super().read_nf4(name)

        def base_nf4(self, name: str) -> nf4.NF4Weight | None:
            return None if name == skipped else super().base_nf4(name)

    (tmp_path / "mixed").mkdir()
    write_nf4(base, Mixed(base), tmp_path / "mixed")
    # and once more, from files that are like that
    mixed = open_model(str(tmp_path / "mixed"))
    again = write(mixed, tmp_path / "again", adapter_for(mixed))
    assert again.source.read_nf4(skipped) is None
    assert torch.equal(again.source.read(skipped), base.source.read(skipped))
    config = json.loads((again.folder / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["lm_head", "model.layers.2.mlp.down_proj"]
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(again.folder, output_loading_info=True)
    assert not any(info.values()), info
    kinds = [type(model.get_submodule(f"model.layers.{b}.mlp.down_proj")).__name__ for b in (1, 2)]
    assert kinds == ["Linear4bit", "Linear"]


def test_a_base_in_fp64_is_quantised_from_fp32(tiny: Tiny, tmp_path: Path) -> None:
    files = tiny("llama")
    write_model(files, files.source.read, tmp_path / "fp64", torch.float64)
    written = write(open_model(str(tmp_path / "fp64")), tmp_path / "out")
    assert_same_bytes(
        written.source.read_nf4(f"{ADAPTED}.weight"),
        nf4.quantize(files.source.read(f"{ADAPTED}.weight")),
    )
